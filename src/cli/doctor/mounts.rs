//! The mounts of chainfs: dead ones, and what one means for its users.

use std::io;
use std::path::Path;

use super::finding::{Finding, quoted};
use super::host::Host;
use super::libvirt;
use crate::fs::METRICS_PATH;
use crate::fs::mount::KIND;
use crate::io::MountEntry;

/// Every mount of chainfs; of several on one directory, the visible one.
pub(super) fn all(host: &Host) -> Vec<MountEntry> {
    let mut found: Vec<MountEntry> = Vec::new();
    for mount in host.mounts() {
        found.retain(|earlier| earlier.directory != mount.directory);
        found.push(mount);
    }
    found.retain(|mount| mount.kind == KIND);
    found
}

/// Whether its daemon answers, and who can enter. It may take for ever.
pub(super) fn check(host: &Host, mount: &MountEntry) -> Vec<Finding> {
    let mut findings = vec![alive(mount, std::fs::metadata(&mount.directory).map(|_| ()))];
    // A dead mount can be asked no more.
    if findings[0].fix.is_none() {
        findings.extend(entered(host, mount));
        findings.extend(problems(&mount.directory));
    }
    findings
}

fn alive(mount: &MountEntry, looked: io::Result<()>) -> Finding {
    let subject = mount.directory.display().to_string();
    let place = quoted(&mount.directory);
    match looked {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            Finding::problem(subject, "is a dead mount: its daemon has ended")
                .means("nothing in it can be opened")
                .fix(format!("chainfs umount {place} (mounting there again does it, too)"))
        }
        // Another user's, without allow_other.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Finding::note(subject, "is a mount that this user may not enter")
                .means("its store is shown to the user who has mounted it")
        }
        Err(error) => Finding::problem(subject, format!("cannot be entered ({error})"))
            .means("nothing in it can be opened")
            .fix(format!("chainfs umount --lazy {place}")),
        Ok(()) => Finding::ok(subject, format!("shows {}", mount.source.display())),
    }
}

/// That a mount did not answer in time.
pub(super) fn silent(directory: &Path, seconds: u64) -> Finding {
    Finding::problem(directory.display().to_string(), format!("has not answered within {seconds} seconds"))
        .means("its daemon hangs, or is stopped")
        .fix(format!("end the daemon, or detach the mount: umount -l {}", quoted(directory)))
}

/// Whether libvirt's user can enter it.
fn entered(host: &Host, mount: &MountEntry) -> Option<Finding> {
    let user = libvirt::user(host)?;
    let subject = mount.directory.display().to_string();
    let has = |wanted: &str| mount.options.split(',').any(|option| option == wanted);
    let owner = mount.options.split(',').find_map(|option| option.strip_prefix("user_id="));
    if user.subject.is_root() || owner == Some(&user.subject.uid.to_string()) || has("allow_other") {
        let found = libvirt::obstacle(&user.subject, &mount.directory).ok().flatten();
        return Some(match found {
            Some(obstacle) => libvirt::unreachable(&user, &subject, &obstacle),
            None => Finding::ok(subject, format!("{} can enter", user.name)),
        });
    }
    Some(
        Finding::warning(subject, format!("{} cannot enter: it has no allow_other", user.name))
            .means("libvirt's virtual machines cannot use its disks")
            .fix(format!(
                "chainfs umount {place} && chainfs mount -o allow_other {store} {place}",
                place = quoted(&mount.directory),
                store = quoted(&mount.source)
            )),
    )
}

/// What the mount itself has to say.
fn problems(directory: &Path) -> Vec<Finding> {
    let metrics = std::fs::read_to_string(directory.join(METRICS_PATH)).unwrap_or_default();
    let count = metrics.lines().find_map(|line| line.strip_prefix("chainfs_problems ")?.parse::<u64>().ok());
    let path = directory.join(".chainfs/problems.txt");
    match count {
        Some(count) if count > 0 => {
            let lines = if count == 1 { "a problem".to_owned() } else { format!("{count} problems") };
            vec![
                Finding::warning(directory.display().to_string(), format!("has {lines}"))
                    .means("something is not shown, or cannot be written")
                    .fix(format!("cat {}", quoted(&path))),
            ]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    fn mount(options: &str) -> MountEntry {
        MountEntry {
            device: (0, 50),
            directory: "/".into(),
            kind: KIND.into(),
            source: "/srv/images".into(),
            options: options.into(),
        }
    }

    #[test]
    fn dead_mounts_are_told_from_those_of_others() {
        let error = |number| Err(io::Error::from_raw_os_error(number));
        for (looked, mark, word) in [
            (Ok(()), Mark::Ok, "shows /srv/images"),
            (error(libc::ENOTCONN), Mark::Problem, "dead"),
            (error(libc::EACCES), Mark::Note, "may not enter"),
            (error(libc::EIO), Mark::Problem, "cannot be entered"),
        ] {
            let finding = alive(&mount("rw"), looked);
            assert!(finding.mark == mark && finding.found.contains(word), "{finding:?}");
        }
        let finding = silent(Path::new("/mnt/a b"), 5);
        assert!(finding.mark == Mark::Problem && finding.fix.unwrap().ends_with("umount -l '/mnt/a b'"));
    }

    #[test]
    fn a_user_of_virtual_machines_needs_allow_other() {
        let (_root, host) = machine(0, &[("/etc/passwd", "qemu:x:107:107::/:/\n")]);
        for (options, mark) in [
            ("rw,user_id=0,group_id=0", Mark::Warning),
            ("rw,user_id=0,allow_other", Mark::Ok),
            ("rw,user_id=107", Mark::Ok),
        ] {
            assert_eq!(entered(&host, &mount(options)).unwrap().mark, mark, "{options}");
        }
        assert_eq!(entered(&machine(0, &[]).1, &mount("rw")), None);
    }

    #[test]
    fn of_mounts_on_one_directory_the_visible_one_counts() {
        let line = |directory: &str, kind: &str| format!("1 2 0:9 / {directory} rw - {kind} /s rw\n");
        let text =
            [line("/a", KIND), line("/b", KIND), line("/b", "tmpfs"), line("/c", "ext4"), line("/c", KIND)];
        let (_root, host) = machine(0, &[("/proc/self/mountinfo", &text.concat())]);
        let found: Vec<_> = all(&host).into_iter().map(|mount| mount.directory).collect();
        assert_eq!(found, [Path::new("/a"), Path::new("/c")]);
    }

    #[test]
    fn problems_of_a_mount_are_counted() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(".chainfs")).unwrap();
        for (text, count) in [("chainfs_problems 0\n", 0), ("x 1\nchainfs_problems 3\n", 1), ("", 0)] {
            std::fs::write(root.path().join(METRICS_PATH), text).unwrap();
            assert_eq!(problems(root.path()).len(), count, "{text}");
        }
    }
}
