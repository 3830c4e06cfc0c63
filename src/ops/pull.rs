//! Pull: what lies between a layer and a base is copied into the layer, which then stands on the base.
//!
//! Promises: no view changes, at no moment, nor does any become invalid; a guest's write always wins. What
//! is left with nobody standing on it is marked as frozen before that is so. Cut off anywhere, it goes on where
//! it was, for what has been copied is not asked for again.

use std::path::Path;
use std::sync::Arc;

use crate::chain::{Source, View};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::HeaderChange;
use crate::image::write::{Below as Lower, Fill, Located, Place, Wanted, Writer};
use crate::io::Claim;
use crate::store::{
    ActiveJob, Deed, ImageIndex, Intent, JobImage, Keeping, Named, OpenView, OwnedIntent, Store, ViewPart, shown,
};

use super::board::{Progress, Tokens};
use super::copy::{PIECE, Segment};
use super::engine::Engine;
use super::finish;
use super::plan::Plan;
use super::request::PullRequest;
use super::world::{Chain, World};

/// What a pull concerns, by index in one catalog.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    /// What is filled, and all below it.
    chain: Vec<ImageIndex>,
    /// What it will stand on.
    base: Option<ImageIndex>,
    between: Vec<ImageIndex>,
    /// What goes afterwards.
    remove: Vec<ImageIndex>,
    is_active: bool,
}

fn layers(world: &World, chain: &Chain, request: &PullRequest) -> Result<Layers> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let views = &chain.views;
    let into = match &request.into {
        Some(name) => finish::layer(chain, name)?,
        None => match views.active() {
            Some(active) => active.layer,
            None => return Err(usage(format!("{} has no active layer; say into=", shown(&chain.path)))),
        },
    };
    let name = world.image(views.layers[into]).shown();
    if into + 1 >= views.layers.len() {
        return Err(usage(format!("{name} stands on nothing: there is nothing to be pulled")));
    }
    let base = request.base.as_ref().map(|base| finish::layer(chain, base)).transpose()?;
    match base {
        Some(base) if base == into => return Err(usage("the layer and its base are the same".to_owned())),
        Some(base) if base < into => {
            return Err(usage("base is above the layer; it has to be one of the layers below".to_owned()));
        }
        Some(base) if base == into + 1 => return Err(usage(format!("{name} stands on that already"))),
        _ => {}
    }
    let between = views.layers[into + 1..base.unwrap_or(views.layers.len())].to_vec();
    let remove = if request.delete { removable(world, views.layers[into], &between) } else { Vec::new() };
    Ok(Layers {
        chain: views.layers[into..].to_vec(),
        base: base.map(|base| views.layers[base]),
        between,
        remove,
        is_active: into == 0 && views.active().is_some(),
    })
}

/// Of what lies between: what this store froze, nobody else stands on, and something else lies below.
fn removable(world: &World, into: ImageIndex, between: &[ImageIndex]) -> Vec<ImageIndex> {
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
pub(super) fn plan(engine: &Engine, world: &World, path: &Path, request: &PullRequest) -> Result<(Plan, Layers)> {
    let chain = world.chain(path)?;
    let layers = layers(world, &chain, request)?;
    let mut plan = Plan { before: finish::tree(world, &chain), ..Plan::default() };
    let into = layers.chain[0];
    let refusals = &mut plan.refusals;
    if !layers.is_active || !layers.remove.is_empty() {
        refusals.extend(world.unguarded());
    }
    let touched: Vec<ImageIndex> = [into].into_iter().chain(layers.remove.clone()).collect();
    refusals.extend(world.begun(&layers.chain));
    refusals.extend(touched.iter().filter_map(|index| world.untouchable(*index)));
    let backing = Some(layers.base.map(|base| world.backing_name(into, base)));
    finish::check_header(world, into, &HeaderChange { backing, frozen: None }, refusals);
    if let Some(left) = layers.between.iter().find(|index| !layers.remove.contains(index))
        && world.image(*left).place.root == 0
        && !world.image(*left).readonly
    {
        finish::check_freeze(world, *left, refusals);
    }
    if let Some(problem) = world.catalog.view_problem(&layers.chain) {
        refusals.push(Error::new(ErrorKind::Broken, problem));
    }
    finish::inner_snapshots(world, layers.remove.iter().copied(), request.discard_internal, refusals);
    let store = engine.store();
    let counted = store.open_view(&world.catalog, &layers.chain[1..], ViewPart::Active, false).and_then(|open| {
        let frozen = store.part_of(&open.view, 0, layers.between.len());
        Segment { live: None, frozen }.data_len()
    });
    match counted {
        Ok(bytes) => plan.bytes = bytes,
        Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
        Err(_) => {}
    }
    plan.space = plan.bytes;
    finish::check_room(world, into, plan.space, &mut plan.refusals);
    plan.removed = layers.remove.iter().map(|index| world.image(*index).place.path.clone()).collect();
    plan.invalid = finish::views_of(&chain, layers.remove.iter().copied());
    plan.notes.push("bytes that the layer holds itself are not copied; how many these are shows as it goes on".into());
    plan.after.clone_from(&plan.before);
    let first = plan.before.iter().position(|line| line.path == world.image(into).place.path).unwrap_or(0);
    if let Some(line) = plan.after.get_mut(first) {
        "with the bytes of what was between".clone_into(&mut line.note);
        let end = (first + 1 + layers.between.len()).min(plan.after.len());
        plan.after.drain(first + 1..end);
    }
    Ok((plan, layers))
}

/// What is wanted where the layer is silent: what the layers between say, unless what is below them says the same.
struct Between {
    between: Option<Arc<View>>,
    base: Option<Arc<View>>,
}

impl Fill for Between {
    fn wanted(&self, at: u64, len: u64) -> Result<(Wanted, u64)> {
        let zero = |len: u64| match &self.base {
            // Without anything below, silence reads as zeroes.
            None => Ok((Wanted::Nothing, len)),
            Some(base) => {
                let (is_zero, run) = base.zero_run(at, len)?;
                Ok((if is_zero { Wanted::Nothing } else { Wanted::Zero }, run))
            }
        };
        let Some(view) = self.between.as_ref().filter(|view| at < view.size()) else {
            // A shorter layer reads as zeroes from its end on.
            return zero(len);
        };
        let extent = view.resolve(at, len.min(view.size() - at))?;
        if extent.layer >= view.layers().len() {
            return Ok((Wanted::Nothing, extent.len));
        }
        match extent.source {
            Source::Zero => zero(extent.len),
            Source::Data(host) if view.layers()[extent.layer].image().is_raw() => {
                let image = view.layers()[extent.layer].image();
                let end = crate::units::HostOffset(host.0 + extent.len);
                let (is_data, run) = image.raw_extent(host, end)?;
                if is_data { Ok((Wanted::Data, run)) } else { zero(run) }
            }
            Source::Data(_) | Source::Compressed | Source::Bad => Ok((Wanted::Data, extent.len)),
        }
    }

    fn place(&self, at: u64, len: u64) -> Result<(Place, u64)> {
        let Some(view) = self.between.as_ref().filter(|view| at < view.size()) else { return Ok((None, len)) };
        let extent = view.resolve(at, len.min(view.size() - at))?;
        let place = match (extent.source, view.layers().get(extent.layer)) {
            // A raw file may end within its last sector.
            (Source::Data(host), Some(layer)) if host.0 + extent.len <= layer.image().data().len()? => {
                Some((Arc::clone(layer.image().data()), host.0))
            }
            _ => None,
        };
        Ok((place, extent.len))
    }
}

/// Who is filled.
enum Target {
    Active(ActiveJob),
    Image(JobImage),
}

/// A pull that was accepted.
pub(super) struct PullJob {
    target: Target,
    writer: Arc<Writer>,
    fill: Between,
    end: u64,
    intent: OwnedIntent,
    _views: Vec<OpenView>,
}

/// Begins a pull.
pub(super) fn begin(
    engine: &Engine,
    path: &Path,
    request: &PullRequest,
    command: &str,
    tokens: &mut Tokens,
) -> Result<PullJob> {
    let store = engine.store();
    let (_lock, world) = World::begin(store)?;
    let (plan, layers) = plan(engine, &world, path, request)?;
    finish::first(plan.refusals)?;
    tokens.extend(&world.chains_of(&layers.chain[..1]))?;
    let named = |indices: &[ImageIndex]| indices.iter().map(|index| world.named(*index)).collect::<Vec<Named>>();
    let deed = Deed::Pull {
        into: world.named(layers.chain[0]),
        base: layers.base.map(|base| world.named(base)),
        remove: named(&layers.remove),
        between: named(&layers.between),
    };
    let ready = open(store, &world, &layers)?;
    let name = engine.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, deed))?;
    store.rescan()?;
    Ok(ready.with(intent))
}

/// A pull without its intent.
struct Ready {
    target: Target,
    writer: Arc<Writer>,
    fill: Between,
    end: u64,
    views: Vec<OpenView>,
}

impl Ready {
    fn with(self, intent: OwnedIntent) -> PullJob {
        let Self { target, writer, fill, end, views } = self;
        PullJob { target, writer, fill, end, intent, _views: views }
    }
}

fn open(store: &Arc<Store>, world: &World, layers: &Layers) -> Result<Ready> {
    let below = store.open_view(&world.catalog, &layers.chain[1..], ViewPart::Active, false)?;
    let depth = layers.between.len();
    let count = below.view.layers().len();
    let fill = Between {
        between: store.part_of(&below.view, 0, depth),
        base: if depth < count { store.part_of(&below.view, depth, count) } else { None },
    };
    let (target, writer) = if layers.is_active {
        let job = store.take_active(&world.catalog, &layers.chain)?;
        let writer = job.writer()?;
        (Target::Active(job), writer)
    } else {
        let mut image = store.take_image(&world.catalog, layers.chain[0])?;
        let writer = image.open_writer(Some(Arc::clone(&below.view)), Keeping::Nothing)?;
        (Target::Image(image), writer)
    };
    // An internal snapshot may have a longer disk than the image has now.
    let longest = writer.snapshots()?.iter().filter_map(|snapshot| snapshot.virtual_size).max().unwrap_or(0);
    let end = writer.size().max(longest);
    Ok(Ready { target, writer, fill, end, views: vec![below] })
}

impl PullJob {
    /// Does it.
    pub(super) fn run(self, engine: &Engine, progress: &Progress) -> Result<()> {
        let store = Arc::clone(engine.store());
        let filled = self.fill(&store, progress).and_then(|()| progress.settle());
        match filled.and_then(|()| self.ready_to_switch(&store)) {
            Ok(ready) => self.switch(engine, ready),
            Err(error) => {
                let Self { target, writer, intent, .. } = self;
                // What was copied changes nothing, and may stay.
                let closed = writer.close();
                drop(writer);
                let closed = closed.and_then(|()| match target {
                    Target::Active(_) => Ok(()),
                    Target::Image(image) => image.finish(),
                });
                if let Err(trouble) = closed {
                    tracing::error!("a pull could not be ended properly: {trouble}");
                }
                if !progress.is_stopped() {
                    let ended = intent.end(&*store.guard_names()).and_then(|()| store.rescan());
                    if let Err(trouble) = ended {
                        return Err(error.within(format!("{trouble}, and")));
                    }
                }
                Err(error)
            }
        }
    }

    fn fill(&self, store: &Store, progress: &Progress) -> Result<()> {
        let needed = self.needed()?;
        progress.set_total(needed);
        if !finish::shares_blocks(store) {
            self.writer.reserve(needed)?;
        }
        let mut at = 0;
        while at < self.end {
            progress.check()?;
            let len = PIECE.min(self.end - at);
            progress.advance(self.writer.fill(at, len, &self.fill)?);
            at += len;
        }
        self.writer.flush()
    }

    /// Bytes that will be copied, as far as the active tables tell.
    fn needed(&self) -> Result<u64> {
        let (mut at, end, mut sum) = (0, self.writer.size(), 0);
        while at < end {
            let (located, mut run) = self.writer.locate(at, end - at)?;
            if located == Located::Below {
                let (wanted, part) = self.fill.wanted(at, run)?;
                run = part;
                sum += if wanted == Wanted::Data { run } else { 0 };
            }
            at += run;
        }
        Ok(sum)
    }

    /// The last look, and the mark on what will be left alone. Nothing has changed for anybody by then.
    fn ready_to_switch(&self, store: &Arc<Store>) -> Result<(Claim, World, HeaderChange)> {
        let lock = store.guard().lock(&*store.guard_names())?;
        let world = World::look(store)?;
        let Deed::Pull { into, base, between, .. } = &self.intent.intent.deed else {
            unreachable!("the intent of a pull")
        };
        let into = find(&world, into)?;
        let base = base.as_ref().map(|base| find(&world, base)).transpose()?;
        freeze_left(store, &world, into, between)?;
        let backing = Some(base.map(|base| world.backing_name(into, base)));
        Ok((lock, world, HeaderChange { backing, frozen: None }))
    }

    fn switch(self, engine: &Engine, (lock, world, change): (Claim, World, HeaderChange)) -> Result<()> {
        let store = engine.store();
        let Self { target, writer, intent, _views: views, .. } = self;
        let Deed::Pull { into, .. } = &intent.intent.deed else { unreachable!("the intent of a pull") };
        let before = Arc::clone(&world.catalog);
        writer.change_header(&change)?;
        match target {
            Target::Active(job) => {
                // Gives back what was reserved and not needed.
                writer.close()?;
                let world = World::look(store)?;
                finish::stand_on_new(&world, &[(job, into.clone())])?;
            }
            Target::Image(image) => {
                writer.close()?;
                drop(writer);
                image.finish()?;
                store.rescan()?;
            }
        }
        drop(views);
        clean_up(engine, intent, lock, &before)
    }
}

fn find(world: &World, named: &Named) -> Result<ImageIndex> {
    world.find(named).ok_or_else(|| {
        let fact = "has been changed or taken away by others while a pull was at it";
        Error::new(ErrorKind::Stale, format!("{} {fact}", shown(&named.path)))
    })
}

/// Marks what will have nobody standing on it, while somebody still does.
fn freeze_left(store: &Arc<Store>, world: &World, into: ImageIndex, between: &[Named]) -> Result<()> {
    let mut going = vec![into];
    for index in between.iter().filter_map(|named| world.find(named)) {
        let is_left = world.image(index).users.iter().all(|user| going.contains(user));
        if !is_left {
            break;
        }
        if world.image(index).place.root == 0 && !world.image(index).readonly {
            finish::freeze(store, world, index, &Frozen::now(""))?;
        }
        // Only the uppermost becomes a leaf.
        going.clear();
    }
    Ok(())
}

/// What follows the switch.
fn clean_up(engine: &Engine, intent: OwnedIntent, lock: Claim, before: &Arc<crate::store::Catalog>) -> Result<()> {
    let store = engine.store();
    let Deed::Pull { remove, .. } = &intent.intent.deed else { unreachable!("the intent of a pull") };
    finish::tell_all(store, before, &intent.intent);
    let removed = finish::remove(store, remove);
    // What is used by others by now stays, and nothing is left to be done.
    if removed.as_ref().is_err_and(|error| error.kind() != ErrorKind::NotEmpty) {
        return removed;
    }
    finish::end(store, intent, lock).and(removed)
}

/// Takes up a pull that was cut off. `Ok(None)`: all that was left to do has been done.
pub(super) fn resume(engine: &Engine, intent: OwnedIntent, tokens: &mut Tokens) -> Result<Option<PullJob>> {
    let store = engine.store();
    let lock = store.guard().lock_for_job(&*store.guard_names())?;
    let world = World::look(store)?;
    let Deed::Pull { into, base, remove, between } = intent.intent.deed.clone() else {
        unreachable!("the intent of a pull")
    };
    let all = |named: &[Named]| named.iter().map(|named| find(&world, named)).collect::<Result<Vec<_>>>();
    let found = find(&world, &into).and_then(|into| {
        let base = base.as_ref().map(|base| find(&world, base)).transpose()?;
        let is_over = world.stands_on(into) == base;
        let between = if is_over { Vec::new() } else { all(&between)? };
        Ok((into, base, between, if is_over { Vec::new() } else { all(&remove)? }))
    });
    let (into, base_index, between, remove) = match found {
        Ok(found) => found,
        Err(error) => {
            // No view has changed, and none will: what others have done to the chain stands.
            finish::end(store, intent, lock)?;
            return Err(error);
        }
    };
    if world.stands_on(into) == base_index {
        let before = Arc::clone(&world.catalog);
        return clean_up(engine, intent, lock, &before).map(|()| None);
    }
    let chain = world.catalog.layers(into);
    let is_active = world.image(into).users.is_empty() && world.catalog.is_active(into);
    let layers = Layers { chain, base: base_index, between, remove, is_active };
    tokens.extend(&world.chains_of(&[into]))?;
    Ok(Some(open(store, &world, &layers)?.with(intent)))
}
