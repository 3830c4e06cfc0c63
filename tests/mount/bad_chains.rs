//! Files that are no images, odd names, and chains that are broken, circular or lead out of the store: each
//! is a problem with the file's name, and affects nothing else.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use support::damage::header;
use support::victims::*;
use support::*;

// ---- files that are no images, and names that are odd ------------------------------------------

#[test]
fn directories_pipes_sockets_and_devices_with_the_name_of_an_image_are_never_opened() {
    let victims = Victims::new("");
    let store = &victims.store;
    store.dir("directory.qcow2");
    store.create("directory.qcow2/inside.qcow2", MIB, "");
    store.dir("directory.raw");
    for name in ["pipe.qcow2", "pipe.raw", "pipe.img"] {
        mknodat(CWD, store.path(name), FileType::Fifo, Mode::from(0o666), 0).expect("a pipe");
    }
    let _listener = UnixListener::bind(store.path("socket.qcow2")).expect("a socket");
    let tape = rustix::fs::makedev(9, 0);
    mknodat(CWD, store.path("tape.raw"), FileType::CharacterDevice, Mode::from(0o666), tape)
        .expect("a device");
    store.put("empty.qcow2", b"");
    store.put("notes.txt", b"not an image");
    store.overlay_unchecked("on-pipe.qcow2", "pipe.raw", "raw");
    store.overlay_unchecked("on-directory.qcow2", "directory.raw", "raw");
    store.overlay_unchecked("on-socket.qcow2", "socket.qcow2", "qcow2");
    victims.mounted(|mount| {
        read_everything(mount.dir());
        let shown = mount.top();
        for name in ["pipe", "socket", "tape", "notes", "notes.txt", "pipe.raw", "tape.raw"] {
            assert!(!shown.contains(&name.to_owned()), "{name} in {shown:?}");
        }
        assert!(
            mount.path("directory.qcow2/inside/active.raw").exists(),
            "a directory may be named like an image"
        );
        for (chain, below) in
            [("on-pipe", "pipe.raw"), ("on-directory", "directory.raw"), ("on-socket", "socket.qcow2")]
        {
            let why = problem_of(mount, chain, below);
            assert!(why.contains(&format!("{chain}.qcow2")), "the layer that wants {below}: {why}");
        }
    });
}

#[test]
fn names_of_any_bytes_are_shown_and_read() {
    let store = Store::new();
    let long = "x".repeat(180);
    let names: Vec<&[u8]> = vec![
        b"with space",
        b"new\nline",
        b"tab\tbell\x07",
        b"quote'\"`$(id)",
        b"per%zent and 100%",
        b"invalid-\xff\xfe-utf8",
        b"-dash",
        b"..dots..",
        b"back\\slash",
        "ünïcödé-雪".as_bytes(),
        long.as_bytes(),
    ];
    store.create("template", MIB, "");
    store.io("template", "qcow2", [store.write(&mut Rng::new(6), 0, MIB)]);
    let bytes = fs::read(store.path("template")).expect("the template");
    fs::remove_file(store.path("template")).expect("the template");
    let in_store = |stem: &[u8]| store.path(OsStr::from_bytes(&[stem, b".qcow2"].concat()));
    for name in &names {
        fs::write(in_store(name), &bytes).expect("an odd name");
        // And as a directory, and as the name of a layer below another.
        let dir = store.path(OsStr::from_bytes(&[b"d-", &name[..name.len().min(200)]].concat()));
        fs::create_dir(&dir).expect("an odd directory");
        fs::write(dir.join("inside.qcow2"), &bytes).expect("an image in it");
    }
    // A name that would leave no room for a suffix is shortened, but two such do not clash.
    for end in ["a", "b"] {
        fs::write(in_store(("y".repeat(248) + end).as_bytes()), &bytes).expect("a very long name");
    }
    let oracle = store.oracle(in_store(b"with space"), "qcow2");

    let mount = Mount::new(&store);
    for name in &names {
        assert_same(&mount.path(OsStr::from_bytes(name)).join("active.raw"), &oracle);
        let dir = mount.path(OsStr::from_bytes(&[b"d-", &name[..name.len().min(200)]].concat()));
        assert_same(&dir.join("inside/active.raw"), &oracle);
    }
    let very_long: Vec<String> = mount.top().into_iter().filter(|n| n.starts_with("yyy")).collect();
    assert_eq!(very_long.len(), 2, "{very_long:?}");
    for name in very_long {
        assert_same(&mount.path(name).join("active.raw"), &oracle);
    }
    let chains = mount.text(".chainfs/chains.json");
    let parsed: Result<serde_json::Value, _> = serde_json::from_str(&chains);
    assert!(parsed.is_ok(), "chains.json is JSON whatever the names are: {parsed:?}");
    let svg = mount.text(".chainfs/tree.svg");
    let picture = roxmltree::Document::parse(&svg);
    assert!(picture.is_ok(), "tree.svg is XML whatever the names are: {picture:?}");
    mount.umount();
}

#[test]
fn layers_with_odd_names_are_snapshots_under_them() {
    let store = Store::new();
    let oddities = ["a b", "per%cent", "new\nline", "comma,colon:equals=", "{json}"];
    let mut below: Option<String> = None;
    for name in oddities.iter().copied().chain(["web"]) {
        let file = format!("./{name}.qcow2");
        // Commas are doubled where qemu-img parses options, so odd names go into headers unchecked.
        match &below {
            Some(backing) => store.overlay_sized(&file, backing, "qcow2", MIB),
            None => store.create(&file, MIB, ""),
        }
        below = Some(file);
    }
    let mount = Mount::new(&store);
    let shown = mount.names("web/snapshots");
    assert_eq!(shown.len(), oddities.len(), "{shown:?} {}", mount.text(".chainfs/problems.txt"));
    for name in &shown {
        assert_eq!(fs::metadata(mount.path("web/snapshots").join(name)).expect("a view").len(), MIB);
    }
    mount.umount();
}

// ---- chains that are broken --------------------------------------------------------------------

#[test]
fn a_missing_backing_file_is_named_with_the_layer_that_wants_it_and_the_layers_below_stay_readable() {
    let victims = Victims::new("");
    let store = &victims.store;
    store.overlay_unchecked("mid.qcow2", "gone.qcow2", "qcow2");
    store.overlay_unchecked("orphan.qcow2", "mid.qcow2", "qcow2");
    // A chain of three whose middle has a bad header: the layers below it can be read.
    store.create("low.qcow2", MIB, "");
    store.scribble("low.qcow2", "qcow2", 7);
    store.overlay("torn.qcow2", "low.qcow2", "qcow2", "");
    store.overlay("top.qcow2", "torn.qcow2", "qcow2", "");
    Damage::to(store.path("torn.qcow2")).put_u64(header::L1_OFFSET, 1 << 40);
    let oracle = store.oracle("low.qcow2", "qcow2");
    victims.mounted(|mount| {
        let why = problem_of(mount, "orphan", "gone.qcow2");
        assert!(why.contains("mid.qcow2"), "the layer that wants it: {why}");
        assert!(
            fs::read(mount.path("orphan/active.raw")).is_err(),
            "zeroes instead of a missing file's bytes"
        );
        problem_of(mount, "top", "torn.qcow2");
        assert!(fs::read(mount.path("top/active.raw")).is_err());
        // Behind the torn header, the lower part is a chain of its own or below the break.
        let ways = ["top/snapshots/low.raw", "low/active.raw", "low/snapshots/low.raw"];
        let way = ways.iter().find(|w| mount.path(w).exists()).expect("the layer below the break is shown");
        assert_same(&mount.path(way), &oracle);
    });
}

/// QEMU would not make an image that names itself, so it is made under another name.
fn overlay_of_itself(store: &Store, name: &str, backing: &str) {
    store.overlay_unchecked("unborn", backing, "qcow2");
    fs::rename(store.path("unborn"), store.path(name)).expect("a rename");
}

#[test]
// C1
fn circular_chains_are_problems() {
    let victims = Victims::new("");
    let store = &victims.store;
    for (name, backing) in
        [("self", "self"), ("one", "two"), ("two", "one"), ("a", "b"), ("b", "c"), ("c", "a"), ("leaf", "a")]
    {
        overlay_of_itself(store, &format!("{name}.qcow2"), &format!("{backing}.qcow2"));
    }
    // A loop by another name of the same file.
    store.dir("sub");
    overlay_of_itself(store, "sub/around.qcow2", "../sub/./around.qcow2");
    victims.mounted(|mount| {
        read_everything(mount.dir());
        for name in ["self", "one", "two"] {
            problem_of(mount, name, &format!("{name}.qcow2"));
        }
        problem_of(mount, "sub/around", "around.qcow2");
        let why = mount.text("leaf/info/problem.txt");
        assert!(["a.qcow2", "b.qcow2", "c.qcow2"].iter().all(|n| why.contains(n)), "the whole loop: {why}");
    });
}

#[test]
fn backing_names_that_lead_out_of_the_store_are_refused() {
    let victims = Victims::new("");
    let store = &victims.store;
    let secret = store.beside("secret.raw");
    fs::write(&secret, [b'S'; 4096]).expect("a secret");
    symlink(&secret, store.path("link.raw")).expect("a link that leads out");
    symlink(store.beside(""), store.path("linked-dir")).expect("a directory that leads out");
    symlink("/etc/passwd", store.path("passwd.qcow2")).expect("a link that leads out");
    for (name, backing, format) in [
        ("absolute", "/etc/passwd", "raw"),
        ("climbing", "../secret.raw", "raw"),
        ("far-up", "../../../../../../../../etc/passwd", "raw"),
        ("by-link", "link.raw", "raw"),
        ("by-linked-directory", "linked-dir/secret.raw", "raw"),
        ("in-and-out", "sub/../../secret.raw", "raw"),
        ("json", r#"json:{"driver":"file","filename":"/etc/passwd"}"#, "raw"),
        (
            "json-inside",
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"good.qcow2"}}"#,
            "qcow2",
        ),
        ("protocol", "nbd://127.0.0.1:1/x", "raw"),
        ("file-protocol", "file:/etc/passwd", "raw"),
        ("device", "/dev/zero", "raw"),
        ("proc", "/proc/self/mem", "raw"),
    ] {
        store.overlay_unchecked(&format!("{name}.qcow2"), backing, format);
    }
    store.dir("sub");
    victims.mounted(|mount| {
        read_everything(mount.dir());
        for name in mount.top().iter().filter(|n| !["good", "sub"].contains(&n.as_str())) {
            problem_of(mount, name, name);
            assert!(fs::read(mount.path(name).join("active.raw")).is_err(), "{name} can be read");
            assert!(mount.names(format!("{name}/snapshots")).is_empty(), "{name} shows what lies outside");
        }
        for name in ["absolute", "climbing", "by-link", "json", "protocol", "device"] {
            assert!(mount.path(name).is_dir(), "{name} stays visible");
        }
        assert!(!mount.path("passwd/active.raw").exists());
    });
}

#[test]
fn without_a_format_in_the_header_the_layer_above_is_broken_unless_probing_is_asked_for() {
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    store.scribble("base.qcow2", "qcow2", 8);
    store.raw("disk.raw", MIB, 9);
    for (name, backing) in [("on-qcow2", "base.qcow2"), ("on-raw", "disk.raw")] {
        store.overlay(&format!("{name}.qcow2"), backing, if name == "on-raw" { "raw" } else { "qcow2" }, "");
        store.scribble(&format!("{name}.qcow2"), "qcow2", 10);
        forget_backing_format(&Damage::to(store.path(format!("{name}.qcow2"))));
        assert_eq!(store.info(&format!("{name}.qcow2"), "qcow2").get("backing-filename-format"), None);
    }
    let mount = Mount::new(&store);
    for (name, backing) in [("on-qcow2", "base.qcow2"), ("on-raw", "disk.raw")] {
        let why = problem_of(&mount, name, &format!("{name}.qcow2"));
        assert!(why.contains(backing) && why.contains("rebase"), "the file and the remedy: {why}");
        assert!(fs::read(mount.path(name).join("active.raw")).is_err(), "{name}");
    }
    mount.umount();
    let mount = Mount::with(&store, "probe");
    for name in ["on-qcow2", "on-raw"] {
        assert_same(&mount.path(name).join("active.raw"), &store.oracle(format!("{name}.qcow2"), "qcow2"));
    }
    mount.umount();
}

#[test]
fn a_remedy_can_be_copied_into_a_shell_whatever_the_image_says() {
    let store = Store::new();
    store.raw("$(touch owned);`id` it's.raw", MIB, 9);
    store.overlay_unchecked("web.qcow2", "./$(touch owned);`id` it's.raw", "raw");
    forget_backing_format(&Damage::to(store.path("web.qcow2")));
    let mount = Mount::new(&store);
    let why = mount.text("web/info/problem.txt");
    let (_, remedy) = why.split_once(": qemu-img").expect("a remedy");
    let (command, _) = remedy.split_once(", or").expect("its end");
    tool("sh").args(["-c", &format!("qemu-img{command}")]).current_dir(store.root()).succeeds();
    eventually("the remedy helps", || !mount.path("web/info/problem.txt").exists());
    assert!(!store.path("owned").exists(), "the remedy ran the image's own words: {command}");
    assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
    mount.umount();
}

/// Turns the extension that names the backing file's format into an unknown one.
fn forget_backing_format(image: &Damage) {
    let mut at = u64::from(image.u32(header::HEADER_LEN));
    while image.u32(at) != 0xe279_2aca {
        assert_ne!(image.u32(at), 0, "no backing format");
        at += 8 + u64::from(image.u32(at + 4)).next_multiple_of(8);
    }
    image.put_u32(at, 0x7878_7878);
}

#[test]
// S2
fn an_img_with_qcow2_magic_is_a_problem_until_its_format_is_stated() {
    let store = Store::new();
    let make = |name: &str| {
        store.create(name, MIB, "");
        store.scribble(name, "qcow2", 11);
    };
    make("guest.img");
    make("named.img");
    store.raw("plain.img", MIB, 12);
    store.overlay("above.qcow2", "named.img", "raw", "");
    let mount = Mount::new(&store);
    problem_of(&mount, "guest", "guest.img");
    assert!(fs::read(mount.path("guest/active.raw")).is_err(), "nobody has said what guest.img is");
    assert!(!mount.text(".chainfs/problems.txt").contains("named.img"), "a child's header says raw");
    assert_chain(&store, &mount, "above", "above.qcow2", "qcow2");
    assert_chain(&store, &mount, "plain", "plain.img", "raw");
    mount.umount();
    for format in ["raw", "qcow2"] {
        let mount = Mount::with(&store, &format!("format=guest.img:{format}"));
        assert_same(&mount.path("guest/active.raw"), &store.oracle("guest.img", format));
        mount.umount();
    }
}

#[test]
fn encrypted_images_are_listed_with_the_reason_why_they_do_not_open() {
    let victims = Victims::new("");
    let store = &victims.store;
    for kind in ["luks", "aes"] {
        // A key that is quick to make is good enough here.
        let quick = if kind == "luks" { ",encrypt.iter-time=10" } else { "" };
        for name in [format!("{kind}.qcow2"), format!("below-{kind}.qcow2")] {
            let options = format!("encrypt.format={kind},encrypt.key-secret=s{quick}");
            let secret = [
                "create",
                "-q",
                "--object",
                "secret,id=s,data=x",
                "-f",
                "qcow2",
                "-o",
                &options,
                &name,
                "1M",
            ];
            store.img(secret);
        }
        store.overlay_unchecked(&format!("on-{kind}.qcow2"), &format!("below-{kind}.qcow2"), "qcow2");
    }
    victims.mounted(|mount| {
        for kind in ["luks", "aes"] {
            for view in [format!("{kind}/active.raw"), format!("on-{kind}/snapshots/below-{kind}.raw")] {
                assert!(mount.path(&view).exists(), "{view} is listed");
                assert_eq!(errno(File::open(mount.path(&view))), Some(Errno::OPNOTSUPP), "{view}");
            }
            for (chain, image) in
                [(kind.to_owned(), kind.to_owned()), (format!("on-{kind}"), format!("below-{kind}"))]
            {
                let why = problem_of(mount, &chain, &format!("{image}.qcow2"));
                assert!(why.to_lowercase().contains("encrypt"), "{why}");
            }
            assert!(File::open(mount.path(format!("on-{kind}/active.raw"))).is_err(), "what lies on {kind}");
        }
    });
}

#[test]
fn two_names_of_one_file_are_one_image_and_a_problem() {
    let victims = Victims::new("");
    let store = &victims.store;
    store.create("first.qcow2", MIB, "");
    store.scribble("first.qcow2", "qcow2", 13);
    fs::hard_link(store.path("first.qcow2"), store.path("second.qcow2")).expect("a hard link");
    victims.mounted(|mount| {
        let shown = mount.top();
        let both = shown.iter().filter(|n| ["first", "second"].contains(&n.as_str())).count();
        assert_eq!(both, 1, "{shown:?}");
        let why = mount.text(".chainfs/problems.txt");
        assert!(why.contains("first.qcow2") && why.contains("second.qcow2"), "{why}");
    });
}
