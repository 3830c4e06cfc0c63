//! Snapshot: the active layer is frozen under a name, and the disk continues in a new, empty overlay.
//!
//! Promises: the disk keeps its name and its open handles; all disks of a command are frozen at one instant;
//! a crash leaves the old chain or the new one, with all bytes. While the disks are quiesced there is a flush
//! and a rename, nothing else.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::change_header;
use crate::image::create::NewBacking;
use crate::image::write::NewSnapshot;
use crate::io::{Backend, Directory, Existing, FileLock, directory_of};
use crate::store::{
    ActiveJob, FileRef, Format, FormerTop, ImageEntry, ImageIndex, Intent, JobImage, NewTop, NewTopFile,
    OwnedIntent, SnapshotOperation, Store, encode, is_draft, shown,
};

use super::check::{
    MAX_DESCRIPTION_LEN, MAX_FILE_NAME_LEN, check_file_name, check_new_name, check_printable,
};
use super::command::Command;
use super::context::Context;
use super::ending;
use super::freeze;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::overlay::{self, DraftImage};
use super::plan::{Plan, PlanLayer};
use super::refusals;
use super::scanned_store::{ScannedChain, ScannedStore, beside, relative, with_stem};
use super::tokenize::quote;
use super::virsh::DomainDisk;
use super::words::{LineBuilder, ParsedWords, VerbSpec, parse_chains, print_chains, show, usage};

/// The words of `snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The name of the frozen layer, or of the internal snapshot.
    pub name: Vec<u8>,
    /// Whether it is kept inside the active image.
    pub internal: bool,
    /// The file that becomes the overlay, while the old one keeps its name, as virsh does it.
    pub file: Option<Vec<u8>>,
    /// The user's description; at most 1,024 bytes.
    pub description: String,
    /// For the store's control file: the chains that are frozen at one instant. Empty: the chain of the
    /// control file.
    pub chains: Vec<PathBuf>,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "snapshot",
    usage: "\
snapshot NAME [internal] [file=FILE] [description=\"TEXT\"]

Freezes the active disk as snapshot NAME and goes on in a new, empty overlay.
  internal        keeps the snapshot inside the active image
  file=FILE       the overlay is FILE, and the old file keeps its name
  description=    your description, at most 1,024 bytes
  chains=A,B      in .chainfs/control only: these chains, at one instant
",
    positional: Some("NAME"),
    keys: &["file", "description", "chains"],
    flags: &["internal"],
    is_for_store: true,
};

impl Command for SnapshotRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            name: words.positional()?,
            internal: words.flag("internal"),
            file: words.value("file"),
            description: match words.value("description") {
                Some(text) => String::from_utf8(text).map_err(|_| usage("the description is not UTF-8"))?,
                None => String::new(),
            },
            chains: words.value("chains").map(|list| parse_chains(&list)).unwrap_or_default(),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { name, internal, file, description, chains } = self;
        line.word(&quote(name));
        line.flag("internal", *internal);
        line.value("file", file.as_deref());
        line.value("description", Some(description.as_bytes()).filter(|text| !text.is_empty()));
        line.value("chains", Some(print_chains(chains)).filter(|list| !list.is_empty()).as_deref());
    }

    fn check(&self) -> Result<()> {
        let SnapshotRequest { name, internal, file, description, chains } = self;
        check_new_name(&SPEC, name)?;
        if let Some(file) = file {
            if *internal {
                return Err(usage("an internal snapshot has no overlay; leave out file= or internal"));
            }
            check_file_name("file=", file, MAX_FILE_NAME_LEN)?;
        }
        if *internal && chains.len() > 1 {
            return Err(usage(
                "internal snapshots of several disks are not of one instant; take them one by one",
            ));
        }
        if description.len() > MAX_DESCRIPTION_LEN {
            let fact = format!(
                "the description has {} bytes; the limit is {MAX_DESCRIPTION_LEN}",
                description.len()
            );
            return Err(usage(fact));
        }
        check_printable("the description", description.as_bytes())?;
        for (index, chain) in chains.iter().enumerate() {
            let is_plain = chain.components().all(|part| matches!(part, Component::Normal(_)));
            // As it was written, so that two spellings of one chain count as one.
            let is_settled = chain.components().collect::<PathBuf>().as_os_str() == chain.as_os_str();
            if chain.as_os_str().is_empty() || !is_plain || !is_settled {
                let shown = show(chain.as_os_str().as_bytes());
                return Err(usage(format!(
                    "{shown} is no chain's path; name chains as the mount does, as in a/b/web01"
                )));
            }
            check_printable("chains=", chain.as_os_str().as_bytes())?;
            if chains[..index].contains(chain) {
                return Err(usage(format!("chains= names {} twice", show(chain.as_os_str().as_bytes()))));
            }
        }
        Ok(())
    }

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let kind = if self.internal { None } else { Some(&b"--disk-only"[..]) };
        disk.command("snapshot-create-as", [&self.name[..]].into_iter().chain(kind))
    }

    fn plan(&self, _: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        plan(scan, chain, self)
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        locks.extend(&self.chains)?;
        run(context, chain, self, command).map(|()| None)
    }
}

/// The plan for one disk.
struct SnapshotDisk {
    chain: ScannedChain,
    leaf: ImageIndex,
    /// Relative to the store: the new name of the old top, and the overlay.
    frozen: PathBuf,
    name: PathBuf,
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    scan: &ScannedStore,
    path: &Path,
    request: &SnapshotRequest,
) -> Result<(Plan, TouchedImages)> {
    let (plan, disks) = disks(scan, path, request)?;
    let layers = |disk: &SnapshotDisk| disk.chain.views.layers.clone();
    let written = disks.iter().map(|disk| disk.leaf).collect();
    Ok((plan, TouchedImages { written, read: disks.iter().flat_map(layers).collect() }))
}

fn disks(scan: &ScannedStore, path: &Path, request: &SnapshotRequest) -> Result<(Plan, Vec<SnapshotDisk>)> {
    let paths = if request.chains.is_empty() { vec![path.to_path_buf()] } else { request.chains.clone() };
    let mut plan = Plan::default();
    let mut disks = Vec::new();
    let chains = paths.iter().map(|path| scan.chain(path)).collect::<Result<Vec<_>>>()?;
    let leaves: Vec<&Path> =
        chains.iter().map(|chain| scan.image(chain.views.layers[0]).place.path.as_path()).collect();
    let frozen_names: Vec<Vec<u8>> =
        leaves.iter().map(|leaf| frozen_name(leaf, &leaves, &request.name)).collect();
    for ((path, chain), frozen_name) in paths.iter().zip(chains).zip(frozen_names) {
        let mut before = lookup::tree(scan, &chain);
        let leaf = chain.views.layers[0];
        if chain.views.active().is_none() {
            let fact = "has no active layer to freeze";
            plan.refusals.push(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", chain.shown(scan))));
        }
        let image = scan.image(leaf);
        plan.refusals.extend(scan.untouchable(leaf));
        plan.refusals.extend(scan.begun(&chain.views.layers[..1]));
        plan.refusals.extend(scan.unfillable(leaf));
        if image.format == Some(Format::Raw) {
            plan.refusals.extend(scan.store.check_notes().err());
        }
        let old = &image.place.path;
        refuse_address(scan, &chain, &frozen_name, request, &mut plan.refusals);
        let (frozen, name) = match &request.file {
            Some(file) => (old.clone(), inside(old, file)?),
            None => (with_stem(old, image.format, &frozen_name), overlay_name(image)),
        };
        if request.internal {
            refuse_inner(scan, leaf, request, &mut plan.refusals);
            plan.after.append(&mut before.clone());
        } else {
            refuse_names(scan, &chain, image, (&frozen, &name), &frozen_name, &mut plan.refusals);
            if frozen == *old {
                plan.refusals.extend(scan.uncounted(leaf, &name, leaf));
            }
            let given = disks.iter().flat_map(|disk: &SnapshotDisk| [&disk.frozen, &disk.name]);
            if let Some(twice) = given.into_iter().find(|path| **path == frozen || **path == name) {
                let fact = "would be the name of two disks of this command; take their snapshots one by one";
                let sentence = format!("{} ({} as well): {fact}", shown(twice), shown(path));
                plan.refusals.push(Error::new(ErrorKind::Exists, sentence));
            }
            let top = PlanLayer {
                name: b"active".to_vec(),
                path: name.clone(),
                active: true,
                note: "new and empty".into(),
            };
            let mut after = before.clone();
            if let Some(line) = after.first_mut() {
                (line.name, line.path, line.active) = (frozen_name.clone(), frozen.clone(), false);
                "frozen".clone_into(&mut line.note);
            }
            after.insert(0, top);
            plan.after.append(&mut after);
            if frozen != *old {
                plan.renamed.push((old.clone(), frozen.clone()));
            }
        }
        plan.before.append(&mut before);
        disks.push(SnapshotDisk { chain, leaf, frozen, name });
    }
    Ok((plan, disks))
}

/// The name of a disk's snapshot file, without extension: NAME; where disks of one directory are frozen
/// together, prefixed with the disk's own name.
fn frozen_name(leaf: &Path, leaves: &[&Path], name: &[u8]) -> Vec<u8> {
    if leaves.iter().filter(|other| other.parent() == leaf.parent()).count() > 1 {
        let stem = leaf.file_stem().unwrap_or_default().as_encoded_bytes();
        return [stem, b"-", name].concat();
    }
    name.to_vec()
}

/// The path of a file that the user names, relative to the image's directory.
fn inside(old: &Path, file: &[u8]) -> Result<PathBuf> {
    let path = Path::new(std::ffi::OsStr::from_bytes(file));
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if !is_plain || file.is_empty() || file.ends_with(b"/") {
        let fact = "is not the name of a file beside the image, or in a directory beneath that";
        return Err(Error::new(ErrorKind::Usage, format!("{} {fact}", shown(path))));
    }
    Ok(directory_of(old).join(path))
}

/// The name of a raw image's overlay: the raw image's extension states the raw format.
fn overlay_name(image: &ImageEntry) -> PathBuf {
    let path = &image.place.path;
    if image.format == Some(Format::Qcow2) {
        return path.clone();
    }
    let stem = path.file_stem().unwrap_or_default().as_encoded_bytes();
    beside(path, &[stem, b".qcow2"].concat())
}

fn refuse_names(
    scan: &ScannedStore,
    chain: &ScannedChain,
    image: &ImageEntry,
    (frozen, name): (&Path, &Path),
    frozen_name: &[u8],
    refusals: &mut Vec<Error>,
) {
    let old = &image.place.path;
    if frozen == name {
        let fact = "is the disk's own name; choose another";
        let own = String::from_utf8_lossy(frozen_name);
        return refusals.push(Error::new(ErrorKind::Exists, format!("{own} {fact}")));
    }
    if frozen != old {
        refusals::taken(scan, frozen, refusals);
        overlay::refuse_misread(scan, frozen, image.format.unwrap_or(Format::Raw), true, refusals);
    }
    if name != old {
        refusals::taken(scan, name, refusals);
    }
    overlay::refuse_misread(scan, name, Format::Qcow2, false, refusals);
    let wanted = if frozen == old { Vec::new() } else { encode(frozen_name) };
    let has_it = chain.views.views.iter().any(|view| view.snapshot.is_none() && view.name == wanted);
    // Two files of one stem would both be shown by their full names, so the view would not have the requested
    // name.
    let same_stem = |other: &&ImageEntry| {
        other.stat.id != image.stat.id
            && directory_of(&other.place.path) == directory_of(frozen)
            && other.place.path.file_stem() == frozen.file_stem()
    };
    let stem_is_taken = frozen != old && scan.catalog.images.iter().any(|other| same_stem(&other));
    if (has_it || stem_is_taken) && refusals.iter().all(|refusal| refusal.kind() != ErrorKind::Exists) {
        let fact = "is already the name of another layer; choose another";
        let name = String::from_utf8_lossy(frozen_name);
        refusals.push(Error::new(ErrorKind::Exists, format!("{name} {fact}")));
    }
}

/// Refuses a name that would make an address ambiguous: IMAGE@NAME is an internal snapshot of the active
/// image, by name or by id, or else a layer of its chain.
pub(super) fn refuse_address(
    scan: &ScannedStore,
    chain: &ScannedChain,
    name: &[u8],
    request: &SnapshotRequest,
    refusals: &mut Vec<Error>,
) {
    let image = scan.image(chain.views.layers[0]);
    let name = if request.internal { &request.name } else { name };
    let shown_name = String::from_utf8_lossy(name);
    let address = format!("{}@{shown_name}", image.shown());
    let inner = image.qcow2().map_or(&[][..], |qcow2| &qcow2.snapshots);
    let is_layer = |view: &crate::store::ChainView| view.snapshot.is_none() && !view.active;
    if request.internal {
        if inner.iter().any(|snapshot| snapshot.id == *name && snapshot.name != *name) {
            let fact = format!("{address} means the internal snapshot of that id; choose another name");
            refusals.push(Error::new(ErrorKind::Exists, fact));
        } else if chain.views.find(&encode(name)).is_some_and(is_layer) {
            let fact = format!("{address} means the layer {shown_name}; choose another name");
            refusals.push(Error::new(ErrorKind::Exists, fact));
        }
    } else if request.file.is_none()
        && inner.iter().any(|snapshot| snapshot.name == *name || snapshot.id == *name)
    {
        let fact = format!("{address} means an internal snapshot; choose another name");
        refusals.push(Error::new(ErrorKind::Exists, fact));
    }
}

fn refuse_inner(scan: &ScannedStore, leaf: ImageIndex, request: &SnapshotRequest, refusals: &mut Vec<Error>) {
    let image = scan.image(leaf);
    let Some(qcow2) = image.qcow2() else {
        let fact = "is raw, and cannot hold internal snapshots; take an external one";
        return refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", image.shown())));
    };
    if qcow2.snapshots.iter().any(|snapshot| snapshot.name == request.name) {
        let name = String::from_utf8_lossy(&request.name);
        let fact =
            format!("{} holds an internal snapshot {name} already; choose another name", image.shown());
        refusals.push(Error::new(ErrorKind::Exists, fact));
    }
}

/// Takes the snapshot; when this returns, it exists.
pub(super) fn run(context: &Context, path: &Path, request: &SnapshotRequest, command: &str) -> Result<()> {
    let store = context.store();
    let (lock, scan) = ScannedStore::begin(store)?;
    let (plan, disks) = disks(&scan, path, request)?;
    scan.accept(&plan)?;
    let jobs = disks
        .iter()
        .map(|disk| store.take_active(&scan.catalog, &disk.chain.views.layers))
        .collect::<Result<Vec<_>>>()?;
    let frozen = Frozen::now(&request.description);
    if request.internal {
        for job in &jobs {
            let (seconds, nanoseconds) = (u32::try_from(frozen.seconds).unwrap_or(0), frozen.nanoseconds);
            // The cached tables of the disk are from before its writes. They become the snapshot's, and a
            // process that opens it needs their current state.
            job.describe_anew()?;
            job.writer()?.take_snapshot(&NewSnapshot { name: request.name.clone(), seconds, nanoseconds })?;
        }
        drop(lock);
        return store.rescan().map(drop);
    }
    let name = context.intent_name();
    let overlays = make_overlays(store, &scan, &disks, &jobs, &name)?;
    let tops = disks
        .iter()
        .zip(&overlays)
        .map(|(disk, overlay)| {
            Ok(NewTop {
                old: scan.witness(disk.leaf, false)?,
                frozen: scan.guarded(&disk.frozen),
                overlay: overlay.draft.named.clone(),
                name: scan.guarded(&disk.name),
                backing: None,
            })
        })
        .collect::<Result<Vec<NewTop>>>();
    let tops = tops.inspect_err(|_| remove(store, &overlays))?;
    let (seconds, nanoseconds, description) =
        (frozen.seconds, frozen.nanoseconds, frozen.description.clone());
    let operation = SnapshotOperation { seconds, nanoseconds, description, disks: tops.clone() };
    let intent = store.guard().begin(&*store.guard_names(), &name, &Intent::new(command, path, operation));
    let intent = intent.inspect_err(|_| remove(store, &overlays))?;
    let before = Arc::clone(&scan.catalog);
    match switch_disks(store, &jobs, overlays, &disks, &tops) {
        Ok(fallen) => {
            let named = tops.iter().map(|top| &top.frozen);
            for (old, path) in fallen.into_iter().zip(named) {
                freeze_former(store, old, path, &frozen)?;
            }
            store.rescan()?;
            jobs.iter().for_each(ActiveJob::settle);
            ending::notify_disks(store, &before, &intent.intent, None);
            ending::end_intent(store, intent, lock)
        }
        Err((error, false)) => {
            drop((intent, lock));
            store.rescan().and(Err(error))
        }
        Err((error, true)) => {
            ending::remove_intent(store, intent)
                .map_err(|trouble| error.clone().within(format!("{trouble}, and")))?;
            Err(error)
        }
    }
}

/// An overlay that is not visible yet.
struct NewOverlay {
    draft: DraftImage,
    top: NewTopFile,
}

fn make_overlays(
    store: &Arc<Store>,
    scan: &ScannedStore,
    disks: &[SnapshotDisk],
    jobs: &[ActiveJob],
    name: &str,
) -> Result<Vec<NewOverlay>> {
    let mut made: Vec<NewOverlay> = Vec::new();
    for (number, (disk, job)) in disks.iter().zip(jobs).enumerate() {
        match make_overlay(store, scan, disk, job, overlay::draft_name(&disk.name, name, number)) {
            Ok(overlay) => made.push(overlay),
            Err(error) => {
                remove(store, &made);
                return Err(error);
            }
        }
    }
    Ok(made)
}

fn remove(store: &Arc<Store>, overlays: &[NewOverlay]) {
    for overlay in overlays {
        overlay.draft.remove(store);
    }
}

fn make_overlay(
    store: &Arc<Store>,
    scan: &ScannedStore,
    disk: &SnapshotDisk,
    job: &ActiveJob,
    path: PathBuf,
) -> Result<NewOverlay> {
    let image = scan.image(disk.leaf);
    let backing = NewBacking {
        name: relative(&disk.name, &disk.frozen).into_os_string().into_encoded_bytes(),
        format: image.format.unwrap_or(Format::Raw).name().to_owned(),
    };
    let options = overlay::options(image, job.writer()?.size(), Some(backing));
    let draft = DraftImage::make(scan, path, &image.place.path, &options)?;
    match store.open_new_top(&draft.path, &shown(&disk.name)) {
        Ok(top) => Ok(NewOverlay { draft, top }),
        Err(error) => {
            draft.remove(store);
            Err(error)
        }
    }
}

/// Switches all disks to their overlays at one instant, or none: then says whether nothing has changed on
/// disk.
fn switch_disks(
    store: &Arc<Store>,
    jobs: &[ActiveJob],
    overlays: Vec<NewOverlay>,
    disks: &[SnapshotDisk],
    tops: &[NewTop],
) -> std::result::Result<Vec<FormerTop>, (Error, bool)> {
    let names = store.guard_names();
    let root = &*store.guard().root;
    // Most data is durable before any request has to wait.
    let ready = jobs
        .iter()
        .try_for_each(|job| job.writer()?.close())
        .and_then(|()| tops.iter().try_for_each(|top| add_name(&*names, top)));
    let done = ready.and_then(|()| {
        let mut sealed: Vec<_> = jobs.iter().map(ActiveJob::seal).collect();
        sealed.iter_mut().try_for_each(super::super::store::Quiesced::close)?;
        let mut prepared = Vec::new();
        let ready = sealed.iter_mut().zip(overlays).try_for_each(|(sealed, overlay)| {
            prepared.push(sealed.prepare(overlay.top)?);
            Ok(())
        });
        if let Err(error) = ready.and_then(|()| switch_names(root, &*names, tops)) {
            for (sealed, prepared) in sealed.iter_mut().zip(prepared) {
                sealed.give_up(prepared);
            }
            return Err(error);
        }
        let all = sealed.into_iter().zip(prepared).zip(disks);
        Ok(all.map(|((sealed, prepared), disk)| sealed.stand(prepared, &disk.name, &disk.frozen)).collect())
    });
    done.map_err(|error| match roll_back_names(root, &*names, tops) {
        Ok(()) => (error, true),
        Err(trouble) => {
            let fact = "it is resumed when the store is mounted again";
            (Error::new(error.kind(), format!("{error}; {trouble}; {fact}")), false)
        }
    })
}

/// Whether that file has that name.
fn is_at(root: &dyn Backend, path: &Path, named: &FileRef) -> bool {
    named.is_at(root, path)
}

/// Adds the old top's new name as a hard link, durably.
fn add_name(names: &dyn Directory, top: &NewTop) -> Result<()> {
    if top.frozen == top.old.path {
        return Ok(());
    }
    names.link(&top.old.path, &top.frozen)?;
    names.sync(&directory_of(&top.frozen))
}

/// Removes overlays that are not visible yet, and second names, once all disks have their first ones,
/// durably. By identity: files that another process has put there stay.
fn roll_back_names(root: &dyn Backend, names: &dyn Directory, tops: &[NewTop]) -> Result<()> {
    for top in tops {
        if !is_at(root, &top.old.path, &top.old) {
            let path = &top.old.path;
            return Err(Error::new(ErrorKind::Io, format!("could not restore the name of {}", shown(path))));
        }
        names.sync(&directory_of(&top.old.path))?;
    }
    remove_overlays(root, names, tops)?;
    for top in tops {
        let has_both = is_at(root, &top.old.path, &top.old) && is_at(root, &top.frozen, &top.old);
        if top.frozen != top.old.path && has_both {
            names.unlink(&top.frozen)?;
        }
        names.sync(&directory_of(&top.frozen))?;
    }
    Ok(())
}

/// Removes overlays that are not visible yet, durably.
fn remove_overlays(root: &dyn Backend, names: &dyn Directory, tops: &[NewTop]) -> Result<()> {
    for top in tops.iter().filter(|top| is_at(root, &top.overlay.path, &top.overlay)) {
        names.unlink(&top.overlay.path)?;
        names.sync(&directory_of(&top.overlay.path))?;
    }
    Ok(())
}

/// Renames the overlays to the disks' names, durably. A failure rolls back the renames.
fn switch_names(root: &dyn Backend, names: &dyn Directory, tops: &[NewTop]) -> Result<()> {
    let mut directories: Vec<PathBuf> = tops.iter().map(|top| directory_of(&top.name)).collect();
    directories.dedup();
    let switched = tops
        .iter()
        .try_for_each(|top| switch_name(root, names, top))
        .and_then(|()| directories.iter().try_for_each(|directory| names.sync(directory)));
    switched.inspect_err(|_| {
        for top in tops.iter().rev() {
            // The overlays are unwritten, since all disks are quiesced.
            if let Err(trouble) = switch_back(root, names, top) {
                tracing::error!("{}: {trouble}", shown(&top.old.path));
            }
        }
    })
}

fn switch_name(root: &dyn Backend, names: &dyn Directory, top: &NewTop) -> Result<()> {
    // A file that another process has put there meanwhile stays.
    expect_at(root, &top.overlay.path, &top.overlay)?;
    expect_at(root, &top.old.path, &top.old)?;
    names.rename(&top.overlay.path, &top.name, top.existing())?;
    if top.frozen != top.old.path && top.name != top.old.path {
        // A raw image keeps only its new name; the overlay's name differs. Without the overlay that name
        // would be an active disk's.
        names.sync(&directory_of(&top.name))?;
        expect_at(root, &top.old.path, &top.old)?;
        names.unlink(&top.old.path)?;
    }
    Ok(())
}

fn expect_at(root: &dyn Backend, path: &Path, named: &FileRef) -> Result<()> {
    if is_at(root, path, named) {
        return Ok(());
    }
    let fact = "has been replaced by another process; give the command again";
    Err(Error::new(ErrorKind::Stale, format!("{} {fact}", shown(path))))
}

/// Rolls [`switch_name`] back from wherever it failed.
fn switch_back(root: &dyn Backend, names: &dyn Directory, top: &NewTop) -> Result<()> {
    if !is_at(root, &top.name, &top.overlay) {
        return Ok(());
    }
    if top.name == top.old.path {
        names.link(&top.frozen, &top.overlay.path)?;
        return names.rename(&top.overlay.path, &top.old.path, Existing::Replace);
    }
    if !is_at(root, &top.old.path, &top.old) {
        names.link(&top.frozen, &top.old.path)?;
    }
    names.unlink(&top.name)
}

/// Marks the former top as frozen, and makes it an ordinary layer.
fn freeze_former(store: &Arc<Store>, old: FormerTop, path: &Path, frozen: &Frozen) -> Result<()> {
    let marked = freeze::mark(store, old.format(), path, frozen, |change| old.writer.change_header(change));
    let marked = freeze::unless_unsupported(marked);
    let finished = old.finish();
    marked.and(finished)
}

/// Whether an interrupted snapshot, or revert, is completed (true) or rolled back; every refusal is checked
/// again. Changes nothing.
pub(super) fn examine(scan: &ScannedStore, intent: &Intent<SnapshotOperation>) -> Result<bool> {
    let SnapshotOperation { disks, .. } = &intent.operation;
    let root = &*scan.store.guard().root;
    // Before the first overlay has its name, nothing is frozen; the disk's present content is of a later
    // moment than the user asked for.
    let is_taken = disks.iter().any(|top| is_at(root, &top.name, &top.overlay));
    let completes = is_taken && disks.iter().all(|top| can_finish(root, top));
    let mut refusals = Vec::new();
    for top in disks {
        refuse_rest(scan, top, completes, &mut refusals);
    }
    refusals::first(refusals)?;
    Ok(completes)
}

/// Why the remaining steps on a disk of a snapshot cannot be done or undone.
fn refuse_rest(scan: &ScannedStore, top: &NewTop, completes: bool, refusals: &mut Vec<Error>) {
    let root = &*scan.store.guard().root;
    let find = |path: &PathBuf| scan.find(&FileRef::known(path.clone(), top.old.file));
    let Some(old) = find(&top.old.path).or_else(|| find(&top.frozen)) else { return };
    let has_come = is_at(root, &top.name, &top.overlay);
    let image = scan.image(old);
    // The disk has two names of its own for a while.
    let own_names = [&top.old.path, &top.frozen].iter().filter(|path| is_at(root, path, &top.old)).count();
    let own_names = if top.old.path == top.frozen { 1 } else { own_names };
    if image.stat.link_count > own_names as u64 {
        let fact = "has gained other names (hard links), under which it would change; remove those";
        refusals.push(Error::new(ErrorKind::Busy, format!("{} {fact}", image.shown())));
    }
    let is_done = has_come && own_names == 1 && image.frozen.is_some();
    if completes && !is_done {
        let is_link = |error: &Error| error.kind() == ErrorKind::Busy;
        refusals.extend(scan.untouchable(old).filter(|error| !is_link(error)));
    }
    // A layer that is kept stays valid for images whose owners' names do not count.
    let is_kept = !is_draft(&top.frozen);
    let others_using = |known: &[ImageIndex]| {
        if is_kept { scan.others_counting(old, known) } else { scan.others_using(old, known) }
    };
    if has_come && own_names > 1 {
        // Its old name is removed: an image that has come to be backed by that name would lose its backing
        // file.
        let others = others_using(&scan.users_by_name(old));
        if !others.is_empty() {
            let (given, others) = (shown(&top.old.path), others.join(", "));
            let fact = format!(
                "has come to be used by {others} under its old name {given}, which is about to be removed"
            );
            let sentence = format!("{} {fact}; rebase those onto {} first", image.shown(), image.shown());
            refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
        }
    } else if !has_come {
        // An image that has come to be backed by it by its old name would be backed by the overlay; one by
        // its new name would lose its backing file.
        let others = others_using(&[]);
        if !others.is_empty() && (completes || own_names > 1) {
            let fact = "has come to be used by other images, which would lose it";
            let sentence = format!("{} {fact}: {}; rebase those first", image.shown(), others.join(", "));
            refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
        }
    }
}

/// Resumes an interrupted snapshot or revert: completes it if the disk was frozen, else rolls it back.
pub(super) fn resume(
    context: &Context,
    intent: OwnedIntent<SnapshotOperation>,
    lock: FileLock,
) -> Result<()> {
    let store = context.store();
    let scan = ScannedStore::scan_for_resume(store, intent.name())?;
    let completes = examine(&scan, &intent.intent)?;
    let SnapshotOperation { disks, .. } = &intent.intent.operation;
    let held = if completes { lock_disks(store, disks)? } else { Vec::new() };
    let done = finish_or_roll_back(context, intent, held, completes);
    drop(lock);
    done
}

/// Completes a snapshot whose disks (`held`) are locked and not in use, or rolls it back. Under the store's
/// lock.
pub(super) fn finish_or_roll_back(
    context: &Context,
    intent: OwnedIntent<SnapshotOperation>,
    held: Vec<JobImage>,
    completes: bool,
) -> Result<()> {
    let store = context.store();
    let names = store.guard_names();
    let SnapshotOperation { disks, .. } = &intent.intent.operation;
    let root = &*store.guard().root;
    let went = if completes { finish(store, &intent.intent, held) } else { Ok(()) };
    let has_come = disks.iter().any(|top| is_at(root, &top.name, &top.overlay));
    if has_come && went.is_err() {
        // The intent stays, and records the remaining steps.
        let fact = "the disk has been switched already; the remaining steps are done at the next mount";
        return went.map_err(|error| error.within(fact));
    }
    if !has_come && disks.iter().all(|top| is_at(root, &top.old.path, &top.old)) {
        roll_back_names(root, &*names, disks)?;
    } else if !has_come {
        // Another process has taken the name of a disk: its new name is the only one that it has, and stays.
        remove_overlays(root, &*names, disks)?;
    }
    ending::remove_intent(store, intent).and(went)
}

fn finish(store: &Arc<Store>, intent: &Intent<SnapshotOperation>, held: Vec<JobImage>) -> Result<()> {
    let SnapshotOperation { seconds, nanoseconds, description, disks } = &intent.operation;
    let (root, names) = (&*store.guard().root, store.guard_names());
    for top in disks {
        if top.frozen != top.old.path && !is_at(root, &top.frozen, &top.old) {
            add_name(&*names, top)?;
        }
        if !is_at(root, &top.name, &top.overlay) {
            expect_at(root, &top.overlay.path, &top.overlay)?;
            if top.name == top.old.path {
                expect_at(root, &top.name, &top.old)?;
            }
            names.rename(&top.overlay.path, &top.name, top.existing())?;
            names.sync(&directory_of(&top.name)).inspect_err(|error| {
                // A crash may bring back the disk's former name: no write may be acknowledged before this is
                // durable.
                if let Ok(stat) = root.stat(&top.name) {
                    store.poison_active(stat.id, &shown(&top.name), error);
                }
            })?;
        }
        if top.frozen != top.old.path && is_at(root, &top.old.path, &top.old) {
            names.unlink(&top.old.path)?;
            names.sync(&directory_of(&top.old.path))?;
        }
    }
    let mark = Frozen { seconds: *seconds, nanoseconds: *nanoseconds, description: description.clone() };
    for mut job in held {
        let top = disks.iter().find(|top| top.old.file.id() == job.id());
        // Readers of its internal snapshots have it open. Their locks count as this process's only if the
        // file is found by its new name.
        if let Some(top) = top {
            job.renamed(&ending::own_path(store, &top.frozen));
        }
        // A file restored from the trash is a snapshot.
        if let Some(top) = top.filter(|top| is_draft(&top.frozen))
            && store.keeps_trash(job.id())
            && job.format() == Format::Qcow2
        {
            let marked = freeze::mark(store, Format::Qcow2, &top.frozen, &mark, |change| {
                change_header(job.name(), &*job.file()?, change)
            });
            if let Err(error) = marked {
                tracing::info!("{error}: moved to the trash without the mark");
            }
        }
        job.finish()?;
    }
    let scan = ScannedStore::scan(store)?;
    for top in disks.iter().filter(|top| is_draft(&top.frozen)) {
        // The replaced and unsaved layer; a file that another process has put there is not.
        if !is_at(root, &top.frozen, &top.old) {
            continue;
        }
        if root.stat(&top.frozen).is_ok_and(|stat| store.keeps_trash(stat.id)) {
            // Its backing file is recorded even if it is gone: a restored file must not seem intact.
            store.put_into_trash(
                &scan.catalog,
                &top.frozen,
                &top.old.path,
                (&intent.command, false),
                top.backing.as_ref(),
            )?;
        } else {
            names.unlink(&top.frozen)?;
        }
        names.sync(&directory_of(&top.frozen))?;
    }
    for top in disks.iter().filter(|top| !is_draft(&top.frozen)) {
        let old = scan.expect(&FileRef::known(top.frozen.clone(), top.old.file))?;
        freeze::unless_unsupported(freeze::freeze(store, &scan, old, &mark))?;
    }
    Ok(())
}

/// Whether all files that a disk of a snapshot needs exist, and no file of another process is in the way. If
/// an overlay is gone, nothing was begun that a guest could have seen.
fn can_finish(root: &dyn Backend, top: &NewTop) -> bool {
    let is_free = |path: &Path| root.stat(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let is_old = |path: &Path| is_at(root, path, &top.old);
    let has_come = is_at(root, &top.name, &top.overlay);
    let may_come = is_at(root, &top.overlay.path, &top.overlay)
        && if top.name == top.old.path { is_old(&top.name) } else { is_free(&top.name) };
    let may_be_named = is_old(&top.frozen) || (is_old(&top.old.path) && is_free(&top.frozen));
    may_be_named && (has_come || may_come)
}

/// Locks the layers that are to be frozen against writers while their names change.
fn lock_disks(store: &Arc<Store>, disks: &[NewTop]) -> Result<Vec<JobImage>> {
    let scan = ScannedStore::scan(store)?;
    let take = |top: &NewTop| {
        let named = |path: &PathBuf| scan.find(&FileRef::known(path.clone(), top.old.file));
        let index = named(&top.old.path).or_else(|| named(&top.frozen));
        index.map(|index| store.take_image(&scan.catalog, index))
    };
    disks.iter().filter_map(take).collect()
}

impl Frozen {
    /// A mark of this moment.
    pub(super) fn now(description: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            nanoseconds: now.subsec_nanos(),
            description: description.to_owned(),
        }
    }
}
