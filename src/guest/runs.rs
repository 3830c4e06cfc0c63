//! The answer of [`FileSystem::runs`](super::FileSystem::runs): collects runs and joins adjacent ones.

use super::filesystem::{FileRun, RunKind};

/// Runs, up to a number of them.
pub(super) struct Runs {
    pub(super) runs: Vec<FileRun>,
    most: usize,
}

impl Runs {
    pub(super) fn new(most: usize) -> Self {
        Self { runs: Vec::new(), most }
    }

    /// Returns false if there is no room for another run.
    pub(super) fn push(&mut self, len: u64, kind: RunKind) -> bool {
        if let Some(last) = self.runs.last_mut() {
            let is_adjacent = match (last.kind, kind) {
                (RunKind::Hole, RunKind::Hole) | (RunKind::Opaque, RunKind::Opaque) => true,
                (RunKind::Stored(start), RunKind::Stored(next))
                | (RunKind::Verified(start), RunKind::Verified(next)) => start + last.len == next,
                _ => false,
            };
            if is_adjacent {
                last.len += len;
                return true;
            }
        }
        if self.runs.len() == self.most {
            return false;
        }
        self.runs.push(FileRun { len, kind });
        true
    }
}
