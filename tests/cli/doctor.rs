//! `chainfs doctor` on stores and mounts that are well, dead, stopped, locked and broken.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::*;

fn store() -> Store {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    store
}

/// The exit code and the findings.
fn doctor(store: &Store, words: &[&str]) -> (i32, Vec<Value>) {
    let mut command = tool(chainfs_binary());
    command.args(["doctor", "--json"]).args(words).current_dir(store.root());
    let (code, out, err) = command.env("XDG_CONFIG_HOME", store.beside("config")).outcome();
    assert_eq!(err, "", "{words:?}");
    let findings = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    (code, findings)
}

/// The only finding with that mark.
fn only(findings: &[Value], mark: &str) -> Value {
    let found: Vec<&Value> = findings.iter().filter(|finding| finding["mark"] == mark).collect();
    assert_eq!(found.len(), 1, "{findings:#?}");
    found[0].clone()
}

fn text(finding: &Value, key: &str) -> String {
    finding[key].as_str().unwrap_or_else(|| panic!("no {key}: {finding}")).to_owned()
}

fn send(signal: Signal, pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a process"), signal).expect("a process");
}

/// Everything that looking could change.
fn state(directory: &Path) -> Vec<(String, i64, i64, Vec<u8>)> {
    let mut found =
        vec![(String::new(), 0, fs::metadata(directory).expect("a store").ctime_nsec(), Vec::new())];
    for entry in fs::read_dir(directory).expect("a store") {
        let path = entry.expect("an entry").path();
        let stat = fs::metadata(&path).expect("a file");
        let name = path.display().to_string();
        found.push((name, stat.mtime_nsec(), stat.ctime_nsec(), fs::read(&path).unwrap_or_default()));
    }
    found.sort();
    found
}

#[test]
fn a_store_that_is_well_has_no_problem_and_is_not_changed() {
    let store = store();
    let before = state(&store.root());
    let (code, findings) = doctor(&store, &["."]);
    assert_eq!(code, 0, "{findings:#?}");
    assert!(findings.iter().any(|finding| finding["found"] == "chains: 1, images: 3, directories: 1"));
    assert!(findings.iter().any(|finding| finding["found"] == "has file locks"), "{findings:#?}");
    assert_eq!(state(&store.root()), before);
    let lines = tool(chainfs_binary()).args(["doctor", "web.qcow2"]).current_dir(store.root()).succeeds();
    assert!(lines.lines().all(|line| ["ok ", "note ", "warning "].iter().any(|mark| line.starts_with(mark))));
}

#[test]
fn the_machine_is_looked_at_by_any_user() {
    // All that a user needs is beneath one directory that everybody may enter.
    let place = Store::new();
    let program = place.beside("chainfs");
    fs::copy(chainfs_binary(), &program).expect("a program");
    tool("chmod").args(["a+rx", "--"]).arg(place.beside("")).arg(&program).succeeds();
    for user in [None, Some(["--reuid=65534", "--regid=65534", "--clear-groups"])] {
        let mut command = tool(if user.is_some() { "setpriv" } else { "env" });
        command.args(user.iter().flatten()).arg(&program).args(["doctor", "--json"]).current_dir("/");
        let (code, out, err) = command.outcome();
        let findings: Vec<Value> =
            serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        let of = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject);
        assert_eq!(of("/dev/fuse").expect("a finding")["mark"], "ok");
        assert_eq!(of("inotify").expect("a finding")["mark"], "ok");
        let stops = findings.iter().any(|finding| finding["mark"] == "problem");
        assert_eq!(code, i32::from(stops), "{findings:#?}");
        let kernel =
            findings.iter().find(|f| f["subject"].as_str().is_some_and(|s| s.starts_with("kernel ")));
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
        assert!(text(kernel.expect("a finding"), "subject").ends_with(release.trim()));
    }
}

#[test]
fn what_is_no_store_stops_the_user() {
    let store = store();
    let (code, findings) = doctor(&store, &["gone"]);
    assert!(code == 1 && text(&only(&findings, "problem"), "found").contains("No such file"));
    fs::remove_file(store.path("base.raw")).expect("an image");
    let (code, findings) = doctor(&store, &["."]);
    let warnings: Vec<_> = findings.iter().filter(|finding| finding["mark"] == "warning").collect();
    assert!(
        code == 0 && warnings.iter().any(|warning| text(warning, "found").contains("base.raw")),
        "{findings:#?}"
    );
}

#[test]
fn an_image_that_qemu_writes_is_named_with_its_user() {
    let store = store();
    let mut command = Command::new("qemu-io");
    command.arg(store.path("web.qcow2")).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut writer = command.spawn().expect("qemu-io");
    eventually("qemu-io locks it", || {
        let (_, findings) = doctor(&store, &["."]);
        findings
            .iter()
            .any(|finding| finding["found"].as_str().is_some_and(|found| found.contains("qemu-io[")))
    });
    drop(writer.stdin.take());
    assert!(writer.wait().expect("it ends").success());
    let (_, findings) = doctor(&store, &["."]);
    assert!(!findings.iter().any(|finding| finding.to_string().contains("qemu-io[")), "{findings:#?}");
}

#[test]
fn a_dead_mount_is_named_and_the_command_removes_it() {
    let store = store();
    let mount = Mount::new(&store);
    let (code, findings) = doctor(&store, &[mount.dir().to_str().expect("a name")]);
    assert!(code == 0 && text(&findings[0], "found").starts_with("shows "), "{findings:#?}");
    let daemon = mount.daemon();
    send(Signal::KILL, daemon);
    eventually("the mount is dead", || fs::metadata(mount.dir()).is_err());
    let (code, findings) = doctor(&store, &[mount.dir().to_str().expect("a name")]);
    let finding = only(&findings, "problem");
    assert!(code == 1 && text(&finding, "found").contains("dead mount"), "{finding}");
    let fix = text(&finding, "fix");
    let words = fix.split(" (").next().expect("a command").replacen("chainfs", chainfs_binary(), 1);
    tool("sh").args(["-c", &words]).succeeds();
    assert_eq!(support::mount::connection_of(mount.dir()), None);
    mount.abandon();
}

#[test]
fn a_mount_whose_daemon_is_stopped_holds_nothing_up() {
    let store = store();
    let mount = Mount::new(&store);
    let daemon = mount.daemon();
    send(Signal::STOP, daemon);
    let (code, findings) = doctor(&store, &[mount.dir().to_str().expect("a name")]);
    // Without a path, every mount is looked at: this one among them.
    let (_, all) = doctor(&store, &[]);
    send(Signal::CONT, daemon);
    let finding = only(&findings, "problem");
    assert!(code == 1 && text(&finding, "found").contains("has not answered within"), "{finding}");
    let of_mount = all.iter().find(|finding| finding["subject"] == mount.dir().to_str().expect("a name"));
    assert_eq!(of_mount.expect("the mount is looked at")["mark"], "problem");
    mount.umount();
}
