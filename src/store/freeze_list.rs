//! The list of frozen raw images, which have no header for the mark.
//!
//! `.chainfs/frozen.toml` in the store's directory, which also marks the directory as a store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::io::{Directory, Existing, directory_of, read_text};

use super::control_dir::ControlDir;
use super::encoded;
use super::resolve::StorePath;

/// The file, relative to the store.
pub const FROZEN_NOTES: &str = ".chainfs/frozen.toml";
/// The draft of the file.
const DRAFT: &str = ".chainfs/frozen.new";
/// Records that there is a list: if it is missing then, it was lost. Stores of older versions, and those that
/// are marked by hand, have none.
const LAYOUT: &str = ".chainfs/layout";
/// Longer files are not this list.
const MAX_LEN: u64 = 16 << 20;

/// The list of one store.
#[derive(Debug, Default)]
pub(super) struct FreezeList {
    frozen: BTreeMap<PathBuf, Frozen>,
    /// The path from the guarded directory to the store's own.
    prefix: PathBuf,
    /// Why the list cannot be used, if so.
    problem: Option<String>,
}

#[derive(Deserialize, Serialize)]
struct FreezeFile {
    /// The number of entries: a truncated list is detected by it. Older lists lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    count: Option<usize>,
    frozen: Option<Vec<FreezeRecord>>,
}

/// A list without entries. It is not an empty file: a crash, or a full disk, may leave one of those.
const NOTHING: &str = "count = 0\nfrozen = []\n";

#[derive(Deserialize, Serialize)]
struct FreezeRecord {
    #[serde(with = "encoded")]
    path: PathBuf,
    seconds: i64,
    #[serde(default)]
    nanoseconds: u32,
    #[serde(default)]
    description: String,
}

impl FreezeList {
    /// The list of the store that `guard` guards. If it cannot be read, every raw image counts as frozen.
    pub(super) fn read(guard: &ControlDir) -> Self {
        Self::try_read(guard)
            .unwrap_or_else(|error| Self { problem: Some(error.to_string()), ..Self::default() })
    }

    /// Why the list cannot be used, to follow its name; `None` if it can.
    pub(super) fn problem(&self) -> Option<String> {
        let reason = self.problem.as_ref()?;
        let fact =
            "says which raw images are frozen, and cannot be used, so that all of them count as frozen";
        let remedy = "restore it, or discard it with chainfs recover STORE --forget frozen.toml";
        Some(format!("{fact}: {reason}; {remedy}"))
    }

    fn try_read(guard: &ControlDir) -> Result<Self> {
        guard.check_trust()?;
        let unusable = |reason: String| Error::new(ErrorKind::Corrupt, reason);
        let file = match guard.root.open_file(Path::new(FROZEN_NOTES)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return match guard.root.stat(Path::new(LAYOUT)) {
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
                    _ => Err(unusable("it was removed".to_owned())),
                };
            }
            opened => opened?,
        };
        let parsed = read_text(&*file, MAX_LEN).map_err(|error| error.to_string()).and_then(|text| {
            toml::from_str::<FreezeFile>(&text).map_err(|error| error.message().to_string())
        });
        let FreezeFile { count, frozen } = parsed.map_err(unusable)?;
        let is_whole = |notes: &Vec<FreezeRecord>| count.is_none_or(|count| count == notes.len());
        let notes = frozen.filter(is_whole).ok_or_else(|| unusable("it is cut short".to_owned()))?;
        let note = |FreezeRecord { path, seconds, nanoseconds, description }| {
            (path, Frozen { seconds, nanoseconds, description })
        };
        Ok(Self {
            frozen: notes.into_iter().map(note).collect(),
            prefix: guard.prefix.clone(),
            problem: None,
        })
    }

    /// Whether the file at `place` was frozen, and when.
    pub(super) fn frozen(&self, place: &StorePath) -> Option<Frozen> {
        (place.root == 0).then(|| self.frozen.get(&self.prefix.join(&place.path)).cloned()).flatten()
    }

    /// Why nothing can be recorded, if so.
    pub(super) fn check(guard: &ControlDir) -> Result<()> {
        Self::try_read(guard).map(drop).map_err(|error| said(&error))
    }

    /// Records, durably, whether the file at `path` relative to the guarded directory is frozen. Under the
    /// store's lock. Without a marked store, nothing is recorded.
    pub(super) fn change(
        guard: &ControlDir,
        names: &dyn Directory,
        path: &Path,
        frozen: Option<&Frozen>,
    ) -> Result<()> {
        if !guard.is_whole {
            tracing::warn!("{} is in no store, so its freeze mark is not recorded", path.display());
            return Ok(());
        }
        // An unreadable list would be lost with the next write.
        let mut notes = Self::try_read(guard).map_err(|error| said(&error))?;
        if notes.frozen.get(path) == frozen {
            return Ok(());
        }
        match frozen {
            Some(frozen) => notes.frozen.insert(path.to_path_buf(), frozen.clone()),
            None => notes.frozen.remove(path),
        };
        let note = |(path, frozen): (PathBuf, Frozen)| FreezeRecord {
            path,
            seconds: frozen.seconds,
            nanoseconds: frozen.nanoseconds,
            description: frozen.description,
        };
        let frozen: Vec<FreezeRecord> = notes.frozen.into_iter().map(note).collect();
        let text = toml::to_string(&FreezeFile { count: Some(frozen.len()), frozen: Some(frozen) });
        let text = text.map_err(|error| {
            let fact = format!("{} cannot be recorded as frozen: {error}; rename it", path.display());
            Error::new(ErrorKind::Unsupported, fact)
        })?;
        guard.in_place(names, || write(names, Path::new(DRAFT), Path::new(FROZEN_NOTES), &text))
    }
}

/// The error as a sentence of its own.
fn said(error: &Error) -> Error {
    let fact = "says which raw images are frozen, and cannot be used; see chainfs recover STORE";
    Error::new(error.kind(), format!("{FROZEN_NOTES} {fact}: {error}"))
}

/// Whether that is the path of a list that is being written.
pub(super) fn is_draft(path: &Path) -> bool {
    path == Path::new(DRAFT) || path == Path::new(LAYOUT).with_extension("new")
}

/// Writes a small file, durably: at every moment there is the old one or the new. No two threads or processes
/// write one file at once: they would share its draft.
pub(super) fn write(names: &dyn Directory, draft: &Path, path: &Path, text: &str) -> Result<()> {
    // A crash may have left a draft.
    let _ = names.unlink(draft);
    let file = names.create(draft, None)?;
    file.write_at(0, text.as_bytes())?;
    file.sync()?;
    names.rename(draft, path, Existing::Replace)?;
    names.sync(&directory_of(path))
}

/// Makes sure that there is a list, so that its removal is detected. Under the store's lock.
pub(super) fn prepare(guard: &ControlDir, names: &dyn Directory) -> Result<()> {
    let is_missing =
        |path: &str| guard.root.stat(Path::new(path)).is_err_and(|e| e.kind() == ErrorKind::NotFound);
    if !is_missing(LAYOUT) {
        return Ok(());
    }
    if is_missing(FROZEN_NOTES) {
        write(names, Path::new(DRAFT), Path::new(FROZEN_NOTES), NOTHING)?;
    }
    write(names, &Path::new(LAYOUT).with_extension("new"), Path::new(LAYOUT), "list\n")
}

/// Discards an unusable list: from here on no raw image is frozen. The old list is kept beside it. Under the
/// store's lock.
pub(super) fn forget(guard: &ControlDir, names: &dyn Directory) -> Result<()> {
    let aside = Path::new(FROZEN_NOTES).with_extension("toml.discarded");
    match names.rename(Path::new(FROZEN_NOTES), &aside, Existing::Replace) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    guard.in_place(names, || {
        write(names, Path::new(DRAFT), Path::new(FROZEN_NOTES), NOTHING)?;
        prepare(guard, names)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LocalDirectory;

    /// A scan prepares the store's directory without the lock, while a command records a frozen image.
    #[test]
    fn a_list_is_created_only_under_the_lock_and_loses_no_record() {
        for round in 0..20 {
            let place = tempfile::tempdir().unwrap();
            let root = LocalDirectory::open(place.path()).unwrap();
            let names = root.names().unwrap();
            let guard = || ControlDir::of_directory(&root, &LocalDirectory::open).unwrap();
            guard().prepare(&*names).unwrap();
            assert!(!place.path().join(FROZEN_NOTES).exists(), "no lock was held");
            let frozen = Frozen { seconds: 1, nanoseconds: 0, description: String::new() };
            let record = |path: &str| {
                let guard = guard();
                guard.prepare(&*names).unwrap();
                let _lock = guard.lock(&*names).unwrap();
                assert!(place.path().join(FROZEN_NOTES).exists(), "{path}");
                FreezeList::change(&guard, &*names, Path::new(path), Some(&frozen)).unwrap();
            };
            std::thread::scope(|scope| {
                for path in ["a.raw", "b.raw"] {
                    scope.spawn(move || record(path));
                }
                for _ in 0..2 {
                    scope.spawn(|| guard().prepare(&*names).unwrap());
                }
            });
            let list = FreezeList::read(&guard());
            assert_eq!((list.frozen.len(), list.problem()), (2, None), "round {round}");
        }
    }
}
