//! FAT12, FAT16 and FAT32, read as Linux' `vfat` shows them with `umask=022,tz=UTC`.
//!
//! A file's inode number is its short entry's offset on the volume divided by the entry's length; the root
//! directory is 1. A directory ends after 65,536 entries (the format's own limit) and a file at its size, so
//! loops in chains do no harm. As the format says, a directory ends at the first entry that was never used;
//! Linux continues after it.

mod chain;
mod entry;
mod names;
mod volume;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::bytes::{corrupt, le32};
use crate::guest::filesystem::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino, RunKind,
    Statistics, Time,
};

use chain::{Chains, ClusterRun};
use entry::{EntryReader, FatEntry, NamedFatEntry};
use names::folded;
use volume::ENTRY_LEN;

pub use volume::{FatVolume, FatWidth};

const ROOT: Ino = Ino(1);
/// Bytes of a directory, by the format.
const DIRECTORY_LIMIT: u64 = 65_536 * ENTRY_LEN as u64;
/// Bytes of memory for cached directories.
const DIRECTORIES_BUDGET: usize = 8 << 20;
/// A longer table is not read only to count free clusters.
const COUNTED_TABLE_LIMIT: u64 = 16 << 20;
/// Runs that one step of a read takes at most.
const RUNS_AT_ONCE: usize = 64;

/// A FAT file system.
pub struct Fat {
    source: Arc<dyn Source>,
    volume: FatVolume,
    chains: Chains,
    directories: Cache<Ino, Arc<FatDirectory>>,
    free_count: OnceLock<u64>,
}

/// A directory as it was read.
struct FatDirectory {
    entries: Vec<(Ino, NamedFatEntry)>,
    /// By folded names and aliases; the first of equal ones.
    by_name: HashMap<String, usize>,
    /// The error after the entries, if any.
    trouble: Option<Error>,
}

/// Where an inode's bytes begin.
#[derive(Clone, Copy)]
enum FirstCluster {
    /// The root directory of FAT12 and FAT16.
    Fixed,
    /// A chain; 0: none.
    Chain(u32),
}

impl Fat {
    /// Opens the file system on a volume. `Corrupt` if its boot sector is invalid.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let mut head = vec![0; source.size().min(512) as usize];
        source.read_at(0, &mut head)?;
        let volume = FatVolume::parse(&head)
            .map_err(|fact| corrupt(format!("the FAT boot sector is invalid: {fact}")))?;
        Ok(Self {
            source,
            volume,
            chains: Chains::new(),
            directories: Cache::new(DIRECTORIES_BUDGET),
            free_count: OnceLock::new(),
        })
    }

    /// The entry of an inode other than the root directory.
    fn entry(&self, ino: Ino) -> Result<FatEntry> {
        let unknown = || corrupt(format!("there is no inode {}", ino.0));
        let at = ino.0.checked_mul(ENTRY_LEN as u64).ok_or_else(unknown)?;
        let volume = &self.volume;
        let in_root = (volume.root_at..volume.root_at + volume.root_len).contains(&at);
        let data_len = u64::from(volume.cluster_count) * u64::from(volume.cluster_len);
        if !in_root && !(volume.data_at..volume.data_at + data_len).contains(&at) {
            return Err(unknown());
        }
        let mut bytes = [0; ENTRY_LEN];
        self.source.read_at(at, &mut bytes)?;
        FatEntry::parse(&bytes, volume.kind == FatWidth::Fat32).ok_or_else(unknown)
    }

    /// Where a directory's entries begin.
    fn directory_start(&self, ino: Ino) -> Result<FirstCluster> {
        if ino == ROOT {
            let is_fixed = self.volume.kind != FatWidth::Fat32;
            return Ok(if is_fixed {
                FirstCluster::Fixed
            } else {
                FirstCluster::Chain(self.volume.root_cluster)
            });
        }
        let entry = self.entry(ino)?;
        if !entry.is_directory {
            return Err(Error::new(ErrorKind::Usage, format!("{} is not a directory", ino.0)));
        }
        Ok(FirstCluster::Chain(entry.start))
    }

    fn file(&self, ino: Ino) -> Result<FatEntry> {
        let entry = if ino == ROOT { None } else { Some(self.entry(ino)?) };
        let is_file = |entry: &FatEntry| !entry.is_directory;
        entry.filter(is_file).ok_or_else(|| Error::new(ErrorKind::Usage, format!("{} is not a file", ino.0)))
    }

    /// A directory, from the cache or read.
    fn directory(&self, ino: Ino) -> Result<Arc<FatDirectory>> {
        if let Some(known) = self.directories.get(&ino) {
            return Ok(known);
        }
        let start = self.directory_start(ino)?;
        let mut directory = FatDirectory { entries: Vec::new(), by_name: HashMap::new(), trouble: None };
        directory.trouble = self.read_directory(start, &mut directory.entries).err();
        let mut weight = 256;
        for (index, (_, named)) in directory.entries.iter().enumerate() {
            weight += 256 + 2 * (named.name.len() + named.alias.len());
            for name in [&named.name, &named.alias] {
                directory.by_name.entry(folded(name)).or_insert(index);
            }
        }
        let directory = Arc::new(directory);
        // A read error may be temporary; damage stays.
        if directory.trouble.as_ref().is_none_or(|trouble| trouble.kind() == ErrorKind::Corrupt) {
            self.directories.put(ino, Arc::clone(&directory), weight);
        }
        Ok(directory)
    }

    fn read_directory(&self, start: FirstCluster, entries: &mut Vec<(Ino, NamedFatEntry)>) -> Result<()> {
        let mut reader = EntryReader::default();
        let first = match start {
            FirstCluster::Fixed => {
                return self.read_entries(&mut reader, self.volume.root_at, self.volume.root_len, entries);
            }
            FirstCluster::Chain(0) => return Ok(()),
            FirstCluster::Chain(cluster) => cluster,
        };
        let cluster_len = u64::from(self.volume.cluster_len);
        let (mut next, mut left) = (Some(first), DIRECTORY_LIMIT.div_ceil(cluster_len));
        while let Some(cluster) = next {
            let Some(at) = self.volume.cluster_at(cluster) else {
                return Err(corrupt(format!(
                    "a directory references cluster {cluster}, which does not exist"
                )));
            };
            if left == 0 {
                return Err(corrupt("a directory has no end"));
            }
            left -= 1;
            self.read_entries(&mut reader, at, cluster_len, entries)?;
            if reader.has_ended {
                break;
            }
            next = self.chains.next((&self.volume, &*self.source), cluster)?;
        }
        Ok(())
    }

    /// Reads a part of a directory: `len` bytes at `at`.
    fn read_entries(
        &self,
        reader: &mut EntryReader,
        at: u64,
        len: u64,
        entries: &mut Vec<(Ino, NamedFatEntry)>,
    ) -> Result<()> {
        let mut bytes = vec![0; len as usize];
        self.source.read_at(at, &mut bytes)?;
        let mut found = Vec::new();
        reader.read(&bytes, &mut found);
        entries
            .extend(found.into_iter().map(|named| (Ino(at / ENTRY_LEN as u64 + named.index as u64), named)));
        Ok(())
    }

    /// Bytes of a directory, as the kernel counts them: all its clusters, used or not.
    fn directory_len(&self, start: FirstCluster) -> Result<u64> {
        let cluster = match start {
            FirstCluster::Fixed => return Ok(self.volume.root_len),
            FirstCluster::Chain(0) => return Ok(0),
            FirstCluster::Chain(cluster) => cluster,
        };
        let cluster_len = u64::from(self.volume.cluster_len);
        let most = DIRECTORY_LIMIT.div_ceil(cluster_len);
        let runs = self.chains.clusters((&self.volume, &*self.source), cluster, 0, most, usize::MAX)?;
        Ok(runs.iter().map(|run| run.count).sum::<u64>() * cluster_len)
    }

    fn free_count(&self) -> u64 {
        *self.free_count.get_or_init(|| {
            let counted = self.volume.table_len <= COUNTED_TABLE_LIMIT;
            let count =
                if counted { self.chains.free_count((&self.volume, &*self.source)).ok() } else { None };
            count.or_else(|| self.stored_free_count()).unwrap_or(0)
        })
    }

    /// FAT32's stored count, which may be wrong.
    fn stored_free_count(&self) -> Option<u64> {
        let mut sector = vec![0; 512];
        self.source.read_at(self.volume.information_at?, &mut sector).ok()?;
        let is_valid = le32(&sector, 0) == 0x4161_5252 && le32(&sector, 484) == 0x6141_7272;
        let count = le32(&sector, 488);
        (is_valid && count <= self.volume.cluster_count).then_some(count.into())
    }
}

impl FileSystem for Fat {
    fn root(&self) -> Ino {
        ROOT
    }

    fn statistics(&self) -> Statistics {
        let free = self.free_count();
        Statistics {
            block_size: self.volume.cluster_len,
            blocks: self.volume.cluster_count.into(),
            free_blocks: free,
            available_blocks: free,
            inodes: 0,
            free_inodes: 0,
            name_len: 255,
        }
    }

    fn remarks(&self) -> Vec<String> {
        let dirty = "it was not unmounted cleanly: recent changes may be missing or damaged";
        if self.volume.is_dirty { vec![dirty.to_owned()] } else { Vec::new() }
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
        let directory = self.directory(directory)?;
        match (directory.by_name.get(&folded(name)), &directory.trouble) {
            (Some(index), _) => Ok(Some(directory.entries[*index].0)),
            (None, None) => Ok(None),
            (None, Some(trouble)) => Err(trouble.clone()),
        }
    }

    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        let directory = self.directory(directory)?;
        let from = directory.entries.len().min(usize::try_from(from).unwrap_or(usize::MAX));
        for (index, (ino, named)) in directory.entries.iter().enumerate().skip(from) {
            let kind = if named.is_directory { FileKind::Directory } else { FileKind::File };
            let name = named.name.clone().into_bytes();
            if !each(DirectoryEntry { name, ino: *ino, kind: Some(kind), next: index as u64 + 1 }) {
                return Ok(());
            }
        }
        directory.trouble.clone().map_or(Ok(()), Err)
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        let entry = if ino == ROOT { None } else { Some(self.entry(ino)?) };
        let is_directory = entry.as_ref().is_none_or(|entry| entry.is_directory);
        let (size, links) = match &entry {
            Some(entry) if !is_directory => (u64::from(entry.size), 1),
            _ => {
                let inner = self.directory(ino)?;
                let count = inner.entries.iter().filter(|(_, named)| named.is_directory).count();
                // A damaged directory still has a size and attributes.
                (self.directory_len(self.directory_start(ino)?).unwrap_or(0), 2 + count as u32)
            }
        };
        let is_read_only = entry.as_ref().is_some_and(|entry| entry.is_read_only && !is_directory);
        let (accessed, modified) = entry
            .as_ref()
            .map_or((Time::default(), Time::default()), |entry| (entry.accessed, entry.modified));
        Ok(FileAttributes {
            kind: if is_directory { FileKind::Directory } else { FileKind::File },
            mode: if is_read_only { 0o555 } else { 0o755 },
            uid: 0,
            gid: 0,
            size,
            blocks: size.next_multiple_of(u64::from(self.volume.cluster_len)) / 512,
            links,
            device: (0, 0),
            accessed,
            modified,
            changed: modified,
            created: entry.and_then(|entry| entry.created),
        })
    }

    fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        Err(Error::new(ErrorKind::Usage, format!("{} is not a symbolic link", ino.0)))
    }

    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        let file = self.file(ino)?;
        let len = len.min(u64::from(file.size).saturating_sub(at));
        if len == 0 || most == 0 {
            return Ok(Vec::new());
        }
        let cluster_len = u64::from(self.volume.cluster_len);
        let (first, last) = (at / cluster_len, (at + len - 1) / cluster_len);
        let place = (&self.volume, &*self.source);
        let cluster_runs = self.chains.clusters(place, file.start, first, last - first + 1, most)?;
        let mut runs = Vec::new();
        let (mut skip, mut left) = (at % cluster_len, len);
        for ClusterRun { first, count } in cluster_runs {
            let Some(from) = self.volume.cluster_at(first) else { break };
            let len = (count * cluster_len - skip).min(left);
            runs.push(FileRun { len, kind: RunKind::Stored(from + skip) });
            (skip, left) = (0, left - len);
        }
        Ok(runs)
    }

    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let runs =
                match self.runs(ino, at.saturating_add(done as u64), (buf.len() - done) as u64, RUNS_AT_ONCE)
                {
                    Ok(runs) => runs,
                    // The bytes before the error are returned.
                    Err(_) if done > 0 => break,
                    Err(error) => return Err(error),
                };
            if runs.is_empty() {
                break;
            }
            for FileRun { len, kind } in runs {
                let part = &mut buf[done..done + len as usize];
                match kind {
                    RunKind::Stored(from) => self.source.read_at(from, part)?,
                    RunKind::Hole | RunKind::Verified(_) | RunKind::Opaque => part.fill(0),
                }
                done += len as usize;
            }
        }
        Ok(done)
    }

    fn extended_attributes(&self, _ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        Ok(Vec::new())
    }
}
