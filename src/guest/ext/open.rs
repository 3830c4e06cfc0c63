//! Opening: finds a valid superblock, and replays the journal if the file system was not unmounted cleanly.

use std::hash::RandomState;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::corrupt;
use crate::guest::source::Source;

use super::blocks::{Blocks, JournalOverlay};
use super::fast::FastCommits;
use super::journal::{self, Log, Replayed};
use super::superblock::{JournalPlace, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock, incompat};
use super::{Ext, INODE_CACHE_LEN, NAME_CACHE_LEN};

/// Groups that may begin with a copy of the superblock.
const COPIES: [u64; 8] = [1, 3, 5, 7, 9, 25, 27, 49];
/// The largest factor, as a power of two, by which bigalloc enlarges groups: their bitmaps count clusters.
const MAX_CLUSTER_BITS: u32 = 6;

pub(super) fn open(source: Arc<dyn Source>) -> Result<Ext> {
    let (superblock, remark) = find(&*source)?;
    let mut ext = bare(source, superblock, JournalOverlay::default());
    ext.remarks.get_mut().extend(remark);
    let have = ext.blocks.source().size();
    let need = ext.superblock.block_count << ext.superblock.block_bits;
    if have < need {
        ext.remark(format!(
            "the file system needs {need} bytes, but the volume has only {have}: the rest is missing"
        ));
    }
    let copy = ext.superblock.group != 0;
    if !copy && !ext.superblock.has(incompat::RECOVER) {
        return Ok(ext);
    }
    match ext.superblock.journal {
        JournalPlace::None => Ok(ext),
        JournalPlace::OtherDevice => {
            ext.stale_remark(old("it is on another device"));
            Ok(ext)
        }
        // A copy of the superblock does not say whether a replay is needed; the journal does.
        JournalPlace::Inode(number) => match Log::open(&ext, number).and_then(|log| replay(&ext, log)) {
            Ok(Some(replayed)) => Ok(replayed),
            Ok(None) => Ok(ext),
            Err(error) if is_fact(&error) => {
                ext.stale_remark(old(error));
                Ok(ext)
            }
            Err(error) => Err(error),
        },
    }
}

/// Whether an error states a fact about the file system. Any other error is temporary: a retry may succeed.
fn is_fact(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit)
}

fn old(why: impl std::fmt::Display) -> String {
    format!("the journal cannot be replayed ({why}): changes after the last checkpoint are missing or old")
}

/// The file system with its journal's content; `None` if there is nothing to replay.
fn replay(ext: &Ext, log: Option<Log>) -> Result<Option<Ext>> {
    let Some(log) = log else { return Ok(None) };
    let Replayed { overlay, end, remarks } = journal::replay(&log)?;
    let source = Arc::clone(ext.blocks.source());
    let mut replayed = bare(source, ext.superblock.clone(), overlay);
    // The file system may have grown in a transaction.
    let mut raw = vec![0; SUPERBLOCK_LEN];
    let block = super::Block(SUPERBLOCK_AT >> ext.superblock.block_bits);
    let skip = SUPERBLOCK_AT & (ext.superblock.block_len() as u64 - 1);
    let is_read = match replayed.blocks.read_at(block, skip, &mut raw) {
        Err(error) if !is_fact(&error) => return Err(error),
        read => read.is_ok(),
    };
    if ext.superblock.group == 0 && is_read {
        match Superblock::parse(&raw) {
            Ok(newer) if newer.sound && newer.block_bits == ext.superblock.block_bits => {
                replayed.blocks.set_count(newer.block_count);
                replayed.superblock = newer;
            }
            _ => replayed
                .stale_remark("the superblock in the journal is damaged; the older one is used".into()),
        }
    }
    replayed.remarks.get_mut().extend(ext.remarks.lock().drain(..));
    for remark in remarks {
        replayed.stale_remark(remark);
    }
    match FastCommits::replay(&replayed, &log, end) {
        Ok(fast) => replayed.fast = fast,
        Err(error) if !is_fact(&error) => return Err(error),
        Err(error) => {
            replayed.stale_remark(format!(
                "fast commits cannot be replayed ({error}): their changes are missing"
            ));
        }
    }
    Ok(Some(replayed))
}

fn bare(source: Arc<dyn Source>, superblock: Superblock, overlay: JournalOverlay) -> Ext {
    Ext {
        blocks: Blocks::new(source, superblock.block_bits, superblock.block_count, overlay),
        superblock,
        fast: FastCommits::default(),
        inodes: Cache::new(INODE_CACHE_LEN),
        name_indexes: Cache::new(NAME_CACHE_LEN),
        name_hasher: RandomState::new(),
        statistics: OnceLock::new(),
        remarks: Mutex::default(),
        stale: Vec::new(),
    }
}

/// The superblock, or a copy of it if it is damaged, with a remark about the damage.
fn find(source: &dyn Source) -> Result<(Superblock, Option<String>)> {
    let primary = read(source, SUPERBLOCK_AT);
    match &primary {
        Ok(superblock) if superblock.sound => return primary.map(|superblock| (superblock, None)),
        // An unknown feature is unknown in a copy, too.
        Err(error) if error.kind() != ErrorKind::Corrupt => return primary.map(|found| (found, None)),
        _ => {}
    }
    for bits in 10..=16 {
        for cluster_bits in 0..=MAX_CLUSTER_BITS {
            for group in COPIES {
                if let Some(found) = copy(source, bits, cluster_bits, group)? {
                    let remark = format!("the superblock is damaged: its copy in group {group} is used");
                    return Ok((found, Some(remark)));
                }
            }
        }
    }
    let remark = "the superblock's checksum is wrong, and there is no copy; it is used anyway";
    primary.map(|superblock| (superblock, Some(remark.into())))
}

/// The copy in a group, if there is a valid one.
fn copy(source: &dyn Source, bits: u32, cluster_bits: u32, group: u64) -> Result<Option<Superblock>> {
    // As many blocks as the bits of a one-block bitmap, but their number must fit 16 bits.
    let per_group = (8u64 << bits).min(if bits > 12 { 65_528 } else { u64::MAX }) << cluster_bits;
    let first = u64::from(bits == 10 && cluster_bits == 0);
    let found = match read(source, (first + group * per_group) << bits) {
        Ok(found) => found,
        Err(error) if is_fact(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let fits = u64::from(found.group) == group && found.block_bits == bits && found.sound;
    Ok(fits.then_some(found))
}

fn read(source: &dyn Source, at: u64) -> Result<Superblock> {
    let mut raw = vec![0; SUPERBLOCK_LEN];
    source.read_at(at, &mut raw).map_err(|error| {
        if is_fact(&error) { corrupt("there is no ext2, ext3 or ext4 superblock") } else { error }
    })?;
    Superblock::parse(&raw)
}
