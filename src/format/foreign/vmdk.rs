//! VMDK: sparse files with an embedded descriptor, older ones of ESX, and descriptors by themselves.

use super::super::bytes::{le_u32, le_u64};
use super::{Parents, ReadAt, bytes};

/// Longest descriptor that is read; QEMU's limit.
const MAX_DESCRIPTOR_LEN: u64 = 1 << 20;
/// Maximum number of names that are kept of one descriptor.
const MAX_NAMES: usize = 4096;

/// Whether a file begins as a descriptor: comments, and then its version.
pub(super) fn is_descriptor(head: &[u8]) -> bool {
    if head.starts_with(b"# Disk DescriptorFile") {
        return true;
    }
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#")).unwrap_or_default();
    [&b"version=1"[..], b"version=2", b"version=3"].contains(&first)
}

pub(super) fn parents<E>(len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    let head = bytes(0, 1056, read)?;
    if head.starts_with(b"COWD") {
        return Ok(esx(&head));
    }
    let (at, descriptor_len) = if head.starts_with(b"KDMV") {
        if head.len() < 44 {
            return Ok(Parents::Unknown);
        }
        let (at, sectors) = (le_u64(&head, 28), le_u64(&head, 36));
        // An extent, which another file describes.
        if at == 0 || sectors == 0 {
            return Ok(Parents::None);
        }
        (at.saturating_mul(512), sectors.saturating_mul(512))
    } else {
        (0, len)
    };
    if at >= len {
        return Ok(Parents::Unknown);
    }
    let text = bytes(at, descriptor_len.min(MAX_DESCRIPTOR_LEN), read)?;
    Ok(described(&text))
}

/// An older file names its parent in its header.
fn esx(head: &[u8]) -> Parents {
    const IS_ROOT: u32 = 1;
    if head.len() < 1056 {
        return Parents::Unknown;
    }
    if le_u32(head, 8) & IS_ROOT != 0 {
        return Parents::None;
    }
    let name = head[32..].split(|byte| *byte == 0).next().unwrap_or_default();
    if name.is_empty() { Parents::Unknown } else { Parents::Named(vec![name.to_vec()]) }
}

/// The names in a descriptor: of its parent, and of the files that hold its data.
fn described(text: &[u8]) -> Parents {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut names = Vec::new();
    let mut is_one = false;
    for line in text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii) {
        is_one |= line.starts_with(b"version=") || line.starts_with(b"createType");
        let access = line.split(u8::is_ascii_whitespace).next().unwrap_or_default();
        let is_extent = [&b"RW"[..], b"RDONLY", b"NOACCESS"].contains(&access);
        if !is_extent && !line.starts_with(b"parentFileNameHint") {
            continue;
        }
        // Between the first quotation mark and the last: QEMU allows no others in a name.
        let mut quotes = (0..line.len()).filter(|at| line[*at] == b'"');
        if let (Some(first), Some(last)) = (quotes.next(), quotes.next_back())
            && first + 1 < last
            && names.len() < MAX_NAMES
        {
            names.push(line[first + 1..last].to_vec());
        }
    }
    match (names.is_empty(), is_one) {
        (false, _) => Parents::Named(names),
        (true, true) => Parents::None,
        (true, false) => Parents::Unknown,
    }
}
