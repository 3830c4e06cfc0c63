//! `chainfs recover`: commands that were cut off, what can be done about each, and doing it.
//!
//! What is proven goes on by itself when a store is mounted. Here is what did not: it is shown with the reason, and goes
//! on once that has been seen to, or is given up by an explicit word.

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

/// How long to wait for news.
const PATIENCE: Duration = Duration::from_millis(200);

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
    let left = each(&engine, args.dry_run);
    engine.stop();
    store.close_writers();
    Ok(u8::from(left? > 0))
}

/// Says of everything that is unfinished what can be done, and does it. Returns how much is left that cannot be done.
fn each(engine: &Arc<Engine>, is_dry: bool) -> Result<usize> {
    let store = engine.store();
    let (mut left, mut said) = (0, false);
    let catalog = store.catalog();
    for path in &catalog.senseless {
        let name = stem(path.file_name().unwrap_or_default());
        let reason = catalog.problems.iter().find(|problem| problem.path == *path).map(|p| p.sentence.as_str());
        say(&format!("{}\n  {}\n", shown(path), reason.unwrap_or("cannot be read")))?;
        say(&format!("  not done; restore it, or give it up: chainfs recover --forget {name} STORE\n"))?;
        (left, said) = (left + 1, true);
    }
    if let Some(problem) = store.notes_problem() {
        say(&format!("{FROZEN_NOTES}\n  {problem}\n"))?;
        (left, said) = (left + 1, true);
    }
    for found in &catalog.intents {
        said = true;
        left += usize::from(!one(engine, found, is_dry)?);
    }
    if !said {
        say("nothing is unfinished\n")?;
    }
    Ok(left)
}

/// One of them; whether nothing is left to be done about it that could not be.
fn one(engine: &Arc<Engine>, found: &FoundIntent, is_dry: bool) -> Result<bool> {
    let (store, name) = (engine.store(), &found.name);
    let guard = store.guard();
    let of = if found.is_copied { ", of the store of which this is a copy" } else { "" };
    let (path, chain) = (shown(&guard.path_of(name)), shown(&found.intent.chain));
    say(&format!("{path}\n  {} (chain {chain}{of})\n", found.intent.command))?;
    if guard.is_owned(found) {
        say("  is at work\n")?;
        return Ok(true);
    }
    let (intent, _, findings) = guard.examine(name)?;
    let mut doubts = 0;
    for finding in findings {
        match finding {
            FileBinding::Here(path) => say(&format!("  {} is there\n", shown(&path)))?,
            FileBinding::Gone(path) => say(&format!("  {} has gone, or is another file by now\n", shown(&path)))?,
            FileBinding::Doubt(sentence) => {
                doubts += 1;
                say(&format!("  {sentence}\n"))?;
            }
        }
    }
    let outcome = if doubts > 0 {
        Err(Error::new(ErrorKind::Stale, "it is not certain of all files that they are those it was about"))
    } else if !found.is_trusted {
        Err(Error::new(ErrorKind::Denied, "others may have written its note"))
    } else if is_dry {
        engine.examine(&intent, name).map(|way| format!("  would be taken up: it {way}\n"))
    } else {
        taken_up(engine, found)
    };
    match outcome {
        Ok(text) => say(&text).map(|()| true),
        Err(error) => {
            let fact = "what it may have spoilt stays hidden. See to that and try again, or give it up, and with it what \
                        is hidden: chainfs recover --forget";
            say(&format!("  not done: {error}; {fact} {} STORE\n", stem(name)))?;
            Ok(false)
        }
    }
}

fn taken_up(engine: &Arc<Engine>, found: &FoundIntent) -> Result<String> {
    engine.recover(found)?;
    let mut status = engine.status(&found.intent.chain);
    while !status.state.is_over() {
        status = engine.wait(&found.intent.chain, status.version, PATIENCE);
    }
    match (status.state, status.error) {
        (JobState::Done, _) => Ok("  done\n".to_owned()),
        (_, error) => Err(Error::new(ErrorKind::Io, error.unwrap_or_else(|| "it has failed".to_owned()))),
    }
}

/// Gives up an intent, or the list of frozen images.
fn forget(store: &Arc<Store>, name: &OsStr, is_dry: bool) -> Result<u8> {
    let guard = store.guard();
    let names = store.guard_names();
    if name == "frozen.toml" {
        if store.notes_problem().is_none() {
            let fact = "can be used as it is; nothing was given up";
            return Err(Error::new(ErrorKind::Usage, format!("{FROZEN_NOTES} {fact}")));
        }
        if !is_dry {
            let _lock = guard.lock(&*names)?;
            store.forget_notes()?;
        }
        let would = if is_dry { "would be" } else { "is" };
        say(&format!(
            "no raw image {would} frozen by {FROZEN_NOTES} any more; freeze those by their mode (chmod a-w)\n"
        ))?;
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
        let fact = "is not unfinished; chainfs recover STORE says what is";
        Error::new(ErrorKind::NotFound, format!("{} {fact}", shown(Path::new(name))))
    })?;
    if is_dry {
        say(&format!("{} would be given up\n", shown(path)))?;
        return Ok(0);
    }
    let _lock = guard.lock(&*names)?;
    let aside = guard.discard(&*names, path)?;
    store.rescan()?;
    let fact = "what it had hidden is shown as it is, whole or not: check it before you use it";
    say(&format!("given up, and kept as {}; {fact}\n", shown(&aside)))?;
    Ok(0)
}

/// By what a user calls an intent.
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
