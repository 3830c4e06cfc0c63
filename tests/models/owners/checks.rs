//! The invariants of a store between steps: who reads and writes which files, and what reports disclose.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use chainfs::fs::Caller;
use chainfs::store::Access as Opening;
use rustix::fs::Access;

use super::after::{is_open_to, is_sound};
use super::image::{backing_name, chain, disk, is_raw};
use super::people::{GIDS, Person, names, text};
use super::seen::Seen;
use super::through::Through;
use super::world::World;

impl World<'_> {
    /// Whether a file is certainly an active disk: sound, and named by no image whose name could count.
    pub(crate) fn is_free(&self, seen: &Seen, path: &Path) -> bool {
        let store = self.store();
        let catalog = store.catalog();
        let Some(entry) = catalog.images.iter().find(|image| image.place.path == path) else { return false };
        let is_claimed = !self.damage.is_empty() || !self.is_whole();
        let is_kept = entry.is_frozen() || seen.files[path].mode & 0o222 == 0 || entry.problem.is_some();
        // Overlays of broken images are tested elsewhere.
        let is_odd = seen.files.keys().any(|path| !is_sound(seen, path));
        if is_claimed || is_kept || is_odd || !is_sound(seen, path) {
            return false;
        }
        !seen.is_linked(path)
            && seen.overlays_of(path).iter().all(|overlay| self.is_shut(seen, overlay, path))
    }

    /// A private file named by another user stays its owner's active disk.
    pub(crate) fn check_free(&mut self) {
        let seen = self.seen();
        let store = self.store();
        let catalog = store.catalog();
        for path in seen.files.keys() {
            if !self.is_free(&seen, path) {
                continue;
            }
            let found = catalog.images.iter().position(|image| image.place.path == *path);
            if found.is_none_or(|found| !catalog.is_active(found) || !catalog.images[found].users.is_empty())
            {
                self.fail(&format!(
                    "{} is no active disk, though nobody may rightly name it",
                    path.display()
                ));
            }
            self.tally.unimpressed += u64::from(!seen.overlays_of(path).is_empty());
        }
        // A name counts if the owner may read the named file.
        for (path, file) in &seen.files {
            let below = file.backing.as_ref().filter(|_| is_sound(&seen, path) && self.is_whole());
            let Some(below) = below.filter(|below| !seen.is_linked(below) && !seen.is_linked(path)) else {
                continue;
            };
            let is_plain =
                backing_name(&file.bytes).is_some_and(|name| !name.contains(':') && !name.contains("-link"));
            let counts = self
                .people
                .owner(file.uid)
                .is_none_or(|owner| owner.may(&self.root.join(below), Access::READ_OK));
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

    /// A reader of a view may read all its files by the kernel, and any user who may is admitted.
    pub(crate) fn check_views(&mut self, person: &Person) {
        let seen = self.seen();
        let (may, store, through) = (self.may(person, &seen), self.store(), Through::new(&self.store()));
        let catalog = store.catalog();
        let chains: Vec<(PathBuf, usize)> = catalog.chains().collect();
        for (path, leaf) in self.some(&chains) {
            let views = store.chain_views(&catalog, leaf);
            for view in &views.views {
                let files: Vec<PathBuf> = views.layers[view.layer..]
                    .iter()
                    .map(|index| catalog.images[*index].place.path.clone())
                    .collect();
                let name = String::from_utf8_lossy(&view.name).into_owned();
                let place = if view.active { "active.raw".into() } else { format!("snapshots/{name}.raw") };
                let at = path.join(place);
                let named = chain(&seen, &files[0]).unwrap_or_default();
                // If a header's name does not count, the modes are those of the remaining layers, which show
                // nothing.
                let is_told = files.iter().all(|file| may.read.contains(file));
                let is_readable = |file: &PathBuf| {
                    let inode = seen.files[file].inode;
                    may.read.iter().any(|path| seen.files[path].inode == inode)
                };
                let is_allowed = is_told && named.iter().all(is_readable);
                let Some(inode) = through.number(&at) else { continue };
                let shown = through.walk(person, &at, 4).is_some();
                let read = through.open(person, inode, Opening::Read, |handle| through.bytes(handle));
                let depth = "user.chainfs.depth".as_ref();
                let attribute = through.tree.extended_attribute(&person.caller(), inode, depth, || None);
                let (uid, at) = (person.uid, at.display());
                let is_described = shown || attribute.is_ok_and(|found| found.is_some());
                if (!is_allowed && read.is_ok()) || (!is_told && is_described) {
                    self.fail(&format!("uid {uid} {:?} gets at {at}, made of {files:?}", person.groups));
                }
                // The kernel caches modes, whoever has asked for them. Owners are assumed to be in no group.
                let modes = through.tree.attributes(&Caller::ADMINISTRATOR, inode);
                let modes = modes.map(|found| (found.uid, found.gid, found.permissions)).unwrap_or_default();
                let is_known = modes.0 != uid || person.groups.iter().all(|group| !GIDS.contains(group));
                if !is_told && is_known && person.is_let_in(modes, 4) {
                    self.fail(&format!(
                        "uid {uid} {:?} may not read all of {at}, and its modes say so",
                        person.groups
                    ));
                }
                if !is_allowed {
                    self.tally.unread += 1;
                    continue;
                }
                let is_plain = view.snapshot.is_none() && !files.iter().any(|file| seen.is_linked(file));
                let is_sound = is_sound(&seen, &files[0]) && is_plain && self.is_whole();
                let wanted = disk(&seen, &files[0]);
                match read {
                    Ok(Ok(bytes)) if is_sound && wanted.is_some_and(|wanted| bytes != wanted) => {
                        self.fail(&format!("{at} shows other bytes than its files hold"))
                    }
                    Ok(Ok(_)) => self.tally.read += 1,
                    _ if is_sound && catalog.view_problem(&views.layers[view.layer..]).is_none() => self
                        .fail(&format!(
                            "uid {uid} {:?} may read all of {at}, and is kept from it",
                            person.groups
                        )),
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

    /// Names that no text may disclose to the user: of files that the kernel denies, and that no readable
    /// file names.
    pub(crate) fn hidden_from(&self, person: &Person, seen: &Seen) -> BTreeSet<String> {
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

    pub(crate) fn check_text(
        &mut self,
        what: &str,
        person: &Person,
        said: &[u8],
        hidden: &BTreeSet<String>,
        own: &str,
    ) {
        self.tally.texts += 1;
        self.tally.hidden += hidden.len() as u64;
        let (told, own) = (names(said), names(own.as_bytes()));
        if let Some(name) = told.iter().find(|name| hidden.contains(*name) && !own.contains(*name)) {
            let said = String::from_utf8_lossy(said);
            self.fail(&format!("{what} tells uid {} {:?} of {name}:\n{said}", person.uid, person.groups));
        }
    }

    /// No text discloses an unreadable file.
    pub(crate) fn check_reports(&mut self, person: &Person) {
        let seen = self.seen();
        let (hidden, through) = (self.hidden_from(person, &seen), Through::new(&self.store()));
        for file in [
            ".chainfs/chains.json",
            ".chainfs/index.html",
            ".chainfs/metrics",
            ".chainfs/problems.txt",
            ".chainfs/trash.txt",
            ".chainfs/tree.svg",
            ".chainfs/tree.txt",
            "README.txt",
        ] {
            let said = through.text(person, Path::new(file));
            let Some(said) = said else { self.fail(&format!("uid {} cannot read {file}", person.uid)) };
            self.check_text(file, person, &said, &hidden, "");
        }
        let chains = self.chains();
        for (chain, _) in self.some(&chains) {
            for file in ["chain.json", "index.html", "problem.txt", "tree.svg", "tree.txt"] {
                if let Some(said) = through.text(person, &chain.join("info").join(file)) {
                    self.check_text(file, person, &said, &hidden, "");
                }
            }
            if let Some(listed) = through.list(person, &chain.join("snapshots")) {
                self.check_text("a directory", person, &listed, &hidden, "");
            }
        }
    }
}
