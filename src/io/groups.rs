//! The groups of a client process.

use std::path::Path;

/// Bytes to read of a process' status: 65,536 groups fit.
const MAX_STATUS: usize = 1 << 20;

/// The groups of the thread `pid`, if it still acts for `uid`; only `gid` if they are unknown. The client
/// waits for the reply, so its thread number has not been reused.
pub fn groups_of_process(pid: u32, uid: u32, gid: u32) -> Vec<u32> {
    let mut groups = vec![gid];
    // 0: the client is in a pid namespace that this process cannot see.
    if pid != 0 {
        groups.extend(read(Path::new(&format!("/proc/{pid}/status")), uid).unwrap_or_default());
    }
    groups
}

fn read(status: &Path, uid: u32) -> Option<Vec<u32>> {
    use std::io::Read as _;
    let mut text = String::new();
    let len = std::fs::File::open(status).ok()?.take(MAX_STATUS as u64).read_to_string(&mut text).ok()?;
    if len == MAX_STATUS { None } else { parse(&text, uid) }
}

/// The groups in a status file, if the user for file access is `uid`.
fn parse(text: &str, uid: u32) -> Option<Vec<u32>> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    // Real, effective, saved and file system uid.
    let acts_for: u32 = field("Uid:")?.split_ascii_whitespace().nth(3)?.parse().ok()?;
    if acts_for != uid {
        return None;
    }
    field("Groups:")?.split_ascii_whitespace().map(|group| group.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_callers_own_groups_are_used() {
        let text = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 11 \nNStgid:\t1\n";
        assert_eq!(parse(text, 4), Some(vec![10, 11]));
        assert_eq!(parse(text, 2), None);
        assert_eq!(parse("Uid:\t1\t1\t1\t1\nGroups:\tx\n", 1), None);
        assert_eq!(parse("Uid:\t1\t1\t1\t1\nGroups:\t\n", 1), Some(vec![]));
        assert_eq!(groups_of_process(0, 1, 7), [7]);
        let own = rustix::process::geteuid().as_raw();
        assert!(groups_of_process(std::process::id(), own, 7).starts_with(&[7]));
        assert_eq!(groups_of_process(std::process::id(), own + 1, 7), [7]);
    }
}
