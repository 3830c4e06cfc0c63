//! The examples of a document: commands in fenced blocks, and their expected output.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{chainfs_binary, project};

/// A document of this repository.
pub fn document(name: &str) -> String {
    fs::read_to_string(project().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// One command of an example and its expected output.
pub struct Example {
    pub command: String,
    pub expected: String,
}

/// The fenced blocks of a text: the words after the opening fence, and the lines within.
pub fn blocks(text: &str) -> Vec<(&str, Vec<&str>)> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            found.push((info, lines.by_ref().take_while(|line| !line.starts_with("```")).collect()));
        }
    }
    found
}

/// The commands of all blocks that are marked so. One that ends with a backslash goes on in the next line.
pub fn examples(text: &str, mark: &str) -> Vec<Example> {
    example_blocks(text, mark).into_iter().flatten().collect()
}

/// The commands of each block that is marked so.
pub fn example_blocks(text: &str, mark: &str) -> Vec<Vec<Example>> {
    let marked = blocks(text).into_iter().filter(|(info, _)| *info == mark);
    let examples = marked.map(|(_, lines)| {
        let mut found: Vec<Example> = Vec::new();
        for line in lines {
            if let Some(command) = line.strip_prefix("$ ") {
                found.push(Example { command: command.to_string(), expected: String::new() });
            } else {
                let last = found.last_mut().expect("a block begins with a command");
                let is_continued = last.command.ends_with('\\') && last.expected.is_empty();
                let text = if is_continued { &mut last.command } else { &mut last.expected };
                if is_continued {
                    text.push('\n');
                    text.push_str(line);
                } else {
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        found
    });
    examples.collect()
}

impl Example {
    /// Runs the command in a shell and compares its output, errors included.
    pub fn run(&self, place: &Path) {
        let Self { command, expected } = self;
        let program = Path::new(chainfs_binary()).parent().expect("its directory");
        let path = format!("{}:{}", program.display(), std::env::var("PATH").expect("PATH"));
        let output = Command::new("timeout")
            .args(["120", "bash", "-c", &format!("exec 2>&1; {command}")])
            .current_dir(place)
            .env("PATH", &path)
            .env("LC_ALL", "C.UTF-8")
            .output()
            .expect("bash");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(matches(&said, expected), "$ {command}\nsaid:\n{said}\nbut is said to say:\n{expected}");
    }
}

/// Whether `said` matches `expected`; `[..]` stands for anything within a line.
pub fn matches(said: &str, expected: &str) -> bool {
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
    said.len() == expected.len()
        && said.iter().zip(&expected).all(|(said, expected)| line_matches(said, expected))
}

/// Removes the mounts that a failed example has left; a mount that hangs is aborted.
pub struct Ending(pub PathBuf);

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
