//! A view as the backing disk of an image that is being written.

use crate::error::Result;
use crate::image::write::BackingDisk;
use crate::units::{BlockStatus, Run};

use super::View;

impl BackingDisk for View {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let len = self.size().saturating_sub(at).min(buf.len() as u64) as usize;
        let (within, beyond) = buf.split_at_mut(len);
        beyond.fill(0);
        if within.is_empty() { Ok(()) } else { self.read_at(at, within) }
    }

    fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        assert!(len > 0);
        if at >= self.size() {
            return Ok(Run::new(BlockStatus::Zero, len));
        }
        Ok(self.frozen_run(at)?.at_most(len))
    }
}
