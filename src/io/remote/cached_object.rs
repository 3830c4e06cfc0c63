//! The chunks of one object that are on this machine: a sparse file of them, and the table that lists them.
//!
//! It promises: bytes that [`CachedObject::read`] returns were stored for this chunk, whatever other
//! processes store or evict meanwhile, and whenever the machine stopped. The order of writes is the reason:
//!
//! - store: bytes, then the entry (present). It counts until the machine stops.
//! - [`CachedObject::make_durable`]: bytes, sync, then the entry (durable).
//! - evict: the entry (absent), sync, then the hole.
//!
//! Entries change under an exclusive lock of the table's file, except for the byte of the last use. Readers
//! take none: they compare generations.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::error::{ErrorKind, Result};
use crate::io::{Backend, Directory, Identity, LockKind, WriteObject};

use super::chunk_table::{
    CHUNK_LEN, Entry, Presence, TableHeader, for_present, forget_undurable, read_entry, table_len, unusable,
    write_entry, write_use,
};

/// Attempts to take the lock of a table, a millisecond apart. What is not stored is fetched again.
const LOCK_ATTEMPTS: usize = 20;

/// The directory of a cache, and what its objects need to know of it.
pub(super) struct CacheDirectory {
    /// Its files.
    pub files: Arc<dyn Backend>,
    /// Its names.
    pub names: Arc<dyn Directory>,
    /// The run of this machine.
    pub boot: String,
}

/// The cached chunks of one version of an object.
pub(super) struct CachedObject {
    header: TableHeader,
    data: Arc<dyn WriteObject>,
    table: Arc<dyn WriteObject>,
    /// Bytes that are there, but for what other processes have stored since.
    present: AtomicU64,
    /// Locks are the process's as well as its threads': one of these at a time. Chunks that were stored here
    /// and are not durable.
    stored: Mutex<Vec<(u64, u16)>>,
}

/// The path of a file of the object `key`.
pub(super) fn path_of(key: &str, extension: &str) -> PathBuf {
    PathBuf::from(format!("{key}.{extension}"))
}

impl CachedObject {
    /// Opens what is there of the object `key`, `len` bytes long, or begins it. `object` is for people.
    pub(super) fn open(cache: &CacheDirectory, key: &str, len: u64, object: &str) -> Result<Self> {
        // Another process may be beginning or removing the same one.
        let mut last = unusable("is being changed by another process");
        for _ in 0..LOCK_ATTEMPTS {
            match Self::try_open(cache, key, len, object) {
                Ok(opened) => return Ok(opened),
                Err(error) if matches!(error.kind(), ErrorKind::Stale | ErrorKind::NotFound) => last = error,
                Err(error) => return Err(error),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(last)
    }

    fn try_open(cache: &CacheDirectory, key: &str, len: u64, object: &str) -> Result<Self> {
        let (data_path, table_path) = (path_of(key, "data"), path_of(key, "chunks"));
        let table = open_or_create(cache, &table_path)?;
        let locked = Locked::take(&*table)?;
        if cache.files.identify(&table_path)? != table.identity()? {
            return Err(unusable("is being changed by another process"));
        }
        if table.len()? == 0 {
            // It is new. What lies beside it belonged to another one.
            let _ = cache.names.unlink(&data_path);
            let data = open_or_create(cache, &data_path)?;
            data.set_len(len)?;
            let header = TableHeader {
                len,
                data_file: data.identity()?.to_string(),
                boot: cache.boot.clone(),
                object: object.to_owned(),
            };
            table.set_len(table_len(header.chunks()))?;
            header.write(&*table)?;
            drop(locked);
            return Self::new(header, data, table);
        }
        let data = match cache.files.open_file_for_writing(&data_path) {
            Ok(data) => Some(data),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let (Some(mut header), Some(data)) = (TableHeader::read(&*table)?, data)
            && header.len == len
            && data.len()? == len
            && let Some(noted) = Identity::parse(&header.data_file)
            // The number of its file system may be another one since the machine was started again.
            && noted.is_met_as(&data.identity()?)
        {
            if header.boot != cache.boot {
                forget_undurable(&*table, header.chunks())?;
                table.sync()?;
                header.boot.clone_from(&cache.boot);
                header.write(&*table)?;
            }
            drop(locked);
            return Self::new(header, data, table);
        }
        // Other processes may have these files open: they are replaced, never changed.
        remove(cache, key)?;
        Err(unusable("was damaged"))
    }

    /// Opens what is there of the object `key`, whatever it is. `None` if that is nothing sound.
    pub(super) fn open_existing(cache: &CacheDirectory, key: &str) -> Result<Option<Self>> {
        let table = cache.files.open_file_for_writing(&path_of(key, "chunks"))?;
        let Some(header) = TableHeader::read(&*table)? else { return Ok(None) };
        Self::try_open(cache, key, header.len, &header.object).map(Some)
    }

    /// Whether a chunk is there.
    pub(super) fn has(&self, chunk: u64) -> bool {
        read_entry(&*self.table, chunk).is_ok_and(Entry::is_there)
    }

    /// Bytes that are there, as far as this process knows.
    pub(super) fn present(&self) -> u64 {
        self.present.load(Ordering::Relaxed)
    }

    fn new(header: TableHeader, data: Arc<dyn WriteObject>, table: Arc<dyn WriteObject>) -> Result<Self> {
        let object = Self { header, data, table, present: AtomicU64::new(0), stored: Mutex::default() };
        let mut sum = 0;
        for_present(&*object.table, object.header.chunks(), |chunk, _| sum += object.chunk_len(chunk))?;
        object.present.store(sum, Ordering::Relaxed);
        Ok(object)
    }

    fn chunk_len(&self, chunk: u64) -> u64 {
        (self.header.len - chunk * CHUNK_LEN).min(CHUNK_LEN)
    }

    /// Reads from `at` into `buf`, which lies within the chunk; whether the chunk is there. `turn` is that of
    /// the eviction.
    pub(super) fn read(&self, at: u64, buf: &mut [u8], turn: u8) -> Result<bool> {
        let chunk = at / CHUNK_LEN;
        let before = read_entry(&*self.table, chunk)?;
        if !before.is_there() || self.data.read_at(at, buf)? < buf.len() {
            return Ok(false);
        }
        // E1: only now is it known that no hole was punched before the bytes were read.
        if !read_entry(&*self.table, chunk)?.promises_the_same(before) {
            return Ok(false);
        }
        if before.used != turn {
            // It matters little if that fails: the chunk goes earlier.
            let _ = write_use(&*self.table, chunk, turn);
        }
        Ok(true)
    }

    /// Stores the bytes of a whole chunk, unless it is there. `NoSpace` if there is no space for it.
    pub(super) fn store(&self, chunk: u64, bytes: &[u8], turn: u8) -> Result<()> {
        debug_assert_eq!(bytes.len() as u64, self.chunk_len(chunk));
        let mut stored = self.stored.lock();
        let _locked = Locked::take(&*self.table)?;
        let entry = read_entry(&*self.table, chunk)?;
        if entry.is_there() {
            return Ok(());
        }
        match self.data.reserve(chunk * CHUNK_LEN, bytes.len() as u64) {
            Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error),
            _ => {}
        }
        self.data.write_at(chunk * CHUNK_LEN, bytes)?;
        let generation = entry.generation.wrapping_add(1);
        write_entry(&*self.table, chunk, Entry { presence: Presence::Present, used: turn, generation })?;
        stored.push((chunk, generation));
        self.present.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Makes durable what was stored here since the last time.
    pub(super) fn make_durable(&self) -> Result<()> {
        let stored = std::mem::take(&mut *self.stored.lock());
        if stored.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.data.sync() {
            // E1: the kernel may have dropped pages that it could not write.
            self.evict(&stored.iter().map(|&(chunk, _)| chunk).collect::<Vec<_>>())?;
            return Err(error);
        }
        let _turn = self.stored.lock();
        let _locked = Locked::take(&*self.table)?;
        for (chunk, generation) in stored {
            let entry = read_entry(&*self.table, chunk)?;
            if entry.presence == Presence::Present && entry.generation == generation {
                write_entry(&*self.table, chunk, Entry { presence: Presence::Durable, ..entry })?;
            }
        }
        Ok(())
    }

    /// The chunks that are there, with the turn in which they were last used.
    pub(super) fn uses(&self) -> Result<Vec<(u64, u8)>> {
        let mut found = Vec::new();
        for_present(&*self.table, self.header.chunks(), |chunk, entry| found.push((chunk, entry.used)))?;
        Ok(found)
    }

    /// Removes it if no chunk is there, so that objects which are not used any more leave nothing behind. Who
    /// has it open goes on with files that have no names.
    pub(super) fn remove_if_empty(&self, cache: &CacheDirectory, key: &str) -> Result<bool> {
        let _turn = self.stored.lock();
        let _locked = Locked::take(&*self.table)?;
        let is_named = cache.files.identify(&path_of(key, "chunks"))? == self.table.identity()?;
        let mut is_empty = true;
        for_present(&*self.table, self.header.chunks(), |_, _| is_empty = false)?;
        if is_named && is_empty {
            remove(cache, key)?;
        }
        Ok(is_named && is_empty)
    }

    /// Evicts chunks, and returns the bytes that they had.
    pub(super) fn evict(&self, chunks: &[u64]) -> Result<u64> {
        let _turn = self.stored.lock();
        let _locked = Locked::take(&*self.table)?;
        let mut gone = Vec::new();
        for &chunk in chunks {
            let entry = read_entry(&*self.table, chunk)?;
            if entry.is_there() {
                write_entry(&*self.table, chunk, Entry { presence: Presence::Absent, ..entry })?;
                gone.push(chunk);
            }
        }
        // E1: else a crash could leave entries that promise what is a hole.
        self.table.sync()?;
        for &chunk in &gone {
            self.data.punch_hole(chunk * CHUNK_LEN, self.chunk_len(chunk))?;
        }
        let len = gone.iter().map(|&chunk| self.chunk_len(chunk)).sum();
        let _ = self
            .present
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(len)));
        Ok(len)
    }
}

/// Removes the files of an object, of which the table's lock is held.
pub(super) fn remove(cache: &CacheDirectory, key: &str) -> Result<()> {
    cache.names.unlink(&path_of(key, "chunks"))?;
    match cache.names.unlink(&path_of(key, "data")) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a file of the cache, which is made if it is missing.
fn open_or_create(cache: &CacheDirectory, path: &Path) -> Result<Arc<dyn WriteObject>> {
    match cache.files.open_file_for_writing(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        found => return found,
    }
    match cache.names.create(path, None) {
        Err(error) if error.kind() != ErrorKind::Exists => return Err(error),
        _ => {}
    }
    cache.files.open_file_for_writing(path)
}

/// An exclusive lock, until it is dropped.
struct Locked<'a>(&'a dyn WriteObject);

impl<'a> Locked<'a> {
    /// Takes it, or says that another process has it.
    fn take(file: &'a dyn WriteObject) -> Result<Self> {
        for attempt in 0.. {
            match file.locks().take(LockKind::Exclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(_) if attempt < LOCK_ATTEMPTS => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => break,
            }
        }
        Err(unusable("is being changed by another process"))
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.locks().release(LockKind::Exclusive);
    }
}
