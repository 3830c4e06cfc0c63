//! `ls`, `cat`, `cp`, `diff` and `versions` on guests' disks, compared with the kernel's own mount of
//! `qemu-img convert`'s output for each view. Needs root, loop devices, ext4 and vfat.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::foreign::{Loop, Qemu};
use support::*;

/// Offsets of the partitions, and their sizes: vfat, ext4, and an unknown one.
const P1: (u64, u64) = (MIB, 16 * MIB);
const P2: (u64, u64) = (17 * MIB, 60 * MIB);
const P3: (u64, u64) = (77 * MIB, MIB);
const DISK: u64 = 80 * MIB;

fn chainfs(args: &[&str]) -> Command {
    let mut command = tool(chainfs_binary());
    command.args(args);
    command
}

fn json(command: &mut Command) -> Value {
    let (code, out, err) = command.outcome();
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{command:?}: {code}: {e}\n{out}{err}"))
}

/// A partition of a plain disk, mounted by the kernel for as long as this lives.
struct Attached(PathBuf);

impl Attached {
    fn new(disk: &Path, (start, len): (u64, u64), dir: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&dir).expect("a mount point");
        let options = format!("loop,offset={start},sizelimit={len},{options}");
        tool("mount").args(["-o", &options]).arg(disk).arg(&dir).succeeds();
        Self(dir)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // A process that another test has just forked holds these descriptors for a moment.
        for _ in 0..100 {
            if tool("umount").arg(&self.0).outcome().0 == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
        assert!(std::thread::panicking(), "{} stays in use", self.0.display());
        let _ = tool("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A guest with three partitions, whose disk becomes a layer now and then.
struct Guest {
    store: Store,
    disk: PathBuf,
}

impl Guest {
    fn install() -> Self {
        let store = Store::new();
        let disk = store.beside("disk");
        File::create(&disk).and_then(|file| file.set_len(DISK)).expect("a disk");
        let table =
            [P1, P2, P3].map(|(start, len)| format!("start={},size={}\n", start / 512, len / 512)).concat();
        let script =
            format!("printf 'label: dos\\n{}' | sfdisk -q --no-reread \"$1\"", table.replace('\n', "\\n"));
        tool("sh").args(["-c", &script, "sh"]).arg(&disk).succeeds();
        let sectors = (P1.0 / 512).to_string();
        tool("mkfs.vfat").args(["--offset", &sectors]).arg(&disk).arg((P1.1 / 1024).to_string()).succeeds();
        let offset = format!("offset={}", P2.0);
        tool("mkfs.ext4")
            .args(["-q", "-F", "-E", &offset])
            .arg(&disk)
            .arg(format!("{}k", P2.1 / 1024))
            .succeeds();
        let file = File::options().write(true).open(&disk).expect("the disk");
        file.write_all_at(&Rng::new(3).bytes(P3.1), P3.0).expect("what nobody knows");
        Self { store, disk }
    }

    /// Does something in the guest's ext4.
    fn works(&self, work: impl FnOnce(&Path)) {
        let attached = Attached::new(&self.disk, P2, self.store.beside("guest"), "rw");
        work(&attached.0);
    }

    /// The disk's present state becomes a layer, which holds the clusters that differ from the layer below.
    fn freeze(&self, layer: &str, backing: Option<&str>) {
        const CLUSTER: usize = 65_536;
        let Some(backing) = backing else {
            self.store.img([
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                self.disk.to_str().expect("a plain path"),
                layer,
            ]);
            return;
        };
        let below = self.store.oracle(backing, "qcow2");
        let (old, new) = (fs::read(&below).expect("bytes"), fs::read(&self.disk).expect("bytes"));
        self.store.overlay(layer, backing, "qcow2", "");
        let differing =
            (0..new.len()).step_by(CLUSTER).filter(|at| old[*at..*at + CLUSTER] != new[*at..*at + CLUSTER]);
        let commands: Vec<String> = differing
            .map(|at| {
                let piece = self.store.beside(format!("patterns/piece-{at}"));
                fs::write(&piece, &new[at..at + CLUSTER]).expect("a piece");
                format!("write -q -s {} {at} {CLUSTER}", piece.display())
            })
            .collect();
        self.store.io(layer, "qcow2", commands);
        fs::remove_file(below).expect("a file");
    }

    fn place(&self, place: &str) -> PathBuf {
        self.store.path(place)
    }

    /// The ext4 of a view, as the kernel shows QEMU's output.
    fn judge(&self, image: &str, snapshot: Option<&str>, name: &str) -> Attached {
        let oracle = self
            .store
            .try_oracle(Path::new(image), "qcow2", snapshot)
            .unwrap_or_else(|e| panic!("{image}: {e}"));
        Attached::new(&oracle, P2, self.store.beside(name), "ro")
    }
}

/// The attributes of a file, by stat(2) and others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    links: u64,
    size: u64,
    device: Option<String>,
    modified: (i64, i64),
    target: Option<PathBuf>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// The first path, in order, of the same inode.
    same_as: PathBuf,
    content: Vec<u8>,
    blocks: u64,
}

fn kind(kind: fs::FileType) -> &'static str {
    if kind.is_file() {
        "file"
    } else if kind.is_dir() {
        "directory"
    } else if kind.is_symlink() {
        "symlink"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_char_device() {
        "char-device"
    } else {
        "block-device"
    }
}

fn attributes(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("a value");
        value.truncate(len);
        value
    };
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names.map(|name| (name.to_vec(), value(name))).collect();
    found.sort();
    found
}

/// Everything beneath a directory of the host, by path.
fn walk(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let (mut paths, mut left) = (BTreeSet::new(), vec![PathBuf::new()]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(root.join(&directory)).expect("a directory") {
            let entry = entry.expect("an entry");
            let path = directory.join(entry.file_name());
            if entry.file_type().expect("a type").is_dir() {
                left.push(path.clone());
            }
            paths.insert(path);
        }
    }
    let mut inodes = BTreeMap::new();
    let described = paths.into_iter().map(|path| {
        let place = root.join(&path);
        let stat = fs::symlink_metadata(&place).expect("attributes");
        let kind = kind(stat.file_type());
        let device = kind
            .ends_with("device")
            .then(|| format!("{}:{}", rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())));
        let entry = Entry {
            kind,
            mode: stat.permissions().mode() & 0o7777,
            owner: (stat.uid(), stat.gid()),
            links: stat.nlink(),
            size: stat.size(),
            device,
            modified: (stat.mtime(), stat.mtime_nsec()),
            target: fs::read_link(&place).ok(),
            attributes: attributes(&place),
            same_as: inodes.entry(stat.ino()).or_insert_with(|| path.clone()).clone(),
            content: if kind == "file" { fs::read(&place).expect("its content") } else { Vec::new() },
            blocks: stat.blocks(),
        };
        (path, entry)
    });
    described.collect()
}

/// The bytes of a name in JSON.
fn name(object: &Value, plain: &str, bytes: &str) -> Vec<u8> {
    match object[bytes].as_str() {
        Some(hex) => (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex"))
            .collect(),
        None => object[plain].as_str().unwrap_or_else(|| panic!("{plain} in {object}")).as_bytes().to_vec(),
    }
}

/// Seconds and nanoseconds of an RFC 3339 time.
fn time(text: &Value) -> (i64, i64) {
    let at: jiff::Timestamp = text.as_str().expect("a time").parse().expect("a time");
    let nanoseconds = at.as_nanosecond();
    let floor = nanoseconds.div_euclid(1_000_000_000);
    (i64::try_from(floor).expect("a second"), nanoseconds.rem_euclid(1_000_000_000) as i64)
}

#[test]
fn ls_and_cp_show_the_same_as_the_kernel() {
    let guest = Guest::install();
    guest.works(|dir| crate::content::Content::ext4().fill(dir));
    guest.freeze("base.qcow2", None);
    guest.store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
    let judge = guest.judge("vm.qcow2", None, "judge");
    let expected = walk(&judge.0);
    assert!(expected.len() > 900, "{}", expected.len());

    let listed = json(chainfs(&["ls", "-aR", "--json"]).arg(guest.place("vm.qcow2:/p2")));
    let mut seen = BTreeSet::new();
    for directory in listed.as_array().expect("directories") {
        let mut last = Vec::new();
        for object in directory["entries"].as_array().expect("entries") {
            let name = name(object, "name", "name-bytes");
            assert!(last < name, "sorted: {last:?} {name:?}");
            last.clone_from(&name);
            let Some(parent) = directory["path"].as_str().filter(|path| !path.contains("\\x")) else {
                continue;
            };
            let path = Path::new(parent.trim_start_matches('/')).join(OsStr::from_bytes(&name));
            let entry = expected.get(&path).unwrap_or_else(|| panic!("{path:?} is not there"));
            let told = (
                object["type"].as_str(),
                u32::from_str_radix(object["mode"].as_str().expect("a mode"), 8).ok(),
                object["uid"].as_u64().zip(object["gid"].as_u64()),
                object["links"].as_u64(),
                object["size"].as_u64(),
                object["device"].as_str().map(str::to_owned),
                Some(time(&object["modified"])),
            );
            let owner = (u64::from(entry.owner.0), u64::from(entry.owner.1));
            let truth = (
                Some(entry.kind),
                Some(entry.mode),
                Some(owner),
                Some(entry.links),
                Some(entry.size),
                entry.device.clone(),
                Some(entry.modified),
            );
            assert_eq!(told, truth, "{path:?}");
            if let Some(target) =
                entry.target.as_ref().and_then(|target| target.to_str()).filter(|text| text.is_ascii())
            {
                assert_eq!(object["target"], target, "{path:?}");
            }
            seen.insert(path);
        }
    }
    assert!(seen.len() * 10 > expected.len() * 9, "{} of {}", seen.len(), expected.len());

    let out = guest.store.beside("out");
    let (code, _, err) = chainfs(&["cp", "-a"]).arg(guest.place("vm.qcow2:/p2/.")).arg(&out).outcome();
    assert_eq!((code, err.as_str()), (0, ""));
    let copied = walk(&out);
    assert!(copied.keys().eq(expected.keys()), "the same names");
    for (path, truth) in &expected {
        let found = &copied[path];
        // How a directory counts itself is its file system's own affair.
        let is_directory = truth.kind == "directory";
        let links = if is_directory { truth.links } else { found.links };
        let size = if is_directory { truth.size } else { found.size };
        let shown = Entry { links, size, blocks: truth.blocks, content: Vec::new(), ..found.clone() };
        assert_eq!(shown, Entry { content: Vec::new(), ..truth.clone() }, "{path:?}");
        assert!(found.content == truth.content, "the content of {path:?}");
        let slack = truth.blocks * 2 + 64;
        assert!(found.blocks <= slack, "{path:?} takes {} blocks, and took {}", found.blocks, truth.blocks);
    }

    let files: Vec<(&PathBuf, &Entry)> = expected.iter().filter(|(_, entry)| entry.kind == "file").collect();
    let some: Vec<_> = files.iter().step_by(9).filter(|(_, entry)| entry.size < 4 * MIB).collect();
    let mut cat = Command::new(chainfs_binary());
    cat.arg("cat").args(some.iter().map(|(path, _)| guest.place("vm.qcow2:/p2").join(path)));
    let output = cat.output().expect("chainfs runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == some.iter().flat_map(|(_, entry)| entry.content.clone()).collect::<Vec<u8>>());
    drop(judge);
}

/// A guest's changes between two snapshots: one of every kind.
fn changes(dir: &Path) {
    let at = |name: &str| dir.join(name);
    fs::write(at("new"), "new").expect("a file");
    fs::create_dir(at("tree/new dir")).expect("a directory");
    fs::write(at("tree/new dir/in it"), "in").expect("a file");
    fs::remove_file(at("gone")).expect("a file");
    fs::remove_dir_all(at("tree/old")).expect("a directory");
    // As long as before, and with the time that it had.
    let before = fs::metadata(at("silent")).expect("attributes").modified().expect("a time");
    let file = File::options().write(true).open(at("silent")).expect("a file");
    file.write_all_at(b"X", 70_000).and_then(|()| file.set_modified(before)).expect("a change");
    fs::write(at("longer"), vec![7; 9000]).expect("a file");
    fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o640)).expect("a mode");
    tool("chown").args(["5:6"]).arg(at("owner")).succeeds();
    tool("touch").args(["-d", "2001-02-03"]).arg(at("touched")).succeeds();
    tool("setfattr").args(["-n", "user.color", "-v", "red"]).arg(at("attributes")).succeeds();
    tool("setfattr").args(["-n", "user.color", "-v", "blue"]).arg(at("tree")).succeeds();
    fs::remove_file(at("link")).and_then(|()| symlink("elsewhere", at("link"))).expect("a link");
    fs::remove_file(at("kind")).and_then(|()| fs::create_dir(at("kind"))).expect("a directory");
    fs::write(at("kind/below"), "x").expect("a file");
    fs::rename(at("tree/moved"), at("tree/there")).expect("a rename");
    // Rewritten with the same bytes elsewhere on the disk; only the time differs.
    let same = fs::read(at("rewritten")).expect("a file");
    fs::write(at("copy"), &same).and_then(|()| fs::rename(at("copy"), at("rewritten"))).expect("a file");
    let _ = fs::read(at("large")).expect("a read, which may change the time of access");
    fs::hard_link(at("tree/kept"), at("second name")).expect("a link");
}

fn before(dir: &Path) {
    let at = |name: &str| dir.join(name);
    fs::create_dir_all(at("tree/old/deep")).expect("a directory");
    fs::write(at("large"), Rng::new(5).bytes(24 * MIB)).expect("a file");
    fs::write(at("silent"), Rng::new(6).bytes(300_000)).expect("a file");
    fs::write(at("rewritten"), Rng::new(7).bytes(200_000)).expect("a file");
    for name in [
        "gone",
        "longer",
        "mode",
        "owner",
        "touched",
        "attributes",
        "kind",
        "tree/old/deep/er",
        "tree/moved",
        "tree/kept",
    ] {
        fs::write(at(name), name).expect("a file");
    }
    symlink("somewhere", at("link")).expect("a link");
}

/// The differences between two mounted trees, each named as chainfs would; found by comparing everything.
fn differences(a: &Path, b: &Path) -> BTreeMap<PathBuf, (String, Vec<String>)> {
    let (a, b) = (walk(a), walk(b));
    let paths: BTreeSet<&PathBuf> = a.keys().chain(b.keys()).collect();
    let found = paths.into_iter().filter_map(|path| {
        let (was, is) = match (a.get(path), b.get(path)) {
            (Some(was), Some(is)) => (was, is),
            (Some(_), None) => return Some((path.clone(), ("removed".to_owned(), vec![]))),
            (None, _) => return Some((path.clone(), ("added".to_owned(), vec![]))),
        };
        let is_kept = was.kind == is.kind;
        let is_directory = was.kind == "directory";
        let what = [
            ("type", !is_kept),
            ("content", is_kept && was.content != is.content),
            ("size", is_kept && was.kind == "file" && was.size != is.size),
            ("target", is_kept && was.target != is.target),
            ("mode", is_kept && was.mode != is.mode),
            ("owner", is_kept && was.owner != is.owner),
            ("time", is_kept && !is_directory && was.modified != is.modified),
            ("xattrs", is_kept && was.attributes != is.attributes),
        ];
        let what: Vec<String> =
            what.iter().filter(|(_, differs)| *differs).map(|(word, _)| (*word).to_owned()).collect();
        (!what.is_empty()).then(|| (path.clone(), ("changed".to_owned(), what)))
    });
    found.collect()
}

fn told(answer: &Value, prefix: &str) -> Vec<(PathBuf, (String, Vec<String>))> {
    let one = |object: &Value| {
        let path = PathBuf::from(OsStr::from_bytes(&name(object, "path", "path-bytes")));
        let what = object["what"].as_array().into_iter().flatten();
        let what = what.map(|word| word.as_str().expect("a word").to_owned()).collect();
        let change = object["change"].as_str().expect("a change").to_owned();
        (path.strip_prefix(prefix).unwrap_or(&path).to_path_buf(), (change, what))
    };
    answer["changes"].as_array().expect("changes").iter().map(one).collect()
}

#[test]
fn diff_reports_every_changed_file_and_reads_little() {
    let guest = Guest::install();
    guest.works(before);
    guest.freeze("base.qcow2", None);
    guest.works(changes);
    guest.freeze("vm.qcow2", Some("base.qcow2"));
    let (base, vm) = (guest.place("base.qcow2"), guest.place("vm.qcow2"));
    let expected = {
        let (a, b) = (guest.judge("base.qcow2", None, "a"), guest.judge("vm.qcow2", None, "b"));
        differences(&a.0, &b.0)
    };
    assert!(expected.len() > 20, "{expected:?}");

    let (code, out, err) = chainfs(&["diff", "--files", "--json"]).args([&base, &vm]).outcome();
    assert_eq!((code, err.as_str()), (1, ""));
    let answer: Value = serde_json::from_str(&out).expect("JSON");
    let found = told(&answer, "/p2");
    let paths: Vec<&PathBuf> = found.iter().map(|(path, _)| path).collect();
    assert!(paths.is_sorted(), "in the order of paths: {paths:?}");
    assert_eq!(found.iter().cloned().collect::<BTreeMap<_, _>>(), expected);
    assert_eq!(found.len(), expected.len(), "each once");
    // The large file has not changed, nor has the vfat: neither is read.
    let read = answer["bytes-read"].as_u64().expect("a number");
    assert!(read < 6 * MIB, "{read} bytes were read");
    assert_eq!(answer["bytes-total"], 2 * (P1.1 + P2.1 + P3.1));

    // The other way round; by the name of a view; and as text.
    let back = json(chainfs(&["diff", "--files", "--json"]).arg(&vm).arg(guest.place("vm.qcow2@base")));
    let turned = |change: &str| match change {
        "added" => "removed".to_owned(),
        "removed" => "added".to_owned(),
        other => other.to_owned(),
    };
    let reversed = found.iter().map(|(path, (change, what))| (path.clone(), (turned(change), what.clone())));
    assert!(told(&back, "/p2").into_iter().eq(reversed));
    let (code, text, _) = chainfs(&["diff", "--files"]).args([&base, &vm]).outcome();
    assert_eq!(code, 1);
    assert!(text.contains("+ /p2/new\n") && text.contains("- /p2/gone\n"), "{text}");
    assert!(text.contains("~ /p2/silent   content\n"), "{text}");
    let last = text.lines().last().expect("a summary");
    assert!(last.contains(" added, ") && last.contains(" of 154 MiB read"), "{last}");

    // A running guest's own layer is not read if it holds no difference.
    let qemu = Qemu::running_on(&guest.store, "vm.qcow2", &[]);
    let running = json(chainfs(&["diff", "--files", "--json", "-U"]).args([&base, &vm]));
    qemu.shut_down();
    assert_eq!(running["changes"], answer["changes"]);
    let read = running["bytes-read"].as_u64().expect("a number");
    assert!(read < 8 * MIB, "{read} bytes were read");

    // A part of it, named once.
    let part = json(chainfs(&["diff", "--json"]).arg(guest.place("base.qcow2:/p2/tree/")).arg(&vm));
    let below = expected.iter().filter(|(path, _)| path.starts_with("tree"));
    assert!(
        told(&part, "/p2").into_iter().eq(below.map(|(path, what)| (path.clone(), what.clone()))),
        "{part}"
    );
    // A file on one side only, and on neither.
    let one = chainfs(&["diff"]).arg(guest.place("base.qcow2:/p2/new")).arg(&vm).outcome();
    assert_eq!((one.0, one.1.lines().next()), (1, Some("+ /p2/new")));
    let (code, _, err) = chainfs(&["diff"]).arg(guest.place("base.qcow2:/p2/never")).arg(&vm).outcome();
    assert!(code == 2 && err.contains("neither"), "{code} {err}");

    // The same disk, and one that was copied into images of its own: nothing shared, no difference.
    let same = chainfs(&["diff", "--files"]).args([&vm, &vm]).outcome();
    assert_eq!((same.0, same.1.starts_with("0 added, 0 removed, 0 changed;")), (0, true), "{same:?}");
    guest.freeze("other.qcow2", None);
    let other = guest.place("other.qcow2");
    let quiet = chainfs(&["diff", "--files", "-q"]).args([&vm, &other]).outcome();
    assert_eq!(quiet, (0, String::new(), String::new()));
    let answer = json(chainfs(&["diff", "--files", "--json"]).args([&vm, &other]));
    assert!(
        answer["bytes-read"].as_u64().expect("a number") > 48 * MIB,
        "what is not shared is read: {answer}"
    );

    // Volumes without a known file system are compared as bytes.
    let file = File::options().write(true).open(&guest.disk).expect("the disk");
    file.write_all_at(b"changed", P3.0 + 5000).expect("a change");
    guest.freeze("third.qcow2", Some("vm.qcow2"));
    let third = json(chainfs(&["diff", "--files", "--json"]).arg(&vm).arg(guest.place("third.qcow2")));
    assert_eq!(
        told(&third, "/"),
        [(PathBuf::from("p3"), ("changed".to_owned(), vec!["content".to_owned()]))]
    );
}

#[test]
fn diff_of_disks_reports_the_differing_sectors() {
    let store = Store::new();
    store.create("base.qcow2", 8 * MIB, "");
    store.scribble("base.qcow2", "qcow2", 1);
    store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
    store.scribble("vm.qcow2", "qcow2", 2);
    store.img(["snapshot", "-c", "inner", "vm.qcow2"]);
    store.io("vm.qcow2", "qcow2", ["write -q -P 9 512 512", "write -q -P 9 1536 1024", "write -q -z 3M 1M"]);
    store.raw("longer.raw", 9 * MIB, 4);
    let views = [
        ("base.qcow2", fs::read(store.oracle("base.qcow2", "qcow2")).expect("bytes")),
        ("vm.qcow2", fs::read(store.oracle("vm.qcow2", "qcow2")).expect("bytes")),
        (
            "vm.qcow2@inner",
            fs::read(store.try_oracle(Path::new("vm.qcow2"), "qcow2", Some("1")).expect("a view"))
                .expect("bytes"),
        ),
        ("longer.raw", fs::read(store.path("longer.raw")).expect("bytes")),
    ];
    for (one, bytes_a) in &views {
        for (other, bytes_b) in &views {
            let size = bytes_a.len().max(bytes_b.len());
            assert_eq!(size % 512, 0);
            let sector = |bytes: &[u8], at: usize| {
                let end = bytes.len().min(at + 512);
                let mut sector = bytes.get(at..end).unwrap_or_default().to_vec();
                sector.resize(512, 0);
                sector
            };
            let mut expected: Vec<(u64, u64)> = Vec::new();
            for at in (0..size).step_by(512).filter(|at| sector(bytes_a, *at) != sector(bytes_b, *at)) {
                match expected.last_mut() {
                    Some((start, len)) if *start + *len == at as u64 => *len += 512,
                    _ => expected.push((at as u64, 512)),
                }
            }
            let (code, out, err) =
                chainfs(&["diff", "--json"]).arg(store.path(one)).arg(store.path(other)).outcome();
            let answer: Value =
                serde_json::from_str(&out).unwrap_or_else(|e| panic!("{one} {other}: {e}\n{out}{err}"));
            let ranges = answer["ranges"].as_array().expect("ranges").iter();
            let ranges: Vec<_> = ranges
                .map(|range| (range["start"].as_u64().unwrap(), range["length"].as_u64().unwrap()))
                .collect();
            assert_eq!(ranges, expected, "{one} {other}");
            assert_eq!(code, i32::from(!expected.is_empty()), "{one} {other}");
            let read = answer["bytes-read"].as_u64().expect("a number");
            if one == other {
                assert_eq!(read, 0, "{one}");
            }
            // Only clusters that were written since can differ.
            if *one == "vm.qcow2" && *other == "vm.qcow2@inner" {
                assert!(read <= 2 * (64 * KIB + MIB), "{read}");
            }
        }
    }
    // Its location is reported.
    let guest = Guest::install();
    guest.freeze("base.qcow2", None);
    guest.store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
    let write = format!("write -q -P 9 {} 1024", P3.0 + 4096);
    guest.store.io("vm.qcow2", "qcow2", ["write -q -P 9 0 100", "write -q -P 9 1100000 600", &write]);
    let text = chainfs(&["diff"]).args([guest.place("base.qcow2"), guest.place("vm.qcow2")]).outcome().1;
    let last = format!("{:#014x}      1 KiB   p3", P3.0 + 4096);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(lines[2], last, "{text}");
    assert!(lines[3].starts_with("3 ranges differ, "), "{text}");
}

#[test]
fn versions_reports_the_views_of_each_content() {
    let guest = Guest::install();
    let file = |text: &'static str| move |dir: &Path| fs::write(dir.join("motd"), text).expect("a file");
    guest.works(|_| {});
    guest.freeze("base.qcow2", None);
    guest.works(file("one"));
    guest.freeze("sn1.qcow2", Some("base.qcow2"));
    guest.store.img(["snapshot", "-c", "in:ner", "sn1.qcow2"]);
    guest.works(|dir| fs::write(dir.join("else"), "x").expect("a file"));
    guest.freeze("sn2.qcow2", Some("sn1.qcow2"));
    guest.works(file("two"));
    guest.freeze("vm.qcow2", Some("sn2.qcow2"));
    guest.works(|dir| {
        fs::remove_file(dir.join("motd")).and_then(|()| symlink("else", dir.join("motd"))).expect("a link");
    });
    guest.freeze("clone.qcow2", Some("sn2.qcow2"));

    let answer = json(chainfs(&["versions", "--json"]).arg(guest.place("sn1.qcow2:/p2/motd")));
    let strings = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .expect("views")
            .iter()
            .map(|name| name.as_str().expect("a name").to_owned())
            .collect()
    };
    let versions = answer["versions"].as_array().expect("versions").iter();
    let found: Vec<_> = versions
        .map(|version| (strings(&version["views"]), version["state"].as_str(), version["size"].as_u64()))
        .collect();
    let views = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let expected = [
        (views(&["base"]), Some("absent"), None),
        (views(&["sn1@in:ner", "sn1", "sn2"]), Some("present"), Some(3)),
        (views(&["clone/active"]), Some("present"), Some(4)),
        (views(&["vm/active"]), Some("present"), Some(3)),
    ];
    assert_eq!(found, expected, "{answer}");
    let text = chainfs(&["versions"]).arg(guest.place("vm.qcow2:/p2/motd")).succeeds();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "the chain of the leaf alone: {text}");
    assert!(lines[0].starts_with("absent ") && lines[0].ends_with(" base"), "{text}");
    assert!(lines[1].contains("  3  -rw-r--r--  sn1@in:ner, sn1, sn2"), "{text}");
    // A path inside a mount means the same, even without a file there.
    let mount = Mount::new(&guest.store);
    for place in ["vm/files/sn1/p2/motd", "vm/files/base/p2/motd"] {
        let by_mount = chainfs(&["versions"]).arg(mount.path(place)).succeeds();
        assert_eq!(by_mount.lines().count(), 3, "{by_mount}");
    }
    mount.umount();
    let (code, _, err) = chainfs(&["versions"]).arg(guest.place("vm.qcow2:/p2/never")).outcome();
    assert!(code == 1 && err.contains("no view has it: base, sn1@in:ner, sn1, sn2, active"), "{code} {err}");
    // An internal snapshot whose name has a colon.
    assert_eq!(chainfs(&["cat"]).arg(guest.place("sn1.qcow2@in:ner:/p2/motd")).succeeds(), "one");
    assert_eq!(chainfs(&["cat"]).arg(guest.place("vm.qcow2@sn1@in:ner:/p2/motd")).succeeds(), "one");
    assert_eq!(
        chainfs(&["cat"]).arg(guest.place("clone.qcow2:/p2/motd")).succeeds(),
        "x",
        "a link is followed"
    );
}

#[test]
fn cp_never_writes_outside_of_its_destination() {
    let guest = Guest::install();
    let outside = guest.store.beside("outside");
    fs::create_dir(&outside).expect("a directory");
    fs::write(outside.join("passwd"), "mine").expect("a file");
    guest.works(|dir| {
        fs::create_dir(dir.join("first"))
            .and_then(|()| fs::create_dir_all(dir.join("second/a")))
            .expect("directories");
        symlink(&outside, dir.join("first/a")).expect("a link");
        symlink(outside.join("passwd"), dir.join("first/b")).expect("a link");
        fs::write(dir.join("second/a/passwd"), "the guest's").expect("a file");
        fs::write(dir.join("second/b"), "the guest's").expect("a file");
        for name in ["first/suid", "second/c"] {
            fs::write(dir.join(name), "x").expect("a file");
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o6755)).expect("a mode");
        }
        tool("mkfifo").arg(dir.join("second/fifo")).succeeds();
    });
    guest.freeze("vm.qcow2", None);
    let out = guest.store.beside("out");
    chainfs(&["cp", "-r"]).arg(guest.place("vm.qcow2:/p2/first")).arg(&out).succeeds();
    assert_eq!(fs::read_link(out.join("a")).expect("a link"), outside, "the guest's own text");
    let mode = |path: &str| fs::metadata(out.join(path)).expect("attributes").permissions().mode() & 0o7777;
    assert_eq!(mode("suid"), 0o755);
    // The directory `a` would be entered through the link `a`.
    let (code, _, err) = chainfs(&["cp", "-r"]).arg(guest.place("vm.qcow2:/p2/second/.")).arg(&out).outcome();
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("/p2/second/.: a: a file that is not a directory has this name"), "{err}");
    assert!(err.contains("not copied, because a fifo needs -a"), "{err}");
    assert_eq!(fs::read_to_string(out.join("b")).expect("a file"), "the guest's", "the link was replaced");
    let left: Vec<_> = fs::read_dir(&outside)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(left, ["passwd"]);
    assert_eq!(fs::read_to_string(outside.join("passwd")).expect("a file"), "mine");
    let drafts = fs::read_dir(&out)
        .expect("a directory")
        .filter(|entry| entry.as_ref().expect("an entry").file_name().as_bytes().starts_with(b".chainfs"));
    assert_eq!(drafts.count(), 0);
    // Root keeps set-ID bits with -a, and only then.
    chainfs(&["cp", "-p"]).arg(guest.place("vm.qcow2:/p2/second/c")).arg(out.join("plain")).succeeds();
    chainfs(&["cp", "-a"]).arg(guest.place("vm.qcow2:/p2/second/c")).arg(out.join("all")).succeeds();
    assert_eq!((mode("plain"), mode("all")), (0o755, 0o6755));
    // A directory is not copied by mistake, and several files not over each other.
    let (code, _, err) = chainfs(&["cp"]).arg(guest.place("vm.qcow2:/p2/first")).arg(out.join("d")).outcome();
    assert!(code == 1 && err.contains("give -r"), "{code} {err}");
    let two = [guest.place("vm.qcow2:/p2/second/b"), guest.place("vm.qcow2:/p2/second/c"), out.join("b")];
    assert_eq!(chainfs(&["cp"]).args(two).outcome().0, 2);
}

#[test]
fn places_are_found_whatever_images_and_snapshots_are_called() {
    let guest = Guest::install();
    guest.works(|dir| {
        fs::create_dir_all(dir.join("etc")).expect("a directory");
        fs::write(dir.join("etc/os-release"), "ID=debian\n").expect("a file");
        fs::write(dir.join("etc/hostname"), "one\n").expect("a file");
        symlink("/etc", dir.join("to-etc")).expect("a link");
        symlink("loop", dir.join("loop")).expect("a link");
        fs::write(dir.join("etc/odd\x1b[2J"), "").expect("a file");
        for name in ["bin", "usr/bin", "sbin", "boot", "var", "home"] {
            fs::create_dir_all(dir.join(name)).expect("a directory");
        }
    });
    let vfat = format!("{}@@{}", guest.disk.display(), P1.0);
    fs::write(guest.store.beside("long"), Rng::new(8).bytes(100_000)).expect("a file");
    tool("mmd").args(["-i", &vfat, "::EFI"]).succeeds();
    tool("mcopy").args(["-i", &vfat]).arg(guest.store.beside("long")).arg("::EFI/A long Name.txt").succeeds();
    guest.freeze("base.qcow2", None);
    guest.store.overlay("plain.qcow2", "base.qcow2", "qcow2", "");
    fs::rename(guest.place("plain.qcow2"), guest.place("od:d@x.qcow2")).expect("another name");
    let cat = |place: &str| chainfs(&["cat"]).arg(guest.place(place)).succeeds();
    for place in [
        "base.qcow2:/p2/etc/hostname",
        "base.qcow2:p2//etc/./hostname",
        "od:d@x.qcow2:/p2/to-etc/hostname",
        "od:d@x.qcow2:/p2/to-etc/../../../etc/hostname",
        "od:d@x.qcow2@base:/p2/etc/hostname",
        "od:d@x.qcow2@active:/root/etc/hostname",
    ] {
        assert_eq!(cat(place), "one\n", "{place}");
    }
    let odd = guest.place("od:d@x.qcow2:");
    let volumes = chainfs(&["ls"]).arg(&odd).succeeds();
    for line in ["p1   vfat", "p2   ext4", "p3   unknown", "partition table: dos"] {
        assert!(volumes.contains(line), "{line} in\n{volumes}");
    }
    let listed = json(chainfs(&["ls", "--json"]).arg(&odd));
    assert_eq!(listed[0]["volumes"][1]["name"], "p2", "{listed}");
    let copied = guest.store.beside("copied");
    chainfs(&["cp", "-r"]).arg(guest.place("base.qcow2:/p1/efi")).arg(&copied).succeeds();
    assert!(fs::read(copied.join("A long Name.txt")).expect("a file") == Rng::new(8).bytes(100_000));
    let names = chainfs(&["ls", "-a"]).arg(guest.place("base.qcow2:/p2/etc")).succeeds();
    assert_eq!(names, "hostname\nodd\\x1b[2J\nos-release\n");
    let long = chainfs(&["ls", "-l"]).arg(guest.place("base.qcow2:/p2/to-etc")).succeeds();
    assert!(long.starts_with("lrwxrwxrwx ") && long.trim_end().ends_with("to-etc -> /etc"), "{long}");

    let refused = |args: &[&str], code: i32, fact: &str| {
        let (have, out, err) =
            chainfs(&args[..1]).args(args[1..].iter().map(|place| guest.place(place))).outcome();
        assert_eq!(have, code, "{args:?}\n{out}{err}");
        assert!(err.contains(fact), "{args:?}: {fact} in {err}");
    };
    refused(&["cat", "absent.qcow2:/p1/x"], 1, "there is no image");
    refused(&["cat", "base.qcow2:/p9/x"], 1, "no volume p9; its volumes: p1, p2, p3");
    refused(&["cat", "base.qcow2@monday:/p1/x"], 1, "has no view monday; there is active");
    refused(&["cat", "base.qcow2:/p2/etc/passwd"], 1, "there is no passwd");
    refused(&["cat", "base.qcow2:/p2/etc/hostname/x"], 1, "not a directory");
    refused(&["cat", "base.qcow2:/p2/loop"], 1, "too many symbolic links");
    refused(&["cat", "base.qcow2:/p2/etc"], 1, "not a regular file but a directory");
    refused(&["cat", "base.qcow2:/p3/x"], 1, "the files of p3 cannot be shown");
    refused(&["cat", "base.qcow2"], 1, "names no volume");
    refused(&["ls", ""], 1, "is a directory; name one of its images");
    // An error of one file does not affect the others.
    let both = [guest.place("base.qcow2:/p2/none"), guest.place("base.qcow2:/p2/etc/hostname")];
    let (code, out, _) = chainfs(&["cat"]).args(both).outcome();
    assert_eq!((code, out.as_str()), (1, "one\n"));
    // A reader that stops early causes no error message.
    let place = guest.place("base.qcow2:/p1/EFI/A long Name.txt");
    let head = tool("sh")
        .args(["-c", "\"$1\" cat \"$2\" | head -c 1 | wc -c", "sh", chainfs_binary()])
        .arg(&place)
        .succeeds();
    assert_eq!(head.trim(), "1");

    // A running guest has its disk locked; the layers below can be inspected.
    let qemu = Qemu::running_on(&guest.store, "./od:d@x.qcow2", &[]);
    refused(&["cat", "od:d@x.qcow2:/p2/etc/hostname"], 1, "qemu-nbd");
    assert_eq!(cat("base.qcow2:/p2/etc/hostname"), "one\n");
    assert_eq!(cat("od:d@x.qcow2@base:/p2/etc/hostname"), "one\n");
    let forced = chainfs(&["cat", "-U"]).arg(guest.place("od:d@x.qcow2:/p2/etc/hostname")).succeeds();
    assert_eq!(forced, "one\n");
    qemu.shut_down();
}

#[test]
fn the_other_disks_of_a_volume_group_are_found_beside_the_image() {
    let store = Store::new();
    let etc = store.beside("lvm");
    fs::create_dir(&etc).expect("a directory");
    let disks = ["one", "two"].map(|name| store.beside(name));
    let devices = disks.each_ref().map(|disk| {
        File::create(disk).and_then(|file| file.set_len(40 * MIB)).expect("a disk");
        Loop::new(disk)
    });
    let names = devices.each_ref().map(|device| device.0.display().to_string());
    let config = format!(
        "devices {{ use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source \
            = \"none\"\n\
         global_filter = [ \"a|^{}$|\", \"a|^{}$|\", \"r|.*|\" ] }}\nactivation {{ udev_sync = 0 udev_rules \
         = 0 monitoring = 0 }}\n\
         backup {{ backup = 0 archive = 0 }}\nglobal {{ etc = \"{2}\" event_activation = 0 use_lvmpolld = 0 \
         locking_dir = \"{2}/lock\" }}\n",
        names[0],
        names[1],
        etc.display()
    );
    fs::write(etc.join("lvm.conf"), config).expect("a configuration");
    let lvm = |words: &str| {
        let mut words = words.split(' ');
        let mut command = tool(words.next().expect("a program"));
        command.env("LVM_SYSTEM_DIR", &etc).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.args(["--driverloaded", "n"]).args(words).succeeds()
    };
    lvm(&format!("pvcreate -q -y {} {}", names[0], names[1]));
    lvm(&format!("vgcreate -q vg {} {}", names[0], names[1]));
    lvm(&format!("lvcreate -q -y -an -Zn -Wn -n far -L 24M vg {}", names[1]));
    for device in devices {
        device.detach();
    }
    let tree = store.beside("tree");
    fs::create_dir(&tree).and_then(|()| fs::write(tree.join("f"), "found")).expect("a file");
    // The first extent of a physical volume of LVM's own making begins at 1 MiB.
    let mut mkfs = tool("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "offset=1048576", "-d"]).arg(&tree).arg(&disks[1]).arg("24576k").succeeds();
    for (disk, image) in disks.iter().zip(["sys.qcow2", "sys-data.qcow2"]) {
        store.img(["convert", "-f", "raw", "-O", "qcow2", disk.to_str().expect("plain"), image]);
    }
    let place = store.path("sys.qcow2:/vg-far/f");
    assert_eq!(chainfs(&["cat"]).arg(&place).succeeds(), "found");
    let same = chainfs(&["diff", "--files"])
        .arg(store.path("sys.qcow2:/vg-far"))
        .arg(store.path("sys.qcow2"))
        .outcome();
    assert_eq!(same.0, 0, "{same:?}");
    // Without the other disk the missing part is reported.
    let apart = store.dir("apart");
    fs::rename(store.path("sys.qcow2"), apart.join("sys.qcow2")).expect("a move");
    let (code, _, err) = chainfs(&["cat"]).arg(apart.join("sys.qcow2:/vg-far/f")).outcome();
    assert_eq!(code, 1, "{err}");
    let root = store.root();
    let by_store = chainfs(&["cat", "--store"]).arg(&root).arg(apart.join("sys.qcow2:/vg-far/f")).outcome();
    assert_eq!((by_store.0, by_store.1.as_str()), (0, "found"), "{by_store:?}");
}

#[test]
fn damaged_files_are_reported_and_the_rest_is_listed() {
    let guest = Guest::install();
    guest.works(|dir| {
        for name in ["sub/ring", "lost"] {
            fs::create_dir_all(dir.join(name)).expect("a directory");
        }
        for name in ["a", "bad", "c", "sub/deep", "lost/one", "lost/two"] {
            fs::write(dir.join(name), Rng::new(9).bytes(50_000)).expect("a file");
        }
    });
    guest.freeze("base.qcow2", None);
    guest.works(|dir| fs::write(dir.join("c"), "changed").expect("a file"));
    let target = format!("{}?offset={}", guest.disk.display(), P2.0);
    // Where its bytes are is no longer known, nor where a directory's names are; and a directory holds the
    // one that it is in.
    for order in
        ["set_inode_field /bad block[0] 0", "set_inode_field /lost block[0] 0", "ln /sub /sub/ring/again"]
    {
        tool("debugfs").args(["-w", "-R", order, &target]).succeeds();
    }
    guest.freeze("vm.qcow2", Some("base.qcow2"));
    let (base, vm) = (guest.place("base.qcow2"), guest.place("vm.qcow2"));
    let (code, out, err) = chainfs(&["diff", "--files"]).args([&base, &vm]).outcome();
    assert_eq!(code, 2, "{out}{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("! /p2/bad   not readable in the second: "), "{out}");
    assert_eq!(lines[1], "~ /p2/c   content, size, time", "{out}");
    // A directory that cannot be listed may still exist.
    assert!(lines[2].starts_with("! /p2/lost   not readable in the second: "), "{out}");
    assert_eq!(lines[3], "+ /p2/sub/ring/again", "{out}");
    assert!(lines[4].starts_with("! /p2/sub/ring/again   not readable in the second: "), "{out}");
    assert!(
        lines[5].starts_with("1 added, 0 removed, 1 changed, 3 not readable; ") && lines.len() == 6,
        "{out}"
    );
    let (code, back, _) = chainfs(&["diff", "--files"]).args([&vm, &base]).outcome();
    assert!(code == 2 && back.starts_with("! /p2/bad   not readable in the first: "), "{back}");
    assert!(back.contains("\n0 added, 1 removed, 1 changed, 3 not readable; "), "{back}");

    let (code, _, err) = chainfs(&["ls", "-R"]).arg(guest.place("vm.qcow2:/p2")).outcome();
    assert!(
        code == 1 && err.contains("/sub/ring/again: this directory was already visited at another path"),
        "{code} {err}"
    );
    let out = guest.store.beside("out");
    let (code, _, err) = chainfs(&["cp", "-r"]).arg(guest.place("vm.qcow2:/p2")).arg(&out).outcome();
    assert!(code == 1 && err.contains(": out/bad: "), "{code} {err}");
    assert_eq!(fs::read_to_string(out.join("c")).expect("a file"), "changed");
    assert!(fs::read(out.join("sub/deep")).expect("a file") == Rng::new(9).bytes(50_000));
    assert!(!out.join("bad").exists(), "nothing that is not whole gets its name");
    let both = [guest.place("vm.qcow2:/p2/bad"), guest.place("vm.qcow2:/p2/c")];
    let (code, text, err) = chainfs(&["cat"]).args(both).outcome();
    assert!(code == 1 && text == "changed" && err.contains("/p2/bad: "), "{code} {text} {err}");
}
