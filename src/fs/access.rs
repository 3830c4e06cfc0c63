//! Access control for mounts with `allow_other`.
//!
//! The mount gives a user no access that the kernel would not give on the store. The modes shown express this
//! for classes of users, and the kernel enforces them. This module checks the individual user, with the
//! groups of the process, at each lookup and open. Text files leave out images that the user may not read.
//! `uid=`, `gid=` and `umask=` are the administrator's choice and override these rules.

use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::io::groups_of_process;
use crate::store::{AccessJudge, Catalog, ImageIndex, Store, Subject};

use super::attributes::Ownership;

/// How long permissions that were read are used for modes and listings. Each open reads them again.
const PERMISSIONS_TTL: Duration = Duration::from_millis(500);
/// The number of filtered catalogs in the cache.
const CATALOGS_CACHED: NonZero<usize> = NonZero::new(16).expect("not zero");

/// The client process of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its file system user id.
    pub uid: u32,
    /// Its file system group id.
    pub gid: u32,
    /// Its thread id; 0 if it is in a pid namespace that the daemon cannot see.
    pub pid: u32,
}

impl Caller {
    /// The administrator, who has all rights.
    pub const ADMINISTRATOR: Self = Self { uid: 0, gid: 0, pid: 0 };
}

/// The rights of one user.
#[derive(Clone, Debug)]
pub(super) struct Viewer {
    /// The user whose read access is checked; `None`: all images are visible.
    subject: Option<Subject>,
    /// The user whose own rights apply to commands; `None`: the administrator.
    commander: Option<Subject>,
}

impl Viewer {
    /// The user whose read access is checked; `None` for the administrator.
    pub(super) fn subject(&self) -> Option<&Subject> {
        self.subject.as_ref()
    }

    /// The user whose rights apply to commands.
    pub(super) fn commander(&self) -> Option<&Subject> {
        self.commander.as_ref()
    }
}

/// Filtered catalogs by catalog and user.
type VisibleCatalog = LruCache<(u64, Subject), (Instant, Arc<Catalog>)>;

/// The access rules of a mount.
#[derive(Debug)]
pub(super) struct Rights {
    store: Arc<Store>,
    ownership: Ownership,
    /// Whether other users than the mounting one have access.
    is_shared: bool,
    own_uid: u32,
    /// A leaf.
    judge: Mutex<Option<(Instant, Arc<AccessJudge>)>>,
    /// A leaf.
    shown: Mutex<VisibleCatalog>,
}

impl Rights {
    pub(super) fn new(store: &Arc<Store>, ownership: Ownership, is_shared: bool) -> Self {
        Self {
            store: Arc::clone(store),
            ownership,
            is_shared,
            own_uid: rustix::process::geteuid().as_raw(),
            judge: Mutex::default(),
            shown: Mutex::new(LruCache::new(CATALOGS_CACHED)),
        }
    }

    /// Whether other users than the mounting one have access.
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Whether access follows the permissions of the images.
    pub(super) fn is_judged(&self) -> bool {
        self.is_shared && self.ownership.umask.is_none()
    }

    /// The rights of a caller. Root, the mounting user and the user of `uid=` have all rights. Users who have
    /// access by `umask=` or `gid=` see all images, but their own rights apply to commands.
    pub(super) fn viewer(&self, caller: &Caller) -> Viewer {
        let Caller { uid, gid, pid } = *caller;
        let is_administrator =
            !self.is_shared || uid == 0 || uid == self.own_uid || self.ownership.uid == Some(uid);
        if is_administrator {
            return Viewer { subject: None, commander: None };
        }
        // A1: judged for this very process, with the groups that it has.
        let subject = Subject::new(uid, groups_of_process(pid, uid, gid));
        let is_let_in =
            self.ownership.umask.is_some() || self.ownership.gid.is_some_and(|gid| subject.is_in(gid));
        Viewer { subject: (!is_let_in).then(|| subject.clone()), commander: Some(subject) }
    }

    /// The permissions of the store, at most [`PERMISSIONS_TTL`] old.
    pub(super) fn judge(&self) -> Arc<AccessJudge> {
        let mut cached = self.judge.lock();
        if let Some((when, judge)) = &*cached
            && when.elapsed() < PERMISSIONS_TTL
        {
            return Arc::clone(judge);
        }
        let judge = Arc::new(self.store.judge());
        *cached = Some((Instant::now(), Arc::clone(&judge)));
        judge
    }

    /// Restricts the mode of a disk, or of a file about it, to what all its layers allow.
    pub(super) fn restrict(
        &self,
        (uid, gid, bits): (u32, u32, u16),
        catalog: &Catalog,
        layers: &[ImageIndex],
    ) -> (u32, u32, u16) {
        if !self.is_judged() {
            return (uid, gid, bits);
        }
        let allowed = self.judge().mode(catalog, layers, bits & 0o222 != 0);
        // Read permission implies search permission.
        let mut allowed = (allowed | (allowed & 0o444) >> 2) as u16;
        if self.ownership.uid.is_some() {
            allowed |= 0o700;
        }
        if self.ownership.gid.is_some() {
            allowed |= 0o070;
        }
        (uid, gid, bits & allowed)
    }

    /// Checks that a user may read these layers. `now`: reads the permissions again.
    pub(super) fn check_read(
        &self,
        viewer: &Viewer,
        catalog: &Catalog,
        layers: &[ImageIndex],
        now: bool,
    ) -> Result<()> {
        let Some(subject) = viewer.subject() else { return Ok(()) };
        let judge = if now { Arc::new(self.store.judge()) } else { self.judge() };
        if judge.may_read_all(subject, catalog, layers) { Ok(()) } else { Err(denied()) }
    }

    /// Checks that a user may write this disk.
    pub(super) fn check_write(
        &self,
        viewer: &Viewer,
        catalog: &Catalog,
        layers: &[ImageIndex],
    ) -> Result<()> {
        let Some(subject) = viewer.subject() else { return Ok(()) };
        let judge = self.store.judge();
        let may = judge.may_read_all(subject, catalog, layers)
            && layers.first().is_none_or(|top| judge.may_write(subject, &catalog.images[*top]));
        if may { Ok(()) } else { Err(denied()) }
    }

    /// The catalog without the images that a user may not read.
    pub(super) fn shown(&self, viewer: &Viewer, catalog: &Arc<Catalog>) -> Arc<Catalog> {
        let Some(subject) = viewer.subject() else { return Arc::clone(catalog) };
        let key = (catalog.serial, subject.clone());
        if let Some((when, shown)) = self.shown.lock().get(&key)
            && when.elapsed() < PERMISSIONS_TTL
        {
            return Arc::clone(shown);
        }
        let shown = Arc::new(catalog.shown_to(&self.judge(), subject));
        self.shown.lock().put(key, (Instant::now(), Arc::clone(&shown)));
        shown
    }

    /// A text without the lines that name images that a user may not read.
    pub(super) fn redact(&self, viewer: &Viewer, text: &str) -> String {
        let Some(subject) = viewer.subject() else { return text.to_owned() };
        let catalog = self.store.catalog();
        let judge = self.judge();
        let images = catalog.images.iter().filter(|image| !judge.may_read(subject, image));
        // Files that the daemon cannot read are not in `images`, but their names are hidden as well.
        let others =
            catalog.problems.iter().filter(|problem| !judge.may_read_in_store(subject, &problem.path));
        let hidden: Vec<&Path> = images
            .map(|image| image.place.path.as_path())
            .chain(others.map(|problem| problem.path.as_path()))
            .collect();
        redacted(text, &hidden)
    }
}

/// Replaces each line that names one of these files.
fn redacted(text: &str, hidden: &[&Path]) -> String {
    let names: Vec<String> = hidden
        .iter()
        .flat_map(|path| [path.file_name(), path.file_stem()])
        .flatten()
        .map(|name| crate::report::safe::terminal_bytes(name.as_encoded_bytes()))
        .collect();
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    let names_it = |line: &str, name: &String| {
        line.match_indices(name.as_str()).any(|(at, found)| {
            !line[..at].ends_with(is_part) && !line[at + found.len()..].starts_with(is_part)
        })
    };
    let line = |line: &str| {
        if !names.iter().any(|name| names_it(line, name)) {
            return line.to_owned();
        }
        let key = line
            .split_once(':')
            .map(|(key, _)| key)
            .filter(|key| key.chars().all(|c| c.is_ascii_lowercase()));
        let end = if line.ends_with('\n') { "\n" } else { "" };
        match key {
            Some(key) => format!("{key}: {REDACTED}{end}"),
            None => format!("{REDACTED}{end}"),
        }
    };
    text.split_inclusive('\n').map(line).collect()
}

/// Replaces a line that names an image.
const REDACTED: &str = "this concerns an image that you may not read; ask its owner or root";

fn denied() -> Error {
    let fact = "you have no permission for one of the image files behind this; ask its owner or root";
    Error::new(ErrorKind::Denied, fact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_name_hidden_images_are_redacted() {
        let hidden = [Path::new("b/secret.qcow2"), Path::new("x")];
        let redacted = |text: &str| redacted(text, &hidden);
        assert_eq!(redacted("state: done\n"), "state: done\n");
        assert_eq!(
            redacted("error: b/secret.qcow2 is open\nnumber: 1\n"),
            format!("error: {REDACTED}\nnumber: 1\n")
        );
        assert_eq!(redacted("failed: web stands on secret"), format!("failed: {REDACTED}"));
        assert_eq!(redacted("max and secretary"), "max and secretary");
        assert_eq!(redacted("● x@s"), REDACTED);
    }
}
