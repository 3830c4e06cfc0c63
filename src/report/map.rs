//! The map of a disk, as `qemu-img map` prints it.

use super::safe::terminal;
use serde::Serialize;
use std::fmt::Write as _;

/// A run of the guest's disk with one source. The JSON is qemu-img's, without `filename`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(clippy::struct_excessive_bools)] // QEMU's fields
pub struct MapEntry {
    /// First byte on the guest's disk.
    pub start: u64,
    /// Bytes of the run.
    pub length: u64,
    /// The layer that has the run; 0 is the requested one.
    pub depth: usize,
    /// Whether any layer has the run.
    pub present: bool,
    /// Whether the run reads as zeroes.
    pub zero: bool,
    /// Whether bytes are stored for the run.
    pub data: bool,
    /// Whether the bytes are compressed.
    pub compressed: bool,
    /// Whether the content is unknown because a layer is missing: an addition of chainfs. QEMU's flags then
    /// say neither data nor zeroes.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
    /// The offset in the file, if the bytes are stored there unchanged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file that holds the bytes, for the text.
    #[serde(skip)]
    pub filename: Option<String>,
}

/// Like `qemu-img map --output=json`: one run per line.
pub fn json(entries: &[MapEntry]) -> String {
    let mut text = String::from("[");
    for (number, entry) in entries.iter().enumerate() {
        let separator = if number == 0 { "" } else { ",\n" };
        let _ = write!(
            text,
            "{separator}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": \
                {}, \"data\": {}, \
             \"compressed\": {}",
            entry.start, entry.length, entry.depth, entry.present, entry.zero, entry.data, entry.compressed
        );
        if entry.lost {
            text.push_str(", \"lost\": true");
        }
        if let Some(offset) = entry.offset {
            let _ = write!(text, ", \"offset\": {offset}");
        }
        text.push('}');
    }
    text.push_str("]\n");
    text
}

/// Like `qemu-img map`: the stored runs and their positions. Compressed runs, which qemu-img refuses, are
/// shown as such.
pub fn human(entries: &[MapEntry]) -> String {
    let mut text = format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    for entry in entries.iter().filter(|entry| entry.data && !entry.zero || entry.lost) {
        let place = match entry.offset {
            _ if entry.lost => "missing".to_owned(),
            Some(offset) => hex(offset),
            None if entry.compressed => "compressed".to_owned(),
            None => "-".to_owned(),
        };
        let file = entry.filename.as_deref().map(terminal).unwrap_or_default();
        let line = format!("{:<16}{:<16}{place:<16}{file}", hex(entry.start), hex(entry.length));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// C prints zero without a prefix.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, length: u64) -> MapEntry {
        let (present, data) = (true, true);
        MapEntry {
            start,
            length,
            depth: 0,
            present,
            zero: false,
            data,
            compressed: false,
            lost: false,
            offset: None,
            filename: None,
        }
    }

    fn sample() -> [MapEntry; 3] {
        let mid = Some("mid.qcow2".to_owned());
        [
            MapEntry { depth: 1, offset: Some(0x90000), filename: mid, ..entry(0, 0x20000) },
            MapEntry { zero: true, data: false, ..entry(0x20000, 65536) },
            MapEntry { compressed: true, filename: Some("z\n".into()), ..entry(0x30000, 65536) },
        ]
    }

    #[test]
    fn the_json_matches_qemu_img() {
        let expected = [
            r#"[{ "start": 0, "length": 131072, "depth": 1, "present": true, "#,
            r#""zero": false, "data": true, "compressed": false, "offset": 589824},"#,
            "\n",
            r#"{ "start": 131072, "length": 65536, "depth": 0, "present": true, "#,
            r#""zero": true, "data": false, "compressed": false},"#,
            "\n",
            r#"{ "start": 196608, "length": 65536, "depth": 0, "present": true, "#,
            r#""zero": false, "data": true, "compressed": true}]"#,
            "\n",
        ]
        .concat();
        assert_eq!(json(&sample()), expected);
        let parsed: serde_json::Value = serde_json::from_str(&expected).unwrap();
        assert_eq!(serde_json::to_value(sample()).unwrap(), parsed);
        assert_eq!(json(&[]), "[]\n");
    }

    #[test]
    fn a_lost_run_is_neither_data_nor_zero() {
        let lost = MapEntry { present: false, data: false, lost: true, ..entry(0, 512) };
        let expected = "[{ \"start\": 0, \"length\": 512, \"depth\": 0, \"present\": false, \"zero\": false, \
                        \"data\": false, \"compressed\": false, \"lost\": true}]\n";
        assert_eq!(json(std::slice::from_ref(&lost)), expected);
        assert!(human(&[lost]).ends_with("\n0               0x200           missing\n"));
    }

    #[test]
    fn the_table_shows_stored_runs() {
        let expected = "\
Offset          Length          Mapped to       File
0               0x20000         0x90000         mid.qcow2
0x30000         0x10000         compressed      z\\x0a
";
        assert_eq!(human(&sample()), expected);
    }
}
