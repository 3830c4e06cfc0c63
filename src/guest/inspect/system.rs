//! The operating system of one tree.

use crate::guest::bytes::{array, slice};
use crate::guest::{FileKind, FileSystem, TreeId};

use super::fstab::mounts;
use super::path::{read_bytes, read_text, resolve_path};
use super::{OpenedVolume, OperatingSystem, RootReason};

/// Bytes of a file that are read; os-release and fstab usually have a few hundred.
pub(super) const FILE_LIMIT: usize = 64 << 10;
/// Characters of a returned text.
const TEXT_LIMIT: usize = 256;

/// A tree with an operating system.
pub(super) struct FoundSystem {
    /// What it says about itself. Its place, and its relation to others, are not known yet.
    pub(super) system: OperatingSystem,
    /// What its fstab mounts as `/`.
    pub(super) fstab_root: Option<TreeId>,
}

/// The operating system whose root directory is that of `tree`. If `/usr` is another tree, it is searched as
/// well.
pub(super) fn find(tree: TreeId, all: &[OpenedVolume<'_>]) -> Option<FoundSystem> {
    let files = |TreeId { volume, subvolume }: TreeId| {
        all.get(volume)?.trees.get(subvolume as usize).map(|tree| &*tree.files)
    };
    let root = files(tree)?;
    if !has_root(root) {
        return None;
    }
    let mounts = mounts(root, all);
    let mounted = |directory: &str| mounts.iter().find(|mount| mount.entry.directory == directory)?.tree;
    let usr = mounted("/usr").and_then(files);
    let fstab_root = mounted("/");
    let places = SystemRoots { root, usr };
    let mut system = OperatingSystem {
        root: all[tree.volume].place(tree.subvolume)?,
        tree,
        reason: RootReason::Only,
        fstab_root: None,
        id: None,
        name: None,
        version: None,
        pretty_name: None,
        host_name: host_name(root),
        machine_id: read_text(root, "/etc/machine-id", FILE_LIMIT).and_then(|text| first_line(&text)),
        architecture: architecture(&places),
        mounts: mounts.into_iter().map(|mount| mount.entry).collect(),
    };
    name(&places, &mut system);
    // A volume that only resembles a root directory (a /boot with an etc, a home) names no system.
    let is_named = system.id.is_some() || system.name.is_some() || system.pretty_name.is_some();
    let is_system = is_named || system.architecture.is_some() && !system.mounts.is_empty();
    is_system.then_some(FoundSystem { system, fstab_root })
}

/// The directories without which no system boots. `bin` may be a link into a separate `/usr`.
pub(super) fn has_root(root: &dyn FileSystem) -> bool {
    let has = |name: &[u8]| matches!(root.lookup(root.root(), name), Ok(Some(_)));
    let has_etc = resolve_path(root, b"/etc").and_then(|etc| root.attributes(etc));
    has_etc.is_ok_and(|etc| etc.kind == FileKind::Directory) && (has(b"bin") || has(b"usr") || has(b"nix"))
}

/// The root directory, and `/usr` if it is another tree.
struct SystemRoots<'a> {
    root: &'a dyn FileSystem,
    usr: Option<&'a dyn FileSystem>,
}

impl SystemRoots<'_> {
    fn read(&self, path: &str, limit: usize) -> Option<Vec<u8>> {
        let in_usr = || read_bytes(self.usr?, path.strip_prefix("/usr")?, limit);
        read_bytes(self.root, path, limit).or_else(in_usr)
    }

    fn text(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&self.read(path, FILE_LIMIT)?).into_owned())
    }
}

fn name(places: &SystemRoots<'_>, system: &mut OperatingSystem) {
    // Links to /usr/lib fail if /usr is another tree, so both paths are tried.
    let release = places.text("/etc/os-release").or_else(|| places.text("/usr/lib/os-release"));
    if let Some(text) = release {
        let value = |key: &str| text.lines().filter_map(|line| assigned(line, key)).next_back();
        system.id = value("ID").and_then(|id| bounded(&id.to_lowercase()));
        system.name = value("NAME").and_then(|name| bounded(&name));
        system.version =
            value("VERSION").or_else(|| value("VERSION_ID")).and_then(|version| bounded(&version));
        system.pretty_name = value("PRETTY_NAME").and_then(|name| bounded(&name));
        if system.id.is_some() || system.name.is_some() || system.pretty_name.is_some() {
            return;
        }
    }
    // The files that preceded os-release.
    let line = |path: &str| places.text(path).and_then(|text| first_line(&text));
    if let Some(line) = line("/etc/redhat-release").or_else(|| line("/etc/SuSE-release")) {
        // "CentOS release 6.10 (Final)"
        let (name, version) = line.split_once(" release ").unwrap_or((&line, ""));
        let known = [
            ("CentOS", "centos"),
            ("Fedora", "fedora"),
            ("Red Hat", "rhel"),
            ("SUSE", "sles"),
            ("openSUSE", "opensuse"),
        ];
        system.id = known.iter().find(|(start, _)| name.starts_with(start)).map(|(_, id)| (*id).to_owned());
        (system.name, system.version) = (bounded(name), bounded(version));
        system.pretty_name = Some(line);
    } else if let Some(version) = line("/etc/alpine-release") {
        system.set("alpine", "Alpine Linux", version);
    } else if let Some(text) = places.text("/etc/lsb-release") {
        let value =
            |key: &str| text.lines().find_map(|line| assigned(line, key)).and_then(|value| bounded(&value));
        system.name = value("DISTRIB_ID");
        system.id = system.name.as_deref().map(str::to_lowercase);
        system.version = value("DISTRIB_RELEASE");
        system.pretty_name = value("DISTRIB_DESCRIPTION");
    } else if let Some(version) = line("/etc/debian_version") {
        system.set("debian", "Debian GNU/Linux", version);
    } else if let Some(version) = line("/etc/slackware-version") {
        system.set("slackware", "Slackware", version);
    }
}

impl OperatingSystem {
    fn set(&mut self, id: &str, name: &str, version: String) {
        self.id = Some(id.to_owned());
        self.name = Some(name.to_owned());
        self.pretty_name = bounded(&format!("{name} {version}"));
        self.version = Some(version);
    }
}

fn host_name(root: &dyn FileSystem) -> Option<String> {
    let modern = read_text(root, "/etc/hostname", FILE_LIMIT).and_then(|text| {
        let line = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
        bounded(line)
    });
    modern.or_else(|| {
        let text = read_text(root, "/etc/sysconfig/network", FILE_LIMIT)?;
        text.lines().find_map(|line| assigned(line, "HOSTNAME")).and_then(|name| bounded(&name))
    })
}

/// The machine type of a standard program.
fn architecture(places: &SystemRoots<'_>) -> Option<String> {
    let programs =
        ["/bin/sh", "/usr/bin/sh", "/usr/bin/env", "/sbin/init", "/usr/lib/systemd/systemd", "/bin/busybox"];
    let names = |path: &&str| elf_machine(&places.read(path, 64)?);
    programs.iter().find_map(names).map(str::to_owned)
}

fn elf_machine(header: &[u8]) -> Option<&'static str> {
    if !header.starts_with(b"\x7fELF") || header.len() < 20 {
        return None;
    }
    let is_little = header[5] == 1;
    let [one, other] = array(header, 18);
    let machine = if is_little { u16::from_le_bytes([one, other]) } else { u16::from_be_bytes([one, other]) };
    let name = match (machine, slice(header, 4, 1)) {
        (2, _) => "sparc",
        (3, _) => "i386",
        (8, _) => "mips",
        (20, _) => "ppc",
        (21, _) if is_little => "ppc64le",
        (21, _) => "ppc64",
        (22, _) => "s390x",
        (40, _) => "arm",
        (43, _) => "sparc64",
        (50, _) => "ia64",
        (62, _) => "x86_64",
        (183, _) => "aarch64",
        (243, [1]) => "riscv32",
        (243, _) => "riscv64",
        (258, _) => "loongarch64",
        _ => return None,
    };
    Some(name)
}

/// The value that a line of a shell's assignments gives to `key`.
fn assigned(line: &str, key: &str) -> Option<String> {
    let value = line.trim().strip_prefix(key)?.strip_prefix('=')?;
    Some(unquoted(value.trim()))
}

/// Text without the quotation marks around it; within double quotes, without backslashes.
pub(super) fn unquoted(text: &str) -> String {
    if let Some(inner) = text.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
        return inner.to_owned();
    }
    let Some(inner) = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return text.to_owned();
    };
    let mut plain = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        plain.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    plain
}

fn first_line(text: &str) -> Option<String> {
    bounded(text.lines().next()?)
}

/// Trimmed, without control characters, and at most [`TEXT_LIMIT`] characters; `None` if it is empty.
pub(super) fn bounded(text: &str) -> Option<String> {
    let shown: String = text.trim().chars().filter(|c| !c.is_control()).take(TEXT_LIMIT).collect();
    (!shown.is_empty()).then_some(shown)
}
