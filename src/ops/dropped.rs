//! The layers that an unsafe rebase would drop from a chain: those between the layer and its new backing
//! file.
//!
//! `unsafe` is for a backing file that was moved, renamed or copied. Promise: if the evidence does not show
//! that the new file is the old one, the refusal names the layers that would drop out, and only `drop-layers`
//! overrides it. The evidence is the same inode; the same length and content; or, if the old file is gone and
//! nothing of its content is known, its name and format. Format and size alone are those of any number of
//! files.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind};
use crate::io::{Expect, Storage, directory_of};
use crate::store::{BackingLink, ImageEntry, ImageIndex, shown};

use super::scanned_store::{ScannedChain, ScannedStore};

/// Files up to this length are compared as a whole, larger ones by samples.
const WHOLE_LEN: u64 = 16 << 20;
/// Samples of a larger file, spread evenly.
const SAMPLE_COUNT: u64 = 1024;
/// Bytes of a sample.
const SAMPLE_LEN: usize = 16 << 10;

/// Why a layer must not get `base` (none: no backing file) by name alone, unless `drop-layers` allows it.
/// `between`: the layers of its chain that do not back `base`.
pub(super) fn refusal(
    scan: &ScannedStore,
    chain: &ScannedChain,
    layer: ImageIndex,
    base: Option<ImageIndex>,
    between: &[ImageIndex],
) -> Option<Error> {
    let image = scan.image(layer);
    let named = image.qcow2()?.header.backing.as_ref()?;
    let old_name = shown(Path::new(OsStr::from_bytes(&named.name)));
    let refuse = |fact: String| {
        let sentence =
            format!("{fact}; {}, or say drop-layers if that is wanted", remedy(scan, chain, layer));
        Some(Error::new(ErrorKind::NotEmpty, sentence))
    };
    let new = base.map(|base| scan.image(base));
    let new_name = new.map_or_else(|| "nothing".to_owned(), ImageEntry::shown);
    let Some(old) = scan.backing_of(layer) else {
        // The old file is gone, or cannot be read.
        let why = not_the_missing(scan, image, new, &named.name, named.format.as_deref())?;
        let fact = format!(
            "{} names {old_name} as its backing file, and {new_name} is not that file moved: {why}",
            image.shown()
        );
        return refuse(fact);
    };
    let is_moved = new.is_some_and(|new| is_same(scan, scan.image(old), new));
    let dropped: Vec<String> = between
        .iter()
        .filter(|index| !(is_moved && **index == old))
        .map(|index| scan.image(*index).shown())
        .collect();
    if dropped.is_empty() {
        return None;
    }
    let (is, what) = if dropped.len() == 1 { ("drops", "it holds") } else { ("drop", "they hold") };
    refuse(format!(
        "{} would be backed by {new_name} instead of {}: {} {is} out of the chain with what {what}",
        image.shown(),
        scan.image(old).shown(),
        dropped.join(", ")
    ))
}

/// The command that the user probably meant.
fn remedy(scan: &ScannedStore, chain: &ScannedChain, layer: ImageIndex) -> String {
    // A layer further down whose backing file is missing is the one to be rebased.
    let depth = chain.views.layers.iter().position(|index| *index == layer).unwrap_or(0);
    let broken = chain
        .views
        .layers
        .iter()
        .skip(depth + 1)
        .find(|index| matches!(scan.image(**index).below, BackingLink::Broken { .. }));
    let view = broken.and_then(|index| {
        let depth = chain.views.layers.iter().position(|other| other == index)?;
        chain.views.views.iter().find(|view| view.layer == depth && view.snapshot.is_none())
    });
    match view {
        Some(view) => {
            let name = String::from_utf8_lossy(&view.name);
            format!("the layer whose backing file is missing is {name}: say layer={name}")
        }
        None if scan.backing_of(layer).is_some() => {
            "leave out unsafe, and differing ranges are copied".to_owned()
        }
        None => "restore the missing file, or name its new path".to_owned(),
    }
}

/// Why `new` is not the missing backing file, if so.
fn not_the_missing(
    scan: &ScannedStore,
    image: &ImageEntry,
    new: Option<&ImageEntry>,
    name: &[u8],
    format: Option<&str>,
) -> Option<String> {
    let Some(new) = new else {
        return Some("the content of the missing file would read as zeroes".to_owned());
    };
    let own = new.format.map(crate::store::Format::name);
    if let (Some(stated), Some(own)) = (format, own)
        && stated != own
    {
        return Some(format!("it is {own}, and the header says {stated}"));
    }
    let old_file = Path::new(OsStr::from_bytes(name)).file_name();
    if old_file == new.place.path.file_name() {
        return None;
    }
    if let Some(old_file) = old_file {
        let beside = directory_of(&new.place.path).join(old_file);
        if scan.store.roots()[new.place.root].stat(&beside).is_ok() {
            return Some(format!("{} is there", shown(&beside)));
        }
    }
    if new.virtual_size() < image.virtual_size() {
        return Some("its disk is shorter".to_owned());
    }
    Some("it has another name, and nothing of the missing file is left to compare it with".to_owned())
}

/// Whether two images are the same file, or copies of one.
fn is_same(scan: &ScannedStore, old: &ImageEntry, new: &ImageEntry) -> bool {
    if old.stat.id == new.stat.id {
        return true;
    }
    let digest = |image: &ImageEntry| image.qcow2().map(|qcow2| qcow2.digest);
    let is_alike = old.format == new.format
        && old.stat.size == new.stat.size
        && digest(old) == digest(new)
        // A copy of the header alone is no evidence for data that is elsewhere.
        && old.data_file.is_none()
        && new.data_file.is_none();
    is_alike && has_same_content(scan, old, new).unwrap_or(false)
}

fn has_same_content(scan: &ScannedStore, old: &ImageEntry, new: &ImageEntry) -> crate::error::Result<bool> {
    let [old, new] = [old, new]
        .map(|image| (scan.store.file(&image.place, &image.stat, Expect::AnyVersion), image.stat.size));
    let (files, len) = ((old.0, new.0), old.1);
    let step = if len <= WHOLE_LEN { SAMPLE_LEN as u64 } else { len / SAMPLE_COUNT };
    let mut buffers = (vec![0; SAMPLE_LEN], vec![0; SAMPLE_LEN]);
    let last = len.saturating_sub(SAMPLE_LEN as u64);
    let mut at = 0;
    loop {
        let counts = (files.0.read_at(at, &mut buffers.0)?, files.1.read_at(at, &mut buffers.1)?);
        if counts.0 != counts.1 || buffers.0[..counts.0] != buffers.1[..counts.1] {
            return Ok(false);
        }
        if at >= last {
            return Ok(true);
        }
        at = (at + step).min(last);
    }
}
