//! A mount that never outlives its test.
//!
//! A watchdog aborts the FUSE connection when the time is up: every call that hangs in it then
//! returns with an error, and the test fails instead of hanging. Dropping the guard unmounts in the
//! way users do and fails the test if that does not work.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::chainfs_binary;
use super::store::Store;
use super::tools::{Outcome as _, eventually, hang, tool};

#[derive(Debug)]
pub struct Refusal {
    pub code: Option<i32>,
    pub message: String,
}

pub struct Mount {
    dir: PathBuf,
    foreground: Option<Child>,
    stop: Option<Sender<()>>,
    watchdog: Option<JoinHandle<()>>,
    timed_out: Arc<AtomicBool>,
}

impl Mount {
    /// Mounts a store beside itself.
    pub fn new(store: &Store) -> Self {
        Self::with(store, "")
    }

    /// Mounts with `-o options`, none if empty.
    pub fn with(store: &Store, options: &str) -> Self {
        Self::try_new(store, &store.root(), &store.beside("mnt"), options)
            .unwrap_or_else(|refusal| panic!("mount failed: {refusal:?}"))
    }

    pub fn try_new(store: &Store, source: &Path, dir: &Path, options: &str) -> Result<Self, Refusal> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=2", &hang().as_secs().to_string(), chainfs_binary()]);
        Self::by(store, command, source, dir, options)
    }

    /// Mounts by a command to which `mount SOURCE DIR -o OPTIONS` is appended. Output goes to
    /// files: a daemon that kept a pipe open would look like a hang.
    pub fn by(
        store: &Store,
        mut command: Command,
        source: &Path,
        dir: &Path,
        options: &str,
    ) -> Result<Self, Refusal> {
        let output = store.beside("mount.output");
        let start = Instant::now();
        command.arg("mount").arg(source).arg(dir);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        let file = File::create(&output).expect("a file for the mount's output");
        let status = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("two of a descriptor"))
            .stderr(file)
            .env("XDG_CONFIG_HOME", store.beside("config"))
            .status()
            .expect("timeout(1) runs");
        if !status.success() {
            let hung = start.elapsed() >= hang();
            if connection_of(dir).is_some() {
                abort(dir);
                lazy_umount(dir);
            }
            let message = fs::read_to_string(&output).unwrap_or_default();
            assert!(!hung, "mount did not return within {:?}\n{message}", hang());
            return Err(Refusal { code: status.code(), message });
        }
        assert!(connection_of(dir).is_some(), "mount returned before {} was mounted", dir.display());
        Ok(Self::watching(dir, None))
    }

    /// Runs a command whose last words become `mount -f SOURCE DIR`, and waits for the tree.
    pub fn foreground(store: &Store, mut command: Command, options: &str) -> Self {
        let dir = store.beside("mnt");
        command.arg("mount").arg("-f").arg(store.root()).arg(&dir);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        let file = File::create(store.beside("mount.output")).expect("a file for the mount's output");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("two of a descriptor"))
            .stderr(file)
            .env("XDG_CONFIG_HOME", store.beside("config"))
            .spawn()
            .expect("the command starts");
        let mut mount = Self::watching(&dir, Some(child));
        let start = Instant::now();
        while connection_of(&dir).is_none() || !dir.join(".chainfs").is_dir() {
            if start.elapsed() > hang() || mount.exit_code().is_some() {
                let said = fs::read_to_string(store.beside("mount.output")).unwrap_or_default();
                panic!("no tree within {:?}: {said}", hang());
            }
            thread::sleep(Duration::from_millis(20));
        }
        mount
    }

    fn watching(dir: &Path, foreground: Option<Child>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let timed_out = Arc::new(AtomicBool::new(false));
        let watchdog = thread::spawn({
            let (dir, timed_out) = (dir.to_owned(), Arc::clone(&timed_out));
            move || {
                if stopped.recv_timeout(hang()) == Err(RecvTimeoutError::Timeout) {
                    timed_out.store(true, Ordering::SeqCst);
                    eprintln!("{}: time is up, aborting the connection", dir.display());
                    abort(&dir);
                }
            }
        });
        Self { dir: dir.to_owned(), foreground, stop: Some(stop), watchdog: Some(watchdog), timed_out }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    pub fn text(&self, name: impl AsRef<Path>) -> String {
        let path = self.path(name);
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The sorted names in a directory of the mount.
    pub fn names(&self, dir: impl AsRef<Path>) -> Vec<String> {
        names_in(&self.path(dir))
    }

    /// The process that serves this mount.
    /// The chains and directories at its top, without what is there of chainfs itself.
    pub fn top(&self) -> Vec<String> {
        let mut names = names_in(&self.dir);
        let count = names.len();
        names.retain(|name| !matches!(name.as_str(), ".chainfs" | "README.txt"));
        assert_eq!(names.len() + 2, count, "a mount explains itself");
        names
    }

    pub fn daemon(&self) -> u32 {
        daemon_of(&self.dir).unwrap_or_else(|| panic!("nobody serves {}", self.dir.display()))
    }

    /// Processor time that the daemon has used. Load of the machine does not count.
    pub fn processor_time(&self) -> Duration {
        let daemon = self.daemon();
        let stat = fs::read_to_string(format!("/proc/{daemon}/stat")).expect("the daemon's times");
        // The name of the program, in parentheses, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Files and directories that the daemon has open for the kernel.
    pub fn open_handles(&self) -> u64 {
        let text = self.text(".chainfs/metrics");
        let line = text.lines().find_map(|line| line.strip_prefix("chainfs_open_handles "));
        line.expect("the gauge").parse().expect("a number")
    }

    /// Closes a file, and waits until the daemon has been told.
    pub fn close(&self, file: File) {
        let before = self.open_handles();
        drop(file);
        eventually("the daemon knows that a file is closed", || self.open_handles() < before);
    }

    /// Exit code of a mount run in the foreground, if it has ended. Killed by a signal: 128 + signal.
    pub fn exit_code(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.foreground.as_mut()?.try_wait().expect("a child of ours")?;
        status.code().or(status.signal().map(|s| 128 + s))
    }

    /// `chainfs umount`, expected to succeed.
    pub fn umount(mut self) {
        assert_eq!(self.leave(), Ok(()), "chainfs umount {}", self.dir.display());
    }

    /// After the daemon has been killed: removes the dead mount, even if it is in use.
    pub fn abandon(mut self) {
        while connection_of(&self.dir).is_some() {
            lazy_umount(&self.dir);
        }
        assert_eq!(self.leave(), Ok(()), "{}", self.dir.display());
    }

    fn leave(&mut self) -> Result<(), String> {
        let mut result = Ok(());
        if connection_of(&self.dir).is_some() {
            let mut umount = tool(chainfs_binary());
            umount.arg("umount").arg(&self.dir);
            let output = unmounting(&mut umount);
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                result = Err(format!("{}: {said}", output.status));
            }
            if connection_of(&self.dir).is_some() {
                abort(&self.dir);
                lazy_umount(&self.dir);
            }
        }
        if let Some(mut child) = self.foreground.take() {
            let start = Instant::now();
            while child.try_wait().expect("a child of ours").is_none() {
                if start.elapsed() > hang() {
                    child.kill().expect("a child of ours");
                    result = result.and(Err("the foreground process outlived its mount".to_owned()));
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        drop(self.stop.take());
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.join().expect("the watchdog does not panic");
        }
        if self.timed_out.load(Ordering::SeqCst) {
            result = Err(format!("the mount lived longer than {:?}", hang()));
        }
        result
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(why) = self.leave()
            && !thread::panicking()
        {
            panic!("{}: {why}", self.dir.display());
        }
    }
}

/// The number of the FUSE connection mounted on `dir`: the minor of its device. Taken from
/// mountinfo, since asking a hung mount would hang as well.
pub fn connection_of(dir: &Path) -> Option<u32> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let line =
        mountinfo.lines().rev().find(|l| l.split(' ').nth(4).map(unescape).as_deref() == dir.to_str())?;
    line.contains(" - fuse").then_some(())?;
    line.split(' ').nth(2)?.split(':').nth(1)?.parse().ok()
}

fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\134", "\\")
}

/// Runs a command that unmounts. A process that another test has just forked holds this one's descriptors
/// until it executes its program: meanwhile the mount is in use, and the command is run again.
pub fn unmounting(umount: &mut Command) -> Output {
    let start = Instant::now();
    loop {
        let output = umount.output().expect("timeout(1) runs");
        let said = String::from_utf8_lossy(&output.stderr);
        if !said.contains("by a process that cannot be seen") || start.elapsed() > hang() {
            return output;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Aborts a connection whatever its daemon is doing; every call that hangs in it returns. Where the control
/// file system is not mounted, the daemon's death does the same.
fn abort(dir: &Path) {
    if let Some(connection) = connection_of(dir)
        && fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1").is_ok()
    {
        return;
    }
    if let Some(pid) = daemon_of(dir).and_then(|pid| Pid::from_raw(pid.cast_signed())) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn lazy_umount(dir: &Path) {
    let (code, out, err) = super::tool("umount").arg("--lazy").arg(dir).outcome();
    if code != 0 {
        eprintln!("umount --lazy {}: {out}{err}", dir.display());
    }
}

/// The chainfs process whose command line ends in this mount point.
pub fn daemon_of(dir: &Path) -> Option<u32> {
    let serves = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|b| *b == 0);
        let program = words.next().unwrap_or_default();
        program.ends_with(b"chainfs") && words.any(|word| word == dir.as_os_str().as_bytes())
    };
    let processes = fs::read_dir("/proc").expect("/proc");
    processes.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).find(|pid| serves(*pid))
}

pub fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let name =
        |e: std::io::Result<fs::DirEntry>| e.expect("an entry").file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}
