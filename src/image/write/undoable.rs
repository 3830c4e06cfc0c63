//! A writer whose changes can be undone.
//!
//! Promise: until [`UndoableWriter::publish`], nothing changes on disk that the image or an internal snapshot
//! shows, and no cluster that they use; a crash leaves leaks at worst. The disk itself reads as it was
//! written.

use std::ops::Deref;
use std::sync::Arc;

use crate::error::Result;
use crate::io::WriteStorage;

use super::qcow2::Qcow2Writer;
use super::{BackingDisk, Writer, WriterOptions};

/// A qcow2 image that is written, and not changed before that is published.
pub struct UndoableWriter {
    writer: Arc<Writer>,
    /// What `writer` writes by.
    qcow2: Arc<Qcow2Writer>,
}

impl UndoableWriter {
    /// The active disk of a qcow2 image; refused as by [`Writer::qcow2`]. An external data file cannot be
    /// undone.
    pub fn open(
        name: &str,
        file: Arc<dyn WriteStorage>,
        backing: Option<Arc<dyn BackingDisk>>,
        options: WriterOptions,
    ) -> Result<Self> {
        let qcow2 = Arc::new(Qcow2Writer::open_undoable(name, file, backing, options)?);
        Ok(Self { writer: Arc::new(Writer { format: Arc::clone(&qcow2) as _ }), qcow2 })
    }

    /// The writer of the disk.
    pub fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }

    /// Makes what was written the image's content, with one write to its header, after everything else is
    /// durable; from then on this is an ordinary writer. If it fails without poisoning the disk, the image
    /// is as it was, and can be published again or abandoned; otherwise it is one or the other as a whole.
    ///
    /// # Panics
    /// If it was published already.
    pub fn publish(&self) -> Result<()> {
        self.qcow2.publish()
    }

    /// Frees everything that was allocated since the opening: the image is as it was, without leaks. Nothing
    /// can be done with the writer afterwards. If it fails, leaks are left.
    ///
    /// # Panics
    /// If it was published already.
    pub fn abandon(&self) -> Result<()> {
        self.qcow2.abandon()
    }
}

impl std::fmt::Debug for UndoableWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.writer.fmt(f)
    }
}

impl Deref for UndoableWriter {
    type Target = Writer;

    fn deref(&self) -> &Writer {
        &self.writer
    }
}
