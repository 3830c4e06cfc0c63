//! `chainfs recover`: lists interrupted commands, and resumes or discards them.
//!
//! A mount resumes an interrupted command by itself if the identity of all its files is proven. This command
//! shows the others with the reason. It resumes one once the reason is gone, or discards it with `--forget`.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::args::RecoverArgs;
use super::config;
use super::mount_options::MountOptions;
use super::output::print;
use super::store_options::{store_options, variable};
use super::target::place_in_mount;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{Engine, JobState};
use crate::report::safe::terminal;
use crate::store::{FROZEN_NOTES, FileBinding, FoundIntent, Store, StoreOptions, shown};

/// Limit of one wait for a new status.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Runs the command.
pub(super) fn run(args: &RecoverArgs) -> Result<u8> {
    let options = config::load(MountOptions::parse(&args.options, false)?, variable)?;
    let options = StoreOptions { notify: false, read_only: false, ..store_options(&options) };
    let store = place_in_mount(&args.store)?.map(|(store, _)| store);
    let store = Store::open(store.as_deref().unwrap_or(&args.store), options)?;
    if let Some(name) = &args.forget {
        return forget(&store, name, args.dry_run);
    }
    let engine = Engine::new(&store);
    let left = recover_all(&engine, args.dry_run);
    engine.stop();
    store.close_writers();
    Ok(u8::from(left? > 0))
}

/// Shows each interrupted command and resumes it. Returns the number of those that could not be resumed.
fn recover_all(engine: &Arc<Engine>, is_dry: bool) -> Result<usize> {
    let store = engine.store();
    let (mut left, mut said) = (0, false);
    let catalog = store.catalog();
    for path in &catalog.senseless {
        let name = stem(path.file_name().unwrap_or_default());
        let reason =
            catalog.problems.iter().find(|problem| problem.path == *path).map(|p| p.sentence.as_str());
        say(&format!("{}\n  {}\n", shown(path), reason.unwrap_or("cannot be read")))?;
        say(&format!(
            "  not resumed; restore the file, or discard it: chainfs recover --forget {name} STORE\n"
        ))?;
        (left, said) = (left + 1, true);
    }
    if let Some(problem) = store.notes_problem() {
        say(&format!("{FROZEN_NOTES}\n  {problem}\n"))?;
        (left, said) = (left + 1, true);
    }
    for found in &catalog.intents {
        said = true;
        left += usize::from(!recover_one(engine, found, is_dry)?);
    }
    if !said {
        say("no interrupted commands\n")?;
    }
    Ok(left)
}

/// Shows and resumes one interrupted command; `false` if it could not be resumed.
fn recover_one(engine: &Arc<Engine>, found: &FoundIntent, is_dry: bool) -> Result<bool> {
    let (store, name) = (engine.store(), &found.name);
    let guard = store.guard();
    let of = if found.is_copied { ", begun in the store that this one was copied from" } else { "" };
    let (path, chain) = (shown(&guard.path_of(name)), shown(&found.intent.chain));
    say(&format!("{path}\n  {} (chain {chain}{of})\n", found.intent.command))?;
    if guard.is_owned(found) {
        say("  running\n")?;
        return Ok(true);
    }
    let (intent, _, findings) = guard.examine(name)?;
    let mut doubts = 0;
    for finding in findings {
        match finding {
            FileBinding::Here(path) => say(&format!("  {} is there\n", shown(&path)))?,
            FileBinding::Gone(path) => {
                say(&format!("  {} is missing, or another file has its name\n", shown(&path)))?;
            }
            FileBinding::Doubt(sentence) => {
                doubts += 1;
                say(&format!("  {sentence}\n"))?;
            }
        }
    }
    let outcome = if doubts > 0 {
        Err(Error::new(ErrorKind::Stale, "the identity of some of its files is not proven"))
    } else if !found.is_trusted {
        Err(Error::new(ErrorKind::Denied, "other users could have written its intent file"))
    } else if is_dry {
        engine.examine(&intent, name).map(|way| format!("  would be resumed: it {way}\n"))
    } else {
        resume(engine, found)
    };
    match outcome {
        Ok(text) => say(&text).map(|()| true),
        Err(error) => {
            let fact = "the layers that it may have damaged stay hidden. Remove the cause and try again, or \
                discard \
                        the command and show the layers: chainfs recover --forget";
            say(&format!("  not resumed: {error}; {fact} {} STORE\n", stem(name)))?;
            Ok(false)
        }
    }
}

fn resume(engine: &Arc<Engine>, found: &FoundIntent) -> Result<String> {
    engine.recover(found)?;
    let mut status = engine.status(&found.intent.chain);
    while !status.state.is_over() {
        status = engine.wait(&found.intent.chain, status.version, POLL_INTERVAL);
    }
    match (status.state, status.error) {
        (JobState::Done, _) => Ok("  done\n".to_owned()),
        (_, error) => {
            Err(Error::new(ErrorKind::Io, error.unwrap_or_else(|| "the command failed".to_owned())))
        }
    }
}

/// Discards an intent, or a damaged freeze list.
fn forget(store: &Arc<Store>, name: &OsStr, is_dry: bool) -> Result<u8> {
    let guard = store.guard();
    let names = store.guard_names();
    if name == "frozen.toml" {
        if store.notes_problem().is_none() {
            let fact = "is valid; nothing was discarded";
            return Err(Error::new(ErrorKind::Usage, format!("{FROZEN_NOTES} {fact}")));
        }
        if !is_dry {
            let _lock = guard.lock(&*names)?;
            store.forget_notes()?;
        }
        let are = if is_dry { "would not be" } else { "are no longer" };
        say(&format!("raw images {are} frozen by {FROZEN_NOTES}; freeze them by their mode (chmod a-w)\n"))?;
        return Ok(0);
    }
    let catalog = store.catalog();
    let is_it = |path: &&Path| {
        let file = path.file_name().unwrap_or_default();
        file == name || stem(file) == name.to_string_lossy()
    };
    let paths: Vec<_> = catalog.intents.iter().map(|found| guard.path_of(&found.name)).collect();
    let mut all = catalog.senseless.iter().chain(&paths).map(std::path::PathBuf::as_path);
    let path = all.find(is_it).ok_or_else(|| {
        let fact = "is not an interrupted command; chainfs recover STORE lists them";
        Error::new(ErrorKind::NotFound, format!("{} {fact}", shown(Path::new(name))))
    })?;
    if is_dry {
        say(&format!("{} would be discarded\n", shown(path)))?;
        return Ok(0);
    }
    let _lock = guard.lock(&*names)?;
    let moved = guard.discard(&*names, path)?;
    store.rescan()?;
    let fact = "the layers that it hid are shown again and may be damaged: check them before use";
    say(&format!("discarded, and moved to {}; {fact}\n", shown(&moved)))?;
    Ok(0)
}

/// The name of an intent for `--forget`.
fn stem(name: &OsStr) -> String {
    let name: OsString = Path::new(name).file_stem().unwrap_or_default().to_owned();
    shown(Path::new(&name))
}

fn say(text: &str) -> Result<()> {
    let mut safe = String::new();
    for line in text.lines() {
        let _ = writeln!(safe, "{}", terminal(line));
    }
    print(&safe)
}
