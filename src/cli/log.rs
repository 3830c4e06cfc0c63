//! The daemon's log: stderr until the mount is ready, then the system log.
//!
//! In the foreground all messages go to stderr. The system log is the socket `/dev/log` (syslog(3) and
//! journald); without it, messages are dropped.

use std::io::{self, IsTerminal as _, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

/// Facility "daemon", severity "warning", as syslog(3) numbers them.
const PRIORITY: u32 = 3 << 3 | 4;
/// Limit of messages per second: a program that reads a damaged disk in a loop must not fill the log.
const MAX_PER_SECOND: u32 = 20;
/// Longer messages are truncated: the socket would drop a datagram that is too long.
const MAX_LEN: usize = 2048;

/// The log of this process.
#[derive(Clone, Debug)]
pub(super) struct Log {
    detached: Arc<AtomicBool>,
    /// Start of the current second, and the number of messages in it.
    counted: Arc<Mutex<(Instant, u32)>>,
}

/// Starts the log; `verbose` lowers its level to debug.
pub(super) fn start(verbose: bool, as_child: bool) -> Log {
    let level = match (verbose, as_child) {
        (true, _) => Level::DEBUG,
        (false, false) => Level::INFO,
        (false, true) => Level::WARN,
    };
    let log = Log { detached: Arc::default(), counted: Arc::new(Mutex::new((Instant::now(), 0))) };
    // Colours only on a terminal.
    let colours =
        !as_child && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let format = tracing_subscriber::fmt().with_max_level(level).with_writer(log.clone()).with_target(false);
    // Fails only if a subscriber is set already, which then serves as well.
    let _ = format.with_ansi(colours).try_init();
    log
}

impl Log {
    /// Redirects later messages to the system log.
    pub(super) fn detach(&self) {
        self.detached.store(true, Ordering::Relaxed);
    }

    /// Counts a message; whether it exceeds the limit of this second.
    fn is_flooded(&self) -> bool {
        let mut counted = self.counted.lock();
        if counted.0.elapsed() > Duration::from_secs(1) {
            *counted = (Instant::now(), 0);
        }
        counted.1 += 1;
        counted.1 > MAX_PER_SECOND
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Box<dyn Write>;

    fn make_writer(&'a self) -> Self::Writer {
        if !self.detached.load(Ordering::Relaxed) {
            Box::new(io::stderr())
        } else if self.is_flooded() {
            Box::new(io::sink())
        } else {
            Box::new(Syslog)
        }
    }
}

/// One message is one datagram.
struct Syslog;

impl Write for Syslog {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut message = format!("<{PRIORITY}>chainfs[{}]: ", std::process::id()).into_bytes();
        message.extend_from_slice(text.trim_ascii_end());
        message.truncate(MAX_LEN);
        send(&message, Path::new("/dev/log"))?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends without blocking, and drops the message if the log is not ready: threads that serve the kernel must
/// not wait for another process.
fn send(message: &[u8], log: &Path) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let _ = socket.send_to(message, log);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_socket_does_not_block_the_sender() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let (done, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for _ in 0..10_000 {
                send(&[b'x'; MAX_LEN], &path).unwrap();
            }
            done.send(()).unwrap();
        });
        waited.recv_timeout(Duration::from_secs(20)).expect("sending blocks on a full socket");
    }
}
