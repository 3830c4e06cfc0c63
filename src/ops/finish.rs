//! What commands have in common: the words of refusals, and the last steps, which are the same whether a job
//! comes to them or one that was cut off is taken up again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bitmap;
use crate::format::{Frozen, Snapshot};
use crate::image::check::{Scope, repair};
use crate::image::write::Writer;
use crate::image::{HeaderChange, change_header, check_header_change, read_bitmaps};
use crate::io::{Directory, FileId, FileLock, directory_of};
use crate::store::{
    ActiveJob, Catalog, ChainView, FileRef, Format, ImageIndex, Intent, JobImage, Operation, OwnedIntent, SPOILT,
    Store, shown,
};
use crate::units::human_size;

use super::commit::CommitRange;
use super::engine::Engine;
use super::job_table::JobProgress;
use super::plan::{Plan, PlanLayer};
use super::request::{CommitRequest, Request};
use super::scanned_store::{ScannedChain, ScannedStore, beside};

/// The layer that a view's name means, counted from the leaf.
pub(super) fn layer(world: &ScannedStore, chain: &ScannedChain, name: &[u8]) -> Result<usize> {
    let view = chain.views.find(name);
    if view.is_some_and(|view| view.snapshot.is_some()) {
        let fact = "is an internal snapshot; name one of the layers";
        return Err(Error::new(ErrorKind::Usage, format!("{} {fact}", String::from_utf8_lossy(name))));
    }
    let is_layer = |view: &ChainView| view.snapshot.is_none();
    view.map(|view| view.layer).ok_or_else(|| chain.views.unknown(&chain.shown(world), name, is_layer))
}

/// The same, and without a name the active layer; `key` is the word that could say another.
pub(super) fn layer_or_active(
    world: &ScannedStore,
    chain: &ScannedChain,
    name: Option<&[u8]>,
    key: &str,
) -> Result<usize> {
    if let Some(name) = name {
        return layer(world, chain, name);
    }
    chain.views.active().map(|active| active.layer).ok_or_else(|| {
        let fact = format!("{} has no active layer; say {key}= with one of its layers", chain.shown(world));
        Error::new(ErrorKind::Usage, fact)
    })
}

/// The view of that name.
pub(super) fn view<'a>(world: &ScannedStore, chain: &'a ScannedChain, name: &[u8]) -> Result<&'a ChainView> {
    chain.views.find(name).ok_or_else(|| chain.views.unknown(&chain.shown(world), name, |_| true))
}

/// The layers of a chain, top first.
pub(super) fn tree(world: &ScannedStore, chain: &ScannedChain) -> Vec<PlanLayer> {
    chain.views.layers.iter().map(|index| line(world, chain, *index)).collect()
}

/// An image, as the chain calls it if it is one of its layers.
pub(super) fn line(world: &ScannedStore, chain: &ScannedChain, index: ImageIndex) -> PlanLayer {
    let views = &chain.views;
    let depth = views.layers.iter().position(|layer| *layer == index);
    let view = views.views.iter().find(|view| Some(view.layer) == depth && view.snapshot.is_none());
    let path = world.image(index).place.path.clone();
    let name =
        view.map_or_else(|| path.file_stem().unwrap_or_default().as_encoded_bytes().to_vec(), |v| v.name.clone());
    PlanLayer { name, path, active: view.is_some_and(|view| view.active), note: String::new() }
}

/// Names of the views that show one of these images, or an internal snapshot of it, at their top.
pub(super) fn views_of(chain: &ScannedChain, images: impl Iterator<Item = ImageIndex>) -> Vec<Vec<u8>> {
    let images: Vec<ImageIndex> = images.collect();
    let shows = |layer: usize| images.contains(&chain.views.layers[layer]);
    chain.views.views.iter().filter(|view| shows(view.layer)).map(|view| view.name.clone()).collect()
}

/// The first refusal.
pub(super) fn first(refusals: Vec<Error>) -> Result<()> {
    refusals.into_iter().next().map_or(Ok(()), Err)
}

/// The internal snapshot of that place in an image's table.
pub(super) fn inner(world: &ScannedStore, index: ImageIndex, place: usize) -> Result<Snapshot> {
    let image = world.image(index);
    let snapshot = image.qcow2().and_then(|qcow2| qcow2.snapshots.get(place)).cloned();
    snapshot.ok_or_else(|| Error::new(ErrorKind::Stale, format!("{} has changed", image.shown())))
}

/// The names of an image's internal snapshots, if it has any.
pub(super) fn inner_names(world: &ScannedStore, index: ImageIndex) -> Option<String> {
    let qcow2 = world.image(index).qcow2()?;
    let names: Vec<_> = qcow2.snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name)).collect();
    let count = qcow2.header.snapshots.count;
    (count > 0).then(|| if names.is_empty() { format!("{count} of them") } else { names.join(", ") })
}

/// Refuses what would cost internal snapshots, unless the command says so.
pub(super) fn inner_snapshots(
    world: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let Some(names) = inner_names(world, index) else { continue };
        let fact = "holds internal snapshots, which this may cost";
        let name = world.image(index).shown();
        let sentence = format!("{name} {fact}: {names}; delete them, or say discard-internal");
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Refuses what would cost persistent bitmaps that are good, unless the command says so.
pub(super) fn bitmaps(
    world: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let names = match bitmap_names(world, index, |bitmap| !bitmap.in_use) {
            Ok(names) => names,
            // Nobody can tell whether they are good.
            Err(error) => {
                let fact = "holds persistent bitmaps that cannot be read, and which this would cost";
                let name = world.image(index).shown();
                let sentence = format!("{name} {fact}: {error}; remove them, or say discard-bitmaps");
                refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
                continue;
            }
        };
        if !names.is_empty() {
            let fact = "holds persistent bitmaps, which this would cost";
            let name = world.image(index).shown();
            let sentence = format!("{name} {fact}: {}; remove them, or say discard-bitmaps", names.join(", "));
            refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
        }
    }
}

/// The names of an image's persistent bitmaps, of those that are wanted. Fails where that cannot be read.
pub(super) fn bitmap_names(
    world: &ScannedStore,
    index: ImageIndex,
    wanted: impl Fn(&Bitmap) -> bool,
) -> Result<Vec<String>> {
    let image = world.image(index);
    let Some(qcow2) = image.qcow2() else { return Ok(Vec::new()) };
    let file = world.store.file(&image.place, &image.stat, false);
    let found = read_bitmaps(&image.shown(), &*file, &qcow2.header)?;
    let all = found.iter().flat_map(|(_, bitmaps)| bitmaps).filter(|bitmap| wanted(bitmap));
    Ok(all.map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned()).collect())
}

/// Why something cannot be done while views are open.
pub(super) fn still_open(engine: &Engine, chain: &Path, names: &[String], why: &str) -> Error {
    let openers = engine.openers(chain);
    let by = if openers.is_empty() { String::new() } else { format!(" by {openers}") };
    Error::new(ErrorKind::Busy, format!("still open{by}: {}; {why}, so close them first", names.join(", ")))
}

/// Refuses a name that something else has.
pub(super) fn taken(world: &ScannedStore, path: &Path, refusals: &mut Vec<Error>) {
    if world.store.roots()[0].stat(path).is_ok() {
        let fact = "exists already; remove it or choose another name";
        refusals.push(Error::new(ErrorKind::Exists, format!("{} {fact}", shown(path))));
    }
}

/// Refuses what a header has no room for: found out later, it could not be done after all.
pub(super) fn check_header(world: &ScannedStore, index: ImageIndex, change: &HeaderChange, refusals: &mut Vec<Error>) {
    let image = world.image(index);
    if image.qcow2().is_some() {
        let file = world.store.file(&image.place, &image.stat, false);
        refusals.extend(check_header_change(&image.shown(), &*file, change).err());
    }
    refusals.extend(world.unwritable(index));
}

/// Whether a layer that nobody stands on any more is marked as frozen: not one that is only read, or whose header would
/// change under another name as well.
pub(super) fn may_be_marked(world: &ScannedStore, index: ImageIndex) -> bool {
    let image = world.image(index);
    let is_its_own = image.format == Some(Format::Raw) || image.stat.link_count == 1;
    // Without a store around it nobody can tell whose layer it is.
    image.place.root == 0 && !image.readonly && is_its_own && world.store.guard().is_whole
}

/// The same for a mark of being frozen, unless there is one.
pub(super) fn check_freeze(world: &ScannedStore, index: ImageIndex, refusals: &mut Vec<Error>) {
    if world.image(index).format == Some(Format::Raw) {
        refusals.extend(world.store.check_notes().err());
    }
    if world.image(index).frozen.is_none() {
        let change = HeaderChange { backing: None, frozen: Some(Some(Frozen::now(""))) };
        check_header(world, index, &change, refusals);
    }
}

/// Refuses what there is surely no room for.
pub(super) fn check_room(world: &ScannedStore, target: ImageIndex, space: u64, refusals: &mut Vec<Error>) {
    let image = world.image(target);
    let free = world.store.file(&image.place, &image.stat, false).free_space();
    if let Ok(free) = free
        && free < space
        && !shares_blocks(&world.store)
    {
        let fact = format!("{} would need {}, and {} are free", image.shown(), human_size(space), human_size(free));
        refusals.push(Error::new(ErrorKind::NoSpace, fact));
    }
}

/// Notes how much would be copied into `target`, as it was `counted`; where that cannot be told, a plan that is refused
/// anyway does without.
pub(super) fn count(world: &ScannedStore, target: ImageIndex, counted: Result<u64>, plan: &mut Plan) {
    match counted {
        Ok(bytes) => plan.bytes += bytes,
        Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
        Err(_) => {}
    }
    plan.space = plan.bytes;
    check_room(world, target, plan.space, &mut plan.refusals);
}

/// Whether what is copied within the store may take no space of its own: none is asked for beforehand then.
pub(super) fn shares_blocks(store: &Store) -> bool {
    store.roots()[0].file_system().is_ok_and(|kind| SHARING.contains(&kind))
}

/// Magic numbers of file systems on which copies may share their blocks: XFS, btrfs, bcachefs.
const SHARING: [u64; 3] = [0x5846_5342, 0x9123_683E, 0xCA45_1A4E];

/// The store's lock for a job that has done its work, unless it is cancelled or stopped while another has that.
pub(super) fn lock_for_job(store: &Store, progress: &JobProgress) -> Result<FileLock> {
    store.guard().lock_for_job(&*store.guard_names(), &|| progress.check())
}

/// What the command of an intent said of what may be lost, whichever verb it was.
pub(super) fn terms(intent: &Intent) -> CommitRequest {
    let keep = matches!(intent.deed, Operation::Commit { keep: true, .. });
    let (discard_internal, discard_bitmaps) = match Request::parse_command(intent.command.as_bytes()) {
        Ok(Request::Commit(request)) => (request.discard_internal, request.discard_bitmaps),
        Ok(Request::Pull(request)) => (request.discard_internal, request.discard_bitmaps),
        Ok(Request::Delete(request)) => (request.discard_internal, request.discard_bitmaps),
        // Nothing was said.
        _ => (false, false),
    };
    CommitRequest { keep, discard_internal, discard_bitmaps, ..CommitRequest::default() }
}

/// How far a commit has come.
pub(super) enum CommitStage {
    /// Base holds everything, durably.
    Copied,
    /// Nobody knows what base holds; top and all between are as they were.
    NotCopied(CommitRange),
}

/// How far the commit of an intent has come, by what the files say.
pub(super) fn commit_state(world: &ScannedStore, intent: &Intent) -> Result<CommitStage> {
    let Operation::Commit { top, base, is_copied, rename, .. } = &intent.deed else {
        unreachable!("asked of a commit")
    };
    let is_switched = if let Some(name) = rename {
        let base_is_there = world.find(&FileRef::known(name.clone(), base.file)).is_some();
        base_is_there && (*name != base.path || world.find(top).is_none())
    } else {
        *is_copied && world.find(base).is_some()
    };
    if is_switched {
        return Ok(CommitStage::Copied);
    }
    CommitRange::of_intent(world, &intent.deed).map(CommitStage::NotCopied).ok_or_else(|| {
        let gone: Vec<String> =
            intent.files().iter().filter(|named| world.find(named).is_none()).map(|named| shown(&named.path)).collect();
        let fact = "cannot be taken up: what it was merging has been changed or taken away";
        let sentence = format!("{}: {fact} ({}); restore it from a copy", intent.command, gone.join(", "));
        Error::new(ErrorKind::Stale, sentence)
    })
}

/// An image that is to stand on something else, in the hands of a job.
pub(super) enum OverlayToRebase {
    /// The top of an active disk, which may be in use.
    Active(ActiveJob, FileRef),
    /// A frozen layer.
    Image(JobImage),
}

impl OverlayToRebase {
    /// Takes it: from here on no other process opens it.
    pub(super) fn take(store: &Arc<Store>, world: &ScannedStore, index: ImageIndex) -> Result<Self> {
        if world.is_active_disk(index) {
            let job = store.take_active(&world.catalog, &world.catalog.layers(index))?;
            return Ok(OverlayToRebase::Active(job, world.named(index)));
        }
        Ok(OverlayToRebase::Image(store.take_image(&world.catalog, index)?))
    }

    /// Points it at another backing file, through which the same bytes show. An active disk is returned: in memory
    /// it does not stand on that yet.
    fn put_on(self, world: &ScannedStore, index: ImageIndex, base: ImageIndex) -> Result<Option<(ActiveJob, FileRef)>> {
        let change = HeaderChange { backing: Some(Some(world.backing_name(index, base))), frozen: None };
        match self {
            OverlayToRebase::Active(job, named) => {
                job.writer()?.change_header(&change)?;
                Ok(Some((job, named)))
            }
            OverlayToRebase::Image(image) => {
                change_header(image.name(), &*image.file()?, &change)?;
                image.finish()?;
                Ok(None)
            }
        }
    }

    fn is(&self, named: &FileRef) -> bool {
        match self {
            OverlayToRebase::Active(_, own) => own.is(named),
            OverlayToRebase::Image(image) => image.id() == named.file.id,
        }
    }
}

/// The steps of a commit after the copy is durable; `lock` is held from the last look at who uses what. `held`: those
/// of the children that the job has held all the while.
pub(super) fn commit(
    engine: &Engine,
    mut intent: OwnedIntent,
    lock: FileLock,
    mut held: Vec<OverlayToRebase>,
) -> Result<()> {
    let store = engine.store();
    if let Operation::Commit { is_copied, rename: None, .. } = &mut intent.intent.deed
        && !std::mem::replace(is_copied, true)
    {
        // Before anybody stands on base: what is found there later may be others' doing.
        store.guard().rewrite(&*store.guard_names(), &mut intent)?;
    }
    let Operation::Commit { top, base, between, children, keep, rename, .. } = intent.intent.deed.clone() else {
        unreachable!("the intent of a commit")
    };
    let world = ScannedStore::look(store)?;
    let before = Arc::clone(&world.catalog);
    if rename.is_none() {
        let base_index = world.expect(&base)?;
        if keep && let Some(top) = world.find(&top) {
            freeze(store, &world, top, &Frozen::now(""))?;
        }
        let world = ScannedStore::look(store)?;
        let mut jobs = Vec::new();
        for named in &children {
            // What others have put on something else in the meantime shows that.
            let Some(index) = world.find(named).filter(|index| world.names(*index, &top)) else { continue };
            let child = match held.iter().position(|child| child.is(named)) {
                Some(place) => held.swap_remove(place),
                None => OverlayToRebase::take(store, &world, index)?,
            };
            jobs.extend(child.put_on(&world, index, base_index)?);
        }
        drop(held);
        let world = ScannedStore::look(store)?;
        stand_on_new(&world, &jobs)?;
        if keep
            && let (Some(top), Some(base)) = (world.find(&top), world.find(&base))
            && world.stands_on(top) != Some(base)
        {
            OverlayToRebase::take(store, &world, top)?.put_on(&world, top, base)?;
        }
        drop(jobs);
        let world = ScannedStore::look(store)?;
        if let Some(base) = world.find(&base)
            && !keep
            && world.image(base).users.iter().all(|user| {
                let named = world.named(*user);
                named.is(&top) || between.iter().any(|other| other.is(&named))
            })
        {
            // What stood there, and goes now, was no disk that anybody wrote.
            freeze(store, &world, base, &Frozen::now(""))?;
        }
    }
    tell(store, &before, &intent.intent, Some(&base));
    let names = store.guard_names();
    if let Some(name) = &rename {
        // Whoever gave it may have been cut off before it was durable.
        names.sync(&directory_of(name))?;
        names.sync(&directory_of(&base.path))?;
    }
    if keep {
        for named in &between {
            if ScannedStore::look(store)?.find(named).is_some() {
                names.rename(&named.path, &spoilt_name(&named.path), false)?;
                names.sync(&directory_of(&named.path))?;
            }
        }
    } else {
        // From the top down: nothing is left standing on what has gone.
        let all: Vec<FileRef> = std::iter::once(top).chain(between).collect();
        remove(store, &all, false, &intent.intent.command)?;
    }
    end(store, intent, lock)
}

/// The last steps when the active layer has fallen onto its base.
pub(super) fn active_commit(
    engine: &Engine,
    job: &ActiveJob,
    intent: OwnedIntent,
    lock: FileLock,
    before: &Arc<Catalog>,
) -> Result<()> {
    let store = engine.store();
    store.rescan()?;
    job.settle();
    let Operation::Commit { base, .. } = &intent.intent.deed else { unreachable!("the intent of a commit") };
    tell(store, before, &intent.intent, Some(base));
    commit(engine, intent, lock, Vec::new())
}

/// Tells those who have disks open what has become of the files below: all layers that are still there show what
/// they did, but for `changed`.
pub(super) fn tell(store: &Arc<Store>, before: &Catalog, intent: &Intent, changed: Option<&FileRef>) {
    let files: Vec<FileId> = intent.files().iter().map(|named| named.file.id).collect();
    tell_files(store, before, &files, changed);
}

/// The same of files by their numbers.
pub(super) fn tell_files(store: &Arc<Store>, before: &Catalog, files: &[FileId], changed: Option<&FileRef>) {
    let all = before.images.iter().map(|image| image.stat.id);
    let files: Vec<FileId> = all.filter(|id| files.contains(id)).collect();
    store.keep_states(before, &files, changed.map(|named| named.file.id));
    store.refresh_disks(&files);
}

/// Takes the intent away: all is done.
pub(super) fn end(store: &Arc<Store>, intent: OwnedIntent, lock: FileLock) -> Result<()> {
    let ended = forget(store, intent);
    drop(lock);
    ended
}

/// Takes the intent of something that did not come to pass away.
pub(super) fn forget(store: &Arc<Store>, intent: OwnedIntent) -> Result<()> {
    intent.end(&*store.guard_names())?;
    store.rescan().map(drop)
}

/// Lets disks stand on what their headers name by now.
pub(super) fn stand_on_new(world: &ScannedStore, jobs: &[(ActiveJob, FileRef)]) -> Result<()> {
    for (job, named) in jobs {
        let child = world.expect(named)?;
        job.stand_on(&world.catalog, &world.catalog.layers(child)[1..])?;
    }
    Ok(())
}

/// Marks an image as frozen, durably, unless it is.
pub(super) fn freeze(store: &Arc<Store>, world: &ScannedStore, index: ImageIndex, frozen: &Frozen) -> Result<()> {
    let image = world.image(index);
    if image.frozen.is_some() {
        return Ok(());
    }
    // C5: durably, or the command fails.
    if image.format == Some(Format::Raw) {
        return store.note_frozen(&world.guarded(&image.place.path), Some(frozen));
    }
    let job = store.take_image(&world.catalog, index)?;
    let change = HeaderChange { backing: None, frozen: Some(Some(frozen.clone())) };
    change_header(job.name(), &*job.file()?, &change)?;
    job.finish()
}

/// Takes the mark away from what is about to become the active layer.
pub(super) fn thaw(
    store: &Arc<Store>,
    world: &ScannedStore,
    writer: &Writer,
    format: Format,
    base: &FileRef,
) -> Result<()> {
    match (format, world.find(base)) {
        (Format::Raw, _) => store.note_frozen(&base.path, None),
        (Format::Qcow2, Some(index)) if world.image(index).frozen.is_some() => {
            writer.change_header(&HeaderChange { backing: None, frozen: Some(None) })
        }
        (Format::Qcow2, _) => Ok(()),
    }
}

/// Gives the base the name of the active layer, or one with its own extension: the moment from which on it is that.
/// If it fails, nothing has happened.
pub(super) fn take_name(names: &dyn Directory, base: &Path, top: &Path, name: &Path) -> Result<()> {
    if name == base {
        // What bears the same stem has to go.
        return names.unlink(top);
    }
    names.rename(base, name, name == top)
}

/// Makes that durable, and takes the old active layer away.
pub(super) fn settle_name(names: &dyn Directory, base: &Path, top: &Path, name: &Path) -> Result<()> {
    if name != top && name != base {
        names.sync(&directory_of(name))?;
        names.unlink(top)?;
    }
    names.sync(&directory_of(name))?;
    if directory_of(base) != directory_of(name) {
        names.sync(&directory_of(base))?;
    }
    Ok(())
}

/// What becomes of the name of a file that shows nothing any more.
pub(super) fn spoilt_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    beside(path, &[name, b".", SPOILT.as_bytes()].concat())
}

/// Gives a frozen base, which shows what `top` does by now, the name of that: in one step, since whoever stands on top
/// names it. Who has top open goes on reading through it, and so has to see base as it is before.
pub(super) fn replace(
    store: &Arc<Store>,
    before: &Catalog,
    intent: &Intent,
    (base, top, name): (&FileRef, &FileRef, &Path),
) -> Result<()> {
    let world = ScannedStore::look(store)?;
    tell(store, before, intent, Some(base));
    let names = store.guard_names();
    let id = world.image(world.expect(base)?).stat.id;
    store.rename_open(id, &own_path(store, name), || take_name(&*names, &base.path, &top.path, name))?;
    settle_name(&*names, &base.path, &top.path, name)
}

/// A path beneath the guarded directory as one beneath the store.
pub(super) fn own_path(store: &Store, path: &Path) -> PathBuf {
    path.strip_prefix(&store.guard().prefix).unwrap_or(path).to_path_buf()
}

/// Removes files that nothing is left to use, in this order; a user found late stops it. Those that still show what
/// they did (`is_valid`) go to the trash, if the store has one.
pub(super) fn remove(store: &Arc<Store>, files: &[FileRef], is_valid: bool, command: &str) -> Result<()> {
    let names = store.guard_names();
    for named in files {
        let world = ScannedStore::look(store)?;
        let Some(index) = world.find(named) else { continue };
        let others = world.others_using(index, &[]);
        if !others.is_empty() {
            let fact = format!("is used by {} by now, and was not removed", others.join(", "));
            return Err(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", shown(&named.path))));
        }
        if is_valid && store.keeps_trash(world.image(index).stat.id.device) {
            // What comes back is a snapshot. If it cannot be marked now, it is when it comes back.
            if let Err(error) = freeze(store, &world, index, &Frozen::now("")) {
                tracing::info!("{error}: it goes to the trash as it is");
            }
            let backing = world.stands_on(index).map(|below| world.named(below));
            let is_raw = world.image(index).format == Some(Format::Raw);
            let kind = (command, is_raw);
            store.put_into_trash(&world.catalog, &named.path, &named.path, kind, backing.as_ref()).map_err(
                |error| {
                    let remedy = "it stays as a snapshot of its own; see to the trash, and delete it again";
                    Error::new(ErrorKind::NotEmpty, format!("{error}; {remedy}"))
                },
            )?;
        } else {
            forget_trash(&world, &[named.file.id])?;
            names.unlink(&named.path)?;
        }
        if world.image(index).format == Some(Format::Raw) {
            store.note_frozen(&named.path, None)?;
        }
        names.sync(&directory_of(&named.path))?;
    }
    Ok(())
}

/// Removes from the trash what would show something else if these files were changed or gone.
pub(super) fn forget_trash(world: &ScannedStore, changed: &[FileId]) -> Result<()> {
    // T1: what would show something else goes before that happens.
    let spoilt = world.store.trash_on(&world.catalog, changed)?;
    for item in &spoilt {
        tracing::info!("{} goes from the trash: what it stands on changes", shown(&item.path));
    }
    world.store.remove_from_trash(spoilt.iter())
}

/// How notes begin on what does not go to the trash.
pub(super) const NOT_KEPT: &str = "not kept in the trash: ";

/// Those notes: they are told also of a command that is not only planned.
pub(super) fn not_kept(notes: Vec<String>) -> impl Iterator<Item = String> {
    notes.into_iter().filter(|note| note.starts_with(NOT_KEPT))
}

/// Notes what of the trash would go.
pub(super) fn note_trash(world: &ScannedStore, changed: &[ImageIndex], plan: &mut Plan) {
    let files: Vec<FileId> = changed.iter().map(|index| world.image(*index).stat.id).collect();
    let spoilt = match world.store.trash_on(&world.catalog, &files) {
        Ok(spoilt) => spoilt,
        // The command would be refused with that.
        Err(error) => return plan.refusals.push(error),
    };
    plan.notes.extend(
        spoilt.iter().map(|item| {
            format!("{} goes from the trash ({}), for what it stands on changes", shown(&item.path), item.id)
        }),
    );
}

/// Gives back what a commit that was cut off has counted in its base and nothing refers to.
pub(super) fn repair_leaks(store: &Arc<Store>, world: &ScannedStore, base: ImageIndex) -> Result<()> {
    if world.image(base).format != Some(Format::Qcow2) {
        return Ok(());
    }
    let job = store.take_image(&world.catalog, base)?;
    let repaired = repair(&*job.file()?, job.name(), Scope::Leaks, &mut |_| Ok(()));
    job.finish()?;
    repaired.map(drop)
}
