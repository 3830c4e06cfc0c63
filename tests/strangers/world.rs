//! The store, the model of it, and everything that may happen.
//!
//! The model holds, for each file of the store, the disk that it has to show once its damage is undone. Guests change
//! that by writing, commands as their plans say, and nothing else does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::ops::{Engine, JobState, Plan, Request, Verb};
use chainfs::store::{Access, Store, StoreOptions, ViewPart};

use super::super::common::lab::run;
use super::super::common::{Outcome as _, Rng, tool};
use super::damage::Damage;
use super::host::Mortal;
use super::reader::{Reader, is_raw};

/// Bytes of a disk.
const SIZE: u64 = 64 << 10;
/// How qcow2 images of the model are made: many clusters in few bytes.
const OPTIONS: &str = "cluster_size=4k";
/// More images than this are not made.
const MAX_IMAGES: usize = 14;
/// No recovery takes longer.
const LIMIT: Duration = Duration::from_mins(1);

/// What has happened, so that a run in which nothing did is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) steps: u64,
    pub(crate) writes: u64,
    pub(crate) denied_writes: u64,
    pub(crate) done: u64,
    pub(crate) refused: u64,
    pub(crate) killed: u64,
    /// Of these, how many stores were whole when they were opened again, and in how many something stayed hidden.
    pub(crate) resumed: u64,
    pub(crate) hidden: u64,
    pub(crate) copied: u64,
    pub(crate) damaged: u64,
    pub(crate) compared: u64,
    /// Raw disks that are frozen, and nothing stands on them any more.
    pub(crate) stranded: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.writes += other.writes;
        self.denied_writes += other.denied_writes;
        self.done += other.done;
        self.refused += other.refused;
        self.killed += other.killed;
        self.resumed += other.resumed;
        self.hidden += other.hidden;
        self.copied += other.copied;
        self.damaged += other.damaged;
        self.compared += other.compared;
        self.stranded += other.stranded;
    }
}

/// A command that was cut off.
struct Pending {
    command: String,
    /// Files that may show other bytes now: what each of them may show.
    legal: BTreeMap<String, Vec<Vec<u8>>>,
    /// Files that may be gone, or have another name.
    leaving: BTreeSet<String>,
    /// Raw files that it freezes, by the names that they have then.
    freezing: BTreeSet<String>,
}

/// One run.
pub(crate) struct World {
    scratch: tempfile::TempDir,
    root: PathBuf,
    rng: Rng,
    store: Option<(Arc<Store>, Arc<Engine>, Mortal)>,
    /// By name: the disk that the file has to show.
    disks: BTreeMap<String, Vec<u8>>,
    /// Overlays in formats that the model cannot read itself.
    foreign: BTreeMap<String, (&'static str, Vec<u8>)>,
    damage: BTreeMap<String, Damage>,
    /// Overlays that name their backing file in a way that is not followed.
    odd: BTreeSet<String>,
    /// Raw files that a snapshot has frozen.
    frozen: BTreeSet<String>,
    /// What stood in the list of frozen files before it was damaged, and after.
    freeze_list: Option<(Vec<u8>, Option<Vec<u8>>)>,
    /// Files that others look at first: those of a command that was cut off.
    focus: Vec<String>,
    /// Names at which another file has come since a command was cut off.
    replaced: BTreeSet<String>,
    number: u64,
    log: Vec<String>,
    pub(crate) tally: Tally,
}

fn options() -> StoreOptions {
    StoreOptions { notify: false, cache: 4 << 20, ..StoreOptions::default() }
}

/// Whether a kind of change is left out, to find out which one a fault needs.
fn is_without(what: &str) -> bool {
    std::env::var("CHAINFS_WITHOUT").is_ok_and(|list| list.split(',').any(|word| word == what))
}

fn is_tail_zero(bytes: &[u8], from: usize) -> bool {
    bytes.get(from..).unwrap_or_default().iter().all(|byte| *byte == 0)
}

/// Whether `have` is `want`, made longer with zeroes or shorter by zeroes.
fn is_same_disk(have: &[u8], want: &[u8]) -> bool {
    let common = have.len().min(want.len());
    have[..common] == want[..common] && is_tail_zero(have, common) && is_tail_zero(want, common)
}

/// Files whose own bytes a plan changes.
fn changed_files(plan: &Plan, before: &[(String, String, bool)]) -> Vec<String> {
    let is_invalid = |name: &str| plan.invalid.iter().any(|invalid| invalid == name.as_bytes());
    let removed: Vec<String> = plan.removed.iter().map(|path| path.display().to_string()).collect();
    let changed = before.iter().filter(|(view, file, _)| is_invalid(view) && !removed.contains(file));
    changed.map(|(_, file, _)| file.clone()).collect()
}

/// Whether a command changes something although the chain stays as it is.
fn is_small(request: &Request) -> bool {
    matches!(request.verb(), Verb::Clone | Verb::Resize)
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let scratch = tempfile::Builder::new().prefix("chainfs-test-").tempdir().expect("a temporary directory");
        let root = scratch.path().join("store");
        fs::create_dir(&root).expect("a store");
        let mut world = Self {
            root,
            scratch,
            rng: Rng::new(seed),
            store: None,
            disks: BTreeMap::new(),
            foreign: BTreeMap::new(),
            damage: BTreeMap::new(),
            odd: BTreeSet::new(),
            frozen: BTreeSet::new(),
            freeze_list: None,
            focus: Vec::new(),
            replaced: BTreeSet::new(),
            number: 0,
            log: vec![format!("seed {seed}")],
            tally: Tally::default(),
        };
        world.base();
        for _ in 0..2 + world.rng.below(3) {
            world.overlay();
        }
        world.open();
        world
    }

    fn say(&mut self, what: impl Into<String>) {
        self.log.push(what.into());
    }

    fn fail(&self, why: &str) -> ! {
        let list = tool("ls").args(["-lAiR", "--time-style=+%T"]).arg(&self.root).succeeds();
        panic!("{why}\n  {}\n{list}", self.log.join("\n  "));
    }

    fn pick(&mut self, among: &[String]) -> Option<String> {
        let first: Vec<&String> = among.iter().filter(|name| self.focus.contains(name)).collect();
        if !first.is_empty() && self.rng.below(4) > 0 {
            return Some(first[self.rng.below(first.len() as u64) as usize].clone());
        }
        (!among.is_empty()).then(|| among[self.rng.below(among.len() as u64) as usize].clone())
    }

    fn reader(&self) -> Reader<'_> {
        Reader { root: &self.root, damage: &self.damage }
    }

    fn names(&self) -> Vec<String> {
        self.disks.keys().cloned().collect()
    }

    fn next(&mut self, stem: &str) -> String {
        self.number += 1;
        format!("{stem}{}", self.number)
    }

    fn content(&mut self) -> Vec<u8> {
        let mut content = self.rng.bytes(SIZE);
        let at = self.rng.below(SIZE);
        let end = (at + self.rng.below(SIZE)).min(SIZE);
        content[at as usize..end as usize].fill(0);
        content
    }

    fn img(&self, args: &[&str]) {
        tool("qemu-img").args(args).current_dir(&self.root).succeeds();
    }

    /// Those whose disk rests on `name`, directly.
    fn overlays_of(&self, name: &str) -> Vec<String> {
        let reader = self.reader();
        // Of a command that was cut off there may be files that the model does not know yet.
        let mut others = self.files_present();
        others.extend(self.names());
        others.remove(name);
        let mut found: Vec<String> =
            others.into_iter().filter(|other| reader.backing(other).as_deref() == Some(name)).collect();
        found.extend(self.foreign.iter().filter(|(_, (_, disk))| !disk.is_empty()).filter_map(|(other, _)| {
            let base = fs::read_to_string(self.beside(other)).ok()?;
            (base == name).then(|| other.clone())
        }));
        found
    }

    /// The names of all regular files of the store's own directory.
    fn files_present(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.root).expect("the store").map(|entry| entry.expect("an entry"));
        let files = entries.filter(|entry| entry.file_type().expect("its type").is_file());
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Of these, images of which the model does not know yet.
    fn unknown_files(&self) -> Vec<String> {
        let is_known = |name: &String| {
            self.disks.contains_key(name)
                || self.foreign.contains_key(name)
                || name.starts_with(".chainfs")
                || name.ends_with(".invalid")
                || self.damage.values().any(|damage| damage.present_name() == Some(name))
        };
        self.files_present().into_iter().filter(|name| !is_known(name)).collect()
    }

    /// Where the model notes on what a foreign overlay rests.
    fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(format!("{name}.base"))
    }

    /// Whether all of a file's chain is there and sound.
    fn is_sound(&self, name: &str) -> bool {
        let mut at = Some(name.to_owned());
        for _ in 0..40 {
            let Some(name) = at else { return true };
            if self.damage.contains_key(&name) || self.odd.contains(&name) || !self.disks.contains_key(&name) {
                return false;
            }
            at = self.reader().backing(&name);
        }
        false
    }

    // What other programs do.

    fn base(&mut self) {
        let content = self.content();
        let name = self.next("b");
        if self.rng.below(2) == 0 {
            self.raw_base(format!("{name}.raw"), content);
        } else {
            let (name, plain) = (format!("{name}.qcow2"), self.scratch.path().join("plain"));
            fs::write(&plain, &content).expect("the content");
            let plain = plain.to_str().expect("a plain path");
            self.img(&["convert", "-f", "raw", "-O", "qcow2", "-o", OPTIONS, plain, &name]);
            self.say(format!("a new base {name}"));
            self.disks.insert(name, content);
        }
    }

    fn raw_base(&mut self, name: String, content: Vec<u8>) {
        fs::write(self.root.join(&name), &content).expect("a base");
        self.say(format!("a new base {name}"));
        self.disks.insert(name, content);
    }

    /// Another program makes an overlay on any image, in any of the ways in which QEMU can name a file.
    fn overlay(&mut self) {
        let sound: Vec<String> = self.names().into_iter().filter(|name| self.is_sound(name)).collect();
        let Some(base) = self.pick(&sound) else { return };
        let Some(disk) = self.reader().disk(&base) else { return };
        let format = if is_raw(&base) { "raw" } else { "qcow2" };
        let stem = self.next("o");
        let (name, kind) = match if is_without("foreign") { 9 } else { self.rng.below(12) } {
            0 => (format!("{stem}.qed"), "qed"),
            1 => (format!("{stem}.qcow"), "qcow"),
            _ => (format!("{stem}.qcow2"), "qcow2"),
        };
        let backing = match if is_without("odd") { 7 } else { self.rng.below(8) } {
            0 => self.root.join(&base).display().to_string(),
            1 => {
                let link = format!("{stem}-link.{format}");
                symlink(self.root.join(&base), self.root.join(&link)).expect("a link");
                link
            }
            2 => {
                let link = format!("{stem}-link.{format}");
                symlink(&base, self.root.join(&link)).expect("a link");
                link
            }
            3 if kind == "qcow2" => {
                format!(r#"json:{{"driver":"{format}","file":{{"driver":"file","filename":"{base}"}}}}"#)
            }
            _ => base.clone(),
        };
        let size = disk.len().to_string();
        let mut args = vec!["create", "-q", "-u", "-f", kind, "-b", &backing, "-F", format];
        if kind == "qcow2" {
            args.extend(["-o", OPTIONS]);
        }
        args.extend([name.as_str(), size.as_str()]);
        self.img(&args);
        self.say(format!("another program: {name} on {base} by {backing}"));
        if backing.starts_with("json:") || backing.contains("-link") {
            self.odd.insert(name.clone());
        }
        if kind == "qcow2" {
            let Some(disk) = self.reader().disk(&name) else { self.fail("the model cannot read an overlay") };
            self.disks.insert(name, disk);
        } else {
            fs::write(self.beside(&name), &base).expect("a note");
            self.foreign.insert(name, (kind, disk));
        }
    }

    fn damage(&mut self) {
        let whole: Vec<String> = self
            .names()
            .into_iter()
            .filter(|name| !is_raw(name) && !self.damage.contains_key(name))
            .filter(|name| fs::metadata(self.root.join(name)).is_ok_and(|found| found.nlink() == 1))
            .collect();
        let Some(name) = self.pick(&whole) else { return };
        let is_leaf = self.overlays_of(&name).is_empty() && self.is_named_plainly(&name);
        let damage = Damage::cause(&self.root, &name, is_leaf, &mut self.rng);
        self.say(format!("damage: {name}: {damage:?}"));
        self.damage.insert(name, damage);
        self.tally.damaged += 1;
    }

    /// Whether no link of the store leads to it.
    fn is_named_plainly(&self, name: &str) -> bool {
        let entries = fs::read_dir(&self.root).expect("the store").map(|entry| entry.expect("an entry").path());
        entries.filter_map(|path| fs::read_link(path).ok()).all(|target| !target.ends_with(name))
    }

    fn mend(&mut self) {
        let damaged: Vec<String> = self.damage.keys().cloned().collect();
        let Some(name) = self.pick(&damaged) else { return };
        self.say(format!("mended: {name}"));
        self.damage.remove(&name).expect("its damage").undo(&self.root, &name);
    }

    /// Files on which nothing rests.
    fn free(&self) -> Vec<String> {
        let is_free = |name: &String| self.overlays_of(name).is_empty() && !self.damage.contains_key(name);
        self.names().into_iter().filter(is_free).collect()
    }

    /// A file that nothing rests on goes, and perhaps another of that name comes.
    fn replace(&mut self) {
        let free = self.free();
        if let Some(name) = self.pick(&free) {
            let is_gone = self.rng.below(2) == 0;
            self.replace_this(name, is_gone);
        }
    }

    /// Others come in the place of all files of a command that was cut off on which nothing rests.
    fn replace_all(&mut self) {
        for name in self.free().into_iter().filter(|name| self.focus.contains(name)).collect::<Vec<_>>() {
            self.replace_this(name, false);
        }
    }

    fn replace_this(&mut self, name: String, is_gone: bool) {
        let path = self.root.join(&name);
        self.disks.remove(&name);
        self.frozen.remove(&name);
        if is_gone {
            fs::remove_file(&path).expect("a file of the store");
            return self.say(format!("another program removes {name}"));
        }
        let content = self.content();
        let mut bytes = content.clone();
        if !is_raw(&name) {
            let [plain, image] = ["plain", "image"].map(|name| self.scratch.path().join(name));
            fs::write(&plain, &content).expect("the content");
            let [plain, image] = [&plain, &image].map(|path| path.to_str().expect("a plain path"));
            self.img(&["convert", "-f", "raw", "-O", "qcow2", "-o", OPTIONS, plain, image]);
            bytes = fs::read(image).expect("another image");
        }
        // At once: some file systems then give it the same inode number.
        fs::remove_file(&path).expect("a file of the store");
        fs::write(&path, bytes).expect("another file");
        self.say(format!("another program puts another {name} in its place"));
        self.replaced.insert(name.clone());
        self.disks.insert(name, content);
    }

    /// A raw disk is frozen by a snapshot, and another program removes all that stands on it: it is a leaf again.
    fn strand(&mut self) {
        let is_raw_leaf = |world: &Self, chain: &String| {
            world.layers(chain).first().is_some_and(|leaf| is_raw(&leaf.1) && world.disks.contains_key(&leaf.1))
        };
        let mut chains: Vec<String> = self.chains().into_iter().filter(|chain| is_raw_leaf(self, chain)).collect();
        if chains.is_empty() && self.disks.len() < MAX_IMAGES {
            let (content, stem) = (self.content(), self.next("b"));
            self.raw_base(format!("{stem}.raw"), content);
            let (store, ..) = self.store.as_ref().expect("an open store");
            store.rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
            chains.push(stem);
        }
        if let Some(chain) = self.pick(&chains) {
            let name = self.next("s");
            self.give_this(&chain, &format!("snapshot {name}"));
        }
        let frozen: Vec<String> = self.frozen.iter().cloned().collect();
        let Some(name) = self.pick(&frozen) else { return };
        let overlays = self.overlays_of(&name);
        let is_free = |world: &Self, other: &String| {
            world.disks.contains_key(other) && !world.damage.contains_key(other) && world.overlays_of(other).is_empty()
        };
        if !overlays.iter().all(|other| is_free(self, other)) {
            return;
        }
        for other in &overlays {
            fs::remove_file(self.root.join(other)).expect("an overlay");
            self.disks.remove(other);
            self.odd.remove(other);
        }
        self.say(format!("another program removes all that stands on {name}: {overlays:?}"));
        self.tally.stranded += 1;
        if self.freeze_list.is_none() && self.rng.below(2) == 0 {
            self.spoil_freeze_list();
        }
    }

    fn protect(&mut self) {
        let names = self.names();
        let Some(name) = self.pick(&names) else { return };
        let path = self.root.join(self.damage.get(&name).and_then(Damage::present_name).unwrap_or(&name));
        let Ok(found) = fs::metadata(&path) else { return };
        if self.rng.below(3) == 0 {
            let number = self.next("h");
            if found.nlink() == 1 && !self.damage.contains_key(&name) {
                fs::hard_link(&path, self.scratch.path().join(number)).expect("another name");
                self.say(format!("another program gives {name} a second name"));
            }
            return;
        }
        let mode = if found.permissions().mode() & 0o222 == 0 { 0o644 } else { 0o444 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("another mode");
        self.say(format!("another program: mode of {name} is {mode:o}"));
    }

    fn spoil_freeze_list(&mut self) {
        let list = self.root.join(".chainfs/frozen.toml");
        if let Some((saved, damaged)) = self.freeze_list.take() {
            if fs::read(&list).ok() != damaged {
                // What was left of it could be used, and has been since.
                return;
            }
            fs::write(&list, saved).expect("the list");
            return self.say("the list of frozen files is mended");
        }
        let Ok(saved) = fs::read(&list) else { return };
        match self.rng.below(4) {
            0 => fs::write(&list, "][").expect("the list"),
            1 => fs::write(&list, "").expect("the list"),
            2 => fs::write(&list, &saved[..saved.len() / 2]).expect("the list"),
            _ => fs::remove_file(&list).expect("the list"),
        }
        self.say("the list of frozen files is damaged");
        self.freeze_list = Some((saved, fs::read(&list).ok()));
    }

    /// A note of what was begun is damaged: what it speaks of is not known any more.
    fn spoil_intent(&mut self) {
        let Ok(entries) = fs::read_dir(self.root.join(".chainfs/intents")) else { return };
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let Some(path) = paths.filter(|path| path.extension().is_some_and(|found| found == "toml")).min() else {
            return;
        };
        let Ok(text) = fs::read(&path) else { return };
        let what = match self.rng.below(4) {
            0 => Vec::new(),
            1 => text[..text.len() / 2].to_vec(),
            2 => text[..text.len() - text.len() / 8].to_vec(),
            _ => String::from_utf8_lossy(&text).replacen("version = ", "version = 9", 1).into_bytes(),
        };
        fs::write(&path, what).expect("the note");
        self.say("the note of what was begun is damaged");
    }

    // What goes through the store.

    fn open(&mut self) {
        let host = Mortal::new();
        let store = Store::open_on(&self.root, options(), Arc::new(host.clone()));
        let store = store.unwrap_or_else(|error| self.fail(&format!("opening the store: {error}")));
        let engine = Engine::new(&store);
        engine.resume();
        self.store = Some((store, engine, host));
        self.await_jobs();
    }

    fn close(&mut self) {
        let (_, engine, _) = self.store.take().expect("an open store");
        engine.stop();
    }

    fn await_jobs(&self) {
        let (store, engine, _) = self.store.as_ref().expect("an open store");
        let start = Instant::now();
        let chains: BTreeSet<PathBuf> = store
            .catalog()
            .intents
            .iter()
            .map(|found| found.intent.chain.clone())
            .chain(store.catalog().chains().map(|(path, _)| path))
            .collect();
        for chain in chains {
            loop {
                let status = engine.status(&chain);
                if status.state != JobState::Running {
                    break;
                }
                if start.elapsed() > LIMIT {
                    self.fail("a job hangs");
                }
                engine.wait(&chain, status.version, Duration::from_millis(100));
            }
        }
        store.rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
    }

    fn chains(&self) -> Vec<String> {
        let (store, ..) = self.store.as_ref().expect("an open store");
        store.catalog().chains().map(|(path, _)| path.display().to_string()).collect()
    }

    /// The names of a chain's layers: view and file, top first.
    fn layers(&self, chain: &str) -> Vec<(String, String, bool)> {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let catalog = store.catalog();
        let Some(leaf) = catalog.chain(Path::new(chain)) else { return Vec::new() };
        let views = store.chain_views(&catalog, leaf);
        let layers = views.views.iter().filter(|view| view.snapshot.is_none());
        let file = |layer: usize| catalog.images[views.layers[layer]].place.path.display().to_string();
        layers.map(|view| (String::from_utf8_lossy(&view.name).into_owned(), file(view.layer), view.active)).collect()
    }

    /// A guest writes to any active disk.
    fn write(&mut self) {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let store = Arc::clone(store);
        let chains = self.chains();
        let Some(chain) = self.pick(&chains) else { return };
        let Some((_, file, true)) = self.layers(&chain).into_iter().next() else { return };
        if self.damage.values().any(|damage| damage.present_name() == Some(&file)) {
            // By the name that it has now it is a raw disk, to whoever writes it.
            return;
        }
        if !self.disks.contains_key(&file) {
            self.fail(&format!("{file} is an active disk, and no image of the store"));
        }
        let catalog = store.catalog();
        let Some(leaf) = catalog.chain(Path::new(&chain)) else { return };
        let views = store.chain_views(&catalog, leaf);
        let Some(active) = views.active() else { return };
        let id = store.view_id(&catalog, &Arc::new(PathBuf::from(&chain)), &views, active, false);
        let opened = store.open_writable(&id, Access::ReadWrite);
        let disk = match opened {
            Ok(disk) => disk,
            Err(error) => {
                self.tally.denied_writes += 1;
                return self.say(format!("{file} cannot be written: {error}"));
            }
        };
        if self.frozen.contains(&file) {
            self.fail(&format!("{file} was frozen, and can be written"));
        }
        for _ in 0..=self.rng.below(6) {
            let size = self.disks[&file].len() as u64;
            let at = self.rng.below(size);
            let len = (1 + self.rng.below(9000)).min(size - at);
            let bytes = self.rng.bytes(len);
            match disk.write_at(at, &bytes) {
                Ok(written) => {
                    let known = self.disks.get_mut(&file).expect("its disk");
                    known[at as usize..at as usize + written].copy_from_slice(&bytes[..written]);
                    self.tally.writes += 1;
                }
                Err(error) => {
                    self.tally.denied_writes += 1;
                    self.say(format!("{file} was not written: {error}"));
                    break;
                }
            }
        }
        let _ = disk.flush();
        self.say(format!("a guest writes {file}"));
    }

    fn command(&mut self) -> Option<(String, String)> {
        let chains = self.chains();
        let chain = self.pick(&chains)?;
        let layers = self.layers(&chain);
        if layers.iter().any(|layer| self.damage.values().any(|damage| damage.present_name() == Some(&layer.1))) {
            return None;
        }
        let names: Vec<String> = layers.iter().filter(|layer| !layer.2).map(|layer| layer.0.clone()).collect();
        let number = self.next("");
        // Two layers of which the first is above the second; no name for the active one.
        let pair = |world: &mut Self| {
            if layers.len() < 2 || world.rng.below(4) == 0 {
                return None;
            }
            let lower = 1 + world.rng.below(layers.len() as u64 - 1) as usize;
            let upper = &layers[world.rng.below(lower as u64) as usize];
            Some(((!upper.2).then(|| upper.0.clone()), layers[lower].0.clone()))
        };
        let any = |world: &mut Self, word: &str| match world.pick(&names) {
            Some(name) if world.rng.below(3) > 0 => format!(" {word}={name}"),
            _ => String::new(),
        };
        let is_raw_leaf = layers.first().is_some_and(|leaf| is_raw(&leaf.1));
        let command = match self.rng.below(16) {
            0..=2 | 8 if is_raw_leaf => format!("snapshot s{number}"),
            0..=2 => format!("snapshot s{number}"),
            3..=6 => {
                let (top, base) = match pair(self) {
                    Some((top, base)) => {
                        (top.map_or(String::new(), |top| format!(" top={top}")), format!(" base={base}"))
                    }
                    None => (any(self, "top"), any(self, "base")),
                };
                let keep = if self.rng.below(5) == 0 { " keep" } else { "" };
                format!("commit{top}{base}{keep}")
            }
            7..=9 => {
                let (base, into) = match pair(self) {
                    Some((into, base)) => {
                        (format!(" base={base}"), into.map_or(String::new(), |into| format!(" into={into}")))
                    }
                    None => (any(self, "base"), any(self, "into")),
                };
                let delete = if self.rng.below(2) == 0 { " delete" } else { "" };
                format!("pull{base}{into}{delete}")
            }
            10 | 11 => {
                let method = ["", " method=commit", " method=pull"][self.rng.below(3) as usize];
                format!("delete {}{method}", self.pick(&names)?)
            }
            12 => {
                let save = if self.rng.below(2) == 0 { format!(" save=v{number}") } else { String::new() };
                format!("revert to={}{save}", self.pick(&names)?)
            }
            13 => format!("rebase{}{}", any(self, "layer"), {
                let base = any(self, "base");
                if base.is_empty() { " base=none".to_owned() } else { base }
            }),
            14 => format!("clone c{number}{}", any(self, "from")),
            _ => format!("resize +{}", 512 * (1 + self.rng.below(8))),
        };
        Some((chain, command))
    }

    /// What a command would do, if it makes sense; `None` if not.
    fn plan(&self, chain: &str, command: &str) -> Option<(Request, Plan)> {
        let (_, engine, _) = self.store.as_ref().expect("an open store");
        let request = Request::parse_command(command.as_bytes()).ok()?;
        let plan = engine.plan(Path::new(chain), &request).ok()?;
        Some((request, plan))
    }

    fn give(&mut self) {
        let found = match self.rng.below(3) {
            0 => self.command(),
            _ => self.sensible().map(|(chain, command, _)| (chain, command)),
        };
        if let Some((chain, command)) = found {
            self.give_this(&chain, &command);
        }
    }

    fn give_this(&mut self, chain: &str, command: &str) {
        let before = self.layers(chain);
        let Some((request, plan)) = self.plan(chain, command) else { return };
        let changed = changed_files(&plan, &before);
        let (_, engine, _) = self.store.as_ref().expect("an open store");
        let engine = Arc::clone(engine);
        let status = run(&engine, chain, command);
        let outcome = match &status {
            Ok(status) if status.state == JobState::Done => Ok(()),
            Ok(status) => Err(status.error.clone().unwrap_or_default()),
            Err(error) => Err(error.to_string()),
        };
        self.say(format!("{chain}: {command}: {outcome:?}"));
        self.await_jobs();
        if outcome.is_err() {
            self.tally.refused += 1;
            return;
        }
        self.tally.done += 1;
        for file in &changed {
            let Ok(found) = fs::metadata(self.root.join(file)) else { continue };
            if found.nlink() > 1 || found.permissions().mode() & 0o222 == 0 {
                self.fail(&format!("{file} was changed, which is protected"));
            }
        }
        self.follow(&request, &plan, &before);
    }

    /// A command that makes sense now, if one is found.
    fn sensible(&mut self) -> Option<(String, String, Plan)> {
        for _ in 0..8 {
            let Some((chain, command)) = self.command() else { continue };
            match self.plan(&chain, &command) {
                Some((request, plan))
                    if plan.refusals.is_empty() && (plan.before != plan.after || is_small(&request)) =>
                {
                    return Some((chain, command, plan));
                }
                _ => {}
            }
        }
        None
    }

    /// A command is done: the model follows, as the plan has said.
    fn follow(&mut self, request: &Request, plan: &Plan, before: &[(String, String, bool)]) {
        let text = |path: &PathBuf| path.display().to_string();
        let old = self.disks.clone();
        let verb = request.verb();
        let file_of = |view: &str| before.iter().find(|layer| layer.0 == view).map(|layer| layer.1.clone());
        // The names first.
        for (from, to) in &plan.renamed {
            let (from, to) = (text(from), text(to));
            if let Some(disk) = self.disks.remove(&from) {
                self.disks.insert(to.clone(), disk);
            }
            if let Some(damage) = self.damage.remove(&from) {
                self.damage.insert(to.clone(), damage);
            }
            let was_frozen = self.frozen.remove(&from) && verb != Verb::Commit && verb != Verb::Delete;
            if was_frozen || verb == Verb::Snapshot && is_raw(&to) {
                self.frozen.insert(to);
            }
        }
        for path in &plan.removed {
            let name = text(path);
            if !self.root.join(&name).exists() {
                self.disks.remove(&name);
                self.frozen.remove(&name);
            }
        }
        let gone: Vec<String> = self
            .names()
            .into_iter()
            .filter(|name| self.damage.get(name).is_none_or(|damage| damage.present_name().is_none()))
            .filter(|name| !self.root.join(name).exists())
            .collect();
        if let Some(name) = gone.first() {
            // A snapshot of a raw leaf gives the disk another file.
            let is_old_leaf = verb == Verb::Snapshot || verb == Verb::Revert;
            if !is_old_leaf || before.first().is_none_or(|leaf| leaf.1 != *name) {
                self.fail(&format!("{name} has gone, of which the plan says nothing: {plan:?}"));
            }
            self.disks.remove(name);
        }
        // What is new.
        for name in self.unknown_files() {
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !old.values().any(|known| is_same_disk(&disk, known)) {
                self.fail(&format!("{name} is new, and shows what nothing showed before"));
            }
            self.disks.insert(name, disk);
        }
        // What shows something else on purpose.
        let active = before.first().filter(|leaf| leaf.2).map(|leaf| leaf.1.clone());
        for name in changed_files(plan, before) {
            let top = active.clone().unwrap_or_default();
            let legal: Vec<Vec<u8>> = before
                .iter()
                .take_while(|(_, file, _)| *file != name)
                .filter_map(|(_, file, _)| old.get(file).cloned())
                .chain(old.get(&top).cloned())
                .collect();
            if !self.disks.contains_key(&name) {
                continue;
            }
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !legal.iter().any(|wanted| is_same_disk(&disk, wanted)) {
                self.fail(&format!("{name} shows what no layer above it did"));
            }
            self.disks.insert(name, disk);
        }
        for (from, to) in &plan.renamed {
            let name = text(to);
            if name.ends_with(".invalid") {
                self.disks.remove(&name);
                continue;
            }
            // What has taken the name of a layer, but for the extension where it is raw, shows what that did.
            let is_it = |layer: &&(String, String, bool)| {
                layer.1 != text(from) && Path::new(&layer.1).file_stem() == to.file_stem()
            };
            let layer = before.iter().find(is_it).filter(|_| verb == Verb::Commit || verb == Verb::Delete);
            let Some(wanted) = layer.and_then(|layer| old.get(&layer.1)) else { continue };
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !is_same_disk(&disk, wanted) {
                self.fail(&format!("{name} does not show what it did"));
            }
            self.disks.insert(name, disk);
        }
        match request {
            Request::Revert(request) => {
                let to = String::from_utf8_lossy(&request.to).into_owned();
                let leaf = before.first().map(|leaf| leaf.1.clone()).unwrap_or_default();
                let name = if self.root.join(&leaf).exists() { leaf } else { leaf.replace(".raw", ".qcow2") };
                let wanted = file_of(&to).and_then(|file| old.get(&file).cloned());
                let disk = self.reader().disk(&name);
                if let (Some(wanted), Some(disk)) = (wanted, disk) {
                    if !is_same_disk(&disk, &wanted) {
                        self.fail(&format!("{name} does not show what it was reverted to"));
                    }
                    self.disks.insert(name, disk);
                }
            }
            Request::Resize(_) => {
                if let Some(name) = active
                    && let Some(disk) = self.reader().disk(&name)
                {
                    if old.get(&name).is_some_and(|was| !is_same_disk(&disk, was)) {
                        self.fail(&format!("{name} shows something else behind its old end"));
                    }
                    self.disks.insert(name, disk);
                }
            }
            _ => {}
        }
    }

    /// A command is cut off by a kill; others change the store before it is opened again.
    fn kill(&mut self) {
        let Some((chain, command, plan)) = self.sensible() else { return };
        let before = self.layers(&chain);
        let text = |path: &PathBuf| path.display().to_string();
        let old = self.disks.clone();
        let above = |file: &str| -> Vec<String> {
            before.iter().take_while(|layer| layer.1 != *file).map(|layer| layer.1.clone()).collect()
        };
        let mut legal: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
        let involved: Vec<String> = before
            .iter()
            .map(|layer| layer.1.clone())
            .chain(plan.removed.iter().map(text))
            .chain(plan.renamed.iter().flat_map(|(from, to)| [text(from), text(to)]))
            .collect();
        let verb = command.split(' ').next().unwrap_or_default().to_owned();
        let is_changing = changed_files(&plan, &before);
        for file in &involved {
            let mut may: Vec<Vec<u8>> = old.get(file).cloned().into_iter().collect();
            let is_renamed = plan.renamed.iter().any(|(from, to)| text(from) == *file || text(to) == *file);
            if is_changing.contains(file) || is_renamed || matches!(verb.as_str(), "revert" | "resize") {
                may.extend(above(file).iter().filter_map(|file| old.get(file).cloned()));
                may.extend(before.first().and_then(|leaf| old.get(&leaf.1)).cloned());
            }
            if verb == "revert" {
                may.extend(before.iter().filter_map(|layer| old.get(&layer.1).cloned()));
            }
            legal.insert(file.clone(), may);
        }
        let mut leaving: BTreeSet<String> =
            plan.removed.iter().map(text).chain(plan.renamed.iter().map(|(from, _)| text(from))).collect();
        if matches!(verb.as_str(), "snapshot" | "revert") {
            leaving.extend(before.first().map(|leaf| leaf.1.clone()));
        }
        let (_, engine, host) = self.store.as_ref().expect("an open store");
        let (engine, host) = (Arc::clone(engine), host.clone());
        // About as many changes as such a command makes.
        let usual = match verb.as_str() {
            "commit" | "delete" => 30,
            "clone" | "resize" => 8,
            "rebase" => 18,
            _ => 24,
        };
        let (calls, what) = if self.rng.below(2) == 0 {
            let calls = self.rng.below(usual);
            host.dies_after(calls);
            (calls, "changes")
        } else {
            let calls = self.rng.below(9);
            host.dies_after_names(calls);
            (calls, "names")
        };
        let status = run(&engine, &chain, &command);
        let was_killed = host.is_dead();
        self.say(format!("{chain}: {command}: killed after {calls} {what}: {:?}", status.map(|s| s.error)));
        drop(engine);
        self.close();
        if !was_killed {
            host.dies_after(i64::MAX as u64);
            host.dies_after_names(i64::MAX as u64);
        }
        self.tally.killed += u64::from(was_killed);
        let freezing = match verb.as_str() {
            "snapshot" => plan.renamed.iter().map(|(_, to)| text(to)).filter(|to| is_raw(to)).collect(),
            _ => BTreeSet::new(),
        };
        let mut pending = Pending { command, legal, leaving, freezing };
        // The model does not know which of what the command has made is whole: others leave that alone.
        self.settle_names(&pending);
        self.focus = pending.legal.keys().cloned().collect();
        self.replaced.clear();
        if self.rng.below(3) == 0 {
            self.replace_all();
        }
        for _ in 0..self.rng.below(5) {
            match self.rng.below(12) {
                0..=2 => self.overlay(),
                3 | 4 | 11 => self.replace(),
                5 | 10 => self.protect(),
                6 if !is_without("damage") => self.damage(),
                7 => self.mend(),
                8 => self.spoil_intent(),
                _ => self.copy(),
            }
        }
        self.focus.clear();
        self.reopen_after(&mut pending);
    }

    /// Drops from the model what a command that was cut off has taken away, before others do anything.
    fn settle_names(&mut self, pending: &Pending) {
        for name in self.names() {
            let present = self.damage.get(&name).and_then(Damage::present_name).unwrap_or(&name).to_owned();
            if !self.root.join(present).exists() {
                if !pending.leaving.contains(&name) {
                    self.fail(&format!("{name} has gone in a command that was cut off"));
                }
                self.disks.remove(&name);
                self.frozen.remove(&name);
            }
        }
    }

    fn reopen_after(&mut self, pending: &mut Pending) {
        // What was put in the place of a file of the command is not the command's.
        pending.legal.retain(|name, _| !self.replaced.contains(name));
        pending.leaving.retain(|name| !self.replaced.contains(name));
        pending.freezing.retain(|name| !self.replaced.contains(name));
        let pending = &*pending;
        let by_others: BTreeMap<String, (u64, Vec<u8>)> = self
            .disks
            .iter()
            .filter(|(name, _)| !pending.legal.contains_key(*name))
            .map(|(name, disk)| {
                let inode = fs::metadata(self.root.join(name)).map_or(0, |found| found.ino());
                (name.clone(), (inode, disk.clone()))
            })
            .collect();
        let guarded = self.guarded();
        self.open();
        self.assert_guarded(&guarded, &pending.command);
        let (store, ..) = self.store.as_ref().expect("an open store");
        let catalog = store.catalog();
        let is_left = !catalog.intents.is_empty() || !catalog.senseless.is_empty();
        if is_left {
            self.tally.hidden += 1;
        } else {
            self.tally.resumed += 1;
        }
        self.say(format!("opened again: {} intents left", catalog.intents.len()));
        for (name, (inode, disk)) in &by_others {
            if self.damage.get(name).is_some_and(|damage| damage.present_name().is_some()) {
                continue;
            }
            match fs::metadata(self.root.join(name)) {
                Ok(found) if found.ino() == *inode || *inode == 0 => {}
                Ok(_) => self.fail(&format!("{name}, which another made, is another file after {}", pending.command)),
                Err(_) => self.fail(&format!("{name}, which another made, has gone after {}", pending.command)),
            }
            if self.reader().disk(name).as_ref() != Some(disk) {
                self.fail(&format!("{name}, of others, shows something else after {}", pending.command));
            }
        }
        // What the command speaks of shows what it did or what it is to be, or is hidden.
        self.views(Some(pending));
        if is_left {
            // What is hidden stays so; the run ends here.
            for name in pending.legal.keys() {
                self.disks.remove(name);
            }
            self.log.push("hidden".to_owned());
            return;
        }
        for (name, legal) in &pending.legal {
            let present = self.damage.get(name).and_then(Damage::present_name).unwrap_or(name);
            if !self.root.join(present).exists() {
                if self.disks.contains_key(name) && !pending.leaving.contains(name) {
                    self.fail(&format!("{name} has gone after {}", pending.command));
                }
                self.disks.remove(name);
                self.frozen.remove(name);
                continue;
            }
            let Some(disk) = self.reader().disk(name) else {
                self.fail(&format!("{name} cannot be read after {}", pending.command))
            };
            let own = self.disks.get(name).cloned();
            if !legal.iter().chain(own.iter()).any(|wanted| is_same_disk(&disk, wanted)) {
                self.fail(&format!("{name} shows what it never did nor is to, after {}", pending.command));
            }
            if pending.freezing.contains(name) {
                self.frozen.insert(name.clone());
            }
            self.disks.insert(name.clone(), disk);
        }
        // What the command has made.
        for name in self.unknown_files() {
            if let Some(disk) = self.reader().disk(&name) {
                self.disks.insert(name, disk);
            }
        }
    }

    /// Files that nobody may change: by their mode, or because they have another name outside of the store.
    fn guarded(&self) -> BTreeMap<u64, (String, Vec<u8>)> {
        let outside: BTreeSet<u64> = fs::read_dir(self.scratch.path())
            .expect("what is beside the store")
            .map(|entry| entry.expect("an entry").metadata().expect("what it is").ino())
            .collect();
        let mut guarded = BTreeMap::new();
        for name in self.files_present().into_iter().filter(|name| !name.starts_with(".chainfs")) {
            let path = self.root.join(&name);
            let found = fs::metadata(&path).expect("a file of the store");
            if found.permissions().mode() & 0o222 == 0 || outside.contains(&found.ino()) {
                guarded.insert(found.ino(), (name, fs::read(&path).expect("its bytes")));
            }
        }
        guarded
    }

    fn assert_guarded(&self, guarded: &BTreeMap<u64, (String, Vec<u8>)>, command: &str) {
        let mut left = guarded.clone();
        for name in self.files_present() {
            let path = self.root.join(&name);
            let Some((_, bytes)) = left.remove(&fs::metadata(&path).expect("a file of the store").ino()) else {
                continue;
            };
            let now = fs::read(&path).expect("its bytes");
            if now != bytes {
                let at = now.iter().zip(&bytes).position(|(now, was)| now != was);
                self.fail(&format!("{name} was protected, and {command} changed it, first at {at:?}"));
            }
        }
        if let Some((name, _)) = left.values().next() {
            self.fail(&format!("{name} was protected, and {command} removed it"));
        }
    }

    /// The store as a whole is copied, with what chainfs keeps in it, and the copy takes its place. It has to be closed.
    fn copy(&mut self) {
        let other = self.scratch.path().join("copy");
        tool("cp").arg("-a").arg(&self.root).arg(&other).succeeds();
        // Links, and names in headers, speak of the old place.
        fs::remove_dir_all(&self.root).expect("the store");
        fs::rename(&other, &self.root).expect("the copy");
        self.tally.copied += 1;
        self.say("the store is copied");
    }

    // What has to hold.

    /// Every view that is shown shows what it has to.
    fn views(&mut self, pending: Option<&Pending>) {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let store = Arc::clone(store);
        let catalog = store.catalog();
        for (path, leaf) in catalog.chains() {
            let views = store.chain_views(&catalog, leaf);
            for view in views.views.iter().filter(|view| view.snapshot.is_none()) {
                let layers = &views.layers[view.layer..];
                let name = catalog.images[layers[0]].place.path.display().to_string();
                if view.active && self.frozen.contains(&name) {
                    self.fail(&format!("{name} was frozen, and is an active disk"));
                }
                let opened = store.open_view(&catalog, layers, ViewPart::Active, view.active);
                let bytes = opened.and_then(|open| {
                    let mut bytes = vec![0; open.view.size() as usize];
                    open.view.read_at(0, &mut bytes).map(|()| bytes)
                });
                let bytes = match bytes {
                    Ok(bytes) => bytes,
                    Err(error) if self.is_sound(&name) && pending.is_none() => {
                        self.fail(&format!("{name} is sound, and cannot be read: {error}"))
                    }
                    Err(_) => continue,
                };
                self.tally.compared += 1;
                let legal = pending.and_then(|pending| pending.legal.get(&name));
                let known = self.disks.get(&name);
                let is_right = known.into_iter().chain(legal.into_iter().flatten());
                if !is_right.clone().any(|wanted| is_same_disk(&bytes, wanted)) && is_right.count() > 0 {
                    self.fail(&format!("{name} in {} shows other bytes than it has to", path.display()));
                }
            }
        }
    }

    /// Every file shows, to a reader of the model's own, what it has to.
    fn files(&self) {
        let reader = self.reader();
        for (name, wanted) in &self.disks {
            match reader.disk(name) {
                Some(disk) if disk == *wanted => {}
                Some(_) => self.fail(&format!("{name} shows other bytes than it has to")),
                None => self.fail(&format!("{name} cannot be read any more")),
            }
        }
    }

    /// One step. Whether the run goes on.
    pub(crate) fn step(&mut self) -> bool {
        self.tally.steps += 1;
        match self.rng.below(29) {
            6..=11 => self.give(),
            12 | 13 if self.disks.len() < MAX_IMAGES => self.overlay(),
            14 if self.disks.len() < MAX_IMAGES => self.base(),
            15 | 16 if !is_without("damage") => self.damage(),
            17 | 18 => self.mend(),
            19 => self.replace(),
            20 => self.protect(),
            21 if !is_without("list") => self.spoil_freeze_list(),
            22 if !is_without("list") => self.strand(),
            28 | 21 | 22 => {
                self.close();
                if self.rng.below(3) == 0 {
                    self.copy();
                }
                self.open();
            }
            23..=27 if !is_without("kill") => self.kill(),
            _ => self.write(),
        }
        if self.log.last().is_some_and(|last| last == "hidden") {
            return false;
        }
        let (store, ..) = self.store.as_ref().expect("an open store");
        store.rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
        self.files();
        self.views(None);
        true
    }

    /// All damage is undone, and QEMU reads everything.
    pub(crate) fn end(mut self) -> Tally {
        self.close();
        while !self.damage.is_empty() {
            self.mend();
        }
        let plain = self.scratch.path().join("plain");
        let foreign = self.foreign.iter().map(|(name, (kind, disk))| (name, *kind, disk));
        let own = self.disks.iter().map(|(name, disk)| (name, if is_raw(name) { "raw" } else { "qcow2" }, disk));
        for (name, format, wanted) in own.chain(foreign) {
            let mut convert = tool("qemu-img");
            convert.current_dir(&self.root).args(["convert", "-f", format, "-O", "raw", name]).arg(&plain);
            let (code, _, said) = convert.outcome();
            if code != 0 {
                self.fail(&format!("QEMU cannot read {name}: {said}"));
            }
            if fs::read(&plain).expect("what QEMU read") != *wanted {
                self.fail(&format!("QEMU reads other bytes from {name} than it has to show"));
            }
        }
        self.tally
    }
}
