//! The operations of another program on the files of a store, seen by strace(1), as the same kind of tape.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::scene::Scene;
use super::tape::{Event, Tape};
use support::sim::action::Action;
use support::{Outcome as _, tool};

/// Calls that open files or change them.
const CALLS: &str = "trace=openat,close,write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync,\
                     io_submit,io_uring_enter,rename,renameat,renameat2,link,linkat,unlink,unlinkat";

/// Runs a program in the directory `root`; returns its operations on the files there, in order.
pub(crate) fn record(root: &Path, command: &[&str], log: &Path) -> Tape {
    let start = Scene::load(root);
    // Strings are hexadecimal and whole.
    let mut strace = tool("strace");
    strace.current_dir(root).args(["-f", "-qq", "-xx", "-s", "16777216", "-e", CALLS, "-o"]).arg(log);
    strace.args(command).succeeds();
    let text = fs::read_to_string(log).expect("strace's log");
    let mut parser =
        Parser { start: &start, files: HashMap::new(), begun: HashMap::new(), events: Vec::new() };
    text.lines().for_each(|line| parser.line(line));
    let (events, inodes) = (parser.events, start.inodes.clone());
    Tape { start, events, inodes }
}

struct Parser<'a> {
    start: &'a Scene,
    /// Descriptors of files of the store.
    files: HashMap<u64, usize>,
    /// Calls that have not returned, by thread.
    begun: HashMap<String, String>,
    events: Vec<Event>,
}

impl Parser<'_> {
    fn line(&mut self, line: &str) {
        let Some((thread, call)) = line.split_once(' ') else { return };
        let call = call.trim_start();
        if let Some(first) = call.strip_suffix(" <unfinished ...>") {
            // A sync covers the changes that were there when it began.
            if first.starts_with("fdatasync(") || first.starts_with("fsync(") {
                self.call(&format!("{first}) = 0"));
            } else {
                self.begun.insert(thread.to_owned(), first.to_owned());
            }
        } else if let Some(rest) = call.strip_prefix("<... ") {
            let (_, rest) = rest.split_once(" resumed>").expect("what goes on");
            if let Some(first) = self.begun.remove(thread) {
                self.call(&format!("{first}{rest}"));
            }
        } else {
            self.call(call);
        }
    }

    fn call(&mut self, call: &str) {
        let Some((name, rest)) = call.split_once('(') else { return };
        let Some((args, result)) = rest.rsplit_once(" = ") else { return };
        let args = args.trim_end().strip_suffix(')').unwrap_or(args);
        let Some(result) = result.split(' ').next().and_then(|result| result.parse::<u64>().ok()) else {
            return;
        };
        let words: Vec<&str> = args.split(", ").collect();
        let number = |word: &str| word.trim().parse::<u64>().unwrap_or_else(|_| panic!("{word} in {name}"));
        if name == "openat" {
            let path = String::from_utf8(bytes(words[1])).expect("a plain name");
            self.files.remove(&result);
            if let Some(file) = self.start.names.get(Path::new(&path)) {
                self.files.insert(result, *file);
            }
            return;
        }
        let Some(fd) = words[0].parse().ok().filter(|fd| self.files.contains_key(fd)) else {
            assert!(!name.contains("rename") && !name.contains("link"), "it changes names: {name}");
            return;
        };
        let file = self.files[&fd];
        let did = |action: Action| Event::Did { file, action };
        match name {
            "close" => drop(self.files.remove(&fd)),
            "fsync" | "fdatasync" => self.events.push(Event::Synced { file }),
            "ftruncate" => self.events.push(did(Action::SetLen(number(words[1])))),
            "pwrite64" => {
                let written = &bytes(words[1])[..result as usize];
                self.events.push(did(Action::Write { at: number(words[3]), bytes: written.into() }));
            }
            "pwritev" | "pwritev2" => {
                let parts = args
                    .split("iov_base=")
                    .skip(1)
                    .map(|part| bytes(part.split(", ").next().unwrap_or_default()));
                let written: Vec<u8> = parts.flatten().take(result as usize).collect();
                let after = args.rsplit_once("], ").expect("a place").1;
                let at = number(after.split(", ").nth(1).expect("a place"));
                self.events.push(did(Action::Write { at, bytes: written.into() }));
            }
            "fallocate" => {
                let (mode, at, len) = (words[1], number(words[2]), number(words[3]));
                self.events.push(did(match mode {
                    _ if mode.contains("PUNCH_HOLE") => Action::Punch { at, len },
                    _ if mode.contains("ZERO_RANGE") => Action::Zero { at, len },
                    _ => Action::Allocate { at, len },
                }));
            }
            _ => panic!("{name} changes a file of the store in a way that is not understood"),
        }
    }
}

/// The bytes of a quoted hexadecimal string.
fn bytes(text: &str) -> Vec<u8> {
    let text = text.trim_start_matches('"').trim_end_matches(['}', ']', '"']);
    let digits = text.split("\\x").skip(1);
    digits.map(|digits| u8::from_str_radix(&digits[..2], 16).expect("hexadecimal digits")).collect()
}
