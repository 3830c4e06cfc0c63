//! The operating systems on a guest's disk, as text.

use std::fmt::Write as _;

use crate::guest::inspect::{FstabEntry, OperatingSystem, RootReason};

use super::safe::{terminal, terminal_bytes};

/// `key: value` lines for each system, and a line for each mount of its fstab. A system whose fstab mounts
/// another one, as that of a snapshot does, gets one line at the end.
pub fn text(systems: &[OperatingSystem]) -> String {
    if systems.is_empty() {
        return "no operating system was found\n".to_owned();
    }
    let is_copy = |found: &&OperatingSystem| found.fstab_root.is_some() && found.root != systems[0].root;
    let (copies, own): (Vec<_>, Vec<_>) = systems.iter().partition(is_copy);
    let mut parts: Vec<String> = own.into_iter().map(system).collect();
    if !copies.is_empty() {
        parts.push(copies.into_iter().map(copy).collect());
    }
    parts.join("\n")
}

/// The first system in a few words: its name, and that of the host.
pub fn brief(systems: &[OperatingSystem]) -> String {
    let Some(first) = systems.first() else { return "no system found".to_owned() };
    let name = match (&first.pretty_name, &first.name, &first.version) {
        (Some(pretty), ..) => pretty.clone(),
        (None, Some(name), Some(version)) => format!("{name} {version}"),
        (None, Some(name), None) => name.clone(),
        (None, None, _) => first.id.clone().unwrap_or_else(|| "unknown system".to_owned()),
    };
    match &first.host_name {
        Some(host) => format!("{} ({})", terminal(&name), terminal(host)),
        None => terminal(&name),
    }
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
    let _ = writeln!(text, "root: {}", terminal_bytes(&found.root));
    if let Some(reason) = reason(found.reason) {
        let _ = writeln!(text, "root-reason: {reason}");
    }
    for mount in &found.mounts {
        let _ = writeln!(text, "mount: {}", terminal(&mounted(mount)));
    }
    text
}

/// Why a system is in front of others, if there are others.
fn reason(reason: RootReason) -> Option<&'static str> {
    match reason {
        RootReason::Only => None,
        RootReason::Fstab => Some("its fstab mounts it as /"),
        RootReason::BootLoader => Some("the boot loader names it"),
        RootReason::DefaultSubvolume => Some("it is the default subvolume"),
        RootReason::First => Some("its volume comes first"),
    }
}

/// `copy: PLACE NAME HOST (its fstab mounts PLACE as /)`
fn copy(found: &OperatingSystem) -> String {
    let name = found.pretty_name.as_deref().or(found.name.as_deref()).or(found.id.as_deref());
    let words = [Some("copy:"), Some(&terminal_bytes(&found.root)), name, found.host_name.as_deref()]
        .into_iter()
        .flatten()
        .map(terminal)
        .collect::<Vec<String>>()
        .join(" ");
    let other = found.fstab_root.as_deref().map(terminal).unwrap_or_default();
    format!("{words} (its fstab mounts {other} as /)\n")
}

/// The fstab's fields, with the place in front, if it is known.
fn mounted(FstabEntry { device, place, directory, kind, options }: &FstabEntry) -> String {
    let place = place.as_deref().unwrap_or("-");
    format!("{directory} {place} {kind} {options} ({device})")
}
