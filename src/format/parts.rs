//! The values that a header consists of. [`super::header`] re-exports them.

use crate::units::HostOffset;

/// The format's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// "compat=0.10": no zero clusters, no feature bits.
    V2,
    /// "compat=1.1".
    V3,
}

/// The location of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Table {
    /// Its place, cluster aligned.
    pub offset: HostOffset,
    /// Its entries.
    pub entries: u32,
}

impl L1Table {
    /// Its bytes.
    pub fn len_bytes(self) -> u64 {
        u64::from(self.entries) * 8
    }
}

/// The location of the refcount table. It may be beyond the end of the file: readers do not need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountTable {
    /// Its place, cluster aligned.
    pub offset: HostOffset,
    /// Its clusters.
    pub clusters: u32,
}

/// The location of the snapshot table. Its length in bytes is known only by parsing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotTable {
    /// Its place, cluster aligned.
    pub offset: HostOffset,
    /// Its entries.
    pub count: u32,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, called "zlib" by QEMU.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// QEMU's legacy AES-CBC.
    AesCbc,
    /// LUKS.
    Luks,
}

impl std::fmt::Display for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AesCbc => "AES-CBC",
            Self::Luks => "LUKS",
        })
    }
}

/// The backing file, as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// The name: not empty, no NUL bytes, otherwise unchecked.
    pub name: Vec<u8>,
    /// Its format, if the header states one.
    pub format: Option<String>,
}

/// The external data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// The name, if the header states one.
    pub name: Option<Vec<u8>>,
    /// Whether it is a raw image by itself.
    pub raw: bool,
}
