//! A plan as text: the chain before and after, base first as in the trees, then the costs.
//!
//! Every line after the trees is `key: value`. A plan that would be refused has lines that begin with
//! `refused:`.

use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use unicode_width::UnicodeWidthStr;

use crate::error::Error;
use crate::ops::{Plan, PlanLayer};

use super::safe::{terminal, terminal_bytes};
use crate::units::human_size;

/// The key of lines that say why a plan would be refused.
const REFUSED: &str = "refused";

/// A plan as text.
pub fn plan(plan: &Plan) -> String {
    let Plan { command, before, after, bytes, space, removed, renamed, invalid, notes, refusals } = plan;
    let mut text = format!("command: {}\n", terminal(command));
    layers(&mut text, "before", before);
    layers(&mut text, "after", after);
    text.push('\n');
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{key}: {value}");
    };
    line("copied", size(*bytes));
    line("space", size(*space));
    for path in removed {
        line("removed", name(path));
    }
    for (old, new) in renamed {
        line("renamed", format!("{} -> {}", name(old), name(new)));
    }
    for view in invalid {
        line("invalidated", terminal_bytes(view));
    }
    for note in notes {
        line("note", terminal(note));
    }
    for error in refusals {
        line(REFUSED, terminal(&error.to_string()));
    }
    text
}

/// The plan of a command that could not be parsed.
pub fn refusal(error: &Error) -> String {
    format!("{REFUSED}: {}\n", terminal(&error.to_string()))
}

/// Whether a plan, as text, would be refused.
pub fn is_refused(text: &str) -> bool {
    text.lines().any(|line| line.strip_prefix(REFUSED).is_some_and(|rest| rest.starts_with(':')))
}

fn layers(text: &mut String, title: &str, layers: &[PlanLayer]) {
    if layers.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{title}:");
    let rows: Vec<_> =
        layers.iter().rev().map(|layer| (layer, terminal_bytes(&layer.name), name(&layer.path))).collect();
    let name_width = rows.iter().map(|(_, name, _)| name.width()).max().unwrap_or(0);
    let path_width = rows.iter().map(|(_, _, path)| path.width()).max().unwrap_or(0);
    for (layer, name, path) in &rows {
        let mark = if layer.active { '◆' } else { '●' };
        let (name_gap, path_gap) = (name_width - name.width(), path_width - path.width());
        let note = terminal(&layer.note);
        let row = format!("{mark} {name}{:name_gap$}   {path}{:path_gap$}   {note}", "", "");
        let _ = writeln!(text, "{}", row.trim_end());
    }
}

fn name(path: &Path) -> String {
    terminal_bytes(path.as_os_str().as_bytes())
}

fn size(len: u64) -> String {
    format!("{} ({len} bytes)", human_size(len))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::error::ErrorKind;

    fn layer(name: &str, path: &str, active: bool, note: &str) -> PlanLayer {
        PlanLayer { name: name.into(), path: PathBuf::from(path), active, note: note.into() }
    }

    #[test]
    fn a_plan_shows_the_chain_base_first_and_all_costs() {
        let base = layer("base", "base.raw", false, "");
        let shown = Plan {
            command: "commit top=mönday base=base".to_string(),
            before: vec![
                layer("active", "web01.qcow2", true, ""),
                layer("mönday", "mönday.qcow2", false, "merged into base"),
                base.clone(),
            ],
            after: vec![layer("active", "web01.qcow2", true, "stands on base"), base],
            bytes: 3 << 19,
            space: 65536,
            removed: vec![PathBuf::from("mönday.qcow2")],
            renamed: vec![(PathBuf::from("a"), PathBuf::from("a.invalid"))],
            invalid: vec![b"base".to_vec(), b"x\x1b[2J\nrefused: no".to_vec()],
            notes: vec!["base is raw".to_string()],
            refusals: Vec::new(),
        };
        let text = plan(&shown);
        let expected = "command: commit top=mönday base=base

before:
● base     base.raw
● mönday   mönday.qcow2   merged into base
◆ active   web01.qcow2

after:
● base     base.raw
◆ active   web01.qcow2   stands on base

copied: 1.5 MiB (1572864 bytes)
space: 64 KiB (65536 bytes)
removed: mönday.qcow2
renamed: a -> a.invalid
invalidated: base
invalidated: x\\x1b[2J\\x0arefused: no
note: base is raw
";
        assert_eq!(text, expected);
        assert!(!is_refused(&text));
    }

    #[test]
    fn a_refused_plan_has_refused_lines() {
        let error = Error::new(ErrorKind::Busy, "base.raw is in use\nby qemu");
        let refused = Plan { refusals: vec![error.clone()], ..Plan::default() };
        assert!(plan(&refused).ends_with("refused: base.raw is in use\\x0aby qemu\n"));
        assert!(is_refused(&plan(&refused)) && is_refused(&refusal(&error)));
    }
}
