//! The difference of two texts in the unified format of diff(1).
//!
//! Bounded: a text that has no good comparison within the time limit is compared less well, never wrongly.
//! What is binary or too large is said instead.

use std::io::Write as _;
use std::time::Duration;

use similar::TextDiff;

use super::safe::terminal;

/// The largest file that is compared.
pub const LARGEST: u64 = 4 << 20;
/// Time for one comparison. After it, the rest is shown as removed and added.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// Lines around a change, as in diff(1).
const CONTEXT: usize = 3;

/// One side of a comparison.
#[derive(Debug)]
pub struct DiffSide<'a> {
    /// Its name in the header; `None` if there is no file on this side.
    pub name: Option<&'a str>,
    /// Its bytes; `None` if they are more than [`LARGEST`].
    pub bytes: Option<&'a [u8]>,
}

impl DiffSide<'_> {
    fn shown(&self) -> String {
        self.name.map_or_else(|| "/dev/null".to_owned(), terminal)
    }
}

/// The difference, with a header; empty if both are the same.
pub fn unified(old: &DiffSide<'_>, new: &DiffSide<'_>) -> Vec<u8> {
    let (old_name, new_name) = (old.shown(), new.shown());
    let (Some(a), Some(b)) = (old.bytes, new.bytes) else {
        let fact = format!(
            "Files {old_name} and {new_name} differ: larger than {} MiB, not compared line by line\n",
            LARGEST >> 20
        );
        return fact.into_bytes();
    };
    if a == b {
        return Vec::new();
    }
    if is_binary(a) || is_binary(b) {
        return format!("Binary files {old_name} and {new_name} differ\n").into_bytes();
    }
    let (a, b) = (lines(a), lines(b));
    let mut configured = TextDiff::configure();
    let diff = configured.newline_terminated(true).timeout(TIME_LIMIT).diff_slices(&a, &b);
    let mut text = Vec::new();
    let mut output = diff.unified_diff();
    let written = output.context_radius(CONTEXT).header(&old_name, &new_name).to_writer(&mut text);
    written.expect("a vector takes all bytes");
    let _ = text.flush();
    text
}

/// As for diff(1), lines end with a newline alone.
fn lines(text: &[u8]) -> Vec<&[u8]> {
    text.split_inclusive(|byte| *byte == b'\n').collect()
}

/// As for diff(1): whether a zero byte is in it.
fn is_binary(bytes: &[u8]) -> bool {
    bytes.contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(old: &[u8], new: &[u8]) -> String {
        let side = |name, bytes| DiffSide { name: Some(name), bytes: Some(bytes) };
        String::from_utf8_lossy(&unified(&side("a", old), &side("b", new))).into_owned()
    }

    #[test]
    fn a_changed_line_has_its_context() {
        let text = of(b"1\n2\n3\n4\n5\n", b"1\n2\nx\n4\n5");
        assert_eq!(
            text,
            "--- a\n+++ b\n@@ -1,5 +1,5 @@\n 1\n 2\n-3\n+x\n 4\n-5\n+5\n\\ No newline at end of file\n"
        );
        assert_eq!(of(b"same\n", b"same\n"), "");
    }

    #[test]
    fn a_carriage_return_ends_no_line() {
        assert_eq!(of(b"a\rb\n", b"a\rc\n"), "--- a\n+++ b\n@@ -1 +1 @@\n-a\rb\n+a\rc\n");
    }

    #[test]
    fn binary_and_large_files_are_said() {
        assert_eq!(of(b"a\0", b"b"), "Binary files a and b differ\n");
        let old = DiffSide { name: None, bytes: Some(b"") };
        let new = DiffSide { name: Some("b"), bytes: None };
        let text = String::from_utf8(unified(&old, &new)).unwrap();
        assert_eq!(text, "Files /dev/null and b differ: larger than 4 MiB, not compared line by line\n");
    }

    /// Nothing of these lines is equal, which is the worst for most algorithms.
    #[test]
    fn a_hard_comparison_ends() {
        let text = |seed: u64| {
            let line = |number: u64| format!("{}\n", (number * 7919 + seed) % 65_521);
            (0..300_000).map(line).collect::<String>().into_bytes()
        };
        let found = of(&text(1), &text(30_000));
        assert!(found.starts_with("--- a\n+++ b\n@@ "));
    }
}
