//! The job of a pull: filling, the switch, and resuming after an interruption.
//!
//! Each command that changes the backing file of layers without changing their bytes is such a job: `pull`,
//! `delete` with method=pull, and `rebase`.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::write::{BackingDisk, Writer};
use crate::image::{HeaderChange, Mapping};
use crate::io::FileLock;
use crate::store::{
    ActiveJob, Catalog, FileRef, ImageIndex, Intent, JobImage, OpenView, OwnedIntent, PullOperation, Store,
    ViewPart, shown,
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

/// A layer that is being filled.
struct FilledLayer {
    target: PullTarget,
    writer: Arc<Writer>,
    named: FileRef,
    /// Size of the largest disk among its internal snapshots: one may be larger than the image is now.
    longest_inner: u64,
}

/// The layers that are filled.
enum PullTarget {
    Active(ActiveJob),
    Image(JobImage),
}

/// The images that a pull has open.
struct OpenedPull {
    parts: Vec<FilledLayer>,
    fill: Filling,
    views: Vec<OpenView>,
}

/// Begins a pull. `Ok(None)`: nothing needs to be done.
pub(in crate::ops) fn begin(
    context: &Context,
    path: &Path,
    request: &PullRequest,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, scan) = ScannedStore::begin(context.store())?;
    let (plan, layers) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    if layers.into.is_empty() {
        return Ok(None);
    }
    locks.notes.extend(removal::not_kept(plan.notes));
    let job = begin_with(context, &scan, lock, path, &layers, command, locks)?;
    Ok(Some(Box::new(job)))
}

/// Begins a pull with an accepted plan, under the store's lock.
pub(in crate::ops) fn begin_with(
    context: &Context,
    scan: &ScannedStore,
    _lock: FileLock,
    path: &Path,
    layers: &PullRange,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<PullJob> {
    let store = context.store();
    locks.extend(&scan.chains_of(&layers.touched()))?;
    let operation = PullOperation {
        into: scan.witnesses(&layers.into, false)?,
        base: layers.base.map(|base| scan.witness(base, false)).transpose()?,
        remove: scan.witnesses(&layers.remove, true)?,
        between: scan.witnesses(&layers.between, false)?,
    };
    let ready = open(store, scan, layers)?;
    let name = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, operation));
    match intent.and_then(|intent| store.rescan().map(|_| intent)) {
        Ok(mut intent) => {
            // X3: no layer gets other bytes.
            intent.change_files(store, &scan.catalog, None);
            Ok(ready.with(intent))
        }
        Err(error) => {
            for part in ready.parts {
                part.restore_backing()?;
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

fn open(store: &Arc<Store>, scan: &ScannedStore, layers: &PullRange) -> Result<OpenedPull> {
    let view = |layers: &[ImageIndex]| {
        (!layers.is_empty())
            .then(|| store.open_view(&scan.catalog, layers, ViewPart::Active, Stability::Frozen))
            .transpose()
    };
    let below = view(&layers.below)?;
    let depth = layers.between.len();
    let mut views = Vec::new();
    let fill = match &below {
        // The new backing file is already among the layers below.
        Some(below) if layers.below.get(depth).copied() == layers.base => {
            Filling::between(store, &below.view, depth)
        }
        _ => {
            let new = view(&layers.base.map(|base| scan.catalog.layers(base)).unwrap_or_default())?;
            let stack = |open: &OpenView| Arc::clone(&open.view);
            let fill = Filling::differing(below.as_ref().map(stack), new.as_ref().map(stack));
            views.extend(new);
            fill
        }
    };
    let mut parts = Vec::new();
    for into in &layers.into {
        let (target, writer) = if scan.is_active_disk(*into) {
            let job = store.take_active(&scan.catalog, &scan.catalog.layers(*into))?;
            let writer = job.writer()?;
            let both = SwitchBacking { old: job.below(), new: fill.new_backing() };
            writer.set_backing(Some(Arc::new(both)));
            (PullTarget::Active(job), writer)
        } else {
            let mut image = store.take_image(&scan.catalog, *into)?;
            let lower = below.as_ref().map(|below| Arc::clone(&below.view));
            let writer = image.open_writer(lower)?;
            (PullTarget::Image(image), writer)
        };
        let mut part = FilledLayer { target, writer, named: scan.named(*into), longest_inner: 0 };
        match part.writer.snapshots() {
            Ok(all) => part.longest_inner = all.iter().filter_map(|one| one.virtual_size).max().unwrap_or(0),
            Err(error) => {
                part.restore_backing()?;
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
            Ok((lock, scan)) => self.switch(context, lock, &scan),
            Err(error) => {
                // The copied bytes change no view, and may stay.
                for part in self.parts {
                    if let Err(trouble) = part.restore_backing() {
                        tracing::error!("a pull could not be rolled back: {trouble}");
                    }
                }
                if !progress.is_stopped()
                    && let Err(trouble) = ending::remove_intent(&store, self.intent)
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
            // The disk may grow meanwhile.
            while at < part.end() {
                progress.check()?;
                // A mostly empty disk has terabytes of such ranges.
                if let Some(run) = self.fill.unchanged_for(at, part.end() - at)? {
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

    /// The last check, and the mark on layers that become leaves. No view has changed by then.
    fn ready_to_switch(
        &self,
        store: &Arc<Store>,
        progress: &JobProgress,
    ) -> Result<(FileLock, ScannedStore)> {
        let lock = ending::lock_for_job(store, progress)?;
        let scan = ScannedStore::scan(store)?;
        let PullOperation { into, base, remove, between } = &self.intent.intent.operation;
        for named in into {
            scan.untouchable(scan.expect(named)?).map_or(Ok(()), Err)?;
        }
        base.iter().try_for_each(|named| scan.expect(named).map(drop))?;
        progress.forbid_cancel()?;
        freeze_left(store, &scan, into, remove, between)?;
        Ok((lock, scan))
    }

    fn switch(self, context: &Context, lock: FileLock, scan: &ScannedStore) -> Result<()> {
        let store = context.store();
        let Self { parts, intent, _views: views, .. } = self;
        let PullOperation { base, .. } = &intent.intent.operation;
        let base = base.as_ref().map(|base| scan.expect(base)).transpose()?;
        let before = Arc::clone(&scan.catalog);
        let mut active = Vec::new();
        for part in parts {
            let into = scan.expect(&part.named)?;
            let backing = Some(base.map(|base| scan.backing_name(into, base)));
            part.describe_anew()?;
            part.writer.change_header(&HeaderChange { backing, frozen: None })?;
            // Frees the space that was reserved and not needed.
            active.extend(part.close()?);
        }
        let scan = ScannedStore::scan(store)?;
        rebased::switch_backing(&scan, &active)?;
        drop((active, views));
        clean_up(context, intent, lock, &before)
    }
}

impl FilledLayer {
    /// Size of the largest of its disks.
    fn end(&self) -> u64 {
        self.writer.size().max(self.longest_inner)
    }

    /// Keeps the old backing file.
    fn restore_backing(self) -> Result<()> {
        if let PullTarget::Active(job) = &self.target {
            self.writer.set_backing(job.below().map(|view| view as Arc<dyn BackingDisk>));
        }
        self.close().map(drop)
    }

    /// Bytes that will be copied, as far as the active tables show.
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

    /// Discards cached tables of the image and of its internal snapshots from before the filling: with
    /// another backing file, or none, they would show other bytes.
    fn describe_anew(&self) -> Result<()> {
        match &self.target {
            PullTarget::Active(job) => job.describe_anew(),
            PullTarget::Image(image) => image.describe_anew(),
        }
    }

    /// Makes it a frozen layer again. An active disk is returned, and stays in use.
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

/// Marks layers that will become leaves, while they still have overlays.
fn freeze_left(
    store: &Arc<Store>,
    scan: &ScannedStore,
    into: &[FileRef],
    remove: &[FileRef],
    between: &[FileRef],
) -> Result<()> {
    let going: Vec<ImageIndex> = into.iter().chain(remove).filter_map(|named| scan.find(named)).collect();
    // Only the uppermost of the remaining layers becomes a leaf.
    let stays = between
        .iter()
        .find(|named| !remove.iter().any(|gone| gone.is(named)))
        .and_then(|named| scan.find(named));
    let Some(index) = stays else { return Ok(()) };
    if scan.image(index).users.iter().all(|user| going.contains(user)) && freeze::may_be_marked(scan, index) {
        freeze::freeze(store, scan, index, &Frozen::now(""))?;
    }
    Ok(())
}

/// The steps after the switch.
fn clean_up(
    context: &Context,
    intent: OwnedIntent<PullOperation>,
    lock: FileLock,
    before: &Catalog,
) -> Result<()> {
    let store = context.store();
    let PullOperation { remove, .. } = &intent.intent.operation;
    ending::notify_disks(store, before, &intent.intent, None);
    let removed = removal::remove(store, remove, true, &intent.intent.command);
    // Layers that have gained users stay, and the pull is done.
    if removed.as_ref().is_err_and(|error| error.kind() != ErrorKind::NotEmpty) {
        return removed;
    }
    ending::end_intent(store, intent, lock).and(removed)
}

/// Whether a pull that was interrupted can be resumed; every refusal is checked again. Changes nothing.
pub(in crate::ops) fn examine(
    scan: &ScannedStore,
    intent: &Intent<PullOperation>,
    Discards { internal, bitmaps }: Discards,
) -> Result<Option<PullRange>> {
    let found = find(scan, &intent.operation)?;
    let mut refusals = Vec::new();
    if let Some(layers) = &found {
        let request =
            PullRequest { discard_internal: internal, discard_bitmaps: bitmaps, ..PullRequest::default() };
        refuse(scan, layers, &request, &mut refusals);
    } else {
        let PullOperation { remove, .. } = &intent.operation;
        let left = remove.iter().filter_map(|named| scan.find(named));
        refusals.extend(left.filter_map(|index| scan.untouchable(index)));
    }
    refusals::first(refusals)?;
    Ok(found)
}

/// Resumes a pull that was interrupted. `Ok(None)`: it was complete.
pub(in crate::ops) fn resume(
    context: &Context,
    intent: OwnedIntent<PullOperation>,
    discards: Discards,
    lock: FileLock,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let store = context.store();
    let scan = ScannedStore::scan_for_resume(store, intent.name())?;
    if let Err(error) = find(&scan, &intent.intent.operation) {
        // No view has changed, and none will: changes by other processes stay.
        ending::end_intent(store, intent, lock)?;
        return Err(error);
    }
    // J5: under the store's lock, before the first write.
    let Some(layers) = examine(&scan, &intent.intent, discards)? else {
        let PullOperation { into, remove, between, .. } = &intent.intent.operation;
        freeze_left(store, &scan, into, remove, between)?;
        let before = Arc::clone(&scan.catalog);
        return clean_up(context, intent, lock, &before).map(|()| None);
    };
    locks.extend(&scan.chains_of(&layers.touched()))?;
    Ok(Some(Box::new(open(store, &scan, &layers)?.with(intent))))
}

/// The remaining range to fill; `None` if there is none.
fn find(scan: &ScannedStore, operation: &PullOperation) -> Result<Option<PullRange>> {
    let PullOperation { into, base, remove, between } = operation;
    let all = |named: &[FileRef]| named.iter().map(|named| scan.expect(named)).collect::<Result<Vec<_>>>();
    let base = base.as_ref().map(|base| scan.expect(base)).transpose()?;
    let left: Vec<ImageIndex> =
        all(into)?.into_iter().filter(|index| scan.backing_of(*index) != base).collect();
    let Some(first) = left.first() else { return Ok(None) };
    let below = scan.catalog.layers(*first)[1..].to_vec();
    if let Some(other) = left.iter().find(|index| scan.backing_of(**index) != below.first().copied()) {
        let fact = "has another backing file by now; check which one it needs, and give the command again";
        let sentence = format!("{} {fact}", shown(&scan.image(*other).place.path));
        return Err(Error::new(ErrorKind::Stale, sentence));
    }
    Ok(Some(PullRange { into: left, below, base, between: all(between)?, remove: all(remove)? }))
}
