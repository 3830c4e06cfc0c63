//! The catalog as of one moment, and every user of its images.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::create::NewBacking;
use crate::io::{FileLock, Identity, ObjectId};
use crate::store::{
    Catalog, ChainViews, DataFileRef, FileRef, Format, FoundIntent, ImageEntry, ImageIndex, Store, StorePath,
    layer_name, shown,
};

use super::asker::{Asker, asker};

/// A store as of one scan.
pub(super) struct ScannedStore {
    pub(super) store: Arc<Store>,
    pub(super) catalog: Arc<Catalog>,
    /// For a store that is one image, or lies in a marked one: all images beneath the marked directory above
    /// it.
    pub(super) whole: Option<Arc<Catalog>>,
    /// The user who gave the command, if rights are checked.
    pub(super) asker: Option<Arc<Asker>>,
    /// The intent that is being resumed: it blocks nothing.
    own: Option<OsString>,
    /// Whether a command begins: it opens the files it writes next, and is refused by that.
    begins: bool,
}

/// One chain of it.
pub(super) struct ScannedChain {
    pub(super) path: PathBuf,
    pub(super) views: Arc<ChainViews>,
}

impl ScannedChain {
    /// Its name in a sentence: a chain that was mounted by itself has no path, so its image is named.
    pub(super) fn shown(&self, scan: &ScannedStore) -> String {
        if self.path.as_os_str().is_empty() {
            scan.image(self.views.layers[0]).shown()
        } else {
            shown(&self.path)
        }
    }
}

/// The chain of a command, as the end of a sentence; empty for an image that was mounted by itself.
pub(super) fn of_chain(path: &Path) -> String {
    if path.as_os_str().is_empty() { String::new() } else { format!(" (chain {})", shown(path)) }
}

impl ScannedStore {
    /// Scans the store, and the store around it.
    pub(super) fn scan(store: &Arc<Store>) -> Result<Self> {
        store.rescan()?;
        let whole = store.whole()?;
        Ok(Self {
            store: Arc::clone(store),
            catalog: store.catalog(),
            whole,
            asker: asker(store),
            own: None,
            begins: false,
        })
    }

    /// The same for resuming an intent.
    pub(super) fn scan_for_resume(store: &Arc<Store>, intent: &OsStr) -> Result<Self> {
        Ok(Self { own: Some(intent.to_owned()), ..Self::scan(store)? })
    }

    /// The same for a command: under the store's lock, and with room for its intent.
    pub(super) fn begin(store: &Arc<Store>) -> Result<(FileLock, Self)> {
        let names = store.guard_names();
        store.guard().check_place()?;
        store.guard().prepare(&*names)?;
        let lock = store.guard().lock(&*names)?;
        Ok((lock, Self { begins: true, ..Self::scan(store)? }))
    }

    pub(super) fn image(&self, index: ImageIndex) -> &ImageEntry {
        &self.catalog.images[index]
    }

    /// Whether an image is the top of an active disk.
    pub(super) fn is_active_disk(&self, index: ImageIndex) -> bool {
        self.image(index).users.is_empty() && self.catalog.is_active(index)
    }

    /// The image that an intent or a plan names, if it is still that file.
    pub(super) fn find(&self, named: &FileRef) -> Option<ImageIndex> {
        let is_it = |image: &ImageEntry| {
            image.stat.id == named.file.id()
                && self.name_of(&image.place) == named.path
                && self.identity(image).is(&named.file)
        };
        self.catalog.images.iter().position(is_it)
    }

    /// The same where a command cannot go on without it.
    pub(super) fn expect(&self, named: &FileRef) -> Result<ImageIndex> {
        self.find(named).ok_or_else(|| {
            let fact = "has been changed or removed by another process";
            Error::new(ErrorKind::Stale, format!("{} {fact}", shown(&named.path)))
        })
    }

    /// A path relative to the store, made relative to the guarded directory.
    pub(super) fn guarded(&self, path: &Path) -> PathBuf {
        self.store.guard().prefix.join(path)
    }

    /// An image by path and identity.
    pub(super) fn named(&self, index: ImageIndex) -> FileRef {
        let image = self.image(index);
        FileRef::known(self.name_of(&image.place), self.identity(image))
    }

    fn identity(&self, image: &ImageEntry) -> Identity {
        let found = self.store.roots()[image.place.root].identify(&image.place.path);
        // Its removal since the scan is found when the file is opened.
        let seen = Identity::of_id(image.stat.id);
        found.ok().filter(|found| found.id() == image.stat.id).unwrap_or(seen)
    }

    /// The same for an intent: with evidence of its content. `fixed`: only the command changes it.
    pub(super) fn witness(&self, index: ImageIndex, fixed: bool) -> Result<FileRef> {
        let image = self.image(index);
        let root = &*self.store.roots()[image.place.root];
        let format = image.format.unwrap_or(Format::Raw);
        let named = FileRef::witness(root, &image.place.path, format, fixed)?;
        if named.file.id() != image.stat.id {
            return Err(Error::new(
                ErrorKind::Stale,
                format!("{} has changed; give the command again", image.shown()),
            ));
        }
        let data = image.data_file.as_ref().map(|(place, _)| {
            DataFileRef::witness(&*self.store.roots()[place.root], &place.path, self.name_of(place), fixed)
                .map(Box::new)
        });
        Ok(FileRef { path: self.name_of(&image.place), data: data.transpose()?, ..named })
    }

    /// The same for several.
    pub(super) fn witnesses(&self, images: &[ImageIndex], fixed: bool) -> Result<Vec<FileRef>> {
        images.iter().map(|index| self.witness(*index, fixed)).collect()
    }

    /// The path by which an intent names a file: relative to the guarded directory; outside of the store the
    /// full path.
    fn name_of(&self, place: &StorePath) -> PathBuf {
        if place.root == 0 { self.guarded(&place.path) } else { self.store.host_path(place) }
    }

    /// The chain at that path of the mount.
    pub(super) fn chain(&self, path: &Path) -> Result<ScannedChain> {
        let leaf = self
            .catalog
            .chain(path)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no chain {}", shown(path))))?;
        Ok(ScannedChain { path: path.to_path_buf(), views: self.store.chain_views(&self.catalog, leaf) })
    }

    /// The backing file of an image, if it is known.
    pub(super) fn backing_of(&self, index: ImageIndex) -> Option<ImageIndex> {
        self.image(index).below.image()
    }

    /// Whether an image is backed by that file, or its header still names it after its removal.
    pub(super) fn names(&self, index: ImageIndex, named: &FileRef) -> bool {
        let image = self.image(index);
        if let Some(below) = self.backing_of(index) {
            return self.find(named) == Some(below);
        }
        let backing = image.qcow2().and_then(|qcow2| qcow2.header.backing.as_ref());
        let place = backing.and_then(|backing| self.store.named_by(&image.place, &backing.name).ok());
        place.is_some_and(|place| self.name_of(&place) == named.path)
    }

    /// Paths of all chains that contain any of these images.
    pub(super) fn chains_of(&self, images: &[ImageIndex]) -> Vec<PathBuf> {
        let contains =
            |leaf: ImageIndex| self.catalog.layers(leaf).iter().any(|layer| images.contains(layer));
        self.catalog.chains().filter(|(_, leaf)| contains(*leaf)).map(|(path, _)| path).collect()
    }

    /// The users of an image, except `known`: overlays, images that have it as their data file, and possible
    /// users.
    pub(super) fn others_using(&self, index: ImageIndex, known: &[ImageIndex]) -> Vec<String> {
        self.others(index, known, true)
    }

    /// The same without images whose owners may not read it. They do not block a command that keeps their
    /// bytes.
    pub(super) fn others_counting(&self, index: ImageIndex, known: &[ImageIndex]) -> Vec<String> {
        self.others(index, known, false)
    }

    fn others(&self, index: ImageIndex, known: &[ImageIndex], is_all: bool) -> Vec<String> {
        let image = self.image(index);
        let known: Vec<ObjectId> = known.iter().map(|index| self.image(*index).stat.id).collect();
        let catalog = self.whole.as_ref().unwrap_or(&self.catalog);
        let mut others = Vec::new();
        let Some(here) = catalog.images.iter().position(|other| other.stat.id == image.stat.id) else {
            return others;
        };
        // Its external data file is part of it.
        let data = image.data_file.as_ref().map(|(_, stat)| stat.id);
        for (number, other) in catalog.images.iter().enumerate() {
            if number == here || known.contains(&other.stat.id) {
                continue;
            }
            let stands = catalog.images[here].users.contains(&number)
                || (is_all && catalog.uncounted_users(here).contains(&number));
            let is_ours = |id: ObjectId| id == image.stat.id || data == Some(id);
            let keeps = other.data_file.as_ref().is_some_and(|(_, stat)| is_ours(stat.id));
            let below = other.below.image().map(|below| catalog.images[below].stat.id);
            let shows_data = data.is_some() && below == data;
            if stands || keeps || shows_data {
                others.push(self.called(other));
            }
        }
        others
            .extend(catalog.claims_on(here).map(|claim| format!("{} (perhaps)", self.called_at(&claim.by))));
        others
    }

    /// The images whose header names an image by the very name under which it is shown. Those that name it by
    /// another name, or through a link, are not among them.
    pub(super) fn users_by_name(&self, index: ImageIndex) -> Vec<ImageIndex> {
        let place = &self.image(index).place;
        let means_it = |other: &ImageEntry| {
            let backing = other.qcow2().and_then(|qcow2| qcow2.header.backing.as_ref());
            backing
                .is_some_and(|backing| self.store.named_by(&other.place, &backing.name).as_ref() == Ok(place))
        };
        (0..self.catalog.images.len()).filter(|other| means_it(self.image(*other))).collect()
    }

    /// Why an image must not be changed because of a possible user, if so.
    fn claimed(&self, image: &ImageEntry) -> Option<Error> {
        let find = |catalog: &Arc<Catalog>| {
            let here = catalog.images.iter().position(|other| other.stat.id == image.stat.id)?;
            Some(catalog.claims_on(here).next()?.sentence(&catalog.images[here]))
        };
        let sentence = self.whole.iter().chain([&self.catalog]).find_map(find)?;
        Some(Error::new(ErrorKind::Forbidden, sentence))
    }

    /// How the header of the image at `from` names the image at `to`: like its old name, absolute or
    /// relative.
    pub(super) fn backing_name(&self, from: ImageIndex, to: ImageIndex) -> NewBacking {
        let old = self.image(from).qcow2().and_then(|qcow2| qcow2.header.backing.as_ref());
        let was_absolute = old.is_some_and(|backing| backing.name.starts_with(b"/"));
        self.backing(&self.image(from).place, to, was_absolute)
    }

    /// How the header of an image at `from` names the image at `to`.
    pub(super) fn backing(&self, from: &StorePath, to: ImageIndex, is_absolute: bool) -> NewBacking {
        let to = self.image(to);
        let place = to.named_place();
        let name = if is_absolute || from.root != place.root {
            self.store.roots()[place.root].given().join(&place.path)
        } else {
            relative(&from.path, &place.path)
        };
        let format = to.format.unwrap_or(Format::Raw).name().to_owned();
        NewBacking { name: name.into_os_string().into_vec(), format }
    }

    /// Why an image that is `owner`'s, at `path` relative to the store, may not be backed by the image `to`,
    /// if so: an image that its owner may not read would not count as its backing file, and the image would
    /// be broken.
    pub(super) fn uncounted(&self, owner: ImageIndex, path: &Path, to: ImageIndex) -> Option<Error> {
        let (owner, to) = (self.image(owner).stat.uid, self.image(to));
        let from = StorePath { root: 0, path: path.to_path_buf() };
        let fact = self.store.uncounted(owner, &from, to.named_place())?;
        let sentence = format!("{} would be backed by {}, which {fact}", shown(path), self.called(to));
        Some(Error::new(ErrorKind::Denied, sentence))
    }

    /// The image that `name` in the header of the image at `from` would name.
    pub(super) fn named_by(&self, from: ImageIndex, name: &[u8]) -> Result<ImageIndex> {
        let shown_name = shown(Path::new(OsStr::from_bytes(name)));
        let place = self.store.named_by(&self.image(from).place, name);
        let place = place.map_err(|fact| Error::new(ErrorKind::Escape, format!("{shown_name} {fact}")))?;
        if let Some(refusal) = self.unreachable(&place) {
            return Err(refusal);
        }
        let id = self.store.roots()[place.root].stat(&place.path)?.id;
        let found =
            self.catalog.images.iter().position(|image| image.stat.id == id && image.format.is_some());
        found.ok_or_else(|| {
            let fact = "is no readable image of the store; name it *.raw, *.img or *.qcow2";
            Error::new(ErrorKind::NotFound, format!("{shown_name} {fact}"))
        })
    }

    /// Why an image cannot be written, renamed or removed by any command, if so.
    pub(super) fn untouchable(&self, index: ImageIndex) -> Option<Error> {
        let image = self.image(index);
        let refuse = |kind, fact: &str| Some(Error::new(kind, format!("{} {fact}", image.shown())));
        if let Some(fact) = self.store.read_only() {
            return refuse(ErrorKind::ReadOnly, &format!("is in a store that {fact}"));
        }
        if image.place.root != 0 {
            return refuse(ErrorKind::ReadOnly, "lies outside of the store, in a read-only directory");
        }
        if image.readonly {
            return refuse(
                ErrorKind::ReadOnly,
                "is read-only by its mode or by -o readonly=; allow writing it first",
            );
        }
        if image.stat.link_count > 1 {
            return refuse(
                ErrorKind::Busy,
                "has other names (hard links), under which it would change; remove those",
            );
        }
        if let Some(other) = &image.found_by {
            let fact = "would lose its backing file, which is found only from its other name";
            let remedy = "give it a name that is found from its own, with qemu-img rebase -u";
            return refuse(ErrorKind::Broken, &format!("{fact} {}; {remedy}", shown(&other.path)));
        }
        if let Some((place, stat)) = &image.data_file {
            let name = shown(&place.path);
            let refuse =
                |kind, fact: &str| Some(Error::new(kind, format!("{name} {fact} of {}", image.shown())));
            if place.root != 0 {
                return refuse(
                    ErrorKind::ReadOnly,
                    "lies outside of the store, and is the external data file",
                );
            }
            if !stat.has_write_bit() || self.store.options().is_readonly(&place.path) {
                return refuse(ErrorKind::ReadOnly, "is read-only, and is the external data file");
            }
            if stat.link_count > 1 {
                return refuse(
                    ErrorKind::Busy,
                    "has other names (hard links), and is the external data file",
                );
            }
        }
        if let Some(problem) = image.qcow2().and_then(|qcow2| qcow2.refcount_problem.as_ref()) {
            return refuse(ErrorKind::Corrupt, problem);
        }
        if image.qcow2().is_some_and(|qcow2| qcow2.header.corrupt()) {
            return refuse(ErrorKind::Corrupt, "is marked as corrupt; run chainfs check --repair all");
        }
        if let Some(refusal) = self.unwritable(index) {
            return Some(refusal);
        }
        // The mark of a raw image goes to the store's list. A list that cannot be written would fail the
        // command at its end and leave it unfinished.
        if image.format == Some(Format::Raw)
            && let Err(error) = self.store.check_notes()
        {
            return Some(error);
        }
        if let Some(problem) = &image.problem {
            return Some(Error::new(ErrorKind::Broken, format!("{} {problem}", image.shown())));
        }
        // S3: users and possible users.
        self.claimed(image).or_else(|| self.used_around(image))
    }

    /// Why the disk of an image cannot be written, if so: opening it for writing would be refused.
    pub(super) fn unfillable(&self, index: ImageIndex) -> Option<Error> {
        if self.begins {
            // All of its tables need not be read twice.
            return None;
        }
        self.store.check_writable(&self.catalog, index).err()
    }

    /// Why a leaf must not be changed: images of the store around it are backed by it.
    fn used_around(&self, image: &ImageEntry) -> Option<Error> {
        let whole = self.whole.as_ref().filter(|_| image.users.is_empty())?;
        let here = whole.images.iter().find(|other| other.stat.id == image.stat.id)?;
        let users: Vec<String> = here.users.iter().map(|user| whole.images[*user].shown()).collect();
        let fact = "backs other images of the store around it";
        let sentence = format!("{} {fact}: {}; give the command there", image.shown(), users.join(", "));
        (!users.is_empty()).then(|| Error::new(ErrorKind::NotEmpty, sentence))
    }

    /// Why an image that is not a leaf must not be changed, if so.
    pub(super) fn unguarded(&self) -> Option<Error> {
        if !self.store.guard().is_whole {
            let directory = self.store.roots()[0].canonical().display();
            let fact = format!(
                "is a single image outside any store, so other users of its layers are unknown; say --store \
                    DIR, the \
                 directory that holds all images which may use them (as in --store {directory}), or mount \
                 that directory"
            );
            return Some(Error::new(
                ErrorKind::Forbidden,
                format!("{} {fact}", self.store.given().display()),
            ));
        }
        None
    }

    /// Intents that name any of these images.
    pub(super) fn begun(&self, images: &[ImageIndex]) -> Option<Error> {
        if let Some(path) = self.catalog.senseless.first() {
            let fact = "notes a command that was begun, and cannot be understood; see what chainfs recover \
                says of it";
            return Some(Error::new(ErrorKind::Busy, format!("{} {fact}", shown(path))));
        }
        // By identity alone: a moved image is still part of the command. And by name alone: its identity may
        // be unknown.
        let speaks = |named: &&FileRef| {
            images.iter().map(|index| self.image(*index)).any(|image| {
                image.stat.id == named.file.id() && self.identity(image).is(&named.file)
                    || self.name_of(&image.place) == named.path
            })
        };
        let is_others = |found: &&FoundIntent| self.own.as_ref() != Some(&found.name);
        let all = self.catalog.intents.iter().chain(self.whole.iter().flat_map(|whole| &whole.intents));
        let found = all.filter(is_others).find(|found| found.intent.files().iter().any(speaks))?;
        let is_owned = self.store.guard().is_owned(found);
        let state = if is_owned {
            "is using them"
        } else {
            "was interrupted and waits to be resumed; mount the store"
        };
        let fact =
            format!("another command {state}: {}{}", found.intent.command, of_chain(&found.intent.chain));
        Some(Error::new(ErrorKind::Busy, fact))
    }
}

/// The relative path from the file `from` to the file `to`, both beneath one root.
pub(super) fn relative(from: &Path, to: &Path) -> PathBuf {
    let base: Vec<Component<'_>> = from.parent().unwrap_or(Path::new("")).components().collect();
    let target: Vec<Component<'_>> = to.components().collect();
    let common = base.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let up = (common..base.len()).map(|_| Component::ParentDir);
    up.chain(target[common..].iter().copied()).collect()
}

/// The file's path with another last component.
pub(super) fn beside(path: &Path, name: &[u8]) -> PathBuf {
    path.with_file_name(OsString::from_vec(name.to_vec()))
}

/// The path of the image with another stem. The extension stays if it says what the file is, so that the layer
/// is called like the stem; that of an image that virsh named (`vm.snap1`) is a part of its name.
pub(super) fn with_stem(path: &Path, format: Option<Format>, stem: &[u8]) -> PathBuf {
    let own = path.extension().map(OsStrExt::as_bytes);
    let is_named_by_virsh = layer_name(path) != path.file_stem().map_or(&b""[..], OsStrExt::as_bytes);
    let extension = match format {
        Some(Format::Qcow2) if is_named_by_virsh => Some(Format::Qcow2.name().as_bytes()),
        _ => own,
    };
    beside(path, &extension.map_or_else(|| stem.to_vec(), |extension| [stem, b".", extension].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_leads_from_one_file_to_another() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to)).display().to_string();
        assert_eq!(way("a.qcow2", "b.raw"), "b.raw");
        assert_eq!(way("x/a.qcow2", "b.raw"), "../b.raw");
        assert_eq!(way("x/y/a.qcow2", "x/z/b.raw"), "../z/b.raw");
        assert_eq!(way("a.qcow2", "x/b.raw"), "x/b.raw");
        let named =
            |path: &str, format, stem: &str| with_stem(Path::new(path), Some(format), stem.as_bytes());
        assert_eq!(named("x/web01.qcow2", Format::Qcow2, "sn.1"), Path::new("x/sn.1.qcow2"));
        assert_eq!(named("web01", Format::Qcow2, "sn1"), Path::new("sn1"));
        assert_eq!(named("vm.snap3", Format::Qcow2, "monday"), Path::new("monday.qcow2"));
        assert_eq!(named("disk.odd", Format::Raw, "monday"), Path::new("monday.odd"));
    }
}
