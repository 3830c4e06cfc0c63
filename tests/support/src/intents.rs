//! Interrupted commands, as found in a store.

use std::path::Path;

use chainfs::io::LocalDirectory;
use chainfs::store::{FileRef, Format, Intent, Operation, Store as Opened, StoreOptions};

use super::store::Store;

/// A file of the store as an intent names it.
pub fn witness(store: &Store, name: &str, fixed: bool) -> FileRef {
    let root = LocalDirectory::open(&store.root()).expect("a store");
    let is_raw = Path::new(name).extension().is_some_and(|extension| extension == "raw");
    let format = if is_raw { Format::Raw } else { Format::Qcow2 };
    FileRef::witness(&*root, Path::new(name), format, fixed).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Leaves an intent as its owner would that is killed right after writing it. Returns its path in the store.
pub fn leave(store: &Store, command: &str, chain: &str, deed: Operation) -> std::path::PathBuf {
    let options = StoreOptions { notify: false, ..StoreOptions::default() };
    let opened = Opened::open(&store.root(), options).expect("a store");
    let names = opened.guard_names();
    opened.guard().prepare(&*names).expect("a place");
    let intent = Intent::new(command, Path::new(chain), deed);
    let owned = opened.guard().begin(&*names, "left", &intent).expect("an intent");
    opened.guard().path_of(owned.name())
}
