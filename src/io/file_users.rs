//! Finds the processes that have files open, by device and inode number, and what they have locked.
//!
//! Only for messages: the answer may be outdated, and lacks processes whose files may not be looked at, which
//! are counted. Files of a mount that is given are matched by the kernel's paths alone, so that no request
//! goes to a daemon that may hang.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, statx};

use super::lock_holders::{LockHolder, LockLine, OwnProcess, lock, processes};
use super::locks::ImageLocks;
use super::mountinfo::MountEntry;

/// A file's device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileNumber {
    device: (u32, u32),
    inode: u64,
}

impl FileNumber {
    /// That of a file, with symbolic links followed.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        // The numbers never change: no server is asked for them again.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let found = statx(CWD, path, flags, StatxFlags::INO)?;
        Ok(Self { device: (found.stx_dev_major, found.stx_dev_minor), inode: found.stx_ino })
    }
}

/// What is looked for.
#[derive(Debug)]
pub struct WantedFiles<'a> {
    /// Files.
    pub files: &'a [FileNumber],
    /// Mounts whose files are all meant.
    pub mounts: &'a [MountEntry],
}

/// A process with an open file that was looked for.
#[derive(Clone, Debug)]
pub struct FileUser {
    /// The process.
    pub process: LockHolder,
    /// Its effective user.
    pub uid: u32,
    /// Its command line.
    pub command: Vec<String>,
    /// Whether it serves a FUSE file system.
    pub is_daemon: bool,
    /// What it has open; each file once.
    pub open: Vec<UsedFile>,
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedFile {
    /// Which one it is.
    pub which: WhichFile,
    /// Whether it can be read through it.
    pub reads: bool,
    /// Whether it can be written through it.
    pub writes: bool,
    /// QEMU's locks on it.
    pub locks: ImageLocks,
}

/// Which of the files that were looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhichFile {
    /// The file of that index.
    Known(usize),
    /// A path in the mount of that index.
    InMount(usize, PathBuf),
    /// The current directory, root directory or program, at a path in the mount of that index.
    Place(usize, PathBuf),
}

/// All users of files.
#[derive(Clone, Debug, Default)]
pub struct FileUsers {
    /// By process id.
    pub users: Vec<FileUser>,
    /// Processes whose files may not be looked at.
    pub unseen: usize,
}

/// All other processes that use those files.
pub fn file_users(wanted: &WantedFiles<'_>) -> FileUsers {
    let numbers = wanted.files.iter().enumerate().map(|(index, number)| (*number, index));
    // Of two names of one file, the first one.
    let numbers: HashMap<FileNumber, usize> = numbers.rev().collect();
    let mut found = FileUsers::default();
    for (pid, directory) in processes(OwnProcess::Excluded) {
        let command = command(&directory);
        match open_files(&directory, wanted, &numbers) {
            Some(OpenFiles { open, is_daemon }) => {
                if !open.is_empty() {
                    let (process, uid) = (LockHolder::of(pid, &directory), user(&directory));
                    found.users.push(FileUser { process, uid, command, is_daemon, open });
                }
            }
            // The kernel's own threads have no command line, and no files. A process that has ended has none
            // either.
            None => found.unseen += usize::from(!command.is_empty()),
        }
    }
    found.users.sort_by_key(|user| user.process.pid);
    found
}

struct OpenFiles {
    open: Vec<UsedFile>,
    is_daemon: bool,
}

/// The files of a process that are wanted; `None` if they may not be looked at.
fn open_files(
    process: &Path,
    wanted: &WantedFiles<'_>,
    known: &HashMap<FileNumber, usize>,
) -> Option<OpenFiles> {
    let mut found = OpenFiles { open: Vec::new(), is_daemon: false };
    for entry in fs::read_dir(process.join("fd")).ok()?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        found.is_daemon |= target == Path::new("/dev/fuse");
        let Some(which) = which(&entry.path(), &target, wanted, known, WhichFile::InMount) else { continue };
        let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).unwrap_or_default();
        let access = OFlags::from_bits_retain(flags(&info).unwrap_or(0));
        let mode = access & OFlags::RWMODE;
        let mut locks = ImageLocks::default();
        for LockLine { first, last, .. } in info.lines().filter_map(lock) {
            locks.add(first, last);
        }
        let is_path = access.contains(OFlags::PATH);
        add(
            &mut found.open,
            UsedFile {
                which,
                reads: !is_path && mode != OFlags::WRONLY,
                writes: mode == OFlags::WRONLY || mode == OFlags::RDWR,
                locks,
            },
        );
    }
    // A mapping outlives the descriptor. Only root may follow these links.
    for entry in fs::read_dir(process.join("map_files")).into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if let Some(which) = which(&entry.path(), &target, wanted, known, WhichFile::InMount) {
            add(
                &mut found.open,
                UsedFile { which, reads: true, writes: false, locks: ImageLocks::default() },
            );
        }
    }
    for name in ["cwd", "root", "exe"] {
        let place = process.join(name);
        let Ok(target) = fs::read_link(&place) else { continue };
        let Some(which) = which(&place, &target, wanted, &HashMap::new(), WhichFile::Place) else { continue };
        add(&mut found.open, UsedFile { which, reads: false, writes: false, locks: ImageLocks::default() });
    }
    Some(found)
}

fn which(
    link: &Path,
    target: &Path,
    wanted: &WantedFiles<'_>,
    known: &HashMap<FileNumber, usize>,
    in_mount: fn(usize, PathBuf) -> WhichFile,
) -> Option<WhichFile> {
    // The last of several mounts on one directory is the visible one.
    let mount = wanted.mounts.iter().rposition(|mount| target.starts_with(&mount.directory));
    if let Some(mount) = mount {
        let rest = target.strip_prefix(&wanted.mounts[mount].directory).ok()?;
        return Some(in_mount(mount, rest.to_path_buf()));
    }
    if known.is_empty() || !target.as_os_str().as_bytes().starts_with(b"/") {
        return None;
    }
    known.get(&FileNumber::of(link).ok()?).map(|index| WhichFile::Known(*index))
}

/// Several descriptors of one file are one entry.
fn add(open: &mut Vec<UsedFile>, new: UsedFile) {
    match open.iter_mut().find(|known| known.which == new.which) {
        Some(known) => {
            known.reads |= new.reads;
            known.writes |= new.writes;
            known.locks.join(new.locks);
        }
        None => open.push(new),
    }
}

/// `flags:\t0100002`, in octal.
fn flags(info: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(line.trim(), 8).ok()
}

fn command(process: &Path) -> Vec<String> {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.collect();
    words.truncate(words.iter().rposition(|word| !word.is_empty()).map_or(0, |last| last + 1));
    words
}

/// `Uid:` has the real, the effective, the saved and the file system's user.
fn user(process: &Path) -> u32 {
    let text = fs::read_to_string(process.join("status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_octal() {
        assert_eq!(flags("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"), Some(0o100_002));
        assert_eq!(flags("pos:\t0\n"), None);
    }

    #[test]
    fn two_names_of_a_file_have_one_number() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&one, "").unwrap();
        fs::hard_link(&one, &other).unwrap();
        assert_eq!(FileNumber::of(&one).unwrap(), FileNumber::of(&other).unwrap());
        assert_ne!(FileNumber::of(&one).unwrap(), FileNumber::of(directory.path()).unwrap());
    }
}
