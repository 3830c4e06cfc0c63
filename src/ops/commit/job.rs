//! The job of a commit: copying, the switch, and resuming after an interruption.

use std::path::Path;
use std::sync::Arc;

use crate::chain::View;
use crate::error::{Error, Result};
use crate::image::{HeaderChange, Layer, Mapping};
use crate::io::{FileLock, ObjectId};
use crate::store::{
    ActiveJob, CommitOperation, Digest, FileRef, Format, ImageIndex, Intent, JobImage, Mirror, OpenView,
    OwnedIntent, SAMPLES, SectorSample, Store, ViewPart, shown,
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
use super::writer::CommitWriter;
use super::{CommitRange, CommitRequest, final_name, is_undoable, plan, refuse, segment};

/// How many ranges of a layer without data are skipped, at most, in the search for a sample.
const MOST_RUNS: usize = 64;

/// A commit that was accepted.
pub(in crate::ops) struct CommitJob {
    /// Dropped first, with its mirror: base is written only under its locks.
    active: Option<(ActiveJob, Arc<MergeMirror>)>,
    base: JobImage,
    writer: CommitWriter,
    intent: OwnedIntent<CommitOperation>,
    /// The segment to merge, and the files that keep it open.
    segment: CommitSegment,
    views: Vec<OpenView>,
    /// The overlays that base will back: locked against other processes.
    children: Vec<OverlayToRebase>,
    /// The copy of base that went to the trash beforehand.
    trash_copy: Option<String>,
}

/// Begins a commit: when this returns, views that will be invalidated are hidden, and none is invalidated
/// yet.
pub(in crate::ops) fn begin(
    context: &Context,
    path: &Path,
    request: &CommitRequest,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, scan) = ScannedStore::begin(context.store())?;
    let (plan, layers) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    locks.notes.extend(removal::not_kept(plan.notes));
    let job = begin_with(context, &scan, lock, path, &layers, request.keep, command, locks)?;
    Ok(Some(Box::new(job)))
}

/// The same for an accepted plan, under the store's lock.
#[expect(clippy::too_many_arguments, reason = "the results of a plan, and the parts of a command")]
pub(in crate::ops) fn begin_with(
    context: &Context,
    scan: &ScannedStore,
    _lock: FileLock,
    path: &Path,
    layers: &CommitRange,
    keep: bool,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<CommitJob> {
    let store = context.store();
    locks.extend(&scan.chains_of(&[layers.top]))?;
    let operation = CommitOperation {
        top: scan.witness(layers.top, !layers.is_active)?,
        base: witness_base(store, scan, layers)?,
        between: scan.witnesses(&layers.between, true)?,
        children: scan.witnesses(&layers.children, false)?,
        keep,
        is_copied: false,
        rename: layers.takes_name.then(|| scan.guarded(&final_name(scan, layers))),
    };
    let base = store.take_image(&scan.catalog, layers.base)?;
    let changed: Vec<ObjectId> =
        layers.segment().iter().chain([&layers.base]).map(|i| scan.image(*i).stat.id).collect();
    removal::remove_dependent_trash(scan, &changed)?;
    let trash_copy =
        if layers.is_deletion { store.keep_copy(&scan.catalog, layers.base, command)? } else { None };
    let name = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, operation));
    let intent = intent.inspect_err(|_| discard_copy(store, trash_copy.as_deref()))?;
    let begun = prepare(context, scan, path, layers, base, intent);
    begun.map(|job| CommitJob { trash_copy: trash_copy.clone(), ..job }).map_err(|failed| {
        let (error, intent) = *failed;
        discard_copy(store, trash_copy.as_deref());
        // Nothing has been changed.
        if let Err(trouble) = ending::remove_intent(store, intent) {
            tracing::error!("{}: {trouble}", shown(path));
        }
        error
    })
}

/// Base with evidence of its content, and of its future content where it is written in place.
fn witness_base(store: &Arc<Store>, scan: &ScannedStore, layers: &CommitRange) -> Result<FileRef> {
    let mut base = scan.witness(layers.base, scan.image(layers.base).format == Some(Format::Raw))?;
    base.will_be_written();
    let (_, open) = segment(store, scan, layers, None)?;
    for sample in base.samples() {
        sample.becomes = Some(Digest::of(&SectorSample::read(&open.view, sample.at)?));
    }
    let layer = &open.view.layers()[layers.segment().len()];
    if !layer.image().is_raw() {
        base.keep_samples(|is_file| sample_clusters(layer, &open.view, is_file));
    }
    Ok(base)
}

/// A few sectors of the data clusters of a qcow2 base, each with its bytes after a commit of `view`, by their
/// offsets in the disk or (`is_file`) in its data file. An unreadable sector is no evidence.
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

/// The next data of a layer: its offset in the disk and in the file.
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
/// Removes a copy from the trash whose layer was not deleted after all.
/// Removes from the trash what has not been deleted after all.
fn discard_copy(store: &Store, trash_copy: Option<&str>) {
    if let Some(id) = trash_copy
        && let Err(error) = store.forget_item(id)
    {
        tracing::warn!("could not remove {id} from the trash, although its layer was not deleted: {error}");
    }
}

/// A job, or the reason for its failure, with the intent that belongs to it.
type BegunCommit = std::result::Result<CommitJob, Box<(Error, OwnedIntent<CommitOperation>)>>;

/// With the intent written: hides views that will be invalidated, and opens all files.
fn prepare(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    layers: &CommitRange,
    mut base: JobImage,
    mut intent: OwnedIntent<CommitOperation>,
) -> BegunCommit {
    let store = context.store();
    // X3: no layer but base gets other bytes.
    intent.change_files(store, &scan.catalog, Some(scan.image(layers.base).stat.id));
    let begun = (|| {
        store.rescan()?;
        let mut refusals = Vec::new();
        // C3: views that will be invalidated are hidden, and not open, before the first byte changes.
        refuse::exposed(context, scan, path, layers, &mut refusals);
        refusals::first(refusals)?;
        let mut views = Vec::new();
        let below = open_below(store, scan, &layers.below, &mut views)?;
        let writer = CommitWriter::open(&mut base, below, is_undoable(scan, layers))?;
        let (live, active) = if layers.is_active {
            let job = store.take_active(&scan.catalog, &layers.chain)?;
            let live = job.writer()?;
            let mirror = MergeMirror::new(writer.writer());
            (Some(live), Some((job, mirror)))
        } else {
            (None, None)
        };
        let (segment, view) = segment(store, scan, layers, live)?;
        views.push(view);
        let take = |child: &ImageIndex| OverlayToRebase::open(store, scan, *child);
        let children = layers.children.iter().map(take).collect::<Result<Vec<_>>>()?;
        Ok((writer, segment, views, children, active))
    })();
    match begun {
        Ok((writer, segment, views, children, active)) => {
            Ok(CommitJob { active, base, writer, intent, segment, views, children, trash_copy: None })
        }
        Err(error) => Err(Box::new((error, intent))),
    }
}

fn open_below(
    store: &Arc<Store>,
    scan: &ScannedStore,
    below: &[ImageIndex],
    views: &mut Vec<OpenView>,
) -> Result<Option<Arc<View>>> {
    if below.is_empty() {
        return Ok(None);
    }
    let open = store.open_view(&scan.catalog, below, ViewPart::Active, Stability::Frozen)?;
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
            // From the last check for users until the switch, no other process changes anything.
            let lock = ending::lock_for_job(&store, progress)?;
            let scan = ScannedStore::scan(&store)?;
            self.check_no_new_users(&scan)?;
            progress.forbid_cancel()?;
            Ok((lock, scan))
        });
        match switched {
            Ok((lock, scan)) => self.switch(context, &scan, lock),
            Err(error) => Err(self.roll_back(&store, progress, error)),
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
            None if size() > self.writer.writer().size() => self.writer.writer().grow(size())?,
            None => {}
        }
        if !refusals::shares_blocks(store) {
            match self.base.format() {
                Format::Qcow2 => self.writer.writer().reserve(total)?,
                Format::Raw => self.segment.reserve_in(self.writer.writer())?,
            }
        }
        let mut at = 0;
        loop {
            while at < size() {
                progress.check()?;
                let len = PIECE.min(size() - at);
                let moved = match &self.active {
                    None => self.segment.merge(self.writer.writer(), at, len)?,
                    Some((_, mirror)) => {
                        mirror.check()?;
                        mirror.copy(at, len, || self.segment.merge(self.writer.writer(), at, len))?
                    }
                };
                progress.advance(moved);
                at += len;
            }
            // Beyond the end of a shorter top, no lower layer shows.
            match &self.active {
                None => {
                    zero_from(self.writer.writer(), size())?;
                    break;
                }
                Some((_, mirror)) if mirror.complete(at, size)? => break,
                // The disk has grown meanwhile.
                Some(_) => {}
            }
        }
        // Most data is durable before other commands have to wait for the rest.
        self.writer.writer().flush()
    }

    /// Checks that no layer which is about to change for good has gained a user.
    fn check_no_new_users(&self, scan: &ScannedStore) -> Result<()> {
        let CommitOperation { top, base, between, children, .. } = &self.intent.intent.operation;
        let find = |named: &FileRef| scan.expect(named);
        let (top, base) = (find(top)?, find(base)?);
        let between = between.iter().map(find).collect::<Result<Vec<_>>>()?;
        let children = children.iter().map(find).collect::<Result<Vec<_>>>()?;
        let merged: Vec<ImageIndex> = std::iter::once(top).chain(between.iter().copied()).collect();
        let mut refusals: Vec<Error> = Vec::new();
        refusals.extend(
            merged.iter().chain([&base]).chain(&children).filter_map(|index| scan.untouchable(*index)),
        );
        for index in between.iter().chain([&base]) {
            refuse::sharers(scan, *index, &merged, &mut refusals);
        }
        refuse::sharers(scan, top, &children, &mut refusals);
        refusals::first(refusals)?;
        if let Some((_, mirror)) = &self.active {
            mirror.check()?;
        }
        Ok(())
    }

    /// Ends the job before the switch: rolled back where that is possible, else left to be resumed.
    fn roll_back(self, store: &Arc<Store>, progress: &JobProgress, error: Error) -> Error {
        let Self { base, writer, intent, active, trash_copy, .. } = self;
        if let Some((job, _)) = &active {
            job.set_mirror(None);
        }
        drop(active);
        let name = base.name().to_owned();
        let is_undoable = writer.is_undoable();
        let called_back = writer.call_back();
        drop(writer);
        let finished = called_back.and_then(|()| base.finish());
        if let Err(trouble) = &finished {
            tracing::error!("{name}: a commit could not be rolled back: {trouble}");
        }
        if is_undoable && !progress.is_stopped() {
            discard_copy(store, trash_copy.as_deref());
            return match ending::remove_intent(store, intent) {
                Ok(()) => error,
                Err(trouble) => error.within(format!("{trouble}, and")),
            };
        }
        drop(intent);
        if is_undoable {
            return error;
        }
        let fact = format!(
            "{name} is partly overwritten; it and the layers between it and top stay hidden until the \
                            commit is given again or the store is mounted again"
        );
        Error::new(error.kind(), format!("{error}; {fact}"))
    }

    /// Makes base the backing file of all overlays of top. From its first step on it cannot be rolled back.
    fn switch(self, context: &Context, scan: &ScannedStore, lock: FileLock) -> Result<()> {
        let Self { base, writer, intent, active, views, segment, children, trash_copy: _ } = self;
        // No view of this process needs base as it was.
        drop((views, segment));
        let store = context.store();
        let CommitOperation { top, base: old_base, rename, .. } = intent.intent.operation.clone();
        let Some((job, mirror)) = active else {
            // The rename is durable and named by the header; then open disks are notified.
            writer.publish()?;
            if rename.is_some()
                && let Some(mark) = scan.image(scan.expect(&top)?).frozen.clone()
            {
                writer.writer().change_header(&HeaderChange { backing: None, frozen: Some(Some(mark)) })?;
            }
            drop(writer);
            base.finish()?;
            if let Some(name) = rename {
                finish::replace(store, &scan.catalog, &intent.intent, (&old_base, &top, &name))?;
            }
            return finish::commit(context, intent, lock, children);
        };
        let name = rename.expect("a base takes the active layer's name");
        freeze::thaw(store, scan, writer.writer(), base.format(), &old_base)?;
        let names = store.guard_names();
        let before = store.catalog();
        let settled;
        {
            let mut sealed = job.seal();
            let prepared = (|| {
                mirror.check()?;
                writer.publish()?;
                let prepared = sealed.prepare_fall(base)?;
                finish::take_name(&*names, &old_base.path, &top.path, &name)?;
                Ok(prepared)
            })();
            match prepared {
                Ok(prepared) => {
                    // The name belongs to base now: whatever fails from here on, guests write to base.
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

/// Whether an interrupted commit can be resumed; every refusal is checked again. Changes nothing.
pub(in crate::ops) fn examine(
    scan: &ScannedStore,
    intent: &Intent<CommitOperation>,
    discards: Discards,
) -> Result<CommitStage> {
    let state = finish::commit_state(scan, intent)?;
    let mut refusals = Vec::new();
    match &state {
        CommitStage::Copied => refuse::rest(scan, &intent.operation, &mut refusals),
        CommitStage::NotCopied(layers) => {
            let terms = CommitRequest {
                keep: intent.operation.keep,
                discard_internal: discards.internal,
                discard_bitmaps: discards.bitmaps,
                ..CommitRequest::default()
            };
            refuse::refusals(scan, layers, &terms, &mut refusals);
        }
    }
    refusals::first(refusals)?;
    Ok(state)
}

/// Resumes an interrupted commit. `Ok(None)`: it was complete.
pub(in crate::ops) fn resume(
    context: &Context,
    intent: OwnedIntent<CommitOperation>,
    discards: Discards,
    lock: FileLock,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let scan = ScannedStore::scan_for_resume(store, intent.name())?;
    match examine(&scan, &intent.intent, discards)? {
        CommitStage::Copied => finish::commit(context, intent, lock, Vec::new()).map(|()| None),
        CommitStage::NotCopied(layers) => {
            let path = intent.intent.chain.clone();
            locks.extend(&scan.chains_of(&[layers.top]))?;
            finish::repair_leaks(store, &scan, layers.base)?;
            let scan = ScannedStore::scan_for_resume(store, intent.name())?;
            let base = store.take_image(&scan.catalog, layers.base)?;
            let job = prepare(context, &scan, &path, &layers, base, intent).map_err(|failed| failed.0)?;
            Ok(Some(Box::new(job)))
        }
    }
}
