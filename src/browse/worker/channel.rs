//! Messages on a socket: a length of the message, a length of the bytes that follow it, and both.
//!
//! What comes in is bounded before there is memory for it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a message, at most.
const MESSAGE_LEN: usize = 4 << 20;
/// Bytes of the two lengths.
const LENGTHS: usize = 8;
/// Bytes that are asked for at once.
const PIECE: usize = 4096;
/// Bytes that follow a message, at most.
const PAYLOAD_LEN: usize = 2 << 20;

/// One end of a lane.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    outgoing: Vec<u8>,
    /// What has come in and has not been taken: most messages come in one piece.
    incoming: Vec<u8>,
    taken: usize,
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, outgoing: Vec::new(), incoming: Vec::new(), taken: 0 }
    }

    /// Sends a message and the bytes that follow it.
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

    /// Receives a message and the bytes that follow it. `patience` is asked whenever the socket's time limit has
    /// passed without news, and after news that was not all, and ends the waiting with an error.
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
        if message > MESSAGE_LEN || payload > PAYLOAD_LEN {
            return Err(io::Error::new(ErrorKind::InvalidData, "a message that is too long"));
        }
        self.await_bytes(message + payload, patience)?;
        let value = postcard::from_bytes(self.take(message));
        let value = value.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok((value, self.take(payload).to_vec()))
    }

    fn take(&mut self, len: usize) -> &[u8] {
        self.taken += len;
        &self.incoming[self.taken - len..self.taken]
    }

    /// Returns when so many bytes are there to be taken.
    fn await_bytes(&mut self, need: usize, patience: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if self.taken > 0 {
            self.incoming.drain(..self.taken);
            self.taken = 0;
        }
        while self.incoming.len() < need {
            let len = self.incoming.len();
            self.incoming.resize(need.max(len + PIECE), 0);
            let received = self.socket.read(&mut self.incoming[len..]);
            self.incoming.truncate(len + received.as_ref().copied().unwrap_or(0));
            match received {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => patience()?,
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                // Who sends byte by byte keeps others waiting as well.
                Ok(_) if self.incoming.len() < need => patience()?,
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }
}
