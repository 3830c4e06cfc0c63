//! QEMU's image locks: which bytes mean what, and how a reader takes them.
//!
//! Byte `100 + n` says "I use permission n", `200 + n` "I do not share permission n"; all are
//! open-file-description read locks of one byte, so that several holders of one byte do not
//! exclude each other and a conflict is found by asking whether a write lock would be refused.
//! As in QEMU, a holder first sets its bytes and then tests the opposite ones: two that race may
//! both fail, never both succeed.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// QEMU's permission bits, as far as images use them.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// What a reader holds: it uses consistent reads and shares neither writing nor resizing.
const READER_SET: [i64; 3] = [USED + CONSISTENT_READ, UNSHARED + WRITE, UNSHARED + RESIZE];
/// What a reader may not find held by others, and what that means.
const READER_CONFLICTS: [(i64, &str); 3] = [
    (UNSHARED + CONSISTENT_READ, "is marked inconsistent by another process"),
    (USED + WRITE, "is being written by another process"),
    (USED + RESIZE, "is being resized by another process"),
];

/// What a writer holds besides the reader's set: it uses writing and resizing.
const WRITER_ADDS: [i64; 2] = [USED + WRITE, USED + RESIZE];
/// What a writer may not find held by others: the plainest fact first.
const WRITER_CONFLICTS: [(i64, &str); 5] = [
    (USED + WRITE, "is being written by another process"),
    (USED + RESIZE, "is being resized by another process"),
    (UNSHARED + CONSISTENT_READ, "is marked inconsistent by another process"),
    (UNSHARED + WRITE, "is being read by another process, which keeps writers out"),
    (UNSHARED + RESIZE, "is being used by another process, which keeps its size"),
];

/// The byte that whoever writes an image holds.
pub const WRITER_BYTE: i64 = USED + WRITE;

/// Why a lock was not given.
#[derive(Debug)]
pub enum Conflict {
    /// Another open file description holds `byte`.
    Held {
        /// The byte.
        byte: i64,
        /// What holding it means, to follow the file's name.
        fact: &'static str,
    },
    /// Locks do not work here.
    System(Errno),
}

/// Takes the reader's set on `file`, or nothing.
pub(super) fn take_reader_set(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    for byte in READER_SET {
        if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            drop_all(file);
            // File systems without such locks have no QEMU that holds any: nothing to keep out of.
            return if is_unsupported(error) { Ok(()) } else { Err(Conflict::System(error)) };
        }
    }
    test(file, &READER_CONFLICTS).inspect_err(|_| drop_all(file))
}

/// Adds what a writer holds to the reader's set on `file`, or nothing. Unlike for a reader, locks
/// that do not work are a failure: nothing would keep two writers apart.
pub(super) fn add_writer_set(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    for byte in WRITER_ADDS {
        if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            drop_writer_set(file);
            return Err(Conflict::System(error));
        }
    }
    test(file, &WRITER_CONFLICTS).inspect_err(|_| drop_writer_set(file))
}

/// What would keep a reader, or a writer, from the file now: a look, nothing is taken.
pub(super) fn look(file: BorrowedFd<'_>, for_writing: bool) -> Result<(), Conflict> {
    let conflicts: &[(i64, &str)] = if for_writing { &WRITER_CONFLICTS } else { &READER_CONFLICTS };
    match test(file, conflicts) {
        Err(Conflict::System(error)) if !for_writing && is_unsupported(error) => Ok(()),
        found => found,
    }
}

/// Becomes a reader again.
pub(super) fn drop_writer_set(file: BorrowedFd<'_>) {
    for byte in WRITER_ADDS {
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte)));
    }
}

/// Whether this is how a file system says that it has no such locks.
pub(super) fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::EINVAL | Errno::ENOTSUP | Errno::ENOSYS | Errno::ENOLCK)
}

fn test(file: BorrowedFd<'_>, conflicts: &[(i64, &'static str)]) -> Result<(), Conflict> {
    for (byte, fact) in conflicts {
        match held_by_others(file, *byte) {
            Ok(false) => {}
            Ok(true) => return Err(Conflict::Held { byte: *byte, fact }),
            Err(error) => return Err(Conflict::System(error)),
        }
    }
    Ok(())
}

/// Lets go of all of QEMU's bytes on `file`.
pub(super) fn drop_all(file: BorrowedFd<'_>) {
    let mut all = range(libc::F_UNLCK, USED);
    all.l_len = UNSHARED + RESIZE + 1 - USED;
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&all));
}

/// Whether another process writes the file behind `file` now: a look, nothing is taken.
pub fn probe_writer(file: BorrowedFd<'_>) -> bool {
    held_by_others(file, USED + WRITE).unwrap_or(false)
}

fn held_by_others(file: BorrowedFd<'_>, byte: i64) -> Result<bool, Errno> {
    let mut question = range(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut question))?;
    Ok(i32::from(question.l_type) != libc::F_UNLCK)
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Two descriptions of one file see each other as two processes would.
    #[test]
    fn readers_share_and_a_writer_keeps_them_out() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(path.path()).unwrap();
        let (one, two, writer) = (open(), open(), open());
        take_reader_set(one.as_fd()).unwrap();
        take_reader_set(two.as_fd()).unwrap();
        assert!(!probe_writer(one.as_fd()));

        drop_all(one.as_fd());
        fcntl(&writer, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, USED + WRITE))).unwrap();
        assert!(matches!(take_reader_set(one.as_fd()), Err(Conflict::Held { byte: 101, .. })));
        assert!(probe_writer(two.as_fd()));
        // The refused reader holds nothing: a writer that tests 201 sees only `two`.
        drop_all(two.as_fd());
        assert!(!held_by_others(writer.as_fd(), UNSHARED + WRITE).unwrap());

        drop(writer);
        take_reader_set(one.as_fd()).unwrap();
    }

    #[test]
    fn a_reader_becomes_a_writer_only_when_it_is_alone_and_stays_a_reader_otherwise() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::open(path.path()).unwrap();
        let (one, two, other) = (open(), open(), open());
        take_reader_set(one.as_fd()).unwrap();
        take_reader_set(two.as_fd()).unwrap();
        assert!(matches!(add_writer_set(one.as_fd()), Err(Conflict::Held { byte: 201, .. })));
        // What was added has gone again, what was there before has not.
        assert!(!held_by_others(other.as_fd(), USED + WRITE).unwrap());
        drop_all(two.as_fd());
        assert!(held_by_others(other.as_fd(), UNSHARED + WRITE).unwrap());

        add_writer_set(one.as_fd()).unwrap();
        assert!(matches!(take_reader_set(two.as_fd()), Err(Conflict::Held { byte: 101, .. })));
        assert!(matches!(add_writer_set(two.as_fd()), Err(Conflict::Held { byte: 101, .. })));
        drop_writer_set(one.as_fd());
        take_reader_set(two.as_fd()).unwrap();
        assert!(held_by_others(two.as_fd(), UNSHARED + WRITE).unwrap(), "the reader's set stays");
    }
}
