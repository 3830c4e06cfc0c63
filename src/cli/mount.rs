//! `chainfs mount`: the parent waits until the mount is ready, the child serves it.
//!
//! The child is a new process of this program, marked by an environment variable: forking a process with
//! threads is unsafe. Parent and child share only a pipe, on which the child reports that it is ready. Until
//! then its messages go to the user's terminal.

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
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use super::args::MountArgs;
use super::mount_options::{KernelMapping, MountOptions, Symlinks};
use super::store_options::{store_options, variable};
use super::{auto_unmount, complain, config, remount, warn};
use crate::browse::worker::WorkerProgram;
use crate::browse::{Browser, Keyring};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount::{self, OwnMount};
use crate::fs::{DEFAULT_MAP_DIRECTORY, Features, GuestOptions, KernelMaps, MountTree, Ownership, Server};
use crate::io::{OwnProcess, other_users_of, users_of};
use crate::report::safe::terminal;
use crate::report::status::progress;
use crate::report::store as report;
use crate::store::{Flusher, Store, StoreOptions, Watcher};

/// mount(8)'s exit codes.
const USAGE: u8 = 1;
const FAILED: u8 = 32;

/// Set in the environment of the child that serves; its standard output is the pipe to the parent.
const SERVE: &str = "CHAINFS_SERVE";
const READY: &str = "ready";

/// Limit for counting the entries of a mount point.
const MAX_ENTRIES_COUNTED: usize = 1000;
const DEFAULT_THREADS: usize = 4;
const MAX_THREADS: usize = 64;
/// How often the service manager is told of running commands, and of how many.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
const MAX_COMMANDS_TOLD: usize = 8;
/// The kernel's read-ahead size on chainfs mounts, in KiB: one whole request.
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

/// Starts the child and waits until it is ready or has failed.
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
    // The child has printed the reason to stderr.
    let status = child.wait().map_err(fail)?;
    Ok(ExitCode::from(
        status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(FAILED),
    ))
}

/// Mounts the store and serves requests until it is unmounted.
fn serve(args: &MountArgs, as_child: bool) -> Result<ExitCode> {
    let options = MountOptions::parse(&args.options, args.sloppy)?;
    let options = config::load(options, variable)?;
    if options.remount {
        remount::run(args, &options)?;
        if as_child {
            report_ready()?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let log = super::log::start(args.verbose, as_child);
    if as_child {
        // A session of its own, so that signals of the terminal do not reach the daemon.
        rustix::process::setsid().map_err(|error| Error::io("leaving the terminal", error))?;
    }
    let threads = options.threads.unwrap_or(DEFAULT_THREADS);
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("threads={threads} is not between 1 and {MAX_THREADS}"),
        ));
    }
    // The daemon's own memory allocations must not wait for pages that only it can write back (a loop device
    // on an active disk). This needs a privilege.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("could not set PR_SET_IO_FLUSHER: {error}");
    }
    // Signals are caught before mounting, so that none can leave a mount without a daemon.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGXFSZ])
        .map_err(|error| Error::io("catching signals", error))?;
    let keyring = Keyring::open(options.keys.as_deref(), None)?;
    let store_options = StoreOptions { remember: !options.read_only, ..store_options(&options) };
    let store = Store::open(&args.store, store_options)?;
    for hint in hints(&args.dir, &store, &options) {
        warn(&hint);
    }
    let ownership = Ownership { uid: options.uid, gid: options.gid, umask: options.umask };
    let browser = Browser::with_keys(&store, WorkerProgram::this(!options.no_seccomp), keyring);
    let guests =
        GuestOptions { shown: !options.no_files, verbatim: options.symlinks == Some(Symlinks::Verbatim) };
    let tree = MountTree::new(&store, ownership, &browser, guests);
    let tree = tree.described(remount::given(args));
    let maps = kernel_maps(&options, &store)?;
    let has_maps = maps.is_some();
    let tree = maps.into_iter().fold(tree, MountTree::with_kernel_maps);
    let tree = Arc::new(if options.allow_other { tree.shared() } else { tree });
    let wanted = mount::MountOptions {
        allow_other: options.allow_other,
        exec: options.exec.unwrap_or(false),
        read_only: options.read_only,
        source: options.fsname.clone(),
        contexts: contexts(&options),
    };
    let (device, mount) = mount::mount(store.given(), &args.dir, &wanted)?;
    // If a later step fails, or the parent has gone, this guard unmounts.
    let unfinished = mount::MountRollback::new(&mount);
    let _auto_unmount = options.auto_unmount.then(|| auto_unmount::start(&mount)).transpose()?;
    let directory = mount.directory();
    log.about(store.given(), directory);
    let features = Features {
        passthrough: !options.no_passthrough,
        kernel_maps: has_maps,
        parallel_writes: !options.no_parallel_writes,
        shared_mapping: !options.no_shared_mapping,
        // With uid=, gid= or umask=, the user's choice replaces the guest's access lists.
        access_lists: options.allow_other
            && !options.no_acl
            && !options.no_xattr
            && ownership.is_the_images(),
        extended_attributes: !options.no_xattr,
        ring: !options.no_io_uring,
        threads,
    };
    let server = Server::connect(&tree, device, features)
        .map_err(|error| Error::io("starting the FUSE session", error))?;
    if options.kernel_map == Some(KernelMapping::On) && !server.has_passthrough() {
        let fact =
            "kernelmap=on needs FUSE passthrough (Linux 6.9, root), which is not there; use kernelmap=auto";
        return Err(Error::new(ErrorKind::Unsupported, fact));
    }
    if !options.no_readahead
        && let Err(error) = mount::read_ahead(directory, READ_AHEAD)
    {
        tracing::debug!("could not set the kernel's read-ahead: {error}");
    }
    let watcher = Watcher::start(&store).map_err(|error| Error::beginning("starting the watcher", error))?;
    let flusher = Flusher::start(&store).map_err(|error| Error::beginning("starting the flusher", error))?;
    let ending = Arc::new(AtomicBool::new(false));
    end_on_signals(signals, mount.clone(), Arc::clone(&tree), Arc::clone(&ending))?;
    // Each serving thread opens one more descriptor later.
    store.descriptors().count_others(threads)?;
    if as_child {
        let _ = rustix::process::chdir("/");
        detach()?;
        log.detach();
    }
    notify_service_manager(&format!(
        "READY=1\nSTATUS=serving {} on {}",
        store.given().display(),
        directory.display()
    ));
    tracing::info!("mounted {} on {}", store.given().display(), directory.display());
    let serving = format!("serving {} on {}", store.given().display(), directory.display());
    tell_of_commands(&tree, serving, Arc::clone(&ending))?;
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

/// The maps by which the kernel reads chains by itself, if the user wants them and they are possible.
fn kernel_maps(options: &MountOptions, store: &Store) -> Result<Option<Arc<KernelMaps>>> {
    let wanted = options.kernel_map.unwrap_or(KernelMapping::Auto);
    let usage = |fact: &str| Err(Error::new(ErrorKind::Usage, fact));
    match wanted {
        KernelMapping::Off => return Ok(None),
        KernelMapping::On if options.no_passthrough => {
            return usage("kernelmap=on needs passthrough; leave out nopassthrough");
        }
        KernelMapping::Auto if options.no_passthrough || !rustix::process::geteuid().is_root() => {
            return Ok(None);
        }
        KernelMapping::On | KernelMapping::Auto => {}
    }
    let directory = options.map_dir.as_deref().unwrap_or(Path::new(DEFAULT_MAP_DIRECTORY));
    let maps = KernelMaps::new(directory, &store.descriptors());
    match (maps, wanted) {
        (Ok(maps), KernelMapping::On) => {
            maps.try_out().map_err(|error| error.within("kernelmap=on"))?;
            Ok(Some(maps))
        }
        (Ok(maps), _) => Ok(Some(maps)),
        (Err(error), KernelMapping::On) => Err(error.within("kernelmap=on")),
        (Err(error), _) => {
            tracing::debug!("the daemon serves all chains: {error}");
            Ok(None)
        }
    }
}

/// Tells the service manager, if there is one, which commands are running: in the status that
/// `systemctl status` shows.
fn tell_of_commands(tree: &Arc<MountTree>, serving: String, ending: Arc<AtomicBool>) -> Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let engine = Arc::clone(tree.engine());
    let work = move || {
        let mut told = serving.clone();
        while !ending.load(Ordering::Relaxed) {
            std::thread::sleep(TELL_INTERVAL);
            let commands = engine.running().into_iter().take(MAX_COMMANDS_TOLD);
            let commands: Vec<String> = commands
                .map(|(chain, status)| format!("{}: {}", chain.display(), progress(&status).trim_end()))
                .collect();
            let status = [serving.clone()].into_iter().chain(commands).collect::<Vec<_>>().join("; ");
            if status != told && !ending.load(Ordering::Relaxed) {
                notify_service_manager(&format!("STATUS={}", terminal(&status)));
                told = status;
            }
        }
    };
    let thread = std::thread::Builder::new().name("status".into());
    thread.spawn(work).map_err(|error| Error::beginning("starting a thread", error))?;
    Ok(())
}

/// Warnings about options that are valid but probably unintended.
fn hints(directory: &Path, store: &Store, options: &MountOptions) -> Vec<String> {
    let mut hints = Vec::new();
    let own = rustix::process::getuid().as_raw();
    if !options.allow_other
        && let Some(uid) = options.uid.filter(|uid| *uid != own)
    {
        hints.push(format!(
            "uid={uid} only changes the owner shown: still only uid {own} has access; add -o allow_other"
        ));
    }
    // An existing mount is not listed: under an automount, listing would wait for this very mount.
    let place = directory.canonicalize().ok();
    let is_mount_point = place.and_then(|place| mount::top_mount(&place).ok().flatten()).is_some();
    let entry_count = if is_mount_point {
        0
    } else {
        std::fs::read_dir(directory).map_or(0, |entries| entries.take(MAX_ENTRIES_COUNTED).count())
    };
    if entry_count > 0 {
        let (entries, are) = if entry_count == 1 { ("entry", "is") } else { ("entries", "are") };
        let shown = directory.display();
        let more = if entry_count == MAX_ENTRIES_COUNTED { " or more" } else { "" };
        hints.push(format!(
            "{shown} is not empty: its {entry_count}{more} {entries} {are} hidden while the store is mounted"
        ));
    }
    hints.extend(report::no_images(store, &store.catalog()));
    hints.extend(store.guard().new_place_note());
    hints
}

/// Reports to the parent that all is done.
fn report_ready() -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = writeln!(out, "{READY}").and_then(|()| out.flush());
    written.map_err(|error| Error::io("reporting that the mount is ready", error))
}

/// The options of `SELinux` that the kernel takes. Without `SELinux` it knows none, and mount(8) ignores them.
fn contexts(options: &MountOptions) -> Vec<Vec<u8>> {
    let is_on = Path::new("/sys/fs/selinux/enforce").exists();
    if is_on { options.contexts.clone() } else { Vec::new() }
}

/// Reports to the parent that the mount is ready, and closes the pipe and the terminal.
fn detach() -> Result<()> {
    let fail = |error: std::io::Error| Error::io("reporting that the mount is ready", error);
    report_ready()?;
    let nothing = std::fs::File::options().write(true).open("/dev/null").map_err(fail)?;
    rustix::stdio::dup2_stdout(nothing.as_fd()).map_err(|error| fail(error.into()))?;
    rustix::stdio::dup2_stderr(nothing.as_fd()).map_err(|error| fail(error.into()))?;
    Ok(())
}

/// Flushes all writers and unmounts on SIGTERM or SIGINT. A mount in use goes on serving; a second signal
/// detaches it, and it ends when its last file is closed.
fn end_on_signals(
    mut signals: Signals,
    mount: OwnMount,
    tree: Arc<MountTree>,
    ending: Arc<AtomicBool>,
) -> Result<()> {
    let work = move || {
        let mut asked = false;
        for signal in &mut signals {
            // SIGHUP: the terminal has gone. SIGXFSZ: a write beyond a file size limit, which the client sees
            // as EFBIG. Neither is a request to unmount.
            if matches!(signal, SIGHUP | SIGXFSZ) {
                continue;
            }
            // First: the service manager may kill the daemon before the mount's users have gone.
            tree.store().flush_writers();
            match mount.unmount(asked) {
                Err(error) if error.kind() == ErrorKind::Busy => {
                    let sentence = busy(mount.directory());
                    tracing::warn!("{sentence}; a second signal detaches the mount");
                    notify_service_manager(&format!("STATUS={sentence}"));
                    asked = true;
                }
                // A mount in use keeps running its jobs. This one is unmounted, though open files may keep
                // the daemon alive: the jobs stop now, and the next mount resumes them.
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

/// A sentence that names the users of a busy mount.
pub(super) fn busy(directory: &Path) -> String {
    let users = users_of(directory);
    let names: Vec<String> = users.iter().map(ToString::to_string).collect();
    let own = if names.is_empty() { OwnProcess::Included } else { OwnProcess::Excluded };
    let others = other_users_of(directory, own);
    let names: Vec<String> = names.into_iter().chain(others).collect();
    let by = if names.is_empty() {
        "by a process that cannot be seen from here: maybe another user's, or in another mount namespace"
            .to_string()
    } else {
        format!("by {}", names.join(", "))
    };
    format!("{} is in use {by}", directory.display())
}

/// systemd's protocol (`sd_notify(3)`): sends a datagram to the socket named in the environment.
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
