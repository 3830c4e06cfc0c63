//! In-memory trees with the layouts of distributions.

use std::collections::BTreeMap;

use super::*;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, Ino, Statistics, Time,
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

    fn opened<'a>(&'a self, name: &'a str) -> OpenedVolume<'a> {
        OpenedVolume {
            name,
            files: self,
            label: None,
            uuid: None,
            partition_uuid: None,
            partition_label: None,
        }
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

    fn list(&self, _: Ino, _: u64, _: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        unreachable!("inspection lists no directory")
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
    let root = Tree::new(&[
        ("/etc/os-release", "-> ../usr/lib/os-release"),
        ("/usr/lib/os-release", DEBIAN),
        ("/etc/hostname", "web01\n"),
        ("/etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("/etc/fstab", fstab),
        ("/bin", "-> usr/bin"),
        ("/usr/bin/sh", "-> dash"),
        ("/usr/bin/dash", PROGRAM),
    ]);
    let other = Tree::new(&[("/EFI/debian/grubx64.efi", "")]);
    let volumes = [
        OpenedVolume { uuid: Some("0E66-6B21"), ..other.opened("p1") },
        OpenedVolume { partition_uuid: Some("ab-02"), ..other.opened("p2") },
        other.opened("p3"),
        OpenedVolume { label: Some("data disk"), ..other.opened("p4") },
        other.opened("my--vg-home"),
        root.opened("my--vg-root"),
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
    assert_eq!(system.volume, "my--vg-root");
    let mounts: Vec<_> =
        system.mounts.iter().map(|mount| (mount.directory.as_str(), mount.volume.as_deref())).collect();
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
    let root = Tree::new(&[
        ("/etc/os-release", "-> ../usr/lib/os-release"),
        ("/etc/fstab", "/dev/sda2 /usr ext4 ro 0 0\n"),
        ("/bin", "-> usr/bin"),
        ("/usr/.keep", ""),
    ]);
    let usr = Tree::new(&[("/lib/os-release", DEBIAN), ("/bin/sh", "-> bash"), ("/bin/bash", PROGRAM)]);
    let found = inspect(&[root.opened("p1"), usr.opened("p2")]);
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
        let tree = Tree::new(&[
            (path, content),
            ("/bin/sh", PROGRAM),
            ("/etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=old.example.org\n"),
        ]);
        let found = inspect(&[tree.opened("disk")]);
        assert_eq!((found[0].id.as_deref(), found[0].version.as_deref()), (Some(id), Some(version)));
        assert_eq!(found[0].host_name.as_deref(), Some("old.example.org"));
    }
    // Volumes that only resemble a root directory: a boot volume, a home directory.
    let home = Tree::new(&[("/etc/something", ""), ("/bin/script", "#!/bin/sh")]);
    assert!(inspect(&[home.opened("p1")]).is_empty());
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
    let tree = Tree::new(&[("/etc/os-release", &release), ("/etc/fstab", &fstab), ("/bin/sh", "\x7fELF")]);
    let found = &inspect(&[tree.opened("p1")])[0];
    assert_eq!(found.name.as_deref(), Some("[2Jclear"));
    assert_eq!((found.pretty_name.as_ref().map(String::len), found.mounts.len()), (Some(256), 256));
    assert_eq!(found.architecture, None);
}
