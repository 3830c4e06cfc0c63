//! `chainfs who`: who has an image open, against lsof, with real programs that hold it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::Value;
use support::command::Control;
use support::foreign::Qemu;
use support::jobs::{at_work, slow};
use support::*;

use crate::chainfs;

fn who(store: &Store, path: &str) -> (i32, Value) {
    let (code, out, err) = chainfs(store, &["who", "--json", path]).outcome();
    let value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    (code, value)
}

/// The process ids of an answer.
fn pids(answer: &Value) -> BTreeSet<u64> {
    let users = answer["users"].as_array().expect("users").iter();
    users.filter_map(|user| user["process"]["pid"].as_u64()).collect()
}

/// Those that lsof finds for a file.
fn by_lsof(store: &Store, name: &str) -> BTreeSet<u64> {
    let (_, out, _) = tool("lsof").arg("-t").arg(store.path(name)).outcome();
    out.lines().filter_map(|line| line.parse().ok()).collect()
}

/// qemu-io that has an image open, until dropped.
struct QemuIo {
    child: Child,
    _stdin: ChildStdin,
}

impl QemuIo {
    fn open(store: &Store, words: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(words).current_dir(store.root()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io");
        let mut stdin = child.stdin.take().expect("a pipe");
        // Its prompt comes when the image is open.
        let mut prompt = [0; "qemu-io>".len()];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut prompt).expect("a prompt");
        stdin.flush().expect("a pipe");
        Self { child, _stdin: stdin }
    }

    fn pid(&self) -> u64 {
        self.child.id().into()
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("monday.qcow2", "base.raw", "raw", "");
    store.overlay("web01.qcow2", "monday.qcow2", "qcow2", "");
    store
}

#[test]
fn who_lists_the_processes_that_lsof_lists() {
    let store = chain();
    for name in ["web01.qcow2", "monday.qcow2", "."] {
        let (code, answer) = who(&store, name);
        assert_eq!((code, pids(&answer).len()), (1, 0), "{name}: {answer}");
    }
    let writer = QemuIo::open(&store, &["web01.qcow2"]);
    let reader = QemuIo::open(&store, &["-r", "-f", "raw", "base.raw"]);
    for name in ["web01.qcow2", "monday.qcow2", "base.raw"] {
        let (code, answer) = who(&store, name);
        assert_eq!((code, pids(&answer)), (0, by_lsof(&store, name)), "{name}: {answer}");
    }
    assert_eq!(pids(&who(&store, ".").1), BTreeSet::from([writer.pid(), reader.pid()]));
    let (_, answer) = who(&store, "web01.qcow2");
    let user = &answer["users"][0];
    assert_eq!((&user["access"], &user["process"]["program"]), (&"write".into(), &"qemu-io".into()));
    assert_eq!(
        user["locks"],
        serde_json::json!(["reading", "writing", "resizing", "excludes other writers"])
    );
    assert_eq!(user["release"], format!("kill {}", writer.pid()));
    assert_eq!(answer["unidentified"], serde_json::json!([]));
    let text = chainfs(&store, &["who", "web01.qcow2"]).succeeds();
    assert!(
        text.starts_with(&format!("qemu-io[{}], user root\n  command: qemu-io web01.qcow2\n", writer.pid()))
    );
    // What it says to do does it.
    tool("bash").args(["-c", user["release"].as_str().expect("a command")]).succeeds();
    eventually("the writer ends", || who(&store, "web01.qcow2").0 == 1);
    drop((writer, reader));
}

#[test]
fn who_names_those_that_use_a_disk_through_the_mount() {
    let store = chain();
    let mount = Mount::new(&store);
    let held = File::options().read(true).write(true).open(mount.path("web01/active.raw")).expect("the disk");
    let mine = u64::from(std::process::id());
    for path in [store.path("web01.qcow2"), store.root(), mount.path("web01"), mount.path("web01/active.raw")]
    {
        let (code, answer) = who(&store, path.to_str().expect("text"));
        let users = answer["users"].as_array().expect("users");
        let through =
            users.iter().find(|user| user["through-mount"] == true).unwrap_or_else(|| panic!("{answer}"));
        assert_eq!((code, through["process"]["pid"].as_u64()), (0, Some(mine)), "{answer}");
        assert_eq!(
            (&through["access"], through["file"].as_str().expect("a path").ends_with("active.raw")),
            (&"write".into(), true)
        );
        let daemon = users.iter().find(|user| user["through-mount"] == false).expect("the daemon");
        assert_eq!(daemon["process"]["pid"], mount.daemon());
        assert_eq!(daemon["release"], format!("chainfs umount {}", mount.dir().display()));
    }
    // The disk below shows nothing of the image above it.
    let (code, answer) = who(&store, mount.path("web01/snapshots/monday.raw").to_str().expect("text"));
    assert_eq!((code, pids(&answer)), (0, BTreeSet::from([mount.daemon().into()])), "{answer}");
    mount.close(held);
    let reader = File::open(mount.path("web01/snapshots/monday.raw")).expect("the disk");
    let (_, answer) = who(&store, "base.raw");
    assert!(pids(&answer).contains(&mine), "it shows the base: {answer}");
    let (code, answer) = who(&store, "web01.qcow2");
    assert_eq!(code, 1, "{answer}");
    drop(reader);
    mount.umount();
}

#[test]
fn who_names_loop_devices() {
    let store = chain();
    let device = tool("losetup").args(["-f", "--show"]).arg(store.path("base.raw")).succeeds();
    let (code, answer) = who(&store, "base.raw");
    tool("losetup").args(["-d", device.trim()]).succeeds();
    assert_eq!((code, &answer["users"][0]["loop-device"]), (0, &device.trim().into()), "{answer}");
    assert_eq!(answer["users"][0]["release"], format!("losetup -d {}", device.trim()));
}

#[test]
fn who_names_a_server_of_an_image_and_how_to_end_it() {
    let store = chain();
    let server = Qemu::running_on(&store, "web01.qcow2", &[]);
    let (code, answer) = who(&store, "web01.qcow2");
    let user = &answer["users"][0];
    assert_eq!((code, &user["process"]["program"]), (0, &"qemu-nbd".into()), "{answer}");
    assert_eq!((&user["access"], user["locks"].to_string().contains("writing")), (&"write".into(), true));
    tool("bash").args(["-c", user["release"].as_str().expect("a command")]).succeeds();
    eventually("the server ends", || who(&store, "web01.qcow2").0 == 1);
    drop(server);
}

#[test]
fn who_names_running_commands() {
    // On a busy machine the command may be done before it is looked for.
    for _ in 0..5 {
        let (lab, _) = slow(false);
        let mount = at_work(&lab, "commit top=sn3 base=base");
        let (_, answer) = who(&lab.store, mount.path("web").to_str().expect("text"));
        let Some(job) = answer["jobs"].as_array().expect("jobs").first() else {
            mount.umount();
            continue;
        };
        assert_eq!((&job["command"], &job["state"]), (&"commit top=sn3 base=base".into(), &"running".into()));
        let release = job["release"]
            .as_str()
            .expect("a command")
            .replace("chainfs ", &format!("{} ", chainfs_binary()));
        let (code, out, err) = tool("bash").args(["-c", &release]).outcome();
        let state = Control::of(&mount, "web").wait();
        assert!(code == 0 && state == "cancelled" || state == "done", "{release}: {state} {out}{err}");
        mount.umount();
        return;
    }
    panic!("no command was seen");
}

#[test]
fn an_ordinary_user_is_told_what_cannot_be_seen() {
    let store = chain();
    tool("chmod").args(["-R", "a+rX"]).arg(store.beside("")).succeeds();
    let writer = QemuIo::open(&store, &["web01.qcow2"]);
    let mut command = tool("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", chainfs_binary(), "who"]);
    let (code, out, err) =
        command.arg(store.path("web01.qcow2")).env("XDG_CONFIG_HOME", "/nonexistent").outcome();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("web01.qcow2 is locked by a process that cannot be seen from here"), "{out}{err}");
    assert!(err.contains("of other users cannot be seen; run it as root"), "{err}");
    drop(writer);
    assert_eq!(chainfs(&store, &["who", "gone.qcow2"]).outcome().0, 2);
}
