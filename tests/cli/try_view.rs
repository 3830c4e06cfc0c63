//! `chainfs try`: with a program in QEMU's place, and with QEMU.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::*;

/// Says what it was given, writes into the overlay as a guest does, and ends as `CODE` says; with `WAIT`, it
/// waits until it is killed.
const STAND_IN: &str = r#"#!/bin/bash
for word; do case $word in file=*if=virtio*) disk=${word#file=}; disk=${disk%%,*};; esac; done
echo "WORDS $*"
echo "MODE $(stat -c %a "$disk") $(stat -c %a "$(dirname "$disk")")"
backing=$(qemu-img info -U --output=json "$disk" | jq -r '."full-backing-filename", ."backing-filename-format"' | xargs)
echo "BACKING $backing"
echo "FIRST $(qemu-io -r -c 'read -v 0 1' "$disk" | head -n 1 | cut -d' ' -f3)"
qemu-io -c 'write -q -P 0x7a 0 64k' "$disk" || exit 9
echo WRITTEN
if [ -n "$WAIT" ]; then exec sleep 300; fi
exit ${CODE:-0}
"#;

/// A store with a snapshot and an internal snapshot, each with its own first byte, and a stand-in for QEMU.
struct Lab {
    store: Store,
    before: Vec<(PathBuf, Vec<u8>)>,
}

impl Lab {
    fn new() -> Self {
        let store = Store::new();
        store.raw("base.raw", MIB, 1);
        store.overlay("monday.qcow2", "base.raw", "raw", "");
        store.io("monday.qcow2", "qcow2", ["write -q -P 0x6d 0 64k"]);
        store.overlay("web01.qcow2", "monday.qcow2", "qcow2", "");
        store.io("web01.qcow2", "qcow2", ["write -q -P 0x69 0 64k"]);
        store.img(["snapshot", "-c", "inner", "web01.qcow2"]);
        store.io("web01.qcow2", "qcow2", ["write -q -P 0x77 0 64k"]);
        fs::create_dir(store.beside("tmp")).expect("a directory");
        let program = store.beside("stand-in");
        fs::write(&program, STAND_IN).expect("a program");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its mode");
        let names = ["base.raw", "monday.qcow2", "web01.qcow2"];
        let before = names.map(|name| (store.path(name), fs::read(store.path(name)).expect("an image")));
        Self { before: before.to_vec(), store }
    }

    /// The command itself, without `tool()`: signals are for it alone.
    fn command(&self, view: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(chainfs_binary());
        command.arg("try").args(words).arg("--qemu").arg(self.store.beside("stand-in"));
        command.arg(view).env("TMPDIR", self.store.beside("tmp"));
        command.env("XDG_CONFIG_HOME", self.store.beside("config"));
        command
    }

    /// The line of that name that the stand-in has printed for a view.
    fn first_byte(&self, view: &Path) -> String {
        let out = self.command(view, &["--run"]).succeeds();
        let line = |key: &str| {
            out.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{out}"))
        };
        assert_eq!(line("MODE "), "600 700", "{out}");
        assert!(line("BACKING ").ends_with(".raw raw"), "{out}");
        assert!(out.contains("\nWRITTEN"), "{out}");
        self.is_clean();
        // `00000000:  6d  m`
        line("FIRST ").to_owned()
    }

    /// Nothing is left, and the store is as it was.
    fn is_clean(&self) {
        let left: Vec<_> = fs::read_dir(self.store.beside("tmp")).expect("it").flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        for (path, bytes) in &self.before {
            assert!(fs::read(path).expect("an image") == *bytes, "{} has changed", path.display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let tmp = self.store.beside("tmp");
        assert!(!mounts.contains(tmp.to_str().expect("text")), "a mount is left");
    }
}

#[test]
fn a_view_is_booted_on_an_overlay_that_is_removed() {
    let lab = Lab::new();
    let at = |view: &str| lab.store.path(view);
    for (view, byte) in [
        ("web01.qcow2", "77"),
        ("web01.qcow2@inner", "69"),
        ("web01.qcow2@monday", "6d"),
        ("monday.qcow2", "6d"),
        ("web01.qcow2@active@inner", "69"),
    ] {
        assert_eq!(lab.first_byte(&at(view)), byte, "{view}");
    }
    let mount = Mount::new(&lab.store);
    for (view, byte) in [("snapshots/monday.raw", "6d"), ("snapshots/active@inner.raw", "69")] {
        assert_eq!(lab.first_byte(&mount.path("web01").join(view)), byte, "{view}");
    }
    let said = lab.command(&mount.path("web01/active.raw"), &["--run"]).fails();
    assert!(said.contains("is the active disk, which may change under the overlay"), "{said}");
    mount.umount();
}

#[test]
fn failures_leave_nothing_behind() {
    let lab = Lab::new();
    let view = lab.store.path("web01.qcow2@monday");
    let (code, _, err) = lab.command(&view, &["--run"]).env("CODE", "3").outcome();
    assert!(code == 1 && err.contains("exit status: 3"), "{code} {err}");
    lab.is_clean();
    let mut absent = Command::new(chainfs_binary());
    absent.args(["try", "--run", "--qemu", "no-such-qemu"]).arg(&view).env("TMPDIR", lab.store.beside("tmp"));
    let said = absent.fails();
    assert!(said.contains("no-such-qemu is not installed"), "{said}");
    let root = lab.store.root();
    let into_store = lab.command(&view, &["--run", "--dir", root.to_str().expect("text")]).fails();
    assert!(into_store.contains("lies in the store, where the overlay would be an image"), "{into_store}");
    let said = lab.command(&lab.store.path("web01.qcow2@never"), &["--run"]).fails();
    assert!(said.contains("has no view never"), "{said}");
    lab.is_clean();
}

/// A trial that waits until it is ended.
struct Waiting {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Waiting {
    fn new(lab: &Lab, view: &Path, words: &[&str]) -> Self {
        let mut command = lab.command(view, words);
        command.env("WAIT", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, out }
    }

    /// Its first line with this text.
    fn line(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.out.read_line(&mut line).expect("text") > 0, "it ended without {text:?}");
            if line.contains(text) {
                return line;
            }
        }
    }

    fn ends_by(mut self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a process");
        kill_process(pid, signal).expect("it runs");
        let status = self.child.wait().expect("it ends");
        let mut err = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
        assert_eq!(status.code(), Some(0), "{err}");
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn signals_end_the_machine_and_remove_the_overlay() {
    let lab = Lab::new();
    let view = lab.store.path("web01.qcow2@inner");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut trial = Waiting::new(&lab, &view, &["--run"]);
        trial.line("WRITTEN");
        trial.ends_by(signal);
        lab.is_clean();
    }
}

#[test]
fn commands_know_of_a_view_that_is_tried() {
    let lab = Lab::new();
    let mount = Mount::new(&lab.store);
    let mut trial = Waiting::new(&lab, &mount.path("web01/snapshots/base.raw"), &[]);
    let line = trial.line("-drive");
    assert!(line.contains(" -nic none "), "{line}");
    let mut commit = tool(chainfs_binary());
    let said = commit.args(["commit", "--top", "monday", "--base", "base"]).arg(mount.path("web01")).fails();
    assert!(said.contains("base") && said.contains("chainfs["), "{said}");
    let mut who = tool(chainfs_binary());
    let users = who.arg("who").arg(mount.path("web01/snapshots/base.raw")).succeeds();
    assert!(users.contains("through the mount") && users.contains(" try "), "{users}");
    trial.ends_by(Signal::INT);
    mount.umount();
    lab.is_clean();
}

/// A boot record that says `K` on the serial line, writes its own sector to the disk's second one, and turns
/// the machine off.
fn boot_record() -> Vec<u8> {
    let mut code = vec![
        0xb0, b'K', // mov al, 'K'
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0x31, 0xc0, 0x8e, 0xc0, // es = 0
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb8, 0x01, 0x03, // write one sector
        0xb9, 0x02, 0x00, // cylinder 0, sector 2
        0xb6, 0x00, // head 0
        0xb2, 0x80, // first disk
        0xcd, 0x13, // int 0x13
        0xba, 0x04, 0x06, // mov dx, 0x604
        0xb8, 0x00, 0x20, // mov ax, 0x2000
        0xef, // out dx, ax: off
        0xf4, // hlt
    ];
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

#[test]
#[ignore = "long: boots a machine"]
fn qemu_boots_what_is_tried() {
    let lab = Lab::new();
    let disk = fs::File::options().write(true).open(lab.store.path("base.raw")).expect("the base");
    disk.write_all_at(&boot_record(), 0).expect("room");
    let before = fs::read(lab.store.path("base.raw")).expect("the base");
    let serial = lab.store.beside("serial");
    let mut command = tool(chainfs_binary());
    command.args(["try", "--run"]).arg(lab.store.path("base.raw")).env("TMPDIR", lab.store.beside("tmp"));
    command.args(["--", "-accel", "tcg", "-display", "none", "-serial"]);
    command.arg(format!("file:{}", serial.display())).succeeds();
    assert_eq!(fs::read_to_string(&serial).expect("what it said").trim_end_matches('\0'), "K");
    assert!(fs::read(lab.store.path("base.raw")).expect("the base") == before);
    let left: Vec<_> = fs::read_dir(lab.store.beside("tmp")).expect("it").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}
