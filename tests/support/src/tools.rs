//! Runs foreign programs: each with a time limit, each failure reported in the program's own words.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// What has not ended after this hangs. It is far beyond what anything takes on a machine that is busy with
/// other things: a test fails on a hang, and never on load.
pub fn hang() -> Duration {
    Duration::from_mins(if std::env::var_os("CHAINFS_LONG").is_some() { 60 } else { 5 })
}

/// A command that runs `program` under a time limit. A missing program fails as loudly as one that fails.
pub fn tool(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &hang().as_secs().to_string(), program]);
    command
}

pub trait Outcome {
    /// Runs it, expects success, returns standard output.
    fn succeeds(&mut self) -> String;
    /// Runs it, expects a failure of its own (not a time-out), returns standard error.
    fn fails(&mut self) -> String;
    /// Runs it; returns exit code, standard output and standard error.
    fn outcome(&mut self) -> (i32, String, String);
}

impl Outcome for Command {
    fn succeeds(&mut self) -> String {
        let (code, out, err) = self.outcome();
        assert!(code == 0, "{self:?} exited with {code}\n{out}{err}");
        out
    }

    fn fails(&mut self) -> String {
        let (code, out, err) = self.outcome();
        assert!(code != 0, "{self:?} should have failed\n{out}{err}");
        err
    }

    fn outcome(&mut self) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.output().unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (out, err) = (text(stdout), text(stderr));
        let code = status.code().unwrap_or_else(|| panic!("{self:?} died of {status}\n{out}{err}"));
        assert!(![124, 127, 137].contains(&code), "{self:?} hung or is not installed ({code})\n{out}{err}");
        (code, out, err)
    }
}

/// Waits until `fact` holds; fails with `what` if it still does not after [`hang`].
pub fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let (start, limit) = (Instant::now(), hang());
    while !fact() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
