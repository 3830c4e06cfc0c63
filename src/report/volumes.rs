//! The volumes of a guest's disk as text.

use std::fmt::Write as _;

use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::browse::{DiskContents, Trees};
use crate::guest::volumes::{SetKind, Volume};

use super::safe::terminal;
use crate::guest::{TOP_LEVEL_SUFFIX, TreeId};
use crate::units::brief_size;

/// A line for each volume: name, content, size, label and identity, and why its files are not shown; then the
/// remarks on the disk.
pub fn listed(contents: &DiskContents) -> String {
    let layout = contents.layout();
    let rows: Vec<[String; 3]> = layout
        .volumes
        .iter()
        .map(|volume| [terminal(&volume.name), volume.content.name().to_owned(), brief_size(volume.size)])
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].width()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for (index, (volume, [name, content, size])) in layout.volumes.iter().zip(&rows).enumerate() {
        let gap = widths[0] - name.width();
        let _ = write!(text, "{name}{:gap$}   {content:1$}   {size:>2$}", "", widths[1], widths[2]);
        let _ = writeln!(text, "{}", remarks(contents, index, volume));
    }
    let table = layout.table.as_deref().unwrap_or("none");
    let _ = writeln!(text, "\npartition table: {table}");
    for remark in contents.remarks() {
        let _ = writeln!(text, "{}", terminal(remark));
    }
    for group in &layout.missing {
        let absent = group.absent.join(", ");
        let (what, members) = match group.kind {
            SetKind::VolumeGroup => ("volume group", "physical volumes"),
            SetKind::Array => ("md array", "members"),
            SetKind::FileSystem => ("file system on", "devices"),
        };
        let fact =
            format!("{what} {} lacks the {members} {absent}; no disk of this store has them", group.name);
        let _ = writeln!(text, "{}", terminal(&fact));
    }
    text
}

/// A volume as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeObject {
    name: String,
    #[serde(rename = "type")]
    content: &'static str,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    /// Why the shown state is not the last one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stale: Vec<String>,
    /// Why its files cannot be shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// The volumes as JSON.
pub fn objects(contents: &DiskContents) -> Vec<VolumeObject> {
    let object = |(index, volume): (usize, &Volume)| VolumeObject {
        name: volume.name.clone(),
        content: volume.content.name(),
        size: volume.size,
        label: volume.label.clone(),
        uuid: volume.uuid.clone(),
        stale: contents.mount(TreeId::main(index)).map(|mounted| mounted.stale).unwrap_or_default(),
        problem: volume
            .problem
            .clone()
            .or_else(|| contents.mount(TreeId::main(index)).err().map(|error| error.to_string())),
    };
    contents.layout().volumes.iter().enumerate().map(object).collect()
}

fn remarks(contents: &DiskContents, index: usize, volume: &Volume) -> String {
    let mut words: Vec<String> = Vec::new();
    words.extend(volume.label.as_ref().map(|label| format!("label {}", terminal(label))));
    words.extend(volume.uuid.as_ref().map(|uuid| format!("uuid {}", terminal(uuid))));
    match (&volume.problem, volume.problem.is_none().then(|| contents.mount(TreeId::main(index)))) {
        (Some(problem), _) => words.push(format!("not shown: {}", terminal(problem))),
        (None, Some(Err(error))) => words.push(format!("not shown: {}", terminal(&error.to_string()))),
        (None, Some(Ok(mounted))) => {
            words.extend(trees(&mounted.trees, &volume.name));
            words.extend(mounted.remarks.iter().map(|remark| terminal(remark)));
        }
        (None, None) => {}
    }
    if words.is_empty() { String::new() } else { format!("   {}", words.join("; ")) }
}

/// Which tree is shown as the volume, and where the others are.
fn trees(Trees { main, top_level: _, count, paths }: &Trees, name: &str) -> Option<String> {
    let main = main.as_ref().map(|path| format!("subvolume {}", terminal(path)));
    if *count == 0 {
        let place = || format!("; the top level is in {name}{TOP_LEVEL_SUFFIX}");
        return main.map(|main| main + &place());
    }
    let listed: Vec<String> = paths.iter().map(|path| terminal(path)).collect();
    let more = (*count as usize).saturating_sub(paths.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let others = format!("{}{more}", listed.join(", "));
    Some(match main {
        Some(main) => format!("{main}; others in {name}{TOP_LEVEL_SUFFIX}: {others}"),
        None => format!("subvolumes {others}"),
    })
}
