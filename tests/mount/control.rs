//! The control files of a mount, as the interface between users and the engine: an invalid command gets its
//! errno from write(2) and its sentence in `status`, and changes nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::io::Errno;
use support::active::{chain, errno, rw};
use support::command::{Control, give};
use support::*;

const VERBS: [&str; 9] =
    ["snapshot", "commit", "pull", "delete", "revert", "rebase", "clone", "resize", "cancel"];
/// Everything else of a `control` directory.
const OTHERS: [&str; 3] = ["plan", "status", "progress"];

/// A line of `status`.
fn status(mount: &Mount, key: &str) -> String {
    Control::of(mount, "web").status(key)
}

/// Names, modes, owners, times and bytes of everything beneath a directory, except chainfs' own files.
fn everything(dir: &Path) -> BTreeMap<PathBuf, (u32, u32, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(path) = left.pop() {
        if path.file_name().is_some_and(|name| name == ".chainfs") {
            continue;
        }
        let stat = fs::symlink_metadata(&path).expect("a stat");
        if stat.is_dir() {
            left.extend(
                fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()),
            );
        }
        // A directory's own time is that of its names, which are compared.
        let time = if stat.is_file() { stat.mtime_nsec() ^ stat.mtime() } else { 0 };
        let bytes = if stat.is_file() { fs::read(&path).expect("a file") } else { Vec::new() };
        found.insert(path, (stat.mode(), stat.uid(), time, bytes));
    }
    found
}

#[test]
fn each_chain_has_its_control_files_and_the_store_has_its_own() {
    let store = chain();
    fs::set_permissions(store.path("web.qcow2"), fs::Permissions::from_mode(0o644)).expect("a mode");
    let mount = Mount::new(&store);
    let mut names = [&VERBS[..], &OTHERS[..]].concat();
    names.sort_unstable();
    for chain in ["web", "plain"] {
        let control = Path::new(chain).join("control");
        assert_eq!(mount.names(&control), names);
        for name in &names {
            let stat = fs::metadata(mount.path(control.join(name))).expect("a control file");
            assert_eq!(
                (stat.mode() & 0o7777, stat.uid(), stat.is_file()),
                (0o600, store_owner(&store), true),
                "{name}"
            );
        }
    }
    assert_eq!(mount.names(".chainfs/control"), ["plan", "snapshot", "status"]);
    for verb in VERBS {
        let usage = mount.text(format!("web/control/{verb}"));
        assert!(usage.starts_with(verb) && usage.ends_with('\n'), "{usage}");
    }
    let keys: Vec<_> =
        mount.text("web/control/status").lines().map(|l| l.split(':').next().unwrap().to_string()).collect();
    assert_eq!(keys, ["number", "command", "state", "done", "total", "error"]);
    assert_eq!(status(&mount, "state"), "idle");
    // They accept commands only.
    for name in names {
        let file = mount.path("web/control").join(name);
        assert_eq!(errno(fs::remove_file(&file)), Some(Errno::PERM));
        assert_eq!(errno(fs::set_permissions(&file, fs::Permissions::from_mode(0o666))), Some(Errno::PERM));
    }
    assert_eq!(errno(File::create(mount.path("web/control/new"))), Some(Errno::PERM));
    for told in ["status", "progress"] {
        assert_eq!(
            errno(File::options().write(true).open(mount.path("web/control").join(told))),
            Some(Errno::ROFS)
        );
    }
    mount.umount();
}

fn store_owner(store: &Store) -> u32 {
    fs::metadata(store.root()).expect("the store").uid()
}

#[test]
fn a_single_image_has_its_control_files_in_the_root() {
    let store = chain();
    let mount = Mount::try_new(&store, &store.path("web.qcow2"), &store.beside("mnt"), "").expect("a mount");
    assert_eq!(mount.names("control").len(), VERBS.len() + OTHERS.len());
    assert_eq!(give(&mount.path("control/commit"), b"nonsense"), Some(Errno::INVAL));
    mount.umount();
}

#[test]
fn an_invalid_command_fails_its_write_and_changes_nothing() {
    let store = chain();
    let mount = Mount::new(&store);
    let before = everything(&store.root());
    let long = [b"commit ".as_slice(), &vec![b' '; 64 << 10]].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "commit",
            b"foo\n".into(),
            "unknown word \"foo\"; commit takes top= base= keep discard-internal discard-bitmaps",
        ),
        ("commit", b"top=a top=b".into(), "top= is given twice"),
        ("commit", b"top=".into(), "top= has no value"),
        ("commit", b"keep=yes".into(), "keep takes no value"),
        ("commit", b"keep\nkeep\n".into(), "one line"),
        ("commit", b"keep\n\n".into(), "one line"),
        ("commit", b"top=a\0".into(), "control characters"),
        ("commit", b"top=\"a".into(), "does not end"),
        ("commit", b"top=a\\".into(), "backslash"),
        ("commit", b"\xff\xfe".into(), "unknown word"),
        ("commit", b"chains=a,b".into(), "unknown word"),
        ("pull", b"base".into(), "base= has no value"),
        ("pull", b"into=../x".into(), "no view"),
        ("snapshot", b"\n".into(), "NAME is missing"),
        ("snapshot", b"a b".into(), "unknown word \"b\""),
        ("snapshot", b"a/b".into(), "not a path"),
        ("snapshot", b".chainfs".into(), "for chainfs itself"),
        ("snapshot", b"active".into(), "the active disk's"),
        ("snapshot", b"n internal file=x".into(), "no overlay"),
        ("snapshot", b"n description=\xff".into(), "not UTF-8"),
        ("snapshot", b"n chains=web,plain".into(), "chains= is for the store's own"),
        ("cancel", b"now".into(), "cancel takes no words"),
        ("commit", long[..=64 << 10].to_vec(), "at most 65536 bytes"),
        ("commit", long, "at most 65536 bytes"),
        ("commit", vec![b'a'; 1 << 20], "at most 65536 bytes"),
        ("commit", vec![b' '; (1 << 20) + 10], "at most 65536 bytes"),
    ];
    for (count, (verb, text, sentence)) in (1..).zip(&cases) {
        let shown = text[..text.len().min(40)].escape_ascii();
        let file = mount.path("web/control").join(verb);
        assert_eq!(give(&file, text), Some(Errno::INVAL), "{verb}: {shown}");
        let error = status(&mount, "error");
        assert!(error.contains(sentence), "{verb}: {shown}: {error}");
        assert_eq!(status(&mount, "number"), count.to_string(), "{verb}: {shown}");
        assert_eq!(status(&mount, "state"), "failed");
        let command = status(&mount, "command");
        assert!(command.starts_with(verb) && command.len() < 2000, "{command}");
        assert_eq!(mount.text("web/control/status").lines().count(), 6);
    }
    // An empty write is no command, and is not refused.
    assert_eq!(give(&mount.path("web/control/commit"), b""), None);
    assert_eq!(status(&mount, "number"), cases.len().to_string());
    assert_eq!(
        mount.text("plain/control/status").lines().next(),
        Some("number: 0"),
        "other chains know nothing of it"
    );
    assert!(
        everything(&store.root()) == before && mount::names_in(&store.path(".chainfs/intents")).is_empty(),
        "the store has changed"
    );
    mount.umount();
}

#[test]
fn a_command_is_one_write_at_any_offset() {
    let store = chain();
    let mount = Mount::new(&store);
    let file = mount.path("web/control/commit");
    let quoted = file.display();
    let given = |script: &str, count: u32| {
        let (code, _, err) = tool("bash").args(["-c", script]).outcome();
        assert!(code != 0 && err.contains("Invalid argument"), "{script}: {code} {err}");
        assert_eq!(status(&mount, "number"), count.to_string(), "{script}");
        assert!(status(&mount, "error").starts_with("unknown word \"foo\""), "{script}");
    };
    given(&format!("echo foo > '{quoted}'"), 1);
    given(&format!("echo foo >> '{quoted}'"), 2);
    given(&format!("printf foo | dd of='{quoted}' status=none"), 3);
    given(&format!("printf foo | dd of='{quoted}' bs=512 seek=7 status=none"), 4);
    given(&format!("printf foo | dd of='{quoted}' bs=512 seek=7 conv=notrunc oflag=append status=none"), 5);
    // Twice to one descriptor, at once and later.
    let open = rw(&file);
    for at in [0, 3, 1 << 40, 3] {
        assert_eq!(errno(open.write_at(b"foo", at)), Some(Errno::INVAL));
    }
    assert_eq!(status(&mount, "number"), "9");
    open.set_len(0).expect("nothing is cut");
    open.set_len(1 << 20).expect("nothing grows");
    assert_eq!(status(&mount, "number"), "9");
    // Text that follows an oversized write is its rest, and no command.
    assert_eq!(errno(open.write_at(&vec![b' '; 70_000], 0)), Some(Errno::INVAL));
    assert_eq!(errno(open.write_at(b"foo", 70_000)), Some(Errno::INVAL));
    assert_eq!(status(&mount, "number"), "10");
    assert!(status(&mount, "error").contains("at most 65536 bytes"));
    drop(open);
    mount.umount();
}

#[test]
fn a_plan_is_read_from_its_own_handle_or_the_last_one_elsewhere() {
    let store = chain();
    let mount = Mount::new(&store);
    let file = mount.path("web/control/plan");
    let before = everything(&store.root());
    assert!(fs::read_to_string(&file).expect("a usage").starts_with("plan: a whole command"));
    // Malformed words: the sentence is in the plan, and the status is unchanged.
    let mut mine = rw(&file);
    assert_eq!(errno(mine.write(b"commit mine")), Some(Errno::INVAL));
    let mut text = String::new();
    mine.read_to_string(&mut text).expect("a plan");
    assert!(text.starts_with("refused: unknown word \"mine\""), "{text}");
    assert_eq!(give(&file, b"frob"), Some(Errno::INVAL));
    assert!(fs::read_to_string(&file).expect("a plan").starts_with("refused: unknown verb \"frob\""));
    mine.seek(SeekFrom::Start(0)).expect("the beginning");
    text.clear();
    mine.read_to_string(&mut text).expect("a plan");
    assert!(text.starts_with("refused: unknown word \"mine\""), "{text}");
    // A missing view: a plan all the same, with the refusal.
    let mut theirs = rw(&file);
    let written = theirs.write(b"commit top=nosuch\n");
    assert!(matches!(errno(written), None | Some(Errno::NOENT)));
    text.clear();
    theirs.read_to_string(&mut text).expect("a plan");
    assert!(text.lines().any(|line| line.starts_with("refused: ") && line.contains("nosuch")), "{text}");
    assert_eq!(fs::read_to_string(&file).expect("the last plan"), text);
    assert_eq!(status(&mount, "number"), "0");
    assert!(
        everything(&store.root()) == before && mount::names_in(&store.path(".chainfs/intents")).is_empty(),
        "the store has changed"
    );
    let several = mount.path(".chainfs/control/plan");
    for (words, sentence) in
        [("snapshot n", "chains= is missing"), ("commit", "in its own control directory")]
    {
        assert_eq!(give(&several, words.as_bytes()), Some(Errno::INVAL));
        assert!(fs::read_to_string(&several).expect("a plan").contains(sentence));
    }
    drop((mine, theirs));
    mount.umount();
}

#[test]
fn the_store_s_own_control_files_name_the_chains() {
    let store = chain();
    let mount = Mount::new(&store);
    let file = mount.path(".chainfs/control/snapshot");
    for words in ["n", "n chains=", "n chains=web,web", "n chains=../web", "n chains=/web", "n chains=web/"] {
        assert_eq!(give(&file, words.as_bytes()), Some(Errno::INVAL), "{words}");
        assert!(mount.text(".chainfs/control/status").contains("error: "), "{words}");
    }
    assert_eq!(status(&mount, "number"), "0", "no chain has heard of it");
    mount.umount();
}

#[test]
fn a_mount_that_is_read_only_takes_no_commands() {
    let store = chain();
    let mount = Mount::with(&store, "ro");
    for name in ["commit", "plan"] {
        let opened = File::options().write(true).open(mount.path("web/control").join(name));
        assert_eq!(errno(opened), Some(Errno::ROFS));
    }
    assert_eq!(status(&mount, "state"), "idle");
    mount.umount();
}

#[test]
fn progress_of_an_idle_chain_ends_at_once() {
    let store = chain();
    let mount = Mount::new(&store);
    assert_eq!(mount.text("web/control/progress"), "idle\n");
    give(&mount.path("web/control/commit"), b"foo");
    let last = mount.text("web/control/progress");
    assert!(last.starts_with("failed: unknown word \"foo\"") && last.lines().count() == 1, "{last}");
    tool("dd")
        .arg(format!("if={}", mount.path("web/control/progress").display()))
        .args(["bs=1", "status=none"])
        .succeeds();
    for dir in ["web/control", ".chainfs"] {
        let dir = mount.path(dir);
        tool("grep").args(["-rs", "unknown word"]).arg(&dir).outcome();
        tool("tar")
            .arg("-cf")
            .arg(store.beside("all.tar"))
            .arg("-C")
            .arg(&dir)
            .arg(".")
            .stdin(Stdio::null())
            .succeeds();
        tool("cp").arg("-r").arg(&dir).arg(store.beside("copy")).succeeds();
        fs::remove_dir_all(store.beside("copy")).expect("a copy");
    }
    mount.umount();
}

#[test]
fn a_mapping_of_a_control_file_gives_no_command() {
    let store = chain();
    let mount = Mount::new(&store);
    let script = "import mmap, os, sys\n\
        fd = os.open(sys.argv[1], os.O_RDWR)\n\
        try:\n    m = mmap.mmap(fd, 4096)\n    m[:6] = b'commit'\n    m.flush()\n    m.close()\n\
        except (OSError, ValueError): pass\n";
    let (_, _, err) = tool("python3").args(["-c", script]).arg(mount.path("web/control/commit")).outcome();
    assert!(err.is_empty(), "{err}");
    assert_eq!(status(&mount, "number"), "0");
    mount.umount();
}

/// The chainfs binary, without a user's configuration.
fn chainfs(store: &Store, args: &[&str]) -> (i32, String, String) {
    tool(chainfs_binary())
        .args(args)
        .current_dir(store.root())
        .env("XDG_CONFIG_HOME", store.beside("config"))
        .outcome()
}

#[test]
fn the_command_line_says_what_the_control_files_say() {
    let store = chain();
    let mount = Mount::new(&store);
    let before = everything(&store.root());
    let (root, web) = (mount.dir().to_str().expect("UTF-8"), mount.path("web"));
    let web = web.to_str().expect("UTF-8");
    for (args, code, sentence) in [
        (&["commit", root][..], 2, "takes no commands; name a chain, as in "),
        (&["commit", &format!("{web}/active.raw")], 2, "takes no commands; name its chain, "),
        (&["commit", &format!("{root}/nosuch")], 2, "there is no chain "),
        (&["snapshot", web, "n", "--chains", "web,plain"], 2, "the mount itself"),
        (&["snapshot", web, "a/b"], 2, "not a path"),
        (&["snapshot", web, "internal"], 2, "taken for another word"),
        (&["commit", web, "--store", "."], 2, "for unmounted images"),
        (&["commit", web, "--top", "nosuch"], 1, ""),
        (&["commit", "-p", web, "--top", "nosuch"], 1, ""),
    ] {
        let (got, out, err) = chainfs(&store, args);
        assert_eq!(got, code, "{args:?}: {out}{err}");
        assert!(
            err.starts_with("chainfs: ") && err.contains(sentence) && err.lines().count() == 1,
            "{args:?}: {err}"
        );
    }
    // A refusal is reported in the words of the status.
    let (_, _, err) = chainfs(&store, &["commit", web, "--top", "nosuch"]);
    assert_eq!(err, format!("chainfs: {}\n", status(&mount, "error")));
    assert_eq!(status(&mount, "command"), "commit top=nosuch");
    let number = status(&mount, "number");
    let (code, out, err) = chainfs(&store, &["commit", web, "--top", "nosuch", "--dry-run"]);
    assert!(code == 1 && out.contains("refused: ") && err.is_empty(), "{code} {out}{err}");
    assert_eq!(mount.text("web/control/plan"), out);
    assert_eq!(status(&mount, "number"), number, "a plan is no command");
    assert!(everything(&store.root()) == before, "the store has changed");
    mount.umount();
    let mount = Mount::with(&store, "ro");
    let (code, _, err) = chainfs(&store, &["commit", web, "--top", "nosuch"]);
    assert!(code == 1 && err.contains("Read-only file system"), "{code} {err}");
    let (code, out, _) = chainfs(&store, &["commit", web, "--top", "nosuch", "--dry-run"]);
    assert!(code == 1 && out.contains("refused: "), "{code} {out}");
    assert!(everything(&store.root()) == before, "the store has changed");
    mount.umount();
}

#[test]
fn images_of_stores_that_are_not_mounted_are_named_by_their_file() {
    let store = chain();
    let before = everything(&store.root());
    let root = store.root();
    let root = root.to_str().expect("UTF-8");
    let (code, out, err) =
        chainfs(&store, &["commit", "--dry-run", "--top", "nosuch", "--store", root, "web.qcow2"]);
    assert!(code == 1 && out.contains("refused: ") && out.contains("nosuch"), "{code} {out}{err}");
    assert!(!store.path(".chainfs").exists(), "a plan leaves something behind");
    for (args, code, sentence) in [
        (&["commit", "nosuch.qcow2"][..], 1, "No such file"),
        (&["commit", root], 2, "name one of its images"),
        (&["commit", "--store", root, "base.raw"], 2, "base.raw has overlays"),
        (&["commit", "--store", "../config", "web.qcow2"], 1, "not an image of the store"),
        (&["commit", "--detach", "web.qcow2"], 2, "leave out --detach"),
        (&["snapshot", "--chains", "web", "web.qcow2", "n"], 2, "chains= is for the store's own"),
        (&["commit", "-o", "nonsense", "web.qcow2"], 2, "nonsense"),
        (&["commit", "--top", "nosuch", "--store", root, "web.qcow2"], 1, ""),
        (&["commit", "--top", "nosuch", "web.qcow2"], 1, ""),
    ] {
        let (got, out, err) = chainfs(&store, args);
        assert_eq!(got, code, "{args:?}: {out}{err}");
        assert!(err.starts_with("chainfs: ") && err.contains(sentence), "{args:?}: {err}");
    }
    assert!(everything(&store.root()) == before, "the store has changed");
}
