//! Manual pages, shell completions and the template of the configuration file.
//!
//! The pages of commands come from the definitions that parse the command line. The others are written by hand,
//! with what the code knows put in: the verbs' words, the options of a mount.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::args::Cli;
use super::mount_options::{SETTINGS, SettingText, TEXTS, Takes};
use crate::ops::Verb;

/// Pages that are written by hand: name and section, and the text. A line `@NAME@` is replaced.
const PAGES: [(&str, &str); 4] = [
    ("chainfs-control.7", include_str!("manual/chainfs-control.7")),
    ("chainfs-store.5", include_str!("manual/chainfs-store.5")),
    ("chainfs.toml.5", include_str!("manual/chainfs.toml.5")),
    ("mount.chainfs.8", include_str!("manual/mount.chainfs.8")),
];

/// Writes the completion script of `shell`. The scripts for bash, zsh and fish ask `chainfs complete`.
pub fn completions(shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    let own = match shell {
        Shell::Bash => Some(include_str!("completions/chainfs.bash")),
        Shell::Zsh => Some(include_str!("completions/_chainfs")),
        Shell::Fish => Some(include_str!("completions/chainfs.fish")),
        _ => None,
    };
    if let Some(own) = own {
        return out.write_all(own.as_bytes());
    }
    // Through memory: clap_complete panics if writing fails, as into a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "chainfs", &mut script);
    out.write_all(&script)
}

/// Writes chainfs(1), one page for each command, and the pages of other sections into `dir`.
pub fn manual_pages(dir: &Path) -> io::Result<()> {
    clap_mangen::generate_to(Cli::command(), dir)?;
    for (name, text) in PAGES {
        std::fs::write(dir.join(name), filled(text))?;
    }
    Ok(())
}

/// A page with the parts that the code knows.
fn filled(page: &str) -> String {
    let mut text = String::new();
    for line in page.lines() {
        match line {
            "@VERBS@" => text += &verbs(),
            "@OPTIONS@" => text += &options(),
            "@KEYS@" => text += &keys(),
            _ => {
                text += line;
                text.push('\n');
            }
        }
    }
    text
}

/// Text for roff: no character of it is a command.
fn roff(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for line in text.split('\n') {
        if !safe.is_empty() {
            safe.push('\n');
        }
        if line.starts_with(['.', '\'']) {
            safe += "\\&";
        }
        for char in line.chars() {
            match char {
                '\\' => safe += "\\e",
                '-' => safe += "\\-",
                _ => safe.push(char),
            }
        }
    }
    safe
}

fn verbs() -> String {
    let mut text = String::new();
    for verb in Verb::ALL {
        let usage = roff(verb.usage().trim_end());
        let _ = write!(text, ".SS {}\n.nf\n{usage}\n.fi\n", verb.name());
    }
    text
}

fn options() -> String {
    let entry = |setting: &SettingText| {
        let (name, value) = (roff(setting.name), roff(setting.value.trim_start_matches('=')));
        let head =
            if value.is_empty() { format!("\\fB{name}\\fR") } else { format!("\\fB{name}=\\fI{value}\\fR") };
        format!(".TP\n{head}\n{}\n", roff(setting.meaning))
    };
    TEXTS.iter().map(entry).collect()
}

fn keys() -> String {
    let entry = |setting: &SettingText| {
        let (name, example) = (roff(setting.name), roff(setting.example));
        format!(".TP\n\\fB{name} = {example}\\fR\n{}\n", roff(setting.meaning))
    };
    TEXTS.iter().map(entry).collect()
}

/// The template of `/etc/chainfs.toml`: every key, explained and commented out.
pub fn configuration_template() -> String {
    let mut text = String::from(
        "# Settings of all mounts of chainfs on this machine; chainfs.toml(5) has more.\n\
         # Options of a mount (-o, /etc/fstab) and a user's file (~/.config/chainfs/config.toml) precede; lists\n\
         # are joined. Remove the # before a key to set it. This file must be writable by root alone.\n",
    );
    for (setting, (_, takes)) in TEXTS.iter().zip(SETTINGS) {
        text.push('\n');
        for line in wrapped(setting.meaning, 96) {
            let _ = writeln!(text, "# {line}");
        }
        if takes == Takes::Values {
            text += "# A list of any number of them.\n";
        }
        let _ = writeln!(text, "#{} = {}", setting.name, setting.example);
    }
    text
}

/// The text in lines of at most `width` columns.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn every_shell_has_completions() {
        for (shell, word) in [
            (Shell::Bash, "complete -F"),
            (Shell::Zsh, "compdef"),
            (Shell::Fish, "complete -c"),
            (Shell::Elvish, "umount"),
        ] {
            let mut script = Vec::new();
            completions(shell, &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains(word) && script.contains("chainfs"), "{shell}");
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        manual_pages(dir.path()).unwrap();
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let names = ["chainfs.1", "chainfs-tree.1", "chainfs-doctor.1"].into_iter();
        for name in names.chain(PAGES.map(|(name, _)| name)) {
            assert!(
                !text(name).contains('@') || !text(name).lines().any(|line| line.starts_with('@')),
                "{name}"
            );
        }
        assert!(text("chainfs-mount.1").contains("allow_other"));
        assert!(text("mount.chainfs.8").contains("\\fBbacking_dir=\\fIDIR\\fR"));
        assert!(text("chainfs.toml.5").contains("cache = "));
        for verb in Verb::ALL {
            assert!(text("chainfs-control.7").contains(&format!(".SS {}\n", verb.name())));
        }
    }

    #[test]
    fn the_template_of_the_configuration_is_that_of_the_package() {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("packaging/chainfs.toml");
        let text = configuration_template();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        let packaged = std::fs::read_to_string(&file).unwrap();
        assert!(packaged == text, "packaging/chainfs.toml is out of date: BLESS=1 cargo test --lib template");
        // As it is, it sets nothing.
        let nothing = super::super::config::parse(&text, "f").unwrap();
        assert_eq!(nothing, super::super::mount_options::MountOptions::default());
        // Without the marks, it sets every key, in the right form.
        let lines = text.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => setting,
            _ => line,
        });
        let all = lines.collect::<Vec<_>>().join("\n");
        super::super::config::parse(&all, "f").unwrap();
        let table: toml::Table = all.parse().unwrap();
        let (mut set, mut known): (Vec<_>, Vec<_>) =
            (table.keys().map(String::as_str).collect(), SETTINGS.iter().map(|(name, _)| *name).collect());
        set.sort_unstable();
        known.sort_unstable();
        assert_eq!(set, known);
    }

    #[test]
    fn no_text_is_a_command_of_roff() {
        assert_eq!(roff(".x -a \\\n'y"), "\\&.x \\-a \\e\n\\&'y");
    }
}
