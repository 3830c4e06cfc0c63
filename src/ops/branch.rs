//! New images that show a frozen view, and the job that fills those which cannot be empty.
//!
//! Promises: an image becomes visible only when it is complete and durable; an interrupted job has changed
//! nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Snapshot;
use crate::image::create::CreateOptions;
use crate::image::write::{BackingDisk, Writer};
use crate::io::FileLock;
use crate::store::{
    CopyOperation, FileRef, ImageIndex, Intent, NewTopFile, OpenView, OwnedIntent, Store, ViewPart, is_draft,
    shown,
};
use crate::units::Stability;

use super::context::Context;
use super::copy::{CommitSegment, PIECE};
use super::ending;
use super::job::Job;
use super::job_table::JobProgress;
use super::lookup;
use super::overlay::{self, DraftImage};
use super::plan::Plan;
use super::refusals;
use super::replace::{self, ClosedDisk};
use super::scanned_store::ScannedStore;

/// The view that a new image shows.
pub(super) struct CopySource {
    /// Its layer.
    pub(super) index: ImageIndex,
    /// The internal snapshot of that layer, by its index in the table.
    pub(super) snapshot: Option<(usize, Snapshot)>,
}

impl CopySource {
    /// The view of a layer, or of an internal snapshot of it.
    pub(super) fn of(scan: &ScannedStore, index: ImageIndex, snapshot: Option<usize>) -> Result<Self> {
        let snapshot = snapshot
            .map(|place| lookup::inner(scan, index, place).map(|found| (place, found)))
            .transpose()?;
        Ok(Self { index, snapshot })
    }

    /// Whether data has to be copied.
    pub(super) fn is_copied(&self) -> bool {
        self.snapshot.is_some()
    }

    /// The layers that back a new image, top first.
    pub(super) fn below(&self, scan: &ScannedStore) -> Vec<ImageIndex> {
        let layers = scan.catalog.layers(self.index);
        layers[usize::from(self.is_copied())..].to_vec()
    }

    /// The options of a new image at `name` relative to the store.
    pub(super) fn options(&self, scan: &ScannedStore, name: &Path) -> CreateOptions {
        let image = scan.image(self.index);
        let inner_size = self.snapshot.as_ref().and_then(|(_, snapshot)| snapshot.virtual_size);
        let size = inner_size.or(image.virtual_size()).unwrap_or(0);
        let backing = self.below(scan).first().map(|below| overlay::backing(scan, name, *below));
        overlay::options(image, size, backing)
    }

    /// Adds the cost of a new image to a plan, and the reasons against it. It is made after the image `like`,
    /// at `name` relative to the store.
    pub(super) fn plan(
        &self,
        context: &Context,
        scan: &ScannedStore,
        (like, name): (ImageIndex, &Path),
        plan: &mut Plan,
    ) {
        let below = self.below(scan);
        plan.refusals.extend(below.first().and_then(|below| scan.uncounted(like, name, *below)));
        let layers = scan.catalog.layers(self.index);
        plan.refusals
            .extend(scan.catalog.view_problem(&layers).map(|fact| Error::new(ErrorKind::Broken, fact)));
        let opened = self.open(context.store(), scan);
        match opened {
            Ok((segment, _view)) if self.is_copied() => {
                refusals::count(scan, self.index, segment.data_len(), plan);
            }
            Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
            Ok(_) | Err(_) => {}
        }
        if let Some((_, snapshot)) = &self.snapshot {
            let fact = "an internal snapshot cannot back an image: its bytes are copied, by reference \
                where the file \
                        system can do that";
            plan.notes.push(fact.into());
            if snapshot.vm_state_size > 0 {
                plan.notes.push("its VM state is not copied: only the disk is".into());
            }
        }
    }

    /// The bytes that a new image has to hold itself.
    fn open(&self, store: &Arc<Store>, scan: &ScannedStore) -> Result<(CommitSegment, OpenView)> {
        let part = self.snapshot.as_ref().map_or(ViewPart::Active, |(place, _)| ViewPart::Snapshot(*place));
        let view =
            store.open_view(&scan.catalog, &scan.catalog.layers(self.index), part, Stability::Frozen)?;
        let frozen = store.part_of(&view.view, 0, usize::from(self.is_copied()));
        Ok((CommitSegment { live: None, frozen }, view))
    }
}

/// The purpose of a new image.
pub(super) enum ImagePurpose {
    /// A new chain.
    Clone {
        /// The name of its file, relative to the store.
        name: PathBuf,
    },
    /// An active disk that is replaced by the image, locked against writers meanwhile.
    Revert(Box<ClosedDisk>),
}

/// An image that is being filled.
pub(super) struct BranchJob {
    path: PathBuf,
    command: String,
    draft: DraftImage,
    top: NewTopFile,
    segment: CommitSegment,
    /// The layer below, which has to be the same at the end.
    below: Option<FileRef>,
    purpose: ImagePurpose,
    intent: OwnedIntent<CopyOperation>,
    _views: Vec<OpenView>,
}

impl Job for BranchJob {
    fn run(self: Box<Self>, context: &Context, progress: &JobProgress) -> Result<()> {
        let store = Arc::clone(context.store());
        let copied = fill(&store, &self.segment, self.top.writer(), progress);
        let Self { path, command, draft, top, below, purpose, intent, segment, _views: views } = *self;
        drop((segment, top));
        let done = copied.and_then(|()| {
            let lock = ending::lock_for_job(&store, progress)?;
            let scan = ScannedStore::scan(&store)?;
            let below = below.as_ref().map(|named| scan.expect(named)).transpose()?;
            progress.forbid_cancel()?;
            match purpose {
                ImagePurpose::Clone { name } => {
                    if let Some(below) = below {
                        scan.begun(&[below]).map_or(Ok(()), Err)?;
                    }
                    draft.give_name(&scan, &name).map(|()| lock)
                }
                ImagePurpose::Revert(closed) => {
                    replace::switch(context, &scan, lock, &path, &command, &draft, *closed)
                }
            }
        });
        drop(views);
        match done {
            Ok(lock) => ending::end_intent(&store, intent, lock),
            Err(error) => {
                draft.remove(&store);
                if let Err(trouble) = ending::remove_intent(&store, intent) {
                    return Err(error.within(format!("{trouble}, and")));
                }
                Err(error)
            }
        }
    }
}

impl BranchJob {
    /// Begins to fill a draft; under the store's lock.
    pub(super) fn begin(
        context: &Context,
        scan: &ScannedStore,
        path: &Path,
        command: &str,
        of: &str,
        (source, draft): (CopySource, DraftImage),
        purpose: ImagePurpose,
    ) -> Result<Self> {
        let store = context.store();
        let name = match &purpose {
            ImagePurpose::Clone { name } => scan.guarded(name),
            // Its own intent makes it a draft of a command; before, it is an ordinary draft.
            ImagePurpose::Revert(_) => draft.named.path.clone(),
        };
        let operation = CopyOperation { draft: draft.named.clone(), name };
        let begun = (|| {
            let (segment, view) = source.open(store, scan)?;
            let top = store.open_new_top(&draft.path, &shown(&draft.path))?;
            let below = source.below(scan);
            let mut views = vec![view];
            if !below.is_empty() {
                let open = store.open_view(&scan.catalog, &below, ViewPart::Active, Stability::Frozen)?;
                top.writer().set_backing(Some(Arc::clone(&open.view) as Arc<dyn BackingDisk>));
                views.push(open);
            }
            let intent =
                store.guard().begin(&*store.guard_names(), of, &Intent::new(command, path, operation))?;
            Ok((segment, top, below.first().map(|index| scan.named(*index)), views, intent))
        })();
        match begun {
            Ok((segment, top, below, views, intent)) => {
                let (path, command) = (path.to_path_buf(), command.to_owned());
                Ok(Self { path, command, draft, top, segment, below, purpose, intent, _views: views })
            }
            Err(error) => {
                draft.remove(store);
                Err(error)
            }
        }
    }
}

/// Copies the bytes of `segment` into a new image.
fn fill(
    store: &Arc<Store>,
    segment: &CommitSegment,
    writer: &Arc<Writer>,
    progress: &JobProgress,
) -> Result<()> {
    let total = segment.data_len()?;
    progress.set_total(total);
    if !refusals::shares_blocks(store) {
        writer.reserve(total)?;
    }
    let mut at = 0;
    while at < segment.size() {
        progress.check()?;
        progress.advance(segment.merge(writer, at, PIECE)?);
        at += PIECE;
    }
    writer.close()
}

/// Resumes an interrupted job: an image without a name is removed.
pub(super) fn resume(context: &Context, intent: OwnedIntent<CopyOperation>, lock: FileLock) -> Result<()> {
    let store = context.store();
    let CopyOperation { draft, .. } = &intent.intent.operation;
    if is_draft(&draft.path) && draft.is_at(&*store.guard().root, &draft.path) {
        store.guard_names().unlink(&draft.path)?;
    }
    ending::end_intent(store, intent, lock)
}
