//! `chainfs tree`: what layers share and free, against what deleting them frees; colours, order, `--watch`.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::command::Control;
use support::jobs::slow;
use support::*;

use crate::chainfs;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// base <- mid <- top, and side, which is backed by mid as well if `shared`.
fn chain(shared: bool) -> Store {
    let store = Store::new();
    store.raw("base.raw", 8 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.io("mid.qcow2", "qcow2", ["write -q -P 1 0 3M", "write -q -z 5M 1M"]);
    store.overlay("top.qcow2", "mid.qcow2", "qcow2", "");
    store.io("top.qcow2", "qcow2", ["write -q -P 2 2M 2M"]);
    if shared {
        store.overlay("side.qcow2", "mid.qcow2", "qcow2", "");
        store.io("side.qcow2", "qcow2", ["write -q -P 3 0 512k"]);
    }
    store
}

/// The node of that name in `tree --sizes`.
fn node(store: &Store, name: &str) -> Value {
    let trees = json(&chainfs(store, &["tree", "--sizes", "--output", "json", "."]).succeeds());
    let nodes = trees["trees"][0]["nodes"].as_array().expect("nodes").clone();
    nodes.into_iter().find(|node| node["name"] == name).unwrap_or_else(|| panic!("no {name} in {trees}"))
}

fn bytes_on_disk(store: &Store) -> i64 {
    let entries = fs::read_dir(store.root()).expect("the store").flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(fs::Metadata::is_file);
    files.map(|found| i64::try_from(found.blocks() * 512).expect("a size")).sum()
}

#[test]
fn what_would_be_freed_is_what_deleting_frees() {
    for (layer, shared) in [("base", false), ("mid", false), ("mid", true)] {
        let store = chain(shared);
        let said = node(&store, layer)["freed-if-deleted"].as_i64().expect("it can be deleted");
        let before = bytes_on_disk(&store);
        chainfs(&store, &["delete", "top.qcow2", layer, "--store", ".", "--method", "pull"]).succeeds();
        let freed = before - bytes_on_disk(&store);
        // Tables of the images that grow.
        let slack = 512 << 10;
        assert!((said - freed).abs() <= slack, "{layer}, shared: {shared}: said {said}, freed {freed}");
        assert_eq!(said < 0, (layer, shared) == ("mid", true), "both overlays get a copy: {said}");
    }
}

#[test]
fn shared_bytes_are_those_of_layers_in_several_chains() {
    let store = chain(true);
    let mid = node(&store, "mid");
    assert_eq!(mid["shared-size"], mid["actual-size"]);
    let top = node(&store, "active");
    assert_eq!((&top["shared-size"], &top["freed-if-deleted"]), (&Value::from(0), &Value::Null));
    // Its base would have to be copied into two overlays: delete refuses that.
    store.overlay("other.qcow2", "base.raw", "raw", "");
    assert_eq!(node(&store, "base")["freed-if-deleted"], Value::Null);
    let text = chainfs(&store, &["tree", "--sizes", "."]).succeeds();
    let headings: Vec<&str> = text.lines().nth(1).expect("headings").split_whitespace().collect();
    assert_eq!(headings, ["own", "shared", "freed", "if", "deleted"]);
    let refused = chainfs(&store, &["tree", "--sizes", "--output", "svg", "."]).outcome();
    assert!(refused.0 == 2 && refused.2.contains("--sizes is for"), "{refused:?}");
}

#[test]
fn chains_are_sorted_as_asked() {
    let store = Store::new();
    for (name, len, hour) in [("b", 3, 1), ("a", 1, 3), ("c", 2, 2)] {
        store.raw(&format!("{name}.raw"), len * MIB, 1);
        let date = format!("2026-03-0{hour} 12:00");
        tool("touch").args(["-d", &date]).arg(store.path(format!("{name}.raw"))).succeeds();
    }
    let titles = |words: &[&str]| {
        let text = chainfs(&store, &[&["tree", "."], words].concat()).succeeds();
        text.lines().filter_map(|line| line.split_once(" ·")).map(|(title, _)| title).collect::<String>()
    };
    assert_eq!(titles(&[]), "abc");
    assert_eq!(titles(&["--sort", "name"]), "abc");
    assert_eq!(titles(&["--sort=date"]), "acb");
    assert_eq!(titles(&["--sort=size"]), "bca");
}

/// What a command writes to a terminal.
fn on_terminal(store: &Store, command: &str, term: &str) -> String {
    let mut script = tool("script");
    script.args(["-qec", &format!("stty cols 100 rows 12; {command}"), "/dev/null"]);
    script.current_dir(store.root()).env("TERM", term).env("XDG_CONFIG_HOME", store.beside("config"));
    script.env_remove("NO_COLOR").stdin(Stdio::null()).succeeds()
}

#[test]
fn a_terminal_gets_colours_unless_it_refuses_them() {
    let store = chain(false);
    let is_coloured = |words: &str, term: &str| {
        let text = on_terminal(&store, &format!("{} tree {words} .", chainfs_binary()), term);
        assert!(text.contains("active"), "{text}");
        text.contains('\u{1b}')
    };
    assert!(is_coloured("", "xterm"));
    assert!(!is_coloured("", "dumb"));
    assert!(is_coloured("--color=always", "dumb"));
    assert!(!is_coloured("--color=never", "xterm"));
    let refused = format!("NO_COLOR=1 {} tree .", chainfs_binary());
    assert!(!on_terminal(&store, &refused, "xterm").contains('\u{1b}'));
    let piped = chainfs(&store, &["tree", "."]).env("TERM", "xterm").succeeds();
    assert!(!piped.contains('\u{1b}'));
    assert!(chainfs(&store, &["tree", "--color=always", "."]).succeeds().contains('\u{1b}'));
    assert!(
        !chainfs(&store, &["tree", "--color=always", "--output=json", "."]).succeeds().contains('\u{1b}')
    );
}

/// `tree --watch`, its output in a pipe.
struct Watch {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Watch {
    fn new(store: &Store, path: &Path) -> Self {
        // Without tool(): the signals below are for the command itself.
        let mut command = Command::new(chainfs_binary());
        command.args(["tree", "--watch"]).arg(path).env("XDG_CONFIG_HOME", store.beside("config"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, lines }
    }

    /// Lines up to one with this text.
    fn until(&mut self, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).expect("text") > 0, "it ended: {found:?}");
            found.push(line.trim_end().to_owned());
            if line.contains(text) {
                return found;
            }
        }
    }

    fn ends_by(mut self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a process");
        kill_process(pid, signal).expect("it runs");
        assert_eq!(self.child.wait().expect("it ends").code(), Some(0));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_watched_store_is_printed_again_only_when_it_differs() {
    let store = chain(false);
    let mut watch = Watch::new(&store, &store.root());
    let mut last = watch.until("active");
    assert_eq!(last.len(), 4);
    // No image: nothing to print. The next tree is that with the new overlay, or has other sizes, as the disk
    // stores the files just written.
    store.put("notes.txt", b"nothing");
    store.img(["create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "web.qcow2"]);
    loop {
        let mut tree = watch.until("active");
        assert_eq!(tree.remove(0), "", "a line between two trees");
        assert_ne!(tree, last);
        if tree[0].starts_with("web ·") {
            assert_eq!(tree.len(), 5, "{tree:?}");
            break;
        }
        last = tree;
    }
    watch.ends_by(Signal::TERM);
}

#[test]
fn a_watched_chain_of_a_mount_shows_its_changes() {
    let store = chain(false);
    let mount = Mount::new(&store);
    let mut watch = Watch::new(&store, &mount.path("top"));
    watch.until("active");
    Control::of(&mount, "top").done("snapshot monday");
    // Trees in between may show the lock that the command takes.
    watch.until("● monday");
    watch.until("active");
    watch.ends_by(Signal::INT);
    mount.umount();
}

#[test]
fn a_watched_mount_shows_how_far_a_running_command_is() {
    // On a busy machine the command may be done before the first look at its progress.
    for _ in 0..5 {
        let (lab, _) = slow(false);
        let mount = Mount::new(&lab.store);
        let mut watch = Watch::new(&lab.store, &mount.path(""));
        watch.until("active");
        let control = Control::of(&mount, "web");
        assert_eq!(control.give("commit top=sn3 base=base"), None, "{}", control.status("error"));
        assert_eq!(control.wait(), "done", "{}", control.status("error"));
        lab.store.img(["create", "-q", "-f", "qcow2", "last.qcow2", "1M"]);
        let lines = watch.until("last");
        watch.ends_by(Signal::TERM);
        mount.umount();
        let shares = lines.iter().filter_map(|line| line.split_once(" %")?.0.rsplit(' ').next());
        let shares: Vec<u64> = shares.map(|share| share.parse().expect("a share")).collect();
        if !shares.is_empty() {
            assert!(shares.is_sorted() && shares.iter().all(|share| *share <= 100), "{shares:?}");
            return;
        }
    }
    panic!("no progress was shown");
}

#[test]
fn a_watch_that_is_stopped_gives_the_terminal_back_meanwhile() {
    let store = chain(false);
    let command = format!(
        "{} tree --watch . & watch=$!; sleep 1; kill -TSTP $watch; sleep 1; echo; grep State /proc/$watch/status; \
         kill -CONT $watch; sleep 1; kill -INT $watch; wait $watch",
        chainfs_binary()
    );
    let text = on_terminal(&store, &command, "xterm");
    let (enter, leave) = ("\u{1b}[?1049h", "\u{1b}[?1049l");
    let (first, stopped) = text.split_once("State:").expect("it is looked at");
    let count = |text: &str| (text.matches(enter).count(), text.matches(leave).count());
    assert_eq!((count(first), count(stopped)), ((1, 1), (1, 1)), "{text:?}");
    assert!(stopped.contains("T (stopped)"), "{text:?}");
}

#[test]
fn a_watch_ends_with_the_reader_of_its_output() {
    let store = chain(false);
    let mut watch = Watch::new(&store, &store.root());
    watch.until("active");
    watch.lines = BufReader::new({
        let mut other = Command::new("true").stdout(Stdio::piped()).spawn().expect("true");
        other.wait().expect("it ends");
        other.stdout.take().expect("a pipe")
    });
    assert_eq!(watch.child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_watch_leaves_the_terminal_as_it_was() {
    let store = chain(false);
    let command = format!("timeout --foreground -s INT 1.5 {} tree --watch .; true", chainfs_binary());
    let text = on_terminal(&store, &command, "xterm");
    let (enter, leave) = ("\u{1b}[?1049h\u{1b}[?25l\u{1b}[?7l", "\u{1b}[?7h\u{1b}[?25h\u{1b}[?1049l");
    assert!(text.starts_with(&format!("{enter}\u{1b}[?2026h\u{1b}[H")), "{text:?}");
    let (frames, rest) = text.split_once(leave).expect("it gives the terminal back");
    assert_eq!(frames.matches("\u{1b}[H").count(), 1, "the same tree is not drawn again: {frames:?}");
    assert!(!frames.contains("\u{1b}[2J"), "clearing the screen would flicker");
    assert!(rest.contains("active") && !rest.contains("\u{1b}[?"), "the last tree stays: {rest:?}");
}
