//! How long reads take, so that one which takes longer than most is sent again.

use std::time::Duration;

/// Samples that are kept.
const WINDOW: usize = 128;
/// Below so many samples nothing is known.
const ENOUGH: usize = 16;

/// The latest durations.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    samples: Vec<Duration>,
    next: usize,
}

impl Latencies {
    pub(crate) fn add(&mut self, sample: Duration) {
        if self.samples.len() < WINDOW {
            self.samples.push(sample);
        } else {
            self.samples[self.next] = sample;
        }
        self.next = (self.next + 1) % WINDOW;
    }

    /// The 95th percentile; `None` while too few are known.
    pub(crate) fn high(&self) -> Option<Duration> {
        if self.samples.len() < ENOUGH {
            return None;
        }
        let mut sorted = self.samples.clone();
        let index = sorted.len() * 95 / 100;
        Some(*sorted.select_nth_unstable(index).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_95th_percentile_of_the_latest() {
        let mut latencies = Latencies::default();
        for ms in 0..15 {
            latencies.add(Duration::from_millis(ms));
        }
        assert_eq!(latencies.high(), None);
        for ms in 0..1000 {
            latencies.add(Duration::from_millis(ms));
        }
        // The latest 128 are 872 to 999.
        assert_eq!(latencies.high(), Some(Duration::from_millis(872 + 121)));
    }
}
