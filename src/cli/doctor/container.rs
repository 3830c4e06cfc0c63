//! What a container, or a user namespace, changes: who may mount, and what of the kernel is for others.

use super::finding::Finding;
use super::host::Host;

/// The bit of `CAP_SYS_ADMIN` in a set of capabilities.
const SYS_ADMIN: u64 = 1 << 21;
/// Profiles of `AppArmor` that deny mount(2) to containers.
const DENYING: [&str; 2] = ["docker-default", "containers-default"];

/// All of it; nothing on a machine itself.
pub(super) fn check(host: &Host) -> Vec<Finding> {
    [namespace(host), right(host), no_new_privileges(host), profile(host)].into_iter().flatten().collect()
}

/// The user outside that root of this user namespace is; `None` in the machine's own.
pub(super) fn outer_root(host: &Host) -> Option<u32> {
    let map = host.read("/proc/self/uid_map").ok()?;
    let mut lines = map.lines().map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    let (inside, outside, count) = lines.next()??;
    ((inside, outside, count) != (0, 0, u32::MAX)).then_some(outside)
}

fn namespace(host: &Host) -> Option<Finding> {
    let outside = outer_root(host)?;
    let found = format!("this is one: its first user is uid {outside} outside");
    Some(Finding::note("user namespace", found).means(
        "a mount made here is seen only in this mount namespace and ends with it, even with allow_other; raw \
         layers are read by the daemon; files of users outside belong to nobody",
    ))
}

/// A line of `/proc/self/status`.
fn status(host: &Host, name: &str) -> Option<String> {
    let text = host.read("/proc/self/status").ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
}

/// Root of a container is not always allowed to mount.
fn right(host: &Host) -> Option<Finding> {
    let held = u64::from_str_radix(&status(host, "CapEff")?, 16).ok()?;
    (host.is_root() && held & SYS_ADMIN == 0).then(|| {
        Finding::problem("CAP_SYS_ADMIN", "is missing: root of this container may not mount")
            .means("nothing can be mounted")
            .fix("start the container with --device /dev/fuse --cap-add SYS_ADMIN, or mount on the host and bind that")
    })
}

/// Whether set-uid programs such as fusermount3 give no rights to this process.
fn has_no_new_privileges(host: &Host) -> bool {
    status(host, "NoNewPrivs").is_some_and(|value| value == "1")
}

fn no_new_privileges(host: &Host) -> Option<Finding> {
    (!host.is_root() && has_no_new_privileges(host)).then(|| {
        Finding::problem("no_new_privs", "set-uid programs give this process no rights, fusermount3 neither")
            .means("this user cannot mount here")
            .fix("mount outside, or in a namespace: unshare --map-root-user --mount (a container: without no-new-privileges)")
    })
}

fn profile(host: &Host) -> Option<Finding> {
    let text = host.read("/proc/self/attr/current").ok()?;
    let name = text.trim_matches(['\0', '\n']).split(' ').next()?.to_owned();
    DENYING.iter().any(|denying| name.starts_with(denying)).then(|| {
        Finding::problem("AppArmor", format!("the profile {name} denies mounting to this container"))
            .means("nothing can be mounted")
            .fix("start it with --security-opt apparmor=unconfined, or mount on the host and bind that")
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Mark;
    use super::super::host::testing::machine;
    use super::*;

    #[test]
    fn a_user_namespace_is_told_from_the_machine() {
        for (map, outside) in [
            ("         0          0 4294967295\n", None),
            ("         0       1000          1\n", Some(1000)),
            ("0 1000 1\n1 100000 65536\n", Some(1000)),
            ("65534 65534 1\n", Some(65534)),
            ("", None),
        ] {
            let (_root, host) = machine(0, &[("/proc/self/uid_map", map)]);
            assert_eq!(outer_root(&host), outside, "{map}");
            assert_eq!(namespace(&host).is_some(), outside.is_some());
        }
    }

    #[test]
    fn what_stops_a_container_is_a_problem_with_its_remedy() {
        let all = "CapEff:\t000001ffffffffff\nNoNewPrivs:\t0\n";
        let (_root, host) =
            machine(0, &[("/proc/self/status", all), ("/proc/self/attr/current", "unconfined\n")]);
        assert_eq!(check(&host), []);
        let docker = "CapEff:\t00000000a80425fb\nNoNewPrivs:\t1\n";
        for (uid, word) in [(0, "--cap-add SYS_ADMIN"), (1000, "unshare --map-root-user")] {
            let (_root, host) = machine(uid, &[("/proc/self/status", docker)]);
            let found = check(&host);
            assert!(matches!(&found[..], [one] if one.mark == Mark::Problem), "{found:?}");
            assert!(found[0].fix.as_ref().unwrap().contains(word), "{found:?}");
        }
        let (_root, host) = machine(0, &[("/proc/self/attr/current", "docker-default (enforce)\n\0")]);
        let found = check(&host);
        assert!(found[0].found.contains("docker-default denies"), "{found:?}");
    }
}
