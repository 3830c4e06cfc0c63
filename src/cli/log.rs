//! What the daemon says while it runs: to the terminal until it is ready, then to the system's log.
//!
//! In the foreground everything stays on stderr. The system's log is the socket `/dev/log`
//! (syslog(3)'s, which journald serves as well); where there is none, nobody listens.

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
/// Messages a second, at most: a program that reads a damaged disk in a loop shall not fill the log.
const MOST_A_SECOND: u32 = 20;
/// Longer messages are cut: a datagram that is too long would be lost whole.
const MAX_LEN: usize = 2048;

/// The log of this process.
#[derive(Clone, Debug)]
pub(super) struct Log {
    detached: Arc<AtomicBool>,
    /// The second that is counted, and the messages in it.
    counted: Arc<Mutex<(Instant, u32)>>,
}

/// Begins: warnings, and more if asked for.
pub(super) fn start(verbose: bool, as_child: bool) -> Log {
    let level = match (verbose, as_child) {
        (true, _) => Level::DEBUG,
        (false, false) => Level::INFO,
        (false, true) => Level::WARN,
    };
    let log = Log { detached: Arc::default(), counted: Arc::new(Mutex::new((Instant::now(), 0))) };
    // Neither a file nor the system's log wants colours.
    let colours = !as_child && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let format = tracing_subscriber::fmt().with_max_level(level).with_writer(log.clone()).with_target(false);
    // Refused only where a log is set up already, which then serves as well.
    let _ = format.with_ansi(colours).try_init();
    log
}

impl Log {
    /// From here on messages go to the system's log.
    pub(super) fn detach(&self) {
        self.detached.store(true, Ordering::Relaxed);
    }

    /// Whether one more message is too many now.
    fn is_flooded(&self) -> bool {
        let mut counted = self.counted.lock();
        if counted.0.elapsed() > Duration::from_secs(1) {
            *counted = (Instant::now(), 0);
        }
        counted.1 += 1;
        counted.1 > MOST_A_SECOND
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

/// Says it if the log listens at once: who answers the kernel waits for nobody.
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
    fn a_log_that_nobody_reads_holds_nobody_up() {
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
        waited.recv_timeout(Duration::from_secs(20)).expect("a message that is not read is waited for");
    }
}
