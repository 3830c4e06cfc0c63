//! `control/progress`: each read returns a line, as soon as there is news, or after a short time.
//!
//! Reads that have to wait are queued here, and one thread replies to them: serving threads never wait.
//! Without readers, that thread sleeps.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::ops::Status;
use crate::report::status::progress;

use super::access::{Rights, Viewer};
use super::control::ControlScope;

/// Maximum wait of a read.
const MAX_WAIT: Duration = Duration::from_millis(240);
/// Interval of checks for news while reads are waiting.
const TICK: Duration = Duration::from_millis(40);

/// Takes the bytes of a read; none mean end of file.
pub type ProgressReply = Box<dyn FnOnce(&[u8]) + Send>;

/// An open `control/progress`.
#[derive(Debug)]
pub struct ProgressReader {
    chain: PathBuf,
    /// The user who reads, if names of images may have to be redacted.
    reader: Option<(Arc<Rights>, Viewer)>,
    /// A leaf; released before a reply is sent.
    line: Mutex<ProgressLine>,
}

#[derive(Debug, Default)]
struct ProgressLine {
    /// The version of the status in the last line.
    last_version: Option<u64>,
    /// The unread rest of the last line.
    rest: Vec<u8>,
    /// Whether it is the final line.
    is_final: bool,
}

/// All waiting reads.
pub(super) struct PendingReads {
    shared: Arc<SharedReads>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct SharedReads {
    /// Returns the status of a chain's last command; called under no lock except a reader's.
    status: Box<dyn Fn(&Path) -> Status + Send + Sync>,
    waiting: Mutex<ReadQueue>,
    news: Condvar,
}

#[derive(Default)]
struct ReadQueue {
    reads: Vec<PendingRead>,
    ended: bool,
}

struct PendingRead {
    reader: Arc<ProgressReader>,
    most: usize,
    until: Instant,
    answer: ProgressReply,
}

impl std::fmt::Debug for PendingReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingReads")
            .field("waiting", &self.shared.waiting.lock().reads.len())
            .finish_non_exhaustive()
    }
}

impl ProgressReader {
    pub(super) fn new(scope: &ControlScope, reader: Option<(Arc<Rights>, Viewer)>) -> Self {
        Self { chain: scope.key().to_path_buf(), reader, line: Mutex::default() }
    }

    /// The result of a read; `None` if it has to wait. `is_due`: repeats the last line instead of waiting.
    fn next(&self, status: impl FnOnce() -> Status, most: usize, is_due: bool) -> Option<Vec<u8>> {
        let mut line = self.line.lock();
        if line.rest.is_empty() {
            if line.is_final {
                return Some(Vec::new());
            }
            let status = status();
            if line.last_version == Some(status.version) && !is_due && !status.state.is_over() {
                return None;
            }
            line.last_version = Some(status.version);
            line.is_final = status.state.is_over();
            let text = progress(&status);
            let text = match &self.reader {
                Some((rights, viewer)) if line.is_final => rights.redact(viewer, &text),
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
    /// `status` returns the status of a chain's last command.
    pub(super) fn new(status: impl Fn(&Path) -> Status + Send + Sync + 'static) -> Self {
        let shared =
            SharedReads { status: Box::new(status), waiting: Mutex::default(), news: Condvar::new() };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Replies to a read of at most `most` bytes, now or later.
    pub(super) fn read(&self, reader: &Arc<ProgressReader>, most: usize, answer: ProgressReply) {
        if let Some(bytes) = self.shared.next(reader, most, false) {
            return answer(&bytes);
        }
        let is_served = self.start();
        let mut waiting = self.shared.waiting.lock();
        if waiting.ended || !is_served {
            drop(waiting);
            // No thread can reply later.
            return answer(&self.shared.next(reader, most, true).unwrap_or_default());
        }
        waiting.reads.push(PendingRead {
            reader: Arc::clone(reader),
            most,
            until: Instant::now() + MAX_WAIT,
            answer,
        });
        self.shared.news.notify_one();
    }

    /// Replies to all waiting reads; later reads do not wait.
    pub(super) fn end(&self) {
        self.shared.waiting.lock().ended = true;
        self.shared.news.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }

    /// Starts the thread; whether it runs.
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
    fn next(&self, reader: &ProgressReader, most: usize, is_due: bool) -> Option<Vec<u8>> {
        reader.next(|| (self.status)(&reader.chain), most, is_due)
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
            // X2: handlers take this lock and must not wait under it, so the engine and the kernel are called
            // without it.
            drop(waiting);
            let now = Instant::now();
            let mut still_waiting = Vec::new();
            for read in reads {
                match self.next(&read.reader, read.most, ended || now >= read.until) {
                    Some(bytes) => (read.answer)(&bytes),
                    None => still_waiting.push(read),
                }
            }
            if ended {
                return;
            }
            waiting = self.waiting.lock();
            waiting.reads.append(&mut still_waiting);
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
    fn each_status_is_one_line_and_the_final_one_ends_the_file() {
        let status = RefCell::new(Status {
            command: "pull".to_string(),
            state: JobState::Running,
            total: 4,
            version: 7,
            ..Status::default()
        });
        let reader = reader();
        let next = |most, is_due| {
            let bytes = reader.next(|| status.borrow().clone(), most, is_due);
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
        assert_eq!(next(99, false).as_deref(), Some(""), "the next command needs a new open");
    }

    #[test]
    fn a_finished_command_is_reported_at_once() {
        let reader = reader();
        assert_eq!(reader.next(Status::default, 99, false).as_deref(), Some(&b"idle\n"[..]));
        assert_eq!(reader.next(Status::default, 99, false).as_deref(), Some(&b""[..]));
    }

    /// A running command that the test advances, and its waiting reads.
    fn at_work() -> (Arc<Mutex<Status>>, PendingReads) {
        let job = Arc::new(Mutex::new(Status { state: JobState::Running, total: 9, ..Status::default() }));
        let seen = Arc::clone(&job);
        (job, PendingReads::new(move |_| seen.lock().clone()))
    }

    fn read(progress: &PendingReads, reader: &Arc<ProgressReader>) -> Receiver<Vec<u8>> {
        let (tell, told) = channel();
        progress.read(reader, 4096, Box::new(move |bytes| tell.send(bytes.to_vec()).expect("a receiver")));
        told
    }

    #[test]
    fn a_read_returns_on_news_or_after_the_maximum_wait() {
        const LIMIT: Duration = Duration::from_secs(20);
        let (job, progress) = at_work();
        let readers = [(); 3].map(|()| Arc::new(reader()));
        for reader in &readers {
            assert!(read(&progress, reader).try_recv().is_ok(), "the first line is there at once");
        }
        // No news: the same line again, after the maximum wait.
        let start = Instant::now();
        for told in readers.each_ref().map(|reader| read(&progress, reader)) {
            assert!(told.recv_timeout(LIMIT).expect("a line").starts_with(b" 0.0 %"));
        }
        assert!(start.elapsed() >= MAX_WAIT);
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
    fn waiting_reads_end_with_the_mount() {
        let (_job, progress) = at_work();
        let reader = Arc::new(reader());
        assert!(read(&progress, &reader).try_recv().is_ok());
        let told = read(&progress, &reader);
        progress.end();
        assert!(told.try_recv().is_ok());
        assert!(read(&progress, &reader).try_recv().is_ok());
    }
}
