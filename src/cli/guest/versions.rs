//! `chainfs versions`: lists the versions of a guest's file and the views that hold each.

use std::ffi::OsStr;

use jiff::tz::TimeZone;

use super::super::args::{Output, VersionsArgs};
use super::super::output::print;
use super::images::OpenStores;
use super::operands::shown;
use super::operands::{self, DiskName, DiskPath};
use super::store_disk::StoreDisk;
use super::{about, store_disk};
use crate::browse::versions::{PathState, find, versions};
use crate::error::{Error, ErrorKind, Result};
use crate::report::json::pretty;
use crate::report::versions::{VersionsObject, table};

/// Runs the command.
pub(in crate::cli) fn run(args: &VersionsArgs) -> Result<u8> {
    look(args).map_err(|error| about(&args.place, error))
}

fn look(args: &VersionsArgs) -> Result<u8> {
    let word: &OsStr = &args.place;
    let place = operands::parse(word)?;
    let Some(inner) = &place.inner else { return Err(operands::no_volume(word)) };
    let mut images = OpenStores::new(&args.look, &[])?;
    let disk = images.in_its_store(&place)?;
    // A path in a mount names one of the chains that have the layer.
    let alone = match &place.disk {
        DiskName::Mounted { chain, .. } => Some(chain.as_path()),
        DiskName::Image { .. } => None,
    };
    let (names, disks): (Vec<Vec<u8>>, Vec<StoreDisk>) =
        store_disk::all_around(&disk, alone).into_iter().unzip();
    let found: Vec<PathState> = disks.iter().map(|disk| found(disk, inner)).collect();
    if found.iter().all(|found| matches!(found, PathState::Absent)) {
        let names: Vec<String> =
            names.iter().map(|name| shown(std::os::unix::ffi::OsStrExt::from_bytes(name))).collect();
        return Err(Error::new(ErrorKind::NotFound, format!("no view has it: {}", names.join(", "))));
    }
    let versions = versions(&found);
    print(&match args.output.format() {
        Output::Human => table(&versions, &names, &TimeZone::system()),
        Output::Json => pretty(&VersionsObject::of(&versions, &names, disk.opened.browser.bytes_read())),
    })?;
    let is_stale = images.warn_stale();
    Ok(u8::from(is_stale || versions.iter().any(|version| matches!(version.state, Some(Err(_))))))
}

/// What a disk has at a path.
pub(super) fn found(disk: &StoreDisk, inner: &DiskPath) -> PathState {
    let inside = match disk.contents() {
        Ok(inside) => inside,
        Err(error) => return PathState::Unreadable(error),
    };
    match operands::tree(&inside, &inner.volume) {
        Ok(tree) => find(&inside, tree, &inner.path),
        // In an early view, the disk may not be partitioned.
        Err(error) if error.kind() == ErrorKind::NotFound => PathState::Absent,
        Err(error) => PathState::Unreadable(error),
    }
}
