//! Opening: reads the superblock, and replays the log if the file system was not unmounted cleanly.

use std::sync::{Arc, OnceLock};

use crate::cache::Cache;
use crate::error::Result;
use crate::guest::source::Source;

use super::blocks::{Blocks, LogOverlay};
use super::log::{self, Replayed};
use super::superblock::{SUPERBLOCK_LEN, Superblock, incompat};
use super::{INODE_CACHE_LEN, Xfs};

pub(super) fn open(source: Arc<dyn Source>) -> Result<Xfs> {
    let superblock = read_superblock(&Blocks::new(Arc::clone(&source), LogOverlay::default()))?;
    let (mut remarks, mut stale) = (Vec::new(), Vec::new());
    let need = superblock.block_count << superblock.block_bits;
    let have = source.size();
    if have < need {
        remarks.push(format!(
            "the file system needs {need} bytes, but the volume has only {have}: the rest is missing"
        ));
    }
    if superblock.incompat & incompat::NEEDS_REPAIR != 0 {
        remarks.push("the file system is marked as in need of repair".to_owned());
    }
    let mut old = |why: &dyn std::fmt::Display| {
        let fact = "changes after the last checkpoint are missing or old";
        stale.push(format!("the log cannot be replayed ({why}): {fact}"));
    };
    let replayed = if superblock.log_start == 0 {
        old(&"it is on another device");
        None
    } else {
        match log::replay(&*source, &superblock) {
            Ok(replayed) => replayed,
            Err(error) if log::is_fact(&error) => {
                old(&error);
                None
            }
            Err(error) => return Err(error),
        }
    };
    let is_replayed = replayed.is_some();
    let Replayed { overlay, unfinished, remarks: incomplete } = replayed.unwrap_or_default();
    for fact in incomplete {
        stale.push(format!("{fact} when the log ended, and is shown as it was before"));
    }
    remarks.extend(stale.iter().cloned());
    let blocks = Blocks::new(source, overlay);
    // The file system may have grown in a transaction.
    let superblock = if is_replayed { read_superblock(&blocks)? } else { superblock };
    Ok(Xfs {
        superblock,
        blocks,
        is_replayed,
        unfinished,
        inodes: Cache::new(INODE_CACHE_LEN),
        statistics: OnceLock::new(),
        remarks,
        stale,
    })
}

fn read_superblock(blocks: &Blocks) -> Result<Superblock> {
    let mut raw = vec![0; blocks.source().size().min(SUPERBLOCK_LEN as u64) as usize];
    let is_replayed = blocks.read_at(0, &mut raw)?;
    Superblock::parse(&raw, is_replayed)
}
