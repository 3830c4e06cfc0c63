//! The byte ranges in which two disks differ.
//!
//! Promise: bytes that both disks have from one place of one image are not read, nor are zeroes of both.

use crate::chain::{Origin, View};
use crate::error::Result;
use crate::units::{BlockStatus, Run, SECTOR_SIZE};

/// Bytes that are compared at once.
const STEP: u64 = 1 << 20;

/// Calls `each` with every differing range, in order: whole sectors, adjacent ones joined. After the end of
/// the shorter disk, zeroes of the other are no difference. Returns the number of bytes read.
pub fn differing_ranges(a: &View, b: &View, each: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<u64> {
    let mut walk = RangeWalk { a, b, read: 0, open: None, buffers: [Vec::new(), Vec::new()] };
    let size = a.size().max(b.size());
    let mut at = 0;
    while at < size {
        at += walk.step(at, size - at, each)?;
    }
    walk.close(each)?;
    Ok(walk.read)
}

struct RangeWalk<'a> {
    a: &'a View,
    b: &'a View,
    read: u64,
    /// A differing range that may continue.
    open: Option<(u64, u64)>,
    buffers: [Vec<u8>; 2],
}

impl RangeWalk<'_> {
    /// Compares the bytes at `at`, and returns how many.
    fn step(&mut self, at: u64, max: u64, each: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<u64> {
        let (from_a, from_b) = (origin(self.a, at, max)?, origin(self.b, at, max)?);
        let len = from_a.len.min(from_b.len);
        if is_same(&from_a, &from_b) {
            return Ok(len);
        }
        // A raw image has holes that appear in no table.
        let (run_a, run_b) = (status_run(self.a, &from_a, at, len)?, status_run(self.b, &from_b, at, len)?);
        let len = run_a.len.min(run_b.len);
        if (run_a.value, run_b.value) == (BlockStatus::Zero, BlockStatus::Zero) {
            return Ok(len);
        }
        let len = len.min(STEP);
        for ((view, run), buffer) in [(self.a, run_a), (self.b, run_b)].into_iter().zip(&mut self.buffers) {
            buffer.clear();
            buffer.resize(len as usize, 0);
            if run.value == BlockStatus::Data {
                view.read_at(at, buffer)?;
                self.read += len;
            }
        }
        let sector = SECTOR_SIZE as usize;
        for (index, (one, other)) in
            self.buffers[0].chunks(sector).zip(self.buffers[1].chunks(sector)).enumerate()
        {
            if one != other {
                let start = at + (index * sector) as u64;
                match &mut self.open {
                    Some((open, len)) if *open + *len == start => *len += one.len() as u64,
                    _ => {
                        if let Some((open, len)) = self.open.replace((start, one.len() as u64)) {
                            each(open, len)?;
                        }
                    }
                }
            }
        }
        Ok(len)
    }

    fn close(&mut self, each: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
        self.open.take().map_or(Ok(()), |(start, len)| each(start, len))
    }
}

/// The origin of a disk's bytes; beyond its end they are zeroes.
fn origin(view: &View, at: u64, max: u64) -> Result<Origin> {
    if at < view.size() {
        view.origin(at, max.min(view.size() - at))
    } else {
        Ok(Origin { image: 0, place: 0, within: None, len: max })
    }
}

fn is_same(a: &Origin, b: &Origin) -> bool {
    a.image == b.image && (a.image == 0 || (a.place, a.within) == (b.place, b.within))
}

/// The status of a range of that origin, without reading it.
fn status_run(view: &View, origin: &Origin, at: u64, len: u64) -> Result<Run<BlockStatus>> {
    if origin.image == 0 {
        return Ok(Run::new(BlockStatus::Zero, len));
    }
    let run = view.map_run(at, len)?;
    Ok(Run::new(if run.zero { BlockStatus::Zero } else { BlockStatus::Data }, run.len.min(len)))
}
