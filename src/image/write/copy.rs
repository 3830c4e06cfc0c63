//! Copies from a file to the disk.
//!
//! Whole clusters are copied from file to file, in turns as long as the free clusters are contiguous; partial
//! clusters are written like any other data. Order, gates and ranges are those of writes.

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::io::Storage;
use crate::units::Run;

use super::qcow2::Qcow2Writer;

/// Maximum bytes of one turn.
const MAX_TURN: u64 = 16 << 20;

/// The data of a write.
#[derive(Clone, Copy)]
pub(super) enum Payload<'a> {
    Bytes(&'a [u8]),
    /// This many bytes of a file, from an offset on.
    File(&'a dyn Storage, u64, u64),
}

impl Payload<'_> {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, _, len) => *len,
        }
    }
}

impl Qcow2Writer {
    /// Makes `[at, at + len)` hold the bytes of `source` at `from`.
    pub(super) fn copy_from(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<()> {
        self.prepare_content()?;
        let cluster = self.image.cluster();
        let mut done = 0;
        while done < len {
            let (position, read_at, rest) = (at + done, from + done, len - done);
            let whole = rest - rest % cluster.size();
            done += if !cluster.aligned(position) || whole == 0 {
                // A part of a cluster: the rest of the cluster may have to move with it.
                let part = rest.min(cluster.size() - cluster.within(position));
                self.write_at(position, &read_exactly(source, read_at, part)?)?;
                part
            } else {
                let turn = self.image.rest_of_table(position, whole).min(MAX_TURN);
                match self.copy_in_place(position, turn, source, read_at)? {
                    0 => self.copy_elsewhere(position, turn, source, read_at)?,
                    copied => copied,
                }
            };
            self.write_back_if_pressed()?;
        }
        Ok(())
    }

    /// As [`Self::write_in_place`].
    fn copy_in_place(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<u64> {
        let _gate = self.reuse_gate.read();
        self.check_poison()?;
        let Run { value: entry, len } = self.lookup_to_write(at, len)?;
        let Some(host) = entry.own_data() else { return Ok(0) };
        // With subclusters a run may end within a cluster; the rest of the cluster is for the next turn.
        self.image.data().copy_from(host.0, source, from, len)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(len)
    }

    /// As [`Self::write_elsewhere`].
    fn copy_elsewhere(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<u64> {
        let _held = self.hold(at, len);
        self.fill_with(at, Payload::File(source, from, len)).map(|done| done as u64)
    }
}

/// Reads bytes of a source that has to have them.
pub(super) fn read_exactly(source: &dyn Storage, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    if source.read_at(at, &mut bytes)? < bytes.len() {
        let fact = format!("a file ends before {:#x}, in the middle of what was to be copied", at + len);
        return Err(Error::new(ErrorKind::Io, fact));
    }
    Ok(bytes)
}
