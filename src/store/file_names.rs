//! Names of files: as part of a sentence or of a shell's command, and what their extensions say.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::printable;

/// The suffix of files that a commit has left and that are invalid.
pub const INVALIDATED_EXTENSION: &str = "invalid";

/// A path as part of a sentence: characters that a terminal would interpret are escaped.
pub fn shown(path: &Path) -> String {
    printable(&String::from_utf8_lossy(path.as_os_str().as_bytes()))
}

/// Extensions that say what a file is. Any other is a part of its name: virsh calls the overlay of `vm.qcow2`
/// that it makes for the snapshot `snap1` `vm.snap1`.
const KINDS: [&str; 12] =
    ["bin", "dd", "img", "iso", "qcow", "qcow2", "qed", "raw", "vdi", "vhd", "vhdx", "vmdk"];

/// Whether the extension of `path` says what the file is.
pub(super) fn has_kind(path: &Path) -> bool {
    path.extension().is_none() || KINDS.iter().any(|kind| has_extension(path, kind))
}

/// The name of the layer of a file: without an extension that says what it is.
pub fn layer_name(path: &Path) -> &[u8] {
    let name = if has_kind(path) { path.file_stem() } else { path.file_name() };
    name.map_or(b"", OsStrExt::as_bytes)
}

/// Whether `path` ends in `.extension`, in any case.
pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}
