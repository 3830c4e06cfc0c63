//! Caches of what was least recently used, bounded by weight: one for a single holder, and one split into
//! shards, so that worker threads seldom wait for each other.

use std::hash::{BuildHasher, Hash, RandomState};

use lru::LruCache;
use parking_lot::Mutex;

const SHARD_COUNT: usize = 16;

/// Values by key; the least recently used go when their weights exceed the budget.
pub struct Cache<K, V> {
    shards: Vec<Mutex<Weighted<K, V>>>,
    hasher: RandomState,
}

/// The same without locks. Takes no memory to speak of before there is anything in it.
pub(crate) struct Weighted<K, V> {
    entries: LruCache<K, (V, usize)>,
    weight: usize,
    budget: usize,
}

impl<K: Hash + Eq, V: Clone> Weighted<K, V> {
    pub(crate) fn new(budget: usize) -> Self {
        Self { entries: LruCache::unbounded(), weight: 0, budget }
    }

    /// What all of them may weigh together.
    pub(crate) fn budget(&self) -> usize {
        self.budget
    }

    /// What all of them weigh now.
    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// The value, now the most recently used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.entries.get(key).map(|(value, _)| value.clone())
    }

    /// Keeps a value that weighs so much. One that is heavier than the budget stays until the next is kept.
    pub(crate) fn put(&mut self, key: K, value: V, weight: usize) {
        if let Some((_, old)) = self.entries.put(key, (value, weight)) {
            self.weight -= old;
        }
        self.weight += weight;
        // B3: the oldest goes.
        while self.weight > self.budget && self.entries.len() > 1 {
            let Some((_, (_, old))) = self.entries.pop_lru() else { break };
            self.weight -= old;
        }
    }
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    /// A cache of about `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let shard = || Mutex::new(Weighted::new(budget / SHARD_COUNT));
        Self { shards: (0..SHARD_COUNT).map(|_| shard()).collect(), hasher: RandomState::new() }
    }

    fn shard(&self, key: &K) -> &Mutex<Weighted<K, V>> {
        &self.shards[self.hasher.hash_one(key) as usize % SHARD_COUNT]
    }

    /// The value, now the most recently used.
    pub fn get(&self, key: &K) -> Option<V> {
        self.shard(key).lock().get(key)
    }

    /// Keeps a value that takes `weight` bytes. One that is larger than a whole shard stays
    /// until the next is kept: the caller has just paid for it.
    pub fn put(&self, key: K, value: V, weight: usize) {
        self.shard(&key).lock().put(key, value, weight);
    }

    /// Bytes held now.
    pub fn weight(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().weight()).sum()
    }
}

impl<K, V> std::fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_stays_within_the_budget_and_the_used_stay() {
        let cache = Cache::new(SHARD_COUNT * 100);
        for n in 0..10_000 {
            cache.put(n, n, 10);
            assert_eq!(cache.get(&n), Some(n));
        }
        assert!(cache.weight() <= SHARD_COUNT * 100);
        assert_eq!(cache.get(&0), None);
        cache.put(9_999, 1, 20);
        assert_eq!(cache.get(&9_999), Some(1));
    }

    #[test]
    fn a_value_larger_than_its_share_is_still_given_back() {
        let cache = Cache::new(16);
        cache.put(1, "large", 1_000);
        assert_eq!(cache.get(&1), Some("large"));
    }
}
