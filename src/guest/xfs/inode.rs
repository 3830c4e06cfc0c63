//! Inodes: the core, and the areas of the two forks behind it.
//!
//! Fields follow "XFS Algorithms & Data Structures", chapter "On-disk Inode". Every stored count stays
//! unproven until the fork is read.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::guest::bytes::{array, be16, be32, be64, corrupt};
use crate::guest::filesystem::{FileAttributes, FileKind, Time};

use super::checksum;
use super::superblock::Superblock;

/// `di_magic`.
pub(super) const MAGIC: u16 = 0x494e;
/// The core of versions 1 and 2, and of version 3.
pub(super) const CORE_V2_LEN: usize = 100;
pub(super) const CORE_V3_LEN: usize = 176;
/// `di_crc`, in version 3.
const CHECKSUM_AT: usize = 100;
/// Bits of `di_flags`.
const REALTIME: u16 = 1;
/// Bits of `di_flags2`.
pub(super) const BIGTIME: u64 = 1 << 3;
const NREXT64: u64 = 1 << 4;
/// Seconds from 1970 to the beginning of the wide range of times.
const BIGTIME_EPOCH: i64 = -(1 << 31);
const NANOSECONDS: u64 = 1_000_000_000;

/// The format of a fork (`di_format`, `di_aformat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForkFormat {
    /// A device number.
    Device,
    /// The content itself.
    Local,
    /// A list of extents.
    Extents,
    /// The root of a B-tree of extents.
    Btree,
    /// Anything else.
    Invalid,
}

impl ForkFormat {
    fn of(value: u8) -> Self {
        match value {
            0 => Self::Device,
            1 => Self::Local,
            2 => Self::Extents,
            3 => Self::Btree,
            _ => Self::Invalid,
        }
    }
}

/// A fork of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fork {
    /// The content.
    Data,
    /// The extended attributes.
    Attributes,
}

/// A valid inode.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u64,
    /// All bytes.
    pub(super) raw: Box<[u8]>,
    pub(super) kind: FileKind,
    /// `di_size`.
    pub(super) size: u64,
    /// `di_format`.
    pub(super) format: ForkFormat,
    /// `di_aformat`.
    pub(super) attribute_format: ForkFormat,
    core_len: usize,
}

impl Inode {
    /// Parses the bytes of an inode. `is_replayed`: the log has changed them, and the checksum was not
    /// computed again.
    pub(super) fn parse(
        superblock: &Superblock,
        number: u64,
        raw: Box<[u8]>,
        is_replayed: bool,
    ) -> Result<Self> {
        let invalid = |fact: &str| Err(corrupt(format!("inode {number} {fact}")));
        if be16(&raw, 0) != MAGIC {
            return invalid("is damaged");
        }
        let version = raw[4];
        let core_len = match version {
            1 | 2 if !superblock.has_checksums => CORE_V2_LEN,
            3 if superblock.has_checksums => CORE_V3_LEN,
            _ => return invalid(&format!("has version {version}")),
        };
        if version == 3 {
            if !is_replayed && !checksum::is_valid(&raw, CHECKSUM_AT) {
                return invalid("has a wrong checksum");
            }
            if be64(&raw, 152) != number || array::<16>(&raw, 160) != superblock.meta_uuid {
                return invalid("belongs elsewhere");
            }
        }
        let kind = match FileKind::of_mode(be16(&raw, 2).into()) {
            Some(kind) => kind,
            None if be16(&raw, 2) & 0o170_000 == 0 => return invalid("is free"),
            None => return invalid("has an unknown kind"),
        };
        let size = be64(&raw, 56);
        if size >= 1 << 63 {
            return invalid("has a negative size");
        }
        let format = ForkFormat::of(raw[5]);
        let attribute_format = ForkFormat::of(raw[83]);
        let inode = Self { number, raw, kind, size, format, attribute_format, core_len };
        if inode.attribute_at() > inode.raw.len() {
            return invalid("has an invalid fork offset");
        }
        Ok(inode)
    }

    fn attribute_at(&self) -> usize {
        self.core_len + usize::from(self.raw[82]) * 8
    }

    /// Whether it has an attribute fork.
    pub(super) fn has_attributes(&self) -> bool {
        self.raw[82] != 0
    }

    /// The range of a fork's area in the inode; empty if there is none.
    fn area_range(&self, fork: Fork) -> Range<usize> {
        match fork {
            Fork::Data if self.has_attributes() => self.core_len..self.attribute_at(),
            Fork::Data => self.core_len..self.raw.len(),
            Fork::Attributes if self.has_attributes() => self.attribute_at()..self.raw.len(),
            Fork::Attributes => 0..0,
        }
    }

    /// A fork's area in the inode.
    pub(super) fn area(&self, fork: Fork) -> &[u8] {
        &self.raw[self.area_range(fork)]
    }

    /// A fork's format.
    pub(super) fn format_of(&self, fork: Fork) -> ForkFormat {
        match fork {
            Fork::Data => self.format,
            Fork::Attributes => self.attribute_format,
        }
    }

    fn flags2(&self) -> u64 {
        if self.core_len == CORE_V3_LEN { be64(&self.raw, 120) } else { 0 }
    }

    /// Number of extents of a fork, as stored.
    pub(super) fn extent_count(&self, fork: Fork) -> u64 {
        match (fork, self.flags2() & NREXT64 != 0) {
            // One field has two meanings.
            (Fork::Data, false) | (Fork::Attributes, true) => be32(&self.raw, 76).into(),
            (Fork::Data, true) => be64(&self.raw, 24),
            (Fork::Attributes, false) => be16(&self.raw, 80).into(),
        }
    }

    /// Whether its content is on the realtime device.
    pub(super) fn is_realtime(&self) -> bool {
        be16(&self.raw, 90) & REALTIME != 0
    }

    fn time(&self, at: usize) -> Time {
        if self.flags2() & BIGTIME != 0 {
            let since = be64(&self.raw, at);
            let seconds = BIGTIME_EPOCH + (since / NANOSECONDS).cast_signed();
            return Time { seconds, nanoseconds: (since % NANOSECONDS) as u32 };
        }
        let seconds = i64::from(be32(&self.raw, at).cast_signed());
        Time { seconds, nanoseconds: be32(&self.raw, at + 4).min(NANOSECONDS as u32 - 1) }
    }

    /// The stat(2) attributes.
    pub(super) fn attributes(&self, superblock: &Superblock) -> FileAttributes {
        let raw = &self.raw;
        // Inodes of version 1 count their links in 16 bits.
        let links = if raw[4] == 1 { be16(raw, 6).into() } else { be32(raw, 16) };
        let device = match self.kind {
            FileKind::CharDevice | FileKind::BlockDevice => {
                let number = be32(raw, self.core_len);
                ((number >> 18) & 0x3fff, number & 0x3_ffff)
            }
            _ => (0, 0),
        };
        FileAttributes {
            kind: self.kind,
            mode: be16(raw, 2) & 0o7777,
            uid: be32(raw, 8),
            gid: be32(raw, 12),
            size: self.size,
            blocks: be64(raw, 64).saturating_mul(1 << (superblock.block_bits - 9)),
            links,
            device,
            accessed: self.time(32),
            modified: self.time(40),
            changed: self.time(48),
            created: (self.core_len == CORE_V3_LEN).then(|| self.time(144)),
        }
    }

    /// The error for a damaged inode.
    pub(super) fn corrupt(&self, fact: &str) -> Error {
        corrupt(format!("inode {} {fact}", self.number))
    }

    /// Adds the inode's number to an error.
    pub(super) fn about(&self, error: Error) -> Error {
        error.within(format!("inode {}", self.number))
    }
}
