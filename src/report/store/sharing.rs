//! What each layer shares with other chains, and what its deletion would free.
//!
//! What is freed are the bytes of its file that no overlay shows: whichever method `delete` takes, the bytes
//! that an overlay shows stay, once for each overlay. Only the tables of images are read. Whether a layer can
//! be deleted at all is what the plan of `delete` says.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::ops::{Engine, Request, quote};
use crate::report::tree::{Forest, Sharing, TreeNode};
use crate::store::{Catalog, ImageIndex, Store, ViewPart};
use crate::units::Stability;

/// Adds to each layer of the forest, which shows the catalog, what it shares and what its deletion frees.
pub fn add_sharing(engine: &Arc<Engine>, catalog: &Catalog, forest: &mut Forest) -> Result<()> {
    let store = engine.store();
    let mut nodes: Vec<(ImageIndex, &mut TreeNode)> = Vec::new();
    for node in forest.trees.iter_mut().flat_map(|tree| &mut tree.nodes) {
        nodes.extend(node.image.map(|image| (image, node)));
    }
    let deletions = deletions(store, catalog);
    let requests: Vec<(PathBuf, Request)> =
        nodes.iter().filter_map(|(image, _)| deletions[*image].clone()).collect();
    let mut plans = engine.plans(&requests)?.into_iter();
    for (image, node) in nodes {
        let own = node.own_size.unwrap_or(0);
        let plan = deletions[image].as_ref().and_then(|_| plans.next());
        let may_go = plan.is_some_and(|plan| plan.is_ok_and(|plan| plan.refusals.is_empty()));
        let freed = if may_go { freed(store, catalog, image, own) } else { None };
        let is_shared = catalog.images[image].chain_count > 1;
        node.sharing = Some(Sharing { shared: if is_shared { own } else { 0 }, freed });
    }
    Ok(())
}

/// For each image, the command that deletes it, of the first chain that has it; `None` for active layers.
fn deletions(store: &Store, catalog: &Catalog) -> Vec<Option<(PathBuf, Request)>> {
    let mut all = vec![None; catalog.images.len()];
    let chains = catalog.chains().chain(catalog.single.map(|leaf| (PathBuf::new(), leaf)));
    for (chain, leaf) in chains {
        let views = store.chain_views(catalog, leaf);
        for view in views.views.iter().filter(|view| view.snapshot.is_none() && !view.active) {
            let command = [b"delete ".as_slice(), &quote(&view.name)].concat();
            let entry = &mut all[views.layers[view.layer]];
            if let (None, Ok(request)) = (&entry, Request::parse_command(&command)) {
                *entry = Some((chain.clone(), request));
            }
        }
    }
    all
}

/// The bytes on disk that the deletion of an image frees, of `own` that its file has.
fn freed(store: &Store, catalog: &Catalog, image: ImageIndex, own: u64) -> Option<i64> {
    let mut freed = i64::try_from(own).ok()?;
    for overlay in &catalog.images[image].users {
        let kept = shown_through(store, catalog, *overlay, image).ok()?.min(own);
        freed = freed.checked_sub(i64::try_from(kept).ok()?)?;
    }
    Some(freed)
}

/// The bytes of an image that its overlay shows.
fn shown_through(store: &Store, catalog: &Catalog, overlay: ImageIndex, image: ImageIndex) -> Result<u64> {
    let is_live = catalog.images[overlay].users.is_empty() && catalog.is_active(overlay);
    // The layers further down answer nothing that the image itself answers.
    let layers = [overlay, image];
    let open = store.open_view(catalog, &layers, ViewPart::Active, Stability::live_if(is_live))?;
    let (mut at, mut sum) = (0, 0);
    while at < open.view.size() {
        let run = open.view.map_run(at, u64::MAX)?;
        if run.depth == 1 && run.present && run.data {
            sum += run.len;
        }
        at += run.len;
    }
    Ok(sum)
}
