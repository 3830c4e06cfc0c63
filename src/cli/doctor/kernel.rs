//! What the kernel has of what chainfs uses, and its limits.

use super::container::outer_root;
use super::finding::Finding;
use super::host::Host;
use crate::io::detached;

/// Enough for every store: the mount raises its limit by itself, as far as it may.
const OPEN_FILES: u64 = 4096;
/// One watch for each directory of a store.
const WATCHES: u64 = 8192;
/// One instance for each mount.
const INSTANCES: u64 = 16;

/// A feature that is used where the kernel has it.
struct Feature {
    name: &'static str,
    since: (u32, u32),
    without: &'static str,
    /// The option that switches it off.
    option: &'static str,
    needs_root: bool,
}

const FEATURES: [Feature; 4] = [
    Feature {
        name: "passthrough of raw layers",
        since: (6, 9),
        without: "the daemon serves every read of a raw layer",
        option: "nopassthrough",
        needs_root: true,
    },
    Feature {
        name: "kernel maps of chains",
        since: (6, 12),
        without: "the daemon serves every read of a snapshot with several layers",
        option: "kernelmap=off",
        needs_root: true,
    },
    Feature {
        name: "shared mappings of active disks",
        since: (6, 6),
        without: "active.raw can only be mapped privately",
        option: "nosharedmapping",
        needs_root: false,
    },
    Feature {
        name: "parallel writes",
        since: (6, 2),
        without: "writes to one disk wait for each other",
        option: "noparallelwrites",
        needs_root: false,
    },
];

/// All of it.
pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut findings = version(host);
    findings.extend([
        io_uring(host),
        seccomp(host),
        namespaces(host),
        modules(host),
        open_files(host),
        watches(host),
    ]);
    findings
}

/// The version of a release such as `6.18.44-fc`.
fn parsed(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|char: char| !char.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn version(host: &Host) -> Vec<Finding> {
    let release = host.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let subject = format!("kernel {}", release.trim());
    if !host.has_openat2 {
        let found = "openat2(2) is missing or forbidden";
        let fix = "use Linux 5.6 or later; in a container: allow openat2 in its seccomp profile";
        return vec![Finding::problem(subject, found).means("no store can be opened").fix(fix)];
    }
    let Some(version) = parsed(&release) else {
        return vec![Finding::note(subject, "its version cannot be told, so its features are unknown")];
    };
    let mut findings = Vec::new();
    let mut present = vec!["openat2"];
    for feature in &FEATURES {
        if version < feature.since {
            let (major, minor) = feature.since;
            let found = format!("no {} (Linux {major}.{minor})", feature.name);
            findings.push(Finding::note(subject.clone(), found).means(feature.without));
        } else if feature.needs_root && (!host.is_root() || outer_root(host).is_some()) {
            let found = format!("{} is for mounts of the machine's root", feature.name);
            findings.push(Finding::note(subject.clone(), found).means(feature.without));
        } else {
            present.push(feature.name);
        }
    }
    let options: Vec<&str> = FEATURES.iter().map(|feature| feature.option).collect();
    let found = format!("has {} (switched off by -o {})", present.join(", "), options.join(", -o "));
    findings.insert(0, Finding::ok(subject, found));
    findings.extend(erofs(host, version));
    findings
}

/// Whether the kernel has what kernel maps are made of.
fn erofs(host: &Host, version: (u32, u32)) -> Option<Finding> {
    let known = host.read("/proc/filesystems").unwrap_or_default();
    let has_it = known.lines().any(|line| line.trim_start_matches("nodev").trim() == detached::EROFS);
    let is_wanted = version >= (6, 12) && host.is_root() && outer_root(host).is_none();
    (is_wanted && !has_it).then(|| {
        Finding::note("EROFS", "is not loaded, if the kernel has it at all")
            .means("without it the daemon serves every read of a snapshot with several layers")
            .fix("modprobe erofs")
    })
}

/// FUSE over `io_uring`, which most kernels have switched off.
fn io_uring(host: &Host) -> Finding {
    const SUBJECT: &str = "FUSE over io_uring";
    const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";
    const RESTRICTION: &str = "/proc/sys/kernel/io_uring_disabled";
    let meaning = "requests come through /dev/fuse: several readers at a time are served more slowly";
    let Ok(parameter) = host.read(PARAMETER) else {
        return Finding::note(SUBJECT, "the kernel has none (Linux 6.14)").means(meaning);
    };
    if !parameter.starts_with('Y') {
        return Finding::note(SUBJECT, "is switched off").means(meaning).fix(format!(
            "echo Y > {PARAMETER} (for good: options fuse enable_uring=1 in /etc/modprobe.d/fuse.conf)"
        ));
    }
    match host.number(RESTRICTION) {
        Some(level) if level > u64::from(host.is_root()) => {
            Finding::note(SUBJECT, format!("io_uring is forbidden here by {RESTRICTION}"))
                .means(meaning)
                .fix("sysctl -w kernel.io_uring_disabled=0")
        }
        _ => Finding::ok(SUBJECT, "is used (switched off by -o noiouring)"),
    }
}

fn seccomp(host: &Host) -> Finding {
    if host.exists("/proc/sys/kernel/seccomp/actions_avail") {
        return Finding::ok("seccomp", "filters can be set");
    }
    Finding::warning("seccomp", "the kernel has no filters")
        .means("the files of guests are not shown")
        .fix("mount with -o noseccomp (workers then have only limits), or with -o nofiles")
}

/// Namespaces of ordinary users: what rootless containers need to mount in themselves.
fn namespaces(host: &Host) -> Finding {
    const SUBJECT: &str = "user namespaces";
    let forbidden = [
        ("/proc/sys/user/max_user_namespaces", 0, "user.max_user_namespaces=15000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", 0, "kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            1,
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ];
    let meaning = "chainfs needs none; rootless containers cannot mount in themselves";
    for (path, bad, setting) in forbidden {
        if host.number(path) == Some(bad) {
            let found = format!("are restricted by {path}");
            return Finding::note(SUBJECT, found).means(meaning).fix(format!("sysctl -w {setting}"));
        }
    }
    if host.program("unshare").is_none() {
        return Finding::note(SUBJECT, "could not be tried: there is no unshare(1)");
    }
    match host.output("unshare", &["--user", "--map-root-user", "true"]) {
        Some(_) => Finding::ok(SUBJECT, "can be made"),
        None => Finding::note(SUBJECT, "cannot be made").means(meaning),
    }
}

/// Security modules: what may refuse something that modes allow.
fn modules(host: &Host) -> Finding {
    const SUBJECT: &str = "security modules";
    match host.read("/sys/kernel/security/lsm") {
        Ok(text) => Finding::ok(SUBJECT, text.trim().replace(',', ", ")),
        Err(_) => Finding::note(SUBJECT, "unknown: /sys/kernel/security/lsm cannot be read here"),
    }
}

fn open_files(host: &Host) -> Finding {
    const SUBJECT: &str = "limit of open files";
    match host.open_files.1 {
        Some(hard) if hard < OPEN_FILES => Finding::warning(SUBJECT, format!("is {hard} (ulimit -Hn)"))
            .means("images of a large store are closed and opened again while they are in use")
            .fix(format!("ulimit -n {OPEN_FILES} as root, or LimitNOFILE={OPEN_FILES} in the unit")),
        hard => {
            let hard = hard.map_or("unlimited".to_owned(), |hard| hard.to_string());
            Finding::ok(SUBJECT, format!("can be raised to {hard}"))
        }
    }
}

fn watches(host: &Host) -> Finding {
    const SUBJECT: &str = "inotify";
    let limit = |name: &str| host.number(&format!("/proc/sys/fs/inotify/{name}"));
    let (Some(watches), Some(instances)) = (limit("max_user_watches"), limit("max_user_instances")) else {
        return Finding::warning(SUBJECT, "the kernel has none")
            .means("stores are scanned every few seconds")
            .fix("mount with -o rescan=SECONDS to choose how often");
    };
    let meaning = "stores are scanned every few seconds where the limit is reached";
    for (name, value, wanted) in
        [("max_user_watches", watches, WATCHES), ("max_user_instances", instances, INSTANCES)]
    {
        if value < wanted {
            return Finding::warning(SUBJECT, format!("fs.inotify.{name} is {value}"))
                .means(meaning)
                .fix(format!("sysctl -w fs.inotify.{name}={wanted}"));
        }
    }
    Finding::ok(SUBJECT, format!("{watches} directories can be watched, by {instances} mounts"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    #[test]
    fn each_feature_that_the_kernel_lacks_is_named() {
        for (release, uid, missing) in
            [("6.1.0-30-amd64", 0, 4), ("6.6.1", 0, 2), ("6.18.44-fc", 0, 0), ("7.0", 1000, 2)]
        {
            let systems = ("/proc/filesystems", "nodev\tproc\n\text4\n\terofs\n");
            let (_root, host) = machine(uid, &[("/proc/sys/kernel/osrelease", release), systems]);
            let findings = version(&host);
            assert_eq!(findings[0].mark, Mark::Ok);
            assert_eq!(
                findings.iter().filter(|finding| finding.mark == Mark::Note).count(),
                missing,
                "{release}"
            );
        }
        let (_root, host) = machine(0, &[("/proc/sys/kernel/osrelease", "6.18.44-fc")]);
        let erofs = version(&host).pop().expect("a finding");
        assert_eq!(erofs.mark, Mark::Note);
        let (_root, host) = machine(0, &[("/proc/sys/kernel/osrelease", "strange")]);
        assert_eq!(version(&host)[0].mark, Mark::Note);
        let (_root, mut host) = machine(0, &[("/proc/sys/kernel/osrelease", "5.4.0")]);
        host.has_openat2 = false;
        assert_eq!(version(&host)[0].mark, Mark::Problem);
    }

    #[test]
    fn limits_that_are_too_low_are_named_with_the_command() {
        let inotify = |watches: &str, instances: &str| {
            let (_root, host) = machine(
                0,
                &[
                    ("/proc/sys/fs/inotify/max_user_watches", watches),
                    ("/proc/sys/fs/inotify/max_user_instances", instances),
                ],
            );
            super::watches(&host)
        };
        assert_eq!(inotify("65536\n", "128\n").mark, Mark::Ok);
        assert_eq!(inotify("100", "128").fix.as_deref(), Some("sysctl -w fs.inotify.max_user_watches=8192"));
        assert_eq!(inotify("65536", "2").fix.as_deref(), Some("sysctl -w fs.inotify.max_user_instances=16"));
        let (_root, mut host) = machine(0, &[]);
        assert_eq!(super::watches(&host).mark, Mark::Warning, "no inotify");
        assert_eq!(open_files(&host).mark, Mark::Ok);
        host.open_files = (Some(64), Some(64));
        assert_eq!(open_files(&host).mark, Mark::Warning);
        host.open_files = (Some(1024), None);
        assert_eq!(open_files(&host).mark, Mark::Ok);
    }

    #[test]
    fn what_keeps_requests_from_io_uring_is_named() {
        let found = |uid, parameter: &str, restriction: &str| {
            let (_root, host) = machine(
                uid,
                &[
                    ("/sys/module/fuse/parameters/enable_uring", parameter),
                    ("/proc/sys/kernel/io_uring_disabled", restriction),
                ],
            );
            io_uring(&host)
        };
        let (_root, host) = machine(0, &[]);
        assert!(io_uring(&host).found.contains("Linux 6.14"));
        assert!(found(0, "N\n", "0\n").fix.is_some_and(|fix| fix.starts_with("echo Y")));
        for (uid, restriction, mark) in
            [(0, "0\n", Mark::Ok), (0, "1\n", Mark::Ok), (0, "2\n", Mark::Note), (1000, "1\n", Mark::Note)]
        {
            assert_eq!(found(uid, "Y\n", restriction).mark, mark, "{uid} {restriction}");
        }
    }

    #[test]
    fn what_restricts_namespaces_is_named() {
        for (path, value, setting) in [
            ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
            ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
            (
                "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
                "1",
                "kernel.apparmor_restrict_unprivileged_userns=0",
            ),
        ] {
            let (_root, host) = machine(1000, &[(path, value)]);
            assert_eq!(namespaces(&host).fix.unwrap(), format!("sysctl -w {setting}"));
        }
        for (program, mark) in [("-> /bin/true", Mark::Ok), ("-> /bin/false", Mark::Note)] {
            let (_root, host) = machine(1000, &[("/usr/bin/unshare", program)]);
            assert_eq!(namespaces(&host).mark, mark);
        }
        let (_root, host) = machine(1000, &[]);
        assert!(namespaces(&host).found.contains("no unshare"));
    }

    #[test]
    fn without_seccomp_the_option_is_named() {
        let (_root, host) = machine(0, &[]);
        assert!(seccomp(&host).mark == Mark::Warning && seccomp(&host).fix.unwrap().contains("noseccomp"));
        let (_root, host) = machine(0, &[("/proc/sys/kernel/seccomp/actions_avail", "errno")]);
        assert_eq!(seccomp(&host).mark, Mark::Ok);
        assert_eq!(modules(&host).mark, Mark::Note);
        let (_root, host) = machine(0, &[("/sys/kernel/security/lsm", "lockdown,yama,apparmor\n")]);
        assert_eq!(modules(&host).found, "lockdown, yama, apparmor");
    }
}
