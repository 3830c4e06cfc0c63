//! Users: the kernel judges what a thread that acts as one tries, and the groups of a user are visible by the
//! number of the user's thread.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use chainfs::fs::Caller;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::process::{Gid, Uid};
use rustix::thread::{gettid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// A user.
#[derive(Debug)]
pub(crate) struct Person {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// A thread with this user's credentials as long as it lives, for lookups of its groups.
    thread: u32,
    _life: Sender<()>,
}

/// Gives this thread a user's credentials: real and saved ids stay root's, only those for file access change.
fn become_user(uid: u32, gid: u32, groups: &[u32]) {
    let ids: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&ids).expect("groups");
    set_thread_res_gid(None, Gid::from_raw(gid), None).expect("a group");
    set_thread_res_uid(None, Uid::from_raw(uid), None).expect("a user");
}

fn become_root() {
    set_thread_res_uid(None, Uid::ROOT, None).expect("root");
    set_thread_res_gid(None, Gid::ROOT, None).expect("root's group");
}

impl Person {
    fn new(uid: u32, gid: u32, groups: &[u32]) -> Self {
        let (life, end) = channel::<()>();
        let (tell, told) = channel();
        let mut all = vec![gid];
        all.extend(groups);
        let known = groups.to_vec();
        thread::spawn(move || {
            become_user(uid, gid, &known);
            tell.send(gettid().as_raw_nonzero().get().cast_unsigned()).expect("somebody waits");
            let _ = end.recv();
        });
        Self { uid, gid, groups: all, thread: told.recv().expect("a thread"), _life: life }
    }

    /// Does it by the person's rights.
    pub(crate) fn does<T>(&self, work: impl FnOnce() -> T) -> T {
        become_user(self.uid, self.gid, &self.groups[1..]);
        let done = work();
        become_root();
        done
    }

    /// The kernel's answers for these paths.
    pub(crate) fn may_all(&self, paths: &[PathBuf], access: Access) -> Vec<bool> {
        self.does(|| paths.iter().map(|path| accessat(CWD, path, access, AtFlags::EACCESS).is_ok()).collect())
    }

    pub(crate) fn may(&self, path: &Path, access: Access) -> bool {
        self.does(|| accessat(CWD, path, access, AtFlags::EACCESS).is_ok())
    }

    /// The user in FUSE's form.
    pub(crate) fn caller(&self) -> Caller {
        Caller { uid: self.uid, gid: self.gid, pid: self.thread }
    }

    /// Whether a kernel that checks only the shown modes would admit the user.
    pub(crate) fn is_let_in(&self, (uid, gid, bits): (u32, u32, u16), want: u16) -> bool {
        let bits = if self.uid == uid {
            bits >> 6
        } else if self.groups.contains(&gid) {
            bits >> 3
        } else {
            bits
        };
        bits & want == want
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct People {
    /// Users of the mount: in several groups, and two with one user id in different groups.
    pub(crate) users: Vec<Person>,
    /// Owners of files, whose groups are unknown.
    plain: Vec<Person>,
}

/// Owners of files.
pub(crate) const UIDS: [u32; 3] = [2001, 2002, 2003];
/// Groups of files.
pub(crate) const GIDS: [u32; 3] = [3000, 3001, 3002];

impl People {
    pub(crate) fn new() -> Self {
        let users = vec![
            Person::new(2001, 2001, &[]),
            Person::new(2002, 3000, &[]),
            Person::new(2003, 2003, &[3001, 3002]),
            Person::new(2001, 3001, &[3002]),
            Person::new(2004, 2004, &[3000]),
        ];
        Self { users, plain: UIDS.iter().map(|uid| Person::new(*uid, 64_000, &[])).collect() }
    }

    /// The owner of a file, of no group; none for root.
    pub(crate) fn owner(&self, uid: u32) -> Option<&Person> {
        self.plain.iter().find(|person| person.uid == uid)
    }
}

/// A text's bytes as an access list of the kernel's: the owner's bits, users, the group's, groups, mask,
/// others.
pub(crate) fn access_list(mode: u32, named: &[(bool, u32, u16)], mask: u16) -> Vec<u8> {
    let mut entries = vec![(1_u16, (mode >> 6 & 7) as u16, u32::MAX)];
    entries.extend(named.iter().filter(|entry| !entry.0).map(|(_, id, bits)| (2, *bits, *id)));
    entries.push((4, (mode >> 3 & 7) as u16, u32::MAX));
    entries.extend(named.iter().filter(|entry| entry.0).map(|(_, id, bits)| (8, *bits, *id)));
    entries.push((16, mask, u32::MAX));
    entries.push((32, (mode & 7) as u16, u32::MAX));
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, bits, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// All names of the model's (`q12z`) that a text holds; names of links (`q12z-link`) are others.
pub(crate) fn names(text: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.iter().enumerate().filter(|(_, byte)| **byte == b'q') {
        let rest = &text[at + 1..];
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits > 0 && rest.get(digits) == Some(&b'z') && rest.get(digits + 1) != Some(&b'-') {
            found.insert(String::from_utf8_lossy(&text[at..at + digits + 2]).into_owned());
        }
    }
    found
}

/// A path's text.
pub(crate) fn text(path: &Path) -> String {
    String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned()
}
