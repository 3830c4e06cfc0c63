//! An image below the active layer that a job writes exclusively.
//!
//! Promises: from the opening on it has QEMU's writer locks, beside those of this process's readers; it is
//! the file of the catalog; and when the job is done, its next opening sees the job's changes. The job itself
//! guarantees that no view of those readers changes.

use std::path::Path;
use std::sync::Arc;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::write::{BackingDisk, UndoableWriter, Writer};
use crate::io::{ObjectId, ReadLock, WriteLock, WriteStorage, WriterKind};
use crate::units::Stability;

use super::Store;
use super::active::{unchanged, writer_options};
use super::catalog::{Catalog, ImageIndex};
use super::open::OpenImage;
use super::options::Format;

/// An image that a job writes.
pub struct JobImage {
    store: Arc<Store>,
    writer: Option<Arc<Writer>>,
    image: OpenImage,
    locks: Vec<WriteLock>,
    reads: Vec<ReadLock>,
}

impl Store {
    /// Opens an image for a job. `Busy` if another process uses it, `Stale` if it differs from the catalog.
    pub fn take_image(self: &Arc<Self>, catalog: &Catalog, index: ImageIndex) -> Result<JobImage> {
        let entry = &catalog.images[index];
        if entry.place.root != 0 {
            let fact = "lies outside of the store, in a read-only directory";
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", entry.shown())));
        }
        let (mut reads, mut forced) = (Vec::new(), None);
        let image = self.open_image(entry, Stability::Frozen, &mut reads, &mut forced)?;
        if let Some(error) = forced {
            return Err(error);
        }
        // M6: as for a guest's writer.
        let lock = |file: &Arc<crate::io::StoreFile>| {
            file.lock_for_writing(WriterKind::Job, self.options.lock_support())
        };
        let locks = image.files().map(lock).collect::<Result<Vec<_>>>()?;
        unchanged(&image, entry)?;
        Ok(JobImage { store: Arc::clone(self), writer: None, image, locks, reads })
    }
}

impl JobImage {
    /// The identity of its file.
    pub fn id(&self) -> ObjectId {
        self.image.file.id()
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.image.format
    }

    /// Its file, for changes of its header only.
    pub fn file(&self) -> Result<Arc<dyn WriteStorage>> {
        self.image.file.open_for_writing()
    }

    /// Records its new name: it is at `path` relative to the store by now.
    pub fn renamed(&mut self, path: &Path) {
        self.image.renamed(path);
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        self.image.image.name()
    }

    /// Opens its disk for writing, as by a guest; `below` is what shows through it.
    pub fn open_writer(&mut self, below: Option<Arc<View>>) -> Result<Arc<Writer>> {
        let file = self.file_to_write()?;
        let name = self.image.image.name();
        let writer = match self.image.format {
            Format::Raw => Writer::raw(name, file)?,
            Format::Qcow2 => {
                let data_file =
                    self.image.data_file.as_ref().map(|file| file.open_for_writing()).transpose()?;
                let below = below.map(|view| view as Arc<dyn BackingDisk>);
                Writer::qcow2(name, file, data_file, below, writer_options(&self.store))?
            }
        };
        self.writer = Some(Arc::clone(&writer));
        Ok(writer)
    }

    /// Opens its disk for writing, so that nothing of the image changes until that is published: a qcow2
    /// image without a data file.
    pub fn open_undoable_writer(&mut self, below: Option<Arc<View>>) -> Result<UndoableWriter> {
        let file = self.file_to_write()?;
        let below = below.map(|view| view as Arc<dyn BackingDisk>);
        let options = writer_options(&self.store);
        let writer = UndoableWriter::open(self.image.image.name(), file, below, options)?;
        self.writer = Some(Arc::clone(writer.writer()));
        Ok(writer)
    }

    fn file_to_write(&self) -> Result<Arc<dyn WriteStorage>> {
        assert!(self.writer.is_none(), "one writer writes an image");
        self.file()
    }

    /// Reopens it for later openers: the writes are in the file, and cached tables are stale.
    pub fn describe_anew(&self) -> Result<()> {
        self.store.opened.keep(&self.store.described_anew(&self.image)?);
        Ok(())
    }

    /// Its current parts: the image as its file describes it, its locks and its writer.
    pub(super) fn into_parts(self) -> Result<(OpenImage, Vec<WriteLock>, Arc<Writer>)> {
        let image = self.store.described_anew(&self.image)?;
        let writer = self.writer.expect("the base of an active commit was written");
        Ok((image, self.locks, writer))
    }

    /// All writes are durable: from now on it is an ordinary layer.
    pub fn finish(self) -> Result<()> {
        let Self { store, writer, image, locks, reads } = self;
        // The descriptor is closed before the file's attributes are recorded: closing may change them.
        drop(writer);
        for file in image.files() {
            let before = file.expected_stat();
            file.accept_changes()?;
            if let (Some(before), Some(after)) = (before, file.expected_stat()) {
                store.touched(file.id(), &before, &after);
            }
        }
        store.opened.keep(&store.described_anew(&image)?);
        drop((locks, reads));
        Ok(())
    }
}
