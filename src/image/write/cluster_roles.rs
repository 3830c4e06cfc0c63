//! The clusters of the file that hold tables: no cluster has two roles.
//!
//! Wrong refcounts could mark a table's cluster as free, so the allocator checks this set as well. A sparse
//! set of bits: tables are few, and close together.

use std::collections::HashMap;

const WORDS: u64 = 8;
const PER_CHUNK: u64 = WORDS * 64;

/// The clusters that hold tables.
pub(super) type ClusterRoles = ClusterSet;

/// A set of cluster numbers.
#[derive(Debug, Default)]
pub(super) struct ClusterSet {
    chunks: HashMap<u64, [u64; WORDS as usize]>,
}

impl ClusterSet {
    /// Whether the cluster is among them.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        let within = cluster % PER_CHUNK;
        self.chunks
            .get(&(cluster / PER_CHUNK))
            .is_some_and(|chunk| chunk[(within / 64) as usize] >> (within % 64) & 1 == 1)
    }

    /// Adds clusters; returns whether all of them are new.
    pub(super) fn add(&mut self, first: u64, count: u64) -> bool {
        let mut all_new = true;
        for cluster in first..first + count {
            let within = cluster % PER_CHUNK;
            let word = &mut self.chunks.entry(cluster / PER_CHUNK).or_default()[(within / 64) as usize];
            all_new &= *word >> (within % 64) & 1 == 0;
            *word |= 1 << (within % 64);
        }
        all_new
    }

    /// All clusters, in order, as first ones and counts.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut keys: Vec<u64> = self.chunks.keys().copied().collect();
        keys.sort_unstable();
        let clusters = keys.into_iter().flat_map(|key| key * PER_CHUNK..(key + 1) * PER_CHUNK);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for cluster in clusters.filter(|cluster| self.contains(*cluster)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => runs.push((cluster, 1)),
            }
        }
        runs
    }

    /// Removes clusters.
    pub(super) fn remove(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            let within = cluster % PER_CHUNK;
            if let Some(chunk) = self.chunks.get_mut(&(cluster / PER_CHUNK)) {
                chunk[(within / 64) as usize] &= !(1 << (within % 64));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_added_and_removed() {
        let mut roles = ClusterRoles::default();
        assert!(roles.add(500, 30) && !roles.contains(499) && roles.contains(500) && roles.contains(529));
        assert!(!roles.add(529, 2) && roles.contains(530));
        roles.remove(500, 29);
        assert_eq!(roles.runs(), [(529, 2)]);
        assert!(!roles.contains(528) && roles.contains(529) && !roles.contains(1 << 50));
    }
}
