//! `control/progress`: each read is a line, as soon as there is news, and soon in any case.
//!
//! Reads that have to wait are kept here and answered by one thread: whoever brings them never waits. With
//! nobody reading, that thread sleeps.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::ops::Status;
use crate::report::status::progress;

use super::access::{Rights, Viewer};
use super::control::ControlScope;

/// How long a read waits, at most.
const PATIENCE: Duration = Duration::from_millis(240);
/// How often the thread looks for news while somebody waits.
const TICK: Duration = Duration::from_millis(40);

/// Takes what has been read; nothing means the end.
pub type ProgressReply = Box<dyn FnOnce(&[u8]) + Send>;

/// An opening of `control/progress`.
#[derive(Debug)]
pub struct ProgressReader {
    chain: PathBuf,
    /// Who reads, where names may have to be kept from that user.
    reader: Option<(Arc<Rights>, Viewer)>,
    /// Taken before nothing else, and left before an answer is given.
    line: Mutex<ProgressLine>,
}

#[derive(Debug, Default)]
struct ProgressLine {
    /// The state that was told last.
    told: Option<u64>,
    /// What has not been taken of the line that was told last.
    rest: Vec<u8>,
    /// Whether that is the last one.
    over: bool,
}

/// All reads that wait.
pub(super) struct PendingReads {
    shared: Arc<SharedReads>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct SharedReads {
    /// How a chain's last command is doing; asked under no lock but a reader's own.
    status: Box<dyn Fn(&Path) -> Status + Send + Sync>,
    waiting: Mutex<PendingRead>,
    news: Condvar,
}

#[derive(Default)]
struct PendingRead {
    reads: Vec<Read>,
    ended: bool,
}

struct Read {
    reader: Arc<ProgressReader>,
    most: usize,
    until: Instant,
    answer: ProgressReply,
}

impl std::fmt::Debug for PendingReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("waiting", &self.shared.waiting.lock().reads.len()).finish_non_exhaustive()
    }
}

impl ProgressReader {
    pub(super) fn new(scope: &ControlScope, reader: Option<(Arc<Rights>, Viewer)>) -> Self {
        Self { chain: scope.key().to_path_buf(), reader, line: Mutex::default() }
    }

    /// What a read gets now; none if it has to wait. `impatient`: the last line again, rather than waiting.
    fn next(&self, status: impl FnOnce() -> Status, most: usize, impatient: bool) -> Option<Vec<u8>> {
        let mut line = self.line.lock();
        if line.rest.is_empty() {
            if line.over {
                return Some(Vec::new());
            }
            let status = status();
            if line.told == Some(status.version) && !impatient && !status.state.is_over() {
                return None;
            }
            line.told = Some(status.version);
            line.over = status.state.is_over();
            let text = progress(&status);
            let text = match &self.reader {
                Some((rights, viewer)) if line.over => rights.redact(viewer, &text),
                _ => text,
            };
            line.rest = text.into_bytes();
            line.rest.push(b'\n');
        }
        let len = line.rest.len().min(most);
        Some(line.rest.drain(..len).collect())
    }
}

impl PendingReads {
    /// `status` tells how the last command of a chain is doing.
    pub(super) fn new(status: impl Fn(&Path) -> Status + Send + Sync + 'static) -> Self {
        let shared = SharedReads { status: Box::new(status), waiting: Mutex::default(), news: Condvar::new() };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Answers a read of at most `most` bytes, now or later.
    pub(super) fn read(&self, reader: &Arc<ProgressReader>, most: usize, answer: ProgressReply) {
        if let Some(bytes) = self.shared.next(reader, most, false) {
            return answer(&bytes);
        }
        let is_served = self.start();
        let mut waiting = self.shared.waiting.lock();
        if waiting.ended || !is_served {
            drop(waiting);
            // Nobody is there who could answer later.
            return answer(&self.shared.next(reader, most, true).unwrap_or_default());
        }
        waiting.reads.push(Read { reader: Arc::clone(reader), most, until: Instant::now() + PATIENCE, answer });
        self.shared.news.notify_one();
    }

    /// Answers everybody; from here on nobody waits.
    pub(super) fn end(&self) {
        self.shared.waiting.lock().ended = true;
        self.shared.news.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }

    /// Whether there is a thread that answers.
    fn start(&self) -> bool {
        let mut thread = self.thread.lock();
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            *thread = std::thread::Builder::new().name("progress".into()).spawn(move || shared.serve()).ok();
        }
        thread.is_some()
    }
}

impl Drop for PendingReads {
    fn drop(&mut self) {
        self.end();
    }
}

impl SharedReads {
    fn next(&self, reader: &ProgressReader, most: usize, impatient: bool) -> Option<Vec<u8>> {
        reader.next(|| (self.status)(&reader.chain), most, impatient)
    }

    fn serve(&self) {
        let mut waiting = self.waiting.lock();
        loop {
            if waiting.reads.is_empty() && !waiting.ended {
                self.news.wait(&mut waiting);
                continue;
            }
            let ended = waiting.ended;
            let reads = std::mem::take(&mut waiting.reads);
            // X2: handlers take this lock, and wait for nothing under it.
            // Neither the engine nor the kernel is spoken to under the lock that handlers take.
            drop(waiting);
            let now = Instant::now();
            let mut patient = Vec::new();
            for read in reads {
                match self.next(&read.reader, read.most, ended || now >= read.until) {
                    Some(bytes) => (read.answer)(&bytes),
                    None => patient.push(read),
                }
            }
            if ended {
                return;
            }
            waiting = self.waiting.lock();
            waiting.reads.append(&mut patient);
            if !waiting.reads.is_empty() && !waiting.ended {
                drop(waiting);
                std::thread::sleep(TICK);
                waiting = self.waiting.lock();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::ops::JobState;

    fn reader() -> ProgressReader {
        ProgressReader::new(&ControlScope::Chain(Arc::new(PathBuf::from("web"))), None)
    }

    #[test]
    fn a_line_is_told_once_for_each_state_and_the_last_one_is_the_end() {
        let status = RefCell::new(Status {
            command: "pull".to_string(),
            state: JobState::Running,
            total: 4,
            version: 7,
            ..Status::default()
        });
        let reader = reader();
        let next = |most, impatient| {
            let bytes = reader.next(|| status.borrow().clone(), most, impatient);
            bytes.map(|bytes| String::from_utf8(bytes).unwrap())
        };
        assert_eq!(next(99, false).as_deref(), Some("pull 0.0 % 0 B of 4 B\n"));
        assert_eq!(next(99, false), None);
        assert_eq!(next(99, true).as_deref(), Some("pull 0.0 % 0 B of 4 B\n"));
        (status.borrow_mut().done, status.borrow_mut().version) = (2, 8);
        assert_eq!(next(10, false).as_deref(), Some("pull 50.0 "));
        (status.borrow_mut().done, status.borrow_mut().version) = (3, 9);
        assert_eq!(next(99, false).as_deref(), Some("% 2 B of 4 B\n"), "a line that was begun is finished");
        assert_eq!(next(99, false).as_deref(), Some("pull 75.0 % 3 B of 4 B\n"));
        (status.borrow_mut().state, status.borrow_mut().version) = (JobState::Done, 10);
        assert_eq!(next(99, false).as_deref(), Some("done\n"));
        assert_eq!(next(99, false).as_deref(), Some(""));
        (status.borrow_mut().state, status.borrow_mut().version) = (JobState::Running, 11);
        assert_eq!(next(99, false).as_deref(), Some(""), "the next command is for the next opening");
    }

    #[test]
    fn a_command_that_is_over_is_told_at_once() {
        let reader = reader();
        assert_eq!(reader.next(Status::default, 99, false).as_deref(), Some(&b"idle\n"[..]));
        assert_eq!(reader.next(Status::default, 99, false).as_deref(), Some(&b""[..]));
    }

    /// A command at work that somebody moves on, and what is read of it.
    fn at_work() -> (Arc<Mutex<Status>>, PendingReads) {
        let job = Arc::new(Mutex::new(Status { state: JobState::Running, total: 9, ..Status::default() }));
        let seen = Arc::clone(&job);
        (job, PendingReads::new(move |_| seen.lock().clone()))
    }

    fn read(progress: &PendingReads, reader: &Arc<ProgressReader>) -> Receiver<Vec<u8>> {
        let (tell, told) = channel();
        progress.read(reader, 4096, Box::new(move |bytes| tell.send(bytes.to_vec()).expect("somebody listens")));
        told
    }

    #[test]
    fn a_read_is_answered_when_there_is_news_and_soon_in_any_case() {
        const LIMIT: Duration = Duration::from_secs(20);
        let (job, progress) = at_work();
        let readers = [(); 3].map(|()| Arc::new(reader()));
        for reader in &readers {
            assert!(read(&progress, reader).try_recv().is_ok(), "the first line is there at once");
        }
        // Nothing new: the same again, but not at once.
        let start = Instant::now();
        for told in readers.each_ref().map(|reader| read(&progress, reader)) {
            assert!(told.recv_timeout(LIMIT).expect("a line").starts_with(b" 0.0 %"));
        }
        assert!(start.elapsed() >= PATIENCE);
        let waiting = readers.each_ref().map(|reader| read(&progress, reader));
        (job.lock().done, job.lock().version) = (3, 1);
        for told in waiting {
            assert!(told.recv_timeout(LIMIT).expect("a line").starts_with(b" 33.3 %"));
        }
        let waiting = readers.each_ref().map(|reader| read(&progress, reader));
        (job.lock().state, job.lock().version) = (JobState::Done, 2);
        for told in waiting {
            assert_eq!(told.recv_timeout(LIMIT).expect("a line"), b"done\n");
        }
        assert_eq!(read(&progress, &readers[0]).try_recv().expect("the end"), b"");
        progress.end();
    }

    #[test]
    fn at_the_end_of_the_mount_nobody_is_left_waiting() {
        let (_job, progress) = at_work();
        let reader = Arc::new(reader());
        assert!(read(&progress, &reader).try_recv().is_ok());
        let told = read(&progress, &reader);
        progress.end();
        assert!(told.try_recv().is_ok());
        assert!(read(&progress, &reader).try_recv().is_ok());
    }
}
