//! Commands on chains of a real mount, while their disks and snapshots are in use: readers and writers notice
//! only a moment's wait. Needs root and loop devices.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::io::Errno;
use support::active::{self, Model, rw};
use support::command::Control;
use support::foreign::{Loop, amount, fio};
use support::lab::{Kind, Lab, extension};
use support::*;

/// One 4 KiB block after fio's part of the disk, written and read repeatedly; returns the duration of the
/// slowest request.
fn probe(disk: &Path, at: u64, stop: &AtomicBool) -> Duration {
    let disk = rw(disk);
    let mut slowest = Duration::ZERO;
    let mut have = [0; 4096];
    for round in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let want = round.to_le_bytes().repeat(512);
        let start = Instant::now();
        disk.write_all_at(&want, at).expect("a write");
        let written = start.elapsed();
        let start = Instant::now();
        disk.read_exact_at(&mut have, at).expect("a read");
        slowest = slowest.max(written).max(start.elapsed());
        assert!(have == want[..], "the prober's own bytes");
        thread::sleep(Duration::from_millis(1));
    }
    slowest
}

/// Looks up a chain's directory until told to stop; returns the errors.
fn look_up(chain: &Path, stop: &AtomicBool) -> Vec<String> {
    let mut errors = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let looked = rustix::fs::mkdir(chain, rustix::fs::Mode::RWXU);
        // EEXIST, and nothing else.
        if looked != Err(rustix::io::Errno::EXIST) {
            errors.push(format!("{looked:?}"));
        }
        thread::sleep(Duration::from_micros(200));
    }
    errors
}

/// Every kind of command; returns the name of the lowest layer afterwards, and their number.
fn every_command(control: &Control, lowest: &str, round: usize) -> (String, usize) {
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|letter| format!("{letter}{round}"));
    let commands = [
        format!("snapshot {a} description='round {round}'"),
        format!("snapshot {b}"),
        format!("snapshot {c}"),
        format!("commit top={c} base={b}"),
        format!("commit base={b}"),
        format!("snapshot {d}"),
        format!("pull base={lowest} into={d} delete"),
        format!("commit top={d} base={lowest}"),
        // The disk has no backing file, and has the lowest layer's format from here on.
        "commit".to_owned(),
        format!("snapshot {a}"),
        format!("snapshot {b}"),
        format!("snapshot {c}"),
        format!("pull base={a} into={c} delete"),
        format!("pull base={a} delete"),
        "commit".to_owned(),
        format!("snapshot {d}"),
    ];
    for command in &commands {
        control.done(command);
    }
    (d, commands.len())
}

/// Every command that removes, moves or grows; the disk is backed by `lowest` before and after.
fn every_other_command(mount: &Mount, lowest: &str, round: usize) -> usize {
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|letter| format!("{letter}{round}"));
    let commands = [
        ("web", format!("snapshot {a}")),
        ("web", format!("snapshot {b}")),
        ("web", format!("snapshot {c}")),
        ("web", format!("delete {b} method=pull")),
        ("web", format!("delete {c} method=commit")),
        ("web", "resize +64K".to_owned()),
        ("web", "snapshot within internal".to_owned()),
        ("web", format!("snapshot {d}")),
        ("web", format!("rebase layer={d} base={lowest}")),
        ("web", format!("clone clone{round} from={d}@within")),
        ("web", format!("delete {d}@within")),
        ("web", "rebase base=none".to_owned()),
        ("web", format!("rebase base={lowest}")),
        // The remaining layer is a frozen chain without an overlay.
        (&*d, format!("delete {d}")),
        (&*a, format!("delete {a}")),
    ];
    for (chain, command) in &commands {
        let control = Control::of(mount, chain);
        eventually("the chain is there", || mount.path(chain).join("control/status").exists());
        if *chain == "web" {
            control.done(command);
        } else {
            assert_eq!(control.give(command), None, "{chain}: {command}");
            eventually("the chain has gone", || !mount.path(chain).exists());
        }
    }
    commands.len()
}

/// Lets the others end when this one does, however.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn fio_never_notices(options: &str, raw_base: bool, seconds: u64, words: &[&str], others: bool) {
    let size = 32 * MIB;
    let disk_size = size + MIB;
    let store = Store::new();
    if raw_base {
        store.raw("base.raw", disk_size, 5);
        store.overlay("web.qcow2", "base.raw", "raw", options);
    } else {
        store.create("base.qcow2", disk_size, options);
        store.scribble("base.qcow2", "qcow2", 5);
        store.overlay("web.qcow2", "base.qcow2", "qcow2", options);
    }
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    let control = Control::of(&mount, "web");
    let stop = AtomicBool::new(false);
    let ends = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        let probing = scope.spawn(|| probe(&active, size + 64 * KIB, &stop));
        let looking = scope.spawn(|| look_up(&mount.path("web"), &stop));
        let writing = scope.spawn(|| {
            let mut runs = 0;
            while Instant::now() < ends && !stop.load(Ordering::Relaxed) {
                fio(&active, size, words);
                runs += 1;
            }
            runs
        });
        let mut lowest = "base".to_owned();
        let (mut rounds, mut commands) = (0, 0);
        let stopping = Stopping(&stop);
        while !writing.is_finished() {
            if others {
                let file = if raw_base { "base.raw" } else { "base.qcow2" };
                (rounds, commands) = (rounds + 1, commands + every_other_command(&mount, file, rounds));
                continue;
            }
            let (now_lowest, count) = every_command(&control, &lowest, rounds);
            (lowest, rounds, commands) = (now_lowest, rounds + 1, commands + count);
        }
        drop(stopping);
        let (runs, slowest) =
            (writing.join().expect("fio finds nothing"), probing.join().expect("the prober"));
        let errors = looking.join().expect("the lookups");
        assert!(errors.is_empty(), "{} lookups failed: {:?}", errors.len(), &errors[..1]);
        assert!(rounds > 0 && runs > 0);
        let slowest = slowest.as_millis();
        println!(
            "{options:?} {words:?}: {runs} runs of fio, {commands} commands, slowest request {slowest} ms"
        );
    });
    let shown = fs::read(&active).expect("the disk");
    mount.umount();
    let leaf = if store.path("web.raw").exists() { ("web.raw", "raw") } else { ("web.qcow2", "qcow2") };
    assert!(fs::read(store.oracle(leaf.0, leaf.1)).expect("what QEMU reads") == shown, "{} differs", leaf.0);
    for entry in fs::read_dir(store.root()).expect("the store") {
        let name = entry.expect("an entry").file_name().into_string().expect("plain");
        assert!(!["new", "invalid"].contains(&extension(&name)), "{name} is left behind");
        if extension(&name) == "qcow2" {
            store.img(["check", "-q", &name]);
        }
    }
}

#[test]
fn fio_finds_no_error_during_snapshot_commit_and_pull() {
    fio_never_notices("", false, amount(3, 300), &["--rw=randwrite", "--randrepeat=0"], false);
}

#[test]
fn fio_finds_no_error_while_a_disk_grows_and_layers_move() {
    fio_never_notices("", false, amount(3, 300), &["--rw=randwrite", "--randrepeat=0"], true);
}

#[test]
fn fio_finds_no_error_with_direct_io_while_a_disk_over_a_raw_base_grows() {
    let words = ["--rw=randrw", "--direct=1", "--blockalign=512"];
    fio_never_notices("cluster_size=4k", true, amount(3, 300), &words, true);
}

#[test]
fn fio_finds_no_error_with_direct_io_over_a_raw_base() {
    let words = ["--rw=randrw", "--direct=1", "--blockalign=512"];
    fio_never_notices("cluster_size=4k", true, amount(3, 300), &words, false);
}

#[test]
fn overlays_read_the_bytes_that_a_pull_adds_to_their_base() {
    for options in ["", "cluster_size=4k", "extended_l2=on"] {
        let store = Store::new();
        store.raw("base.raw", 8 * MIB, 1);
        store.overlay("web.qcow2", "base.raw", "raw", options);
        let mut want = fs::read(store.path("base.raw")).expect("the base");
        let mount = Mount::new(&store);
        let control = Control::of(&mount, "web");
        let disk = rw(&mount.path("web/active.raw"));
        disk.write_all_at(b"one", MIB).expect("a write");
        want[MIB as usize..][..3].copy_from_slice(b"one");
        // No reader has read its tables when the pull extends its file.
        control.done("snapshot monday");
        control.done("pull into=monday");
        let mut have = vec![0; want.len()];
        disk.read_exact_at(&mut have, 0).expect("a read");
        assert!(have == want, "{options}");
        drop(disk);
        mount.umount();
        assert!(fs::read(store.oracle("web.qcow2", "qcow2")).expect("what QEMU reads") == want, "{options}");
    }
}

/// Compares a disk with its expected bytes until its standard input ends.
const READER: &str = "\
import mmap, os, select, sys
path, want, how = sys.argv[1:]
want = open(want, 'rb').read()
fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == 'direct' else 0))
piece = 1 << 20
buffer = mmap.mmap(-1, piece)
mapped = mmap.mmap(fd, len(want), prot=mmap.PROT_READ) if how == 'mmap' else None
rounds = 0
while True:
    for at in range(0, len(want), piece):
        part = want[at:at + piece]
        if mapped is not None:
            have = mapped[at:at + piece]
        elif how == 'direct':
            have = buffer[:os.preadv(fd, [buffer], at)]
        else:
            have = os.pread(fd, piece, at)
        if have != part:
            sys.exit(f'{path} by {how}, round {rounds}: other bytes in the MiB at {at}')
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)
    elif how == 'cached' and not path.startswith('/dev/'):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.lseek(fd, 0, os.SEEK_END)
    if size != len(want) or os.fstat(fd).st_size not in (len(want), 0):
        sys.exit(f'{path} by {how}: {size} bytes')
    rounds += 1
    if rounds == 1:
        print('reads', flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
";

/// A process that reads a disk all the time.
struct Reader {
    child: Child,
}

impl Reader {
    fn new(disk: &Path, want: &Path, how: &str) -> Self {
        let mut python = tool("python3");
        python.args(["-c", READER]).arg(disk).arg(want).arg(how);
        let mut child = python
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let reader = Self { child };
        if line != "reads\n" {
            reader.ends();
            panic!("{} {how}: nothing is read", disk.display());
        }
        reader
    }

    /// It has found no error so far.
    fn ends(mut self) {
        drop(self.child.stdin.take());
        let mut said = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
        let status = self.child.wait().expect("a child of ours");
        assert!(status.success(), "{status}: {said}");
    }
}

#[test]
fn an_internal_snapshot_keeps_its_bytes_during_writes() {
    let store = active::chain();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "web");
    let path = mount.path("web/active.raw");
    // The disk's tables are cached from here on.
    let mut model = Model::of(&path);
    let disk = rw(&path);
    let mut taken = Vec::new();
    for round in 0..3_u8 {
        model.write(&disk, u64::from(round) * 600_000, &vec![round + 1; 300_000]);
        control.done(&format!("snapshot round{round} internal"));
        taken.push(model.0.clone());
        for (number, bytes) in taken.iter().enumerate() {
            let shown =
                fs::read(mount.path(format!("web/snapshots/active@round{number}.raw"))).expect("a snapshot");
            assert!(shown == *bytes, "round{number}, in round {round}");
        }
    }
    model.assert_is(&path);
    drop(disk);
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
}

#[test]
fn a_pull_changes_no_internal_snapshot_during_writes() {
    let store = active::chain();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "web");
    let path = mount.path("web/active.raw");
    control.done("snapshot monday internal");
    let monday = mount.path("web/snapshots/active@monday.raw");
    let model = Model::of(&monday);
    let disk = rw(&path);
    let open = File::open(&monday).expect("a snapshot");
    control.done("pull");
    model.assert_is(&monday);
    model.assert_is(&path);
    let mut bytes = vec![0; model.0.len()];
    open.read_exact_at(&mut bytes, 0).expect("a read");
    assert!(bytes == model.0, "what was open before");
    // No reader loses any of it.
    control.done("clone copy from=active@monday");
    model.assert_is(&mount.path("copy/active.raw"));
    drop((disk, open));
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
}

#[test]
fn a_disk_is_replaced_while_its_internal_snapshots_are_read() {
    let store = active::chain();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "web");
    control.done("snapshot monday internal");
    let path = mount.path("web/snapshots/active@monday.raw");
    let (model, open) = (Model::of(&path), File::open(&path).expect("a snapshot"));
    let base = Model::of(&mount.path("web/snapshots/base.raw"));
    control.done("revert to=base save=kept");
    base.assert_is(&mount.path("web/active.raw"));
    let mut bytes = vec![0; model.0.len()];
    open.read_exact_at(&mut bytes, 0).expect("a read");
    assert!(bytes == model.0, "who had it open reads on");
    for view in ["kept", "kept@monday"] {
        model.assert_is(&mount.path(format!("kept/snapshots/{view}.raw")));
    }
    drop(open);
    mount.umount();
    store.img(["check", "-q", "kept.qcow2"]);
}

/// The expected bytes of each view of `views`, as files beside the store.
fn wanted(lab: &Lab, views: &[&str]) -> Vec<PathBuf> {
    let keep = |view: &&str| {
        let path = lab.store.beside(format!("want-{view}"));
        fs::write(&path, lab.content(&lab.file(view))).expect("room");
        path
    };
    views.iter().map(keep).collect()
}

#[test]
fn readers_of_snapshots_see_the_same_bytes_during_all_commands() {
    for raw_base in [false, true] {
        let lab = Lab::new(Kind { raw_base, ..Kind::PLAIN });
        let views = ["base", "sn2", "sn3", "web"];
        let wants = wanted(&lab, &views);
        let mount = Mount::new(&lab.store);
        let disk = |view: &str| match view {
            "web" => mount.path("web/active.raw"),
            view => mount.path("web/snapshots").join(format!("{view}.raw")),
        };
        let mut readers = Vec::new();
        for (number, (view, want)) in views.iter().zip(&wants).enumerate() {
            for (way, how) in ["cached", "direct", "mmap"].into_iter().enumerate() {
                // Each of them over one of the bases, or over both.
                let is_here = amount(0, 1) == 1 || (number + way + usize::from(raw_base)).is_multiple_of(2);
                // Of an active disk a mapping would be the kernel's own copy of it.
                if is_here && (*view, how) != ("web", "mmap") {
                    readers.push(Reader::new(&disk(view), want, how));
                }
            }
        }
        let device = Loop::read_only(&disk("sn2"));
        readers.push(Reader::new(&device.0, &wants[1], "direct"));
        let open = File::open(disk("sn2")).expect("a snapshot");
        let before = open.metadata().expect("attributes");
        let control = Control::of(&mount, "web");
        for command in [
            "snapshot monday",
            "commit top=sn2 base=sn1",
            "pull base=base into=sn3",
            "snapshot tuesday",
            "commit top=tuesday base=monday",
            "commit base=monday",
            "pull base=base",
            "pull",
        ] {
            control.done(command);
            let after = open.metadata().expect("attributes of an open file");
            assert_eq!((after.len(), after.ino()), (before.len(), before.ino()), "{command}");
            thread::sleep(Duration::from_millis(30));
        }
        for reader in readers {
            reader.ends();
        }
        device.detach();
        drop(open);
        let shown = fs::read(mount.path("web/active.raw")).expect("the disk");
        assert!(shown == fs::read(&wants[3]).expect("what it was"));
        mount.umount();
        lab.assert_clean();
    }
}

/// A process that has a file open and sleeps.
struct Holder(Child);

impl Holder {
    fn new(file: &Path) -> Self {
        Self(
            Command::new("sleep")
                .arg("100")
                .stdin(File::open(file).expect("a file"))
                .spawn()
                .expect("sleep(1)"),
        )
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_open_snapshot_blocks_a_commit_and_its_reader_is_named() {
    let lab = Lab::new(Kind::PLAIN);
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    for (spoilt, command) in [
        ("sn1", "commit top=sn2 base=sn1"),
        ("sn1", "commit top=sn3 base=sn1"),
        ("sn2", "commit top=sn3 base=base"),
        ("sn3", "commit"),
        ("sn1", "commit base=base"),
    ] {
        let path = mount.path("web/snapshots").join(format!("{spoilt}.raw"));
        let want = fs::read(&path).expect("a snapshot");
        let holder = Holder::new(&path);
        let names = mount.names("web/snapshots");
        let sentence = control.refused(command, Errno::BUSY);
        let who = format!("sleep[{}]", holder.0.id());
        assert!(sentence.contains(&who) && sentence.contains(spoilt), "{command}: {sentence}");
        assert!(
            names == mount.names("web/snapshots") && fs::read(&path).expect("a snapshot") == want,
            "{command}"
        );
    }
    // The daemon learns of a close a moment later.
    eventually("nobody has it open", || control.give("commit top=sn2 base=sn1").is_none());
    assert_eq!(control.wait(), "done");
    mount.umount();
    lab.assert_clean();
}

/// Layers of `info/chain.json`, leaf first.
fn layers(mount: &Mount) -> Vec<serde_json::Value> {
    serde_json::from_str(&mount.text("web/info/chain.json")).expect("a list")
}

#[test]
fn the_tree_shows_a_command_s_result_and_the_disk_keeps_its_inode() {
    let lab = Lab::new(Kind::PLAIN);
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    let active = mount.path("web/active.raw");
    let open = rw(&active);
    let disk = open.metadata().expect("attributes");
    let same_disk = |command: &str| {
        for stat in [open.metadata(), fs::metadata(&active)] {
            let stat = stat.expect("attributes");
            assert_eq!(
                (stat.ino(), stat.len(), stat.dev()),
                (disk.ino(), disk.len(), disk.dev()),
                "{command}"
            );
        }
        open.write_all_at(command.as_bytes(), 0).expect("a write");
        open.sync_all().expect("a sync");
        assert_eq!(fs::read(&active).expect("the disk")[..command.len()], *command.as_bytes());
    };
    let snapshots = |command: &str, want: &[&str]| {
        let want: Vec<String> = want.iter().map(|name| format!("{name}.raw")).collect();
        eventually(&format!("{command} shows {want:?}"), || mount.names("web/snapshots") == want);
        for name in &want {
            let path = mount.path("web/snapshots").join(name);
            assert_eq!(fs::metadata(path).expect("attributes").len(), disk.len(), "{command}: {name}");
        }
    };
    same_disk("nothing yet");
    let before = SystemTime::now();
    control.done("snapshot monday description=\"before the upgrade\"");
    let after = SystemTime::now();
    snapshots("snapshot", &["base", "monday", "sn1", "sn2", "sn3"]);
    same_disk("snapshot");
    let stat = fs::metadata(mount.path("web/snapshots/monday.raw")).expect("attributes");
    let time = stat.modified().expect("a time");
    assert!(before <= time && time <= after, "{before:?} <= {time:?} <= {after:?}");
    let all = layers(&mount);
    let monday = &all[1]["chainfs"];
    assert_eq!(
        (monday["view"].as_str(), monday["description"].as_str()),
        (Some("monday"), Some("before the upgrade"))
    );
    assert_eq!(monday["frozen-sec"], stat.mtime());
    assert_eq!(monday["frozen-nsec"], stat.mtime_nsec());
    assert!(all[0]["chainfs"]["frozen-sec"].is_null() && all[0]["chainfs"]["description"].is_null());
    for (command, names) in [
        ("commit top=sn2 base=sn1", &["base", "monday", "sn1", "sn3"][..]),
        ("commit", &["base", "sn1", "sn3"]),
        ("snapshot tuesday", &["base", "sn1", "sn3", "tuesday"]),
        ("pull base=sn1 into=tuesday", &["base", "sn1", "tuesday"]),
        ("snapshot wednesday", &["base", "sn1", "tuesday", "wednesday"]),
        ("commit base=tuesday", &["base", "sn1"]),
        ("snapshot thursday", &["base", "sn1", "thursday"]),
        ("pull", &[]),
    ] {
        let names: Vec<&str> = names.to_vec();
        control.done(command);
        snapshots(command, &names);
        same_disk(command);
        let shown: Vec<String> = layers(&mount)
            .iter()
            .map(|layer| layer["chainfs"]["view"].as_str().expect("a name").to_owned())
            .collect();
        assert_eq!(shown.len(), names.len() + 1, "{command}: {shown:?}");
    }
    drop(open);
    mount.umount();
    lab.assert_clean();
}

#[test]
fn progress_reports_a_job_to_its_end_and_readers_may_leave() {
    let lab = Lab::slow(false);
    let want = lab.content("web.qcow2");
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    assert_eq!(control.give("pull"), None);
    let mut impatient =
        Command::new("cat").arg(control.file("progress")).stdout(Stdio::null()).spawn().expect("cat");
    let mut patient =
        Command::new("cat").arg(control.file("progress")).stdout(Stdio::piped()).spawn().expect("cat");
    thread::sleep(Duration::from_millis(50));
    impatient.kill().expect("a child of ours");
    eventually("a reader is interrupted", || impatient.try_wait().expect("a child of ours").is_some());
    let mut text = String::new();
    patient.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    assert!(patient.wait().expect("a child of ours").success());
    let lines: Vec<&str> = text.lines().collect();
    // How many there are in between depends on how fast it was.
    assert!(lines.len() >= 2 && lines.last() == Some(&"done"), "{text}");
    assert!(lines[..lines.len() - 1].iter().all(|line| line.starts_with("pull ")), "{text}");
    assert_eq!(control.status("state"), "done");
    assert!(fs::read(mount.path("web/active.raw")).expect("the disk") == want);
    mount.umount();
    lab.assert_clean();
}

#[test]
// J3
fn a_job_that_is_cancelled_leaves_the_chain_as_it_was() {
    let lab = Lab::slow(false);
    let views = ["base", "sn1", "sn2", "sn3", "web"].map(|layer| lab.file(layer));
    let views = views.each_ref().map(String::as_str);
    let (before, chain, files) = (lab.contents(&views), lab.chain("web.qcow2"), lab.files());
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    for command in ["commit top=sn3 base=base", "commit base=base", "pull base=base into=sn3", "pull"] {
        assert_eq!(control.give(command), None, "{command}: {}", control.status("error"));
        control.begun();
        assert_eq!(control.give("cancel"), None, "{command}: {}", control.status("error"));
        assert_eq!(control.wait(), "cancelled", "{command}: {}", control.status("error"));
        assert_eq!(mount.text("web/control/progress"), "cancelled\n");
        eventually("all are shown again", || mount.names("web/snapshots").len() == 4);
        for (view, want) in &before {
            let name = view.split('.').next().expect("a name");
            let shown = if name == "web" {
                mount.path("web/active.raw")
            } else {
                mount.path("web/snapshots").join(format!("{name}.raw"))
            };
            assert!(fs::read(&shown).expect("a view") == *want, "{command}: {view}");
        }
        assert_eq!(lab.chain("web.qcow2"), chain, "{command}");
        assert_eq!(lab.files(), files, "{command}");
    }
    mount.umount();
    lab.assert_clean();
    assert!(lab.contents(&views) == before);
}

// X3
#[test]
fn a_layer_that_a_commit_has_changed_has_another_inode_number() {
    let lab = Lab::new(Kind::PLAIN);
    let merged = lab.content("sn1.qcow2");
    let mount = Mount::new(&lab.store);
    let base = mount.path("web/snapshots/base.raw");
    let before = (fs::metadata(&base).expect("attributes").ino(), fs::read(&base).expect("its bytes"));
    assert!(before.1 != merged);
    Control::of(&mount, "web").done("commit top=sn1 base=base");
    let is_another = || fs::metadata(&base).is_ok_and(|now| now.ino() != before.0);
    eventually("the base is shown again, as another file", is_another);
    assert!(fs::read(&base).expect("its bytes") == merged, "pages of before are not shown");
    mount.umount();
    lab.assert_clean();
}
