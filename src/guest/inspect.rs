//! Finds the volume with the operating system and describes the system, from files that every distribution
//! has, like guestfish(1)'s inspection.
//!
//! Promises:
//! - Links are followed within the volume only.
//! - Every file is read up to a limit.
//! - Every returned text is short and without control characters.

mod path;
mod system;

use serde::{Deserialize, Serialize};

use crate::guest::FileSystem;

pub use path::{read_text, resolve_path};

/// A volume with an open file system.
#[derive(Clone, Copy)]
pub struct OpenedVolume<'a> {
    /// Its name in the layout: `p1`, `vg-root`.
    pub name: &'a str,
    /// Its files.
    pub files: &'a dyn FileSystem,
    /// The value of `LABEL=` in an fstab.
    pub label: Option<&'a str>,
    /// The value of `UUID=`.
    pub uuid: Option<&'a str>,
    /// The value of `PARTUUID=`, if it is a partition.
    pub partition_uuid: Option<&'a str>,
    /// The value of `PARTLABEL=`.
    pub partition_label: Option<&'a str>,
}

/// An operating system on a guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatingSystem {
    /// The volume that holds its root directory.
    pub volume: String,
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

/// A line of an fstab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FstabEntry {
    /// The device as written: `UUID=...`, `/dev/vda1`.
    pub device: String,
    /// The volume of that device.
    pub volume: Option<String>,
    /// Where it is mounted.
    pub directory: String,
    /// The file system's type.
    pub kind: String,
    /// The options.
    pub options: String,
}

/// The operating systems on these volumes, in their order. Callers that show only one show the first.
pub fn inspect(volumes: &[OpenedVolume<'_>]) -> Vec<OperatingSystem> {
    volumes.iter().filter_map(|volume| system::find(volume, volumes)).collect()
}

#[cfg(test)]
mod tests;
