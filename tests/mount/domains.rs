//! Stores that libvirt manages: names of chains and layers that stay, leaves that virsh left behind, and old
//! names as links. The definitions are files as libvirt writes them; `live/libvirt.rs` has a real one.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use support::command::{Control, give};
use support::*;

/// A store as virsh leaves it: `vm.qcow2` <- `vm.snap1` <- `vm.snap2`, with directories for definitions.
struct Managed {
    store: Store,
    definitions: PathBuf,
}

impl Managed {
    fn new() -> Self {
        let store = Store::new();
        store.create("vm.qcow2", 4 * MIB, "");
        store.scribble("vm.qcow2", "qcow2", 1);
        for (name, backing) in [("vm.snap1", "vm.qcow2"), ("vm.snap2", "vm.snap1")] {
            store.overlay(name, backing, "qcow2", "");
            store.scribble(name, "qcow2", 2);
        }
        let definitions = store.beside("definitions");
        fs::create_dir_all(definitions.join("vm")).expect("a directory");
        Self { store, definitions }
    }

    /// Defines a domain as libvirt does: a new file takes the name.
    fn define(&self, domain: &str, disk: &str) {
        let disk = self.store.path(disk);
        self.write(
            &format!("{domain}.xml"),
            &format!(
                "<domain type='kvm'><name>{domain}</name><devices><disk type='file' device='disk'>\
                 <driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda'/></disk></devices></domain>",
                disk.display()
            ),
        );
    }

    fn define_snapshot(&self, name: &str, state: &str, overlay: &str) {
        let path = |file: &str| self.store.path(file).display().to_string();
        self.write(
            &format!("vm/{name}.xml"),
            &format!(
                "<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external' type='file'>\
                 <source file='{}'/></disk></disks><domain><name>vm</name><devices><disk type='file'>\
                 <source file='{}'/><target dev='vda'/></disk></devices></domain></domainsnapshot>",
                path(overlay),
                path(state)
            ),
        );
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.definitions.join(name);
        fs::write(path.with_extension("xml.new"), text).expect("room");
        fs::rename(path.with_extension("xml.new"), path).expect("a name");
    }

    fn mount(&self, options: &str) -> Mount {
        Mount::with(&self.store, &format!("domains={}{options}", self.definitions.display()))
    }
}

fn chains(mount: &Mount) -> Vec<String> {
    let is_chain =
        |name: &String| !name.starts_with('.') && mount.path(name).is_dir() && !mount.path(name).is_symlink();
    mount.names(".").into_iter().filter(is_chain).collect()
}

#[test]
fn a_layer_has_one_name_however_many_overlays_come() {
    let managed = Managed::new();
    let mount = managed.mount("");
    assert_eq!(chains(&mount), ["vm"]);
    assert_eq!(mount.names("vm/snapshots"), ["vm.raw", "vm.snap1.raw"]);
    managed.store.overlay("vm.snap3", "vm.snap2", "qcow2", "");
    eventually("the new overlay is the disk", || {
        mount.names("vm/snapshots") == ["vm.raw", "vm.snap1.raw", "vm.snap2.raw"]
    });
    let tree = mount.text(".chainfs/tree.txt");
    for name in ["● vm ", "● vm.snap1 ", "● vm.snap2 ", "◆ active "] {
        assert!(tree.contains(name), "{name}: {tree}");
    }
    let control = Control::of(&mount, "vm");
    control.done("commit top=vm.snap2 base=vm.snap1");
    // The file that virsh named gets an extension of its own, so that the layer is called as asked.
    control.done("snapshot monday");
    assert_eq!(mount.names("vm/snapshots"), ["monday.raw", "vm.raw", "vm.snap1.raw"]);
    assert!(managed.store.path("monday.qcow2").exists() && managed.store.path("vm.snap3").exists());
    mount.umount();
}

#[test]
fn a_disk_keeps_its_directory_and_the_leaf_left_behind_is_told() {
    let managed = Managed::new();
    let store = &managed.store;
    managed.define("vm", "vm.snap2");
    managed.define_snapshot("snap1", "vm.qcow2", "vm.snap1");
    let mount = managed.mount(",trash=1");
    let tree = mount.text(".chainfs/tree.txt");
    assert!(tree.contains("snapshot snap1 of domain vm") && tree.contains("after snapshot snap1"), "{tree}");
    assert!(tree.contains("writable, domain vm"), "{tree}");

    // virsh reverts to a new overlay; the domain uses that from then on.
    store.overlay("vm.1795944043", "vm.snap1", "qcow2", "");
    managed.define("vm", "vm.1795944043");
    eventually("the new leaf is the disk", || chains(&mount) == ["vm", "vm.snap2"]);
    eventually("the old leaf is left behind", || !mount.path("vm.snap2/active.raw").exists());
    assert!(mount.path("vm/active.raw").exists());
    let problem = mount.text("vm.snap2/info/problem.txt");
    assert!(problem.contains("was left behind: the domain vm has another file"), "{problem}");
    let tree = mount.text(".chainfs/tree.txt");
    let last = tree.lines().last().expect("a tree");
    assert!(last.contains("active") && last.contains("domain vm"), "the main line is the domain's: {tree}");
    assert!(tree.contains("left behind by domain vm"), "{tree}");
    assert!(mount.path("vm.snap2/snapshots/vm.snap2.raw").exists(), "it can be read");
    let active = fs::read(mount.path("vm/active.raw")).expect("a disk");

    // It is removed by the usual verb, and can be restored.
    // Its status goes with its chain.
    assert_eq!(give(&mount.path("vm.snap2/control/delete"), b"vm.snap2"), None);
    eventually("it is gone", || chains(&mount) == ["vm"]);
    assert!(!store.path("vm.snap2").exists());
    assert!(mount.text(".chainfs/trash.txt").contains("vm.snap2"));
    assert!(fs::read(mount.path("vm/active.raw")).expect("a disk") == active);
    mount.umount();
    for name in ["vm.qcow2", "vm.snap1", "vm.1795944043"] {
        store.img(["check", "-q", name]);
    }
}

#[test]
fn the_leaf_above_a_committed_disk_is_left_behind() {
    let managed = Managed::new();
    // virsh blockcommit --active --pivot without --delete: the domain uses the base, below its old overlays.
    managed.define("vm", "vm.qcow2");
    let mount = managed.mount("");
    assert_eq!(chains(&mount), ["vm"], "the directory keeps its name");
    assert!(!mount.path("vm/active.raw").exists());
    assert!(mount.text("vm/info/problem.txt").contains("vm.snap2 was left behind"));
    for name in ["vm.snap2", "vm.snap1"] {
        Control::of(&mount, "vm").done(&format!("delete {name}"));
    }
    eventually("the disk is active again", || mount.path("vm/active.raw").exists());
    mount.umount();
}

#[test]
fn only_definitions_make_a_leaf_one_that_was_left_behind() {
    let managed = Managed::new();
    let store = &managed.store;
    store.overlay("vm.test", "vm.snap1", "qcow2", "");
    store.overlay("vm-clone.qcow2", "vm.snap1", "qcow2", "");
    // Two virtual machines on one base look just like a disk and a leaf that was left behind.
    let mount = managed.mount("");
    assert_eq!(chains(&mount), ["vm-clone", "vm.snap2", "vm.test"]);
    for name in chains(&mount) {
        assert!(mount.path(format!("{name}/active.raw")).exists(), "{name}");
    }
    // A file that came after the definition may be the domain's disk in a moment.
    managed.define("vm", "vm.snap2");
    store.overlay("vm.new", "vm.snap1", "qcow2", "");
    eventually("it is a disk", || mount.path("vm.new/active.raw").exists());
    fs::remove_file(store.path("vm.new")).expect("a file");
    // A domain's disk, a snapshot's state, another stem, and what the user has named are not left behind.
    managed.define("vm", "vm.snap2");
    eventually("the disk has its name", || chains(&mount) == ["vm", "vm-clone", "vm.test"]);
    eventually("one is left behind", || !mount.path("vm.test/active.raw").exists());
    assert!(mount.path("vm/active.raw").exists() && mount.path("vm-clone/active.raw").exists());
    managed.define_snapshot("test", "vm.test", "vm.other");
    let is_left_behind = || mount.text(".chainfs/tree.txt").contains("left behind");
    eventually("a snapshot needs it", || !is_left_behind());
    assert!(!mount.path("vm.test/active.raw").exists(), "nobody changes a snapshot's state");
    let plan = mount.path("vm.test/control/plan");
    give(&plan, b"delete vm.test");
    let text = fs::read_to_string(&plan).expect("a plan");
    assert!(text.contains("virsh snapshot-delete vm test --metadata"), "{text}");
    fs::remove_file(managed.definitions.join("vm/test.xml")).expect("a file");
    managed.define("other", "vm.test");
    eventually("another domain has it", || mount.text(".chainfs/tree.txt").contains("domain other"));
    assert_eq!(chains(&mount), ["vm-clone", "vm.snap2", "vm.test"], "both are disks");
    fs::remove_file(managed.definitions.join("other.xml")).expect("a file");
    eventually("it is left behind again", || !mount.path("vm.test/active.raw").exists());
    assert_eq!(give(&mount.path("vm.test/control/snapshot"), b"x"), Some(Errno::ROFS));
    mount.umount();
    let mount = managed.mount(",name=vm.test:testing");
    assert_eq!(chains(&mount), ["testing", "vm", "vm-clone"]);
    assert!(mount.path("testing/active.raw").exists());
    mount.umount();
    // Nor do definitions that others could have written.
    let definition = managed.definitions.join("vm.xml");
    fs::set_permissions(&definition, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("a mode");
    let mount = managed.mount("");
    assert_eq!(chains(&mount), ["vm-clone", "vm.snap2", "vm.test"]);
    mount.umount();
    let mount = managed.mount(",nodomains");
    assert!(mount.path("vm.test/active.raw").exists());
    mount.umount();
}

#[test]
fn a_former_name_leads_to_the_same_disk() {
    let managed = Managed::new();
    let store = &managed.store;
    let mount = Mount::new(store);
    let disk = fs::read(mount.path("vm/active.raw")).expect("a disk");
    // Another leaf of the same stem comes: both have their full names.
    store.create("vm.raw.qcow2", MIB, "");
    fs::rename(store.path("vm.raw.qcow2"), store.path("vm.qcow")).expect("a name");
    eventually("the disk has its full name", || chains(&mount) == ["vm.qcow", "vm.snap2"]);
    let leads = |name: &str, to: &str| {
        eventually("a link", || fs::read_link(mount.path(name)).is_ok_and(|found| found == Path::new(to)));
    };
    leads("vm", "vm.snap2");
    assert!(fs::read(mount.path("vm/active.raw")).expect("a disk") == disk);
    // An overlay on it continues the same disk.
    store.overlay("vm.snap3", "vm.snap2", "qcow2", "");
    leads("vm", "vm.snap3");
    leads("vm.snap2", "vm.snap3");
    // The name is a chain's again.
    fs::remove_file(store.path("vm.qcow")).expect("a file");
    eventually("it is no link any more", || chains(&mount) == ["vm"]);
    leads("vm.snap3", "vm");
    mount.umount();
    let mount = Mount::new(store);
    assert!(!mount.path("vm.snap3").exists(), "for the life of the mount");
    mount.umount();
}
