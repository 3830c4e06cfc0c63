//! `chainfs trash`: lists, restores and removes layers in the trash.

use std::path::Path;

use jiff::tz::TimeZone;

use super::args::{Output, TrashArgs};
use super::config;
use super::mount_options::MountOptions;
use super::output::print;
use super::store_options::{store_options, variable};
use super::target::place_in_mount;
use crate::error::Result;
use crate::report::trash::{listed, listed_json};
use crate::store::{Store, StoreOptions, shown};

/// Runs the command.
pub(super) fn run(args: &TrashArgs) -> Result<u8> {
    let store = open(&args.store)?;
    if let Some(id) = &args.restore {
        let path = store.restore(id, args.name.as_deref())?;
        print(&format!("{}\n", shown(&path)))?;
    } else if args.empty || args.remove.is_some() {
        store.empty_trash(args.remove.as_deref())?;
    } else {
        let items = store.trash()?;
        print(&match args.output.format() {
            Output::Human => listed(&items, &TimeZone::system()),
            Output::Json => listed_json(&items),
        })?;
    }
    Ok(0)
}

fn open(path: &Path) -> Result<std::sync::Arc<Store>> {
    let options = config::load(MountOptions::default(), variable)?;
    let options = StoreOptions { notify: false, ..store_options(&options) };
    let store = place_in_mount(path)?.map(|(store, _)| store);
    Store::open(store.as_deref().unwrap_or(path), options)
}
