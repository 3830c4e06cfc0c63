//! Commands through the control files of a mount, as a shell gives them.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::active::errno;
use super::mount::Mount;
use super::tools::hang;

/// One write(2) to a control file.
pub fn give(file: &Path, text: &[u8]) -> Option<Errno> {
    match File::options().write(true).open(file) {
        Ok(mut file) => errno(file.write(text)),
        failed => errno(failed),
    }
}

/// The `control` directory of a chain.
pub struct Control(PathBuf);

impl Control {
    pub fn of(mount: &Mount, chain: &str) -> Self {
        Self(mount.path(chain).join("control"))
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Gives a command, its verb first; how the write ended.
    pub fn give(&self, command: &str) -> Option<Errno> {
        let (verb, words) = command.split_once(' ').unwrap_or((command, ""));
        give(&self.file(verb), format!("{words}\n").as_bytes())
    }

    /// A line of `status`.
    pub fn status(&self, key: &str) -> String {
        let [value] = self.statuses([key]);
        value
    }

    /// Lines of `status`, all of one moment.
    pub fn statuses<const N: usize>(&self, keys: [&str; N]) -> [String; N] {
        let text = std::fs::read_to_string(self.file("status")).unwrap_or_else(|e| panic!("status: {e}"));
        keys.map(|key| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
        })
    }

    /// Waits until the running command has done a part of its work.
    pub fn begun(&self) {
        let start = Instant::now();
        while self.status("done") == "0" {
            assert!(start.elapsed() < hang(), "{} hangs", self.status("command"));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until no command runs; returns the final state.
    pub fn wait(&self) -> String {
        self.ended().0
    }

    /// Waits until no command runs; returns the final state and the error. A command that has failed may be
    /// resumed right afterwards, and would have another status then.
    pub fn ended(&self) -> (String, String) {
        let start = Instant::now();
        loop {
            let [state, error] = self.statuses(["state", "error"]);
            if state != "running" {
                return (state, error);
            }
            assert!(start.elapsed() < hang(), "{} hangs", self.status("command"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gives a command and waits until it is done.
    pub fn done(&self, command: &str) {
        let failed = self.give(command);
        assert!(failed.is_none(), "{command}: {failed:?}: {}", self.status("error"));
        let (state, error) = self.ended();
        assert!(state == "done", "{command}: {state}: {error}");
    }

    /// Gives a command that is refused with this errno; returns the sentence.
    pub fn refused(&self, command: &str, with: Errno) -> String {
        assert_eq!(self.give(command), Some(with), "{command}: {}", self.status("error"));
        self.status("error")
    }
}
