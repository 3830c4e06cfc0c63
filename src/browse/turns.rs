//! One at a time, for each thing of many.

use std::collections::HashSet;
use std::hash::Hash;

use parking_lot::{Condvar, Mutex};

/// Who has a thing's turn keeps all others waiting who want that thing, and nobody else.
#[derive(Debug)]
pub(super) struct Turns<T> {
    taken: Mutex<HashSet<T>>,
    ended: Condvar,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { taken: Mutex::default(), ended: Condvar::new() }
    }
}

/// A thing's turn, until it is dropped.
#[must_use = "the turn ends when this is dropped"]
pub(super) struct Turn<'a, T: Eq + Hash> {
    turns: &'a Turns<T>,
    thing: &'a T,
}

impl<T: Eq + Hash + Clone> Turns<T> {
    /// Waits until nobody has it.
    pub(super) fn take<'a>(&'a self, thing: &'a T) -> Turn<'a, T> {
        let mut taken = self.taken.lock();
        while !taken.insert(thing.clone()) {
            self.ended.wait(&mut taken);
        }
        Turn { turns: self, thing }
    }
}

impl<T: Eq + Hash> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.turns.taken.lock().remove(self.thing);
        self.turns.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn one_thing_has_one_turn_and_another_thing_its_own() {
        let (turns, inside) = (Turns::default(), AtomicU64::new(0));
        let other = turns.take(&2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _turn = turns.take(&1);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        drop(other);
        drop(turns.take(&2));
    }
}
