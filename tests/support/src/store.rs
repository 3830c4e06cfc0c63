//! A store in a temporary directory, and QEMU's tools working in it.
//!
//! Content is seeded: the same test writes the same bytes every time. All writes of one step go
//! through a single qemu-io process.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

use super::MIB;
use super::rng::Rng;
use super::tools::{Outcome as _, tool};

/// Files of random bytes that writes take their content from. The length is odd and no multiple of
/// any cluster size, so that neighbouring clusters of one long write differ.
const PATTERN_COUNT: u64 = 16;
const PATTERN_LEN: u64 = 65_521;

static PATTERNS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    (0..PATTERN_COUNT).map(|number| Rng::new(0x5eed_0000 + number).bytes(PATTERN_LEN)).collect()
});

pub struct Store {
    scratch: TempDir,
}

impl Store {
    pub fn new() -> Self {
        let scratch =
            tempfile::Builder::new().prefix("chainfs-test-").tempdir().expect("a temporary directory");
        let store = Self { scratch };
        for dir in ["store", "mnt", "oracle", "patterns", "config"] {
            fs::create_dir(store.beside(dir)).expect("a directory beside the store");
        }
        for (number, bytes) in (0..).zip(&*PATTERNS) {
            fs::write(store.pattern(number), bytes).expect("a pattern file");
        }
        store
    }

    /// The directory that is mounted.
    pub fn root(&self) -> PathBuf {
        self.beside("store")
    }

    /// A path of the store.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }

    /// A path outside the store that lives as long as it does.
    pub fn beside(&self, name: impl AsRef<Path>) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory in the store");
        path
    }

    fn pattern(&self, number: u64) -> PathBuf {
        self.beside("patterns").join(number.to_string())
    }

    /// Runs qemu-img in the store's root.
    pub fn img<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> String {
        tool("qemu-img").args(args).current_dir(self.root()).succeeds()
    }

    /// `qemu-img create -f qcow2`, options as for `-o`, none if empty.
    pub fn create(&self, name: &str, size: u64, options: &str) {
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([name, &size]);
        self.img(args);
    }

    /// An overlay named `name`; `backing` is written into its header unchanged.
    pub fn overlay(&self, name: &str, backing: &str, backing_format: &str, options: &str) {
        let mut args = vec!["create", "-q", "-f", "qcow2", "-b", backing, "-F", backing_format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.push(name);
        self.img(args);
    }

    /// An overlay whose backing file need not exist nor make sense.
    pub fn overlay_unchecked(&self, name: &str, backing: &str, backing_format: &str) {
        self.overlay_sized(name, backing, backing_format, 1 << 20);
    }

    /// An overlay of this size; its backing file is not opened.
    pub fn overlay_sized(&self, name: &str, backing: &str, backing_format: &str, size: u64) {
        let size = size.to_string();
        self.img(["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", backing_format, name, &size]);
    }

    /// Runs qemu-io's commands on an image, in one process.
    pub fn io<S: AsRef<str>>(&self, name: &str, format: &str, commands: impl IntoIterator<Item = S>) {
        let mut io = tool("qemu-io");
        // There are no power cuts here: data in the kernel is as good as data on the disk.
        io.args(["-t", "unsafe", "-f", format]).current_dir(self.root());
        for command in commands {
            io.args(["-c", command.as_ref()]);
        }
        io.arg(name).succeeds();
    }

    /// A qemu-io command that writes random bytes.
    pub fn write(&self, rng: &mut Rng, at: u64, len: u64) -> String {
        format!("write -q -s {} {at} {len}", self.pattern(rng.below(PATTERN_COUNT)).display())
    }

    /// The same, compressed; must be whole clusters.
    pub fn write_compressed(&self, rng: &mut Rng, at: u64, len: u64) -> String {
        self.write(rng, at, len).replacen("-q", "-q -c", 1)
    }

    /// Writes, zeroes and discards all over the image, unaligned ones too.
    pub fn scribble(&self, name: &str, format: &str, seed: u64) {
        let size = self.virtual_size(name, format);
        let commands = self.scribbles(size, seed);
        self.io(name, format, commands);
    }

    /// Writes every other 4 KiB of the first `len` bytes, so that a copy has many pieces.
    pub fn speckle(&self, name: &str, len: u64, byte: u8) {
        self.io(name, "qcow2", (0..len).step_by(8 << 10).map(|at| format!("write -q -P {byte} {at} 4096")));
    }

    fn scribbles(&self, size: u64, seed: u64) -> Vec<String> {
        let mut rng = Rng::new(seed);
        let mut commands = Vec::new();
        for step in 0..24 {
            let at = rng.below(size);
            let longest = (size / 12).clamp(1, size - at);
            let len = 1 + rng.below(longest);
            let (at_sector, len_sectors) = (at & !511, ((len + 511) & !511).min(size - (at & !511)) & !511);
            match step % 8 {
                0..=4 => commands.push(self.write(&mut rng, at, len)),
                _ if len_sectors == 0 => {}
                5 => commands.push(format!("write -q -z {at_sector} {len_sectors}")),
                6 => commands.push(format!("write -q -z -u {at_sector} {len_sectors}")),
                _ => commands.push(format!("discard -q {at_sector} {len_sectors}")),
            }
        }
        commands
    }

    /// A raw file of `len` bytes, half of it holes; no tool involved.
    pub fn raw(&self, name: &str, len: u64, seed: u64) {
        let mut rng = Rng::new(seed);
        let file = File::create(self.path(name)).expect("a raw file");
        file.set_len(len).expect("room");
        let chunk = 64 << 10;
        for at in (0..len).step_by(chunk).filter(|_| rng.below(2) == 0).collect::<Vec<_>>() {
            file.write_all_at(&rng.bytes((chunk as u64).min(len - at)), at).expect("a chunk");
        }
    }

    /// A raw disk with one partition: an ext4 of `mib` MiB with the files of `tree`.
    pub fn guest(&self, name: &str, tree: &Path, mib: u64) {
        let disk = self.path(name);
        File::create(&disk).and_then(|file| file.set_len((mib + 2) * MIB)).expect("a disk");
        tool("sgdisk").args([&format!("-n1:2048:+{mib}M"), "-t1:8300"]).arg(&disk).succeeds();
        let offset = format!("offset={MIB}");
        let mut mkfs = tool("mkfs.ext4");
        mkfs.args(["-q", "-F", "-E", &offset, "-d"]).arg(tree).arg(&disk).arg(format!("{mib}m")).succeeds();
    }

    pub fn info(&self, name: &str, format: &str) -> Value {
        let text = self.img(["info", "-U", "-f", format, "--output=json", name]);
        serde_json::from_str(&text).expect("qemu-img info speaks JSON")
    }

    pub fn virtual_size(&self, name: &str, format: &str) -> u64 {
        self.info(name, format)["virtual-size"].as_u64().expect("a virtual size")
    }

    /// QEMU's read of an image or one of its internal snapshots, as a file; `Err` is QEMU's message if it
    /// would not read it.
    pub fn try_oracle(&self, name: &Path, format: &str, snapshot: Option<&str>) -> Result<PathBuf, String> {
        let (file, path) = tempfile::Builder::new()
            .prefix("view-")
            .tempfile_in(self.beside("oracle"))
            .and_then(|t| Ok(t.keep()?))
            .expect("a file for what QEMU reads");
        drop(file);
        let mut convert = tool("qemu-img");
        convert.current_dir(self.root()).args(["convert", "-U", "-f", format, "-O", "raw"]);
        if let Some(snapshot) = snapshot {
            convert.args(["-l", &format!("snapshot.id={snapshot}")]);
        }
        let (code, _, err) = convert.arg(name).arg(&path).outcome();
        if code == 0 { Ok(path) } else { Err(err) }
    }

    pub fn oracle(&self, name: impl AsRef<Path>, format: &str) -> PathBuf {
        self.try_oracle(name.as_ref(), format, None)
            .unwrap_or_else(|e| panic!("{}: {e}", name.as_ref().display()))
    }

    /// Writes a file into the store.
    pub fn put(&self, name: impl AsRef<Path>, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|mut f| f.write_all(bytes)).expect("a file in the store");
        path
    }
}
