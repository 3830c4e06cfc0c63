//! `chainfs info`: the output of `qemu-img info`, with additions of chainfs.

use jiff::tz::TimeZone;

use super::args::{InfoArgs, Output};
use super::output::print;
use super::target::{Target, TargetKind, host_path};
use super::warn;
use crate::error::Result;
use crate::report::info::{ImageInfo, human};
use crate::report::json::pretty;
use crate::report::store::{chain_info, chain_info_as};
use crate::store::ImageIndex;

/// Runs the command.
pub(super) fn run(args: &InfoArgs) -> Result<u8> {
    let target = Target::find(&args.path, args.format, &args.image)?;
    let Target { store, catalog, .. } = &target;
    let chains: Vec<Vec<ImageInfo>> = match &target.what {
        TargetKind::Store => {
            let leaves = catalog.chains().map(|(_, leaf)| leaf);
            leaves.map(|leaf| chain_info(store, catalog, leaf)).collect()
        }
        TargetKind::Chain(leaf) => vec![chain_info(store, catalog, *leaf)],
        TargetKind::Disk(disk) => vec![from_layer(&target, disk.layers[0])],
    };
    let chains: Vec<Vec<ImageInfo>> = if args.backing_chain {
        chains
    } else {
        chains.into_iter().map(|chain| chain.into_iter().take(1).collect()).collect()
    };
    let zone = TimeZone::system();
    match (args.output.format(), &target.what) {
        (Output::Human, _) => {
            let texts: Vec<String> = chains.iter().map(|chain| human(chain, &zone)).collect();
            print(&texts.join("\n"))?;
        }
        (Output::Json, TargetKind::Store) if args.backing_chain => print(&pretty(&chains))?,
        (Output::Json, TargetKind::Store) => print(&pretty(&chains.concat()))?,
        (Output::Json, _) if args.backing_chain => print(&pretty(&chains[0]))?,
        (Output::Json, _) => print(&pretty(&chains[0][0]))?,
    }
    if !matches!(target.what, TargetKind::Store) {
        let problems = chains.iter().flatten().filter_map(|image| image.chainfs.as_ref()?.problem.as_ref());
        problems.for_each(|problem| warn(problem));
    }
    let top = match &target.what {
        TargetKind::Store => None,
        TargetKind::Chain(leaf) => Some(*leaf),
        TargetKind::Disk(disk) => Some(disk.layers[0]),
    };
    let layers = top.map(|top| catalog.layers(top)).unwrap_or_default();
    let shown = if args.backing_chain { &layers[..] } else { &layers[..layers.len().min(1)] };
    let is_unreadable = shown.iter().any(|layer| catalog.images[*layer].format.is_none());
    Ok(u8::from(is_unreadable))
}

/// The chain from this layer down. An image given by its own path is described as in qemu-img, without the
/// fields about the store.
fn from_layer(target: &Target, layer: ImageIndex) -> Vec<ImageInfo> {
    let Target { store, catalog, filename, .. } = target;
    if let Some(single) = catalog.single.filter(|single| *single == layer) {
        let mut chain = chain_info_as(store, catalog, single, filename);
        for image in &mut chain {
            image.chainfs.take_if(|layer| layer.problem.is_none());
        }
        return chain;
    }
    // The layer is described as part of a chain, from any leaf above it.
    let mut leaf = layer;
    while let Some(user) = catalog.images[leaf].users.first() {
        leaf = *user;
    }
    let mut chain = chain_info_as(store, catalog, leaf, &host_path(store, catalog, leaf));
    let depth = catalog.layers(leaf).iter().position(|index| *index == layer).unwrap_or(0);
    chain.drain(..depth);
    chain
}
