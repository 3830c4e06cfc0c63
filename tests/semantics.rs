//! docs/SEMANTICS.md, held to its word: its examples are run, its errno table is compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use chainfs::error::{ERROR_KINDS, errno};

fn document() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/SEMANTICS.md")).expect("the document")
}

/// Takes away what an example that failed has left mounted; a mount that hangs is aborted.
struct Ending(PathBuf);

impl Drop for Ending {
    fn drop(&mut self) {
        for mount in chainfs::io::mounts().expect("the list of mounts") {
            if mount.directory.starts_with(&self.0) {
                let _ = fs::write(format!("/sys/fs/fuse/connections/{}/abort", mount.device.1), "1");
                let _ = Command::new("umount").arg("-l").arg(&mount.directory).status();
            }
        }
    }
}

/// One command of an example and what it is said to print.
struct Example {
    command: String,
    expected: String,
}

fn examples(text: &str) -> Vec<Example> {
    let mut found: Vec<Example> = Vec::new();
    for block in text.split("```console\n").skip(1) {
        let block = block.split("```").next().expect("a block ends");
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                found.push(Example { command: command.to_string(), expected: String::new() });
            } else {
                let last = found.last_mut().expect("a block begins with a command");
                last.expected.push_str(line);
                last.expected.push('\n');
            }
        }
    }
    found
}

/// Whether `said` is what `expected` promises; `[..]` stands for anything within a line.
fn matches(said: &str, expected: &str) -> bool {
    let line_matches = |said: &str, expected: &str| {
        let mut rest = said;
        let mut parts = expected.split("[..]");
        let first = parts.next().unwrap_or("");
        let Some(after) = rest.strip_prefix(first) else { return false };
        rest = after;
        let parts: Vec<_> = parts.collect();
        for (index, part) in parts.iter().enumerate() {
            let found = if index + 1 == parts.len() {
                rest.strip_suffix(part).map(|_| rest.len() - part.len())
            } else {
                rest.find(part)
            };
            let Some(at) = found else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.is_empty()
    };
    let (said, expected): (Vec<_>, Vec<_>) = (said.lines().collect(), expected.lines().collect());
    said.len() == expected.len() && said.iter().zip(&expected).all(|(said, expected)| line_matches(said, expected))
}

#[test]
fn the_examples_do_what_they_say() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().canonicalize().expect("its path");
    let _ending = Ending(place.clone());
    let program = Path::new(env!("CARGO_BIN_EXE_chainfs")).parent().expect("its directory");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").expect("PATH"));
    let examples = examples(&document());
    assert!(examples.len() > 30, "the document has lost its examples");
    for Example { command, expected } in examples {
        let output = Command::new("timeout")
            .args(["30", "bash", "-c", &format!("exec 2>&1; {command}")])
            .current_dir(&place)
            .env("PATH", &path)
            .env("LC_ALL", "C.UTF-8")
            .output()
            .expect("bash");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(matches(&said, &expected), "$ {command}\nsaid:\n{said}\nbut is said to say:\n{expected}");
    }
}

#[test]
fn a_wildcard_stands_for_anything_in_its_line_only() {
    assert!(matches("a 12 b\nc\n", "a [..] b\nc\n"));
    assert!(matches("a 12 b", "[..]"));
    assert!(!matches("a 12 b\n", "a [..] c\n"));
    assert!(!matches("a\nb\n", "[..]\n"));
    assert!(!matches("", "a\n"));
}

#[test]
fn the_table_of_errors_is_the_programs() {
    let text = document();
    let rows: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let kind = cells.get(2)?.strip_prefix('`')?.strip_suffix('`')?;
            Some((kind.to_string(), (*cells.get(1)?).to_string()))
        })
        .collect();
    let expected: Vec<(String, String)> =
        ERROR_KINDS.iter().map(|kind| (format!("{kind:?}"), name(errno(*kind)))).collect();
    assert_eq!(rows, expected);
}

fn name(errno: rustix::io::Errno) -> String {
    let names = [
        (rustix::io::Errno::NOENT, "ENOENT"),
        (rustix::io::Errno::INVAL, "EINVAL"),
        (rustix::io::Errno::EXIST, "EEXIST"),
        (rustix::io::Errno::NOTEMPTY, "ENOTEMPTY"),
        (rustix::io::Errno::CANCELED, "ECANCELED"),
        (rustix::io::Errno::BUSY, "EBUSY"),
        (rustix::io::Errno::ACCESS, "EACCES"),
        (rustix::io::Errno::ROFS, "EROFS"),
        (rustix::io::Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (rustix::io::Errno::STALE, "ESTALE"),
        (rustix::io::Errno::IO, "EIO"),
        (rustix::io::Errno::PERM, "EPERM"),
        (rustix::io::Errno::MFILE, "EMFILE"),
        (rustix::io::Errno::NOSPC, "ENOSPC"),
        (rustix::io::Errno::DQUOT, "EDQUOT"),
        (rustix::io::Errno::FBIG, "EFBIG"),
    ];
    names.iter().find(|(known, _)| *known == errno).expect("an errno with a name").1.to_string()
}
