//! The simulated machine: files whose changes are recorded on one tape, in their order, and a fault at a
//! chosen call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use chainfs::error::{Error, ErrorKind, Result};
use chainfs::io::{Storage, WriteStorage};
use chainfs::units::{BlockStatus, Run};
use parking_lot::Mutex;
use rustix::io::Errno;

use super::action::Action;
use super::{Pages, mix};

/// An event on the tape.
#[derive(Clone, Debug)]
pub enum Event {
    /// A change of a file.
    Did { file: usize, action: Action },
    /// All changes of the file so far are durable.
    Synced { file: usize },
    /// They may be lost, and the kernel will not try again.
    SyncFailed { file: usize },
    /// An operation began or ended: no change of the files.
    Mark,
    /// A flush has been acknowledged.
    Flushed,
}

/// How syncs behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncRule {
    /// As promised.
    Honest,
    /// Returns at once and does nothing.
    Swallowed,
    /// Only each n-th does something.
    SwallowedBut(u64),
    /// Each n-th change before a sync becomes durable only with the sync after it.
    Late(u64),
}

/// The error of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    NoSpace,
    Quota,
    TooLarge,
    Io,
}

impl Failure {
    pub const ALL: [Self; 4] = [Self::NoSpace, Self::Quota, Self::TooLarge, Self::Io];

    fn error(self, what: &str) -> Error {
        let errno = match self {
            Self::NoSpace => Errno::NOSPC,
            Self::Quota => Errno::DQUOT,
            Self::TooLarge => Errno::FBIG,
            Self::Io => Errno::IO,
        };
        Error::io(format!("{what} the simulated disk"), errno)
    }

    pub fn kind(self) -> ErrorKind {
        match self {
            Self::NoSpace => ErrorKind::NoSpace,
            Self::Quota => ErrorKind::Quota,
            Self::TooLarge => ErrorKind::TooLarge,
            Self::Io => ErrorKind::Io,
        }
    }
}

/// Which calls are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    Changes,
    Reads,
}

/// The call that fails.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub calls: Calls,
    /// The first call is 0.
    pub number: u64,
    pub failure: Failure,
    /// Whether those after it fail as well.
    pub lasting: bool,
}

/// The kind of call that a fault has hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    Change,
    Sync,
    Read,
}

#[derive(Default)]
struct Plan {
    fault: Option<Fault>,
    hit: Option<Hit>,
    /// Pages that all files together may take.
    capacity: Option<u64>,
    used: u64,
}

/// The state that all files share.
pub struct Machine {
    tape: Mutex<Vec<Event>>,
    changes: AtomicU64,
    reads: AtomicU64,
    plan: Mutex<Plan>,
    sync_rule: SyncRule,
    /// Whether calls yield to other threads now and then.
    jitter: bool,
    pauses: AtomicU64,
    /// Whether holes can be punched and space taken.
    can_punch: bool,
    late: Mutex<Vec<Event>>,
    /// Whether there is a tape at all.
    forgets: AtomicBool,
}

impl Machine {
    pub fn new(sync_rule: SyncRule, jitter: bool, can_punch: bool) -> Arc<Self> {
        Arc::new(Self {
            tape: Mutex::default(),
            changes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            plan: Mutex::default(),
            sync_rule,
            jitter,
            pauses: AtomicU64::new(0),
            can_punch,
            late: Mutex::default(),
            forgets: AtomicBool::new(false),
        })
    }

    /// A machine without faults.
    pub fn honest() -> Arc<Self> {
        Self::new(SyncRule::Honest, false, true)
    }

    /// A machine without faults and tape, for long runs.
    pub fn forgetful() -> Arc<Self> {
        Self::honest().forget()
    }

    /// Stops recording.
    #[must_use]
    pub fn forget(self: Arc<Self>) -> Arc<Self> {
        self.forgets.store(true, Ordering::Relaxed);
        self
    }

    /// Puts a mark on the tape and returns its position.
    pub fn mark(&self, event: Event) -> usize {
        let mut tape = self.tape.lock();
        if self.forgets.load(Ordering::Relaxed) {
            return tape.len();
        }
        tape.push(event);
        tape.len() - 1
    }

    /// The tape so far.
    pub fn tape(&self) -> Vec<Event> {
        self.tape.lock().clone()
    }

    /// Changes and syncs so far.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    /// Arms a fault; its number counts from the beginning.
    pub fn arm(&self, fault: Option<Fault>) {
        let mut plan = self.plan.lock();
        (plan.fault, plan.hit) = (fault, None);
    }

    /// The call that the fault has hit, if it has.
    pub fn hit(&self) -> Option<Hit> {
        self.plan.lock().hit
    }

    /// Limits the pages that files may take from now on; `None`: no limit.
    pub fn set_free(&self, pages: Option<u64>) {
        let mut plan = self.plan.lock();
        plan.capacity = pages.map(|pages| plan.used + pages);
    }

    fn pause(&self) {
        if !self.jitter {
            return;
        }
        let chance = mix(self.pauses.fetch_add(1, Ordering::Relaxed));
        match chance % 64 {
            // Long enough for others to free a cluster, flush, and use it for something else.
            0 | 1 => thread::sleep(Duration::from_micros(chance >> 32 & 0xfff)),
            2..24 => thread::yield_now(),
            _ => {}
        }
    }

    /// Whether this call fails, and how.
    fn strikes(&self, calls: Calls, hit: Hit) -> Option<Failure> {
        let counter = if calls == Calls::Reads { &self.reads } else { &self.changes };
        let number = counter.fetch_add(1, Ordering::SeqCst);
        let mut plan = self.plan.lock();
        let fault = plan.fault.filter(|fault| fault.calls == calls)?;
        let strikes = number == fault.number || fault.lasting && number > fault.number;
        if strikes {
            plan.hit.get_or_insert(hit);
        }
        strikes.then_some(fault.failure)
    }

    fn record(&self, file: usize, action: Action) {
        let event = Event::Did { file, action };
        if let SyncRule::Late(every) = self.sync_rule
            && mix(self.changes()).is_multiple_of(every)
        {
            self.late.lock().push(event);
            return;
        }
        self.mark(event);
    }

    fn record_sync(&self, file: usize) {
        match self.sync_rule {
            SyncRule::Honest => drop(self.mark(Event::Synced { file })),
            SyncRule::Swallowed => {}
            SyncRule::SwallowedBut(every) => {
                if mix(self.changes()).is_multiple_of(every) {
                    self.mark(Event::Synced { file });
                }
            }
            SyncRule::Late(_) => {
                self.mark(Event::Synced { file });
                self.tape.lock().append(&mut self.late.lock());
            }
        }
    }
}

/// A file of the machine.
pub struct SimDisk {
    file: usize,
    pages: Mutex<Pages>,
    machine: Arc<Machine>,
}

impl SimDisk {
    pub fn new(machine: &Arc<Machine>, file: usize, pages: Pages) -> Arc<Self> {
        machine.plan.lock().used += pages.page_count();
        Arc::new(Self { file, pages: Mutex::new(pages), machine: Arc::clone(machine) })
    }

    /// The present content of the file.
    pub fn snapshot(&self) -> Pages {
        self.pages.lock().clone()
    }

    fn change(&self, what: &str, action: Action) -> Result<()> {
        self.machine.pause();
        let result = self.change_now(what, action);
        self.machine.pause();
        result
    }

    fn change_now(&self, what: &str, action: Action) -> Result<()> {
        let mut pages = self.pages.lock();
        let failure =
            self.machine.strikes(Calls::Changes, Hit::Change).or_else(|| self.lacks_space(&pages, &action));
        if let Some(failure) = failure {
            // A failed write leaves any part of its bytes.
            if let Action::Write { at, bytes } = &action {
                let part = mix(self.machine.changes()) as usize % (bytes.len() / 512 + 1) * 512;
                if part > 0 && part < bytes.len() && failure != Failure::TooLarge {
                    let action = Action::Write { at: *at, bytes: bytes[..part].into() };
                    action.apply(&mut pages);
                    self.machine.record(self.file, action);
                }
            }
            return Err(failure.error(what));
        }
        let before = self.machine.plan.lock().capacity.is_some().then(|| pages.page_count());
        action.apply(&mut pages);
        if let Some(before) = before {
            let mut plan = self.machine.plan.lock();
            plan.used = (plan.used + pages.page_count()).saturating_sub(before);
        }
        self.machine.record(self.file, action);
        Ok(())
    }

    fn lacks_space(&self, pages: &Pages, action: &Action) -> Option<Failure> {
        let plan = self.machine.plan.lock();
        let capacity = plan.capacity?;
        let needed = match action {
            Action::Write { at, bytes } => pages.pages_needed(*at, bytes.len() as u64),
            Action::Allocate { at, len } => pages.pages_needed(*at, *len),
            Action::SetLen(_) | Action::Punch { .. } | Action::Zero { .. } => 0,
        };
        (needed > 0 && plan.used + needed > capacity).then_some(Failure::NoSpace)
    }
}

impl Storage for SimDisk {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.machine.pause();
        if let Some(failure) = self.machine.strikes(Calls::Reads, Hit::Read) {
            return Err(failure.error("reading"));
        }
        self.pages.lock().read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.pages.lock().len())
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(self.pages.lock().extent(at, end))
    }
}

impl WriteStorage for SimDisk {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.change("writing", Action::Write { at, bytes: bytes.into() })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change("resizing", Action::SetLen(len))
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        if !self.machine.can_punch {
            return Err(Error::new(ErrorKind::Unsupported, "the simulated disk has no holes"));
        }
        self.change("punching", Action::Punch { at, len })
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.change("zeroing", Action::Zero { at, len })
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        if !self.machine.can_punch {
            return Err(Error::new(ErrorKind::Unsupported, "the simulated disk cannot take space"));
        }
        self.change("allocating", Action::Allocate { at, len })
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        // The file does not change; the room is checked all the same.
        let pages = self.pages.lock();
        let failure = self.machine.strikes(Calls::Changes, Hit::Change);
        match failure.or_else(|| self.lacks_space(&pages, &Action::Allocate { at, len })) {
            Some(failure) => Err(failure.error("reserving space of")),
            None => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        self.machine.pause();
        // No change can come between the record and the operation.
        let pages = self.pages.lock();
        if let Some(failure) = self.machine.strikes(Calls::Changes, Hit::Sync) {
            self.machine.mark(Event::SyncFailed { file: self.file });
            return Err(failure.error("syncing"));
        }
        self.machine.record_sync(self.file);
        drop(pages);
        self.machine.pause();
        Ok(())
    }
}
