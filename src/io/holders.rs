//! Who it is that holds a lock or keeps a mount busy, where `/proc` tells.
//!
//! Only for sentences: the answer is a moment old, and lacks what another user's processes hide.

use std::fmt;
use std::fs;
use std::path::Path;

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
    others(|process| {
        let Ok(infos) = fs::read_dir(process.join("fdinfo")) else { return false };
        infos.flatten().any(|info| {
            fs::read_to_string(info.path())
                .is_ok_and(|text| text.lines().any(|line| lock_line_covers(line, id.inode, byte)))
        })
    })
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

/// The holders of `byte` as part of a sentence.
pub(super) fn describe(id: FileId, byte: i64) -> String {
    let holders = lock_holders(id, byte);
    if holders.is_empty() {
        return "which one cannot be seen from here".to_string();
    }
    holders.iter().map(Holder::to_string).collect::<Vec<_>>().join(", ")
}

fn others(is_one: impl Fn(&Path) -> bool) -> Vec<Holder> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let own = std::process::id();
    let mut found: Vec<_> = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .map(|pid| (pid, Path::new("/proc").join(pid.to_string())))
        .filter(|(_, process)| is_one(process))
        .map(|(pid, process)| {
            let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
            Holder { pid, program: program.trim_end().to_string() }
        })
        .collect();
    found.sort();
    found
}

/// A line of fdinfo: `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 101`.
fn lock_line_covers(line: &str, inode: u64, byte: i64) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else { return false };
    let words: Vec<_> = rest.split_whitespace().collect();
    let [.., file, start, end] = words.as_slice() else { return false };
    let same_file = file.rsplit(':').next().and_then(|n| n.parse().ok()) == Some(inode);
    let starts = start.parse().is_ok_and(|start: i64| start <= byte);
    let ends = *end == "EOF" || end.parse().is_ok_and(|end: i64| byte <= end);
    same_file && starts && ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_line_names_file_and_range() {
        let line = "lock:\t3: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 103";
        assert!(lock_line_covers(line, 1234, 101) && lock_line_covers(line, 1234, 103));
        assert!(!lock_line_covers(line, 1234, 104) && !lock_line_covers(line, 1235, 101));
        assert!(lock_line_covers("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 0 EOF", 9, 4711));
        assert!(!lock_line_covers("pos:\t0", 9, 0));
    }
}
