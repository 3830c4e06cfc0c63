//! Counters in Prometheus' text format, for the file `.chainfs/metrics`.

use std::fmt::{Display, Write as _};

/// The kind of a family of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A text of whole families; [`Metrics::finish`] returns it.
#[derive(Debug, Default)]
pub struct Metrics {
    text: String,
}

/// One family. Its samples must be contiguous, so they are added through this.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Metrics {
    /// An empty text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a family.
    ///
    /// # Panics
    /// If the name is invalid: names are constants, so this is a bug.
    ///
    /// # Panics
    /// If the name is none: names are ours, so a bad one is our bug.
    pub fn family(&mut self, name: &'static str, kind: MetricKind, help: &str) -> Family<'_> {
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{name}");
        let word = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {word}");
        Family { text: &mut self.text, name }
    }

    /// The text, ready for a scraper.
    pub fn finish(self) -> String {
        self.text
    }
}

impl Family<'_> {
    /// Adds a sample. Label values may contain any characters.
    #[allow(clippy::return_self_not_must_use)] // the last sample of a family is dropped
    pub fn sample(self, labels: &[(&str, &str)], value: impl Display) -> Self {
        self.text.push_str(self.name);
        for (number, (label, text)) in labels.iter().enumerate() {
            let open = if number == 0 { '{' } else { ',' };
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Not required by the format: people read this file with cat.
            let text: String = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            let _ = write!(self.text, "{open}{label}=\"{text}\"");
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{close} {value}");
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_help_type_and_escaped_labels() {
        let mut metrics = Metrics::new();
        metrics.family("chainfs_images", MetricKind::Gauge, "Images of the store.").sample(&[], 7);
        metrics
            .family("chainfs_read_bytes_total", MetricKind::Counter, "Bytes read\nby guests.")
            .sample(&[("chain", "a\"b\\c\nd\x1b"), ("view", "active")], 1u64 << 40)
            .sample(&[("chain", "e")], 0.5);
        let expected = "\
# HELP chainfs_images Images of the store.
# TYPE chainfs_images gauge
chainfs_images 7
# HELP chainfs_read_bytes_total Bytes read\\nby guests.
# TYPE chainfs_read_bytes_total counter
chainfs_read_bytes_total{chain=\"a\\\"b\\\\c\\nd\u{fffd}\",view=\"active\"} 1099511627776
chainfs_read_bytes_total{chain=\"e\"} 0.5
";
        assert_eq!(metrics.finish(), expected);
    }
}
