//! The store, the model of it, and everything that may happen.
//!
//! The model holds, for each file of the store, the expected bytes of its disk once its damage is undone.
//! They change by guest writes and by commands, as their plans say, and by nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chainfs::ops::Engine;
use chainfs::store::Store;

use super::damage::Damage;
use super::reader::{Reader, is_raw};
use support::host::Mortal;
use support::tally;
use support::{Outcome as _, Rng, tool};

/// Bytes of a disk.
pub(super) const SIZE: u64 = 64 << 10;
/// How qcow2 images of the model are made: many clusters in few bytes.
pub(super) const OPTIONS: &str = "cluster_size=4k";
/// More images than this are not made.
pub(super) const MAX_IMAGES: usize = 14;
/// No recovery takes longer.
pub(super) const LIMIT: Duration = Duration::from_mins(1);

tally! {
    always:
    writes, done, refused,
    /// Interrupted commands; of these, the number of stores that were complete at their next opening.
    killed, resumed,
    damaged,
    /// Views that were compared.
    compared,
    /// Frozen raw disks without overlays.
    stranded;
    rarely:
    denied_writes,
    /// Interrupted commands with views that stayed hidden.
    hidden,
    copied,
}

/// One run.
pub(crate) struct World {
    pub(super) scratch: tempfile::TempDir,
    pub(super) root: PathBuf,
    pub(super) rng: Rng,
    pub(super) store: Option<(Arc<Store>, Arc<Engine>, Mortal)>,
    /// By name: the disk that the file has to show.
    pub(super) disks: BTreeMap<String, Vec<u8>>,
    /// Overlays in formats that the model cannot read itself.
    pub(super) foreign: BTreeMap<String, (&'static str, Vec<u8>)>,
    pub(super) damage: BTreeMap<String, Damage>,
    /// Overlays that name their backing file in a way that is not followed.
    pub(super) odd: BTreeSet<String>,
    /// Raw files that a snapshot has frozen.
    pub(super) frozen: BTreeSet<String>,
    /// The list of frozen files before it was damaged, and after.
    pub(super) freeze_list: Option<(Vec<u8>, Option<Vec<u8>>)>,
    /// Files that other programs change first: those of an interrupted command.
    pub(super) focus: Vec<String>,
    /// Names that another file has taken since a command was interrupted.
    pub(super) replaced: BTreeSet<String>,
    pub(super) number: u64,
    pub(super) log: Vec<String>,
    pub(crate) tally: Tally,
}

/// Whether a kind of change is left out, to find out which one a fault needs.
pub(super) fn is_without(what: &str) -> bool {
    std::env::var("CHAINFS_WITHOUT").is_ok_and(|list| list.split(',').any(|word| word == what))
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let scratch =
            tempfile::Builder::new().prefix("chainfs-test-").tempdir().expect("a temporary directory");
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

    pub(super) fn say(&mut self, what: impl Into<String>) {
        self.log.push(what.into());
    }

    pub(super) fn fail(&self, why: &str) -> ! {
        let list = tool("ls").args(["-lAiR", "--time-style=+%T"]).arg(&self.root).succeeds();
        panic!("{why}\n  {}\n{list}", self.log.join("\n  "));
    }

    pub(super) fn pick(&mut self, among: &[String]) -> Option<String> {
        let first: Vec<&String> = among.iter().filter(|name| self.focus.contains(name)).collect();
        if !first.is_empty() && self.rng.below(4) > 0 {
            return Some(first[self.rng.below(first.len() as u64) as usize].clone());
        }
        (!among.is_empty()).then(|| among[self.rng.below(among.len() as u64) as usize].clone())
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { root: &self.root, damage: &self.damage }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.disks.keys().cloned().collect()
    }

    pub(super) fn next(&mut self, stem: &str) -> String {
        self.number += 1;
        format!("{stem}{}", self.number)
    }

    pub(super) fn content(&mut self) -> Vec<u8> {
        let mut content = self.rng.bytes(SIZE);
        let at = self.rng.below(SIZE);
        let end = (at + self.rng.below(SIZE)).min(SIZE);
        content[at as usize..end as usize].fill(0);
        content
    }

    pub(super) fn img(&self, args: &[&str]) {
        tool("qemu-img").args(args).current_dir(&self.root).succeeds();
    }

    /// The direct overlays of `name`.
    pub(super) fn overlays_of(&self, name: &str) -> Vec<String> {
        let reader = self.reader();
        // An interrupted command may have files that the model does not know yet.
        let mut others = self.files_present();
        others.extend(self.names());
        others.remove(name);
        let mut found: Vec<String> =
            others.into_iter().filter(|other| reader.backing(other).as_deref() == Some(name)).collect();
        found.extend(self.foreign.iter().filter(|(_, (_, disk))| !disk.is_empty()).filter_map(
            |(other, _)| {
                let base = fs::read_to_string(self.beside(other)).ok()?;
                (base == name).then(|| other.clone())
            },
        ));
        found
    }

    /// The names of all regular files of the store's own directory.
    pub(super) fn files_present(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.root).expect("the store").map(|entry| entry.expect("an entry"));
        let files = entries.filter(|entry| entry.file_type().expect("its type").is_file());
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Of these, images of which the model does not know yet.
    pub(super) fn unknown_files(&self) -> Vec<String> {
        let is_known = |name: &String| {
            self.disks.contains_key(name)
                || self.foreign.contains_key(name)
                || name.starts_with(".chainfs")
                || name.ends_with(".invalid")
                || self.damage.values().any(|damage| damage.present_name() == Some(name))
        };
        self.files_present().into_iter().filter(|name| !is_known(name)).collect()
    }

    /// Where the model records the backing file of a foreign overlay.
    pub(super) fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(format!("{name}.base"))
    }

    /// Whether all of a file's chain is there and sound.
    pub(super) fn is_sound(&self, name: &str) -> bool {
        let mut at = Some(name.to_owned());
        for _ in 0..40 {
            let Some(name) = at else { return true };
            if self.damage.contains_key(&name) || self.odd.contains(&name) || !self.disks.contains_key(&name)
            {
                return false;
            }
            at = self.reader().backing(&name);
        }
        false
    }

    /// One step. Returns whether the run continues.
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
        let own =
            self.disks.iter().map(|(name, disk)| (name, if is_raw(name) { "raw" } else { "qcow2" }, disk));
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
