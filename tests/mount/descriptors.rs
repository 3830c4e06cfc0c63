//! A store has more chains than the mount may have open files: everything can be listed and read all the
//! same, only a request beyond the limit is refused, and afterwards nothing stays open.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use support::active::errno;
use support::foreign::Qemu;
use support::*;

/// The content of the guests' file systems.
const FILES: [(&str, &[u8]); 3] =
    [("etc/hostname", b"web\n"), ("data", &[7; 9000]), ("notes.txt", b"to be kept\n")];

/// So many chains of so many layers, each on a base of its own that holds an ext4 file system.
fn chains(chain_count: usize, layer_count: usize) -> Store {
    let store = Store::new();
    let content = store.beside("content");
    for (name, bytes) in FILES {
        let path = content.join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(path, bytes).expect("a file");
    }
    let template = store.beside("template.raw");
    tool("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&content).arg(&template).arg("1M").succeeds();
    let base = fs::read(&template).expect("a file system");
    let layers: Vec<Vec<u8>> = (0..layer_count - 1)
        .map(|below| {
            let (name, format) = if below == 0 {
                ("c000-0.raw".into(), "raw")
            } else {
                (format!("c000-{below}.qcow2"), "qcow2")
            };
            store.overlay_sized("template.qcow2", &name, format, MIB);
            fs::read(store.path("template.qcow2")).expect("an overlay")
        })
        .collect();
    fs::remove_file(store.path("template.qcow2")).expect("a file that is not needed any more");
    for chain in 0..chain_count {
        store.put(format!("c{chain:03}-0.raw"), &base);
        for (layer, bytes) in (1..).zip(&layers) {
            let at = bytes.windows(5).position(|word| word == b"c000-").expect("a backing file");
            let mut bytes = bytes.clone();
            bytes[at..at + 5].copy_from_slice(format!("c{chain:03}-").as_bytes());
            store.put(format!("c{chain:03}-{layer}.qcow2"), &bytes);
        }
    }
    store
}

/// Mounts with so many descriptors.
fn mount_with(store: &Store, descriptors: u32, options: &str) -> Mount {
    try_mount(store, descriptors, options).unwrap_or_else(|refusal| panic!("mount failed: {refusal:?}"))
}

fn try_mount(store: &Store, descriptors: u32, options: &str) -> Result<Mount, mount::Refusal> {
    let mut command = tool("sh");
    command.args(["-c", &format!("ulimit -n {descriptors} && exec \"$@\""), "sh", chainfs_binary()]);
    Mount::by(store, command, &store.root(), &store.beside("mnt"), options)
}

/// The resources of a mount's process: descriptors, threads and child processes.
fn in_use(mount: &Mount) -> (usize, usize, usize) {
    let count =
        |what: &str| fs::read_dir(format!("/proc/{}/{what}", mount.daemon())).expect("a process").count();
    let children = format!("/proc/{0}/task/{0}/children", mount.daemon());
    // Of all threads: each is the parent of the processes that it has started.
    let threads = fs::read_dir(format!("/proc/{}/task", mount.daemon())).expect("a process").flatten();
    let begun = |thread: PathBuf| fs::read_to_string(thread.join("children")).unwrap_or_default();
    let workers: usize = threads.map(|thread| begun(thread.path()).split_whitespace().count()).sum();
    assert!(Path::new(&children).exists(), "the kernel tells of children");
    (count("fd"), count("task"), workers)
}

/// Runs a shell's line in the mount, which must print nothing on stderr.
fn walk(mount: &Mount, line: &str) -> String {
    let (code, out, err) = tool("sh").args(["-c", line]).current_dir(mount.dir()).outcome();
    assert!(code == 0 && err.is_empty(), "{line}: {code} {err}");
    out
}

/// Walks through everything in several ways at the same time.
fn walk_all(mount: &Mount, store: &Store, chain_count: usize, layer_count: usize) {
    let base = fs::read(store.path("c000-0.raw")).expect("a base");
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let listed = walk(mount, "ls -lR .");
                assert_eq!(listed.matches("hostname").count(), chain_count * layer_count);
                assert_eq!(listed.matches("active.raw").count(), chain_count);
            });
        }
        scope.spawn(|| {
            let sums = walk(
                mount,
                "find . -path '*/files/*' -name data -exec cksum {} + | cut -d' ' -f1,2 | sort | uniq -c",
            );
            let words: Vec<&str> = sums.split_whitespace().collect();
            assert_eq!(words.len(), 3, "one content: {sums}");
            assert_eq!((words[0], words[2]), (&*(chain_count * layer_count).to_string(), "9000"));
        });
        scope.spawn(|| {
            walk(mount, "find . -type f -name '*.raw' -print0 | xargs -0 -n 20 cat >/dev/null");
            let disk = fs::read(mount.path("c001-1/snapshots/c001-0.raw"));
            assert!(disk.is_err() || disk.is_ok_and(|disk| disk == base));
        });
        scope.spawn(|| walk(mount, "find . -type f -name '*.t*' -print0 | xargs -0 -n 50 cat >/dev/null"));
    });
}

#[test]
fn everything_is_listed_and_read_with_few_descriptors() {
    let (chain_count, layer_count) = (24, 4);
    let store = chains(chain_count, layer_count);
    for descriptors in [128, 64] {
        let mount = mount_with(&store, descriptors, "");
        walk_all(&mount, &store, chain_count, layer_count);
        let (open, ..) = in_use(&mount);
        assert!(open <= descriptors as usize, "{open} of {descriptors}");
        walk(&mount, "ls -lR . >/dev/null");
        let last = chain_count - 1;
        let disk =
            fs::read(mount.path(format!("c{last:03}-{}/active.raw", layer_count - 1))).expect("a disk");
        assert!(disk == fs::read(store.path("c000-0.raw")).expect("a base"));
        assert_eq!(mount.text(".chainfs/problems.txt"), "");
        mount.umount();
    }
}

#[test]
fn unused_descriptors_are_closed() {
    let (chain_count, layer_count) = (12, 3);
    let store = chains(chain_count, layer_count);
    let guest = Qemu::running_on(&store, "c003-2.qcow2", &[]);
    // Rings have descriptors of their own; with fewer left, a disk that is read by force is closed in
    // between.
    let mount = mount_with(&store, 128, "force_share,noiouring");
    let by_force = mount.path("c003-2/active.raw");
    // One after the other: a disk that is read by force is another one each time.
    walk(&mount, "ls -lR . >/dev/null");
    assert!(fs::read(&by_force).is_ok());
    let (before, threads, _) = in_use(&mount);
    for round in 0..30 {
        // By force a disk is opened again each time.
        assert!(fs::read(&by_force).is_ok(), "{round}");
        assert_eq!(mount.names("c003-2/files/active/disk").len(), FILES.len() + 1);
    }
    let is_as_before = || {
        let (open, now, _) = in_use(&mount);
        open <= before + 3 && now <= threads
    };
    eventually("nothing is left of thirty openings", is_as_before);
    std::thread::scope(|scope| {
        for number in 0..4_u8 {
            let mount = &mount;
            scope.spawn(move || {
                for round in 0..6_u64 {
                    let chain = 4 + (usize::from(number) + round as usize) % 8;
                    let path = mount.path(format!("c{chain:03}-2/active.raw"));
                    let disk = File::options().read(true).write(true).open(&path).expect("a disk");
                    disk.write_all_at(&[number; 4096], (600 << 10) + round * 4096).expect("a write");
                    disk.sync_all().expect("a flush");
                }
            });
        }
        scope.spawn(|| walk(&mount, "for i in 1 2; do ls -lR . >/dev/null; done"));
    });
    // Idle workers end; files may stay open, as long as there is room.
    eventually("no workers are left", || {
        let (_, now, workers) = in_use(&mount);
        workers == 0 && now <= threads
    });
    let (open, ..) = in_use(&mount);
    assert!(open <= 128 - 24, "the reserve is free: {open}");
    guest.shut_down();
    mount.umount();
    for chain in 4..12 {
        store.img(["check", "-q", &format!("c{chain:03}-2.qcow2")]);
    }
}

#[test]
// B2
fn only_the_opener_of_too_many_writable_disks_is_refused() {
    let (chain_count, layer_count) = (30, 3);
    let store = chains(chain_count, layer_count);
    let mount = mount_with(&store, 64, "");
    let disk = |chain: usize| {
        File::options().read(true).write(true).open(mount.path(format!("c{chain:03}-2/active.raw")))
    };
    let mut written = Vec::new();
    let refused = (0..chain_count).find_map(|chain| match disk(chain) {
        Ok(disk) => {
            written.push(disk);
            None
        }
        error => errno(error.map(drop)),
    });
    assert_eq!(refused, Some(Errno::MFILE));
    assert!(written.len() >= 3, "{} disks", written.len());
    for (chain, disk) in written.iter().enumerate() {
        disk.write_all_at(&[chain as u8; 4096], 500 << 10).expect("a write to one that was there before");
        disk.sync_all().expect("a flush");
    }
    let others = chain_count - 1;
    assert!(fs::read(mount.path(format!("c{others:03}-2/active.raw"))).is_ok(), "others are read");
    assert_eq!(mount.names(format!("c{others:03}-2/files/active/disk")).len(), FILES.len() + 1);
    walk(&mount, "ls -lR . >/dev/null");
    drop(written);
    eventually("disks can be written again", || disk(others).is_ok());
    mount.umount();
    store.img(["check", "-q", "c000-2.qcow2"]);
}

#[test]
fn a_too_low_descriptor_limit_is_refused_before_mounting() {
    let store = chains(2, 2);
    for descriptors in [20, 32, 40] {
        let refusal = try_mount(&store, descriptors, "").err().expect("no mount");
        assert_eq!(refusal.code, Some(32), "{refusal:?}");
        assert!(refusal.message.contains("ulimit -n"), "{refusal:?}");
    }
    let many = try_mount(&store, 96, "threads=64").err().expect("no mount");
    assert!(many.message.contains("too low"), "each thread has a descriptor: {many:?}");
    // A read-only command needs next to nothing.
    let line = "ulimit -n 16 && exec \"$@\"";
    let said = tool("sh").args(["-c", line, "sh", chainfs_binary(), "tree"]).arg(store.root()).succeeds();
    assert!(said.contains("c001-0"), "{said}");
}

/// A group of processes of which there can be no more than a number.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
        let own = format!("chainfs-test-{name}-{}", std::process::id());
        let made = roots.iter().map(|root| Path::new(root).join(&own)).find(|path| {
            let is_made = fs::create_dir(path).is_ok();
            let is_counted = path.join("pids.max").exists();
            if is_made && !is_counted {
                let _ = fs::remove_dir(path);
            }
            is_made && is_counted
        });
        Self(made.expect("control groups that count processes (the pids controller)"))
    }

    fn allow(&self, count: &str) {
        fs::write(self.0.join("pids.max"), count).expect("a limit");
    }

    fn add(&self, process: u32) {
        fs::write(self.0.join("cgroup.procs"), process.to_string()).expect("a process that moves");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn without_more_threads_requests_fail_and_the_mount_survives() {
    let store = chains(3, 3);
    store.put("plain.raw", &[5; 4096]);
    // Dropped after the mount, whose process is in it.
    let group = Group::new("daemon");
    let mount = Mount::new(&store);
    group.add(mount.daemon());
    // The existing ones may stay.
    group.allow("1");
    assert_eq!(errno(fs::read_dir(mount.path("c000-2/files/active"))), Some(Errno::MFILE), "no worker");
    assert!(fs::write(mount.path("c000-2/control/snapshot"), "one").is_ok(), "it needs no thread of its own");
    assert_eq!(errno(fs::write(mount.path("c001-2/control/pull"), "\n")), Some(Errno::MFILE), "no job");
    let said = mount.text("c001-2/control/status");
    assert!(said.contains("starting"), "{said}");
    assert!(fs::read(mount.path("c002-2/active.raw")).is_ok());
    let disk = File::options().read(true).write(true).open(mount.path("plain/active.raw")).expect("a disk");
    disk.write_all_at(&[6; 512], 0).expect("a write");
    disk.sync_all().expect("a flush");
    drop(disk);
    store.put("late.raw", &[1; 512]);
    eventually("a scan goes on", || mount.path("late/active.raw").exists());
    group.allow("max");
    assert_eq!(mount.names("c000-2/files/active/disk").len(), FILES.len() + 1);
    fs::write(mount.path("c001-2/control/pull"), "\n").expect("a command");
    mount.umount();
}

#[test]
fn a_command_works_without_threads() {
    let store = chains(3, 3);
    let group = Group::new("command");
    // The shell itself, which becomes the command.
    let line = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", group.0.display());
    group.allow("1");
    for words in [&["tree"][..], &["check"]] {
        let mut command = Command::new("sh");
        let place = if words == ["tree"] { store.root() } else { store.path("c001-2.qcow2") };
        let command = command.args(["-c", &line, "sh", chainfs_binary()]).args(words).arg(place);
        let (code, out, err) = command.stdin(Stdio::null()).outcome();
        assert!(code == 0 && err.is_empty(), "{words:?}: {code} {out}{err}");
    }
    let mut command = Command::new("sh");
    let place = format!("{}:/disk/", store.path("c001-2.qcow2").display());
    let (code, out, err) = command.args(["-c", &line, "sh", chainfs_binary(), "ls", &place]).outcome();
    assert!(
        code == 1 && out.is_empty() && err.contains("starting a file-system worker"),
        "{code} {out}{err}"
    );
    assert!(!err.contains("panicked"), "{err}");
}
