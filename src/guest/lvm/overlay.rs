//! A device some of whose chunks lie on another one: a snapshot over its origin, a cache over its origin.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::Source;
use crate::guest::source::within;
use crate::guest::volumes::{Device, DeviceDisks, DeviceMap};

/// Chunks that one device may have on the other: 16 bytes each.
pub(super) const MOVED_LIMIT: usize = 1 << 21;

/// A chunk of the base, and its place on the other device, both as numbers of chunks.
pub(super) type MovedChunk = (u64, u64);

/// The base with the moved chunks on `other`. Of several entries of one chunk the last counts.
pub(super) fn device(
    base: &Device,
    other: &Device,
    chunk_len: u64,
    mut moved: Vec<MovedChunk>,
    disks: &DeviceDisks,
) -> std::result::Result<Device, String> {
    if !chunk_len.is_power_of_two() && !chunk_len.is_multiple_of(512) || chunk_len == 0 {
        return Err("its chunks have an impossible length".to_owned());
    }
    moved.reverse();
    moved.sort_by_key(|(chunk, _)| *chunk);
    moved.dedup_by_key(|(chunk, _)| *chunk);
    let size = base.size();
    let mut map = DeviceMap::new(disks);
    let mut end = 0;
    for (chunk, place) in &moved {
        let at = chunk.saturating_mul(chunk_len);
        if at >= size || map.is_full() {
            break;
        }
        map.linear(base, end, at - end);
        let len = chunk_len.min(size - at);
        map.linear(other, place.saturating_mul(chunk_len), len);
        end = at + len;
    }
    map.linear(base, end, size - end);
    let source = || -> Arc<dyn Source> {
        let (base, other) = (Arc::clone(base.source()), Arc::clone(other.source()));
        Arc::new(Overlay { base, other, chunk_len, moved, size })
    };
    Ok(map.finish(source))
}

/// The same bytes by lookup.
struct Overlay {
    base: Arc<dyn Source>,
    other: Arc<dyn Source>,
    chunk_len: u64,
    /// By chunk.
    moved: Vec<MovedChunk>,
    size: u64,
}

impl Source for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let (chunk, into) = (at / self.chunk_len, at % self.chunk_len);
            let len = (self.chunk_len - into).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            match self.moved.binary_search_by_key(&chunk, |(chunk, _)| *chunk) {
                Ok(index) => {
                    let place = self.moved[index].1.saturating_mul(self.chunk_len).saturating_add(into);
                    self.other.read_at(place, piece)?;
                }
                Err(_) => self.base.read_at(at, piece)?,
            }
            at += len as u64;
            rest = more;
        }
        Ok(())
    }
}
