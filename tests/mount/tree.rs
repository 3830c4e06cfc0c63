//! The tree's own files, and intensive reading of them.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;

use rustix::fs::{OFlags, getxattr, listxattr, statvfs};
use rustix::io::Errno;
use support::*;

fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().map(|e| Errno::from_io_error(&e).unwrap_or_else(|| panic!("{e} has no errno")))
}

#[test]
fn nothing_can_be_changed_through_a_read_only_mount() {
    let store = small_chain();
    let before: Vec<Vec<u8>> = ["base.raw", "mid.qcow2", "web.qcow2"]
        .iter()
        .map(|n| fs::read(store.path(n)).expect("an image"))
        .collect();
    let mount = Mount::with(&store, "ro");
    let (active, base) = (mount.path("web/active.raw"), mount.path("web/snapshots/base.raw"));
    for view in [&active, &base, &mount.path(".chainfs/tree.txt"), &mount.path("web/info/chain.json")] {
        assert_eq!(errno(OpenOptions::new().write(true).open(view)), Some(Errno::ROFS), "{}", view.display());
        assert_eq!(
            errno(OpenOptions::new().append(true).open(view)),
            Some(Errno::ROFS),
            "{}",
            view.display()
        );
        assert_eq!(errno(fs::remove_file(view)), Some(Errno::ROFS), "{}", view.display());
        assert_eq!(errno(fs::set_permissions(view, fs::Permissions::from_mode(0o777))), Some(Errno::ROFS));
    }
    assert_eq!(errno(File::create(mount.path("web/new"))), Some(Errno::ROFS));
    assert_eq!(errno(fs::create_dir(mount.path("new"))), Some(Errno::ROFS));
    assert_eq!(errno(fs::remove_dir(mount.path("web"))), Some(Errno::ROFS));
    assert_eq!(errno(fs::rename(&active, mount.path("web/other.raw"))), Some(Errno::ROFS));
    assert_eq!(errno(fs::hard_link(&active, mount.path("web/other.raw"))), Some(Errno::ROFS));
    mount.umount();
    let after: Vec<Vec<u8>> = ["base.raw", "mid.qcow2", "web.qcow2"]
        .iter()
        .map(|n| fs::read(store.path(n)).expect("an image"))
        .collect();
    assert!(before == after, "an image changed");
}

#[test]
fn extended_attributes_are_read_by_name_and_not_listed() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let attribute = |path: &str, name: &str| {
        let mut value = vec![0; 4096];
        let len = getxattr(mount.path(path), format!("user.chainfs.{name}"), &mut value)
            .unwrap_or_else(|e| panic!("user.chainfs.{name} of {path}: {e}"));
        String::from_utf8(value[..len].to_vec()).expect("text")
    };
    assert_eq!(attribute("web/active.raw", "format"), "qcow2");
    assert_eq!(attribute("web/snapshots/base.raw", "format"), "raw");
    assert_eq!(attribute("web/active.raw", "backing"), "mid.qcow2");
    assert_eq!(attribute("web/snapshots/mid.raw", "backing"), "base.raw");
    assert_eq!(attribute("web/active.raw", "cluster-size"), "4096");
    assert_eq!(attribute("web/snapshots/mid.raw", "cluster-size"), "65536");
    let depths: Vec<u64> = ["active.raw", "snapshots/mid.raw", "snapshots/base.raw"]
        .map(|v| attribute(&format!("web/{v}"), "depth").parse().expect("a number"))
        .into();
    assert!(depths.windows(2).all(|w| w[0].abs_diff(w[1]) == 1), "{depths:?}");
    assert!(attribute("web/active.raw", "allocated").parse::<u64>().expect("a number") > 0);
    let mut names = vec![0; 4096];
    let listed = listxattr(mount.path("web/active.raw"), &mut names).unwrap_or(0);
    assert!(!String::from_utf8_lossy(&names[..listed]).contains("chainfs"), "not listed");
    let mut value = [0; 16];
    let unknown = getxattr(mount.path("web/active.raw"), "user.chainfs.nonsense", &mut value);
    assert_eq!(unknown.err(), Some(Errno::NODATA));
    mount.umount();
}

#[test]
fn sizes_blocks_times_and_modes_come_from_the_image_files() {
    let store = small_chain();
    let old = "2020-02-03 04:05:06";
    tool("touch").args(["-d", old]).arg(store.path("mid.qcow2")).succeeds();
    fs::set_permissions(store.path("mid.qcow2"), fs::Permissions::from_mode(0o664)).expect("permissions");
    fs::set_permissions(store.path("web.qcow2"), fs::Permissions::from_mode(0o640)).expect("permissions");
    chown(store.path("mid.qcow2"), Some(7), Some(8)).expect("an owner");
    let mount = Mount::new(&store);
    for (view, image) in
        [("active.raw", "web.qcow2"), ("snapshots/mid.raw", "mid.qcow2"), ("snapshots/base.raw", "base.raw")]
    {
        let (view, image) = (mount.path("web").join(view), store.path(image));
        let (shown, file) = (fs::metadata(&view).expect("a view"), fs::metadata(&image).expect("an image"));
        assert_eq!(shown.len(), 2 * MIB, "{}", view.display());
        assert_eq!(shown.blocks(), file.blocks(), "blocks of {}", view.display());
        assert_eq!((shown.uid(), shown.gid()), (file.uid(), file.gid()), "owner of {}", view.display());
        assert_eq!(
            (shown.mtime(), shown.mtime_nsec()),
            (file.mtime(), file.mtime_nsec()),
            "{}",
            view.display()
        );
        assert!(shown.is_file() && shown.nlink() == 1);
        // By this many bytes cmp(1) and others read.
        assert!(
            (4096..=MIB).contains(&shown.blksize()),
            "block size of {}: {}",
            view.display(),
            shown.blksize()
        );
    }
    let mode = |view: &str| fs::metadata(mount.path("web").join(view)).expect("a view").mode() & 0o7777;
    assert_eq!(mode("snapshots/mid.raw"), 0o444, "no write bits on snapshots");
    assert_eq!(mode("active.raw") & 0o444, 0o440, "who may read the image may read the disk");
    mount.umount();
}

#[test]
fn a_view_with_data_has_blocks_even_if_its_own_file_has_none() {
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    store.io("base.qcow2", "qcow2", [store.write(&mut Rng::new(9), 0, MIB)]);
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    File::create(store.path("sparse.raw")).and_then(|f| f.set_len(MIB)).expect("a sparse file");
    let mount = Mount::new(&store);
    let blocks = |path: &str| fs::metadata(mount.path(path)).expect("a view").blocks();
    assert!(blocks("web/active.raw") > 0);
    let copy = store.beside("copy.raw");
    tool("cp").args(["--sparse=auto"]).arg(mount.path("web/active.raw")).arg(&copy).succeeds();
    assert_same(&mount.path("web/active.raw"), &copy);
    let tar = store.beside("copy.tar");
    tool("tar").arg("-Scf").arg(&tar).arg("-C").arg(mount.path("web")).arg("active.raw").succeeds();
    tool("tar").arg("-xf").arg(&tar).arg("-C").arg(store.beside("oracle")).succeeds();
    assert_same(&mount.path("web/active.raw"), &store.beside("oracle/active.raw"));
    mount.umount();
}

#[test]
fn uid_gid_and_umask_override_what_the_files_say() {
    let store = small_chain();
    let mount = Mount::with(&store, "uid=1001,gid=1002,umask=027");
    for path in ["web/active.raw", "web/snapshots/base.raw", "web", ".chainfs/tree.txt", "."] {
        let shown = fs::metadata(mount.path(path)).expect("an entry");
        assert_eq!((shown.uid(), shown.gid()), (1001, 1002), "{path}");
        assert_eq!(shown.mode() & 0o027, 0, "{path}");
    }
    mount.umount();
}

#[test]
fn other_users_see_a_mount_only_if_allowed_and_by_its_modes() {
    let store = small_chain();
    fs::set_permissions(store.beside(""), fs::Permissions::from_mode(0o755)).expect("permissions");
    for (image, mode) in [("base.raw", 0o644), ("mid.qcow2", 0o600), ("web.qcow2", 0o644)] {
        fs::set_permissions(store.path(image), fs::Permissions::from_mode(mode)).expect("permissions");
    }
    let reads = |path: &Path| {
        let mut cat = tool("setpriv");
        cat.args(["--reuid=65534", "--regid=65534", "--clear-groups", "head", "-c", "1"])
            .arg(path)
            .outcome()
            .0
            == 0
    };
    let mount = Mount::new(&store);
    assert!(!reads(&mount.path("web/snapshots/base.raw")), "without allow_other the mount is its owner's");
    mount.umount();
    let mount = Mount::with(&store, "allow_other");
    assert!(reads(&mount.path("web/snapshots/base.raw")), "everybody may read this image");
    assert!(!reads(&mount.path("web/snapshots/mid.raw")), "nobody else may read this one");
    mount.umount();
}

#[test]
fn inode_numbers_stay_and_are_never_reused() {
    let store = small_chain();
    store.create("other.qcow2", MIB, "");
    let mount = Mount::new(&store);
    let inode = |path: &str| fs::metadata(mount.path(path)).expect("an entry").ino();
    let paths =
        [".", "web", "web/active.raw", "web/snapshots", "web/snapshots/mid.raw", "web/info/chain.json"];
    let before = paths.map(inode);
    let mut seen: Vec<u64> = before.to_vec();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), paths.len(), "different things have different numbers: {before:?}");
    let other = inode("other/active.raw");
    fs::remove_file(store.path("other.qcow2")).expect("an unlink");
    eventually("it is gone", || !mount.path("other").exists());
    for name in ["new1.qcow2", "new2.qcow2", "new3.qcow2"] {
        store.create(name, MIB, "");
        let chain = name.trim_end_matches(".qcow2");
        let active = mount.path(chain).join("active.raw");
        eventually("it is there", || active.exists());
        assert_ne!(inode(&format!("{chain}/active.raw")), other, "{chain}: other content, other number");
    }
    assert_eq!(paths.map(inode), before, "what did not change keeps its number");
    let entries = fs::read_dir(mount.path("web/snapshots")).expect("a directory");
    for entry in entries.flatten() {
        use std::os::unix::fs::DirEntryExt as _;
        assert_eq!(entry.ino(), entry.metadata().expect("metadata").ino(), "readdir and stat agree");
    }
    mount.umount();
}

#[test]
fn df_shows_the_stores_file_system() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let (ours, theirs) = (statvfs(mount.dir()).expect("statvfs"), statvfs(store.root()).expect("statvfs"));
    assert_eq!((ours.f_blocks, ours.f_frsize), (theirs.f_blocks, theirs.f_frsize));
    mount.umount();
}

#[test]
fn a_leaf_that_is_frozen_shows_snapshots_only() {
    let store = small_chain();
    store.create("golden-debian.qcow2", MIB, "");
    store.create("writable.qcow2", MIB, "");
    fs::set_permissions(store.path("web.qcow2"), fs::Permissions::from_mode(0o444)).expect("permissions");
    let mount = Mount::with(&store, "readonly=golden-*");
    for (chain, view) in [("web", "web.raw"), ("golden-debian", "golden-debian.raw")] {
        assert!(!mount.path(chain).join("active.raw").exists(), "{chain} is frozen");
        assert!(mount.names(format!("{chain}/snapshots")).contains(&view.to_owned()), "{chain}");
    }
    assert_same(&mount.path("web/snapshots/web.raw"), &store.oracle("web.qcow2", "qcow2"));
    assert!(mount.path("writable/active.raw").exists());
    mount.umount();
}

#[test]
fn the_stores_own_files_list_every_chain() {
    let store = small_chain();
    store.dir("a/b");
    store.create("a/b/deep.qcow2", MIB, "");
    store.img(["snapshot", "-c", "monday", "a/b/deep.qcow2"]);
    let mount = Mount::new(&store);
    assert_eq!(mount.top(), ["a", "web"]);
    let names = mount.names(".chainfs");
    for name in ["index.html", "tree.txt", "tree.svg", "chains.json", "problems.txt", "trash.txt", "metrics"]
    {
        assert!(names.contains(&name.to_owned()), "{name} in {names:?}");
        let shown = fs::metadata(mount.path(".chainfs").join(name)).expect("an entry");
        assert_eq!(shown.mode() & 0o222, 0, "{name} is not for writing");
    }
    let tree = mount.text(".chainfs/tree.txt");
    for word in ["web", "mid", "base", "deep", "monday", "active"] {
        assert!(tree.contains(word), "{word} in\n{tree}");
    }
    assert!(tree.ends_with('\n'));
    let svg = mount.text(".chainfs/tree.svg");
    let picture = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{e}: {svg}"));
    assert_eq!(picture.root_element().tag_name().name(), "svg");
    let chains: serde_json::Value = serde_json::from_str(&mount.text(".chainfs/chains.json")).expect("JSON");
    let text = chains.to_string();
    for word in ["web", "mid.qcow2", "base.raw", "a/b/deep"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    let metrics = mount.text(".chainfs/metrics");
    let samples: Vec<&str> = metrics.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
    assert!(!samples.is_empty());
    for sample in samples {
        let (name, value) = sample.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {sample}"));
        assert!(name.starts_with("chainfs_") && value.parse::<f64>().is_ok(), "{sample}");
    }
    let own = mount.text("web/info/tree.txt");
    assert!(own.contains("mid") && !own.contains("deep"), "{own}");
    assert!(mount.text("web/info/tree.svg").contains("<svg"));
    assert!(!mount.path("web/info/problem.txt").exists());
    // Generated text is read whole by small reads, and by readers that trust its size as well.
    let mut small = Vec::new();
    let file = File::open(mount.path(".chainfs/tree.txt")).expect("an entry");
    let mut byte = [0; 7];
    while let Ok(n) = (&file).read(&mut byte) {
        if n == 0 {
            break;
        }
        small.extend_from_slice(&byte[..n]);
    }
    assert_eq!(String::from_utf8_lossy(&small), tree);
    drop(file);
    mount.umount();
}

// ---- reading hard -------------------------------------------------------------------------------

#[test]
fn many_concurrent_readers_read_the_same_as_one() {
    let store = small_chain();
    let oracles = [
        ("web/active.raw", store.oracle("web.qcow2", "qcow2")),
        ("web/snapshots/mid.raw", store.oracle("mid.qcow2", "qcow2")),
        ("web/snapshots/base.raw", store.oracle("base.raw", "raw")),
    ];
    let mount = Mount::new(&store);
    std::thread::scope(|scope| {
        for reader in 0..12_u64 {
            let (oracles, mount) = (&oracles, &mount);
            scope.spawn(move || {
                let mut rng = Rng::new(reader);
                for _ in 0..20 {
                    let (view, oracle) = &oracles[rng.below(3) as usize];
                    let flags = if reader % 2 == 0 { OFlags::DIRECT } else { OFlags::empty() };
                    let flags = flags.bits().cast_signed();
                    let open = |p: &Path, flags| OpenOptions::new().read(true).custom_flags(flags).open(p);
                    // A disk that the kernel reads by itself for others has no direct reads.
                    let ours = match open(&mount.path(view), flags) {
                        Err(error) if *view == "web/snapshots/mid.raw" => {
                            assert_eq!(errno::<()>(Err(error)), Some(Errno::INVAL), "{view}");
                            open(&mount.path(view), 0)
                        }
                        opened => opened,
                    };
                    let ours = ours.expect("a view");
                    let theirs = open(oracle, 0).expect("what QEMU reads");
                    let at = rng.below(2 * MIB / 4096 - 16) * 4096;
                    let len = 4096 * (1 + rng.below(16)) as usize;
                    let (mut have, mut want) = (vec![0; len + 4096], vec![0; len]);
                    // Direct reads that the file system below serves itself want aligned memory.
                    let aligned = have.as_ptr().align_offset(4096);
                    let have = &mut have[aligned..aligned + len];
                    ours.read_exact_at(have, at).expect("a read");
                    theirs.read_exact_at(&mut want, at).expect("a read");
                    assert!(have == want, "{view} at {at}+{len}");
                }
            });
        }
    });
    mount.umount();
}

#[test]
fn opening_and_closing_leaves_no_descriptor_behind() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let open_now = || fs::read_dir(format!("/proc/{}/fd", mount.daemon())).expect("descriptors").count();
    let read_all = || {
        for view in ["web/active.raw", "web/snapshots/mid.raw", "web/snapshots/base.raw", ".chainfs/tree.txt"]
        {
            drop(fs::read(mount.path(view)).expect("a view"));
        }
    };
    read_all();
    eventually("settled", || true);
    let before = open_now();
    for _ in 0..50 {
        read_all();
    }
    eventually("no more descriptors than before", || open_now() <= before + 3);
    mount.umount();
}

/// A store has more images than a process may have open.
#[test]
fn more_images_than_descriptors_can_be_open_one_after_the_other() {
    let store = Store::new();
    store.raw("base.raw", 64 * KIB, 1);
    store.overlay("web000.qcow2", "base.raw", "raw", "");
    let template = fs::read(store.path("web000.qcow2")).expect("an image");
    for number in 1..150 {
        store.put(format!("web{number:03}.qcow2"), &template);
    }
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64 && exec \"$@\"", "sh", chainfs_binary()]);
    let mount = Mount::by(&store, command, &store.root(), &store.beside("mnt"), "").expect("a mount");
    let want = fs::read(store.path("base.raw")).expect("the base");
    let open: Vec<File> = (0..40)
        .filter_map(|n| File::open(mount.path(format!("web{n:03}/snapshots/base.raw"))).ok())
        .collect();
    assert_eq!(open.len(), 40, "forty openings of one layer take few descriptors");
    for number in 0..150 {
        let have = fs::read(mount.path(format!("web{number:03}/active.raw")));
        assert!(have.unwrap_or_else(|e| panic!("image {number}: {e}")) == want, "image {number}");
    }
    drop(open);
    mount.umount();
}
