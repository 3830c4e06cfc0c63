//! The commands that need no mount, compared with qemu-img.

use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::*;

use crate::chainfs;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Images of many kinds, each with some content.
fn assorted() -> (Store, Vec<&'static str>) {
    let store = Store::new();
    let kinds = [
        ("plain.qcow2", ""),
        ("v2.qcow2", "compat=0.10"),
        ("small.qcow2", "cluster_size=512"),
        ("large.qcow2", "cluster_size=2M"),
        ("sub.qcow2", "extended_l2=on,cluster_size=32k"),
        ("zstd.qcow2", "compression_type=zstd,refcount_bits=1"),
        ("lazy.qcow2", "lazy_refcounts=on,refcount_bits=64"),
        ("data.qcow2", "data_file=external.dat"),
        ("rawdata.qcow2", "data_file=external2.dat,data_file_raw=on"),
        ("full.qcow2", "preallocation=falloc"),
    ];
    for (seed, (name, options)) in (40..).zip(kinds) {
        store.create(name, 3 * MIB, options);
        store.scribble(name, "qcow2", seed);
    }
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "cluster_size=4k");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.img(["bitmap", "--add", "mid.qcow2", "daily"]);
    store.img(["bitmap", "--add", "--disable", "-g", "32k", "mid.qcow2", "weekly"]);
    store.img(["snapshot", "-c", "before", "mid.qcow2"]);
    store.overlay_sized("top.qcow2", "./mid.qcow2", "qcow2", 3 * MIB);
    store.io("top.qcow2", "qcow2", [store.write(&mut Rng::new(3), 70_000, 9000)]);
    let names = kinds.iter().map(|(name, _)| *name).chain(["base.raw", "mid.qcow2", "top.qcow2"]);
    (store, names.collect())
}

#[test]
fn info_says_what_qemu_img_says() {
    let (store, names) = assorted();
    for name in names {
        let format = if name == "base.raw" { "raw" } else { "qcow2" };
        let theirs = json(&store.img(["info", "--output=json", "-f", format, name]));
        let ours = json(&chainfs(&store, &["info", "--output=json", name]).succeeds());
        assert_eq!(ours, theirs, "{name}");
        let theirs = json(&store.img(["info", "--output=json", "--backing-chain", "-f", format, name]));
        let ours = json(&chainfs(&store, &["info", "--json", "--backing-chain", name]).succeeds());
        assert_eq!(ours, theirs, "the chain of {name}");
    }
}

#[test]
fn info_for_people_has_qemu_imgs_lines() {
    let (store, names) = assorted();
    for name in names {
        let format = if name == "base.raw" { "raw" } else { "qcow2" };
        let theirs = store.img(["info", "-f", format, name]);
        let ours = chainfs(&store, &["info", name]).succeeds();
        // qemu-img repeats the lower file's details at the end.
        let expected = theirs.split("Child node").next().unwrap_or_default();
        assert_eq!(ours, expected, "{name}");
    }
}

#[test]
fn map_says_what_qemu_img_says() {
    let (store, names) = assorted();
    for name in names.into_iter().filter(|name| *name != "sub.qcow2") {
        let format = if name == "base.raw" { "raw" } else { "qcow2" };
        let theirs = store.img(["map", "--output=json", "-f", format, name]);
        let ours = chainfs(&store, &["map", "--output=json", name]).succeeds();
        assert_eq!(ours, theirs, "{name}");
        let theirs = store.img(["map", "-f", format, name]);
        let ours = chainfs(&store, &["map", name]).succeeds();
        assert_eq!(ours, theirs, "{name}");
    }
}

/// Of a cluster whose subclusters are not all in use, QEMU gives the place of the unused ones, too.
#[test]
fn map_of_subclusters_matches_except_for_offsets_of_holes() {
    let (store, _) = assorted();
    let runs = |text: &str| {
        let mut runs: Vec<(u64, Value)> = Vec::new();
        for mut entry in json(text).as_array().expect("a list").clone() {
            let object = entry.as_object_mut().expect("an object");
            let (start, len) =
                (object["start"].as_u64().expect("a number"), object["length"].as_u64().expect("one"));
            for key in ["start", "length"] {
                object.remove(key);
            }
            match object.remove("offset") {
                // By the difference, so that what belongs together stays so.
                Some(offset) if object["data"] == true => {
                    let shift = offset.as_i64().expect("a place") - start.cast_signed();
                    object.insert("shift".into(), shift.into());
                }
                _ => {}
            }
            match runs.last_mut() {
                Some((end, last)) if *last == entry => *end = start + len,
                _ => runs.push((start + len, entry)),
            }
        }
        runs
    };
    let theirs = store.img(["map", "--output=json", "sub.qcow2"]);
    let ours = chainfs(&store, &["map", "--output=json", "sub.qcow2"]).succeeds();
    assert_eq!(runs(&ours), runs(&theirs));
}

#[test]
fn compressed_clusters_are_named_where_qemu_img_gives_up() {
    let store = Store::new();
    store.create("c.qcow2", MIB, "");
    store.io("c.qcow2", "qcow2", ["write -q -c -P 7 0 64k"]);
    let theirs = store.img(["map", "--output=json", "c.qcow2"]);
    assert_eq!(chainfs(&store, &["map", "--json", "c.qcow2"]).succeeds(), theirs);
    let ours = chainfs(&store, &["map", "c.qcow2"]).succeeds();
    assert!(ours.lines().nth(1).is_some_and(|line| line.contains("compressed")), "{ours}");
}

#[test]
fn compare_answers_as_qemu_img_does() {
    let (store, names) = assorted();
    store.img(["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "same.raw"]);
    store.img(["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "longer.raw"]);
    fs::File::options()
        .write(true)
        .open(store.path("longer.raw"))
        .and_then(|f| f.set_len(9 * MIB))
        .expect("room");
    fs::copy(store.path("longer.raw"), store.path("tail.raw")).expect("a copy");
    store.io("tail.raw", "raw", ["write -q -P 5 8193k 1k"]);
    store.create("zero.qcow2", 3 * MIB, "");
    store.io("zero.qcow2", "qcow2", ["write -q -z 1M 128k", "write -q -P 0 2M 64k"]);
    store.create("empty.qcow2", 3 * MIB, "");
    let format =
        |name: &str| if Path::new(name).extension() == Some(OsStr::new("raw")) { "raw" } else { "qcow2" };
    let mut others = vec!["same.raw", "longer.raw", "tail.raw", "zero.qcow2", "empty.qcow2"];
    others.extend(names);
    let mut codes = [0; 2];
    for (a, b) in others.iter().flat_map(|a| others.iter().map(move |b| (*a, *b))) {
        let mut qemu = tool("qemu-img");
        qemu.args(["compare", "-f", format(a), "-F", format(b), a, b]).current_dir(store.root());
        let (code, theirs, _) = qemu.outcome();
        let (ours_code, ours, err) = chainfs(&store, &["compare", a, b]).outcome();
        assert_eq!((ours_code, ours), (code, theirs), "{a} {b}: {err}");
        codes[usize::from(code == 1)] += 1;
    }
    assert!(codes[0] > 20 && codes[1] > 20, "{codes:?}");
}

#[test]
fn strict_comparison_sees_sizes_and_holes() {
    let store = Store::new();
    store.create("a.qcow2", MIB, "");
    store.create("b.qcow2", MIB, "");
    store.create("c.qcow2", 2 * MIB, "");
    store.io("b.qcow2", "qcow2", ["write -q -z 64k 64k"]);
    let run = |words: &[&str]| {
        let (code, out, _) = chainfs(&store, &[&["compare"], words].concat()).outcome();
        (code, out)
    };
    assert_eq!(run(&["a.qcow2", "b.qcow2"]), (0, "Images are identical.\n".to_owned()));
    let status = "Strict mode: Offset 65536 block status mismatch!\n";
    assert_eq!(run(&["-s", "a.qcow2", "b.qcow2"]), (1, status.to_owned()));
    assert_eq!(run(&["-s", "a.qcow2", "c.qcow2"]), (1, "Strict mode: Image size mismatch!\n".to_owned()));
    assert_eq!(run(&["-s", "a.qcow2", "a.qcow2"]).0, 0);
    assert_eq!(run(&["-q", "a.qcow2", "c.qcow2"]), (0, String::new()));
    let answer = json(&run(&["--json", "-s", "a.qcow2", "b.qcow2"]).1);
    let expected = r#"{"identical": false, "size-mismatch": false, "difference": "status", "offset": 65536}"#;
    assert_eq!(answer, json(expected));
    assert_eq!(run(&["a.qcow2", "absent.qcow2"]).0, 2);
    assert_eq!(run(&["a.qcow2", "."]).0, 2);
    assert_eq!(run(&["a.qcow2"]).0, 2);
}

#[test]
fn internal_snapshots_are_disks_of_their_own() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    store.io("web.qcow2", "qcow2", [store.write(&mut Rng::new(1), 0, 100_000)]);
    store.img(["snapshot", "-c", "a@b", "web.qcow2"]);
    store.io("web.qcow2", "qcow2", [store.write(&mut Rng::new(2), 0, 100_000)]);
    let oracle =
        store.try_oracle(Path::new("web.qcow2"), "qcow2", Some("1")).expect("QEMU reads the snapshot");
    let oracle = oracle.to_str().expect("text");
    for name in ["web.qcow2@a@b", "web.qcow2@1"] {
        assert_eq!(chainfs(&store, &["compare", name, oracle, "-F", "raw"]).outcome().0, 0, "{name}");
    }
    assert_eq!(chainfs(&store, &["compare", "web.qcow2", oracle, "-F", "raw"]).outcome().0, 1);
    let (code, _, err) = chainfs(&store, &["map", "web.qcow2@c"]).outcome();
    assert!(
        code == 1 && err.contains("web.qcow2 has no view c; there is active, active@a@b"),
        "{code} {err}"
    );
    // A file of exactly that name is used.
    store.create("web.qcow2@1", 2 * MIB, "");
    let found = json(&chainfs(&store, &["info", "--json", "web.qcow2@1"]).succeeds());
    assert_eq!(found["virtual-size"], 2 * MIB);
}

#[test]
fn a_store_is_checked_as_a_whole_and_the_worst_result_counts() {
    let (store, _) = assorted();
    let code = |words: &[&str]| chainfs(&store, words).outcome().0;
    let (have, out, err) = chainfs(&store, &["check", "."]).outcome();
    assert_eq!(have, 0, "{out}{err}");
    assert_eq!(out.matches("No errors were found").count(), 12, "{out}");
    assert_eq!(code(&["check", "base.raw"]), 63);
    let leaky = Damage::to(store.path("plain.qcow2"));
    let entry = leaky.l2_entry_at(0);
    leaky.put_u64(entry, 0);
    let (first, theirs) = (code(&["check", "plain.qcow2"]), tool("qemu-img"));
    let mut theirs = theirs;
    let theirs = theirs.args(["check", "-q"]).arg(store.path("plain.qcow2")).outcome().0;
    assert_eq!(first, theirs);
    assert_eq!(code(&["check", "."]), first);
    store.put("nonsense.qcow2", b"no image");
    assert_eq!(code(&["check", "."]), 1);
    assert_eq!(code(&["check", "nonsense.qcow2"]), 1);
    assert_eq!(code(&["check", "--nonsense"]), 1);
    let ours = json(&chainfs(&store, &["check", "--json", "lazy.qcow2"]).succeeds());
    assert_eq!(ours, json(&store.img(["check", "--output=json", "lazy.qcow2"])));
}

#[test]
fn a_repair_reports_damage_repairs_it_and_checks_again() {
    let store = Store::new();
    let damage = || {
        store.create("web.qcow2", MIB, "");
        store.io("web.qcow2", "qcow2", [store.write(&mut Rng::new(1), 0, MIB)]);
        let web = Damage::to(store.path("web.qcow2"));
        // One more cluster in use than is counted, one counted that is not in use.
        let entry = web.l2_entry_at(65_536);
        web.put_u64(entry, web.u64(entry) + 65_536);
        fs::read(store.path("web.qcow2")).unwrap()
    };
    let before = damage();
    let (code, out, err) = chainfs(&store, &["check", "--repair", "leaks", "web.qcow2"]).outcome();
    assert_eq!(code, 2, "{out}{err}");
    let told = out.find("1 leaked clusters were found").expect("what is wrong");
    let mended =
        out.find("repaired:\n\n    1 leaked clusters\n    0 corruptions\n").expect("what was mended");
    let again = out.find("Double checking the fixed image now...\n").expect("another look");
    assert!(told < mended && mended < again && out[again..].contains("1 errors were found"), "{out}");
    let mut theirs = tool("qemu-img");
    assert_eq!(theirs.args(["check", "-q", "-r", "all"]).arg(store.path("web.qcow2")).outcome().0, 0);

    assert!(damage() == before);
    let (code, out, err) = chainfs(&store, &["check", "-r", "all", "--output=json", "web.qcow2"]).outcome();
    assert_eq!(code, 0, "{out}{err}");
    let found = json(&out);
    assert_eq!((&found["leaks-fixed"], &found["corruptions-fixed"]), (&Value::from(1), &Value::from(3)));
    assert_eq!(
        json(&store.img(["check", "--output=json", "web.qcow2"]))["allocated-clusters"],
        found["allocated-clusters"]
    );
    let text = chainfs(&store, &["check", "-r", "all", "web.qcow2"]).succeeds();
    assert_eq!(text.matches("No errors were found").count(), 1, "{text}");

    // qemu-img's words, and its refusals.
    assert_eq!(chainfs(&store, &["check", "-r", "nonsense", "web.qcow2"]).outcome().0, 1);
    assert_eq!(chainfs(&store, &["check", "-U", "-r", "all", "web.qcow2"]).outcome().0, 1);
    store.raw("base.raw", MIB, 1);
    assert_eq!(chainfs(&store, &["check", "-r", "all", "base.raw"]).outcome().0, 63);
}

#[test]
fn an_image_that_is_in_use_is_not_repaired() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.arg("-r").arg(store.path("web.qcow2"));
    let mut reader = qemu_io.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-io");
    // Its prompt: before that, it may find the image held by us.
    let mut prompt = [0; "qemu-io>".len()];
    reader.stdout.as_mut().expect("a pipe").read_exact(&mut prompt).expect("a prompt");
    let (code, _, err) = chainfs(&store, &["check", "-r", "all", "web.qcow2"]).outcome();
    assert!(code == 1 && err.contains("web.qcow2") && err.contains("qemu-io"), "{code}: {err}");
    drop(reader.stdin.take());
    reader.wait().expect("qemu-io ends");
    chainfs(&store, &["check", "-r", "all", "web.qcow2"]).succeeds();
}

#[test]
fn qemu_img_finds_created_images_clean() {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.dir("sub");
    let words = ["create", "new.qcow2", "10M", "-o", "cluster_size=4k,compat=1.1"];
    let ours = chainfs(&store, &words).succeeds();
    store.img(["check", "new.qcow2"]);
    fs::remove_file(store.path("new.qcow2")).expect("it was made");
    let theirs = store.img(["create", "-f", "qcow2", "-o", "cluster_size=4k,compat=1.1", "new.qcow2", "10M"]);
    assert_eq!(ours, theirs.replace(" compat=1.1", ""));
    // A backing file is resolved relative to the new image.
    chainfs(&store, &["create", "-q", "-b", "../base.raw", "-F", "raw", "sub/web.qcow2"]).succeeds();
    store.img(["check", "sub/web.qcow2"]);
    store.img(["compare", "-F", "raw", "sub/web.qcow2", "base.raw"]);
    for (words, code) in [
        (&["new.qcow2", "1M"][..], 2),
        (&["x.qcow2", "-b", "absent.raw", "-F", "raw"], 1),
        (&["x.qcow2", "1M", "-b", "base.raw", "-F", "qcow2"], 1),
        (&["x.qcow2", "1M", "-o", "cluster_size=3k"], 2),
        (&["x.qcow2", "1M", "-o", "preallocation=full"], 2),
        (&["x.qcow2", "1M", "-b", "base.raw"], 2),
        (&["x.qcow2"], 2),
    ] {
        let (have, _, err) = chainfs(&store, &[&["create"], words].concat()).outcome();
        assert_eq!(have, code, "{words:?}: {err}");
        assert!(!store.path("x.qcow2").exists());
    }
}

#[test]
fn the_tree_shows_the_store_or_the_part_that_an_image_belongs_to() {
    let (store, _) = assorted();
    let tree = |words: &[&str]| chainfs(&store, &[&["tree"], words].concat()).succeeds();
    let whole = tree(&["."]);
    assert_eq!(whole.split("\n\n").count(), 11, "{whole}");
    let part = tree(&["--ascii", "mid.qcow2"]);
    assert!(
        part.starts_with("mid - 2 MiB virtual") && part.contains("\n* base ") && part.is_ascii(),
        "{part}"
    );
    let value = json(&tree(&["--output", "json", "."]));
    assert_eq!(value["trees"].as_array().map(Vec::len), Some(11));
    assert!(tree(&["--output", "svg", "."]).starts_with('<'));
    assert!(tree(&["--output", "dot", "."]).starts_with("digraph"));
    let empty = store.beside("empty");
    fs::create_dir(&empty).expect("a directory");
    let (code, out, err) = chainfs(&store, &["tree"]).arg(&empty).outcome();
    assert!(code == 0 && out.is_empty() && err.contains("holds no disk images"), "{code} {out} {err}");
}

#[test]
fn hostile_names_stay_on_their_line() {
    let store = Store::new();
    let name = OsStr::from_bytes(b"a\n\x1b[2J\xff\xe2\x80\xae.qcow2");
    store.create("plain.qcow2", MIB, "");
    store.img(["snapshot", "-c", "x\ny\u{1b}[31m", "plain.qcow2"]);
    fs::rename(store.path("plain.qcow2"), store.path(name)).expect("a rename");
    store.overlay_unchecked("wants.qcow2", "no\nsuch\u{1b}[2J", "raw");
    for verb in ["tree", "info", "check"] {
        let (_, out, err) = chainfs(&store, &[verb, "."]).outcome();
        let is_harmless = |c: char| c == '\n' || (!c.is_control() && c != '\u{202e}');
        assert!((out.clone() + &err).chars().all(is_harmless), "{verb}\n{out:?}\n{err:?}");
        assert!(out.contains("a\\x0a\\x1b[2J") || verb == "check", "{verb}\n{out}");
    }
    for verb in ["tree", "info", "map", "check"] {
        assert_eq!(chainfs(&store, &[verb]).arg(name).outcome().0, 0, "{verb}");
    }
    let (code, _, err) = chainfs(&store, &["map", "wants.qcow2"]).outcome();
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    assert!(err.contains("is missing"), "{err}");
}

#[test]
fn options_state_formats_that_names_and_headers_lack() {
    let store = Store::new();
    store.create("guest.img", MIB, "");
    let (code, _, err) = chainfs(&store, &["map", "guest.img"]).outcome();
    assert!(code == 1 && err.contains("raw by its name"), "{code} {err}");
    for words in [&["-f", "qcow2"][..], &["-o", "format=guest.img:qcow2"]] {
        let found = json(&chainfs(&store, &[&["info", "--json", "guest.img"], words].concat()).succeeds());
        assert_eq!((&found["format"], &found["virtual-size"]), (&"qcow2".into(), &MIB.into()));
    }
    let found = json(&chainfs(&store, &["info", "--json", "-f", "raw", "guest.img"]).succeeds());
    assert_eq!(found["format"], "raw");
    let (code, _, err) = chainfs(&store, &["info", "-o", "prob", "guest.img"]).outcome();
    assert!(code == 2 && err.contains("did you mean 'probe'?"), "{code} {err}");
    fs::create_dir(store.beside("config/chainfs")).expect("a directory");
    fs::write(store.beside("config/chainfs/config.toml"), "format = \"*.img:qcow2\"").expect("a file");
    assert_eq!(chainfs(&store, &["map", "guest.img"]).outcome().0, 0);
    // A link that leads out of its directory is followed because the user named it.
    store.dir("links");
    std::os::unix::fs::symlink("../guest.img", store.path("links/here.img")).expect("a link");
    assert_eq!(chainfs(&store, &["map", "links/here.img"]).outcome().0, 0);
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let (store, _) = assorted();
    for words in
        [&["tree", "--full", "."][..], &["info", "."], &["map", "mid.qcow2"], &["completions", "bash"]]
    {
        let mut child = Command::new(chainfs_binary())
            .args(words)
            .current_dir(store.root())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("our binary runs");
        drop(child.stdout.take());
        let status = child.wait().expect("it ends");
        let mut err = String::new();
        child.stderr.take().expect("it is piped").read_to_string(&mut err).expect("text");
        assert!(status.success() && !err.contains("panic"), "{words:?}: {status} {err}");
    }
}

#[test]
fn pages_and_completions_are_written() {
    let store = Store::new();
    let dir = store.dir("man1");
    chainfs(&store, &["man", "man1"]).succeeds();
    assert!(dir.join("chainfs-compare.1").exists());
    assert!(chainfs(&store, &["completions", "elvish"]).succeeds().contains("backing-chain"));
    assert_eq!(chainfs(&store, &["man", "absent"]).outcome().0, 1);
}
