//! The operating system of one volume.

use crate::guest::bytes::{array, slice};
use crate::guest::{FileKind, FileSystem};

use super::path::{read_bytes, read_text, resolve_path};
use super::{FstabEntry, OpenedVolume, OperatingSystem};

/// Bytes of a file that are read; os-release and fstab usually have a few hundred.
const FILE_LIMIT: usize = 64 << 10;
/// Characters of a returned text.
const TEXT_LIMIT: usize = 256;
/// Lines of an fstab.
const MOUNT_LIMIT: usize = 256;

/// The operating system whose root directory is on `volume`. If `/usr` is a separate volume, it is searched
/// as well.
pub(super) fn find(volume: &OpenedVolume<'_>, all: &[OpenedVolume<'_>]) -> Option<OperatingSystem> {
    let root = volume.files;
    if !has_root(root) {
        return None;
    }
    let mounts = mounts(root, all);
    let usr_volume =
        mounts.iter().find(|mount| mount.directory == "/usr").and_then(|mount| mount.volume.clone());
    let usr = usr_volume.and_then(|name| all.iter().find(|other| other.name == name));
    let places = SystemRoots { root, usr: usr.map(|usr| usr.files) };
    let mut system = OperatingSystem {
        volume: volume.name.to_owned(),
        host_name: host_name(root),
        machine_id: read_text(root, "/etc/machine-id", FILE_LIMIT).and_then(|text| first_line(&text)),
        architecture: architecture(&places),
        mounts,
        ..OperatingSystem::default()
    };
    name(&places, &mut system);
    // A volume that only resembles a root directory (a /boot with an etc, a home) names no system.
    let is_named = system.id.is_some() || system.name.is_some() || system.pretty_name.is_some();
    (is_named || system.architecture.is_some() && !system.mounts.is_empty()).then_some(system)
}

/// The directories without which no system boots. `bin` may be a link into a separate `/usr`.
fn has_root(root: &dyn FileSystem) -> bool {
    let has = |name: &[u8]| matches!(root.lookup(root.root(), name), Ok(Some(_)));
    let has_etc = resolve_path(root, b"/etc").and_then(|etc| root.attributes(etc));
    has_etc.is_ok_and(|etc| etc.kind == FileKind::Directory) && (has(b"bin") || has(b"usr") || has(b"nix"))
}

/// The root directory, and `/usr` if it is a separate volume.
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
    // Links to /usr/lib fail if /usr is a separate volume, so both paths are tried.
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

fn mounts(root: &dyn FileSystem, all: &[OpenedVolume<'_>]) -> Vec<FstabEntry> {
    let Some(text) = read_text(root, "/etc/fstab", FILE_LIMIT) else { return Vec::new() };
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mount = |line: &str| {
        let mut fields = line.split_whitespace().map(|field| unescaped(&unquoted(field)));
        let device = bounded(&fields.next()?)?;
        let directory = bounded(&fields.next()?)?;
        let mut word = || fields.next().and_then(|field| bounded(&field)).unwrap_or_default();
        let (kind, options) = (word(), word());
        let volume = find_device(&device, all).map(|volume| volume.name.to_owned());
        Some(FstabEntry { device, volume, directory, kind, options })
    };
    lines.filter_map(mount).take(MOUNT_LIMIT).collect()
}

/// The volume of an fstab's first field. Disk names (`/dev/vda1`) change between boots; partition numbers do
/// not, and only one disk is inspected.
fn find_device<'a>(device: &str, all: &[OpenedVolume<'a>]) -> Option<OpenedVolume<'a>> {
    let find = |is_it: &dyn Fn(&OpenedVolume<'a>) -> bool| all.iter().find(|volume| is_it(volume)).copied();
    let same = |one: Option<&str>, other: &str| one.is_some_and(|one| one.eq_ignore_ascii_case(other));
    let tag = |tag: &str, value: &str| match tag {
        "UUID" => find(&|volume| same(volume.uuid, value)),
        "LABEL" => find(&|volume| volume.label == Some(value)),
        "PARTUUID" => find(&|volume| same(volume.partition_uuid, value)),
        "PARTLABEL" => find(&|volume| volume.partition_label == Some(value)),
        _ => None,
    };
    if let Some((name, value)) = device.split_once('=') {
        return tag(name, &unquoted(value));
    }
    if let Some((by, value)) = device.strip_prefix("/dev/disk/by-").and_then(|rest| rest.split_once('/')) {
        return tag(&by.to_uppercase(), value);
    }
    if let Some(name) = device.strip_prefix("/dev/mapper/") {
        return find(&|volume| volume.name == name);
    }
    let name = device.strip_prefix("/dev/")?;
    if let Some(array) = name.strip_prefix("md/") {
        return find(&|volume| {
            volume.name.strip_prefix("md-").or(volume.name.strip_prefix("md")) == Some(array)
        });
    }
    if name.starts_with("md") {
        return find(&|volume| volume.name == name);
    }
    if let Some((group, volume)) = name.split_once('/') {
        let mapped = format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"));
        return find(&|volume| volume.name == mapped);
    }
    let disks = ["sd", "vd", "hd", "xvd", "nvme", "mmcblk"];
    let number = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    let number = if name.starts_with("nvme") || name.starts_with("mmcblk") {
        name.rsplit_once('p')?.1
    } else {
        number
    };
    if !disks.iter().any(|disk| name.starts_with(disk)) {
        return None;
    }
    let wanted = if number.is_empty() { "disk".to_owned() } else { format!("p{number}") };
    find(&|volume| volume.name == wanted)
}

/// The value that a line of a shell's assignments gives to `key`.
fn assigned(line: &str, key: &str) -> Option<String> {
    let value = line.trim().strip_prefix(key)?.strip_prefix('=')?;
    Some(unquoted(value.trim()))
}

/// Text without the quotation marks around it; within double quotes, without backslashes.
fn unquoted(text: &str) -> String {
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

/// An fstab writes a space as `\040`.
fn unescaped(field: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail
            .get(..3)
            .filter(|digits| *first == b'\\' && digits.iter().all(|digit| (b'0'..b'8').contains(digit)));
        let (byte, next) = match digits {
            Some(digits) => {
                (digits.iter().fold(0u8, |byte, digit| byte.wrapping_mul(8) + (digit - b'0')), &tail[3..])
            }
            None => (*first, tail),
        };
        bytes.push(byte);
        rest = next;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn first_line(text: &str) -> Option<String> {
    bounded(text.lines().next()?)
}

/// Trimmed, without control characters, and at most [`TEXT_LIMIT`] characters; `None` if it is empty.
fn bounded(text: &str) -> Option<String> {
    let shown: String = text.trim().chars().filter(|c| !c.is_control()).take(TEXT_LIMIT).collect();
    (!shown.is_empty()).then_some(shown)
}
