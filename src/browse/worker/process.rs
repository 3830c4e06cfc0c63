//! The daemon's side of a worker: begun when it is needed, watched, ended when it hangs, begun again.
//!
//! Promises: whatever a worker does, who asks it gets an answer or an error, and within a bounded time; what one request
//! does to a worker costs others nothing but time. The worker is given bytes of the disks of the set in question, and nothing else.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::io::Reclaimable;

use super::channel::Channel;
use super::pool::{Permit, Pool};
use super::protocol::{Answer, CHUNK, ChunkKey, Failure, FromWorker, GROUP, Request, ToWorker};

/// The word that makes the program a worker.
pub const WORKER: &str = "guest-worker";
/// The word that keeps a worker from being confined by seccomp.
pub const WITHOUT_SECCOMP: &str = "--without-seccomp";

/// How often it is asked whether a worker still gets anywhere.
const GLANCE: Duration = Duration::from_millis(250);
/// Processor time that an ordinary question may cost, and one that looks at a whole disk.
const USUAL: Duration = Duration::from_secs(2);
const LARGE: Duration = Duration::from_secs(30);
/// How long a worker may be silent, busy or not.
const SILENCE: Duration = Duration::from_mins(1);
/// How long one question may keep whoever asks waiting for the worker, however often that says something: where a machine
/// has much else to do, a worker gets a small part of a processor.
const USUAL_WAIT: Duration = Duration::from_mins(1);
const LARGE_WAIT: Duration = Duration::from_mins(5);
/// Bytes that one question may need of the disks: a journal, at most.
const FETCHED: u64 = 8 << 30;

/// How workers are begun.
#[derive(Clone, Debug)]
pub struct WorkerProgram {
    /// This program.
    pub path: PathBuf,
    /// Whether workers are confined by seccomp.
    pub seccomp: bool,
}

impl WorkerProgram {
    /// This program, whatever has become of its file since it was started.
    pub fn this(seccomp: bool) -> Self {
        Self { path: "/proc/self/exe".into(), seccomp }
    }
}

/// The disks of a set, as those who answer a worker see them.
pub(in crate::browse) trait Disks {
    /// The keys of chunks of a disk.
    fn keys(&self, disk: u32, first: u64, count: u64) -> Result<Vec<ChunkKey>>;
    /// Bytes of a disk; the range may lie anywhere.
    fn read(&self, disk: u32, at: u64, buf: &mut [u8]) -> Result<()>;
}

/// A worker, running or not.
#[derive(Debug)]
pub(in crate::browse) struct Worker {
    pool: Arc<Pool>,
    /// This very worker, for those who end what is idle.
    me: Weak<Self>,
    /// Whether it was asked since the search for something to end last looked.
    is_used: AtomicBool,
    state: Mutex<ProcessState>,
    /// Held while a view is looked into for the first time: once. Other chains' views do not wait for what this one's guest has written.
    pub(in crate::browse) first: Mutex<()>,
}

#[derive(Debug)]
struct ProcessState {
    process: Option<Arc<WorkerProcess>>,
    used: Instant,
}

#[derive(Debug)]
struct WorkerProcess {
    child: Mutex<Child>,
    id: u32,
    lanes: [Mutex<Channel>; 2],
    /// Nothing is ever said on it: its other end tells the worker that the daemon is no more.
    _life: UnixStream,
    turn: AtomicUsize,
    is_gone: AtomicBool,
    /// Given back when all of the above has gone.
    _permit: Permit,
}

/// A process that is not ended because nobody asks it anything.
pub(in crate::browse) struct Kept {
    _process: Arc<WorkerProcess>,
}

/// What one question may cost.
#[derive(Clone, Copy, Debug)]
struct RequestLimits {
    /// Of the processors.
    spent: Duration,
    /// Of the time of whoever asks, but for what the disks take.
    waited: Duration,
}

/// Why there is no answer.
enum WorkerFailure {
    /// The worker has ended, or says what makes no sense.
    Gone(io::Error),
    /// It was ended because of this question.
    Ended(Error),
}

impl Worker {
    pub(in crate::browse) fn new(pool: &Arc<Pool>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            pool: Arc::clone(pool),
            me: Weak::clone(me),
            is_used: AtomicBool::new(false),
            state: Mutex::new(ProcessState { process: None, used: Instant::now() }),
            first: Mutex::new(()),
        })
    }

    /// Asks. A worker that ends meanwhile is begun anew, once: it may have been another question that ended it.
    pub(in crate::browse) fn ask(&self, request: &Request, disks: &dyn Disks) -> Result<(Answer, Vec<u8>)> {
        let mut is_again = false;
        loop {
            let process = self.process()?;
            match process.ask(request, disks) {
                Ok(answered) => {
                    self.state.lock().used = Instant::now();
                    return answered;
                }
                Err(WorkerFailure::Ended(error)) => {
                    self.discard(&process);
                    tracing::warn!("{error}");
                    return Err(error);
                }
                Err(WorkerFailure::Gone(error)) => {
                    self.discard(&process);
                    tracing::warn!("a worker that reads guests' file systems has ended: {error}");
                    if is_again {
                        let fact = "what reads guests' file systems has ended twice over this; the disk may be damaged";
                        return Err(Error::new(ErrorKind::Io, fact));
                    }
                    is_again = true;
                }
            }
        }
    }

    /// Keeps the process from being ended for another worker's sake, until dropped: for who asks several things of which one goes by the other.
    pub(in crate::browse) fn hold(&self) -> Result<Kept> {
        Ok(Kept { _process: self.process()? })
    }

    /// Ends the process if nobody has asked it anything for that long; whether that was so.
    pub(in crate::browse) fn rest(&self, idle: Duration) -> bool {
        // Who begins it keeps it, and is not waited for.
        let Some(mut state) = self.state.try_lock() else { return false };
        if state.used.elapsed() < idle {
            return false;
        }
        // Whoever is asking it has it, too.
        let Some(process) = state.process.take_if(|process| Arc::strong_count(process) == 1) else { return false };
        drop(state);
        process.end();
        true
    }

    /// Whether it runs, or somebody is just beginning it.
    pub(in crate::browse) fn may_run(&self) -> bool {
        self.state.try_lock().is_none_or(|state| state.process.is_some())
    }

    /// For how long nobody has asked it anything; `None` if it does not run or is being asked.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let state = self.state.try_lock()?;
        let is_idle = state.process.as_ref().is_some_and(|process| Arc::strong_count(process) == 1);
        is_idle.then(|| state.used.elapsed())
    }

    fn process(&self) -> Result<Arc<WorkerProcess>> {
        self.is_used.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.used = Instant::now();
        if let Some(process) = &state.process {
            return Ok(Arc::clone(process));
        }
        let me = self.me.upgrade().expect("whoever asks has it");
        let mut begun = WorkerProcess::begin(&self.pool.program, self.pool.admit(&me)?);
        // There may be no more processes because of those that only wait to be asked.
        if begun.as_ref().is_err_and(|error| error.kind() == ErrorKind::Exhausted) && self.pool.end_one(Duration::ZERO)
        {
            begun = WorkerProcess::begin(&self.pool.program, self.pool.admit(&me)?);
        }
        let process = Arc::new(begun?);
        state.used = Instant::now();
        state.process = Some(Arc::clone(&process));
        Ok(process)
    }

    fn discard(&self, process: &Arc<WorkerProcess>) {
        let mut state = self.state.lock();
        if state.process.as_ref().is_some_and(|current| Arc::ptr_eq(current, process)) {
            state.process = None;
        }
        drop(state);
        process.end();
    }
}

impl Reclaimable for Worker {
    fn was_used(&self) -> bool {
        self.is_used.swap(false, Ordering::Relaxed)
    }

    fn reclaim(&self, _even_locked: bool) -> bool {
        self.rest(Duration::ZERO)
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.end();
    }
}

impl WorkerProcess {
    fn begin(program: &WorkerProgram, permit: Permit) -> Result<Self> {
        /// One at a time: it takes some more descriptors until the other end of each has gone.
        static BEGINNING: Mutex<()> = Mutex::new(());
        let fail = |error| Error::beginning("starting a worker that reads guests' file systems", error);
        let _one = BEGINNING.lock();
        let (first, first_end) = UnixStream::pair().map_err(fail)?;
        let (second, second_end) = UnixStream::pair().map_err(fail)?;
        let (life, life_end) = UnixStream::pair().map_err(fail)?;
        for lane in [&first, &second] {
            lane.set_read_timeout(Some(GLANCE)).map_err(fail)?;
            lane.set_write_timeout(Some(SILENCE)).map_err(fail)?;
        }
        let mut command = Command::new(&program.path);
        command.arg0("chainfs").arg(WORKER).env_clear().current_dir("/");
        if !program.seccomp {
            command.arg(WITHOUT_SECCOMP);
        }
        let child = command
            .stdin(Stdio::from(OwnedFd::from(first_end)))
            .stdout(Stdio::from(OwnedFd::from(second_end)))
            .stderr(Stdio::from(OwnedFd::from(life_end)))
            .spawn()
            .map_err(fail)?;
        let id = child.id();
        let lanes = [first, second].map(|lane| Mutex::new(Channel::new(lane)));
        let (turn, is_gone) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Self { child: Mutex::new(child), id, lanes, _life: life, turn, is_gone, _permit: permit })
    }

    fn end(&self) {
        if !self.is_gone.swap(true, Ordering::AcqRel) {
            let mut child = self.child.lock();
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// A lane that nobody else is on, and its number.
    fn lane(&self) -> (MutexGuard<'_, Channel>, usize) {
        // Where none is free, they wait by turns.
        let free = self.lanes.iter().enumerate().find_map(|(number, lane)| Some((lane.try_lock()?, number)));
        free.unwrap_or_else(|| {
            let number = self.turn.fetch_add(1, Ordering::Relaxed) % self.lanes.len();
            (self.lanes[number].lock(), number)
        })
    }

    /// One conversation.
    fn ask(
        &self,
        request: &Request,
        disks: &dyn Disks,
    ) -> std::result::Result<Result<(Answer, Vec<u8>)>, WorkerFailure> {
        let (mut lane, number) = self.lane();
        if self.is_gone.load(Ordering::Acquire) {
            return Err(WorkerFailure::Gone(io::ErrorKind::BrokenPipe.into()));
        }
        let is_large = !matches!(
            request,
            Request::Lookup(..)
                | Request::List(..)
                | Request::Attributes(..)
                | Request::ReadLink(..)
                | Request::OpenFile(..)
                | Request::Runs(..)
                | Request::Read(..)
                | Request::ExtendedAttributes(..)
        );
        let limits = if is_large {
            RequestLimits { spent: LARGE, waited: LARGE_WAIT }
        } else {
            RequestLimits { spent: USUAL, waited: USUAL_WAIT }
        };
        converse(&mut lane, request, disks, limits, &|| processor_time(self.id, &lane_name(number)))
    }
}

/// What the thread is called that serves a lane.
pub(super) fn lane_name(number: usize) -> String {
    format!("lane {number}")
}

/// What a process's thread of that name has used of the processors: whoever asks on one lane does not pay for what is asked on
/// another. What the whole process has used, before it has such a thread.
fn processor_time(process: u32, thread: &str) -> Duration {
    /// The unit of /proc's times, on every architecture that Linux has.
    const TICK: Duration = Duration::from_millis(10);
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let mut stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let whole = || std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let stat = stats.find(|stat| stat.contains(&format!("({thread}) "))).unwrap_or_else(whole);
    // The program's name stands in parentheses and may hold anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks: u32 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    TICK * ticks
}

/// Asks, and answers what the worker asks back, until it answers.
fn converse(
    lane: &mut Channel,
    request: &Request,
    disks: &dyn Disks,
    limits: RequestLimits,
    processor_time: &dyn Fn() -> Duration,
) -> std::result::Result<Result<(Answer, Vec<u8>)>, WorkerFailure> {
    // Asked only of those that take their time: most do not.
    let mut begun = None;
    let mut spent = || {
        let now = processor_time();
        now.saturating_sub(*begun.get_or_insert(now))
    };
    let (mut fetched, mut waited, mut looked) = (0, Duration::ZERO, Instant::now());
    let (mut reply, mut bytes) = (ToWorker::Request(request.clone()), Vec::new());
    loop {
        let asked = Instant::now();
        let mut patience = || {
            let mut is_too_long = asked.elapsed() > SILENCE || waited + asked.elapsed() > limits.waited;
            if looked.elapsed() > GLANCE {
                looked = Instant::now();
                is_too_long |= spent() > limits.spent;
            }
            if is_too_long { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        };
        lane.send(&reply, &bytes).map_err(WorkerFailure::Gone)?;
        let received = lane.receive::<FromWorker>(&mut patience);
        // A conversation that never ends is made of short answers, too.
        let received = received.and_then(|found| match found.0 {
            FromWorker::Answer(_) => Ok(found),
            FromWorker::Locate { .. } | FromWorker::Read { .. } => patience().map(|()| found),
        });
        let (message, payload) = received.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => WorkerFailure::Ended(too_long()),
            _ => WorkerFailure::Gone(error),
        })?;
        waited += asked.elapsed();
        bytes.clear();
        reply = match message {
            FromWorker::Answer(answer) => {
                return Ok(answer.map_err(|failure| failure.error()).map(|answer| (answer, payload)));
            }
            FromWorker::Locate { disk, first, count } => match disks.keys(disk, first, count.min(GROUP)) {
                Ok(keys) => ToWorker::Keys(keys),
                Err(error) => ToWorker::Refused(Failure::of(&error)),
            },
            FromWorker::Read { disk, at, len } => {
                bytes.resize(u64::from(len).min(CHUNK) as usize, 0);
                fetched += bytes.len() as u64;
                if fetched > FETCHED {
                    return Err(WorkerFailure::Ended(too_long()));
                }
                match disks.read(disk, at, &mut bytes) {
                    Ok(()) => ToWorker::Bytes,
                    Err(error) => {
                        bytes.clear();
                        ToWorker::Refused(Failure::of(&error))
                    }
                }
            }
        };
    }
}

fn too_long() -> Error {
    let fact = "reading a guest's file system took too long and was broken off; the disk may be damaged";
    Error::new(ErrorKind::Io, fact)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browse::worker::protocol::VolumeId;
    use crate::guest::Ino;

    /// Disks that have whatever is asked for.
    struct All;

    impl Disks for All {
        fn keys(&self, _disk: u32, _first: u64, count: u64) -> Result<Vec<ChunkKey>> {
            Ok(vec![ChunkKey::ZERO; count as usize])
        }

        fn read(&self, _disk: u32, _at: u64, _buf: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    /// What becomes of a question to a worker that uses no processor and does `work` on its end of the lane.
    fn asked(work: impl FnOnce(UnixStream) + Send + 'static) -> WorkerFailure {
        let (lane, end) = UnixStream::pair().unwrap();
        lane.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let worker = std::thread::spawn(move || work(end));
        let request = Request::Attributes(VolumeId { set: 1, volume: 0 }, Ino(2));
        let limits = RequestLimits { spent: Duration::from_secs(1), waited: Duration::from_millis(300) };
        let begun = Instant::now();
        let answer = converse(&mut Channel::new(lane), &request, &All, limits, &|| Duration::ZERO);
        assert!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
        worker.join().unwrap();
        answer.expect_err("there is none")
    }

    #[test]
    fn each_lane_has_a_time_of_its_own() {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |number: usize, is_busy: bool| {
            let stop = Arc::clone(&stop);
            let work = move || {
                while !stop.load(Ordering::Relaxed) {
                    if !is_busy {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            };
            std::thread::Builder::new().name(lane_name(number)).spawn(work).unwrap()
        };
        let threads = [thread(77, true), thread(78, false)];
        let begun = Instant::now();
        let spent = |number| processor_time(std::process::id(), &lane_name(number));
        while spent(77) < Duration::from_millis(200) {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(spent(78) < Duration::from_millis(100), "{:?}", spent(78));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_worker_that_sends_byte_by_byte_is_not_waited_for() {
        let trouble = asked(|mut end| {
            use io::Write as _;
            // A message of a mebibyte, which takes days.
            let _ = end.write_all(&[0, 0, 16, 0, 0, 0, 0, 0]);
            while end.write_all(&[0]).is_ok() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        assert!(matches!(trouble, WorkerFailure::Ended(_)));
    }

    #[test]
    fn a_worker_that_asks_back_for_ever_is_not_answered_for_ever() {
        let trouble = asked(|end| {
            let mut lane = Channel::new(end);
            let question = FromWorker::Locate { disk: 0, first: 0, count: 1 };
            while lane.receive::<ToWorker>(&mut || Ok(())).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
                if lane.send(&question, &[]).is_err() {
                    break;
                }
            }
        });
        assert!(matches!(trouble, WorkerFailure::Ended(_)));
    }
}
