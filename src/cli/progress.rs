//! Progress of a command: a bar on a terminal, qemu-img's line elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::ops::{JobState, Status};
use crate::report::safe::terminal;
use crate::report::status::per_mille;
use crate::units::brief_size;

/// Length of the bar in characters.
const BAR_LEN: u64 = 30;
/// Minimum time between two drawings.
const INTERVAL: Duration = Duration::from_millis(200);
/// Time constant of the smoothed rate, in seconds.
const SMOOTHING_SECONDS: f64 = 5.0;

/// Shows the progress of a command.
#[derive(Debug)]
pub(super) struct Meter {
    shown: ProgressDisplay,
    drawn: Option<Instant>,
    rate: Rate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgressDisplay {
    Nothing,
    Bar,
    Percent,
}

impl Meter {
    /// `wanted`: the user gave `--progress`.
    pub(super) fn new(wanted: bool) -> Self {
        let shown = match (wanted, std::io::stderr().is_terminal()) {
            (false, _) => ProgressDisplay::Nothing,
            (true, true) => ProgressDisplay::Bar,
            (true, false) => ProgressDisplay::Percent,
        };
        Self { shown, drawn: None, rate: Rate::default() }
    }

    /// Whether progress is shown.
    pub(super) fn is_shown(&self) -> bool {
        self.shown != ProgressDisplay::Nothing
    }

    /// Draws the present state.
    pub(super) fn draw(&mut self, status: &Status) {
        let now = Instant::now();
        if self.shown == ProgressDisplay::Nothing || self.drawn.is_some_and(|drawn| now - drawn < INTERVAL) {
            return;
        }
        let since = self.drawn.replace(now).map(|drawn| (now - drawn).as_secs_f64());
        self.rate.note(status.done, since);
        // Errors are ignored: progress is not the result.
        let _ = match self.shown {
            ProgressDisplay::Nothing => Ok(()),
            ProgressDisplay::Bar => {
                write!(std::io::stderr(), "\r{}\x1b[K", bar(status, self.rate.per_second))
            }
            ProgressDisplay::Percent => percent(status),
        };
    }

    /// Draws the final state and ends the line.
    pub(super) fn finish(&mut self, status: &Status) {
        if self.drawn.take().is_none() && status.state != JobState::Done {
            return;
        }
        // `drawn` is empty now, so the final state is always drawn.
        self.draw(status);
        let _ = match self.shown {
            ProgressDisplay::Nothing => Ok(()),
            ProgressDisplay::Bar => writeln!(std::io::stderr()),
            ProgressDisplay::Percent => writeln!(std::io::stdout()),
        };
    }
}

/// qemu-img's progress line, on standard output as there.
fn percent(status: &Status) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "    ({}/100%)\r", hundredths(status))?;
    out.flush()
}

fn hundredths(status: &Status) -> String {
    let is_done = status.state == JobState::Done;
    let share = u128::from(status.done.min(status.total)) * 10_000;
    let share = if is_done { 10_000 } else { share.checked_div(u128::from(status.total)).unwrap_or(0) };
    format!("{}.{:02}", share / 100, share % 100)
}

/// The rate in bytes per second, smoothed.
#[derive(Debug, Default)]
struct Rate {
    last: Option<u64>,
    per_second: Option<f64>,
}

impl Rate {
    /// Takes a sample: `done` bytes, `since` seconds after the last sample.
    #[allow(clippy::cast_precision_loss)] // two digits of it are shown
    fn note(&mut self, done: u64, since: Option<f64>) {
        let last = self.last.replace(done);
        let (Some(last), Some(since)) = (last, since) else { return };
        if since <= 0.0 {
            return;
        }
        let now = done.saturating_sub(last) as f64 / since;
        let weight = (since / SMOOTHING_SECONDS).min(1.0);
        self.per_second = Some(self.per_second.map_or(now, |before| before + (now - before) * weight));
    }
}

/// `commit  43.2 % [#############.................] 1.2 GiB of 2.8 GiB  105 MiB/s  0:15 left`.
#[allow(clippy::cast_precision_loss, clippy::cast_sign_loss)] // a rate, of which two digits are shown
fn bar(status: &Status, rate: Option<f64>) -> String {
    let verb = terminal(status.command.split(' ').next().unwrap_or_default());
    let share = per_mille(status);
    let full = share * BAR_LEN / 1000;
    let marks = "#".repeat(full as usize) + &".".repeat((BAR_LEN - full) as usize);
    let (done, total) = (brief_size(status.done), brief_size(status.total));
    let mut line = format!("{verb} {:>3}.{} % [{marks}] {done} of {total}", share / 10, share % 10);
    if let Some(rate) = rate.filter(|rate| *rate >= 1.0) {
        let left = (status.total.saturating_sub(status.done) as f64 / rate) as u64;
        let _ = write!(line, "  {}/s  {} left", brief_size(rate as u64), duration(left));
    }
    line
}

/// `0:15`, `1:02:03`.
fn duration(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours == 0 { format!("{minutes}:{seconds:02}") } else { format!("{hours}:{minutes:02}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(done: u64, total: u64) -> Status {
        Status {
            command: "commit top=a".to_string(),
            state: JobState::Running,
            done,
            total,
            ..Status::default()
        }
    }

    #[test]
    fn the_bar_shows_the_remaining_time() {
        let line = bar(&status(1 << 30, 4 << 30), Some(f64::from(100 << 20)));
        assert_eq!(
            line,
            "commit  25.0 % [#######.......................] 1.0 GiB of 4.0 GiB  100 MiB/s  0:30 left"
        );
        assert_eq!(bar(&status(0, 0), None), "commit   0.0 % [..............................] 0 B of 0 B");
        assert!(bar(&status(5, 5), Some(0.0)).ends_with("[##############################] 5 B of 5 B"));
        assert_eq!(duration(3723), "1:02:03");
    }

    #[test]
    fn the_rate_follows_the_samples() {
        let mut rate = Rate::default();
        rate.note(500, None);
        assert_eq!(rate.per_second, None);
        rate.note(1500, Some(1.0));
        assert_eq!(rate.per_second, Some(1000.0));
        rate.note(1500, Some(5.0));
        assert_eq!(rate.per_second, Some(0.0));
    }

    #[test]
    fn a_finished_command_without_data_shows_100_percent() {
        assert_eq!(hundredths(&status(1234, 10_000)), "12.34");
        assert_eq!(hundredths(&status(0, 0)), "0.00");
        assert_eq!(hundredths(&Status { state: JobState::Done, ..status(0, 0) }), "100.00");
    }
}
