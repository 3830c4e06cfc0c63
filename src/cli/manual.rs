//! Manual pages and shell completions, generated from the definitions that parse the command line.

use super::args::Cli;
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::io::{self, Write};
use std::path::Path;

/// Writes the completion script of `shell`.
pub fn completions(shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    // Through memory: clap_complete panics if writing fails, as into a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "chainfs", &mut script);
    out.write_all(&script)
}

/// Writes chainfs(1), one page for each command, and mount.chainfs(8) into `dir`.
pub fn manual_pages(dir: &Path) -> io::Result<()> {
    clap_mangen::generate_to(Cli::command(), dir)?;
    std::fs::write(dir.join("mount.chainfs.8"), ".so man1/chainfs-mount.1\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_has_completions() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            completions(shell, &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("umount") && script.contains("backing-chain"), "{shell}");
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = std::env::temp_dir().join(format!("chainfs-manual-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let written = manual_pages(&dir);
        let page = std::fs::read_to_string(dir.join("chainfs-mount.1"));
        let missing =
            ["chainfs.1", "chainfs-tree.1", "mount.chainfs.8"].iter().find(|name| !dir.join(name).exists());
        std::fs::remove_dir_all(&dir).unwrap();
        written.unwrap();
        assert!(page.unwrap().contains("allow_other"));
        assert_eq!(missing, None);
    }
}
