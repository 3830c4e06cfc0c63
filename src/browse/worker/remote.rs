//! A disk in a worker: its bytes are requested from the daemon chunk by chunk, and cached.
//!
//! Chunks are cached by content, not by disk: layers of a chain share common chunks, which are fetched once.

use std::cell::RefCell;
use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::source::within;

use super::channel::Channel;
use super::protocol::{CHUNK, ChunkKey, Failure, FromWorker, GROUP, ToWorker};

/// Bytes of cached chunks.
const CHUNKS_LEN: usize = 48 << 20;
/// Bytes of cached keys.
const KEYS_LEN: usize = 8 << 20;

thread_local! {
    /// The channel of this worker thread to the daemon.
    static CHANNEL: RefCell<Option<Channel>> = const { RefCell::new(None) };
}

/// Sets this thread's channel.
pub(super) fn set_channel(channel: Channel) {
    CHANNEL.set(Some(channel));
}

/// Calls `work` with this thread's channel.
pub(super) fn with_channel<T>(work: impl FnOnce(&mut Channel) -> std::io::Result<T>) -> Result<T> {
    CHANNEL
        .with_borrow_mut(|channel| work(channel.as_mut().expect("a worker thread has a channel")))
        .map_err(|error| Error::io("communicating with the daemon", error))
}

thread_local! {
    /// This thread's first error that is not a fact about a disk.
    static TRANSIENT: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Calls `work`, in which parsers treat unreadable parts as absent or damaged. That is correct for damage. A
/// transient read error fails the whole call instead, so that the request is repeated.
pub(super) fn fail_on_transient<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    TRANSIENT.take();
    let result = work();
    TRANSIENT.take().map_or(result, Err)
}

/// The error of a refused request; records it if it is transient.
fn refused(failure: &Failure) -> Error {
    let error = failure.error();
    if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit) {
        TRANSIENT.with_borrow_mut(|first| {
            first.get_or_insert_with(|| error.clone());
        });
    }
    error
}

/// The cached chunks of all disks.
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
    /// The set's number, which is never reused; `None`: nothing is cached.
    pub(super) set: Option<u32>,
    pub(super) index: u32,
    pub(super) size: u64,
    pub(super) chunks: Arc<ChunkCache>,
}

fn ask(question: &FromWorker) -> Result<(ToWorker, Vec<u8>)> {
    with_channel(|channel| {
        channel.send(question, &[])?;
        channel.receive(&mut || Ok(()))
    })
}

fn protocol_violation() -> Error {
    Error::new(ErrorKind::Io, "protocol violation by the daemon")
}

impl RemoteDisk {
    fn key(&self, set: u32, chunk: u64) -> Result<ChunkKey> {
        let place = (set, self.index, chunk / GROUP);
        if let Some(keys) = self.chunks.keys.get(&place) {
            return keys.get((chunk % GROUP) as usize).copied().ok_or_else(protocol_violation);
        }
        let first = chunk / GROUP * GROUP;
        let count = GROUP.min(self.size.div_ceil(CHUNK) - first);
        match ask(&FromWorker::Locate { disk: self.index, first, count })?.0 {
            ToWorker::Keys(keys) => {
                let keys: Arc<[ChunkKey]> = keys.into();
                let found = keys.get((chunk - first) as usize).copied().ok_or_else(protocol_violation)?;
                self.chunks.keys.put(place, Arc::clone(&keys), std::mem::size_of_val(&*keys) + 64);
                Ok(found)
            }
            ToWorker::Refused(failure) => Err(refused(&failure)),
            ToWorker::Request(_) | ToWorker::Bytes => Err(protocol_violation()),
        }
    }

    fn fetch(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        match ask(&FromWorker::Read { disk: self.index, at, len: len as u32 })? {
            (ToWorker::Bytes, bytes) if bytes.len() == len => Ok(bytes),
            (ToWorker::Refused(failure), _) => Err(refused(&failure)),
            _ => Err(protocol_violation()),
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
                        let found = bytes.get(start..start + piece.len()).ok_or_else(protocol_violation)?;
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
