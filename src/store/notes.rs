//! What a store remembers of files that cannot say it themselves: raw images that are frozen.
//!
//! `.chainfs/frozen.toml` in the store's directory, which also marks the directory as a store.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::io::{Directory, directory_of};

use super::intents::{Guard, encoded};
use super::resolve::Place;

/// The file, beneath the store.
pub const FROZEN_NOTES: &str = ".chainfs/frozen.toml";
/// What becomes it.
const DRAFT: &str = ".chainfs/frozen.new";
/// Longer notes are not ours.
const MAX_LEN: u64 = 16 << 20;

/// Notes of one store.
#[derive(Debug, Default)]
pub(super) struct Notes {
    frozen: BTreeMap<PathBuf, Frozen>,
    /// From where the notes speak to the store's own directory.
    prefix: PathBuf,
}

#[derive(Deserialize, Serialize)]
struct File {
    #[serde(default)]
    frozen: Vec<Note>,
}

#[derive(Deserialize, Serialize)]
struct Note {
    #[serde(with = "encoded")]
    path: PathBuf,
    seconds: i64,
    #[serde(default)]
    nanoseconds: u32,
    #[serde(default)]
    description: String,
}

impl Notes {
    /// The notes of the store that `guard` guards. Unreadable ones freeze nothing and are logged.
    pub(super) fn read(guard: &Guard) -> Self {
        Self::try_read(guard).unwrap_or_else(|error| {
            tracing::warn!("{error}");
            Self::default()
        })
    }

    fn try_read(guard: &Guard) -> Result<Self> {
        guard.check_trust()?;
        let file = match guard.root.open_file(Path::new(FROZEN_NOTES)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened?,
        };
        let mut text = String::new();
        let read = std::fs::File::from(file).take(MAX_LEN).read_to_string(&mut text);
        let parsed = read
            .map_err(|error| error.to_string())
            .and_then(|_| toml::from_str::<File>(&text).map_err(|error| error.message().to_string()));
        match parsed {
            Ok(File { frozen }) => Ok(Self {
                frozen: frozen
                    .into_iter()
                    .map(|Note { path, seconds, nanoseconds, description }| {
                        (path, Frozen { seconds, nanoseconds, description })
                    })
                    .collect(),
                prefix: guard.prefix.clone(),
            }),
            Err(reason) => {
                let fact = "cannot be read, and says which raw images are frozen; restore it, or remove it and freeze";
                let sentence = format!("{FROZEN_NOTES} {fact} them by their mode: {reason}");
                Err(Error::new(ErrorKind::Corrupt, sentence))
            }
        }
    }

    /// Whether the file at `place` was frozen, and when.
    pub(super) fn frozen(&self, place: &Place) -> Option<Frozen> {
        (place.root == 0).then(|| self.frozen.get(&self.prefix.join(&place.path)).cloned()).flatten()
    }

    /// Why nothing can be noted, if so.
    pub(super) fn check(guard: &Guard) -> Result<()> {
        Self::try_read(guard).map(drop)
    }

    /// Notes, durably, that the file at `path` beneath the guarded directory is frozen, or that it is not. Under
    /// the store's lock. Where there is no marked store, nothing is noted.
    pub(super) fn change(guard: &Guard, names: &dyn Directory, path: &Path, frozen: Option<&Frozen>) -> Result<()> {
        if !guard.is_whole {
            tracing::warn!("{} is in no store; that it is frozen is noted nowhere", path.display());
            return Ok(());
        }
        // What cannot be read would be lost with the next note.
        let mut notes = Self::try_read(guard)?;
        if notes.frozen.get(path) == frozen {
            return Ok(());
        }
        match frozen {
            Some(frozen) => notes.frozen.insert(path.to_path_buf(), frozen.clone()),
            None => notes.frozen.remove(path),
        };
        let note = |(path, frozen): (PathBuf, Frozen)| Note {
            path,
            seconds: frozen.seconds,
            nanoseconds: frozen.nanoseconds,
            description: frozen.description,
        };
        let text = toml::to_string(&File { frozen: notes.frozen.into_iter().map(note).collect() });
        let text = text.map_err(|error| {
            let fact = format!("{} cannot be noted as frozen: {error}; rename it", path.display());
            Error::new(ErrorKind::Unsupported, fact)
        })?;
        // What a crash has left of an earlier attempt.
        let _ = names.unlink(Path::new(DRAFT));
        let file = names.create(Path::new(DRAFT), None)?;
        file.write_at(0, text.as_bytes())?;
        file.sync()?;
        names.rename(Path::new(DRAFT), Path::new(FROZEN_NOTES), true)?;
        names.sync(&directory_of(Path::new(FROZEN_NOTES)))
    }
}
