//! The mounts of a system: its fstab, and the trees that the lines mean.

use crate::guest::{FileSystem, Subvolume, TreeId};

use super::device::{Crypttab, find_device};
use super::path::read_text;
use super::system::{FILE_LIMIT, bounded, unquoted};
use super::{FstabEntry, OpenedVolume};

/// Lines of an fstab.
const MOUNT_LIMIT: usize = 256;

/// A line of an fstab, and the tree that it mounts.
pub(super) struct Mount {
    pub(super) entry: FstabEntry,
    pub(super) tree: Option<TreeId>,
}

/// The mounts of the fstab of the system with this root.
pub(super) fn mounts(root: &dyn FileSystem, all: &[OpenedVolume<'_>]) -> Vec<Mount> {
    let Some(text) = read_text(root, "/etc/fstab", FILE_LIMIT) else { return Vec::new() };
    let crypttab = Crypttab::read(root);
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mount = |line: &str| {
        let mut fields = line.split_whitespace().map(|field| unescaped(&unquoted(field)));
        let device = bounded(&fields.next()?)?;
        let directory = bounded(&fields.next()?)?;
        let mut word = || fields.next().and_then(|field| bounded(&field)).unwrap_or_default();
        let (kind, options) = (word(), word());
        let volume = find_device(&device, &crypttab, all);
        let tree =
            volume.and_then(|volume| Some(TreeId { volume, subvolume: tree(&all[volume], &options)? }));
        let place = match (volume, tree) {
            // Swap, for example.
            (Some(volume), None) if all[volume].trees.is_empty() => Some(all[volume].name.to_owned()),
            (_, Some(TreeId { volume, subvolume })) => {
                all[volume].place(subvolume).and_then(|place| shown(&place))
            }
            _ => None,
        };
        Some(Mount { entry: FstabEntry { device, place, directory, kind, options }, tree })
    };
    lines.filter_map(mount).take(MOUNT_LIMIT).collect()
}

/// A path as a bounded text.
pub(super) fn shown(place: &[u8]) -> Option<String> {
    bounded(&String::from_utf8_lossy(place))
}

/// The tree of a volume that is mounted with these options: `subvol=`, `subvolid=`, or the default.
pub(super) fn tree(volume: &OpenedVolume<'_>, options: &str) -> Option<u32> {
    let find =
        |is_it: &dyn Fn(&Subvolume) -> bool| volume.trees.iter().position(is_it).map(|index| index as u32);
    let value =
        |key: &str| options.split(',').rev().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let names = |path: &[u8]| -> Vec<Vec<u8>> {
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        names.map(<[u8]>::to_vec).collect()
    };
    if let Some(path) = value("subvol") {
        let wanted = names(path.as_bytes());
        // The number changes when a subvolume is restored from a snapshot, and the path stays.
        let found = find(&|tree| tree.path.as_deref().is_some_and(|path| names(path) == wanted));
        if found.is_some() {
            return found;
        }
    }
    if let Some(id) = value("subvolid") {
        // 0 is another number of the top level.
        let top_level = Subvolume::top_level(volume.trees) as u32;
        let id = id.parse::<u64>().ok()?;
        return if id == 0 { Some(top_level) } else { find(&|tree| tree.id == id) };
    }
    (value("subvol").is_none() && !volume.trees.is_empty()).then_some(0)
}

/// An fstab writes a space as `\040`.
fn unescaped(field: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail
            .get(..3)
            .filter(|digits| *first == b'\\' && digits.iter().all(|digit| (b'0'..b'8').contains(digit)));
        let (byte, next) = match digits {
            Some(digits) => {
                (digits.iter().fold(0u8, |byte, digit| byte.wrapping_mul(8) + (digit - b'0')), &tail[3..])
            }
            None => (*first, tail),
        };
        bytes.push(byte);
        rest = next;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
