//! The bytes of a guest's file: where they are, where they come from, and whether two files have the same.
//!
//! Promise of [`same_bytes`]: bytes that both files have from one place of one image are not read.

use crate::chain::Origin;
use crate::error::{Error, Result};
use crate::guest::RunKind;
use crate::guest::luks::CipherId;
use crate::units::Run;

use super::mapped_file::MappedFile;
use super::walk::{GuestEntry, GuestTree};
use super::{DiskContents, VolumeOrigin};

/// Bytes of a file whose runs are requested at once.
const WINDOW: u64 = 1 << 40;
/// Bytes that are compared at once.
const STEP: u64 = 1 << 20;

/// An open file.
#[derive(Debug)]
pub struct OpenContent<'a> {
    tree: &'a GuestTree,
    file: MappedFile,
}

/// The origin of some bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByteSource {
    Zero,
    Place {
        image: u64,
        place: u64,
        within: Option<u64>,
        /// How it is decrypted.
        cipher: Option<(CipherId, u64, u64)>,
    },
    /// Unknown without reading.
    Unknown,
}

impl<'a> OpenContent<'a> {
    /// The bytes of a regular file.
    pub fn new(tree: &'a GuestTree, file: &GuestEntry) -> Self {
        let GuestEntry { ino, attributes, .. } = *file;
        Self { tree, file: MappedFile::sized(&tree.contents, tree.tree, ino, attributes.size, WINDOW) }
    }

    /// The rest of the run at `at`, which lies within the file: where the byte at `at` is.
    pub fn run(&self, at: u64) -> Result<Run<RunKind>> {
        self.file.run(at)
    }

    /// All its bytes; `None` if they are more than `limit`.
    pub fn whole(&self, limit: u64) -> Result<Option<Vec<u8>>> {
        let size = self.file.size();
        if size > limit {
            return Ok(None);
        }
        let mut bytes = vec![0; size as usize];
        let mut at = 0;
        while at < size {
            let Run { value: kind, len } = self.run(at)?;
            let len = len.min(STEP);
            if kind != RunKind::Hole {
                self.read_at(at, &mut bytes[at as usize..][..len as usize])?;
            }
            at += len;
        }
        Ok(Some(bytes))
    }

    /// Fills `buf` with the bytes at `at`, all of which lie before the file's end.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(at, buf)
    }
}

impl ByteSource {
    fn of(found: Option<VolumeOrigin>) -> Self {
        let Some(VolumeOrigin { origin: Origin { image, place, within, .. }, cipher }) = found else {
            return Self::Unknown;
        };
        match (image, cipher) {
            (0, None) => Self::Zero,
            // Zeroes have no place. Decrypted, they are something else.
            (0, Some(_)) => Self::Place { image, place: 0, within: None, cipher },
            _ => Self::Place { image, place, within, cipher },
        }
    }

    /// Whether the bytes of both are known to be equal.
    fn is_same(self, other: Self) -> bool {
        self == other && self != Self::Unknown
    }
}

/// One of the two sides of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

/// A result, or the side that cannot be read and the error.
pub type Compared<T> = std::result::Result<T, (Side, Error)>;

/// Bytes that can be compared.
trait ComparedBytes {
    fn size(&self) -> u64;
    /// The origin of the bytes at `at`, and the number of bytes that share it.
    fn origin(&mut self, at: u64) -> Result<(ByteSource, u64)>;
    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> Result<()>;
}

impl ComparedBytes for OpenContent<'_> {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn origin(&mut self, at: u64) -> Result<(ByteSource, u64)> {
        let Run { value: kind, len } = self.run(at)?;
        match kind {
            RunKind::Hole => Ok((ByteSource::Zero, len)),
            RunKind::Opaque => Ok((ByteSource::Unknown, len)),
            RunKind::Stored(place) | RunKind::Verified(place) => {
                let (origin, len) = self.tree.contents.origin(self.tree.tree.volume, place, len)?;
                Ok((ByteSource::of(origin), len))
            }
        }
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        OpenContent::read_at(self, at, buf)
    }
}

/// A whole volume.
struct WholeVolume<'a>(&'a DiskContents, usize);

impl ComparedBytes for WholeVolume<'_> {
    fn size(&self) -> u64 {
        self.0.layout().volumes[self.1].size
    }

    fn origin(&mut self, at: u64) -> Result<(ByteSource, u64)> {
        let (origin, len) = self.0.origin(self.1, at, self.size() - at)?;
        Ok((ByteSource::of(origin), len))
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_volume(self.1, at, buf)
    }
}

/// Whether two files hold the same bytes.
pub fn same_bytes(a: &mut OpenContent<'_>, b: &mut OpenContent<'_>) -> Compared<bool> {
    same(a, b)
}

/// Whether two volumes hold the same bytes.
pub(super) fn same_volumes(a: (&DiskContents, usize), b: (&DiskContents, usize)) -> Compared<bool> {
    same(&mut WholeVolume(a.0, a.1), &mut WholeVolume(b.0, b.1))
}

fn same(a: &mut dyn ComparedBytes, b: &mut dyn ComparedBytes) -> Compared<bool> {
    let on = |side| move |error| (side, error);
    if a.size() != b.size() {
        return Ok(false);
    }
    let mut buffers = [Vec::new(), Vec::new()];
    let mut at = 0;
    while at < a.size() {
        let (from_a, len_a) = a.origin(at).map_err(on(Side::A))?;
        let (from_b, len_b) = b.origin(at).map_err(on(Side::B))?;
        let mut len = len_a.min(len_b);
        if !from_a.is_same(from_b) {
            len = len.min(STEP);
            let sides: [(Side, &mut dyn ComparedBytes, ByteSource); 2] =
                [(Side::A, &mut *a, from_a), (Side::B, &mut *b, from_b)];
            for ((side, bytes, from), buf) in sides.into_iter().zip(&mut buffers) {
                buf.clear();
                buf.resize(len as usize, 0);
                if from != ByteSource::Zero {
                    bytes.read_at(at, buf).map_err(on(side))?;
                }
            }
            if buffers[0] != buffers[1] {
                return Ok(false);
            }
        }
        at += len;
    }
    Ok(true)
}

/// Whether two volumes are known to hold the same bytes from beginning to end. Nothing is read.
pub(super) fn same_origins(a: (&DiskContents, usize), b: (&DiskContents, usize)) -> bool {
    let (mut a, mut b) = (WholeVolume(a.0, a.1), WholeVolume(b.0, b.1));
    let size = a.size();
    let mut at = 0;
    while at < size {
        let (Ok((from_a, len_a)), Ok((from_b, len_b))) = (a.origin(at), b.origin(at)) else { return false };
        if !from_a.is_same(from_b) {
            return false;
        }
        at += len_a.min(len_b);
    }
    size == b.size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_origins_are_never_the_same() {
        let place = |image, place, within| {
            Some(VolumeOrigin { origin: Origin { image, place, within, len: 10 }, cipher: None })
        };
        let same = |a, b| ByteSource::of(a).is_same(ByteSource::of(b));
        assert!(same(place(1, 5, None), place(1, 5, None)));
        assert!(same(place(0, 5, None), place(0, 9, None)), "zeroes have no place");
        assert!(!same(place(1, 5, None), place(2, 5, None)));
        assert!(!same(place(1, 5, Some(0)), place(1, 5, Some(512))));
        assert!(!same(None, None));
    }
}
