//! `chainfs log`: shows each version of a guest's file, newest first, and what changed.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;

use jiff::tz::TimeZone;

use super::super::args::{LogArgs, Output};
use super::super::output::print;
use super::about;
use super::images::OpenStores;
use super::operands::{self, shown};
use super::store_disk::{self, StoreDisk};
use super::versions::found;
use crate::browse::content::OpenContent;
use crate::browse::versions::{PathRun, PathState, runs};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::FileKind;
use crate::report::json::pretty;
use crate::report::log::{LogEntry, LogObject, text};
use crate::report::unified::{DiffSide, LARGEST, unified};

/// Runs the command.
pub(in crate::cli) fn run(args: &LogArgs) -> Result<u8> {
    look(args).map_err(|error| about(&args.place, error))
}

fn look(args: &LogArgs) -> Result<u8> {
    let word: &OsStr = &args.place;
    let place = operands::parse(word)?;
    let Some(inner) = &place.inner else { return Err(operands::no_volume(word)) };
    let mut images = OpenStores::new(&args.look, &[])?;
    let disk = images.in_its_store(&place)?;
    let (names, disks): (Vec<Vec<u8>>, Vec<StoreDisk>) = store_disk::history(&disk).into_iter().unzip();
    let states: Vec<PathState> = disks.iter().map(|disk| found(disk, inner)).collect();
    let all = runs(&states);
    if all.is_empty() {
        let names: Vec<String> = names.iter().map(|name| shown(OsStr::from_bytes(name))).collect();
        return Err(Error::new(ErrorKind::NotFound, format!("no view has it: {}", names.join(", "))));
    }
    let path = [b":/", inner.volume.as_slice(), &inner.path].concat();
    let history = History { names: &names, disks: &disks, states: &states, path: &path };
    // An error in what is shown, for the exit code.
    let mut failed = false;
    let entries = all.iter().rev().take(args.max_count.unwrap_or(usize::MAX)).map(|run| {
        let entry = history.entry(run, args.patch);
        failed |= matches!(entry.now, Some(Err(_))) || matches!(entry.diff, Some(Err(_)));
        entry
    });
    match args.output.format() {
        Output::Json => print(&pretty(&entries.map(|entry| LogObject::of(&entry)).collect::<Vec<_>>()))?,
        Output::Human => print_all(entries)?,
    }
    let is_stale = images.warn_stale();
    Ok(u8::from(failed || is_stale))
}

/// Prints entries as they are made, with an empty line between two.
fn print_all(entries: impl Iterator<Item = LogEntry>) -> Result<()> {
    let (zone, mut out) = (TimeZone::system(), io::stdout().lock());
    let raw = !out.is_terminal();
    for (number, entry) in entries.enumerate() {
        let gap = if number > 0 { &b"\n"[..] } else { b"" };
        match out.write_all(&[gap, &text(&entry, &zone, raw)].concat()).and_then(|()| out.flush()) {
            // The reader has closed the pipe, as `| head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(|error| Error::io("writing the result", error))?,
        }
    }
    Ok(())
}

/// A path in the views of a chain, oldest first.
struct History<'a> {
    names: &'a [Vec<u8>],
    disks: &'a [StoreDisk],
    states: &'a [PathState],
    /// The path as it is written after the name of a disk.
    path: &'a [u8],
}

impl History<'_> {
    fn entry(&self, run: &PathRun, with_diff: bool) -> LogEntry {
        let first = run.disks.start;
        let before = first.checked_sub(1).map_or(&PathState::Absent, |before| &self.states[before]);
        let now = &self.states[first];
        let (mut target, mut state) = (None, None);
        match now {
            PathState::Absent => {}
            PathState::Unreadable(error) => state = Some(Err(error.clone())),
            PathState::There(there) => {
                let (tree, entry) = &**there;
                state = Some(Ok(entry.attributes));
                if entry.attributes.kind == FileKind::Symlink {
                    target = tree.read_link(entry.ino).ok();
                }
            }
        }
        LogEntry {
            views: self.names[run.disks.clone()].to_vec(),
            taken: self.disks[first].taken(),
            change: run.change.clone(),
            before: match before {
                PathState::There(there) => Some(there.1.attributes),
                PathState::Absent | PathState::Unreadable(_) => None,
            },
            now: state,
            target,
            diff: if with_diff { self.diff(first, before, now) } else { None },
        }
    }

    fn diff(&self, first: usize, before: &PathState, now: &PathState) -> Option<Result<Vec<u8>>> {
        let name = |index: usize| {
            let name = [self.names[index].as_slice(), self.path].concat();
            String::from_utf8_lossy(&name).into_owned()
        };
        let old_name = first.checked_sub(1).map(name).filter(|_| matches!(before, PathState::There(_)));
        let new_name = Some(name(first)).filter(|_| matches!(now, PathState::There(_)));
        let sides = content(before).and_then(|old| Ok((old, content(now)?)));
        let (old, new) = match sides {
            // Directories and devices have no lines; their changes are said already.
            Ok((None, _) | (_, None)) => return None,
            Ok((Some(old), Some(new))) => (old, new),
            Err(error) => return Some(Err(error)),
        };
        let old = DiffSide { name: old_name.as_deref(), bytes: old.bytes() };
        let new = DiffSide { name: new_name.as_deref(), bytes: new.bytes() };
        Some(Ok(unified(&old, &new)))
    }
}

/// What is compared line by line.
enum Lines {
    Bytes(Vec<u8>),
    TooLarge,
}

impl Lines {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::TooLarge => None,
        }
    }
}

/// The bytes of a file, or the target of a symbolic link; `None` of what has neither.
fn content(state: &PathState) -> Result<Option<Lines>> {
    let there = match state {
        PathState::Absent => return Ok(Some(Lines::Bytes(Vec::new()))),
        PathState::Unreadable(error) => return Err(error.clone()),
        PathState::There(there) => there,
    };
    let (tree, entry) = &**there;
    match entry.attributes.kind {
        FileKind::File => {
            let bytes = OpenContent::new(tree, entry).whole(LARGEST)?;
            Ok(Some(bytes.map_or(Lines::TooLarge, Lines::Bytes)))
        }
        FileKind::Symlink => Ok(Some(Lines::Bytes(tree.read_link(entry.ino)?))),
        FileKind::Directory
        | FileKind::CharDevice
        | FileKind::BlockDevice
        | FileKind::Fifo
        | FileKind::Socket => Ok(None),
    }
}
