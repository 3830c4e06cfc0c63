//! `chainfs versions`: which views of a chain hold which version of a guest's file.

use std::ffi::OsStr;

use jiff::tz::TimeZone;

use super::super::args::{Output, VersionsArgs};
use super::super::output::print;
use super::images::{Disk, Images};
use super::places::{self, DiskName, Inner};
use super::{about, place, shown};
use crate::browse::versions::{Found, find, versions};
use crate::error::{Error, ErrorKind, Result};
use crate::report::json::pretty;
use crate::report::versions::{VersionsObject, table};

/// Runs the command.
pub(in crate::cli) fn run(args: &VersionsArgs) -> Result<u8> {
    look(args).map_err(|error| about(&args.place, error))
}

fn look(args: &VersionsArgs) -> Result<u8> {
    let word: &OsStr = &args.place;
    let place = places::parse(word)?;
    let Some(inner) = &place.inner else { return Err(places::no_volume(word)) };
    let mut images = Images::new(&args.look, &[])?;
    let disk = images.in_its_store(&place)?;
    // In a mount, it is one chain of those that have it that was named.
    let alone = match &place.disk {
        DiskName::Mounted { chain, .. } => Some(chain.as_path()),
        DiskName::Image { .. } => None,
    };
    let (names, disks): (Vec<Vec<u8>>, Vec<Disk>) = place::all_around(&disk, alone).into_iter().unzip();
    let found: Vec<Found> = disks.iter().map(|disk| found(disk, inner)).collect();
    if found.iter().all(|found| matches!(found, Found::Absent)) {
        let names: Vec<String> =
            names.iter().map(|name| shown(std::os::unix::ffi::OsStrExt::from_bytes(name))).collect();
        return Err(Error::new(ErrorKind::NotFound, format!("none of these has it: {}", names.join(", "))));
    }
    let versions = versions(&found);
    print(&match args.output.format() {
        Output::Human => table(&versions, &names, &TimeZone::system()),
        Output::Json => pretty(&VersionsObject::of(&versions, &names, disk.opened.browser.bytes_read())),
    })?;
    let is_stale = images.tell_stale();
    Ok(u8::from(is_stale || versions.iter().any(|version| matches!(version.state, Some(Err(_))))))
}

fn found(disk: &Disk, inner: &Inner) -> Found {
    let inside = match disk.inside() {
        Ok(inside) => inside,
        Err(error) => return Found::Unreadable(error),
    };
    match places::volume(&inside, &inner.volume) {
        Ok(volume) => find(&inside, Some(volume), &inner.path),
        // A disk may not have been partitioned yet.
        Err(error) if error.kind() == ErrorKind::NotFound => Found::Absent,
        Err(error) => Found::Unreadable(error),
    }
}
