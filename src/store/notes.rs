//! What a store remembers of files that cannot say it themselves: raw images that are frozen.
//!
//! `.chainfs/frozen.toml` in the store's directory, which also marks the directory as a store.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::format::Frozen;
use crate::io::Root;

use super::resolve::Place;

/// The file, beneath the store.
pub const FROZEN_NOTES: &str = ".chainfs/frozen.toml";
/// Longer notes are not ours.
const MAX_LEN: u64 = 16 << 20;

/// Notes of one store.
#[derive(Debug, Default)]
pub(super) struct Notes {
    frozen: HashMap<PathBuf, Frozen>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    frozen: Vec<Note>,
}

#[derive(Deserialize)]
struct Note {
    path: PathBuf,
    seconds: i64,
    #[serde(default)]
    nanoseconds: u32,
    #[serde(default)]
    description: String,
}

impl Notes {
    /// The notes of the store at `root`. Unreadable ones freeze nothing and are logged.
    pub(super) fn read(root: &Root) -> Self {
        let Ok(file) = root.open_file(Path::new(FROZEN_NOTES)) else { return Self::default() };
        let mut text = String::new();
        let read = std::fs::File::from(file).take(MAX_LEN).read_to_string(&mut text);
        let parsed = read
            .map_err(|error| error.to_string())
            .and_then(|_| toml::from_str::<File>(&text).map_err(|error| error.message().to_string()));
        match parsed {
            Ok(File { frozen }) => Self {
                frozen: frozen
                    .into_iter()
                    .map(|Note { path, seconds, nanoseconds, description }| {
                        (path, Frozen { seconds, nanoseconds, description })
                    })
                    .collect(),
            },
            Err(reason) => {
                tracing::warn!("{FROZEN_NOTES} cannot be read: {reason}");
                Self::default()
            }
        }
    }

    /// Whether the file at `place` was frozen, and when.
    pub(super) fn frozen(&self, place: &Place) -> Option<Frozen> {
        (place.root == 0).then(|| self.frozen.get(&place.path).cloned()).flatten()
    }
}
