//! Converts the options of a mount to those of a store.

use std::path::PathBuf;

use super::config::user_directory;
use super::mount_options::{ImageFormat, MountOptions, PathMap};
use crate::io::RemoteOptions;
use crate::store::{Format, StoreOptions};

/// The store options that follow from mount options.
pub fn store_options(options: &MountOptions) -> StoreOptions {
    let usual = StoreOptions::default();
    StoreOptions {
        backing_dirs: options.backing_dirs.clone(),
        maps: options.maps.iter().map(|PathMap { old, new }| (old.clone(), new.clone())).collect(),
        readonly: options.readonly.clone(),
        formats: options.formats.iter().map(|rule| (rule.glob.clone(), format(rule.format))).collect(),
        standalone: options.standalone.clone(),
        names: options.names.iter().map(|rule| (rule.glob.clone(), rule.name.clone())).collect(),
        domains: domains(options, variable),
        remember: false,
        probe: options.probe,
        force_share: options.force_share,
        salvage: options.salvage,
        read_only: options.read_only,
        no_lock: options.no_lock,
        cache: options.cache.unwrap_or(usual.cache),
        rescan: options.rescan.unwrap_or(usual.rescan),
        notify: !options.no_inotify,
        trash: options.trash,
        owners_count: options.allow_other || rustix::process::geteuid().is_root(),
        whole_store: None,
        remote: RemoteOptions {
            cache_dir: options.cache_dir.clone().or_else(usual_cache_dir),
            cache_size: options.cache_size.unwrap_or(usual.remote.cache_size),
            offline: options.offline,
            deadline: options.timeout.unwrap_or(usual.remote.deadline),
            durable_every: usual.remote.durable_every,
        },
    }
}

/// The directory of the cache of remote stores: the system's for root, the user's for others.
fn usual_cache_dir() -> Option<PathBuf> {
    let caches = if rustix::process::geteuid().is_root() {
        Some(PathBuf::from("/var/cache"))
    } else {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))
    };
    caches.map(|caches| caches.join("chainfs/objects"))
}

/// The directories with libvirt's definitions: the user's choice, or those of the system's libvirt for root and
/// of the session's for other users.
fn domains(options: &MountOptions, variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if options.no_domains {
        return Vec::new();
    }
    if !options.domains.is_empty() {
        return options.domains.clone();
    }
    if rustix::process::geteuid().is_root() {
        let usual = ["/etc/libvirt/qemu", "/run/libvirt/qemu", "/var/lib/libvirt/qemu/snapshot"];
        return usual.map(PathBuf::from).to_vec();
    }
    let config = user_directory(&variable).map(|home| home.join("libvirt/qemu"));
    let run = variable("XDG_RUNTIME_DIR").map(|run| run.join("libvirt/qemu/run"));
    let snapshots = config.as_ref().map(|config| config.join("snapshot"));
    config.into_iter().chain(run).chain(snapshots).filter(|path| path.is_absolute()).collect()
}

/// The same format as the store's type.
pub fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

/// Looks up a variable of the environment that holds a path, for the configuration files.
pub fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}
