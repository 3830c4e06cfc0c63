//! Images of other programs: their formats, how they are probed, and the files that they need.
//!
//! Only the names of the files that they need are read: a file that one of them needs must not change. Pure
//! functions over a reader of bytes; every length is bounded, and malformed bytes give [`Parents::Unknown`],
//! never a panic.

mod vhd;
mod vhdx;
mod vmdk;

use std::path::Path;

use super::bytes::{be_u32, be_u64, le_u32, le_u64};

/// A format that chainfs recognises and does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignFormat {
    /// `VMware`'s.
    Vmdk,
    /// `VirtualBox`'s.
    Vdi,
    /// Hyper-V's newer one.
    Vhdx,
    /// Hyper-V's and Virtual PC's older one (VHD).
    Vpc,
    /// QEMU's former one.
    Qed,
    /// qcow, version 1.
    Qcow,
    /// Parallels'.
    Parallels,
    /// Apple's.
    Dmg,
}

/// How many bytes of a file's start [`probe`] needs.
pub const PROBE_LEN: usize = 512;
/// Longest name that is read; QEMU's limit for its own formats.
const MAX_NAME_LEN: u64 = 1023;

/// The files that an image needs besides itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parents {
    /// None, or only images of a foreign format, which chainfs never changes.
    None,
    /// The files of these names, as written in the image.
    Named(Vec<Vec<u8>>),
    /// Unknown.
    Unknown,
}

/// Reads bytes at an offset; fewer at the end of the file.
pub type ReadAt<'a, E> = dyn FnMut(u64, &mut [u8]) -> Result<usize, E> + 'a;

impl ForeignFormat {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            ForeignFormat::Vmdk => "vmdk",
            ForeignFormat::Vdi => "vdi",
            ForeignFormat::Vhdx => "vhdx",
            ForeignFormat::Vpc => "vpc",
            ForeignFormat::Qed => "qed",
            ForeignFormat::Qcow => "qcow",
            ForeignFormat::Parallels => "parallels",
            ForeignFormat::Dmg => "dmg",
        }
    }

    /// The format that a file's extension indicates.
    pub fn of_name(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match extension.as_str() {
            "vmdk" => ForeignFormat::Vmdk,
            "vdi" => ForeignFormat::Vdi,
            "vhdx" | "avhdx" => ForeignFormat::Vhdx,
            "vhd" | "avhd" | "vpc" => ForeignFormat::Vpc,
            "qed" => ForeignFormat::Qed,
            "qcow" | "cow" => ForeignFormat::Qcow,
            "hdd" | "parallels" => ForeignFormat::Parallels,
            "dmg" => ForeignFormat::Dmg,
            _ => return None,
        })
    }
}

/// The foreign format that a file's first bytes indicate.
pub fn probe(head: &[u8]) -> Option<ForeignFormat> {
    let starts = |magic: &[u8]| head.starts_with(magic);
    let kind = if starts(b"KDMV") || starts(b"COWD") || vmdk::is_descriptor(head) {
        ForeignFormat::Vmdk
    } else if starts(b"vhdxfile") {
        ForeignFormat::Vhdx
    } else if starts(b"conectix") {
        ForeignFormat::Vpc
    } else if starts(b"QED\0") {
        ForeignFormat::Qed
    } else if starts(b"QFI\xfb\0\0\0\x01") {
        ForeignFormat::Qcow
    } else if starts(b"WithoutFreeSpace") || starts(b"WithouFreSpacExt") {
        ForeignFormat::Parallels
    } else if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) {
        ForeignFormat::Vdi
    } else {
        return None;
    };
    Some(kind)
}

/// The files that an image of that format needs, of a file of `len` bytes.
pub fn parents<E>(kind: ForeignFormat, len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    match kind {
        ForeignFormat::Vmdk => vmdk::parents(len, read),
        ForeignFormat::Vhdx => vhdx::parents(len, read),
        ForeignFormat::Vpc => vhd::parents(len, read),
        ForeignFormat::Qed => qed(len, read),
        ForeignFormat::Qcow => qcow(len, read),
        // Their parents are identified by numbers, if at all, and are of their own format.
        ForeignFormat::Vdi | ForeignFormat::Parallels | ForeignFormat::Dmg => Ok(Parents::None),
    }
}

/// The backing file of an image whose header is qcow2's with an error: in all versions the name of the
/// backing file is found in the same way.
pub fn qcow<E>(len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    let head = bytes(0, 20, read)?;
    if head.len() < 20 {
        return Ok(Parents::Unknown);
    }
    named(be_u64(&head, 8), be_u32(&head, 16).into(), len, read)
}

/// Whether bytes without qcow2's magic are otherwise a qcow2 header.
pub fn is_qcow2_but_for_magic(head: &[u8]) -> bool {
    head.len() >= 72 && matches!(be_u32(head, 4), 1..=3) && matches!(be_u32(head, 20), 9..=21)
}

fn qed<E>(len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    const HAS_BACKING_FILE: u64 = 1;
    let head = bytes(0, 64, read)?;
    if head.len() < 64 {
        return Ok(Parents::Unknown);
    }
    if le_u64(&head, 16) & HAS_BACKING_FILE == 0 {
        return Ok(Parents::None);
    }
    named(le_u32(&head, 56).into(), le_u32(&head, 60).into(), len, read)
}

/// The name at that offset of the file.
fn named<E>(at: u64, name_len: u64, len: u64, read: &mut ReadAt<'_, E>) -> Result<Parents, E> {
    if at == 0 || name_len == 0 {
        return Ok(Parents::None);
    }
    if name_len > MAX_NAME_LEN || at.checked_add(name_len).is_none_or(|end| end > len) {
        return Ok(Parents::Unknown);
    }
    let mut name = bytes(at, name_len, read)?;
    // QEMU reads it up to the first NUL.
    name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
    Ok(if name.is_empty() { Parents::Unknown } else { Parents::Named(vec![name]) })
}

/// At most `len` bytes at `at`.
fn bytes<E>(at: u64, len: u64, read: &mut ReadAt<'_, E>) -> Result<Vec<u8>, E> {
    let mut found = vec![0; len as usize];
    let got = read(at, &mut found)?;
    found.truncate(got);
    Ok(found)
}

/// A name in UTF-16; invalid code units are replaced.
fn utf16(units: impl Iterator<Item = u16>) -> Vec<u8> {
    let units = units.take_while(|unit| *unit != 0);
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect::<String>()
        .into_bytes()
}

#[cfg(test)]
mod tests;
