//! A guest of an active disk in an open store: its writes, and the promises that it got.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use chainfs::error::Result;
use chainfs::image::write::Zeroing;
use chainfs::store::{Access, ActiveHandle, Store};

use super::shape::pages;
use super::tape::{Event, Recorder};
use support::sim::history::{History, Moment};
use support::sim::value::{Value, pattern_range};
use support::sim::{KIB, Random, SECTOR, mix};

/// A user of the disk.
pub(crate) struct Guest {
    handle: ActiveHandle,
    recorder: Recorder,
    pub(crate) history: History,
    random: Random,
    tag: u64,
}

impl Guest {
    /// Opens the disk of the chain whose leaf is `leaf`, which holds `initial`.
    pub(crate) fn open(
        store: &Arc<Store>,
        recorder: &Recorder,
        leaf: &str,
        initial: &[u8],
        seed: u64,
    ) -> Self {
        let catalog = store.catalog();
        let leaf =
            catalog.images.iter().position(|image| image.place.path.as_os_str() == leaf).expect("the leaf");
        let handle = store.open_active(&catalog, &catalog.layers(leaf), Access::ReadWrite).expect("its disk");
        let history = History::new(pages(initial), initial.len() as u64);
        Self { handle, recorder: recorder.clone(), history, random: Random::new(mix(seed)), tag: 1000 }
    }

    /// Does something, or waits a little.
    pub(crate) fn step(&mut self) {
        self.try_step().expect("a working disk");
    }

    /// The same on a disk that may fail.
    pub(crate) fn try_step(&mut self) -> Result<()> {
        let size = self.handle.size()?;
        let at = self.random.next() % size;
        let len = (1 + self.random.next() % [KIB, 9 * KIB, 40 * KIB][self.random.below(3)]).min(size - at);
        let sectors = (at / SECTOR * SECTOR, len.next_multiple_of(SECTOR).min(size - at / SECTOR * SECTOR));
        match self.random.below(12) {
            0..=4 => self.write(at, len),
            5 | 6 => self.write(sectors.0, sectors.1),
            7 => self.zero(sectors, Zeroing::Keep),
            8 => self.zero(sectors, Zeroing::Unmap),
            _ => self.flush(),
        }
    }

    fn write(&mut self, at: u64, len: u64) -> Result<()> {
        self.tag += 1;
        let bytes = pattern_range(self.tag, at, len);
        let number = self
            .history
            .begin(self.recorder.mark(Event::Mark), format!("write {} at {at:#x}+{len:#x}", self.tag));
        self.history.put(number, at, &bytes, &Value::Written(self.tag));
        assert_eq!(self.handle.write_at(at, &bytes)?, len as usize);
        self.history.acknowledge(number, self.recorder.mark(Event::Mark));
        Ok(())
    }

    fn zero(&mut self, (at, len): (u64, u64), zeroing: Zeroing) -> Result<()> {
        let number = self.history.begin(self.recorder.mark(Event::Mark), format!("zero at {at:#x}+{len:#x}"));
        self.history.put(number, at, &vec![0; len as usize], &Value::Zero);
        self.handle.zero(at, len, zeroing)?;
        self.history.acknowledge(number, self.recorder.mark(Event::Mark));
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        let begun = self.recorder.mark(Event::Mark);
        self.handle.flush()?;
        let acked = self.recorder.mark(Event::Flushed);
        self.history.flushed(begun, acked);
        Ok(())
    }

    /// Whether the disk shows the writes.
    pub(crate) fn verify(&self) -> std::result::Result<(), String> {
        let mut bytes = vec![0; self.handle.size().map_err(|error| error.to_string())? as usize];
        self.handle.read_at(0, &mut bytes).map_err(|error| error.to_string())?;
        self.history.judge(0, &bytes, Moment::Now)
    }

    /// Continues in a thread of its own during `work`.
    pub(crate) fn while_at_it<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let is_over = &is_over;
            scope.spawn(move || {
                let mut steps = 0;
                while !is_over.load(Ordering::Acquire) && steps < 60 {
                    self.step();
                    steps += 1;
                    thread::sleep(Duration::from_micros(mix(steps) % 1500));
                }
            });
            let done = work();
            is_over.store(true, Ordering::Release);
            done
        })
    }
}
