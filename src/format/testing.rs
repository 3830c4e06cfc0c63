//! A builder of image headers for the tests of this layer: start from a valid one, change fields.

use super::header::{Header, MAGIC};
use super::malformed::Malformed;

/// A header extension with its padding.
pub(super) fn extension(magic: u32, data: &[u8]) -> Vec<u8> {
    let mut out = [magic.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// The first cluster of an image, and the length of its file.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) file_len: u64,
}

impl Image {
    /// 1 GiB, 64 KiB clusters, no backing file: refcount table at cluster 1, L1 at cluster 3.
    pub(super) fn v3() -> Self {
        Self { bytes: vec![0; 65_536], file_len: 0x40000 }
            .u32(0, MAGIC)
            .u32(4, 3)
            .u32(20, 16)
            .u64(24, 1 << 30)
            .u32(36, 2)
            .u64(40, 0x30000)
            .u64(48, 0x10000)
            .u32(56, 1)
            .u32(96, 4)
            .u32(100, 112)
    }

    /// The same as version 2.
    pub(super) fn v2() -> Self {
        Self::v3().u32(4, 2).u32(96, 0).u32(100, 0)
    }

    pub(super) fn u32(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn u64(mut self, at: usize, value: u64) -> Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn at(mut self, at: usize, bytes: &[u8]) -> Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Names a backing file: offset, length and the name itself.
    pub(super) fn backing(self, at: usize, name: &[u8]) -> Self {
        self.u64(8, at as u64).u32(16, name.len() as u32).at(at, name)
    }

    pub(super) fn file_len(mut self, len: u64) -> Self {
        self.file_len = len;
        self.bytes.truncate(len as usize);
        self
    }

    pub(super) fn parse(&self) -> Result<Header, Malformed> {
        Header::parse(&self.bytes, self.file_len)
    }

    pub(super) fn reason(&self) -> Malformed {
        self.parse().expect_err("the header is malformed")
    }
}
