//! Clone: a new chain that stands on a frozen layer.
//!
//! Nothing is copied: the new image is empty, and what it stands on shows through. On an internal snapshot
//! nothing can stand, so what that holds itself is copied into the new image, by reference where the file
//! system can do that, and the new image stands on what the snapshot's layer stands on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Existing, directory_of};
use crate::store::{ACTIVE, Format, Store, shown};

use super::branch::{BranchJob, CopySource, ImagePurpose};
use super::check::{check_new_name, check_view};
use super::command::Command;
use super::context::Context;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::overlay::{self, DraftImage};
use super::plan::{Plan, PlanLayer};
use super::scanned_store::{ScannedChain, ScannedStore, beside};
use super::tokenize::quote;
use super::words::{LineBuilder, ParsedWords, VerbSpec};

/// The words of `clone`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloneRequest {
    /// What the new chain is to be called.
    pub name: Vec<u8>,
    /// The snapshot that it stands on, as a view's name; none: what the active layer stands on.
    pub from: Option<Vec<u8>>,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "clone",
    usage: "\
clone NAME [from=VIEW]

Makes a new chain NAME that stands on a snapshot and shows what it does.
  from=VIEW   the snapshot, or an internal one (what the active disk stands on)
",
    positional: Some("NAME"),
    keys: &["from"],
    flags: &[],
    is_for_store: false,
};

impl Command for CloneRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self { name: words.positional()?, from: words.value("from") })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { name, from } = self;
        line.word(&quote(name));
        line.value("from", from.as_deref());
    }

    fn check(&self) -> Result<()> {
        check_new_name(&SPEC, &self.name)?;
        check_view("from=", self.from.as_deref())
    }

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, clone) = plan(context, world, chain, self)?;
        Ok((plan, clone.touched(world)))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, _: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command)
    }
}

/// What a clone comes to.
pub(super) struct PlannedClone {
    source: CopySource,
    /// The new image, beneath the store.
    name: PathBuf,
}

impl PlannedClone {
    /// What is opened for it.
    pub(super) fn touched(&self, world: &ScannedStore) -> TouchedImages {
        TouchedImages { written: Vec::new(), read: world.catalog.layers(self.source.index) }
    }
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &CloneRequest,
) -> Result<(Plan, PlannedClone)> {
    let chain = world.chain(path)?;
    let source = source(world, &chain, request)?;
    let leaf = world.image(chain.views.layers[0]);
    let name = beside(&leaf.place.path, &[&request.name[..], b".qcow2"].concat());
    let mut plan = Plan { before: lookup::tree(world, &chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    overlay::refuse_name(world, &name, (Format::Qcow2, false), None, refusals);
    refusals.extend(world.begun(&chain.views.layers));
    if let Some(fact) = world.store.read_only() {
        refusals.push(Error::new(ErrorKind::ReadOnly, format!("the store {fact}")));
    }
    source.plan(context, world, (chain.views.layers[0], &name), &mut plan);
    let file = PlanLayer { name: ACTIVE.to_vec(), path: name.clone(), active: true, note: "new".into() };
    plan.after = source.below(world).iter().map(|index| lookup::line(world, &chain, *index)).collect();
    plan.after.insert(0, file);
    plan.notes.push(format!("a new chain {}", shown(&directory_of(path).join(os(&request.name)))));
    Ok((plan, PlannedClone { source, name }))
}

fn os(name: &[u8]) -> &std::ffi::OsStr {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(name)
}

fn source(world: &ScannedStore, chain: &ScannedChain, request: &CloneRequest) -> Result<CopySource> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let (depth, inner) = match (&request.from, chain.views.active()) {
        (Some(name), _) => {
            let view = lookup::view(world, chain, name)?;
            if view.active {
                return Err(usage(
                    "the active disk changes, and nothing can stand on it; snapshot it first".into(),
                ));
            }
            (view.layer, view.snapshot)
        }
        (None, Some(_)) if chain.views.layers.len() == 1 => {
            let fact = "has no snapshot that a clone could stand on; snapshot it first";
            return Err(usage(format!("{} {fact}", chain.shown(world))));
        }
        (None, active) => (usize::from(active.is_some()), None),
    };
    CopySource::of(world, chain.views.layers[depth], inner)
}

/// Makes the clone, or begins to where something has to be copied.
pub(super) fn begin(context: &Context, path: &Path, request: &CloneRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, world) = ScannedStore::begin(store)?;
    let (plan, PlannedClone { source, name }) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    let like = world.image(world.chain(path)?.views.layers[0]).place.path.clone();
    let of = context.intent_name();
    let draft = overlay::draft_name(&name, &of, 0);
    let draft = DraftImage::make(&world, draft, &like, &source.options(&world, &name))?;
    if source.is_copied() {
        let purpose = ImagePurpose::Clone { name };
        let job = BranchJob::begin(context, &world, path, command, &of, (source, draft), purpose)?;
        return Ok(Some(Box::new(job)));
    }
    give_name(store, &world, &draft, &name)?;
    drop(lock);
    store.rescan().map(|_| None)
}

/// Gives a whole image its name, durably.
pub(super) fn give_name(
    store: &Arc<Store>,
    world: &ScannedStore,
    draft: &DraftImage,
    name: &Path,
) -> Result<()> {
    let names = store.guard_names();
    let name = world.guarded(name);
    if !draft.is_there(store) {
        let fact = "has been replaced by others, and gets no name; give the command again";
        return Err(Error::new(ErrorKind::Stale, format!("{} {fact}", shown(&draft.path))));
    }
    names.rename(&draft.named.path, &name, Existing::Refuse).inspect_err(|_| draft.unmake(store))?;
    names.sync(&directory_of(&name))
}
