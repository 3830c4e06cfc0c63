//! The store, its users, and the checks after each step.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::sync::Arc;

use chainfs::store::{Store, StoreOptions};

use super::image::is_raw;
use super::people::{GIDS, People, Person, UIDS, text};
use super::seen::{Looker, May, Seen};
use super::through::Through;
use support::host::Mortal;
use support::tally;
use support::{Outcome as _, Rng, tool};

/// More images than this are not made.
const MAX_IMAGES: usize = 13;

tally! {
    always:
    /// Owners, modes and lists that root has changed.
    modes,
    damaged,
    /// Views that users may read, and that they may not; of the first, those that they reach by shown modes.
    read, unread, shown,
    /// The same of writing.
    written, unwritten,
    /// Disks that stay active although a user who may not read them names them.
    unimpressed,
    /// Names that count.
    counted,
    /// Commands of users that were done, that were refused, of these for lack of rights; those of root.
    done, refused, denied, done_by_root,
    /// Commands of users that were interrupted; that other users repeated; that were resumed at the next
    /// start.
    killed, again, resumed,
    /// Commands after whose interruption others changed the store.
    touched,
    /// Further names of files; copies.
    linked, copied,
    /// Images that QEMU has checked.
    checked,
    /// Texts that were checked, and names that had to be in none.
    texts, hidden;
    rarely:
    /// Interrupted commands that are not resumed.
    left,
}

/// One run.
pub(crate) struct World<'a> {
    _scratch: tempfile::TempDir,
    pub(crate) root: PathBuf,
    pub(crate) people: &'a People,
    pub(crate) rng: Rng,
    pub(crate) store: Option<(Arc<Store>, Mortal)>,
    /// By file: where its header is damaged, and the old bytes.
    pub(crate) damage: Vec<(u64, u64, Vec<u8>)>,
    number: u64,
    log: Vec<String>,
    /// A command was not resumed, since others have changed its files: its hidden views stay hidden, and the
    /// run ends.
    pub(crate) is_hidden: bool,
    pub(crate) tally: Tally,
    looker: Looker,
}

fn options() -> StoreOptions {
    StoreOptions { notify: false, owners_count: true, cache: 4 << 20, ..StoreOptions::default() }
}

impl<'a> World<'a> {
    pub(crate) fn new(seed: u64, people: &'a People) -> Self {
        let scratch =
            tempfile::Builder::new().prefix("chainfs-test-").tempdir().expect("a temporary directory");
        let scratch_path = scratch.path().canonicalize().expect("its path");
        let root = scratch_path.join("store");
        fs::create_dir(&root).expect("a store");
        for path in [&scratch_path, &root] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
        }
        let mut world = Self {
            _scratch: scratch,
            root,
            people,
            rng: Rng::new(seed),
            store: None,
            damage: Vec::new(),
            number: 0,
            log: vec![format!("seed {seed}")],
            is_hidden: false,
            tally: Tally::default(),
            looker: Looker::default(),
        };
        for (name, uid) in
            [("a", UIDS[0]), ("b", UIDS[1]), ("b/sub", UIDS[1]), ("c", UIDS[2]), ("root", 0), ("all", 0)]
        {
            let mode = match name {
                "all" => 0o1777,
                "root" => 0o755,
                _ => [0o700, 0o711, 0o755, 0o750][world.rng.below(4) as usize],
            };
            let path = world.root.join(name);
            fs::create_dir(&path).expect("a directory");
            chown(&path, Some(uid), Some(GIDS[world.rng.below(3) as usize])).expect("an owner");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
            world.say(format!("{name} is {uid}'s, {mode:o}"));
        }
        for _ in 0..3 {
            world.base();
            world.overlay();
        }
        world.open();
        world
    }

    pub(crate) fn say(&mut self, what: impl Into<String>) {
        self.log.push(what.into());
    }

    pub(crate) fn fail(&self, why: &str) -> ! {
        let list = tool("ls").args(["-lAinR", "--time-style=+%T"]).arg(&self.root).succeeds();
        let lists = tool("getfacl").args(["-Rsnp", "."]).current_dir(&self.root).succeeds();
        panic!("{why}\n  {}\n{list}{lists}", self.log.join("\n  "));
    }

    pub(crate) fn pick<T: Clone>(&mut self, among: &[T]) -> Option<T> {
        (!among.is_empty()).then(|| among[self.rng.below(among.len() as u64) as usize].clone())
    }

    /// A sample: checking all of them after each step takes longer than it is worth.
    pub(crate) fn some<T: Clone>(&mut self, among: &[T]) -> Vec<T> {
        (0..3.min(among.len())).filter_map(|_| self.pick(among)).collect()
    }

    /// A name that occurs in no text by chance.
    pub(crate) fn next(&mut self) -> String {
        self.number += 1;
        format!("q{}z", self.number)
    }

    pub(crate) fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store.as_ref().expect("an open store").0)
    }

    /// Opens the store; nothing is resumed yet.
    pub(crate) fn open_only(&mut self) {
        let host = Mortal::new();
        let store = Store::open_on(&self.root, options(), &|directory| host.open(directory));
        let store = store.unwrap_or_else(|error| self.fail(&format!("opening the store: {error}")));
        self.store = Some((store, host));
    }

    pub(crate) fn open(&mut self) {
        self.open_only();
        Through::new(&self.store()).resume();
        self.rescan();
    }

    pub(crate) fn rescan(&self) {
        self.store().rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
    }

    pub(crate) fn is_whole(&self) -> bool {
        let catalog = self.store().catalog();
        catalog.intents.is_empty() && catalog.senseless.is_empty()
    }

    /// All chains, and of each the files of its layers, top first.
    pub(crate) fn chains(&self) -> Vec<(PathBuf, Vec<PathBuf>)> {
        let store = self.store();
        let catalog = store.catalog();
        let files = |leaf| {
            catalog.layers(leaf).iter().map(|index| catalog.images[*index].place.path.clone()).collect()
        };
        catalog.chains().map(|(path, leaf)| (path, files(leaf))).collect()
    }

    /// The store as it is now.
    pub(crate) fn seen(&self) -> Seen {
        self.looker.look(&self.root)
    }

    pub(crate) fn may(&self, person: &Person, seen: &Seen) -> May {
        May::of(person, &self.root, seen)
    }

    pub(crate) fn step(&mut self) {
        if self.is_hidden {
            return;
        }
        self.tally.steps += 1;
        let is_full = self.seen().files.len() >= MAX_IMAGES;
        match self.rng.below(30) {
            0 if !is_full => self.base(),
            1..=3 if !is_full => self.overlay(),
            4..=6 => self.allow(),
            7 => self.damage(),
            8..=10 => self.write(),
            11..=15 => self.give(false),
            16..=18 => self.give(true),
            19..=26 => self.kill(),
            27 => {
                self.store = None;
                self.open();
            }
            28 => self.link(),
            _ => self.replace(),
        }
        self.rescan();
        // Each command is checked by itself; the invariants between steps are checked now and then.
        let person = &self.people.users[self.rng.below(self.people.users.len() as u64) as usize];
        match self.rng.below(6) {
            0 => self.check_views(person),
            1 => self.check_reports(person),
            2 => self.check_free(),
            _ => {}
        }
        if self.is_hidden {
            for person in &self.people.users {
                self.check_views(person);
                self.check_reports(person);
            }
        }
    }

    /// QEMU finds every image sound, of a third of all stores: it takes longer than the run itself.
    pub(crate) fn end(mut self) -> Tally {
        if self.number.is_multiple_of(3) && !self.is_hidden {
            self.store = None;
            while !self.damage.is_empty() {
                self.damage();
            }
            for path in
                self.seen().files.keys().filter(|path| !is_raw(path) && !text(path).contains(".chainfs"))
            {
                let (at, name) = (self.root.join(path), path.display());
                // Another user has renamed a draft, which was not completed.
                if fs::metadata(&at).is_ok_and(|found| found.len() == 0) {
                    continue;
                }
                // Its backing file is checked elsewhere.
                let file = serde_json::json!({ "driver": "file", "filename": at });
                let image = serde_json::json!({ "driver": "qcow2", "backing": null, "file": file });
                let done = tool("qemu-img")
                    .args(["check", "-q", &format!("json:{image}")])
                    .output()
                    .expect("qemu-img");
                // An interrupted command may leave leaked clusters (3), and flags of an internal snapshot
                // (2).
                let found = String::from_utf8_lossy(&done.stderr);
                let mut errors = found.lines().filter(|line| !line.starts_with("Leaked")).peekable();
                let are_flags =
                    errors.peek().is_some() && errors.all(|line| line.starts_with("ERROR OFLAG_COPIED"));
                let is_sound = match done.status.code() {
                    Some(0 | 3) => true,
                    Some(2) => are_flags,
                    _ => false,
                };
                if !is_sound {
                    self.fail(&format!("QEMU finds {name} unsound: {done:?}"));
                }
                self.tally.checked += 1;
            }
        }
        self.tally
    }
}
