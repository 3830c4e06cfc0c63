//! Refusals because other processes have images open: QEMU's locks, as of now.
//!
//! For plans only. A command takes the locks themselves, and is refused by those.

use crate::io::LockKind;
use crate::store::ImageIndex;

use super::plan::Plan;
use super::scanned_store::ScannedStore;

/// The images that a command would open.
#[derive(Default)]
pub(super) struct TouchedImages {
    /// To write them.
    pub(super) written: Vec<ImageIndex>,
    /// To read them.
    pub(super) read: Vec<ImageIndex>,
}

impl TouchedImages {
    /// A chain whose first layer is written.
    pub(super) fn top_of(layers: &[ImageIndex]) -> Self {
        Self { written: layers[..1].to_vec(), read: layers[1..].to_vec() }
    }

    /// Adds a refusal for each image that another process has locked, unless the plan says so already.
    pub(super) fn refuse(self, scan: &ScannedStore, plan: &mut Plan) {
        let only_read = self.read.iter().filter(|index| !self.written.contains(index));
        let read = only_read.map(|index| (*index, LockKind::Reader));
        let mut all: Vec<(ImageIndex, LockKind)> =
            self.written.iter().map(|index| (*index, LockKind::Writer)).chain(read).collect();
        all.sort_unstable_by_key(|(index, _)| *index);
        all.dedup_by_key(|(index, _)| *index);
        for (index, kind) in all {
            let image = scan.image(index);
            let Some(error) = scan.store.locked_out(image, kind) else { continue };
            let begin = format!("{} is ", image.shown());
            let is_said = |known: &crate::error::Error| {
                known.kind() == error.kind() && known.to_string().starts_with(&begin)
            };
            if !plan.refusals.iter().any(is_said) {
                plan.refusals.push(error);
            }
        }
    }
}
