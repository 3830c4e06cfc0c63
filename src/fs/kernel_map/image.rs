//! Writes the image of a frozen disk: an entry for each of its chunks that says where a layer's file has it.
//!
//! A chunk that no file has as it is (it is compressed, or only partly in one place, or its file ends within
//! its last block) is copied into the image. A disk of which too much would be copied, whose table would be
//! too large, or that is damaged anywhere, gets no image: the daemon serves it, and says what is wrong.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;

use crate::chain::{Piece, Place, View, is_at};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Layer;
use crate::io::LocalFile;
use crate::units::are_zero;

use super::erofs::{ENTRY_LEN, Geometry, MAX_BLOCK_BITS, MIN_BLOCK_BITS, NOWHERE, PAGE, entry, parts};

/// B3: bytes on disk of one image: of the pages of its table that are not empty, and of what is copied.
pub(super) const MAX_TABLE: u64 = 128 << 20;
pub(super) const MAX_COPIED: u64 = 64 << 20;
/// Bytes of the table with its empty pages, which take no space.
const MAX_TABLE_LEN: u64 = 2 << 30;
/// The entry of a chunk of zeroes.
const EMPTY: u64 = (NOWHERE as u64) << 32;
/// In memory: the entry of a chunk that has to be copied.
const MIXED: u64 = u64::MAX;
/// Chunks of disks that are raw in all layers, and the largest ones.
const RAW_CHUNK: u64 = 1 << 20;
const MAX_CHUNK: u64 = 2 << 20;
/// Bytes of the table that are made at a time, in memory.
const STEP_TABLE: u64 = 1 << 20;
/// A longer table has holes for its empty pages.
const LEAST_SPARSE: u64 = 1 << 20;

/// A written image, and what it refers to.
pub(super) struct WrittenImage {
    pub(super) geometry: Geometry,
    /// The files of the devices, in order.
    pub(super) devices: Vec<LocalFile>,
    /// Whether its beginning has to be zeroed once it is open.
    pub(super) is_sparse: bool,
    /// Bytes on disk.
    pub(super) allocated: u64,
}

/// Writes the image of `view` into `file`, which is empty. `goes_on` is asked again and again. `Unsupported`
/// if the daemon has to serve the disk; the sentence says why.
pub(super) fn write_image(view: &View, file: &File, goes_on: &dyn Fn() -> bool) -> Result<WrittenImage> {
    let devices = devices(view)?;
    let geometry = geometry(view, devices.len())?;
    let mut writer = ImageWriter {
        view,
        file,
        geometry,
        file_lens: devices.iter().map(|(_, len)| *len).collect(),
        is_sparse: geometry.table_len() > LEAST_SPARSE,
        table: Vec::new(),
        first: 0,
        copied: 0,
        table_pages: 0,
        chunk_buffer: Vec::new(),
    };
    let step = STEP_TABLE / ENTRY_LEN * geometry.chunk();
    let mut at = 0;
    while at < geometry.size {
        if !goes_on() {
            return Err(Error::new(ErrorKind::Busy, "it was given up"));
        }
        let end = (at + step).min(geometry.size);
        writer.chunks(at, end)?;
        at = end;
    }
    let len = geometry.data_at() + writer.copied * geometry.chunk();
    write_at(file, 0, &geometry.head(len))?;
    let len_with_last_page = len.next_multiple_of(PAGE);
    file.set_len(len_with_last_page).map_err(|error| Error::io("making a kernel map longer", error))?;
    Ok(WrittenImage {
        geometry,
        is_sparse: writer.is_sparse,
        allocated: geometry.table_at() + writer.table_pages * PAGE + writer.copied * geometry.chunk(),
        devices: devices.into_iter().map(|(file, _)| file).collect(),
    })
}

/// Zeroes the beginning of an image that is open: see [`super::erofs`].
pub(super) fn zero_beginning(file: &File, geometry: Geometry) -> Result<()> {
    write_at(file, 0, &vec![0; geometry.chunk() as usize])
}

fn unfit(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, fact)
}

fn write_at(file: &File, at: u64, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, at).map_err(|error| Error::io("writing a kernel map", error))
}

/// The data file of each layer, and its length.
fn devices(view: &View) -> Result<Vec<(LocalFile, u64)>> {
    let layers = view.layers().iter().map(|layer| {
        let data = layer.image().data();
        let file = data.local_file().ok_or_else(|| unfit("a layer is no file of this machine"))?;
        Ok((file, data.len()?))
    });
    layers.collect()
}

/// Chunks as small as the smallest cluster, and blocks that all places are multiples of. If the table would
/// be too long, chunks are larger; then those are copied that are not in one place.
fn geometry(view: &View, devices: usize) -> Result<Geometry> {
    let unit = view.granularity().unwrap_or(RAW_CHUNK);
    let block_bits = unit.trailing_zeros().clamp(MIN_BLOCK_BITS, MAX_BLOCK_BITS);
    let chunk_bits = unit.trailing_zeros().max(block_bits);
    let mut geometry = Geometry { size: view.size(), block_bits, chunk_bits, devices };
    while geometry.table_len() > MAX_TABLE_LEN && geometry.chunk() < MAX_CHUNK {
        geometry.chunk_bits += 1;
    }
    if geometry.table_len() > MAX_TABLE_LEN {
        return Err(unfit(format!("its table would have {} bytes", geometry.table_len())));
    }
    if geometry.size == 0 {
        return Err(unfit("it is empty"));
    }
    Ok(geometry)
}

struct ImageWriter<'a> {
    view: &'a View,
    file: &'a File,
    geometry: Geometry,
    /// Of each device.
    file_lens: Vec<u64>,
    is_sparse: bool,
    /// The entries of a step, and the number of the first chunk of it.
    table: Vec<u64>,
    first: u64,
    /// Chunks that were copied, and pages of the table that are on disk.
    copied: u64,
    table_pages: u64,
    chunk_buffer: Vec<u8>,
}

impl ImageWriter<'_> {
    /// The entries of the chunks of `[from, to)`.
    fn chunks(&mut self, from: u64, to: u64) -> Result<()> {
        let chunk = self.geometry.chunk();
        self.first = from / chunk;
        self.table.clear();
        self.table.resize((to - from).div_ceil(chunk) as usize, EMPTY);
        let view = self.view;
        view.paint(from, to, |piece| {
            self.paint(piece);
            Ok(())
        })?;
        for index in 0..self.table.len() {
            if self.table[index] == MIXED {
                self.table[index] = self.copied(self.first + index as u64)?;
            }
        }
        self.write_table()
    }

    /// Enters a piece over those of the layers below. A chunk of which it is only a part has to be copied.
    fn paint(&mut self, piece: Piece) {
        let chunk = self.geometry.chunk();
        let Piece { start, len, place } = piece;
        let end =
            if start + len == self.geometry.size { self.geometry.chunks() * chunk } else { start + len };
        let (whole, past) = (start.div_ceil(chunk), end / chunk);
        if whole > past {
            return self.mix(start / chunk, place);
        }
        if !start.is_multiple_of(chunk) {
            self.mix(start / chunk, place);
        }
        if !end.is_multiple_of(chunk) {
            self.mix(past, place);
        }
        let entries = (whole - self.first) as usize..(past - self.first) as usize;
        match place {
            Place::Zero => self.table[entries].fill(EMPTY),
            Place::Unplaced => self.table[entries].fill(MIXED),
            Place::File { layer, at } => {
                for number in whole..past {
                    let entry = self.placed(number, layer, at + (number * chunk - start));
                    self.table[(number - self.first) as usize] = entry;
                }
            }
        }
    }

    /// A chunk that another piece is a part of.
    fn mix(&mut self, number: u64, place: Place) {
        let entry = &mut self.table[(number - self.first) as usize];
        if place != Place::Zero || *entry != EMPTY {
            *entry = MIXED;
        }
    }

    /// The entry of a chunk that is at one place of a layer's file.
    fn placed(&self, number: u64, layer: usize, at: u64) -> u64 {
        let Geometry { size, block_bits, .. } = self.geometry;
        let (chunk, block) = (self.geometry.chunk(), self.geometry.block());
        let len = chunk.min(size - number * chunk).next_multiple_of(block);
        // R2: no chunk refers to what is not in its file; the kernel refuses what has been cut off since.
        let is_within = at.checked_add(len).is_some_and(|end| end <= self.file_lens[layer]);
        match u32::try_from(at >> block_bits) {
            Ok(place) if place < NOWHERE - chunk as u32 && is_within && at.is_multiple_of(block) => {
                entry(layer as u16 + 1, place)
            }
            _ => MIXED,
        }
    }

    /// The entry of a chunk that is copied.
    fn copied(&mut self, number: u64) -> Result<u64> {
        let Geometry { size, block_bits, .. } = self.geometry;
        let chunk = self.geometry.chunk();
        let len = chunk.min(size - number * chunk) as usize;
        self.chunk_buffer.resize(chunk as usize, 0);
        self.view.read_at(number * chunk, &mut self.chunk_buffer[..len])?;
        self.chunk_buffer[len..].fill(0);
        if are_zero(&self.chunk_buffer) {
            return Ok(EMPTY);
        }
        if (self.copied + 1) * chunk > MAX_COPIED {
            return Err(unfit("too much of it is compressed, or in no file in one piece"));
        }
        let at = self.geometry.data_at() + self.copied * chunk;
        write_at(self.file, at, &self.chunk_buffer)?;
        self.copied += 1;
        Ok(entry(0, (at >> block_bits) as u32))
    }

    /// Writes the entries of a step: all of them, or the pages that are not empty.
    fn write_table(&mut self) -> Result<()> {
        const ENTRIES_OF_PAGE: usize = (PAGE / ENTRY_LEN) as usize;
        let at = self.geometry.table_at() + self.first * ENTRY_LEN;
        let is_hole = |page: &[u64]| self.is_sparse && page.iter().all(|entry| *entry == EMPTY);
        let pages: Vec<&[u64]> = self.table.chunks(ENTRIES_OF_PAGE).collect();
        let mut first = 0;
        for run in pages.chunk_by(|a, b| is_hole(a) == is_hole(b)) {
            let page = first;
            first += run.len();
            if is_hole(run[0]) {
                continue;
            }
            let bytes: Vec<u8> = run.concat().into_iter().flat_map(u64::to_le_bytes).collect();
            write_at(self.file, at + page as u64 * PAGE, &bytes)?;
            self.table_pages += run.len() as u64;
        }
        if self.table_pages * PAGE > MAX_TABLE {
            return Err(unfit("its table would take too much space"));
        }
        Ok(())
    }
}

/// Whether everything that an image refers to in the file of a layer, by its index from the top, is where the
/// tables of `layer` have it.
pub(super) fn is_still_there(image: &File, geometry: Geometry, index: usize, layer: &Layer) -> Result<bool> {
    let device = index as u16 + 1;
    let mut table = vec![0; geometry.table_len().min(STEP_TABLE) as usize];
    // The run of chunks that follow each other also in the file: first byte, bytes, place.
    let (mut at, mut run) = (0, (0, 0, 0));
    while at < geometry.table_len() {
        let len = (geometry.table_len() - at).min(STEP_TABLE);
        let part = &mut table[..len as usize];
        let read = image.read_exact_at(part, geometry.table_at() + at);
        read.map_err(|error| Error::io("reading a kernel map", error))?;
        for (number, entry) in (at / ENTRY_LEN..).zip(part.chunks_exact(ENTRY_LEN as usize)) {
            let (of, block) = parts(u64::from_le_bytes(entry.try_into().expect("eight bytes")));
            if of != device {
                continue;
            }
            let host = u64::from(block) << geometry.block_bits;
            let start = number * geometry.chunk();
            let len = geometry.chunk().min(geometry.size - start);
            if run.0 + run.1 == start && run.2 + run.1 == host {
                run.1 += len;
            } else {
                if !is_at(layer, run.0, run.1, run.2)? {
                    return Ok(false);
                }
                run = (start, len, host);
            }
        }
        at += len;
    }
    is_at(layer, run.0, run.1, run.2)
}

/// The descriptors of `devices`.
pub(super) fn descriptors(devices: &[LocalFile]) -> Vec<std::os::fd::BorrowedFd<'_>> {
    devices.iter().map(AsFd::as_fd).collect()
}

/// Whether the mapped file has the same bytes as the view, at some places: the first and last chunk, and some
/// between.
pub(super) fn agrees(view: &View, mapped: &LocalFile, geometry: Geometry) -> Result<bool> {
    const SAMPLES: u64 = 6;
    const LEN: u64 = 4096;
    let mut own = vec![0; LEN as usize];
    let mut theirs = own.clone();
    for sample in 0..=SAMPLES {
        let last = geometry.size.saturating_sub(LEN);
        let at = (u128::from(last) * u128::from(sample) / u128::from(SAMPLES)) as u64;
        let len = LEN.min(geometry.size - at) as usize;
        view.read_at(at, &mut own[..len])?;
        let have = mapped.read_at(at, &mut theirs[..len])?;
        if have != len || own[..len] != theirs[..len] {
            return Ok(false);
        }
    }
    Ok(true)
}
