//! What a process knows of the intents of a store besides their files: which are its own, which ones of other
//! processes it has seen, and which it could not resume.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::io::{FileLock, OpenObject, WriteObject};

use super::intent::Intent;

/// The first line of an intent's file, and the line that its owner writes over it before removing it: an
/// observer can tell whether it was ended, or removed by another process.
pub(super) const BEGUN: &str = "# begun\n";
pub(super) const ENDED: &str = "# ended\n";
const _: () = assert!(BEGUN.len() == ENDED.len());
/// Maximum number of former files of one intent that are kept. An observer that has missed that many does not
/// know the intent.
const MOST_FORMER: usize = 16;

/// All of it. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct KnownIntents {
    pub(super) live: LiveIntents,
    pub(super) seen: SeenIntents,
    pub(super) refused: ResumeRefusals,
}

/// Why commands were not resumed, by the names of their intents.
pub(super) type ResumeRefusals = Arc<Mutex<HashMap<OsString, ResumeRefusal>>>;

#[derive(Debug)]
pub(super) struct ResumeRefusal {
    pub(super) sentence: String,
    /// Whether a retry would be refused again.
    pub(super) is_final: bool,
    pub(super) when: Instant,
}

/// The intents of this process, by name, and their locks: known even if another process has removed their
/// files.
pub(super) type LiveIntents = Arc<Mutex<HashMap<OsString, LiveIntent>>>;

/// Intents of other processes that have been seen, by name.
pub(super) type SeenIntents = Arc<Mutex<HashMap<OsString, SeenIntent>>>;

#[derive(Debug)]
pub(super) struct SeenIntent {
    pub(super) intent: Intent,
    pub(super) is_copied: bool,
    /// Its file, which tells what has become of it also when it has no name any more.
    pub(super) file: Arc<dyn OpenObject>,
}

impl SeenIntent {
    /// Whether another process has removed its file, and its owner has not.
    pub(super) fn is_lost(&self) -> bool {
        // A file that has a name was renamed on purpose: the command is discarded.
        let has_name = self.file.stat().is_ok_and(|stat| stat.link_count > 0);
        let mut start = [0; ENDED.len()];
        let is_read = self.file.read_at(0, &mut start).is_ok_and(|len| len == start.len());
        !(has_name || is_read && start == ENDED.as_bytes())
    }
}

#[derive(Debug)]
pub(super) struct LiveIntent {
    pub(super) intent: Intent,
    /// Held while the intent exists.
    pub(super) claim: FileLock,
    /// The locks of its former files: an observer that has seen one of those alone, because the next was
    /// removed too, must not take the intent for ended.
    pub(super) former: Vec<FileLock>,
    /// Whether its owner is removing its file.
    pub(super) is_ending: bool,
}

impl LiveIntent {
    /// Switches to another file.
    pub(super) fn replace(&mut self, intent: Intent, claim: FileLock) {
        self.intent = intent;
        self.former.push(std::mem::replace(&mut self.claim, claim));
        if self.former.len() > MOST_FORMER {
            say_ended(&**self.former.remove(0).file());
        }
    }

    /// Says to those who have one of its files open that it goes in order.
    pub(super) fn say_ended(&self) {
        self.former.iter().chain([&self.claim]).for_each(|claim| say_ended(&**claim.file()));
    }
}

/// Says to those who have the file of an intent open that it goes in order. If that cannot be said, they look
/// after it once more.
pub(super) fn say_ended(file: &dyn WriteObject) {
    let _ = file.write_at(0, ENDED.as_bytes());
}
