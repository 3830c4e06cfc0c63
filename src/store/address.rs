//! Stores in object storage, opened by their addresses: `s3://BUCKET/PREFIX`, or one image of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Backend, RemoteStore, is_address};

use super::control_dir::ControlDir;
use super::resolve::StorePath;
use super::{Store, StoreOptions};

impl Store {
    /// Opens and scans the store at an address: all objects beneath it, or the one object that has it.
    pub(super) fn open_address(address: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        debug_assert!(is_address(address));
        let text = |path: &Path| {
            path.to_str().map(str::to_owned).ok_or_else(|| {
                Error::new(ErrorKind::Usage, format!("{} is no address: it is not UTF-8", path.display()))
            })
        };
        let has_objects = |tree: &Arc<dyn Backend>| -> Result<bool> {
            let root = tree.open_directory(Path::new("."), crate::io::MountPoints::Skip)?;
            root.map_or(Ok(false), |root| root.list().map(|entries| !entries.is_empty()))
        };
        let whole = match RemoteStore::open(&text(address)?, &options.remote) {
            Ok(tree) if has_objects(&tree)? => return Self::open_tree(tree, options),
            // An object has nothing beneath it.
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(error),
            Err(error) => return Err(error),
        };
        let (above, name) = split(&text(address)?);
        if let Some((above, name)) = above.zip(name)
            && let Ok(tree) = RemoteStore::open(&above, &options.remote)
            && tree.stat(Path::new(&name)).is_ok_and(|stat| stat.is_file())
        {
            let guard = ControlDir::of_tree(&tree);
            let single = StorePath { root: 0, path: PathBuf::from(name) };
            return Self::new(address.to_path_buf(), vec![tree], guard, (Some(single), None), options);
        }
        whole.and_then(|()| {
            let fact = "has no objects; check the names of bucket and prefix";
            Err(Error::new(ErrorKind::NotFound, format!("{} {fact}", address.display())))
        })
    }
}

/// An address, as that of what lies above it and a name; nothing lies above a bucket.
fn split(address: &str) -> (Option<String>, Option<String>) {
    let address = address.trim_end_matches('/');
    let start = address.find("://").map_or(0, |at| at + 3);
    match address[start..].rfind('/') {
        Some(at) => (Some(address[..start + at].to_owned()), Some(address[start + at + 1..].to_owned())),
        None => (None, None),
    }
}
