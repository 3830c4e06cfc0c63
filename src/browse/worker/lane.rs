//! Messages on a socket: a length of the message, a length of the bytes that follow it, and both.
//!
//! What comes in is bounded before there is memory for it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a message, at most.
const MESSAGE_LEN: usize = 4 << 20;
/// Bytes that follow a message, at most.
const PAYLOAD_LEN: usize = 2 << 20;

/// One end of a lane.
#[derive(Debug)]
pub(super) struct Lane {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Lane {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, buffer: Vec::new() }
    }

    /// Sends a message and the bytes that follow it.
    pub(super) fn send(&mut self, message: &impl Serialize, payload: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.resize(8, 0);
        let buffer = postcard::to_extend(message, std::mem::take(&mut self.buffer)).map_err(io::Error::other)?;
        self.buffer = buffer;
        let len = (self.buffer.len() - 8) as u32;
        self.buffer[..4].copy_from_slice(&len.to_le_bytes());
        self.buffer[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(payload);
        self.socket.write_all(&self.buffer)
    }

    /// Receives a message and the bytes that follow it. `patience` is asked whenever the socket's time limit has
    /// passed without news, and ends the waiting with an error.
    pub(super) fn receive<T: DeserializeOwned>(
        &mut self,
        patience: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<(T, Vec<u8>)> {
        let mut lengths = [0; 8];
        self.fill(&mut lengths, patience)?;
        let [message, payload] = [0, 4].map(|at| {
            let bytes = lengths[at..at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(bytes) as usize
        });
        if message > MESSAGE_LEN || payload > PAYLOAD_LEN {
            return Err(io::Error::new(ErrorKind::InvalidData, "a message that is too long"));
        }
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.resize(message, 0);
        self.fill(&mut bytes, patience)?;
        let value = postcard::from_bytes(&bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        self.buffer = bytes;
        let mut rest = vec![0; payload];
        self.fill(&mut rest, patience)?;
        Ok((value, rest))
    }

    fn fill(&mut self, mut rest: &mut [u8], patience: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        while !rest.is_empty() {
            match self.socket.read(rest) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => rest = &mut rest[len..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => patience()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
