//! A guest: writes through a `Writer` on simulated files and remembers the allowed bytes of its disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chainfs::error::Result;
use chainfs::image::write::{BackingDisk, Fill, NewSnapshot, Writer, WriterOptions, Zeroing};
use chainfs::io::WriteStorage;
use chainfs::units::are_zero;
use parking_lot::{Mutex, RwLock};

use super::disk::Event;
use super::history::{History, Moment};
use super::value::{Value, pattern_range};
use super::{Backing, IMAGE, Machine, Pages, SECTOR, SimDisk, StartImage};

/// A user of the disk.
pub struct Guest {
    pub machine: Arc<Machine>,
    pub disks: Vec<Arc<SimDisk>>,
    backing: Option<Backing>,
    options: WriterOptions,
    writer: RwLock<Option<Arc<Writer>>>,
    history: Mutex<History>,
    tags: AtomicU64,
}

/// Opens a writer on simulated files.
pub fn open_writer(
    disks: &[Arc<SimDisk>],
    backing: Option<&Backing>,
    options: WriterOptions,
) -> Result<Arc<Writer>> {
    let storage = |disk: &Arc<SimDisk>| Arc::clone(disk) as Arc<dyn WriteStorage>;
    let below = backing.map(|backing| Arc::new(backing.clone()) as Arc<dyn BackingDisk>);
    Writer::qcow2(IMAGE, storage(&disks[0]), disks.get(1).map(storage), below, options)
}

/// An internal snapshot of this name, taken at a time of no importance.
pub fn new_snapshot(name: &str) -> NewSnapshot {
    NewSnapshot { name: name.into(), seconds: 1_700_000_000, nanoseconds: 5 }
}

impl Guest {
    /// Puts the files of an image into a machine and opens it.
    pub fn new(machine: &Arc<Machine>, image: &StartImage, options: WriterOptions) -> Self {
        let disks: Vec<_> = image
            .files
            .iter()
            .enumerate()
            .map(|(file, pages)| SimDisk::new(machine, file, pages.clone()))
            .collect();
        let writer = open_writer(&disks, image.backing.as_ref(), options).unwrap();
        assert_eq!(writer.size(), image.initial_size, "the size of the disk as opened");
        Self {
            machine: Arc::clone(machine),
            disks,
            backing: image.backing.clone(),
            options,
            writer: RwLock::new(Some(writer)),
            history: Mutex::new(History::new(image.initial.clone(), image.initial_size)),
            tags: AtomicU64::new(1000),
        }
    }

    pub fn writer(&self) -> Arc<Writer> {
        Arc::clone(self.writer.read().as_ref().expect("it is open"))
    }

    /// The backing disk of the image.
    pub fn backing(&self) -> Backing {
        self.backing.clone().expect("an image with a backing file")
    }

    pub fn size(&self) -> u64 {
        self.writer().size()
    }

    /// The present content of the files.
    pub fn files(&self) -> Vec<Pages> {
        self.disks.iter().map(|disk| disk.snapshot()).collect()
    }

    pub fn history(&self) -> parking_lot::MutexGuard<'_, History> {
        self.history.lock()
    }

    fn operation(
        &self,
        what: String,
        note: impl FnOnce(&mut History, usize),
        run: impl FnOnce(&Writer, usize) -> Result<()>,
    ) -> Result<()> {
        let number = {
            let mut history = self.history.lock();
            let number = history.begin(self.machine.mark(Event::Mark), what);
            note(&mut history, number);
            number
        };
        run(&self.writer(), number)?;
        self.history.lock().acknowledge(number, self.machine.mark(Event::Mark));
        Ok(())
    }

    /// No two writes have the same bytes.
    fn next_tag(&self) -> u64 {
        self.tags.fetch_add(1, Ordering::Relaxed)
    }

    pub fn try_write(&self, at: u64, len: u64) -> Result<()> {
        let tag = self.next_tag();
        let bytes = pattern_range(tag, at, len);
        self.operation(
            format!("write {tag} at {at:#x}+{len:#x}"),
            |history, number| history.put(number, at, &bytes, &Value::Written(tag)),
            |writer, _| writer.write_at(at, &bytes),
        )
    }

    pub fn try_zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.operation(
            format!("zero {zeroing:?} at {at:#x}+{len:#x}"),
            |history, number| history.put(number, at, &vec![0; len as usize], &Value::Zero),
            |writer, _| writer.zero(at, len, zeroing),
        )
    }

    pub fn try_allocate(&self, at: u64, len: u64) -> Result<()> {
        self.operation(format!("allocate {at:#x}+{len:#x}"), |_, _| {}, |writer, _| writer.allocate(at, len))
    }

    pub fn try_grow(&self, size: u64) -> Result<()> {
        self.operation(
            format!("grow to {size:#x}"),
            |history, number| history.resized(number, size.next_multiple_of(SECTOR)),
            |writer, _| writer.grow(size),
        )
    }

    /// Takes an internal snapshot without concurrent writes: its bytes are the disk's.
    pub fn try_snapshot(&self, name: &str) -> Result<()> {
        let content = self.content()?;
        let begun = self.machine.mark(Event::Mark);
        let taken = self.operation(
            format!("snapshot {name}"),
            |history, number| history.snapshot(number, content),
            |writer, _| writer.take_snapshot(&new_snapshot(name)),
        );
        if taken.is_err() && self.writer().poison().is_none() {
            // Refused, so no snapshot may be in the files.
            self.history.lock().take_snapshot_back();
        }
        taken?;
        let acked = self.machine.mark(Event::Flushed);
        self.history.lock().flushed(begun, acked);
        Ok(())
    }

    /// Fills from below; no view changes.
    pub fn try_fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<()> {
        self.operation(
            format!("fill {at:#x}+{len:#x}"),
            |_, _| {},
            |writer, _| writer.fill(at, len, fill).map(drop),
        )
    }

    pub fn fill(&self, at: u64, len: u64, fill: &dyn Fill) {
        self.try_fill(at, len, fill).unwrap_or_else(|error| panic!("fill {at:#x}+{len:#x}: {error}"));
    }

    pub fn snapshot(&self, name: &str) {
        self.try_snapshot(name).unwrap_or_else(|error| panic!("snapshot {name}: {error}"));
    }

    /// All of the disk, as the writer reads it.
    pub fn content(&self) -> Result<Pages> {
        let mut content = Pages::default();
        let mut bytes = vec![0; 1 << 16];
        for at in (0..self.size()).step_by(bytes.len()) {
            let piece = (self.size() - at).min(bytes.len() as u64) as usize;
            self.writer().read_at(at, &mut bytes[..piece])?;
            if !are_zero(&bytes[..piece]) {
                content.write(at, &bytes[..piece]);
            }
        }
        content.set_len(self.size());
        Ok(content)
    }

    fn flush_by(&self, flush: impl FnOnce(&Writer) -> Result<()>) -> Result<()> {
        let begun = self.machine.mark(Event::Mark);
        flush(&self.writer())?;
        let acked = self.machine.mark(Event::Flushed);
        self.history.lock().flushed(begun, acked);
        Ok(())
    }

    pub fn try_flush(&self) -> Result<()> {
        self.flush_by(Writer::flush)
    }

    pub fn try_close(&self) -> Result<()> {
        self.flush_by(Writer::close)
    }

    pub fn write(&self, at: u64, len: u64) {
        self.try_write(at, len).unwrap_or_else(|error| panic!("write {at:#x}+{len:#x}: {error}"));
    }

    /// Zeroes that stay preallocated.
    pub fn zero(&self, at: u64, len: u64) {
        self.try_zero(at, len, Zeroing::Keep)
            .unwrap_or_else(|error| panic!("zero {at:#x}+{len:#x}: {error}"));
    }

    pub fn discard(&self, at: u64, len: u64) {
        self.try_zero(at, len, Zeroing::Unmap)
            .unwrap_or_else(|error| panic!("discard {at:#x}+{len:#x}: {error}"));
    }

    pub fn allocate(&self, at: u64, len: u64) {
        self.try_allocate(at, len).unwrap_or_else(|error| panic!("allocate {at:#x}+{len:#x}: {error}"));
    }

    pub fn grow(&self, size: u64) {
        self.try_grow(size).unwrap_or_else(|error| panic!("grow to {size:#x}: {error}"));
    }

    pub fn flush(&self) {
        self.try_flush().unwrap_or_else(|error| panic!("flush: {error}"));
    }

    pub fn close(&self) {
        self.try_close().unwrap_or_else(|error| panic!("close: {error}"));
    }

    /// Closes and opens again.
    pub fn reopen(&self) {
        self.close();
        let mut writer = self.writer.write();
        *writer = None;
        *writer = Some(open_writer(&self.disks, self.backing.as_ref(), self.options).unwrap());
    }

    /// Drops the writer without closing it, as a killed process does.
    pub fn abandon(&self) {
        *self.writer.write() = None;
    }

    /// Everything that was written to (and its surroundings) reads back through the writer.
    pub fn verify(&self) -> std::result::Result<(), String> {
        let writer = self.writer();
        let history = self.history.lock();
        for (at, len) in history.touched(64 * 1024, writer.size()) {
            for at in (at..at + len).step_by(1 << 20).map(|piece| (piece, (at + len - piece).min(1 << 20))) {
                let mut bytes = vec![0; at.1 as usize];
                writer.read_at(at.0, &mut bytes).map_err(|error| format!("reading {:#x}: {error}", at.0))?;
                history.judge(at.0, &bytes, Moment::Now)?;
            }
        }
        Ok(())
    }
}
