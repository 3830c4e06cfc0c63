//! Verbs on images whose store is not mounted: the store is opened, the command carried out, and all is let go.
//!
//! A job that is stopped keeps its intent in the store; the same command, or a mount, goes on with it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::RunArgs;
use super::config;
use super::mount_options::MountOptions;
use super::progress::Meter;
use super::store_options::{store_options, variable};
use super::target::place_in_mount;
use super::verbs::{finished, tell_plan};
use super::warn;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{Engine, JobState, Plan, Request, Status};
use crate::report::plan;
use crate::store::{STORE_DIRECTORY, Store, StoreOptions, shown};

/// How long to wait for news before looking whether somebody has pressed Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(200);
/// What marks a directory as a store.
const MARK: &str = ".chainfs";

/// Runs a verb on the image, or for several chains on the store, at `target`.
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

/// The plan of a command on the chain at `chain` of a mounted store that takes none.
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

/// The plan of a command on the chain that `target` names, mounted or not, as a value.
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
    let plan = engine.plan(chain, request).map_or_else(|error| plan::refusal(&error), |made| plan::plan(&made));
    tell_plan(&plan)
}

fn chain_is_store(request: &Request) -> bool {
    matches!(request, Request::Snapshot(snapshot) if !snapshot.chains.is_empty())
}

/// What stands for the store as a whole where a chain is named.
fn store_key() -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(STORE_DIRECTORY).into_owned())
}

/// Opens the store that `target` belongs to; tells the path of its chain there.
fn find(
    target: &Path,
    request: &Request,
    store: Option<&Path>,
    options: StoreOptions,
) -> Result<(Arc<Store>, PathBuf)> {
    let place = target.canonicalize().map_err(|error| Error::io(format!("opening {}", shown(target)), error))?;
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
        None => place.ancestors().skip(1).find(|above| above.join(MARK).is_dir()).map(Path::to_path_buf),
    };
    let store = Store::open(directory.as_deref().unwrap_or(&place), options)?;
    let catalog = store.catalog();
    let index = catalog.images.iter().position(|image| store.host_path(&image.place) == place);
    let index = index.ok_or_else(|| {
        let fact = format!("{} is no image of the store {}", shown(target), shown(store.given()));
        Error::new(ErrorKind::NotFound, fact)
    })?;
    let chain = if catalog.single == Some(index) { Some(PathBuf::new()) } else { catalog.chain_path(index) };
    let chain = chain.ok_or_else(|| {
        let fact = format!("other images stand on {}; name the one at the end of the chain", shown(target));
        Error::new(ErrorKind::Usage, fact)
    })?;
    Ok((store, chain))
}

/// Set by the first Ctrl-C; the second ends the program, as if it had crashed.
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
    // What was begun before and cut off goes on when it is given again. Other commands are refused until then: once
    // it is done, the chain is another one, and so might be what they mean.
    if matches!(request, Request::Revert(_)) {
        engine.plan(chain, request)?.notes.iter().for_each(|note| warn(note));
    }
    engine.run(chain, request, &request.to_string())?;
    finished(&wait(engine, chain, Meter::new(args.progress), stopping)?)
}

/// Waits until the chain's command is over.
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
            let fact = "stopped; the same command given again, or a mount of the store, goes on with it";
            return Err(Error::new(ErrorKind::Cancelled, fact));
        }
        meter.draw(&now);
        now = engine.wait(chain, now.version, PATIENCE);
    }
    meter.finish(&now);
    Ok(now)
}
