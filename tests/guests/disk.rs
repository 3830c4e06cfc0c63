//! Disks with a file system, made by its own tools and mounted by the kernel, and comparison of whole trees:
//! the kernel's view of a disk with that of chainfs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::error::{Error, ErrorKind, Result};
use chainfs::guest::{FileAttributes, FileKind, FileSystem, Ino, RunKind, Source, Time};
use rustix::fs::{SeekFrom, XattrFlags};

use support::{Outcome as _, eventually, tool};

/// Files larger than this are compared where they have data only.
const READ_WHOLE: u64 = 128 << 20;

/// A plain file as a source.
pub(crate) struct FileSource {
    file: File,
    size: u64,
}

impl FileSource {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let size = file.metadata().expect("a size").len();
        Self { file, size }
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        chainfs::guest::source::within(self.size, at, buf.len())?;
        self.file.read_exact_at(buf, at).map_err(|e| Error::io("reading a disk", e))
    }
}

/// A disk of which a range cannot be read at this moment, for this reason.
pub(crate) struct Troubled(pub(crate) FileSource, pub(crate) std::ops::Range<u64>, pub(crate) ErrorKind);

impl Source for Troubled {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        if at < self.1.end && at + buf.len() as u64 > self.1.start {
            return Err(Error::new(self.2, "not at this moment"));
        }
        self.0.read_at(at, buf)
    }
}

/// Whether two files of one size have the same bytes; holes are not read.
pub(crate) fn have_same_content(one: &Path, other: &Path) -> bool {
    let files = [one, other].map(|path| File::open(path).expect("a disk"));
    let size = files[0].metadata().expect("a size").len();
    let mut bufs = [vec![0; 1 << 20], vec![0; 1 << 20]];
    let mut ranges: Vec<(u64, u64)> = files.iter().flat_map(|file| kernel_data(file, size)).collect();
    ranges.sort_unstable();
    let mut done = 0;
    for (start, end) in ranges {
        let mut at = start.max(done);
        while at < end {
            let len = (end - at).min(1 << 20) as usize;
            for (file, buf) in files.iter().zip(&mut bufs) {
                file.read_exact_at(&mut buf[..len], at).expect("its bytes");
            }
            if bufs[0][..len] != bufs[1][..len] {
                return false;
            }
            at += len as u64;
        }
        done = done.max(end);
    }
    true
}

/// A disk in a directory of its own.
pub(crate) struct Disk {
    dir: tempfile::TempDir,
    pub(crate) image: PathBuf,
    /// The kernel's name of the file system, and the options with which it is mounted beside a copy of it.
    kind: &'static str,
    options: &'static str,
}

impl Disk {
    /// A disk formatted by `mkfs`, a program and its options.
    pub(crate) fn format(mkfs: &str, size: u64) -> Self {
        Self::format_in(&std::env::temp_dir(), mkfs, size)
    }

    /// The same in a directory.
    pub(crate) fn format_in(parent: &Path, mkfs: &str, size: u64) -> Self {
        let mut words = mkfs.split(' ');
        let program = words.next().expect("a program");
        let (kind, options, force) = match program {
            "mkfs.xfs" => ("xfs", "nouuid", "-f"),
            _ => ("ext4", "noatime", "-F"),
        };
        let disk = Self::blank(parent, size, kind, options);
        tool(program).args(["-q", force]).args(words).arg(&disk.image).succeeds();
        disk
    }

    fn blank(parent: &Path, size: u64, kind: &'static str, options: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix("chainfs-disk-").tempdir_in(parent).expect("a directory");
        let image = dir.path().join("disk");
        File::create(&image).and_then(|file| file.set_len(size)).expect("a disk");
        Self { dir, image, kind, options }
    }

    /// Mounts the disk while `work` is done in it.
    pub(crate) fn mounted<T>(&self, options: &str, work: impl FnOnce(&Path) -> T) -> T {
        let options = format!("loop,noatime,{},{options}", self.options);
        let mount = Mounted::new(&self.image, &self.dir.path().join("mnt"), self.kind, &options);
        let result = work(&mount.dir);
        mount.end();
        result
    }

    /// The disk at one moment, even while mounted: the content of a snapshot.
    pub(crate) fn snapshot(&self) -> Self {
        // Copying takes time, and the kernel may write meanwhile. A copy that is unchanged afterwards is of
        // one moment.
        for _ in 0..20 {
            let copy = self.blank_copy();
            tool("cp").arg("--sparse=always").arg(&self.image).arg(&copy.image).succeeds();
            if have_same_content(&self.image, &copy.image) {
                return copy;
            }
        }
        panic!("{} changes all the time", self.image.display());
    }

    /// The disk at the moment of the call, while a kernel works on it: its directory is on a file system that
    /// can share blocks, and does that in one step.
    pub(crate) fn instant(&self) -> Self {
        let copy = self.blank_copy();
        tool("cp").arg("--reflink=always").arg(&self.image).arg(&copy.image).succeeds();
        copy
    }

    fn blank_copy(&self) -> Self {
        Self::blank(self.dir.path().parent().expect("a parent"), 0, self.kind, self.options)
    }

    /// The disk as a source.
    pub(crate) fn source(&self) -> Arc<dyn Source> {
        Arc::new(FileSource::open(&self.image))
    }

    /// Runs a debugfs command on the disk.
    pub(crate) fn debugfs(&self, command: &str) -> String {
        tool("debugfs").args(["-w", "-R", command]).arg(&self.image).succeeds()
    }

    /// Where the first blocks of a file are.
    pub(crate) fn blocks_of(&self, file: &str, count: usize) -> Vec<u64> {
        let script = self.image.with_file_name("script");
        let lines: Vec<String> = (0..count).map(|block| format!("bmap {file} {block}")).collect();
        fs::write(&script, lines.join("\n")).expect("a script");
        let told = tool("debugfs").arg("-f").arg(&script).arg(&self.image).succeeds();
        let blocks: Vec<u64> = told.lines().filter_map(|line| line.trim().parse().ok()).collect();
        assert_eq!(blocks.len(), count, "{told}");
        blocks
    }

    /// Overwrites bytes of the disk.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        File::options()
            .write(true)
            .open(&self.image)
            .and_then(|f| f.write_all_at(bytes, at))
            .expect("a change");
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.image)
            .and_then(|file| file.read_exact_at(&mut bytes, at))
            .expect("bytes of the disk");
        bytes
    }
}

/// A loop mount for as long as this lives.
struct Mounted {
    dir: PathBuf,
    ended: bool,
}

impl Mounted {
    fn new(image: &Path, dir: &Path, kind: &str, options: &str) -> Self {
        fs::create_dir_all(dir).expect("a mount point");
        tool("mount").args(["-t", kind, "-o", options]).arg(image).arg(dir).succeeds();
        Self { dir: dir.to_owned(), ended: false }
    }

    fn end(mut self) {
        // A process that another test has just forked holds these descriptors until it executes its program.
        eventually("unmounted", || tool("umount").arg(&self.dir).outcome().0 == 0);
        self.ended = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.ended {
            // Unmounting a loop mount frees its device as well.
            let _ = tool("umount").arg("--lazy").arg(&self.dir).status();
        }
    }
}

/// All that can be known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) ino: u64,
    pub(crate) attributes: FileAttributes,
    pub(crate) target: Option<Vec<u8>>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where it has data, from and to.
    pub(crate) data: Vec<(u64, u64)>,
    pub(crate) hash: u64,
}

/// Files by their path from the root.
pub(crate) type Tree = BTreeMap<Vec<u8>, Node>;

/// The kernel's tree below `dir`.
pub(crate) fn kernel_tree(dir: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut left = vec![Vec::new()];
    while let Some(path) = left.pop() {
        let full = if path.is_empty() { dir.to_owned() } else { dir.join(OsStr::from_bytes(&path[1..])) };
        let node = kernel_node(&full);
        if node.attributes.kind == FileKind::Directory {
            for entry in fs::read_dir(&full).unwrap_or_else(|e| panic!("{}: {e}", full.display())) {
                let name = entry.expect("an entry").file_name();
                left.push([path.as_slice(), b"/", name.as_bytes()].concat());
            }
        }
        tree.insert(path, node);
    }
    tree
}

fn kernel_node(path: &Path) -> Node {
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kind = match metadata.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Symlink,
        kind if kind.is_char_device() => FileKind::CharDevice,
        kind if kind.is_block_device() => FileKind::BlockDevice,
        kind if kind.is_fifo() => FileKind::Fifo,
        _ => FileKind::Socket,
    };
    let time = |seconds, nanoseconds: i64| Time {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).expect("below a second"),
    };
    let is_device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
    let rdev = if is_device { metadata.rdev() } else { 0 };
    let attributes = FileAttributes {
        kind,
        mode: metadata.mode() as u16 & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: metadata.size(),
        blocks: metadata.blocks(),
        links: metadata.nlink() as u32,
        device: (rustix::fs::major(rdev), rustix::fs::minor(rdev)),
        accessed: time(metadata.atime(), metadata.atime_nsec()),
        modified: time(metadata.mtime(), metadata.mtime_nsec()),
        changed: time(metadata.ctime(), metadata.ctime_nsec()),
        created: born(path),
    };
    let (mut data, mut hash) = (Vec::new(), 0);
    if kind == FileKind::File {
        let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        data = kernel_data(&file, attributes.size);
        hash =
            hash_of(attributes.size, &data, |at, buf| file.read_exact_at(buf, at).expect("the kernel reads"));
    }
    let target = (kind == FileKind::Symlink).then(|| fs::read_link(path).expect("a target"));
    let target = target.map(|target| target.as_os_str().as_bytes().to_vec());
    Node { ino: metadata.ino(), attributes, target, xattrs: kernel_xattrs(path), data, hash }
}

fn born(path: &Path) -> Option<Time> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BTIME).expect("statx");
    let time = found.stx_btime;
    (found.stx_mask & StatxFlags::BTIME.bits() != 0)
        .then_some(Time { seconds: time.tv_sec, nanoseconds: time.tv_nsec })
}

fn kernel_data(file: &File, size: u64) -> Vec<(u64, u64)> {
    let mut data = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) else { break };
        at = rustix::fs::seek(file, SeekFrom::Hole(start)).expect("the end is a hole");
        data.push((start, at));
    }
    data
}

fn kernel_xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 64 << 10];
    let len =
        rustix::fs::llistxattr(path, &mut names[..]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut value = vec![0; 64 << 10];
    names
        .map(|name| {
            let len = rustix::fs::lgetxattr(path, name, &mut value[..])
                .unwrap_or_else(|e| panic!("{name:?} of {}: {e}", path.display()));
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let set = rustix::fs::lsetxattr(path, name, value, XattrFlags::empty());
    set.unwrap_or_else(|e| panic!("{name} of {}: {e}", path.display()));
}

/// Of small files all bytes, of large ones those that are data.
fn hash_of(size: u64, data: &[(u64, u64)], mut read: impl FnMut(u64, &mut [u8])) -> u64 {
    let whole = [(0, size)];
    let mut hasher = DefaultHasher::new();
    let mut buf = vec![0; 100_003];
    for (start, end) in if size <= READ_WHOLE { &whole } else { data } {
        let mut at = *start;
        while at < *end {
            let len = (end - at).min(buf.len() as u64) as usize;
            read(at, &mut buf[..len]);
            hasher.write(&buf[..len]);
            at += len as u64;
        }
    }
    hasher.finish()
}

/// The tree of chainfs' reader. Every name is looked up, and every content is read in both ways.
pub(crate) fn our_tree(files: &dyn FileSystem, image: &Path) -> Tree {
    let source = FileSource::open(image);
    let mut tree = Tree::new();
    let mut left = vec![(Vec::new(), files.root())];
    while let Some((path, ino)) = left.pop() {
        let say = |e: Error| -> ! { panic!("{} (inode {}): {e}", String::from_utf8_lossy(&path), ino.0) };
        let node = our_node(files, &source, ino).unwrap_or_else(|e| say(e));
        if node.attributes.kind == FileKind::Directory {
            for (name, ino) in entries(files, ino).unwrap_or_else(|e| say(e)) {
                left.push(([path.as_slice(), b"/", &name].concat(), ino));
            }
        }
        let twice = tree.insert(path.clone(), node);
        assert!(twice.is_none(), "{} is listed twice", String::from_utf8_lossy(&path));
    }
    tree
}

/// The names in a directory; each looked up, and the listing continued from one of its middle as well.
fn entries(files: &dyn FileSystem, directory: Ino) -> Result<Vec<(Vec<u8>, Ino)>> {
    let mut all = Vec::new();
    files.list(directory, 0, &mut |entry| {
        all.push(entry);
        true
    })?;
    if let Some(middle) = all.get(all.len() / 2) {
        let mut rest = Vec::new();
        files.list(directory, middle.next, &mut |entry| {
            rest.push(entry);
            true
        })?;
        assert_eq!(rest, all[all.len() / 2 + 1..], "the listing goes on after {middle:?}");
    }
    for entry in &all {
        assert_eq!(files.lookup(directory, &entry.name)?, Some(entry.ino), "{entry:?}");
        assert_ne!(entry.next, 0);
        if let (Some(said), Ok(attributes)) = (entry.kind, files.attributes(entry.ino)) {
            assert_eq!(said, attributes.kind, "{entry:?}");
        }
    }
    assert_eq!(files.lookup(directory, b"no such name here")?, None);
    Ok(all.into_iter().map(|entry| (entry.name, entry.ino)).collect())
}

fn our_node(files: &dyn FileSystem, source: &FileSource, ino: Ino) -> Result<Node> {
    let attributes = files.attributes(ino)?;
    let (mut data, mut hash) = (Vec::new(), 0);
    if attributes.kind == FileKind::File {
        let runs = our_runs(files, ino, attributes.size)?;
        data = data_of(&runs);
        hash = hash_of(attributes.size, &data, |at, buf| {
            assert_eq!(
                files.read_at(ino, at, buf).unwrap_or_else(|e| panic!("inode {}: {e}", ino.0)),
                buf.len()
            );
        });
        let by_runs =
            hash_of(attributes.size, &data, |at, buf| read_runs(files, source, ino, &runs, at, buf));
        assert_eq!(hash, by_runs, "inode {}: the runs are not what is read", ino.0);
    }
    let target = if attributes.kind == FileKind::Symlink { Some(files.read_link(ino)?) } else { None };
    let xattrs = files.extended_attributes(ino)?.into_iter().map(|found| (found.name, found.value)).collect();
    Ok(Node { ino: ino.0, attributes, target, xattrs, data, hash })
}

/// The runs of a file from its beginning, asked for in windows as an adapter would.
fn our_runs(files: &dyn FileSystem, ino: Ino, size: u64) -> Result<Vec<(u64, u64, RunKind)>> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < size {
        let window = files.runs(ino, at, u64::MAX, 512)?;
        assert!(!window.is_empty() && window.len() <= 512, "inode {}: {} runs", ino.0, window.len());
        for run in window {
            assert!(run.len > 0);
            runs.push((at, at + run.len, run.kind));
            at += run.len;
        }
    }
    assert_eq!(at, size, "inode {}: the runs end where the file ends", ino.0);
    Ok(runs)
}

fn data_of(runs: &[(u64, u64, RunKind)]) -> Vec<(u64, u64)> {
    let mut data: Vec<(u64, u64)> = Vec::new();
    for (start, end, kind) in runs {
        match (kind, data.last_mut()) {
            (RunKind::Hole, _) => {}
            (_, Some(last)) if last.1 == *start => last.1 = *end,
            _ => data.push((*start, *end)),
        }
    }
    data
}

fn read_runs(
    files: &dyn FileSystem,
    source: &FileSource,
    ino: Ino,
    runs: &[(u64, u64, RunKind)],
    at: u64,
    buf: &mut [u8],
) {
    let end = at + buf.len() as u64;
    let first = runs.partition_point(|(_, end, _)| *end <= at);
    for (start, stop, kind) in runs[first..].iter().take_while(|(start, ..)| *start < end) {
        let (from, to) = ((*start).max(at), (*stop).min(end));
        let part = &mut buf[(from - at) as usize..(to - at) as usize];
        match kind {
            RunKind::Hole => part.fill(0),
            RunKind::Stored(offset) => {
                source.read_at(offset + (from - start), part).expect("it lies on the disk");
            }
            RunKind::Verified(_) | RunKind::Opaque => {
                assert_eq!(files.read_at(ino, from, part).expect("it can be read"), part.len());
            }
        }
    }
}

/// How two trees differ, a line each.
pub(crate) fn differences(theirs: &Tree, ours: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    let shown = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    let missing = theirs.keys().filter(|path| !ours.contains_key(*path));
    lines.extend(missing.map(|path| format!("{}: missing", shown(path))));
    for (path, our) in ours {
        let Some(their) = theirs.get(path) else {
            lines.push(format!("{}: must not be there", shown(path)));
            continue;
        };
        let mut say = |what: &str, theirs: &dyn Debug, ours: &dyn Debug| {
            let (theirs, ours) = (format!("{theirs:?}"), format!("{ours:?}"));
            if theirs != ours {
                lines.push(format!(
                    "{}: {what}: {theirs:.300} for the kernel, {ours:.300} for us",
                    shown(path)
                ));
            }
        };
        say("inode", &their.ino, &our.ino);
        say("attributes", &their.attributes, &our.attributes);
        say("target", &their.target, &our.target);
        say("extended attributes", &their.xattrs, &our.xattrs);
        say("data", &their.data, &our.data);
        say("content", &their.hash, &our.hash);
    }
    lines
}

#[track_caller]
pub(crate) fn assert_same_trees(what: &str, theirs: &Tree, ours: &Tree) {
    let lines = differences(theirs, ours);
    assert!(
        lines.is_empty(),
        "{what}: {} differences\n{}",
        lines.len(),
        lines[..lines.len().min(8)].join("\n")
    );
    assert!(theirs.len() > 1, "{what}: nothing was compared");
}

/// Compares a reader's view of a disk with that of the kernel: the tree, the sizes, and that nothing is said.
#[track_caller]
pub(crate) fn compare(disk: &Disk, files: &dyn FileSystem, what: &str) {
    let tree = our_tree(files, &disk.image);
    let (theirs, sizes) =
        disk.mounted("ro", |dir| (kernel_tree(dir), rustix::fs::statvfs(dir).expect("statvfs")));
    assert_same_trees(what, &theirs, &tree);
    let counted = files.statistics();
    let our =
        (counted.blocks, counted.free_blocks, counted.available_blocks, counted.inodes, counted.free_inodes);
    assert_eq!(our, (sizes.f_blocks, sizes.f_bfree, sizes.f_bavail, sizes.f_files, sizes.f_ffree), "{what}");
    assert_eq!(files.remarks(), Vec::<String>::new(), "{what}");
}

/// Everything of a file system is asked for, each question with a limit; an error is an answer.
pub(crate) fn walk_everything(files: &dyn FileSystem, mut asked: impl FnMut(&str, Ino)) -> usize {
    let (mut seen, mut left) = (std::collections::HashSet::new(), vec![files.root()]);
    let mut errors = 0;
    files.statistics();
    while let Some(ino) = left.pop() {
        if !seen.insert(ino) || seen.len() > 3000 {
            continue;
        }
        let mut count = |failed: Option<ErrorKind>| {
            if let Some(kind) = failed {
                let known = matches!(
                    kind,
                    ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit | ErrorKind::NotFound
                );
                assert!(known, "inode {}: {kind:?}", ino.0);
                errors += 1;
            }
        };
        let attributes = files.attributes(ino);
        asked("attributes", ino);
        count(attributes.as_ref().err().map(Error::kind));
        count(files.extended_attributes(ino).err().map(|e| e.kind()));
        asked("attributes of its own", ino);
        let mut names = Vec::new();
        let listed = files.list(ino, 0, &mut |entry| {
            let name = &entry.name;
            assert!(
                !name.is_empty()
                    && name != b"."
                    && name != b".."
                    && !name.iter().any(|b| [0, b'/'].contains(b))
            );
            names.push(entry.name);
            left.push(entry.ino);
            names.len() < 20_000
        });
        asked("list", ino);
        if let Ok(FileAttributes { kind: FileKind::Directory, .. }) = attributes {
            count(listed.err().map(|e| e.kind()));
        }
        for name in names.iter().step_by(names.len() / 8 + 1) {
            count(files.lookup(ino, name).err().map(|e| e.kind()));
            asked("lookup", ino);
        }
        count(files.read_link(ino).err().map(|e| e.kind()).filter(|kind| *kind != ErrorKind::Corrupt));
        asked("read_link", ino);
        let Ok(FileAttributes { kind: FileKind::File, size, .. }) = attributes else { continue };
        let mut buf = vec![0; 128 << 10];
        for at in [0, size / 2, size.saturating_sub(1000)] {
            count(files.read_at(ino, at, &mut buf).err().map(|e| e.kind()));
            asked("read_at", ino);
            count(files.runs(ino, at, u64::MAX, 512).err().map(|e| e.kind()));
            asked("runs", ino);
        }
    }
    errors
}
