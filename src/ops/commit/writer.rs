//! How a commit writes its base.

use std::sync::Arc;

use crate::chain::View;
use crate::error::Result;
use crate::image::write::{UndoableWriter, Writer};
use crate::store::JobImage;

/// The writer of a base.
pub(super) enum CommitWriter {
    /// The base changes as it is written.
    InPlace(Arc<Writer>),
    /// The base changes when all is written.
    Undoable(UndoableWriter),
}

impl CommitWriter {
    /// Opens the base, undoable or not; `below` is what shows through it.
    pub(super) fn open(base: &mut JobImage, below: Option<Arc<View>>, is_undoable: bool) -> Result<Self> {
        if is_undoable {
            base.open_undoable_writer(below).map(Self::Undoable)
        } else {
            base.open_writer(below).map(Self::InPlace)
        }
    }

    pub(super) fn writer(&self) -> &Arc<Writer> {
        match self {
            Self::InPlace(writer) => writer,
            Self::Undoable(writer) => writer.writer(),
        }
    }

    /// Whether the base is as it was until it is published.
    pub(super) fn is_undoable(&self) -> bool {
        matches!(self, Self::Undoable(_))
    }

    /// Makes all that was written the base's content, durably.
    pub(super) fn publish(&self) -> Result<()> {
        match self {
            Self::InPlace(writer) => writer.close(),
            Self::Undoable(writer) => writer.publish(),
        }
    }

    /// Undoes what was written, where that can be.
    pub(super) fn call_back(&self) -> Result<()> {
        match self {
            Self::InPlace(writer) => writer.close(),
            Self::Undoable(writer) => writer.abandon(),
        }
    }
}
