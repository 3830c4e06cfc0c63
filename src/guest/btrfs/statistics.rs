//! The numbers of statfs(2), counted like the kernel does: from block groups, devices and the sizes of trees.

use crate::error::Result;
use crate::guest::bytes::le64;
use crate::guest::filesystem::Statistics;

use super::Shared;
use super::chunks::{Chunk, profile};
use super::format::{Key, kind, object};
use super::superblock::{DeviceItem, compat_ro};
use super::tree::Tree;

/// Chunks whose block groups are read; larger file systems use the superblock's number.
const MAX_GROUPS: usize = 1 << 14;
const NAME_LEN: u32 = 255;
/// Space of a device that is never allocated.
const DEVICE_RESERVE: u64 = 1 << 20;
const STRIPE: u64 = 64 << 10;
/// Bounds of the kernel's reserve for metadata, and the items that it is for at least.
const MAX_RESERVE: u64 = 512 << 20;
const UNLINK_ITEMS: u64 = 6;
/// Levels of a tree, each of whose nodes may be split.
const NODES_OF_AN_INSERTION: u64 = 16;
/// With less space for metadata the kernel says that there is none for data.
const MIN_METADATA: u64 = 4 << 20;

/// The space of a device that belongs to the file system.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceSpace {
    total: u64,
    allocated: u64,
}

impl DeviceSpace {
    pub(super) fn new(item: &DeviceItem) -> Self {
        Self { total: item.total_bytes, allocated: item.bytes_used }
    }
}

/// Space of one type of chunks, in bytes of devices.
#[derive(Clone, Copy, Debug, Default)]
struct Space {
    total: u64,
    used: u64,
}

impl Space {
    fn free(self) -> u64 {
        self.total.saturating_sub(self.used)
    }
}

impl Shared {
    pub(super) fn count(&self) -> Statistics {
        let superblock = &self.superblock;
        let sector = u64::from(superblock.sector_len);
        let (mut data, mut metadata, mut used) = (Space::default(), Space::default(), 0u64);
        let (mut factor, mut data_profile, mut is_mixed) = (1, 0, false);
        let groups = self.group_tree();
        let count = self.nodes.volume.chunks.iter().count();
        for chunk in self.nodes.volume.chunks.iter().take(MAX_GROUPS) {
            let key = Key::new(chunk.start, kind::BLOCK_GROUP, chunk.len);
            let group = groups.as_ref().and_then(|tree| tree.get(&self.nodes, key).ok().flatten());
            let group_used = group.map_or(0, |item| le64(item.data(), 0)).min(chunk.len);
            let copies = Chunk::factor(chunk.flags);
            let group_used = group_used.saturating_mul(copies);
            let space = if chunk.flags & profile::DATA != 0 {
                (factor, data_profile) = (copies, chunk.flags);
                is_mixed |= chunk.flags & profile::METADATA != 0;
                &mut data
            } else if chunk.flags & profile::METADATA != 0 {
                &mut metadata
            } else {
                &mut Space::default()
            };
            space.total = space.total.saturating_add(chunk.len.saturating_mul(copies));
            space.used = space.used.saturating_add(group_used);
            used = used.saturating_add(group_used);
        }
        if count > MAX_GROUPS {
            used = superblock.bytes_used.saturating_mul(factor);
        }
        let reserve = self.reserve();
        let blocks = superblock.total_bytes / factor / sector;
        let free = blocks.saturating_sub(used / factor / sector).saturating_sub(reserve / sector);
        let unallocated = self.unallocated(data_profile);
        let mut available = (data.free() / factor).saturating_add(unallocated / factor) / sector;
        let is_full = unallocated == 0 && self.unallocated(profile::METADATA | metadata_profile(self)) == 0;
        if !is_mixed && is_full && metadata.free().saturating_sub(MIN_METADATA) < reserve {
            available = 0;
        }
        Statistics {
            block_size: superblock.sector_len,
            blocks,
            free_blocks: free,
            available_blocks: available,
            inodes: 0,
            free_inodes: 0,
            name_len: NAME_LEN,
        }
    }

    /// The tree of block groups.
    fn group_tree(&self) -> Option<Tree> {
        let has_own = self.superblock.compat_ro & compat_ro::BLOCK_GROUP_TREE != 0;
        let id = if has_own { object::BLOCK_GROUP_TREE } else { object::EXTENT_TREE };
        self.root_of(id).ok().flatten().map(|root| Tree::new(root.pointer))
    }

    /// The kernel's reserve for metadata: what its own trees take, or what a few changes of them need.
    fn reserve(&self) -> u64 {
        let superblock = &self.superblock;
        let has = |feature| superblock.compat_ro & feature != 0;
        let used = |id| -> Result<Option<u64>> { Ok(self.root_of(id)?.map(|root| root.bytes_used)) };
        let trees =
            [object::EXTENT_TREE, object::CSUM_TREE, object::FREE_SPACE_TREE, object::BLOCK_GROUP_TREE];
        let trees: Vec<u64> = trees.into_iter().filter_map(|id| used(id).ok().flatten()).collect();
        // The root tree's own size is in no item; a node of it is certain.
        let all = trees.iter().fold(u64::from(superblock.node_len), |sum, used| sum.saturating_add(*used));
        let insertion = u64::from(superblock.node_len) * NODES_OF_AN_INSERTION;
        let items = 1 + trees.len() as u64 + UNLINK_ITEMS;
        let references = if has(compat_ro::FREE_SPACE_TREE) { 2 } else { 1 } * UNLINK_ITEMS;
        all.max(insertion * (items + references)).min(MAX_RESERVE)
    }

    /// Bytes of devices that chunks of a profile can still be made of, as the kernel estimates them.
    fn unallocated(&self, flags: u64) -> u64 {
        let (device_stripes, min_devices, most) = match flags & profile::ALL {
            profile::DUP => (2, 1, 1),
            profile::RAID0 => (1, 1, self.devices.len()),
            profile::RAID1 => (1, 2, 2),
            profile::RAID1C3 => (1, 3, 3),
            profile::RAID1C4 => (1, 4, 4),
            profile::RAID10 => (1, 2, 4),
            profile::RAID5 => (1, 2, 1),
            profile::RAID6 => (1, 3, 1),
            _ => (1, 1, 1),
        };
        let min = device_stripes * STRIPE;
        let free = self.devices.iter().map(|device| device.total.saturating_sub(device.allocated));
        let free = free.map(|free| free - free % STRIPE).filter(|free| *free > DEVICE_RESERVE + min);
        let mut free: Vec<u64> = free.map(|free| free - DEVICE_RESERVE).collect();
        free.sort_unstable_by(|a, b| b.cmp(a));
        let mut sum = 0u64;
        while !free.is_empty() && free.len() >= min_devices {
            let count = most.clamp(1, free.len());
            let smallest = free[free.len() - 1];
            if smallest >= min {
                sum = sum.saturating_add(smallest.saturating_mul(count as u64));
                free.iter_mut().rev().take(count).for_each(|free| *free -= smallest);
            }
            free.pop();
        }
        sum
    }
}

/// The profile of metadata.
fn metadata_profile(shared: &Shared) -> u64 {
    let chunks = shared.nodes.volume.chunks.iter();
    chunks.filter(|chunk| chunk.flags & profile::METADATA != 0).map(|chunk| chunk.flags).last().unwrap_or(0)
}
