//! The user as whom libvirt runs virtual machines, and the way of that user to an image.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::finding::{Finding, quoted};
use super::host::Host;
use crate::io::Permissions;
use crate::store::Subject;

const CONFIGURATION: &str = "/etc/libvirt/qemu.conf";
/// The users that distributions set up for it: Debian's and Ubuntu's, Fedora's and others'.
const USUAL_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];
/// Searching a directory, in the bits of a mode.
const SEARCH: u32 = 1;
const READ: u32 = 4;

/// The user of virtual machines.
#[derive(Debug)]
pub(super) struct VmUser {
    pub(super) name: String,
    pub(super) subject: Subject,
    /// Whether libvirt gives images to that user when a machine starts.
    pub(super) takes_files: bool,
}

/// What is set up, and for whom.
pub(super) fn check(host: &Host) -> Vec<Finding> {
    const SUBJECT: &str = "libvirt";
    if !host.exists("/etc/libvirt") && USUAL_USERS.iter().all(|name| host.user(name, None).is_none()) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    match host.read(CONFIGURATION) {
        Ok(text) => {
            let word = |key: &str, usual: &str| value(&text, key).unwrap_or_else(|| usual.to_owned());
            let settings = ["security_driver", "dynamic_ownership", "remember_owner", "namespaces"]
                .map(|key| format!("{key} {}", word(key, "as usual")));
            findings.push(Finding::ok(SUBJECT, settings.join(", ")));
            if word("namespaces", "mount").contains("mount") {
                findings.push(
                    Finding::note(SUBJECT, "each virtual machine has a mount namespace of its own")
                        .means("a mount of chainfs ends only when the machines that were started on it have"),
                );
            }
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => findings.push(
            Finding::note(SUBJECT, format!("{CONFIGURATION} may not be read by this user"))
                .means("its usual settings are assumed")
                .fix("run chainfs doctor as root"),
        ),
        Err(_) => {}
    }
    match user(host) {
        Some(user) => findings.push(Finding::ok(
            SUBJECT,
            format!("virtual machines run as {} (uid {})", user.name, user.subject.uid),
        )),
        None => findings.push(
            Finding::warning(SUBJECT, "the user of virtual machines is not in /etc/passwd")
                .means("the permissions on the way to images are not checked")
                .fix(format!("set user and group in {CONFIGURATION}")),
        ),
    }
    findings
}

/// The user of virtual machines; `None` without libvirt.
pub(super) fn user(host: &Host) -> Option<VmUser> {
    let text = host.read(CONFIGURATION).unwrap_or_default();
    let group = value(&text, "group");
    let configured = value(&text, "user");
    let names: Vec<&str> = configured.as_deref().map_or_else(|| USUAL_USERS.to_vec(), |name| vec![name]);
    let takes_files = value(&text, "dynamic_ownership").is_none_or(|value| value != "0");
    names.into_iter().find_map(|name| {
        let subject = host.user(name, group.as_deref())?;
        Some(VmUser { name: name.to_owned(), subject, takes_files })
    })
}

/// `key = "value"`, the last one that is no comment.
fn value(text: &str, key: &str) -> Option<String> {
    let mut values = text.lines().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key)
            .then(|| value.split('#').next().unwrap_or_default().trim().trim_matches('"').to_owned())
    });
    values.next_back()
}

/// What stops a user on the way to a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    pub(super) path: PathBuf,
    /// Whether it is a directory on the way, not the file itself.
    pub(super) is_directory: bool,
}

/// The first directory that the user may not search, or the file that the user may not read.
pub(super) fn obstacle(subject: &Subject, path: &Path) -> io::Result<Option<Obstacle>> {
    let path = path.canonicalize()?;
    let mut way: Vec<&Path> = path.ancestors().skip(1).collect();
    way.reverse();
    for directory in way {
        if !subject.may(&permissions(directory)?, SEARCH) {
            return Ok(Some(Obstacle { path: directory.to_owned(), is_directory: true }));
        }
    }
    let wanted = if path.is_dir() { SEARCH } else { READ };
    let is_refused = !subject.may(&permissions(&path)?, wanted);
    Ok(is_refused.then(|| Obstacle { is_directory: path.is_dir(), path }))
}

fn permissions(path: &Path) -> io::Result<Permissions> {
    let file: OwnedFd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Permissions::of(&file).map_err(|error| io::Error::other(error.to_string()))
}

/// That the user of virtual machines cannot reach an image.
pub(super) fn unreachable(user: &VmUser, image: &str, found: &Obstacle) -> Finding {
    let place = quoted(&found.path);
    let name = &user.name;
    if found.is_directory {
        return Finding::warning(image.to_owned(), format!("{name} may not search {}", found.path.display()))
            .means("libvirt's virtual machines cannot open it")
            .fix(format!("setfacl -m u:{name}:x {place}"));
    }
    let found = Finding::note(image.to_owned(), format!("{name} may not read it"));
    if user.takes_files {
        return found.means("libvirt makes that user its owner when a virtual machine starts on it");
    }
    found.means("libvirt's virtual machines cannot open it").fix(format!("setfacl -m u:{name}:rw {place}"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    const PASSWD: (&str, &str) =
        ("/etc/passwd", "libvirt-qemu:x:64055:108::/:/bin/false\nann:x:1000:1000::/:/\n");

    #[test]
    fn the_user_of_virtual_machines_is_that_of_the_configuration() {
        assert!(check(&machine(0, &[]).1).is_empty(), "no libvirt");
        let (_root, host) = machine(0, &[PASSWD]);
        assert_eq!(user(&host).unwrap().subject.uid, 64_055);
        let conf = "#user = \"root\"\nuser = \"ann\" # me\ndynamic_ownership = 0\nnamespaces = []\n";
        let (_root, host) = machine(0, &[PASSWD, (CONFIGURATION, conf)]);
        let found = user(&host).unwrap();
        assert_eq!((found.subject.uid, found.takes_files), (1000, false));
        assert!(check(&host).iter().all(|finding| finding.mark == Mark::Ok), "{:?}", check(&host));
        let (_root, host) = machine(0, &[PASSWD, (CONFIGURATION, "user = \"gone\"\n")]);
        let findings = check(&host);
        assert!(findings.iter().any(|finding| finding.found.contains("namespace")));
        assert_eq!(findings.last().unwrap().mark, Mark::Warning);
    }

    #[test]
    fn the_first_directory_that_stops_the_user_is_named() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().canonicalize().unwrap();
        fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(top.join("a/b")).unwrap();
        let image = top.join("a/b/web.qcow2");
        fs::write(&image, "").unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let subject = Subject::new(64_055, vec![108]);
        set(&top.join("a"), 0o700);
        let found = obstacle(&subject, &image).unwrap().unwrap();
        // Directories above may stop this user as well, where tests run.
        assert!(top.join("a").starts_with(&found.path) && found.is_directory);
        if found.path == top.join("a") {
            set(&top.join("a"), 0o711);
            set(&image, 0o600);
            let found = obstacle(&subject, &image).unwrap().unwrap();
            assert_eq!(found, Obstacle { path: image.clone(), is_directory: false });
            set(&image, 0o644);
            assert_eq!(obstacle(&subject, &image).unwrap(), None);
        }
    }

    #[test]
    fn an_unreachable_image_has_the_command_that_opens_the_way() {
        let mut user = VmUser { name: "qemu".into(), subject: Subject::new(107, vec![]), takes_files: true };
        let directory = Obstacle { path: "/srv/a b".into(), is_directory: true };
        let finding = unreachable(&user, "web", &directory);
        assert_eq!(finding.fix.as_deref(), Some("setfacl -m u:qemu:x '/srv/a b'"));
        let file = Obstacle { path: "/srv/x".into(), is_directory: false };
        assert_eq!(unreachable(&user, "web", &file).fix, None);
        user.takes_files = false;
        assert_eq!(unreachable(&user, "web", &file).fix.as_deref(), Some("setfacl -m u:qemu:rw /srv/x"));
    }
}
