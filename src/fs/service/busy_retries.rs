//! Ends the loop of clients that retry on EBUSY.
//!
//! `losetup` and `mount -o loop` treat EBUSY as a lost race for a loop device and try the next one: on a disk
//! that another process writes, they would never stop. The first refusals are EBUSY. A client that keeps
//! retrying at once gets ETXTBSY, which ends its loop and has the same meaning: the file is being written.

use std::time::{Duration, Instant};

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
    /// Counts a refusal of a thread's open of `inode`; whether this thread gets ETXTBSY.
    pub(super) fn exceeded(&self, thread: u32, inode: u64) -> bool {
        let mut refused = self.0.lock();
        let (count, last) = refused.get_or_insert_mut((thread, inode), || (0, Instant::now()));
        *count = if last.elapsed() > RETRY_WINDOW { 1 } else { *count + 1 };
        *last = Instant::now();
        *count > MAX_BUSY_REPLIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_repeated_opens_of_one_file_exceed_the_count() {
        let retries = BusyRetries::default();
        let first = [(); MAX_BUSY_REPLIES as usize].map(|()| retries.exceeded(1, 7));
        assert_eq!(first, [false; MAX_BUSY_REPLIES as usize]);
        assert_eq!([(); 2].map(|()| retries.exceeded(1, 7)), [true; 2]);
        assert_eq!(
            [retries.exceeded(2, 7), retries.exceeded(1, 8)],
            [false, false],
            "others, and other files"
        );
        if let Some((_, last)) = retries.0.lock().get_mut(&(1, 7)) {
            *last -= 2 * RETRY_WINDOW;
        }
        assert!(!retries.exceeded(1, 7), "a pause starts a new count");
    }
}
