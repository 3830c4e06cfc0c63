//! The content of the test disks: every kind of file that a file system can store.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, Timespec, Timestamps};

use super::disk::set_xattr;
use support::Rng;
use support::{Outcome as _, tool};

/// How much of it.
#[derive(Clone, Copy)]
pub(crate) struct Content {
    /// Files from the machine's own /usr/share; 0: some of /etc.
    pub(crate) files: usize,
    /// Names in one directory.
    pub(crate) names: usize,
    /// Extents of one file.
    pub(crate) pieces: u64,
    /// The longest value of an extended attribute.
    pub(crate) value_len: usize,
    /// The longest target of a link, if blocks are long enough for it.
    pub(crate) target_len: usize,
    /// Whether there are holes punched and space reserved, as extents can.
    pub(crate) punched: bool,
}

impl Content {
    pub(crate) fn small() -> Self {
        Self { files: 0, names: 700, pieces: 40, value_len: 900, target_len: 4095, punched: false }
    }

    pub(crate) fn ext4() -> Self {
        Self { punched: true, pieces: 400, ..Self::small() }
    }

    pub(crate) fn fill(&self, dir: &Path) {
        self.copies(dir);
        let blocks = rustix::fs::statvfs(dir).expect("statvfs").f_bsize;
        sizes(dir);
        names(dir);
        links(dir, self.target_len.min(blocks as usize - 1));
        devices(dir);
        many_names(&dir.join("many"), self.names);
        fragmented(&dir.join("fragmented"), self.pieces, blocks, self.punched);
        self.attributes(dir);
        owners(dir);
        if self.punched {
            reserved(dir);
        }
        // Last: everything else changes times.
        times(dir);
    }

    fn copies(&self, dir: &Path) {
        let to = dir.join("copies");
        fs::create_dir(&to).expect("a directory");
        let (from, count) = if self.files == 0 { ("/etc", 250) } else { ("/usr/share", self.files) };
        let script = format!(
            "cd {from} && find . -xdev \\( -type f -size -300k -o -type l \\) | sort | head -n {count} | tar \
                cf - -T - | tar xf - -C \"$1\""
        );
        tool("sh").args(["-c", &script, "sh"]).arg(&to).succeeds();
        // Removals leave entries without an inode in the middle of blocks.
        let mut removed = tool("find");
        removed.arg(&to).args(["-name", "*a*", "-type", "f", "-size", "-2k", "-delete"]).succeeds();
    }

    fn attributes(&self, dir: &Path) {
        let path = dir.join("attributes");
        for number in 0..12u8 {
            let file = path.join(format!("file {number}"));
            fs::create_dir_all(&path).and_then(|()| fs::write(&file, [number; 70])).expect("a file");
            for value in 0..number {
                let len = usize::from(value) * usize::from(number);
                set_xattr(&file, &format!("user.number {value}"), &vec![value; len]);
            }
        }
        set_xattr(&path, "trusted.of a directory", b"\0\xff");
        let long = path.join("long");
        fs::write(&long, "long").expect("a file");
        set_xattr(&long, "user.long", &Rng::new(7).bytes(self.value_len as u64));
        set_xattr(&long, "security.selinux", b"system_u:object_r:etc_t:s0\0");
        let capable = path.join("capable");
        fs::write(&capable, "capable").expect("a file");
        // cap_net_raw+ep, as setcap writes it.
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set_xattr(&capable, "security.capability", &capability);
        let shared = path.join("shared");
        fs::create_dir(&shared).expect("a directory");
        tool("setfacl")
            .args(["-m", "u:1234:rwx,g:99:r,u:0:---,m:rx,d:u:5:rw,d:g:7:x"])
            .arg(&shared)
            .succeeds();
        fs::write(shared.join("inherits"), "it").expect("a file");
        let link = path.join("link");
        symlink("nowhere", &link).expect("a link");
        set_xattr(&link, "trusted.of a link", b"value");
    }
}

fn sizes(dir: &Path) {
    let dir = dir.join("sizes");
    fs::create_dir(&dir).expect("a directory");
    let mut rng = Rng::new(1);
    for size in
        [0, 1, 59, 60, 61, 99, 130, 155, 160, 200, 500, 1023, 1024, 1025, 4095, 4096, 4097, 65_537, 700_001]
    {
        fs::write(dir.join(size.to_string()), rng.bytes(size)).expect("a file");
    }
    for (number, at) in [0u64, 11 << 10, 12 << 10, 300 << 10, 5 << 20, 70 << 20].into_iter().enumerate() {
        let file = File::create(dir.join(format!("sparse {number}"))).expect("a file");
        file.write_all_at(b"far out", at).expect("its end");
        file.set_len(at + (number as u64) * 10_000 + 7).expect("a hole behind it");
    }
    let shrunk = File::create(dir.join("shrunk")).expect("a file");
    shrunk
        .write_all_at(&rng.bytes(100_000), 0)
        .and_then(|()| shrunk.set_len(50_001))
        .expect("a shorter file");
    shrunk.sync_all().and_then(|()| shrunk.set_len(60_000)).expect("a longer one again");
}

fn names(dir: &Path) {
    let dir = dir.join("names");
    fs::create_dir(&dir).expect("a directory");
    let long = [b'n'; 255];
    let names: [&[u8]; 9] = [
        &long,
        b"new\nline",
        b"\xff\xfenot UTF-8",
        b"-dash",
        b" ",
        b"...",
        b"tab\tand *?[",
        b"\xc3\xa4",
        b"\x01\x7f",
    ];
    for name in names {
        fs::write(dir.join(OsStr::from_bytes(name)), name).expect("a file");
    }
    fs::create_dir_all(dir.join("a/b/c/d/e/f/g")).expect("directories");
    fs::create_dir(dir.join("empty")).expect("a directory");
}

fn links(dir: &Path, longest: usize) {
    let dir = dir.join("links");
    fs::create_dir(&dir).expect("a directory");
    for len in [1, 58, 59, 60, 61, 150, 255, 1000, longest] {
        symlink("t".repeat(len), dir.join(len.to_string())).expect("a link");
    }
    fs::write(dir.join("one"), "several names").expect("a file");
    for name in ["two", "three"] {
        fs::hard_link(dir.join("one"), dir.join(name)).expect("a hard link");
    }
    fs::hard_link(dir.join("60"), dir.join("the same link")).expect("a hard link");
}

fn devices(dir: &Path) {
    let dir = dir.join("devices");
    fs::create_dir(&dir).expect("a directory");
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), device).expect("a node");
    };
    let number = rustix::fs::makedev;
    make("old", FileType::BlockDevice, number(8, 3));
    make("new", FileType::CharacterDevice, number(0x123, 0x45678));
    make("zero", FileType::CharacterDevice, number(0, 0));
    make("fifo", FileType::Fifo, 0);
    drop(UnixListener::bind(dir.join("socket")).expect("a socket"));
}

/// A directory of many names, some of them removed again.
pub(crate) fn many_names(dir: &Path, count: usize) {
    fs::create_dir(dir).expect("a directory");
    let first = dir.join("entry 000000 with a name that is not short");
    File::create(&first).expect("a file");
    for number in 1..count {
        let name = dir.join(format!("entry {number:06} with a name that is not short"));
        // Many names for a few files: as good for a directory, and much faster.
        if number % 50 == 0 { File::create(name).map(drop) } else { fs::hard_link(&first, name) }
            .expect("a name");
    }
    for number in (3..count).step_by(7) {
        fs::remove_file(dir.join(format!("entry {number:06} with a name that is not short")))
            .expect("a removal");
    }
}

/// A file of many pieces.
fn fragmented(path: &Path, pieces: u64, block_len: u64, punched: bool) {
    let file = File::create(path).expect("a file");
    let mut rng = Rng::new(2);
    if !punched {
        for piece in 0..pieces {
            file.write_all_at(&rng.bytes(block_len), piece * 2 * block_len).expect("a piece");
        }
        return;
    }
    file.write_all_at(&rng.bytes(pieces * 2 * block_len), 0).and_then(|()| file.sync_all()).expect("a file");
    for piece in 0..pieces {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, (piece * 2 + 1) * block_len, block_len).expect("a hole");
    }
}

/// Space that is reserved and partly written.
fn reserved(dir: &Path) {
    let file = File::create(dir.join("reserved")).expect("a file");
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 3 << 20).expect("space");
    file.write_all_at(&vec![1; 100_000], 1 << 20).expect("a part of it");
    let beyond = File::create(dir.join("reserved beyond its end")).expect("a file");
    beyond.write_all_at(b"short", 0).expect("a beginning");
    rustix::fs::fallocate(&beyond, FallocateFlags::KEEP_SIZE, 0, 1 << 20).expect("space");
}

fn owners(dir: &Path) {
    for (number, mode) in [0o4755, 0o2755, 0o1777, 0o000, 0o600].into_iter().enumerate() {
        let path = dir.join(format!("owned {number}"));
        fs::write(&path, "owned").expect("a file");
        let id = [0, 1, 65_535, 65_536, 4_000_000_000][number];
        std::os::unix::fs::lchown(&path, Some(id), Some(id / 2)).expect("an owner");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("a mode");
    }
}

fn times(dir: &Path) {
    let dir = dir.join("times");
    fs::create_dir(&dir).expect("a directory");
    let seconds = [
        -0x8000_0000,
        -1_000_000_000,
        -1,
        0,
        1,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x3_7fff_ffff,
    ];
    for tv_sec in seconds {
        let path = dir.join(tv_sec.to_string());
        fs::write(&path, "when").expect("a file");
        let time = Timespec { tv_sec, tv_nsec: 123_456_789 };
        let times =
            Timestamps { last_access: time, last_modification: Timespec { tv_nsec: 999_999_999, ..time } };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("a time");
    }
    assert!(fs::metadata(&dir).expect("a directory").ino() > 2);
}
