//! The history of a guest's file: an entry for each version, as text in the style of git's log and as JSON.

use std::fmt::Write as _;
use std::time::SystemTime;

use jiff::tz::TimeZone;
use serde::Serialize;

use crate::browse::versions::PathChange;
use crate::error::Error;
use crate::guest::FileAttributes;

use super::files::{AttributesObject, mode, time};
use super::safe::{terminal, terminal_bytes, text as text_of};
use super::time::{minute, rfc3339};

/// One version.
#[derive(Debug)]
pub struct LogEntry {
    /// The views that have it, oldest first.
    pub views: Vec<Vec<u8>>,
    /// When the first of these was taken.
    pub taken: SystemTime,
    /// What changed from the version before.
    pub change: PathChange,
    /// The attributes in the version before, if that has the file.
    pub before: Option<FileAttributes>,
    /// The attributes; `None` if the file is absent.
    pub now: Option<Result<FileAttributes, Error>>,
    /// The target, of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// The difference to the version before, in the unified format, if asked for; or why there is none.
    pub diff: Option<Result<Vec<u8>, Error>>,
}

/// An entry as text. With `raw`, the difference has the guest's own bytes, for programs; else what a terminal
/// would interpret is escaped.
pub fn text(entry: &LogEntry, zone: &TimeZone, raw: bool) -> Vec<u8> {
    let mut text = String::new();
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "{:9}{value}", format!("{key}:"));
    };
    if let [first, .., last] = entry.views.as_slice() {
        let count = entry.views.len();
        line("Views", &format!("{} .. {} ({count})", terminal_bytes(first), terminal_bytes(last)));
    }
    line("Date", &minute(entry.taken, zone));
    match &entry.now {
        None => {}
        Some(Err(error)) => line("File", &terminal(&format!("not readable: {error}"))),
        Some(Ok(now)) => {
            let target = entry.target.as_ref().map(|target| format!(" -> {}", terminal_bytes(target)));
            let modified = time(now.modified, zone);
            let owner = format!("{}:{}", now.uid, now.gid);
            line(
                "File",
                &format!("{} {owner} {} {modified}{}", mode(now), now.size, target.unwrap_or_default()),
            );
        }
    }
    line("Change", &change(entry));
    let first = entry.views.first().map(|name| terminal_bytes(name)).unwrap_or_default();
    let mut bytes = format!("version {first}\n{text}").into_bytes();
    match &entry.diff {
        Some(Ok(diff)) if !diff.is_empty() => {
            bytes.push(b'\n');
            bytes.extend(if raw { diff.clone() } else { escaped(diff) });
        }
        Some(Err(error)) => bytes.extend(format!("\n{}\n", terminal(&error.to_string())).into_bytes()),
        Some(Ok(_)) | None => {}
    }
    bytes
}

/// The kinds of change, with the old and new values of those that are short.
fn change(entry: &LogEntry) -> String {
    let what = match &entry.change {
        PathChange::Added => return "added".to_owned(),
        PathChange::Removed => return "removed".to_owned(),
        PathChange::Unknown => return "not known".to_owned(),
        PathChange::Changed(what) => what,
    };
    let (Some(before), Some(Ok(now))) = (&entry.before, &entry.now) else {
        return what.iter().map(|aspect| aspect.word()).collect::<Vec<_>>().join(", ");
    };
    let word = |aspect: &crate::browse::difference::Aspect| {
        use crate::browse::difference::Aspect;
        let word = aspect.word();
        match aspect {
            Aspect::Size => format!("{word} {} -> {}", before.size, now.size),
            Aspect::Mode | Aspect::Kind => format!("{word} {} -> {}", mode(before), mode(now)),
            Aspect::Owner => format!("{word} {}:{} -> {}:{}", before.uid, before.gid, now.uid, now.gid),
            Aspect::Content
            | Aspect::Target
            | Aspect::Device
            | Aspect::Modified
            | Aspect::Attributes
            | Aspect::Changed => word.to_owned(),
        }
    };
    what.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// A difference for a terminal; its lines stay lines.
fn escaped(diff: &[u8]) -> Vec<u8> {
    let line = |line: &[u8]| {
        let shown = line.split(|byte| *byte == b'\t').map(terminal_bytes).collect::<Vec<_>>().join("\t");
        (shown + "\n").into_bytes()
    };
    diff.strip_suffix(b"\n").unwrap_or(diff).split(|byte| *byte == b'\n').flat_map(line).collect()
}

/// An entry as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LogObject {
    views: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    taken: Option<String>,
    state: &'static str,
    change: Vec<&'static str>,
    #[serde(flatten)]
    attributes: Option<AttributesObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl LogObject {
    /// From an entry.
    pub fn of(entry: &LogEntry) -> Self {
        let error = match (&entry.now, &entry.diff) {
            (Some(Err(error)), _) | (_, Some(Err(error))) => Some(error.to_string()),
            _ => None,
        };
        Self {
            views: entry.views.iter().map(|view| text_of(view)).collect(),
            taken: rfc3339(entry.taken),
            state: match &entry.now {
                None => "absent",
                Some(Ok(_)) => "present",
                Some(Err(_)) => "unreadable",
            },
            change: match &entry.change {
                PathChange::Added => vec!["added"],
                PathChange::Removed => vec!["removed"],
                PathChange::Unknown => vec!["unknown"],
                PathChange::Changed(what) => what.iter().map(|aspect| aspect.word()).collect(),
            },
            attributes: entry.now.as_ref().and_then(|now| now.as_ref().ok()).map(AttributesObject::of),
            target: entry.target.as_deref().map(text_of),
            diff: entry.diff.as_ref().and_then(|diff| diff.as_ref().ok()).map(|diff| text_of(diff)),
            error,
        }
    }
}
