//! A least-recently-used cache bounded by bytes and split into shards, so that worker threads
//! seldom wait for each other.

use std::hash::{BuildHasher, Hash, RandomState};

use lru::LruCache;
use parking_lot::Mutex;

const SHARD_COUNT: usize = 16;

/// Values by key; the least recently used go when their weights exceed the budget.
pub struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    hasher: RandomState,
}

struct Shard<K, V> {
    entries: LruCache<K, (V, usize)>,
    weight: usize,
    budget: usize,
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    /// A cache of about `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let shard = || Mutex::new(Shard { entries: LruCache::unbounded(), weight: 0, budget: budget / SHARD_COUNT });
        Self { shards: (0..SHARD_COUNT).map(|_| shard()).collect(), hasher: RandomState::new() }
    }

    fn shard(&self, key: &K) -> &Mutex<Shard<K, V>> {
        &self.shards[self.hasher.hash_one(key) as usize % SHARD_COUNT]
    }

    /// The value, now the most recently used.
    pub fn get(&self, key: &K) -> Option<V> {
        self.shard(key).lock().entries.get(key).map(|(value, _)| value.clone())
    }

    /// Keeps a value that takes `weight` bytes. One that is larger than a whole shard stays
    /// until the next is kept: the caller has just paid for it.
    pub fn put(&self, key: K, value: V, weight: usize) {
        let mut shard = self.shard(&key).lock();
        if let Some((_, old)) = shard.entries.put(key, (value, weight)) {
            shard.weight -= old;
        }
        shard.weight += weight;
        while shard.weight > shard.budget && shard.entries.len() > 1 {
            let Some((_, (_, old))) = shard.entries.pop_lru() else { break };
            shard.weight -= old;
        }
    }

    /// Bytes held now.
    pub fn weight(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().weight).sum()
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
