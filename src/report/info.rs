//! An image in the terms of `qemu-img info`.
//!
//! The JSON has the keys of QEMU's `ImageInfo`, so that scripts for qemu-img work. Facts that only chainfs
//! knows are in a separate object, `chainfs`. The text is qemu-img's, too.

use super::safe::terminal;
use super::time;
use crate::units::human_size;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

/// One image: `qemu-img info --output=json` prints one, with `--backing-chain` a list from the leaf to the
/// base.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The files of the image: one named "file", and "data-file" if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub children: Option<Vec<ChildInfo>>,
    /// The file's path as the user gave it, or as the backing chain leads to it.
    pub filename: String,
    /// "qcow2", "raw", or "file" for the image's file.
    pub format: String,
    /// Bytes of the disk, or of the file. Absent if the image cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    /// Bytes that the file uses on its file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Bytes of a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether the guest's data is encrypted; absent if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// Whether the image was not closed cleanly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_flag: Option<bool>,
    /// The backing file's name in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The backing file's name, relative to the user's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<Vec<SnapshotInfo>>,
    /// Details of the format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// Facts that only chainfs knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chainfs: Option<LayerInfo>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChildInfo {
    /// "file" or "data-file".
    pub name: String,
    /// The file itself.
    pub info: ImageInfo,
}

/// Details of one format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum FormatSpecific {
    /// A qcow2 image.
    Qcow2(Qcow2Info),
    /// A plain file; QEMU reports no details.
    File(FileInfo),
}

/// Details of a plain file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileInfo {
    /// XFS' extent size hint, where one is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extent_size_hint: Option<u64>,
}

/// Details of a qcow2 image. Version 2 has only the first and the last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// "0.10" is version 2, "1.1" version 3.
    pub compat: String,
    /// "zlib" or "zstd".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression_type: Option<String>,
    /// Whether refcounts may be outdated after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether QEMU marked the image's tables as corrupt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether clusters are divided into subclusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// The external data file's name in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether the data file is a valid raw image on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Dirty bitmaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<Vec<BitmapInfo>>,
    /// How the guest's data is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<serde_json::Value>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// "in-use", "auto".
    pub flags: Vec<String>,
    /// The name from the backup program.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
}

/// An internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// QEMU's number of the snapshot, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of the saved machine state, 0 if none.
    pub vm_state_size: u64,
    /// When it was taken, in seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the machine had been running, in seconds.
    pub vm_clock_sec: u64,
    /// And nanoseconds.
    pub vm_clock_nsec: u32,
    /// Executed instructions, if QEMU counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

/// Facts about a layer that only chainfs knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// The view that shows the disk as of this layer.
    pub view: String,
    /// Chains that share the layer, this one first; of very many, only the first ones.
    pub chains: Vec<String>,
    /// The number of these chains.
    pub chain_count: usize,
    /// Layers above it in this chain.
    pub depth: usize,
    /// Whether the layer is frozen.
    pub frozen: bool,
    /// When chainfs froze it, in seconds since 1970; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_sec: Option<i64>,
    /// And nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_nsec: Option<u32>,
    /// The description that the user gave for the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Images that use it as their backing file.
    pub shared_by: usize,
    /// Internal snapshots that are not listed; absent if all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots_left_out: Option<usize>,
    /// Why the layer, or its backing chain, cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A chain, leaf first, as `qemu-img info --backing-chain` prints it as text.
pub fn human(chain: &[ImageInfo], zone: &TimeZone) -> String {
    let images: Vec<_> = chain.iter().map(|image| one(image, zone)).collect();
    images.join("\n")
}

fn one(image: &ImageInfo, zone: &TimeZone) -> String {
    let mut out = Lines(String::new());
    out.line("image", &image.filename);
    out.line("file format", &image.format);
    let size = |size: u64| format!("{} ({size} bytes)", human_size(size));
    out.line("virtual size", &image.virtual_size.map_or_else(|| "unknown".to_owned(), size));
    out.line("disk size", &image.actual_size.map_or_else(|| "unavailable".to_owned(), human_size));
    if image.encrypted == Some(true) {
        out.line("encrypted", "yes");
    }
    if let Some(len) = image.cluster_size {
        out.line("cluster_size", &len.to_string());
    }
    if image.dirty_flag == Some(true) {
        out.line("cleanly shut down", "no");
    }
    if let Some(backing) = &image.backing_filename {
        match &image.full_backing_filename {
            Some(full) if full != backing => {
                out.line("backing file", &format!("{backing} (actual path: {full})"));
            }
            Some(_) => out.line("backing file", backing),
            None => out.line("backing file", &format!("{backing} (cannot determine actual path)")),
        }
    }
    if let Some(format) = &image.backing_filename_format {
        out.line("backing file format", format);
    }
    if let Some(snapshots) = image.snapshots.as_ref().filter(|all| !all.is_empty()) {
        out.0.push_str("Snapshot list:\n");
        out.0.push_str(&snapshot_list(snapshots, zone));
    }
    match &image.format_specific {
        Some(FormatSpecific::Qcow2(details)) => out.qcow2(details),
        Some(FormatSpecific::File(_)) | None => {}
    }
    if let Some(layer) = &image.chainfs {
        out.layer(layer, zone);
    }
    out.0
}

/// The table of `qemu-img snapshot -l`.
pub fn snapshot_list(snapshots: &[SnapshotInfo], zone: &TimeZone) -> String {
    let mut table =
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n".to_owned();
    for snapshot in snapshots {
        let taken = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(snapshot.date_sec));
        let date = taken.map_or_else(|| "?".to_owned(), |taken| time::second(taken, zone));
        let ran = snapshot.vm_clock_sec;
        let (hours, minutes, seconds) = (ran / 3600, ran / 60 % 60, ran % 60);
        let clock = format!("{hours:04}:{minutes:02}:{seconds:02}.{:03}", snapshot.vm_clock_nsec / 1_000_000);
        let (id, name) = (terminal(&snapshot.id), terminal(&snapshot.name));
        let icount = snapshot.icount.map_or_else(|| "--".to_owned(), |count| count.to_string());
        let state = human_size(snapshot.vm_state_size);
        let _ = writeln!(table, "{id:<7} {name:<16} {state:>8}{date:>20} {clock:>15} {icount:>10}");
    }
    table
}

struct Lines(String);

impl Lines {
    fn line(&mut self, key: &str, value: &str) {
        let _ = writeln!(self.0, "{key}: {}", terminal(value));
    }

    fn line_if(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }

    fn qcow2(&mut self, details: &Qcow2Info) {
        self.0.push_str("Format specific information:\n");
        self.line("    compat", &details.compat);
        let word = |value: bool| if value { "true" } else { "false" };
        self.line_if("    compression type", details.compression_type.as_deref());
        self.line_if("    lazy refcounts", details.lazy_refcounts.map(word));
        for (number, bitmap) in details.bitmaps.iter().flatten().enumerate() {
            if number == 0 {
                self.0.push_str("    bitmaps:\n");
            }
            let _ = writeln!(self.0, "        [{number}]:\n            flags:");
            for (number, flag) in bitmap.flags.iter().enumerate() {
                self.line(&format!("                [{number}]"), flag);
            }
            self.line("            name", &bitmap.name);
            self.line("            granularity", &bitmap.granularity.to_string());
        }
        self.line("    refcount bits", &details.refcount_bits.to_string());
        self.line_if("    data file", details.data_file.as_deref());
        self.line_if("    data file raw", details.data_file_raw.map(word));
        let method =
            details.encrypt.as_ref().and_then(|encrypt| encrypt.get("format")).and_then(|name| name.as_str());
        self.line_if("    encrypt format", method);
        self.line_if("    corrupt", details.corrupt.map(word));
        self.line_if("    extended l2", details.extended_l2.map(word));
    }

    fn layer(&mut self, layer: &LayerInfo, zone: &TimeZone) {
        self.0.push_str("chainfs:\n");
        self.line("    view", &layer.view);
        self.line("    chains", &layer.chains.join(", "));
        self.line("    depth", &layer.depth.to_string());
        self.line("    frozen", if layer.frozen { "true" } else { "false" });
        if let Some(seconds) = layer.frozen_sec.and_then(|seconds| u64::try_from(seconds).ok()) {
            let when = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
            self.line("    frozen at", &when.map_or_else(|| "?".to_owned(), |when| time::second(when, zone)));
        }
        self.line_if("    description", layer.description.as_deref());
        self.line("    shared by", &layer.shared_by.to_string());
        if let Some(problem) = &layer.problem {
            self.line("    problem", problem);
        }
    }
}

#[cfg(test)]
mod tests;
