//! QEMU's tools as judges, a directory for each test, and damage to be judged. Where QEMU is not
//! installed, the tests that need it fail.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of one test's own, removed at its end.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new directory. Panics where QEMU's tools are missing: without the reference there is no test.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static THERE: LazyLock<Output> = LazyLock::new(|| {
            Command::new("qemu-img")
                .arg("--version")
                .output()
                .expect("qemu-img is needed: install qemu-utils")
        });
        LazyLock::force(&THERE);
        let unique =
            format!("chainfs-oracle-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// Runs a tool in the directory, without checking its result.
    pub fn run(&self, tool: &str, args: &[&str]) -> Output {
        Command::new(tool).args(args).current_dir(&self.0).output().unwrap()
    }

    /// Runs a tool that has to succeed; returns what it printed.
    pub fn tool(&self, tool: &str, args: &[&str]) -> String {
        let output = self.run(tool, args);
        assert!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `qemu-img` with words separated by spaces.
    pub fn img(&self, words: &str) -> String {
        self.tool("qemu-img", &words.split_whitespace().collect::<Vec<_>>())
    }

    /// `qemu-img create` of a qcow2 image; `options` may be empty.
    pub fn create(&self, name: &str, options: &str, size: &str) {
        let options = if options.is_empty() { String::new() } else { format!("-o {options}") };
        self.img(&format!("create -q -f qcow2 {options} {name} {size}"));
    }

    /// Commands of `qemu-io` on an image.
    pub fn io(&self, name: &str, commands: &[&str]) {
        let args: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).chain([name]).collect();
        self.tool("qemu-io", &args);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A real file as storage.
pub struct Disk(File);

impl Disk {
    pub fn open(path: impl AsRef<Path>) -> Self {
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.0.read_exact_at(&mut out, at).unwrap();
        out
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    pub fn poke_u64(&self, at: u64, value: u64) {
        self.poke(at, &value.to_be_bytes());
    }

    pub fn set_len(&self, len: u64) {
        self.0.set_len(len).unwrap();
    }
}

impl chainfs::io::Storage for Disk {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> chainfs::error::Result<usize> {
        let mut have = 0;
        while have < buf.len() {
            match self.0.read_at(&mut buf[have..], at + have as u64) {
                Ok(0) => break,
                Ok(len) => have += len,
                Err(error) => return Err(chainfs::error::Error::io("reading", error)),
            }
        }
        Ok(have)
    }

    fn len(&self) -> chainfs::error::Result<u64> {
        Ok(self.0.metadata().unwrap().len())
    }
}

/// The image under test.
pub const NAME: &str = "image.qcow2";
/// COPIED, of an L1 or L2 entry.
pub const COPIED: u64 = 1 << 63;
/// The offset in a standard entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where the tables of an image are.
pub struct Places {
    pub disk: Disk,
    pub l1: u64,
    pub l2: u64,
    pub refcount_table: u64,
    pub refcount_block: u64,
    pub snapshots: u64,
}

/// Of the image [`NAME`].
pub fn places(scratch: &Scratch) -> Places {
    let disk = Disk::open(scratch.path(NAME));
    let (l1, refcount_table, snapshots) = (disk.u64(40), disk.u64(48), disk.u64(64));
    let (l2, refcount_block) = (disk.u64(l1) & OFFSET, disk.u64(refcount_table));
    Places { disk, l1, l2, refcount_table, refcount_block, snapshots }
}

impl Places {
    pub fn count(&self, cluster: u64, count: u16) {
        self.disk.poke(self.refcount_block + cluster * 2, &count.to_be_bytes());
    }

    pub fn change_l2(&self, index: u64, change: impl Fn(u64) -> u64) {
        let at = self.l2 + index * 8;
        self.disk.poke_u64(at, change(self.disk.u64(at)));
    }
}

/// A generator of numbers that replays from its seed (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A wrong value for an 8-byte entry.
pub fn damaged_entry(random: &mut Random, entry: u64, file_len: u64) -> u64 {
    match random.below(8) {
        0 => entry ^ (1 << random.below(64)),
        1 => entry ^ COPIED,
        2 => 0,
        3 => entry.wrapping_add(0x1000),
        4 => random.below(file_len) & !0xfff | entry & COPIED,
        5 => random.below(file_len) & !0xfff | COPIED,
        6 => random.next(),
        _ => entry ^ (1 << (12 + random.below(8))),
    }
}
