//! `chainfs log` and `find` on the example store: against debugfs on what QEMU reads, and `diff -u`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::*;

/// The views of web01, oldest first: the image that QEMU reads it from, and the internal snapshot in that.
const VIEWS: [(&str, &str, Option<&str>); 6] = [
    ("base", "base.raw", None),
    ("installed", "installed.qcow2", None),
    ("monday", "monday.qcow2", None),
    ("tuesday", "tuesday.qcow2", None),
    ("active@before-upgrade", "web01.qcow2", Some("before-upgrade")),
    ("active", "web01.qcow2", None),
];
const PARTITION: u64 = MIB;

/// The store that the README shows.
struct Example(Store);

impl Example {
    fn new() -> Self {
        let store = Store::new();
        let script = project().join("examples/store.sh");
        tool(script.to_str().expect("text")).arg(store.root()).succeeds();
        Self(store)
    }

    fn chainfs(&self, args: &[&str]) -> Command {
        let mut command = tool(chainfs_binary());
        command.args(args).current_dir(self.0.root()).env("XDG_CONFIG_HOME", self.0.beside("config"));
        command
    }

    fn json(&self, args: &[&str]) -> Value {
        let out = self.chainfs(&[args, &["--json"]].concat()).succeeds();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
    }

    /// The first partition of a view, as QEMU reads it.
    fn partition(&self, (view, image, snapshot): (&str, &str, Option<&str>)) -> PathBuf {
        let (disk, partition) = (self.0.beside("disk"), self.0.beside(format!("part-{view}")));
        let format = if image == "base.raw" { "raw" } else { "qcow2" };
        let mut convert = tool("qemu-img");
        convert.args(["convert", "-f", format, "-O", "raw"]).current_dir(self.0.root());
        convert.args(snapshot.iter().flat_map(|name| ["-l", name])).arg(image).arg(&disk).succeeds();
        let bytes = fs::read(&disk).expect("a disk");
        fs::write(&partition, &bytes[usize::try_from(PARTITION).expect("small")..]).expect("room");
        partition
    }
}

fn debugfs(partition: &Path, request: &str) -> String {
    tool("debugfs").args(["-R", request]).arg(partition).succeeds()
}

/// Every file of a partition: path, size and time of last change.
fn files(partition: &Path, directory: &str, found: &mut BTreeSet<(String, u64)>) {
    // /INODE/MODE/UID/GID/NAME/SIZE/
    for line in debugfs(partition, &format!("ls -p {directory}")).lines() {
        let words: Vec<&str> = line.split('/').collect();
        let [_, inode, mode, _, _, name, size, _] = words.as_slice() else { continue };
        if [".", ".."].contains(name) || *inode == "0" {
            continue;
        }
        let path = format!("{}/{name}", directory.trim_end_matches('/'));
        if mode.starts_with("04") {
            files(partition, &path, found);
        } else {
            found.insert((path, size.parse().unwrap_or(0)));
        }
    }
}

#[test]
fn find_lists_every_file_of_every_view() {
    let example = Example::new();
    let found = example.json(&["find", "-t", "f", "*", "web01.qcow2"]);
    let found = found.as_array().expect("a list");
    assert!(found.len() > 10, "{found:?}");
    for view in VIEWS {
        let mut theirs = BTreeSet::new();
        files(&example.partition(view), "/", &mut theirs);
        let has_view =
            |hit: &&Value| hit["views"].as_array().expect("views").iter().any(|name| name == view.0);
        let ours: BTreeSet<(String, u64)> = found
            .iter()
            .filter(has_view)
            .map(|hit| {
                let path = hit["path"].as_str().expect("a path").strip_prefix("/p1").expect("its volume");
                (path.to_owned(), hit["size"].as_u64().expect("a size"))
            })
            .collect();
        assert_eq!(ours, theirs, "{view:?}");
    }
    // Equal runs are folded: the same runs as `versions` has.
    for path in ["/p1/etc/fstab", "/p1/etc/motd", "/p1/etc/passwd"] {
        let versions = example.json(&["versions", &format!("tuesday.qcow2:{path}"), "--store", "."]);
        let count = |views: &Value| views.as_array().expect("views").len();
        let of_find: Vec<usize> =
            found.iter().filter(|hit| hit["path"] == path).map(|hit| count(&hit["views"])).collect();
        let versions = versions["versions"].as_array().expect("versions");
        let of_web01 = |version: &Value| {
            let views = version["views"].as_array().expect("views").iter();
            views.filter(|name| !name.as_str().is_some_and(|name| name.starts_with("try-php9"))).count()
        };
        let of_versions: Vec<usize> = versions.iter().map(of_web01).filter(|count| *count > 0).collect();
        assert_eq!(of_find.iter().sum::<usize>(), of_versions.iter().sum::<usize>(), "{path}");
        assert_eq!(of_find, of_versions, "{path}");
    }
}

#[test]
fn find_takes_patterns_as_find_does_and_prints_what_cat_takes() {
    let example = Example::new();
    let lines = |args: &[&str]| example.chainfs(&[&["find"], args].concat()).succeeds();
    assert_eq!(lines(&["never", "."]), "");
    assert_eq!(example.chainfs(&["find", "--json", "never", "."]).succeeds(), "[]\n");
    let motds = lines(&["motd", "."]);
    assert_eq!(motds.lines().count(), 7, "{motds}");
    assert!(motds.contains("\nweb01  monday  /p1/etc/motd  20  "), "{motds}");
    assert!(
        motds.starts_with("try-php9  active  ") && motds.contains("\nweb01  base  "),
        "as drawn: {motds}"
    );
    assert_eq!(lines(&["-i", "MO[T]?", "web01.qcow2"]).lines().count(), 6);
    assert_eq!(lines(&["*/etc/m*", "web01.qcow2@monday"]).lines().count(), 1);
    assert_eq!(lines(&["etc/m*", "web01.qcow2"]), "", "a pattern with a slash is for the whole path");
    assert_eq!(
        lines(&["-t", "d", "etc", "web01.qcow2"]).lines().count() % 7,
        lines(&["etc", "web01.qcow2"]).lines().count() % 7
    );
    let printed = lines(&["-0", "motd", "web01.qcow2"]);
    let addresses: Vec<&str> = printed.split_terminator('\0').collect();
    assert_eq!(addresses.len(), 6, "{printed:?}");
    for address in addresses {
        assert!(!example.chainfs(&["cat", address]).succeeds().is_empty(), "{address}");
    }
    let mount = Mount::new(&example.0);
    let by_mount = |path: &str| lines(&["motd", mount.path(path).to_str().expect("text")]).lines().count();
    assert_eq!((by_mount(""), by_mount("web01"), by_mount("web01/snapshots/monday.raw")), (7, 6, 1));
    mount.umount();
    for (words, code) in [(["[", "."], 2), (["x", "web01.qcow2:/p1/etc"], 2), (["x", "absent"], 1)] {
        assert_eq!(example.chainfs(&["find", words[0], words[1]]).outcome().0, code, "{words:?}");
    }
    // A layer that is gone makes all above it unreadable; the rest is searched.
    fs::rename(example.0.path("monday.qcow2"), example.0.beside("monday.qcow2")).expect("a rename");
    let (code, out, err) = example.chainfs(&["find", "motd", "."]).outcome();
    assert_eq!(code, 1, "{out}{err}");
    assert_eq!(out.lines().count(), 3, "try-php9 with its layers: {out}");
    assert!(err.contains("monday.qcow2") && err.contains("is missing"), "{err}");
}

#[test]
fn log_shows_the_differences_that_diff_shows() {
    let example = Example::new();
    let entries = example.json(&["log", "-p", "web01.qcow2:/p1/etc/motd"]);
    let entries = entries.as_array().expect("entries");
    assert_eq!(entries.len(), VIEWS.len(), "{entries:?}");
    let content = |view| {
        let path = example.0.beside("content");
        let text = debugfs(&example.partition(view), "cat /etc/motd");
        fs::write(&path, &text).expect("room");
        text
    };
    let mut before: Option<(String, String)> = None;
    for (entry, view) in entries.iter().rev().zip(VIEWS) {
        assert_eq!(entry["views"], serde_json::json!([view.0]));
        let name = format!("{}:/p1/etc/motd", view.0);
        let text = content(view);
        let (old_name, old) = before.take().unwrap_or(("/dev/null".to_owned(), String::new()));
        fs::write(example.0.beside("old"), &old)
            .and_then(|()| fs::write(example.0.beside("new"), &text))
            .expect("room");
        let mut diff = tool("diff");
        diff.args(["-u", "--label", &old_name, "--label", &name]);
        let (code, theirs, _) = diff.args([example.0.beside("old"), example.0.beside("new")]).outcome();
        assert_eq!((code, entry["diff"].as_str()), (1, Some(theirs.as_str())), "{view:?}");
        before = Some((name, text));
    }
    let text = example.chainfs(&["log", "-n", "1", "web01.qcow2@monday:/root/etc/motd"]).succeeds();
    assert!(
        text.starts_with("version monday\nDate:    ")
            && text.contains("\nChange:  content, size 10 -> 20, time\n"),
        "{text}"
    );
    let (code, _, err) = example.chainfs(&["log", "web01.qcow2:/root/never"]).outcome();
    assert!(code == 1 && err.contains("no view has it: base, installed, monday"), "{err}");
}
