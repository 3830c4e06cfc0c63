//! The options of a store.

use crate::io::{LockSupport, RemoteOptions};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use glob::Pattern;

use super::file_names::{INVALIDATED_EXTENSION, has_extension};
use super::names::OWN_PREFIX;

/// An image's format, as a header, a name or a user states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// Bytes of the disk, as they are.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Format {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format of that name; `None` for those chainfs does not read.
    pub fn from_name(name: &str) -> Option<Self> {
        [Format::Raw, Format::Qcow2].into_iter().find(|format| format.name() == name)
    }
}

/// The options of a store.
#[expect(clippy::struct_excessive_bools, reason = "each is a word of its own to users")]
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Directories besides the store in which backing files may lie.
    pub backing_dirs: Vec<PathBuf>,
    /// Prefixes of names in headers and their current replacements.
    pub maps: Vec<(PathBuf, PathBuf)>,
    /// Leaves that are never active.
    pub readonly: Vec<Pattern>,
    /// Formats of files whose names match; the first match counts.
    pub formats: Vec<(Pattern, Format)>,
    /// Files and directories that use no other image, though that is unknown.
    pub standalone: Vec<Pattern>,
    /// Names of the chains of leaves whose paths match; the first match counts.
    pub names: Vec<(Pattern, Vec<u8>)>,
    /// Directories with libvirt's definitions of domains and snapshots.
    pub domains: Vec<PathBuf>,
    /// Whether the store records which files have been seen without qcow2's magic.
    pub remember: bool,
    /// Whether a backing file without a format in the header may be probed.
    pub probe: bool,
    /// Whether images that another process writes are opened anyway.
    pub force_share: bool,
    /// Whether a disk with a lost layer is opened anyway, to read the data of its other layers.
    pub salvage: bool,
    /// Whether nothing is ever opened for writing.
    pub read_only: bool,
    /// Whether images are written even without file locks that keep two writers apart.
    pub no_lock: bool,
    /// Bytes of memory for tables, maps and decompressed clusters.
    pub cache: u64,
    /// The interval of scans where the system does not report changes.
    pub rescan: Duration,
    /// Whether the system's change notifications (inotify) are used.
    pub notify: bool,
    /// How long layers that a command has removed, and that are still valid, stay in the trash; `None`: they
    /// are removed for good.
    pub trash: Option<Duration>,
    /// Whether names in images count only if the owners of these may read the named files: if root opens the
    /// store, or other users have access.
    pub owners_count: bool,
    /// For a store that is one image: the directory with all possible users of it.
    pub whole_store: Option<PathBuf>,
    /// How stores in object storage are read.
    pub remote: RemoteOptions,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            backing_dirs: Vec::new(),
            maps: Vec::new(),
            readonly: Vec::new(),
            formats: Vec::new(),
            standalone: Vec::new(),
            names: Vec::new(),
            domains: Vec::new(),
            remember: false,
            probe: false,
            force_share: false,
            salvage: false,
            read_only: false,
            no_lock: false,
            cache: 128 << 20,
            rescan: Duration::from_secs(30),
            notify: true,
            trash: None,
            owners_count: false,
            whole_store: None,
            remote: RemoteOptions::default(),
        }
    }
}

impl StoreOptions {
    /// What a writer needs of the file system.
    pub(super) fn lock_support(&self) -> LockSupport {
        if self.no_lock { LockSupport::Optional } else { LockSupport::Required }
    }

    /// The format that the user states for `path`.
    pub(super) fn stated_format(&self, path: &Path) -> Option<Format> {
        self.formats.iter().find(|(pattern, _)| matches(pattern, path)).map(|(_, format)| *format)
    }

    /// Whether a file called `path`, an image of `format`, would be probed as that: also if no image names
    /// it, or only as long as one does (`is_named`). One without an overlay is to be an active disk.
    pub(crate) fn reads_as(&self, path: &Path, format: Format, is_named: bool) -> bool {
        let name = path.file_name().unwrap_or_default().as_bytes();
        if has_extension(path, INVALIDATED_EXTENSION)
            || name.starts_with(OWN_PREFIX)
            || (!is_named && self.is_readonly(path))
        {
            return false;
        }
        match (self.stated_format(path), format) {
            (Some(stated), _) => stated == format,
            (None, Format::Raw) => is_named || has_extension(path, "raw") || has_extension(path, "img"),
            (None, Format::Qcow2) => !has_extension(path, "raw") && (is_named || !has_extension(path, "img")),
        }
    }

    /// Whether the user states that `path`, or a directory that holds it, uses no other image.
    pub(super) fn is_standalone(&self, path: &Path) -> bool {
        let is_it = |pattern: &Pattern, path: &Path| {
            if path.as_os_str().is_empty() { pattern.as_str() == "." } else { matches(pattern, path) }
        };
        self.standalone.iter().any(|pattern| path.ancestors().any(|path| is_it(pattern, path)))
    }

    /// The name that the user gives the chain of the leaf `path`.
    pub(super) fn stated_name(&self, path: &Path) -> Option<&[u8]> {
        self.names.iter().find(|(pattern, _)| matches(pattern, path)).map(|(_, name)| name.as_slice())
    }

    /// Whether the user makes `path` read-only.
    pub(crate) fn is_readonly(&self, path: &Path) -> bool {
        self.readonly.iter().any(|pattern| matches(pattern, path))
    }
}

/// A pattern without `/` is matched against the file's name, one with `/` against its path in the store.
fn matches(pattern: &Pattern, path: &Path) -> bool {
    if pattern.as_str().contains('/') {
        return pattern.matches_path(path);
    }
    path.file_name().is_some_and(|name| pattern.matches_path(Path::new(name)))
}
