//! Verbs on images of an unmounted store: opens the store, runs the command, and closes the store.
//!
//! A stopped job keeps its intent in the store; the same command, or a mount, resumes it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::RunArgs;
use super::config;
use super::mount_options::MountOptions;
use super::outcome::{exit_code, print_plan};
use super::progress::Meter;
use super::store_options::{store_options, variable};
use super::target::place_in_mount;
use super::warn;
use crate::error::{Error, ErrorKind, Result};
use crate::io::is_address;
use crate::ops::{Engine, JobState, Plan, Request, Status};
use crate::report::plan;
use crate::store::{MARKER, STORE_DIRECTORY, Store, StoreOptions, shown};

/// Interval of checks for Ctrl-C while a job runs.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Runs a verb on the image at `target`, or for several chains on the store at `target`.
pub(super) fn run(target: &Path, request: &Request, args: &RunArgs) -> Result<u8> {
    let options = config::load(MountOptions::parse(&args.options, false)?, variable)?;
    let options = StoreOptions { notify: false, ..store_options(&options) };
    let (store, chain) = find(target, request, args.store.as_deref(), options)?;
    let engine = Engine::new(&store);
    if args.dry_run {
        return plan_by(&engine, &chain, request);
    }
    let stopping = catch_signals()?;
    let result = carry_out(&engine, &chain, request, args, &stopping);
    engine.stop();
    store.close_writers();
    if let Some(note) = store.guard().new_place_note() {
        warn(&note);
    }
    result
}

/// Prints the plan of a command on a chain of a store that is mounted read-only.
pub(super) fn plan_of_mounted(store: &Path, chain: &Path, request: &Request) -> Result<u8> {
    let (engine, chain) = in_mount(store, chain, request)?;
    plan_by(&engine, &chain, request)
}

fn in_mount(store: &Path, chain: &Path, request: &Request) -> Result<(Arc<Engine>, PathBuf)> {
    let options = config::load(MountOptions::default(), variable)?;
    let options = StoreOptions { notify: false, ..store_options(&options) };
    let store = Store::open(store, options)?;
    let chain = if chain_is_store(request) { store_key() } else { chain.to_path_buf() };
    Ok((Engine::beside_mount(&store), chain))
}

/// The plan of a command on the chain that `target` names, mounted or not.
pub(super) fn planned(target: &Path, request: &Request, options: &[OsString]) -> Result<(Arc<Store>, Plan)> {
    let (engine, chain) = if let Some((store, chain)) = place_in_mount(target)? {
        in_mount(&store, &chain, request)?
    } else {
        let options = config::load(MountOptions::parse(options, false)?, variable)?;
        let options = StoreOptions { notify: false, ..store_options(&options) };
        let (store, chain) = find(target, request, None, options)?;
        (Engine::new(&store), chain)
    };
    let plan = engine.plan(&chain, request)?;
    Ok((Arc::clone(engine.store()), plan))
}

fn plan_by(engine: &Arc<Engine>, chain: &Path, request: &Request) -> Result<u8> {
    let plan =
        engine.plan(chain, request).map_or_else(|error| plan::refusal(&error), |made| plan::plan(&made));
    print_plan(&plan)
}

fn chain_is_store(request: &Request) -> bool {
    matches!(request, Request::Snapshot(snapshot) if !snapshot.chains.is_empty())
}

/// The chain path that means the whole store.
fn store_key() -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(STORE_DIRECTORY).into_owned())
}

/// Opens the store that `target` belongs to; returns it with the path of the target's chain.
fn find(
    target: &Path,
    request: &Request,
    store: Option<&Path>,
    options: StoreOptions,
) -> Result<(Arc<Store>, PathBuf)> {
    if is_address(target) {
        let fact = "lies where nothing can be made or renamed; copy the store to a directory first";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", shown(target))));
    }
    let place =
        target.canonicalize().map_err(|error| Error::io(format!("opening {}", shown(target)), error))?;
    if place.is_dir() {
        if !chain_is_store(request) {
            let fact = format!("{} is a directory; name one of its images", shown(target));
            return Err(Error::new(ErrorKind::Usage, fact));
        }
        return Ok((Store::open(&place, options)?, store_key()));
    }
    request.check_for_chain()?;
    let directory = match store {
        Some(directory) => Some(directory.to_path_buf()),
        None => place.ancestors().skip(1).find(|above| above.join(MARKER).is_dir()).map(Path::to_path_buf),
    };
    let store = Store::open(directory.as_deref().unwrap_or(&place), options)?;
    let catalog = store.catalog();
    let index = catalog.images.iter().position(|image| store.host_path(&image.place) == place);
    let index = index.ok_or_else(|| {
        let fact = format!("{} is not an image of the store {}", shown(target), shown(store.given()));
        Error::new(ErrorKind::NotFound, fact)
    })?;
    let chain = if catalog.single == Some(index) { Some(PathBuf::new()) } else { catalog.chain_path(index) };
    let chain = chain.ok_or_else(|| {
        let fact = format!("{} has overlays; name the active image of the chain", shown(target));
        Error::new(ErrorKind::Usage, fact)
    })?;
    Ok((store, chain))
}

/// A flag that the first Ctrl-C sets. The second one ends the program at once, like a crash.
fn catch_signals() -> Result<Arc<AtomicBool>> {
    let fail = |error| Error::io("catching signals", error);
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping)).map_err(fail)?;
        signal_hook::flag::register(signal, Arc::clone(&stopping)).map_err(fail)?;
    }
    Ok(stopping)
}

fn carry_out(
    engine: &Arc<Engine>,
    chain: &Path,
    request: &Request,
    args: &RunArgs,
    stopping: &AtomicBool,
) -> Result<u8> {
    // The same command resumes an interrupted one. Other commands are refused until then: the resumed command
    // changes the chain, and with it what their arguments mean.
    if matches!(request, Request::Revert(_)) {
        engine.plan(chain, request)?.notes.iter().for_each(|note| warn(note));
    }
    engine.run(chain, request, &request.to_string())?;
    exit_code(&wait(engine, chain, Meter::new(args.progress), stopping)?)
}

/// Waits until the chain's command has ended.
fn wait(engine: &Arc<Engine>, chain: &Path, mut meter: Meter, stopping: &AtomicBool) -> Result<Status> {
    let mut now = engine.status(chain);
    while !now.state.is_over() {
        if stopping.load(Ordering::Relaxed) {
            engine.stop();
            now = engine.status(chain);
            meter.finish(&now);
            if matches!(now.state, JobState::Done | JobState::Failed) {
                break;
            }
            let fact = "stopped; the same command, or a mount of the store, resumes it";
            return Err(Error::new(ErrorKind::Cancelled, fact));
        }
        meter.draw(&now);
        now = engine.wait(chain, now.version, POLL_INTERVAL);
    }
    meter.finish(&now);
    Ok(now)
}
