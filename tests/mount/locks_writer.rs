//! The mount as a writer among QEMU's tools, in both directions: an open image excludes the same users as
//! under QEMU, and no others.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;

use rustix::io::Errno;
use support::*;

/// `base.raw` <- `mid.qcow2` <- `web.qcow2`, with the internal snapshot `monday`; and `plain.raw` alone.
fn chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    store.scribble("web.qcow2", "qcow2", 3);
    store.img(["snapshot", "-c", "monday", "web.qcow2"]);
    store.raw("plain.raw", MIB, 4);
    store
}

const LEAVES: [(&str, &str, &str); 2] = [("web", "web.qcow2", "qcow2"), ("plain", "plain.raw", "raw")];

fn open_rw(path: &Path) -> Result<File, Errno> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map_err(|e| Errno::from_io_error(&e).expect("an errno"))
}

fn open_ro(path: &Path) -> Result<File, Errno> {
    File::open(path).map_err(|e| Errno::from_io_error(&e).expect("an errno"))
}

/// A QEMU that has an image open until it is dropped.
struct Foreign {
    child: Child,
}

impl Foreign {
    /// `qemu-io` with these options, once it has the image open.
    fn qemu_io(store: &Store, image: &str, format: &str, options: &[&str]) -> Self {
        // A file that was just closed in a mount may still be locked.
        eventually("nobody has the image", || qemu_tools(store, image, format)[0].1.is_ok());
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .args(options)
            .arg(image)
            .current_dir(store.root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        // It answers only when the image is open.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("qemu-io listens");
        let mut answer = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut answer).expect("qemu-io answers");
        assert!(answer.contains("MiB"), "{answer}");
        Self { child }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The results of QEMU's tools for an image: opening for writing, for reading, by force, describing,
/// checking.
fn qemu_tools(store: &Store, image: &str, format: &str) -> Vec<(&'static str, Result<(), String>)> {
    let run = |program: &str, args: &[&str]| {
        let mut command = tool(program);
        let (code, out, err) = command.args(args).arg(image).current_dir(store.root()).outcome();
        if code == 0 { Ok(()) } else { Err(out + &err) }
    };
    let mut said = vec![
        ("rw", run("qemu-io", &["-f", format, "-c", "flush"])),
        ("ro", run("qemu-io", &["-r", "-f", format, "-c", "read 0 512"])),
        ("-U", run("qemu-io", &["-r", "-U", "-f", format, "-c", "read 0 512"])),
        ("info", run("qemu-img", &["info", "-f", format])),
        ("info -U", run("qemu-img", &["info", "-U", "-f", format])),
        ("map", run("qemu-img", &["map", "-f", format])),
    ];
    if format == "qcow2" {
        said.push(("check", run("qemu-img", &["check", "-q", "-f", format])));
    }
    let copy = store.beside("copy");
    let (code, out, err) = tool("qemu-img")
        .args(["convert", "-f", format, "-O", "raw", image])
        .arg(copy)
        .current_dir(store.root())
        .outcome();
    said.push(("convert", if code == 0 { Ok(()) } else { Err(out + &err) }));
    said
}

/// Whether QEMU may write an image, and whether it may copy it, for which it must not be written.
fn free_for(store: &Store, image: &str, format: &str) -> (bool, bool) {
    let said = qemu_tools(store, image, format);
    let may = |name: &str| said.iter().any(|(tool, said)| *tool == name && said.is_ok());
    (may("rw"), may("convert"))
}

#[test]
fn while_the_mount_writes_qemu_neither_writes_nor_reads_except_by_force() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        for (tool, said) in qemu_tools(&store, image, format) {
            assert_eq!(said, Ok(()), "{tool} of {image}: a mount alone holds no lock");
        }
        let writing = open_rw(&mount.path(chain).join("active.raw")).expect("an active disk");
        for (tool, said) in qemu_tools(&store, image, format) {
            match tool {
                "-U" | "info -U" => assert_eq!(said, Ok(()), "{tool} of {image}"),
                // Of a raw file QEMU's readers do not mind a writer, unless they copy it.
                "ro" | "info" | "map" if format == "raw" => assert_eq!(said, Ok(()), "{tool} of {image}"),
                _ => {
                    let said = said.expect_err("a lock");
                    assert!(said.contains("lock"), "{tool} of {image}: {said}");
                }
            }
        }
        drop(writing);
        eventually("the locks are gone", || {
            qemu_tools(&store, image, format).iter().all(|(_, said)| said.is_ok())
        });
    }
    mount.umount();
}

#[test]
// C2
fn below_the_disk_that_the_mount_writes_layers_are_read_by_all_and_written_by_none() {
    let store = chain();
    let mount = Mount::new(&store);
    let writing = open_rw(&mount.path("web/active.raw")).expect("an active disk");
    for (image, format) in [("mid.qcow2", "qcow2"), ("base.raw", "raw")] {
        for (tool, said) in qemu_tools(&store, image, format) {
            assert_eq!(said.is_err(), tool == "rw", "{tool} of {image}: {said:?}");
        }
    }
    assert!(open_ro(&mount.path("web/snapshots/mid.raw")).is_ok());
    drop(writing);
    mount.umount();
}

#[test]
// M6
fn an_open_image_keeps_the_mount_out_as_it_keeps_qemu_out() {
    let store = chain();
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    // The program, and whether a reader or a writer is possible beside it.
    for (options, reads, writes) in [
        (&[][..], Err(Errno::BUSY), Err(Errno::BUSY)),
        (&["-r"], Ok(()), Err(Errno::BUSY)),
        (&["-r", "-U"], Ok(()), Ok(())),
    ] {
        let foreign = Foreign::qemu_io(&store, "web.qcow2", "qcow2", options);
        assert_eq!(open_ro(&active).map(drop), reads, "reading beside qemu-io {options:?}");
        assert_eq!(open_rw(&active).map(drop), writes, "writing beside qemu-io {options:?}");
        drop(foreign);
        eventually("it can be written again", || open_rw(&active).is_ok());
    }
    // A layer below that another process writes blocks writing as it blocks reading.
    let foreign = Foreign::qemu_io(&store, "mid.qcow2", "qcow2", &[]);
    assert_eq!(open_rw(&active).map(drop), Err(Errno::BUSY));
    drop(foreign);
    eventually("it can be written again", || open_rw(&active).is_ok());
    mount.umount();
}

#[test]
fn force_share_reads_but_never_writes_beside_another_writer() {
    let store = chain();
    let mount = Mount::with(&store, "force_share");
    let active = mount.path("web/active.raw");
    for image in ["web.qcow2", "mid.qcow2"] {
        let foreign = Foreign::qemu_io(&store, image, "qcow2", &[]);
        assert!(open_ro(&active).is_ok(), "{image}");
        assert_eq!(open_rw(&active).map(drop), Err(Errno::BUSY), "{image}");
        drop(foreign);
        eventually("it can be written again", || open_rw(&active).is_ok());
    }
    mount.umount();
}

#[test]
fn the_refusal_names_process_and_program() {
    let store = chain();
    let mut command = tool(chainfs_binary());
    command.env("RUST_LOG", "info");
    let mount = Mount::foreground(&store, command, "");
    for (options, fact) in
        [(&[][..], "is being written by another process"), (&["-r"], "is being read by another")]
    {
        let foreign = Foreign::qemu_io(&store, "web.qcow2", "qcow2", options);
        assert_eq!(open_rw(&mount.path("web/active.raw")).map(drop), Err(Errno::BUSY));
        let holder = format!("qemu-io[{}]", foreign.pid());
        eventually("it is told who", || {
            let log = fs::read_to_string(store.beside("mount.output")).expect("a log");
            log.lines()
                .any(|line| line.contains(fact) && line.contains(&holder) && line.contains("web.qcow2"))
        });
    }
    mount.umount();
}

#[test]
// W2
fn closing_the_last_writer_drops_its_locks_and_keeps_a_reader_s() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let writable = || free_for(&store, image, format).0;
        let readable = || free_for(&store, image, format).1;
        let reading = open_ro(&active).expect("a view");
        assert!(readable() && !writable());
        for round in 0_u8..3 {
            let (one, two) = (open_rw(&active).expect("a disk"), open_rw(&active).expect("a disk"));
            one.write_all_at(&[round + 1; 4096], 4096).expect("a write");
            let mut have = [0; 4096];
            reading.read_exact_at(&mut have, 4096).expect("a read");
            assert_eq!(have, [round + 1; 4096], "a reader sees what is written");
            mount.close(one);
            assert!(!readable(), "one writer is left");
            two.write_all_at(&[round + 2; 4096], 4096).expect("a write");
            drop(two);
            eventually("other readers may come", readable);
            assert!(!writable(), "the reader is still there");
            reading.read_exact_at(&mut have, 4096).expect("a read");
            assert_eq!(have, [round + 2; 4096]);
        }
        drop(reading);
        eventually("nobody holds it", writable);
        assert_same(&active, &store.oracle(image, format));
    }
    mount.umount();
}

#[test]
fn an_internal_snapshot_is_read_before_while_and_after_the_disk_is_written() {
    let store = chain();
    let oracle = store.try_oracle(Path::new("web.qcow2"), "qcow2", Some("1")).expect("what QEMU reads");
    let want = fs::read(&oracle).expect("bytes");
    let mount = Mount::new(&store);
    let (active, monday) = (mount.path("web/active.raw"), mount.path("web/snapshots/active@monday.raw"));
    let kept = open_ro(&monday).expect("a snapshot");
    let all = |file: &File| {
        let mut bytes = vec![0; want.len()];
        file.read_exact_at(&mut bytes, 0).expect("a read");
        bytes
    };
    assert!(all(&kept) == want);
    for round in 1..4 {
        let writing = open_rw(&active).expect("the snapshot's reader is no obstacle");
        for at in (0..2 * MIB).step_by(64 << 10) {
            writing.write_all_at(&[round; 5000], at + 100).expect("a write");
        }
        let during = open_ro(&monday).expect("a snapshot");
        assert!(all(&kept) == want && all(&during) == want, "round {round}, while writing");
        drop(writing);
        assert!(all(&kept) == want && all(&during) == want, "round {round}, after writing");
    }
    drop(kept);
    assert!(all(&open_ro(&monday).expect("a snapshot")) == want);
    eventually("nobody holds it", || qemu_tools(&store, "web.qcow2", "qcow2")[0].1.is_ok());
    store.img(["check", "-q", "web.qcow2"]);
    mount.umount();
}

#[test]
fn umount_releases_a_writers_locks_before_it_returns() {
    let store = chain();
    for _ in 0..5 {
        let mount = Mount::new(&store);
        for (chain, ..) in LEAVES {
            let disk = open_rw(&mount.path(chain).join("active.raw")).expect("a disk");
            disk.write_all_at(b"written", 1000).expect("a write");
        }
        mount.umount();
        for (_, image, format) in LEAVES {
            for (tool, said) in qemu_tools(&store, image, format) {
                assert_eq!(said, Ok(()), "{tool} of {image}");
            }
        }
    }
}

/// Set, then test: two that race may both fail, never both succeed.
#[test]
fn of_two_mounts_and_a_qemu_that_race_one_writes_at_most() {
    let store = chain();
    let other = store.beside("mnt2");
    fs::create_dir(&other).expect("a directory");
    let one = Mount::new(&store);
    let two = Mount::try_new(&store, &store.root(), &other, "").expect("a second mount");
    let barrier = Barrier::new(3);
    for _ in 0..25 {
        let won = std::thread::scope(|scope| {
            let open = |path: std::path::PathBuf| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let disk = open_rw(&path);
                    assert!(matches!(disk, Ok(_) | Err(Errno::BUSY)), "{disk:?}");
                    // Held until all have tried.
                    barrier.wait();
                    disk.is_ok()
                })
            };
            let mounts = [open(one.path("web/active.raw")), open(two.path("web/active.raw"))];
            barrier.wait();
            let (code, ..) = tool("qemu-io")
                .args(["-f", "qcow2", "-c", "flush", "-c", "sleep 30", "web.qcow2"])
                .current_dir(store.root())
                .outcome();
            let _ = code;
            barrier.wait();
            mounts.map(|mount| usize::from(mount.join().expect("an opener"))).into_iter().sum::<usize>()
        });
        assert!(won <= 1, "both mounts write");
    }
    assert!(open_rw(&one.path("web/active.raw")).is_ok(), "a mount without rivals gets it");
    two.umount();
    one.umount();
}

#[test]
// W1
fn an_image_that_became_a_layer_of_another_chain_is_not_read_there_while_it_is_written() {
    let store = chain();
    let mount = Mount::new(&store);
    let writing = open_rw(&mount.path("web/active.raw")).expect("a disk");
    // qemu-img asks no lock of a backing file here.
    store.img(["create", "-q", "-u", "-f", "qcow2", "-b", "web.qcow2", "-F", "qcow2", "top.qcow2", "2M"]);
    let web = mount.path("top/snapshots/web.raw");
    eventually("the new chain is there", || web.exists());
    assert_eq!(open_ro(&web).map(drop), Err(Errno::BUSY));
    assert_eq!(open_ro(&mount.path("top/active.raw")).map(drop), Err(Errno::BUSY));
    assert_eq!(open_rw(&mount.path("top/active.raw")).map(drop), Err(Errno::BUSY));
    writing.write_all_at(b"goes on", 0).expect("who has it open goes on");
    drop(writing);
    eventually("it can be read", || open_ro(&web).is_ok());
    let frozen = open_ro(&web).expect("a snapshot");
    // The other way round: an image shown as a snapshot is not written.
    fs::remove_file(store.path("top.qcow2")).expect("an unlink");
    eventually("it is a leaf again", || mount.path("web/active.raw").exists());
    assert_eq!(open_rw(&mount.path("web/active.raw")).map(drop), Err(Errno::BUSY));
    drop(frozen);
    eventually("it can be written", || open_rw(&mount.path("web/active.raw")).is_ok());
    mount.umount();
}

#[test]
fn the_external_data_file_is_locked_with_its_image() {
    let store = Store::new();
    store.img([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=web.data,data_file_raw=on",
        "web.qcow2",
        "2M",
    ]);
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    let free = || qemu_tools(&store, "web.data", "raw")[0].1.is_ok();
    assert!(free());
    let writing = open_rw(&active).expect("a disk");
    assert!(!free());
    writing.write_all_at(&[7; 4096], MIB).expect("a write");
    drop(writing);
    eventually("it is free again", free);
    assert_same(&active, &store.oracle("web.qcow2", "qcow2"));
    eventually("it is free again", free);
    let foreign = Foreign::qemu_io(&store, "web.data", "raw", &[]);
    assert_eq!(open_rw(&active).map(drop), Err(Errno::BUSY));
    drop(foreign);
    mount.umount();
}

#[test]
fn qemu_nbd_and_the_mount_never_write_the_same_disk() {
    let store = chain();
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    let nbd = |program: &mut Command, options: &[&str]| {
        let socket = store.beside("nbd.sock");
        let _ = fs::remove_file(&socket);
        program.args(["-f", "qcow2", "--persistent", "-k"]).arg(&socket).args(options).arg("web.qcow2");
        program.current_dir(store.root()).stdin(Stdio::null());
    };
    let writing = open_rw(&active).expect("a disk");
    for options in [&[][..], &["--read-only"]] {
        let mut program = tool("qemu-nbd");
        nbd(&mut program, options);
        let refused = program.fails();
        assert!(refused.contains("lock"), "{refused}");
    }
    drop(writing);
    eventually("it is free", || qemu_tools(&store, "web.qcow2", "qcow2")[0].1.is_ok());
    let mut program = Command::new("qemu-nbd");
    nbd(&mut program, &[]);
    let guest = Foreign { child: program.spawn().expect("qemu-nbd starts") };
    support::foreign::greeted(&store.beside("nbd.sock"));
    assert_eq!(open_rw(&active).map(drop), Err(Errno::BUSY));
    drop(guest);
    eventually("it can be written", || open_rw(&active).is_ok());
    mount.umount();
}

/// The descriptor with a writer's locks is not closed to make room.
#[test]
fn a_shortage_of_descriptors_drops_no_writer_s_locks() {
    let store = Store::new();
    let growth = Growth { depth: 40, size: MIB, cluster_size: 4096, seed: 5 };
    deep_chain(&store, "deep", &growth);
    store.create("web.qcow2", MIB, "");
    let mut command = tool("sh");
    // 128 are kept for other things.
    command.args(["-c", "ulimit -n 144; exec \"$@\"", "sh", chainfs_binary()]);
    let mount = Mount::foreground(&store, command, "");
    let writing = open_rw(&mount.path("web/active.raw")).expect("a disk");
    writing.write_all_at(&[1; 4096], 0).expect("a write");
    for name in mount.names("deep/leaf/snapshots") {
        fs::read(mount.path("deep/leaf/snapshots").join(name)).expect("a snapshot");
    }
    fs::read(mount.path("deep/leaf/active.raw")).expect("a disk of forty layers");
    for (tool, said) in qemu_tools(&store, "web.qcow2", "qcow2") {
        assert_eq!(said.is_ok(), tool == "-U" || tool == "info -U", "{tool}: {said:?}");
    }
    let deep = open_rw(&mount.path("deep/leaf/active.raw")).expect("a disk of forty layers");
    deep.write_all_at(&[2; 5000], 1000).expect("a write");
    writing.write_all_at(&[3; 5000], 1000).expect("a write");
    let mut have = [0; 5000];
    deep.read_exact_at(&mut have, 1000).expect("a read");
    assert_eq!(have, [2; 5000]);
    drop((writing, deep));
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
    store.img(["check", "-q", "deep/leaf.qcow2"]);
}
