//! What packages are made of, and with `--long` the packages themselves: the .deb in clean Debians,
//! installed, mounted through fstab, removed and purged; the .rpm and the static programs in empty roots; the
//! unit under a systemd of its own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use support::*;

fn packaging(name: &str) -> PathBuf {
    project().join("packaging").join(name)
}

fn unit() -> String {
    fs::read_to_string(packaging("systemd/chainfs@.service")).expect("the unit")
}

/// A script whose mounts and processes end with it.
fn apart(script: &str) -> std::process::Command {
    let mut command = tool("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-ec"]);
    command.arg(script);
    command
}

#[test]
fn systemd_accepts_the_units() {
    let store = Store::new();
    // The unit as it is, but for the program, which is not installed here.
    let text = unit().replace("/usr/bin/chainfs", chainfs_binary());
    fs::write(store.beside("chainfs@.service"), text).expect("a unit");
    let mut files = vec![store.beside("chainfs@images.service")];
    std::os::unix::fs::symlink("chainfs@.service", &files[0]).expect("an instance");
    for name in ["mnt-images.mount", "mnt-images.automount"] {
        files.push(store.beside(name));
        fs::copy(packaging("examples").join(name), store.beside(name)).expect("a unit");
    }
    let mut verify = tool("systemd-analyze");
    verify.args(["verify", "--man=no"]).args(&files);
    let (code, out, err) = verify.outcome();
    // Other units of the machine are read, too, and have faults of their own.
    let ours: Vec<&str> = out
        .lines()
        .chain(err.lines())
        .filter(|line| line.contains("chainfs") || line.contains("mnt-images"))
        .collect();
    assert!(code == 0 && ours.is_empty(), "{code}: {ours:#?}");
    // A fault is noticed.
    let wrong = unit().replace("Type=notify", "Type=notify\nNoNewPriviliges=yes");
    fs::write(store.beside("wrong.service"), wrong.replace("/usr/bin/chainfs", chainfs_binary()))
        .expect("a unit");
    let (_, out, err) =
        tool("systemd-analyze").args(["verify", "--man=no"]).arg(store.beside("wrong.service")).outcome();
    assert!((out + &err).contains("NoNewPriviliges"));
}

/// What gives a service a mount namespace of its own (systemd.exec(5)): its mounts would be seen by no one
/// else.
#[test]
fn the_unit_mounts_where_everybody_sees_it() {
    let forbidden = [
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateUsers",
        "PrivateNetwork",
        "PrivateIPC",
        "Protect",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "TemporaryFileSystem",
        "BindPaths",
        "BindReadOnlyPaths",
        "RootDirectory",
        "RootImage",
        "MountImages",
        "ExtensionImages",
        "DynamicUser",
        "MountFlags",
        "MountAPIVFS",
        "RuntimeDirectory",
        "StateDirectory",
        "CacheDirectory",
        "LogsDirectory",
        "LogNamespace",
        "LoadCredential",
        "SetCredential",
    ];
    let text = unit();
    let keys: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    let found: Vec<_> =
        keys.iter().filter(|key| forbidden.iter().any(|word| key.starts_with(word))).collect();
    assert!(found.is_empty() && keys.len() > 20, "{found:?}");
}

/// The command of the unit, with a listener in systemd's place.
#[test]
fn the_units_command_tells_when_it_is_ready_and_when_it_ends() {
    use std::os::unix::net::UnixDatagram;
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    let place = store.beside("notify");
    let socket = UnixDatagram::bind(&place).expect("a socket");
    socket.set_read_timeout(Some(support::tools::hang())).expect("a limit");
    let mut command = std::process::Command::new("env");
    command.arg(format!("NOTIFY_SOCKET={}", place.display())).arg(chainfs_binary());
    let mount = Mount::foreground(&store, command, "");
    let received = || {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).expect("a message");
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let ready = received();
    assert!(ready.contains("READY=1\n") && ready.contains("STATUS=serving "), "{ready}");
    assert!(ready.contains(&*mount.dir().to_string_lossy()), "{ready}");
    mount.umount();
    let last = std::iter::repeat_with(received).find(|message| !message.starts_with("STATUS="));
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
}

/// An upgrade replaces the program of a running mount; its workers are still that program.
#[test]
fn a_mount_survives_the_upgrade_and_the_removal_of_its_program() {
    let store = Store::new();
    guest(&store, "disk.raw");
    let program = store.beside("program");
    fs::copy(chainfs_binary(), &program).expect("a program");
    let mount = Mount::foreground(&store, std::process::Command::new(&program), "");
    // As dpkg does it: the new file under another name, then renamed over the old one; then removed.
    fs::write(store.beside("new"), "of another version").expect("a file");
    fs::rename(store.beside("new"), &program).expect("an upgrade");
    let names = mount.names("disk/files/active");
    let volume = names.iter().find(|name| !name.contains('.')).unwrap_or_else(|| panic!("{names:?}"));
    assert_eq!(mount.text(format!("disk/files/active/{volume}/hello")), "of the guest\n");
    fs::remove_file(&program).expect("a removal");
    mount.umount();
}

/// The paths of the lists in Cargo.toml.
fn listed(section: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(project().join("Cargo.toml")).expect("Cargo.toml");
    let (_, rest) = text.split_once(&format!("[package.metadata.{section}]")).expect("a section");
    let rest = rest.split("\n]").next().expect("a list");
    let words = rest.split('"').filter_map(|word| word.strip_prefix("target/package/root/"));
    words.map(str::to_owned).collect()
}

#[test]
fn both_packages_have_all_files() {
    let (deb, rpm) = (listed("deb"), listed("generate-rpm"));
    let differing: Vec<&String> = deb.symmetric_difference(&rpm).collect();
    // Debian has a place of its own for zsh, its copyright is an option of cargo-deb, and lintian is its.
    let known = ["zsh", "/copyright", "/lintian/"];
    let is_known = |path: &&&String| known.iter().any(|known| path.contains(known));
    assert!(differing.len() == 4 && differing.iter().all(|path| is_known(&path)), "{differing:?}");
    assert!(deb.len() > 14, "{deb:?}");
    let script = fs::read_to_string(packaging("build.sh")).expect("the script");
    for path in
        ["usr/bin/chainfs", "usr/sbin/mount.chainfs", "usr/sbin/mount.fuse.chainfs", "etc/chainfs.toml"]
    {
        assert!(deb.contains(path) && script.contains(path), "{path}");
    }
    tool("bash").arg("-n").arg(packaging("build.sh")).succeeds();
}

/// Runs a shell script in a directory as the root of a machine, in namespaces of its own: no mount is left.
fn in_machine(root: &Path, script: &str) -> String {
    let outer = r#"
        mount --rbind "$ROOT" "$ROOT"; cd "$ROOT"
        mount -t proc proc proc; mount -t sysfs sysfs sys; mount -t tmpfs tmpfs dev
        for device in null zero random urandom fuse; do touch dev/$device; mount --bind /dev/$device dev/$device; done
        mkdir -p dev/pts dev/shm; ln -s /proc/self/fd dev/fd
        exec chroot . /bin/sh -ec "$SCRIPT"
    "#;
    let mut command = apart(outer);
    command.env("ROOT", root).env("SCRIPT", script).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C").succeeds()
}

/// A clean system with these packages, made once.
fn debian(suite: &str, packages: &str) -> PathBuf {
    let tools = project().join("target/tools");
    let archive = tools.join(format!("{suite}-{}.tar", packages.replace(',', "-")));
    if !archive.exists() {
        let place = archive.with_extension("new");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).expect("a directory");
        let mut debootstrap = tool("debootstrap");
        debootstrap.args(["--variant=minbase", &format!("--include={packages}"), suite]);
        debootstrap.arg(place.join("root")).arg("http://deb.debian.org/debian").succeeds();
        let mut tar = tool("tar");
        tar.args(["--xattrs", "--numeric-owner", "-C"]).arg(place.join("root"));
        tar.arg("-cf").arg(place.join("tar")).arg(".").succeeds();
        fs::rename(place.join("tar"), &archive).expect("an archive");
        fs::remove_dir_all(&place).expect("a directory");
    }
    archive
}

/// Every file of the machine, but for what running programs leave.
fn files(root: &Path) -> BTreeSet<String> {
    let mut find = tool("find");
    find.arg(".").args(["-xdev", "-not", "-path", "./var/lib/dpkg/*", "-not", "-path", "./var/log/*"]);
    find.args(["-not", "-path", "./var/cache/*", "-not", "-path", "./tmp/*", "-not", "-path", "./run/*"]);
    find.current_dir(root).succeeds().lines().map(str::to_owned).collect()
}

/// Makes a package of what is tested here.
fn made(format: &str) -> PathBuf {
    let programs = Path::new(chainfs_binary()).parent().expect("a directory");
    let profile = match programs.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(profile) => profile,
        None => "checked",
    };
    let mut build = tool("bash");
    build.arg(packaging("build.sh")).args(["--profile", profile, format]).current_dir(project()).succeeds();
    let extension = if format == "musl" { "gz" } else { format };
    let packages = fs::read_dir(project().join("target/package")).expect("packages");
    let mut packages = packages.map(|entry| entry.expect("an entry").path());
    packages.find(|path| path.extension().is_some_and(|have| have == extension)).expect("a package")
}

#[test]
#[ignore = "takes minutes"]
fn a_package_comes_mounts_and_goes_in_a_clean_debian() {
    let package = &made("deb");
    let (_, said, _) = tool("lintian").args(["--tag-display-limit", "0"]).arg(package).outcome();
    let faults: Vec<&str> = said.lines().filter(|line| line.starts_with(['E', 'W'])).collect();
    assert!(faults.is_empty(), "{faults:#?}");

    let store = Store::new();
    store.raw("base.raw", MIB, 7);
    store.overlay("monday.qcow2", "base.raw", "raw", "");
    store.overlay("web.qcow2", "monday.qcow2", "qcow2", "");
    for suite in ["bookworm", "trixie"] {
        let archive = debian(suite, "fuse3");
        let root = store.beside(suite);
        fs::create_dir(&root).expect("a directory");
        tool("tar")
            .args(["--xattrs", "--numeric-owner", "-C"])
            .arg(&root)
            .arg("-xf")
            .arg(&archive)
            .succeeds();
        fs::copy(package, root.join("chainfs.deb")).expect("a package");
        tool("cp").arg("-r").arg(store.root()).arg(root.join("srv/images")).succeeds();
        let before = files(&root);
        let begun = Instant::now();
        let said = in_machine(
            &root,
            r"
            dpkg -i /chainfs.deb >&2
            mkdir -p /mnt/images /mnt/second
            echo '/srv/images /mnt/images chainfs nofail 0 0' >> /etc/fstab
            echo '/srv/images /mnt/second fuse.chainfs noauto,ro 0 0' >> /etc/fstab
            chainfs doctor | grep '^problem' && exit 3
            mount -a
            cmp /srv/images/base.raw /mnt/images/web/snapshots/base.raw
            echo first file read
            umount /mnt/images
            mount /mnt/second
            cmp /srv/images/base.raw /mnt/second/web/snapshots/base.raw
            # The package goes while a mount runs: it goes on.
            dpkg -r chainfs >&2
            cmp /srv/images/base.raw /mnt/second/web/snapshots/monday.raw
            umount /mnt/second
            test -f /etc/chainfs.toml
            dpkg -P chainfs >&2
            test ! -e /etc/chainfs.toml
            sed -i /chainfs/d /etc/fstab
            rmdir /mnt/images /mnt/second
            echo all well
        ",
        );
        eprintln!("{suite}: {:?}", begun.elapsed());
        assert!(said.ends_with("first file read\nall well\n"), "{suite}: {said}");
        let left: Vec<String> = files(&root).difference(&before).cloned().collect();
        let is_the_stores = |path: &&String| path.starts_with("./srv/images/.chainfs");
        let left: Vec<&String> = left.iter().filter(|path| !is_the_stores(path)).collect();
        assert!(left.is_empty(), "{suite}: {left:#?}");
    }
}

/// An .rpm has the files of the .deb, runs nothing when it comes and goes, and asks for the C library it
/// needs.
#[test]
#[ignore = "takes minutes"]
fn an_rpm_installs_in_an_empty_root() {
    let store = Store::new();
    let package = made("rpm");
    let ask =
        |words: &[&str]| tool("rpm").args(["-q", "-p", "--nosignature"]).args(words).arg(&package).succeeds();
    let files = ask(&["-l"]);
    for path in listed("generate-rpm") {
        let path = path.trim_end_matches('*').trim_end_matches("*.");
        assert!(files.lines().any(|line| line.starts_with(&format!("/{path}"))), "{path}: {files}");
    }
    assert_eq!(ask(&["--scripts"]), "");
    let needed = ask(&["--requires"]);
    assert!(needed.lines().any(|line| line.starts_with("libc.so.6(GLIBC_2.")), "{needed}");
    assert!(!needed.contains("/bin/sh"), "{needed}");
    let modes = ask(&["-l", "-v"]);
    assert!(!modes.lines().any(|line| line.starts_with("-rwxrwxrwx")), "{modes}");
    assert!(ask(&["--recommends"]).contains("fuse3"));
    assert_eq!(ask(&["--configfiles"]), "/etc/chainfs.toml\n");
    let root = store.beside("root");
    let rpm = |words: &[&str]| {
        let mut command = tool("rpm");
        command.arg("--root").arg(&root).args(words);
        command
    };
    rpm(&["--initdb"]).succeeds();
    rpm(&["-i", "--nodeps", "--nosignature"]).arg(&package).succeeds();
    // Sizes, sums, modes, owners and links are those of the package.
    assert_eq!(rpm(&["-V", "--nodeps", "chainfs"]).succeeds(), "");
    tool(root.join("usr/bin/chainfs").to_str().expect("text")).arg("--version").succeeds();
    let helper = |name: &str| fs::read(root.join("usr/sbin").join(name)).expect("a program");
    assert!(helper("mount.fuse.chainfs") == helper("mount.chainfs"));
    rpm(&["-e", "--nodeps", "chainfs"]).succeeds();
    assert!(!root.join("usr/bin/chainfs").exists() && !root.join("etc/chainfs.toml").exists());
}

/// The programs of the tarball run where there is nothing else.
#[test]
#[ignore = "takes minutes"]
fn the_static_programs_need_an_empty_root_and_the_device() {
    let store = Store::new();
    let package = made("musl");
    let root = store.beside("root");
    for directory in ["dev", "proc", "srv", "mnt", "usr"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    let mut tar = tool("tar");
    tar.args(["--strip-components=1", "-C"]).arg(&root).arg("-xzf").arg(&package).succeeds();
    for program in ["usr/bin/chainfs", "usr/sbin/mount.chainfs"] {
        let (_, out, err) = tool("ldd").arg(root.join(program)).outcome();
        assert!(
            (out.clone() + &err).contains("statically linked") || err.contains("not a dynamic"),
            "{out}{err}"
        );
    }
    store.raw("base.raw", MIB, 7);
    store.overlay("monday.qcow2", "base.raw", "raw", "compression_type=zstd");
    store.overlay("web.qcow2", "monday.qcow2", "qcow2", "");
    guest(&store, "guest.raw");
    tool("mv").arg(store.root()).arg(root.join("srv/images")).succeeds();
    let script = r#"
        cd "$ROOT"
        for device in fuse null; do touch dev/$device; mount --bind /dev/$device dev/$device; done
        mount -t proc proc proc
        inside() { chroot "$ROOT" /usr/bin/chainfs "$@"; }
        inside mount /srv/images /mnt
        cmp srv/images/base.raw mnt/web/snapshots/base.raw
        # A worker, with the C library's own system calls in its sandbox.
        cat mnt/guest/files/active/*/hello
        inside tree /srv/images
        inside ls -l guest.raw: 2>/dev/null || inside ls -l /srv/images/guest.raw:
        inside snapshot /mnt/web wednesday
        inside commit -p --top wednesday --base monday /mnt/web
        inside delete /mnt/web monday
        inside clone --from base /mnt/web web02
        inside resize /mnt/web +1M
        printf written | dd of=mnt/web/active.raw conv=notrunc,fsync status=none
        test "$(head -c 7 mnt/web/active.raw)" = written
        inside pull -p /mnt/web
        inside check /srv/images/web.qcow2
        inside doctor /mnt | grep ^problem && exit 3
        inside umount /mnt
        test -z "$(grep " $ROOT/mnt " /proc/self/mountinfo)"
        echo all well
    "#;
    let mut command = apart(script);
    let (code, out, err) = command.env("ROOT", &root).outcome();
    assert!(code == 0 && out.ends_with("all well\n") && out.contains("of the guest\n"), "{code}: {out}{err}");
}

/// systemd as the first process of a clean Debian: the unit starts, is hardened, does all that a mount does,
/// tells what it is doing, restarts and stops.
#[test]
#[ignore = "takes minutes"]
fn systemd_runs_the_unit_and_everybody_sees_its_mount() {
    let store = Store::new();
    store.raw("base.raw", MIB, 7);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    let root = store.beside("machine");
    fs::create_dir(&root).expect("a directory");
    let archive = debian("bookworm", "fuse3,systemd,systemd-sysv,dbus");
    tool("tar").args(["--xattrs", "--numeric-owner", "-C"]).arg(&root).arg("-xf").arg(&archive).succeeds();
    fs::copy(chainfs_binary(), root.join("usr/bin/chainfs")).expect("a program");
    let unit = root.join("usr/lib/systemd/system/chainfs@.service");
    fs::copy(packaging("systemd/chainfs@.service"), unit).expect("a unit");
    guest(&store, "guest.raw");
    // Three gigabytes to copy: a command that takes a while.
    tool("sh").args(["-c", "yes chainfs | head -c 3G > \"$0\""]).arg(store.path("big.raw")).succeeds();
    store.overlay("large.qcow2", "big.raw", "raw", "");
    tool("mv").arg(store.root()).arg(root.join("srv/images")).succeeds();
    for directory in [
        "etc/chainfs",
        "mnt/images",
        "etc/systemd/system/multi-user.target.wants",
        "etc/systemd/system/chainfs@images.service.d",
    ] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    fs::copy(packaging("examples/images.conf"), root.join("etc/chainfs/images.conf")).expect("settings");
    // A program under the same rules whose call is not in the filter's list: everybody else may give it.
    let drop_in = "[Service]\nExecStartPre=/bin/sh -c 'nice -n 5 true 2>/niceness; exit 0'\n";
    fs::write(root.join("etc/systemd/system/chainfs@images.service.d/probe.conf"), drop_in)
        .expect("a drop-in");
    let probe = "[Unit]\nAfter=chainfs@images.service\nWants=chainfs@images.service\n[Service]\nType=oneshot\n\
        ExecStart=/bin/sh -e /probe.sh\nExecStopPost=/bin/systemctl exit 0\nStandardOutput=file:/probe.out\n\
        StandardError=file:/probe.err\n";
    fs::write(root.join("etc/systemd/system/probe.service"), probe).expect("a unit");
    let wanted = root.join("etc/systemd/system/multi-user.target.wants/probe.service");
    std::os::unix::fs::symlink("../probe.service", wanted).expect("a link");
    fs::write(root.join("probe.sh"), PROBE).expect("a script");
    let outer = r#"
        set -e
        group=/sys/fs/cgroup/unified
        test -d $group || group=/sys/fs/cgroup
        group=$group/chainfs-test-$$
        mkdir $group
        trap 'find $group -depth -type d -exec rmdir {} \;' EXIT
        sh -c 'echo $$ > $0/cgroup.procs; exec unshare --mount --pid --fork --kill-child --uts --ipc --cgroup \
            --propagation private sh -c "$MACHINE"' $group
    "#;
    let machine = r#"
        set -e
        mount --rbind "$ROOT" "$ROOT"; cd "$ROOT"
        mount -t proc proc proc; mount -t sysfs sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
        mount -t tmpfs tmpfs dev; mount -t tmpfs tmpfs run; mount -t tmpfs tmpfs tmp
        for device in null zero full random urandom fuse; do touch dev/$device; mount --bind /dev/$device dev/$device; done
        mkdir -p dev/pts dev/shm; ln -s /proc/self/fd dev/fd
        pivot_root . mnt; cd /; umount -l /mnt
        exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
    "#;
    let begun = Instant::now();
    let mut command = tool("sh");
    command.args(["-c", outer]).env("ROOT", &root).env("MACHINE", machine);
    let (code, out, err) = command.outcome();
    eprintln!("systemd: {:?}", begun.elapsed());
    let text = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
    let said = text("probe.out");
    assert!(said.ends_with("inactive\nall well\n"), "{code} {out}{err}\n{said}\n{}", text("probe.err"));
    assert!(said.starts_with("active\n0\nserving /srv/images on /mnt/images\n"), "{said}");
    for words in ["NoNewPrivs:\t1", "Seccomp:\t2", "of the guest", "\nrunning: serving", "\nstopped: serving"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(text("niceness").contains("Operation not permitted"), "{}", text("niceness"));
    // The journal's records, each with its fields.
    let records: Vec<serde_json::Value> =
        text("journal.json").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let has = |message: &str, field: &str, value: &str| {
        records.iter().any(|record| {
            let of = |name: &str| record[name].as_str().unwrap_or_default();
            of("MESSAGE").contains(message) && of(field) == value && of("SYSLOG_IDENTIFIER") == "chainfs"
        })
    };
    for (message, field, value) in [
        ("mounted", "CHAINFS_STORE", "/srv/images"),
        ("mounted", "PRIORITY", "6"),
        ("mounted", "CHAINFS_MOUNT", "/mnt/images"),
        ("snapshot wednesday", "CHAINFS_COMMAND", "snapshot wednesday"),
        ("snapshot wednesday", "CHAINFS_CHAIN", "web"),
        ("pull", "CHAINFS_CHAIN", "large"),
    ] {
        assert!(has(message, field, value), "{message} {field}={value}\n{}", text("journal.json"));
    }
    // The kernel reads raw layers by itself: the unit has the right to let it.
    assert!(!text("journal.json").contains("no passthrough"), "{}", text("journal.json"));
}

/// What is tried on a machine that systemd runs.
const PROBE: &str = r#"
    state() { for key in ActiveState NRestarts StatusText; do systemctl show chainfs@images -P $key; done; }
    process() { systemctl show -P MainPID chainfs@images; }
    # told WORDS: the status text, once it has these words.
    told() {
        for i in $(seq 600); do
            text=$(systemctl show chainfs@images -P StatusText)
            case $text in *"$1"*) echo "$text"; return ;; esac
            sleep 0.1
        done
        echo "never told: $1: $text" >&2; return 1
    }
    # give CHAIN VERB WORDS: a command, until it is done.
    give() {
        control=/mnt/images/$1/control
        echo "$3" > $control/$2
        while grep -q '^state: running' $control/status; do sleep 0.1; done
        grep -q '^state: done' $control/status || { cat $control/status >&2; return 1; }
    }
    unmounted() { test -z "$(grep fuse.chainfs /proc/self/mountinfo)"; }
    state
    cmp /srv/images/base.raw /mnt/images/web/snapshots/base.raw
    grep -E '^(NoNewPrivs|Seccomp):' /proc/$(process)/status
    # A guest's file, which a worker in a sandbox of its own reads.
    cat /mnt/images/guest/files/active/*/hello
    give web snapshot wednesday
    give web snapshot thursday
    give web snapshot friday
    give web commit 'top=friday base=thursday'
    give web delete thursday
    give web clone 'web02 from=wednesday'
    give web resize +1M
    give web revert 'to=wednesday save=before'
    give web rebase base=base.raw
    give web pull ''
    give web02 snapshot internal-one\ internal
    printf written | dd of=/mnt/images/web02/active.raw conv=notrunc,fsync status=none
    test "$(head -c 7 /mnt/images/web02/active.raw)" = written
    # Killed, it is started again.
    kill -KILL $(process)
    while ! test -f /mnt/images/web/active.raw; do sleep 0.2; done
    cmp /srv/images/base.raw /mnt/images/web02/snapshots/base.raw
    # A command that runs is in the status, with its share done; stopped with the unit, it goes on with it.
    echo > /mnt/images/large/control/pull
    echo "running: $(told ' % ')"
    systemctl stop chainfs@images
    unmounted
    chainfs recover --dry-run /srv/images
    systemctl start chainfs@images
    echo "stopped: $(told ' % ')"
    while grep -q '^state: running' /mnt/images/large/control/status; do sleep 0.5; done
    cmp /srv/images/big.raw /mnt/images/large/active.raw
    test ! -e /mnt/images/large/snapshots/big.raw
    journalctl --flush
    journalctl -u chainfs@images -o json > /journal.json
    systemctl stop chainfs@images
    unmounted
    systemctl is-failed chainfs@images || echo all well
"#;

/// An image with a file system of a guest's.
fn guest(store: &Store, name: &str) {
    let disk = store.put(name, &[]);
    fs::File::options().write(true).open(&disk).expect("a disk").set_len(8 * MIB).expect("a size");
    let tree = store.dir("../guest");
    fs::write(tree.join("hello"), "of the guest\n").expect("a file");
    tool("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&disk).succeeds();
}
