//! Finds the holders of a lock in `/proc`: process, program, and the virtual machine that it runs.
//!
//! Only for messages: the answer may be outdated, and lacks processes of other users. The cost is bounded:
//! one thread at a time walks `/proc`, for a limited time, and its result answers all concurrent requests.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::backend::LockOwners;
use super::object::ObjectId;

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LockHolder {
    /// Process id.
    pub pid: u32,
    /// Its program's name as `/proc/PID/comm` says.
    pub program: String,
    /// The name of the virtual machine that it runs, from QEMU's command line.
    pub domain: Option<String>,
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.program, self.pid)?;
        self.domain.as_ref().map_or(Ok(()), |domain| write!(f, " of domain {domain}"))
    }
}

/// The other processes that hold a lock on `byte`, for many files at once: by file. Inode numbers of
/// different file systems are not told apart, so ask only about files that are known to be locked.
pub fn all_lock_holders(ids: &[ObjectId], byte: i64) -> HashMap<ObjectId, Vec<LockHolder>> {
    let inodes: Vec<u64> = ids.iter().map(|id| id.number()).collect();
    let Some(first) = inodes.first() else { return HashMap::new() };
    // A lock without a known holder is a reason for a new survey.
    let unknown =
        |survey: &LockSurvey| inodes.iter().copied().find(|inode| survey.holders(*inode, byte).is_empty());
    let mut survey = LockSurvey::for_lock(*first, byte);
    if let Some(inode) = unknown(&survey) {
        survey = LockSurvey::for_lock(inode, byte);
    }
    ids.iter().map(|id| (*id, survey.holders(id.number(), byte))).collect()
}

/// Time limit of one walk through `/proc`: a host may have many thousand processes, and the caller waits.
const SURVEY_TIME_LIMIT: Duration = Duration::from_millis(250);
/// A survey stays valid for this many times its own duration: a program that retries in a loop then costs at
/// most a tenth of a processor.
const VALIDITY_FACTOR: u32 = 10;

/// All locks of all processes at one moment.
struct LockSurvey {
    begun: Instant,
    cost: Duration,
    /// By inode: first and last locked byte, and the holder; `None` is this process.
    locks: HashMap<u64, Vec<(i64, i64, Option<LockHolder>)>>,
}

impl LockSurvey {
    /// The last survey, if it is still valid for this lock; else a new one. Callers wait for a survey in
    /// progress.
    fn for_lock(inode: u64, byte: i64) -> Arc<Self> {
        static LAST: Mutex<Option<Arc<LockSurvey>>> = Mutex::new(None);
        let mut last = LAST.lock();
        if let Some(known) = &*last {
            let is_found = known.all(inode, byte).next().is_some();
            // A holder that is not found may have locked the file after the survey.
            let holds_for = if is_found { known.cost * VALIDITY_FACTOR } else { known.cost };
            if known.begun.elapsed() < known.cost + holds_for && !known.has_ended_holder(inode, byte) {
                return Arc::clone(known);
            }
        }
        Arc::clone(last.insert(Arc::new(Self::new(SURVEY_TIME_LIMIT))))
    }

    /// Surveys all processes within the time limit.
    fn new(limit: Duration) -> Self {
        let begun = Instant::now();
        let mut locks: HashMap<u64, Vec<(i64, i64, Option<LockHolder>)>> = HashMap::new();
        let own = std::process::id();
        for (pid, process) in processes(OwnProcess::Included).take_while(|_| begun.elapsed() <= limit) {
            let Ok(infos) = fs::read_dir(process.join("fdinfo")) else { continue };
            let mut holder = None;
            for info in infos.flatten().take_while(|_| begun.elapsed() <= limit) {
                let text = fs::read_to_string(info.path()).unwrap_or_default();
                for LockLine { inode, first, last } in text.lines().filter_map(lock) {
                    let holder = (pid != own)
                        .then(|| holder.get_or_insert_with(|| LockHolder::of(pid, &process)).clone());
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

    /// Whether a holder of the byte has ended since: another process may hold it now.
    fn has_ended_holder(&self, inode: u64, byte: i64) -> bool {
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

const UNIDENTIFIED: &str = "which cannot be identified from here";

/// The holders of `byte`.
pub(super) fn owners(id: ObjectId, byte: i64) -> LockOwners {
    let survey = LockSurvey::for_lock(id.number(), byte);
    let holders = survey.holders(id.number(), byte);
    if holders.is_empty() {
        // This process holds the lock: an older open of the file from before it was changed.
        let is_own = survey.all(id.number(), byte).next().is_some();
        let sentence =
            if is_own { "by this mount, for a disk opened before the file changed" } else { UNIDENTIFIED };
        return LockOwners { text: sentence.to_string(), ..LockOwners::default() };
    }
    let domain = holders.iter().find_map(|holder| holder.domain.clone());
    let text = holders.iter().map(LockHolder::to_string).collect::<Vec<_>>().join(", ");
    LockOwners { text, domain, processes: holders }
}

pub(super) fn others(is_one: impl Fn(&Path) -> bool) -> Vec<LockHolder> {
    let found = processes(OwnProcess::Excluded).filter(|(_, process)| is_one(process));
    let mut holders: Vec<LockHolder> = found.map(|(pid, process)| LockHolder::of(pid, &process)).collect();
    holders.sort();
    holders
}

/// Whether this process counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnProcess {
    /// It does.
    Included,
    /// It does not.
    Excluded,
}

/// Ids and directories of all processes, newest first, with or without this one: recently started programs
/// hold locks more often than system services.
pub(super) fn processes(own: OwnProcess) -> impl Iterator<Item = (u32, PathBuf)> {
    let this = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable_by(|one, other| other.cmp(one));
    pids.into_iter()
        .filter(move |pid| own == OwnProcess::Included || *pid != this)
        .map(|pid| (pid, Path::new("/proc").join(pid.to_string())))
}

impl LockHolder {
    pub(super) fn of(pid: u32, process: &Path) -> Self {
        let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
        Self { pid, program: program.trim_end().to_string(), domain: domain(process) }
    }
}

/// The name given to QEMU with `-name`.
fn domain(process: &Path) -> Option<String> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    let is_qemu = words.next()?.rsplit(|byte| *byte == b'/').next()?.starts_with(b"qemu");
    domain_of(words.skip_while(|word| *word != b"-name").nth(1).filter(|_| is_qemu)?)
}

/// Parses `guest=web01,debug-threads=on`, or the name alone before the first comma; a comma in the name is
/// doubled.
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

/// A lock of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockLine {
    /// The file's inode number.
    pub(super) inode: u64,
    /// The first byte.
    pub(super) first: i64,
    /// The last byte.
    pub(super) last: i64,
}

/// Parses a lock line of fdinfo: `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 101`.
pub(super) fn lock(line: &str) -> Option<LockLine> {
    let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [.., file, first, last] = words.as_slice() else { return None };
    let last = if *last == "EOF" { i64::MAX } else { last.parse().ok()? };
    Some(LockLine { inode: file.rsplit(':').next()?.parse().ok()?, first: first.parse().ok()?, last })
}

#[cfg(test)]
mod tests {
    use super::super::FileLock;
    use super::super::local::LocalOpenFile;
    use super::super::object::ObjectStat;
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn a_domain_is_the_name_given_to_qemu() {
        let name = |value: &str| domain_of(value.as_bytes());
        assert_eq!(name("guest=web01,debug-threads=on").as_deref(), Some("web01"));
        assert_eq!(name("web01").as_deref(), Some("web01"));
        assert_eq!(name("guest=a,,b,process=x").as_deref(), Some("a,b"));
        assert_eq!(name(""), None);
    }

    #[test]
    fn a_lock_line_names_file_and_range() {
        let line = "lock:\t3: OFDLCK  ADVISORY  READ -1 fe:00:1234 101 103";
        let of = |inode, first, last| Some(LockLine { inode, first, last });
        assert_eq!(lock(line), of(1234, 101, 103));
        assert_eq!(lock("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 0 EOF"), of(9, 0, i64::MAX));
        assert_eq!(lock("pos:\t0"), None);
        assert_eq!(lock("lock:\t1: OFDLCK ADVISORY READ -1 fe:00:x 1 2"), None);
    }

    #[test]
    fn one_survey_answers_many_and_a_missing_holder_starts_another() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let file = std::fs::File::options().read(true).write(true).open(place.path()).unwrap();
        let id = ObjectStat::of(&file).unwrap().id;
        let file = Arc::new(LocalOpenFile::new(OwnedFd::from(file), place.path()));
        let claim = FileLock::take(file, place.path(), Duration::ZERO).unwrap();
        let own = |survey: &LockSurvey| survey.all(id.number(), 0).next().is_some();
        // Another test's survey may have begun before the lock was taken.
        let found = (0..1000)
            .map(|_| LockSurvey::for_lock(id.number(), 0))
            .find(|survey| own(survey))
            .expect("our own lock");
        assert!(found.holders(id.number(), 0).is_empty(), "this process is not listed as another one");
        let again: Vec<_> = (0..20).map(|_| LockSurvey::for_lock(id.number(), 0)).collect();
        assert!(
            again.windows(2).filter(|pair| !Arc::ptr_eq(&pair[0], &pair[1])).count() < 10,
            "few walks for many"
        );
        drop(claim);
    }

    #[test]
    fn a_survey_ends_at_its_time_limit() {
        assert!(LockSurvey::new(Duration::ZERO).locks.is_empty());
    }
}
