//! An open view: what it is made of, how it is made, and when two are the same.
//!
//! Every [`OpenView`] comes from [`Store::new_open_view`]: jobs learn of it there, and its [`ViewKey`] says
//! which view in memory it shares and which cached bytes of earlier openings still hold. Opening the images
//! and taking their locks is left to the caller.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::chain::View;
use crate::error::{Error, Result};
use crate::image::Layer;
use crate::io::{ObjectId, ReadLock, StoreFile};
use crate::units::Stability;

use super::Store;
use super::open::OpenImage;
use super::options::Format;

/// Which disk of a view's top layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ViewPart {
    /// Its active state.
    Active,
    /// An internal snapshot, by its place in the table.
    Snapshot(usize),
    /// The VM state of an internal snapshot.
    VmState(usize),
}

/// A view in use. While it lives, its layers carry QEMU's reader locks.
#[derive(Debug)]
pub struct OpenView {
    /// The disk.
    pub view: Arc<View>,
    /// Equal for two openings only if no file below has changed in between.
    pub fingerprint: u64,
    /// The file that may stand for the whole disk: that of a view which is one frozen raw image.
    pub raw_file: Option<Arc<StoreFile>>,
    /// Its top layer.
    pub(super) top: OpenImage,
    /// What of it another process writes, if that is read by force.
    pub(super) forced: Option<Error>,
    pub(super) locks: Vec<ReadLock>,
    /// Says to jobs what is open, for as long as this lives.
    state: Arc<OpenState>,
}

/// What an open view shows bytes of.
#[derive(Clone, Debug)]
pub(super) struct OpenState {
    /// Its images, top first, and the serial number of each one's opening.
    pub(super) layers: Vec<(ObjectId, u64)>,
    /// The id of the internal snapshot by which the first is shown, whose tables hide other parts of those
    /// below.
    pub(super) inner: Option<Vec<u8>>,
    /// The layer and, if so, that it is the active one, for sentences.
    pub(super) name: String,
}

/// Which view it is: equal keys are equal bytes, for as long as the images they name are kept open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ViewKey {
    part: ViewPart,
    stability: Stability,
    /// Of the images, top first: which opening of each.
    serials: Vec<u64>,
}

impl ViewKey {
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// Layers of which a view is made.
pub(super) struct ViewStack {
    /// Top first.
    pub(super) layers: Vec<Layer>,
    /// Which disk of the top image its first layer is.
    pub(super) part: ViewPart,
    /// Whether the first layer may change; the others never do.
    pub(super) stability: Stability,
}

impl ViewStack {
    /// An active disk in use.
    pub(super) fn live(top: Layer, below: impl IntoIterator<Item = Layer>) -> Self {
        let layers = std::iter::once(top).chain(below).collect();
        Self { layers, part: ViewPart::Active, stability: Stability::Live }
    }

    fn key(&self) -> ViewKey {
        let serials = self.layers.iter().map(|layer| layer.image().serial()).collect();
        ViewKey { part: self.part, stability: self.stability, serials }
    }

    fn view(self, store: &Store) -> Arc<View> {
        View::new(self.layers, self.stability, &store.flat)
    }
}

/// What an open view is made of.
pub(super) struct NewView<'a> {
    pub(super) stack: ViewStack,
    /// Its top image.
    pub(super) top: OpenImage,
    /// All its images, top first, also those that are lost.
    pub(super) images: Vec<ObjectId>,
    /// The id of the internal snapshot that is shown, if one is.
    pub(super) inner: Option<Vec<u8>>,
    /// What it is called in sentences.
    pub(super) name: &'a str,
    /// The locks on its images.
    pub(super) locks: Vec<ReadLock>,
    /// What force was needed against.
    pub(super) forced: Option<Error>,
}

impl OpenView {
    /// Whether its bytes may be read from its layers' files by others than this process: none of them changes
    /// while it is open, as far as is known.
    pub fn can_be_mapped(&self) -> bool {
        self.forced.is_none() && !self.view.is_live()
    }

    /// What jobs see of it.
    pub(super) fn state(&self) -> &OpenState {
        &self.state
    }

    /// Its images, top first.
    pub(super) fn images(&self) -> impl Iterator<Item = ObjectId> {
        self.state.layers.iter().map(|(id, _)| *id)
    }

    /// Whether any of these images is among its layers.
    pub(super) fn shows(&self, images: &[ObjectId]) -> bool {
        self.state.layers.iter().any(|(id, _)| images.contains(id))
    }

    /// Its images below the top one, and which opening of each it shows.
    pub(super) fn lower_images(&self) -> &[(ObjectId, u64)] {
        self.state.layers.get(1..).unwrap_or_default()
    }

    /// Its layers below the top one.
    pub(super) fn lower_layers(&self) -> &[Layer] {
        &self.view.layers()[1..]
    }
}

impl Store {
    /// Makes an open view, which jobs see from here on.
    pub(super) fn new_open_view(&self, new: NewView<'_>) -> OpenView {
        let NewView { stack, top, images, inner, name, locks, forced } = new;
        let key = stack.key();
        let is_whole_file = stack.layers.len() == 1
            && (stack.part, stack.stability) == (ViewPart::Active, Stability::Frozen)
            && top.format == Format::Raw;
        // What is read by force is never the same as for the next who opens it: kept, it would only keep its
        // files open.
        let view = if forced.is_some() { stack.view(self) } else { self.assemble(stack) };
        let layers = images.into_iter().zip(key.serials.iter().copied()).collect();
        let state = self.opened.show(OpenState { layers, inner, name: name.to_owned() });
        let raw_file = is_whole_file.then(|| Arc::clone(&top.file));
        OpenView { view, fingerprint: key.fingerprint(), raw_file, top, forced, locks, state }
    }

    /// The view of that stack, which is shared by all that have the same key.
    fn assemble(&self, stack: ViewStack) -> Arc<View> {
        let mut views = self.opened.views.lock();
        Arc::clone(views.get_or_insert(stack.key(), || stack.view(self)))
    }

    /// What a view shows through its top layer: the view of the layers below. `None` if there are none.
    pub(super) fn view_below(&self, view: &View) -> Option<Arc<View>> {
        let layers = view.layers()[1..].to_vec();
        let is_any = !layers.is_empty();
        is_any.then(|| {
            self.assemble(ViewStack { layers, part: ViewPart::Active, stability: Stability::Frozen })
        })
    }

    /// An opening of an active disk after our own writer has left, or after a job has changed what its top
    /// image says of itself: its top layer is described anew, everything else stays. Takes the locks of
    /// `open`.
    pub(super) fn with_top_described_anew(&self, open: &mut OpenView, name: &str) -> Result<OpenView> {
        let top = self.described_anew(&open.top)?;
        let stack = ViewStack::live(Layer::active(&top.image)?, open.lower_layers().iter().cloned());
        self.opened.keep(&top);
        let images = open.images().collect();
        let (locks, forced) = (std::mem::take(&mut open.locks), open.forced.take());
        Ok(self.new_open_view(NewView { stack, top, images, inner: None, name, locks, forced }))
    }
}
