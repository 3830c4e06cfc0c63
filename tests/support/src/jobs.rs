//! Running commands of a real mount: given, observed, interrupted, and their views afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::command::Control;
use super::lab::{LAYERS, Lab};
use super::mount::Mount;
use super::tools::hang;

pub type Contents = BTreeMap<String, Vec<u8>>;

pub fn contents(lab: &Lab) -> Contents {
    LAYERS.iter().map(|layer| ((*layer).to_owned(), lab.content(&lab.file(layer)))).collect()
}

/// How often an interruption is tried.
const ATTEMPTS: u32 = 10;

/// A slow chain, and the bytes of its layers, which QEMU reads once.
pub fn slow(raw_base: bool) -> (Lab, Arc<Contents>) {
    static SHOWN: [OnceLock<Arc<Contents>>; 2] = [OnceLock::new(), OnceLock::new()];
    let lab = Lab::slow(raw_base);
    let shown = SHOWN[usize::from(raw_base)].get_or_init(|| Arc::new(contents(&lab)));
    (lab, Arc::clone(shown))
}

/// The unfinished commands.
pub fn intents(lab: &Lab) -> usize {
    fs::read_dir(lab.store.path(".chainfs/intents")).map_or(0, Iterator::count)
}

/// Every snapshot of every chain is unchanged; a commit into base has given base the bytes of `merged` if
/// that is gone. Returns how many there were.
pub fn assert_snapshots(
    mount: &Mount,
    before: &Contents,
    merged: Option<(&str, &str)>,
    context: &str,
) -> usize {
    let mut count = 0;
    for chain in &mount.top() {
        let names = mount.names(Path::new(chain).join("snapshots"));
        let has = |layer: &str| names.contains(&format!("{layer}.raw"));
        for name in &names {
            let layer = name.strip_suffix(".raw").expect("a disk");
            let Some(own) = before.get(layer) else { continue };
            let want = match merged {
                Some((top, base)) if layer == base && !has(top) => &before[top],
                _ => own,
            };
            let shown = fs::read(mount.path(chain).join("snapshots").join(name));
            let shown = shown.unwrap_or_else(|e| panic!("{context}: {chain}/{name}: {e}"));
            assert!(shown == *want, "{context}: {chain}/{name} of {names:?} has other bytes");
            count += 1;
        }
    }
    count
}

/// Waits until all that was begun is over, by itself.
pub fn settled(lab: &Lab, mount: &Mount, context: &str) {
    let control = Control::of(mount, "web");
    let start = Instant::now();
    // Between two states no command may seem to run although one has begun.
    while intents(lab) > 0 {
        let (state, error) = (control.status("state"), control.status("error"));
        let log = || fs::read_to_string(lab.store.beside("mount.output")).unwrap_or_default();
        assert!(state != "failed" && start.elapsed() < hang(), "{context}: {state}: {error}\n{}", log());
        thread::sleep(Duration::from_millis(10));
    }
    let state = control.wait();
    assert!(state == "done" || state == "idle", "{context}: {state}: {}", control.status("error"));
}

pub fn kill(mount: Mount) {
    let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
    kill_process(daemon, Signal::KILL).expect("the daemon is ours");
    mount.abandon();
}

/// Mounts a slow chain and gives it a command that is running when this returns.
pub fn at_work(lab: &Lab, command: &str) -> Mount {
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    assert_eq!(control.give(command), None, "{command}: {}", control.status("error"));
    control.begun();
    mount
}

/// A daemon that makes no progress until this is dropped: what a test does meanwhile happens while its
/// command is running, however busy the machine is. Its mount answers nothing.
pub struct Paused(Pid);

impl Paused {
    /// Stops the daemon of `mount`, which has begun a command of `lab`.
    pub fn at_work(lab: &Lab, mount: &Mount) -> Self {
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
        kill_process(daemon, Signal::STOP).expect("the daemon is ours");
        let paused = Self(daemon);
        assert_eq!(intents(lab), 1, "the command has ended before the daemon was stopped");
        paused
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// A chain of which a command was interrupted by `interrupt`, and what `make` gave with the chain. On a busy
/// machine the command may end before it is interrupted: then it is tried again.
pub fn interrupted<T>(make: impl Fn() -> (Lab, T), command: &str, interrupt: impl Fn(Mount)) -> (Lab, T) {
    for _ in 0..ATTEMPTS {
        let (lab, extra) = make();
        interrupt(at_work(&lab, command));
        match intents(&lab) {
            0 => {}
            1 => return (lab, extra),
            many => panic!("{command}: {many} intents are left"),
        }
    }
    panic!("{command} has ended {ATTEMPTS} times before it was interrupted");
}
