//! A store with one disk, for tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Store, StoreOptions, ViewId};
use crate::image::create::{CreateOptions, initial_image};

/// A store that exists as long as this, and its only disk, the active one of a chain of one empty image.
pub(crate) struct OneDisk {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Arc<Store>,
    pub(crate) id: ViewId,
}

impl OneDisk {
    /// A disk of that many bytes.
    pub(crate) fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = CreateOptions { size: Some(size), ..CreateOptions::default() };
        std::fs::write(directory.path().join("a.qcow2"), initial_image(&options).unwrap()).unwrap();
        let store = Store::open(directory.path(), StoreOptions::default()).unwrap();
        let catalog = store.catalog();
        let views = store.chain_views(&catalog, catalog.chain(Path::new("a")).unwrap());
        let chain = Arc::new(PathBuf::from("a"));
        let id = store.view_id(&catalog, &chain, &views, views.active().unwrap(), false);
        Self { directory, store, id }
    }
}
