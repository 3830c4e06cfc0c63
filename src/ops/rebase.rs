//! Rebase: a layer gets another backing file.
//!
//! The safe way is a pull: the layer's bytes stay the same, and ranges where the two backing files differ are
//! copied. The unsafe way changes the name only, for files that were moved: then no view that contains the
//! layer may be open.

use std::path::Path;
use std::sync::Arc;

use crate::chain::MAX_DEPTH;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::{HeaderChange, change_header};
use crate::store::{Format, ImageIndex, Store, ViewPart};
use crate::units::Stability;

use super::check::{check_path, check_view};
use super::command::Command;
use super::context::Context;
use super::dropped;
use super::freeze;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::plan::{Plan, PlanLayer};
use super::pull;
use super::pull::PullRequest;
use super::refusals;
use super::removal;
use super::scanned_store::{ScannedChain, ScannedStore};
use super::words::{LineBuilder, ParsedWords, VerbSpec, usage};

/// The words of `rebase`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebaseRequest {
    /// The layer that gets another backing file, as a view's name; none: the active one.
    pub layer: Option<Vec<u8>>,
    /// A file as the layer's header would name it, or a view of the chain; none: no backing file.
    pub base: Option<Vec<u8>>,
    /// Whether only the name in the header is changed.
    pub is_unsafe: bool,
    /// Whether layers may drop out of the chain.
    pub drop_layers: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "rebase",
    usage: "\
rebase [layer=VIEW] base=FILE|none [unsafe [drop-layers]]

Gives a layer another backing file.
  layer=VIEW   the layer (the active disk)
  base=FILE    as the layer's header would name it, or a view of this chain; none: no backing file
  unsafe       changes the name only: for a backing file that was moved or renamed, even if the old one is
               gone. The layer is the one right above that file. Without unsafe, the layer's bytes stay the
               same: ranges that differ are copied
  drop-layers  with unsafe: FILE may differ from the old backing file; layers may drop out of the chain
",
    positional: None,
    keys: &["layer", "base"],
    flags: &["unsafe", "drop-layers"],
    is_for_store: false,
};

impl Command for RebaseRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            layer: words.value("layer"),
            base: Some(words.needed("base")?).filter(|base| base != b"none"),
            is_unsafe: words.flag("unsafe"),
            drop_layers: words.flag("drop-layers"),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { layer, base, is_unsafe, drop_layers } = self;
        line.value("layer", layer.as_deref());
        line.value("base", Some(base.as_deref().unwrap_or(b"none")));
        line.flag("unsafe", *is_unsafe);
        line.flag("drop-layers", *drop_layers);
    }

    fn check(&self) -> Result<()> {
        if self.drop_layers && !self.is_unsafe {
            return Err(usage("drop-layers goes with unsafe; a safe rebase loses nothing"));
        }
        assert!(self.base.as_deref() != Some(b"none"), "base=none is no name");
        check_view("layer=", self.layer.as_deref())?;
        self.base.as_deref().map_or(Ok(()), check_path)
    }

    fn introduce(&self, context: &Context, chain: &Path) {
        introduce(context.store(), chain, self);
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, scan, chain, self)?;
        Ok((plan, layers.touched()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

/// The images of a rebase.
pub(super) struct RebaseRange {
    /// The layer that gets another backing file, counted from the leaf.
    depth: usize,
    layer: ImageIndex,
    base: Option<ImageIndex>,
    /// The layers that drop out of its chain.
    between: Vec<ImageIndex>,
    /// Whether it has that backing file already.
    is_done: bool,
}

impl RebaseRange {
    /// The images that are opened for it; the plan itself opens the layers of the base.
    pub(super) fn touched(&self) -> TouchedImages {
        TouchedImages { written: vec![self.layer], read: Vec::new() }
    }
}

fn layers(scan: &ScannedStore, chain: &ScannedChain, request: &RebaseRequest) -> Result<RebaseRange> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let depth = lookup::layer_or_active(scan, chain, request.layer.as_deref(), "layer")?;
    let layer = chain.views.layers[depth];
    let image = scan.image(layer);
    if image.format != Some(Format::Qcow2) {
        let fact = "is raw, and has no header that could name a backing file";
        return Err(Error::new(ErrorKind::Unsupported, format!("{} {fact}", image.shown())));
    }
    let base = request.base.as_ref().map(|name| base(scan, chain, layer, name)).transpose()?;
    let above = base.map(|base| scan.catalog.layers(base)).unwrap_or_default();
    if above.contains(&layer) {
        let base = scan.image(above[0]).shown();
        return Err(usage(format!("{base} is itself backed by {}: that would be a loop", image.shown())));
    }
    let below = &chain.views.layers[depth + 1..];
    let between = below.iter().copied().take_while(|index| !above.contains(index)).collect();
    Ok(RebaseRange { depth, layer, base, between, is_done: false })
}

/// Adds the file that `base=` names to the scan: a directory for backing files may hold files that back no
/// image yet.
pub(super) fn introduce(store: &Store, chain: &Path, request: &RebaseRequest) {
    let Some(name) = &request.base else { return };
    let catalog = store.catalog();
    let Some(leaf) = catalog.chain(chain) else { return };
    let views = store.chain_views(&catalog, leaf);
    let layer = request.layer.as_ref().map_or(Some(0), |layer| views.find(layer).map(|view| view.layer));
    if let Some(layer) = layer
        && let Ok(place) = store.named_by(&catalog.images[views.layers[layer]].place, name)
        && store.roots()[place.root].stat(&place.path).is_ok()
    {
        store.introduce(place);
    }
}

/// The image that `base=` names: a file as the header would name it, else a layer of the chain.
fn base(scan: &ScannedStore, chain: &ScannedChain, layer: ImageIndex, name: &[u8]) -> Result<ImageIndex> {
    match scan.named_by(layer, name) {
        Err(error) if error.kind() == ErrorKind::NotFound => match chain.views.find(name) {
            Some(view) if view.snapshot.is_some() => {
                let fact = "is an internal snapshot, which cannot back an image; clone it first";
                Err(Error::new(ErrorKind::Usage, format!("{} {fact}", String::from_utf8_lossy(name))))
            }
            Some(view) => Ok(chain.views.layers[view.layer]),
            None => Err(error),
        },
        found => found,
    }
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &RebaseRequest,
) -> Result<(Plan, RebaseRange)> {
    let chain = scan.chain(path)?;
    let layers = layers(scan, &chain, request)?;
    if pull::is_backed_by(scan, layers.layer, layers.base).or_else(|error| {
        // A rebase with `unsafe` may be given to change the spelling of the name only.
        if request.is_unsafe { Ok(false) } else { Err(error) }
    })? {
        return Ok((pull::nothing_to_do(scan, &chain), RebaseRange { is_done: true, ..layers }));
    }
    let mut plan = if request.is_unsafe {
        plan_unsafe(context, scan, &chain, &layers, request.drop_layers)
    } else {
        pull::plan_of(context, scan, &chain, &as_pull(&chain, &layers), &PullRequest::default())
    };
    let refusals = &mut plan.refusals;
    if let Some(base) = layers.base {
        refuse_base(context, scan, &layers, base, request.is_unsafe, refusals);
        let image = scan.image(base);
        if scan.is_active_disk(base) {
            let fact = "is an active disk now; it becomes a snapshot, since it will have an overlay";
            plan.notes.push(format!("{} {fact}", image.shown()));
        }
    }
    plan.after = after(scan, &chain, &layers);
    Ok((plan, layers))
}

fn as_pull(chain: &ScannedChain, layers: &RebaseRange) -> pull::PullRange {
    pull::PullRange {
        into: vec![layers.layer],
        below: chain.views.layers[layers.depth + 1..].to_vec(),
        base: layers.base,
        between: layers.between.clone(),
        remove: Vec::new(),
    }
}

fn refuse_base(
    context: &Context,
    scan: &ScannedStore,
    layers: &RebaseRange,
    base: ImageIndex,
    is_unsafe: bool,
    refusals: &mut Vec<Error>,
) {
    let below = scan.catalog.layers(base);
    if !is_unsafe {
        refusals.extend(scan.begun(&below));
    }
    let above = scan
        .catalog
        .chains()
        .filter_map(|(_, leaf)| scan.catalog.layers(leaf).iter().position(|index| *index == layers.layer));
    let depth = above.max().unwrap_or(0) + 1 + below.len();
    if depth > MAX_DEPTH {
        let fact = format!("would be {depth} layers deep, and the limit is {MAX_DEPTH}; merge some of them");
        refusals.push(Error::new(ErrorKind::Limit, format!("the chain {fact}")));
    }
    // A process that writes the base keeps it from being opened.
    match context.store().open_view(&scan.catalog, &below, ViewPart::Active, Stability::Frozen) {
        Err(error) if !is_unsafe || error.kind() == ErrorKind::Busy => refusals.push(error),
        _ => {}
    }
}

fn plan_unsafe(
    context: &Context,
    scan: &ScannedStore,
    chain: &ScannedChain,
    layers: &RebaseRange,
    drop_layers: bool,
) -> Plan {
    let mut plan = Plan { before: lookup::tree(scan, chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    let image = scan.image(layers.layer);
    if !image.users.is_empty() {
        refusals.extend(scan.unguarded());
    }
    refusals.extend(scan.untouchable(layers.layer));
    let is_whole = scan.catalog.view_problem(&scan.catalog.layers(layers.layer)).is_none();
    let above = &chain.views.layers[..=layers.depth];
    refusals.extend(scan.begun(above));
    let others: Vec<String> = above.iter().flat_map(|layer| scan.others_using(*layer, above)).collect();
    if is_whole && !others.is_empty() {
        let fact = "is used by other images as well, which might show other bytes then";
        let sentence = format!("{} {fact}: {}; do without unsafe", image.shown(), others.join(", "));
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    let dropped = dropped::refusal(scan, chain, layers.layer, layers.base, &layers.between);
    refusals.extend(dropped.filter(|_| !drop_layers));
    refusals.extend(layers.base.and_then(|base| scan.uncounted(layers.layer, &image.place.path, base)));
    let backing = Some(layers.base.map(|base| scan.backing_name(layers.layer, base)));
    refusals::check_header(scan, layers.layer, &HeaderChange { backing, frozen: None }, refusals);
    refuse_open(context, scan, &chain.path, layers.layer, refusals);
    let fact = "only the name is changed: the layer's bytes stay the same only if the new backing file holds \
        the same bytes";
    plan.notes.push(fact.into());
    if !layers.between.is_empty() {
        let names: Vec<String> = layers.between.iter().map(|index| scan.image(*index).shown()).collect();
        plan.notes.push(format!("no longer part of the chain: {}", names.join(", ")));
    }
    removal::note_dependent_trash(scan, &[layers.layer], &mut plan);
    plan
}

/// No view that contains the layer may be open.
fn refuse_open(
    context: &Context,
    scan: &ScannedStore,
    chain: &Path,
    layer: ImageIndex,
    refusals: &mut Vec<Error>,
) {
    let names = context.store().exposed(scan.image(layer).stat.id, &[]);
    if !names.is_empty() {
        refusals.push(refusals::still_open(context, chain, &names, "this may change their bytes"));
    }
}

fn after(scan: &ScannedStore, chain: &ScannedChain, layers: &RebaseRange) -> Vec<PlanLayer> {
    let below = layers.base.map(|base| scan.catalog.layers(base)).unwrap_or_default();
    let stays = chain.views.layers[..=layers.depth].iter().copied();
    let mut after: Vec<PlanLayer> =
        stays.chain(below).map(|index| lookup::line(scan, chain, index)).collect();
    "with another backing file".clone_into(&mut after[layers.depth].note);
    after
}

/// Begins a rebase, or carries it out if only a name is changed.
pub(super) fn begin(
    context: &Context,
    path: &Path,
    request: &RebaseRequest,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let (lock, scan) = ScannedStore::begin(store)?;
    let (plan, layers) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    if layers.is_done {
        return Ok(None);
    }
    if request.is_unsafe {
        locks.extend(&scan.chains_of(&[layers.layer]))?;
        change_name(context, &scan, path, &layers)?;
        drop(lock);
        return store.rescan().map(|_| None);
    }
    let found = as_pull(&scan.chain(path)?, &layers);
    let job = pull::begin_with(context, &scan, lock, path, &found, command, locks)?;
    Ok(Some(Box::new(job)))
}

fn change_name(context: &Context, scan: &ScannedStore, path: &Path, layers: &RebaseRange) -> Result<()> {
    let store: &Arc<Store> = context.store();
    let change = || {
        // The new base is locked against writers meanwhile. A base that cannot be read is accepted as well.
        let below = layers.base.map(|base| scan.catalog.layers(base));
        let base =
            below.map(|below| store.open_view(&scan.catalog, &below, ViewPart::Active, Stability::Frozen));
        let base = base
            .transpose()
            .or_else(|error| if error.kind() == ErrorKind::Busy { Err(error) } else { Ok(None) })?;
        let job = store.take_image(&scan.catalog, layers.layer)?;
        // The writer's locks keep other writers out, and a reader that opens the layer from here on reads the
        // new state.
        let mut refusals = Vec::new();
        refuse_open(context, scan, path, layers.layer, &mut refusals);
        refusals::first(refusals)?;
        if let Some(left) = layers.between.first()
            && scan.image(*left).users == [layers.layer]
            && freeze::may_be_marked(scan, *left)
        {
            freeze::freeze(store, scan, *left, &Frozen::now(""))?;
        }
        removal::remove_dependent_trash(scan, &[scan.image(layers.layer).stat.id])?;
        let backing = Some(layers.base.map(|base| scan.backing_name(layers.layer, base)));
        change_header(job.name(), &*job.file()?, &HeaderChange { backing, frozen: None })?;
        drop(base);
        job.finish()
    };
    if scan.is_active_disk(layers.layer) {
        return store.while_closed(scan.image(layers.layer), change);
    }
    change()
}
