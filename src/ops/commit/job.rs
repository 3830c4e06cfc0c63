//! A commit at work: copying, the switch, and taking up what was cut off.

use std::path::Path;
use std::sync::Arc;

use crate::chain::View;
use crate::error::{Error, Result};
use crate::image::write::Writer;
use crate::image::{HeaderChange, Layer, Mapping};
use crate::io::{FileLock, ObjectId};
use crate::store::{
    ActiveJob, CachePolicy, CommitOperation, Digest, FileRef, Format, ImageIndex, Intent, JobImage, Mirror,
    OpenView, OwnedIntent, SAMPLES, SectorSample, Store, ViewPart, shown,
};
use crate::units::{GuestOffset, HostOffset, Stability};

use super::super::context::Context;
use super::super::copy::{CommitSegment, PIECE};
use super::super::ending;
use super::super::freeze;
use super::super::job::{Begun, Job};
use super::super::job_table::{ChainLocks, JobProgress};
use super::super::mirror::{MergeMirror, zero_from};
use super::super::rebased::OverlayToRebase;
use super::super::refusals;
use super::super::removal;
use super::super::scanned_store::ScannedStore;
use super::super::words::Discards;
use super::finish::{self, CommitStage};
use super::{CommitRange, CommitRequest, final_name, is_undoable, plan, refuse, segment};

/// Stretches of a layer without data that are passed over, at most, in search of a sample.
const MOST_RUNS: usize = 64;

/// A commit that was accepted.
pub(in crate::ops) struct CommitJob {
    /// Goes first, and its mirror with it: nothing is written to base without its locks.
    active: Option<(ActiveJob, Arc<MergeMirror>)>,
    base: JobImage,
    writer: Arc<Writer>,
    intent: OwnedIntent<CommitOperation>,
    is_undoable: bool,
    /// What is merged, and what keeps it open.
    segment: CommitSegment,
    views: Vec<OpenView>,
    /// Those that will stand on base: nobody else opens them meanwhile.
    children: Vec<OverlayToRebase>,
    /// What of base went to the trash beforehand.
    kept: Option<String>,
}

/// Begins a commit: when this returns, nobody sees what it is going to spoil, and nothing is spoilt yet.
pub(in crate::ops) fn begin(
    context: &Context,
    path: &Path,
    request: &CommitRequest,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, world) = ScannedStore::begin(context.store())?;
    let (plan, layers) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    tokens.notes.extend(removal::not_kept(plan.notes));
    let job = begin_with(context, &world, lock, path, &layers, request.keep, command, tokens)?;
    Ok(Some(Box::new(job)))
}

/// The same for what has been found out, and found good, under the store's lock.
#[expect(clippy::too_many_arguments, reason = "what a plan has found, and what goes with a command")]
pub(in crate::ops) fn begin_with(
    context: &Context,
    world: &ScannedStore,
    _lock: FileLock,
    path: &Path,
    layers: &CommitRange,
    keep: bool,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<CommitJob> {
    let store = context.store();
    tokens.extend(&world.chains_of(&[layers.top]))?;
    let operation = CommitOperation {
        top: world.witness(layers.top, !layers.is_active)?,
        base: witness_base(store, world, layers)?,
        between: world.witnesses(&layers.between, true)?,
        children: world.witnesses(&layers.children, false)?,
        keep,
        is_copied: false,
        rename: layers.takes_name.then(|| world.guarded(&final_name(world, layers))),
    };
    let base = store.take_image(&world.catalog, layers.base)?;
    let changed: Vec<ObjectId> =
        layers.segment().iter().chain([&layers.base]).map(|i| world.image(*i).stat.id).collect();
    removal::forget_trash(world, &changed)?;
    let kept = if layers.is_deletion { store.keep_copy(&world.catalog, layers.base, command)? } else { None };
    let name = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, operation));
    let intent = intent.inspect_err(|_| take_back(store, kept.as_deref()))?;
    let begun = set_out(context, world, path, layers, base, intent);
    begun.map(|job| CommitJob { kept: kept.clone(), ..job }).map_err(|failed| {
        let (error, intent) = *failed;
        take_back(store, kept.as_deref());
        // Nothing has been changed.
        if let Err(trouble) = ending::forget(store, intent) {
            tracing::error!("{}: {trouble}", shown(path));
        }
        error
    })
}

/// Base with evidence of what it holds, and of what it is going to hold where it is written in place.
fn witness_base(store: &Arc<Store>, world: &ScannedStore, layers: &CommitRange) -> Result<FileRef> {
    let mut base = world.witness(layers.base, world.image(layers.base).format == Some(Format::Raw))?;
    base.will_be_written();
    let (_, open) = segment(store, world, layers, None)?;
    for sample in base.samples() {
        sample.becomes = Some(Digest::of(&SectorSample::read(&open.view, sample.at)?));
    }
    let layer = &open.view.layers()[layers.segment().len()];
    if !layer.image().is_raw() {
        base.keep_samples(|is_file| sample_clusters(layer, &open.view, is_file));
    }
    Ok(base)
}

/// A few sectors of the data clusters of a qcow2 base, each with what a commit of `view` makes of it, by
/// their places in the disk or (`is_file`) in its data file. What cannot be read tells nothing.
fn sample_clusters(base: &Layer, view: &View, is_file: bool) -> Vec<SectorSample> {
    let mut samples = Vec::<SectorSample>::new();
    for number in 0..SAMPLES {
        let start = base.size() / SAMPLES * number / SectorSample::LEN as u64 * SectorSample::LEN as u64;
        let Some((at, host)) = next_data(base, start) else { continue };
        let (mut was, place) = ([0; SectorSample::LEN], if is_file { host.0 } else { at });
        let is_known = samples.iter().any(|sample| sample.at == place);
        if is_known || base.image().read_data(host, &mut was).is_err() {
            continue;
        }
        let Ok(becomes) = SectorSample::read(view, at) else { continue };
        samples.push(SectorSample { at: place, was: Digest::of(&was), becomes: Some(Digest::of(&becomes)) });
    }
    samples
}

/// Where the next data of a layer are, in the disk and in the file.
fn next_data(layer: &Layer, mut at: u64) -> Option<(u64, HostOffset)> {
    for _ in 0..MOST_RUNS {
        let left = layer.size().checked_sub(at).filter(|left| *left > 0)?;
        let run = layer.map(GuestOffset(at), left).ok()?;
        match run.value {
            Mapping::Data(host) => return Some((at, host)),
            Mapping::Zero(_) | Mapping::Compressed(_) | Mapping::Hole => at += run.len,
        }
    }
    None
}

/// Removes from the trash what has not been deleted after all.
fn take_back(store: &Store, kept: Option<&str>) {
    if let Some(id) = kept
        && let Err(error) = store.forget_item(id)
    {
        tracing::warn!("{id} is in the trash, and was not deleted after all: {error}");
    }
}

/// A job, or why there is none, with the intent that speaks of it.
type BegunCommit = std::result::Result<CommitJob, Box<(Error, OwnedIntent<CommitOperation>)>>;

/// With the intent there: hides what will be spoilt, and opens everything.
fn set_out(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    layers: &CommitRange,
    mut base: JobImage,
    intent: OwnedIntent<CommitOperation>,
) -> BegunCommit {
    let store = context.store();
    let is_undoable = is_undoable(world, layers);
    let begun = (|| {
        store.rescan()?;
        let mut refusals = Vec::new();
        // C3: what will be invalidated is hidden, and not open, before the first byte changes.
        refuse::exposed(context, world, path, layers, &mut refusals);
        refusals::first(refusals)?;
        let mut views = Vec::new();
        let below = open_below(store, world, &layers.below, &mut views)?;
        let keeping = if is_undoable { CachePolicy::Everything } else { CachePolicy::Nothing };
        let writer = base.open_writer(below, keeping)?;
        let (live, active) = if layers.is_active {
            let job = store.take_active(&world.catalog, &layers.chain)?;
            let live = job.writer()?;
            let mirror = MergeMirror::new(&writer);
            (Some(live), Some((job, mirror)))
        } else {
            (None, None)
        };
        let (segment, view) = segment(store, world, layers, live)?;
        views.push(view);
        let take = |child: &ImageIndex| OverlayToRebase::take(store, world, *child);
        let children = layers.children.iter().map(take).collect::<Result<Vec<_>>>()?;
        Ok((writer, segment, views, children, active))
    })();
    match begun {
        Ok((writer, segment, views, children, active)) => {
            Ok(CommitJob { active, base, writer, intent, is_undoable, segment, views, children, kept: None })
        }
        Err(error) => Err(Box::new((error, intent))),
    }
}

fn open_below(
    store: &Arc<Store>,
    world: &ScannedStore,
    below: &[ImageIndex],
    views: &mut Vec<OpenView>,
) -> Result<Option<Arc<View>>> {
    if below.is_empty() {
        return Ok(None);
    }
    let open = store.open_view(&world.catalog, below, ViewPart::Active, Stability::Frozen)?;
    let view = Arc::clone(&open.view);
    views.push(open);
    Ok(Some(view))
}

impl Job for CommitJob {
    fn run(self: Box<Self>, context: &Context, progress: &JobProgress) -> Result<()> {
        let store = Arc::clone(context.store());
        if let Some((job, mirror)) = &self.active {
            job.set_mirror(Some(Arc::clone(mirror) as Arc<dyn Mirror>));
        }
        let copied = self.copy(&store, progress);
        let switched = copied.and_then(|()| {
            // From the last look at who uses what until the switch, nobody else changes anything.
            let lock = ending::lock_for_job(&store, progress)?;
            let world = ScannedStore::look(&store)?;
            self.still_alone(&world)?;
            progress.settle()?;
            Ok((lock, world))
        });
        match switched {
            Ok((lock, world)) => self.switch(context, &world, lock),
            Err(error) => Err(self.call_back(&store, progress, error)),
        }
    }
}

impl CommitJob {
    fn copy(&self, store: &Store, progress: &JobProgress) -> Result<()> {
        let total = self.segment.data_len()?;
        progress.set_total(total);
        let size = || self.segment.size();
        match &self.active {
            Some((_, mirror)) => mirror.level(size)?,
            None if size() > self.writer.size() => self.writer.grow(size())?,
            None => {}
        }
        if !refusals::shares_blocks(store) {
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
    fn still_alone(&self, world: &ScannedStore) -> Result<()> {
        let CommitOperation { top, base, between, children, .. } = &self.intent.intent.operation;
        let find = |named: &FileRef| world.expect(named);
        let (top, base) = (find(top)?, find(base)?);
        let between = between.iter().map(find).collect::<Result<Vec<_>>>()?;
        let children = children.iter().map(find).collect::<Result<Vec<_>>>()?;
        let merged: Vec<ImageIndex> = std::iter::once(top).chain(between.iter().copied()).collect();
        let mut refusals: Vec<Error> = Vec::new();
        refusals.extend(
            merged.iter().chain([&base]).chain(&children).filter_map(|index| world.untouchable(*index)),
        );
        for index in between.iter().chain([&base]) {
            refuse::sharers(world, *index, &merged, &mut refusals);
        }
        refuse::sharers(world, top, &children, &mut refusals);
        refusals::first(refusals)?;
        if let Some((_, mirror)) = &self.active {
            mirror.check()?;
        }
        Ok(())
    }

    /// It ends before the switch: undone where that is possible, else left to be taken up again.
    fn call_back(self, store: &Arc<Store>, progress: &JobProgress, error: Error) -> Error {
        let Self { base, writer, intent, is_undoable, active, kept, .. } = self;
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
            take_back(store, kept.as_deref());
            return match ending::forget(store, intent) {
                Ok(()) => error,
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
    fn switch(self, context: &Context, world: &ScannedStore, lock: FileLock) -> Result<()> {
        let Self { base, writer, intent, active, views, segment, children, is_undoable, kept: _ } = self;
        let publish = || if is_undoable { writer.publish() } else { writer.close() };
        // Nobody of us needs base as it was any more.
        drop((views, segment));
        let store = context.store();
        let CommitOperation { top, base: old_base, rename, .. } = intent.intent.operation.clone();
        let Some((job, mirror)) = active else {
            // Durable and named by its header; then everybody is told.
            publish()?;
            if rename.is_some()
                && let Some(mark) = world.image(world.expect(&top)?).frozen.clone()
            {
                writer.change_header(&HeaderChange { backing: None, frozen: Some(Some(mark)) })?;
            }
            drop(writer);
            base.finish()?;
            if let Some(name) = rename {
                finish::replace(store, &world.catalog, &intent.intent, (&old_base, &top, &name))?;
            }
            return finish::commit(context, intent, lock, children);
        };
        let name = rename.expect("a base takes the active layer's name");
        freeze::thaw(store, world, &writer, base.format(), &old_base)?;
        let names = store.guard_names();
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
                    sealed.fall(prepared, &ending::own_path(store, &name), &settled);
                }
                Err(error) => {
                    sealed.set_mirror(None);
                    return Err(error);
                }
            }
        }
        settled?;
        drop((writer, mirror));
        finish::active_commit(context, &job, intent, lock, &before)
    }
}

/// What is left of a commit that was cut off; every refusal is asked again. Nothing is changed.
pub(in crate::ops) fn examine(
    world: &ScannedStore,
    intent: &Intent<CommitOperation>,
    discards: Discards,
) -> Result<CommitStage> {
    let state = finish::commit_state(world, intent)?;
    let mut refusals = Vec::new();
    match &state {
        CommitStage::Copied => refuse::rest(world, &intent.operation, &mut refusals),
        CommitStage::NotCopied(layers) => {
            let terms = CommitRequest {
                keep: intent.operation.keep,
                discard_internal: discards.internal,
                discard_bitmaps: discards.bitmaps,
                ..CommitRequest::default()
            };
            refuse::refusals(world, layers, &terms, &mut refusals);
        }
    }
    refusals::first(refusals)?;
    Ok(state)
}

/// Takes up a commit that was cut off. `Ok(None)`: all that was left to do has been done.
pub(in crate::ops) fn resume(
    context: &Context,
    intent: OwnedIntent<CommitOperation>,
    discards: Discards,
    lock: FileLock,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let world = ScannedStore::look_for(store, intent.name())?;
    match examine(&world, &intent.intent, discards)? {
        CommitStage::Copied => finish::commit(context, intent, lock, Vec::new()).map(|()| None),
        CommitStage::NotCopied(layers) => {
            let path = intent.intent.chain.clone();
            tokens.extend(&world.chains_of(&[layers.top]))?;
            finish::repair_leaks(store, &world, layers.base)?;
            let world = ScannedStore::look_for(store, intent.name())?;
            let base = store.take_image(&world.catalog, layers.base)?;
            let job = set_out(context, &world, &path, &layers, base, intent).map_err(|failed| failed.0)?;
            Ok(Some(Box::new(job)))
        }
    }
}
