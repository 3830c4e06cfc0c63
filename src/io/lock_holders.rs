//! Who it is that holds a lock, where `/proc` tells: process, program, and the virtual machine that it runs.
//!
//! Only for sentences: the answer is a moment old, and lacks what another user's processes hide. It is bounded: however many
//! ask, and however often, `/proc` is walked through by one at a time, for a limited time, and what was found answers all.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::file::FileId;

/// A process, by number and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LockHolder {
    /// Process number.
    pub pid: u32,
    /// Its program's name as `/proc/PID/comm` says.
    pub program: String,
    /// The virtual machine that it runs, as QEMU and libvirt call it.
    pub domain: Option<String>,
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.program, self.pid)?;
        self.domain.as_ref().map_or(Ok(()), |domain| write!(f, " of domain {domain}"))
    }
}

/// Other processes that hold a lock on `byte` of the file `id`.
pub fn lock_holders(id: FileId, byte: i64) -> Vec<LockHolder> {
    LockSurvey::for_lock(id.inode, byte).holders(id.inode, byte)
}

/// As [`lock_holders`], for many files at once: who holds `byte` of which inode. Inode numbers
/// are those of any file system, so ask only about files that are known to be locked.
pub fn all_lock_holders(inodes: &[u64], byte: i64) -> HashMap<u64, Vec<LockHolder>> {
    let Some(first) = inodes.first() else { return HashMap::new() };
    // One that nobody is known to hold is a reason to look again.
    let unknown = |survey: &LockSurvey| inodes.iter().copied().find(|inode| survey.holders(*inode, byte).is_empty());
    let mut survey = LockSurvey::for_lock(*first, byte);
    if let Some(inode) = unknown(&survey) {
        survey = LockSurvey::for_lock(inode, byte);
    }
    inodes.iter().map(|inode| (*inode, survey.holders(*inode, byte))).collect()
}

/// How long one walk through `/proc` may take: a host may have many thousand processes, and who asks waits.
const WALK: Duration = Duration::from_millis(250);
/// For how many times its own cost a walk answers all who ask: looking again and again, as a program does that is
/// refused and tries again at once, takes a tenth of a processor at most.
const ANSWERS: u32 = 10;

/// All locks of all processes at one moment.
struct LockSurvey {
    begun: Instant,
    cost: Duration,
    /// By inode: first and last locked byte, and who holds it; `None` is this process.
    locks: HashMap<u64, Vec<(i64, i64, Option<LockHolder>)>>,
}

impl LockSurvey {
    /// The last one, if it still holds for this question; else a new one. Whoever comes while one is made waits for it.
    fn for_lock(inode: u64, byte: i64) -> Arc<Self> {
        static LAST: Mutex<Option<Arc<LockSurvey>>> = Mutex::new(None);
        let mut last = LAST.lock();
        if let Some(known) = &*last {
            let is_found = known.all(inode, byte).next().is_some();
            // Who is not found may have come since.
            let holds_for = if is_found { known.cost * ANSWERS } else { known.cost };
            if known.begun.elapsed() < known.cost + holds_for && !known.names_the_dead(inode, byte) {
                return Arc::clone(known);
            }
        }
        Arc::clone(last.insert(Arc::new(Self::new(WALK))))
    }

    /// Looks at all processes, for as long as there is time.
    fn new(limit: Duration) -> Self {
        let begun = Instant::now();
        let mut locks: HashMap<u64, Vec<(i64, i64, Option<LockHolder>)>> = HashMap::new();
        let own = std::process::id();
        for (pid, process) in processes(true).take_while(|_| begun.elapsed() <= limit) {
            let Ok(infos) = fs::read_dir(process.join("fdinfo")) else { continue };
            let mut holder = None;
            for info in infos.flatten().take_while(|_| begun.elapsed() <= limit) {
                let text = fs::read_to_string(info.path()).unwrap_or_default();
                for (inode, first, last) in text.lines().filter_map(lock) {
                    let holder =
                        (pid != own).then(|| holder.get_or_insert_with(|| LockHolder::of(pid, &process)).clone());
                    let held = locks.entry(inode).or_default();
                    if !held.contains(&(first, last, holder.clone())) {
                        held.push((first, last, holder));
                    }
                }
            }
        }
        Self { begun, cost: begun.elapsed(), locks }
    }

    fn all(&self, inode: u64, byte: i64) -> impl Iterator<Item = &Option<LockHolder>> {
        let held = self.locks.get(&inode).into_iter().flatten();
        held.filter(move |(first, last, _)| (*first..=*last).contains(&byte)).map(|(_, _, holder)| holder)
    }

    /// Whether one that held the byte has ended since: another may hold it by now.
    fn names_the_dead(&self, inode: u64, byte: i64) -> bool {
        self.all(inode, byte).flatten().any(|holder| !Path::new(&format!("/proc/{}", holder.pid)).exists())
    }

    /// The other processes that hold a byte.
    fn holders(&self, inode: u64, byte: i64) -> Vec<LockHolder> {
        let mut holders: Vec<LockHolder> = self.all(inode, byte).flatten().cloned().collect();
        holders.sort();
        holders.dedup();
        holders
    }
}

const UNSEEN: &str = "which one cannot be seen from here";

/// The holders of `byte` as part of a sentence, and the virtual machine of one that runs any.
pub(super) fn describe(id: FileId, byte: i64) -> (String, Option<String>) {
    let survey = LockSurvey::for_lock(id.inode, byte);
    let holders = survey.holders(id.inode, byte);
    if holders.is_empty() {
        // Two openings of ours: the older one is of the file as it was before somebody changed it.
        let is_own = survey.all(id.inode, byte).next().is_some();
        let sentence = if is_own { "by this mount, in a disk opened before the file changed" } else { UNSEEN };
        return (sentence.to_string(), None);
    }
    let domain = holders.iter().find_map(|holder| holder.domain.clone());
    (holders.iter().map(LockHolder::to_string).collect::<Vec<_>>().join(", "), domain)
}

pub(super) fn others(is_one: impl Fn(&Path) -> bool) -> Vec<LockHolder> {
    let found = processes(false).filter(|(_, process)| is_one(process));
    let mut holders: Vec<LockHolder> = found.map(|(pid, process)| LockHolder::of(pid, &process)).collect();
    holders.sort();
    holders
}

/// Numbers and directories of all processes, `with_own` among them or not, the newest first: what holds a lock is more
/// often a program of today than one of the system's.
pub(super) fn processes(with_own: bool) -> impl Iterator<Item = (u32, PathBuf)> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable_by(|one, other| other.cmp(one));
    pids.into_iter()
        .filter(move |pid| with_own || *pid != own)
        .map(|pid| (pid, Path::new("/proc").join(pid.to_string())))
}

impl LockHolder {
    pub(super) fn of(pid: u32, process: &Path) -> Self {
        let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
        Self { pid, program: program.trim_end().to_string(), domain: domain(process) }
    }
}

/// The name that a QEMU was given with `-name`.
fn domain(process: &Path) -> Option<String> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    let is_qemu = words.next()?.rsplit(|byte| *byte == b'/').next()?.starts_with(b"qemu");
    domain_of(words.skip_while(|word| *word != b"-name").nth(1).filter(|_| is_qemu)?)
}

/// `guest=web01,debug-threads=on`, or the name alone before the first comma; one within the name is doubled.
fn domain_of(value: &[u8]) -> Option<String> {
    let mut name = Vec::new();
    let mut bytes = value.strip_prefix(b"guest=").unwrap_or(value).iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            break;
        }
        name.push(byte);
    }
    let name = String::from_utf8_lossy(&name).into_owned();
    (!name.is_empty() && !name.contains(char::is_control)).then_some(name)
}

/// What a line of fdinfo says is locked: inode, first and last byte.
/// `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 101`.
fn lock(line: &str) -> Option<(u64, i64, i64)> {
    let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [.., file, first, last] = words.as_slice() else { return None };
    let last = if *last == "EOF" { i64::MAX } else { last.parse().ok()? };
    Some((file.rsplit(':').next()?.parse().ok()?, first.parse().ok()?, last))
}

#[cfg(test)]
mod tests {
    use super::super::FileLock;
    use super::super::file::FileStat;
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn a_domain_is_what_qemu_was_called() {
        let name = |value: &str| domain_of(value.as_bytes());
        assert_eq!(name("guest=web01,debug-threads=on").as_deref(), Some("web01"));
        assert_eq!(name("web01").as_deref(), Some("web01"));
        assert_eq!(name("guest=a,,b,process=x").as_deref(), Some("a,b"));
        assert_eq!(name(""), None);
    }

    #[test]
    fn a_lock_line_names_file_and_range() {
        let line = "lock:\t3: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 103";
        assert_eq!(lock(line), Some((1234, 101, 103)));
        assert_eq!(lock("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 0 EOF"), Some((9, 0, i64::MAX)));
        assert_eq!(lock("pos:\t0"), None);
        assert_eq!(lock("lock:\t1: OFDLCK ADVISORY READ -1 fe:00:x 1 2"), None);
    }

    #[test]
    fn one_walk_answers_many_who_ask_and_who_is_not_found_is_looked_for_again() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let file = std::fs::File::options().read(true).write(true).open(place.path()).unwrap();
        let id = FileStat::of(&file).unwrap().id;
        let claim = FileLock::take(OwnedFd::from(file), place.path(), Duration::ZERO).unwrap();
        let own = |survey: &LockSurvey| survey.all(id.inode, 0).next().is_some();
        // Another test's walk may have begun before the claim was there.
        let found =
            (0..1000).map(|_| LockSurvey::for_lock(id.inode, 0)).find(|survey| own(survey)).expect("our own lock");
        assert!(found.holders(id.inode, 0).is_empty(), "this process is nobody else");
        let again: Vec<_> = (0..20).map(|_| LockSurvey::for_lock(id.inode, 0)).collect();
        assert!(again.windows(2).filter(|pair| !Arc::ptr_eq(&pair[0], &pair[1])).count() < 10, "few walks for many");
        drop(claim);
    }

    #[test]
    fn a_walk_ends_when_its_time_is_over() {
        assert!(LockSurvey::new(Duration::ZERO).locks.is_empty());
    }
}
