//! QEMU's image locks: the meaning of the bytes, and how readers and writers lock them.
//!
//! Byte `100 + n` means "I use permission n", byte `200 + n` "I do not share permission n". All are
//! open-file-description read locks of one byte, so that several holders of one byte do not exclude each
//! other. A conflict is found by testing whether a write lock would be refused. As in QEMU, a holder first
//! sets its bytes and then tests the opposite ones: of two that race, both may fail, but never both succeed.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::backend::LockKind;

/// The permission bits of QEMU that images use.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// The bytes of a reader: it uses consistent reads and shares neither writing nor resizing.
const READER_SET: [i64; 3] = [USED + CONSISTENT_READ, UNSHARED + WRITE, UNSHARED + RESIZE];
/// The bytes that exclude a reader if others hold them, with the reason.
const READER_CONFLICTS: [(i64, &str); 3] = [
    (UNSHARED + CONSISTENT_READ, "is marked inconsistent by another process"),
    (USED + WRITE, "is being written by another process"),
    (USED + RESIZE, "is being resized by another process"),
];

/// The additional bytes of a writer: it uses writing and resizing.
const WRITER_ADDS: [i64; 2] = [USED + WRITE, USED + RESIZE];
/// The bytes that exclude a writer if others hold them; the clearest reason first.
const WRITER_CONFLICTS: [(i64, &str); 5] = [
    (USED + WRITE, "is being written by another process"),
    (USED + RESIZE, "is being resized by another process"),
    (UNSHARED + CONSISTENT_READ, "is marked inconsistent by another process"),
    (UNSHARED + WRITE, "is being read by another process, which excludes writers"),
    (UNSHARED + RESIZE, "is being used by another process, which does not allow resizing"),
];

/// The byte that each writer of an image holds.
pub const WRITER_BYTE: i64 = USED + WRITE;

/// What the bytes that a process has locked say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a byte of QEMU's")]
pub struct ImageLocks {
    /// It reads the image.
    pub reads: bool,
    /// It writes the image.
    pub writes: bool,
    /// It may change the length of the file.
    pub resizes: bool,
    /// Nobody else may write the image.
    pub excludes_writers: bool,
    /// Bytes are locked that mean nothing to QEMU.
    pub others: bool,
}

impl ImageLocks {
    /// Adds a locked range.
    pub(super) fn add(&mut self, first: i64, last: i64) {
        let has = |byte| (first..=last).contains(&byte);
        self.reads |= has(USED + CONSISTENT_READ);
        self.writes |= has(USED + WRITE);
        self.resizes |= has(USED + RESIZE);
        self.excludes_writers |= has(UNSHARED + WRITE);
        self.others |= first < USED || last > UNSHARED + RESIZE;
    }

    /// Adds all of another one.
    pub(super) fn join(&mut self, other: Self) {
        self.reads |= other.reads;
        self.writes |= other.writes;
        self.resizes |= other.resizes;
        self.excludes_writers |= other.excludes_writers;
        self.others |= other.others;
    }
}

/// Why a lock was refused.
#[derive(Debug)]
pub(super) enum Conflict {
    /// Another open file description holds `byte`.
    Held {
        /// The byte.
        byte: i64,
        /// The reason, phrased to follow the file's name.
        fact: &'static str,
    },
    /// The file system does not support locks.
    System(Errno),
}

/// Takes the reader's bytes on `file`, all or none.
pub(super) fn take_reader_set(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    for byte in READER_SET {
        if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            drop_all(file);
            // On a file system without such locks, no QEMU holds any: there is no conflict to detect.
            return if is_unsupported(error) { Ok(()) } else { Err(Conflict::System(error)) };
        }
    }
    test(file, &READER_CONFLICTS).inspect_err(|_| drop_all(file))
}

/// Adds the writer's bytes to the reader's on `file`, all or none. Unlike for a reader, missing lock support
/// is an error: nothing would exclude a second writer.
pub(super) fn add_writer_set(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    for byte in WRITER_ADDS {
        if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            drop_writer_set(file);
            return Err(Conflict::System(error));
        }
    }
    test(file, &WRITER_CONFLICTS).inspect_err(|_| drop_writer_set(file))
}

/// Locks the whole file, as files of chainfs itself are.
pub(super) fn take_whole(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Conflict::Held { byte: 0, fact: "is locked" }),
        Err(error) => Err(Conflict::System(error)),
    }
}

/// Releases the lock on the whole file.
pub(super) fn drop_whole(file: BorrowedFd<'_>) {
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
}

fn test_whole(file: BorrowedFd<'_>) -> Result<(), Conflict> {
    let mut question = whole(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut question)).map_err(Conflict::System)?;
    let is_free = i32::from(question.l_type) == libc::F_UNLCK;
    if is_free { Ok(()) } else { Err(Conflict::Held { byte: 0, fact: "is locked" }) }
}

/// The conflict that would exclude a holder of that lock now. Takes no lock.
pub(super) fn conflict(file: BorrowedFd<'_>, kind: LockKind) -> Result<(), Conflict> {
    let conflicts: &[(i64, &str)] = match kind {
        LockKind::Reader => &READER_CONFLICTS,
        LockKind::Writer => &WRITER_CONFLICTS,
        LockKind::Exclusive => return test_whole(file),
    };
    match test(file, conflicts) {
        Err(Conflict::System(error)) if kind == LockKind::Reader && is_unsupported(error) => Ok(()),
        found => found,
    }
}

/// Releases the writer's bytes and keeps the reader's.
pub(super) fn drop_writer_set(file: BorrowedFd<'_>) {
    for byte in WRITER_ADDS {
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte)));
    }
}

/// Whether the error means that the file system does not support these locks.
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

/// Releases all of QEMU's bytes on `file`.
pub(super) fn drop_all(file: BorrowedFd<'_>) {
    let mut all = range(libc::F_UNLCK, USED);
    all.l_len = UNSHARED + RESIZE + 1 - USED;
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&all));
}

/// Whether another process writes the open file `file` now. Takes no lock.
pub(super) fn probe_writer(file: BorrowedFd<'_>) -> bool {
    held_by_others(file, USED + WRITE).unwrap_or(false)
}

fn held_by_others(file: BorrowedFd<'_>, byte: i64) -> Result<bool, Errno> {
    let mut question = range(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut question))?;
    Ok(i32::from(question.l_type) != libc::F_UNLCK)
}

fn whole(kind: i32) -> libc::flock {
    libc::flock { l_len: 0, ..range(kind, 0) }
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

    /// Two open file descriptions conflict like two processes.
    #[test]
    fn readers_share_and_a_writer_excludes_them() {
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
        // The refused reader holds no bytes: a writer that tests 201 sees only `two`.
        drop_all(two.as_fd());
        assert!(!held_by_others(writer.as_fd(), UNSHARED + WRITE).unwrap());

        drop(writer);
        take_reader_set(one.as_fd()).unwrap();
    }

    #[test]
    fn only_a_sole_reader_becomes_a_writer_and_others_stay_readers() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::open(path.path()).unwrap();
        let (one, two, other) = (open(), open(), open());
        take_reader_set(one.as_fd()).unwrap();
        take_reader_set(two.as_fd()).unwrap();
        assert!(matches!(add_writer_set(one.as_fd()), Err(Conflict::Held { byte: 201, .. })));
        // The added bytes are released, the earlier ones are kept.
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
