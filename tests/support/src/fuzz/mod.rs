//! The common parts of the fuzzing tests: a driver that replays from one number, seeded changes, and a reader
//! that compares every way to read an image.
//!
//! `CHAINFS_FUZZ_SECONDS` sets the budget of each target, `CHAINFS_FUZZ_SEED` its first input: the
//! seed that a failure names makes the failing input the first.

pub mod images;
pub mod random;
pub mod reader;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use random::Random;

/// Processor time of one input, at most.
pub const LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });
/// An input that is still not done hangs.
const HANG: Duration = Duration::from_mins(1);

/// The result of a run.
pub struct Run {
    pub inputs: u64,
    pub elapsed: Duration,
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Calls `target` with the numbers of one input after the other until the time is over.
pub fn drive(name: &str, seconds: u64, mut target: impl FnMut(&mut Random)) -> Run {
    let first = from_environment("CHAINFS_FUZZ_SEED").unwrap_or_else(first_seed);
    let budget = Duration::from_secs(from_environment("CHAINFS_FUZZ_SECONDS").unwrap_or(seconds));
    let (start, mut inputs, mut slowest) = (Instant::now(), 0, (Duration::ZERO, first));
    let current = &AtomicU64::new(first);
    thread::scope(|scope| {
        let (_running, ended) = mpsc::channel::<()>();
        scope.spawn(move || watch(name, current, &ended));
        while start.elapsed() < budget {
            let seed = current.load(Ordering::Relaxed);
            let took = time(name, seed, &mut target);
            slowest = slowest.max((took, seed));
            assert!(took <= LIMIT, "{name}: the input of CHAINFS_FUZZ_SEED={seed} took {took:?}");
            inputs += 1;
            current.store(Random::new(seed).next(), Ordering::Relaxed);
        }
    });
    let (took, seed) = slowest;
    println!("{name}: seed {first}, {inputs} inputs, slowest {took:?} (seed {seed})");
    Run { inputs, elapsed: start.elapsed() }
}

fn time(name: &str, seed: u64, target: &mut impl FnMut(&mut Random)) -> Duration {
    let start = processor_time();
    catch_unwind(AssertUnwindSafe(|| target(&mut Random::new(seed)))).unwrap_or_else(|panic| {
        println!("{name}: CHAINFS_FUZZ_SEED={seed} replays this input");
        resume_unwind(panic);
    });
    processor_time().saturating_sub(start)
}

/// Processor time that this thread has used. Load of the machine does not count.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned() as u32)
}

/// The same inputs in each usual run; others in each long one.
fn first_seed() -> u64 {
    if std::env::var_os("CHAINFS_LONG").is_none() {
        return 1;
    }
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64)
}

/// Ends the test with a message when an input does not end by itself.
fn watch(name: &str, current: &AtomicU64, ended: &mpsc::Receiver<()>) {
    let mut last = (current.load(Ordering::Relaxed), Instant::now());
    while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
        let seed = current.load(Ordering::Relaxed);
        if seed != last.0 {
            last = (seed, Instant::now());
        } else if last.1.elapsed() > HANG {
            // Not by `println`: captured output would be lost.
            drop(writeln!(std::io::stderr(), "{name}: the input of CHAINFS_FUZZ_SEED={seed} hangs"));
            std::process::exit(101);
        }
    }
}

/// Feeds `corpus`, and then mutations of it, to `target`.
pub fn fuzz(name: &str, corpus: &[Vec<u8>], target: impl Fn(&[u8], &mut Random)) {
    for good in corpus {
        target(good, &mut Random::new(1));
    }
    drive(name, 1, |random| {
        let mut bytes = corpus[random.below(corpus.len())].clone();
        random.mutate(&mut bytes);
        target(&bytes, random);
    });
}

/// The peak memory of this process, in bytes; `None` where the system does not report it.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
