//! Fast commits: small changes that were committed between two transactions, kept as an overlay in memory.
//!
//! A record says "this name was added", "these blocks hold this part of the file" or "the inode is now this".
//! The kernel applies the records when it mounts. Here they are kept as they are and consulted on each
//! request: by name in a directory, by block in a file, by number for inodes.

mod replay;

use std::collections::{BTreeMap, HashMap};

use super::map::{ExtMapping, ExtSegment};

/// The combined changes of all fast commits.
#[derive(Debug, Default)]
pub(super) struct FastCommits {
    inodes: HashMap<u32, Box<[u8]>>,
    ranges: HashMap<u32, ExtSegments>,
    names: HashMap<u32, NameChanges>,
}

impl FastCommits {
    /// An inode as it was last committed.
    pub(super) fn inode(&self, number: u32) -> Option<&[u8]> {
        self.inodes.get(&number).map(AsRef::as_ref)
    }

    /// The changes to the names of a directory.
    pub(super) fn names(&self, directory: u32) -> Option<&NameChanges> {
        self.names.get(&directory)
    }

    /// The last recorded mapping of block `at` of a file and of those after it.
    pub(super) fn range(&self, number: u32, at: u64) -> Option<ExtSegment> {
        self.ranges.get(&number)?.covering(at)
    }

    /// The next block after `at` with a recorded mapping.
    pub(super) fn next_range(&self, number: u32, at: u64) -> Option<u64> {
        self.ranges.get(&number)?.0.range(at + 1..).next().map(|(start, _)| *start)
    }
}

/// Segments of a file by their first block; none overlaps another.
#[derive(Debug, Default)]
struct ExtSegments(BTreeMap<u64, ExtSegment>);

impl ExtSegments {
    fn covering(&self, at: u64) -> Option<ExtSegment> {
        let (start, segment) = self.0.range(..=at).next_back()?;
        (at - start < segment.count).then(|| rest(*segment, at - start))
    }

    /// Sets the mapping of a range and replaces earlier ones.
    fn put(&mut self, start: u64, segment: ExtSegment) {
        let end = start + segment.count;
        if let Some((first, before)) =
            self.0.range(..start).next_back().map(|(first, before)| (*first, *before))
        {
            let cut = start - first;
            if before.count > cut {
                self.0.insert(first, ExtSegment { count: cut, ..before });
                if before.count > end - first {
                    self.0.insert(end, rest(before, end - first));
                }
            }
        }
        while let Some((first, old)) = self.0.range(start..end).next().map(|(first, old)| (*first, *old)) {
            self.0.remove(&first);
            if first + old.count > end {
                self.0.insert(end, rest(old, end - first));
            }
        }
        self.0.insert(start, segment);
    }
}

/// A segment without its first `skip` blocks.
fn rest(segment: ExtSegment, skip: u64) -> ExtSegment {
    let mapping = match segment.mapping {
        ExtMapping::Stored(first) => ExtMapping::Stored(super::Block(first.0 + skip)),
        mapping => mapping,
    };
    ExtSegment { count: segment.count - skip, mapping }
}

/// A change of a name.
#[derive(Clone, Copy, Debug)]
enum NameChange {
    Added(u32),
    Removed(u32),
}

/// The changes to the names of one directory.
#[derive(Debug, Default)]
pub(super) struct NameChanges {
    changes: HashMap<Vec<u8>, Vec<NameChange>>,
    order: Vec<Vec<u8>>,
    outcomes: HashMap<Vec<u8>, Outcome>,
    fresh: bool,
}

/// The combined effect of all changes of a name.
#[derive(Debug, Default)]
struct Outcome {
    /// The result if the name did not exist before.
    absent: Option<u32>,
    /// The result if the name stood for one of the removed inodes; any other inode stays.
    removed: HashMap<u32, Option<u32>>,
}

impl Outcome {
    /// A name that exists keeps its inode when another is added: the stored one reached the disk first. A
    /// removal applies only to the inode that it names.
    fn of(changes: &[NameChange]) -> Self {
        // From the last change to the first: the result for a name that is absent before the change, and
        // where each inode is removed.
        let mut absent = vec![None; changes.len() + 1];
        let mut removal: HashMap<u32, usize> = HashMap::new();
        for (index, change) in changes.iter().enumerate().rev() {
            absent[index] = match change {
                NameChange::Added(ino) => removal.get(ino).map_or(Some(*ino), |index| absent[index + 1]),
                NameChange::Removed(ino) => {
                    removal.insert(*ino, index);
                    absent[index + 1]
                }
            };
        }
        let removed = removal.into_iter().map(|(ino, index)| (ino, absent[index + 1])).collect();
        Self { absent: absent[0], removed }
    }
}

impl NameChanges {
    /// The directory was created by a fast commit: it holds only names that were added since.
    pub(super) fn fresh(&self) -> bool {
        self.fresh
    }

    /// All changed names, in the order of their first change.
    pub(super) fn in_order(&self) -> &[Vec<u8>] {
        &self.order
    }

    /// The inode of a name now, if it was `stored` before.
    pub(super) fn now(&self, name: &[u8], stored: Option<u32>) -> Option<u32> {
        let Some(outcome) = self.outcomes.get(name) else { return stored };
        stored.map_or(outcome.absent, |ino| outcome.removed.get(&ino).copied().unwrap_or(stored))
    }

    fn change(&mut self, name: &[u8], change: NameChange) {
        if let Some(changes) = self.changes.get_mut(name) {
            changes.push(change);
            return;
        }
        self.order.push(name.to_vec());
        self.changes.insert(name.to_vec(), vec![change]);
    }

    /// Computes the outcomes; no change may follow.
    fn settle(&mut self) {
        let changes = std::mem::take(&mut self.changes);
        self.outcomes = changes.into_iter().map(|(name, changes)| (name, Outcome::of(&changes))).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Block;
    use super::*;

    fn stored(count: u64, first: u64) -> ExtSegment {
        ExtSegment { count, mapping: ExtMapping::Stored(Block(first)) }
    }

    #[test]
    fn a_later_range_replaces_what_it_covers() {
        let mut ranges = ExtSegments::default();
        ranges.put(10, stored(10, 100));
        ranges.put(14, ExtSegment { count: 2, mapping: ExtMapping::Hole });
        ranges.put(30, stored(1, 7));
        ranges.put(19, stored(12, 500));
        let all: Vec<_> = ranges.0.into_iter().collect();
        let hole = ExtSegment { count: 2, mapping: ExtMapping::Hole };
        assert_eq!(all, [(10, stored(4, 100)), (14, hole), (16, stored(3, 106)), (19, stored(12, 500))]);
    }

    #[test]
    fn a_range_in_the_middle_is_found_by_each_of_its_blocks() {
        let mut ranges = ExtSegments::default();
        ranges.put(10, stored(3, 100));
        assert_eq!(ranges.covering(9), None);
        assert_eq!(ranges.covering(12), Some(stored(1, 102)));
        assert_eq!(ranges.covering(13), None);
    }

    #[test]
    fn names_follow_the_changes_in_their_order() {
        let mut names = NameChanges::default();
        names.change(b"a", NameChange::Removed(5));
        names.change(b"a", NameChange::Added(6));
        for change in [
            NameChange::Added(1),
            NameChange::Removed(1),
            NameChange::Added(2),
            NameChange::Added(3),
            NameChange::Removed(3),
        ] {
            names.change(b"c", change);
        }
        names.settle();
        assert_eq!(names.now(b"a", Some(5)), Some(6));
        assert_eq!(names.now(b"a", Some(7)), Some(7), "the directory was written in the meantime");
        assert_eq!(names.now(b"b", Some(7)), Some(7));
        let of_c = [None, Some(1), Some(3), Some(9)].map(|stored| names.now(b"c", stored));
        assert_eq!(of_c, [Some(2), Some(2), None, Some(9)]);
    }
}
