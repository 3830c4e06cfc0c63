//! A chain under commands: base <- sn1 <- sn2 <- sn3 <- web, QEMU's reads of each layer, and the engine.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chainfs::error::Result;
use chainfs::ops::{Engine, JobState, Request, Status};
use chainfs::store::{Store as Opened, StoreOptions};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::store::Store;
use super::tools::hang;

/// The layers, base first, and web last.
pub const LAYERS: [&str; 5] = ["base", "sn1", "sn2", "sn3", "web"];
/// Bytes of the disks of a slow chain.
const SLOW_SIZE: u64 = 64 << 20;

/// How a chain is made.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    pub raw_base: bool,
    /// Options of all qcow2 layers, as for `qemu-img -o`.
    pub options: &'static str,
    /// Bytes of each layer's disk, base first.
    pub sizes: [u64; 5],
    /// Layers that hold an internal snapshot.
    pub inner: &'static [&'static str],
}

impl Kind {
    pub const PLAIN: Kind = Kind { raw_base: false, options: "", sizes: [4 << 20; 5], inner: &[] };

    pub fn with(self, options: &'static str) -> Self {
        Self { options, ..self }
    }
}

/// Chains that were made, by kind, and whether they are slow.
type Made = HashMap<(Kind, bool), Arc<Vec<Kept>>>;

pub struct Lab {
    pub store: Store,
    raw_base: bool,
}

impl Lab {
    pub fn new(kind: Kind) -> Self {
        Self::made_once(kind, false)
    }

    /// QEMU makes the chain once in a process; another one of its kind is a copy with the same bytes and
    /// holes.
    fn made_once(kind: Kind, is_speckled: bool) -> Self {
        static MADE: Mutex<Option<Made>> = Mutex::new(None);
        let key = (kind, is_speckled);
        let kept = MADE.lock().expect("nobody panics here").get_or_insert_default().get(&key).cloned();
        let Some(kept) = kept else {
            let lab = Self::made(kind);
            for (byte, layer) in (1..).zip(["sn1", "sn2", "sn3"]).filter(|_| is_speckled) {
                lab.store.speckle(&lab.file(layer), SLOW_SIZE, byte);
            }
            let kept = lab.files().iter().map(|name| Kept::load(&lab.store, name)).collect();
            MADE.lock().expect("nor here").get_or_insert_default().insert(key, Arc::new(kept));
            return lab;
        };
        let lab = Self { store: Store::new(), raw_base: kind.raw_base };
        kept.iter().for_each(|file| file.save(&lab.store));
        lab
    }

    fn made(kind: Kind) -> Self {
        let store = Store::new();
        let lab = Self { store, raw_base: kind.raw_base };
        for (number, (layer, size)) in LAYERS.iter().zip(kind.sizes).enumerate() {
            let file = lab.file(layer);
            let seed = 100 + number as u64;
            if number == 0 && kind.raw_base {
                lab.store.raw(&file, size, seed);
                continue;
            }
            if number == 0 {
                lab.store.create(&file, size, kind.options);
            } else {
                let below = LAYERS[number - 1];
                let mut args = vec!["create", "-q", "-f", "qcow2", "-b"];
                let (name, size) = (lab.file(below), size.to_string());
                args.extend([name.as_str(), "-F", lab.format(below)]);
                if !kind.options.is_empty() {
                    args.extend(["-o", kind.options]);
                }
                args.extend([file.as_str(), &size]);
                lab.store.img(args);
            }
            lab.store.scribble(&file, "qcow2", seed);
            if kind.inner.contains(layer) {
                lab.store.img(["snapshot", "-c", "inner", &file]);
                lab.store.scribble(&file, "qcow2", seed + 50);
            }
        }
        lab
    }

    /// A chain of which a commit or pull takes long enough to be observed.
    pub fn slow(raw_base: bool) -> Self {
        Self::made_once(
            Kind { raw_base, options: "cluster_size=4k", sizes: [SLOW_SIZE; 5], inner: &[] },
            true,
        )
    }

    pub fn format(&self, layer: &str) -> &'static str {
        if layer == "base" && self.raw_base { "raw" } else { "qcow2" }
    }

    pub fn file(&self, layer: &str) -> String {
        format!("{layer}.{}", self.format(layer))
    }

    /// QEMU's reads of these images, and of internal snapshots (`image@name`).
    pub fn contents(&self, views: &[&str]) -> BTreeMap<String, Vec<u8>> {
        views.iter().map(|view| ((*view).to_owned(), self.content(view))).collect()
    }

    pub fn content(&self, view: &str) -> Vec<u8> {
        let (file, inner) = view.split_once('@').map_or((view, None), |(file, inner)| (file, Some(inner)));
        let format = if extension(file) == "raw" { "raw" } else { "qcow2" };
        let id = inner.map(|_| "1");
        let path = self
            .store
            .try_oracle(Path::new(file), format, id)
            .unwrap_or_else(|error| panic!("{view}: {error}"));
        let bytes = fs::read(&path).expect("what QEMU reads");
        fs::remove_file(path).expect("room");
        bytes
    }

    /// Opens the store.
    pub fn open(&self) -> Arc<Opened> {
        let options = StoreOptions { notify: false, ..StoreOptions::default() };
        Opened::open(&self.store.root(), options).expect("a store")
    }

    /// Gives a command and waits for its end.
    pub fn run(&self, command: &str) -> Status {
        run(&Engine::new(&self.open()), "web", command).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Gives a command that is refused.
    pub fn refused(&self, command: &str) -> chainfs::error::Error {
        match run(&Engine::new(&self.open()), "web", command) {
            Err(error) => error,
            Ok(status) => panic!("{command} was done: {status:?}"),
        }
    }

    /// The names of all files of the store, without chainfs' own.
    pub fn files(&self) -> Vec<String> {
        let entries =
            fs::read_dir(self.store.root()).expect("the store").map(|entry| entry.expect("an entry"));
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().into_string().expect("plain")).collect();
        names.retain(|name| !name.starts_with(".chainfs"));
        names.sort();
        names
    }

    /// Whether QEMU finds all of them sound.
    pub fn assert_clean(&self) {
        for name in self.files().iter().filter(|name| extension(name) == "qcow2") {
            self.store.img(["check", "-q", name]);
        }
    }

    /// The names in the chain of an image as QEMU follows them, top first.
    pub fn chain(&self, image: &str) -> Vec<String> {
        let text = self.store.img(["info", "-U", "--backing-chain", "--output=json", image]);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let all = value.as_array().expect("a list").iter();
        all.map(|layer| layer["filename"].as_str().expect("a name").to_owned()).collect()
    }
}

/// The old state of a file: its name, its length, and its data outside of holes.
struct Kept {
    name: String,
    len: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Kept {
    fn load(store: &Store, name: &str) -> Self {
        let file = File::open(store.path(name)).expect("a layer");
        let len = file.metadata().expect("its length").len();
        let (mut parts, mut at) = (Vec::new(), 0);
        loop {
            at = match seek(&file, SeekFrom::Data(at)) {
                Ok(at) => at,
                Err(Errno::NXIO) => break,
                Err(error) => panic!("{name}: {error}"),
            };
            let end = seek(&file, SeekFrom::Hole(at)).expect("every file ends with a hole");
            let mut bytes = vec![0; (end - at) as usize];
            file.read_exact_at(&mut bytes, at).expect("its bytes");
            parts.push((at, bytes));
            at = end;
        }
        Self { name: name.to_owned(), len, parts }
    }

    fn save(&self, store: &Store) {
        let file = File::create(store.path(&self.name)).expect("a layer");
        file.set_len(self.len).expect("room");
        for (at, bytes) in &self.parts {
            file.write_all_at(bytes, *at).expect("room");
        }
    }
}

/// The extension of a name, after its last dot.
pub fn extension(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or_default()
}

/// Gives a command and waits for its end.
pub fn run(engine: &Arc<Engine>, chain: &str, command: &str) -> Result<Status> {
    let request = Request::parse_command(command.as_bytes())?;
    let number = engine.run(Path::new(chain), &request, command)?;
    let start = Instant::now();
    let mut status = engine.status(Path::new(chain));
    while status.number == number && status.state == JobState::Running {
        assert!(start.elapsed() < hang(), "{command} hangs: {status:?}");
        status = engine.wait(Path::new(chain), status.version, Duration::from_millis(100));
    }
    Ok(status)
}
