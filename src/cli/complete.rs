//! What may follow on a command line, for the completion scripts of shells.
//!
//! A script passes the words up to the cursor, and gets one candidate per line: the text, a tab, a description.
//! `:files` and `:dirs` ask the shell to complete names of files by itself.
//!
//! A shell must not hang: the work is done by a child with a time limit, as a mount may be dead or a store
//! huge. Names of views come from the listing of a mount, or from one image and its backing files; no store is
//! scanned.

use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use clap::builder::ValueHint;
use clap::{Arg, ArgAction, Command, CommandFactory as _};

use super::args::{Cli, ImageArgs};
use super::mount_options::{SETTINGS, Takes};
use super::output::print;
use super::target::{Target, TargetKind, place_in_mount};
use crate::error::Result;
use crate::ops::Verb;

/// A shell waits no longer.
const LIMIT: Duration = Duration::from_secs(1);
/// Candidates that are of use to anybody.
const MAX_CANDIDATES: usize = 1000;
/// Marks the child.
const CHILD: &str = "CHAINFS_COMPLETE";

const FILES: &str = ":files";
const DIRECTORIES: &str = ":dirs";

/// Prints the candidates for the last word.
pub(super) fn run(words: &[OsString]) -> Result<u8> {
    if std::env::var_os(CHILD).is_none() {
        print(&by_child(words).unwrap_or_default())?;
        return Ok(0);
    }
    let mut text = String::new();
    for (candidate, description) in candidates(words).into_iter().take(MAX_CANDIDATES) {
        // A name with a line break cannot be told from two.
        if !candidate.chars().chain(description.chars()).any(char::is_control) {
            text.extend([&candidate, "\t", &description, "\n"]);
        }
    }
    print(&text)?;
    Ok(0)
}

/// What a child prints; `None` if it takes too long.
fn by_child(words: &[OsString]) -> Option<String> {
    let mut command = Process::new("/proc/self/exe");
    command.arg(super::args::COMPLETE).arg("--").args(words).env(CHILD, "1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut out = child.stdout.take()?;
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = send.send(out.read_to_string(&mut text).map(|_| text));
    });
    let end = Instant::now() + LIMIT;
    let text = receive.recv_timeout(end.saturating_duration_since(Instant::now())).ok()?.ok();
    if text.is_none() {
        let _ = child.kill();
    }
    text
}

type Candidates = Vec<(String, String)>;

/// The candidates for the last of the words; the first word is the program.
fn candidates(words: &[OsString]) -> Candidates {
    let Some((current, before)) = words.split_last() else { return Vec::new() };
    let mut cli = Cli::command();
    cli.build();
    let mut command = &cli;
    let mut line = Line::default();
    for word in before.iter().skip(1) {
        line.take(&mut command, word);
    }
    let mut found = line.next(command, current);
    let typed = current.to_string_lossy();
    found.retain(|(text, _)| text.starts_with(':') || text.starts_with(&*typed));
    found
}

/// What the words so far mean.
#[derive(Default)]
struct Line<'a> {
    /// The option that waits for its value.
    option: Option<&'a Arg>,
    /// Operands so far.
    operands: Vec<OsString>,
    /// After `--`.
    only_operands: bool,
    /// An option that takes the rest of the line (`tree --dry-run`), and its words so far.
    several: Option<(&'a Arg, Vec<OsString>)>,
}

impl<'a> Line<'a> {
    fn take(&mut self, command: &mut &'a Command, word: &OsStr) {
        if self.option.take().is_some() {
            return;
        }
        let text = word.to_string_lossy();
        if let Some((_, words)) = &mut self.several {
            words.push(word.to_owned());
            return;
        }
        if self.only_operands || text == "-" || !text.starts_with('-') {
            match command.find_subcommand(&*text).filter(|_| self.operands.is_empty()) {
                Some(inner) if !self.only_operands => *command = inner,
                _ => self.operands.push(word.to_owned()),
            }
            return;
        }
        if text == "--" {
            self.only_operands = true;
        } else if !text.contains('=') {
            let arg = option(command, &text).filter(|arg| takes_value(arg));
            match arg {
                Some(arg) if takes_several(arg) => self.several = Some((arg, Vec::new())),
                other => self.option = other,
            }
        }
    }

    fn next(&self, command: &'a Command, current: &OsStr) -> Candidates {
        let text = current.to_string_lossy();
        if let Some(arg) = self.option {
            return self.values(command, arg, current);
        }
        if let Some((_, words)) = &self.several {
            return self.request(words, current);
        }
        if text.starts_with('-') && !self.only_operands {
            if let Some((name, value)) = text.split_once('=') {
                let Some(arg) = option(command, name) else { return Vec::new() };
                let found = self.values(command, arg, OsStr::new(value));
                return found.into_iter().map(|(value, about)| (format!("{name}={value}"), about)).collect();
            }
            return options(command);
        }
        if command.has_subcommands() && self.operands.is_empty() {
            let shown = command.get_subcommands().filter(|inner| !inner.is_hide_set());
            return shown.map(|inner| (inner.get_name().to_owned(), about(inner.get_about()))).collect();
        }
        let positionals: Vec<&Arg> = command.get_positionals().collect();
        let place = self.operands.len();
        let last = positionals.last().filter(|arg| takes_several(arg)).copied();
        positionals
            .get(place)
            .copied()
            .or(last)
            .map(|arg| self.values(command, arg, current))
            .unwrap_or_default()
    }

    /// The values of an argument.
    fn values(&self, command: &Command, arg: &Arg, current: &OsStr) -> Candidates {
        let possible = arg.get_possible_values();
        if !possible.is_empty() {
            let shown = possible.iter().filter(|value| !value.is_hide_set());
            return shown.map(|value| (value.get_name().to_owned(), about(value.get_help()))).collect();
        }
        let kind = arg.get_value_names().and_then(|names| names.first()).map(clap::builder::Str::as_str);
        let is_view = kind == Some("VIEW")
            || (command.get_name() == "delete" && arg.is_positional() && arg.get_id() == "name");
        if is_view {
            return self.operands.first().map(|target| views(Path::new(target))).unwrap_or_default();
        }
        if arg.get_id() == "options" && command.get_name() != "create" {
            return mount_options(&current.to_string_lossy());
        }
        if !is_path(arg) {
            return Vec::new();
        }
        if let Some((image, _)) = split_at(current) {
            let typed = image.to_string_lossy().into_owned();
            let named = views(&image).into_iter();
            let found: Candidates = named.map(|(view, about)| (format!("{typed}@{view}"), about)).collect();
            if !found.is_empty() {
                return found;
            }
        }
        // A directory that does not answer holds up this child, not the shell.
        let place = Path::new(current).parent().filter(|place| !place.as_os_str().is_empty());
        let _ =
            std::fs::read_dir(place.unwrap_or(Path::new("."))).map(|mut entries| entries.next().is_some());
        let wants_directory = matches!(arg.get_value_hint(), ValueHint::DirPath)
            || kind == Some("DIR")
            || (arg.get_id() == "dir" && matches!(command.get_name(), "mount" | "umount" | "man"));
        if command.get_name() == "umount" {
            return mounted().into_iter().chain([(DIRECTORIES.to_owned(), String::new())]).collect();
        }
        vec![(if wants_directory { DIRECTORIES } else { FILES }.to_owned(), String::new())]
    }

    /// The words of a command as control files take them: the verb, then its own words.
    fn request(&self, words: &[OsString], current: &OsStr) -> Candidates {
        let verb = words.first().and_then(|word| Verb::from_name(word.to_str()?));
        if words.is_empty() {
            return Verb::ALL.iter().map(|verb| (verb.name().to_owned(), String::new())).collect();
        }
        let text = current.to_string_lossy();
        let target = self.operands.first();
        if let Some((key, _)) = text.split_once('=') {
            let named = target.map(|target| views(Path::new(target))).unwrap_or_default();
            return named.into_iter().map(|(view, about)| (format!("{key}={view}"), about)).collect();
        }
        let (keys, flags) = verb.map_or((&[][..], &[][..]), Verb::words);
        let keys = keys.iter().map(|key| format!("{key}="));
        let words = keys.chain(flags.iter().map(ToString::to_string));
        let mut found: Candidates = words.map(|word| (word, String::new())).collect();
        found.extend(target.map(|target| views(Path::new(target))).unwrap_or_default());
        found.sort();
        found.dedup();
        found
    }
}

fn option<'a>(command: &'a Command, text: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| match text.strip_prefix("--") {
        Some(long) => arg.get_long() == Some(long),
        // In a group of short ones, the last one may take a value.
        None => arg.get_short().is_some() && arg.get_short() == text.chars().next_back(),
    })
}

fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

fn takes_several(arg: &Arg) -> bool {
    arg.get_num_args().is_some_and(|range| range.max_values() > 1)
}

fn is_path(arg: &Arg) -> bool {
    let name = arg.get_value_names().and_then(|names| names.first()).map(clap::builder::Str::as_str);
    matches!(arg.get_value_hint(), ValueHint::AnyPath | ValueHint::FilePath | ValueHint::DirPath)
        || name.is_some_and(|name| name == "FILE" || name.starts_with("IMAGE"))
        || matches!(arg.get_id().as_str(), "a" | "b")
}

fn options(command: &Command) -> Candidates {
    let mut found = Vec::new();
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set() && !arg.is_positional()) {
        let about = about(arg.get_help());
        found.extend(arg.get_long().map(|long| (format!("--{long}"), about.clone())));
        found.extend(arg.get_short().map(|short| (format!("-{short}"), about)));
    }
    found
}

fn about(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(|text| text.to_string().lines().next().unwrap_or_default().to_owned()).unwrap_or_default()
}

/// The options of a mount, behind those that are written already.
fn mount_options(typed: &str) -> Candidates {
    let before = typed.rfind(',').map_or("", |at| &typed[..=at]);
    let option = |(name, takes): &(&str, Takes)| {
        let equals = if *takes == Takes::Nothing { "" } else { "=" };
        (format!("{before}{name}{equals}"), String::new())
    };
    SETTINGS.iter().map(option).collect()
}

/// Where chainfs is mounted.
fn mounted() -> Candidates {
    let mounts = crate::io::mounts().unwrap_or_default().into_iter();
    let ours = mounts.filter(|mount| mount.kind == crate::fs::mount::KIND);
    ours.map(|mount| {
        let about = format!("shows {}", mount.source.display());
        (mount.directory.display().to_string(), about)
    })
    .collect()
}

/// The image of `IMAGE@VIEW` that is being typed.
fn split_at(word: &OsStr) -> Option<(PathBuf, &[u8])> {
    let bytes = word.as_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b'@')?;
    let image = PathBuf::from(OsString::from_vec(bytes[..at].to_vec()));
    image.is_file().then_some((image, &bytes[at + 1..]))
}

/// The views of a chain: its directory in a mount, or an image.
fn views(target: &Path) -> Candidates {
    match place_in_mount(target) {
        Ok(Some(_)) => listed(target),
        _ => of_image(target).unwrap_or_default(),
    }
}

/// The names in `snapshots/` of the chain that a path in a mount lies in.
fn listed(path: &Path) -> Candidates {
    let found = path.ancestors().take(8).find_map(|place| std::fs::read_dir(place.join("snapshots")).ok());
    let names = found.into_iter().flatten().flatten().take(MAX_CANDIDATES);
    let mut names: Candidates = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_suffix(".raw")?.to_owned(), String::new()))
        })
        .collect();
    names.sort();
    names
}

/// The views of an image, from it and its backing files alone.
fn of_image(image: &Path) -> Result<Candidates> {
    if !image.is_file() {
        return Ok(Vec::new());
    }
    let args = ImageArgs { force_share: true, options: Vec::new() };
    let target = Target::find(image, None, &args)?;
    let TargetKind::Disk(disk) = &target.what else { return Ok(Vec::new()) };
    let Some(leaf) = disk.layers.first() else { return Ok(Vec::new()) };
    let views = target.store.chain_views(&target.catalog, *leaf);
    let names = views.views.iter().filter(|view| !view.active).take(MAX_CANDIDATES);
    let mut names: Candidates = names
        .filter_map(|view| {
            let about = if view.snapshot.is_some() { "internal snapshot" } else { "snapshot" };
            Some((String::from_utf8(view.name.clone()).ok()?, about.to_owned()))
        })
        .collect();
    names.sort();
    Ok(names)
}
