//! The versions of a guest's file as a table and as JSON.

use jiff::tz::TimeZone;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::browse::versions::PathVersion;

use super::files::{AttributesObject, mode, time};
use super::safe::{terminal, terminal_bytes, text};

/// Consecutive views that are named one by one.
const ROW: usize = 5;

/// A line for each version: time, size, mode, its views, and a link's target.
pub fn table(versions: &[PathVersion], views: &[Vec<u8>], zone: &TimeZone) -> String {
    let rows: Vec<([String; 3], String)> = versions.iter().map(|version| row(version, views, zone)).collect();
    let width = |column: usize| rows.iter().map(|(row, _)| row[column].width()).max().unwrap_or(0);
    let (time, size, mode) = (width(0), width(1), width(2));
    let line = |([of_time, of_size, of_mode], rest): &([String; 3], String)| {
        format!("{of_time:time$}  {of_size:>size$}  {of_mode:mode$}  {rest}\n")
    };
    rows.iter().map(line).collect()
}

fn row(version: &PathVersion, views: &[Vec<u8>], zone: &TimeZone) -> ([String; 3], String) {
    let names = names(&version.disks, views);
    match &version.state {
        None => (["absent".to_owned(), String::new(), String::new()], names),
        Some(Err(error)) => {
            let fact = format!("{names}: {}", terminal(&error.to_string()));
            (["not readable".to_owned(), String::new(), String::new()], fact)
        }
        Some(Ok(found)) => {
            let target = version.target.as_ref().map(|target| format!(" -> {}", terminal_bytes(target)));
            let rest = names + &target.unwrap_or_default();
            ([time(found.modified, zone), found.size.to_string(), mode(found)], rest)
        }
    }
}

/// Names of views; of a long consecutive range, only the first and the last.
fn names(disks: &[usize], views: &[Vec<u8>]) -> String {
    let name = |disk: usize| terminal_bytes(&views[disk]);
    let rows = disks.chunk_by(|one, next| one + 1 == *next);
    let names = rows.flat_map(|row| match row {
        [first, .., last] if row.len() > ROW => {
            vec![format!("{} .. {} ({})", name(*first), name(*last), row.len())]
        }
        _ => row.iter().map(|disk| name(*disk)).collect(),
    });
    names.collect::<Vec<String>>().join(", ")
}

/// All versions as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VersionsObject {
    versions: Vec<VersionObject>,
    bytes_read: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct VersionObject {
    state: &'static str,
    views: Vec<String>,
    #[serde(flatten)]
    attributes: Option<AttributesObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl VersionsObject {
    /// From the versions and their views.
    pub fn of(versions: &[PathVersion], views: &[Vec<u8>], bytes_read: u64) -> Self {
        let object = |version: &PathVersion| VersionObject {
            state: match version.state {
                None => "absent",
                Some(Ok(_)) => "present",
                Some(Err(_)) => "unreadable",
            },
            views: version.disks.iter().map(|disk| text(&views[*disk])).collect(),
            attributes: version
                .state
                .as_ref()
                .and_then(|state| state.as_ref().ok())
                .map(AttributesObject::of),
            target: version.target.as_deref().map(text),
            error: version.state.as_ref().and_then(|state| state.as_ref().err()).map(ToString::to_string),
        };
        Self { versions: versions.iter().map(object).collect(), bytes_read }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_ranges_of_views_show_their_ends() {
        let views: Vec<Vec<u8>> = (0..20).map(|number| format!("l{number}").into_bytes()).collect();
        let disks: Vec<usize> = [0, 2, 3].into_iter().chain(5..15).collect();
        assert_eq!(names(&disks, &views), "l0, l2, l3, l5 .. l14 (10)");
    }
}
