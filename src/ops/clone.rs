//! Clone: a new chain that is backed by a frozen layer.
//!
//! Nothing is copied: the new image is empty and shows its backing file. An internal snapshot cannot back an
//! image, so the clusters of that snapshot are copied into the new image, by reference where the file system
//! shares blocks, and the new image is backed by the backing file of the snapshot's layer.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::io::directory_of;
use crate::store::{ACTIVE, Format, shown};

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
    /// The name of the new chain.
    pub name: Vec<u8>,
    /// The snapshot that backs it, as a view's name; none: the backing file of the active layer.
    pub from: Option<Vec<u8>>,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "clone",
    usage: "\
clone NAME [from=VIEW]

Makes a new chain NAME that is backed by a snapshot and shows the same bytes.
  from=VIEW   the snapshot, or an internal one (the backing file of the active disk)
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

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, clone) = plan(context, scan, chain, self)?;
        Ok((plan, clone.touched(scan)))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, _: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command)
    }
}

/// The plan of a clone.
pub(super) struct PlannedClone {
    source: CopySource,
    /// The new image, relative to the store.
    name: PathBuf,
}

impl PlannedClone {
    /// The images that are opened for it.
    pub(super) fn touched(&self, scan: &ScannedStore) -> TouchedImages {
        TouchedImages { written: Vec::new(), read: scan.catalog.layers(self.source.index) }
    }
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &CloneRequest,
) -> Result<(Plan, PlannedClone)> {
    let chain = scan.chain(path)?;
    let source = source(scan, &chain, request)?;
    let leaf = scan.image(chain.views.layers[0]);
    let name = beside(&leaf.place.path, &[&request.name[..], b".qcow2"].concat());
    let mut plan = Plan { before: lookup::tree(scan, &chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    overlay::refuse_name(scan, &name, (Format::Qcow2, false), None, refusals);
    refusals.extend(scan.begun(&chain.views.layers));
    if let Some(fact) = scan.store.read_only() {
        refusals.push(Error::new(ErrorKind::ReadOnly, format!("the store {fact}")));
    }
    source.plan(context, scan, (chain.views.layers[0], &name), &mut plan);
    let file = PlanLayer { name: ACTIVE.to_vec(), path: name.clone(), active: true, note: "new".into() };
    plan.after = source.below(scan).iter().map(|index| lookup::line(scan, &chain, *index)).collect();
    plan.after.insert(0, file);
    plan.notes.push(format!("a new chain {}", shown(&directory_of(path).join(os(&request.name)))));
    Ok((plan, PlannedClone { source, name }))
}

fn os(name: &[u8]) -> &std::ffi::OsStr {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(name)
}

fn source(scan: &ScannedStore, chain: &ScannedChain, request: &CloneRequest) -> Result<CopySource> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let (depth, inner) = match (&request.from, chain.views.active()) {
        (Some(name), _) => {
            let view = lookup::view(scan, chain, name)?;
            if view.active {
                return Err(usage(
                    "the active disk changes and cannot back an image; snapshot it first".into(),
                ));
            }
            (view.layer, view.snapshot)
        }
        (None, Some(_)) if chain.views.layers.len() == 1 => {
            let fact = "has no snapshot that could back a clone; snapshot it first";
            return Err(usage(format!("{} {fact}", chain.shown(scan))));
        }
        (None, active) => (usize::from(active.is_some()), None),
    };
    CopySource::of(scan, chain.views.layers[depth], inner)
}

/// Makes the clone, or begins a job if data has to be copied.
pub(super) fn begin(context: &Context, path: &Path, request: &CloneRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, scan) = ScannedStore::begin(store)?;
    let (plan, PlannedClone { source, name }) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    let like = scan.image(scan.chain(path)?.views.layers[0]).place.path.clone();
    let of = context.intent_name();
    let draft = overlay::draft_name(&name, &of, 0);
    let draft = DraftImage::make(&scan, draft, &like, &source.options(&scan, &name))?;
    if source.is_copied() {
        let purpose = ImagePurpose::Clone { name };
        let job = BranchJob::begin(context, &scan, path, command, &of, (source, draft), purpose)?;
        return Ok(Some(Box::new(job)));
    }
    draft.give_name(&scan, &name)?;
    drop(lock);
    store.rescan().map(|_| None)
}
