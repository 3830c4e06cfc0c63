//! A disk as a worker sees it: bytes that the daemon is asked for, chunk by chunk, and that are kept.
//!
//! Chunks are kept by what they hold, not by which disk they are of: layers of a chain share what they have in common,
//! and it is fetched once.

use std::cell::RefCell;
use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::source::within;

use super::channel::Channel;
use super::protocol::{CHUNK, ChunkKey, Failure, FromWorker, GROUP, ToWorker};

/// Bytes of chunks that are kept.
const CHUNKS_LEN: usize = 48 << 20;
/// Bytes of keys that are kept.
const KEYS_LEN: usize = 8 << 20;

thread_local! {
    /// On which a thread of the worker speaks with the daemon.
    static LANE: RefCell<Option<Channel>> = const { RefCell::new(None) };
}

/// Gives this thread its lane.
pub(super) fn speak_on(lane: Channel) {
    LANE.set(Some(lane));
}

/// Does something with this thread's lane.
pub(super) fn with_lane<T>(work: impl FnOnce(&mut Channel) -> std::io::Result<T>) -> Result<T> {
    LANE.with_borrow_mut(|lane| work(lane.as_mut().expect("a thread of the worker has a lane")))
        .map_err(|error| Error::io("speaking with the daemon", error))
}

thread_local! {
    /// The first error that this thread has met and that is no fact about a disk.
    static TROUBLE: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Does something for which parsers take what they cannot read for absent or damaged. That is right of what is damaged; what only could not be
/// read at this moment is an error of the whole, and is asked for again.
pub(super) fn untroubled<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    TROUBLE.take();
    let done = work();
    TROUBLE.take().map_or(done, Err)
}

/// Why the daemon does not give what was asked for.
fn refused(failure: &Failure) -> Error {
    let error = failure.error();
    if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit) {
        TROUBLE.with_borrow_mut(|trouble| {
            trouble.get_or_insert_with(|| error.clone());
        });
    }
    error
}

/// Chunks of all disks.
pub(super) struct ChunkCache {
    chunks: Cache<ChunkKey, Arc<[u8]>>,
    /// By set, disk and group.
    keys: Cache<(u32, u32, u64), Arc<[ChunkKey]>>,
}

impl ChunkCache {
    pub(super) fn new() -> Self {
        Self { chunks: Cache::new(CHUNKS_LEN), keys: Cache::new(KEYS_LEN) }
    }
}

/// One disk of a set.
pub(super) struct RemoteDisk {
    /// The set's number, of which there is never another; `None`: nothing is kept.
    pub(super) set: Option<u32>,
    pub(super) index: u32,
    pub(super) size: u64,
    pub(super) chunks: Arc<ChunkCache>,
}

fn ask(question: &FromWorker) -> Result<(ToWorker, Vec<u8>)> {
    with_lane(|lane| {
        lane.send(question, &[])?;
        lane.receive(&mut || Ok(()))
    })
}

fn confused() -> Error {
    Error::new(ErrorKind::Io, "the daemon has answered something else than what was asked")
}

impl RemoteDisk {
    fn key(&self, set: u32, chunk: u64) -> Result<ChunkKey> {
        let place = (set, self.index, chunk / GROUP);
        if let Some(keys) = self.chunks.keys.get(&place) {
            return keys.get((chunk % GROUP) as usize).copied().ok_or_else(confused);
        }
        let first = chunk / GROUP * GROUP;
        let count = GROUP.min(self.size.div_ceil(CHUNK) - first);
        match ask(&FromWorker::Locate { disk: self.index, first, count })?.0 {
            ToWorker::Keys(keys) => {
                let keys: Arc<[ChunkKey]> = keys.into();
                let found = keys.get((chunk - first) as usize).copied().ok_or_else(confused)?;
                self.chunks.keys.put(place, Arc::clone(&keys), std::mem::size_of_val(&*keys) + 64);
                Ok(found)
            }
            ToWorker::Refused(failure) => Err(refused(&failure)),
            ToWorker::Request(_) | ToWorker::Bytes => Err(confused()),
        }
    }

    fn fetch(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        match ask(&FromWorker::Read { disk: self.index, at, len: len as u32 })? {
            (ToWorker::Bytes, bytes) if bytes.len() == len => Ok(bytes),
            (ToWorker::Refused(failure), _) => Err(refused(&failure)),
            _ => Err(confused()),
        }
    }

    fn chunk(&self, set: u32, chunk: u64) -> Result<Option<Arc<[u8]>>> {
        let key = self.key(set, chunk)?;
        if key == ChunkKey::ZERO {
            return Ok(None);
        }
        if let Some(bytes) = self.chunks.chunks.get(&key) {
            return Ok(Some(bytes));
        }
        let start = chunk * CHUNK;
        let bytes: Arc<[u8]> = self.fetch(start, CHUNK.min(self.size - start) as usize)?.into();
        self.chunks.chunks.put(key, Arc::clone(&bytes), bytes.len() + 64);
        Ok(Some(bytes))
    }
}

impl Source for RemoteDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (chunk, start) = (at / CHUNK, (at % CHUNK) as usize);
            let len = (CHUNK as usize - start).min(rest.len());
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            match self.set {
                Some(set) => match self.chunk(set, chunk)? {
                    Some(bytes) => {
                        let found = bytes.get(start..start + piece.len()).ok_or_else(confused)?;
                        piece.copy_from_slice(found);
                    }
                    None => piece.fill(0),
                },
                None => piece.copy_from_slice(&self.fetch(at, piece.len())?),
            }
            at += piece.len() as u64;
            rest = more;
        }
        Ok(())
    }
}
