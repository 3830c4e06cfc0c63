//! Actions of users and root through the mount: guest writes, and commands that are given, interrupted and
//! resumed.

use std::path::{Path, PathBuf};

use chainfs::fs::Caller;
use chainfs::store::Access as Opening;
use rustix::fs::Access;

use super::after::{Given, is_surely_uncounted};
use super::hands::relative;
use super::image::{chain, disk, is_same_disk};
use super::people::Person;
use super::seen::Seen;
use super::through::Through;
use super::world::World;

impl World<'_> {
    /// A guest of some user writes an active disk.
    pub(crate) fn write(&mut self) {
        let Some((Some(number), path, layers)) = self.choose(false) else { return };
        let (person, seen) = (&self.people.users[number], self.seen());
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
            self.fail(&format!(
                "uid {} has written {}, which the kernel would not let",
                person.uid,
                path.display()
            ));
        }
        self.tally.written += 1;
        let after = self.seen();
        for (other, was) in &seen.files {
            let is_it = was.inode == seen.files[file].inode;
            if !is_it && after.files.get(other).is_none_or(|now| now.bytes != was.bytes) {
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

    pub(crate) fn words(&mut self, chain: &Path) -> Option<String> {
        let store = self.store();
        let catalog = store.catalog();
        let views = store.chain_views(&catalog, catalog.chain(chain)?);
        let layers: Vec<(String, bool)> = views
            .views
            .iter()
            .filter(|view| view.snapshot.is_none())
            .map(|view| (String::from_utf8_lossy(&view.name).into_owned(), view.active))
            .collect();
        let names: Vec<String> =
            layers.iter().filter(|layer| !layer.1).map(|layer| layer.0.clone()).collect();
        let any = |world: &mut Self, word: &str| match world.pick(&names) {
            Some(name) if world.rng.below(3) > 0 => format!(" {word}={name}"),
            _ => String::new(),
        };
        let number = self.next();
        let seen = self.seen();
        Some(match self.rng.below(19) {
            0..=2 => format!("snapshot {number}"),
            3 => {
                let below: Vec<PathBuf> = seen.directories.keys().chain(seen.links.keys()).cloned().collect();
                let directory = self.pick(&below)?;
                let from = chain.parent().unwrap_or(Path::new(""));
                let file =
                    directory.strip_prefix(from).unwrap_or(Path::new("")).join(format!("{number}.qcow2"));
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

    pub(crate) fn given(&self, who: Option<usize>, command: &str, layers: &[PathBuf]) -> Given {
        let before = self.seen();
        let by = who.map(|who| &self.people.users[who]).map(|person| (person.uid, self.may(person, &before)));
        let (layers, readers) = (layers.to_vec(), self.readers(&layers[0]));
        let verb = command.split(' ').next().unwrap_or_default().to_owned();
        Given { verb, by, before, layers, readers }
    }

    pub(crate) fn readers(&self, path: &Path) -> Vec<bool> {
        self.people.users.iter().map(|person| person.may(&self.root.join(path), Access::READ_OK)).collect()
    }

    pub(crate) fn judge(&self, given: &Given, command: &str) {
        let after = self.seen();
        let reads = |path: &Path| self.readers(path);
        let found = given
            .overstepped(&after)
            .or_else(|| given.misowned(&after, reads))
            .or_else(|| given.spoilt(&after));
        let found = found
            .or_else(|| given.cut_off_from(&after, |overlay, target| self.is_shut(&after, overlay, target)));
        if let Some(found) = found {
            self.fail(&format!("{command}: {found}"));
        }
    }

    /// Whether a name certainly does not count: its owner is a user who may not read the target.
    pub(crate) fn is_shut(&self, seen: &Seen, overlay: &Path, target: &Path) -> bool {
        let owner = self.people.owner(seen.files[overlay].uid);
        owner.is_some_and(|owner| is_surely_uncounted(seen, overlay, target, &self.may(owner, seen)))
    }

    /// The user of a command, and its chain: mostly the user's own.
    pub(crate) fn choose(&mut self, is_root: bool) -> Option<(Option<usize>, PathBuf, Vec<PathBuf>)> {
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
                    && layers[0]
                        .parent()
                        .is_some_and(|directory| may(directory, Access::WRITE_OK | Access::EXEC_OK))
            };
            chains.iter().filter(is_owned).cloned().collect()
        };
        let mut users: Vec<usize> = (0..self.people.users.len()).collect();
        users.rotate_left(any);
        let (who, owned) = users
            .into_iter()
            .map(|who| (who, owned(&self.people.users[who])))
            .find(|(_, of)| !of.is_empty())?;
        let long: Vec<_> = owned.iter().filter(|(_, layers)| layers.len() > 1).cloned().collect();
        let among = if long.is_empty() || self.rng.below(3) == 0 { owned } else { long };
        let (chain, layers) = self.pick(&among)?;
        Some((Some(who), chain, layers))
    }

    /// The command, mostly one that is not refused: an immediate refusal tests little.
    pub(crate) fn command(
        &mut self,
        is_root: bool,
    ) -> Option<(Option<usize>, PathBuf, Vec<PathBuf>, String)> {
        let tries = if self.rng.below(4) == 0 { 1 } else { 4 };
        let mut last = None;
        for _ in 0..tries {
            let (who, chain, layers) = self.choose(is_root)?;
            let Some(command) = self.words(&chain) else { continue };
            let plan = Through::new(&self.store()).plan(&self.caller(who), &chain, &command);
            let is_refused = plan.is_none_or(|plan| {
                let plan = String::from_utf8_lossy(&plan).into_owned();
                !plan.contains("after:") || plan.contains("refused:")
            });
            last = Some((who, chain, layers, command));
            if !is_refused {
                break;
            }
        }
        last
    }

    pub(crate) fn caller(&self, who: Option<usize>) -> Caller {
        who.map_or(Caller::ADMINISTRATOR, |who| self.people.users[who].caller())
    }

    pub(crate) fn give(&mut self, is_root: bool) {
        let Some((who, chain, layers, command)) = self.command(is_root) else { return };
        let given = self.given(who, &command, &layers);
        let through = Through::new(&self.store());
        if let Some(who) = who
            && self.rng.below(2) == 0
        {
            let person = &self.people.users[who];
            let hidden = self.hidden_from(person, &given.before);
            if let Some(said) = through.plan(&person.caller(), &chain, &command) {
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
        // Any user may read the result.
        let seen = self.seen();
        for _ in 0..2 {
            let person = &self.people.users[self.rng.below(self.people.users.len() as u64) as usize];
            let was_hidden = self.hidden_from(person, &given.before);
            let hidden = self.hidden_from(person, &seen).intersection(&was_hidden).cloned().collect();
            for file in ["status", "plan"] {
                if let Some(said) = through.text(person, &chain.join("control").join(file)) {
                    let own = if who.is_some_and(|who| self.people.users[who].uid == person.uid) {
                        &command
                    } else {
                        ""
                    };
                    self.check_text(file, person, &said, &hidden, own);
                }
            }
        }
    }

    /// A command is interrupted, and resumed at the next start.
    pub(crate) fn kill(&mut self) {
        let is_root = self.rng.below(4) == 0;
        let Some((who, chain, layers, command)) = self.command(is_root) else { return };
        let mut given = self.given(who, &command, &layers);
        let through = Through::new(&self.store());
        let (_, host) = self.store.as_ref().expect("an open store");
        let most = if self.rng.below(2) == 0 { 10 } else { 30 };
        let after = self.rng.below(most);
        host.dies_after(after);
        let outcome = through.command(&self.caller(who), &chain, &command);
        let is_dead = host.is_dead();
        through.tree.close();
        drop(through);
        self.store = None;
        let called = who.map_or(0, |who| self.people.users[who].uid);
        let end = if is_dead { "cut off" } else { "not cut off" };
        self.say(format!(
            "uid {called}: {}: {command}: {end} after {after} changes: {outcome:?}",
            chain.display()
        ));
        self.tally.killed += u64::from(is_dead);
        // An unfinished change grants no access either.
        let half = self.seen();
        if let Some(found) =
            given.overstepped(&half).or_else(|| given.misowned(&half, |path| self.readers(path)))
        {
            self.fail(&format!("{command}, half done: {found}"));
        }
        let touched = (is_dead && self.rng.below(2) == 0).then(|| {
            self.interfere(&layers);
            self.seen()
        });
        self.open_only();
        let was_left = !self.is_whole();
        if was_left && self.rng.below(4) > 0 {
            // Another user gives it again before it is resumed: no rights are gained or lost by that.
            let other = self.rng.below(self.people.users.len() as u64) as usize;
            let through = Through::new(&self.store());
            let again = through.command(&self.people.users[other].caller(), &chain, &command);
            self.say(format!("uid {} gives it again: {again:?}", self.people.users[other].uid));
            self.tally.again += 1;
        }
        Through::new(&self.store()).resume();
        self.rescan();
        self.tally.resumed += u64::from(was_left);
        if let Some(mid) = touched {
            self.tally.touched += 1;
            self.is_hidden = !self.is_whole();
            self.tally.left += u64::from(self.is_hidden);
            if let Some(found) = given.trespassed(&half, &mid, &self.seen()) {
                self.fail(&format!("{command}, going on after others have acted: {found}"));
            }
            return;
        }
        if !self.is_whole() {
            let why = self
                .store()
                .catalog()
                .problems
                .iter()
                .map(|found| found.sentence.clone())
                .collect::<Vec<_>>();
            self.fail(&format!("a command that was cut off is left: {why:?}"));
        }
        given.forget_swept(&half, &self.seen());
        self.judge(&given, &command);
    }
}
