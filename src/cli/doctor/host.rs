//! The machine as the checks see it: its files beneath a root, its programs, its user.
//!
//! A test gives another root, with the files that provoke a finding.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::io::MountEntry;
use crate::store::Subject;

/// Files of settings are smaller.
const MAX_LEN: u64 = 4 << 20;
/// How long a program may take to tell its version.
const PROGRAM_TIME: Duration = Duration::from_secs(5);
/// Where programs are, PATH or not: those for the administrator are not on an ordinary user's.
const PROGRAM_DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// A machine.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    /// Who asks.
    pub(super) uid: u32,
    /// The limits of open files: now, and what the process may raise it to.
    pub(super) open_files: (Option<u64>, Option<u64>),
    /// Whether openat2(2) works.
    pub(super) has_openat2: bool,
}

impl Host {
    /// The machine on which this process runs.
    pub(super) fn this() -> Self {
        use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let opened = openat2(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH);
        let has_openat2 = !matches!(opened, Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM));
        Self {
            root: PathBuf::from("/"),
            uid: rustix::process::geteuid().as_raw(),
            open_files: (limit.current, limit.maximum),
            has_openat2,
        }
    }

    /// A machine whose files are in `root`, where nothing is amiss otherwise.
    #[cfg(test)]
    pub(super) fn beneath(root: &Path, uid: u32) -> Self {
        Self { root: root.to_owned(), uid, open_files: (Some(65_536), Some(65_536)), has_openat2: true }
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Where a file of the machine is.
    pub(super) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.at(path).symlink_metadata().is_ok()
    }

    /// The text of a file of settings.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let mut bytes = Vec::new();
        fs::File::open(self.at(path))?.take(MAX_LEN).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A number of the kernel's.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.read(path).ok()?.trim().parse().ok()
    }

    /// Where a program is, by its name on the machine.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let places = PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
        let is_program = |path: &PathBuf| {
            fs::metadata(self.at(path))
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        places.into_iter().find(is_program)
    }

    /// What a program prints, if it ends soon and well.
    pub(super) fn output(&self, program: &str, words: &[&str]) -> Option<String> {
        let mut command = Command::new(self.at(self.program(program)?));
        command.args(words).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().ok()?;
        let end = Instant::now() + PROGRAM_TIME;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    let _ = child.kill();
                    return None;
                }
            }
        };
        let mut text = Vec::new();
        child.stdout.take()?.take(MAX_LEN).read_to_end(&mut text).ok()?;
        status.success().then(|| String::from_utf8_lossy(&text).into_owned())
    }

    /// All mounts, oldest first.
    pub(super) fn mounts(&self) -> Vec<MountEntry> {
        crate::io::parse_mounts(self.read("/proc/self/mountinfo").unwrap_or_default().as_bytes())
    }

    /// A user of `/etc/passwd`, with all groups of `/etc/group`; the group replaces the user's own, if given.
    pub(super) fn user(&self, name: &str, group: Option<&str>) -> Option<Subject> {
        let passwd = self.read("/etc/passwd").ok()?;
        let by_number = name.strip_prefix('+').unwrap_or(name);
        let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let entry = fields
            .into_iter()
            .find(|fields| fields.len() > 3 && (fields[0] == name || fields[2] == by_number))?;
        let groups = self.read("/etc/group").unwrap_or_default();
        let groups = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let mut of_user = Vec::new();
        let mut own = entry[3].parse().ok()?;
        for fields in groups.filter(|fields| fields.len() > 3) {
            let Ok(gid) = fields[2].parse() else { continue };
            if group.is_some_and(|group| group == fields[0]) {
                own = gid;
            }
            if fields[3].split(',').any(|member| member == entry[0]) {
                of_user.push(gid);
            }
        }
        of_user.push(own);
        Some(Subject::new(entry[2].parse().ok()?, of_user))
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A machine with these files.
    pub(in crate::cli::doctor) fn machine(uid: u32, files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::beneath(root.path(), uid);
        for (path, text) in files {
            let place = host.at(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            // A program that is written and run at once may be busy: those of the machine stand in.
            match text.strip_prefix("-> ") {
                Some(target) => std::os::unix::fs::symlink(target, place).unwrap(),
                None => fs::write(place, text).unwrap(),
            }
        }
        (root, host)
    }

    #[test]
    fn users_are_found_with_all_their_groups() {
        let (_root, host) = machine(
            0,
            &[
                ("/etc/passwd", "root:x:0:0::/root:/bin/sh\nqemu:x:107:108::/:/bin/false\n"),
                ("/etc/group", "qemu:x:108:\nkvm:x:36:qemu,other\ndisk:x:6:\n"),
            ],
        );
        assert_eq!(host.user("qemu", None), Some(Subject::new(107, vec![36, 108])));
        assert_eq!(host.user("+107", Some("disk")), Some(Subject::new(107, vec![6, 36])));
        assert_eq!(host.user("nobody", None), None);
    }

    #[test]
    fn programs_are_run_where_the_machine_has_them() {
        let (_root, host) = machine(0, &[("/usr/bin/good", "-> /bin/true"), ("/sbin/bad", "-> /bin/false")]);
        assert_eq!(host.program("good"), Some(PathBuf::from("/usr/bin/good")));
        assert_eq!(host.output("good", &[]), Some(String::new()));
        assert_eq!(host.output("bad", &[]), None);
        assert_eq!(host.output("none", &[]), None);
    }
}
