//! A pull at work: filling, the switch, and taking up what was cut off.
//!
//! Whatever puts layers on something else without a change of what they show is such a job: `pull`, `delete`
//! upwards, and `rebase`.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::write::{BackingDisk, Writer};
use crate::image::{HeaderChange, Mapping};
use crate::io::FileLock;
use crate::store::{
    ActiveJob, CachePolicy, Catalog, FileRef, ImageIndex, Intent, JobImage, OpenView, OwnedIntent,
    PullOperation, Store, ViewPart, shown,
};
use crate::units::{Run, Stability};

use super::super::context::Context;
use super::super::copy::PIECE;
use super::super::ending;
use super::super::freeze;
use super::super::job::{Begun, Job};
use super::super::job_table::{ChainLocks, JobProgress};
use super::super::rebased;
use super::super::refusals;
use super::super::removal;
use super::super::scanned_store::ScannedStore;
use super::super::words::Discards;
use super::fill::SwitchBacking;
use super::{Filling, PullRange, PullRequest, plan, refuse};

/// A pull that was accepted.
pub(in crate::ops) struct PullJob {
    parts: Vec<FilledLayer>,
    fill: Filling,
    intent: OwnedIntent<PullOperation>,
    _views: Vec<OpenView>,
}

/// A layer that is filled.
struct FilledLayer {
    target: PullTarget,
    writer: Arc<Writer>,
    named: FileRef,
    /// Bytes of the longest disk of its internal snapshots: one may be longer than the image's own is now.
    longest_inner: u64,
}

/// Who is filled.
enum PullTarget {
    Active(ActiveJob),
    Image(JobImage),
}

/// Everything that a pull needs, opened.
struct OpenedPull {
    parts: Vec<FilledLayer>,
    fill: Filling,
    views: Vec<OpenView>,
}

/// Begins a pull. `Ok(None)`: nothing is left to be done.
pub(in crate::ops) fn begin(
    context: &Context,
    path: &Path,
    request: &PullRequest,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, world) = ScannedStore::begin(context.store())?;
    let (plan, layers) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    if layers.into.is_empty() {
        return Ok(None);
    }
    tokens.notes.extend(removal::not_kept(plan.notes));
    let job = begin_with(context, &world, lock, path, &layers, command, tokens)?;
    Ok(Some(Box::new(job)))
}

/// The same for what has been found out, and found good, under the store's lock.
pub(in crate::ops) fn begin_with(
    context: &Context,
    world: &ScannedStore,
    _lock: FileLock,
    path: &Path,
    layers: &PullRange,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<PullJob> {
    let store = context.store();
    tokens.extend(&world.chains_of(&layers.touched()))?;
    let operation = PullOperation {
        into: world.witnesses(&layers.into, false)?,
        base: layers.base.map(|base| world.witness(base, false)).transpose()?,
        remove: world.witnesses(&layers.remove, true)?,
        between: world.witnesses(&layers.between, false)?,
    };
    let ready = open(store, world, layers)?;
    let name = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, operation));
    match intent.and_then(|intent| store.rescan().map(|_| intent)) {
        Ok(intent) => Ok(ready.with(intent)),
        Err(error) => {
            for part in ready.parts {
                part.give_up()?;
            }
            Err(error)
        }
    }
}

impl OpenedPull {
    fn with(self, intent: OwnedIntent<PullOperation>) -> PullJob {
        let Self { parts, fill, views } = self;
        PullJob { parts, fill, intent, _views: views }
    }
}

fn open(store: &Arc<Store>, world: &ScannedStore, layers: &PullRange) -> Result<OpenedPull> {
    let view = |layers: &[ImageIndex]| {
        (!layers.is_empty())
            .then(|| store.open_view(&world.catalog, layers, ViewPart::Active, Stability::Frozen))
            .transpose()
    };
    let below = view(&layers.below)?;
    let depth = layers.between.len();
    let mut views = Vec::new();
    let fill = match &below {
        // What it will stand on lies below it already.
        Some(below) if layers.below.get(depth).copied() == layers.base => {
            Filling::between(store, &below.view, depth)
        }
        _ => {
            let new = view(&layers.base.map(|base| world.catalog.layers(base)).unwrap_or_default())?;
            let stack = |open: &OpenView| Arc::clone(&open.view);
            let fill = Filling::differing(below.as_ref().map(stack), new.as_ref().map(stack));
            views.extend(new);
            fill
        }
    };
    let mut parts = Vec::new();
    for into in &layers.into {
        let (target, writer) = if world.is_active_disk(*into) {
            let job = store.take_active(&world.catalog, &world.catalog.layers(*into))?;
            let writer = job.writer()?;
            let both = SwitchBacking { now: job.below(), then: fill.then() };
            writer.set_backing(Some(Arc::new(both)));
            (PullTarget::Active(job), writer)
        } else {
            let mut image = store.take_image(&world.catalog, *into)?;
            let lower = below.as_ref().map(|below| Arc::clone(&below.view));
            let writer = image.open_writer(lower, CachePolicy::Nothing)?;
            (PullTarget::Image(image), writer)
        };
        let mut part = FilledLayer { target, writer, named: world.named(*into), longest_inner: 0 };
        match part.writer.snapshots() {
            Ok(all) => part.longest_inner = all.iter().filter_map(|one| one.virtual_size).max().unwrap_or(0),
            Err(error) => {
                part.give_up()?;
                return Err(error);
            }
        }
        parts.push(part);
    }
    views.extend(below);
    Ok(OpenedPull { parts, fill, views })
}

impl Job for PullJob {
    fn run(self: Box<Self>, context: &Context, progress: &JobProgress) -> Result<()> {
        let store = Arc::clone(context.store());
        let filled = self.fill(&store, progress);
        match filled.and_then(|()| self.ready_to_switch(&store, progress)) {
            Ok((lock, world)) => self.switch(context, lock, &world),
            Err(error) => {
                // What was copied changes nothing, and may stay.
                for part in self.parts {
                    if let Err(trouble) = part.give_up() {
                        tracing::error!("a pull could not be ended properly: {trouble}");
                    }
                }
                if !progress.is_stopped()
                    && let Err(trouble) = ending::forget(&store, self.intent)
                {
                    return Err(error.within(format!("{trouble}, and")));
                }
                Err(error)
            }
        }
    }
}

impl PullJob {
    fn fill(&self, store: &Store, progress: &JobProgress) -> Result<()> {
        let needed = self.parts.iter().map(|part| part.needed(&self.fill)).collect::<Result<Vec<u64>>>()?;
        progress.set_total(needed.iter().sum());
        if !refusals::shares_blocks(store) {
            for (part, needed) in self.parts.iter().zip(needed) {
                part.writer.reserve(needed)?;
            }
        }
        for part in &self.parts {
            let mut at = 0;
            // It may grow meanwhile.
            while at < part.end() {
                progress.check()?;
                // A disk of which next to nothing was ever written has terabytes of this.
                if let Some(run) = self.fill.nothing_for(at, part.end() - at)? {
                    at += run;
                    continue;
                }
                let len = PIECE.min(part.end() - at);
                progress.advance(part.writer.fill(at, len, &self.fill)?);
                at += len;
            }
            part.writer.flush()?;
        }
        Ok(())
    }

    /// The last look, and the mark on what will be left alone. Nothing has changed for anybody by then.
    fn ready_to_switch(
        &self,
        store: &Arc<Store>,
        progress: &JobProgress,
    ) -> Result<(FileLock, ScannedStore)> {
        let lock = ending::lock_for_job(store, progress)?;
        let world = ScannedStore::look(store)?;
        let PullOperation { into, base, remove, between } = &self.intent.intent.operation;
        for named in into {
            world.untouchable(world.expect(named)?).map_or(Ok(()), Err)?;
        }
        base.iter().try_for_each(|named| world.expect(named).map(drop))?;
        progress.settle()?;
        freeze_left(store, &world, into, remove, between)?;
        Ok((lock, world))
    }

    fn switch(self, context: &Context, lock: FileLock, world: &ScannedStore) -> Result<()> {
        let store = context.store();
        let Self { parts, intent, _views: views, .. } = self;
        let PullOperation { base, .. } = &intent.intent.operation;
        let base = base.as_ref().map(|base| world.expect(base)).transpose()?;
        let before = Arc::clone(&world.catalog);
        let mut active = Vec::new();
        for part in parts {
            let into = world.expect(&part.named)?;
            let backing = Some(base.map(|base| world.backing_name(into, base)));
            part.describe_anew()?;
            part.writer.change_header(&HeaderChange { backing, frozen: None })?;
            // Gives back what was reserved and not needed.
            active.extend(part.close()?);
        }
        let world = ScannedStore::look(store)?;
        rebased::stand_on_new(&world, &active)?;
        drop((active, views));
        clean_up(context, intent, lock, &before)
    }
}

impl FilledLayer {
    /// Bytes of the longest of its disks.
    fn end(&self) -> u64 {
        self.writer.size().max(self.longest_inner)
    }

    /// It stays on what it stands on.
    fn give_up(self) -> Result<()> {
        if let PullTarget::Active(job) = &self.target {
            self.writer.set_backing(job.below().map(|view| view as Arc<dyn BackingDisk>));
        }
        self.close().map(drop)
    }

    /// Bytes that will be copied, as far as the active tables tell.
    fn needed(&self, fill: &Filling) -> Result<u64> {
        let (mut at, end, mut sum) = (0, self.writer.size(), 0);
        while at < end {
            let Run { value: mapping, mut len } = self.writer.map(at, end - at)?;
            if mapping == Mapping::Hole {
                let copied = fill.may_differ(at, len)?;
                len = copied.len;
                sum += if copied.value { len } else { 0 };
            }
            at += len;
        }
        Ok(sum)
    }

    /// Lets nobody see its tables, or those of its internal snapshots, as they were kept before they were
    /// filled: above another layer, or none, they would show other bytes.
    fn describe_anew(&self) -> Result<()> {
        match &self.target {
            PullTarget::Active(job) => job.describe_anew(),
            PullTarget::Image(image) => image.describe_anew(),
        }
    }

    /// Makes it a layer like any other again; an active disk is returned, which goes on.
    fn close(self) -> Result<Option<(ActiveJob, FileRef)>> {
        let Self { target, writer, named, .. } = self;
        let closed = writer.close();
        drop(writer);
        match target {
            PullTarget::Active(job) => closed.map(|()| Some((job, named))),
            PullTarget::Image(image) => closed.and_then(|()| image.finish()).map(|()| None),
        }
    }
}

/// Marks what will have nobody standing on it, while somebody still does.
fn freeze_left(
    store: &Arc<Store>,
    world: &ScannedStore,
    into: &[FileRef],
    remove: &[FileRef],
    between: &[FileRef],
) -> Result<()> {
    let going: Vec<ImageIndex> = into.iter().chain(remove).filter_map(|named| world.find(named)).collect();
    // Only the uppermost of those that stay becomes a leaf.
    let stays = between
        .iter()
        .find(|named| !remove.iter().any(|gone| gone.is(named)))
        .and_then(|named| world.find(named));
    let Some(index) = stays else { return Ok(()) };
    if world.image(index).users.iter().all(|user| going.contains(user)) && freeze::may_be_marked(world, index)
    {
        freeze::freeze(store, world, index, &Frozen::now(""))?;
    }
    Ok(())
}

/// What follows the switch.
fn clean_up(
    context: &Context,
    intent: OwnedIntent<PullOperation>,
    lock: FileLock,
    before: &Catalog,
) -> Result<()> {
    let store = context.store();
    let PullOperation { remove, .. } = &intent.intent.operation;
    ending::tell(store, before, &intent.intent, None);
    let removed = removal::remove(store, remove, true, &intent.intent.command);
    // What is used by others by now stays, and nothing is left to be done.
    if removed.as_ref().is_err_and(|error| error.kind() != ErrorKind::NotEmpty) {
        return removed;
    }
    ending::end(store, intent, lock).and(removed)
}

/// What is left of a pull that was cut off; every refusal is asked again. Nothing is changed.
pub(in crate::ops) fn examine(
    world: &ScannedStore,
    intent: &Intent<PullOperation>,
    Discards { internal, bitmaps }: Discards,
) -> Result<Option<PullRange>> {
    let found = find(world, &intent.operation)?;
    let mut refusals = Vec::new();
    if let Some(layers) = &found {
        let request =
            PullRequest { discard_internal: internal, discard_bitmaps: bitmaps, ..PullRequest::default() };
        refuse(world, layers, &request, &mut refusals);
    } else {
        let PullOperation { remove, .. } = &intent.operation;
        let left = remove.iter().filter_map(|named| world.find(named));
        refusals.extend(left.filter_map(|index| world.untouchable(index)));
    }
    refusals::first(refusals)?;
    Ok(found)
}

/// Takes up a pull that was cut off. `Ok(None)`: all that was left to do has been done.
pub(in crate::ops) fn resume(
    context: &Context,
    intent: OwnedIntent<PullOperation>,
    discards: Discards,
    lock: FileLock,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let world = ScannedStore::look_for(store, intent.name())?;
    if let Err(error) = find(&world, &intent.intent.operation) {
        // No view has changed, and none will: what others have done to the chain stands.
        ending::end(store, intent, lock)?;
        return Err(error);
    }
    // J5: under the store's lock, before the first write.
    let Some(layers) = examine(&world, &intent.intent, discards)? else {
        let PullOperation { into, remove, between, .. } = &intent.intent.operation;
        freeze_left(store, &world, into, remove, between)?;
        let before = Arc::clone(&world.catalog);
        return clean_up(context, intent, lock, &before).map(|()| None);
    };
    tokens.extend(&world.chains_of(&layers.touched()))?;
    Ok(Some(Box::new(open(store, &world, &layers)?.with(intent))))
}

/// What is left to be filled, and what that needs; `None` if nothing is.
fn find(world: &ScannedStore, operation: &PullOperation) -> Result<Option<PullRange>> {
    let PullOperation { into, base, remove, between } = operation;
    let all = |named: &[FileRef]| named.iter().map(|named| world.expect(named)).collect::<Result<Vec<_>>>();
    let base = base.as_ref().map(|base| world.expect(base)).transpose()?;
    let left: Vec<ImageIndex> =
        all(into)?.into_iter().filter(|index| world.stands_on(*index) != base).collect();
    let Some(first) = left.first() else { return Ok(None) };
    let below = world.catalog.layers(*first)[1..].to_vec();
    if let Some(other) = left.iter().find(|index| world.stands_on(**index) != below.first().copied()) {
        let fact = "stands on something else by now; see what it is to stand on, and give the command again";
        let sentence = format!("{} {fact}", shown(&world.image(*other).place.path));
        return Err(Error::new(ErrorKind::Stale, sentence));
    }
    Ok(Some(PullRange { into: left, below, base, between: all(between)?, remove: all(remove)? }))
}
