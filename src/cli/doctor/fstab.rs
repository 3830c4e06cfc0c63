//! The lines of `/etc/fstab` that mount chainfs: what mount(8) and systemd would refuse, or do otherwise than
//! was meant.

use std::io;
use std::path::{Path, PathBuf};

use super::finding::{Finding, quoted};
use super::host::Host;
use crate::cli::mount_options::MountOptions;
use crate::fs::mount::KIND;

const FSTAB: &str = "/etc/fstab";
const OLD_PREFIX: &str = "chainfs#";

/// A line of ours.
struct Line<'a> {
    number: usize,
    store: PathBuf,
    directory: PathBuf,
    kind: &'a str,
    options: Vec<&'a str>,
    pass: Option<&'a str>,
}

/// Every line, each with what is wrong with it. `look` is told what is about to be looked at.
pub(super) fn check(host: &Host, mut look: impl FnMut(&Path)) -> Vec<Finding> {
    let text = match host.read(FSTAB) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![Finding::note(FSTAB, format!("cannot be read ({error})"))],
    };
    let mut findings = Vec::new();
    let mut seen: Vec<PathBuf> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let Some(line) = parse(number + 1, line) else { continue };
        let mut found = judge(host, &line, &mut look);
        if seen.contains(&line.directory) {
            let directory = line.directory.display();
            found.push(
                Finding::problem(subject(&line), format!("mounts on {directory}, as an earlier line does"))
                    .means("the second mount is refused")
                    .fix(format!("remove line {} of {FSTAB}", line.number)),
            );
        }
        seen.push(line.directory.clone());
        if found.is_empty() {
            let what = format!("mounts {} on {}", line.store.display(), line.directory.display());
            found.push(Finding::ok(subject(&line), what));
        }
        findings.extend(found);
    }
    findings
}

fn subject(line: &Line<'_>) -> String {
    format!("{FSTAB}:{}", line.number)
}

/// A line of chainfs; `None` for all others.
fn parse(number: usize, line: &str) -> Option<Line<'_>> {
    let line = line.trim();
    let words: Vec<&str> = line.split_whitespace().collect();
    if line.starts_with('#') || words.len() < 2 {
        return None;
    }
    let kind = words.get(2).copied().unwrap_or_default();
    if kind != "chainfs" && kind != KIND && !words[0].starts_with(OLD_PREFIX) {
        return None;
    }
    let mut options: Vec<&str> = words.get(3).map_or(Vec::new(), |list| list.split(',').collect());
    let named = options.iter().find_map(|option| option.strip_prefix("store="));
    let store = named.unwrap_or(words[0].trim_start_matches(OLD_PREFIX));
    let store = crate::io::unescape_mount_word(store.as_bytes());
    // The helper takes it away before chainfs sees it.
    options.retain(|option| !option.starts_with("store="));
    let directory = crate::io::unescape_mount_word(words[1].as_bytes());
    Some(Line { number, store, directory, kind, options, pass: words.get(5).copied() })
}

fn judge(host: &Host, line: &Line<'_>, look: &mut impl FnMut(&Path)) -> Vec<Finding> {
    let mut findings = Vec::new();
    let problem = |found: String| Finding::problem(subject(line), found);
    if line.kind != "chainfs" && line.kind != KIND {
        findings.push(
            problem(format!("the type is '{}'", line.kind))
                .means("mount(8) would call another helper")
                .fix("write chainfs as the third word of the line"),
        );
    }
    if let Err(error) = MountOptions::parse(&[line.options.join(",")], false) {
        let fix = format!("correct the fourth word of line {}", line.number);
        findings.push(problem(error.to_string()).means("the mount is refused").fix(fix));
    }
    let has = |wanted: &str| line.options.iter().any(|option| option.split('=').next() == Some(wanted));
    look(&line.store);
    if let Err(error) = std::fs::metadata(host.at(&line.store)) {
        let found = format!("the store {} cannot be opened ({error})", line.store.display());
        findings.push(problem(found).means("the mount fails").fix("correct the first word of the line"));
    }
    look(&line.directory);
    match std::fs::metadata(host.at(&line.directory)) {
        // A dead mount is reported as such.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && !has("X-mount.mkdir")
                && !has("x-systemd.automount") =>
        {
            let found = format!("the mount point {} is missing", line.directory.display());
            let fix = format!("mkdir -p {}", quoted(&line.directory));
            findings.push(problem(found).means("mount(8) refuses the line").fix(fix));
        }
        Ok(meta) if !meta.is_dir() => {
            let found = format!("the mount point {} is no directory", line.directory.display());
            findings.push(problem(found).means("the mount is refused").fix("name a directory"));
        }
        _ => {}
    }
    let starts_at_boot = !has("noauto") && !has("x-systemd.automount");
    if starts_at_boot && !has("nofail") {
        findings.push(
            Finding::warning(subject(line), "has no nofail")
                .means("the machine does not boot if this mount fails")
                .fix(format!("add nofail to the options of line {}", line.number)),
        );
    }
    if !has("allow_other") {
        findings.push(
            Finding::note(subject(line), "has no allow_other")
                .means("only root can enter the mount, and no virtual machine of libvirt")
                .fix(format!("add allow_other to the options of line {}", line.number)),
        );
    }
    if line.pass.is_some_and(|pass| pass != "0") {
        findings.push(
            Finding::warning(subject(line), "the last word is not 0")
                .means("fsck looks for a device of that name at boot")
                .fix("write 0 as the sixth word of the line"),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    fn findings(line: &str) -> Vec<Finding> {
        let files =
            [(FSTAB, line), ("/srv/images/web.qcow2", ""), ("/mnt/images/.keep", ""), ("/mnt/file", "")];
        let (_root, host) = machine(0, &files);
        check(&host, |_| {})
    }

    fn one(line: &str) -> (Mark, String) {
        let found = findings(line);
        assert_eq!(found.len(), 1, "{found:?}");
        (found[0].mark, format!("{} {}", found[0].found, found[0].fix.clone().unwrap_or_default()))
    }

    #[test]
    fn a_line_without_mistakes_is_well() {
        for line in [
            "/srv/images /mnt/images chainfs nofail,allow_other 0 0",
            "none /mnt/images fuse.chainfs nofail,allow_other,store=/srv/images",
            "/srv/images /mnt/new chainfs allow_other,x-systemd.automount,trash=7 0 0",
            "chainfs#/srv/images /mnt/images chainfs nofail,allow_other",
        ] {
            assert_eq!(one(line).0, Mark::Ok, "{line}");
        }
        assert!(findings("# /srv/images /mnt/images chainfs\nUUID=1 / ext4 defaults 0 1\n").is_empty());
        assert!(check(&machine(0, &[]).1, |_| {}).is_empty());
    }

    #[test]
    fn each_mistake_is_named_with_its_remedy() {
        for (line, mark, word) in [
            ("/srv/gone /mnt/images chainfs nofail,allow_other", Mark::Problem, "/srv/gone cannot be opened"),
            ("/srv/images /mnt/a\\040b chainfs nofail,allow_other", Mark::Problem, "mkdir -p '/mnt/a b'"),
            ("/srv/images /mnt/file chainfs nofail,allow_other", Mark::Problem, "no directory"),
            ("/srv/images /mnt/images chainfs nofail,allow_other,trahs=7", Mark::Problem, "'trash'"),
            ("chainfs#/srv/images /mnt/images fuse nofail,allow_other", Mark::Problem, "write chainfs"),
            ("/srv/images /mnt/images chainfs allow_other", Mark::Warning, "add nofail"),
            ("/srv/images /mnt/images chainfs nofail", Mark::Note, "add allow_other"),
            ("/srv/images /mnt/images chainfs nofail,allow_other 0 2", Mark::Warning, "sixth word"),
        ] {
            let (found, text) = one(line);
            assert!(found == mark && text.contains(word), "{line}: {text}");
        }
        let twice = "/srv/images /mnt/images chainfs nofail,allow_other\n".repeat(2);
        let found = findings(&twice);
        assert!(found[0].mark == Mark::Ok && found[1].mark == Mark::Problem);
        assert_eq!(found[1].subject, "/etc/fstab:2");
    }
}
