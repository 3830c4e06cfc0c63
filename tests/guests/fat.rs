//! FAT as it is read from inside, judged by mtools, which made no line of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::counted::Counted;
use chainfs::error::ErrorKind;
use chainfs::guest::fat::{Fat, FatVolume, FatWidth};
use chainfs::guest::{FileAttributes, FileKind, FileSystem, Ino, RunKind, Source};
use support::*;
use tempfile::TempDir;

/// A volume in a file, changed by mtools.
struct Lab {
    dir: TempDir,
}

impl Lab {
    fn new(size: u64, options: &[&str]) -> Self {
        let lab = Self { dir: TempDir::new().expect("a directory") };
        fs::File::create(lab.image()).and_then(|file| file.set_len(size)).expect("a volume");
        tool("mkfs.vfat").args(options).arg(lab.image()).succeeds();
        fs::create_dir(lab.tree()).expect("a directory");
        lab
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// The files to copy to the volume.
    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn mtools(&self, program: &str) -> Command {
        let mut command = tool(program);
        // Sizes of the volume are its own affair.
        command
            .env("MTOOLS_SKIP_CHECK", "1")
            .env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .arg("-i")
            .arg(self.image());
        command
    }

    /// Copies all files of the tree to the volume.
    fn fill(&self) {
        let mut command = self.mtools("mcopy");
        command.args(["-s", "-p", "-m", "-Q", "-o"]);
        let mut names: Vec<_> =
            fs::read_dir(self.tree()).expect("the tree").map(|entry| entry.unwrap().path()).collect();
        names.sort();
        command.args(names).arg("::/").succeeds();
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.image()).expect("the volume")
    }

    fn open(&self) -> Fat {
        Fat::open(Arc::new(self.bytes())).expect("a file system")
    }

    /// The files that mtools reads from it.
    fn judged(&self, name: &str) -> BTreeMap<String, Seen> {
        let out = self.dir.path().join(name);
        fs::create_dir(&out).expect("a directory");
        self.mtools("mcopy").args(["-s", "-p", "-m", "-n", "-Q", "::/*"]).arg(&out).succeeds();
        let mut seen = BTreeMap::new();
        read_tree(&out, "", &mut seen);
        seen
    }
}

/// The compared properties of a file.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Seen {
    is_directory: bool,
    modified: i64,
    content: Vec<u8>,
}

fn read_tree(dir: &Path, prefix: &str, seen: &mut BTreeMap<String, Seen>) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        let name = format!("{prefix}{}", entry.file_name().to_str().expect("a name in UTF-8"));
        let metadata = entry.metadata().expect("metadata");
        let is_directory = metadata.is_dir();
        let content = if is_directory { Vec::new() } else { fs::read(entry.path()).expect("a file") };
        // mcopy sets a directory's time before it fills it.
        let modified = if is_directory { 0 } else { metadata.mtime() };
        if is_directory {
            read_tree(&entry.path(), &format!("{name}/"), seen);
        }
        seen.insert(name, Seen { is_directory, modified, content });
    }
}

/// Everything, read in pieces of an odd size; each file's runs agree with its bytes.
fn walk(fat: &Fat, bytes: &[u8]) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut left = vec![(fat.root(), String::new())];
    while let Some((directory, prefix)) = left.pop() {
        let mut names = Vec::new();
        fat.list(directory, 0, &mut |entry| {
            names.push(entry);
            true
        })
        .expect("a listing");
        for entry in names {
            let name = String::from_utf8(entry.name.clone()).expect("UTF-8");
            assert_eq!(fat.lookup(directory, &entry.name).unwrap(), Some(entry.ino), "{name}");
            let other_case = name.to_ascii_uppercase();
            assert_eq!(
                fat.lookup(directory, other_case.as_bytes()).unwrap(),
                Some(entry.ino),
                "{other_case}"
            );
            let attributes = fat.attributes(entry.ino).expect("attributes");
            assert_eq!(Some(attributes.kind), entry.kind);
            let is_directory = attributes.kind == FileKind::Directory;
            let content = if is_directory { Vec::new() } else { content(fat, entry.ino, &attributes, bytes) };
            let modified = if is_directory { 0 } else { attributes.modified.seconds };
            if is_directory {
                left.push((entry.ino, format!("{prefix}{name}/")));
            }
            seen.insert(format!("{prefix}{name}"), Seen { is_directory, modified, content });
        }
    }
    seen
}

fn content(fat: &Fat, ino: Ino, attributes: &FileAttributes, bytes: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut buf = [0; 10_007];
    loop {
        match fat.read_at(ino, content.len() as u64, &mut buf).expect("a read") {
            0 => break,
            len => content.extend_from_slice(&buf[..len]),
        }
    }
    assert_eq!(content.len() as u64, attributes.size);
    let mut mapped = Vec::new();
    while (mapped.len() as u64) < attributes.size {
        for run in fat.runs(ino, mapped.len() as u64, u64::MAX, 3).expect("runs") {
            let RunKind::Stored(at) = run.kind else { panic!("FAT knows no {:?}", run.kind) };
            mapped.extend_from_slice(&bytes[at as usize..][..run.len as usize]);
        }
    }
    assert!(mapped == content, "runs and bytes differ");
    content
}

fn assert_same_tree(ours: &BTreeMap<String, Seen>, theirs: &BTreeMap<String, Seen>) {
    let names = |seen: &BTreeMap<String, Seen>| seen.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs));
    for (name, seen) in ours {
        assert!(*seen == theirs[name], "{name} differs: {} and {}", seen.modified, theirs[name].modified);
    }
}

/// Names that need everything that names can need.
const NAMES: [&str; 17] = [
    "README.TXT",
    "readme2.txt",
    "Mixed.txt",
    "lower.TXT",
    "UPPER.txt",
    "noextension",
    "a name with spaces and many.dots.in it",
    ".hidden",
    "trailing.tar.gz",
    "ünïcödé ñame.txt",
    "日本語のファイル名",
    "emoji 😀 name",
    "thirteen_char",
    "fourteen_chars",
    "twenty-six-characters-name",
    "[brackets] +,;=.x",
    "ÄÖÜ.TXT",
];

fn set_time(path: &Path, seconds: u64) {
    let time = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    fs::File::options().write(true).open(path).and_then(|file| file.set_modified(time)).expect("a time");
}

/// A tree with something of everything: `most` bytes at a time.
fn plant(dir: &Path, rng: &mut Rng, most: u64) {
    let long = "x".repeat(255);
    for (number, name) in NAMES.into_iter().chain([long.as_str()]).enumerate() {
        let path = dir.join(name);
        let len = [0, 1, 511, 512, 513, most][number % 6];
        fs::write(&path, rng.bytes(len)).expect("a file");
        // The format stores times in units of two seconds.
        set_time(&path, 315_532_800 + rng.below(2_000_000_000) / 2 * 2);
    }
    let mut deep = dir.to_path_buf();
    for level in 0..20 {
        deep.push(format!("level {level} of the tree"));
        fs::create_dir(&deep).expect("a directory");
        fs::write(deep.join("FILE"), rng.bytes(700)).expect("a file");
    }
}

fn reads_as_mtools_do(size: u64, options: &[&str], kind: FatWidth, most: u64) {
    let lab = Lab::new(size, options);
    assert_eq!(FatVolume::detect(&lab.bytes()).expect("FAT").kind, kind);
    let mut rng = Rng::new(size);
    plant(&lab.tree(), &mut rng, most);
    lab.fill();
    let ours = walk(&lab.open(), &lab.bytes());
    assert_eq!(ours.len(), NAMES.len() + 1 + 40);
    assert_same_tree(&ours, &lab.judged("first"));

    // Punches holes, and adds a large file in them.
    lab.mtools("mdel").args(["::/Mixed.txt", "::/fourteen_chars", "::/level 0 of the tree/FILE"]).succeeds();
    lab.mtools("mren").args(["::/noextension", "::/now another much longer name"]).succeeds();
    lab.mtools("mmd").args(["::/empty"]).succeeds();
    fs::write(lab.dir.path().join("large"), rng.bytes(most * 3)).expect("a file");
    lab.mtools("mcopy").args(["-m", "-Q"]).arg(lab.dir.path().join("large")).arg("::/large.bin").succeeds();
    let ours = walk(&lab.open(), &lab.bytes());
    assert!(ours.contains_key("now another much longer name") && !ours.contains_key("Mixed.txt"));
    assert_same_tree(&ours, &lab.judged("second"));
}

#[test]
fn fat12_reads_as_mtools_read_it() {
    reads_as_mtools_do(1440 * KIB, &["-F", "12"], FatWidth::Fat12, 30_000);
}

#[test]
fn fat12_with_all_its_clusters_reads_as_mtools_read_it() {
    reads_as_mtools_do(2 * MIB, &["-F", "12", "-s", "1", "-f", "1"], FatWidth::Fat12, 200_000);
}

#[test]
fn fat16_reads_as_mtools_read_it() {
    reads_as_mtools_do(32 * MIB, &["-F", "16", "-s", "4"], FatWidth::Fat16, 700_000);
}

#[test]
fn fat32_reads_as_mtools_read_it() {
    reads_as_mtools_do(64 * MIB, &["-F", "32", "-s", "1", "-n", "EFI"], FatWidth::Fat32, 3_000_000);
}

#[test]
fn a_volume_with_sectors_of_4096_bytes_reads_as_mtools_read_it() {
    reads_as_mtools_do(300 * MIB, &["-F", "32", "-S", "4096", "-s", "1"], FatWidth::Fat32, 3_000_000);
}

/// The entries of an empty file: its long name, from its end to its beginning, and the short one.
fn entries(name: &str, number: u32) -> Vec<u8> {
    let short = format!("N{number:07}BIN");
    let sum = short.bytes().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(byte));
    let mut units: Vec<u16> = name.encode_utf16().chain([0]).collect();
    units.resize(units.len().next_multiple_of(13), 0xffff);
    let count = units.len() / 13;
    let mut entries = Vec::new();
    for (part, units) in units.chunks(13).enumerate().rev() {
        let order = part as u8 + if part + 1 == count { 0x41 } else { 1 };
        let text: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        entries
            .extend([&[order], &text[..10], &[0x0f, 0, sum], &text[10..22], &[0, 0], &text[22..]].concat());
    }
    entries.extend([short.as_bytes(), &[0x20], &[0; 20]].concat());
    entries
}

#[test]
fn a_large_directory_is_searched_and_listed_in_parts() {
    // mtools take minutes to make so many; so they only judge that these have been made well.
    let lab = Lab::new(16 * MIB, &["-F", "16", "-r", "8192"]);
    let mut bytes = lab.bytes();
    let field = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let root_at = (field(14) + 2 * field(22)) * field(11);
    let made: Vec<u8> =
        (0..2000).flat_map(|n| entries(&format!("the file with the number {n}"), n)).collect();
    bytes[root_at..][..made.len()].copy_from_slice(&made);
    fs::write(lab.image(), &bytes).expect("the volume");
    let judged = lab.mtools("mdir").args(["-b", "::/"]).succeeds();

    let source = Arc::new(Counted::new(bytes));
    let fat = Fat::open(Arc::clone(&source) as Arc<dyn Source>).expect("a file system");
    let mut names = Vec::new();
    let mut from = 0;
    loop {
        let before = names.len();
        fat.list(fat.root(), from, &mut |entry| {
            from = entry.next;
            names.push(entry);
            names.len() % 7 != 0
        })
        .unwrap();
        if names.len() == before {
            break;
        }
    }
    let shown: Vec<String> =
        names.iter().map(|entry| format!("::/{}", str::from_utf8(&entry.name).unwrap())).collect();
    assert_eq!(shown, judged.lines().collect::<Vec<_>>());
    assert_eq!(shown.len(), 2000);
    source.taken();
    for (number, entry) in names.iter().enumerate() {
        assert_eq!(fat.lookup(fat.root(), &entry.name).unwrap(), Some(entry.ino));
        assert_eq!(fat.lookup(fat.root(), format!("n{number:07}.Bin").as_bytes()).unwrap(), Some(entry.ino));
    }
    let (requests, bytes) = source.taken();
    assert!(requests < 100, "the directory is read again: {requests} requests, {bytes} bytes");
    assert_eq!(fat.lookup(fat.root(), b"the file with the number 2000").unwrap(), None);
}

/// A large file in single, separate clusters: reading it must not walk the chain from its beginning.
#[test]
fn a_file_in_a_hundred_thousand_pieces_is_read_in_time() {
    let lab = Lab::new(128 * MIB, &["-F", "32", "-s", "1"]);
    fs::write(lab.tree().join("large"), vec![7; 50 << 20]).expect("a file");
    lab.fill();
    let mut bytes = lab.bytes();
    let fat = lab.open();
    let ino = fat.lookup(fat.root(), b"large").unwrap().expect("the file");
    let runs = fat.runs(ino, 0, u64::MAX, 10).unwrap();
    assert_eq!(runs.len(), 1, "mtools have spread it");
    // Every second cluster first, then the others: rewrites the chain.
    let table_at = usize::from(u16::from_le_bytes([bytes[14], bytes[15]])) * 512;
    let entry = ino.0 as usize * 32;
    let first =
        u32::from_le_bytes([bytes[entry + 26], bytes[entry + 27], bytes[entry + 20], bytes[entry + 21]]);
    let count = (50u32 << 20) / 512;
    let order: Vec<u32> =
        (0..count).step_by(2).chain((1..count).step_by(2)).map(|index| first + index).collect();
    for pair in order.windows(2) {
        bytes[table_at + pair[0] as usize * 4..][..4].copy_from_slice(&pair[1].to_le_bytes());
    }
    bytes[table_at + order[order.len() - 1] as usize * 4..][..4]
        .copy_from_slice(&0x0fff_ffffu32.to_le_bytes());
    let source = Arc::new(Counted::new(bytes));
    let fat = Fat::open(Arc::clone(&source) as Arc<dyn Source>).unwrap();
    let mut buf = vec![0; 64 << 10];
    for at in (0..50u64 << 20).step_by(buf.len()).collect::<Vec<_>>().into_iter().rev() {
        assert_eq!(fat.read_at(ino, at, &mut buf).unwrap(), buf.len());
        assert!(buf.iter().all(|byte| *byte == 7));
    }
    let (requests, bytes) = source.taken();
    let is_once = requests < 2 * u64::from(count) && bytes < 100 << 20;
    assert!(is_once, "the chain is read again and again: {requests} requests, {bytes} bytes");
}

#[test]
fn attributes_match_those_of_linux() {
    let lab = Lab::new(4 * MIB, &["-F", "12", "-s", "4", "-n", "A LABEL", "-i", "12ab34cd"]);
    fs::create_dir_all(lab.tree().join("dir/sub1/deeper")).expect("directories");
    fs::create_dir(lab.tree().join("dir/sub2")).expect("a directory");
    fs::write(lab.tree().join("locked"), vec![1; 3000]).expect("a file");
    set_time(&lab.tree().join("locked"), 1_700_000_000);
    lab.fill();
    lab.mtools("mattrib").args(["+r", "+h", "::/locked"]).succeeds();
    let fat = lab.open();
    let attributes =
        |name: &[u8]| fat.attributes(fat.lookup(fat.root(), name).unwrap().expect("the file")).unwrap();
    let locked = attributes(b"locked");
    assert_eq!((locked.mode, locked.links, locked.size, locked.blocks), (0o555, 1, 3000, 8));
    assert_eq!((locked.modified.seconds, locked.changed), (1_700_000_000, locked.modified));
    let dir = attributes(b"dir");
    assert_eq!((dir.kind, dir.mode, dir.links, dir.size), (FileKind::Directory, 0o755, 4, 2048));
    let root = fat.attributes(fat.root()).unwrap();
    assert_eq!((root.links, root.size, root.modified.seconds), (3, 512 * 32, 0));
    assert!(
        fat.lookup(fat.root(), b"A LABEL").unwrap().is_none()
            && fat.lookup(fat.root(), b".").unwrap().is_none()
    );

    let minfo = lab.mtools("minfo").arg("::").succeeds();
    assert!(minfo.contains("serial number: 12AB34CD"), "{minfo}");
    let volume = FatVolume::detect(&lab.bytes()).expect("FAT");
    assert_eq!(volume.serial().as_deref(), Some("12AB-34CD"));
    assert_eq!(volume.label(&lab.bytes()).as_deref(), Some("A LABEL"));
    // mdir prints the number of free bytes.
    let mdir = lab.mtools("mdir").arg("::/").succeeds();
    let free: String = mdir
        .lines()
        .find(|line| line.contains("bytes free"))
        .unwrap()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    let statistics = fat.statistics();
    assert_eq!((statistics.free_blocks * u64::from(statistics.block_size)).to_string(), free);
}

#[test]
fn orphaned_and_damaged_long_names_are_ignored() {
    let lab = Lab::new(2 * MIB, &["-F", "12"]);
    for name in ["first long name", "second long name", "third long name"] {
        fs::write(lab.tree().join(name), name).expect("a file");
    }
    lab.fill();
    let mut bytes = lab.bytes();
    let root_at = bytes.windows(11).position(|window| window == b"FIRSTL~1   ").expect("its short name") - 64;
    // The root has the entries: two parts and the file, three times.
    let entry = |number: usize| root_at + number * 32;
    bytes[entry(1) + 13] ^= 1;
    bytes[entry(3)] = 0x43;
    let fat = Fat::open(Arc::new(bytes.clone())).unwrap();
    let names = |fat: &Fat, bytes: &[u8]| walk(fat, bytes).into_keys().collect::<Vec<_>>();
    assert_eq!(names(&fat, &bytes), ["FIRSTL~1", "SECOND~1", "third long name"]);
    let ino = fat.lookup(fat.root(), b"thirdl~1").unwrap().expect("by its short name");

    // A deleted file takes its names with it, and its number is unused.
    bytes[entry(8)] = 0xe5;
    let fat = Fat::open(Arc::new(bytes.clone())).unwrap();
    assert_eq!(names(&fat, &bytes), ["FIRSTL~1", "SECOND~1"]);
    for ino in [ino, Ino(0), Ino(2), Ino(3), Ino(u64::MAX), Ino(Ino::SMALL_LIMIT - 1)] {
        assert_eq!(fat.attributes(ino).unwrap_err().kind(), ErrorKind::Corrupt, "{ino:?}");
    }
}

#[test]
fn a_broken_cluster_chain_affects_one_file_only() {
    let lab = Lab::new(4 * MIB, &["-F", "16", "-s", "1"]);
    for name in ["GOOD", "BAD"] {
        fs::write(lab.tree().join(name), vec![7; 5 * 512]).expect("a file");
    }
    lab.fill();
    let mut bytes = lab.bytes();
    let fat = lab.open();
    let bad = fat.lookup(fat.root(), b"BAD").unwrap().expect("the file");
    let entry = bad.0 as usize * 32;
    let start = usize::from(u16::from_le_bytes([bytes[entry + 26], bytes[entry + 27]]));
    let table_at = usize::from(u16::from_le_bytes([bytes[14], bytes[15]])) * 512;
    for (broken, what) in [(0xffef_u16, "outside"), (0, "free"), (0xffff, "the end")] {
        bytes[table_at + (start + 1) * 2..][..2].copy_from_slice(&broken.to_le_bytes());
        let fat = Fat::open(Arc::new(bytes.clone())).unwrap();
        let mut buf = [0; 5 * 512];
        assert_eq!(fat.read_at(bad, 0, &mut buf).unwrap(), 1024, "{what}");
        assert_eq!(fat.read_at(bad, 1024, &mut buf).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
        let good = fat.lookup(fat.root(), b"GOOD").unwrap().expect("the file");
        assert_eq!(fat.read_at(good, 0, &mut buf).unwrap(), buf.len());
    }
}

/// A volume whose first sectors cannot be read.
struct Bad(Vec<u8>, std::ops::Range<u64>);

impl Source for Bad {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> chainfs::error::Result<()> {
        if at < self.1.end && at + buf.len() as u64 > self.1.start {
            return Err(chainfs::error::Error::new(ErrorKind::Io, "a bad sector"));
        }
        self.0.read_at(at, buf)
    }
}

#[test]
fn the_second_table_is_used_where_the_first_cannot_be_read() {
    let lab = Lab::new(4 * MIB, &["-F", "16", "-s", "1"]);
    fs::write(lab.tree().join("FILE"), vec![7; 50_000]).expect("a file");
    lab.fill();
    let bytes = lab.bytes();
    let table_at = u64::from(u16::from_le_bytes([bytes[14], bytes[15]])) * 512;
    let fat = Fat::open(Arc::new(Bad(bytes, table_at..table_at + 512))).unwrap();
    let file = fat.lookup(fat.root(), b"file").unwrap().expect("the file");
    let mut buf = vec![0; 50_000];
    assert_eq!(fat.read_at(file, 0, &mut buf).unwrap(), buf.len());
    assert!(buf.iter().all(|byte| *byte == 7));
}

/// One query reads little, whatever the volume states; the free clusters of the largest take 2 MiB.
fn assert_little(source: &Counted<Vec<u8>>) {
    let (requests, bytes) = source.taken();
    assert!(requests <= 1000 && bytes <= 16 << 20, "{requests} requests, {bytes} bytes");
}

/// A walk over a damaged volume always ends.
fn survive(bytes: Vec<u8>) {
    let source = Arc::new(Counted::new(bytes));
    let opened = Fat::open(Arc::clone(&source) as Arc<dyn Source>);
    assert_little(&source);
    let Ok(fat) = opened else { return };
    let _ = (fat.statistics(), fat.remarks());
    let mut left = vec![fat.root()];
    let mut budget = 400;
    let mut buf = vec![0; 100_000];
    while let Some(directory) = left.pop() {
        let mut found = Vec::new();
        let _ = fat.list(directory, 0, &mut |entry| {
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/') && entry.ino.0 < Ino::SMALL_LIMIT);
            found.push(entry);
            found.len() < 100
        });
        assert_little(&source);
        for entry in found {
            budget -= 1;
            if budget == 0 {
                return;
            }
            let _ = (
                fat.lookup(directory, &entry.name),
                fat.attributes(entry.ino),
                fat.extended_attributes(entry.ino),
            );
            let _ = (fat.read_at(entry.ino, 0, &mut buf), fat.runs(entry.ino, 1 << 20, u64::MAX, 5));
            assert_little(&source);
            if entry.kind == Some(FileKind::Directory) {
                left.push(entry.ino);
            }
        }
    }
}

#[test]
fn no_damage_makes_it_panic_or_hang() {
    let count = if std::env::var_os("CHAINFS_LONG").is_some() { 2000 } else { 150 };
    for (size, options) in [(MIB, "12"), (4 * MIB, "16"), (34 * MIB, "32")] {
        let lab = Lab::new(size, &["-F", options, "-s", "1"]);
        plant(&lab.tree(), &mut Rng::new(1), 3000);
        lab.fill();
        let good = lab.bytes();
        // Where there is metadata: boot sector, tables, directories and the beginning of the data.
        let places: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).take(20_000).collect();
        for seed in 0..count {
            let mut rng = Rng::new(seed);
            let mut bytes = good.clone();
            for _ in 0..=rng.below(8) {
                // Every other time in the boot sector, which everything hangs on.
                let limit = if rng.below(2) == 0 { 50 } else { places.len() };
                let at = places[rng.below(limit as u64) as usize];
                bytes[at] = [0, 0xff, 0x80, 1, rng.next() as u8][rng.below(5) as usize];
            }
            if rng.below(5) == 0 {
                bytes.truncate(rng.below(good.len() as u64) as usize);
            }
            survive(bytes);
        }
    }
}

#[test]
fn the_comparison_notices_what_changes() {
    let lab = Lab::new(2 * MIB, &["-F", "12"]);
    fs::write(lab.tree().join("FILE"), b"content").expect("a file");
    lab.fill();
    let theirs = lab.judged("theirs");
    let good = lab.bytes();
    let differs = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        walk(&Fat::open(Arc::new(bytes.clone())).unwrap(), &bytes) != theirs
    };
    let entry = good.windows(11).position(|window| window == b"FILE       ").expect("its entry");
    let content = good.windows(7).position(|window| window == b"content").expect("its content");
    assert!(!differs(&|_| ()));
    assert!(differs(&|bytes| bytes[content] ^= 1));
    assert!(differs(&|bytes| bytes[entry] = b'X'));
    // 1 January 2000: a date that exists, and that no clock shows any more.
    assert!(differs(&|bytes| bytes[entry + 24..][..2].copy_from_slice(&0x2821u16.to_le_bytes())));
}
