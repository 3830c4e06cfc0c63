//! A guest whose disk fails at any moment: it knows which of its blocks have to be there afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::active::rw;
use super::{KIB, Rng};

/// A guest that writes blocks of 4 KiB and knows which of them have to be there.
pub struct BlockGuest {
    /// For each block the last synced content, and all later writes.
    blocks: Vec<(u64, Vec<u64>)>,
    number: u64,
}

/// Bytes of one.
pub const BLOCK: u64 = 4096;
/// Where a guest's blocks begin.
pub const PLACE: u64 = 512 * KIB;

impl BlockGuest {
    /// Blocks that have numbers already.
    pub fn new(disk: &Path, count: u64) -> Self {
        let mut guest = Self { blocks: vec![(0, Vec::new()); count as usize], number: 0 };
        let disk = rw(disk);
        for block in 0..count {
            guest.write(&disk, block).expect("a write");
        }
        guest.sync(&disk).expect("a sync");
        guest
    }

    fn write(&mut self, disk: &File, block: u64) -> std::io::Result<()> {
        self.number += 1;
        // Even if it fails, some of it may be there.
        self.blocks[block as usize].1.push(self.number);
        disk.write_all_at(&self.number.to_le_bytes().repeat(512), PLACE + block * BLOCK)
    }

    fn sync(&mut self, disk: &File) -> std::io::Result<()> {
        disk.sync_data()?;
        for (synced, since) in &mut self.blocks {
            *synced = since.last().copied().unwrap_or(*synced);
            since.clear();
        }
        Ok(())
    }

    /// Until writing fails, or the test stops it.
    pub fn work(&mut self, disk: &File, seed: u64, stop: &AtomicBool) {
        let mut rng = Rng::new(seed);
        while !stop.load(Ordering::Relaxed) {
            let block = rng.below(self.blocks.len() as u64);
            let done = if rng.below(24) == 0 { self.sync(disk) } else { self.write(disk, block) };
            if done.is_err() {
                break;
            }
        }
    }

    /// The synced content is there, or a later one. An interrupted write may have reached a part of its
    /// sectors, as on any disk.
    pub fn assert_there(&self, disk: &Path, context: &str) {
        let disk = File::open(disk).expect("the disk");
        let mut have = [0; BLOCK as usize];
        for (number, (synced, since)) in self.blocks.iter().enumerate() {
            disk.read_exact_at(&mut have, PLACE + number as u64 * BLOCK).expect("a read");
            for sector in have.chunks_exact(512) {
                let first = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
                assert!(
                    sector == &first.to_le_bytes().repeat(64)[..],
                    "{context}: a sector of block {number} is torn"
                );
                let is_known = first == *synced || since.contains(&first);
                assert!(is_known, "{context}: block {number} is {first}, not {synced} nor {since:?}");
            }
        }
    }
}
