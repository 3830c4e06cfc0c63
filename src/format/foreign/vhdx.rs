//! VHDX: the names in the parent locator of a differencing disk. The parent is a VHDX itself, which chainfs
//! never changes, so an unknown name does no harm.

use super::super::bytes::{le_u16, le_u32, le_u64};
use super::{Parents, ReadAt, bytes, utf16};

const REGION_TABLE_AT: u64 = 192 << 10;
const MAX_ENTRIES: usize = 2047;
const METADATA_REGION: [u8; 16] =
    [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e];
const PARENT_LOCATOR: [u8; 16] =
    [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
/// Maximum length of a parent locator.
const MAX_LOCATOR_LEN: u32 = 1 << 20;

pub(super) fn parents<E>(len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    let Some(metadata) = entry(REGION_TABLE_AT, b"regi", (8, 16), &METADATA_REGION, read)? else {
        return Ok(Parents::None);
    };
    let at = le_u64(&metadata, 16);
    if at >= len {
        return Ok(Parents::None);
    }
    let Some(item) = entry(at, b"metadata", (10, 32), &PARENT_LOCATOR, read)? else {
        return Ok(Parents::None);
    };
    let (offset, item_len) = (le_u32(&item, 16), le_u32(&item, 20).min(MAX_LOCATOR_LEN));
    let locator = bytes(at + u64::from(offset), item_len.into(), read)?;
    Ok(located(&locator))
}

/// The entry of 32 bytes that begins with `id`, of a table at `at`: its count is at `count`, entries start at
/// `first`.
fn entry<E>(
    at: u64,
    magic: &[u8],
    (count, first): (usize, usize),
    id: &[u8; 16],
    read: &mut ReadAt<'_, E>,
) -> Result<Option<Vec<u8>>, E> {
    let table = bytes(at, 64 << 10, read)?;
    if table.len() < first || !table.starts_with(magic) {
        return Ok(None);
    }
    let count = usize::from(le_u16(&table, count)).min(MAX_ENTRIES);
    Ok(table[first..].chunks_exact(32).take(count).find(|entry| entry.starts_with(id)).map(<[u8]>::to_vec))
}

fn located(locator: &[u8]) -> Parents {
    if locator.len() < 20 {
        return Parents::None;
    }
    let text = |at: u32, len: u16| {
        let part =
            locator.get(at as usize..).and_then(|rest| rest.get(..usize::from(len))).unwrap_or_default();
        utf16(part.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])))
    };
    let count = usize::from(le_u16(locator, 18));
    let mut names = Vec::new();
    for pair in locator[20..].chunks_exact(12).take(count.min(MAX_ENTRIES)) {
        let key = text(le_u32(pair, 0), le_u16(pair, 8));
        let value = text(le_u32(pair, 4), le_u16(pair, 10));
        if key.ends_with(b"path") && !value.is_empty() {
            names.push(value);
        }
    }
    if names.is_empty() { Parents::None } else { Parents::Named(names) }
}
