//! The log trees: what fsync(2) wrote since the last commit.
//!
//! Each subvolume with synced files has a log tree, with copies of their items. When the kernel mounts a file
//! system with logs, it merges them into the subvolumes. Here the same steps, in the same order, make changes
//! in memory, above the trees: see [`replay::Replay`].
//!
//! A log that cannot be replayed is a remark, and its subvolume is shown as of the last commit.

mod content;
mod links;
mod names;
mod replay;

use crate::error::{Error, Result};

use super::Shared;
use super::format::{Key, is_fact, kind, object};
use super::subvolumes::RootItem;
use super::tree::{OVERLAY_LIMIT, Tree};

use replay::Replay;

/// Replays all logs. The result are remarks that say that the shown state is old.
pub(super) fn replay(shared: &mut Shared) -> Result<Vec<String>> {
    let mut stale = Vec::new();
    let Some(pointer) = shared.superblock.log_root else { return Ok(stale) };
    let logs = match find(shared, &Tree::new(pointer)) {
        Ok(logs) => logs,
        Err(error) => return remark(&mut stale, None, error).map(|()| stale),
    };
    let mut room = OVERLAY_LIMIT;
    for (id, item) in logs {
        // A subvolume that is deleted needs nothing.
        let Some(index) = shared.index_of(id) else { continue };
        let log = Tree::new(item.pointer);
        let sums = match read_sums(shared, &log, room) {
            Ok(sums) => sums,
            Err(error) => {
                remark(&mut stale, Some(id), error)?;
                continue;
            }
        };
        let tree = shared.subvolumes[index].tree.as_stored();
        match Replay::new(&shared.nodes, &shared.superblock, tree, &log, room).run() {
            Ok(tree) => {
                room = room.saturating_sub(tree.overlay_weight());
                shared.subvolumes[index].tree = tree;
                for (at, bytes) in sums {
                    room = room.saturating_sub(bytes.len());
                    shared.sums.add(at, bytes);
                }
            }
            Err(error) => remark(&mut stale, Some(id), error)?,
        }
    }
    Ok(stale)
}

/// The logs, by the numbers of their subvolumes.
fn find(shared: &Shared, logs: &Tree) -> Result<Vec<(u64, RootItem)>> {
    let first = Key::new(object::TREE_LOG, kind::ROOT, 0);
    let items = logs.items_beside(&shared.nodes, first);
    items
        .map(|item| {
            let item = item?;
            Ok((item.key.offset, RootItem::parse(item.key.offset, item.data())?))
        })
        .collect()
}

/// The checksums of data in a log, by addresses.
fn read_sums(shared: &Shared, log: &Tree, room: usize) -> Result<Vec<(u64, Vec<u8>)>> {
    let first = Key::new(object::CHECKSUMS, kind::EXTENT_CSUM, 0);
    let mut len = 0;
    let items = log.items_beside(&shared.nodes, first);
    items
        .map(|item| {
            let item = item?;
            len += item.data().len();
            if len > room {
                return Err(super::format::limit("the log has too many checksums"));
            }
            Ok((item.key.offset, item.data().to_vec()))
        })
        .collect()
}

/// Adds the remark that a log cannot be replayed; an error that is no fact is passed on.
fn remark(stale: &mut Vec<String>, subvolume: Option<u64>, error: Error) -> Result<()> {
    if !is_fact(&error) {
        return Err(error);
    }
    let which = subvolume.map_or_else(|| "the log".to_owned(), |id| format!("the log of subvolume {id}"));
    stale.push(format!(
        "{which} cannot be replayed ({error}): changes synced since the last commit are missing"
    ));
    Ok(())
}
