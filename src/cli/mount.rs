//! `chainfs mount`: the parent waits until the tree can be used, the child serves it.
//!
//! The child is this program again, told so by its environment: no fork of a process with
//! threads, nothing shared but a pipe. On it the child says that it is ready; everything
//! before that goes to the user's terminal, nothing after.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use super::args::MountArgs;
use super::mount_options::{MountOptions, Symlinks};
use super::store_options::{store_options, variable};
use super::{complain, config, warn};
use crate::browse::Browser;
use crate::browse::worker::WorkerProgram;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount::{self, OwnMount};
use crate::fs::{Features, GuestOptions, MountTree, Ownership, Server};
use crate::io::{other_users_of, users_of};
use crate::report::store as report;
use crate::store::{Flusher, Store, StoreOptions, Watcher};

/// mount(8)'s exit codes.
const USAGE: u8 = 1;
const FAILED: u8 = 32;

/// Set for the child that serves; its standard output is the pipe to its parent.
const SERVE: &str = "CHAINFS_SERVE";
const READY: &str = "ready";

/// Entries of a mount point that are counted.
const MOST_COUNTED: usize = 1000;
const USUAL_THREADS: usize = 4;
const MOST_THREADS: usize = 64;
/// What the kernel reads ahead on our mounts, in KiB: a whole request.
const READ_AHEAD: u32 = 1024;

/// Runs the command.
pub fn run(args: &MountArgs) -> ExitCode {
    let serving = std::env::var_os(SERVE).is_some();
    let result = if args.foreground || serving { serve(args, serving) } else { spawn() };
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            ExitCode::from(if error.kind() == ErrorKind::Usage { USAGE } else { FAILED })
        }
    }
}

/// Starts the child and waits for its word.
fn spawn() -> Result<ExitCode> {
    let fail = |error| Error::beginning("starting the daemon", error);
    let program = std::env::current_exe().map_err(fail)?;
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut child = Command::new(program)
        .args(words)
        .env(SERVE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    let mut word = String::new();
    let pipe = child.stdout.take().expect("it is piped");
    BufReader::new(pipe).read_line(&mut word).map_err(fail)?;
    if word.trim_end() == READY {
        return Ok(ExitCode::SUCCESS);
    }
    // It has said why on stderr.
    let status = child.wait().map_err(fail)?;
    Ok(ExitCode::from(
        status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(FAILED),
    ))
}

/// Mounts and serves until the end.
fn serve(args: &MountArgs, as_child: bool) -> Result<ExitCode> {
    let options = MountOptions::parse(&args.options, args.sloppy)?;
    let options = config::load(options, variable)?;
    let log = super::log::start(args.verbose, as_child);
    if as_child {
        // A session of its own: the terminal's signals are not for us.
        rustix::process::setsid().map_err(|error| Error::io("leaving the terminal", error))?;
    }
    let threads = options.threads.unwrap_or(USUAL_THREADS);
    if !(1..=MOST_THREADS).contains(&threads) {
        return Err(Error::new(ErrorKind::Usage, format!("threads={threads} is not between 1 and {MOST_THREADS}")));
    }
    // Memory for our own writes must not wait for pages that only we can write back (a loop device on an
    // active disk). Not everybody may ask for that.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("the kernel does not treat this process as one that writes pages back: {error}");
    }
    // Signals are caught before there is a mount that they could leave behind.
    let signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP, SIGXFSZ]).map_err(|error| Error::io("catching signals", error))?;
    let store_options = StoreOptions { remember: !options.read_only, ..store_options(&options) };
    let store = Store::open(&args.store, store_options)?;
    for hint in hints(&args.dir, &store, &options) {
        warn(&hint);
    }
    let ownership = Ownership { uid: options.uid, gid: options.gid, umask: options.umask };
    let browser = Browser::new(&store, WorkerProgram::this(!options.no_seccomp));
    let guests = GuestOptions { shown: !options.no_files, verbatim: options.symlinks == Some(Symlinks::Verbatim) };
    let tree = MountTree::new(&store, ownership, &browser, guests);
    let tree = Arc::new(if options.allow_other { tree.shared() } else { tree });
    let wanted = mount::MountOptions {
        allow_other: options.allow_other,
        exec: options.exec.unwrap_or(false),
        read_only: options.read_only,
    };
    let (device, mount) = mount::mount(store.given(), &args.dir, &wanted)?;
    // Whatever fails from here on, or if nobody waits for us any more, leaves no dead mount.
    let unfinished = mount::MountRollback::new(&mount);
    let directory = mount.directory();
    let features = Features {
        passthrough: !options.no_passthrough,
        parallel_writes: !options.no_parallel_writes,
        shared_mapping: !options.no_shared_mapping,
        // Who says whose the files are does not go by whom else the guest lets in.
        access_lists: options.allow_other && !options.no_acl && ownership.is_the_images(),
        threads,
    };
    let server = Server::connect(&tree, device, features).map_err(|error| Error::io("answering the kernel", error))?;
    if !options.no_readahead
        && let Err(error) = mount::read_ahead(directory, READ_AHEAD)
    {
        tracing::debug!("the kernel's read-ahead stays as it is: {error}");
    }
    let watcher = Watcher::start(&store).map_err(|error| Error::beginning("starting the watcher", error))?;
    let flusher = Flusher::start(&store).map_err(|error| Error::beginning("starting the flusher", error))?;
    let ending = Arc::new(AtomicBool::new(false));
    end_on_signals(signals, mount.clone(), Arc::clone(&tree), Arc::clone(&ending))?;
    // One for each of the mount's threads is yet to come.
    store.descriptors().settle(threads)?;
    if as_child {
        let _ = rustix::process::chdir("/");
        detach()?;
        log.detach();
    }
    notify_service_manager(&format!("READY=1\nSTATUS=showing {} on {}", store.given().display(), directory.display()));
    tracing::info!("{} is shown on {}", store.given().display(), directory.display());
    unfinished.finished();
    tree.engine().set_mount(mount.directory());
    if !options.read_only {
        tree.resume();
    }
    let result = server.run();
    ending.store(true, Ordering::Relaxed);
    notify_service_manager("STOPPING=1");
    drop((watcher, flusher));
    result.map_err(|error| Error::io("serving the mount", error))?;
    Ok(ExitCode::SUCCESS)
}

/// What is allowed, and probably not what the user wants.
fn hints(directory: &Path, store: &Store, options: &MountOptions) -> Vec<String> {
    let mut hints = Vec::new();
    let own = rustix::process::getuid().as_raw();
    if !options.allow_other
        && let Some(uid) = options.uid.filter(|uid| *uid != own)
    {
        hints
            .push(format!("uid={uid} shows who owns the files, and lets nobody in but user {own}; add -o allow_other"));
    }
    // What is mounted there already is not listed: under an automount that would wait for this very mount.
    let place = directory.canonicalize().ok();
    let is_mount_point = place.and_then(|place| mount::top_mount(&place).ok().flatten()).is_some();
    let entry_count = if is_mount_point {
        0
    } else {
        std::fs::read_dir(directory).map_or(0, |entries| entries.take(MOST_COUNTED).count())
    };
    if entry_count > 0 {
        let (entries, are) = if entry_count == 1 { ("entry", "is") } else { ("entries", "are") };
        let shown = directory.display();
        let more = if entry_count == MOST_COUNTED { " or more" } else { "" };
        hints.push(format!("{shown} is not empty: its {entry_count}{more} {entries} {are} hidden while it is mounted"));
    }
    hints.extend(report::no_images(store, &store.catalog()));
    hints.extend(store.guard().new_place_note());
    hints
}

/// Tells the parent that all is well, and lets go of its pipe and terminal.
fn detach() -> Result<()> {
    let fail = |error: std::io::Error| Error::io("telling that the mount is ready", error);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{READY}").and_then(|()| out.flush()).map_err(fail)?;
    let nothing = std::fs::File::options().write(true).open("/dev/null").map_err(fail)?;
    rustix::stdio::dup2_stdout(nothing.as_fd()).map_err(|error| fail(error.into()))?;
    rustix::stdio::dup2_stderr(nothing.as_fd()).map_err(|error| fail(error.into()))?;
    Ok(())
}

/// Flushes everything and unmounts when asked to. A mount in use goes on serving; asked again, it is taken out of the
/// way and ends with its last user.
fn end_on_signals(mut signals: Signals, mount: OwnMount, tree: Arc<MountTree>, ending: Arc<AtomicBool>) -> Result<()> {
    let work = move || {
        let mut asked = false;
        for signal in &mut signals {
            // The terminal has gone, or a file would become larger than a limit allows, which is
            // EFBIG to whoever wrote: nobody has asked for the mount to go.
            if matches!(signal, SIGHUP | SIGXFSZ) {
                continue;
            }
            // First: the service manager may not wait for those who keep the mount busy.
            tree.store().flush_writers();
            match mount.unmount(asked) {
                Err(error) if error.kind() == ErrorKind::Busy => {
                    let sentence = busy(mount.directory());
                    tracing::warn!("{sentence}; asked once more, it will be taken away from them");
                    notify_service_manager(&format!("STATUS={sentence}"));
                    asked = true;
                }
                // A mount that goes on serving goes on with its jobs, too. This one ends, maybe only with the last
                // of those who were in it: the jobs need not wait for them, and are taken up by the next mount.
                Ok(()) => tree.stop(),
                Err(error) if !ending.load(Ordering::Relaxed) => tracing::warn!("{error}"),
                Err(_) => {}
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(work)
        .map_err(|error| Error::beginning("starting a thread", error))?;
    Ok(())
}

/// Who keeps a mount busy, as a sentence.
pub(super) fn busy(directory: &Path) -> String {
    let users = users_of(directory);
    let names: Vec<String> = users.iter().map(ToString::to_string).collect();
    let others = other_users_of(directory, names.is_empty());
    let names: Vec<String> = names.into_iter().chain(others).collect();
    let by = if names.is_empty() {
        "by whom cannot be seen from here: maybe by another user's process, or in another mount namespace".to_string()
    } else {
        format!("by {}", names.join(", "))
    };
    format!("{} is in use {by}", directory.display())
}

/// systemd's protocol (`sd_notify(3)`): a datagram to the socket that the environment names.
fn notify_service_manager(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(&name),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(state.as_bytes(), &address);
    }
}
