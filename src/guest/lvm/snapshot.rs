//! Snapshots of the old kind (dm-snapshot): a store with the origin's chunks as they were, or as they were
//! changed in the snapshot.
//!
//! The first chunk of a persistent store is its header. Behind it are areas: a chunk with a table of
//! exceptions, and the chunks of its exceptions.

use crate::guest::bytes::{le32, le64};
use crate::guest::volumes::{Device, DeviceDisks};

use super::overlay::{self, MOVED_LIMIT, MovedChunk};

const SECTOR: u64 = 512;
const MAGIC: u32 = 0x7041_6e53;
/// Bytes of an exception: a chunk of the origin, and its place in the store.
const EXCEPTION_LEN: u64 = 16;
/// Bytes of a chunk; LVM has at most 512 KiB.
const CHUNK_LIMIT: u64 = 16 << 20;

/// The snapshot of an origin whose changes are in `store`.
pub(super) fn device(origin: &Device, store: &Device, disks: &DeviceDisks) -> Result<Device, String> {
    let mut header = [0; SECTOR as usize];
    store.source().read_at(0, &mut header).map_err(|error| format!("its exceptions: {error}"))?;
    if le32(&header, 0) != MAGIC {
        // The header is written when the snapshot is first activated.
        return if header == [0; SECTOR as usize] {
            Ok(origin.clone())
        } else {
            Err("its store of exceptions has no header".to_owned())
        };
    }
    let (is_valid, version, chunk_len) =
        (le32(&header, 4) != 0, le32(&header, 8), u64::from(le32(&header, 12)) * SECTOR);
    if version != 1 {
        return Err(format!("its store of exceptions has the unknown version {version}"));
    }
    if !is_valid {
        return Err("the snapshot became invalid: its store of exceptions was full".to_owned());
    }
    if !chunk_len.is_power_of_two() || chunk_len > CHUNK_LIMIT {
        return Err("its chunks have an impossible length".to_owned());
    }
    overlay::device(origin, store, chunk_len, exceptions(store, chunk_len)?, disks)
}

/// All exceptions, in the order in which they were made.
fn exceptions(store: &Device, chunk_len: u64) -> Result<Vec<MovedChunk>, String> {
    let of_area = chunk_len / EXCEPTION_LEN;
    let mut all = Vec::new();
    let mut table = vec![0; chunk_len as usize];
    // The header's chunk is the first.
    let mut area = 1;
    loop {
        let at = u64::saturating_mul(area, chunk_len);
        if at.saturating_add(chunk_len) > store.size() {
            // A full store has no end mark.
            return Ok(all);
        }
        store.source().read_at(at, &mut table).map_err(|error| format!("its exceptions: {error}"))?;
        for entry in table.chunks_exact(EXCEPTION_LEN as usize) {
            let (chunk, place) = (le64(entry, 0), le64(entry, 8));
            // Place 0 is the header: the end.
            if place == 0 {
                return Ok(all);
            }
            if all.len() == MOVED_LIMIT {
                return Err("it has too many exceptions".to_owned());
            }
            all.push((chunk, place));
        }
        area += of_area + 1;
    }
}
