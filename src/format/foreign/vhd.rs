//! VHD: the names of the parent of a differencing disk. The parent is a VHD itself, which chainfs never
//! changes, so an unknown name does no harm.

use super::super::bytes::{be_u32, be_u64};
use super::{Parents, ReadAt, bytes, utf16};

/// Offset of the disk type in the copy of the footer, and the type of a differencing disk.
const TYPE_AT: usize = 60;
const DIFFERENCING: u32 = 4;
/// Maximum length of a locator's name.
const MAX_LOCATOR_LEN: u32 = 4096;

pub(super) fn parents<E>(len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    let footer = bytes(0, 512, read)?;
    if footer.len() < 512 || be_u32(&footer, TYPE_AT) != DIFFERENCING {
        return Ok(Parents::None);
    }
    let at = be_u64(&footer, 16);
    if at >= len {
        return Ok(Parents::None);
    }
    let header = bytes(at, 1024, read)?;
    if header.len() < 1024 || !header.starts_with(b"cxsparse") {
        return Ok(Parents::None);
    }
    let mut names =
        vec![utf16(header[64..576].chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])))];
    for locator in header[576..768].chunks_exact(24) {
        let (name_len, at) = (be_u32(locator, 8), be_u64(locator, 16));
        if name_len == 0 || name_len > MAX_LOCATOR_LEN || at >= len {
            continue;
        }
        let name = bytes(at, name_len.into(), read)?;
        match &locator[..4] {
            b"W2ru" | b"W2ku" => {
                names.push(utf16(name.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]))));
            }
            b"MacX" => names.push(name),
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    Ok(if names.is_empty() { Parents::None } else { Parents::Named(names) })
}
