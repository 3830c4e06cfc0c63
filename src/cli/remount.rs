//! `mount -o remount`: changes of a mount that is there.
//!
//! The kernel's flags can change: `ro` and `rw`, `exec` and `noexec`. All other options belong to the daemon for
//! its life. mount(8) passes the options of fstab again with `remount`, so those that are as they were are
//! accepted.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use super::args::MountArgs;
use super::config;
use super::mount_options::MountOptions;
use super::store_options::variable;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount::{self, KIND};

/// Carries it out. `options`: those of the command line and of the configuration.
pub(super) fn run(args: &MountArgs, options: &MountOptions) -> Result<()> {
    let directory = args
        .dir
        .canonicalize()
        .map_err(|error| Error::io(format!("opening {}", args.dir.display()), error))?;
    let shown = directory.display();
    if mount::top_mount(&directory)?.is_none_or(|found| found.kind != KIND) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{shown} shows no store; mount it without remount"),
        ));
    }
    let lists = mount::attribute(&directory, "options").ok_or_else(|| {
        let fact = "does not tell the options of its mount (noxattr); unmount it and mount it again";
        Error::new(ErrorKind::Unsupported, format!("{shown} {fact}"))
    })?;
    let before = MountOptions::parse(&[OsStr::from_bytes(&lists)], true)?;
    let before = config::load(before, variable)?;
    let changed = options.unlike(&before);
    if !changed.is_empty() {
        let (names, it) = (changed.join(", "), if changed.len() == 1 { "it" } else { "them" });
        let fact = format!("cannot change {names} while it is mounted; unmount it and mount it with {it}");
        return Err(Error::new(ErrorKind::Unsupported, format!("{shown}: {fact}")));
    }
    if before.read_only && !options.read_only {
        let fact =
            "was mounted with ro, so its images are open for reading only; unmount it and mount it again";
        return Err(Error::new(ErrorKind::Unsupported, format!("{shown} {fact}")));
    }
    let flags = mount::MountOptions {
        exec: options.exec.unwrap_or(false),
        read_only: options.read_only,
        ..mount::MountOptions::default()
    };
    mount::remount(&directory, &flags)
}

/// The options of a mount as they were given, for a later remount.
pub(super) fn given(args: &MountArgs) -> Vec<u8> {
    let lists: Vec<&[u8]> = args.options.iter().map(|list| list.as_bytes()).collect();
    lists.join(&b","[..])
}

impl MountOptions {
    /// The names of the options that a remount cannot change and that differ.
    fn unlike(&self, other: &Self) -> Vec<&'static str> {
        let usual = Self::default();
        macro_rules! changed {
            ($($name:literal $field:ident,)*) => {{
                // All fields, so that none is forgotten.
                let Self {
                    read_only: _, exec: _, atime: _, sync: _, dirsync: _, remount: _, config: _, $($field,)*
                } = self;
                // What is not given stays: `mount -o remount,ro DIR` need not repeat it.
                let changes = [$(($name, *$field != other.$field && *$field != usual.$field),)*];
                changes.into_iter().filter(|(_, is_changed)| *is_changed).map(|(name, _)| name).collect()
            }};
        }
        changed! {
            "allow_other" allow_other,
            "uid" uid,
            "gid" gid,
            "umask" umask,
            "threads" threads,
            "cache" cache,
            "backing_dir" backing_dirs,
            "map" maps,
            "readonly" readonly,
            "format" formats,
            "standalone" standalone,
            "name" names,
            "domains" domains,
            "nodomains" no_domains,
            "probe" probe,
            "force_share" force_share,
            "salvage" salvage,
            "nolock" no_lock,
            "nofiles" no_files,
            "keys" keys,
            "symlinks" symlinks,
            "rescan" rescan,
            "trash" trash,
            "nopassthrough" no_passthrough,
            "kernelmap" kernel_map,
            "map_dir" map_dir,
            "cache_dir" cache_dir,
            "cache_size" cache_size,
            "offline" offline,
            "timeout" timeout,
            "noparallelwrites" no_parallel_writes,
            "nosharedmapping" no_shared_mapping,
            "noacl" no_acl,
            "noxattr" no_xattr,
            "noseccomp" no_seccomp,
            "noinotify" no_inotify,
            "noreadahead" no_readahead,
            "noiouring" no_io_uring,
            "fsname" fsname,
            "context" contexts,
            "auto_unmount" auto_unmount,
        }
    }
}
