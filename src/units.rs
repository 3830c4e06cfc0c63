//! The address spaces of a disk image, each as a type of its own.
//!
//! A function that takes a [`GuestOffset`] and a [`HostOffset`] cannot be called the wrong
//! way round. Shifting and masking by the cluster size stands here and nowhere else.

mod list;
mod size;

use std::fmt;

pub use list::{join_list, split_list};
pub use size::{brief_size, human_size, parse_size};

// Lengths in memory are `usize`, lengths on disk `u64`; conversions between them are only
// right where the two are equally wide.
const _: () = assert!(usize::BITS == 64);

/// Bytes of a disk sector, the unit in which QEMU sizes disks.
pub const SECTOR_SIZE: u64 = 512;

/// A byte position on the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte position in an image file (or in its external data file).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Cluster size as a power of two. Invariant: 9 <= bits <= 21, so `1 << bits` cannot overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClusterBits(u32);

impl ClusterBits {
    /// `None` outside of what the qcow2 specification and QEMU allow (512 bytes to 2 MiB).
    pub fn new(bits: u32) -> Option<Self> {
        (9..=21).contains(&bits).then_some(Self(bits))
    }

    /// The power itself.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Bytes of one cluster.
    pub fn size(self) -> u64 {
        1 << self.0
    }

    /// Number of the cluster that holds `at`.
    pub fn index(self, at: u64) -> u64 {
        at >> self.0
    }

    /// Position of `at` within its cluster.
    pub fn within(self, at: u64) -> u64 {
        at & (self.size() - 1)
    }

    /// The start of the cluster that holds `at`.
    pub fn floor(self, at: u64) -> u64 {
        at & !(self.size() - 1)
    }

    /// Bytes left from `at` to the end of its cluster; at least 1.
    pub fn remaining(self, at: GuestOffset) -> u64 {
        self.size() - self.within(at.0)
    }

    /// Whether `at` is a multiple of the cluster size.
    pub fn aligned(self, at: u64) -> bool {
        self.within(at) == 0
    }
}

/// A run of bytes of which one thing holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<T> {
    /// What holds.
    pub value: T,
    /// Bytes; at least 1.
    pub len: u64,
}

impl<T> Run<T> {
    /// So many bytes of which `value` holds.
    pub fn new(value: T, len: u64) -> Self {
        Self { value, len }
    }

    /// The same run, with what `work` makes of the value.
    pub fn map<U>(self, work: impl FnOnce(T) -> U) -> Run<U> {
        Run { value: work(self.value), len: self.len }
    }

    /// At most `max` bytes of it.
    #[must_use]
    pub fn at_most(self, max: u64) -> Self {
        Self { len: self.len.min(max), ..self }
    }
}

/// What is known of bytes that have not been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// They may be anything.
    Data,
    /// They read as zeroes; in a file, they may be a hole.
    Zero,
}

/// Whether the bytes of an image or of a disk may change while they are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stability {
    /// They stay as they are.
    Frozen,
    /// A guest may write them.
    Live,
}

impl Stability {
    /// Live if `is_live`, else frozen.
    pub fn live_if(is_live: bool) -> Self {
        if is_live { Self::Live } else { Self::Frozen }
    }
}

/// Rounds a length up to whole sectors, as QEMU sizes raw disks. Saturates at the last whole sector.
pub fn round_up_to_sector(len: u64) -> u64 {
    len.checked_next_multiple_of(SECTOR_SIZE).unwrap_or(!(SECTOR_SIZE - 1))
}

/// Whether there is no byte but zeroes; as fast as memory is read.
pub fn are_zero(bytes: &[u8]) -> bool {
    // Whole blocks without an early end, so that the compiler takes many bytes at a time.
    bytes.chunks(4096).all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_nothing_else() {
        for len in [0, 1, 4096, 5000] {
            assert!(are_zero(&vec![0; len]));
            for at in [0, 4095, 4096, 4999].into_iter().filter(|at| *at < len) {
                let mut bytes = vec![0; len];
                bytes[at] = 0x80;
                assert!(!are_zero(&bytes), "{len} {at}");
            }
        }
    }

    #[test]
    fn cluster_bits_are_those_of_the_specification() {
        assert!(ClusterBits::new(8).is_none() && ClusterBits::new(22).is_none());
        let bits = ClusterBits::new(16).unwrap();
        assert_eq!(
            (bits.size(), bits.within(65_537), bits.floor(65_537), bits.index(65_537)),
            (65_536, 1, 65_536, 1)
        );
        assert_eq!((bits.remaining(GuestOffset(0)), bits.remaining(GuestOffset(65_535))), (65_536, 1));
    }

    #[test]
    fn sizes_round_up_to_sectors_without_overflow() {
        assert_eq!((round_up_to_sector(0), round_up_to_sector(1), round_up_to_sector(512)), (0, 512, 512));
        assert_eq!(round_up_to_sector(u64::MAX) % SECTOR_SIZE, 0);
    }
}
