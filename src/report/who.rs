//! Who has images open, as text and as JSON.

use std::fmt::Write as _;
use std::path::Path;

use nix::unistd::{Uid, User};
use serde::Serialize;

use crate::error::shell_word;
use crate::io::{FileUser, ImageLocks, UsedFile};
use crate::ops::Status;
use crate::store::shown;

use super::safe::terminal;
use super::status::per_mille;

/// Everything that was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct WhoReport {
    /// Processes and loop devices, one for each file that they use.
    pub users: Vec<UserRow>,
    /// Running and interrupted commands.
    pub jobs: Vec<JobRow>,
    /// Files that are locked by processes that were not found.
    pub unidentified: Vec<String>,
    /// Processes whose open files may not be looked at.
    pub unseen_processes: usize,
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// It is open for reading.
    Read,
    /// It is open for writing.
    Write,
    /// It is open, and neither can be done through that.
    Open,
    /// It is the current directory, the root directory or the program of the process.
    Place,
}

impl Access {
    /// How a process has opened a file.
    pub fn of(file: &UsedFile) -> Self {
        match (file.writes, file.reads) {
            (true, _) => Self::Write,
            (false, true) => Self::Read,
            (false, false) => Self::Open,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Read => "open for reading",
            Self::Write => "open for writing",
            Self::Open => "open",
            Self::Place => "in use as a directory or program",
        }
    }
}

/// A process or loop device with one file that it uses.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct UserRow {
    file: String,
    access: Access,
    through_mount: bool,
    locks: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loop_device: Option<String>,
    /// The mounts that the process may serve.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    serves: Vec<String>,
    release: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ProcessObject {
    pid: u32,
    program: String,
    command: Vec<String>,
    uid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
}

impl UserRow {
    /// A process with a file.
    pub fn of(
        user: &FileUser,
        file: String,
        access: Access,
        locks: ImageLocks,
        through_mount: bool,
        serves: Vec<String>,
    ) -> Self {
        let release = release(user, &serves);
        let known = User::from_uid(Uid::from_raw(user.uid)).ok().flatten();
        let process = ProcessObject {
            pid: user.process.pid,
            program: user.process.program.clone(),
            command: user.command.clone(),
            uid: user.uid,
            user: known.map(|user| user.name),
            domain: user.process.domain.clone(),
        };
        let locks = lock_words(locks);
        Self {
            file,
            access,
            through_mount,
            locks,
            process: Some(process),
            loop_device: None,
            serves,
            release,
        }
    }

    /// A loop device on a file.
    pub fn of_loop(device: String, file: String, through_mount: bool) -> Self {
        let release = format!("losetup -d {}", shell_word(&device));
        Self {
            file,
            access: Access::Open,
            through_mount,
            locks: Vec::new(),
            process: None,
            loop_device: Some(device),
            serves: Vec::new(),
            release,
        }
    }

    /// "web01.qcow2: open for writing; locks: reading, writing".
    fn what(&self) -> String {
        let mount = if self.through_mount { ", through the mount" } else { "" };
        let locks =
            if self.locks.is_empty() { String::new() } else { format!("; locks: {}", self.locks.join(", ")) };
        format!("{}: {}{mount}{locks}", self.file, self.access.words())
    }

    fn who(&self) -> String {
        let Some(process) = &self.process else { return self.loop_device.clone().unwrap_or_default() };
        let domain = process.domain.as_ref().map(|domain| format!(" of domain {domain}")).unwrap_or_default();
        let user = process.user.clone().unwrap_or_else(|| format!("uid {}", process.uid));
        format!("{}[{}]{domain}, user {user}", process.program, process.pid)
    }
}

/// A command that works on the images.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobRow {
    command: String,
    chain: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    percent: Option<u64>,
    release: String,
}

impl JobRow {
    /// A command that a mount runs on the chain of that directory.
    pub fn running(status: &Status, chain: &Path) -> Self {
        let name = shown(chain);
        Self {
            command: status.command.clone(),
            release: format!("chainfs cancel {}", shell_word(&name)),
            chain: name,
            state: "running",
            percent: Some(per_mille(status) / 10),
        }
    }

    /// A command that was begun, and that no mount runs: another process does, or it was interrupted.
    pub fn begun(command: &str, chain: &Path, store: &Path) -> Self {
        Self {
            command: command.to_owned(),
            chain: shown(chain),
            state: "begun",
            percent: None,
            release: format!("chainfs recover {}", shell_word(&shown(store))),
        }
    }
}

/// What QEMU's locks say, in words.
fn lock_words(locks: ImageLocks) -> Vec<&'static str> {
    let ImageLocks { reads, writes, resizes, excludes_writers, others } = locks;
    let all = [
        (reads, "reading"),
        (writes, "writing"),
        (resizes, "resizing"),
        (excludes_writers, "excludes other writers"),
        (others, "other bytes"),
    ];
    all.into_iter().filter(|(is_set, _)| *is_set).map(|(_, word)| word).collect()
}

/// The command that would let a file go.
fn release(user: &FileUser, serves: &[String]) -> String {
    if let [mount, ..] = serves {
        return format!("chainfs umount {}", shell_word(mount));
    }
    if let Some(domain) = &user.process.domain {
        return format!("virsh shutdown {}", shell_word(domain));
    }
    let mut words = user.command.iter();
    let program = words.next().map(|word| word.rsplit('/').next().unwrap_or_default());
    if program == Some("qemu-nbd") {
        let device = words.clone().find_map(|word| word.strip_prefix("--connect=")).or_else(|| {
            words
                .find(|word| *word == "-c" || *word == "--connect")
                .and_then(|_| words.next())
                .map(String::as_str)
        });
        if let Some(device) = device {
            return format!("qemu-nbd --disconnect {}", shell_word(device));
        }
    }
    format!("kill {}", user.process.pid)
}

/// A paragraph for each process, loop device and command; empty if there are none.
pub fn text(report: &WhoReport) -> String {
    let mut text = String::new();
    let mut line = |indent: &str, line: String| {
        let _ = writeln!(text, "{indent}{}", terminal(&line));
    };
    let pid = |row: &UserRow| row.process.as_ref().map(|process| process.pid);
    // A loop device has one file.
    for rows in report.users.chunk_by(|one, next| pid(one).is_some() && pid(one) == pid(next)) {
        let first = &rows[0];
        line("", first.who());
        if let Some(process) = &first.process {
            line("  ", format!("command: {}", process.command.join(" ")));
        }
        for row in rows {
            line("  ", row.what());
        }
        let serves = rows.iter().find(|row| !row.serves.is_empty());
        if let Some(row) = serves {
            line("  ", format!("serves: {}", row.serves.join(", ")));
        }
        line("  ", format!("to release: {}", serves.unwrap_or(first).release));
    }
    for job in &report.jobs {
        let percent = job.percent.map(|percent| format!(", {percent} %")).unwrap_or_default();
        line("", format!("{}: {}: {}{percent}", job.chain, job.state, job.command));
        line("  ", format!("to release: {}", job.release));
    }
    for file in &report.unidentified {
        let fact = "is locked by a process that cannot be seen from here: one of another user, in a container, \
            or on another machine";
        line("", format!("{file} {fact}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LockHolder;

    fn user(command: &[&str], domain: Option<&str>) -> FileUser {
        FileUser {
            process: LockHolder { pid: 7, program: "x".into(), domain: domain.map(str::to_owned) },
            uid: 0,
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            is_daemon: false,
            open: Vec::new(),
        }
    }

    #[test]
    fn each_kind_of_user_has_its_own_command_that_ends_it() {
        let of = |command: &[&str], domain| release(&user(command, domain), &[]);
        assert_eq!(of(&["qemu-system-x86_64"], Some("web 01")), "virsh shutdown 'web 01'");
        assert_eq!(of(&["qemu-system-x86_64"], None), "kill 7");
        assert_eq!(
            of(&["/usr/bin/qemu-nbd", "-c", "/dev/nbd0", "a"], None),
            "qemu-nbd --disconnect /dev/nbd0"
        );
        assert_eq!(of(&["qemu-nbd", "--connect=/dev/nbd1"], None), "qemu-nbd --disconnect /dev/nbd1");
        assert_eq!(of(&["qemu-nbd", "-k", "socket"], None), "kill 7");
        assert_eq!(release(&user(&["chainfs"], None), &["/mnt/a b".into()]), "chainfs umount '/mnt/a b'");
    }

    #[test]
    fn names_stay_on_their_line() {
        let user = user(&["evil\n\u{1b}[2J"], None);
        let row = UserRow::of(&user, "a\nb".into(), Access::Write, ImageLocks::default(), false, Vec::new());
        let report =
            WhoReport { users: vec![row], jobs: Vec::new(), unidentified: Vec::new(), unseen_processes: 0 };
        let text = text(&report);
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
