//! Lists of guests' files: the output of `ls`, as text and JSON.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::guest::{FileAttributes, FileKind, Time};

use super::safe::{terminal_bytes, text};

/// A file in a list.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name or path.
    pub name: Vec<u8>,
    /// Its stat(2) attributes; `None` if they cannot be read.
    pub attributes: Option<FileAttributes>,
    /// The target of a symbolic link.
    pub target: Option<Vec<u8>>,
}

/// A line for each file: type and mode, links, owner, group, size or device numbers, time, name and target.
pub fn long(files: &[Listed], zone: &TimeZone) -> String {
    let columns: Vec<[String; 6]> = files.iter().map(|file| columns(file, zone)).collect();
    let width = |column: usize| columns.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |(file, row): (&Listed, &[String; 6])| {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:>width$} ");
        }
        line += &terminal_bytes(&file.name);
        if let Some(target) = &file.target {
            let _ = write!(line, " -> {}", terminal_bytes(target));
        }
        line + "\n"
    };
    files.iter().zip(&columns).map(line).collect()
}

fn columns(file: &Listed, zone: &TimeZone) -> [String; 6] {
    let Some(found) = &file.attributes else {
        return ["??????????", "?", "?", "?", "?", "?"].map(str::to_owned);
    };
    let size = match found.kind {
        FileKind::CharDevice | FileKind::BlockDevice => format!("{}, {}", found.device.0, found.device.1),
        _ => found.size.to_string(),
    };
    let numbers = [found.links, found.uid, found.gid].map(|number| number.to_string());
    let [links, uid, gid] = numbers;
    [mode(found), links, uid, gid, size, time(found.modified, zone)]
}

/// Names in columns for a terminal of that width; one per line without a width.
pub fn short(files: &[Listed], width: Option<usize>) -> String {
    let names: Vec<String> = files.iter().map(|file| terminal_bytes(&file.name)).collect();
    let widest = names.iter().map(|name| name.width() + 2).max().unwrap_or(1);
    let count = width.map_or(1, |width| (width / widest).max(1));
    let lines = names.len().div_ceil(count);
    let mut text = String::new();
    for line in 0..lines {
        // Down the columns first, like ls.
        let row: Vec<&String> = names.iter().skip(line).step_by(lines.max(1)).collect();
        for (index, name) in row.iter().enumerate() {
            text.push_str(name);
            if index + 1 < row.len() {
                text.extend(std::iter::repeat_n(' ', widest - name.width()));
            }
        }
        text.push('\n');
    }
    text
}

/// `drwxr-xr-x`.
pub fn mode(found: &FileAttributes) -> String {
    let kind = match found.kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
    };
    let mut text = String::from(kind);
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = found.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, found.mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// "2026-01-03 09:12:00"; seconds since 1970 for times outside the calendar.
pub fn time(at: Time, zone: &TimeZone) -> String {
    let found = timestamp(at).map(|at| at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string());
    found.unwrap_or_else(|| format!("@{}", at.seconds))
}

fn timestamp(at: Time) -> Option<Timestamp> {
    // Nanoseconds count forward from the second, also before 1970, unlike in jiff's constructor.
    Timestamp::from_second(at.seconds)
        .ok()?
        .checked_add(jiff::SignedDuration::from_nanos(at.nanoseconds.into()))
        .ok()
}

/// A file as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileObject {
    /// Bytes that are not UTF-8 are written `\xff`.
    name: String,
    /// The name's bytes in hexadecimal, if the name is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_bytes: Option<String>,
    #[serde(flatten)]
    attributes: Option<AttributesObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// The stat(2) attributes as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AttributesObject {
    #[serde(rename = "type")]
    kind: &'static str,
    mode: String,
    links: u32,
    uid: u32,
    gid: u32,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    modified: Option<String>,
    changed: Option<String>,
}

impl FileObject {
    /// From a file of a list.
    pub fn of(file: &Listed) -> Self {
        Self {
            name: text(&file.name),
            name_bytes: std::str::from_utf8(&file.name).is_err().then(|| hexadecimal(&file.name)),
            attributes: file.attributes.as_ref().map(AttributesObject::of),
            target: file.target.as_deref().map(text),
        }
    }
}

impl AttributesObject {
    /// From the attributes of an inode.
    pub fn of(found: &FileAttributes) -> Self {
        let is_device = matches!(found.kind, FileKind::CharDevice | FileKind::BlockDevice);
        let time = |at| timestamp(at).map(|at| at.to_string());
        Self {
            kind: kind(found.kind),
            mode: format!("{:04o}", found.mode),
            links: found.links,
            uid: found.uid,
            gid: found.gid,
            size: found.size,
            device: is_device.then(|| format!("{}:{}", found.device.0, found.device.1)),
            modified: time(found.modified),
            changed: time(found.changed),
        }
    }
}

/// A kind in find(1)'s terms, in full words.
pub fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::CharDevice => "char-device",
        FileKind::BlockDevice => "block-device",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
    }
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &[u8], kind: FileKind, mode: u16) -> Listed {
        let time = Time { seconds: 1_767_431_520, nanoseconds: 5 };
        let attributes = FileAttributes {
            kind,
            mode,
            uid: 0,
            gid: 1000,
            size: 7,
            blocks: 8,
            links: 1,
            device: (8, 1),
            accessed: time,
            modified: time,
            changed: time,
            created: None,
        };
        Listed { name: name.to_vec(), attributes: Some(attributes), target: None }
    }

    #[test]
    fn lines_are_aligned_and_safe_for_a_terminal() {
        let mut link = file(b"l", FileKind::Symlink, 0o777);
        link.target = Some(b"\x1b[2J".to_vec());
        let lost = Listed { name: b"lost".to_vec(), attributes: None, target: None };
        let files = [
            file(b"a\xff", FileKind::File, 0o4755),
            link,
            file(b"sda1", FileKind::BlockDevice, 0o1660),
            lost,
        ];
        let expected = "\
-rwsr-xr-x 1 0 1000    7 2026-01-03 09:12:00 a\\xff
lrwxrwxrwx 1 0 1000    7 2026-01-03 09:12:00 l -> \\x1b[2J
brw-rw---T 1 0 1000 8, 1 2026-01-03 09:12:00 sda1
?????????? ? ?    ?    ?                   ? lost
";
        assert_eq!(long(&files, &TimeZone::UTC), expected);
    }

    #[test]
    fn names_go_down_first() {
        let files: Vec<Listed> =
            ["a", "bb", "c", "d", "e"].map(|name| file(name.as_bytes(), FileKind::File, 0)).into();
        assert_eq!(short(&files, Some(12)), "a   c   e\nbb  d\n");
        assert_eq!(short(&files, Some(9)), "a   d\nbb  e\nc\n");
        assert_eq!(short(&files, None), "a\nbb\nc\nd\ne\n");
        assert_eq!(short(&[], Some(80)), "");
    }

    #[test]
    fn times_before_1970_and_beyond_the_calendar() {
        let at = |seconds, nanoseconds| Time { seconds, nanoseconds };
        assert_eq!(timestamp(at(-1, 500_000_000)).unwrap().to_string(), "1969-12-31T23:59:59.5Z");
        assert_eq!(time(at(i64::MAX, 0), &TimeZone::UTC), format!("@{}", i64::MAX));
    }
}
