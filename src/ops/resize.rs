//! Resize: the active disk becomes larger, also while in use, or smaller.
//!
//! Promises: added space reads as zeroes, whatever the layers below hold there; internal snapshots keep their
//! sizes. Clusters beyond a smaller disk's end are freed only after the header states the new size; if that
//! is interrupted, resuming frees them.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::FileLock;
use crate::store::{ImageIndex, Intent, OwnedIntent, ShrinkOperation, Store, ViewPart};
use crate::units::{SECTOR_SIZE, Stability, human_size, parse_size};

use super::command::Command;
use super::context::Context;
use super::ending;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::plan::Plan;
use super::refusals;
use super::scanned_store::ScannedStore;
use super::virsh::DomainDisk;
use super::words::{LineBuilder, ParsedWords, VerbSpec, show, usage};

/// The words of `resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeRequest {
    /// The new size of the disk.
    pub size: NewSize,
    /// Whether the disk may shrink and lose the data beyond its new end.
    pub shrink: bool,
}

/// A size in bytes, or a difference from the current size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// A number of bytes.
    To(u64),
    /// This many bytes more than now.
    More(u64),
    /// This many bytes less than now.
    Less(u64),
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "resize",
    usage: "\
resize [+|-]SIZE [shrink]

Sets the size of the active disk, or adds to it (+) or subtracts from it (-). Units: K, M, G, T.
  shrink   allows a smaller size: data beyond the new end is lost, and the disk must not be open
",
    positional: Some("SIZE"),
    keys: &[],
    flags: &["shrink"],
    is_for_store: false,
};

impl Command for ResizeRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self { size: NewSize::parse(&words.positional()?)?, shrink: words.flag("shrink") })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { size, shrink } = self;
        line.word(size.to_string().as_bytes());
        line.flag("shrink", *shrink);
    }

    fn check(&self) -> Result<()> {
        match self.size {
            NewSize::To(0) => Err(usage("a disk of 0 bytes holds nothing; give its new size")),
            NewSize::More(0) | NewSize::Less(0) => Err(usage("the size would stay what it is")),
            NewSize::To(_) | NewSize::More(_) | NewSize::Less(_) => Ok(()),
        }
    }

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let old = disk.size()?;
        self.size.of(old).filter(|new| *new > old).and_then(|new| disk.resize(new))
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, _) = plan(context, scan, chain, self)?;
        Ok((plan, TouchedImages::top_of(&scan.chain(chain)?.views.layers)))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, _: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command)
    }
}

impl NewSize {
    /// Reads `10G`, `+1.5T`, `-512`.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = str::from_utf8(text).map_err(|_| usage(format!("{} is no size", show(text))))?;
        match text.as_bytes().first() {
            Some(b'+') => Ok(Self::More(parse_size(&text[1..])?)),
            Some(b'-') => Ok(Self::Less(parse_size(&text[1..])?)),
            _ => Ok(Self::To(parse_size(text)?)),
        }
    }
}

impl NewSize {
    /// The size that it means for a disk of `old` bytes: whole sectors. `None` if no disk is that large.
    fn of(self, old: u64) -> Option<u64> {
        let wanted = match self {
            NewSize::To(size) => size,
            NewSize::More(more) => old.checked_add(more)?,
            NewSize::Less(less) => old.saturating_sub(less),
        };
        wanted.checked_next_multiple_of(SECTOR_SIZE).filter(|size| i64::try_from(*size).is_ok())
    }
}

/// A size in the largest unit of which it is a whole number.
fn shortest(size: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.into_iter().find(|(shift, _)| size > 0 && size.trailing_zeros() >= *shift);
    unit.map_or_else(|| size.to_string(), |(shift, unit)| format!("{}{unit}", size >> shift))
}

/// Exactly, for [`NewSize::parse`].
impl std::fmt::Display for NewSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::To(size) => f.write_str(&shortest(*size)),
            Self::More(more) => write!(f, "+{}", shortest(*more)),
            Self::Less(less) => write!(f, "-{}", shortest(*less)),
        }
    }
}

/// The plan of a resize.
pub(super) struct PlannedResize {
    leaf: ImageIndex,
    old: u64,
    new: u64,
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &ResizeRequest,
) -> Result<(Plan, PlannedResize)> {
    let chain = scan.chain(path)?;
    let leaf = chain.views.layers[0];
    let image = scan.image(leaf);
    if chain.views.active().is_none() {
        let fact = "has no active disk to resize; clone it";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", chain.shown(scan))));
    }
    let old = image
        .virtual_size()
        .ok_or_else(|| Error::new(ErrorKind::Broken, format!("{} cannot be read", image.shown())))?;
    let too_large = || Error::new(ErrorKind::TooLarge, "no disk is that large (8 EiB)");
    let new = request.size.of(old).ok_or_else(too_large)?;
    let mut plan = Plan { before: lookup::tree(scan, &chain), ..Plan::default() };
    plan.after.clone_from(&plan.before);
    if let Some(line) = plan.after.first_mut() {
        line.note = human_size(new);
    }
    let refusals = &mut plan.refusals;
    if new == 0 {
        refusals.push(Error::new(ErrorKind::Usage, "nothing would be left of the disk"));
    }
    if new == old {
        refusals.push(Error::new(ErrorKind::Usage, format!("the disk has {} already", exact(old))));
    }
    refusals.extend(scan.untouchable(leaf));
    refusals.extend(scan.begun(&chain.views.layers[..1]));
    refusals.extend(scan.unfillable(leaf));
    refuse_bitmaps(scan, leaf, refusals);
    if new < old {
        if !request.shrink {
            let fact = format!(
                "the disk has {} and would have {}: data beyond that would be lost",
                exact(old),
                exact(new)
            );
            refusals.push(Error::new(ErrorKind::Forbidden, format!("{fact}; say shrink if it may")));
        }
        if context.store().is_active_open(image.stat.id) {
            let names = [format!("the active disk of {}", chain.shown(scan))];
            refusals.push(refusals::still_open(context, path, &names, "it is about to shrink"));
        }
        plan.refusals.extend(refusals::used_by_others(scan, leaf));
        plan.notes.push(format!("{} at the end of the disk are lost", exact(old - new)));
    }
    plan.notes.push(format!("from {} to {}", exact(old), exact(new)));
    Ok((plan, PlannedResize { leaf, old, new }))
}

/// A human-readable size and the exact number of bytes.
fn exact(len: u64) -> String {
    format!("{} ({len} bytes)", human_size(len))
}

/// Bitmaps have the size of the disk, and chainfs does not resize them.
fn refuse_bitmaps(scan: &ScannedStore, leaf: ImageIndex, refusals: &mut Vec<Error>) {
    let names = match refusals::bitmap_names(scan, leaf, |_| true) {
        Ok(names) => names,
        Err(error) => {
            let fact = "has unreadable persistent bitmaps, whose sizes would be wrong";
            let sentence = format!("{} {fact}: {error}; remove them first", scan.image(leaf).shown());
            return refusals.push(Error::new(ErrorKind::Unsupported, sentence));
        }
    };
    if !names.is_empty() {
        let fact = "has persistent bitmaps, whose sizes would be wrong";
        let sentence =
            format!("{} {fact}: {}; remove them first", scan.image(leaf).shown(), names.join(", "));
        refusals.push(Error::new(ErrorKind::Unsupported, sentence));
    }
}

/// Carries it out.
pub(super) fn begin(context: &Context, path: &Path, request: &ResizeRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, scan) = ScannedStore::begin(store)?;
    let (plan, PlannedResize { leaf, old, new }) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    if new > old {
        let job = store.take_active(&scan.catalog, &scan.catalog.layers(leaf))?;
        // The disk may have grown since the scan.
        let now = job.writer()?.size();
        let new = if let NewSize::More(more) = request.size { now.saturating_add(more) } else { new };
        if new > now {
            job.writer()?.grow(new)?;
        }
        job.writer()?.flush()?;
        drop((job, lock));
        return store.rescan().map(|_| None);
    }
    let named = scan.witness(leaf, false)?;
    let operation = ShrinkOperation { image: named.clone(), size: new };
    let of = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &of, &Intent::new(command, path, operation))?;
    match shrink(store, &scan, leaf, new) {
        Ok(()) => ending::end_intent(store, intent, lock).map(|()| None),
        Err(error) => {
            // Without evidence to the contrary, the header may have the new size.
            let is_shorter = ScannedStore::scan(store).map_or(true, |scan| {
                scan.find(&named).is_none_or(|leaf| scan.image(leaf).virtual_size() != Some(old))
            });
            if is_shorter {
                let fact = "the rest is done when the store is mounted again";
                return Err(Error::new(error.kind(), format!("{error}; {fact}")));
            }
            ending::remove_intent(store, intent)
                .map_err(|trouble| error.clone().within(format!("{trouble}, and")))?;
            Err(error)
        }
    }
}

fn shrink(store: &Arc<Store>, scan: &ScannedStore, leaf: ImageIndex, size: u64) -> Result<()> {
    let below = scan.catalog.layers(leaf)[1..].to_vec();
    let open = || store.open_view(&scan.catalog, &below, ViewPart::Active, Stability::Frozen);
    let view = (!below.is_empty()).then(open).transpose()?;
    store.while_closed(scan.image(leaf), || {
        let mut job = store.take_image(&scan.catalog, leaf)?;
        let writer = job.open_writer(view.as_ref().map(|open| Arc::clone(&open.view)))?;
        let done = writer.shrink(size).and_then(|()| writer.close());
        drop(writer);
        done.and(job.finish())
    })
}

/// Why an interrupted shrink cannot be resumed; whether anything remains to be done.
pub(super) fn examine(
    context: &Context,
    scan: &ScannedStore,
    intent: &Intent<ShrinkOperation>,
) -> Result<Option<ImageIndex>> {
    let ShrinkOperation { image, size } = &intent.operation;
    let Some(leaf) = scan.find(image).filter(|leaf| scan.image(*leaf).virtual_size() == Some(*size)) else {
        return Ok(None);
    };
    let mut refusals: Vec<Error> = Vec::new();
    refusals.extend(scan.untouchable(leaf));
    refusals.extend(scan.begun(&[leaf]));
    refusals.extend(refusals::used_by_others(scan, leaf));
    if context.store().is_active_open(scan.image(leaf).stat.id) {
        let names = ["the active disk".to_owned()];
        refusals.push(refusals::still_open(
            context,
            &intent.chain,
            &names,
            "clusters beyond its end are about to be freed",
        ));
    }
    refusals::first(refusals)?;
    Ok(Some(leaf))
}

/// Resumes an interrupted shrink: if the disk has its new size, clusters beyond its end are freed.
pub(super) fn resume(context: &Context, intent: OwnedIntent<ShrinkOperation>, lock: FileLock) -> Result<()> {
    let store = context.store();
    let scan = ScannedStore::scan_for_resume(store, intent.name())?;
    let ShrinkOperation { size, .. } = intent.intent.operation;
    if let Some(leaf) = examine(context, &scan, &intent.intent)? {
        shrink(store, &scan, leaf, size)?;
    }
    ending::end_intent(store, intent, lock)
}
