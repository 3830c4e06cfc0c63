//! `chainfs doctor`: what stops, or hinders, on this machine or with this store, one line each.
//!
//! Changes nothing. Whatever may hang (a dead mount, a server that has gone) is looked at by child processes of
//! this program, each with a time limit; one that the kernel does not let end is left behind, and named.

mod apparmor;
mod container;
mod file_system;
mod finding;
mod fstab;
mod fuse;
mod host;
mod kernel;
mod libvirt;
mod mounts;
mod store;
mod tools;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::args::{DoctorArgs, Output};
use super::output::print;
use crate::error::{Error, Result};
use finding::{Finding, Mark};
use host::Host;

/// How long a part may say nothing.
const QUIET: Duration = Duration::from_secs(5);
/// The same while a store is scanned.
const QUIET_SCAN: Duration = Duration::from_mins(1);
/// Mounts that are looked at, all at once.
const MAX_MOUNTS: usize = 64;

/// The part of the work that a child does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// FUSE, the kernel, libvirt, programs.
    Machine,
    /// Lines of fstab.
    Fstab,
    /// The mount at PATH.
    Mount,
    /// The store, image or mount at PATH.
    Path,
}

impl Part {
    fn word(self) -> &'static str {
        match self {
            Part::Machine => "machine",
            Part::Fstab => "fstab",
            Part::Mount => "mount",
            Part::Path => "path",
        }
    }
}

/// A line from a child to its parent.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// What is looked at next.
    Looking(PathBuf),
    /// The store that is scanned next.
    Scanning(PathBuf),
    Found(Finding),
}

/// Runs the command: 1 if something stops the user.
pub(super) fn run(args: &DoctorArgs) -> Result<u8> {
    if let Some(part) = args.part {
        serve(part, args);
        return Ok(0);
    }
    let mut parts = Vec::new();
    if let Some(path) = &args.path {
        parts.push(Watched::start(Part::Path, Some(path), args)?);
    } else {
        parts.push(Watched::start(Part::Machine, None, args)?);
        parts.push(Watched::start(Part::Fstab, None, args)?);
        for mount in mounts::all(&Host::this()).into_iter().take(MAX_MOUNTS) {
            parts.push(Watched::start(Part::Mount, Some(&mount.directory), args)?);
        }
    }
    let mut findings = Vec::new();
    for mut part in parts {
        while let Some(finding) = part.next() {
            if args.output.format() == Output::Human {
                print(&finding.line())?;
            }
            findings.push(finding);
        }
    }
    if args.output.format() == Output::Json {
        let text = serde_json::to_string_pretty(&findings).expect("findings are plain values");
        print(&(text + "\n"))?;
    }
    Ok(u8::from(findings.iter().any(|finding| finding.mark == Mark::Problem)))
}

/// Does one part, as a child: writes a line for each message.
fn serve(part: Part, args: &DoctorArgs) {
    let host = Host::this();
    let tell = |message: &Message| {
        let line = serde_json::to_string(message).expect("messages are plain values");
        let mut out = std::io::stdout().lock();
        // If the parent has gone, nobody wants the rest.
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    };
    let mut say = |finding| tell(&Message::Found(finding));
    let path = args.path.as_deref().unwrap_or(Path::new("/"));
    match part {
        Part::Machine => {
            container::check(&host).into_iter().for_each(&mut say);
            fuse::check(&host).into_iter().for_each(&mut say);
            kernel::check(&host).into_iter().for_each(&mut say);
            libvirt::check(&host).into_iter().for_each(&mut say);
            tools::check(&host).into_iter().for_each(&mut say);
        }
        Part::Fstab => {
            let look = |path: &Path| tell(&Message::Looking(path.to_owned()));
            fstab::check(&host, look).into_iter().for_each(&mut say);
        }
        Part::Mount => {
            if let Some(mount) = mounts::all(&host).iter().find(|mount| mount.directory == path) {
                mounts::check(&host, mount).into_iter().for_each(&mut say);
            }
        }
        Part::Path => {
            tell(&Message::Looking(path.to_owned()));
            let scan = |store: &Path| tell(&Message::Scanning(store.to_owned()));
            store::check(&host, path, &args.image, &scan, &mut say);
        }
    }
}

/// A child at work.
struct Watched {
    part: Part,
    child: Child,
    lines: Receiver<String>,
    looking_at: Option<PathBuf>,
    quiet: Duration,
    is_done: bool,
}

impl Watched {
    fn start(part: Part, path: Option<&Path>, args: &DoctorArgs) -> Result<Self> {
        let fail = |error| Error::beginning("starting a check", error);
        let mut command = Command::new("/proc/self/exe");
        command.args(["doctor", "--part", part.word()]);
        for options in &args.image.options {
            command.arg("-o").arg(options);
        }
        command.args(args.image.force_share.then_some("--force-share"));
        if let Some(path) = path {
            command.arg("--").arg(path);
        }
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(fail)?;
        let out = child.stdout.take().expect("it is piped");
        let (send, lines) = channel();
        let relay = move || {
            for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("doctor".into()).spawn(relay).map_err(fail)?;
        let looking_at = path.filter(|_| part == Part::Mount).map(Path::to_owned);
        Ok(Self { part, child, lines, looking_at, quiet: QUIET, is_done: false })
    }

    /// The next finding; `None` at the end.
    fn next(&mut self) -> Option<Finding> {
        while !self.is_done {
            match self.lines.recv_timeout(self.quiet) {
                Ok(line) => match serde_json::from_str(&line) {
                    Ok(Message::Looking(path)) => (self.looking_at, self.quiet) = (Some(path), QUIET),
                    Ok(Message::Scanning(path)) => (self.looking_at, self.quiet) = (Some(path), QUIET_SCAN),
                    Ok(Message::Found(finding)) => return Some(finding),
                    Err(_) => {}
                },
                Err(RecvTimeoutError::Disconnected) => {
                    self.is_done = true;
                    let is_well = self.child.wait().is_ok_and(|status| status.success());
                    return (!is_well).then(|| self.broken());
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.is_done = true;
                    // It is not waited for: it may be in a call that does not end.
                    let _ = self.child.kill();
                    return Some(self.silent());
                }
            }
        }
        None
    }

    fn broken(&self) -> Finding {
        Finding::warning(
            "chainfs doctor",
            format!("the checks of the part '{}' ended early", self.part.word()),
        )
        .means("what they look at is unknown")
        .fix(format!("chainfs doctor --part {} shows why", self.part.word()))
    }

    fn silent(&self) -> Finding {
        let seconds = self.quiet.as_secs();
        match (&self.looking_at, self.part) {
            (Some(place), Part::Mount) => mounts::silent(place, seconds),
            (Some(place), _) => Finding::problem(
                place.display().to_string(),
                format!("has not answered within {seconds} seconds"),
            )
            .means("its file system hangs, or its server has gone")
            .fix(format!("look at df {}, and at the server or daemon behind it", finding::quoted(place))),
            (None, _) => self.broken(),
        }
    }
}
