//! Finds the trees with operating systems and describes the systems, from files that every distribution has,
//! like guestfish(1)'s inspection.
//!
//! Promises:
//! - Links are followed within their tree only.
//! - Every file is read up to a limit, and so are the trees that are looked into.
//! - Every returned text is short and without control characters.

mod boot;
mod device;
mod fstab;
mod path;
mod roots;
mod system;

use serde::{Deserialize, Serialize};

use super::content::VolumeContent;
use super::{Subvolume, TOP_LEVEL_SUFFIX, TreeId};

pub use path::{read_text, resolve_path};
pub use roots::inspect;

/// A volume, with its trees if it has an open file system.
#[derive(Clone, Copy, Debug)]
pub struct OpenedVolume<'a> {
    /// Its name in the layout: `p1`, `vg-root`.
    pub name: &'a str,
    /// Its trees; the first is shown as the volume. Empty if it has no files that can be shown.
    pub trees: &'a [Subvolume],
    /// Its content.
    pub content: VolumeContent,
    /// The value of `LABEL=` in an fstab.
    pub label: Option<&'a str>,
    /// The value of `UUID=`.
    pub uuid: Option<&'a str>,
    /// The value of `PARTUUID=`, if it is a partition.
    pub partition_uuid: Option<&'a str>,
    /// The value of `PARTLABEL=`.
    pub partition_label: Option<&'a str>,
}

impl OpenedVolume<'_> {
    /// The path of a tree in the directory of a view's volumes, if there is one.
    fn place(&self, tree: u32) -> Option<Vec<u8>> {
        let own = self.name.as_bytes();
        let path = self.trees.get(tree as usize)?.path.as_deref();
        let top_level = Subvolume::top_level(self.trees);
        Some(match path {
            _ if tree == 0 => own.to_vec(),
            Some(path) if top_level == 0 => [own, b"/", path].concat(),
            Some(b"") => [own, TOP_LEVEL_SUFFIX.as_bytes()].concat(),
            Some(path) => [own, TOP_LEVEL_SUFFIX.as_bytes(), b"/", path].concat(),
            None => return None,
        })
    }
}

/// An operating system on a guest's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatingSystem {
    /// The path of its root directory in the directory of a view's volumes: `p1`, `p2/@`.
    pub root: Vec<u8>,
    /// The tree that its root directory is the root of.
    pub tree: TreeId,
    /// Why it is in front of the others.
    pub reason: RootReason,
    /// The path of what its fstab mounts as `/`, if that is another system: it is a snapshot or a copy.
    pub fstab_root: Option<String>,
    /// os-release's `ID`: `debian`, `fedora`.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Its full name with its version.
    pub pretty_name: Option<String>,
    /// The machine's host name.
    pub host_name: Option<String>,
    /// systemd's machine ID.
    pub machine_id: Option<String>,
    /// The architecture of its programs in uname(1)'s spelling: `x86_64`, `aarch64`.
    pub architecture: Option<String>,
    /// The mounts of its fstab, in order.
    pub mounts: Vec<FstabEntry>,
}

/// Why a system is in front of the others on the same disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootReason {
    /// There is no other.
    Only,
    /// Its fstab mounts it as `/`.
    Fstab,
    /// A boot loader's entry names it.
    BootLoader,
    /// It is on a volume's default subvolume.
    DefaultSubvolume,
    /// Its volume comes first.
    First,
}

/// A line of an fstab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FstabEntry {
    /// The device as written: `UUID=...`, `/dev/vda1`.
    pub device: String,
    /// The path of the mounted tree in the directory of a view's volumes: `p1`, `p2/@home`. Of what has no
    /// files, the volume's name.
    pub place: Option<String>,
    /// Where it is mounted.
    pub directory: String,
    /// The file system's type.
    pub kind: String,
    /// The options.
    pub options: String,
}

#[cfg(test)]
mod tests;
