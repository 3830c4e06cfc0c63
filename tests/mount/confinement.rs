//! Only files beneath the store are ever opened, for any names in images and any links in the store. The
//! witness is the kernel: every successful open of the whole process, by strace.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use support::damage::header;
use support::*;

const EXTERNAL_DATA_FILE: u32 = 0x4441_5441;

/// Files that any program opens, and that a mount has to open.
const SYSTEM: &[&str] = &[
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/chainfs.toml",
    "/etc/libvirt/qemu",
    "/run/libvirt/qemu",
    "/var/lib/libvirt/qemu/snapshot",
    "/usr/lib/",
    "/usr/lib64/",
    "/lib/",
    "/lib64/",
    "/usr/share/zoneinfo",
    "/proc/",
    "/sys/",
    "/dev/fuse",
    "/dev/null",
    "/dev/urandom",
    // Where kernel maps are made.
    "/var/cache/chainfs",
];

/// A store in which every name leads, or tries to lead, out. The decoys are valid images of both kinds, so
/// that an opened one would be readable.
struct Trap {
    store: Store,
    outside: PathBuf,
}

impl Trap {
    fn new() -> Self {
        let store = Store::new();
        let outside = store.beside("outside");
        fs::create_dir(&outside).expect("a directory outside the store");
        store.create("decoy.qcow2", MIB, "");
        store.scribble("decoy.qcow2", "qcow2", 1);
        fs::rename(store.path("decoy.qcow2"), outside.join("decoy.qcow2")).expect("a move");
        fs::write(outside.join("decoy.raw"), Rng::new(2).bytes(MIB)).expect("a decoy");
        fs::copy(outside.join("decoy.qcow2"), outside.join("decoy.img")).expect("a decoy");
        fs::create_dir(outside.join("store-mimic")).expect("a directory");
        fs::copy(outside.join("decoy.qcow2"), outside.join("store-mimic/web.qcow2")).expect("a decoy");
        let trap = Self { store, outside };
        trap.lay_healthy();
        trap.lay_links();
        trap.lay_backing_names();
        trap.lay_data_files();
        trap
    }

    fn lay_healthy(&self) {
        let store = &self.store;
        store.dir("sub");
        store.raw("sub/base.raw", MIB, 3);
        store.overlay("good.qcow2", "sub/base.raw", "raw", "");
        store.scribble("good.qcow2", "qcow2", 4);
        symlink("sub/base.raw", store.path("inside.raw")).expect("a link inside");
        store.overlay("by-inner-link.qcow2", "inside.raw", "raw", "");
    }

    fn lay_links(&self) {
        for decoy in ["decoy.qcow2", "decoy.raw", "decoy.img"] {
            let name = format!("link-{decoy}");
            symlink(self.outside.join(decoy), self.store.path(name)).expect("a link");
            let relative = Path::new("../outside").join(decoy);
            symlink(relative, self.store.path(format!("relative-{decoy}"))).expect("a link");
            symlink(format!("link-{decoy}"), self.store.path(format!("twice-{decoy}"))).expect("a link");
        }
        symlink(&self.outside, self.store.path("linked")).expect("a link");
        symlink("../../outside", self.store.path("sub/linked")).expect("a link");
        symlink("/proc/self/root", self.store.path("root")).expect("a link");
        symlink("/etc/passwd", self.store.path("passwd.raw")).expect("a link");
        symlink("/etc/passwd", self.store.path("passwd.qcow2")).expect("a link");
        symlink("loop.qcow2", self.store.path("loop.qcow2")).expect("a link");
    }

    fn backing_names(&self) -> Vec<(String, &'static str)> {
        let outside = self.outside.display();
        let json = |driver: &str, file: &str| {
            format!(r#"json:{{"driver":"{driver}","file":{{"driver":"file","filename":"{file}"}}}}"#)
        };
        let mut names = vec![
            (json("raw", &format!("{outside}/decoy.raw")), "raw"),
            (json("qcow2", &format!("{outside}/decoy.qcow2")), "qcow2"),
            (format!("file:{outside}/decoy.raw"), "raw"),
            ("nbd://127.0.0.1:10809/x".to_owned(), "raw"),
            ("nbd+unix:///x?socket=/run/x".to_owned(), "raw"),
            ("/etc/passwd".to_owned(), "raw"),
            ("root/etc/passwd".to_owned(), "raw"),
            ("/proc/self/root/etc/passwd".to_owned(), "raw"),
            ("../../../../../../etc/passwd".to_owned(), "raw"),
            ("/dev/vda".to_owned(), "raw"),
            ("/dev/zero".to_owned(), "raw"),
        ];
        for (file, format) in [("decoy.qcow2", "qcow2"), ("decoy.raw", "raw"), ("decoy.img", "raw")] {
            names.extend([
                (format!("{outside}/{file}"), format),
                (format!("../outside/{file}"), format),
                (format!("sub/../../outside/{file}"), format),
                (format!("absent/../../outside/{file}"), format),
                (format!("linked/{file}"), format),
                (format!("sub/linked/{file}"), format),
                (format!("sub/../linked/{file}"), format),
                (format!("link-{file}"), format),
                (format!("relative-{file}"), format),
                (format!("twice-{file}"), format),
                // The store's own path is no licence to climb out of it again.
                (format!("{}/../outside/{file}", self.store.root().display()), format),
                (format!("{}/linked/{file}", self.store.root().display()), format),
            ]);
        }
        names
    }

    fn lay_backing_names(&self) {
        for (number, (backing, format)) in self.backing_names().into_iter().enumerate() {
            self.store.overlay_unchecked(&format!("trap{number:03}.qcow2"), &backing, format);
            // In a sub-directory and below another layer, the way is another.
            let name = format!("sub/trap{number:03}.qcow2");
            let backing = if backing.starts_with("..") { format!("../{backing}") } else { backing };
            self.store.overlay_unchecked(&name, &backing, format);
            self.store.overlay_unchecked(&format!("above{number:03}.qcow2"), &name, "qcow2");
        }
    }

    fn lay_data_files(&self) {
        let mut names: Vec<String> = ["decoy.raw", "decoy.qcow2"]
            .iter()
            .flat_map(|file| {
                let outside = self.outside.display();
                [
                    format!("{outside}/{file}"),
                    format!("../outside/{file}"),
                    format!("linked/{file}"),
                    format!("link-{file}"),
                    format!("twice-{file}"),
                    format!(r#"json:{{"driver":"file","filename":"{outside}/{file}"}}"#),
                ]
            })
            .collect();
        names.extend(["/etc/passwd".into(), "file:/etc/passwd".into(), "nbd://127.0.0.1/x".into()]);
        for (number, name) in names.iter().enumerate() {
            let image = format!("data{number:03}.qcow2");
            self.store.create(&image, MIB, "");
            self.store.io(&image, "qcow2", ["write -q -P 1 0 1M"]);
            let image = Damage::to(self.store.path(&image));
            image.set_extensions(&[(EXTERNAL_DATA_FILE, name.as_bytes())]);
            image.put_u64(header::INCOMPATIBLE, 1 << 2);
            // With an external file, data is at the guest's own offsets.
            for cluster in 0..16 {
                image.put_u64(image.l2_entry_at(cluster << 16), cluster << 16 | 1 << 63);
            }
        }
    }

    /// Runs `command` after strace's own words; returns the paths of all files it opened.
    fn strace(&self) -> Command {
        let mut strace = Command::new("strace");
        strace.args([
            "-f",
            "-y",
            "-s",
            "4096",
            "-e",
            "trace=open,openat,openat2,open_by_handle_at,creat",
            "-o",
        ]);
        strace.arg(self.store.beside("opens.log")).arg(chainfs_binary());
        strace
    }

    /// Every path that was opened, as the kernel names it.
    fn opened(&self) -> Vec<String> {
        let log = fs::read_to_string(self.store.beside("opens.log")).expect("strace's log");
        let opened: Vec<String> = log.lines().filter_map(opened_path).map(str::to_owned).collect();
        assert!(
            opened.iter().any(|p| p.starts_with("/usr/lib") || p.starts_with("/lib")),
            "strace saw no library"
        );
        opened
    }

    fn assert_nothing_outside(&self, opened: &[String]) {
        let root = self.store.root().canonicalize().expect("the store");
        let root = root.to_str().expect("a plain path");
        let mount = self.store.beside("mnt");
        let mount = mount.to_str().expect("a plain path");
        let config = self.store.beside("config");
        let config = config.to_str().expect("a plain path");
        let fine = |path: &str| {
            let beneath =
                |dir: &str| path == dir || path.strip_prefix(dir).is_some_and(|p| p.starts_with('/'));
            // The mount point itself is checked: whether mounting there would hide anything.
            beneath(root)
                || path == mount
                || beneath(config)
                || SYSTEM.iter().any(|s| path.starts_with(s))
                || ["anon_inode:", "pipe:", "socket:"].iter().any(|s| path.starts_with(s))
        };
        let outside: Vec<&String> = opened.iter().filter(|p| !fine(p)).collect();
        assert!(outside.is_empty(), "opened outside the store: {outside:#?}");
    }
}

/// The path of a descriptor that an open call of strace's log returned: the end is `= 7</a/path>`.
fn opened_path(line: &str) -> Option<&str> {
    let (_, result) = line.rsplit_once(" = ")?;
    let (number, path) = result.split_once('<')?;
    number.parse::<u32>().ok()?;
    let path = path.rsplit_once('>').map_or(path, |(path, _)| path);
    // Since 6.x devices are shown as `/dev/fuse<char 10:229>`.
    Some(path.split('<').next().unwrap_or(path))
}

#[test]
fn the_path_that_an_open_returned_is_read_from_straces_log() {
    let path = |line| opened_path(line);
    assert_eq!(path(r#"7 openat(AT_FDCWD</x>, "/a", O_RDONLY) = 3</b/a>"#), Some("/b/a"));
    assert_eq!(path(r#"7 openat2(4</s>, "a", {flags=O_RDONLY}, 24) = 5</s/a>"#), Some("/s/a"));
    assert_eq!(path(r"7 <... openat resumed>) = 9</dev/fuse<char 10:229>>"), Some("/dev/fuse"));
    assert_eq!(path(r#"7 openat2(4</s>, "a", {flags=0}, 24) = -1 EXDEV (Invalid cross-device link)"#), None);
    assert_eq!(path(r#"7 openat(AT_FDCWD</x>, "/a", O_RDONLY <unfinished ...>"#), None);
}

/// Reads all that can be read; of each disk the first bytes will do.
fn read_all(dir: &Path, readable: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type());
        if kind.as_ref().is_ok_and(fs::FileType::is_dir) {
            read_all(&path, readable);
        } else if kind.is_ok_and(|k| k.is_file()) {
            let mut bytes = Vec::new();
            let read = File::open(&path).and_then(|f| f.take(MIB).read_to_end(&mut bytes));
            if read.is_ok() && path.extension().is_some_and(|e| e == "raw") {
                assert!(!bytes.starts_with(b"root:"), "{} shows the host's own file", path.display());
                readable.push(path);
            }
        }
    }
}

#[test]
// S1
fn a_mount_of_a_hostile_store_opens_nothing_outside_it() {
    let trap = Trap::new();
    let mount = Mount::foreground(&trap.store, trap.strace(), "");
    let mut readable = Vec::new();
    read_all(mount.dir(), &mut readable);
    assert_same(&mount.path("good/active.raw"), &trap.store.oracle("good.qcow2", "qcow2"));
    assert_same(&mount.path("by-inner-link/active.raw"), &trap.store.oracle("by-inner-link.qcow2", "qcow2"));
    let stem = |p: &PathBuf| p.strip_prefix(mount.dir()).expect("a path of the mount").display().to_string();
    let trapped: Vec<String> =
        readable.iter().map(stem).filter(|p| p.contains("trap") && p.contains("active")).collect();
    assert!(trapped.is_empty(), "zeroes instead of the bytes of a refused backing file: {trapped:?}");
    let problems = mount.text(".chainfs/problems.txt");
    for number in 0..trap.backing_names().len() {
        assert!(
            problems.contains(&format!("trap{number:03}.qcow2")),
            "trap {number} is no problem: {problems}"
        );
    }
    mount.umount();
    trap.assert_nothing_outside(&trap.opened());
}

/// With every leniency the user can grant short of naming a directory.
#[test]
fn probing_and_forced_sharing_do_not_widen_what_is_opened() {
    let trap = Trap::new();
    let mount = Mount::foreground(&trap.store, trap.strace(), "probe,force_share,format=*.img:qcow2,ro");
    read_all(mount.dir(), &mut Vec::new());
    mount.umount();
    trap.assert_nothing_outside(&trap.opened());
}

#[test]
fn reporting_commands_open_nothing_outside_a_hostile_store() {
    let trap = Trap::new();
    for verb in ["tree", "info", "map", "check"] {
        for path in ["", "good.qcow2", "trap000.qcow2", "data000.qcow2", "link-decoy.qcow2", "passwd.raw"] {
            // Map and check are of images; whether they succeed is not the question here.
            if path.is_empty() && verb != "tree" {
                continue;
            }
            let target = if path.is_empty() { trap.store.root() } else { trap.store.path(path) };
            let output = trap.strace().arg(verb).arg(target).output().expect("strace runs");
            assert!(output.status.code().is_some(), "{verb} {path}: {}", output.status);
            let opened = trap.opened();
            // A path the user gave is followed where it leads; names inside images are not.
            let named = if path.contains("decoy") || path.contains("passwd") { continue } else { opened };
            trap.assert_nothing_outside(&named);
        }
    }
}

/// A directory that is a link out of the store every other moment: the check and the opening must be one
/// step.
#[test]
fn a_directory_swapped_for_a_link_never_leads_outside() {
    let trap = Trap::new();
    let store = &trap.store;
    store.dir("swing");
    for name in ["decoy.raw", "decoy.qcow2"] {
        fs::copy(trap.outside.join(name), store.path("swing").join(name)).expect("a copy");
    }
    symlink(&trap.outside, store.path("swung")).expect("a link");
    store.overlay("over.qcow2", "swing/decoy.raw", "raw", "");
    store.overlay("over2.qcow2", "swing/decoy.qcow2", "qcow2", "");
    let mount = Mount::foreground(store, trap.strace(), "");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (dir, link) = (store.path("swing"), store.path("swung"));
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).expect("an exchange");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            for chain in ["over", "over2", "swing/decoy", "swung/decoy"] {
                let _ = fs::read(mount.path(chain).join("active.raw"));
            }
            let _ = fs::read_dir(mount.dir()).map(Iterator::count);
        }
        stop.store(true, Ordering::Relaxed);
    });
    mount.umount();
    trap.assert_nothing_outside(&trap.opened());
}
