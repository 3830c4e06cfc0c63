//! What a store remembers of files that cannot say it themselves: raw images that are frozen.
//!
//! `.chainfs/frozen.toml` in the store's directory, which also marks the directory as a store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::io::{Directory, Existing, directory_of, read_text};

use super::intents::{ControlDir, encoded};
use super::resolve::StorePath;

/// The file, beneath the store.
pub const FROZEN_NOTES: &str = ".chainfs/frozen.toml";
/// What becomes it.
const DRAFT: &str = ".chainfs/frozen.new";
/// Says that there is a list: where it is not, it was lost. Stores of before, and those that are marked by
/// hand, have none.
const LAYOUT: &str = ".chainfs/layout";
/// Longer notes are not ours.
const MAX_LEN: u64 = 16 << 20;

/// Notes of one store.
#[derive(Debug, Default)]
pub(super) struct FreezeList {
    frozen: BTreeMap<PathBuf, Frozen>,
    /// From where the notes speak to the store's own directory.
    prefix: PathBuf,
    /// Why nobody can tell what is frozen, if so.
    problem: Option<String>,
}

#[derive(Deserialize, Serialize)]
struct FreezeFile {
    /// How many there are: a list that was cut short says so. Older lists do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    count: Option<usize>,
    frozen: Option<Vec<FreezeRecord>>,
}

/// A list that names nothing. It is no empty file: that is what a crash, or a full disk, may leave of one.
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
    /// The notes of the store that `guard` guards. Where they cannot be read, everything raw counts as
    /// frozen.
    pub(super) fn read(guard: &ControlDir) -> Self {
        Self::try_read(guard)
            .unwrap_or_else(|error| Self { problem: Some(error.to_string()), ..Self::default() })
    }

    /// Why nobody can tell which raw images are frozen, to follow the list's name; `None` if it can be told.
    pub(super) fn problem(&self) -> Option<String> {
        let reason = self.problem.as_ref()?;
        let fact =
            "says which raw images are frozen, and cannot be used, so that all of them count as frozen";
        let remedy = "restore it, or give up what it said with chainfs recover STORE --forget frozen.toml";
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

    /// Why nothing can be noted, if so.
    pub(super) fn check(guard: &ControlDir) -> Result<()> {
        Self::try_read(guard).map(drop).map_err(|error| said(&error))
    }

    /// Notes, durably, that the file at `path` beneath the guarded directory is frozen, or that it is not.
    /// Under the store's lock. Where there is no marked store, nothing is noted.
    pub(super) fn change(
        guard: &ControlDir,
        names: &dyn Directory,
        path: &Path,
        frozen: Option<&Frozen>,
    ) -> Result<()> {
        if !guard.is_whole {
            tracing::warn!("{} is in no store; that it is frozen is noted nowhere", path.display());
            return Ok(());
        }
        // What cannot be read would be lost with the next note.
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
            let fact = format!("{} cannot be noted as frozen: {error}; rename it", path.display());
            Error::new(ErrorKind::Unsupported, fact)
        })?;
        write(names, Path::new(DRAFT), Path::new(FROZEN_NOTES), &text)
    }
}

/// As a sentence of its own.
fn said(error: &Error) -> Error {
    let fact = "says which raw images are frozen, and cannot be used; see chainfs recover STORE";
    Error::new(error.kind(), format!("{FROZEN_NOTES} {fact}: {error}"))
}

/// Whether that is the path of a note that is being written.
pub(super) fn is_draft(path: &Path) -> bool {
    path == Path::new(DRAFT) || path == Path::new(LAYOUT).with_extension("new")
}

/// Writes a small note, durably: at every moment there is the old one or the new.
pub(super) fn write(names: &dyn Directory, draft: &Path, path: &Path, text: &str) -> Result<()> {
    // What a crash has left of an earlier attempt.
    let _ = names.unlink(draft);
    let file = names.create(draft, None)?;
    file.write_at(0, text.as_bytes())?;
    file.sync()?;
    names.rename(draft, path, Existing::Replace)?;
    names.sync(&directory_of(path))
}

/// Makes sure that there is a list, so that one that was removed is missed. Under the store's lock, or before
/// anybody has frozen anything.
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

/// Gives up what an unusable list said: from here on no raw image is frozen. What there was is kept beside
/// it. Under the store's lock.
pub(super) fn forget(guard: &ControlDir, names: &dyn Directory) -> Result<()> {
    let aside = Path::new(FROZEN_NOTES).with_extension("toml.discarded");
    match names.rename(Path::new(FROZEN_NOTES), &aside, Existing::Replace) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write(names, Path::new(DRAFT), Path::new(FROZEN_NOTES), NOTHING)?;
    prepare(guard, names)
}
