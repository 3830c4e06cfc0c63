//! What a mount needs of FUSE: the device, and for ordinary users fusermount3, with what confines it.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::apparmor::{PROFILE, Rules};
use super::container::outer_root;
use super::finding::{Finding, quoted};
use super::host::Host;

const DEVICE: &str = "/dev/fuse";
const CONFIGURATION: &str = "/etc/fuse.conf";

/// All of it.
pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut findings = vec![device(host), helper(host), allow_other(host)];
    findings.extend(confined(host, None));
    findings
}

/// Whether the device can be opened.
fn device(host: &Host) -> Finding {
    let file = std::fs::File::options().read(true).write(true).open(host.at(DEVICE));
    let opened = file.and_then(|file| file.metadata()).map(|meta| meta.file_type().is_char_device());
    let is_known = host
        .read("/proc/filesystems")
        .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().next_back() == Some("fuse")));
    device_state(opened, is_known)
}

fn device_state(opened: io::Result<bool>, is_known: bool) -> Finding {
    let problem = |found: &str| Finding::problem(DEVICE, found).means("nothing can be mounted");
    match opened {
        Ok(true) => Finding::ok(DEVICE, "can be opened"),
        Ok(false) => problem("is no device").fix("rm /dev/fuse && mknod -m 666 /dev/fuse c 10 229"),
        Err(error) if error.kind() == io::ErrorKind::NotFound && is_known => {
            problem("is missing, though the kernel has FUSE")
                .fix("mknod -m 666 /dev/fuse c 10 229 (in a container: start it with --device /dev/fuse)")
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => problem("is missing").fix("modprobe fuse"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            problem("may not be opened by this user").fix("chmod 666 /dev/fuse")
        }
        Err(error) => problem(&format!("cannot be opened ({error})")).fix("modprobe fuse"),
    }
}

/// fusermount3, through which ordinary users mount.
fn helper(host: &Host) -> Finding {
    const NAME: &str = "fusermount3";
    if outer_root(host).is_some() {
        let found = "gives no rights in a user namespace";
        if host.is_root() {
            return Finding::ok(NAME, format!("{found}; its root needs it not"));
        }
        return Finding::problem(NAME, found)
            .means("only root of the namespace can mount, in a mount namespace of its own")
            .fix("unshare --map-root-user --mount");
    }
    let Some(path) = host.program(NAME) else {
        return judged(host, "is missing").fix("apt install fuse3 (or the package of that name elsewhere)");
    };
    let is_setuid = std::fs::metadata(host.at(&path)).is_ok_and(|meta| is_setuid(meta.mode(), meta.uid()));
    if !is_setuid {
        return judged(host, "is not set-uid root").fix(format!("chmod u+s {}", quoted(&path)));
    }
    let version = host.output(NAME, &["--version"]).unwrap_or_default();
    let version = version.split_whitespace().next_back().unwrap_or("of unknown version").to_owned();
    Finding::ok(NAME, format!("{version}, set-uid root"))
}

fn judged(host: &Host, found: &str) -> Finding {
    let meaning = "ordinary users cannot mount";
    if host.is_root() {
        Finding::note("fusermount3", found).means(format!("{meaning}; root can"))
    } else {
        Finding::problem("fusermount3", found).means(meaning)
    }
}

fn is_setuid(mode: u32, uid: u32) -> bool {
    mode & 0o4000 != 0 && uid == 0
}

/// Whether ordinary users may let others in.
fn allow_other(host: &Host) -> Finding {
    const SUBJECT: &str = "user_allow_other";
    match host.read(CONFIGURATION) {
        Ok(text) if text.lines().any(|line| line.trim() == SUBJECT) => {
            Finding::ok(SUBJECT, format!("is set in {CONFIGURATION}"))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Finding::note(SUBJECT, format!("unknown: {CONFIGURATION} may not be read by this user"))
        }
        _ => Finding::note(SUBJECT, format!("is not set in {CONFIGURATION}"))
            .means("-o allow_other is refused to ordinary users; root needs it not")
            .fix(format!("echo {SUBJECT} >> {CONFIGURATION}")),
    }
}

/// What `AppArmor` lets fusermount3 do: in general, or on one mount point.
pub(super) fn confined(host: &Host, mount_point: Option<&Path>) -> Option<Finding> {
    let rules = Rules::of(host)?;
    let Some(place) = mount_point else {
        let places = rules.mount_points().collect::<Vec<_>>().join(", ");
        return Some(
            Finding::note(PROFILE, format!("confines fusermount3 to mount points in {places}"))
                .means("elsewhere ordinary users get 'Permission denied'; root does not use it")
                .fix("chainfs doctor DIR says what DIR needs"),
        );
    };
    let shown = place.display();
    if rules.allow(place) {
        return Some(Finding::ok(PROFILE, format!("lets ordinary users mount on {shown}")));
    }
    let line = format!(
        "mount fstype=fuse.chainfs options=(nosuid,nodev) options in (ro,rw,noexec) -> \"{shown}/\",\\numount \
         \"{shown}/\",\\n"
    );
    let fix = format!(
        "printf '{}' >> /etc/apparmor.d/local/fusermount3 && apparmor_parser -r {PROFILE}",
        line.replace('\'', "'\\''")
    );
    let found = format!("does not let fusermount3 mount on {shown}");
    let meaning = "ordinary users get 'Permission denied' there";
    Some(if host.is_root() {
        Finding::warning(PROFILE, found).means(meaning).fix(fix)
    } else {
        Finding::problem(PROFILE, found).means(meaning).fix(fix)
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    #[test]
    fn the_device_is_missing_denied_or_none() {
        let (_root, host) = machine(1000, &[]);
        assert_eq!(device(&host).fix.as_deref(), Some("modprobe fuse"));
        let (_root, host) = machine(1000, &[("/proc/filesystems", "nodev\tfuse\n")]);
        let finding = device(&host);
        assert!(finding.mark == Mark::Problem && finding.fix.unwrap().contains("--device"), "a container");
        let (_root, host) = machine(1000, &[("/dev/fuse", "x")]);
        assert_eq!(device(&host).found, "is no device");
        let (_root, host) = machine(1000, &[("/dev/fuse", "-> /dev/null")]);
        assert_eq!(device(&host).mark, Mark::Ok);
        let denied = device_state(Err(io::ErrorKind::PermissionDenied.into()), true);
        assert_eq!((denied.mark, denied.fix.as_deref()), (Mark::Problem, Some("chmod 666 /dev/fuse")));
    }

    #[test]
    fn without_fusermount3_only_root_mounts() {
        for (uid, mark) in [(0, Mark::Note), (1000, Mark::Problem)] {
            let (_root, host) = machine(uid, &[]);
            assert_eq!(helper(&host).mark, mark);
            let (_root, host) = machine(uid, &[("/usr/bin/fusermount3", "-> /bin/true")]);
            let finding = helper(&host);
            assert_eq!(
                (finding.mark, finding.fix.as_deref()),
                (mark, Some("chmod u+s /usr/bin/fusermount3"))
            );
        }
        assert!(is_setuid(0o104_755, 0) && !is_setuid(0o104_755, 1000) && !is_setuid(0o100_755, 0));
    }

    #[test]
    fn user_allow_other_counts_if_it_is_no_comment() {
        for (text, mark) in
            [("#user_allow_other\n", Mark::Note), ("mount_max = 9\nuser_allow_other \n", Mark::Ok)]
        {
            let (_root, host) = machine(1000, &[("/etc/fuse.conf", text)]);
            assert_eq!(allow_other(&host).mark, mark);
        }
        let (_root, host) = machine(1000, &[]);
        assert_eq!(allow_other(&host).fix.as_deref(), Some("echo user_allow_other >> /etc/fuse.conf"));
    }

    #[test]
    fn a_mount_point_outside_of_the_profile_is_named_with_the_lines_that_it_needs() {
        let profile =
            "profile fusermount3 /usr/bin/fusermount3 {\n  mount fstype=@{fuse_types} -> /mnt/{,**/},\n}\n";
        let files = [(PROFILE, profile), ("/sys/module/apparmor/parameters/enabled", "Y\n")];
        let (_root, host) = machine(1000, &files);
        assert_eq!(confined(&host, None).unwrap().mark, Mark::Note);
        assert_eq!(confined(&host, Some(Path::new("/mnt/a"))).unwrap().mark, Mark::Ok);
        let finding = confined(&host, Some(Path::new("/srv/a"))).unwrap();
        assert_eq!(finding.mark, Mark::Problem);
        assert!(finding.fix.unwrap().contains("-> \"/srv/a/\","));
        let (_root, host) = machine(0, &files);
        assert_eq!(confined(&host, Some(Path::new("/srv/a"))).unwrap().mark, Mark::Warning);
        let (_root, host) = machine(0, &files[..1]);
        assert_eq!(confined(&host, None), None, "AppArmor is off");
    }
}
