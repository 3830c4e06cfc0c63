//! The operating systems on a guest's disk, as text.

use std::fmt::Write as _;

use crate::guest::inspect::{FstabEntry, OperatingSystem};

use super::safe::terminal;

/// `key: value` lines for each system, and a line for each mount of its fstab.
pub fn text(systems: &[OperatingSystem]) -> String {
    if systems.is_empty() {
        return "no operating system was found\n".to_owned();
    }
    let each: Vec<String> = systems.iter().map(system).collect();
    each.join("\n")
}

fn system(found: &OperatingSystem) -> String {
    let mut text = String::new();
    let mut line = |key: &str, value: Option<&str>| {
        if let Some(value) = value {
            let _ = writeln!(text, "{key}: {}", terminal(value));
        }
    };
    line("name", found.name.as_deref().or(found.id.as_deref()));
    line("version", found.version.as_deref());
    line("pretty-name", found.pretty_name.as_deref());
    line("id", found.id.as_deref());
    line("host-name", found.host_name.as_deref());
    line("machine-id", found.machine_id.as_deref());
    line("architecture", found.architecture.as_deref());
    line("root", Some(&found.volume));
    for mount in &found.mounts {
        line("mount", Some(&mounted(mount)));
    }
    text
}

/// The fstab's fields, with the volume in front, if it is known.
fn mounted(FstabEntry { device, volume, directory, kind, options }: &FstabEntry) -> String {
    let volume = volume.as_deref().unwrap_or("-");
    format!("{directory} {volume} {kind} {options} ({device})")
}
