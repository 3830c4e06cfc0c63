//! Pull: what lies between a layer and a base is copied into the layer, which then stands on the base.
//!
//! Promises: no view changes, at no moment, nor does any become invalid; a guest's write always wins. What
//! is left with nobody standing on it is marked as frozen before that is so. Cut off anywhere, it goes on
//! where it was, for what has been copied is not asked for again.

mod fill;
mod job;

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::image::HeaderChange;
use crate::store::{BackingLink, ImageIndex, ViewPart};
use crate::units::Stability;

use super::check::check_view;
use super::command::Command;
use super::context::Context;
use super::copy::CommitSegment;
use super::freeze;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::plan::Plan;
use super::refusals;
use super::removal;
use super::scanned_store::{ScannedChain, ScannedStore};
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec};

pub(super) use fill::Filling;
pub(super) use job::{begin, begin_with, examine, resume};

/// The words of `pull`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullRequest {
    /// The layer that is to be stood on afterwards; none: nothing.
    pub base: Option<Vec<u8>>,
    /// The layer that is filled, as a view's name; none: the active one.
    pub into: Option<Vec<u8>>,
    /// Whether layers that nobody needs afterwards are removed.
    pub delete: bool,
    /// Whether internal snapshots of those may go with them.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "pull",
    usage: "\
pull [base=VIEW|none] [into=VIEW] [delete] [discard-internal] [discard-bitmaps]

Copies what lies between base and a layer into that layer, which then stands on base.
  base=VIEW          what it stands on afterwards (none: nothing)
  into=VIEW          the layer that is filled (the active disk)
  delete             removes layers that nobody needs afterwards
  discard-internal   internal snapshots of those may go with them
  discard-bitmaps    their persistent bitmaps may
",
    positional: None,
    keys: &["base", "into"],
    flags: &["delete", "discard-internal", "discard-bitmaps"],
    is_for_store: false,
};

impl Command for PullRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            base: words.value("base").filter(|base| base != b"none"),
            into: words.value("into"),
            delete: words.flag("delete"),
            discard_internal: words.flag("discard-internal"),
            discard_bitmaps: words.flag("discard-bitmaps"),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { base, into, delete, discard_internal, discard_bitmaps } = self;
        line.value("base", base.as_deref());
        line.value("into", into.as_deref());
        line.flag("delete", *delete);
        line.discards(*discard_internal, *discard_bitmaps);
    }

    fn check(&self) -> Result<()> {
        assert!(self.base.as_deref() != Some(b"none"), "standing on nothing is no name");
        check_view("base=", self.base.as_deref())?;
        check_view("into=", self.into.as_deref())
    }

    fn discards(&self) -> Discards {
        Discards { internal: self.discard_internal, bitmaps: self.discard_bitmaps }
    }

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, world, chain, self)?;
        Ok((plan, layers.opened()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

/// What a pull concerns, by index in one catalog. Nothing is filled if all is as it should be already.
#[derive(Clone, Debug, Default)]
pub(super) struct PullRange {
    /// What is filled; all of them stand on the same.
    pub(super) into: Vec<ImageIndex>,
    /// What that is, and all below it, top first.
    pub(super) below: Vec<ImageIndex>,
    /// What they will stand on.
    pub(super) base: Option<ImageIndex>,
    /// What they will stand on no more.
    pub(super) between: Vec<ImageIndex>,
    /// What goes afterwards.
    pub(super) remove: Vec<ImageIndex>,
}

impl PullRange {
    /// What is opened for it.
    pub(super) fn opened(&self) -> TouchedImages {
        TouchedImages { written: self.into.clone(), read: self.below.clone() }
    }

    /// What is changed, or goes.
    fn touched(&self) -> Vec<ImageIndex> {
        self.into.iter().chain(&self.remove).copied().collect()
    }
}

fn layers(world: &ScannedStore, chain: &ScannedChain, request: &PullRequest) -> Result<PullRange> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let views = &chain.views;
    let into = lookup::layer_or_active(world, chain, request.into.as_deref(), "into")?;
    let name = world.image(views.layers[into]).shown();
    if into + 1 >= views.layers.len() && request.base.is_some() {
        return Err(usage(format!("{name} stands on nothing: there is nothing to be pulled")));
    }
    let base = request.base.as_ref().map(|base| lookup::layer(world, chain, base)).transpose()?;
    match base {
        Some(base) if base == into => return Err(usage("the layer and its base are the same".to_owned())),
        Some(base) if base < into => {
            return Err(usage("base is above the layer; it has to be one of the layers below".to_owned()));
        }
        _ => {}
    }
    let base_index = base.map(|base| views.layers[base]);
    if stands_already(world, views.layers[into], base_index)? {
        return Ok(PullRange::default());
    }
    let between = views.layers[into + 1..base.unwrap_or(views.layers.len())].to_vec();
    let remove = if request.delete { removable(world, views.layers[into], &between) } else { Vec::new() };
    Ok(PullRange {
        into: vec![views.layers[into]],
        below: views.layers[into + 1..].to_vec(),
        base: base_index,
        between,
        remove,
    })
}

/// Whether a layer stands on that already, so that a command which would put it there is done: it can be
/// given again.
/// `Broken` if what it stands on cannot be told.
pub(super) fn stands_already(
    world: &ScannedStore,
    layer: ImageIndex,
    base: Option<ImageIndex>,
) -> Result<bool> {
    match &world.image(layer).below {
        BackingLink::Nothing => Ok(base.is_none()),
        BackingLink::Image(below) => Ok(base == Some(*below)),
        BackingLink::Broken { image, .. } if *image == base => {
            let problem = world.catalog.view_problem(&[layer]).unwrap_or_default();
            Err(Error::new(ErrorKind::Broken, problem))
        }
        BackingLink::Broken { .. } => Ok(false),
    }
}

/// The plan of what is so already.
pub(super) fn nothing_to_do(world: &ScannedStore, chain: &ScannedChain) -> Plan {
    let tree = lookup::tree(world, chain);
    let note = "nothing is left to do: the layer stands on that already".to_owned();
    Plan { before: tree.clone(), after: tree, notes: vec![note], ..Plan::default() }
}

/// Of what lies between: what this store froze, nobody else stands on, and something else lies below.
fn removable(world: &ScannedStore, into: ImageIndex, between: &[ImageIndex]) -> Vec<ImageIndex> {
    let mut gone = vec![into];
    let is_lowest = |index: ImageIndex| world.stands_on(index).is_none();
    for index in between {
        let image = world.image(*index);
        let may_go = image.frozen.is_some() && !is_lowest(*index) && world.untouchable(*index).is_none();
        if !may_go || !world.others_using(*index, &gone).is_empty() {
            break;
        }
        gone.push(*index);
    }
    gone.split_off(1)
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &PullRequest,
) -> Result<(Plan, PullRange)> {
    let chain = world.chain(path)?;
    let layers = layers(world, &chain, request)?;
    if layers.into.is_empty() {
        return Ok((nothing_to_do(world, &chain), layers));
    }
    let mut plan = plan_of(context, world, &chain, &layers, request);
    let into = &world.image(layers.into[0]).place.path;
    let first = plan.before.iter().position(|line| line.path == *into).unwrap_or(0);
    if let Some(line) = plan.after.get_mut(first) {
        "with the bytes of what was between".clone_into(&mut line.note);
        let end = (first + 1 + layers.between.len()).min(plan.after.len());
        plan.after.drain(first + 1..end);
    }
    Ok((plan, layers))
}

/// The same for what has been found out already, but for the chain afterwards; of the request only its flags
/// count.
pub(super) fn plan_of(
    context: &Context,
    world: &ScannedStore,
    chain: &ScannedChain,
    layers: &PullRange,
    request: &PullRequest,
) -> Plan {
    let mut plan = Plan { before: lookup::tree(world, chain), ..Plan::default() };
    refuse(world, layers, request, &mut plan.refusals);
    if let Some(first) = layers.into.first().filter(|_| !layers.below.is_empty()) {
        let store = context.store();
        let counted = store
            .open_view(&world.catalog, &layers.below, ViewPart::Active, Stability::Frozen)
            .and_then(|open| {
                let frozen = store.part_of(&open.view, 0, layers.between.len());
                CommitSegment { live: None, frozen }.data_len()
            });
        refusals::count(world, *first, counted.map(|bytes| bytes * layers.into.len() as u64), &mut plan);
        let fact = "bytes that the layer holds itself are not copied; how many these are shows as it goes on";
        plan.notes.push(fact.into());
    }
    plan.removed = layers.remove.iter().map(|index| world.image(*index).place.path.clone()).collect();
    plan.invalid = lookup::views_of(chain, layers.remove.iter().copied());
    let is_far = |index: &&ImageIndex| !world.store.keeps_trash(world.image(**index).stat.id);
    if world.store.has_trash() {
        plan.notes.extend(layers.remove.iter().filter(is_far).map(|index| {
            let fact = "lies on another file system than the store's own directory";
            format!("{}{}: it {fact}", removal::NOT_KEPT, world.image(*index).shown())
        }));
    }
    plan.after.clone_from(&plan.before);
    plan
}

/// Everything that keeps a pull from being done.
fn refuse(world: &ScannedStore, layers: &PullRange, request: &PullRequest, refusals: &mut Vec<Error>) {
    let is_leaf = |index: &ImageIndex| world.image(*index).users.is_empty();
    if !layers.into.iter().all(is_leaf) || !layers.remove.is_empty() {
        refusals.extend(world.unguarded());
    }
    let concerned: Vec<ImageIndex> =
        layers.touched().into_iter().chain(layers.below.iter().copied()).collect();
    refusals.extend(world.begun(&concerned));
    refusals.extend(layers.touched().iter().filter_map(|index| world.untouchable(*index)));
    refusals.extend(layers.into.iter().filter_map(|index| world.unfillable(*index)));
    for into in &layers.into {
        let snapshots = world.image(*into).qcow2().map_or(&[][..], |qcow2| &qcow2.snapshots);
        if snapshots.iter().any(|snapshot| snapshot.damage.is_some()) {
            let fact =
                "has an internal snapshot whose entry is damaged, and what shows through that cannot be kept";
            let sentence = format!("{} {fact}; restore it from a copy", world.image(*into).shown());
            refusals.push(Error::new(ErrorKind::Corrupt, sentence));
        }
        refusals.extend(
            layers.base.and_then(|base| world.uncounted(*into, &world.image(*into).place.path, base)),
        );
        let backing = Some(layers.base.map(|base| world.backing_name(*into, base)));
        refusals::check_header(world, *into, &HeaderChange { backing, frozen: None }, refusals);
        let stack: Vec<ImageIndex> = [*into].into_iter().chain(layers.below.iter().copied()).collect();
        refusals
            .extend(world.catalog.view_problem(&stack).map(|problem| Error::new(ErrorKind::Broken, problem)));
    }
    if let Some(left) = layers.between.iter().find(|index| !layers.remove.contains(index))
        && freeze::may_be_marked(world, *left)
    {
        freeze::check_freeze(world, *left, refusals);
    }
    refusals::inner_snapshots(world, layers.remove.iter().copied(), request.discard_internal, refusals);
    refusals::bitmaps(world, layers.remove.iter().copied(), request.discard_bitmaps, refusals);
}
