//! Who of those whom `allow_other` lets in may see and do what.
//!
//! Nobody gets through the mount what the kernel would not give him on the store. The modes that are shown say so for
//! whole classes of users, and the kernel holds to them; this asks again for the very user, with the groups that the process
//! has, whenever something is looked up or opened. What he may not read is in none of the texts that he reads.
//! `uid=`, `gid=` and `umask=` are the word of the administrator, and go before all that.

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

/// For how long what was found out of permissions is used for modes and lists. Whatever is opened is judged anew.
const BELIEF: Duration = Duration::from_millis(500);
/// What is shown to how many users is kept.
const SHOWN_KEPT: NonZero<usize> = NonZero::new(16).expect("not zero");

/// A process that asks for something, as the kernel tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user by whose rights it reaches files.
    pub uid: u32,
    /// The same group.
    pub gid: u32,
    /// Its thread; 0 if it cannot be seen from here.
    pub pid: u32,
}

impl Caller {
    /// The administrator: who may see and do everything.
    pub const ADMINISTRATOR: Self = Self { uid: 0, gid: 0, pid: 0 };
}

/// What one user may see.
#[derive(Clone, Debug)]
pub(super) struct Viewer {
    /// The user; none: everything is shown.
    subject: Option<Subject>,
    /// The user, if commands are judged by what he may do himself.
    commander: Option<Subject>,
}

impl Viewer {
    /// Who has to be asked for, where it is not the administrator.
    pub(super) fn subject(&self) -> Option<&Subject> {
        self.subject.as_ref()
    }

    /// By whose rights commands are judged.
    pub(super) fn commander(&self) -> Option<&Subject> {
        self.commander.as_ref()
    }
}

/// What is shown of a catalog to a user.
type VisibleCatalog = LruCache<(u64, Subject), (Instant, Arc<Catalog>)>;

/// The rules of a mount.
#[derive(Debug)]
pub(super) struct Rights {
    store: Arc<Store>,
    ownership: Ownership,
    /// Whether others than the mounting user come in.
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
            shown: Mutex::new(LruCache::new(SHOWN_KEPT)),
        }
    }

    /// Whether the modes that are shown are those of the images, for others to be let in by.
    pub(super) fn is_judged(&self) -> bool {
        self.is_shared && self.ownership.umask.is_none()
    }

    /// What a caller may see. Everything: root, the user who has mounted, whom `uid=` names; and what is to be seen,
    /// not done, whom `umask=` or `gid=` let in.
    pub(super) fn viewer(&self, caller: &Caller) -> Viewer {
        let Caller { uid, gid, pid } = *caller;
        let is_administrator = !self.is_shared || uid == 0 || uid == self.own_uid || self.ownership.uid == Some(uid);
        if is_administrator {
            return Viewer { subject: None, commander: None };
        }
        // A1: judged for this very process, with the groups that it has.
        let subject = Subject::new(uid, groups_of_process(pid, uid, gid));
        let is_let_in = self.ownership.umask.is_some() || self.ownership.gid.is_some_and(|gid| subject.is_in(gid));
        Viewer { subject: (!is_let_in).then(|| subject.clone()), commander: Some(subject) }
    }

    /// Who may do what, as of a moment ago.
    pub(super) fn judge(&self) -> Arc<AccessJudge> {
        let mut kept = self.judge.lock();
        if let Some((when, judge)) = &*kept
            && when.elapsed() < BELIEF
        {
            return Arc::clone(judge);
        }
        let judge = Arc::new(self.store.judge());
        *kept = Some((Instant::now(), Arc::clone(&judge)));
        judge
    }

    /// The mode of a disk, or of what shows something of it: no more than what all files of it allow.
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
        // What is searched is what is read.
        let mut allowed = (allowed | (allowed & 0o444) >> 2) as u16;
        if self.ownership.uid.is_some() {
            allowed |= 0o700;
        }
        if self.ownership.gid.is_some() {
            allowed |= 0o070;
        }
        (uid, gid, bits & allowed)
    }

    /// Refuses what a user may not read. `now`: by what holds at this moment.
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

    /// Refuses what a user may not write.
    pub(super) fn check_write(&self, viewer: &Viewer, catalog: &Catalog, layers: &[ImageIndex]) -> Result<()> {
        let Some(subject) = viewer.subject() else { return Ok(()) };
        let judge = self.store.judge();
        let may = judge.may_read_all(subject, catalog, layers)
            && layers.first().is_none_or(|top| judge.may_write(subject, &catalog.images[*top]));
        if may { Ok(()) } else { Err(denied()) }
    }

    /// The catalog without what a user may not read.
    pub(super) fn shown(&self, viewer: &Viewer, catalog: &Arc<Catalog>) -> Arc<Catalog> {
        let Some(subject) = viewer.subject() else { return Arc::clone(catalog) };
        let key = (catalog.serial, subject.clone());
        if let Some((when, shown)) = self.shown.lock().get(&key)
            && when.elapsed() < BELIEF
        {
            return Arc::clone(shown);
        }
        let shown = Arc::new(catalog.shown_to(&self.judge(), subject));
        self.shown.lock().put(key, (Instant::now(), Arc::clone(&shown)));
        shown
    }

    /// A text without lines that name what a user may not read.
    pub(super) fn redact(&self, viewer: &Viewer, text: &str) -> String {
        let Some(subject) = viewer.subject() else { return text.to_owned() };
        let catalog = self.store.catalog();
        let judge = self.judge();
        let images = catalog.images.iter().filter(|image| !judge.may_read(subject, image));
        // What cannot be read by us is no image, and has its name all the same.
        let others = catalog.problems.iter().filter(|problem| !judge.may_read_in_store(subject, &problem.path));
        let hidden: Vec<&Path> = images
            .map(|image| image.place.path.as_path())
            .chain(others.map(|problem| problem.path.as_path()))
            .collect();
        redacted(text, &hidden)
    }
}

/// Each line that names any of these files says so instead.
fn redacted(text: &str, hidden: &[&Path]) -> String {
    let names: Vec<String> = hidden
        .iter()
        .flat_map(|path| [path.file_name(), path.file_stem()])
        .flatten()
        .map(|name| crate::report::safe::terminal_bytes(name.as_encoded_bytes()))
        .collect();
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    let names_it = |line: &str, name: &String| {
        line.match_indices(name.as_str())
            .any(|(at, found)| !line[..at].ends_with(is_part) && !line[at + found.len()..].starts_with(is_part))
    };
    let line = |line: &str| {
        if !names.iter().any(|name| names_it(line, name)) {
            return line.to_owned();
        }
        let key = line.split_once(':').map(|(key, _)| key).filter(|key| key.chars().all(|c| c.is_ascii_lowercase()));
        let end = if line.ends_with('\n') { "\n" } else { "" };
        match key {
            Some(key) => format!("{key}: {NOT_YOURS}{end}"),
            None => format!("{NOT_YOURS}{end}"),
        }
    };
    text.split_inclusive('\n').map(line).collect()
}

/// What stands in place of what would name an image.
const NOT_YOURS: &str = "an image that you may not read has to do with it; ask its owner or root";

fn denied() -> Error {
    let fact = "you may not read, or not write, every file that this is made of; ask their owners, or root";
    Error::new(ErrorKind::Denied, fact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_name_what_is_hidden_do_not() {
        let hidden = [Path::new("b/secret.qcow2"), Path::new("x")];
        let redacted = |text: &str| redacted(text, &hidden);
        assert_eq!(redacted("state: done\n"), "state: done\n");
        assert_eq!(redacted("error: b/secret.qcow2 is open\nnumber: 1\n"), format!("error: {NOT_YOURS}\nnumber: 1\n"));
        assert_eq!(redacted("failed: web stands on secret"), format!("failed: {NOT_YOURS}"));
        assert_eq!(redacted("max and secretary"), "max and secretary");
        assert_eq!(redacted("● x@s"), NOT_YOURS);
    }
}
