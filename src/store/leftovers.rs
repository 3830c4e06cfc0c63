//! Drafts that nobody will finish: what a command had made before its intent was there, when it was cut off.
//!
//! Promises: only files of chainfs' own making go, and none that an intent speaks of. Whoever makes a draft
//! holds the store's lock until an intent speaks of it or it is gone, so that under the lock all others are
//! nobody's.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::io::directory_of;

use super::Store;
use super::intents::Deed;
use super::names::OWN_PREFIX;

/// How the names of drafts end.
pub(super) const DRAFT: &str = "new";

/// Whether a file of that name, among the images, is a draft of an image, or what a command has put aside.
pub(crate) fn is_draft(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_bytes().starts_with(OWN_PREFIX) && path.extension().is_some_and(|extension| extension == DRAFT)
}

impl Store {
    /// Removes drafts that nobody will finish.
    pub fn sweep(&self) -> Result<()> {
        if self.options.read_only || (self.catalog().drafts.is_empty() && self.guard.drafts().is_empty()) {
            return Ok(());
        }
        let names = self.guard_names();
        self.guard.prepare(&*names)?;
        let _lock = self.guard.lock(&*names)?;
        self.rescan()?;
        let (intents, senseless) = self.guard.read();
        let files = intents.iter().flat_map(|found| found.intent.files()).map(|named| named.path.as_path());
        // What a revert has put aside is its own to remove, or to put into the trash.
        let put_aside = intents.iter().flat_map(|found| match &found.intent.deed {
            Deed::Snapshot { disks, .. } => disks.as_slice(),
            Deed::Commit { .. } | Deed::Pull { .. } | Deed::Copy { .. } | Deed::Shrink { .. } | Deed::Unknown => &[],
        });
        let spoken_of: HashSet<&Path> = files.chain(put_aside.map(|top| top.frozen.as_path())).collect();
        let images = self.catalog().drafts.iter().map(|path| self.guard.prefix.join(path)).collect::<Vec<PathBuf>>();
        // An intent that cannot be understood may speak of any of them.
        let images = images.into_iter().filter(|path| senseless.is_empty() && !spoken_of.contains(path.as_path()));
        for path in images.chain(self.guard.drafts()) {
            tracing::info!("removing {}, a draft of a command that was cut off", path.display());
            names.unlink(&path)?;
            names.sync(&directory_of(&path))?;
        }
        self.rescan().map(drop)
    }
}
