//! The store, who acts on it, and what has to hold after each act.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::fs::Caller;
use chainfs::store::{Access as Opening, Catalog, Store, StoreOptions};
use rustix::fs::Access;

use super::super::common::{Outcome as _, Rng, tool};
use super::after::{Given, is_open_to, is_sound, is_surely_uncounted};
use super::hands::relative;
use super::host::Mortal;
use super::image::{backing_name, chain, disk, is_raw, is_same_disk};
use super::people::{GIDS, People, Person, UIDS, names, text};
use super::seen::{May, Seen};
use super::through::Through;

/// More images than this are not made.
const MAX_IMAGES: usize = 13;

macro_rules! tally {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What has happened, so that a run in which nothing did is noticed.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Tally { pub(crate) steps: u64, $($(#[$doc])* pub(crate) $name: u64),* }

        impl Tally {
            pub(crate) fn add(&mut self, other: &Self) {
                self.steps += other.steps;
                $(self.$name += other.$name;)*
            }

            /// Whether nothing is missing.
            pub(crate) fn all_happened(&self) -> bool {
                [$(self.$name),*].iter().all(|count| *count > 0)
            }
        }
    };
}

tally! {
    /// Owners, modes and lists that root has changed.
    modes,
    damaged,
    /// Views that users may read, that they may not; of the first, those that they come to by shown modes.
    read, unread, shown,
    /// The same of writing.
    written, unwritten,
    /// Disks that stay active although somebody who may not read them names them.
    unimpressed,
    /// Names that count.
    counted,
    /// Commands of users that were done, that were refused, of these for want of rights; those of root.
    done, refused, denied, done_by_root,
    /// Commands of users that were cut off; that were given again by others; that went on at the next start.
    killed, again, resumed,
    /// Texts that were looked at, and names that had to be in none.
    texts, hidden,
}

/// One run.
pub(crate) struct World<'a> {
    scratch: tempfile::TempDir,
    pub(crate) root: PathBuf,
    pub(crate) people: &'a People,
    pub(crate) rng: Rng,
    store: Option<(Arc<Store>, Mortal)>,
    /// By file: where its header is damaged, and what stood there.
    pub(crate) damage: Vec<(u64, u64, Vec<u8>)>,
    number: u64,
    log: Vec<String>,
    /// Something was not taken up, as it may be: what is hidden stays so.
    is_hidden: bool,
    pub(crate) tally: Tally,
}

fn options() -> StoreOptions {
    StoreOptions { notify: false, owners_count: true, cache: 4 << 20, ..StoreOptions::default() }
}

impl<'a> World<'a> {
    pub(crate) fn new(seed: u64, people: &'a People) -> Self {
        let scratch = tempfile::Builder::new().prefix("chainfs-test-").tempdir().expect("a temporary directory");
        let scratch_path = scratch.path().canonicalize().expect("its path");
        let root = scratch_path.join("store");
        fs::create_dir(&root).expect("a store");
        for path in [&scratch_path, &root] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
        }
        let mut world = Self {
            scratch,
            root,
            people,
            rng: Rng::new(seed),
            store: None,
            damage: Vec::new(),
            number: 0,
            log: vec![format!("seed {seed}")],
            is_hidden: false,
            tally: Tally::default(),
        };
        for (name, uid) in [("a", UIDS[0]), ("b", UIDS[1]), ("b/sub", UIDS[1]), ("c", UIDS[2]), ("root", 0), ("all", 0)]
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

    fn fail(&self, why: &str) -> ! {
        let list = tool("ls").args(["-lAinR", "--time-style=+%T"]).arg(&self.root).succeeds();
        let lists = tool("getfacl").args(["-Rsnp", "."]).current_dir(&self.root).succeeds();
        panic!("{why}\n  {}\n{list}{lists}", self.log.join("\n  "));
    }

    pub(crate) fn pick<T: Clone>(&mut self, among: &[T]) -> Option<T> {
        (!among.is_empty()).then(|| among[self.rng.below(among.len() as u64) as usize].clone())
    }

    /// A few of many: looking at all of them after each step takes longer than it finds.
    fn some<T: Clone>(&mut self, among: &[T]) -> Vec<T> {
        (0..3.min(among.len())).filter_map(|_| self.pick(among)).collect()
    }

    /// A name that is in no text by chance.
    pub(crate) fn next(&mut self) -> String {
        self.number += 1;
        format!("q{}z", self.number)
    }

    fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store.as_ref().expect("an open store").0)
    }

    /// Opens the store; nothing is taken up yet.
    fn open_only(&mut self) {
        let host = Mortal::new();
        let store = Store::open_on(&self.root, options(), Arc::new(host.clone()));
        let store = store.unwrap_or_else(|error| self.fail(&format!("opening the store: {error}")));
        self.store = Some((store, host));
    }

    fn open(&mut self) {
        self.open_only();
        Through::new(&self.store()).resume();
        self.rescan();
    }

    fn rescan(&self) {
        self.store().rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
    }

    fn is_whole(&self) -> bool {
        let catalog = self.store().catalog();
        catalog.intents.is_empty() && catalog.senseless.is_empty()
    }

    /// All chains, and of each the files of its layers, top first.
    fn chains(&self) -> Vec<(PathBuf, Vec<PathBuf>)> {
        let store = self.store();
        let catalog = store.catalog();
        let files = |leaf| catalog.layers(leaf).iter().map(|index| catalog.images[*index].place.path.clone()).collect();
        catalog.chains().map(|(path, leaf)| (path, files(leaf))).collect()
    }

    fn may(&self, person: &Person, seen: &Seen) -> May {
        May::of(person, &self.root, seen)
    }

    // Guests.

    /// A guest of somebody's writes an active disk.
    fn write(&mut self) {
        let Some((Some(number), path, layers)) = self.choose(false) else { return };
        let (person, seen) = (&self.people.users[number], Seen::of(&self.root));
        let through = Through::new(&self.store());
        let file = &layers[0];
        let is_shown = through.walk(person, &path.join("active.raw"), 2).is_some();
        let Some(inode) = through.number(&path.join("active.raw")) else { return };
        let (at, len) = (self.rng.below(60_000), 1 + self.rng.below(4000));
        let bytes = self.rng.bytes(len);
        let written = through.open(person, inode, Opening::ReadWrite, |handle| {
            let written = through.tree.write(handle, at, &bytes, false);
            written.and_then(|_| through.tree.sync(handle))
        });
        let may = self.may(person, &seen);
        let is_allowed = may.write.contains(file) && layers.iter().all(|layer| may.read.contains(layer));
        self.say(format!("uid {} writes {} at {at}+{len}: {written:?}", person.uid, path.display()));
        if !matches!(written, Ok(Ok(()))) {
            self.tally.unwritten += 1;
            let is_followed = chain(&seen, file).is_some_and(|named| named == layers);
            if is_allowed && is_shown && is_followed && self.is_free(&seen, file) {
                self.fail(&format!("uid {} may write {}, and was kept from it", person.uid, path.display()));
            }
            return;
        }
        if !is_allowed {
            self.fail(&format!("uid {} has written {}, which the kernel would not let", person.uid, path.display()));
        }
        self.tally.written += 1;
        let after = Seen::of(&self.root);
        for (other, was) in &seen.files {
            if other != file && after.files.get(other).is_none_or(|now| now.bytes != was.bytes) {
                self.fail(&format!("{} was changed by a guest of {}", other.display(), path.display()));
            }
        }
        if let Some(mut wanted) = disk(&seen, file) {
            let end = (at as usize + bytes.len()).min(wanted.len());
            if at as usize <= end {
                wanted[at as usize..end].copy_from_slice(&bytes[..end - at as usize]);
            }
            if disk(&after, file).is_none_or(|shown| !is_same_disk(&shown, &wanted)) {
                self.fail(&format!("{} does not hold what was written to it", file.display()));
            }
        }
    }

    /// Whether a file is surely an active disk: sound, and named by none who might be right to name it.
    fn is_free(&self, seen: &Seen, path: &Path) -> bool {
        let store = self.store();
        let catalog = store.catalog();
        let Some(entry) = catalog.images.iter().find(|image| image.place.path == path) else { return false };
        let is_claimed = !self.damage.is_empty() || !self.is_whole();
        let is_kept = entry.is_frozen() || seen.files[path].mode & 0o222 == 0 || entry.problem.is_some();
        // Whatever stands on what is broken is for others to test.
        let is_odd = seen.files.keys().any(|path| !is_sound(seen, path));
        if is_claimed || is_kept || is_odd || !is_sound(seen, path) {
            return false;
        }
        seen.overlays_of(path).iter().all(|overlay| {
            let owner = self.people.owner(seen.files[*overlay].uid);
            owner.is_some_and(|owner| is_surely_uncounted(seen, overlay, path, &self.may(owner, seen)))
        })
    }

    /// What somebody names that may not be read stays its owner's active disk.
    fn check_free(&mut self) {
        let seen = Seen::of(&self.root);
        let store = self.store();
        let catalog = store.catalog();
        for path in seen.files.keys() {
            if !self.is_free(&seen, path) {
                continue;
            }
            let found = catalog.images.iter().position(|image| image.place.path == *path);
            if found.is_none_or(|found| !catalog.is_active(found) || !catalog.images[found].users.is_empty()) {
                self.fail(&format!("{} is no active disk, though nobody may rightly name it", path.display()));
            }
            self.tally.unimpressed += u64::from(!seen.overlays_of(path).is_empty());
        }
        // A name counts where the owner may read what it names.
        for (path, file) in &seen.files {
            let Some(below) = file.backing.as_ref().filter(|_| is_sound(&seen, path) && self.is_whole()) else {
                continue;
            };
            let is_plain = backing_name(&file.bytes).is_some_and(|name| !name.contains(':') && !name.contains("-link"));
            let counts =
                self.people.owner(file.uid).is_none_or(|owner| owner.may(&self.root.join(below), Access::READ_OK));
            let found = catalog.images.iter().find(|image| image.place.path == *path);
            let Some(found) = found.filter(|_| is_plain && counts) else { continue };
            let stands_on = found.below.image().map(|below| &catalog.images[below].place.path);
            if stands_on != Some(below) {
                self.fail(&format!(
                    "{} names {}, and is taken to stand on {stands_on:?}",
                    path.display(),
                    below.display()
                ));
            }
            self.tally.counted += 1;
        }
    }

    // Commands.

    fn words(&mut self, chain: &Path) -> Option<String> {
        let store = self.store();
        let catalog = store.catalog();
        let views = store.chain_views(&catalog, catalog.chain(chain)?);
        let layers: Vec<(String, bool)> = views
            .views
            .iter()
            .filter(|view| view.snapshot.is_none())
            .map(|view| (String::from_utf8_lossy(&view.name).into_owned(), view.active))
            .collect();
        let names: Vec<String> = layers.iter().filter(|layer| !layer.1).map(|layer| layer.0.clone()).collect();
        let any = |world: &mut Self, word: &str| match world.pick(&names) {
            Some(name) if world.rng.below(3) > 0 => format!(" {word}={name}"),
            _ => String::new(),
        };
        let number = self.next();
        let seen = Seen::of(&self.root);
        Some(match self.rng.below(19) {
            0..=2 => format!("snapshot {number}"),
            3 => {
                let below: Vec<PathBuf> = seen.directories.keys().chain(seen.links.keys()).cloned().collect();
                let directory = self.pick(&below)?;
                let from = chain.parent().unwrap_or(Path::new(""));
                let file = directory.strip_prefix(from).unwrap_or(Path::new("")).join(format!("{number}.qcow2"));
                format!("snapshot {number}f file={}", file.display())
            }
            4..=7 => {
                let (top, base) = (any(self, "top"), any(self, "base"));
                let keep = if self.rng.below(5) == 0 { " keep" } else { "" };
                format!("commit{top}{base}{keep}")
            }
            8 | 9 => {
                let (base, into) = (any(self, "base"), any(self, "into"));
                let delete = if self.rng.below(2) == 0 { " delete" } else { "" };
                format!("pull{base}{into}{delete}")
            }
            10 | 11 => {
                let method = ["", " method=commit", " method=pull"][self.rng.below(3) as usize];
                format!("delete {}{method}", self.pick(&names)?)
            }
            12 | 13 => {
                let save = if self.rng.below(2) == 0 { format!(" save={number}") } else { String::new() };
                format!("revert to={}{save}", self.pick(&names)?)
            }
            14 | 15 => {
                let files: Vec<PathBuf> = seen.files.keys().cloned().collect();
                let file = self.pick(&files)?;
                let leaf = catalog.images[catalog.chain(chain)?].place.path.clone();
                let base = relative(leaf.parent().unwrap_or(Path::new("")), &file);
                format!("rebase{} base={base}", any(self, "layer"))
            }
            16 => format!("clone {number}{}", any(self, "from")),
            17 => format!("snapshot {number}i internal"),
            _ => format!("resize +{}", 512 * (1 + self.rng.below(8))),
        })
    }

    fn given(&self, who: Option<usize>, command: &str, layers: &[PathBuf]) -> Given {
        let before = Seen::of(&self.root);
        let by = who.map(|who| &self.people.users[who]).map(|person| (person.uid, self.may(person, &before)));
        let (layers, readers) = (layers.to_vec(), self.readers(&layers[0]));
        let verb = command.split(' ').next().unwrap_or_default().to_owned();
        Given { verb, by, before, layers, readers }
    }

    fn readers(&self, path: &Path) -> Vec<bool> {
        self.people.users.iter().map(|person| person.may(&self.root.join(path), Access::READ_OK)).collect()
    }

    fn judge(&self, given: &Given, command: &str) {
        let after = Seen::of(&self.root);
        let reads = |path: &Path| self.readers(path);
        let found =
            given.overstepped(&after).or_else(|| given.misowned(&after, reads)).or_else(|| given.spoilt(&after));
        if let Some(found) = found {
            self.fail(&format!("{command}: {found}"));
        }
    }

    /// Who gives a command, and of which chain: mostly one of the user's own.
    fn choose(&mut self, is_root: bool) -> Option<(Option<usize>, PathBuf, Vec<PathBuf>)> {
        let chains = self.chains();
        let any = self.rng.below(self.people.users.len() as u64) as usize;
        if is_root || self.rng.below(4) == 0 {
            let (chain, layers) = self.pick(&chains)?;
            return Some(((!is_root).then_some(any), chain, layers));
        }
        let owned = |person: &Person| -> Vec<(PathBuf, Vec<PathBuf>)> {
            let may = |path: &Path, access| person.may(&self.root.join(path), access);
            let is_owned = |(_, layers): &&(PathBuf, Vec<PathBuf>)| {
                may(&layers[0], Access::READ_OK | Access::WRITE_OK)
                    && layers.iter().all(|layer| may(layer, Access::READ_OK))
                    && layers[0].parent().is_some_and(|directory| may(directory, Access::WRITE_OK | Access::EXEC_OK))
            };
            chains.iter().filter(is_owned).cloned().collect()
        };
        let mut users: Vec<usize> = (0..self.people.users.len()).collect();
        users.rotate_left(any);
        let (who, owned) =
            users.into_iter().map(|who| (who, owned(&self.people.users[who]))).find(|(_, of)| !of.is_empty())?;
        let long: Vec<_> = owned.iter().filter(|(_, layers)| layers.len() > 1).cloned().collect();
        let among = if long.is_empty() || self.rng.below(3) == 0 { owned } else { long };
        let (chain, layers) = self.pick(&among)?;
        Some((Some(who), chain, layers))
    }

    fn caller(&self, who: Option<usize>) -> Caller {
        who.map_or(Caller::ADMINISTRATOR, |who| self.people.users[who].caller())
    }

    fn give(&mut self, is_root: bool) {
        let Some((who, chain, layers)) = self.choose(is_root) else { return };
        let Some(command) = self.words(&chain) else { return };
        let given = self.given(who, &command, &layers);
        let through = Through::new(&self.store());
        if let Some(who) = who
            && self.rng.below(2) == 0
        {
            let person = &self.people.users[who];
            let hidden = self.hidden_from(person, &given.before);
            if let Some(said) = through.plan(person, &chain, &command) {
                self.check_text("a plan", person, &said, &hidden, &command);
            }
        }
        let outcome = through.command(&self.caller(who), &chain, &command);
        let called = who.map_or(0, |who| self.people.users[who].uid);
        self.say(format!("uid {called}: {}: {command}: {outcome:?}", chain.display()));
        match (&outcome, who) {
            (Ok(()), None) => self.tally.done_by_root += 1,
            (Ok(()), Some(_)) => self.tally.done += 1,
            (Err(error), Some(_)) => {
                self.tally.refused += 1;
                self.tally.denied += u64::from(error.kind() == chainfs::error::ErrorKind::Denied);
            }
            (Err(_), None) => {}
        }
        self.rescan();
        self.judge(&given, &command);
        if !self.is_whole() {
            self.fail("a command has ended, and is left");
        }
        // Whoever asks how it went.
        let seen = Seen::of(&self.root);
        for _ in 0..2 {
            let person = &self.people.users[self.rng.below(self.people.users.len() as u64) as usize];
            let was_hidden = self.hidden_from(person, &given.before);
            let hidden = self.hidden_from(person, &seen).intersection(&was_hidden).cloned().collect();
            for file in ["status", "plan"] {
                if let Some(said) = through.text(person, &chain.join("control").join(file)) {
                    let own =
                        if who.is_some_and(|who| self.people.users[who].uid == person.uid) { &command } else { "" };
                    self.check_text(file, person, &said, &hidden, own);
                }
            }
        }
    }

    /// A command is cut off, and goes on at the next start.
    fn kill(&mut self) {
        let is_root = self.rng.below(4) == 0;
        let Some((who, chain, layers)) = self.choose(is_root) else { return };
        let Some(command) = self.words(&chain) else { return };
        let given = self.given(who, &command, &layers);
        let through = Through::new(&self.store());
        let (_, host) = self.store.as_ref().expect("an open store");
        let most = if self.rng.below(2) == 0 { 12 } else { 40 };
        let after = self.rng.below(most);
        host.dies_after(after);
        let outcome = through.command(&self.caller(who), &chain, &command);
        let is_dead = host.is_dead();
        through.tree.close();
        drop(through);
        self.store = None;
        let called = who.map_or(0, |who| self.people.users[who].uid);
        let end = if is_dead { "cut off" } else { "not cut off" };
        self.say(format!("uid {called}: {}: {command}: {end} after {after} changes: {outcome:?}", chain.display()));
        self.tally.killed += u64::from(is_dead);
        // What is half done lets nobody in either.
        let half = Seen::of(&self.root);
        if let Some(found) = given.overstepped(&half).or_else(|| given.misowned(&half, |path| self.readers(path))) {
            self.fail(&format!("{command}, half done: {found}"));
        }
        self.open_only();
        let was_left = !self.is_whole();
        if was_left && self.rng.below(2) == 0 {
            // Somebody else gives it again before it is taken up: nothing is gained or lost by that.
            let other = self.rng.below(self.people.users.len() as u64) as usize;
            let through = Through::new(&self.store());
            let again = through.command(&self.people.users[other].caller(), &chain, &command);
            self.say(format!("uid {} gives it again: {again:?}", self.people.users[other].uid));
            self.tally.again += 1;
        }
        Through::new(&self.store()).resume();
        self.rescan();
        self.tally.resumed += u64::from(was_left);
        if !self.is_whole() {
            let why = self.store().catalog().problems.iter().map(|found| found.sentence.clone()).collect::<Vec<_>>();
            self.fail(&format!("a command that was cut off is left: {why:?}"));
        }
        self.judge(&given, &command);
    }

    // What has to hold.

    /// Who reads a view may read all files of it by the kernel, and nobody else is kept from it.
    fn check_views(&mut self, person: &Person) {
        let seen = Seen::of(&self.root);
        let (may, store, through) = (self.may(person, &seen), self.store(), Through::new(&self.store()));
        let catalog = store.catalog();
        let chains: Vec<(PathBuf, usize)> = catalog.chains().collect();
        for (path, leaf) in self.some(&chains) {
            let views = store.chain_views(&catalog, leaf);
            for view in &views.views {
                let files: Vec<PathBuf> =
                    views.layers[view.layer..].iter().map(|index| catalog.images[*index].place.path.clone()).collect();
                let name = String::from_utf8_lossy(&view.name).into_owned();
                let place = if view.active { "active.raw".into() } else { format!("snapshots/{name}.raw") };
                let at = path.join(place);
                let named = chain(&seen, &files[0]).unwrap_or_default();
                // Where what a header names does not count, the modes are those of what is left, which shows nothing.
                let is_told = files.iter().all(|file| may.read.contains(file));
                let is_allowed = is_told && named.iter().all(|file| may.read.contains(file));
                let Some(inode) = through.number(&at) else { continue };
                let shown = through.walk(person, &at, 4).is_some();
                let read = through.open(person, inode, Opening::Read, |handle| through.bytes(handle));
                let attribute = through.tree.extended_attribute(&person.caller(), inode, "user.chainfs.depth".as_ref());
                let (uid, at) = (person.uid, at.display());
                let is_described = shown || attribute.is_ok_and(|found| found.is_some());
                if (!is_allowed && read.is_ok()) || (!is_told && is_described) {
                    self.fail(&format!("uid {uid} {:?} gets at {at}, made of {files:?}", person.groups));
                }
                if !is_allowed {
                    self.tally.unread += 1;
                    continue;
                }
                let is_sound = is_sound(&seen, &files[0]) && view.snapshot.is_none() && self.is_whole();
                let wanted = disk(&seen, &files[0]);
                match read {
                    Ok(Ok(bytes)) if is_sound && wanted.is_some_and(|wanted| bytes != wanted) => {
                        self.fail(&format!("{at} shows other bytes than its files hold"))
                    }
                    Ok(Ok(_)) => self.tally.read += 1,
                    _ if is_sound && catalog.view_problem(&views.layers[view.layer..]).is_none() => {
                        self.fail(&format!("uid {uid} {:?} may read all of {at}, and is kept from it", person.groups))
                    }
                    _ => {}
                }
                let is_owner = seen.files.get(&files[0]).is_some_and(|file| file.uid == uid);
                let is_open = seen.files.contains_key(&files[0])
                    && catalog.chain(&path).is_some_and(|leaf| {
                        let leaf = &catalog.images[leaf].place.path;
                        let is_leafs_owner = seen.files.get(leaf).is_some_and(|file| file.uid == uid);
                        is_open_to(&seen, leaf, uid, is_leafs_owner, 4)
                    })
                    && files.iter().all(|file| is_open_to(&seen, file, uid, is_owner, 4));
                if is_open && !shown && is_sound {
                    self.fail(&format!("uid {uid} {:?} may read {at}, and its modes say no", person.groups));
                }
                self.tally.shown += u64::from(shown);
            }
        }
    }

    /// Names that the person is to be told by no text: of files that the kernel lets not be read, and that no file which
    /// may be read names.
    fn hidden_from(&self, person: &Person, seen: &Seen) -> BTreeSet<String> {
        let may = self.may(person, seen);
        let (mut open, mut hidden) = (BTreeSet::new(), BTreeSet::new());
        for path in seen.files.keys() {
            let into = if may.read.contains(path) { &mut open } else { &mut hidden };
            into.extend(names(text(path.file_name().map_or(path, Path::new)).as_bytes()));
        }
        let known = seen.files.iter().filter(|(path, _)| may.read.contains(*path) && !is_raw(path));
        for (_, file) in known {
            open.extend(names(&file.bytes[..file.bytes.len().min(4096)]));
        }
        hidden.retain(|name| !open.contains(name));
        hidden
    }

    fn check_text(&mut self, what: &str, person: &Person, said: &[u8], hidden: &BTreeSet<String>, own: &str) {
        self.tally.texts += 1;
        self.tally.hidden += hidden.len() as u64;
        let (told, own) = (names(said), names(own.as_bytes()));
        if let Some(name) = told.iter().find(|name| hidden.contains(*name) && !own.contains(*name)) {
            let said = String::from_utf8_lossy(said);
            self.fail(&format!("{what} tells uid {} {:?} of {name}:\n{said}", person.uid, person.groups));
        }
    }

    /// No text tells anybody of what may not be read.
    fn check_reports(&mut self, person: &Person) {
        let seen = Seen::of(&self.root);
        let (hidden, through) = (self.hidden_from(person, &seen), Through::new(&self.store()));
        for file in ["chains.json", "metrics", "problems.txt", "trash.txt", "tree.svg", "tree.txt"] {
            let said = through.text(person, &Path::new(".chainfs").join(file));
            let Some(said) = said else { self.fail(&format!("uid {} cannot read {file}", person.uid)) };
            self.check_text(file, person, &said, &hidden, "");
        }
        let chains = self.chains();
        for (chain, _) in self.some(&chains) {
            for file in ["chain.json", "problem.txt", "tree.svg", "tree.txt"] {
                if let Some(said) = through.text(person, &chain.join("info").join(file)) {
                    self.check_text(file, person, &said, &hidden, "");
                }
            }
            if let Some(listed) = through.list(person, &chain.join("snapshots")) {
                self.check_text("a directory", person, &listed, &hidden, "");
            }
        }
    }

    pub(crate) fn step(&mut self) {
        if self.is_hidden {
            return;
        }
        self.tally.steps += 1;
        let images = Seen::of(&self.root).files.len();
        match self.rng.below(26) {
            0 if images < MAX_IMAGES => self.base(),
            1..=3 if images < MAX_IMAGES => self.overlay(),
            4..=6 => self.allow(),
            8 => self.damage(),
            9..=11 => self.write(),
            12..=16 => self.give(false),
            17 | 18 => self.give(true),
            19..=24 => self.kill(),
            25 => {
                self.store = None;
                self.open();
            }
            _ => self.replace(),
        }
        self.rescan();
        let person = &self.people.users[self.rng.below(self.people.users.len() as u64) as usize];
        match self.rng.below(3) {
            0 => self.check_views(person),
            1 => self.check_reports(person),
            _ => self.check_free(),
        }
    }

    /// QEMU finds every image sound, now and then.
    pub(crate) fn end(self) -> Tally {
        self.tally
    }
}
