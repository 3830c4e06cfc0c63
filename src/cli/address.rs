//! Resolves the `VIEW` of `IMAGE@VIEW`: an internal snapshot of the image, or a view of its chain.
//!
//! All commands use this resolver. Promise: an address means the same one disk in every command. An ambiguous
//! address is refused with the addresses of all candidates. `VIEW` is an internal snapshot's name; a view's
//! name as in a mount of the image (`active@monday`, `sn1`); the file name of a layer; or, if it is none of
//! these, an internal snapshot's id.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::report::safe::terminal_bytes;
use crate::store::{Catalog, ChainView, ChainViews, ImageIndex, Store};

/// The view that `wanted` names in the chain from the image `index` downwards; `image` is the user's name for
/// it. The view's layer number is relative to the image.
pub(super) fn resolve(
    store: &Store,
    catalog: &Catalog,
    index: ImageIndex,
    image: &Path,
    wanted: &[u8],
) -> Result<ChainView> {
    let views = store.chain_views(catalog, index);
    let found = match by_name(catalog, &views, wanted) {
        found if found.is_empty() => by_id(catalog, &views, wanted),
        found => found,
    };
    match found.as_slice() {
        [] => {
            let image = shown(image.as_os_str().as_bytes());
            Err(views.unknown(&image, wanted, |_| true))
        }
        [view] => Ok((*view).clone()),
        several => Err(ambiguous(catalog, &views, several, image, wanted)),
    }
}

/// All views with this name.
fn by_name<'a>(catalog: &Catalog, views: &'a ChainViews, wanted: &[u8]) -> Vec<&'a ChainView> {
    let is_called = |view: &&ChainView| {
        let image = &catalog.images[views.layers[view.layer]];
        view.name == wanted
            || match view.snapshot {
                Some(inner) => {
                    view.layer == 0
                        && image.qcow2().is_some_and(|qcow2| qcow2.snapshots[inner].name == wanted)
                }
                None => image.place.path.file_name().is_some_and(|name| name.as_bytes() == wanted),
            }
    };
    views.views.iter().filter(is_called).collect()
}

fn by_id<'a>(catalog: &Catalog, views: &'a ChainViews, wanted: &[u8]) -> Vec<&'a ChainView> {
    let has_id = |view: &&ChainView| {
        let qcow2 = catalog.images[views.layers[view.layer]].qcow2();
        view.layer == 0
            && view
                .snapshot
                .is_some_and(|inner| qcow2.is_some_and(|qcow2| qcow2.snapshots[inner].id == wanted))
    };
    views.views.iter().filter(has_id).collect()
}

fn ambiguous(
    catalog: &Catalog,
    views: &ChainViews,
    found: &[&ChainView],
    image: &Path,
    wanted: &[u8],
) -> Error {
    let image = shown(image.as_os_str().as_bytes());
    let address = |view: &&ChainView| {
        let file =
            catalog.images[views.layers[view.layer]].place.path.file_name().unwrap_or_default().as_bytes();
        // A name that only this view has.
        let own =
            [view.name.as_slice(), file].into_iter().find(|name| by_name(catalog, views, name).len() == 1);
        let kind = if view.snapshot.is_some() { "the internal snapshot" } else { "the layer" };
        match own {
            Some(name) => format!("{kind} ({image}@{})", shown(name)),
            None => format!("{kind} {}", view.shown()),
        }
    };
    let all: Vec<String> = found.iter().map(address).collect();
    let fact = format!("{image}@{} is ambiguous: {}; name one of them", shown(wanted), all.join(" or "));
    Error::new(ErrorKind::Usage, fact)
}

fn shown(bytes: &[u8]) -> String {
    terminal_bytes(OsStr::from_bytes(bytes).as_bytes())
}
