//! The input of a parser: a disk, a partition, a logical volume. It cannot be written.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// Bytes that can only be read.
pub trait Source: Send + Sync {
    /// Number of bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes from `at` on. `Corrupt` if the range exceeds the source: ranges come from
    /// structures on the disk.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()>;
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        (**self).read_at(at, buf)
    }
}

/// Memory as a source, for tests and small structures.
impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size(), at, buf.len())?;
        buf.copy_from_slice(&self[at as usize..][..buf.len()]);
        Ok(())
    }
}

/// `Corrupt` unless the range lies within a source of `size` bytes.
pub fn within(size: u64, at: u64, len: usize) -> Result<()> {
    if at.checked_add(len as u64).is_some_and(|end| end <= size) {
        return Ok(());
    }
    let fact = format!("{len} bytes at {at:#x} are referenced, but it ends at {size:#x}");
    Err(Error::new(ErrorKind::Corrupt, fact))
}

/// A part of a source, as a source of its own.
#[derive(Clone, Debug)]
pub struct Slice<S> {
    whole: S,
    start: u64,
    len: u64,
}

impl<S: Source> Slice<S> {
    /// `len` bytes of `whole` from `start` on, cut off at its end.
    pub fn new(whole: S, start: u64, len: u64) -> Self {
        let len = len.min(whole.size().saturating_sub(start));
        Self { whole, start, len }
    }
}

impl<S: Source> Source for Slice<S> {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.len, at, buf.len())?;
        self.whole.read_at(self.start + at, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_outside_are_corrupt_and_nothing_overflows() {
        let slice = Slice::new((0..100u8).collect::<Vec<u8>>(), 90, 50);
        assert_eq!(slice.size(), 10);
        let mut buf = [0; 4];
        slice.read_at(6, &mut buf).unwrap();
        assert_eq!(buf, [96, 97, 98, 99]);
        for at in [7, 10, 11, u64::MAX, u64::MAX - 3] {
            assert_eq!(slice.read_at(at, &mut buf).unwrap_err().kind(), ErrorKind::Corrupt, "{at:#x}");
        }
        assert_eq!(Slice::new(vec![0; 10], 11, 5).size(), 0);
    }
}
