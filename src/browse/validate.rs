//! Validates and sanitises a worker's answers.
//!
//! A compromised worker can answer anything. Promises: accepted answers take a bounded amount of memory,
//! their names are valid names, and every walk over them ends. The limits are those that honest parsers keep;
//! anything beyond them is a protocol violation.

use std::collections::HashSet;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::inspect::{FstabEntry, OperatingSystem};
use crate::guest::luks::Unlocked;
use crate::guest::volumes::{
    MissingMembers, Partition, SetMember, Volume, VolumeLayout, VolumeMapping, VolumeSegment,
};
use crate::guest::{DirectoryEntry, ExtendedAttribute, FileRun, TOP_LEVEL_SUFFIX};

use super::worker::protocol::LIST_LEN;
use super::worker::{Listing, Mounted};

/// Bytes of a name in a directory at most: FAT's longest, in UTF-8.
const NAME_LEN: usize = 1024;
/// Bytes of a volume's name, and of any other text, at most.
const VOLUME_NAME_LEN: usize = 255;
const TEXT_LEN: usize = 4096;
/// Volumes of a set, and its other lists, at most.
const VOLUMES: usize = 1 << 14;
const PARTITIONS: usize = 256;
const SEGMENTS: usize = 1 << 18;
const REMARKS: usize = 128;
const MOUNTS: usize = 256;
const SYSTEMS: usize = 64;
/// Paths of a file system's trees.
const TREE_PATHS: usize = 8;
/// Members of volume groups and arrays on one disk, and missing ones altogether.
const SET_MEMBERS: usize = 1024;
/// Extended attributes of one inode; bytes of a name and of a value, which damage can make longer than the
/// kernel's limits.
const ATTRIBUTES: usize = 8192;
const ATTRIBUTE_NAME_LEN: usize = 300;
const ATTRIBUTE_LEN: usize = 1 << 17;
/// Opened containers of a set, and ranges of data of one.
const CONTAINERS: usize = 64;
/// Volume keys of one container, and bytes of one, at most.
const VOLUME_KEYS: usize = 32;
const VOLUME_KEY_LEN: usize = 512;

/// The error for an answer that does not match the request.
pub(super) fn protocol_violation() -> Error {
    Error::new(ErrorKind::Io, "protocol violation by a file-system worker")
}

fn check(is_good: bool) -> Result<()> {
    // G6: an answer beyond the limits is refused.
    if is_good { Ok(()) } else { Err(protocol_violation()) }
}

fn is_text(text: &str) -> bool {
    text.len() <= TEXT_LEN
}

fn are_texts<'a>(texts: impl IntoIterator<Item = &'a Option<String>>) -> bool {
    texts.into_iter().flatten().all(|text| is_text(text))
}

fn are_remarks(remarks: &[String]) -> bool {
    remarks.len() <= REMARKS && remarks.iter().all(|remark| is_text(remark))
}

/// Validates the layout of a disk of `size` bytes and the disks assembled with it.
pub(super) fn check_layout(layout: &VolumeLayout, size: u64) -> Result<()> {
    let mut numbers = HashSet::new();
    let is_partition = |partition: &Partition| {
        let is_within = partition.start.checked_add(partition.len).is_some_and(|end| end <= size);
        let texts = [&partition.name, &partition.uuid];
        (is_within || partition.len == 0) && are_texts(texts) && is_text(&partition.type_name)
    };
    let partitions = &layout.partitions;
    check(partitions.len() <= PARTITIONS && partitions.iter().all(is_partition))?;
    check(partitions.iter().all(|partition| numbers.insert(partition.number)))?;
    let mut names = HashSet::new();
    let is_volume = |volume: &Volume| {
        is_volume_name(&volume.name) && are_texts([&volume.label, &volume.uuid, &volume.problem])
    };
    let volumes = &layout.volumes;
    check(volumes.len() <= VOLUMES && volumes.iter().all(is_volume))?;
    check(volumes.iter().all(|volume| names.insert(volume.name.as_str())))?;
    check(
        volumes.iter().flat_map(|volume| &volume.segments).map(VolumeSegment::weight).sum::<usize>()
            <= SEGMENTS,
    )?;
    check(are_remarks(&layout.remarks) && are_texts([&layout.table]))?;
    check(layout.missing.iter().map(|group| group.absent.len()).sum::<usize>() <= SET_MEMBERS)?;
    let is_group = |group: &MissingMembers| {
        let is_absent = |id: &String| is_text(id);
        is_text(&group.name) && is_text(&group.id) && group.absent.iter().all(is_absent)
    };
    check(layout.missing.len() <= SET_MEMBERS && layout.missing.iter().all(is_group))?;
    check(layout.locked.len() <= volumes.len())?;
    check(layout.locked.iter().all(|locked| locked.volume < volumes.len()))?;
    // Reading a volume leads down to a volume of a lower index, each time.
    let containers = &layout.containers;
    check(containers.len() <= CONTAINERS)?;
    check(containers.iter().all(|open| open.data.len() <= CONTAINERS && open.volume < volumes.len()))?;
    let is_down = |index: usize, segment: &VolumeSegment| match &segment.place {
        VolumeMapping::Encrypted(position) => {
            containers.get(position.container as usize).is_some_and(|open| open.volume < index)
        }
        _ => true,
    };
    check(
        volumes
            .iter()
            .enumerate()
            .all(|(index, volume)| volume.segments.iter().all(|segment| is_down(index, segment))),
    )
}

/// Validates what has become of an attempt to unlock a volume.
pub(super) fn check_unlocked(unlocked: &Unlocked) -> Result<()> {
    check(match unlocked {
        Unlocked::Keys(keys) => {
            keys.len() <= VOLUME_KEYS && keys.all().all(|key| key.bytes().len() <= VOLUME_KEY_LEN)
        }
        Unlocked::NoKeyFits => true,
        Unlocked::Problem(sentence) => is_text(sentence),
    })
}

/// Names of volumes become names of directories, and targets of the link to the operating system's volume.
fn is_volume_name(name: &str) -> bool {
    let is_known =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '.' | '-' | '~' | '!' | '#');
    let number = name.strip_prefix('p').unwrap_or_default();
    let is_partition = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let is_logical = name.contains('-') && name.chars().all(is_known);
    // `md0`, and its partitions (`md0p1`).
    let is_array = name
        .strip_prefix("md")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()) && rest.chars().all(is_known));
    (name == "disk" || is_partition || is_logical || is_array) && name.len() <= VOLUME_NAME_LEN
}

/// Validates the members of volume groups and arrays on a disk.
pub(super) fn check_set_members(found: &[SetMember]) -> Result<()> {
    let is_one = |held: &SetMember| is_text(&held.id) && are_texts([&held.set]);
    check(found.len() <= SET_MEMBERS && found.iter().all(is_one))
}

/// Validates the answer about a file system.
pub(super) fn check_mounted(mounted: &Mounted) -> Result<()> {
    let Mounted { root: _, statistics, remarks, stale, trees } = mounted;
    let are_paths = trees.paths.len() <= TREE_PATHS && trees.paths.iter().all(|path| is_text(path));
    check(are_paths && are_texts([&trees.main]))?;
    // Programs divide by it.
    check(statistics.block_size > 0 && are_remarks(remarks) && are_remarks(stale))
}

/// Validates the operating systems on some volumes, and removes those of volumes that do not exist.
pub(super) fn check_systems(systems: &mut Vec<OperatingSystem>, layout: &VolumeLayout) -> Result<()> {
    let is_one = |found: &OperatingSystem| {
        let OperatingSystem {
            root,
            tree: _,
            reason: _,
            fstab_root,
            id,
            name,
            version,
            pretty_name,
            host_name,
            machine_id,
            architecture,
            mounts,
        } = found;
        let is_mount = |mount: &FstabEntry| {
            let words = [&mount.device, &mount.directory, &mount.kind, &mount.options];
            words.into_iter().all(|word| is_text(word)) && are_texts([&mount.place])
        };
        are_texts([fstab_root, id, name, version, pretty_name, host_name, machine_id, architecture])
            && root.len() <= TEXT_LEN
            && mounts.len() <= MOUNTS
            && mounts.iter().all(is_mount)
    };
    check(systems.len() <= SYSTEMS && systems.iter().all(is_one))?;
    systems.retain(|system| {
        let volume = layout.volumes.get(system.tree.volume);
        volume.is_some_and(|volume| is_place(&system.root, &volume.name))
    });
    Ok(())
}

/// Whether a path leads to the root of a tree of this volume: it becomes the target of a symbolic link.
fn is_place(path: &[u8], volume: &str) -> bool {
    let Some(rest) = path.strip_prefix(volume.as_bytes()) else { return false };
    let rest = rest.strip_prefix(TOP_LEVEL_SUFFIX.as_bytes()).unwrap_or(rest);
    let mut names = rest.split(|byte| *byte == b'/');
    names.next() == Some(b"") && names.all(is_presentable_name)
}

/// Validates a part of a directory and removes the entries that cannot be shown. Each entry's position is
/// after the one before, so that every listing ends.
pub(super) fn sanitise_listing(mut listing: Listing, from: u64) -> Result<Listing> {
    check(listing.entries.len() <= LIST_LEN)?;
    let mut before = from;
    for listed in &listing.entries {
        let next = listed.entry.next;
        check(next > before && next < DirectoryEntry::NEXT_LIMIT - 2)?;
        before = next;
    }
    listing.entries.retain(|listed| is_presentable(&listed.entry));
    if listing.entries.is_empty() && !listing.ends {
        return Err(Error::new(ErrorKind::Corrupt, "a directory with many names that cannot be shown"));
    }
    Ok(listing)
}

/// Whether an entry can be shown unchanged.
fn is_presentable(entry: &DirectoryEntry) -> bool {
    is_presentable_name(&entry.name)
}

fn is_presentable_name(name: &[u8]) -> bool {
    let is_name = !matches!(name, b"" | b"." | b"..") && name.len() <= NAME_LEN;
    is_name && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// Validates all extended attributes of an inode.
pub(super) fn check_extended_attributes(found: &[ExtendedAttribute]) -> Result<()> {
    let is_one = |attribute: &ExtendedAttribute| {
        (1..=ATTRIBUTE_NAME_LEN).contains(&attribute.name.len())
            && !attribute.name.contains(&0)
            && attribute.value.len() <= ATTRIBUTE_LEN
    };
    check(found.len() <= ATTRIBUTES && found.iter().all(is_one))
}

/// `Err` unless each run has bytes, and the sum of their lengths does not overflow.
pub(super) fn check_runs(at: u64, runs: &[FileRun]) -> Result<()> {
    let end = |end: u64, run: &FileRun| end.checked_add(run.len).filter(|_| run.len > 0);
    runs.iter().try_fold(at, end).map(drop).ok_or_else(protocol_violation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browse::ListedEntry;
    use crate::guest::Ino;
    use crate::guest::content::VolumeContent;
    use crate::guest::volumes::{DiskPosition, Stripes};

    const SIZE: u64 = 1 << 30;

    fn volume(name: &str) -> Volume {
        let (label, uuid, problem) = (None, None, None);
        Volume {
            name: name.into(),
            size: 0,
            segments: Vec::new(),
            content: VolumeContent::Ext4,
            label,
            uuid,
            problem,
        }
    }

    fn partition(number: u32, start: u64, len: u64) -> Partition {
        let (name, uuid) = (None, None);
        Partition { number, start, len, name, type_name: "Linux".into(), uuid, is_extended: false }
    }

    fn with_volumes(names: &[&str]) -> VolumeLayout {
        VolumeLayout { volumes: names.iter().map(|name| volume(name)).collect(), ..VolumeLayout::default() }
    }

    #[test]
    fn volume_names_are_valid_and_unique() {
        let long = format!("vg-{}", "a".repeat(120));
        let good = with_volumes(&[
            "p1",
            "p15",
            "disk",
            "vg-lv",
            "vg--a-lv.1+b",
            "vg-lv~Zq2hEb-zKAX",
            "md0",
            "md127p2",
            "md-data",
            &long,
        ]);
        check_layout(&good, SIZE).unwrap();
        let bad = [
            "",
            ".",
            "..",
            "root",
            "volumes.txt",
            "p",
            "p1/..",
            "../../../etc",
            "a-b/c",
            "a-b\0",
            "a-b\n",
            "p1 ",
            "md",
            "md0/..",
        ];
        for name in bad {
            assert!(check_layout(&with_volumes(&[name]), SIZE).is_err(), "{name:?}");
        }
        assert!(check_layout(&with_volumes(&["p1", "p1"]), SIZE).is_err());
    }

    #[test]
    fn partitions_lie_within_the_disk() {
        let layout = |partitions| VolumeLayout { partitions, ..VolumeLayout::default() };
        check_layout(&layout(vec![partition(1, 512, SIZE - 512), partition(2, SIZE * 2, 0)]), SIZE).unwrap();
        for (start, len) in [(512, SIZE), (SIZE, 1), (u64::MAX, 2), (1 << 63, 1 << 63)] {
            assert!(check_layout(&layout(vec![partition(1, start, len)]), SIZE).is_err(), "{start} + {len}");
        }
        assert!(check_layout(&layout(vec![partition(1, 0, 1), partition(1, 1, 1)]), SIZE).is_err());
    }

    #[test]
    fn layouts_are_bounded() {
        let many = |count| VolumeLayout { remarks: vec!["a".into(); count], ..VolumeLayout::default() };
        check_layout(&many(101), SIZE).unwrap();
        assert!(check_layout(&many(1000), SIZE).is_err());
        let long = VolumeLayout { remarks: vec!["a".repeat(1 << 20)], ..VolumeLayout::default() };
        assert!(check_layout(&long, SIZE).is_err());
        let legs = vec![Some(DiskPosition { disk: 0, offset: 0 }); SEGMENTS];
        let place = VolumeMapping::Striped(Stripes { chunk_len: 1, row_len: 1, start: 0, legs });
        let mut striped = with_volumes(&["a-b"]);
        striped.volumes[0].segments = vec![VolumeSegment { at: 0, len: 1, place }];
        assert!(check_layout(&striped, SIZE).is_err());
    }

    fn listing(entries: &[(&str, u64)], ends: bool) -> Listing {
        let listed = |(name, next): &(&str, u64)| {
            let entry =
                DirectoryEntry { name: name.as_bytes().to_vec(), ino: Ino(2), kind: None, next: *next };
            ListedEntry { entry, attributes: None, is_plain: false, crossing: None }
        };
        Listing { entries: entries.iter().map(listed).collect(), ends }
    }

    #[test]
    fn a_root_lies_within_its_volume() {
        for good in ["p2", "p2/@", "p2.subvolumes", "p2.subvolumes/@/.snapshots/1/snapshot", "p2/..."] {
            assert!(is_place(good.as_bytes(), "p2"), "{good}");
        }
        for bad in ["", "p", "p1", "p21", "p2.", "p2/", "p2/..", "p2/a/../..", "p2//a", "p2/a\0", "/p2"] {
            assert!(!is_place(bad.as_bytes(), "p2"), "{bad:?}");
        }
    }

    #[test]
    fn a_listing_moves_forward_and_has_valid_names() {
        let names =
            |found: Listing| found.entries.into_iter().map(|listed| listed.entry.name).collect::<Vec<_>>();
        let mixed = [("a", 6), ("..", 7), ("b/c", 8), ("", 9), ("d\0", 10), ("e", 11)];
        assert_eq!(names(sanitise_listing(listing(&mixed, false), 5).unwrap()), [b"a", b"e"]);
        for places in [[6, 6], [6, 5], [5, 6], [6, u64::MAX]] {
            let entries = [("a", places[0]), ("b", places[1])];
            assert!(sanitise_listing(listing(&entries, false), 5).is_err(), "{places:?}");
        }
        // No entry is left, and the listing does not end: that is an error.
        assert!(sanitise_listing(listing(&[("/", 6)], false), 5).is_err());
        assert!(sanitise_listing(listing(&[("/", 6)], true), 5).unwrap().entries.is_empty());
        assert!(sanitise_listing(listing(&[], false), 5).is_err());
    }
}
