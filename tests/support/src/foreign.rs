//! Foreign users of disks and images: the kernel's loop devices and file systems, fio, and a running QEMU.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::store::Store;
use super::tools::{Outcome as _, eventually, hang, tool};

/// More with `tests/run.sh --long`.
pub fn amount(usual: u64, long: u64) -> u64 {
    if std::env::var_os("CHAINFS_LONG").is_some() { long } else { usual }
}

/// Waits until the qemu-nbd that makes this socket has its image open: it listens before it opens and locks
/// that, and greets after it.
pub fn greeted(socket: &Path) {
    let mut stream = None;
    // The socket is there a moment before it listens.
    eventually("qemu-nbd listens", || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    let mut stream = stream.expect("a connection");
    stream.set_read_timeout(Some(hang())).expect("a limit");
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).expect("qemu-nbd greets");
    assert_eq!(&greeting, b"NBDMAGIC");
}

/// A loop device that is detached with this.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn new(disk: &Path) -> Self {
        let device = tool("losetup").args(["--find", "--show"]).arg(disk).succeeds();
        Self(device.trim().into())
    }

    pub fn read_only(disk: &Path) -> Self {
        let device = tool("losetup").args(["--read-only", "--find", "--show"]).arg(disk).succeeds();
        Self(device.trim().into())
    }

    pub fn detach(self) {
        tool("losetup").arg("-d").arg(&self.0).succeeds();
        // The kernel releases the file a moment later.
        eventually("the loop device is free", || {
            let name = self.0.file_name().expect("a device has a name");
            !Path::new("/sys/block").join(name).join("loop/backing_file").exists()
        });
        std::mem::forget(self);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Random sizes, four jobs, each with a quarter of the disk, every block verified by its checksum.
pub fn fio(target: &Path, size: u64, words: &[&str]) -> String {
    let quarter = size / 4;
    let mut fio = tool("fio");
    fio.args([
        "--name=verify",
        "--thread",
        "--ioengine=psync",
        "--numjobs=4",
        "--bsrange=512-1M",
        "--bs_unaligned=0",
    ]);
    fio.args([
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--do_verify=1",
        "--group_reporting",
        "--fsync=64",
    ]);
    fio.args([&format!("--size={quarter}"), &format!("--offset_increment={quarter}")]).args(words);
    fio.arg(format!("--filename={}", target.display())).succeeds()
}

/// A file system mounted for as long as this lives.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(device: &Path, dir: PathBuf) -> Self {
        fs::create_dir_all(&dir).expect("a mount point");
        tool("mount").arg(device).arg(&dir).succeeds();
        Self(dir)
    }

    /// A file system in memory.
    pub fn tmpfs(dir: &Path) -> Self {
        fs::create_dir_all(dir).expect("a mount point");
        tool("mount").args(["-t", "tmpfs", "none"]).arg(dir).succeeds();
        Self(dir.to_path_buf())
    }

    pub fn umount(self) {
        tool("umount").arg(&self.0).succeeds();
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tool("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A QEMU that has an image open, writable or not, as a running guest would.
pub struct Qemu(Child);

impl Qemu {
    pub fn running_on(store: &Store, image: &str, more: &[&str]) -> Self {
        let socket = store.beside("guest.sock");
        let _ = fs::remove_file(&socket);
        let mut nbd = Command::new("qemu-nbd");
        nbd.args(["--persistent", "-f", "qcow2", "-k"]).arg(&socket).args(more).arg(image);
        let child = nbd.current_dir(store.root()).stdin(Stdio::null()).spawn().expect("qemu-nbd starts");
        let qemu = Self(child);
        greeted(&socket);
        qemu
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn shut_down(mut self) {
        self.0.kill().expect("a child of ours");
        self.0.wait().expect("a child of ours");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
