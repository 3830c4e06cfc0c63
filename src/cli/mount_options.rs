//! Parses `-o`: lists of options as mount(8), fstab and systemd pass them on.
//!
//! Pure: text in, [`MountOptions`] or an error out. Options for other programs (`x-*`, `_netdev`, `nofail`
//! ...) are accepted and ignored. Unknown options are refused with a suggestion, unless the caller is sloppy.
//! mount(8) adds `rw` by default, so `rw` never undoes a `ro`. Within a value `\,` is a comma.

mod names;
mod texts;
mod values;

use crate::error::Result;
use crate::units::split_list;
use glob::Pattern;
use names::{CONTEXTS, is_ignored, unknown};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;
use values::{format_rule, glob, name_rule, number, octal, path_map, path_of, refuse, size, utf8};

pub(super) use names::{SETTINGS, Takes, suggestion};
pub(super) use texts::{SettingText, TEXTS};
pub use values::{FormatRule, ImageFormat, NameRule, PathMap};

/// The options of a mount. `None` means "not given".
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // each is an option of its own on the command line
pub struct MountOptions {
    /// `ro`: no image is ever opened for writing.
    pub read_only: bool,
    /// `allow_other`: all users have access; the kernel enforces the modes shown.
    pub allow_other: bool,
    /// `uid=`: the owner shown for all files.
    pub uid: Option<u32>,
    /// `gid=`: the group shown for all files.
    pub gid: Option<u32>,
    /// `umask=`: permission bits masked from all files, in octal.
    pub umask: Option<u32>,
    /// `threads=`: number of threads that serve requests.
    pub threads: Option<usize>,
    /// `cache=`: bytes of memory for tables and decompressed clusters.
    pub cache: Option<u64>,
    /// `backing_dir=`: directories outside the store that may hold backing files.
    pub backing_dirs: Vec<PathBuf>,
    /// `map=OLD=NEW`: backing files named under OLD are looked for in NEW.
    pub maps: Vec<PathMap>,
    /// `readonly=GLOB`: images that never become writable.
    pub readonly: Vec<Pattern>,
    /// `format=GLOB:FORMAT`: formats of images whose names and headers do not say.
    pub formats: Vec<FormatRule>,
    /// `standalone=GLOB`: unreadable files and directories that have no backing file.
    pub standalone: Vec<Pattern>,
    /// `name=GLOB:NAME`: names of chains.
    pub names: Vec<NameRule>,
    /// `domains=`: directories with libvirt's definitions, instead of the usual ones.
    pub domains: Vec<PathBuf>,
    /// `nodomains`: libvirt's definitions are not read.
    pub no_domains: bool,
    /// `probe`: detect the format where a header names no backing format.
    pub probe: bool,
    /// `force_share`: show images that another process is writing.
    pub force_share: bool,
    /// `salvage`: show disks with a missing layer; reads of that layer's data fail.
    pub salvage: bool,
    /// `nolock`: write images even where file locks do not work.
    pub no_lock: bool,
    /// `nofiles`: do not show `files/`.
    pub no_files: bool,
    /// `keys=`: the table of keys of encrypted volumes.
    pub keys: Option<PathBuf>,
    /// `symlinks=`: how symbolic links of a guest's file system are shown.
    pub symlinks: Option<Symlinks>,
    /// `rescan=`: interval of scans for a store that cannot be watched.
    pub rescan: Option<Duration>,
    /// `trash=`: how long removed layers can be restored.
    pub trash: Option<Duration>,
    /// `config=`: a file to read instead of the default ones.
    pub config: Option<PathBuf>,
    /// `nopassthrough`: every read goes through the daemon.
    pub no_passthrough: bool,
    /// `kernelmap=`: whether the kernel reads chains by itself.
    pub kernel_map: Option<KernelMapping>,
    /// `map_dir=`: where the files of kernel maps lie.
    pub map_dir: Option<PathBuf>,
    /// `cache_dir=`: where what was fetched from a remote store is kept.
    pub cache_dir: Option<PathBuf>,
    /// `cache_size=`: bytes that this may have.
    pub cache_size: Option<u64>,
    /// `offline`: a remote store is shown from the cache alone.
    pub offline: bool,
    /// `timeout=`: the time after which a request to a remote store fails.
    pub timeout: Option<Duration>,
    /// `noparallelwrites`: the kernel sends one write to a disk at a time.
    pub no_parallel_writes: bool,
    /// `nosharedmapping`: active disks can only be mapped privately.
    pub no_shared_mapping: bool,
    /// `noacl`: guests' access control lists are shown, but not enforced.
    pub no_acl: bool,
    /// `noxattr`: there are no extended attributes, and the kernel asks for none.
    pub no_xattr: bool,
    /// `noseccomp`: the file-system workers run without a seccomp filter.
    pub no_seccomp: bool,
    /// `noinotify`: the store is scanned every `rescan` seconds instead of being watched.
    pub no_inotify: bool,
    /// `noreadahead`: the kernel's read-ahead size is not changed.
    pub no_readahead: bool,
    /// `noiouring`: all requests come through /dev/fuse.
    pub no_io_uring: bool,
    /// `fsname=`: the source in the list of mounts, instead of the store's path.
    pub fsname: Option<PathBuf>,
    /// `context=` and its like: options of `SELinux`, whole.
    pub contexts: Vec<Vec<u8>>,
    /// `auto_unmount`: the mount goes when its daemon is killed.
    pub auto_unmount: bool,
    /// `remount`: changes a mount that is there.
    pub remount: bool,
    /// `exec`, `noexec`.
    pub exec: Option<bool>,
    /// `atime`, `noatime`.
    pub atime: Option<bool>,
    /// `sync`, `async`.
    pub sync: Option<bool>,
    /// `dirsync`.
    pub dirsync: bool,
}

/// How symbolic links of a guest's file system are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Symlinks {
    /// Rewritten so that they stay inside their volume.
    Inside,
    /// Unchanged.
    Verbatim,
}

/// Whether the kernel reads chains of several layers by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelMapping {
    /// Where it can.
    Auto,
    /// It must be able to, or nothing is mounted.
    On,
    /// No.
    Off,
}

impl MountOptions {
    /// Parses each `-o` in turn; later ones hold. `sloppy` ignores unknown options.
    pub fn parse<S: AsRef<OsStr>>(lists: &[S], sloppy: bool) -> Result<Self> {
        let mut options = Self::default();
        for list in lists {
            for option in quoted_words(split_list(list.as_ref().as_bytes())) {
                let (name, value) = match option.iter().position(|byte| *byte == b'=') {
                    Some(at) => (&option[..at], Some(&option[at + 1..])),
                    None => (option.as_slice(), None),
                };
                options.option(name, value, sloppy)?;
            }
        }
        Ok(options)
    }

    /// These options, completed by `defaults`. Lists are joined.
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
            standalone: defaults.standalone.into_iter().chain(self.standalone).collect(),
            names: defaults.names.into_iter().chain(self.names).collect(),
            domains: defaults.domains.into_iter().chain(self.domains).collect(),
            no_domains: self.no_domains || defaults.no_domains,
            probe: self.probe || defaults.probe,
            force_share: self.force_share || defaults.force_share,
            salvage: self.salvage || defaults.salvage,
            no_lock: self.no_lock || defaults.no_lock,
            no_files: self.no_files || defaults.no_files,
            keys: self.keys.or(defaults.keys),
            symlinks: self.symlinks.or(defaults.symlinks),
            rescan: self.rescan.or(defaults.rescan),
            trash: self.trash.or(defaults.trash),
            config: self.config.or(defaults.config),
            no_passthrough: self.no_passthrough || defaults.no_passthrough,
            kernel_map: self.kernel_map.or(defaults.kernel_map),
            map_dir: self.map_dir.or(defaults.map_dir),
            cache_dir: self.cache_dir.or(defaults.cache_dir),
            cache_size: self.cache_size.or(defaults.cache_size),
            offline: self.offline || defaults.offline,
            timeout: self.timeout.or(defaults.timeout),
            no_parallel_writes: self.no_parallel_writes || defaults.no_parallel_writes,
            no_shared_mapping: self.no_shared_mapping || defaults.no_shared_mapping,
            no_acl: self.no_acl || defaults.no_acl,
            no_xattr: self.no_xattr || defaults.no_xattr,
            no_seccomp: self.no_seccomp || defaults.no_seccomp,
            no_inotify: self.no_inotify || defaults.no_inotify,
            no_readahead: self.no_readahead || defaults.no_readahead,
            no_io_uring: self.no_io_uring || defaults.no_io_uring,
            fsname: self.fsname.or(defaults.fsname),
            contexts: defaults.contexts.into_iter().chain(self.contexts).collect(),
            auto_unmount: self.auto_unmount || defaults.auto_unmount,
            remount: self.remount || defaults.remount,
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
            ("remount", None) => self.remount = true,
            ("fsname", Some(value)) if !value.is_empty() => self.fsname = Some(path_of(value)),
            (_, Some(value)) if CONTEXTS.contains(&text) => {
                self.contexts.push([name, b"=", value].concat());
            }
            _ if is_ignored(text) || sloppy => {}
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    /// Sets an option of [`SETTINGS`]; `value` is empty for those that take none.
    pub(super) fn set(&mut self, name: &str, value: &[u8]) -> Result<()> {
        match name {
            "ro" => self.read_only = true,
            "allow_other" => self.allow_other = true,
            "uid" => self.uid = Some(number(name, value, 0, u64::from(u32::MAX - 1))? as u32),
            "gid" => self.gid = Some(number(name, value, 0, u64::from(u32::MAX - 1))? as u32),
            "umask" => self.umask = Some(octal(name, value)?),
            "threads" => self.threads = Some(number(name, value, 1, 256)? as usize),
            "cache" => self.cache = Some(size(name, value)?),
            "backing_dir" => self.backing_dirs.push(path_of(value)),
            "map" => self.maps.push(path_map(value)?),
            "readonly" => self.readonly.push(glob(name, utf8(name, value)?)?),
            "format" => self.formats.push(format_rule(utf8(name, value)?)?),
            "standalone" => self.standalone.push(glob(name, utf8(name, value)?)?),
            "name" => self.names.push(name_rule(value)?),
            "domains" => self.domains.push(path_of(value)),
            "nodomains" => self.no_domains = true,
            "auto_unmount" => self.auto_unmount = true,
            "probe" => self.probe = true,
            "force_share" => self.force_share = true,
            "salvage" => self.salvage = true,
            "nolock" => self.no_lock = true,
            "nofiles" => self.no_files = true,
            "keys" => self.keys = Some(path_of(value)),
            "symlinks" => {
                self.symlinks = Some(match value {
                    b"inside" => Symlinks::Inside,
                    b"verbatim" => Symlinks::Verbatim,
                    _ => return Err(refuse(name, "must be inside or verbatim")),
                });
            }
            "rescan" => self.rescan = Some(Duration::from_secs(number(name, value, 1, 86_400)?)),
            "trash" => self.trash = Some(Duration::from_hours(24 * number(name, value, 1, 36_500)?)),
            "nopassthrough" => self.no_passthrough = true,
            "kernelmap" => {
                self.kernel_map = Some(match value {
                    b"auto" => KernelMapping::Auto,
                    b"on" => KernelMapping::On,
                    b"off" => KernelMapping::Off,
                    _ => return Err(refuse(name, "must be auto, on or off")),
                });
            }
            "map_dir" => self.map_dir = Some(path_of(value)),
            "cache_dir" => self.cache_dir = Some(path_of(value)),
            "cache_size" => self.cache_size = Some(size(name, value)?),
            "offline" => self.offline = true,
            "timeout" => self.timeout = Some(Duration::from_secs(number(name, value, 1, 3600)?)),
            "noparallelwrites" => self.no_parallel_writes = true,
            "nosharedmapping" => self.no_shared_mapping = true,
            "noacl" => self.no_acl = true,
            "noxattr" => self.no_xattr = true,
            "noseccomp" => self.no_seccomp = true,
            "noinotify" => self.no_inotify = true,
            "noreadahead" => self.no_readahead = true,
            "noiouring" => self.no_io_uring = true,
            "noexec" => self.exec = Some(false),
            _ => return Err(unknown(name.as_bytes())),
        }
        Ok(())
    }
}

/// Joins the words of a value in quotation marks, in which commas end no option: `context="a:b:c:s0:c1,c2"`.
fn quoted_words(words: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let is_open = |word: &[u8]| {
        let value = word.iter().position(|byte| *byte == b'=').map_or(&[][..], |at| &word[at + 1..]);
        value.first() == Some(&b'"') && (value.len() == 1 || value.last() != Some(&b'"'))
    };
    let mut joined: Vec<Vec<u8>> = Vec::new();
    for word in words {
        match joined.last_mut().filter(|last| is_open(last) && is_context(last)) {
            Some(last) => {
                last.push(b',');
                last.extend(word);
            }
            None if word.is_empty() => {}
            None => joined.push(word),
        }
    }
    joined
}

fn is_context(word: &[u8]) -> bool {
    CONTEXTS
        .iter()
        .any(|name| word.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'=')))
}

#[cfg(test)]
mod tests;
