//! Which users are trusted with the files in `.chainfs`: intents are resumed, and notes decide which files
//! are written.
//!
//! Trusted are root, the mounting user, and the owner of the store's directory, who could do all that without
//! chainfs; and if a group shares the directory, a member of it. A file that any user may write is not
//! trusted.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Backend, ObjectStat};

/// The bit of a directory in which only owners may remove and rename.
const STICKY: u32 = 0o1000;

/// Fails with `Denied` if the directory `path` relative to the store, which is chainfs' own if it exists, may
/// be another user's.
pub(super) fn check(root: &dyn Backend, path: &Path) -> Result<()> {
    let kept = match root.stat(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let store = root.stat(Path::new("."))?;
    let own = rustix::process::geteuid().as_raw();
    if is_trusted(&kept, &store, own) {
        return Ok(());
    }
    let fact = format!(
        "belongs to uid {} (mode {:o}), and is not trusted: it has to belong to root, to the owner of the \
            store's directory or to \
         who mounts it, and not everybody may write it; see what it holds, then chown or remove it",
        kept.uid,
        kept.mode & 0o7777
    );
    Err(Error::new(ErrorKind::Denied, format!("{} {fact}", path.display())))
}

/// Whether that user is trusted.
pub(super) fn is_known(root: &dyn Backend, uid: u32) -> bool {
    let own = rustix::process::geteuid().as_raw();
    root.stat(Path::new(".")).map_or(true, |store| is_one_of_us(uid, &store, own))
}

fn is_one_of_us(uid: u32, store: &ObjectStat, own: u32) -> bool {
    [0, own, store.uid].contains(&uid)
}

fn is_trusted(kept: &ObjectStat, store: &ObjectStat, own: u32) -> bool {
    let is_of_the_group = store.mode & 0o020 != 0 && store.mode & STICKY == 0 && kept.gid == store.gid;
    let is_ours = is_one_of_us(kept.uid, store, own) || is_of_the_group;
    is_ours && kept.mode & 0o002 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LocalDirectory;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_those_who_could_do_it_themselves_are_believed() {
        let directory = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(directory.path()).unwrap();
        let plain = root.stat(Path::new(".")).unwrap();
        let of = |uid, gid, mode| ObjectStat { mode, uid, gid, ..plain };
        let store = of(1000, 100, 0o755);
        assert!(is_trusted(&of(0, 0, 0o755), &store, 7));
        assert!(is_trusted(&of(1000, 0, 0o755), &store, 7));
        assert!(is_trusted(&of(7, 0, 0o755), &store, 7));
        assert!(!is_trusted(&of(1001, 100, 0o755), &store, 0));
        assert!(!is_trusted(&of(0, 0, 0o777), &store, 0));
        assert!(is_trusted(&of(1001, 100, 0o775), &of(0, 100, 0o2775), 0), "a group that shares the store");
        assert!(!is_trusted(&of(1001, 100, 0o775), &of(0, 100, 0o3775), 0), "a sticky one");
        std::fs::create_dir(directory.path().join("own")).unwrap();
        assert!(check(&*root, Path::new("own")).is_ok() && check(&*root, Path::new("gone")).is_ok());
        std::fs::set_permissions(directory.path().join("own"), std::fs::Permissions::from_mode(0o777))
            .unwrap();
        assert_eq!(check(&*root, Path::new("own")).unwrap_err().kind(), ErrorKind::Denied);
    }
}
