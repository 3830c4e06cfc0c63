//! What is installed around chainfs: the helper of mount(8), qemu-img, updatedb, the switch of `SELinux`.

use super::finding::Finding;
use super::host::Host;

/// The links by which mount(8) finds the helper.
const LINKS: [(&str, &str); 2] = [
    ("/sbin/mount.chainfs", "mount -t chainfs and lines of /etc/fstab do not work"),
    ("/sbin/mount.fuse.chainfs", "mount -t fuse.chainfs does not work"),
];
const UPDATEDB: &str = "/etc/updatedb.conf";
const KIND: &str = crate::fs::mount::KIND;

/// All of it.
pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        LINKS.iter().map(|(link, meaning)| helper(host, link, meaning)).collect();
    findings.extend([qemu_img(host)]);
    findings.extend(updatedb(host));
    findings.extend(selinux(host));
    findings
}

fn helper(host: &Host, link: &str, meaning: &str) -> Finding {
    let name = link.rsplit('/').next().unwrap_or(link);
    if host.program(name).is_some() {
        return Finding::ok(link, "is installed");
    }
    let found = if host.exists(link) { "leads to no program" } else { "is missing" };
    Finding::warning(link, found)
        .means(meaning)
        .fix(format!("ln -sf \"$(command -v mount-chainfs)\" {link} (packages of chainfs have it)"))
}

fn qemu_img(host: &Host) -> Finding {
    const NAME: &str = "qemu-img";
    let Some(path) = host.program(NAME) else {
        return Finding::note(NAME, "is not installed")
            .means("chainfs needs it not; you cannot convert images")
            .fix("apt install qemu-utils (Fedora: qemu-img)");
    };
    match host.output(NAME, &["--version"]) {
        Some(text) => {
            let line = text.lines().next().unwrap_or_default();
            Finding::ok(NAME, line.trim_start_matches("qemu-img ").to_owned())
        }
        None => Finding::warning(NAME, format!("{} does not tell its version", path.display()))
            .means("it may not work")
            .fix("apt install --reinstall qemu-utils"),
    }
}

/// locate(1) would read every snapshot of every guest.
fn updatedb(host: &Host) -> Option<Finding> {
    let text = host.read(UPDATEDB).ok()?;
    let prunes = text.lines().filter_map(|line| line.trim().strip_prefix("PRUNEFS")).flat_map(|rest| {
        rest.split(|char: char| char.is_whitespace() || "=\"".contains(char))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    if prunes.into_iter().any(|word| word == KIND) {
        return Some(Finding::ok(UPDATEDB, format!("PRUNEFS has {KIND}")));
    }
    let fix = if text.lines().any(|line| line.trim().starts_with("PRUNEFS")) {
        format!("sed -i 's/^ *PRUNEFS *= *\"/&{KIND} /' {UPDATEDB}")
    } else {
        format!("echo 'PRUNEFS=\"{KIND}\"' >> {UPDATEDB}")
    };
    Some(
        Finding::warning(UPDATEDB, format!("PRUNEFS lacks {KIND}"))
            .means("updatedb reads all files of all guests in all snapshots")
            .fix(fix),
    )
}

/// `SELinux` lets virtual machines use files on FUSE only if a switch is on.
fn selinux(host: &Host) -> Option<Finding> {
    const SWITCH: &str = "/sys/fs/selinux/booleans/virt_use_fusefs";
    let is_enforced = host.number("/sys/fs/selinux/enforce")? == 1;
    let Ok(values) = host.read(SWITCH) else {
        return Some(Finding::note("SELinux", "is on; virt_use_fusefs is unknown here"));
    };
    if values.split_whitespace().next() == Some("1") {
        return Some(Finding::ok("SELinux", "virt_use_fusefs is on"));
    }
    let found = "virt_use_fusefs is off";
    let finding =
        if is_enforced { Finding::warning("SELinux", found) } else { Finding::note("SELinux", found) };
    let meaning = "libvirt's virtual machines may not open disks in a mount of chainfs";
    Some(finding.means(meaning).fix("setsebool -P virt_use_fusefs 1"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    #[test]
    fn links_of_mount_8_that_are_missing_or_lead_nowhere_are_named() {
        let (_root, host) = machine(0, &[("/sbin/mount.chainfs", "-> /nonexistent/x")]);
        let findings = check(&host);
        assert!(findings[0].mark == Mark::Warning && findings[0].found == "leads to no program");
        assert!(findings[1].mark == Mark::Warning && findings[1].found == "is missing");
        let (_root, host) = machine(0, &[("/sbin/mount.chainfs", "-> /bin/true")]);
        assert_eq!(check(&host)[0].mark, Mark::Ok);
    }

    #[test]
    fn qemu_img_is_wanted_but_not_needed() {
        let (_root, host) = machine(0, &[]);
        assert_eq!(qemu_img(&host).mark, Mark::Note);
        let (_root, host) = machine(0, &[("/usr/bin/qemu-img", "-> /bin/false")]);
        assert_eq!(qemu_img(&host).mark, Mark::Warning);
    }

    #[test]
    fn the_command_for_updatedb_mends_its_file() {
        for (text, mark) in [
            ("PRUNEFS = \"NFS nfs\"\n", Mark::Warning),
            ("PRUNEPATHS=\"/tmp\"\n", Mark::Warning),
            ("PRUNEFS=\"NFS fuse.chainfs\"\n", Mark::Ok),
        ] {
            let (_root, host) = machine(0, &[(UPDATEDB, text)]);
            let finding = updatedb(&host).unwrap();
            assert_eq!(finding.mark, mark, "{text}");
            let Some(fix) = finding.fix else { continue };
            let place = host.at(UPDATEDB);
            let fix = fix.replace(UPDATEDB, &place.display().to_string());
            assert!(std::process::Command::new("sh").args(["-c", &fix]).status().unwrap().success());
            assert_eq!(updatedb(&host).unwrap().mark, Mark::Ok, "{fix}");
        }
        assert_eq!(updatedb(&machine(0, &[]).1), None);
    }

    #[test]
    fn selinux_needs_a_switch_for_virtual_machines() {
        let state = |enforce: &str, switch: &str| {
            let files =
                [("/sys/fs/selinux/enforce", enforce), ("/sys/fs/selinux/booleans/virt_use_fusefs", switch)];
            let (_root, host) = machine(0, &files);
            selinux(&host).unwrap().mark
        };
        assert_eq!(state("1", "0 0"), Mark::Warning);
        assert_eq!(state("0", "0 0"), Mark::Note);
        assert_eq!(state("1", "1 1"), Mark::Ok);
        assert_eq!(selinux(&machine(0, &[]).1), None);
        let (_root, host) = machine(0, &[("/sys/fs/selinux/enforce", "1")]);
        assert_eq!(selinux(&host).unwrap().mark, Mark::Note);
    }
}
