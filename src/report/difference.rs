//! The differences between two disks or two trees of files, as text and JSON.

use serde::Serialize;

use crate::browse::difference::{Aspect, PathDifference, Side};

use super::files::{AttributesObject, hexadecimal};
use super::safe::{terminal_bytes, text};
use crate::units::human_size;

/// The counts of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Paths that only the second side has.
    pub added: u64,
    /// Paths that only the first side has.
    pub removed: u64,
    /// Paths with changes.
    pub changed: u64,
    /// Paths that could not be read.
    pub unreadable: u64,
    /// Bytes read from the disks.
    pub bytes_read: u64,
    /// Bytes of the volumes.
    pub bytes_total: u64,
}

impl Tally {
    /// Counts one finding.
    pub fn count(&mut self, finding: &PathDifference) {
        match finding {
            PathDifference::Added(_) | PathDifference::Subvolume(Side::B, _) => self.added += 1,
            PathDifference::Removed(_) | PathDifference::Subvolume(Side::A, _) => self.removed += 1,
            PathDifference::Changed { .. } | PathDifference::Bytes => self.changed += 1,
            PathDifference::Unreadable(..) => self.unreadable += 1,
        }
    }

    /// Whether anything differs.
    pub fn differs(&self) -> bool {
        self.added + self.removed + self.changed > 0
    }
}

/// `~ /p1/etc/hostname   content, time`.
pub fn line(path: &[u8], finding: &PathDifference) -> String {
    let path = terminal_bytes(path);
    match finding {
        PathDifference::Added(_) => format!("+ {path}\n"),
        PathDifference::Removed(_) => format!("- {path}\n"),
        PathDifference::Subvolume(side, _) => format!("{} {path}   the whole subvolume\n", mark(*side)),
        PathDifference::Changed { what, .. } => format!("~ {path}   {}\n", words(what).join(", ")),
        PathDifference::Bytes => format!("~ {path}   content, whose files cannot be shown\n"),
        PathDifference::Unreadable(side, error) => {
            let error = super::safe::terminal(&error.to_string());
            format!("! {path}   not readable in {}: {error}\n", side_name(*side))
        }
    }
}

/// A volume that only one side has.
pub fn volume_line(name: &str, side: Side) -> String {
    let mark = mark(side);
    format!("{mark} /{}   the whole volume\n", super::safe::terminal(name))
}

/// The mark of what only one side has.
fn mark(side: Side) -> char {
    if side == Side::A { '-' } else { '+' }
}

/// `3 added, 1 removed, 12 changed; 4.1 MiB of 1.2 GiB read`.
pub fn summary(tally: &Tally) -> String {
    let Tally { added, removed, changed, unreadable, bytes_read, bytes_total } = tally;
    let unreadable = if *unreadable > 0 { format!(", {unreadable} not readable") } else { String::new() };
    let (read, total) = (human_size(*bytes_read), human_size(*bytes_total));
    format!("{added} added, {removed} removed, {changed} changed{unreadable}; {read} of {total} read\n")
}

fn words(what: &[Aspect]) -> Vec<&'static str> {
    what.iter().map(|aspect| aspect.word()).collect()
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::A => "the first",
        Side::B => "the second",
    }
}

/// A finding as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangeObject {
    change: &'static str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    what: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<AttributesObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<AttributesObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl ChangeObject {
    /// From a finding.
    pub fn of(path: &[u8], finding: &PathDifference) -> Self {
        let mut object = Self {
            change: "unreadable",
            path: text(path),
            path_bytes: std::str::from_utf8(path).is_err().then(|| hexadecimal(path)),
            what: Vec::new(),
            a: None,
            b: None,
            error: None,
        };
        match finding {
            PathDifference::Added(after) => {
                (object.change, object.b) = ("added", Some(AttributesObject::of(after)));
            }
            PathDifference::Removed(before) => {
                (object.change, object.a) = ("removed", Some(AttributesObject::of(before)));
            }
            PathDifference::Subvolume(side, attributes) => {
                let attributes = Some(AttributesObject::of(attributes));
                object.what = vec!["subvolume"];
                match side {
                    Side::A => (object.change, object.a) = ("removed", attributes),
                    Side::B => (object.change, object.b) = ("added", attributes),
                }
            }
            PathDifference::Changed { before, after, what } => {
                (object.change, object.what) = ("changed", words(what));
                object.a = Some(AttributesObject::of(before));
                object.b = Some(AttributesObject::of(after));
            }
            PathDifference::Bytes => {
                (object.change, object.what) = ("changed", vec![Aspect::Content.word()]);
            }
            PathDifference::Unreadable(side, error) => {
                object.error = Some(format!("in {}: {error}", side_name(*side)));
            }
        }
        object
    }
}

/// All findings as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FilesObject {
    /// Whether nothing differs, as far as everything could be read.
    pub identical: bool,
    /// Volumes that only the first side has.
    pub only_in_a: Vec<String>,
    /// Volumes that only the second side has.
    pub only_in_b: Vec<String>,
    /// In the order of their paths.
    pub changes: Vec<ChangeObject>,
    /// Bytes read from the disks.
    pub bytes_read: u64,
    /// Bytes of the volumes.
    pub bytes_total: u64,
}

/// A range of two disks that differs.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RangeObject {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The volumes that overlap the range.
    pub volumes: Vec<String>,
}

/// All ranges as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RangesObject {
    /// Whether there are no ranges.
    pub identical: bool,
    /// Whether the disks' sizes differ.
    pub size_mismatch: bool,
    /// In order.
    pub ranges: Vec<RangeObject>,
    /// Bytes in all ranges.
    pub bytes_different: u64,
    /// Bytes read from both disks.
    pub bytes_read: u64,
}

/// `0x000000100000     64 KiB   p1`.
pub fn range_line(range: &RangeObject) -> String {
    let names: Vec<String> = range.volumes.iter().map(|name| super::safe::terminal(name)).collect();
    let names = if names.is_empty() { String::new() } else { format!("   {}", names.join(", ")) };
    format!("{:#014x} {:>10}{names}\n", range.start, human_size(range.length))
}

/// `2 ranges differ, 192 KiB of 10 GiB; 384 KiB read`.
pub fn ranges_summary(count: u64, different: u64, size: u64, read: u64) -> String {
    let read = human_size(read);
    if count == 0 {
        return format!("the disks are the same; {read} read\n");
    }
    let ranges = if count == 1 { "1 range differs".to_owned() } else { format!("{count} ranges differ") };
    format!("{ranges}, {} of {}; {read} read\n", human_size(different), human_size(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn a_hostile_name_stays_in_its_line() {
        let error = Error::new(ErrorKind::Corrupt, "bad\nblock");
        let text = line(b"/p1/a\nb", &PathDifference::Unreadable(Side::B, error));
        assert_eq!(text, "! /p1/a\\x0ab   not readable in the second: bad\\x0ablock\n");
        let tally = Tally {
            added: 3,
            removed: 1,
            changed: 12,
            bytes_read: 4_299_162,
            bytes_total: 1 << 30,
            unreadable: 0,
        };
        assert_eq!(summary(&tally), "3 added, 1 removed, 12 changed; 4.1 MiB of 1 GiB read\n");
        assert!(tally.differs() && !Tally { unreadable: 1, ..Tally::default() }.differs());
    }

    #[test]
    fn each_range_is_one_line() {
        let range = RangeObject { start: 1 << 20, length: 65_536, volumes: vec!["p1".into(), "vg-a".into()] };
        assert_eq!(range_line(&range), "0x000000100000     64 KiB   p1, vg-a\n");
        assert_eq!(ranges_summary(0, 0, 5, 0), "the disks are the same; 0 B read\n");
        assert_eq!(ranges_summary(1, 512, 1024, 2048), "1 range differs, 512 B of 1 KiB; 2 KiB read\n");
    }
}
