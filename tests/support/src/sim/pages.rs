//! Sparse bytes that are cheap to copy: a copy shares every page until one of the two changes it.
//!
//! Each value carries a hash of its content, updated page by page, so that equal states are found without
//! comparing them. A page of zeroes and a missing page are equal.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use chainfs::error::Result;
use chainfs::io::Storage;
use chainfs::units::{BlockStatus, Run};
use rustix::fs::{SeekFrom, seek};

use super::mix;

const PAGE: u64 = 4096;
const PER_CHUNK: u64 = 64;

#[derive(Clone)]
struct Page {
    bytes: [u8; PAGE as usize],
    hash: u64,
}

#[derive(Clone)]
struct Chunk(Vec<Option<Arc<Page>>>);

impl Default for Chunk {
    fn default() -> Self {
        Self(vec![None; PER_CHUNK as usize])
    }
}

/// The bytes of a file.
#[derive(Clone, Default)]
pub struct Pages {
    chunks: BTreeMap<u64, Arc<Chunk>>,
    len: u64,
    hash: u64,
}

fn hash_of(index: u64, bytes: &[u8; PAGE as usize]) -> u64 {
    let (mut hash, mut any) = (mix(index), 0);
    for word in bytes.chunks_exact(8) {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        any |= word;
        hash = (hash ^ word).wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(29);
    }
    if any == 0 { 0 } else { mix(hash) }
}

/// The parts of `[at, at + len)` within one page each: page, offset in it, bytes.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let (position, left) = (at + done, len - done);
        let piece = left.min(PAGE - position % PAGE);
        done += piece;
        (left > 0).then_some((position / PAGE, (position % PAGE) as usize, piece as usize))
    })
}

impl Pages {
    /// The content of a real file, its holes left out.
    pub fn load(path: impl AsRef<Path>) -> Self {
        let file = File::open(path).unwrap();
        let mut pages = Self { len: file.metadata().unwrap().len(), ..Self::default() };
        let mut at = 0;
        while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
            let end = seek(&file, SeekFrom::Hole(start)).unwrap();
            let mut bytes = vec![0; (1 << 20).min(end - start) as usize];
            at = start;
            while at < end {
                let len = file.read_at(&mut bytes, at).unwrap();
                assert!(len > 0);
                let piece = len.min((end - at) as usize);
                pages.write(at, &bytes[..piece]);
                at += piece as u64;
            }
        }
        pages
    }

    /// Makes a real file of it, its holes left out.
    pub fn save(&self, path: impl AsRef<Path>) {
        let file = File::create(path).unwrap();
        file.set_len(self.len).unwrap();
        for (chunk, pages) in &self.chunks {
            for (index, page) in pages.0.iter().enumerate() {
                let at = (chunk * PER_CHUNK + index as u64) * PAGE;
                if let Some(page) = page.as_ref().filter(|page| page.hash != 0) {
                    file.write_all_at(&page.bytes[..PAGE.min(self.len - at) as usize], at).unwrap();
                }
            }
        }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Equal content has equal hashes; unequal content practically never.
    pub fn hash(&self) -> u64 {
        self.hash ^ mix(!self.len)
    }

    /// Pages that take up space.
    pub fn page_count(&self) -> u64 {
        self.chunks.values().map(|chunk| chunk.0.iter().flatten().count() as u64).sum()
    }

    /// How many more pages a write there would take.
    pub fn pages_needed(&self, at: u64, len: u64) -> u64 {
        pieces(at, len).filter(|(index, ..)| self.page(*index).is_none()).count() as u64
    }

    fn page(&self, index: u64) -> Option<&Arc<Page>> {
        self.chunks.get(&(index / PER_CHUNK))?.0[(index % PER_CHUNK) as usize].as_ref()
    }

    /// Fills `buf`, with zeroes for missing pages, even past the end.
    pub fn fill(&self, at: u64, buf: &mut [u8]) {
        let mut done = 0;
        for (index, within, len) in pieces(at, buf.len() as u64) {
            let target = &mut buf[done..done + len];
            match self.page(index) {
                Some(page) => target.copy_from_slice(&page.bytes[within..within + len]),
                None => target.fill(0),
            }
            done += len;
        }
    }

    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.fill(at, &mut bytes);
        bytes
    }

    fn change(&mut self, index: u64, change: impl FnOnce(&mut [u8; PAGE as usize])) {
        let chunk = Arc::make_mut(self.chunks.entry(index / PER_CHUNK).or_default());
        let slot = &mut chunk.0[(index % PER_CHUNK) as usize];
        let page = slot.get_or_insert_with(|| Arc::new(Page { bytes: [0; PAGE as usize], hash: 0 }));
        let page = Arc::make_mut(page);
        change(&mut page.bytes);
        self.hash ^= page.hash;
        page.hash = hash_of(index, &page.bytes);
        self.hash ^= page.hash;
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        for (index, within, len) in pieces(at, bytes.len() as u64) {
            self.change(index, |page| page[within..within + len].copy_from_slice(&bytes[done..done + len]));
            done += len;
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    /// Zeroes without extending; whole pages are removed.
    pub fn punch(&mut self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.len.next_multiple_of(PAGE));
        let mut position = at;
        while position < end {
            let (index, within) = (position / PAGE, position % PAGE);
            // Missing pages need no visit: a chunk at a time.
            if !self.chunks.contains_key(&(index / PER_CHUNK)) {
                position = (index / PER_CHUNK + 1) * PER_CHUNK * PAGE;
                continue;
            }
            let piece = (PAGE - within).min(end - position);
            if self.page(index).is_some() {
                if piece == PAGE {
                    self.drop_page(index);
                } else {
                    self.change(index, |page| page[within as usize..(within + piece) as usize].fill(0));
                }
            }
            position += piece;
        }
    }

    fn drop_page(&mut self, index: u64) {
        let chunk = self.chunks.get_mut(&(index / PER_CHUNK)).expect("the page is there");
        if let Some(page) = Arc::make_mut(chunk).0[(index % PER_CHUNK) as usize].take() {
            self.hash ^= page.hash;
        }
    }

    /// Bytes beyond a shorter end are lost for good.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, self.len - len);
        }
        self.len = len;
    }

    /// The first run of `[at, end)` that has pages or has none.
    pub fn extent(&self, at: u64, end: u64) -> Run<BlockStatus> {
        let is_data = self.page(at / PAGE).is_some();
        let mut next = (at / PAGE + 1) * PAGE;
        while next < end && self.page(next / PAGE).is_some() == is_data {
            // A missing chunk is 256 KiB of hole.
            let is_chunk = self.chunks.contains_key(&(next / PAGE / PER_CHUNK));
            next = if is_chunk { next + PAGE } else { (next / PAGE / PER_CHUNK + 1) * PER_CHUNK * PAGE };
        }
        Run::new(if is_data { BlockStatus::Data } else { BlockStatus::Zero }, next.min(end) - at)
    }
}

impl Storage for Pages {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
        self.fill(at, &mut buf[..len]);
        Ok(len)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(Self::extent(self, at, end))
    }
}
