//! The cache of remote objects on this machine: one directory, shared by all processes of a user.
//!
//! It promises to use no more than its size, but for moments: a process that stores more evicts what was not
//! used for the longest time. Time is counted in turns. Each eviction begins a new one, and what is read from
//! then on is noted with its number.
//!
//! If anything of the cache fails (no space, no permission, a damaged disk), objects are read without it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{LockKind, MountPoints, Storage, WriteObject};

use super::CacheFiles;
use super::cached_object::{CacheDirectory, CachedObject};

/// The file that has the turn, and whose lock the evicting process holds.
const TURN: &str = "turn";
/// Bytes that are stored between two looks at the size of the whole.
const LOOK_EVERY: u64 = 64 << 20;
/// An eviction makes so much room, of the cache's size, that it is seldom.
const ROOM_DIVISOR: u64 = 10;

/// A cache of chunks of objects.
pub(super) struct ChunkCache {
    directory: CacheDirectory,
    turn_file: Arc<dyn WriteObject>,
    /// Bytes, at most.
    size: u64,
    turn: AtomicU8,
    /// Bytes stored since the size of the whole was looked at.
    unseen: AtomicU64,
    open: Mutex<HashMap<String, Weak<CachedObject>>>,
    pub evicted: AtomicU64,
}

impl ChunkCache {
    /// Opens the cache in these files, `size` bytes at most.
    pub(super) fn open(CacheFiles { files, boot }: CacheFiles, size: u64) -> Result<Self> {
        let names = files.names().ok_or_else(|| {
            Error::new(
                ErrorKind::ReadOnly,
                "cache_dir lies where nothing can be made; name another directory",
            )
        })?;
        let path = Path::new(TURN);
        match names.create(path, None) {
            Err(error) if error.kind() != ErrorKind::Exists => return Err(error.within("cache_dir")),
            _ => {}
        }
        let turn_file = files.open_file_for_writing(path).map_err(|error| error.within("cache_dir"))?;
        let turn = read_turn(&*turn_file)?;
        Ok(Self {
            directory: CacheDirectory { files, names, boot },
            turn_file,
            size,
            turn: AtomicU8::new(turn),
            // So that the first one stored looks.
            unseen: AtomicU64::new(LOOK_EVERY),
            open: Mutex::default(),
            evicted: AtomicU64::new(0),
        })
    }

    /// The turn of the eviction.
    pub(super) fn turn(&self) -> u8 {
        self.turn.load(Ordering::Relaxed)
    }

    /// What is there of a version of an object. All users of this process share it.
    pub(super) fn object(
        &self,
        location: &str,
        name: &str,
        version: &str,
        len: u64,
    ) -> Result<Arc<CachedObject>> {
        let key = key_of(location, name, version, len);
        if let Some(open) = self.open.lock().get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let object = format!("{location}/{name} {version}");
        let opened = Arc::new(CachedObject::open(&self.directory, &key, len, &object)?);
        let mut open = self.open.lock();
        open.retain(|_, object| object.strong_count() > 0);
        // Another thread may have been faster.
        if let Some(other) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(other);
        }
        open.insert(key, Arc::downgrade(&opened));
        Ok(opened)
    }

    /// Bytes that are there of a version of an object.
    pub(super) fn present(&self, location: &str, name: &str, version: &str, len: u64) -> u64 {
        self.opened(&key_of(location, name, version, len)).map_or(0, |object| object.present())
    }

    /// Stores a chunk, and makes room if there is too little. Errors are for the log: the bytes are not lost.
    pub(super) fn store(&self, object: &CachedObject, chunk: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        if len > self.size / 2 {
            return Ok(());
        }
        if self.unseen.fetch_add(len, Ordering::Relaxed) + len >= LOOK_EVERY.min(self.size / 4) {
            self.unseen.store(0, Ordering::Relaxed);
            self.make_room(0)?;
        }
        match object.store(chunk, bytes, self.turn()) {
            Err(error) if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Quota) => {
                // The disk is fuller than the cache is.
                self.make_room(LOOK_EVERY)?;
                object.store(chunk, bytes, self.turn())
            }
            result => result,
        }
    }

    /// Makes durable what this process has stored.
    pub(super) fn make_durable(&self) -> Result<()> {
        let open: Vec<_> = self.open.lock().values().filter_map(Weak::upgrade).collect();
        open.iter().try_for_each(|object| object.make_durable())
    }

    /// Evicts what was not used for the longest time, until the cache has its size again, and `more` bytes
    /// less than it has now. One process at a time does that; the others go on.
    fn make_room(&self, more: u64) -> Result<()> {
        if self.turn_file.locks().take(LockKind::Exclusive).is_err() {
            return Ok(());
        }
        let result = self.make_room_in_turn(more);
        self.turn_file.locks().release(LockKind::Exclusive);
        result
    }

    fn make_room_in_turn(&self, more: u64) -> Result<()> {
        let turn = read_turn(&*self.turn_file)?;
        self.turn.store(turn, Ordering::Relaxed);
        let keys = self.keys()?;
        let mut used = 0;
        let mut chunks = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            let Some(object) = self.opened(key) else { continue };
            for (chunk, last_use) in object.uses()? {
                used += super::chunk_table::CHUNK_LEN;
                chunks.push((turn.wrapping_sub(last_use), index, chunk));
            }
        }
        let limit = if more > 0 { used.saturating_sub(more).min(self.size) } else { self.size };
        if used <= limit && more == 0 {
            return Ok(());
        }
        let room = used - limit + if more == 0 { self.size / ROOM_DIVISOR } else { 0 };
        // What is older goes first. Of one age, objects go as they come: their order is that of a digest.
        chunks.sort_by_key(|&(age, index, chunk)| (std::cmp::Reverse(age), index, chunk));
        chunks.truncate(room.div_ceil(super::chunk_table::CHUNK_LEN) as usize);
        chunks.sort_by_key(|&(_, index, chunk)| (index, chunk));
        for of_object in chunks.chunk_by(|a, b| a.1 == b.1) {
            let key = &keys[of_object[0].1];
            let Some(object) = self.opened(key) else { continue };
            let chunks: Vec<u64> = of_object.iter().map(|&(_, _, chunk)| chunk).collect();
            self.evicted.fetch_add(object.evict(&chunks)?, Ordering::Relaxed);
            object.remove_if_empty(&self.directory, key)?;
        }
        let next = turn.wrapping_add(1);
        self.turn_file.write_at(0, &[next])?;
        self.turn.store(next, Ordering::Relaxed);
        Ok(())
    }

    /// The keys of all objects that have files here.
    fn keys(&self) -> Result<Vec<String>> {
        let root = self.directory.files.open_directory(Path::new("."), MountPoints::Skip)?;
        let Some(root) = root else { return Ok(Vec::new()) };
        let names = root.list()?.into_iter().filter_map(|entry| entry.name.into_string().ok());
        Ok(names.filter_map(|name| name.strip_suffix(".chunks").map(str::to_owned)).collect())
    }

    /// The object of a key that was listed; `None` if it cannot be opened now.
    fn opened(&self, key: &str) -> Option<Arc<CachedObject>> {
        let open = self.open.lock().get(key).and_then(Weak::upgrade);
        open.or_else(|| CachedObject::open_existing(&self.directory, key).ok().flatten().map(Arc::new))
    }
}

fn read_turn(file: &dyn Storage) -> Result<u8> {
    let mut turn = [0];
    file.read_at(0, &mut turn)?;
    Ok(turn[0])
}

/// The name of the files of a version of an object: of one that is unlike every other one's.
fn key_of(location: &str, name: &str, version: &str, len: u64) -> String {
    let mut digest = Sha256::new();
    for part in [location, name, version, &len.to_string()] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part.as_bytes());
    }
    let bytes: [u8; 16] = *digest.finalize().first_chunk().expect("32 bytes");
    format!("{:032x}", u128::from_be_bytes(bytes))
}
