//! The volumes that the device names of a system mean: in its fstab, in its crypttab, and on the command line
//! of its kernel.

use crate::guest::FileSystem;
use crate::guest::content::VolumeContent;

use super::OpenedVolume;
use super::path::read_text;
use super::system::{FILE_LIMIT, unquoted};

/// Lines of a crypttab.
const CRYPTTAB_LIMIT: usize = 256;

/// The encrypted volumes that a system opens (crypttab(5)).
#[derive(Default)]
pub(super) struct Crypttab {
    /// The name in `/dev/mapper`, and the encrypted device.
    lines: Vec<(String, String)>,
}

impl Crypttab {
    /// That of the system with this root.
    pub(super) fn read(root: &dyn FileSystem) -> Self {
        let text = read_text(root, "/etc/crypttab", FILE_LIMIT).unwrap_or_default();
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let name = words.next().filter(|name| !name.starts_with('#'))?;
            Some((name.to_owned(), words.next()?.to_owned()))
        };
        Self { lines: text.lines().filter_map(line).take(CRYPTTAB_LIMIT).collect() }
    }

    fn device(&self, name: &str) -> Option<&str> {
        self.lines.iter().find(|(known, _)| known == name).map(|(_, device)| device.as_str())
    }
}

/// The index of the volume that a device name means. Disk names (`/dev/vda1`) change between boots; partition
/// numbers do not, and only one disk is inspected.
pub(super) fn find_device(device: &str, crypttab: &Crypttab, all: &[OpenedVolume<'_>]) -> Option<usize> {
    if let Some((name, value)) = device.split_once('=') {
        return tagged(name, &unquoted(value), all);
    }
    let name = device.strip_prefix("/dev/")?;
    if let Some((by, value)) = name.strip_prefix("disk/by-").and_then(|rest| rest.split_once('/')) {
        // udev writes what is not plain in a label as `\x20`.
        return if by == "id" {
            by_id(value, crypttab, all)
        } else {
            tagged(&by.to_uppercase(), &unhexed(value), all)
        };
    }
    if let Some(name) = name.strip_prefix("mapper/") {
        return mapped(name, crypttab, all);
    }
    if let Some(array) = name.strip_prefix("md/") {
        return array_named(array, all);
    }
    if name.starts_with("md") {
        return find(all, |volume| volume.name == name);
    }
    if let Some((group, volume)) = name.split_once('/') {
        let mapped = format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"));
        return find(all, |volume| volume.name == mapped);
    }
    let disks = ["sd", "vd", "hd", "xvd", "nvme", "mmcblk"];
    let number = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    let number = if name.starts_with("nvme") || name.starts_with("mmcblk") {
        name.rsplit_once('p')?.1
    } else {
        number
    };
    if !disks.iter().any(|disk| name.starts_with(disk)) {
        return None;
    }
    let wanted = if number.is_empty() { "disk".to_owned() } else { format!("p{number}") };
    find(all, |volume| volume.name == wanted)
}

fn find(all: &[OpenedVolume<'_>], is_it: impl Fn(&OpenedVolume<'_>) -> bool) -> Option<usize> {
    all.iter().position(is_it)
}

/// By `UUID=` and its like. An encrypted volume is named by what opens it, and by a crypttab.
fn tagged(tag: &str, value: &str, all: &[OpenedVolume<'_>]) -> Option<usize> {
    let same = |one: Option<&str>| one.is_some_and(|one| one.eq_ignore_ascii_case(value));
    match tag {
        "UUID" => find(all, |volume| same(volume.uuid)),
        "LABEL" => find(all, |volume| volume.label == Some(value)),
        "PARTUUID" => find(all, |volume| same(volume.partition_uuid)),
        "PARTLABEL" => find(all, |volume| volume.partition_label == Some(value)),
        _ => None,
    }
}

/// A name in `/dev/mapper`: a logical volume's, or that of an opened encrypted volume.
fn mapped(name: &str, crypttab: &Crypttab, all: &[OpenedVolume<'_>]) -> Option<usize> {
    if let Some(found) = find(all, |volume| volume.name == name) {
        return Some(found);
    }
    let container = match (crypttab.device(name), name.strip_prefix("luks-")) {
        // The container may be a logical volume, and not another encrypted volume.
        (Some(device), _) => find_device(device, &Crypttab::default(), all),
        // As systemd and Fedora's installer name it.
        (None, Some(uuid)) => tagged("UUID", uuid, all),
        (None, None) => None,
    };
    unlocked(container?, all)
}

/// The volume inside of the encrypted one with this index: the worker names it `luks-UUID`.
fn unlocked(container: usize, all: &[OpenedVolume<'_>]) -> Option<usize> {
    let OpenedVolume { content, uuid, .. } = all[container];
    let is_encrypted = matches!(content, VolumeContent::Luks1 | VolumeContent::Luks2);
    let name = format!("luks-{}", uuid.filter(|_| is_encrypted)?);
    find(all, |volume| volume.name.eq_ignore_ascii_case(&name))
}

fn array_named(name: &str, all: &[OpenedVolume<'_>]) -> Option<usize> {
    // The name of an array of another host begins with the host's.
    let name = name.rsplit_once(':').map_or(name, |(_, name)| name);
    find(all, |volume| volume.name.strip_prefix("md-").or(volume.name.strip_prefix("md")) == Some(name))
}

/// udev's names by identity, as far as the disk itself determines them.
fn by_id(name: &str, crypttab: &Crypttab, all: &[OpenedVolume<'_>]) -> Option<usize> {
    if let Some(name) = name.strip_prefix("dm-name-") {
        return mapped(name, crypttab, all);
    }
    if let Some(name) = name.strip_prefix("md-name-") {
        return array_named(name, all);
    }
    // `dm-uuid-CRYPT-LUKS2-0123456789abcdef0123456789abcdef-NAME`
    let rest = name.strip_prefix("dm-uuid-CRYPT-LUKS")?.split_once('-')?.1;
    let id = rest.split('-').next()?;
    let plain = |uuid: &str| uuid.replace('-', "");
    let container = find(all, |volume| volume.uuid.is_some_and(|uuid| plain(uuid).eq_ignore_ascii_case(id)))?;
    unlocked(container, all)
}

/// Text with udev's `\x20` replaced.
fn unhexed(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = rest.strip_prefix(b"\\x").and_then(|digits| std::str::from_utf8(digits.get(..2)?).ok());
        if let Some(byte) = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            bytes.push(byte);
            rest = &rest[4..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
