//! journald's own protocol: a record is one datagram of named fields, so that each can be searched by itself.
//!
//! It is described at <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>. A field longer than [`MAX_VALUE`] is
//! truncated: no datagram is ever too long for the socket, and the protocol's way by a memfd is not needed.

use std::fmt::Debug;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tracing::Level;
use tracing::field::{Field, Visit};

/// Where journald listens. Tests listen elsewhere.
const SOCKET: &str = "/run/systemd/journal/socket";
pub(super) const SOCKET_VARIABLE: &str = "CHAINFS_TEST_JOURNAL";
/// Set by systemd for a service whose stderr is the journal: its device and inode.
const STREAM_VARIABLE: &str = "JOURNAL_STREAM";
const MAX_VALUE: usize = 2048;

/// The socket of journald, if it is there.
pub(super) fn socket() -> Option<PathBuf> {
    let path = std::env::var_os(SOCKET_VARIABLE).map_or_else(|| PathBuf::from(SOCKET), PathBuf::from);
    path.exists().then_some(path)
}

/// Whether stderr is the journal: what it gets there without fields is better sent with them. A program that
/// was started by a service and has redirected its stderr still has the variable, so it is compared.
pub(super) fn is_stderr() -> bool {
    let Ok(stat) = rustix::fs::fstat(rustix::stdio::stderr()) else { return false };
    std::env::var(STREAM_VARIABLE).is_ok_and(|value| value == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// syslog(3)'s number of a level.
pub(super) fn severity(level: Level) -> u32 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// The fields of an event or a span, in the journal's form, and its message.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields {
    pub(super) message: String,
    pub(super) bytes: Vec<u8>,
}

impl Fields {
    /// Adds a field: the value has a length of its own in front if it has a line end.
    pub(super) fn put(&mut self, name: &str, value: &[u8]) {
        let value = &value[..value.len().min(MAX_VALUE)];
        self.bytes.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            self.bytes.push(b'\n');
            self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.bytes.push(b'=');
        }
        self.bytes.extend_from_slice(value);
        self.bytes.push(b'\n');
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            // journald has a name for it.
            "errno" => self.put("ERRNO", value.as_bytes()),
            name => self.put(&format!("CHAINFS_{}", name.to_ascii_uppercase()), value.as_bytes()),
        }
    }
}

/// A record: the message, and fields.
pub(super) fn record(level: Level, message: &str, fields: &[&[u8]]) -> Vec<u8> {
    let mut all = Fields::default();
    all.put("MESSAGE", message.as_bytes());
    all.put("PRIORITY", severity(level).to_string().as_bytes());
    all.put("SYSLOG_IDENTIFIER", b"chainfs");
    all.put("SYSLOG_FACILITY", b"3");
    for bytes in fields {
        all.bytes.extend_from_slice(bytes);
    }
    all.bytes
}

/// Sends a datagram without blocking; whether somebody has taken it. Threads that serve the kernel must not
/// wait for another process: the journal may lie on a disk of this very mount.
pub(super) fn send(message: &[u8], log: &Path) -> bool {
    let socket = UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
    socket.and_then(|socket| socket.send_to(message, log)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_full_log_socket_does_not_block_the_sender() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let (done, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let sent = (0..10_000).filter(|_| send(&[b'x'; MAX_VALUE], &path)).count();
            done.send(sent).unwrap();
        });
        let sent = waited.recv_timeout(Duration::from_secs(20)).expect("sending blocks on a full socket");
        assert!(sent < 10_000);
    }

    #[test]
    fn without_a_journal_nothing_fails() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!send(b"lost", &directory.path().join("none")));
        let gone = directory.path().join("gone");
        drop(UnixDatagram::bind(&gone).unwrap());
        assert!(!send(b"lost", &gone));
    }

    #[test]
    fn a_value_with_line_ends_has_its_length_before_it() {
        let mut fields = Fields::default();
        fields.put("A", b"plain");
        fields.put("B", b"two\nlines");
        assert_eq!(fields.bytes, b"A=plain\nB\n\x09\0\0\0\0\0\0\0two\nlines\n");
        let long = record(Level::WARN, &"x".repeat(1 << 20), &[&fields.bytes]);
        assert!(long.len() < 2 * MAX_VALUE && long.ends_with(&fields.bytes));
        assert!(long.windows(12).any(|part| part == b"\nPRIORITY=4\n"));
    }
}
