//! What `-o` says: lists of options as mount(8), fstab and systemd pass them on.
//!
//! Pure: text in, [`MountOptions`] or a sentence out. What other programs leave in the list for
//! each other (`x-*`, `_netdev`, `nofail` ...) is accepted and ignored; what nobody knows is refused,
//! with the name that was probably meant, unless the caller is sloppy. `rw` is what mount(8) says when
//! nobody said anything, so it means "as usual" and never undoes a `ro`. Within a value `\,` is a comma.

use crate::error::{Error, ErrorKind, Result};
use crate::report::safe::terminal_bytes;
use crate::report::size::parse_size;
use glob::Pattern;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

/// Everything that the options of a mount can say. `None` is "not said".
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // each is a word of its own on the command line
pub struct MountOptions {
    /// `ro`: nothing below the mount is ever opened for writing.
    pub read_only: bool,
    /// `allow_other`: every user may enter; the kernel enforces the modes shown.
    pub allow_other: bool,
    /// `uid=`: the owner shown of everything.
    pub uid: Option<u32>,
    /// `gid=`: the group shown of everything.
    pub gid: Option<u32>,
    /// `umask=`: permission bits taken away from everything, in octal.
    pub umask: Option<u32>,
    /// `threads=`: how many requests are served at once.
    pub threads: Option<usize>,
    /// `cache=`: bytes of memory for tables and decompressed clusters.
    pub cache: Option<u64>,
    /// `backing_dir=`: directories outside of the store that layers may come from.
    pub backing_dirs: Vec<PathBuf>,
    /// `map=OLD=NEW`: where backing files are that moved since their names were written.
    pub maps: Vec<PathMap>,
    /// `readonly=GLOB`: images that never become writable.
    pub readonly: Vec<Pattern>,
    /// `format=GLOB:FORMAT`: formats of images whose names and headers do not tell.
    pub formats: Vec<FormatRule>,
    /// `probe`: believe the content where a header names no backing format.
    pub probe: bool,
    /// `force_share`: show what another process is writing.
    pub force_share: bool,
    /// `nofiles`: leave `files/` out.
    pub no_files: bool,
    /// `symlinks=`: how links of a guest's file system are shown.
    pub symlinks: Option<Symlinks>,
    /// `rescan=`: how often a store that cannot be watched is looked through.
    pub rescan: Option<Duration>,
    /// `config=`: a file read in place of the usual ones.
    pub config: Option<PathBuf>,
    /// `nopassthrough`: every read goes through the daemon.
    pub no_passthrough: bool,
    /// `noinotify`: the store is looked through every `rescan` seconds instead of being watched.
    pub no_inotify: bool,
    /// `noreadahead`: the kernel's own read-ahead is left as it is.
    pub no_readahead: bool,
    /// `exec`, `noexec`.
    pub exec: Option<bool>,
    /// `atime`, `noatime`.
    pub atime: Option<bool>,
    /// `sync`, `async`.
    pub sync: Option<bool>,
    /// `dirsync`.
    pub dirsync: bool,
}

/// A directory that moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMap {
    /// What names written in images begin with.
    pub old: PathBuf,
    /// What to look beneath instead.
    pub new: PathBuf,
}

/// The format of images whose path in the store matches.
#[derive(Clone, Debug, PartialEq)]
pub struct FormatRule {
    /// Matched against the path beneath the store.
    pub glob: Pattern,
    /// What they are.
    pub format: ImageFormat,
}

/// A format that an image can be said to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum ImageFormat {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// How symbolic links of a guest's file system are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Symlinks {
    /// Rewritten so that they stay inside their volume.
    Inside,
    /// As the guest wrote them.
    Verbatim,
}

/// What an option of ours wants after its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing.
    Nothing,
    /// One value; the last one holds.
    Value,
    /// A value; every one adds to those before.
    Values,
}

/// Options that a configuration file may set as well.
pub(super) const SETTINGS: [(&str, Takes); 20] = [
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
    ("probe", Takes::Nothing),
    ("force_share", Takes::Nothing),
    ("nofiles", Takes::Nothing),
    ("symlinks", Takes::Value),
    ("rescan", Takes::Value),
    ("nopassthrough", Takes::Nothing),
    ("noinotify", Takes::Nothing),
    ("noreadahead", Takes::Nothing),
    ("noexec", Takes::Nothing),
];

/// Words for mount(8), fstab, systemd and the kernel that change nothing here: the mount always has
/// nosuid and nodev, its times never change by reading, and `allow_other` brings `default_permissions`.
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

/// Known words that are neither settings nor ignored, for suggestions.
const OTHERS: [&str; 7] = ["config", "exec", "atime", "noatime", "sync", "async", "dirsync"];

impl MountOptions {
    /// Reads every `-o` in turn; later ones hold. `sloppy` ignores what is unknown.
    pub fn parse<S: AsRef<OsStr>>(lists: &[S], sloppy: bool) -> Result<Self> {
        let mut options = Self::default();
        for list in lists {
            for option in split_list(list.as_ref().as_bytes()) {
                let (name, value) = match option.iter().position(|byte| *byte == b'=') {
                    Some(at) => (&option[..at], Some(&option[at + 1..])),
                    None => (option.as_slice(), None),
                };
                options.option(name, value, sloppy)?;
            }
        }
        Ok(options)
    }

    /// These options where they say something, `defaults` where they do not. Lists are joined.
    #[must_use]
    pub fn over(self, defaults: Self) -> Self {
        Self {
            read_only: self.read_only || defaults.read_only,
            allow_other: self.allow_other || defaults.allow_other,
            uid: self.uid.or(defaults.uid),
            gid: self.gid.or(defaults.gid),
            umask: self.umask.or(defaults.umask),
            threads: self.threads.or(defaults.threads),
            cache: self.cache.or(defaults.cache),
            backing_dirs: defaults.backing_dirs.into_iter().chain(self.backing_dirs).collect(),
            maps: defaults.maps.into_iter().chain(self.maps).collect(),
            readonly: defaults.readonly.into_iter().chain(self.readonly).collect(),
            formats: defaults.formats.into_iter().chain(self.formats).collect(),
            probe: self.probe || defaults.probe,
            force_share: self.force_share || defaults.force_share,
            no_files: self.no_files || defaults.no_files,
            symlinks: self.symlinks.or(defaults.symlinks),
            rescan: self.rescan.or(defaults.rescan),
            config: self.config.or(defaults.config),
            no_passthrough: self.no_passthrough || defaults.no_passthrough,
            no_inotify: self.no_inotify || defaults.no_inotify,
            no_readahead: self.no_readahead || defaults.no_readahead,
            exec: self.exec.or(defaults.exec),
            atime: self.atime.or(defaults.atime),
            sync: self.sync.or(defaults.sync),
            dirsync: self.dirsync || defaults.dirsync,
        }
    }

    fn option(&mut self, name: &[u8], value: Option<&[u8]>, sloppy: bool) -> Result<()> {
        let Ok(text) = std::str::from_utf8(name) else {
            return if sloppy { Ok(()) } else { Err(unknown(name)) };
        };
        if let Some((known, takes)) = SETTINGS.iter().find(|(known, _)| *known == text) {
            return match (takes, value) {
                (Takes::Nothing, Some(_)) => Err(refuse(text, "takes no value")),
                (Takes::Value | Takes::Values, None | Some(b"")) => Err(refuse(text, "needs a value")),
                (_, value) => self.set(known, value.unwrap_or_default()),
            };
        }
        match (text, value) {
            ("config", None | Some(b"")) => return Err(refuse(text, "needs a value")),
            ("config", Some(path)) => self.config = Some(path_of(path)),
            ("exec", None) => self.exec = Some(true),
            ("atime", None) => self.atime = Some(true),
            ("noatime", None) => self.atime = Some(false),
            ("sync", None) => self.sync = Some(true),
            ("async", None) => self.sync = Some(false),
            ("dirsync", None) => self.dirsync = true,
            ("remount", None) => {
                return Err(refuse(text, "a mounted store cannot change its options; unmount it and mount it again"));
            }
            _ if is_ignored(text) || sloppy => {}
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    /// Sets an option of [`SETTINGS`]; `value` is empty for those that take nothing.
    pub(super) fn set(&mut self, name: &str, value: &[u8]) -> Result<()> {
        match name {
            "ro" => self.read_only = true,
            "allow_other" => self.allow_other = true,
            "uid" => self.uid = Some(number(name, value, 0, u64::from(u32::MAX - 1))? as u32),
            "gid" => self.gid = Some(number(name, value, 0, u64::from(u32::MAX - 1))? as u32),
            "umask" => self.umask = Some(octal(name, value)?),
            "threads" => self.threads = Some(number(name, value, 1, 256)? as usize),
            "cache" => {
                let len =
                    parse_size(utf8(name, value)?).map_err(|error| error.within(format!("mount option '{name}'")))?;
                self.cache = Some(len);
            }
            "backing_dir" => self.backing_dirs.push(path_of(value)),
            "map" => self.maps.push(path_map(value)?),
            "readonly" => self.readonly.push(glob(name, utf8(name, value)?)?),
            "format" => self.formats.push(format_rule(utf8(name, value)?)?),
            "probe" => self.probe = true,
            "force_share" => self.force_share = true,
            "nofiles" => self.no_files = true,
            "symlinks" => {
                self.symlinks = Some(match value {
                    b"inside" => Symlinks::Inside,
                    b"verbatim" => Symlinks::Verbatim,
                    _ => return Err(refuse(name, "must be inside or verbatim")),
                });
            }
            "rescan" => self.rescan = Some(Duration::from_secs(number(name, value, 1, 86_400)?)),
            "nopassthrough" => self.no_passthrough = true,
            "noinotify" => self.no_inotify = true,
            "noreadahead" => self.no_readahead = true,
            "noexec" => self.exec = Some(false),
            _ => return Err(unknown(name.as_bytes())),
        }
        Ok(())
    }
}

/// Splits at commas that no backslash stands before. `\,` and `\\` lose theirs; any other stays.
fn split_list(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = bytes.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let last = parts.len() - 1;
        match byte {
            b'\\' => parts[last].push(bytes.next_if(|next| matches!(next, b',' | b'\\')).unwrap_or(b'\\')),
            b',' => parts.push(Vec::new()),
            _ => parts[last].push(byte),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn is_ignored(name: &str) -> bool {
    let for_others = ["x-", "X-"].iter().any(|prefix| name.starts_with(prefix));
    for_others || matches!(name, "comment" | "fsname" | "subtype" | "uhelper" | "helper") || IGNORED.contains(&name)
}

fn refuse(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("mount option '{name}': {why}"))
}

fn unknown(name: &[u8]) -> Error {
    let shown = terminal_bytes(name);
    let remedy = match suggestion(&String::from_utf8_lossy(name)) {
        Some(meant) => format!("did you mean '{meant}'?"),
        None => "see chainfs mount --help".to_owned(),
    };
    Error::new(ErrorKind::Usage, format!("mount option '{shown}': unknown; {remedy}"))
}

/// The known option that `name` is nearest to, if it is near at all.
pub(super) fn suggestion(name: &str) -> Option<&'static str> {
    let known = SETTINGS.iter().map(|(known, _)| *known).chain(OTHERS).chain(IGNORED);
    let name = name.replace('-', "_").to_ascii_lowercase();
    // A hostile list must not cost quadratic time.
    let (distance, meant) = known
        .filter(|known| known.len().abs_diff(name.len()) <= 3)
        .map(|known| (edit_distance(&name, known), known))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= meant.len().div_ceil(4)).then_some(meant)
}

/// Letters to insert, remove or replace to make one word of the other.
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

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

fn utf8<'a>(name: &str, value: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(value).map_err(|_| refuse(name, &format!("'{}' is not text", terminal_bytes(value))))
}

fn number(name: &str, value: &[u8], min: u64, max: u64) -> Result<u64> {
    let digits = utf8(name, value)?;
    let parsed = digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
    parsed
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| refuse(name, &format!("'{}' must be a number from {min} to {max}", terminal_bytes(value))))
}

fn octal(name: &str, value: &[u8]) -> Result<u32> {
    let bits = u32::from_str_radix(utf8(name, value)?, 8).ok();
    bits.filter(|bits| *bits <= 0o777 && value.iter().all(u8::is_ascii_digit))
        .ok_or_else(|| refuse(name, &format!("'{}' must be octal, as in 027", terminal_bytes(value))))
}

fn glob(name: &str, text: &str) -> Result<Pattern> {
    Pattern::new(text).map_err(|error| {
        let shown = terminal_bytes(text.as_bytes());
        refuse(name, &format!("'{shown}' is not a pattern: {} at position {}", error.msg, error.pos))
    })
}

/// `OLD=NEW`; an equals sign of OLD is written `\=`.
fn path_map(value: &[u8]) -> Result<PathMap> {
    let mut old = Vec::new();
    let mut bytes = value.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => old.push(bytes.next_if_eq(&b'=').unwrap_or(b'\\')),
            b'=' => {
                let new: Vec<u8> = bytes.collect();
                if old.is_empty() || new.is_empty() {
                    break;
                }
                return Ok(PathMap { old: path_of(&old), new: path_of(&new) });
            }
            _ => old.push(byte),
        }
    }
    Err(refuse("map", &format!("'{}' must be OLD=NEW, two directories", terminal_bytes(value))))
}

/// `GLOB:FORMAT`; the pattern may have colons of its own.
fn format_rule(value: &str) -> Result<FormatRule> {
    let format = |word| match word {
        "raw" => Some(ImageFormat::Raw),
        "qcow2" => Some(ImageFormat::Qcow2),
        _ => None,
    };
    match value.rsplit_once(':').map(|(pattern, word)| (pattern, format(word))) {
        Some((pattern, Some(format))) if !pattern.is_empty() => {
            Ok(FormatRule { glob: glob("format", pattern)?, format })
        }
        _ => {
            let shown = terminal_bytes(value.as_bytes());
            Err(refuse("format", &format!("'{shown}' must be GLOB:raw or GLOB:qcow2")))
        }
    }
}

#[cfg(test)]
mod tests;
