//! Active disks under test: two leaves that different engines write, and the expected bytes of each.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::MIB;
use super::store::Store;
use super::tools::{Outcome as _, eventually, tool};

/// `base.raw` <- `web.qcow2`, and `plain.raw` alone: the leaves are written by different engines.
pub fn chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    store.scribble("web.qcow2", "qcow2", 2);
    store.raw("plain.raw", 2 * MIB, 3);
    store
}

pub const LEAVES: [(&str, &str, &str); 2] = [("web", "web.qcow2", "qcow2"), ("plain", "plain.raw", "raw")];

pub fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().map(|e| Errno::from_io_error(&e).unwrap_or_else(|| panic!("{e} has no errno")))
}

pub fn rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The disk as it should be, changed along with the real one.
pub struct Model(pub Vec<u8>);

impl Model {
    pub fn of(path: &Path) -> Self {
        Self(fs::read(path).expect("a disk"))
    }

    pub fn write(&mut self, disk: &File, at: u64, bytes: &[u8]) {
        disk.write_all_at(bytes, at).expect("a write");
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub fn zero(&mut self, disk: &File, flags: FallocateFlags, at: u64, len: u64) {
        fallocate(disk, flags, at, len).expect("a zeroed range");
        self.0[at as usize..][..len as usize].fill(0);
    }

    pub fn assert_is(&self, path: &Path) {
        assert!(fs::read(path).expect("a disk") == self.0, "{} differs", path.display());
    }
}

/// After the mount QEMU reads the written bytes, and finds no error.
pub fn assert_left_behind(store: &Store, image: &str, format: &str, model: &Model) {
    // The last close is reported to the daemon asynchronously.
    eventually("nobody has it open", || {
        tool("qemu-io").args(["-f", format, "-c", "flush", image]).current_dir(store.root()).outcome().0 == 0
    });
    assert!(fs::read(store.oracle(image, format)).expect("what QEMU reads") == model.0, "{image} differs");
    if format == "qcow2" {
        store.img(["check", "-q", image]);
    }
}
