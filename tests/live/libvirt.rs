//! Virtual machines of a libvirt with its default configuration on disks of a mount: they start, are saved,
//! restored and stopped, while the chain changes. A guest verifies what it writes, and QEMU reads its last
//! synced bytes in the image afterwards.
//!
//! The daemons run in namespaces of their own, with their directories in memory: the machine's own libvirt is
//! not touched, and nothing outlives the test.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::command::Control;
use support::*;

use crate::guest::{BLOCK, BLOCKS, BOOT_LIMIT, Boot, Console, sum};

/// Starts the daemons of the system's libvirt. `$1`: the directory of their sockets.
const SYSTEM: &str = r#"
    set -e
    for dir in /run /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
        mount -t tmpfs -o mode=755 tmpfs $dir
    done
    mkdir -p /run/libvirt /var/log/libvirt/qemu "$1/lib/images"
    # Domains are defined there; the configuration is the one that is installed.
    cp -a /etc/libvirt "$1/etc"
    mount --bind "$1/etc" /etc/libvirt
    mount --bind "$1/lib" /var/lib/libvirt
    mount --bind "$1" /run/libvirt
    virtlogd &
    libvirtd &
    # This shell is the first process here, and reaps what the daemons start and leave.
    wait
"#;

/// A libvirt that ends with this.
struct Libvirt {
    daemons: Child,
    sockets: PathBuf,
}

impl Libvirt {
    fn new(store: &Store) -> Self {
        let sockets = store.beside("libvirt");
        fs::create_dir(&sockets).expect("a directory");
        let daemons = Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "--net", "--pid", "--fork", "--kill-child=KILL"])
            .args(["--mount-proc", "sh", "-c", SYSTEM, "sh"])
            .arg(&sockets)
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare(1) runs");
        let libvirt = Self { daemons, sockets };
        eventually("libvirtd listens", || {
            libvirt.command(["list"]).output().expect("virsh").status.success()
        });
        libvirt
    }

    fn command<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let mut virsh = tool("virsh");
        let socket = self.sockets.join("libvirt-sock");
        virsh.args(["-c", &format!("qemu+unix:///system?socket={}", socket.display())]).args(words);
        virsh
    }

    fn virsh<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> String {
        self.command(words).succeeds()
    }

    /// The option of a mount that reads this one's definitions.
    fn domains(&self) -> String {
        let directories = ["etc/qemu", "qemu", "lib/qemu/snapshot"].map(|name| self.sockets.join(name));
        directories.map(|path| format!("domains={}", path.display())).join(",")
    }

    /// Why libvirt refuses.
    fn refuses<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> String {
        let out = self.command(words).output().expect("virsh runs");
        assert!(!out.status.success(), "it is done: {}", String::from_utf8_lossy(&out.stdout));
        String::from_utf8_lossy(&out.stderr).into_owned()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let _ = self.daemons.kill();
        let _ = self.daemons.wait();
    }
}

/// The XML of a domain with one disk, as virt-install and most guides write it; `more` are further elements
/// of the disk.
fn domain(store: &Store, name: &str, disk: &Path, more: &str, boot: Option<&Boot>) -> String {
    let os = boot.map_or(String::new(), |boot| {
        format!(
            "<kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline>",
            boot.kernel.display(),
            boot.initramfs.display(),
            boot.words
        )
    });
    let serial = boot.map_or(String::new(), |_| {
        format!(
            "<serial type='unix'><source mode='bind' path='{}'/><target port='0'/></serial>",
            console_path(store).display()
        )
    });
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>192</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type>{os}</os><features><acpi/></features>\
         <on_reboot>destroy</on_reboot><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/>{more}</disk>{serial}</devices></domain>",
        disk.display()
    );
    let path = store.beside(format!("{name}.xml"));
    fs::write(&path, xml).expect("room");
    path.display().to_string()
}

fn console_path(store: &Store) -> PathBuf {
    store.beside("console")
}

fn console(store: &Store) -> Console {
    let line = UnixStream::connect(console_path(store)).expect("the domain's serial line");
    Console::new(line.try_clone().expect("two of a descriptor"), line)
}

/// A store whose images belong to root alone, as virt-install makes them, on the way that QEMU's user can go.
fn store_of_root() -> Store {
    let store = Store::new();
    store.create("base.qcow2", BLOCK * BLOCKS + MIB, "");
    store.scribble("base.qcow2", "qcow2", 1);
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    for (path, mode) in [
        (store.beside(""), 0o711),
        (store.root(), 0o711),
        (store.path("base.qcow2"), 0o600),
        (store.path("web.qcow2"), 0o600),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    }
    store
}

fn owner(path: &Path) -> u32 {
    fs::metadata(path).expect("attributes").uid()
}

/// That no image has another owner or attributes than before.
fn assert_untouched(store: &Store) {
    for name in ["base.qcow2", "web.qcow2"] {
        assert_eq!(owner(&store.path(name)), 0, "{name}");
        let listed = tool("getfattr").args(["--absolute-names", "-m", "-"]).arg(store.path(name)).succeeds();
        assert!(!listed.contains("libvirt"), "{listed}");
    }
}

#[test]
fn a_domain_of_a_default_libvirt_lives_on_an_active_disk() {
    let store = store_of_root();
    let mount = Mount::with(&store, "allow_other");
    let (active, control) = (mount.path("web/active.raw"), Control::of(&mount, "web"));
    let libvirt = Libvirt::new(&store);
    let boot = Boot::new(&store);
    libvirt.virsh(["define", &domain(&store, "web", &active, "", Some(&boot))]);
    libvirt.virsh(["start", "web"]);
    let mut guest = console(&store);
    assert!(owner(&active) != 0, "libvirt gave the disk to QEMU's user");
    assert_untouched(&store);
    guest.says("at work", BOOT_LIMIT);

    // The chain changes under it.
    for command in ["snapshot monday", "snapshot tuesday", "commit top=tuesday base=monday"] {
        control.done(command);
    }
    // A second domain that would write the same disk is refused by QEMU's lock, and the first goes on.
    let second = domain(&store, "second", &active, "", None);
    let refusal = libvirt.refuses(["create", &second]);
    assert!(refusal.contains("Failed to get \"write\" lock"), "{refusal}");
    // A domain that would write a snapshot is told so.
    let monday = mount.path("web/snapshots/monday.raw");
    let refusal = libvirt.refuses(["create", &domain(&store, "writes", &monday, "", None)]);
    assert!(refusal.contains("Permission denied") || refusal.contains("Read-only"), "{refusal}");
    // A snapshot is booted read-only, beside the running guest.
    libvirt.virsh(["create", &domain(&store, "reads", &monday, "<readonly/>", None)]);
    libvirt.virsh(["destroy", "reads"]);

    // It grows.
    let size = BLOCK * BLOCKS + 3 * MIB;
    control.done(&format!("resize {size}"));
    libvirt.virsh(["blockresize", "web", "vda", &format!("{size}B")]);
    assert!(libvirt.virsh(["domblkinfo", "web", "vda"]).contains(&size.to_string()));

    // Its disk is copied into a new chain.
    let copy = store.path("copy.qcow2").display().to_string();
    let copying =
        ["blockcopy", "web", "vda", &copy, "--format", "qcow2", "--transient-job", "--wait", "--finish"];
    libvirt.virsh(copying);
    eventually("the copy is a chain", || mount.top().contains(&"copy".to_owned()));

    // It is saved, its chain changes, and it goes on.
    let saved = store.beside("saved").display().to_string();
    libvirt.virsh(["save", "web", &saved]);
    assert_eq!(owner(&active), 0, "the disk is taken back");
    control.done("snapshot saved");
    libvirt.virsh(["restore", &saved]);
    let mut guest = console(&store);
    control.done("commit top=active base=saved");

    let (want, verdict) = guest.verdict();
    println!("{verdict}");
    eventually("the domain is off", || libvirt.virsh(["domstate", "web"]).contains("shut off"));
    eventually("the disk is taken back", || owner(&active) == 0);

    // libvirt would make a file beside the disk.
    let refusal = libvirt.refuses(["create", &domain(&store, "lost", &active, "<transient/>", None)]);
    assert!(refusal.contains("TRANSIENT-lost") && refusal.contains("Operation not permitted"), "{refusal}");
    // Two domains that agree to share it.
    for name in ["one", "two"] {
        libvirt.virsh(["create", &domain(&store, name, &active, "<shareable/>", None)]);
    }
    for name in ["one", "two"] {
        libvirt.virsh(["destroy", name]);
    }
    drop(libvirt);
    mount.umount();
    assert_untouched(&store);
    let [disk, copied] = ["web.qcow2", "copy.qcow2"].map(|name| {
        store.img(["check", "-q", name]);
        fs::read(store.oracle(name, "qcow2")).expect("what QEMU reads")
    });
    assert_eq!(sum(&disk), want, "what the guest synced last is not what the image holds");
    sum(&copied);
}

#[test]
fn a_disk_of_virsh_keeps_its_directory_through_all_that_virsh_does() {
    let store = store_of_root();
    fs::remove_file(store.path("web.qcow2")).expect("a file");
    fs::rename(store.path("base.qcow2"), store.path("vm.qcow2")).expect("a name");
    let libvirt = Libvirt::new(&store);
    let xml = domain(&store, "vm", &store.path("vm.qcow2"), "", None);
    let text = fs::read_to_string(&xml).expect("a domain").replace("type='raw'", "type='qcow2'");
    fs::write(&xml, text).expect("room");
    libvirt.virsh(["define", &xml]);
    let mount = Mount::with(&store, &libvirt.domains());
    let chains = || -> Vec<String> {
        let is_chain = |name: &String| !name.starts_with('.') && mount.path(name).join("snapshots").is_dir();
        mount.names(".").into_iter().filter(|name| is_chain(name) && !mount.path(name).is_symlink()).collect()
    };
    let tree = || mount.text(".chainfs/tree.txt");
    let is_active_layer = |file: &str| mount.text("vm/info/chain.json").contains(&format!("/{file}\""));
    assert_eq!(chains(), ["vm"]);
    libvirt.virsh(["start", "vm"]);
    for (snapshot, overlay) in [("snap1", "vm.snap1"), ("snap2", "vm.snap2"), ("snap3", "vm.snap3")] {
        libvirt.virsh(["snapshot-create-as", "vm", snapshot, "--disk-only"]);
        eventually("the mount follows", || is_active_layer(overlay) && chains() == ["vm"]);
    }
    // libvirt writes its definitions in between, and after all.
    eventually("the overlay is the disk", || {
        mount.names("vm/snapshots") == ["vm.raw", "vm.snap1.raw", "vm.snap2.raw"]
    });
    eventually("the tree tells of snapshots", || {
        tree().contains("snapshot snap1 of domain vm") && tree().contains("after snapshot snap3 of domain vm")
    });

    // Without --delete, virsh leaves the file behind; its records still speak of it.
    let [top, base] = ["vm.snap2", "vm.snap1"].map(|name| store.path(name).display().to_string());
    libvirt.virsh(["blockcommit", "vm", "vda", "--top", &top, "--base", &base, "--wait"]);
    eventually("the layer is no layer any more", || {
        mount.names("vm/snapshots") == ["vm.raw", "vm.snap1.raw"]
    });
    assert_eq!(chains(), ["vm", "vm.snap2"]);
    assert!(!mount.path("vm.snap2/active.raw").exists());
    libvirt.virsh(["snapshot-delete", "vm", "snap3", "--metadata"]);
    eventually("it is left behind", || tree().contains("left behind by domain vm"));
    let problem = mount.text("vm.snap2/info/problem.txt");
    assert!(problem.contains("was left behind: the domain vm has another file as this disk"), "{problem}");
    Control::of(&mount, "vm.snap2").give("delete vm.snap2");
    eventually("it is removed", || chains() == ["vm"]);
    assert!(!store.path("vm.snap2").exists());

    // A pull leaves whole chains.
    libvirt.virsh(["blockpull", "vm", "vda", "--wait"]);
    eventually("the disk stands alone", || mount.names("vm/snapshots").is_empty());
    assert_eq!(chains(), ["vm", "vm.snap1"]);
    libvirt.virsh(["destroy", "vm"]);
    assert!(mount.path("vm/active.raw").exists() && tree().contains("domain vm"));
    drop(libvirt);
    mount.umount();
    for name in ["vm.qcow2", "vm.snap1", "vm.snap3"] {
        store.img(["check", "-q", name]);
    }
}

/// An ordinary user's mount and the libvirt of that user's session.
const SESSION: &str = r#"
    set -e
    export XDG_RUNTIME_DIR="$HOME/run" XDG_CONFIG_HOME="$HOME/config" XDG_CACHE_HOME="$HOME/cache"
    cd "$HOME"
    bin/chainfs mount store mnt
    trap 'cat cache/libvirt/qemu/log/*.log >&2 || true; bin/chainfs umount --lazy mnt' EXIT
    virsh="virsh -q -c qemu:///session"
    $virsh create web.xml
    $virsh domstate web | grep -q running
    echo monday > mnt/web/control/snapshot
    $virsh save web saved
    $virsh restore saved
    $virsh domstate web | grep -q running
    $virsh destroy web
    $virsh create reads.xml
    $virsh destroy reads
    trap - EXIT
    bin/chainfs umount mnt
    qemu-img check -q store/web.qcow2
    echo all well
"#;

#[test]
fn a_users_session_starts_domains_on_the_users_own_mount() {
    const USER: u32 = 65534;
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    domain(&store, "web", &store.beside("mnt/web/active.raw"), "", None);
    domain(&store, "reads", &store.beside("mnt/web/snapshots/monday.raw"), "<readonly/>", None);
    for dir in ["bin", "run", "config", "cache"] {
        fs::create_dir_all(store.beside(dir)).expect("a directory");
    }
    fs::copy(chainfs_binary(), store.beside("bin/chainfs")).expect("a copy of the binary");
    let home = store.beside("");
    tool("chown").args(["-R", &format!("{USER}:{USER}")]).arg(&home).succeeds();
    // /dev/fuse as udev would make it.
    let outer = r#"
        set -e
        mknod "$HOME/fuse" c 10 229
        chmod 666 "$HOME/fuse"
        mount --bind "$HOME/fuse" /dev/fuse
        setpriv --reuid=65534 --regid=65534 --clear-groups sh -c "$SCRIPT"
    "#;
    let said = tool("unshare")
        .args(["--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child=KILL"])
        .args(["--mount-proc", "sh", "-c", outer])
        .env("HOME", &home)
        .env("SCRIPT", SESSION)
        .succeeds();
    assert!(said.ends_with("all well\n"), "{said}");
    assert_eq!(owner(&store.path("web.qcow2")), USER);
}
