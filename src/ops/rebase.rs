//! Rebase: a layer is put on another backing file.
//!
//! Safely, which is a pull: what the layer shows stays the same, and where the two backing files differ it is
//! copied. Or by name alone, for files that were moved: then nobody may have a view open that the layer is
//! part of.

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
    /// The layer that is put on something else, as a view's name; none: the active one.
    pub layer: Option<Vec<u8>>,
    /// A file as the layer's header would name it, or a view of the chain; none: nothing.
    pub base: Option<Vec<u8>>,
    /// Whether only the name in the header is changed.
    pub is_unsafe: bool,
    /// Whether layers may drop out of the chain by that.
    pub drop_layers: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "rebase",
    usage: "\
rebase [layer=VIEW] base=FILE|none [unsafe [drop-layers]]

Puts a layer on another backing file.
  layer=VIEW   the layer (the active disk)
  base=FILE    as the layer's header would name it, or a view of this chain; none: it stands on nothing
  unsafe       only the name is changed: for a backing file that was moved or renamed, also when the old one is gone.
               The layer is the one right above that file. Without it what the layer shows stays the same, and what
               differs is copied
  drop-layers  with unsafe: FILE need not be the old backing file, and what lies between may drop out of the chain
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
        assert!(self.base.as_deref() != Some(b"none"), "standing on nothing is no name");
        check_view("layer=", self.layer.as_deref())?;
        self.base.as_deref().map_or(Ok(()), check_path)
    }

    fn introduce(&self, context: &Context, chain: &Path) {
        introduce(context.store(), chain, self);
    }

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, world, chain, self)?;
        Ok((plan, layers.touched()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

/// What a rebase concerns.
pub(super) struct RebaseRange {
    /// What is put on something else, counted from the leaf.
    depth: usize,
    layer: ImageIndex,
    base: Option<ImageIndex>,
    /// What the layer stands on no more.
    between: Vec<ImageIndex>,
    /// Whether it stands there already.
    is_done: bool,
}

impl RebaseRange {
    /// What is opened for it; what the base consists of is opened by the plan itself.
    pub(super) fn touched(&self) -> TouchedImages {
        TouchedImages { written: vec![self.layer], read: Vec::new() }
    }
}

fn layers(world: &ScannedStore, chain: &ScannedChain, request: &RebaseRequest) -> Result<RebaseRange> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let depth = lookup::layer_or_active(world, chain, request.layer.as_deref(), "layer")?;
    let layer = chain.views.layers[depth];
    let image = world.image(layer);
    if image.format != Some(Format::Qcow2) {
        let fact = "is raw, and has no header in which a backing file could be named";
        return Err(Error::new(ErrorKind::Unsupported, format!("{} {fact}", image.shown())));
    }
    let base = request.base.as_ref().map(|name| base(world, chain, layer, name)).transpose()?;
    let above = base.map(|base| world.catalog.layers(base)).unwrap_or_default();
    if above.contains(&layer) {
        let base = world.image(above[0]).shown();
        return Err(usage(format!("{base} stands on {} itself: that would be a loop", image.shown())));
    }
    let below = &chain.views.layers[depth + 1..];
    let between = below.iter().copied().take_while(|index| !above.contains(index)).collect();
    Ok(RebaseRange { depth, layer, base, between, is_done: false })
}

/// Has the store look at the file that `base=` names, if it means one: in a directory for backing files there
/// may be some that nobody stands on yet.
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

/// The image that `base=` means: a file as the header would name it, else a layer of the chain.
fn base(world: &ScannedStore, chain: &ScannedChain, layer: ImageIndex, name: &[u8]) -> Result<ImageIndex> {
    match world.named_by(layer, name) {
        Err(error) if error.kind() == ErrorKind::NotFound => match chain.views.find(name) {
            Some(view) if view.snapshot.is_some() => {
                let fact = "is an internal snapshot, on which nothing can stand; clone it first";
                Err(Error::new(ErrorKind::Usage, format!("{} {fact}", String::from_utf8_lossy(name))))
            }
            Some(view) => Ok(chain.views.layers[view.layer]),
            None => Err(error),
        },
        found => found,
    }
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &RebaseRequest,
) -> Result<(Plan, RebaseRange)> {
    let chain = world.chain(path)?;
    let layers = layers(world, &chain, request)?;
    if pull::stands_already(world, layers.layer, layers.base).or_else(|error| {
        // Who gives another name only may mean just that.
        if request.is_unsafe { Ok(false) } else { Err(error) }
    })? {
        return Ok((pull::nothing_to_do(world, &chain), RebaseRange { is_done: true, ..layers }));
    }
    let mut plan = if request.is_unsafe {
        plan_unsafe(context, world, &chain, &layers, request.drop_layers)
    } else {
        pull::plan_of(context, world, &chain, &as_pull(&chain, &layers), &PullRequest::default())
    };
    let refusals = &mut plan.refusals;
    if let Some(base) = layers.base {
        refuse_base(context, world, &layers, base, request.is_unsafe, refusals);
        let image = world.image(base);
        if world.is_active_disk(base) {
            let fact = "is a disk of its own by now; it will be a snapshot, for something stands on it then";
            plan.notes.push(format!("{} {fact}", image.shown()));
        }
    }
    plan.after = after(world, &chain, &layers);
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
    world: &ScannedStore,
    layers: &RebaseRange,
    base: ImageIndex,
    is_unsafe: bool,
    refusals: &mut Vec<Error>,
) {
    let below = world.catalog.layers(base);
    if !is_unsafe {
        refusals.extend(world.begun(&below));
    }
    let above = world
        .catalog
        .chains()
        .filter_map(|(_, leaf)| world.catalog.layers(leaf).iter().position(|index| *index == layers.layer));
    let depth = above.max().unwrap_or(0) + 1 + below.len();
    if depth > MAX_DEPTH {
        let fact =
            format!("would be {depth} layers deep, and at most {MAX_DEPTH} are read; merge some of them");
        refusals.push(Error::new(ErrorKind::Limit, format!("the chain {fact}")));
    }
    // Whoever writes it keeps us from opening it.
    match context.store().open_view(&world.catalog, &below, ViewPart::Active, Stability::Frozen) {
        Err(error) if !is_unsafe || error.kind() == ErrorKind::Busy => refusals.push(error),
        _ => {}
    }
}

fn plan_unsafe(
    context: &Context,
    world: &ScannedStore,
    chain: &ScannedChain,
    layers: &RebaseRange,
    drop_layers: bool,
) -> Plan {
    let mut plan = Plan { before: lookup::tree(world, chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    let image = world.image(layers.layer);
    if !image.users.is_empty() {
        refusals.extend(world.unguarded());
    }
    refusals.extend(world.untouchable(layers.layer));
    let is_whole = world.catalog.view_problem(&world.catalog.layers(layers.layer)).is_none();
    let above = &chain.views.layers[..=layers.depth];
    refusals.extend(world.begun(above));
    let others: Vec<String> = above.iter().flat_map(|layer| world.others_using(*layer, above)).collect();
    if is_whole && !others.is_empty() {
        let fact = "is used by other images as well, which might show something else then";
        let sentence = format!("{} {fact}: {}; do without unsafe", image.shown(), others.join(", "));
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    let dropped = dropped::refusal(world, chain, layers.layer, layers.base, &layers.between);
    refusals.extend(dropped.filter(|_| !drop_layers));
    refusals.extend(layers.base.and_then(|base| world.uncounted(layers.layer, &image.place.path, base)));
    let backing = Some(layers.base.map(|base| world.backing_name(layers.layer, base)));
    refusals::check_header(world, layers.layer, &HeaderChange { backing, frozen: None }, refusals);
    refuse_open(context, world, &chain.path, layers.layer, refusals);
    let fact = "only the name is changed: what is shown stays the same only if the new backing file holds \
        the same bytes";
    plan.notes.push(fact.into());
    if !layers.between.is_empty() {
        let names: Vec<String> = layers.between.iter().map(|index| world.image(*index).shown()).collect();
        plan.notes.push(format!("no longer part of the chain: {}", names.join(", ")));
    }
    removal::note_trash(world, &[layers.layer], &mut plan);
    plan
}

/// Nobody may have anything open that the layer is part of.
fn refuse_open(
    context: &Context,
    world: &ScannedStore,
    chain: &Path,
    layer: ImageIndex,
    refusals: &mut Vec<Error>,
) {
    let names = context.store().exposed(world.image(layer).stat.id, &[]);
    if !names.is_empty() {
        refusals.push(refusals::still_open(context, chain, &names, "this may change what they show"));
    }
}

fn after(world: &ScannedStore, chain: &ScannedChain, layers: &RebaseRange) -> Vec<PlanLayer> {
    let below = layers.base.map(|base| world.catalog.layers(base)).unwrap_or_default();
    let stays = chain.views.layers[..=layers.depth].iter().copied();
    let mut after: Vec<PlanLayer> =
        stays.chain(below).map(|index| lookup::line(world, chain, index)).collect();
    "put on another backing file".clone_into(&mut after[layers.depth].note);
    after
}

/// Begins a rebase, or does it if only a name is changed.
pub(super) fn begin(
    context: &Context,
    path: &Path,
    request: &RebaseRequest,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let (lock, world) = ScannedStore::begin(store)?;
    let (plan, layers) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    if layers.is_done {
        return Ok(None);
    }
    if request.is_unsafe {
        tokens.extend(&world.chains_of(&[layers.layer]))?;
        change_name(context, &world, path, &layers)?;
        drop(lock);
        return store.rescan().map(|_| None);
    }
    let found = as_pull(&world.chain(path)?, &layers);
    let job = pull::begin_with(context, &world, lock, path, &found, command, tokens)?;
    Ok(Some(Box::new(job)))
}

fn change_name(context: &Context, world: &ScannedStore, path: &Path, layers: &RebaseRange) -> Result<()> {
    let store: &Arc<Store> = context.store();
    let change = || {
        // Nobody comes to write the new base meanwhile. What cannot be read may be put below it all the same.
        let below = layers.base.map(|base| world.catalog.layers(base));
        let base =
            below.map(|below| store.open_view(&world.catalog, &below, ViewPart::Active, Stability::Frozen));
        let base = base
            .transpose()
            .or_else(|error| if error.kind() == ErrorKind::Busy { Err(error) } else { Ok(None) })?;
        let job = store.take_image(&world.catalog, layers.layer)?;
        // Under the writer's locks nobody comes to write it, and who reads it from here on reads what it is
        // then.
        let mut refusals = Vec::new();
        refuse_open(context, world, path, layers.layer, &mut refusals);
        refusals::first(refusals)?;
        if let Some(left) = layers.between.first()
            && world.image(*left).users == [layers.layer]
            && freeze::may_be_marked(world, *left)
        {
            freeze::freeze(store, world, *left, &Frozen::now(""))?;
        }
        removal::forget_trash(world, &[world.image(layers.layer).stat.id])?;
        let backing = Some(layers.base.map(|base| world.backing_name(layers.layer, base)));
        change_header(job.name(), &*job.file()?, &HeaderChange { backing, frozen: None })?;
        drop(base);
        job.finish()
    };
    if world.is_active_disk(layers.layer) {
        return store.while_closed(world.image(layers.layer), change);
    }
    change()
}
