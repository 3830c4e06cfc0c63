//! Who it is that holds a lock or keeps a mount busy, where `/proc` tells.
//!
//! Only for sentences: the answer is a moment old, and lacks what another user's processes hide.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::file::FileId;

/// A process, by number and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// Process number.
    pub pid: u32,
    /// Its program's name as `/proc/PID/comm` says.
    pub program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.program, self.pid)
    }
}

/// Other processes that hold a lock on `byte` of the file `id`.
pub fn lock_holders(id: FileId, byte: i64) -> Vec<Holder> {
    others(|process| holds_lock(process, id, byte))
}

fn holds_lock(process: &Path, id: FileId, byte: i64) -> bool {
    let Ok(infos) = fs::read_dir(process.join("fdinfo")) else { return false };
    infos.flatten().any(|info| {
        fs::read_to_string(info.path())
            .is_ok_and(|text| text.lines().any(|line| locked_inode(line, byte) == Some(id.inode)))
    })
}

/// As [`lock_holders`], for many files at once: who holds `byte` of which inode. Inode numbers
/// are those of any file system, so ask only about files that are known to be locked.
pub fn all_lock_holders(byte: i64) -> HashMap<u64, Vec<Holder>> {
    let mut found: HashMap<u64, Vec<Holder>> = HashMap::new();
    for (pid, process) in processes() {
        let Ok(infos) = fs::read_dir(process.join("fdinfo")) else { continue };
        let texts = infos.flatten().filter_map(|info| fs::read_to_string(info.path()).ok());
        let mut inodes: Vec<u64> = texts
            .flat_map(|text| text.lines().filter_map(|line| locked_inode(line, byte)).collect::<Vec<_>>())
            .collect();
        inodes.sort_unstable();
        inodes.dedup();
        if inodes.is_empty() {
            continue;
        }
        let holder = Holder::of(pid, &process);
        for inode in inodes {
            found.entry(inode).or_default().push(holder.clone());
        }
    }
    found
}

/// Other processes that have a file open, mapped, or as their place, beneath `directory`.
pub fn users_of(directory: &Path) -> Vec<Holder> {
    let beneath = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(directory));
    others(|process| {
        if beneath(&process.join("cwd")) || beneath(&process.join("root")) || beneath(&process.join("exe")) {
            return true;
        }
        let maps = || {
            fs::read_dir(process.join("map_files"))
                .is_ok_and(|mut all| all.any(|m| m.is_ok_and(|m| beneath(&m.path()))))
        };
        let open =
            fs::read_dir(process.join("fd")).is_ok_and(|mut all| all.any(|fd| fd.is_ok_and(|fd| beneath(&fd.path()))));
        open || maps()
    })
}

const UNSEEN: &str = "which one cannot be seen from here";

/// The holders of `byte` as part of a sentence.
pub(super) fn describe(id: FileId, byte: i64) -> String {
    let holders = lock_holders(id, byte);
    if holders.is_empty() {
        // Two openings of ours: the older one is of the file as it was before somebody changed it.
        let is_own = holds_lock(Path::new("/proc/self"), id, byte);
        let sentence = if is_own { "by this mount, in a disk opened before the file changed" } else { UNSEEN };
        return sentence.to_string();
    }
    holders.iter().map(Holder::to_string).collect::<Vec<_>>().join(", ")
}

fn others(is_one: impl Fn(&Path) -> bool) -> Vec<Holder> {
    processes().filter(|(_, process)| is_one(process)).map(|(pid, process)| Holder::of(pid, &process)).collect()
}

/// Numbers and directories of all processes but this one, in the order of their numbers.
fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().filter(move |pid| *pid != own).map(|pid| (pid, Path::new("/proc").join(pid.to_string())))
}

impl Holder {
    fn of(pid: u32, process: &Path) -> Self {
        let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
        Self { pid, program: program.trim_end().to_string() }
    }
}

/// The inode that a line of fdinfo says is locked at `byte`:
/// `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 101`.
fn locked_inode(line: &str, byte: i64) -> Option<u64> {
    let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [.., file, start, end] = words.as_slice() else { return None };
    let starts = start.parse().is_ok_and(|start: i64| start <= byte);
    let ends = *end == "EOF" || end.parse().is_ok_and(|end: i64| byte <= end);
    if starts && ends { file.rsplit(':').next()?.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_line_names_file_and_range() {
        let line = "lock:\t3: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 103";
        assert_eq!([100, 101, 103, 104].map(|byte| locked_inode(line, byte)), [None, Some(1234), Some(1234), None]);
        assert_eq!(locked_inode("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 0 EOF", 4711), Some(9));
        assert_eq!(locked_inode("pos:\t0", 0), None);
    }
}
