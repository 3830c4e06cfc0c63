//! Opening: finds the devices, the chunks, the roots of all trees, and replays the logs.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::cache::Cache;
use crate::error::Result;
use crate::guest::readers::Subvolume;
use crate::guest::source::Source;

use super::chunks::{Chunk, Chunks};
use super::devices::{Device, Devices, MAX_DEVICES, Volume};
use super::format::{Key, corrupt, is_fact, kind, object};
use super::nodes::Nodes;
use super::number::MAX_SUBVOLUMES;
use super::statistics::DeviceSpace;
use super::sums::Sums;
use super::superblock::{DeviceId, DeviceItem, Superblock};
use super::tree::Tree;
use super::{Btrfs, REMARK_LIMIT, Shared, log, subvolumes};

/// Bytes of decompressed extents cached per file system.
const EXTENT_CACHE_LEN: usize = 8 << 20;

pub(super) fn open(sources: &[Arc<dyn Source>]) -> Result<Vec<Subvolume>> {
    let mut shared = share(sources)?;
    let default = match shared.default_subvolume() {
        Ok(id) => id,
        Err(error) if is_fact(&error) => {
            shared.remark(format!("the default subvolume is unknown ({error}): the top level is shown"));
            object::FS_TREE
        }
        Err(error) => return Err(error),
    };
    let main = shared.index_of(default).or_else(|| {
        shared.remark(format!("the default subvolume {default} is missing: the top level is shown"));
        shared.index_of(object::FS_TREE)
    });
    let main = main.ok_or_else(|| corrupt("there is no tree of files"))?;
    let mut trees = vec![(main, path(&shared, main)?)];
    for index in (0..shared.subvolumes.len()).filter(|index| *index != main) {
        let path = path(&shared, index)?;
        trees.extend(path.map(|path| (index, Some(path))));
    }
    let mut numbers = vec![None; shared.subvolumes.len()];
    for (number, (index, _)) in trees.iter().enumerate() {
        numbers[*index] = Some(number as u32);
    }
    shared.trees = numbers;
    let shared = Arc::new(shared);
    let show = |(subvolume, path): (usize, Option<Vec<u8>>)| Subvolume {
        path,
        id: shared.subvolumes[subvolume].id,
        files: Arc::new(Btrfs { shared: Arc::clone(&shared), subvolume }),
    };
    Ok(trees.into_iter().map(show).collect())
}

/// The path of a subvolume from the top level, if it is known.
fn path(shared: &Shared, subvolume: usize) -> Result<Option<Vec<u8>>> {
    match shared.path(subvolume) {
        Err(error) if is_fact(&error) => {
            let id = shared.subvolumes[subvolume].id;
            shared.remark(format!("the path of subvolume {id} is unknown: {error}"));
            Ok(None)
        }
        found => found,
    }
}

fn share(sources: &[Arc<dyn Source>]) -> Result<Shared> {
    let (devices, superblock, copy) = Devices::open(sources)?;
    let mut remarks = Vec::new();
    let chunks = Chunks::of_array(&superblock.chunk_array)?;
    let is_alone = sources.len() == 1;
    let mut nodes = Nodes::new(Volume { devices, chunks, is_alone }, &superblock);
    let items = read_chunks(&mut nodes, &superblock, &mut remarks)?;
    let missing = superblock.device_count.saturating_sub(nodes.volume.devices.iter().count() as u64);
    if missing > 0 {
        remarks.push(format!(
            "{missing} of its {} devices are missing: what only they hold cannot be read",
            superblock.device_count
        ));
    }
    let roots = Tree::new(superblock.root);
    let (subvolumes, found) = subvolumes::all(&roots, &nodes, MAX_SUBVOLUMES);
    match found {
        Ok(()) => {}
        Err(error) if is_fact(&error) && !subvolumes.is_empty() => {
            remarks.push(format!("not all subvolumes are shown: {error}"));
        }
        Err(error) => return Err(error),
    }
    let sums = match subvolumes::root_item(&roots, &nodes, object::CSUM_TREE) {
        Ok(root) => root.map(|root| Tree::new(root.pointer)),
        Err(error) if is_fact(&error) => {
            remarks.push(format!("checksums of data are not verified: {error}"));
            None
        }
        Err(error) => return Err(error),
    };
    let sums = Sums::new(sums, superblock.checksum.len(), superblock.sector_len);
    let mut shared = Shared {
        nodes,
        roots,
        sums,
        subvolumes,
        trees: Vec::new(),
        devices: items.iter().map(DeviceSpace::new).collect(),
        extents: Cache::new(EXTENT_CACHE_LEN),
        statistics: OnceLock::new(),
        remarks: Mutex::new(Vec::new()),
        stale: Vec::new(),
        superblock,
    };
    let mut stale = log::replay(&mut shared)?;
    if copy > 0 {
        stale.push(format!(
            "the superblock is damaged: its copy {copy} is used, which does not name a log: changes synced \
             since the last commit are missing"
        ));
    }
    remarks.iter().chain(&stale).for_each(|remark| shared.remark(remark.clone()));
    shared.stale = stale;
    Ok(shared)
}

/// The identities of devices that are not among `sources`, as far as the others name them.
pub(super) fn absent(sources: &[Arc<dyn Source>]) -> Result<Vec<DeviceId>> {
    let (devices, superblock, _) = Devices::open(sources)?;
    let present: BTreeSet<DeviceId> = devices.iter().map(Device::identity).collect();
    if present.len() as u64 >= superblock.device_count {
        return Ok(Vec::new());
    }
    let chunks = Chunks::of_array(&superblock.chunk_array)?;
    let mut named: BTreeSet<DeviceId> = chunks.devices().collect();
    let mut nodes = Nodes::new(Volume { devices, chunks, is_alone: false }, &superblock);
    // The chunk tree can be on a device that is absent: the superblock names it.
    if let Ok(items) = read_chunks(&mut nodes, &superblock, &mut Vec::new()) {
        named.extend(items.iter().map(DeviceItem::identity));
        named.extend(nodes.volume.chunks.devices());
    }
    Ok(named.difference(&present).take(MAX_DEVICES).copied().collect())
}

/// Reads the chunk tree: all chunks, and the devices. A chunk that is not understood costs what it holds.
fn read_chunks(
    nodes: &mut Nodes,
    superblock: &Superblock,
    remarks: &mut Vec<String>,
) -> Result<Vec<DeviceItem>> {
    let tree = Tree::new(superblock.chunk_root);
    let (mut chunks, mut devices) = (Chunks::default(), Vec::new());
    for item in tree.items(nodes, Key::FIRST) {
        let item = item?;
        match (item.key.object, item.key.kind) {
            (object::CHUNKS, kind::CHUNK) => {
                let chunk = Chunk::parse(item.key.offset, item.data());
                match chunk.and_then(|chunk| chunks.add(chunk)) {
                    Err(error) if remarks.len() < REMARK_LIMIT => remarks.push(error.to_string()),
                    Ok(()) | Err(_) => {}
                }
            }
            (object::DEVICES, kind::DEVICE) if devices.len() < MAX_DEVICES => {
                devices.push(DeviceItem::parse(item.data()));
            }
            _ => {}
        }
    }
    nodes.volume.chunks = chunks;
    Ok(devices)
}
