//! A disk that counts reads: the amount of work for a query does not depend on the machine.

use std::sync::atomic::{AtomicU64, Ordering};

use chainfs::error::Result;
use chainfs::guest::Source;

/// A source, and the number of requests and of bytes that were read of it.
pub(crate) struct Counted<S> {
    source: S,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl<S> Counted<S> {
    pub(crate) fn new(source: S) -> Self {
        Self { source, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    /// Requests, and bytes of all of them, since this was last asked.
    pub(crate) fn taken(&self) -> (u64, u64) {
        (self.requests.swap(0, Ordering::Relaxed), self.bytes.swap(0, Ordering::Relaxed))
    }
}

impl<S: Source> Source for Counted<S> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.source.read_at(at, buf)
    }
}
