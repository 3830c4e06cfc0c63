//! Refusals because other processes have images open: QEMU's locks, as of now.
//!
//! For plans only. A command takes the locks themselves, and is refused by those.

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
        let read =
            self.read.iter().filter(|index| !self.written.contains(index)).map(|index| (*index, false));
        let mut all: Vec<(ImageIndex, bool)> =
            self.written.iter().map(|index| (*index, true)).chain(read).collect();
        all.sort_unstable();
        all.dedup_by_key(|(index, _)| *index);
        for (index, for_writing) in all {
            let image = scan.image(index);
            let Some(error) = scan.store.locked_out(image, for_writing) else { continue };
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
