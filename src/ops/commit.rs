//! Commit: what top and the layers between hold is merged into base, and whatever stood on top stands on base.
//!
//! Promises: the view through top, and all above it, has the same bytes at every moment, for top covers
//! what is written below it; views that change are hidden, durably, before the first byte under them does.
//! Until the switch a commit into a qcow2 base can be called back without a trace; one into a raw base cannot,
//! and what it has spoilt stays hidden until it is taken up again. Every step can be told from the files to be done,
//! so that a commit that was cut off is done again from the beginning, or from the switch on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::HeaderChange;
use crate::image::write::Writer;
use crate::io::{Claim, directory_of};
use crate::store::{
    ActiveJob, Deed, Format, ImageIndex, Intent, JobImage, Keeping, Mirror, Named, OpenView, OwnedIntent, Store,
    ViewPart, shown,
};

use super::board::{Progress, Tokens};
use super::copy::{PIECE, Segment};
use super::engine::Engine;
use super::finish::{self, Child, Finish};
use super::mirror::{MergeMirror, zero_from};
use super::plan::{Plan, PlanLayer};
use super::request::CommitRequest;
use super::world::{Chain, World, beside};

/// What a commit concerns, by index in one catalog.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    /// The layers of the chain, leaf first.
    chain: Vec<ImageIndex>,
    top: ImageIndex,
    base: ImageIndex,
    /// From below top to above base.
    between: Vec<ImageIndex>,
    /// Those that stand on top.
    children: Vec<ImageIndex>,
    /// The layers below base, top first.
    below: Vec<ImageIndex>,
    /// Whether top is the active layer.
    is_active: bool,
}

impl Layers {
    /// Top and all between: what is merged.
    fn segment(&self) -> Vec<ImageIndex> {
        std::iter::once(self.top).chain(self.between.iter().copied()).collect()
    }
}

/// Finds what the words of a commit mean.
fn layers(world: &World, chain: &Chain, request: &CommitRequest) -> Result<Layers> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let views = &chain.views;
    let top = match &request.top {
        Some(name) => finish::layer(chain, name)?,
        None => match views.active() {
            Some(active) => active.layer,
            None => return Err(usage(format!("{} has no active layer; say top=", shown(&chain.path)))),
        },
    };
    let base = match &request.base {
        Some(name) => finish::layer(chain, name)?,
        None => top + 1,
    };
    if base >= views.layers.len() {
        let name = world.image(views.layers[top]).shown();
        return Err(usage(format!("{name} stands on nothing that it could be merged into")));
    }
    if base <= top {
        let fact = if base == top { "top and base are the same layer" } else { "base is above top" };
        return Err(usage(format!("{fact}; base has to be one of the layers below top")));
    }
    let is_active = top == 0 && views.active().is_some();
    Ok(Layers {
        top: views.layers[top],
        base: views.layers[base],
        between: views.layers[top + 1..base].to_vec(),
        children: world.image(views.layers[top]).users.clone(),
        below: views.layers[base + 1..].to_vec(),
        chain: views.layers.clone(),
        is_active,
    })
}

/// What the request would do, with every refusal.
pub(super) fn plan(engine: &Engine, world: &World, path: &Path, request: &CommitRequest) -> Result<(Plan, Layers)> {
    let chain = world.chain(path)?;
    let layers = layers(world, &chain, request)?;
    let mut plan = Plan { before: finish::tree(world, &chain), ..Plan::default() };
    refusals(world, &layers, request, &mut plan);
    let is_undoable = is_undoable(world, &layers);
    let base = world.image(layers.base);
    if !is_undoable {
        let fact = "cannot be called back once it is begun: if it is cut off, the layers from it up to below top stay \
                    hidden until it is taken up again";
        plan.notes.push(format!("a commit into {} {fact}", base.shown()));
    }
    plan.invalid = finish::views_of(&chain, std::iter::once(layers.base).chain(layers.between.iter().copied()));
    if !request.keep {
        let is_inner = |name: &Vec<u8>| chain.views.find(name).is_some_and(|view| view.snapshot.is_some());
        plan.invalid.extend(finish::views_of(&chain, std::iter::once(layers.top)).into_iter().filter(is_inner));
    }
    let gone = if request.keep { Vec::new() } else { layers.segment() };
    if layers.is_active {
        let name = final_name(world, &layers);
        if name != base.place.path {
            plan.renamed.push((base.place.path.clone(), name));
        }
    }
    if request.keep {
        plan.renamed.extend(layers.between.iter().map(|index| {
            let path = &world.image(*index).place.path;
            (path.clone(), spoilt_name(path))
        }));
    }
    let is_replaced = |path: &PathBuf| plan.renamed.iter().any(|(_, new)| new == path);
    plan.removed =
        gone.iter().map(|index| world.image(*index).place.path.clone()).filter(|p| !is_replaced(p)).collect();
    // What it would amount to is told of one that is refused, too, if it can be told.
    let segment = frozen_segment(engine.store(), world, &layers);
    match segment.and_then(|(segment, _views)| segment.data_len()) {
        Ok(bytes) => plan.bytes = bytes,
        Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
        Err(_) => {}
    }
    plan.space = plan.bytes;
    finish::check_room(world, layers.base, plan.space, &mut plan.refusals);
    exposed(engine, world, &chain.path, &layers, &mut plan.refusals);
    plan.after = after(&plan, &layers, request);
    Ok((plan, layers))
}

/// Bytes of what is merged, by the files alone: what a guest has not flushed yet may be missing.
fn frozen_segment(store: &Arc<Store>, world: &World, layers: &Layers) -> Result<(Segment, OpenView)> {
    let view = store.open_view(
        &world.catalog,
        &layers.chain[position(layers, layers.top)..],
        ViewPart::Active,
        layers.is_active,
    )?;
    let depth = layers.segment().len();
    let segment = Segment { live: None, frozen: store.part_of(&view.view, 0, depth) };
    Ok((segment, view))
}

fn position(layers: &Layers, index: ImageIndex) -> usize {
    layers.chain.iter().position(|layer| *layer == index).expect("a layer of the chain")
}

fn is_undoable(world: &World, layers: &Layers) -> bool {
    let base = world.image(layers.base);
    base.format == Some(Format::Qcow2) && base.data_file.is_none()
}

fn refusals(world: &World, layers: &Layers, request: &CommitRequest, plan: &mut Plan) {
    let refusals = &mut plan.refusals;
    refusals.extend(world.unguarded());
    let all: Vec<ImageIndex> =
        layers.segment().into_iter().chain([layers.base]).chain(layers.children.clone()).collect();
    refusals.extend(world.begun(&all));
    refusals.extend(all.iter().filter_map(|index| world.untouchable(*index)));
    if let Some(problem) = world.catalog.view_problem(&layers.chain[position(layers, layers.top)..]) {
        refusals.push(Error::new(ErrorKind::Broken, problem));
    }
    if layers.is_active && request.keep {
        let fact = "keep leaves top's file valid, which the active layer's cannot be while base is written; take a \
                    snapshot first, and commit that";
        refusals.push(Error::new(ErrorKind::Usage, fact));
    }
    // Whatever others depend on is never changed under them.
    let merged: Vec<ImageIndex> = layers.segment();
    for index in layers.between.iter().chain([&layers.base]) {
        sharers(world, *index, &merged, refusals);
    }
    let known: Vec<ImageIndex> = layers.children.clone();
    sharers(world, layers.top, &known, refusals);
    let holders = merged.iter().chain([&layers.base]).copied();
    finish::inner_snapshots(world, holders, request.discard_internal, refusals);
    if request.keep && finish::inner_names(world, layers.top).is_some() {
        let fact = "holds internal snapshots, which would show other bytes if it were kept; delete them, or do without \
                    keep";
        refusals.push(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", world.image(layers.top).shown())));
    }
    if layers.is_active {
        fall_refusals(world, layers, refusals);
    }
    let kept = request.keep.then_some(layers.top).filter(|top| world.stands_on(*top) != Some(layers.base));
    for index in layers.children.iter().copied().chain(kept) {
        let backing = Some(Some(world.backing_name(index, layers.base)));
        finish::check_header(world, index, &HeaderChange { backing, frozen: None }, refusals);
    }
    if request.keep {
        finish::check_freeze(world, layers.top, refusals);
    }
    if layers.children.is_empty() && !layers.is_active {
        finish::check_freeze(world, layers.base, refusals);
    }
    if request.keep {
        for path in layers.between.iter().map(|index| spoilt_name(&world.image(*index).place.path)) {
            finish::taken(world, &path, refusals);
        }
    }
}

/// What keeps a base from taking the active layer's place.
fn fall_refusals(world: &World, layers: &Layers, refusals: &mut Vec<Error>) {
    let (top, base) = (world.image(layers.top), world.image(layers.base));
    let name = final_name(world, layers);
    if name != top.place.path && name != base.place.path {
        finish::taken(world, &name, refusals);
    }
    if !world.store.options().reads_as(&name, base.format.unwrap_or(Format::Raw), false) {
        let fact = "is what the disk would be called, and it would not be read as what it is; rename the base first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", shown(&name))));
    }
    if top.stat.id.device != base.stat.id.device {
        let fact = "lies on another file system than the active layer, whose name it would take; copy it there first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
    let is_elsewhere = directory_of(&top.place.path) != directory_of(&base.place.path);
    if is_elsewhere && (!layers.below.is_empty() || base.data_file.is_some()) {
        let fact = "stands on other files and lies in another directory than the active layer, whose name it would \
                    take: the names in its header would lead elsewhere; move it into that directory first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
}

fn sharers(world: &World, index: ImageIndex, known: &[ImageIndex], refusals: &mut Vec<Error>) {
    let others = world.others_using(index, known);
    if !others.is_empty() {
        let name = world.image(index).shown();
        let fact = "is used by other images as well, which would be spoilt";
        let sentence = format!("{name} {fact}: {}; pull into those first, or delete them", others.join(", "));
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Open views that would show other bytes.
fn exposed(engine: &Engine, world: &World, chain: &Path, layers: &Layers, refusals: &mut Vec<Error>) {
    let cover: Vec<_> = layers.segment().iter().map(|index| world.image(*index).stat.id).collect();
    let names = engine.store().exposed(world.image(layers.base).stat.id, &cover);
    if !names.is_empty() {
        let openers = engine.openers(chain);
        let by = if openers.is_empty() { String::new() } else { format!(" by {openers}") };
        let fact =
            format!("still open{by}: {}; a commit changes what they show, so close them first", names.join(", "));
        refusals.push(Error::new(ErrorKind::Busy, fact));
    }
}

/// The name that base gets when the active layer falls onto it.
fn final_name(world: &World, layers: &Layers) -> PathBuf {
    let (top, base) = (world.image(layers.top), world.image(layers.base));
    let format = base.format.unwrap_or(Format::Raw);
    let stem = top.place.path.file_stem().unwrap_or_default().as_encoded_bytes();
    let with = |extension: &[u8]| beside(&top.place.path, &[stem, b".", extension].concat());
    let own = base.place.path.extension().map(|extension| with(extension.as_encoded_bytes()));
    // Nobody will stand on it and say what it is.
    own.filter(|name| world.store.options().reads_as(name, format, false))
        .unwrap_or_else(|| with(format.name().as_bytes()))
}

fn spoilt_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    beside(path, &[name, b".invalid"].concat())
}

fn after(plan: &Plan, layers: &Layers, request: &CommitRequest) -> Vec<PlanLayer> {
    let (from, to) = (position(layers, layers.top), position(layers, layers.base));
    let mut after: Vec<PlanLayer> = plan.before.clone();
    if after.len() <= to {
        return after;
    }
    after[to].note = format!("with the bytes of {}", String::from_utf8_lossy(&after[from].name.clone()));
    if layers.is_active {
        after[to].active = true;
        let name = after[from].name.clone();
        after[to].name = name;
        if let Some((_, new)) = plan.renamed.first() {
            after[to].path.clone_from(new);
        }
    }
    if request.keep {
        "kept, beside the chain".clone_into(&mut after[from].note);
    }
    after.drain(from..to);
    after
}

/// A commit that was accepted.
pub(super) struct CommitJob {
    /// Goes first, and its mirror with it: nothing is written to base without its locks.
    active: Option<(ActiveJob, Arc<MergeMirror>)>,
    base: JobImage,
    writer: Arc<Writer>,
    intent: OwnedIntent,
    is_undoable: bool,
    /// What is merged, and what keeps it open.
    segment: Segment,
    views: Vec<OpenView>,
    /// Those that will stand on base: nobody else opens them meanwhile.
    children: Vec<Child>,
}

/// Begins a commit: when this returns, nobody sees what it is going to spoil, and nothing is spoilt yet.
pub(super) fn begin(
    engine: &Engine,
    path: &Path,
    request: &CommitRequest,
    command: &str,
    tokens: &mut Tokens,
) -> Result<CommitJob> {
    let store = engine.store();
    let (_lock, world) = World::begin(store)?;
    let (plan, layers) = plan(engine, &world, path, request)?;
    finish::first(plan.refusals)?;
    tokens.extend(&world.chains_of(&[layers.top]))?;
    let deed = Deed::Commit {
        top: world.named(layers.top),
        base: world.named(layers.base),
        between: layers.between.iter().map(|index| world.named(*index)).collect(),
        children: layers.children.iter().map(|index| world.named(*index)).collect(),
        keep: request.keep,
        rename: layers.is_active.then(|| world.guarded(&final_name(&world, &layers))),
    };
    let base = store.take_image(&world.catalog, layers.base)?;
    let name = engine.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, deed))?;
    set_out(engine, &world, path, &layers, base, intent).map_err(|failed| {
        let (error, intent) = *failed;
        // Nothing has been changed.
        if let Err(trouble) = intent.end(&*store.guard_names()).and_then(|()| store.rescan()) {
            tracing::error!("{}: {trouble}", shown(path));
        }
        error
    })
}

/// A job, or why there is none, with the intent that speaks of it.
type Begun = std::result::Result<CommitJob, Box<(Error, OwnedIntent)>>;

/// With the intent there: hides what will be spoilt, and opens everything.
fn set_out(
    engine: &Engine,
    world: &World,
    path: &Path,
    layers: &Layers,
    mut base: JobImage,
    intent: OwnedIntent,
) -> Begun {
    let store = engine.store();
    let is_undoable = is_undoable(world, layers);
    let begun = (|| {
        store.rescan()?;
        let mut refusals = Vec::new();
        exposed(engine, world, path, layers, &mut refusals);
        finish::first(refusals)?;
        let mut views = Vec::new();
        let below = open_below(store, world, &layers.below, &mut views)?;
        let keeping = if is_undoable { Keeping::Everything } else { Keeping::Nothing };
        let writer = base.open_writer(below, keeping)?;
        let segment = layers.segment();
        let (live, active) = if layers.is_active {
            let job = store.take_active(&world.catalog, &layers.chain)?;
            let live = job.writer()?;
            let mirror = MergeMirror::new(&writer);
            (Some(live), Some((job, mirror)))
        } else {
            (None, None)
        };
        let first = usize::from(live.is_some());
        // Through top, which is shown throughout; what lies between by itself is not.
        let start = position(layers, layers.top);
        let view = store.open_view(&world.catalog, &layers.chain[start..], ViewPart::Active, layers.is_active)?;
        let frozen = store.part_of(&view.view, first, segment.len());
        views.push(view);
        let take = |child: &ImageIndex| Child::take(store, world, *child);
        let children = layers.children.iter().map(take).collect::<Result<Vec<_>>>()?;
        Ok((writer, Segment { live, frozen }, views, children, active))
    })();
    match begun {
        Ok((writer, segment, views, children, active)) => {
            Ok(CommitJob { active, base, writer, intent, is_undoable, segment, views, children })
        }
        Err(error) => Err(Box::new((error, intent))),
    }
}

fn open_below(
    store: &Arc<Store>,
    world: &World,
    below: &[ImageIndex],
    views: &mut Vec<OpenView>,
) -> Result<Option<Arc<View>>> {
    if below.is_empty() {
        return Ok(None);
    }
    let open = store.open_view(&world.catalog, below, ViewPart::Active, false)?;
    let view = Arc::clone(&open.view);
    views.push(open);
    Ok(Some(view))
}

impl CommitJob {
    /// Does it. On the way out, whatever happens, every view that is listed is right.
    pub(super) fn run(self, engine: &Engine, progress: &Progress) -> Result<()> {
        let store = Arc::clone(engine.store());
        if let Some((job, mirror)) = &self.active {
            job.set_mirror(Some(Arc::clone(mirror) as Arc<dyn Mirror>));
        }
        let copied = self.copy(&store, progress);
        let switched = copied.and_then(|()| {
            // From the last look at who uses what until the switch, nobody else changes anything.
            let lock = store.guard().lock_for_job(&*store.guard_names())?;
            let world = World::look(&store)?;
            self.still_alone(&world)?;
            progress.settle()?;
            Ok((lock, world))
        });
        match switched {
            Ok((lock, world)) => self.switch(engine, &world, lock),
            Err(error) => Err(self.call_back(&store, progress, error)),
        }
    }

    fn copy(&self, store: &Store, progress: &Progress) -> Result<()> {
        let total = self.segment.data_len()?;
        progress.set_total(total);
        let size = || self.segment.size();
        match &self.active {
            Some((_, mirror)) => mirror.level(size)?,
            None if size() > self.writer.size() => self.writer.grow(size())?,
            None => {}
        }
        if !finish::shares_blocks(store) {
            match self.base.format() {
                Format::Qcow2 => self.writer.reserve(total)?,
                Format::Raw => self.segment.reserve_in(&self.writer)?,
            }
        }
        let mut at = 0;
        loop {
            while at < size() {
                progress.check()?;
                let len = PIECE.min(size() - at);
                let moved = match &self.active {
                    None => self.segment.merge(&self.writer, at, len)?,
                    Some((_, mirror)) => {
                        mirror.check()?;
                        mirror.copy(at, len, || self.segment.merge(&self.writer, at, len))?
                    }
                };
                progress.advance(moved);
                at += len;
            }
            // Behind a shorter top nothing shows through it.
            match &self.active {
                None => {
                    zero_from(&self.writer, size())?;
                    break;
                }
                Some((_, mirror)) if mirror.complete(at, size)? => break,
                // It has grown meanwhile.
                Some(_) => {}
            }
        }
        // Most of it is durable before anybody has to wait for the rest.
        self.writer.flush()
    }

    /// Whether nobody else has come to use what is about to change for good.
    fn still_alone(&self, world: &World) -> Result<()> {
        let Deed::Commit { top, base, between, children, .. } = &self.intent.intent.deed else {
            unreachable!("the intent of a commit")
        };
        let find = |named: &Named| {
            world.find(named).ok_or_else(|| {
                let fact = "has been changed or taken away by others while a commit was at it";
                Error::new(ErrorKind::Stale, format!("{} {fact}", shown(&named.path)))
            })
        };
        let (top, base) = (find(top)?, find(base)?);
        let between = between.iter().map(find).collect::<Result<Vec<_>>>()?;
        let children = children.iter().map(find).collect::<Result<Vec<_>>>()?;
        let merged: Vec<ImageIndex> = std::iter::once(top).chain(between.iter().copied()).collect();
        let mut refusals = Vec::new();
        for index in between.iter().chain([&base]) {
            sharers(world, *index, &merged, &mut refusals);
        }
        sharers(world, top, &children, &mut refusals);
        finish::first(refusals)?;
        if let Some((_, mirror)) = &self.active {
            mirror.check()?;
        }
        Ok(())
    }

    /// It ends before the switch: undone where that is possible, else left to be taken up again.
    fn call_back(self, store: &Arc<Store>, progress: &Progress, error: Error) -> Error {
        let Self { base, writer, intent, is_undoable, active, .. } = self;
        if let Some((job, _)) = &active {
            job.set_mirror(None);
        }
        drop(active);
        let name = base.name().to_owned();
        let called_back = if is_undoable { writer.abandon() } else { writer.close() };
        drop(writer);
        let finished = called_back.and_then(|()| base.finish());
        if let Err(trouble) = &finished {
            tracing::error!("{name}: a commit could not be called back properly: {trouble}");
        }
        if is_undoable && !progress.is_stopped() {
            let ended = intent.end(&*store.guard_names()).and_then(|()| store.rescan());
            return match ended {
                Ok(_) => error,
                Err(trouble) => error.within(format!("{trouble}, and")),
            };
        }
        drop(intent);
        if is_undoable {
            return error;
        }
        let fact = format!(
            "{name} is a part of both by now, and what stands between it and top stays hidden until the \
                            commit is given again or the store is mounted again"
        );
        Error::new(error.kind(), format!("{error}; {fact}"))
    }

    /// Makes base what everybody stands on. From its first step on there is no way back.
    fn switch(self, engine: &Engine, world: &World, lock: Claim) -> Result<()> {
        let Self { base, writer, intent, active, views, segment, children, is_undoable } = self;
        let publish = || if is_undoable { writer.publish() } else { writer.close() };
        // Nobody of us needs base as it was any more.
        drop((views, segment));
        let Some((job, mirror)) = active else {
            // Durable and named by its header; then everybody is told.
            publish()?;
            drop(writer);
            base.finish()?;
            return finish::commit(engine, intent, lock, children);
        };
        let store = engine.store();
        let Deed::Commit { top, base: old_base, rename: Some(name), .. } = intent.intent.deed.clone() else {
            unreachable!("the active layer falls onto a base, which takes its name")
        };
        finish::thaw(store, world, &writer, base.format(), &old_base)?;
        let names = store.guard_names();
        let own = |path: &Path| path.strip_prefix(&store.guard().prefix).unwrap_or(path).to_path_buf();
        let before = store.catalog();
        let settled;
        {
            let mut sealed = job.seal();
            let prepared = (|| {
                mirror.check()?;
                publish()?;
                let prepared = sealed.prepare_fall(base)?;
                finish::take_name(&*names, &old_base.path, &top.path, &name)?;
                Ok(prepared)
            })();
            match prepared {
                Ok(prepared) => {
                    // The name has changed hands: whatever fails from here on, guests write to base.
                    settled = finish::settle_name(&*names, &old_base.path, &top.path, &name);
                    sealed.fall(prepared, &own(&name), &settled);
                }
                Err(error) => {
                    sealed.set_mirror(None);
                    return Err(error);
                }
            }
        }
        settled?;
        drop((writer, mirror));
        finish::active_commit(engine, &job, intent, lock, &before)
    }
}

/// Takes up a commit that was cut off. `Ok(None)`: all that was left to do has been done.
pub(super) fn resume(engine: &Engine, intent: OwnedIntent, tokens: &mut Tokens) -> Result<Option<CommitJob>> {
    let store = engine.store();
    let lock = store.guard().lock(&*store.guard_names())?;
    let world = World::look(store)?;
    match finish::commit_state(&world, &intent.intent)? {
        Finish::Copied => finish::commit(engine, intent, lock, Vec::new()).map(|()| None),
        Finish::NotCopied(layers) => {
            let path = intent.intent.chain.clone();
            tokens.extend(&world.chains_of(&[layers.top]))?;
            finish::repair_leaks(store, &world, layers.base)?;
            let world = World::look(store)?;
            let base = store.take_image(&world.catalog, layers.base)?;
            set_out(engine, &world, &path, &layers, base, intent).map(Some).map_err(|failed| failed.0)
        }
    }
}

impl Layers {
    /// What an intent names, if all of it is there.
    pub(super) fn of_intent(world: &World, deed: &Deed) -> Option<Self> {
        let Deed::Commit { top, base, between, children, rename, .. } = deed else { return None };
        let top = world.find(top)?;
        let base = world.find(base)?;
        let between = between.iter().map(|named| world.find(named)).collect::<Option<Vec<_>>>()?;
        let children: Vec<ImageIndex> = children.iter().filter_map(|named| world.find(named)).collect();
        let chain = world.catalog.layers(top);
        let depth = chain.iter().position(|layer| *layer == base)?;
        let below = chain[depth + 1..].to_vec();
        Some(Self { chain, top, base, between, children, below, is_active: rename.is_some() })
    }
}
