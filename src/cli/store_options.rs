//! Converts the options of a mount to those of a store.

use std::path::PathBuf;

use super::mount_options::{ImageFormat, MountOptions, PathMap};
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
    }
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
