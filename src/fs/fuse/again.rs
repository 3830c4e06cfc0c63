//! Who is refused because something is in use, and asks again and again.
//!
//! `losetup` and `mount -o loop` take EBUSY for a loop device that another has got first, and try the next one: on a disk that
//! another process writes, for ever. The first refusals are what they are; whoever comes back at once, and
//! once more, is told ETXTBSY, which ends it and says the same: the file is being written.

use std::time::{Duration, Instant};

use fuser::Errno;
use lru::LruCache;
use parking_lot::Mutex;

/// Refusals in a row that are EBUSY.
const PATIENCE: u32 = 8;
/// Who comes later than this after his last refusal has thought about it.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How many who were refused are remembered.
const REMEMBERED: std::num::NonZero<usize> = std::num::NonZero::new(256).expect("not zero");

/// By thread and inode: how often in a row it was refused, and when it was last.
pub(super) struct Refusals(Mutex<LruCache<(u32, u64), (u32, Instant)>>);

impl Default for Refusals {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

impl Refusals {
    /// What a thread is told whose opening of `inode` has been refused with `errno`.
    pub(super) fn tell(&self, thread: u32, inode: u64, errno: Errno) -> Errno {
        if errno.code() != Errno::EBUSY.code() {
            return errno;
        }
        let mut refused = self.0.lock();
        let (count, last) = refused.get_or_insert_mut((thread, inode), || (0, Instant::now()));
        *count = if last.elapsed() > AT_ONCE { 1 } else { *count + 1 };
        *last = Instant::now();
        if *count > PATIENCE { Errno::ETXTBSY } else { errno }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_asks_for_the_same_again_and_again_is_told_something_else() {
        let refusals = Refusals::default();
        let tell = |thread, inode| refusals.tell(thread, inode, Errno::EBUSY).code();
        let (busy, text_busy) = (Errno::EBUSY.code(), Errno::ETXTBSY.code());
        assert_eq!([(); PATIENCE as usize].map(|()| tell(1, 7)), [busy; PATIENCE as usize]);
        assert_eq!([(); 2].map(|()| tell(1, 7)), [text_busy; 2]);
        assert_eq!([tell(2, 7), tell(1, 8)], [busy, busy], "others, and other files");
        assert_eq!(refusals.tell(1, 7, Errno::EIO).code(), Errno::EIO.code());
        if let Some((_, last)) = refusals.0.lock().get_mut(&(1, 7)) {
            *last -= 2 * AT_ONCE;
        }
        assert_eq!(tell(1, 7), busy, "who has waited begins anew");
    }
}
