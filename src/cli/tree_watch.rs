//! `chainfs tree --watch`: draws the tree again whenever the store changes or a job advances.
//!
//! Promises: on a terminal a tree replaces the last one in place, in one write, and whatever ends the command
//! short of SIGKILL leaves the terminal as it was, with the last tree on it. Elsewhere each tree that differs
//! from the last one is printed. The store is followed directly; only the progress of running jobs comes
//! from the daemon of a mount.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGWINCH};

use super::args::{TreeArgs, TreeOutput};
use super::target::{Target, mount_directory};
use super::tree::{drawn, found, is_coloured, leaf, remarks};
use super::warn;
use crate::error::{Error, Result};
use crate::fs::CONTROL;
use crate::ops::{Engine, JobState};
use crate::report::safe::terminal;
use crate::report::status::{parse_status, per_mille};
use crate::report::tree::Forest;
use crate::store::{Catalog, Store, Watcher, shown};

/// How often signals, the catalog and the output are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often running jobs are asked for their progress.
const PROGRESS: Duration = Duration::from_millis(500);
/// How often the tree is drawn although the catalog is the same: processes lock and unlock images.
const LOCKS: Duration = Duration::from_secs(2);
/// Drawing takes at most one part of this many of the time.
const SHARE: u32 = 20;

/// Runs the command.
pub(super) fn run(args: &TreeArgs) -> Result<u8> {
    let target = Target::find_watched(&args.path, &args.image)?;
    let followed = Followed::new(args, &target)?;
    let watcher = Watcher::start(&target.store).map_err(|error| Error::io("following the store", error))?;
    let signals = WatchedSignals::new()?;
    let mut screen = Screen::new(args.output == TreeOutput::Human);
    let ended = follow(&followed, args, &signals, &mut screen);
    drop(screen);
    drop(watcher);
    ended.map(|()| 0)
}

fn follow(followed: &Followed, args: &TreeArgs, signals: &WatchedSignals, screen: &mut Screen) -> Result<()> {
    let color = is_coloured(args.color);
    let mut last: Option<Frame> = None;
    let mut drawn_of: Option<Arc<Catalog>> = None;
    let (mut at, mut cost) = (Instant::now(), Duration::ZERO);
    loop {
        if signals.is_ending() {
            return Ok(());
        }
        if signals.stopped.swap(false, Ordering::Relaxed) {
            screen.leave();
            // As without this program's own handler.
            signal_hook::low_level::emulate_default_handler(SIGTSTP)
                .map_err(|error| Error::io("stopping", error))?;
            (screen.is_entered, last) = (false, None);
        }
        let is_resized = signals.resized.swap(false, Ordering::Relaxed);
        let catalog = followed.store.catalog();
        let is_same = drawn_of.as_ref().is_some_and(|known| Arc::ptr_eq(known, &catalog));
        let patience = if catalog.intents.is_empty() { LOCKS } else { PROGRESS }.max(cost * SHARE);
        if !is_same || last.is_none() || at.elapsed() >= patience {
            at = Instant::now();
            let frame = followed.frame(args, &catalog, color)?;
            (cost, drawn_of) = (at.elapsed(), Some(catalog));
            if last.as_ref() != Some(&frame) {
                if screen.show(&frame, last.is_some())?.is_closed() {
                    return Ok(());
                }
                last = Some(frame);
            }
        } else if let Some(frame) = last.as_ref().filter(|_| is_resized && screen.is_terminal) {
            screen.show(frame, true)?;
        }
        if is_closed_within(TICK) {
            return Ok(());
        }
    }
}

/// What is drawn once.
#[derive(PartialEq, Eq)]
struct Frame {
    /// The tree.
    text: String,
    /// Problems and notes, one to a line.
    remarks: Vec<String>,
}

/// What is followed.
struct Followed {
    store: Arc<Store>,
    /// The chain by its path; `None` for a whole store and an image by itself.
    chain: Option<PathBuf>,
    /// The mount that the path lies in.
    mount: Option<PathBuf>,
    engine: Option<Arc<Engine>>,
}

impl Followed {
    fn new(args: &TreeArgs, target: &Target) -> Result<Self> {
        let (store, catalog) = (&target.store, &target.catalog);
        let chain = leaf(target).filter(|_| catalog.single.is_none());
        // The base of a disk is in several chains; any of them has the same tree.
        let chain = chain.and_then(|index| {
            catalog.chains().find(|(_, leaf)| catalog.layers(*leaf).contains(&index)).map(|(path, _)| path)
        });
        let mount = mount_directory(&args.path)?;
        let engine = args.sizes.then(|| Engine::beside_mount(store));
        Ok(Self { store: Arc::clone(store), chain, mount, engine })
    }

    fn frame(&self, args: &TreeArgs, catalog: &Catalog, color: bool) -> Result<Frame> {
        let leaf = match &self.chain {
            None => catalog.single,
            Some(chain) => catalog.chain(chain),
        };
        if let (Some(chain), None) = (&self.chain, leaf) {
            let remarks = vec![format!("there is no chain {} at present", shown(chain))];
            return Ok(Frame { text: drawn(&Forest::default(), args, color), remarks });
        }
        let shares = |chain: &Path| self.share(chain);
        let forest = found(&self.store, catalog, leaf, self.engine.as_ref(), args.sort, &shares)?;
        let is_text = args.output == TreeOutput::Human;
        let remarks = if is_text { remarks(&self.store, catalog, leaf, &forest) } else { Vec::new() };
        Ok(Frame { text: drawn(&forest, args, color), remarks })
    }

    /// The progress in percent of the job that the mount's daemon runs on a chain.
    fn share(&self, chain: &Path) -> Option<u64> {
        let control = self.mount.as_ref()?.join(chain).join(CONTROL);
        let status = parse_status(&std::fs::read_to_string(control.join("status")).ok()?);
        (status.state == JobState::Running).then(|| per_mille(&status) / 10)
    }
}

/// The signals that end, stop or resize the output.
struct WatchedSignals {
    ending: Arc<AtomicBool>,
    stopped: Arc<AtomicBool>,
    resized: Arc<AtomicBool>,
}

impl WatchedSignals {
    fn new() -> Result<Self> {
        let all = Self { ending: Arc::default(), stopped: Arc::default(), resized: Arc::default() };
        let flags = [
            (SIGINT, &all.ending),
            (SIGTERM, &all.ending),
            (SIGHUP, &all.ending),
            (SIGTSTP, &all.stopped),
            (SIGWINCH, &all.resized),
            (SIGCONT, &all.resized),
        ];
        for (signal, flag) in flags {
            signal_hook::flag::register(signal, Arc::clone(flag))
                .map_err(|error| Error::io("catching signals", error))?;
        }
        Ok(all)
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }
}

/// Whether the reader of the output has gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reader {
    There,
    Closed,
}

impl Reader {
    fn is_closed(self) -> bool {
        self == Reader::Closed
    }
}

/// Where trees are drawn. On a terminal that is its second screen, which has no lines above the window; when
/// this is dropped, the first one is back, and the last tree is printed there.
struct Screen {
    is_terminal: bool,
    is_entered: bool,
    last: String,
}

// DEC private modes, as xterm and its successors have them.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// A terminal that knows these shows all between them at once; others ignore them.
const TOGETHER: (&str, &str) = ("\x1b[?2026h", "\x1b[?2026l");

impl Screen {
    /// `is_text`: whether the output is meant for people.
    fn new(is_text: bool) -> Self {
        let is_dumb = super::store_options::variable("TERM").is_none_or(|term| term.as_os_str() == "dumb");
        let is_terminal = is_text && !is_dumb && io::stdout().is_terminal();
        Self { is_terminal, is_entered: false, last: String::new() }
    }

    /// Shows a frame; `again`: it is not the first one.
    fn show(&mut self, frame: &Frame, again: bool) -> Result<Reader> {
        if !self.is_terminal {
            let gap = if again && !frame.text.is_empty() { "\n" } else { "" };
            let shown = write(&format!("{gap}{}", frame.text))?;
            frame.remarks.iter().for_each(|line| warn(line));
            return Ok(shown);
        }
        let mut lines: Vec<String> = frame.text.lines().map(str::to_owned).collect();
        lines.extend(frame.remarks.iter().map(|line| terminal(line)));
        self.last = lines.join("\n") + "\n";
        let rows = rustix::termios::tcgetwinsize(io::stdout()).map_or(24, |size| usize::from(size.ws_row));
        let room = rows.max(2) - 1;
        if lines.len() > room {
            let hidden = lines.len() - (room - 1);
            lines.truncate(room - 1);
            lines.push(format!("({hidden} more lines; make the window higher)"));
        }
        let mut text = String::new();
        if !std::mem::replace(&mut self.is_entered, true) {
            text.push_str(ENTER);
        }
        text.push_str(TOGETHER.0);
        text.push_str("\x1b[H");
        for line in &lines {
            // Each line is written over the old one, and only then is the rest of that one cleared.
            let _ = write!(text, "{line}\x1b[K\r\n");
        }
        text.push_str("\x1b[J");
        text.push_str(TOGETHER.1);
        write(&text)
    }

    /// Gives the terminal back.
    fn leave(&mut self) {
        if std::mem::replace(&mut self.is_entered, false) {
            // If this fails, nobody looks at the terminal.
            let _ = write(LEAVE);
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.is_entered {
            self.leave();
            let _ = write(&self.last);
        }
    }
}

fn write(text: &str) -> Result<Reader> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Closed),
        Err(error) => Err(Error::io("writing the result", error)),
    }
}

/// Waits, and returns early and `true` if the reader of the output has gone.
fn is_closed_within(patience: Duration) -> bool {
    let out = io::stdout();
    let timeout = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(out.as_fd(), PollFlags::empty())];
    let found = poll(&mut fds, Some(&timeout));
    found.is_ok() && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
}
