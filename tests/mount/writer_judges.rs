//! Foreign judges of the writable disk: QEMU on a twin, fsx, fio, the kernel's ext4. None of them knows
//! chainfs. Needs root and loop devices.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::foreign::{Loop, Mounted, amount, fio};
use support::*;

/// Every geometry that a writer treats differently: options, and whether there is a backing file.
const GEOMETRIES: [(&str, bool); 22] = [
    ("", false),
    ("", true),
    ("cluster_size=512", true),
    ("cluster_size=4k,refcount_bits=1", true),
    ("cluster_size=4k,refcount_bits=2", false),
    ("cluster_size=4k,refcount_bits=4", false),
    ("cluster_size=4k,refcount_bits=8", true),
    ("cluster_size=1k,refcount_bits=32", false),
    ("cluster_size=512,refcount_bits=64", false),
    ("cluster_size=2M", true),
    ("cluster_size=2M", false),
    ("compat=0.10", false),
    ("compat=0.10", true),
    ("compat=0.10,cluster_size=4k", true),
    ("extended_l2=on", false),
    ("extended_l2=on", true),
    ("extended_l2=on,cluster_size=16k", true),
    ("extended_l2=on,cluster_size=2M", true),
    ("lazy_refcounts=on", true),
    ("compression_type=zstd", true),
    ("preallocation=metadata", false),
    ("preallocation=falloc,cluster_size=16k", false),
];

/// qemu-io commands that mean the same to a raw disk and to a qcow2 image.
fn commands(store: &Store, seed: u64, size: u64, options: &str) -> Vec<String> {
    let mut rng = Rng::new(seed);
    let mut commands = Vec::new();
    // QEMU's discard is advisory: partial clusters stay. Version 2 does not discard at all.
    let unit = 2 * MIB;
    for _ in 0..60 {
        let at = rng.below(size - 1);
        let longest = [1000, 70_000, 400_000, 2_500_000][rng.below(4) as usize];
        let len = 1 + rng.below(longest).min(size - at - 1);
        let (sector, sectors) = (at & !511, ((len + 511) & !511).min(size - (at & !511)));
        match rng.below(10) {
            0..=4 => commands.push(store.write(&mut rng, at, len)),
            5 => commands.push(format!("write -q -z {at} {len}")),
            6 => commands.push(format!("write -q -z -u {sector} {sectors}")),
            7 => commands.push(format!("write -q -z -u {at} {len}")),
            8 if !options.contains("compat=0.10") => {
                commands.push(format!("discard -q {} {unit}", rng.below(size / unit) * unit));
            }
            _ => commands.push("flush".to_owned()),
        }
    }
    commands
}

#[test]
fn the_same_commands_leave_the_same_disk_as_qemu_does() {
    let store = Store::new();
    let size = 12 * MIB;
    let beside = store.beside("twins");
    fs::create_dir(&beside).expect("a directory");
    for (number, (options, has_backing)) in GEOMETRIES.into_iter().enumerate() {
        let name = format!("g{number}.qcow2");
        if has_backing {
            let base = format!("b{number}.raw");
            // Shorter than the disk, or longer.
            store.raw(&base, if number % 2 == 0 { 7 * MIB + 512 } else { 14 * MIB }, number as u64);
            store.overlay(&name, &base, "raw", options);
            store.img(["resize", "-q", "-f", "qcow2", "--shrink", &name, &size.to_string()]);
        } else {
            store.create(&name, size, options);
        }
        store.scribble(&name, "qcow2", 1000 + number as u64);
        let may_have_snapshots = !options.contains("refcount_bits=1");
        if number % 3 == 0 && may_have_snapshots {
            store.img(["snapshot", "-c", "kept", &name]);
            store.scribble(&name, "qcow2", 2000 + number as u64);
        }
        fs::copy(store.path(&name), beside.join(&name)).expect("a twin");
        if has_backing {
            fs::copy(store.path(format!("b{number}.raw")), beside.join(format!("b{number}.raw")))
                .expect("its base");
        }
    }
    let mount = Mount::new(&store);
    for (number, (options, _)) in GEOMETRIES.into_iter().enumerate() {
        let commands = commands(&store, 77 + number as u64, size, options);
        let run = |disk: &Path, format: &str| {
            let mut io = tool("qemu-io");
            io.args(["-d", "unmap", "-f", format]);
            if format == "qcow2" {
                // Only chainfs has to sync.
                io.args(["-t", "unsafe"]);
            }
            io.args(commands.iter().flat_map(|command| ["-c", command]));
            io.arg(disk).succeeds();
        };
        run(&mount.path(format!("g{number}/active.raw")), "raw");
        run(&beside.join(format!("g{number}.qcow2")), "qcow2");
    }
    mount.umount();
    for (number, geometry) in GEOMETRIES.iter().enumerate() {
        let name = format!("g{number}.qcow2");
        let twin = beside.join(&name);
        let twin = twin.to_str().expect("a plain path");
        let (code, out, err) = tool("qemu-img")
            .args(["compare", "-f", "qcow2", "-F", "qcow2"])
            .arg(store.path(&name))
            .arg(twin)
            .outcome();
        assert_eq!(code, 0, "{geometry:?}: {out}{err}");
        store.img(["check", "-q", &name]);
        if store.info(&name, "qcow2")["snapshots"].is_array() {
            let ours = store.try_oracle(Path::new(&name), "qcow2", Some("1")).expect("our internal snapshot");
            let theirs = store.try_oracle(Path::new(twin), "qcow2", Some("1")).expect("the twin's");
            assert_same(&ours, &theirs);
        }
    }
}

/// fsx, built beside the tests' own programs by tests/setup.sh.
fn fsx() -> PathBuf {
    let path = project().join("target/tools/bin/fsx");
    assert!(path.exists(), "{} is missing; tests/setup.sh installs it", path.display());
    path
}

/// A disk of random content over a backing file, as a chain named `disk`.
fn overlaid(options: &str, size: u64) -> Store {
    let store = Store::new();
    store.raw("base.raw", size, 5);
    store.overlay("disk.qcow2", "base.raw", "raw", options);
    store
}

fn fsx_finds_nothing(options: &str, seed: u64) {
    let store = overlaid(options, 4 * MIB);
    let config = store.beside("fsx.toml");
    // fsx never unmaps what it has read: a process may have 65,530 mappings, so a million operations may
    // have one in twenty of these. Without msync(2) changed pages stay in the kernel, among writes that go
    // past them.
    let text = "blockmode = true\nnomsyncafterwrite = true\n[opsize]\nmax = 131072\n[weights]\ntruncate = \
        0\nread = 2\n\
                write = 3\nmapread = 0.3\nmapwrite = 1\ninvalidate = 0.2\nfsync = 0.02\nfdatasync = \
                0.02\npunch_hole = 1\n";
    fs::write(&config, text).expect("a configuration");
    let mount = Mount::new(&store);
    let operations = amount(4_000, 1_000_000).to_string();
    let mut run = Command::new("timeout");
    run.args(["--kill-after=5", &amount(140, 3600).to_string()]).arg(fsx());
    run.args(["-q", "-N", &operations, "-S", &seed.to_string(), "-P"])
        .arg(store.beside(""))
        .arg("-f")
        .arg(&config);
    let (code, out, err) = run.arg(mount.path("disk/active.raw")).outcome();
    assert_eq!(code, 0, "{options} seed {seed}: {out}{err}");
    mount.umount();
    store.img(["check", "-q", "disk.qcow2"]);
}

#[test]
fn fsx_finds_no_error_with_clusters_of_64_kib() {
    fsx_finds_nothing("", 1);
}

#[test]
fn fsx_finds_no_error_with_subclusters() {
    fsx_finds_nothing("extended_l2=on", 2);
}

#[test]
fn fsx_finds_no_error_with_clusters_of_512_bytes() {
    fsx_finds_nothing("cluster_size=512", 3);
}

#[test]
fn fio_reads_back_what_four_jobs_wrote() {
    let size = amount(64, 1024) * MIB;
    for options in ["", "cluster_size=4k", "extended_l2=on"] {
        let store = overlaid(options, size);
        let mount = Mount::new(&store);
        fio(&mount.path("disk/active.raw"), size, &["--rw=randwrite", "--randrepeat=0"]);
        fio(&mount.path("disk/active.raw"), size, &["--rw=randrw", "--direct=1", "--blockalign=512"]);
        mount.umount();
        store.img(["check", "-q", "disk.qcow2"]);
    }
}

#[test]
fn fio_reads_back_what_it_wrote_and_trimmed_through_a_loop_device() {
    let size = amount(64, 1024) * MIB;
    let store = overlaid("", size);
    let mount = Mount::new(&store);
    let device = Loop::new(&mount.path("disk/active.raw"));
    // Each block is trimmed, then written.
    let report = fio(
        &device.0,
        size,
        &["--rw=randtrimwrite", "--direct=1", "--blockalign=512", "--output-format=json"],
    );
    // Its warnings come first.
    let report = &report[report.find('{').expect("fio's report")..];
    let report: serde_json::Value = serde_json::from_str(report).expect("fio speaks JSON");
    assert!(report["jobs"][0]["trim"]["total_ios"].as_u64() > Some(50), "nothing was trimmed: {report}");
    device.detach();
    mount.umount();
    store.img(["check", "-q", "disk.qcow2"]);
}

/// A tree of many small files, as an archive: manuals, headers and settings of this machine.
fn archive(store: &Store) -> PathBuf {
    let archive = store.beside("tree.tar");
    let all = ["usr/include", "usr/share/doc", "usr/share/perl", "usr/share/zoneinfo", "etc"];
    let wanted = if amount(0, 1) == 1 { &all[..] } else { &all[..1] };
    let there: Vec<&str> = wanted.iter().copied().filter(|dir| Path::new("/").join(dir).is_dir()).collect();
    assert!(!there.is_empty(), "none of {wanted:?} is here to be packed");
    tool("tar").args(["-C", "/", "--ignore-failed-read", "-cf"]).arg(&archive).args(there).succeeds();
    archive
}

#[test]
fn ext4_on_the_disk_is_clean_after_an_archive_was_unpacked() {
    let store = Store::new();
    store.create("disk.qcow2", 2048 * MIB, "");
    let archive = archive(&store);
    let mount = Mount::new(&store);
    let device = Loop::new(&mount.path("disk/active.raw"));
    tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&device.0).succeeds();
    let guest = Mounted::new(&device.0, store.beside("guest"));
    tool("tar").args(["-xf"]).arg(&archive).arg("-C").arg(&guest.0).succeeds();
    tool("rm").args(["-rf", "--"]).arg(guest.0.join("usr/include/linux")).succeeds();
    tool("fstrim").arg(&guest.0).succeeds();
    guest.umount();
    tool("e2fsck").args(["-fn"]).arg(&device.0).succeeds();
    let guest = Mounted::new(&device.0, store.beside("guest"));
    let (code, out, err) = tool("tar")
        .args(["-df"])
        .arg(&archive)
        .arg("-C")
        .arg(&guest.0)
        .args(["--exclude=usr/include/linux*"])
        .outcome();
    assert_eq!(code, 0, "{out}{err}");
    guest.umount();
    device.detach();
    mount.umount();
    store.img(["check", "-q", "disk.qcow2"]);
}

#[test]
fn ext4_recovers_by_its_journal_after_the_daemon_was_killed() {
    let store = Store::new();
    store.create("disk.qcow2", 1024 * MIB, "");
    let archive = archive(&store);
    for round in 0..amount(2, 20) {
        let mount = Mount::new(&store);
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
        let device = Loop::new(&mount.path("disk/active.raw"));
        if round == 0 {
            tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&device.0).succeeds();
        }
        let guest = Mounted::new(&device.0, store.beside("guest"));
        let kept = guest.0.join(format!("kept{round}"));
        fs::write(&kept, vec![round as u8; 300_000]).expect("a file");
        fs::File::open(&kept).and_then(|file| file.sync_all()).expect("a durable file");
        let dir = guest.0.join(format!("tree{round}"));
        fs::create_dir(&dir).expect("a directory");
        let mut unpacking = Command::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&dir)
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("tar");
        std::thread::sleep(Duration::from_millis(300 + 170 * (round % 5)));
        kill_process(daemon, Signal::KILL).expect("the daemon is ours");
        // It fails, or ends; its file system is lost either way.
        let _ = unpacking.wait();
        drop((guest, device));
        mount.abandon();

        let (code, out, _) =
            tool("qemu-img").args(["check", "disk.qcow2"]).current_dir(store.root()).outcome();
        assert!(code == 0 || code == 3, "round {round}: {out}");
        let mount = Mount::new(&store);
        let device = Loop::new(&mount.path("disk/active.raw"));
        let (code, out, err) = tool("e2fsck").arg("-fp").arg(&device.0).outcome();
        assert!(code == 0 || code == 1, "round {round}: the journal does not mend it: {out}{err}");
        let guest = Mounted::new(&device.0, store.beside("guest"));
        for earlier in 0..=round {
            let bytes = fs::read(guest.0.join(format!("kept{earlier}"))).expect("a file that was synced");
            assert!(bytes == vec![earlier as u8; 300_000], "round {round}: file {earlier} has changed");
        }
        guest.umount();
        device.detach();
        mount.umount();
    }
}
