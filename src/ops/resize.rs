//! Resize: the active disk becomes longer, also in use, or shorter.
//!
//! Promises: what is new reads as zeroes, whatever lies there in layers below; internal snapshots keep their
//! sizes. What a shorter disk loses is given back only when its header says so, and if that is cut off, by
//! whoever takes it up.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::FileLock;
use crate::store::{CachePolicy, ImageIndex, Intent, OwnedIntent, ShrinkOperation, Store, ViewPart};
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
use super::revert::used_by_others;
use super::scanned_store::ScannedStore;
use super::words::{LineBuilder, ParsedWords, VerbSpec, show, usage};

/// The words of `resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeRequest {
    /// How long the disk is to be.
    pub size: NewSize,
    /// Whether it may become shorter, and lose what lies behind its new end.
    pub shrink: bool,
}

/// A size in bytes, or a difference to what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more than now.
    More(u64),
    /// So many bytes less than now.
    Less(u64),
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "resize",
    usage: "\
resize [+|-]SIZE [shrink]

Makes the active disk SIZE bytes long, or by so much longer or shorter; K, M, G, T follow a number as in qemu-img.
  shrink   it may become shorter: what lies behind the new end is lost, and nobody may have the disk open
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
            NewSize::To(0) => Err(usage("a disk of 0 bytes holds nothing; say how long it is to be")),
            NewSize::More(0) | NewSize::Less(0) => Err(usage("the size would stay what it is")),
            NewSize::To(_) | NewSize::More(_) | NewSize::Less(_) => Ok(()),
        }
    }

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, _) = plan(context, world, chain, self)?;
        Ok((plan, TouchedImages::top_of(&world.chain(chain)?.views.layers)))
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

/// What a resize comes to.
pub(super) struct PlannedResize {
    leaf: ImageIndex,
    old: u64,
    new: u64,
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &ResizeRequest,
) -> Result<(Plan, PlannedResize)> {
    let chain = world.chain(path)?;
    let leaf = chain.views.layers[0];
    let image = world.image(leaf);
    if chain.views.active().is_none() {
        let fact = "has no active disk that could be resized; clone it";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", chain.shown(world))));
    }
    let old = image
        .virtual_size()
        .ok_or_else(|| Error::new(ErrorKind::Broken, format!("{} cannot be read", image.shown())))?;
    let too_large = || Error::new(ErrorKind::TooLarge, "no disk is that large (8 EiB)");
    let wanted = match request.size {
        NewSize::To(size) => Some(size),
        NewSize::More(more) => old.checked_add(more),
        NewSize::Less(less) => Some(old.saturating_sub(less)),
    };
    let new = wanted.and_then(|size| size.checked_next_multiple_of(SECTOR_SIZE)).ok_or_else(too_large)?;
    if new > i64::MAX as u64 {
        return Err(too_large());
    }
    let mut plan = Plan { before: lookup::tree(world, &chain), ..Plan::default() };
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
    refusals.extend(world.untouchable(leaf));
    refusals.extend(world.begun(&chain.views.layers[..1]));
    refusals.extend(world.unfillable(leaf));
    refuse_bitmaps(world, leaf, refusals);
    if new < old {
        if !request.shrink {
            let fact = format!(
                "the disk has {} and would have {}: what lies behind that would be lost",
                exact(old),
                exact(new)
            );
            refusals.push(Error::new(ErrorKind::Forbidden, format!("{fact}; say shrink if it may")));
        }
        if context.store().is_active_open(image.stat.id) {
            let names = [format!("the active disk of {}", chain.shown(world))];
            refusals.push(refusals::still_open(context, path, &names, "it becomes shorter"));
        }
        plan.refusals.extend(used_by_others(world, leaf));
        plan.notes.push(format!("{} at the end of the disk are lost", exact(old - new)));
    }
    plan.notes.push(format!("from {} to {}", exact(old), exact(new)));
    Ok((plan, PlannedResize { leaf, old, new }))
}

/// A size for people, and the bytes that it stands for.
fn exact(len: u64) -> String {
    format!("{} ({len} bytes)", human_size(len))
}

/// Bitmaps have the size of the disk, and nobody here changes theirs.
fn refuse_bitmaps(world: &ScannedStore, leaf: ImageIndex, refusals: &mut Vec<Error>) {
    let names = match refusals::bitmap_names(world, leaf, |_| true) {
        Ok(names) => names,
        Err(error) => {
            let fact = "has persistent bitmaps that cannot be read, and whose sizes would be wrong";
            let sentence = format!("{} {fact}: {error}; remove them first", world.image(leaf).shown());
            return refusals.push(Error::new(ErrorKind::Unsupported, sentence));
        }
    };
    if !names.is_empty() {
        let fact = "has persistent bitmaps, whose sizes would be wrong";
        let sentence =
            format!("{} {fact}: {}; remove them first", world.image(leaf).shown(), names.join(", "));
        refusals.push(Error::new(ErrorKind::Unsupported, sentence));
    }
}

/// Does it.
pub(super) fn begin(context: &Context, path: &Path, request: &ResizeRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, world) = ScannedStore::begin(store)?;
    let (plan, PlannedResize { leaf, old, new }) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    if new > old {
        let job = store.take_active(&world.catalog, &world.catalog.layers(leaf))?;
        // It may have grown since it was looked at.
        let now = job.writer()?.size();
        let new = if let NewSize::More(more) = request.size { now.saturating_add(more) } else { new };
        if new > now {
            job.writer()?.grow(new)?;
        }
        job.writer()?.flush()?;
        drop((job, lock));
        return store.rescan().map(|_| None);
    }
    let named = world.witness(leaf, false)?;
    let operation = ShrinkOperation { image: named.clone(), size: new };
    let of = context.intent_name();
    let intent = store.guard().begin(&*store.guard_names(), &of, &Intent::new(command, path, operation))?;
    match shrink(store, &world, leaf, new) {
        Ok(()) => ending::end(store, intent, lock).map(|()| None),
        Err(error) => {
            // Where nobody can tell, it may be.
            let is_shorter = ScannedStore::look(store).map_or(true, |world| {
                world.find(&named).is_none_or(|leaf| world.image(leaf).virtual_size() != Some(old))
            });
            if is_shorter {
                let fact = "what is left of it is done when the store is mounted again";
                return Err(Error::new(error.kind(), format!("{error}; {fact}")));
            }
            ending::forget(store, intent)
                .map_err(|trouble| error.clone().within(format!("{trouble}, and")))?;
            Err(error)
        }
    }
}

fn shrink(store: &Arc<Store>, world: &ScannedStore, leaf: ImageIndex, size: u64) -> Result<()> {
    let below = world.catalog.layers(leaf)[1..].to_vec();
    let open = || store.open_view(&world.catalog, &below, ViewPart::Active, Stability::Frozen);
    let view = (!below.is_empty()).then(open).transpose()?;
    store.while_closed(world.image(leaf), || {
        let mut job = store.take_image(&world.catalog, leaf)?;
        let writer =
            job.open_writer(view.as_ref().map(|open| Arc::clone(&open.view)), CachePolicy::Nothing)?;
        let done = writer.shrink(size).and_then(|()| writer.close());
        drop(writer);
        done.and(job.finish())
    })
}

/// What keeps a shrinking that was cut off from being taken up; whether anything is left to be done.
pub(super) fn examine(
    context: &Context,
    world: &ScannedStore,
    intent: &Intent<ShrinkOperation>,
) -> Result<Option<ImageIndex>> {
    let ShrinkOperation { image, size } = &intent.operation;
    let Some(leaf) = world.find(image).filter(|leaf| world.image(*leaf).virtual_size() == Some(*size)) else {
        return Ok(None);
    };
    let mut refusals: Vec<Error> = Vec::new();
    refusals.extend(world.untouchable(leaf));
    refusals.extend(world.begun(&[leaf]));
    refusals.extend(used_by_others(world, leaf));
    if context.store().is_active_open(world.image(leaf).stat.id) {
        let names = ["the active disk".to_owned()];
        refusals.push(refusals::still_open(context, &intent.chain, &names, "what lies behind its end goes"));
    }
    refusals::first(refusals)?;
    Ok(Some(leaf))
}

/// Takes up a shrinking that was cut off: if the disk has its new size, what lies behind that is given back.
pub(super) fn resume(context: &Context, intent: OwnedIntent<ShrinkOperation>, lock: FileLock) -> Result<()> {
    let store = context.store();
    let world = ScannedStore::look_for(store, intent.name())?;
    let ShrinkOperation { size, .. } = intent.intent.operation;
    if let Some(leaf) = examine(context, &world, &intent.intent)? {
        shrink(store, &world, leaf, size)?;
    }
    ending::end(store, intent, lock)
}
