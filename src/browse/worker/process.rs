//! The daemon's side of a worker: starts it on demand, watches it, kills it when it hangs, and restarts it.
//!
//! Promises: whatever a worker does, each request gets an answer or an error within a bounded time; the
//! effect of one request on a worker costs other requests only time. A worker receives bytes of the disks of
//! the requested set, and nothing else.

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
use crate::io::{Reclaim, Reclaimable};

use super::channel::Channel;
use super::pool::{Permit, Pool};
use super::protocol::{Answer, CHUNK, ChunkKey, Failure, FromWorker, GROUP, Request, ToWorker};

/// The argument that makes the program a worker.
pub const WORKER: &str = "guest-worker";
/// The argument that disables a worker's seccomp filter.
pub const WITHOUT_SECCOMP: &str = "--without-seccomp";
/// The argument that gives a worker the memory to derive keys.
pub const UNLOCKS: &str = "--unlocks";

/// How often the progress of a worker is checked.
const CHECK_PERIOD: Duration = Duration::from_millis(250);
/// Processor time of an ordinary request, and of one that reads a whole disk.
const USUAL: Duration = Duration::from_secs(2);
const LARGE: Duration = Duration::from_secs(30);
/// Processor time of deriving keys: minutes, as a container's header may demand.
const UNLOCKING: Duration = Duration::from_mins(3);
/// How long a worker may be silent, busy or not.
const SILENCE: Duration = Duration::from_mins(1);
/// How long one request may wait for the worker, however often the worker sends something: on a busy machine
/// a worker gets a small share of a processor.
const USUAL_WAIT: Duration = Duration::from_mins(1);
const LARGE_WAIT: Duration = Duration::from_mins(5);
const UNLOCKING_WAIT: Duration = Duration::from_mins(10);
/// Bytes that one request may read from the disks: a journal at most.
const FETCHED: u64 = 8 << 30;

/// How workers are started.
#[derive(Clone, Debug)]
pub struct WorkerProgram {
    /// This program.
    pub path: PathBuf,
    /// Whether workers are confined by seccomp.
    pub seccomp: bool,
}

impl WorkerProgram {
    /// This program, even if its file was replaced since it was started.
    pub fn this(seccomp: bool) -> Self {
        Self { path: "/proc/self/exe".into(), seccomp }
    }
}

/// What a worker is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerTask {
    /// To read guests' disks.
    Read,
    /// To derive the keys of one encrypted volume; it ends with that.
    Unlock,
}

/// The disks of a set, as the handler of a worker's requests sees them.
pub(in crate::browse) trait Disks {
    /// The keys of chunks of a disk.
    fn keys(&self, disk: u32, first: u64, count: u64) -> Result<Vec<ChunkKey>>;
    /// Bytes of a disk; the range is not validated yet.
    fn read(&self, disk: u32, at: u64, buf: &mut [u8]) -> Result<()>;
}

/// A worker, running or not.
#[derive(Debug)]
pub(in crate::browse) struct Worker {
    pool: Arc<Pool>,
    task: WorkerTask,
    /// This worker itself, for the pool.
    this: Weak<Self>,
    /// Whether it was used since the last search for reclaimable descriptors.
    is_used: AtomicBool,
    state: Mutex<ProcessState>,
    /// Held while a view is opened for the first time, so that it is opened once. Views of other chains do
    /// not wait for this guest's data.
    pub(in crate::browse) opening: Mutex<()>,
}

#[derive(Debug)]
struct ProcessState {
    process: Option<Arc<WorkerProcess>>,
    last_used: Instant,
}

#[derive(Debug)]
struct WorkerProcess {
    child: Mutex<Child>,
    id: u32,
    channels: [Mutex<Channel>; 2],
    /// Carries no data: it tells the worker's end when the daemon exits.
    _life: UnixStream,
    next_channel: AtomicUsize,
    is_killed: AtomicBool,
    /// Released when everything above is dropped.
    _permit: Permit,
}

/// Keeps a process from being stopped as idle.
pub(in crate::browse) struct WorkerHold {
    _process: Arc<WorkerProcess>,
}

/// The limits of one request.
#[derive(Clone, Copy, Debug)]
struct RequestLimits {
    /// Processor time.
    spent: Duration,
    /// Wall-clock time, without the time that the disks take.
    waited: Duration,
    /// Wall-clock time without a message.
    silent: Duration,
}

/// Why a request has no answer.
enum WorkerFailure {
    /// The worker has exited, or violated the protocol.
    Gone(io::Error),
    /// The worker was killed because of this request.
    Killed(Error),
}

impl Worker {
    pub(in crate::browse) fn new(pool: &Arc<Pool>) -> Arc<Self> {
        Self::for_task(pool, WorkerTask::Read)
    }

    /// A worker for one request to unlock a volume. What stops it is `Limit`.
    pub(in crate::browse) fn unlocker(pool: &Arc<Pool>) -> Arc<Self> {
        Self::for_task(pool, WorkerTask::Unlock)
    }

    fn for_task(pool: &Arc<Pool>, task: WorkerTask) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            pool: Arc::clone(pool),
            task,
            this: Weak::clone(this),
            is_used: AtomicBool::new(false),
            state: Mutex::new(ProcessState { process: None, last_used: Instant::now() }),
            opening: Mutex::new(()),
        })
    }

    /// Sends a request. If the worker exits meanwhile, it is restarted once: another request may have caused
    /// the exit.
    pub(in crate::browse) fn ask(&self, request: &Request, disks: &dyn Disks) -> Result<(Answer, Vec<u8>)> {
        let mut is_retry = false;
        loop {
            let process = self.process()?;
            match process.ask(request, disks) {
                Ok(answered) => {
                    self.state.lock().last_used = Instant::now();
                    return answered;
                }
                Err(WorkerFailure::Killed(error)) => {
                    self.discard(&process);
                    tracing::warn!("{error}");
                    return Err(error);
                }
                Err(WorkerFailure::Gone(error)) => {
                    self.discard(&process);
                    tracing::warn!("a file-system worker exited unexpectedly: {error}");
                    if self.task == WorkerTask::Unlock {
                        let fact = "deriving its key needed more memory than there is, or failed";
                        return Err(Error::new(ErrorKind::Limit, fact));
                    }
                    if is_retry {
                        let fact =
                            "the file-system worker crashed twice on this request; the disk may be damaged";
                        return Err(Error::new(ErrorKind::Io, fact));
                    }
                    is_retry = true;
                }
            }
        }
    }

    /// Keeps the process from being stopped for another worker until dropped: for a sequence of requests of
    /// which one depends on another.
    pub(in crate::browse) fn hold(&self) -> Result<WorkerHold> {
        Ok(WorkerHold { _process: self.process()? })
    }

    /// Stops the process if it had no request for `idle`; returns whether it did.
    pub(in crate::browse) fn stop_if_idle(&self, idle: Duration) -> bool {
        // A thread that starts the process holds the lock and keeps the process; it is not waited for.
        let Some(mut state) = self.state.try_lock() else { return false };
        if state.last_used.elapsed() < idle {
            return false;
        }
        // A request in progress holds the process, too.
        let Some(process) = state.process.take_if(|process| Arc::strong_count(process) == 1) else {
            return false;
        };
        drop(state);
        process.kill();
        true
    }

    /// Whether it runs or is being started.
    pub(in crate::browse) fn may_be_running(&self) -> bool {
        self.state.try_lock().is_none_or(|state| state.process.is_some())
    }

    /// The time since its last request; `None` if it does not run or has a request in progress.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let state = self.state.try_lock()?;
        let is_idle = state.process.as_ref().is_some_and(|process| Arc::strong_count(process) == 1);
        is_idle.then(|| state.last_used.elapsed())
    }

    fn process(&self) -> Result<Arc<WorkerProcess>> {
        self.is_used.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.last_used = Instant::now();
        if let Some(process) = &state.process {
            return Ok(Arc::clone(process));
        }
        let this = self.this.upgrade().expect("the caller holds it");
        let mut started = WorkerProcess::start(&self.pool.program, self.task, self.pool.admit(&this)?);
        // Idle workers may have used up the limit of processes.
        if started.as_ref().is_err_and(|error| error.kind() == ErrorKind::Exhausted)
            && self.pool.stop_one_idle(Duration::ZERO)
        {
            started = WorkerProcess::start(&self.pool.program, self.task, self.pool.admit(&this)?);
        }
        let process = Arc::new(started?);
        state.last_used = Instant::now();
        state.process = Some(Arc::clone(&process));
        Ok(process)
    }

    fn discard(&self, process: &Arc<WorkerProcess>) {
        let mut state = self.state.lock();
        if state.process.as_ref().is_some_and(|current| Arc::ptr_eq(current, process)) {
            state.process = None;
        }
        drop(state);
        process.kill();
    }
}

impl Reclaimable for Worker {
    fn was_used(&self) -> bool {
        self.is_used.swap(false, Ordering::Relaxed)
    }

    fn reclaim(&self, _which: Reclaim) -> bool {
        self.stop_if_idle(Duration::ZERO)
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

impl WorkerProcess {
    fn start(program: &WorkerProgram, task: WorkerTask, permit: Permit) -> Result<Self> {
        /// One at a time: a start takes more descriptors until the other ends are closed.
        static STARTING: Mutex<()> = Mutex::new(());
        let fail = |error| Error::beginning("starting a file-system worker", error);
        let _one = STARTING.lock();
        let (first, first_end) = UnixStream::pair().map_err(fail)?;
        let (second, second_end) = UnixStream::pair().map_err(fail)?;
        let (life, life_end) = UnixStream::pair().map_err(fail)?;
        for channel in [&first, &second] {
            channel.set_read_timeout(Some(CHECK_PERIOD)).map_err(fail)?;
            channel.set_write_timeout(Some(SILENCE)).map_err(fail)?;
        }
        let mut command = Command::new(&program.path);
        command.arg0("chainfs").arg(WORKER).env_clear().current_dir("/");
        if !program.seccomp {
            command.arg(WITHOUT_SECCOMP);
        }
        if task == WorkerTask::Unlock {
            command.arg(UNLOCKS);
        }
        let child = command
            .stdin(Stdio::from(OwnedFd::from(first_end)))
            .stdout(Stdio::from(OwnedFd::from(second_end)))
            .stderr(Stdio::from(OwnedFd::from(life_end)))
            .spawn()
            .map_err(fail)?;
        let id = child.id();
        let channels = [first, second].map(|socket| Mutex::new(Channel::new(socket)));
        let (next_channel, is_killed) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Self {
            child: Mutex::new(child),
            id,
            channels,
            _life: life,
            next_channel,
            is_killed,
            _permit: permit,
        })
    }

    fn kill(&self) {
        if !self.is_killed.swap(true, Ordering::AcqRel) {
            let mut child = self.child.lock();
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// A channel without a request in progress, and its number.
    fn channel(&self) -> (MutexGuard<'_, Channel>, usize) {
        // If none is free, callers wait for the channels in turn.
        let free = self
            .channels
            .iter()
            .enumerate()
            .find_map(|(number, channel)| Some((channel.try_lock()?, number)));
        free.unwrap_or_else(|| {
            let number = self.next_channel.fetch_add(1, Ordering::Relaxed) % self.channels.len();
            (self.channels[number].lock(), number)
        })
    }

    /// One exchange.
    fn ask(
        &self,
        request: &Request,
        disks: &dyn Disks,
    ) -> std::result::Result<Result<(Answer, Vec<u8>)>, WorkerFailure> {
        let (mut channel, number) = self.channel();
        if self.is_killed.load(Ordering::Acquire) {
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
                | Request::ReadVolume(..)
                | Request::ExtendedAttributes(..)
        );
        let limits = if matches!(request, Request::Unlock { .. }) {
            RequestLimits { spent: UNLOCKING, waited: UNLOCKING_WAIT, silent: UNLOCKING_WAIT }
        } else if is_large {
            RequestLimits { spent: LARGE, waited: LARGE_WAIT, silent: SILENCE }
        } else {
            RequestLimits { spent: USUAL, waited: USUAL_WAIT, silent: SILENCE }
        };
        let secret_len = request.secret_len();
        secret_len.inspect(|len| channel.prepare_for_secrets(*len));
        let spent = || processor_time(self.id, &channel_name(number));
        let answered = exchange(&mut channel, request, disks, limits, &spent);
        if secret_len.is_some() {
            channel.wipe();
        }
        answered
    }
}

/// The name of the worker's thread for a channel.
pub(super) fn channel_name(number: usize) -> String {
    format!("channel {number}")
}

/// The processor time of a process's thread with this name, so that requests on one channel do not pay for
/// those on another. The whole process's time, before the thread exists.
fn processor_time(process: u32, thread: &str) -> Duration {
    /// The unit of /proc's times, on every architecture that Linux has.
    const TICK: Duration = Duration::from_millis(10);
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let mut stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let whole = || std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let stat = stats.find(|stat| stat.contains(&format!("({thread}) "))).unwrap_or_else(whole);
    // The program's name is in parentheses and may contain anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks: u32 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    TICK * ticks
}

/// Sends a request, and serves the worker's requests until it answers.
fn exchange(
    channel: &mut Channel,
    request: &Request,
    disks: &dyn Disks,
    limits: RequestLimits,
    processor_time: &dyn Fn() -> Duration,
) -> std::result::Result<Result<(Answer, Vec<u8>)>, WorkerFailure> {
    // Measured only for slow requests; most are fast.
    let mut start = None;
    let mut spent = || {
        let now = processor_time();
        now.saturating_sub(*start.get_or_insert(now))
    };
    let (mut fetched, mut waited, mut checked) = (0, Duration::ZERO, Instant::now());
    let (mut reply, mut bytes) = (ToWorker::Request(request.clone()), Vec::new());
    loop {
        let asked = Instant::now();
        let mut patience = || {
            let mut is_too_long = asked.elapsed() > limits.silent || waited + asked.elapsed() > limits.waited;
            if checked.elapsed() > CHECK_PERIOD {
                checked = Instant::now();
                is_too_long |= spent() > limits.spent;
            }
            if is_too_long { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        };
        channel.send(&reply, &bytes).map_err(WorkerFailure::Gone)?;
        let received = channel.receive::<FromWorker>(&mut patience);
        // An endless exchange can consist of short messages, too.
        let received = received.and_then(|found| match found.0 {
            FromWorker::Answer(_) => Ok(found),
            FromWorker::Locate { .. } | FromWorker::Read { .. } => patience().map(|()| found),
        });
        let (message, payload) = received.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut if limits.spent == UNLOCKING => {
                let fact = "deriving its key took too long and was stopped";
                WorkerFailure::Killed(Error::new(ErrorKind::Limit, fact))
            }
            io::ErrorKind::TimedOut => WorkerFailure::Killed(too_long()),
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
                    return Err(WorkerFailure::Killed(too_long()));
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
    let fact = "reading a guest's file system took too long and was stopped; the disk may be damaged";
    Error::new(ErrorKind::Io, fact)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browse::worker::protocol::SetTree;
    use crate::guest::Ino;
    use crate::guest::TreeId;

    /// Disks that have every requested byte.
    struct All;

    impl Disks for All {
        fn keys(&self, _disk: u32, _first: u64, count: u64) -> Result<Vec<ChunkKey>> {
            Ok(vec![ChunkKey::ZERO; count as usize])
        }

        fn read(&self, _disk: u32, _at: u64, _buf: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    /// The failure of a request to a worker that uses no processor time and does `work` on its end of the
    /// channel.
    fn request_fails(work: impl FnOnce(UnixStream) + Send + 'static) -> WorkerFailure {
        let (socket, end) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let worker = std::thread::spawn(move || work(end));
        let request = Request::Attributes(SetTree { set: 1, tree: TreeId::main(0) }, Ino(2));
        let limits = RequestLimits {
            spent: Duration::from_secs(1),
            waited: Duration::from_millis(300),
            silent: SILENCE,
        };
        let start = Instant::now();
        let answer = exchange(&mut Channel::new(socket), &request, &All, limits, &|| Duration::ZERO);
        assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
        worker.join().unwrap();
        answer.expect_err("no answer was sent")
    }

    #[test]
    fn each_channel_has_its_own_processor_time() {
        let stop = Arc::new(AtomicBool::new(false));
        // Before a thread exists, the whole process's time counts.
        let started = Arc::new(std::sync::Barrier::new(3));
        let thread = |number: usize, is_busy: bool| {
            let (stop, started) = (Arc::clone(&stop), Arc::clone(&started));
            let work = move || {
                started.wait();
                while !stop.load(Ordering::Relaxed) {
                    if !is_busy {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            };
            std::thread::Builder::new().name(channel_name(number)).spawn(work).unwrap()
        };
        let threads = [thread(77, true), thread(78, false)];
        started.wait();
        let start = Instant::now();
        let spent = |number| processor_time(std::process::id(), &channel_name(number));
        while spent(77) < Duration::from_millis(200) {
            assert!(start.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(spent(78) < Duration::from_millis(100), "{:?}", spent(78));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_worker_that_sends_byte_by_byte_is_killed() {
        let trouble = request_fails(|mut end| {
            use io::Write as _;
            // A message of a mebibyte, which would take days.
            let _ = end.write_all(&[0, 0, 16, 0, 0, 0, 0, 0]);
            while end.write_all(&[0]).is_ok() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        assert!(matches!(trouble, WorkerFailure::Killed(_)));
    }

    #[test]
    fn a_worker_with_endless_requests_is_killed() {
        let trouble = request_fails(|end| {
            let mut channel = Channel::new(end);
            let question = FromWorker::Locate { disk: 0, first: 0, count: 1 };
            while channel.receive::<ToWorker>(&mut || Ok(())).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
                if channel.send(&question, &[]).is_err() {
                    break;
                }
            }
        });
        assert!(matches!(trouble, WorkerFailure::Killed(_)));
    }
}
