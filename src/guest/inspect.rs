//! Which volume holds the operating system, and what that is: told by the files that every distribution has, as
//! guestfish(1)'s inspection does it.
//!
//! Promises: links are followed within the volume only, whatever they say; every file is read up to a limit, every text that
//! is given is short and without control characters.

mod path;
mod system;

use serde::{Deserialize, Serialize};

use crate::guest::FileSystem;

pub use path::{read_text, resolve_path};

/// A volume whose file system has been opened.
#[derive(Clone, Copy)]
pub struct OpenedVolume<'a> {
    /// As in the layout: `p1`, `vg-root`.
    pub name: &'a str,
    /// Its files.
    pub files: &'a dyn FileSystem,
    /// What `LABEL=` of an fstab means.
    pub label: Option<&'a str>,
    /// What `UUID=` means.
    pub uuid: Option<&'a str>,
    /// What `PARTUUID=` means, if it is a partition.
    pub partition_uuid: Option<&'a str>,
    /// What `PARTLABEL=` means.
    pub partition_label: Option<&'a str>,
}

/// An operating system that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatingSystem {
    /// The volume that holds its root directory.
    pub volume: String,
    /// `debian`, `fedora`: os-release's `ID`.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// What it calls itself, version and all.
    pub pretty_name: Option<String>,
    /// What the machine is called.
    pub host_name: Option<String>,
    /// What systemd knows the machine by.
    pub machine_id: Option<String>,
    /// `x86_64`, `aarch64`: uname's word for what its programs run on.
    pub architecture: Option<String>,
    /// What its fstab mounts, in that order.
    pub mounts: Vec<FstabEntry>,
}

/// A line of an fstab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FstabEntry {
    /// As it stands there: `UUID=...`, `/dev/vda1`.
    pub device: String,
    /// The volume that it is.
    pub volume: Option<String>,
    /// Where it is mounted.
    pub directory: String,
    /// The file system's type.
    pub kind: String,
    /// The options.
    pub options: String,
}

/// The operating systems on some volumes, in the order of these. The first is the one to show where one is wanted.
pub fn inspect(volumes: &[OpenedVolume<'_>]) -> Vec<OperatingSystem> {
    volumes.iter().filter_map(|volume| system::find(volume, volumes)).collect()
}

#[cfg(test)]
mod tests;
