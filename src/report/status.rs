//! The state of a command, in the format of `control/status` and `control/progress`.
//!
//! Both are read by programs and people; their format is stable.

use std::fmt::Write as _;

use crate::ops::{JobState, Status};

use super::safe::terminal;
use crate::units::brief_size;

/// `key: value` lines: number, command, state, done, total, error, and a `note` for each further fact.
pub fn status(status: &Status) -> String {
    let Status { number, command, state, done, total, error, notes, version: _ } = status;
    let mut text = String::new();
    let error = error.as_deref().unwrap_or_default();
    let lines = [
        ("number", number.to_string()),
        ("command", terminal(command)),
        ("state", state.name().to_string()),
        ("done", done.to_string()),
        ("total", total.to_string()),
        ("error", terminal(error)),
    ];
    for (key, value) in lines {
        let _ = writeln!(text, "{}", format!("{key}: {value}").trim_end());
    }
    for note in notes {
        let _ = writeln!(text, "note: {}", terminal(note));
    }
    text
}

/// Parses the output of [`status`]; missing lines have default values.
pub fn parse_status(text: &str) -> Status {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.map(str::trim).unwrap_or_default()
    };
    let number = |key| value(key).parse().unwrap_or_default();
    let states = [JobState::Idle, JobState::Running, JobState::Done, JobState::Failed, JobState::Cancelled];
    let state = states.into_iter().find(|state| state.name() == value("state")).unwrap_or_default();
    Status {
        number: number("number"),
        command: value("command").to_string(),
        state,
        done: number("done"),
        total: number("total"),
        error: Some(value("error")).filter(|error| !error.is_empty()).map(str::to_string),
        notes: text.lines().filter_map(|line| line.strip_prefix("note: ")).map(str::to_string).collect(),
        version: 0,
    }
}

/// One line of `control/progress`: `commit 43.2 % 1.2 GiB of 2.8 GiB` while the command runs, then `done`,
/// `failed: ...` or `cancelled`; `idle` if there was none.
pub fn progress(status: &Status) -> String {
    match (status.state, &status.error) {
        (JobState::Running, _) => {
            let verb = terminal(status.command.split(' ').next().unwrap_or_default());
            let tenths = per_mille(status);
            let (done, total) = (brief_size(status.done), brief_size(status.total));
            format!("{verb} {}.{} % {done} of {total}", tenths / 10, tenths % 10)
        }
        (JobState::Failed, Some(error)) => format!("failed: {}", terminal(error)),
        (state, _) => state.name().to_string(),
    }
}

/// The done part in thousandths, rounded down: it is 1000 only when everything is done.
pub fn per_mille(status: &Status) -> u64 {
    let share = u128::from(status.done.min(status.total)) * 1000;
    share.checked_div(u128::from(status.total)).unwrap_or(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Status {
        Status {
            number: 3,
            command: "commit top=a".to_string(),
            state: JobState::Running,
            done: 1_319_413_953,
            total: 3_006_477_107,
            ..Status::default()
        }
    }

    #[test]
    fn a_status_is_six_lines_and_parses_back() {
        let text =
            "number: 3\ncommand: commit top=a\nstate: running\ndone: 1319413953\ntotal: 3006477107\nerror:\n";
        assert_eq!(status(&running()), text);
        assert_eq!(parse_status(text), running());
        let failed =
            Status { state: JobState::Failed, error: Some("a\nstate: done".to_string()), ..running() };
        assert_eq!(status(&failed).lines().count(), 6);
        assert_eq!(parse_status(&status(&failed)).state, JobState::Failed);
        assert_eq!(parse_status(""), Status::default());
    }

    #[test]
    fn progress_is_full_only_when_everything_is_done() {
        assert_eq!(progress(&running()), "commit 43.8 % 1.2 GiB of 2.8 GiB");
        assert!(
            progress(&Status { done: 999_999, total: 1_000_000, ..running() }).starts_with("commit 99.9 %")
        );
        assert!(progress(&Status { done: 0, total: 0, ..running() }).starts_with("commit 0.0 %"));
        assert!(
            progress(&Status { done: u64::MAX, total: u64::MAX, ..running() }).starts_with("commit 100.0 %")
        );
        assert_eq!(progress(&Status { state: JobState::Done, ..running() }), "done");
        assert_eq!(progress(&Status::default()), "idle");
        let failed = Status { state: JobState::Failed, error: Some("no\nspace".to_string()), ..running() };
        assert_eq!(progress(&failed), "failed: no\\x0aspace");
    }
}
