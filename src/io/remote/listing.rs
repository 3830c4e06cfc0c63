//! What a bucket has: the tree of its objects, their versions, and the listing that is kept for `-o offline`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use chainfs_objects::ObjectInfo;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::io::object::Timestamp;
use crate::io::object_tree::{ListedObject, Listing, ObjectTree};
use crate::io::{Backend, Existing, read_all};

/// Bytes of a kept listing, at most.
const MAX_SAVED: u64 = 256 << 20;
/// Objects whose names begin so are chainfs' own.
const OWN_PREFIX: &str = ".chainfs";

/// A number for a text, the same in every run of the program.
pub(super) fn number_of(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    u64::from_le_bytes(*digest.first_chunk().expect("32 bytes")) | 1
}

/// The objects of a bucket by path, with their versions.
#[derive(Default)]
pub(super) struct Named {
    pub listing: Arc<Listing>,
    versions: BTreeMap<PathBuf, String>,
}

/// An object in a kept listing.
#[derive(Serialize, Deserialize)]
struct SavedObject {
    name: String,
    len: u64,
    version: String,
    seconds: i64,
}

impl Named {
    /// The tree of these objects, of which those that cannot be files of a tree are left out.
    pub(super) fn of(found: Vec<ObjectInfo>) -> Self {
        let objects = found.into_iter().map(|object| SavedObject {
            seconds: object
                .modified
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs().cast_signed()),
            name: object.name,
            len: object.len,
            version: object.version,
        });
        Self::of_saved(objects)
    }

    fn of_saved(found: impl Iterator<Item = SavedObject>) -> Self {
        let (mut objects, mut versions) = (BTreeMap::new(), BTreeMap::new());
        let mut digest = Sha256::new();
        for object in found {
            let path = PathBuf::from(&object.name);
            let is_normal =
                ObjectTree::normal(&path).is_ok_and(|normal| normal.as_os_str() == path.as_os_str());
            let is_own = path.iter().next() == Some(OsStr::new(OWN_PREFIX));
            if !is_normal || is_own {
                continue;
            }
            let tag = number_of(&object.version);
            digest.update(number_of(&object.name).to_le_bytes());
            digest.update(tag.to_le_bytes());
            let modified = Timestamp { seconds: object.seconds, nanoseconds: 0 };
            let listed = ListedObject { number: number_of(&object.name), tag, len: object.len, modified };
            objects.insert(path.clone(), listed);
            versions.insert(path, object.version);
        }
        // An object whose name is also a directory's is hidden by it.
        let hidden: BTreeSet<PathBuf> = objects
            .keys()
            .flat_map(|path| path.ancestors().skip(1))
            .filter(|above| objects.contains_key(*above))
            .map(Path::to_path_buf)
            .collect();
        objects.retain(|path, _| !hidden.contains(path));
        let tag = u64::from_le_bytes(*digest.finalize().first_chunk().expect("32 bytes"));
        Self { listing: Arc::new(Listing { objects, tag }), versions }
    }

    /// The version of an object, as the server calls it; `None` if another one is listed now.
    pub(super) fn version(&self, path: &Path, object: &ListedObject) -> Option<&str> {
        let now = self.listing.objects.get(path)?;
        ((now.number, now.tag) == (object.number, object.tag))
            .then(|| self.versions.get(path).map(String::as_str))?
    }

    fn saved(&self) -> Vec<SavedObject> {
        let one = |(path, object): (&PathBuf, &ListedObject)| {
            let version = self.versions.get(path)?.clone();
            let name = path.to_str()?.to_owned();
            Some(SavedObject { name, len: object.len, version, seconds: object.modified.seconds })
        };
        self.listing.objects.iter().filter_map(one).collect()
    }
}

/// The last listing of a bucket, in the directory of the cache.
pub(super) struct SavedListing {
    files: Arc<dyn Backend>,
    path: PathBuf,
}

impl SavedListing {
    pub(super) fn new(files: &Arc<dyn Backend>, location: &str) -> Option<Self> {
        files.names()?;
        Some(Self {
            files: Arc::clone(files),
            path: PathBuf::from(format!("{:016x}.listing", number_of(location))),
        })
    }

    /// What was kept, if that is sound.
    pub(super) fn read(&self) -> Option<Named> {
        let file = self.files.open_file(&self.path).ok()?;
        let bytes = read_all(&*file, MAX_SAVED).ok()?;
        let objects: Vec<SavedObject> = serde_json::from_slice(&bytes).ok()?;
        Some(Named::of_saved(objects.into_iter()))
    }

    /// Keeps a listing instead of the last one.
    pub(super) fn write(&self, named: &Named) -> Result<()> {
        let Some(directory) = self.files.names() else { return Ok(()) };
        let draft = self.path.with_extension(format!("{}.draft", std::process::id()));
        let bytes = serde_json::to_vec(&named.saved()).expect("plain values");
        let kept = self.files.open_file(&self.path).and_then(|file| read_all(&*file, MAX_SAVED));
        if kept.is_ok_and(|kept| kept == bytes) {
            // Nearly every command finds it so, and need not wait for a sync.
            return Ok(());
        }
        // Of a process that was killed.
        let _ = directory.unlink(&draft);
        let result = (|| {
            let file = directory.create(&draft, None)?;
            file.write_at(0, &bytes)?;
            file.sync()?;
            directory.rename(&draft, &self.path, Existing::Replace)
        })();
        if result.is_err() {
            let _ = directory.unlink(&draft);
        }
        result
    }
}
