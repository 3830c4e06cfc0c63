//! Many guests with damaged disks in one mount, root's and an ordinary user's in turn: every request is
//! answered, and the daemon serves all others as before.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{DirEntryExt as _, FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::scramble::{scramble, telling_blocks};
use chainfs::units::are_zero;
use support::foreign::amount;
use support::*;

/// The kind of disk that is made by [`encrypt`].
const ENCRYPTED: &str = "cryptsetup";
/// What its headers take before and behind the data.
const HEADERS: u64 = 32 * MIB;
/// Disks in one mount.
const BATCH: u64 = 10;
/// An ordinary user and the group of that user: nobody and nogroup.
const USER: u32 = 65534;
/// Maximum memory of the daemon and its workers together, whatever sizes the disks state.
const MEMORY: u64 = 1 << 30;
/// Maximum number of entries read of one disk: damage can make them endless.
const ENTRIES: usize = 3000;
/// Bytes of one file that are read, for the same reason.
const CONTENT: usize = 8 << 20;

/// A whole disk with files of many shapes.
fn plant(store: &Store, kind: &str, size: u64) -> Vec<u8> {
    let (path, tree) = (store.beside("disk"), store.beside("tree"));
    File::create(&path).and_then(|file| file.set_len(size)).expect("a disk");
    fill(&tree);
    let mut words = kind.split(' ');
    let mut mkfs = tool(words.next().expect("a program"));
    mkfs.args(words);
    if kind == ENCRYPTED {
        return encrypt(store, &tree, size);
    }
    if kind.starts_with("mkfs.vfat") {
        mkfs.arg(&path).succeeds();
        tool("mcopy")
            .env("MTOOLS_SKIP_CHECK", "1")
            .args(["-s", "-Q", "-i"])
            .arg(&path)
            .arg(&tree)
            .arg("::/")
            .succeeds();
    } else if kind.starts_with("mkfs.xfs") {
        let prototype = store.beside("prototype");
        let lines = format!("/dev/null\n0 0\nd--755 0 0\n{}$\n", prototype_of(&tree));
        fs::write(&prototype, lines).expect("a file");
        mkfs.arg("-p").arg(&prototype).arg(&path).succeeds();
    } else {
        let option = if kind.starts_with("mkfs.btrfs") { "--rootdir" } else { "-d" };
        mkfs.arg(option).arg(&tree).arg(&path).succeeds();
    }
    fs::read(&path).expect("the disk")
}

/// A container of version 2 around a disk with ext4.
fn encrypt(store: &Store, tree: &Path, size: u64) -> Vec<u8> {
    let (path, key) = (store.beside("disk"), store.beside("key"));
    fs::write(&key, "key").expect("a key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode");
    tool("mkfs.ext4").args(["-q", "-F", "-d"]).arg(tree).arg(&path).succeeds();
    File::options().write(true).open(&path).and_then(|file| file.set_len(size + HEADERS)).expect("room");
    let words = ["reencrypt", "-q", "--encrypt", "--type=luks2", "--iter-time=1", "--pbkdf=pbkdf2"];
    let mut cryptsetup = tool("cryptsetup");
    cryptsetup.args(words).args(["--reduce-device-size=32M", "--key-file"]);
    cryptsetup.arg(&key).arg(&path).succeeds();
    fs::read(&path).expect("the disk")
}

/// The table with its key, for a mount of this user.
fn keys(store: &Store, is_user: bool) -> String {
    let table = store.beside("keys.toml");
    fs::write(&table, "[[key]]\nuuid = \"*\"\npassphrase = \"key\"\n").expect("a table");
    fs::set_permissions(&table, fs::Permissions::from_mode(0o600)).expect("a mode");
    if is_user {
        tool("chown").arg("nobody").arg(&table).succeeds();
    }
    format!("keys={}", table.display())
}

/// The lines by which mkfs.xfs copies a directory's content.
fn prototype_of(dir: &Path) -> String {
    let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
    let line = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_str().expect("a plain name");
        if path.is_dir() {
            format!("{name} d--755 0 0\n{}$\n", prototype_of(&path))
        } else {
            format!("{name} ---644 0 0 {}\n", path.display())
        }
    };
    entries.map(line).collect()
}

fn fill(dir: &Path) {
    fs::create_dir_all(dir.join("sub/deeper")).expect("a directory");
    for number in 0..60 {
        fs::write(dir.join(format!("sub/file-with-number-{number}")), vec![number; 5000]).expect("a file");
    }
    fs::write(dir.join("sub/deeper/large"), Rng::new(3).bytes(300_000)).expect("a file");
    let pieces = File::create(dir.join("pieces")).expect("a file");
    for piece in 0..30u64 {
        pieces.write_all_at(&[1; 1024], piece * 9000).expect("a piece");
    }
}

/// How a walk went.
#[derive(Debug, Default)]
struct Walk {
    entries: usize,
    errors: usize,
    slowest: Duration,
}

impl Walk {
    fn timed<T>(&mut self, what: impl FnOnce() -> std::io::Result<T>) -> Option<T> {
        let start = Instant::now();
        let result = what();
        self.slowest = self.slowest.max(start.elapsed());
        self.errors += usize::from(result.is_err());
        result.ok()
    }

    fn directory(&mut self, dir: &Path) {
        let Some(mut entries) = self.timed(|| fs::read_dir(dir)) else { return };
        while let Some(next) = self.timed(|| entries.next().transpose()) {
            let Some(entry) = next else { return };
            self.entries += 1;
            if self.entries > ENTRIES {
                return;
            }
            assert_ne!(entry.ino(), 0);
            let path = entry.path();
            let Some(found) = self.timed(|| fs::symlink_metadata(&path)) else { continue };
            let mut names = vec![0u8; 65_536];
            self.timed(|| rustix::fs::llistxattr(&path, &mut names[..]).map_err(Into::into));
            if found.is_dir() {
                self.directory(&path);
            } else if found.is_symlink() {
                self.timed(|| fs::read_link(&path));
            } else if found.is_file() {
                self.file(&path);
            }
        }
    }

    fn file(&mut self, path: &Path) {
        let Some(mut file) = self.timed(|| File::open(path)) else { return };
        let mut buf = vec![0; 1 << 20];
        let mut left = CONTENT;
        while let Some(len) = self.timed(|| file.read(&mut buf)) {
            left = left.saturating_sub(len);
            if len == 0 || left == 0 {
                return;
            }
        }
    }
}

/// Mounts as an ordinary user, who owns the store.
fn mount_as_user(store: &Store, options: &str) -> Mount {
    let dir = store.beside("mnt");
    for path in [&store.root(), &dir] {
        tool("chown").args(["-R", "nobody"]).arg(path).succeeds();
    }
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(store.root().parent().expect("a parent"), open).expect("a mode");
    let mut command = Command::new("timeout");
    command.args(["--kill-after=2", &hang().as_secs().to_string(), "setpriv"]);
    command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all"]);
    command.arg(chainfs_binary());
    Mount::by(store, command, &store.root(), &dir, options).unwrap_or_else(|refusal| panic!("{refusal:?}"))
}

/// Works as the ordinary user.
fn as_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let switched = || {
        let (uid, gid) = (rustix::process::Uid::from_raw(USER), rustix::process::Gid::from_raw(USER));
        rustix::thread::set_thread_res_gid(gid, gid, gid).expect("another group");
        rustix::thread::set_thread_res_uid(uid, uid, uid).expect("another user");
        work()
    };
    std::thread::scope(|scope| scope.spawn(switched).join().expect("no panic"))
}

/// Bytes of memory that a process and its children have.
fn memory_of(daemon: u32) -> u64 {
    let all =
        tool("ps").args(["-o", "rss=", "-p", &daemon.to_string(), "--ppid", &daemon.to_string()]).succeeds();
    all.split_whitespace().map(|kib| kib.parse::<u64>().expect("a number") * 1024).sum()
}

#[test]
// X2
fn damaged_guests_cause_no_crash_or_hang() {
    let rounds = amount(10, 2000);
    let seeds = Store::new();
    let kinds = [
        ("mkfs.ext4 -q -F -b 1024", 24 * MIB),
        ("mkfs.ext4 -q -F -b 1024 -O ^metadata_csum,inline_data", 24 * MIB),
        ("mkfs.vfat -F 16 -s 1", 8 * MIB),
        ("mkfs.vfat -F 32 -s 1", 34 * MIB),
        ("mkfs.xfs -q", 300 * MIB),
        // Without checksums, damage is found by those who read it.
        ("mkfs.xfs -q -m crc=0,finobt=0 -b size=1024", 300 * MIB),
        ("mkfs.btrfs -q -f --mixed -n 4096", 24 * MIB),
        (ENCRYPTED, 24 * MIB),
    ];
    for (kind, size) in kinds {
        let good = plant(&seeds, kind, size);
        let mut blocks = telling_blocks(&good);
        if kind == ENCRYPTED {
            // Both copies of the header; what is encrypted says nothing.
            blocks.retain(|block| block * 1024 < 32 << 10);
        }
        let seed = seeds.beside("seed");
        sparse(&seed, &good);
        let mut bytes = good.clone();
        let (mut errors, mut slowest, mut most) = (0, Duration::ZERO, 0);
        for batch in 0..u64::div_ceil(rounds, BATCH) {
            let store = Store::new();
            copy(&seed, &store.path("sound.raw"));
            let disks = (batch * BATCH..rounds.min((batch + 1) * BATCH)).map(|seed| format!("d{seed}"));
            let disks: Vec<String> = disks.collect();
            for (number, name) in (batch * BATCH..).zip(&disks) {
                scramble(&mut bytes, &blocks, &mut Rng::new(number + 99));
                let path = store.path(format!("{name}.raw"));
                copy(&seed, &path);
                move_changes(&path, &mut bytes, &good, &blocks);
            }
            let is_user = batch % 2 == 1;
            let options = if kind == ENCRYPTED { keys(&store, is_user) } else { String::new() };
            let mount = if is_user { mount_as_user(&store, &options) } else { Mount::with(&store, &options) };
            let daemon = mount.daemon();
            let walk_all = || {
                for name in &disks {
                    let mut walk = Walk::default();
                    walk.directory(&mount.path(format!("{name}/files/active")));
                    walk.timed(|| fs::read(mount.path(format!("{name}/volumes.txt"))));
                    assert!(walk.slowest < hang(), "{kind}, {name}: {walk:?}");
                    errors += walk.errors;
                    slowest = slowest.max(walk.slowest);
                }
                let memory = memory_of(daemon);
                assert!(memory < MEMORY, "{kind}: {memory} bytes of memory");
                most = most.max(memory);
                let mut sound = Walk::default();
                sound.directory(&mount.path("sound/files/active"));
                assert!(sound.errors == 0 && sound.entries > 60, "{kind}: {sound:?}");
            };
            if is_user {
                as_user(walk_all);
            } else {
                let mut walk_all = walk_all;
                walk_all();
            }
            assert_eq!(mount.daemon(), daemon);
            mount.umount();
        }
        println!("{kind}: {errors} errors, the slowest answer {slowest:?}, {} MiB of memory", most / MIB);
        assert!(errors > rounds as usize / 4, "{kind}: the damage hit nothing: {errors} errors");
    }
}

fn copy(from: &Path, to: &Path) {
    tool("cp").arg("--sparse=always").arg(from).arg(to).succeeds();
}

/// Writes what damage has changed in these blocks, or just behind them, and undoes it in memory.
fn move_changes(path: &Path, bytes: &mut [u8], good: &[u8], blocks: &[usize]) {
    let file = File::options().write(true).open(path).expect("a disk");
    for block in blocks {
        let range = block * 1024..(block * 1024 + 1088).min(good.len());
        if bytes[range.clone()] != good[range.clone()] {
            file.write_all_at(&bytes[range.clone()], range.start as u64).expect("its bytes");
            bytes[range.clone()].copy_from_slice(&good[range]);
        }
    }
}

/// Writes the nonzero parts.
fn sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).expect("a disk");
    file.set_len(bytes.len() as u64).expect("its size");
    for (number, block) in (0..).zip(bytes.chunks(4096)) {
        if !are_zero(block) {
            file.write_all_at(block, number * 4096).expect("its bytes");
        }
    }
}
