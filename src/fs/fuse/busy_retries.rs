//! Ends the loop of clients that retry on EBUSY.
//!
//! `losetup` and `mount -o loop` treat EBUSY as a lost race for a loop device and try the next one: on a disk
//! that another process writes, they would never stop. The first refusals are EBUSY. A client that keeps
//! retrying at once gets ETXTBSY, which ends its loop and has the same meaning: the file is being written.

use std::time::{Duration, Instant};

use fuser::Errno;
use lru::LruCache;
use parking_lot::Mutex;

/// Consecutive refusals with EBUSY.
const MAX_BUSY_REPLIES: u32 = 8;
/// A retry later than this after the last refusal starts a new count.
const RETRY_WINDOW: Duration = Duration::from_secs(1);
/// The number of threads and inodes to keep counts of.
const COUNTS_KEPT: std::num::NonZero<usize> = std::num::NonZero::new(256).expect("not zero");

/// By thread and inode: the number of consecutive refusals, and the time of the last one.
pub(super) struct BusyRetries(Mutex<LruCache<(u32, u64), (u32, Instant)>>);

impl Default for BusyRetries {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(COUNTS_KEPT)))
    }
}

impl BusyRetries {
    /// The errno for a thread whose open of `inode` was refused with `errno`.
    pub(super) fn errno(&self, thread: u32, inode: u64, errno: Errno) -> Errno {
        if errno.code() != Errno::EBUSY.code() {
            return errno;
        }
        let mut refused = self.0.lock();
        let (count, last) = refused.get_or_insert_mut((thread, inode), || (0, Instant::now()));
        *count = if last.elapsed() > RETRY_WINDOW { 1 } else { *count + 1 };
        *last = Instant::now();
        if *count > MAX_BUSY_REPLIES { Errno::ETXTBSY } else { errno }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_repeated_opens_of_one_file_get_another_errno() {
        let retries = BusyRetries::default();
        let errno = |thread, inode| retries.errno(thread, inode, Errno::EBUSY).code();
        let (busy, text_busy) = (Errno::EBUSY.code(), Errno::ETXTBSY.code());
        assert_eq!([(); MAX_BUSY_REPLIES as usize].map(|()| errno(1, 7)), [busy; MAX_BUSY_REPLIES as usize]);
        assert_eq!([(); 2].map(|()| errno(1, 7)), [text_busy; 2]);
        assert_eq!([errno(2, 7), errno(1, 8)], [busy, busy], "others, and other files");
        assert_eq!(retries.errno(1, 7, Errno::EIO).code(), Errno::EIO.code());
        if let Some((_, last)) = retries.0.lock().get_mut(&(1, 7)) {
            *last -= 2 * RETRY_WINDOW;
        }
        assert_eq!(errno(1, 7), busy, "a pause starts a new count");
    }
}
