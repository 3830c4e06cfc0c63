//! Messages on a socket: the length of the message, the length of the payload, and both.
//!
//! Lengths are checked before memory is allocated.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroize as _;

/// Bytes of a message, at most.
const MESSAGE_LEN: usize = 4 << 20;
/// The same where the daemon is the sender: it may send key files.
const LARGE_MESSAGE_LEN: usize = 64 << 20;
/// Bytes by which a message is longer than the secrets in it, at most.
const BESIDE_SECRETS: usize = 64 << 10;
/// Bytes of the two lengths.
const LENGTHS: usize = 8;
/// Bytes of one read.
const READ_STEP: usize = 4096;
/// Bytes of a payload at most.
const PAYLOAD_LEN: usize = 2 << 20;

/// One end of a connection between the daemon and a worker.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    outgoing: Vec<u8>,
    /// Received bytes that are not consumed yet: most messages arrive in one read.
    incoming: Vec<u8>,
    consumed: usize,
    message_len: usize,
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> Self {
        let (outgoing, incoming) = (Vec::new(), Vec::new());
        Self { socket, outgoing, incoming, consumed: 0, message_len: MESSAGE_LEN }
    }

    /// Accepts messages with key files: for the worker's end.
    pub(super) fn with_large_messages(self) -> Self {
        Self { message_len: LARGE_MESSAGE_LEN, ..self }
    }

    /// Makes room for a message with so many bytes of secrets, so that no copies of it are left behind when
    /// the buffer grows.
    pub(super) fn prepare_for_secrets(&mut self, len: usize) {
        self.outgoing.clear();
        self.outgoing.reserve(len + BESIDE_SECRETS);
        self.incoming.reserve(BESIDE_SECRETS);
    }

    /// Overwrites the messages that were sent and received.
    pub(super) fn wipe(&mut self) {
        let rest = self.incoming.split_off(self.consumed);
        [std::mem::take(&mut self.outgoing), std::mem::replace(&mut self.incoming, rest)].zeroize();
        self.consumed = 0;
    }

    /// Sends a message and its payload.
    pub(super) fn send(&mut self, message: &impl Serialize, payload: &[u8]) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.outgoing);
        buffer.clear();
        buffer.resize(LENGTHS, 0);
        let mut buffer = postcard::to_extend(message, buffer).map_err(io::Error::other)?;
        let len = (buffer.len() - LENGTHS) as u32;
        buffer[..4].copy_from_slice(&len.to_le_bytes());
        buffer[4..LENGTHS].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        buffer.extend_from_slice(payload);
        self.outgoing = buffer;
        self.socket.write_all(&self.outgoing)
    }

    /// Receives a message and its payload. `patience` is called after each read timeout and each partial
    /// read; its error ends the wait.
    pub(super) fn receive<T: DeserializeOwned>(
        &mut self,
        patience: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<(T, Vec<u8>)> {
        self.await_bytes(LENGTHS, patience)?;
        let lengths = self.take(LENGTHS);
        let [message, payload] = [0, 4].map(|at| {
            let bytes = lengths[at..at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(bytes) as usize
        });
        if message > self.message_len || payload > PAYLOAD_LEN {
            return Err(io::Error::new(ErrorKind::InvalidData, "the message is too long"));
        }
        self.await_bytes(message + payload, patience)?;
        let value = postcard::from_bytes(self.take(message));
        let value = value.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok((value, self.take(payload).to_vec()))
    }

    fn take(&mut self, len: usize) -> &[u8] {
        self.consumed += len;
        &self.incoming[self.consumed - len..self.consumed]
    }

    /// Returns when `need` bytes are available.
    fn await_bytes(&mut self, need: usize, patience: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if self.consumed > 0 {
            self.incoming.drain(..self.consumed);
            self.consumed = 0;
        }
        while self.incoming.len() < need {
            let len = self.incoming.len();
            self.incoming.resize(need.max(len + READ_STEP), 0);
            let received = self.socket.read(&mut self.incoming[len..]);
            self.incoming.truncate(len + received.as_ref().copied().unwrap_or(0));
            match received {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => patience()?,
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                // A sender of single bytes would otherwise keep the reader waiting forever.
                Ok(_) if self.incoming.len() < need => patience()?,
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }
}
