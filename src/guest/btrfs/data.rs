//! The content of files: verified by checksums where there are any, from any copy that is right.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::filesystem::FileKind;

use super::compression::{Compression, MAX_LEN};
use super::devices::{Piece, Volume};
use super::extents::{ExtentForm, FileExtent, FileSegment, inline_bytes};
use super::format::{corrupt, is_fact};
use super::sums::SectorSums;
use super::{Shared, about};

/// Bytes that are read and verified at once.
const WINDOW: u64 = 256 << 10;

impl Shared {
    pub(super) fn read_file(&self, subvolume: usize, object: u64, at: u64, buf: &mut [u8]) -> Result<usize> {
        let inode = self.inode_of(subvolume, object, FileKind::File)?;
        self.read_content(subvolume, object, inode.attributes.size, at, buf)
    }

    /// Reads an inode's content from `at` on, up to `size`.
    pub(super) fn read_content(
        &self,
        subvolume: usize,
        object: u64,
        size: u64,
        at: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        let len = size.saturating_sub(at).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        if len == 0 {
            return Ok(0);
        }
        let mut done = 0;
        for segment in self.segments(subvolume, object, at, at + len as u64)? {
            let segment = segment?;
            let now = (segment.end - segment.start) as usize;
            self.read_segment(&segment, &mut buf[done..][..now]).map_err(about(object))?;
            done += now;
        }
        Ok(len)
    }

    fn read_segment(&self, segment: &FileSegment, buf: &mut [u8]) -> Result<()> {
        let Some((extent, item)) = &segment.extent else {
            buf.fill(0);
            return Ok(());
        };
        let skip = segment.start - extent.start;
        match extent.form {
            ExtentForm::Hole | ExtentForm::Stored { is_reserved: true, .. } => buf.fill(0),
            ExtentForm::Inline => {
                let stored = inline_bytes(item.data());
                match extent.compression {
                    Compression::None => copy(stored, skip, buf),
                    compression => {
                        let sector_len = self.superblock.sector_len;
                        copy(&compression.decompress(stored, extent.len, sector_len)?, skip, buf);
                    }
                }
            }
            ExtentForm::Stored { disk, offset, .. } if extent.compression == Compression::None => {
                self.read_disk(disk + offset + skip, buf)?;
            }
            ExtentForm::Stored { disk, disk_len, offset, .. } => {
                copy(&self.decompressed(extent, disk, disk_len)?, offset + skip, buf);
            }
        }
        Ok(())
    }

    /// The content of a compressed extent.
    fn decompressed(&self, extent: &FileExtent, disk: u64, disk_len: u64) -> Result<Arc<[u8]>> {
        if let Some(found) = self.extents.get(&disk).filter(|found| found.len() as u64 == extent.ram_len) {
            return Ok(found);
        }
        if disk_len > MAX_LEN {
            return Err(corrupt("a compressed extent is too long"));
        }
        let mut stored = vec![0; disk_len as usize];
        self.read_disk(disk, &mut stored)?;
        let found = extent.compression.decompress(&stored, extent.ram_len, self.superblock.sector_len)?;
        self.extents.put(disk, Arc::clone(&found), found.len());
        Ok(found)
    }

    /// Reads the bytes at a logical address.
    fn read_disk(&self, mut at: u64, mut buf: &mut [u8]) -> Result<()> {
        let sector = u64::from(self.superblock.sector_len);
        while !buf.is_empty() {
            // Checksums are of whole sectors.
            let start = at - at % sector;
            let skip = (at - start) as usize;
            let now = (WINDOW - skip as u64).min(buf.len() as u64) as usize;
            let (part, rest) = buf.split_at_mut(now);
            if skip == 0 && (now as u64).is_multiple_of(sector) {
                self.read_sectors(start, part)?;
            } else {
                let mut whole = vec![0; self.superblock.whole_sectors((skip + now) as u64) as usize];
                self.read_sectors(start, &mut whole)?;
                part.copy_from_slice(&whole[skip..][..now]);
            }
            buf = rest;
            at = at.checked_add(now as u64).ok_or_else(|| corrupt("an address is too large"))?;
        }
        Ok(())
    }

    /// Reads and verifies whole sectors.
    fn read_sectors(&self, start: u64, buf: &mut [u8]) -> Result<()> {
        let sector = self.superblock.sector_len as usize;
        let sums = self.sums.of(&self.nodes, start, buf.len() / sector)?;
        let mut done = 0;
        while done < buf.len() {
            let piece = self.nodes.volume.piece(start + done as u64, (buf.len() - done) as u64)?;
            let now = piece.len as usize;
            self.read_piece(&piece, &mut buf[done..][..now], &sums, done / sector)?;
            done += now;
        }
        Ok(())
    }

    /// Reads a piece in the first way that works, and its wrong sectors in other ways.
    fn read_piece(&self, piece: &Piece<'_>, buf: &mut [u8], sums: &SectorSums, first: usize) -> Result<()> {
        let sector = self.superblock.sector_len as usize;
        let checksum = self.nodes.checksum;
        let volume = &self.nodes.volume;
        let ways = Volume::ways(piece);
        let mut failed: Option<Error> = None;
        for way in 0..ways {
            if let Err(error) = volume.read(piece, way, 0, buf) {
                if failed.as_ref().is_none_or(is_fact) {
                    failed = Some(error);
                }
                continue;
            }
            for (number, part) in buf.chunks_mut(sector).enumerate() {
                let is_right =
                    |part: &[u8]| sums.get(first + number).is_none_or(|sum| checksum.fits(part, sum));
                let mut others = (0..ways).filter(|other| *other != way);
                let skip = (number * sector) as u64;
                while !is_right(part) {
                    let Some(other) = others.next() else {
                        return Err(corrupt("data has a wrong checksum"));
                    };
                    if volume.read(piece, other, skip, part).is_err() {
                        part.fill(0);
                    }
                }
            }
            return Ok(());
        }
        Err(failed.unwrap_or_else(|| corrupt("data without a copy")))
    }
}

/// Copies from `skip` on; zeroes where `from` ends.
fn copy(from: &[u8], skip: u64, buf: &mut [u8]) {
    let from = from.get(usize::try_from(skip).unwrap_or(usize::MAX)..).unwrap_or_default();
    let len = from.len().min(buf.len());
    buf[..len].copy_from_slice(&from[..len]);
    buf[len..].fill(0);
}
