//! Byte ranges that may overlap, turned into disjoint ones with their number of references.
//!
//! Thousands of snapshots of a hostile image may name overlapping tables. Reading each range once, with a
//! weight, bounds the work by the size of the file.

/// How often something is referenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weight {
    /// By the active tables.
    pub(super) active: u64,
    /// By all tables.
    pub(super) total: u64,
}

impl Weight {
    /// One reference of the active tables.
    pub(super) const ACTIVE: Self = Self { active: 1, total: 1 };
    /// One reference of anything else.
    pub(super) const OTHER: Self = Self { active: 0, total: 1 };

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            active: self.active.saturating_add(other.active),
            total: self.total.saturating_add(other.total),
        }
    }
}

/// Bytes `start..end` of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WeightedRange {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) weight: Weight,
}

/// The same bytes with the same weights, in order and without overlap.
pub(super) fn disjoint(ranges: &[WeightedRange]) -> Vec<WeightedRange> {
    // Where the weight changes: the ranges that begin there, and those that end there.
    let mut changes: Vec<(u64, Weight, Weight)> = Vec::with_capacity(ranges.len() * 2);
    for range in ranges.iter().filter(|range| range.start < range.end) {
        changes.push((range.start, range.weight, Weight::default()));
        changes.push((range.end, Weight::default(), range.weight));
    }
    changes.sort_unstable_by_key(|&(at, ..)| at);
    let mut out: Vec<WeightedRange> = Vec::new();
    let (mut begun, mut ended) = (Weight::default(), Weight::default());
    for (index, &(start, begins, ends)) in changes.iter().enumerate() {
        (begun, ended) = (begun.plus(begins), ended.plus(ends));
        let weight = Weight { active: begun.active - ended.active, total: begun.total - ended.total };
        let Some(&(end, ..)) = changes.get(index + 1) else { break };
        if start < end && weight.total > 0 {
            out.push(WeightedRange { start, end, weight });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64, weight: Weight) -> WeightedRange {
        WeightedRange { start, end, weight }
    }

    #[test]
    fn overlaps_become_ranges_of_their_own() {
        let ranges = [range(0, 10, Weight::ACTIVE), range(5, 15, Weight::OTHER), range(5, 8, Weight::OTHER)];
        let three = Weight { active: 1, total: 3 };
        let two = Weight { active: 1, total: 2 };
        let expected = [
            range(0, 5, Weight::ACTIVE),
            range(5, 8, three),
            range(8, 10, two),
            range(10, 15, Weight::OTHER),
        ];
        assert_eq!(disjoint(&ranges), expected);
    }

    #[test]
    fn gaps_and_empty_ranges_leave_nothing() {
        let ranges = [range(20, 30, Weight::OTHER), range(3, 3, Weight::OTHER), range(0, 1, Weight::OTHER)];
        assert_eq!(disjoint(&ranges), [range(0, 1, Weight::OTHER), range(20, 30, Weight::OTHER)]);
        assert_eq!(disjoint(&[]), []);
    }
}
