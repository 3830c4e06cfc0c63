//! One version of an object, read in chunks: from the cache, from a fetch that is under way, or by a new one.
//!
//! It promises: a chunk is fetched once for all readers of a moment, and what was fetched is stored before
//! the fetch is forgotten. Reads that go on where others ended are streams: their fetches grow from one
//! chunk to 8 MiB, and the next one begins before it is needed.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chainfs_objects::{Bucket, ObjectError, ObjectErrorKind};
use parking_lot::{Condvar, Mutex};

use crate::cache::Weighted;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Storage;

use super::cache::ChunkCache;
use super::cached_object::CachedObject;
use super::chunk_table::CHUNK_LEN;

/// Chunks of a fetch, at most: larger requests are not faster.
const MAX_WINDOW: u64 = 32;
/// Attempts to read a chunk that is here before it is fetched whether it is here or not.
const EVICTED_BEFORE_READ: usize = 3;
/// Streams of one object that are followed.
const STREAMS: usize = 8;
/// Fetches ahead of their readers, at most, of a whole store.
const MAX_AHEAD: usize = 8;
/// Bytes of chunks that are kept in memory where the cache does not take them.
const RECENT_LEN: usize = 32 << 20;

/// Chunks by version of an object and number.
type RecentChunks = Weighted<(u64, u64), Arc<Vec<u8>>>;

/// What all objects of a store share.
pub(super) struct Remote {
    /// `None` if nothing is to be asked for.
    pub bucket: Option<Bucket>,
    pub cache: Option<Arc<ChunkCache>>,
    /// What messages call the store.
    pub shown: String,
    /// A leaf.
    recent: Mutex<RecentChunks>,
    ahead: AtomicUsize,
}

impl Remote {
    pub(super) fn new(shown: String, bucket: Option<Bucket>, cache: Option<Arc<ChunkCache>>) -> Self {
        let recent = Mutex::new(Weighted::new(RECENT_LEN));
        Self { bucket, cache, shown, recent, ahead: AtomicUsize::new(0) }
    }
}

/// The error of a request, in the words of the rest.
pub(super) fn convert(error: &ObjectError) -> Error {
    let kind = match error.kind() {
        ObjectErrorKind::NotFound => ErrorKind::NotFound,
        ObjectErrorKind::Changed => ErrorKind::Stale,
        ObjectErrorKind::Denied => ErrorKind::Denied,
        ObjectErrorKind::TimedOut | ObjectErrorKind::Failed => ErrorKind::Io,
        ObjectErrorKind::Unsupported => ErrorKind::Unsupported,
        ObjectErrorKind::Limit => ErrorKind::Limit,
        ObjectErrorKind::Usage => ErrorKind::Usage,
    };
    Error::new(kind, error.to_string())
}

/// One version of an object.
pub(super) struct RemoteObject {
    remote: Arc<Remote>,
    name: String,
    version: String,
    len: u64,
    /// A number that no other version of any object of the store has.
    id: u64,
    cached: Option<Arc<CachedObject>>,
    /// Fetches that are under way, by chunk. Locked for moments.
    fetches: Mutex<HashMap<u64, Arc<Fetch>>>,
    /// A leaf.
    streams: Mutex<Vec<Stream>>,
}

/// A fetch that is under way.
struct Fetch {
    chunks: Range<u64>,
    /// Shared, because each of its readers takes a part.
    result: Mutex<Option<Result<Arc<Vec<u8>>>>>,
    done: Condvar,
}

impl Fetch {
    fn end(&self, result: Result<Arc<Vec<u8>>>) {
        *self.result.lock() = Some(result);
        self.done.notify_all();
    }

    fn wait(&self) -> Result<Arc<Vec<u8>>> {
        let mut result = self.result.lock();
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            self.done.wait(&mut result);
        }
    }
}

/// Reads that go on where others ended.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The first chunk that was not asked for.
    next: u64,
    /// Chunks of the next fetch.
    window: u64,
}

impl RemoteObject {
    pub(super) fn new(remote: &Arc<Remote>, name: String, version: String, len: u64, id: u64) -> Arc<Self> {
        let cached = remote.cache.as_ref().and_then(|cache| {
            cache
                .object(&remote.shown, &name, &version, len)
                .inspect_err(|error| {
                    tracing::warn!("{}/{name} is read without the cache: {error}", remote.shown);
                })
                .ok()
        });
        Arc::new(Self {
            remote: Arc::clone(remote),
            name,
            version,
            len,
            id,
            cached,
            fetches: Mutex::default(),
            streams: Mutex::default(),
        })
    }

    fn chunks(&self) -> u64 {
        self.len.div_ceil(CHUNK_LEN)
    }

    /// Whether a chunk needs no request.
    fn has(&self, chunk: u64) -> bool {
        self.cached.as_ref().is_some_and(|cached| cached.has(chunk))
            || self.remote.recent.lock().get(&(self.id, chunk)).is_some()
    }

    /// Reads a part of one chunk from this machine; whether it is here.
    fn read_here(&self, at: u64, buf: &mut [u8]) -> bool {
        if let (Some(cached), Some(cache)) = (&self.cached, &self.remote.cache) {
            match cached.read(at, buf, cache.turn()) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!("reading {}/{} from the cache: {error}", self.remote.shown, self.name);
                }
            }
        }
        let Some(bytes) = self.remote.recent.lock().get(&(self.id, at / CHUNK_LEN)) else { return false };
        let start = (at % CHUNK_LEN) as usize;
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        true
    }

    /// Reads a part of one chunk by a fetch of up to `window` chunks, or of one that is under way.
    fn read_there(&self, at: u64, buf: &mut [u8], window: u64) -> Result<()> {
        for attempt in 0.. {
            // A chunk that is here may be evicted at once, but not again and again.
            let Some((fetch, is_mine)) = self.fetch_of(at / CHUNK_LEN, window, attempt < EVICTED_BEFORE_READ)
            else {
                if self.read_here(at, buf) {
                    break;
                }
                continue;
            };
            if is_mine {
                self.run(&fetch);
            }
            let bytes = fetch.wait()?;
            let start = (at - fetch.chunks.start * CHUNK_LEN) as usize;
            buf.copy_from_slice(&bytes[start..start + buf.len()]);
            break;
        }
        Ok(())
    }

    /// The fetch that a chunk comes with, and whether the caller has to run it. `None` if it is here now, if
    /// the caller wants to know that.
    fn fetch_of(&self, chunk: u64, window: u64, unless_here: bool) -> Option<(Arc<Fetch>, bool)> {
        let mut fetches = self.fetches.lock();
        if let Some(fetch) = fetches.get(&chunk) {
            return Some((Arc::clone(fetch), false));
        }
        // A fetch keeps its chunks before it is forgotten.
        if unless_here && self.has(chunk) {
            return None;
        }
        let mut end = chunk + 1;
        while end < (chunk + window).min(self.chunks()) && !fetches.contains_key(&end) && !self.has(end) {
            end += 1;
        }
        let fetch = Arc::new(Fetch { chunks: chunk..end, result: Mutex::default(), done: Condvar::new() });
        fetches.extend((chunk..end).map(|chunk| (chunk, Arc::clone(&fetch))));
        Some((fetch, true))
    }

    /// Runs a fetch to its end, whatever that is.
    fn run(&self, fetch: &Fetch) {
        let result = self.request(&fetch.chunks);
        if let Ok(bytes) = &result {
            self.keep(&fetch.chunks, bytes);
        }
        // From here on, readers find the bytes where they were kept.
        self.fetches.lock().retain(|chunk, _| !fetch.chunks.contains(chunk));
        fetch.end(result);
    }

    fn request(&self, chunks: &Range<u64>) -> Result<Arc<Vec<u8>>> {
        let Some(bucket) = &self.remote.bucket else {
            let fact = "is not in the cache, and -o offline asks no server";
            return Err(Error::new(
                ErrorKind::Io,
                format!("a part of {}/{} {fact}", self.remote.shown, self.name),
            ));
        };
        let range = chunks.start * CHUNK_LEN..(chunks.end * CHUNK_LEN).min(self.len);
        // E2: the answer is whole and of this version, or there is an error by the deadline.
        let read = bucket.read(&self.name, range, &self.version);
        read.map(Arc::new).map_err(|error| match error.kind() {
            // R3: the version that was opened, or no bytes.
            ObjectErrorKind::NotFound => Error::new(ErrorKind::Stale, format!("{error} any more")),
            _ => convert(&error),
        })
    }

    fn keep(&self, chunks: &Range<u64>, bytes: &[u8]) {
        for (chunk, bytes) in chunks.clone().zip(bytes.chunks(CHUNK_LEN as usize)) {
            let is_stored = match (&self.cached, &self.remote.cache) {
                (Some(cached), Some(cache)) => match cache.store(cached, chunk, bytes) {
                    Ok(()) => cached.has(chunk),
                    Err(error) => {
                        tracing::warn!("storing a part of {}/{}: {error}", self.remote.shown, self.name);
                        false
                    }
                },
                _ => false,
            };
            if !is_stored {
                self.remote.recent.lock().put((self.id, chunk), Arc::new(bytes.to_vec()), bytes.len());
            }
        }
    }

    /// Notes that a chunk is read, and returns how many chunks a fetch of it takes. Begins the next fetch of
    /// its stream.
    fn follow(self: &Arc<Self>, chunk: u64) -> u64 {
        let mut streams = self.streams.lock();
        let found = streams
            .iter()
            .position(|stream| chunk <= stream.next && chunk + stream.window.max(2) >= stream.next);
        let Some(index) = found else {
            if streams.len() == STREAMS {
                streams.remove(0);
            }
            streams.push(Stream { next: chunk + 1, window: 1 });
            return 1;
        };
        let mut stream = streams.remove(index);
        let mut window = 1;
        if chunk == stream.next {
            // The reader is where the last fetch ended.
            stream.window = (stream.window * 2).min(MAX_WINDOW);
            window = stream.window;
            stream.next += window;
        } else if stream.window > 1 && chunk + stream.window / 2 >= stream.next && stream.next < self.chunks()
        {
            stream.window = (stream.window * 2).min(MAX_WINDOW);
            self.fetch_ahead(stream.next, stream.window);
            stream.next += stream.window;
        }
        streams.push(stream);
        window
    }

    /// Begins to fetch up to `window` chunks from `chunk` on, in a thread of its own.
    fn fetch_ahead(self: &Arc<Self>, chunk: u64, window: u64) {
        let end = (chunk + window).min(self.chunks());
        let Some(missing) = (chunk..end).find(|chunk| !self.has(*chunk)) else { return };
        if self.remote.bucket.is_none() || self.remote.ahead.fetch_add(1, Ordering::Relaxed) >= MAX_AHEAD {
            self.remote.ahead.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        // From now on readers wait for it.
        let Some((fetch, true)) = self.fetch_of(missing, end - missing, true) else {
            self.remote.ahead.fetch_sub(1, Ordering::Relaxed);
            return;
        };
        let (object, of_thread) = (Arc::clone(self), Arc::clone(&fetch));
        let run = move || {
            object.run(&of_thread);
            object.remote.ahead.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("fetch ahead".into()).spawn(run).is_err() {
            self.run(&fetch);
            self.remote.ahead.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// An opening of one version of an object.
pub(super) struct OpenRemoteObject(pub(super) Arc<RemoteObject>);

impl Storage for OpenRemoteObject {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let object = &self.0;
        let len = object.len.saturating_sub(at).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let at = at + done as u64;
            let part = (len - done).min((CHUNK_LEN - at % CHUNK_LEN) as usize);
            let window = object.follow(at / CHUNK_LEN);
            let buf = &mut buf[done..done + part];
            if !object.read_here(at, buf) {
                object.read_there(at, buf, window)?;
            }
            done += part;
        }
        Ok(len)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.len)
    }
}
