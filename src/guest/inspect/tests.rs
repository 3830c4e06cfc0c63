//! In-memory trees with the layouts of distributions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino, Statistics, Time,
};

enum Node {
    Directory(BTreeMap<Vec<u8>, Ino>),
    File(Vec<u8>),
    Link(Vec<u8>),
}

/// Inode 0 is the root directory.
struct Tree(Vec<Node>);

impl Tree {
    /// From `path content` or `path -> target`; directories are created as needed.
    fn new(files: &[(&str, &str)]) -> Self {
        let mut tree = Self(vec![Node::Directory(BTreeMap::new())]);
        for (path, content) in files {
            let path = path.trim_start_matches('/');
            let (directories, name) = path.rsplit_once('/').unwrap_or(("", path));
            let mut here = Ino(0);
            for directory in directories.split('/').filter(|directory| !directory.is_empty()) {
                here = match tree.lookup(here, directory.as_bytes()).unwrap() {
                    Some(known) => known,
                    None => tree.add(here, directory, Node::Directory(BTreeMap::new())),
                };
            }
            match content.strip_prefix("-> ") {
                Some(target) => tree.add(here, name, Node::Link(target.into())),
                None => tree.add(here, name, Node::File((*content).into())),
            };
        }
        tree
    }

    fn add(&mut self, directory: Ino, name: &str, node: Node) -> Ino {
        let ino = Ino(self.0.len() as u64);
        self.0.push(node);
        let Node::Directory(entries) = &mut self.0[directory.0 as usize] else {
            panic!("{name} is in no directory")
        };
        entries.insert(name.into(), ino);
        ino
    }

    /// The only tree of a volume.
    fn only(files: &[(&str, &str)]) -> Vec<Subvolume> {
        vec![Self::subvolume("", 0, files)]
    }

    fn subvolume(path: &str, id: u64, files: &[(&str, &str)]) -> Subvolume {
        Subvolume { path: Some(path.into()), id, files: Arc::new(Self::new(files)) }
    }
}

/// A volume with these trees.
fn opened<'a>(name: &'a str, trees: &'a [Subvolume]) -> OpenedVolume<'a> {
    OpenedVolume {
        name,
        trees,
        content: VolumeContent::Unknown,
        label: None,
        uuid: None,
        partition_uuid: None,
        partition_label: None,
    }
}

impl FileSystem for Tree {
    fn root(&self) -> Ino {
        Ino(0)
    }

    fn statistics(&self) -> Statistics {
        Statistics::default()
    }

    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        match &self.0[directory.0 as usize] {
            Node::Directory(entries) => Ok(entries.get(name).copied()),
            Node::File(_) | Node::Link(_) => Err(Error::new(ErrorKind::Usage, "not a directory")),
        }
    }

    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        let Node::Directory(entries) = &self.0[directory.0 as usize] else {
            return Err(Error::new(ErrorKind::Usage, "not a directory"));
        };
        for ((name, ino), next) in entries.iter().zip(1..).skip(from as usize) {
            if !each(DirectoryEntry { name: name.clone(), ino: *ino, kind: None, next }) {
                break;
            }
        }
        Ok(())
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        let (kind, size) = match &self.0[ino.0 as usize] {
            Node::Directory(_) => (FileKind::Directory, 0),
            Node::File(content) => (FileKind::File, content.len()),
            Node::Link(target) => (FileKind::Symlink, target.len()),
        };
        let time = Time::default();
        let (size, blocks, links, device) = (size as u64, 0, 1, (0, 0));
        let (accessed, modified, changed, created) = (time, time, time, None);
        let (mode, uid, gid) = (0o755, 0, 0);
        Ok(FileAttributes {
            kind,
            mode,
            uid,
            gid,
            size,
            blocks,
            links,
            device,
            accessed,
            modified,
            changed,
            created,
        })
    }

    fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        match &self.0[ino.0 as usize] {
            Node::Link(target) => Ok(target.clone()),
            Node::Directory(_) | Node::File(_) => Err(Error::new(ErrorKind::Usage, "not a link")),
        }
    }

    fn runs(&self, _: Ino, _: u64, _: u64, _: usize) -> Result<Vec<FileRun>> {
        unreachable!("inspection requests no runs")
    }

    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        let Node::File(content) = &self.0[ino.0 as usize] else {
            return Err(Error::new(ErrorKind::Usage, "not a file"));
        };
        let rest = content.get(at as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn extended_attributes(&self, _: Ino) -> Result<Vec<ExtendedAttribute>> {
        Ok(Vec::new())
    }
}

/// The beginning of a program for x86-64.
const PROGRAM: &str = "\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0";
const DEBIAN: &str = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian \
    GNU/Linux\"\nVERSION_ID=\"12\"\n\
                      VERSION=\"12 (bookworm)\"\nID=debian\nHOME_URL=\"https://www.debian.org/\"\n";

#[test]
fn a_debian_of_several_volumes_is_found_with_its_mounts() {
    let fstab = "# /etc/fstab\n\
        UUID=0E66-6B21 /boot/efi vfat umask=0077 0 1\n\
        \t/dev/mapper/my--vg-root  /  ext4 errors=remount-ro 0 1\n\
        /dev/my-vg/home /home ext4 defaults\n\
        LABEL=\"data\\040disk\" /srv/a\\040b xfs\n\
        PARTUUID=AB-02 none swap sw 0 0\n\
        /dev/vda3 /var ext4\n\
        /dev/nvme0n1p4 /opt ext4\n\
        server:/export /mnt nfs defaults 0 0\n\
        broken\n";
    let root = Tree::only(&[
        ("/etc/os-release", "-> ../usr/lib/os-release"),
        ("/usr/lib/os-release", DEBIAN),
        ("/etc/hostname", "web01\n"),
        ("/etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("/etc/fstab", fstab),
        ("/bin", "-> usr/bin"),
        ("/usr/bin/sh", "-> dash"),
        ("/usr/bin/dash", PROGRAM),
    ]);
    let other = Tree::only(&[("/EFI/debian/grubx64.efi", "")]);
    let volumes = [
        OpenedVolume { uuid: Some("0E66-6B21"), ..opened("p1", &other) },
        OpenedVolume { partition_uuid: Some("ab-02"), ..opened("p2", &other) },
        opened("p3", &other),
        OpenedVolume { label: Some("data disk"), ..opened("p4", &other) },
        opened("my--vg-home", &other),
        opened("my--vg-root", &root),
    ];
    let found = inspect(&volumes);
    let [system] = found.as_slice() else { panic!("{found:?}") };
    let said = [
        &system.id,
        &system.name,
        &system.version,
        &system.pretty_name,
        &system.host_name,
        &system.architecture,
    ];
    let expected =
        ["debian", "Debian GNU/Linux", "12 (bookworm)", "Debian GNU/Linux 12 (bookworm)", "web01", "x86_64"];
    assert_eq!(said.map(|text| text.as_deref().unwrap_or_default()), expected);
    assert_eq!(
        (&*system.root, system.tree, system.reason),
        (&b"my--vg-root"[..], TreeId::main(5), RootReason::Only)
    );
    let mounts: Vec<_> =
        system.mounts.iter().map(|mount| (mount.directory.as_str(), mount.place.as_deref())).collect();
    let expected = [
        ("/boot/efi", Some("p1")),
        ("/", Some("my--vg-root")),
        ("/home", Some("my--vg-home")),
        ("/srv/a b", Some("p4")),
        ("none", Some("p2")),
        ("/var", Some("p3")),
        ("/opt", Some("p4")),
        ("/mnt", None),
    ];
    assert_eq!(mounts, expected);
    assert_eq!(
        (system.mounts[1].kind.as_str(), system.mounts[1].options.as_str()),
        ("ext4", "errors=remount-ro")
    );
}

#[test]
fn usr_may_be_a_volume_of_its_own() {
    let root = Tree::only(&[
        ("/etc/os-release", "-> ../usr/lib/os-release"),
        ("/etc/fstab", "/dev/sda2 /usr ext4 ro 0 0\n"),
        ("/bin", "-> usr/bin"),
        ("/usr/.keep", ""),
    ]);
    let usr = Tree::only(&[("/lib/os-release", DEBIAN), ("/bin/sh", "-> bash"), ("/bin/bash", PROGRAM)]);
    let found = inspect(&[opened("p1", &root), opened("p2", &usr)]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].id.as_deref(), found[0].architecture.as_deref()), (Some("debian"), Some("x86_64")));
}

#[test]
fn old_distributions_are_known_by_other_files() {
    let cases = [
        ("/etc/redhat-release", "CentOS release 6.10 (Final)\n", "centos", "6.10 (Final)"),
        ("/etc/alpine-release", "3.2.0\n", "alpine", "3.2.0"),
        ("/etc/debian_version", "4.0\n", "debian", "4.0"),
        ("/etc/lsb-release", "DISTRIB_ID=Ubuntu\nDISTRIB_RELEASE=8.04\n", "ubuntu", "8.04"),
    ];
    for (path, content, id, version) in cases {
        let tree = Tree::only(&[
            (path, content),
            ("/bin/sh", PROGRAM),
            ("/etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=old.example.org\n"),
        ]);
        let found = inspect(&[opened("disk", &tree)]);
        assert_eq!((found[0].id.as_deref(), found[0].version.as_deref()), (Some(id), Some(version)));
        assert_eq!(found[0].host_name.as_deref(), Some("old.example.org"));
    }
    // Volumes that only resemble a root directory: a boot volume, a home directory.
    let home = Tree::only(&[("/etc/something", ""), ("/bin/script", "#!/bin/sh")]);
    assert!(inspect(&[opened("p1", &home)]).is_empty());
}

#[test]
fn links_stay_within_the_volume_and_end() {
    let tree = Tree::new(&[
        ("/a/b/file", "found"),
        ("/absolute", "-> /a/b"),
        ("/climbing", "-> ../../../../a/b/file"),
        ("/a/up", "-> ../../absolute/../b/./file"),
        ("/loop", "-> loop"),
        ("/one", "-> two/x"),
        ("/two", "-> one/y"),
        ("/nowhere", "-> /etc/passwd"),
    ]);
    for path in ["/a/b/file", "a//b/./file", "/absolute/file", "/climbing", "/a/up", "/../a/../../a/b/file"] {
        assert_eq!(read_text(&tree, path, 100).as_deref(), Some("found"), "{path}");
    }
    assert_eq!(read_text(&tree, "/climbing", 3).as_deref(), Some("fou"));
    for path in ["/nowhere", "/a/b/file/x", "/missing"] {
        assert_eq!(resolve_path(&tree, path.as_bytes()).unwrap_err().kind(), ErrorKind::NotFound, "{path}");
    }
    for path in ["/loop", "/one"] {
        assert_eq!(resolve_path(&tree, path.as_bytes()).unwrap_err().kind(), ErrorKind::Limit, "{path}");
    }
    let long = "a/../".repeat(5000);
    assert_eq!(resolve_path(&tree, long.as_bytes()).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn texts_are_short_and_safe_for_a_terminal() {
    let release = format!("ID=evil\nNAME=\"\u{1b}[2Jclear\"\nPRETTY_NAME=\"{}\"\n", "x".repeat(10_000));
    let fstab = "/dev/sda1 / ext4\n".repeat(5000);
    let tree = Tree::only(&[("/etc/os-release", &release), ("/etc/fstab", &fstab), ("/bin/sh", "\x7fELF")]);
    let found = &inspect(&[opened("p1", &tree)])[0];
    assert_eq!(found.name.as_deref(), Some("[2Jclear"));
    assert_eq!((found.pretty_name.as_ref().map(String::len), found.mounts.len()), (Some(256), 256));
    assert_eq!(found.architecture, None);
}

/// The files of a system with this fstab.
fn system<'a>(host: &'a str, fstab: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut files = vec![("/etc/os-release", DEBIAN), ("/bin/sh", PROGRAM), ("/etc/hostname", host)];
    if !fstab.is_empty() {
        files.push(("/etc/fstab", fstab));
    }
    files
}

/// The roots in their order, each with the root that its fstab names; and why the first one is the first.
fn roots(volumes: &[OpenedVolume<'_>]) -> (Vec<(String, Option<String>)>, RootReason) {
    let found = inspect(volumes);
    let reason = found[0].reason;
    let place = |root: Vec<u8>| String::from_utf8(root).unwrap();
    (found.into_iter().map(|system| (place(system.root), system.fstab_root)).collect(), reason)
}

fn own(place: &str) -> (String, Option<String>) {
    (place.to_owned(), None)
}

fn copy(place: &str, of: &str) -> (String, Option<String>) {
    (place.to_owned(), Some(of.to_owned()))
}

#[test]
fn the_root_is_the_subvolume_that_its_fstab_mounts() {
    // Ubuntu, Fedora and Debian: the top level is the default subvolume.
    for (name, option) in [("@", "subvol=@"), ("root", "subvol=root,compress=zstd:1"), ("@", "subvolid=257")]
    {
        let fstab = format!("UUID=1-2 / btrfs defaults,{option} 0 0\nUUID=1-2 /home btrfs subvol=/@home\n");
        let files = system("web", &fstab);
        let trees = [
            Tree::subvolume("", 5, &[]),
            Tree::subvolume("timeshift/1", 256, &files),
            Tree::subvolume(name, 257, &files),
            Tree::subvolume("@home", 258, &[]),
        ];
        let volume = OpenedVolume { uuid: Some("1-2"), ..opened("p2", &trees) };
        let place = format!("p2/{name}");
        let expected = vec![own(&place), copy("p2/timeshift/1", &place)];
        assert_eq!(roots(&[volume]), (expected, RootReason::Fstab));
        let found = inspect(&[volume]);
        assert_eq!(found[0].tree, TreeId { volume: 0, subvolume: 2 });
        let mounts: Vec<_> = found[0].mounts.iter().map(|mount| mount.place.as_deref()).collect();
        assert_eq!(mounts, [Some(&*place), Some("p2/@home")]);
    }
}

#[test]
fn the_root_is_the_default_subvolume_if_the_fstab_names_none() {
    // SUSE: the default is a snapshot that the others are rolled back to.
    let fstab = "LABEL=ROOT / btrfs defaults 0 0\nLABEL=ROOT /home btrfs subvol=/@/home 0 0\n\
        LABEL=ROOT /gone btrfs subvol=@/gone 0 0\nLABEL=ROOT /all btrfs subvolid=5 0 0\n";
    let files = system("suse", fstab);
    let trees = [
        Tree::subvolume("@/.snapshots/7/snapshot", 300, &files),
        Tree::subvolume("", 5, &[]),
        Tree::subvolume("@", 256, &[]),
        Tree::subvolume("@/home", 257, &[]),
        Tree::subvolume("@/.snapshots/1/snapshot", 258, &files),
    ];
    let volume = OpenedVolume { label: Some("ROOT"), ..opened("p2", &trees) };
    let expected = vec![own("p2"), copy("p2.subvolumes/@/.snapshots/1/snapshot", "p2")];
    assert_eq!(roots(&[volume]), (expected, RootReason::Fstab));
    let mounts = inspect(&[volume]).remove(0).mounts;
    let places: Vec<_> = mounts.iter().map(|mount| mount.place.as_deref()).collect();
    assert_eq!(places, [Some("p2"), Some("p2.subvolumes/@/home"), None, Some("p2.subvolumes")]);
}

#[test]
fn without_an_fstab_the_boot_loader_and_the_default_decide() {
    let files = system("a", "");
    let two = || {
        [Tree::subvolume("", 5, &[]), Tree::subvolume("a", 256, &files), Tree::subvolume("b", 257, &files)]
    };
    let entry = "title Linux\noptions root=UUID=9 ro rootflags=subvol=b,ro quiet\n";
    let grub = "menuentry 'a' {\n  linux /vmlinuz root=/dev/vda2 rootflags=subvol=b\n}\n\
        menuentry 'b' {\n  linux /vmlinuz root=/dev/vda2 rootflags=subvol=a\n}\n";
    for (path, text) in [("/loader/entries/1.conf", entry), ("/grub2/grub.cfg", grub)] {
        let (boot, trees) = (Tree::only(&[(path, text)]), two());
        let volumes = [opened("p1", &boot), OpenedVolume { uuid: Some("9"), ..opened("p2", &trees) }];
        assert_eq!(roots(&volumes), (vec![own("p2/b"), own("p2/a")], RootReason::BootLoader));
    }
    let trees = two();
    assert_eq!(roots(&[opened("p2", &trees)]), (vec![own("p2/a"), own("p2/b")], RootReason::First));
    let trees =
        [Tree::subvolume("b", 257, &files), Tree::subvolume("", 5, &[]), Tree::subvolume("a", 256, &files)];
    let expected = vec![own("p2"), own("p2.subvolumes/a")];
    assert_eq!(roots(&[opened("p2", &trees)]), (expected, RootReason::DefaultSubvolume));
}

#[test]
fn two_systems_on_one_disk_are_both_roots() {
    let one = Tree::only(&system("one", "UUID=1 / ext4\n"));
    let two = Tree::only(&system("two", "UUID=2 / ext4\n"));
    // A copy of a disk with a new identity: its fstab names what is not there.
    let lost = Tree::only(&system("lost", "UUID=3 / ext4\n"));
    let volumes = [
        opened("p1", &lost),
        OpenedVolume { uuid: Some("1"), ..opened("p2", &one) },
        OpenedVolume { uuid: Some("2"), ..opened("p3", &two) },
    ];
    assert_eq!(roots(&volumes), (vec![own("p2"), own("p3"), own("p1")], RootReason::First));
}

#[test]
fn names_of_arrays_logical_volumes_and_encrypted_volumes_mean_volumes() {
    let fstab = "/dev/md0 /a ext4\n/dev/md/data /b ext4\n/dev/md/host:data /c ext4\n\
        /dev/disk/by-id/md-name-host:data /d ext4\n/dev/mapper/my--vg-lv /e ext4\n/dev/my-vg/lv /f ext4\n\
        /dev/disk/by-id/dm-name-my--vg-lv /g ext4\n/dev/mapper/secret / ext4\n\
        /dev/mapper/luks-aaaa-bb /h ext4\n/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-aaaabb-secret /i ext4\n\
        /dev/disk/by-label/a\\x20b /j ext4\n/dev/disk/by-partuuid/77 /k ext4\n/dev/mapper/none /l ext4\n\
        /dev/mapper/other /m ext4\n/dev/disk/by-id/ata-DISK_1-part2 /n ext4\n";
    let crypttab = "# name device key\nsecret UUID=AAAA-BB none luks,discard\nother /dev/vda4 none\n\
        none UUID=11 none\n";
    let mut files = system("x", fstab);
    files.push(("/etc/crypttab", crypttab));
    let (root, other) = (Tree::only(&files), Tree::only(&[]));
    let container =
        OpenedVolume { content: VolumeContent::Luks2, uuid: Some("aaaa-bb"), ..opened("p3", &[]) };
    let locked = OpenedVolume { content: VolumeContent::Luks1, uuid: Some("cc"), ..opened("p4", &[]) };
    let volumes = [
        OpenedVolume { label: Some("a b"), ..opened("p1", &other) },
        OpenedVolume { partition_uuid: Some("77"), ..opened("p2", &other) },
        container,
        locked,
        opened("md0", &other),
        opened("md-data", &other),
        opened("my--vg-lv", &other),
        opened("luks-aaaa-bb", &root),
    ];
    let found = inspect(&volumes).remove(0);
    assert_eq!((&*found.root, found.reason), (&b"luks-aaaa-bb"[..], RootReason::Only));
    let place = |mount: &FstabEntry| (mount.directory.clone(), mount.place.clone().unwrap_or("-".to_owned()));
    let places: Vec<(String, String)> = found.mounts.iter().map(place).collect();
    let expected = [
        ("/a", "md0"),
        ("/b", "md-data"),
        ("/c", "md-data"),
        ("/d", "md-data"),
        ("/e", "my--vg-lv"),
        ("/f", "my--vg-lv"),
        ("/g", "my--vg-lv"),
        ("/", "luks-aaaa-bb"),
        ("/h", "luks-aaaa-bb"),
        ("/i", "luks-aaaa-bb"),
        ("/j", "p1"),
        ("/k", "p2"),
        ("/l", "-"),
        ("/m", "-"),
        ("/n", "-"),
    ];
    assert_eq!(places, expected.map(|(directory, place)| (directory.to_owned(), place.to_owned())));
}

#[test]
fn very_many_systems_are_bounded() {
    let files = system("a", "UUID=1 / btrfs\n");
    let trees: Vec<Subvolume> =
        (0..300).map(|number| Tree::subvolume(&format!("s/{number}"), 256 + number, &files)).collect();
    assert_eq!(inspect(&[OpenedVolume { uuid: Some("1"), ..opened("p1", &trees) }]).len(), 64);
}
