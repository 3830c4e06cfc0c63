//! The names of mount options: known ones, ignored ones, and suggestions for unknown ones.

use crate::error::{Error, ErrorKind};
use crate::report::safe::terminal_bytes;

/// The argument that an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Takes {
    /// Nothing.
    Nothing,
    /// One value; the last one holds.
    Value,
    /// A value; values add up.
    Values,
}

/// Options that a configuration file may set as well.
pub(in crate::cli) const SETTINGS: [(&str, Takes); 41] = [
    ("ro", Takes::Nothing),
    ("allow_other", Takes::Nothing),
    ("uid", Takes::Value),
    ("gid", Takes::Value),
    ("umask", Takes::Value),
    ("threads", Takes::Value),
    ("cache", Takes::Value),
    ("backing_dir", Takes::Values),
    ("map", Takes::Values),
    ("readonly", Takes::Values),
    ("format", Takes::Values),
    ("standalone", Takes::Values),
    ("name", Takes::Values),
    ("domains", Takes::Values),
    ("nodomains", Takes::Nothing),
    ("auto_unmount", Takes::Nothing),
    ("probe", Takes::Nothing),
    ("force_share", Takes::Nothing),
    ("salvage", Takes::Nothing),
    ("nolock", Takes::Nothing),
    ("nofiles", Takes::Nothing),
    ("keys", Takes::Value),
    ("symlinks", Takes::Value),
    ("rescan", Takes::Value),
    ("trash", Takes::Value),
    ("nopassthrough", Takes::Nothing),
    ("kernelmap", Takes::Value),
    ("map_dir", Takes::Value),
    ("cache_dir", Takes::Value),
    ("cache_size", Takes::Value),
    ("offline", Takes::Nothing),
    ("timeout", Takes::Value),
    ("noparallelwrites", Takes::Nothing),
    ("nosharedmapping", Takes::Nothing),
    ("noacl", Takes::Nothing),
    ("noxattr", Takes::Nothing),
    ("noseccomp", Takes::Nothing),
    ("noinotify", Takes::Nothing),
    ("noreadahead", Takes::Nothing),
    ("noiouring", Takes::Nothing),
    ("noexec", Takes::Nothing),
];

/// Options for mount(8), fstab, systemd and the kernel that have no effect here: the mount always has
/// nosuid and nodev, reading never changes its times, and `allow_other` implies `default_permissions`.
const IGNORED: [&str; 32] = [
    "_netdev",
    "auto",
    "defaults",
    "default_permissions",
    "dev",
    "diratime",
    "fail",
    "group",
    "lazytime",
    "loud",
    "mand",
    "noauto",
    "nodev",
    "nodiratime",
    "nofail",
    "nogroup",
    "nolazytime",
    "nomand",
    "noowner",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "nousers",
    "owner",
    "relatime",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "user",
    "users",
];

/// Options that mount(8) takes from the list of mounts for a remount.
const OF_MOUNTED: [&str; 2] = ["user_id", "group_id"];

/// Options of `SELinux`, which are the kernel's.
pub(super) const CONTEXTS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// Known options that are neither settings nor ignored, for suggestions.
const OTHERS: [&str; 9] =
    ["fsname", "remount", "config", "exec", "atime", "noatime", "sync", "async", "dirsync"];

pub(super) fn is_ignored(name: &str) -> bool {
    let for_others = ["x-", "X-"].iter().any(|prefix| name.starts_with(prefix));
    for_others
        || matches!(name, "comment" | "subtype" | "uhelper" | "helper")
        || OF_MOUNTED.contains(&name)
        || IGNORED.contains(&name)
}

pub(super) fn unknown(name: &[u8]) -> Error {
    let shown = terminal_bytes(name);
    let remedy = match suggestion(&String::from_utf8_lossy(name)) {
        Some(meant) => format!("did you mean '{meant}'?"),
        None => "see chainfs mount --help".to_owned(),
    };
    Error::new(ErrorKind::Usage, format!("mount option '{shown}': unknown; {remedy}"))
}

/// The known option most similar to `name`, if one is similar enough.
pub(in crate::cli) fn suggestion(name: &str) -> Option<&'static str> {
    let known = SETTINGS.iter().map(|(known, _)| *known).chain(OTHERS).chain(IGNORED);
    let name = name.replace('-', "_").to_ascii_lowercase();
    // The length filter bounds the cost: a hostile name must not cost quadratic time.
    let (distance, meant) = known
        .filter(|known| known.len().abs_diff(name.len()) <= 3)
        .map(|known| (edit_distance(&name, known), known))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= meant.len().div_ceil(4)).then_some(meant)
}

/// The Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b = b.as_bytes();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
