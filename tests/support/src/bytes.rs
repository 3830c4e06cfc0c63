//! Bytes compared as fast as memory is read: most comparisons of tests find no difference.

/// Compared at once.
const BLOCK: usize = 4096;

/// The first position where the two differ, in the length of the shorter one.
pub fn first_difference(have: &[u8], want: &[u8]) -> Option<usize> {
    let len = have.len().min(want.len());
    let (have, want) = (&have[..len], &want[..len]);
    let block = have.chunks(BLOCK).zip(want.chunks(BLOCK)).position(|(have, want)| have != want)?;
    let start = block * BLOCK;
    let within = have[start..].iter().zip(&want[start..]).position(|(have, want)| have != want);
    within.map(|within| start + within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_wherever_it_is() {
        for len in [0, 1, 4095, 4096, 4097, 10_000] {
            let want = vec![7; len];
            assert_eq!(first_difference(&want, &want), None);
            for at in [0, 1, 4095, 4096, 4097, 8191, 9999] {
                if at < len {
                    let mut have = want.clone();
                    have[at..].fill(8);
                    assert_eq!(first_difference(&have, &want), Some(at), "{len}");
                    assert_eq!(first_difference(&have[..at], &want), None, "{len}");
                }
            }
        }
    }
}
