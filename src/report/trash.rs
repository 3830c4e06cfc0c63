//! The content of a store's trash.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use jiff::tz::TimeZone;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::error::Error;
use crate::store::TrashItem;

use super::json::pretty;
use super::safe::{terminal, text};
use super::time::{minute, rfc3339};
use crate::units::brief_size;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct TrashEntry {
    id: String,
    filename: String,
    removed: Option<String>,
    actual_size: u64,
    command: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// The line for a trash that cannot be listed.
pub fn unlisted(error: &Error) -> String {
    format!(
        "the trash cannot be listed: {}; check .chainfs/trash in the store\n",
        terminal(&error.to_string())
    )
}

/// A line for each item: id, time of removal, size on disk, file and command.
pub fn listed(items: &[TrashItem], zone: &TimeZone) -> String {
    let names: Vec<String> = items.iter().map(|item| terminal(&item.path.to_string_lossy())).collect();
    let name_width = names.iter().map(|name| name.width()).max().unwrap_or(0);
    let id_width = items.iter().map(|item| item.id.width()).max().unwrap_or(0);
    let mut lines = String::new();
    for (item, name) in items.iter().zip(&names) {
        let when = minute(UNIX_EPOCH + Duration::from_secs(item.seconds), zone);
        let (id, gap) = (terminal(&item.id), name_width - name.width());
        let (size, command) = (brief_size(item.disk_len), terminal(&item.command));
        let problem =
            item.problem.as_ref().map(|problem| format!("   ({})", terminal(problem))).unwrap_or_default();
        let _ =
            writeln!(lines, "{id:id_width$}   {when}   {size:>9}   {name}{:gap$}   {command}{problem}", "");
    }
    lines
}

/// The same as JSON.
pub fn listed_json(items: &[TrashItem]) -> String {
    let entry = |item: &TrashItem| TrashEntry {
        id: item.id.clone(),
        filename: text(item.path.as_os_str().as_encoded_bytes()),
        removed: rfc3339(UNIX_EPOCH + Duration::from_secs(item.seconds)),
        actual_size: item.disk_len,
        command: item.command.clone(),
        problem: item.problem.clone(),
    };
    pretty(&items.iter().map(entry).collect::<Vec<_>>())
}
