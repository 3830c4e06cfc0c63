//! Which of the trees are roots of systems, and which of these is the one that boots.
//!
//! A snapshot of a root is a root as well, as is a container's. In front is, in this order: what its own
//! fstab mounts as `/`; what is named by a boot loader; a default subvolume; what comes first. Last are those
//! whose fstab mounts another one.

use crate::guest::TreeId;

use super::fstab::shown;
use super::system::{FoundSystem, find};
use super::{OpenedVolume, OperatingSystem, RootReason, boot};

/// Trees that are looked into. Those with the shortest paths come first.
const TREE_LIMIT: usize = 256;
/// Systems that are returned.
const SYSTEM_LIMIT: usize = 64;

/// What decides the order of systems; less is better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    fstab: FstabRank,
    is_not_booted: bool,
    is_not_default: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum FstabRank {
    /// It mounts this root.
    Own,
    /// It does not say, or names what is not there.
    Unknown,
    /// It mounts the root of another system.
    Other,
}

/// The operating systems on these volumes, the one that boots first.
pub fn inspect(volumes: &[OpenedVolume<'_>]) -> Vec<OperatingSystem> {
    let mut systems: Vec<FoundSystem> =
        trees(volumes).into_iter().filter_map(|tree| find(tree, volumes)).take(SYSTEM_LIMIT).collect();
    let known: Vec<TreeId> = systems.iter().map(|found| found.system.tree).collect();
    let fstab = |found: &FoundSystem| match found.fstab_root {
        Some(root) if root == found.system.tree => FstabRank::Own,
        Some(root) if known.contains(&root) => FstabRank::Other,
        Some(_) | None => FstabRank::Unknown,
    };
    let best = systems.iter().map(fstab).min();
    let has_rivals = systems.iter().filter(|found| Some(fstab(found)) == best).count() > 1;
    let booted = if has_rivals { booted(volumes, &known) } else { Vec::new() };
    let rank = |found: &FoundSystem| Rank {
        fstab: fstab(found),
        is_not_booted: !booted.contains(&found.system.tree),
        is_not_default: found.system.tree.subvolume != 0,
    };
    let ranks: Vec<Rank> = systems.iter().map(rank).collect();
    for (found, rank) in systems.iter_mut().zip(&ranks) {
        let other = found.fstab_root.filter(|_| rank.fstab == FstabRank::Other);
        let place = other.and_then(|TreeId { volume, subvolume }| volumes.get(volume)?.place(subvolume));
        found.system.fstab_root = place.and_then(|place| shown(&place));
    }
    let mut order: Vec<(Rank, OperatingSystem)> =
        ranks.into_iter().zip(systems.into_iter().map(|found| found.system)).collect();
    order.sort_by_key(|(rank, _)| *rank);
    if let [(first, _), (second, _), ..] = order[..] {
        order[0].1.reason = reason(first, second);
    }
    order.into_iter().map(|(_, system)| system).collect()
}

/// Why the first is in front of the second.
fn reason(first: Rank, second: Rank) -> RootReason {
    if first.fstab != second.fstab && first.fstab == FstabRank::Own {
        RootReason::Fstab
    } else if first.fstab == second.fstab && first.is_not_booted != second.is_not_booted {
        RootReason::BootLoader
    } else if first.fstab == second.fstab && first.is_not_default != second.is_not_default {
        RootReason::DefaultSubvolume
    } else {
        RootReason::First
    }
}

/// The trees that are looked into: those that are shown as volumes, and then the others.
fn trees(volumes: &[OpenedVolume<'_>]) -> Vec<TreeId> {
    let mut all: Vec<(usize, TreeId)> = Vec::new();
    for (volume, opened) in volumes.iter().enumerate() {
        for (subvolume, tree) in (0..).zip(opened.trees) {
            let names = tree.path.iter().flatten().filter(|byte| **byte == b'/').count();
            let depth = if subvolume == 0 { 0 } else { names + 1 };
            all.push((depth, TreeId { volume, subvolume }));
        }
    }
    all.sort_by_key(|(depth, tree)| (*depth, tree.volume, tree.subvolume));
    all.into_iter().map(|(_, tree)| tree).take(TREE_LIMIT).collect()
}

/// What boot loaders name, in the volumes and in the systems.
fn booted(volumes: &[OpenedVolume<'_>], systems: &[TreeId]) -> Vec<TreeId> {
    let shown = (0..volumes.len()).map(TreeId::main);
    let places = shown.chain(systems.iter().copied().filter(|tree| tree.subvolume != 0));
    let files = |TreeId { volume, subvolume }: TreeId| volumes[volume].trees.get(subvolume as usize);
    places.filter_map(files).flat_map(|tree| boot::roots(&*tree.files, volumes)).collect()
}
