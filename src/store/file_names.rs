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

/// A word of a remedy, quoted if a shell would interpret it: remedies are copied, and names are any bytes of
/// an image.
pub(super) fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/+@%,:=".contains(c);
    let plain = !word.is_empty() && word.chars().all(is_plain);
    if plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Whether `path` ends in `.extension`, in any case.
pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}
