//! The clusters of the disk that are being changed: a thread that allocates, zeroes or frees holds its range,
//! and others that need any of it wait.

use parking_lot::{Condvar, Mutex};

/// The ranges that are held now, as pairs of first and end.
#[derive(Debug, Default)]
pub struct Ranges {
    held: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub struct Held<'a> {
    ranges: &'a Ranges,
    range: (u64, u64),
}

impl Ranges {
    /// Waits until no other thread holds any of `[start, end)`, then holds it. A thread holds one range at a
    /// time, so that no threads wait in a circle.
    pub fn hold(&self, start: u64, end: u64) -> Held<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|range| range.0 < end && start < range.1) {
            self.freed.wait(&mut held);
        }
        held.push((start, end));
        Held { ranges: self, range: (start, end) }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held.lock();
        let index = held.iter().position(|range| *range == self.range).expect("a range that is held");
        held.swap_remove(index);
        self.ranges.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn overlapping_ranges_are_held_one_at_a_time() {
        let (ranges, inside) = (Ranges::default(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _held = ranges.hold(10, 20);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        let _other = Ranges::default();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        let (_one, _next) = (ranges.hold(0, 10), ranges.hold(10, 20));
    }
}
