//! `chainfs try`: boots a view on a throw-away overlay.
//!
//! Promises: the store is only read; the view is held open from before the overlay is made until it is
//! removed, so that commands on its chain know of it; whatever ends the command short of SIGKILL removes the
//! overlay.
//!
//! The overlay is always backed by a disk of a mount. If the store is not mounted, a private read-only mount
//! is made for that. QEMU itself could follow the backing files, but it cannot put an overlay on an internal
//! snapshot, follows whatever an image names, and guesses formats where a header has none.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::super::args::{Boot, ImageArgs, LookArgs, TryArgs};
use super::super::output::print;
use super::super::target::mount_directory;
use super::super::warn;
use super::about;
use super::images::OpenStores;
use super::machine::{Machine, find_program, firmware, line};
use super::operands::{self, DiskName};
use super::store_disk::StoreDisk;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount::{KIND, store_of};
use crate::image::create::{CreateOptions, NewBacking, create};
use crate::io::{MountEntry, mounts};
use crate::store::{MARKER, shown};

/// How often the machine and signals are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a machine may take to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of code in a boot record.
const BOOT_CODE_LEN: usize = 440;

/// Runs the command.
pub(in crate::cli) fn run(args: &TryArgs) -> Result<u8> {
    let program =
        args.qemu.clone().unwrap_or_else(|| format!("qemu-system-{}", std::env::consts::ARCH).into());
    if args.run && find_program(&program).is_none() {
        let fact = format!("{} is not installed; install it, or leave out --run", operands::shown(&program));
        return Err(Error::new(ErrorKind::NotFound, fact));
    }
    // Before anything is made: from here on, a signal ends the command in its own order.
    let ending = catch_signals()?;
    let mut trial = Trial::new(args).map_err(|error| about(&args.view, error))?;
    let machine = Machine {
        program: &program,
        disk: &trial.overlay,
        interface: &args.interface,
        firmware: trial.firmware.as_ref().map(|(code, variables)| (code.as_path(), variables.as_path())),
        words: &args.words,
    };
    let words = machine.command();
    print(&format!("{}\n", line(&words)))?;
    if !args.run {
        warn("the overlay is removed when this command ends: press Ctrl-C when the machine is off");
        while ending.load(Ordering::Relaxed) == 0 {
            std::thread::sleep(TICK);
        }
        return Ok(0);
    }
    let status = trial.run(&words, &ending)?;
    match status.code() {
        Some(0) => Ok(0),
        // It was asked to end.
        _ if ending.load(Ordering::Relaxed) > 0 => Ok(0),
        _ => Err(Error::new(ErrorKind::Io, format!("{} has failed: {status}", operands::shown(&program)))),
    }
}

/// The number of signals so far.
fn catch_signals() -> Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let counted = Arc::clone(&count);
        signal_hook::flag::register_usize(signal, counted, 1)
            .map_err(|e| Error::io("catching signals", e))?;
    }
    Ok(count)
}

/// What is made for one trial, and removed when this is dropped.
struct Trial {
    /// A directory of our own.
    directory: PathBuf,
    overlay: PathBuf,
    /// The firmware, and our own file of its variables.
    firmware: Option<(PathBuf, PathBuf)>,
    /// A private mount, if the store is not mounted.
    mount: Option<PathBuf>,
    /// The view: while it is open, commands do not change it.
    held: Option<File>,
    machine: Option<Child>,
}

impl Trial {
    fn new(args: &TryArgs) -> Result<Self> {
        let place = operands::parse(&args.view)?;
        if place.has_inner {
            return Err(Error::new(ErrorKind::Usage, "names a guest's file; name its disk"));
        }
        let look = LookArgs {
            store: None,
            key_file: None,
            image: ImageArgs { force_share: false, options: args.options.clone() },
        };
        let disk = OpenStores::new(&look, &[])?.disk(&place)?;
        let uefi = is_uefi(args, &disk)?;
        let above = args.dir.clone().unwrap_or_else(std::env::temp_dir);
        let above =
            above.canonicalize().map_err(|error| Error::io(format!("opening {}", shown(&above)), error))?;
        if is_in_a_store(&above, &disk, args.dir.is_some())? {
            let fact = format!(
                "{} lies in the store, where the overlay would be an image; give another --dir",
                shown(&above)
            );
            return Err(Error::new(ErrorKind::Usage, fact));
        }
        let directory = private_directory(&above)?;
        let mut trial = Self {
            overlay: directory.join("overlay.qcow2"),
            directory,
            firmware: None,
            mount: None,
            held: None,
            machine: None,
        };
        let backing = match &place.disk {
            DiskName::Mounted { .. } => in_mount(&args.view, &disk)?,
            DiskName::Image { path, .. } => trial.mount(path, &args.options)?.join(disk.place_in_mount()),
        };
        let held = File::open(&backing);
        let held = held.map_err(|error| Error::io(format!("opening {}", shown(&backing)), error))?;
        let size = held.metadata().map_err(|error| Error::io("its size", error))?.len();
        trial.held = Some(held);
        let name = backing.as_os_str().as_bytes().to_vec();
        let backing = NewBacking { name, format: "raw".to_owned() };
        create(
            &trial.overlay,
            &CreateOptions { size: Some(size), backing: Some(backing), ..CreateOptions::default() },
        )?;
        let only_owner = fs::set_permissions(&trial.overlay, Permissions::from_mode(0o600));
        only_owner.map_err(|error| Error::io(format!("the mode of {}", shown(&trial.overlay)), error))?;
        if uefi {
            trial.add_firmware()?;
        }
        Ok(trial)
    }

    /// Mounts an image for itself; returns the directory of its chain.
    fn mount(&mut self, image: &Path, options: &[OsString]) -> Result<PathBuf> {
        let directory = self.directory.join("mnt");
        let fail = |error| Error::io("mounting the image for this command", error);
        fs::create_dir(&directory).map_err(fail)?;
        self.mount = Some(directory.clone());
        let mut command = Command::new(std::env::current_exe().map_err(fail)?);
        command.arg("mount");
        for option in options {
            command.arg("-o").arg(option);
        }
        command.args(["-o", "ro,nofiles", "--"]).arg(image).arg(&directory);
        let status = command.stdin(Stdio::null()).status().map_err(fail)?;
        if !status.success() {
            let fact = "the image could not be mounted for this command, see above";
            return Err(Error::new(ErrorKind::Io, fact));
        }
        Ok(directory)
    }

    fn add_firmware(&mut self) -> Result<()> {
        let Some((code, template)) = firmware() else {
            warn("the disk boots by UEFI only, and no firmware was found: install it (Debian: ovmf)");
            return Ok(());
        };
        let variables = self.directory.join("variables.fd");
        let copied = fs::copy(&template, &variables);
        let copied = copied.and_then(|_| fs::set_permissions(&variables, Permissions::from_mode(0o600)));
        copied.map_err(|error| Error::io(format!("copying {}", shown(&template)), error))?;
        self.firmware = Some((code, variables));
        Ok(())
    }

    /// Runs the machine until it ends. A signal is passed on to it.
    fn run(&mut self, words: &[OsString], ending: &AtomicUsize) -> Result<ExitStatus> {
        let fail = |error| Error::io(format!("running {}", operands::shown(&words[0])), error);
        let machine = self.machine.insert(Command::new(&words[0]).args(&words[1..]).spawn().map_err(fail)?);
        let mut asked: Option<Instant> = None;
        loop {
            if let Some(status) = machine.try_wait().map_err(fail)? {
                return Ok(status);
            }
            match asked {
                None if ending.load(Ordering::Relaxed) > 0 => {
                    asked = Some(Instant::now());
                    end(machine, Signal::TERM);
                }
                Some(since) if since.elapsed() > PATIENCE => end(machine, Signal::KILL),
                None | Some(_) => {}
            }
            std::thread::sleep(TICK);
        }
    }
}

fn end(machine: &Child, signal: Signal) {
    if let Some(pid) = Pid::from_raw(machine.id().cast_signed()) {
        // It may have ended just now.
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Some(machine) = &mut self.machine
            && !matches!(machine.try_wait(), Ok(Some(_)))
        {
            let _ = machine.kill();
            let _ = machine.wait();
        }
        self.held = None;
        if let Some(mount) = &self.mount {
            unmount(mount);
        }
        // Never recursively: if the mount is still there, nothing in it is touched.
        for file in ["overlay.qcow2", "variables.fd"] {
            let _ = fs::remove_file(self.directory.join(file));
        }
        let _ = fs::remove_dir(self.directory.join("mnt"));
        if let Err(error) = fs::remove_dir(&self.directory) {
            warn(&format!("{} could not be removed: {error}", shown(&self.directory)));
        }
    }
}

/// Unmounts a private mount. A machine that the user has started on it may still run.
fn unmount(directory: &Path) {
    let Ok(program) = std::env::current_exe() else { return };
    let umount = |words: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("umount").args(words).arg("--").arg(directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let is_there = |found: &Option<PathBuf>| found.as_deref() == Some(directory);
    if mount_directory(directory).is_ok_and(|found| !is_there(&found)) {
        return;
    }
    if !umount(&[]) && umount(&["--lazy"]) {
        warn("the overlay is still in use; its disk stays until that ends, and what is written is lost");
    }
}

/// The path of a view in the mount that was named.
fn in_mount(word: &OsStr, disk: &StoreDisk) -> Result<PathBuf> {
    if disk.is_active() {
        let fact =
            "is the active disk, which may change under the overlay; take a snapshot of it and try that";
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    let mount = mount_directory(Path::new(word))?;
    let mount =
        mount.ok_or_else(|| Error::new(ErrorKind::Stale, "was unmounted just now; name its image"))?;
    Ok(mount.join(&**disk.id.chain).join(disk.place_in_mount()))
}

/// Whether an overlay in that directory would be an image of a store: of a marked or mounted one, or, if the
/// user chose the directory, one that has the image.
fn is_in_a_store(above: &Path, disk: &StoreDisk, is_chosen: bool) -> Result<bool> {
    let store = disk.opened.store.given().canonicalize().ok();
    let own = store.and_then(|store| if store.is_dir() { Some(store) } else { Some(store.parent()?.into()) });
    let is_own = is_chosen && own.is_some_and(|own: PathBuf| above.starts_with(own));
    let is_marked = above.ancestors().any(|above| above.join(MARKER).is_dir());
    let is_mounted = |mount: &MountEntry| mount.kind == KIND && above.starts_with(store_of(mount));
    Ok(is_own || is_marked || mounts()?.iter().any(is_mounted))
}

/// A new directory that only this user can enter.
fn private_directory(above: &Path) -> Result<PathBuf> {
    for number in 0.. {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let name = format!("chainfs-try-{}-{:x}-{number}", std::process::id(), now.subsec_nanos());
        let directory = above.join(name);
        match DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && number < 100 => {}
            Err(error) => return Err(Error::io(format!("making a directory in {}", shown(above)), error)),
        }
    }
    unreachable!("it returns")
}

/// Whether the machine needs UEFI: the disk has a partition for it, and no code for a BIOS.
fn is_uefi(args: &TryArgs, disk: &StoreDisk) -> Result<bool> {
    match args.boot {
        Boot::Uefi => return Ok(true),
        Boot::Bios => return Ok(false),
        Boot::Auto => {}
    }
    let open = disk.view()?;
    let mut code = [0; BOOT_CODE_LEN];
    if open.view.size() < BOOT_CODE_LEN as u64 {
        return Ok(false);
    }
    open.view.read_at(0, &mut code)?;
    if code.iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    // A disk that cannot be looked into boots as it boots.
    let Ok(contents) = disk.contents() else { return Ok(false) };
    Ok(contents.layout().partitions.iter().any(|partition| partition.type_name.starts_with("EFI")))
}
