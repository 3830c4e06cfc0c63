//! Pull: the layers between a layer and a base are copied into the layer, which is backed by the base
//! afterwards.
//!
//! Promises: no view changes or becomes invalid at any moment; a guest's write always wins. A layer that
//! becomes a leaf is marked as frozen before it is one. An interrupted pull continues where it was, since a
//! copied range is not copied again.

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
use super::virsh::DomainDisk;
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec};

pub(super) use fill::Filling;
pub(super) use job::{begin, begin_with, examine, resume};

/// The words of `pull`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullRequest {
    /// The backing file afterwards; none: no backing file.
    pub base: Option<Vec<u8>>,
    /// The layer that is filled, as a view's name; none: the active one.
    pub into: Option<Vec<u8>>,
    /// Whether layers that are no longer needed are removed.
    pub delete: bool,
    /// Whether internal snapshots of those may be lost.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may be lost.
    pub discard_bitmaps: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "pull",
    usage: "\
pull [base=VIEW|none] [into=VIEW] [delete] [discard-internal] [discard-bitmaps]

Copies the layers between base and a layer into that layer, which is backed by base afterwards.
  base=VIEW          the backing file afterwards (none: no backing file)
  into=VIEW          the layer that is filled (the active disk)
  delete             removes layers that are not needed afterwards
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
        assert!(self.base.as_deref() != Some(b"none"), "base=none is no name");
        check_view("base=", self.base.as_deref())?;
        check_view("into=", self.into.as_deref())
    }

    fn discards(&self) -> Discards {
        Discards { internal: self.discard_internal, bitmaps: self.discard_bitmaps }
    }

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let base = match &self.base {
            Some(name) => Some(disk.layer(Some(name))?),
            None => None,
        };
        (disk.layer(self.into.as_deref())? == 0).then(|| disk.pull(base)).flatten()
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, scan, chain, self)?;
        Ok((plan, layers.opened()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

/// The images of a pull, by index in one catalog. Nothing is filled if the layer has that base already.
#[derive(Clone, Debug, Default)]
pub(super) struct PullRange {
    /// The layers that are filled; all of them have the same backing file.
    pub(super) into: Vec<ImageIndex>,
    /// That backing file, and all layers below it, top first.
    pub(super) below: Vec<ImageIndex>,
    /// Their new backing file.
    pub(super) base: Option<ImageIndex>,
    /// The layers that drop out of their chains.
    pub(super) between: Vec<ImageIndex>,
    /// The layers that are removed afterwards.
    pub(super) remove: Vec<ImageIndex>,
}

impl PullRange {
    /// The images that are opened for it.
    pub(super) fn opened(&self) -> TouchedImages {
        TouchedImages { written: self.into.clone(), read: self.below.clone() }
    }

    /// The images that are changed or removed.
    fn touched(&self) -> Vec<ImageIndex> {
        self.into.iter().chain(&self.remove).copied().collect()
    }
}

fn layers(scan: &ScannedStore, chain: &ScannedChain, request: &PullRequest) -> Result<PullRange> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let views = &chain.views;
    let into = lookup::layer_or_active(scan, chain, request.into.as_deref(), "into")?;
    let name = scan.image(views.layers[into]).shown();
    if into + 1 >= views.layers.len() && request.base.is_some() {
        return Err(usage(format!("{name} has no backing file: there is nothing to pull")));
    }
    let base = request.base.as_ref().map(|base| lookup::layer(scan, chain, base)).transpose()?;
    match base {
        Some(base) if base == into => return Err(usage("the layer and its base are the same".to_owned())),
        Some(base) if base < into => {
            return Err(usage("base is above the layer; it has to be one of the layers below".to_owned()));
        }
        _ => {}
    }
    let base_index = base.map(|base| views.layers[base]);
    if is_backed_by(scan, views.layers[into], base_index)? {
        return Ok(PullRange::default());
    }
    let between = views.layers[into + 1..base.unwrap_or(views.layers.len())].to_vec();
    let remove = if request.delete { removable(scan, views.layers[into], &between) } else { Vec::new() };
    Ok(PullRange {
        into: vec![views.layers[into]],
        below: views.layers[into + 1..].to_vec(),
        base: base_index,
        between,
        remove,
    })
}

/// Whether a layer has that backing file already: then the command is done, and can be repeated.
/// `Broken` if its backing file is unknown.
pub(super) fn is_backed_by(scan: &ScannedStore, layer: ImageIndex, base: Option<ImageIndex>) -> Result<bool> {
    match &scan.image(layer).below {
        BackingLink::Nothing => Ok(base.is_none()),
        BackingLink::Image(below) => Ok(base == Some(*below)),
        BackingLink::Broken { image, .. } if *image == base => {
            let problem = scan.catalog.view_problem(&[layer]).unwrap_or_default();
            Err(Error::new(ErrorKind::Broken, problem))
        }
        BackingLink::Broken { .. } => Ok(false),
    }
}

/// The plan of a command that has been carried out already.
pub(super) fn nothing_to_do(scan: &ScannedStore, chain: &ScannedChain) -> Plan {
    let tree = lookup::tree(scan, chain);
    let note = "nothing to do: the layer has that backing file already".to_owned();
    Plan { before: tree.clone(), after: tree, notes: vec![note], ..Plan::default() }
}

/// Of the layers between: those that this store froze, that have no other overlay, and that have a backing
/// file.
fn removable(scan: &ScannedStore, into: ImageIndex, between: &[ImageIndex]) -> Vec<ImageIndex> {
    let mut gone = vec![into];
    let is_lowest = |index: ImageIndex| scan.backing_of(index).is_none();
    for index in between {
        let image = scan.image(*index);
        let may_go = image.frozen.is_some() && !is_lowest(*index) && scan.untouchable(*index).is_none();
        if !may_go || !scan.others_using(*index, &gone).is_empty() {
            break;
        }
        gone.push(*index);
    }
    gone.split_off(1)
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &PullRequest,
) -> Result<(Plan, PullRange)> {
    let chain = scan.chain(path)?;
    let layers = layers(scan, &chain, request)?;
    if layers.into.is_empty() {
        return Ok((nothing_to_do(scan, &chain), layers));
    }
    let mut plan = plan_of(context, scan, &chain, &layers, request);
    let into = &scan.image(layers.into[0]).place.path;
    let first = plan.before.iter().position(|line| line.path == *into).unwrap_or(0);
    if let Some(line) = plan.after.get_mut(first) {
        "with the bytes of the layers between".clone_into(&mut line.note);
        let end = (first + 1 + layers.between.len()).min(plan.after.len());
        plan.after.drain(first + 1..end);
    }
    Ok((plan, layers))
}

/// The plan for a range that is known already, without the chain afterwards; only the flags of the request
/// count.
pub(super) fn plan_of(
    context: &Context,
    scan: &ScannedStore,
    chain: &ScannedChain,
    layers: &PullRange,
    request: &PullRequest,
) -> Plan {
    let mut plan = Plan { before: lookup::tree(scan, chain), ..Plan::default() };
    refuse(scan, layers, request, &mut plan.refusals);
    if let Some(first) = layers.into.first().filter(|_| !layers.below.is_empty()) {
        let store = context.store();
        let counted = store
            .open_view(&scan.catalog, &layers.below, ViewPart::Active, Stability::Frozen)
            .and_then(|open| {
                let frozen = store.part_of(&open.view, 0, layers.between.len());
                CommitSegment { live: None, frozen }.data_len()
            });
        refusals::count(scan, *first, counted.map(|bytes| bytes * layers.into.len() as u64), &mut plan);
        let fact =
            "bytes that the layer holds itself are not copied; their number is known only when the job runs";
        plan.notes.push(fact.into());
    }
    plan.removed = layers.remove.iter().map(|index| scan.image(*index).place.path.clone()).collect();
    plan.invalid = lookup::views_of(chain, layers.remove.iter().copied());
    let is_far = |index: &&ImageIndex| !scan.store.keeps_trash(scan.image(**index).stat.id);
    if scan.store.has_trash() {
        plan.notes.extend(layers.remove.iter().filter(is_far).map(|index| {
            let fact = "lies on another file system than the store's own directory";
            format!("{}{}: it {fact}", removal::NOT_KEPT, scan.image(*index).shown())
        }));
    }
    plan.after.clone_from(&plan.before);
    plan
}

/// Every reason why a pull cannot be done.
fn refuse(scan: &ScannedStore, layers: &PullRange, request: &PullRequest, refusals: &mut Vec<Error>) {
    let is_leaf = |index: &ImageIndex| scan.image(*index).users.is_empty();
    if !layers.into.iter().all(is_leaf) || !layers.remove.is_empty() {
        refusals.extend(scan.unguarded());
    }
    let concerned: Vec<ImageIndex> =
        layers.touched().into_iter().chain(layers.below.iter().copied()).collect();
    refusals.extend(scan.begun(&concerned));
    refusals.extend(layers.touched().iter().filter_map(|index| scan.untouchable(*index)));
    refusals.extend(layers.into.iter().filter_map(|index| scan.unfillable(*index)));
    for into in &layers.into {
        let snapshots = scan.image(*into).qcow2().map_or(&[][..], |qcow2| &qcow2.snapshots);
        if snapshots.iter().any(|snapshot| snapshot.damage.is_some()) {
            let fact = "has an internal snapshot with a damaged entry, whose content cannot be kept";
            let sentence = format!("{} {fact}; restore it from a copy", scan.image(*into).shown());
            refusals.push(Error::new(ErrorKind::Corrupt, sentence));
        }
        refusals
            .extend(layers.base.and_then(|base| scan.uncounted(*into, &scan.image(*into).place.path, base)));
        let backing = Some(layers.base.map(|base| scan.backing_name(*into, base)));
        refusals::check_header(scan, *into, &HeaderChange { backing, frozen: None }, refusals);
        let stack: Vec<ImageIndex> = [*into].into_iter().chain(layers.below.iter().copied()).collect();
        refusals
            .extend(scan.catalog.view_problem(&stack).map(|problem| Error::new(ErrorKind::Broken, problem)));
    }
    if let Some(left) = layers.between.iter().find(|index| !layers.remove.contains(index))
        && freeze::may_be_marked(scan, *left)
    {
        freeze::check_freeze(scan, *left, refusals);
    }
    refusals::inner_snapshots(scan, layers.remove.iter().copied(), request.discard_internal, refusals);
    refusals::bitmaps(scan, layers.remove.iter().copied(), request.discard_bitmaps, refusals);
}
