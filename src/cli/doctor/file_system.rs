//! What the file system of a store can do: locks, holes, shared blocks, and how durable names are.
//!
//! It is tried on a file without a name (`O_TMPFILE`), which no one else sees and no crash leaves.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, fallocate, ftruncate, ioctl_ficlone, open, seek};
use rustix::io::Errno;

use super::finding::Finding;
use crate::io::MountEntry;

/// What was tried, `None` if it could not be.
#[derive(Clone, Copy, Debug, Default)]
struct Abilities {
    locks: Option<bool>,
    holes: Option<bool>,
    shared_blocks: Option<bool>,
}

/// All of it, for the directory of a store.
pub(super) fn check(directory: &Path, mounts: &[MountEntry]) -> Vec<Finding> {
    let kind = kind_of(directory, mounts);
    let subject = format!("file system {}", if kind.is_empty() { "(unknown)" } else { &kind });
    let mut findings = vec![names(&subject, &kind)];
    match attempt(directory) {
        Ok(abilities) => findings.extend(judge(&subject, abilities)),
        Err(error) => findings.push(
            Finding::note(
                subject,
                format!("not tried: no file can be made in {} ({error})", directory.display()),
            )
            .means("whether locks, holes and shared blocks work there is unknown"),
        ),
    }
    findings
}

/// The type of the file system that covers a directory.
fn kind_of(directory: &Path, mounts: &[MountEntry]) -> String {
    let covering = mounts.iter().filter(|mount| directory.starts_with(&mount.directory));
    // Of several mounts on one directory, the last one is visible.
    let found = covering.max_by_key(|mount| mount.directory.as_os_str().len());
    found.map(|mount| mount.kind.clone()).unwrap_or_default()
}

/// What a rename and a hard link are worth there.
fn names(subject: &str, kind: &str) -> Finding {
    match kind {
        "ext2" | "vfat" | "msdos" | "exfat" | "ntfs" | "ntfs3" | "fuseblk" | "hfsplus" => {
            Finding::warning(subject, "has no journal that keeps a rename whole, or no hard links")
                .means("after a power failure a name may be lost; commands that need hard links are refused")
                .fix("keep stores on ext4, XFS or btrfs")
        }
        "ext3" | "ext4" | "xfs" | "btrfs" | "f2fs" | "zfs" | "bcachefs" | "jfs" => {
            Finding::ok(subject, "names are durable and change whole")
        }
        "tmpfs" | "ramfs" => Finding::warning(subject, "lives in memory")
            .means("all images are lost when the machine stops")
            .fix("keep stores on a disk"),
        "overlay" => Finding::note(subject, "images are copied whole when they are first written")
            .means("names are as durable as those of its upper file system"),
        "nfs" | "nfs4" | "cifs" | "smb3" | "ceph" | "9p" | "virtiofs" | "glusterfs" => {
            Finding::note(subject, "is a server's").means("names are as durable as the server makes them")
        }
        _ => Finding::note(subject, "how durable its names are is not known here"),
    }
}

fn attempt(directory: &Path) -> io::Result<Abilities> {
    let file = || -> io::Result<OwnedFd> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(open(directory, flags, Mode::RUSR | Mode::WUSR)?)
    };
    let one = file()?;
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    let locks = fcntl(one.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).is_ok();
    let holes = || -> rustix::io::Result<bool> {
        const LEN: u64 = 1 << 20;
        ftruncate(&one, LEN)?;
        fallocate(&one, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, LEN)?;
        Ok(seek(&one, SeekFrom::Hole(0))? == 0)
    };
    let shared = file().map(|two| ioctl_ficlone(&two, &one));
    Ok(Abilities {
        locks: Some(locks),
        holes: known(holes()),
        shared_blocks: shared.ok().and_then(|cloned| known(cloned.map(|()| true))),
    })
}

/// An answer, if it is one: an error that means "not here" is.
fn known(result: rustix::io::Result<bool>) -> Option<bool> {
    match result {
        Ok(is_able) => Some(is_able),
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::XDEV) => Some(false),
        Err(_) => None,
    }
}

fn judge(subject: &str, abilities: Abilities) -> Vec<Finding> {
    let answer = |is_able: Option<bool>, name: &str, otherwise: Finding| match is_able {
        Some(true) => Finding::ok(subject, format!("has {name}")),
        Some(false) => otherwise,
        None => Finding::note(subject, format!("whether it has {name} could not be tried")),
    };
    vec![
        answer(
            abilities.locks,
            "file locks",
            Finding::problem(subject, "has no file locks")
                .means("active disks are read-only, and no other program's use is noticed")
                .fix("keep the store elsewhere, or mount with -o nolock if no other program uses the images"),
        ),
        answer(
            abilities.holes,
            "holes",
            Finding::warning(subject, "has no holes")
                .means("images take their whole size, and freed clusters keep their space")
                .fix("keep stores on ext4, XFS or btrfs"),
        ),
        answer(
            abilities.shared_blocks,
            "shared blocks (reflinks)",
            Finding::note(subject, "has no shared blocks (reflinks)")
                .means("copies of raw layers take time and space"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::*;

    #[test]
    fn what_a_file_system_lacks_is_named() {
        let marks = |locks, holes, shared_blocks| {
            judge("x", Abilities { locks, holes, shared_blocks }).iter().map(|f| f.mark).collect::<Vec<_>>()
        };
        assert_eq!(marks(Some(true), Some(true), Some(true)), [Mark::Ok; 3]);
        assert_eq!(marks(Some(false), Some(false), Some(false)), [Mark::Problem, Mark::Warning, Mark::Note]);
        assert_eq!(marks(None, None, None), [Mark::Note; 3]);
        for (kind, mark) in [
            ("ext4", Mark::Ok),
            ("vfat", Mark::Warning),
            ("tmpfs", Mark::Warning),
            ("nfs4", Mark::Note),
            ("overlay", Mark::Note),
            ("fuse.other", Mark::Note),
        ] {
            assert_eq!(names("x", kind).mark, mark, "{kind}");
        }
    }

    #[test]
    fn trying_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let before = std::fs::metadata(root.path()).unwrap().modified().unwrap();
        let findings = check(root.path(), &crate::io::mounts().unwrap());
        assert!(findings.iter().any(|finding| finding.found.contains("locks")), "{findings:?}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        assert_eq!(std::fs::metadata(root.path()).unwrap().modified().unwrap(), before);
        let missing = check(&root.path().join("none"), &[]);
        assert!(missing[1].mark == Mark::Note && missing[1].found.contains("not tried"));
    }
}
