//! Any commands in any order on a chain that is written and read meanwhile, beside a model of each view's
//! bytes: after each command all views match it, at the end QEMU reads it, and open snapshots keep their
//! bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags};
use serde_json::Value;
use support::active::{Model, rw};
use support::command::Control;
use support::foreign::amount;
use support::*;

const CHAIN: &str = "vm";

/// A chain in a mount, and its expected content.
struct Run {
    mount: Mount,
    control: Control,
    store: Store,
    rng: Rng,
    /// The active disk, while it is open for writing.
    disk: Option<File>,
    active: Model,
    /// By name, internal snapshots by theirs alone: they keep it, whatever happens to their layer.
    views: BTreeMap<String, Vec<u8>>,
    /// Open snapshots, by that name.
    readers: BTreeMap<String, File>,
    /// The commands so far, for a failure.
    done: Vec<String>,
}

/// The name of a view in the model.
fn key(view: &str) -> String {
    view.split_once('@').map_or(view, |(_, snapshot)| snapshot).to_owned()
}

fn pick<'a, T>(rng: &mut Rng, among: &'a [T]) -> &'a T {
    &among[rng.below(among.len() as u64) as usize]
}

impl Run {
    fn new(seed: u64) -> Self {
        let (store, mut rng) = (Store::new(), Rng::new(seed));
        let size = *pick(&mut rng, &[MIB, 3 * MIB, 5 * MIB]);
        let kinds = [
            "cluster_size=512",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=64k,extended_l2=on",
            "cluster_size=64k,compat=0.10",
            "cluster_size=16k,extended_l2=on",
        ];
        let options = *pick(&mut rng, &kinds);
        let mut content = rng.bytes(size);
        for _ in 0..5 {
            let at = rng.below(size);
            content[at as usize..(at + rng.below(MIB)).min(size) as usize].fill(0);
        }
        let plain = store.beside("content");
        fs::write(&plain, &content).expect("the content");
        if rng.below(2) == 0 {
            fs::copy(&plain, store.path("base.raw")).expect("a base");
            store.overlay("vm.qcow2", "base.raw", "raw", options);
        } else {
            let plain = plain.to_str().expect("a plain path");
            store.img(["convert", "-f", "raw", "-O", "qcow2", "-o", options, plain, "base.qcow2"]);
            store.overlay("vm.qcow2", "base.qcow2", "qcow2", options);
        }
        let mount = Mount::new(&store);
        let (control, active) = (Control::of(&mount, CHAIN), Model(content.clone()));
        let (views, readers) = (BTreeMap::from([("base".to_owned(), content)]), BTreeMap::new());
        let done = vec![format!("seed {seed}, {options}, {size} bytes")];
        Self { mount, control, store, rng, disk: None, active, views, readers, done }
    }

    fn snapshot(&self, view: &str) -> std::path::PathBuf {
        self.mount.path(CHAIN).join(format!("snapshots/{view}.raw"))
    }

    /// The layers below the active disk, the uppermost first.
    fn layers(&self) -> Vec<String> {
        let chain: Value = serde_json::from_str(&self.mount.text("vm/info/chain.json")).expect("JSON");
        let layers = chain.as_array().expect("layers").iter().skip(1);
        layers.map(|layer| layer["chainfs"]["view"].as_str().expect("its view").to_owned()).collect()
    }

    /// All snapshots, internal ones as LAYER@NAME.
    fn snapshots(&self) -> Vec<String> {
        let names = self.mount.names("vm/snapshots");
        names.iter().filter_map(|name| name.strip_suffix(".raw")).map(str::to_owned).collect()
    }

    /// Gives a command and waits for its end. A refused one has changed nothing, which the comparison checks.
    fn give(&mut self, command: &str) -> bool {
        let refused = self.control.give(command);
        let state = if refused.is_none() { self.control.wait() } else { self.control.status("error") };
        self.done.push(format!("{command}: {state}"));
        assert_ne!(state, "failed", "{}: {:#?}", self.control.status("error"), self.done);
        refused.is_none()
    }

    fn write(&mut self) {
        let own;
        let disk = if let Some(disk) = &self.disk {
            disk
        } else {
            own = rw(&self.mount.path("vm/active.raw"));
            &own
        };
        let size = self.active.0.len() as u64;
        for _ in 0..=self.rng.below(5) {
            let (at, most) = (self.rng.below(size), *pick(&mut self.rng, &[100, 5000, 70_000, 300_000]));
            let len = most.min(size - at);
            match self.rng.below(4) {
                0 => self.active.zero(disk, FallocateFlags::ZERO_RANGE, at, len),
                1 => self.active.zero(disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len),
                _ => {
                    let bytes = self.rng.bytes(len);
                    self.active.write(disk, at, &bytes);
                }
            }
        }
        self.done.push(format!("write, {}", if self.disk.is_some() { "open" } else { "closed" }));
    }

    /// One step: a command, a change of the disk, or an open or close.
    fn step(&mut self, number: u64) {
        let (layers, snapshots) = (self.layers(), self.snapshots());
        let any = |run: &mut Self, word: &str, among: &[String]| {
            if among.is_empty() || run.rng.below(2) == 0 {
                String::new()
            } else {
                format!(" {word}={}", pick(&mut run.rng, among))
            }
        };
        let maybe = |run: &mut Self, words: &[&str]| {
            if run.rng.below(2) == 0 { String::new() } else { format!(" {}", pick(&mut run.rng, words)) }
        };
        match self.rng.below(20) {
            0..=4 => self.write(),
            5 => {
                if self.give(&format!("snapshot s{number}")) {
                    self.views.insert(format!("s{number}"), self.active.0.clone());
                }
            }
            6..=8 => {
                if self.give(&format!("snapshot i{number} internal")) {
                    self.views.insert(format!("i{number}"), self.active.0.clone());
                }
            }
            9 => {
                let top = any(self, "top", &layers);
                let discard = maybe(self, &["discard-internal"]);
                // The layer below shows top's bytes.
                if self.give(&format!("commit{top}{discard}"))
                    && let Some(top) = top.strip_prefix(" top=")
                {
                    let place = layers.iter().position(|layer| layer == top).expect("a layer");
                    self.views.insert(layers[place + 1].clone(), self.views[top].clone());
                }
            }
            10 => {
                let (base, into) = (any(self, "base", &layers), any(self, "into", &layers));
                let delete = maybe(self, &["delete"]);
                self.give(&format!("pull{base}{into}{delete}"));
            }
            11 | 12 if !snapshots.is_empty() => {
                let method = maybe(self, &["method=commit", "method=pull"]);
                let discard = maybe(self, &["discard-internal"]);
                let name = pick(&mut self.rng, &snapshots).clone();
                self.give(&format!("delete {name}{method}{discard}"));
            }
            13 if !snapshots.is_empty() => {
                self.disk = None;
                let to = pick(&mut self.rng, &snapshots).clone();
                let saved = format!("v{number}");
                let save = maybe(self, &[&format!("save={saved}")]);
                if self.give(&format!("revert to={to}{save}")) {
                    let was = std::mem::replace(&mut self.active.0, self.views[&key(&to)].clone());
                    self.views.insert(saved, was);
                }
            }
            14 => {
                let more = *pick(&mut self.rng, &[512, 4096, 69_632]);
                if self.give(&format!("resize +{more}")) {
                    let size = self.active.0.len() + more;
                    self.active.0.resize(size, 0);
                }
            }
            15 => {
                let bases: Vec<String> = layers.iter().cloned().chain(["none".to_owned()]).collect();
                let base = pick(&mut self.rng, &bases).clone();
                self.give(&format!("rebase base={base}"));
            }
            16 if !snapshots.is_empty() => {
                let from = pick(&mut self.rng, &snapshots).clone();
                if self.give(&format!("clone c{number} from={from}")) {
                    self.judge_clone(&format!("c{number}"), &from);
                }
            }
            17 if !snapshots.is_empty() => {
                let view = pick(&mut self.rng, &snapshots).clone();
                let open = File::open(self.snapshot(&view)).expect("a snapshot");
                self.done.push(format!("open {view}"));
                self.readers.insert(key(&view), open);
            }
            18 => {
                self.done.push("close all".into());
                self.readers.clear();
            }
            _ => {
                self.done.push("open or close the disk".into());
                self.disk =
                    if self.disk.is_none() { Some(rw(&self.mount.path("vm/active.raw"))) } else { None };
            }
        }
        self.judge();
    }

    /// A clone shows its source's bytes; then it is removed.
    fn judge_clone(&self, name: &str, from: &str) {
        let disk = self.mount.path(name).join("active.raw");
        eventually("the clone is there", || disk.exists());
        assert!(
            fs::read(disk).expect("a clone") == self.views[&key(from)],
            "clone of {from}: {:#?}",
            self.done
        );
        let made =
            fs::read_dir(self.store.root()).expect("the store").map(|entry| entry.expect("an entry").path());
        for image in made.filter(|path| path.file_stem().is_some_and(|stem| stem == name)) {
            fs::remove_file(image).expect("a clone");
        }
        eventually("the clone has gone", || !self.mount.path(name).exists());
    }

    fn judge(&mut self) {
        // From the kernel's pages, or without them.
        let anew = self.rng.below(2) == 0;
        let read = |path: &Path| -> Vec<u8> {
            let file = File::open(path).expect("a view");
            if anew {
                rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("no pages");
            }
            let mut bytes = vec![0; file.metadata().expect("its size").len() as usize];
            file.read_exact_at(&mut bytes, 0).expect("its bytes");
            bytes
        };
        let done = &self.done;
        let same = |what: &str, have: &[u8], want: &[u8]| {
            let differs = first_difference(have, want);
            assert!(
                have == want,
                "{what}: {} bytes of {}, differs at {differs:?}: {done:#?}",
                have.len(),
                want.len()
            );
        };
        same("active", &read(&self.mount.path("vm/active.raw")), &self.active.0);
        for view in self.snapshots() {
            same(&view, &read(&self.snapshot(&view)), &self.views[&key(&view)]);
        }
        for (name, open) in &self.readers {
            let mut bytes = vec![0; self.views[name].len()];
            open.read_exact_at(&mut bytes, 0).expect("what is open");
            same(&format!("{name}, open"), &bytes, &self.views[name]);
        }
    }

    fn end(mut self) {
        self.readers.clear();
        self.disk = None;
        eventually("nobody has it open", || {
            self.control.give("snapshot last").is_none() && self.control.wait() == "done"
        });
        self.views.insert("last".into(), self.active.0.clone());
        let chain: Value = serde_json::from_str(&self.mount.text("vm/info/chain.json")).expect("JSON");
        let text = |key: &str| chain[0][key].as_str().expect("a text").to_owned();
        let leaf = text("filename");
        let leaf = Path::new(&leaf).file_name().and_then(|name| name.to_str()).expect("a name");
        let views = views_of(&self.store, leaf, &text("format"));
        for view in &views {
            let name = view.name.trim_start_matches("snapshots/").trim_end_matches(".raw");
            let path = self.store.try_oracle(&view.image, &view.format, view.snapshot.as_deref());
            let read =
                fs::read(path.unwrap_or_else(|e| panic!("QEMU cannot read {view:?}: {e}"))).expect("a disk");
            let want = if name == "active" { &self.active.0 } else { &self.views[&key(name)] };
            // QEMU reads a snapshot at the disk's present size, be that more or less.
            let len = read.len().min(want.len());
            assert!(
                read[..len] == want[..len] && (view.snapshot.is_some() || read.len() == want.len()),
                "QEMU reads something else in {view:?}: {:#?}",
                self.done
            );
        }
        assert_eq!(views.len(), self.snapshots().len() + 1, "{views:?}: {:#?}", self.done);
        self.mount.umount();
        for entry in fs::read_dir(self.store.root()).expect("the store") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                self.store.img(["check", "-q", path.to_str().expect("a plain path")]);
            }
        }
    }
}

#[test]
fn every_view_keeps_its_bytes_under_any_sequence_of_commands() {
    for seed in 0..amount(5, 150) {
        let mut run = Run::new(seed);
        run.judge();
        for number in 0..amount(30, 60) {
            run.step(number);
        }
        run.end();
    }
}
