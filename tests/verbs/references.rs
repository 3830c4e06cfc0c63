//! Users of images where that is not obvious: images that cannot be read, names that are not followed, images
//! of other programs, and headers that a guest may have written. An image that may be in use is shown and
//! read, and neither written nor changed by a command; its possible user is named, with the remedy.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chainfs::ops::{Engine, JobState};
use chainfs::store::{Store as Opened, StoreOptions};
use support::damage::header;
use support::foreign::Mounted;
use support::*;

/// base.qcow2 with one overlay, and nothing else.
fn store_with_base() -> Store {
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    store.io("base.qcow2", "qcow2", ["write -q -P 2 0 1M"]);
    store
}

/// base.qcow2, and top.qcow2 on it.
fn store_with_top() -> Store {
    let store = store_with_base();
    store.overlay("top.qcow2", "base.qcow2", "qcow2", "");
    store
}

fn open_with(store: &Store, change: impl FnOnce(&mut StoreOptions)) -> Arc<Opened> {
    let mut options = StoreOptions { notify: false, ..StoreOptions::default() };
    change(&mut options);
    Opened::open(&store.root(), options).expect("a store")
}

fn open(store: &Store) -> Arc<Opened> {
    open_with(store, |_| {})
}

/// Why the active disk of a chain cannot be opened for writing; `None` if it can. It can be read in any case.
fn refusal_to_write(store: &Arc<Opened>, chain: &str) -> Option<String> {
    use chainfs::store::Access;
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new(chain)).unwrap_or_else(|| panic!("no chain {chain}"));
    let layers = catalog.layers(leaf);
    assert!(catalog.is_active(leaf), "{chain} has no active disk");
    drop(
        store
            .open_active(&catalog, &layers, Access::Read)
            .unwrap_or_else(|error| panic!("reading {chain}: {error}")),
    );
    store.open_active(&catalog, &layers, Access::Write).map(drop).err().map(|error| error.to_string())
}

/// Why a command is refused; `None` if it is done.
fn refusal_of(store: &Arc<Opened>, chain: &str, command: &str) -> Option<String> {
    match support::lab::run(&Engine::new(store), chain, command) {
        Err(error) => Some(error.to_string()),
        Ok(status) if status.state == JobState::Failed => Some(format!("{status:?}")),
        Ok(_) => None,
    }
}

fn problems(store: &Opened) -> String {
    let lines = store
        .catalog()
        .problems
        .iter()
        .map(|found| format!("{}: {}\n", found.path.display(), found.sentence))
        .collect::<Vec<_>>();
    lines.concat()
}

/// The top directory of a mount, without the files about the store as a whole.
fn chains(mount: &Mount) -> Vec<String> {
    mount.top()
}

/// The overlay is damaged like this, and its backing file is known all the same.
#[test]
fn an_overlay_with_any_bad_field_still_uses_its_base() {
    type Harm = fn(&Damage);
    let harms: [(&str, Harm); 9] = [
        ("version", |image| image.put_u32(header::VERSION, 4)),
        ("cluster bits", |image| image.put_u32(header::CLUSTER_BITS, 63)),
        ("L1 offset", |image| image.put_u64(header::L1_OFFSET, 0x123)),
        ("L1 size", |image| image.put_u32(header::L1_ENTRY_COUNT, u32::MAX)),
        ("refcount table", |image| image.put_u64(header::REFCOUNT_TABLE_OFFSET, 7)),
        ("snapshots", |image| image.put_u32(header::SNAPSHOT_COUNT, u32::MAX)),
        ("refcount order", |image| image.put_u32(header::REFCOUNT_ORDER, 77)),
        ("crypt method", |image| image.put_u32(header::CRYPT_METHOD, 9)),
        ("header length", |image| image.put_u32(header::HEADER_LEN, 3)),
    ];
    for (what, harm) in harms {
        let store = store_with_top();
        harm(&Damage::to(store.path("top.qcow2")));
        let opened = open(&store);
        let catalog = opened.catalog();
        assert!(catalog.chain(Path::new("base")).is_none(), "{what}: base is a leaf");
        let leaf = catalog.chain(Path::new("top")).expect("the overlay is shown as broken");
        assert_eq!(catalog.layers(leaf).len(), 2, "{what}");
        assert!(problems(&opened).contains("top.qcow2"), "{what}");
    }
}

#[test]
fn a_repeated_extension_is_read_as_qemu_reads_it() {
    let store = store_with_top();
    let top = Damage::to(store.path("top.qcow2"));
    let at = u64::from(top.u32(header::HEADER_LEN));
    let name_at = at + 5 * 8;
    let format = [0xe279_2aca_u32.to_be_bytes(), 5_u32.to_be_bytes()].concat();
    top.put(
        at,
        &[format.clone(), b"wrong\0\0\0".to_vec(), format, b"qcow2\0\0\0".to_vec(), vec![0; 8]].concat(),
    );
    top.put(name_at, b"base.qcow2");
    top.put_u64(header::BACKING_OFFSET, name_at);
    assert_eq!(store.info("top.qcow2", "qcow2")["backing-filename-format"], "qcow2");
    let mount = Mount::new(&store);
    assert_same(&mount.path("top/active.raw"), &store.oracle("top.qcow2", "qcow2"));
    assert!(!mount.path("base").exists());
    mount.umount();
    // A new backing file is read afterwards.
    store.create("other.qcow2", MIB, "");
    store.io("other.qcow2", "qcow2", ["write -q -P 7 0 1M"]);
    assert_eq!(refusal_of(&open(&store), "top", "rebase base=other.qcow2 unsafe drop-layers"), None);
    let info = store.info("top.qcow2", "qcow2");
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&"other.qcow2".into(), &"qcow2".into())
    );
}

/// Possible users of base.qcow2 that cannot be read: base.qcow2 is neither written nor changed, each is
/// named, and one option ends it.
#[test]
// S3
fn an_unreadable_image_may_use_any_layer_until_its_format_is_stated() {
    type Lay = fn(&Store);
    let cases: [(&str, &str, Lay); 9] = [
        ("lost.qcow2", "lost magic and all", |store| {
            store.put("lost.qcow2", &[0; 4096]);
        }),
        ("lost.qcow2", "a name that lies nowhere", |store| {
            store.overlay("lost.qcow2", "base.qcow2", "qcow2", "");
            Damage::to(store.path("lost.qcow2")).put_u64(header::BACKING_OFFSET, 1 << 40);
        }),
        ("j.qcow2", "a description without a name", |store| {
            store.overlay_unchecked("j.qcow2", r#"json:{"file":"node0"}"#, "qcow2");
        }),
        ("out.qcow2", "a link that leads out", |store| {
            store.create("out.qcow2", MIB, "");
            fs::rename(store.path("out.qcow2"), store.beside("out.qcow2")).expect("a move");
            symlink(store.beside("out.qcow2"), store.path("out.qcow2")).expect("a link");
        }),
        ("old.qed", "a foreign image whose name is lost", |store| {
            let mut qed = vec![0; 1024];
            qed[..4].copy_from_slice(b"QED\0");
            qed[16] = 1;
            qed[56..64].copy_from_slice(&[0xff; 8]);
            store.put("old.qed", &qed);
        }),
        ("disk.img", "a foreign image called raw", |store| {
            let mut vmdk = vec![0; 4096];
            vmdk[..4].copy_from_slice(b"KDMV");
            vmdk[28] = 1;
            vmdk[36] = 1;
            store.put("disk.img", &vmdk);
        }),
        ("odd.raw", "a raw disk that bears a header without a name", |store| {
            let mut header = vec![0; 4096];
            header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x07");
            header[8] = 0xff;
            header[16] = 0xff;
            store.put("odd.raw", &header);
        }),
        (".chainfs-x.qcow2", "a name of our own", |store| {
            store.put(".chainfs-x.qcow2", &[1; 4096]);
        }),
        ("d0/d1", "directories that are too deep", |store| {
            let deep: Vec<String> = (0..70).map(|number| format!("d{number}")).collect();
            fs::create_dir_all(store.path(deep.join("/"))).expect("room");
        }),
    ];
    for (name, what, lay) in cases {
        let store = store_with_base();
        lay(&store);
        let opened = open(&store);
        let why = refusal_to_write(&opened, "base").unwrap_or_else(|| panic!("{what}: base is written"));
        let word = name.split('/').next_back().unwrap_or_default();
        assert!(why.contains(word) && why.contains("standalone="), "{what}: {why}");
        let told = problems(&opened);
        assert!(told.contains(word) && told.contains("standalone="), "{what}: {told}");
        for command in ["snapshot s1", "resize 2M", "snapshot s1 internal"] {
            let why =
                refusal_of(&opened, "base", command).unwrap_or_else(|| panic!("{what}: {command} was done"));
            assert!(why.contains(word), "{what}: {command}: {why}");
        }
        let opened = open_with(&store, |options| {
            options.standalone = vec![glob::Pattern::new(name.split('/').next().unwrap()).unwrap()];
        });
        assert_eq!(refusal_to_write(&opened, "base"), None, "{what}: with the override");
        assert_eq!(refusal_of(&opened, "base", "snapshot s1"), None, "{what}: with the override");
    }
}

/// Names that are not followed to read by them, but that mean base.qcow2.
#[test]
// S3
fn an_unresolved_name_counts_for_its_target() {
    let names = |store: &Store| {
        let root = store.root().display().to_string();
        [
            "latest.qcow2".to_owned(),
            "out/base.qcow2".to_owned(),
            "file:base.qcow2".to_owned(),
            format!("file:{root}/base.qcow2"),
            r#"json:{"driver":"qcow2","file.filename":"base.qcow2"}"#.to_owned(),
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{root}/base.qcow2"}}}}"#),
            "nbd://localhost/base.qcow2".to_owned(),
            "/elsewhere/base.qcow2".to_owned(),
            "gone/base.qcow2".to_owned(),
        ]
    };
    let laid = || {
        let store = store_with_base();
        store.create("free.qcow2", MIB, "");
        symlink(store.path("base.qcow2"), store.path("latest.qcow2")).expect("a link");
        symlink(store.root(), store.path("out")).expect("a link");
        store
    };
    for number in 0..names(&laid()).len() {
        let store = laid();
        let name = names(&store)[number].clone();
        store.overlay_unchecked("top.qcow2", &name, "qcow2");
        let opened = open(&store);
        if opened.catalog().chain(Path::new("base")).is_some() {
            let why = refusal_to_write(&opened, "base").unwrap_or_else(|| panic!("{name}: base is written"));
            assert!(why.contains("top.qcow2"), "{name}: {why}");
            assert!(refusal_of(&opened, "base", "snapshot s1").is_some(), "{name}");
        } else {
            let catalog = opened.catalog();
            let leaf = catalog.chain(Path::new("top")).expect("who names it is shown");
            assert_eq!(catalog.layers(leaf).len(), 2, "{name}: base is a layer below");
        }
        // An image that none of them can name stays writable.
        assert_eq!(refusal_to_write(&opened, "free"), None, "{name}");
    }
}

#[test]
fn an_overlay_behind_an_absolute_link_protects_its_base() {
    let store = store_with_base();
    store.overlay("s1.qcow2", "base.qcow2", "qcow2", "");
    store.io("s1.qcow2", "qcow2", ["write -q -P 3 0 1M"]);
    store.overlay("vm.qcow2", "s1.qcow2", "qcow2", "");
    symlink(store.path("base.qcow2"), store.path("latest.qcow2")).expect("a link");
    store.overlay("other.qcow2", "latest.qcow2", "qcow2", "");
    let before = fs::read(store.oracle("other.qcow2", "qcow2")).expect("what QEMU reads");
    let why = refusal_of(&open(&store), "vm", "commit top=s1 base=base").expect("a refusal");
    assert!(why.contains("other.qcow2"), "{why}");
    assert!(fs::read(store.oracle("other.qcow2", "qcow2")).expect("what QEMU reads") == before);
}

/// A file with a header of qcow2 and a raw name may be used as either.
#[test]
fn a_header_in_a_raw_disk_counts_unless_the_guest_wrote_it() {
    for name in ["top.raw", "top.img"] {
        let store = store_with_top();
        fs::rename(store.path("top.qcow2"), store.path(name)).expect("a move");
        let opened = open(&store);
        let why = refusal_to_write(&opened, "base").unwrap_or_else(|| panic!("{name}: base is written"));
        assert!(why.contains(name) && why.contains("format="), "{why}");
        assert!(problems(&opened).contains(name));
        let opened = open_with(&store, |options| {
            options.formats = vec![(glob::Pattern::new(name).unwrap(), chainfs::store::Format::Raw)];
        });
        assert_eq!(refusal_to_write(&opened, "base"), None, "{name} is said to be raw");
    }
    // A file once seen without a header: its guest may write any bytes.
    let store = store_with_top();
    let header = fs::read(store.path("top.qcow2")).expect("a header");
    fs::remove_file(store.path("top.qcow2")).expect("an overlay");
    store.raw("disk.raw", MIB, 3);
    Mount::new(&store).umount();
    File::options()
        .write(true)
        .open(store.path("disk.raw"))
        .unwrap()
        .write_all_at(&header[..4096], 0)
        .unwrap();
    assert_eq!(refusal_to_write(&open(&store), "base"), None);
}

/// Every name in a header of another format protects its file.
#[test]
fn images_of_other_programs_protect_their_parents() {
    for (format, options) in [("qcow", ""), ("qed", ""), ("vmdk", "")] {
        let store = store_with_base();
        let name = format!("top.{format}");
        let _ = options;
        if format == "vmdk" {
            store.raw("data.raw", MIB, 4);
            store.put(
                &name,
                b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"data.raw\" \
                    0\n",
            );
        } else {
            store.img(["create", "-q", "-f", format, "-b", "base.qcow2", "-F", "qcow2", &name]);
        }
        let used = if format == "vmdk" { "data" } else { "base" };
        let opened = open(&store);
        let why = refusal_to_write(&opened, used).unwrap_or_else(|| panic!("{format}: {used} is written"));
        assert!(why.contains(&name), "{format}: {why}");
        assert!(problems(&opened).contains(&format!("{name}: ")), "{format}: {}", problems(&opened));
        assert!(refusal_of(&opened, used, "snapshot s1").is_some());
    }
}

#[test]
fn an_image_of_another_format_is_no_raw_disk_unless_the_user_says_so() {
    let store = Store::new();
    for (name, format) in
        [("a.vmdk", "vmdk"), ("b.vdi", "vdi"), ("c.vhdx", "vhdx"), ("d.img", "vmdk"), ("e.vpc", "vpc")]
    {
        store.img(["create", "-q", "-f", format, name, "1M"]);
    }
    let mount = Mount::new(&store);
    let told = mount.text(".chainfs/problems.txt");
    for name in ["a.vmdk: ", "b.vdi: ", "c.vhdx: ", "d.img: ", "e.vpc: "] {
        assert!(
            told.lines().any(|line| line.starts_with(name) && line.contains("format=")),
            "{name} in {told}"
        );
    }
    assert_eq!(chains(&mount), ["d"], "only what is called a disk is shown, as broken");
    assert!(!mount.path("d/active.raw").exists());
    mount.umount();
    let single = Mount::try_new(&store, &store.path("a.vmdk"), &store.beside("mnt"), "").expect("a mount");
    assert!(!single.path("active.raw").exists());
    assert!(single.text("info/problem.txt").contains("vmdk"), "{}", single.text("info/problem.txt"));
    single.umount();
    let single = Mount::try_new(&store, &store.path("a.vmdk"), &store.beside("mnt"), "format=a.vmdk:raw")
        .expect("a mount");
    assert!(single.path("active.raw").exists());
    single.umount();
    let (code, out, _) =
        tool(chainfs_binary()).args(["info", "--output", "json"]).arg(store.path("a.vmdk")).outcome();
    assert!(code == 1 && out.contains("\"format\": \"vmdk\""), "{code} {out}");
    let tree = tool(chainfs_binary()).arg("tree").arg(store.path("a.vmdk")).succeeds();
    assert!(tree.contains("vmdk") && !tree.contains("writable"), "{tree}");
}

#[test]
fn an_unreadable_image_is_never_raw_and_info_fails() {
    let store = store_with_base();
    Damage::to(store.path("base.qcow2")).put_u32(header::VERSION, 4);
    let (code, out, err) =
        tool(chainfs_binary()).args(["info", "--output", "json"]).arg(store.path("base.qcow2")).outcome();
    let told: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, told["format"].as_str(), told.get("virtual-size")), (1, Some("qcow2"), None), "{out}");
    assert!(err.contains("version"), "{err}");
    store.put("empty.qcow2", b"");
    let (code, out, _) = tool(chainfs_binary()).arg("info").arg(store.path("empty.qcow2")).outcome();
    assert!(code == 1 && !out.contains("raw") && out.contains("virtual size: unknown"), "{out}");
}

#[test]
fn a_file_shorter_than_a_header_has_no_backing_file() {
    let store = store_with_base();
    store.put("empty.qcow2", b"");
    store.put("short.qcow2", &[7; 71]);
    store.put("notes.txt", b"anything");
    assert_eq!(refusal_to_write(&open(&store), "base"), None);
}

// ---- a mount in a mount, and a store in a store --------------------------------------------------

#[test]
fn a_nested_store_counts_users_in_the_outer_store() {
    let store = Store::new();
    store.dir("sub");
    store.create("sub/base.qcow2", MIB, "");
    store.io("sub/base.qcow2", "qcow2", ["write -q -P 2 0 1M"]);
    store.overlay("sub/s1.qcow2", "base.qcow2", "qcow2", "");
    store.overlay("sub/vm.qcow2", "s1.qcow2", "qcow2", "");
    store.create("sub/lone.qcow2", MIB, "");
    store.overlay("user.qcow2", "sub/base.qcow2", "qcow2", "");
    store.overlay("lone-user.qcow2", "sub/lone.qcow2", "qcow2", "");
    store.dir(".chainfs");
    let inner = || {
        Opened::open(&store.path("sub"), StoreOptions { notify: false, ..StoreOptions::default() })
            .expect("a store")
    };
    let why = refusal_of(&inner(), "vm", "commit top=s1 base=base").expect("a refusal");
    assert!(why.contains("user.qcow2"), "{why}");
    let why = refusal_to_write(&inner(), "lone").expect("a refusal");
    assert!(why.contains("lone-user.qcow2"), "{why}");
    // Intents are written in the store around it.
    assert_eq!(refusal_of(&inner(), "vm", "snapshot s2"), None);
    assert!(!store.path("sub/.chainfs").exists() && store.path(".chainfs/lock").exists());
    fs::remove_file(store.path("user.qcow2")).expect("the user");
    assert_eq!(refusal_of(&inner(), "vm", "commit top=s1 base=base"), None);
    let (code, _, err) = tool(chainfs_binary())
        .args(["snapshot", "--store"])
        .arg(store.path("sub"))
        .arg(store.path("sub/lone.qcow2"))
        .arg("s1")
        .outcome();
    assert!(code == 1 && err.contains("lone-user.qcow2"), "{code} {err}");
}

#[test]
fn a_file_system_mounted_in_the_store_is_part_of_it() {
    let store = store_with_base();
    let pool = Mounted::tmpfs(&store.path("pool"));
    store.overlay("pool/vm.qcow2", "../base.qcow2", "qcow2", "");
    store.dir("pool/deep");
    store.overlay("pool/deep/web.qcow2", "../../pool/vm.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    assert_same(&mount.path("pool/deep/web/active.raw"), &store.oracle("base.qcow2", "qcow2"));
    assert!(!mount.path("base").exists());
    mount.umount();
    pool.umount();
}

#[test]
fn names_in_an_image_behind_a_link_are_relative_to_the_link() {
    let store = store_with_base();
    store.dir("sub");
    store.create("sub/top.qcow2", MIB, "");
    store.img(["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "sub/top.qcow2"]);
    symlink("sub/top.qcow2", store.path("link.qcow2")).expect("a link");
    store.overlay("up.qcow2", "link.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    assert_same(&mount.path("up/active.raw"), &store.oracle("up.qcow2", "qcow2"));
    mount.umount();
    let single =
        Mount::try_new(&store, &store.path("link.qcow2"), &store.beside("mnt"), "").expect("a mount");
    assert_same(&single.path("active.raw"), &store.oracle("link.qcow2", "qcow2"));
    single.umount();
    // A file of that name beside the image itself: now the two names have two backing files, and neither is
    // guessed.
    store.create("sub/base.qcow2", MIB, "");
    let opened = open(&store);
    assert!(problems(&opened).contains("link.qcow2"), "{}", problems(&opened));
    let catalog = opened.catalog();
    let leaf = catalog.chain(Path::new("up")).expect("a chain");
    assert!(
        catalog.view_problem(&catalog.layers(leaf)).is_some_and(|why| why.contains("another backing file"))
    );
    assert!(refusal_to_write(&opened, "base").is_some(), "QEMU reads base by the link");
    let single =
        Mount::try_new(&store, &store.path("link.qcow2"), &store.beside("mnt"), "").expect("a mount");
    assert_same(&single.path("active.raw"), &store.oracle("link.qcow2", "qcow2"));
    single.umount();
}

// ---- guests decide no format ----------------------------------------------------------------------

/// A header that makes its file an overlay of other.qcow2.
fn stolen_header(store: &Store) -> Vec<u8> {
    store.create("other.qcow2", MIB, "");
    store.io("other.qcow2", "qcow2", ["write -q -P 0x53 0 1M"]);
    store.overlay_unchecked("h", "other.qcow2", "qcow2");
    let bytes = fs::read(store.path("h")).expect("a header");
    fs::remove_file(store.path("h")).expect("the overlay");
    bytes
}

fn overwrite(path: &Path, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, 0).unwrap();
}

#[test]
// S4
fn a_file_once_seen_without_the_magic_never_becomes_qcow2_by_its_content() {
    let store = Store::new();
    let header = stolen_header(&store);
    store.raw("disk", MIB, 5);
    File::create(store.path("blank")).unwrap().set_len(MIB).unwrap();
    Mount::new(&store).umount();
    // Written in place, cut and written, by another name, by two names.
    overwrite(&store.path("disk"), &header);
    fs::rename(store.path("disk"), store.path("renamed")).unwrap();
    fs::hard_link(store.path("renamed"), store.path("second")).unwrap();
    File::create(store.path("blank")).unwrap().write_all_at(&header, 0).unwrap();
    for _ in 0..2 {
        let mount = Mount::new(&store);
        assert_eq!(chains(&mount), ["other"]);
        let told = mount.text(".chainfs/problems.txt");
        assert!(told.contains("renamed: ") && told.contains("blank: ") && told.contains("format="), "{told}");
        mount.umount();
    }
    let mount = Mount::with(&store, "format=blank:qcow2");
    assert_eq!(chains(&mount), ["blank"], "the user's word holds");
    mount.umount();
    // A file of its own, though it has the name and perhaps the number of one that was.
    fs::remove_file(store.path("blank")).unwrap();
    store.overlay("blank", "other.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    assert_eq!(chains(&mount), ["blank"]);
    mount.umount();
}

#[test]
fn a_running_mount_ignores_guest_headers_and_shows_new_overlays() {
    let store = Store::new();
    let header = stolen_header(&store);
    store.raw("disk", MIB, 5);
    store.create("vm", MIB, "");
    let mount = Mount::new(&store);
    overwrite(&store.path("disk"), &header);
    // As virsh does it: an empty file first, which the scan may meet.
    File::create(store.path("vm.snap1")).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    store.overlay("vm.snap1", "vm", "qcow2", "");
    eventually("the overlay is shown", || {
        mount.path("vm.snap1").exists()
            || chains(&mount) == ["other", "vm"] && mount.path("vm/snapshots/vm.raw").exists()
    });
    assert!(!mount.path("disk").exists());
    assert!(mount.path("other/active.raw").exists());
    mount.umount();
}

#[test]
fn a_store_copied_as_a_whole_still_knows_its_raw_disks() {
    let store = Store::new();
    let header = stolen_header(&store);
    store.raw("disk", MIB, 5);
    Mount::new(&store).umount();
    overwrite(&store.path("disk"), &header);
    let copy = store.beside("copy");
    tool("cp").arg("-a").arg(store.root()).arg(&copy).succeeds();
    fs::remove_dir_all(store.root()).unwrap();
    fs::rename(&copy, store.root()).unwrap();
    let mount = Mount::new(&store);
    assert_eq!(chains(&mount), ["other"]);
    mount.umount();
}

#[test]
fn a_damaged_freeze_list_is_a_problem_and_no_content_decides() {
    let store = Store::new();
    store.create("vm", MIB, "");
    store.create("web.qcow2", MIB, "");
    store.raw("disk", MIB, 5);
    Mount::new(&store).umount();
    overwrite(&store.path(".chainfs/plain"), b"####");
    let mount = Mount::new(&store);
    assert_eq!(chains(&mount), ["web"]);
    let told = mount.text(".chainfs/problems.txt");
    assert!(told.contains(".chainfs/plain: ") && told.contains("vm: "), "{told}");
    mount.umount();
}

#[test]
fn a_read_only_mount_writes_no_list() {
    let store = Store::new();
    store.raw("disk", MIB, 5);
    Mount::with(&store, "ro").umount();
    tool(chainfs_binary()).arg("tree").arg(store.root()).succeeds();
    assert!(!store.path(".chainfs").exists());
    Mount::new(&store).umount();
    assert!(store.path(".chainfs/plain").exists());
    let whole = fs::read(store.path(".chainfs/plain")).unwrap();
    Mount::new(&store).umount();
    assert!(fs::read(store.path(".chainfs/plain")).unwrap() == whole, "nothing is noted twice");
}

#[test]
fn standalone_can_be_said_in_the_configuration_and_on_the_command_line() {
    let store = store_with_base();
    store.put("lost.qcow2", &[1; 4096]);
    let snapshot = |options: &[&str]| {
        let mut command = tool(chainfs_binary());
        command
            .arg("snapshot")
            .args(options)
            .arg("--store")
            .arg(store.root())
            .arg(store.path("base.qcow2"))
            .arg("s1");
        command.env("XDG_CONFIG_HOME", store.beside("config"));
        command
    };
    let why = snapshot(&[]).fails();
    assert!(why.contains("lost.qcow2") && why.contains("standalone=lost.qcow2"), "{why}");
    snapshot(&["-o", "standalone=lost.qcow2"]).succeeds();
    fs::create_dir_all(store.beside("config/chainfs")).unwrap();
    fs::write(store.beside("config/chainfs/config.toml"), "standalone = [\"lost.*\"]\n").unwrap();
    let mount = Mount::new(&store);
    assert!(OpenOptions::new().write(true).open(mount.path("base/active.raw")).is_ok());
    let tree = mount.text(".chainfs/tree.txt");
    assert!(tree.contains("writable"), "{tree}");
    mount.umount();
}

#[test]
fn a_mount_shows_read_only_images_with_the_reason() {
    let store = store_with_base();
    store.put("lost.qcow2", &[1; 4096]);
    let mount = Mount::new(&store);
    assert_eq!(fs::read(mount.path("base/active.raw")).unwrap(), vec![2; MIB as usize]);
    let error = OpenOptions::new().write(true).open(mount.path("base/active.raw")).expect_err("a refusal");
    assert_eq!(error.raw_os_error(), Some(30), "{error}");
    let told = mount.text(".chainfs/problems.txt");
    assert!(told.contains("lost.qcow2: ") && told.contains("standalone=lost.qcow2"), "{told}");
    let tree = mount.text(".chainfs/tree.txt");
    assert!(tree.contains("not writable: lost.qcow2 may use it as its backing file"), "{tree}");
    // After its removal, the disk is writable again.
    fs::remove_file(store.path("lost.qcow2")).unwrap();
    eventually("base is written", || {
        OpenOptions::new().write(true).open(mount.path("base/active.raw")).is_ok()
    });
    mount.umount();
}

/// A file that cannot be opened, for a user other than root.
#[test]
fn an_image_that_may_not_be_opened_may_use_any_layer() {
    let store = store_with_top();
    fs::set_permissions(store.path("top.qcow2"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(store.beside(""), fs::Permissions::from_mode(0o755)).unwrap();
    let mut as_other = tool("setpriv");
    as_other.args([
        "--reuid",
        "2001",
        "--regid",
        "2001",
        "--clear-groups",
        chainfs_binary(),
        "snapshot",
        "--dry-run",
        "--store",
    ]);
    tool("chown").args(["-R", "2001:2001"]).arg(store.root()).succeeds();
    tool("chown").arg("0:0").arg(store.path("top.qcow2")).succeeds();
    let (code, out, err) =
        as_other.arg(store.root()).arg(store.path("base.qcow2")).arg("s1").env("HOME", "/").outcome();
    assert!(code != 0 && format!("{out}{err}").contains("top.qcow2"), "{code} {out} {err}");
}

#[test]
fn a_dangling_link_uses_no_layer() {
    let store = Store::new();
    store.create("vm.qcow2", MIB, "");
    std::os::unix::fs::symlink(store.path("gone.qcow2"), store.path("link.qcow2")).unwrap();
    let mount = Mount::new(&store);
    let disk = fs::File::options().write(true).open(mount.path("vm/active.raw")).expect("a writable disk");
    drop(disk);
    assert!(
        mount
            .text(".chainfs/problems.txt")
            .starts_with("link.qcow2: is a symbolic link that cannot be followed")
    );
    mount.umount();
    // One that leads elsewhere may be an overlay of anything.
    fs::remove_file(store.path("link.qcow2")).unwrap();
    std::os::unix::fs::symlink("/nowhere/gone.qcow2", store.path("link.qcow2")).unwrap();
    let mount = Mount::new(&store);
    let refused = fs::File::options().write(true).open(mount.path("vm/active.raw"));
    assert_eq!(refused.expect_err("a claim").raw_os_error(), Some(30));
    mount.umount();
}
