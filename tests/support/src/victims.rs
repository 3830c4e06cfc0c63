//! A store with one healthy chain and any number of damaged ones beside it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;

use super::{Damage, KIB, MIB, Mount, Rng, Store, assert_chain};

/// However bad a store of this size is, the daemon has its tree ready with no more processor time than this.
pub const READY: Duration = Duration::from_secs(5);
/// The daemon must not use more memory than this, whatever an image states.
pub const MEMORY_LIMIT_KIB: u64 = 512 << 10;

/// The standard victim: several L1 entries, several L2 tables, data almost everywhere.
pub const VICTIM_SIZE: u64 = 5 * MIB;
pub const VICTIM_CLUSTER: u64 = 4 * KIB;

pub struct Victims {
    pub store: Store,
    /// The reads of the undamaged victim.
    pub intact: Vec<u8>,
}

impl Victims {
    pub fn new(options: &str) -> Self {
        let store = Store::new();
        store.create("good.qcow2", VICTIM_SIZE, &format!("cluster_size=4k{options}"));
        store.io("good.qcow2", "qcow2", [store.write(&mut Rng::new(1), 0, VICTIM_SIZE - 70_000)]);
        store.img(["snapshot", "-c", "kept", "good.qcow2"]);
        store.io("good.qcow2", "qcow2", [store.write(&mut Rng::new(2), 300_000, 100_000)]);
        let intact = fs::read(store.oracle("good.qcow2", "qcow2")).expect("what QEMU reads");
        Self { store, intact }
    }

    /// A copy of the healthy image to be damaged.
    pub fn victim(&self, name: &str) -> Damage {
        let path = self.store.path(format!("{name}.qcow2"));
        fs::copy(self.store.path("good.qcow2"), &path).expect("a copy");
        Damage::to(path)
    }

    /// Mounts, checks the healthy chain, runs `then` on the mount, and checks it again.
    pub fn mounted(&self, then: impl FnOnce(&Mount)) {
        let mount = Mount::new(&self.store);
        let took = mount.processor_time();
        assert!(took < READY, "the mount took {took:?}");
        assert_chain(&self.store, &mount, "good", "good.qcow2", "qcow2");
        then(&mount);
        assert_chain(&self.store, &mount, "good", "good.qcow2", "qcow2");
        assert_memory_is_bounded(&mount);
        mount.umount();
    }
}

pub fn assert_memory_is_bounded(mount: &Mount) {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.daemon())).expect("the daemon's status");
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < MEMORY_LIMIT_KIB, "the daemon took {} MiB", peak >> 10);
}

/// Reads everything that a directory of the mount holds; errors are fine, hanging is not.
pub fn read_everything(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => read_everything(&entry.path()),
            Ok(kind) if kind.is_file() => {
                let mut buffer = vec![0; MIB as usize];
                let size = entry.metadata().map_or(0, |m| m.len());
                let Ok(file) = File::open(entry.path()) else { continue };
                // Of a disk of exabytes the beginning and the end will do.
                for at in (0..size.min(64 * MIB)).step_by(buffer.len()).chain([size.saturating_sub(MIB)]) {
                    let _ = file.read_at(&mut buffer, at);
                }
            }
            _ => {}
        }
    }
}

/// The problem of a chain or of the store that names `image`; fails if there is none.
pub fn problem_of(mount: &Mount, chain: &str, image: &str) -> String {
    let of_chain = fs::read_to_string(mount.path(chain).join("info/problem.txt")).unwrap_or_default();
    let of_store = mount.text(".chainfs/problems.txt");
    let lines: Vec<&str> = of_chain.lines().chain(of_store.lines()).filter(|l| l.contains(image)).collect();
    assert!(!lines.is_empty(), "no problem names {image}\nchain: {of_chain}\nstore: {of_store}");
    lines.join("\n")
}

pub fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().map(|e| Errno::from_io_error(&e).unwrap_or_else(|| panic!("{e} has no errno")))
}

/// Each cluster as QEMU reads it, or an error; the number of errors is the caller's to judge.
pub fn assert_equal_or_error(name: &str, shown: &File, want: &[u8]) -> Vec<u64> {
    assert_eq!(shown.metadata().expect("metadata").len(), want.len() as u64, "size of {name}");
    let mut errors = Vec::new();
    for (number, want) in want.chunks(VICTIM_CLUSTER as usize).enumerate() {
        let at = number as u64 * VICTIM_CLUSTER;
        let mut have = vec![0; want.len()];
        match shown.read_exact_at(&mut have, at) {
            Ok(()) => assert!(have == want, "{name} differs from QEMU at {at}"),
            Err(e) => {
                assert_eq!(Errno::from_io_error(&e), Some(Errno::IO), "{name} at {at}");
                errors.push(number as u64);
            }
        }
    }
    errors
}
