//! Requests from words, and words from requests.
//!
//! Every refusal names the word that is wrong and the words that there are. What can be said without
//! looking at the store is said here: a [`Request`] that was parsed, or that passed [`Request::check`],
//! has names that can be file names and texts of bounded length.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

use super::words::{quote, split};
use super::{CommitRequest, PullRequest, Request, SnapshotRequest, Verb};

/// Bytes of a snapshot's name, at most: with a suffix and a digest it is still a file name.
const MAX_NAME_LEN: usize = 200;
/// Bytes of the name of a file or a view, at most (`NAME_MAX`).
const MAX_FILE_NAME_LEN: usize = 255;
/// Bytes of a description, at most.
const MAX_DESCRIPTION_LEN: usize = 1024;
/// What chainfs keeps for itself in a store begins like this.
const OWN_PREFIX: &[u8] = b".chainfs";

/// The words that a verb takes, besides `NAME`.
struct Grammar {
    name: bool,
    keys: &'static [&'static str],
    flags: &'static [&'static str],
}

const fn grammar(verb: Verb) -> Grammar {
    match verb {
        Verb::Snapshot => Grammar { name: true, keys: &["file", "description", "chains"], flags: &["internal"] },
        Verb::Commit => Grammar { name: false, keys: &["top", "base"], flags: &["keep", "discard-internal"] },
        Verb::Pull => Grammar { name: false, keys: &["base", "into"], flags: &["delete", "discard-internal"] },
        Verb::Cancel => Grammar { name: false, keys: &[], flags: &[] },
    }
}

/// The words of one command, each known and given once.
struct Given {
    name: Option<Vec<u8>>,
    values: Vec<(&'static str, Vec<u8>)>,
    flags: Vec<&'static str>,
}

impl Request {
    /// Reads the words of a command of `verb`: one line of shell words, `key=value` or a flag.
    /// `Usage` says which word is wrong and which there are.
    pub fn parse(verb: Verb, text: &[u8]) -> Result<Self> {
        Self::from_words(verb, split(text)?)
    }

    /// Reads a whole command, the verb being its first word.
    pub fn parse_command(text: &[u8]) -> Result<Self> {
        let mut words = split(text)?;
        let names = || Verb::ALL.map(|(_, name)| name).join(" ");
        if words.is_empty() {
            return Err(usage(format!("there is no command; the verbs are {}", names())));
        }
        let first = words.remove(0);
        let verb = str::from_utf8(&first).ok().and_then(Verb::from_name);
        let verb = verb.ok_or_else(|| usage(format!("unknown verb {}; the verbs are {}", show(&first), names())))?;
        Self::from_words(verb, words)
    }

    fn from_words(verb: Verb, words: Vec<Vec<u8>>) -> Result<Self> {
        let mut given = Given::of(verb, words)?;
        let request = match verb {
            Verb::Snapshot => Request::Snapshot(SnapshotRequest {
                name: given.name.take().ok_or_else(|| usage(format!("a NAME is missing; {}", takes(verb))))?,
                internal: given.flag("internal"),
                file: given.value("file"),
                description: match given.value("description") {
                    Some(text) => String::from_utf8(text).map_err(|_| usage("the description is not UTF-8"))?,
                    None => String::new(),
                },
                chains: given.value("chains").map_or_else(|| Ok(Vec::new()), |list| parse_chains(&list))?,
            }),
            Verb::Commit => Request::Commit(CommitRequest {
                top: given.value("top"),
                base: given.value("base"),
                keep: given.flag("keep"),
                discard_internal: given.flag("discard-internal"),
            }),
            Verb::Pull => Request::Pull(PullRequest {
                base: given.value("base").filter(|base| base != b"none"),
                into: given.value("into"),
                delete: given.flag("delete"),
                discard_internal: given.flag("discard-internal"),
            }),
            Verb::Cancel => Request::Cancel,
        };
        request.check()?;
        Ok(request)
    }

    /// Its verb.
    pub fn verb(&self) -> Verb {
        match self {
            Request::Snapshot(_) => Verb::Snapshot,
            Request::Commit(_) => Verb::Commit,
            Request::Pull(_) => Verb::Pull,
            Request::Cancel => Verb::Cancel,
        }
    }

    /// Whether it makes sense by itself: what was parsed does, what was put together may not.
    pub fn check(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) => check_snapshot(request),
            Request::Commit(CommitRequest { top, base, .. }) => {
                check_view("top", top.as_deref())?;
                check_view("base", base.as_deref())
            }
            Request::Pull(PullRequest { base, into, .. }) => {
                assert!(base.as_deref() != Some(b"none"), "standing on nothing is no name");
                check_view("base", base.as_deref())?;
                check_view("into", into.as_deref())
            }
            Request::Cancel => Ok(()),
        }
    }

    /// Whether it is one for a chain's own control files.
    pub fn check_for_chain(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) if !request.chains.is_empty() => {
                Err(usage("chains= is for the store's own .chainfs/control/snapshot; leave it out here"))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is one for the control files of the store as a whole.
    pub fn check_for_store(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) if !request.chains.is_empty() => Ok(()),
            Request::Snapshot(_) => Err(usage("chains= is missing: name the chains, as in chains=web01,db01")),
            _ => Err(usage(format!("{} is given to one chain, in its own control directory", self.verb().name()))),
        }
    }

    /// Its words without the verb, quoted for [`Request::parse`] and for a shell.
    pub fn words(&self) -> Vec<u8> {
        let mut line = Line::default();
        match self {
            Request::Snapshot(SnapshotRequest { name, internal, file, description, chains }) => {
                line.word(&quote(name));
                line.flag("internal", *internal);
                line.value("file", file.as_deref());
                line.value("description", Some(description.as_bytes()).filter(|text| !text.is_empty()));
                line.value("chains", Some(print_chains(chains)).filter(|list| !list.is_empty()).as_deref());
            }
            Request::Commit(CommitRequest { top, base, keep, discard_internal }) => {
                line.value("top", top.as_deref());
                line.value("base", base.as_deref());
                line.flag("keep", *keep);
                line.flag("discard-internal", *discard_internal);
            }
            Request::Pull(PullRequest { base, into, delete, discard_internal }) => {
                line.value("base", base.as_deref());
                line.value("into", into.as_deref());
                line.flag("delete", *delete);
                line.flag("discard-internal", *discard_internal);
            }
            Request::Cancel => {}
        }
        line.0
    }

    /// The whole command, verb first, quoted for [`Request::parse_command`] and for a shell.
    pub fn command_line(&self) -> Vec<u8> {
        let mut line = Line(self.verb().name().into());
        let words = self.words();
        if !words.is_empty() {
            line.word(&words);
        }
        line.0
    }
}

/// The whole command for people: bytes that are not UTF-8 are replaced.
impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.command_line()))
    }
}

/// A line in the making.
#[derive(Default)]
struct Line(Vec<u8>);

impl Line {
    fn word(&mut self, word: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b' ');
        }
        self.0.extend_from_slice(word);
    }

    fn flag(&mut self, flag: &str, given: bool) {
        if given {
            self.word(flag.as_bytes());
        }
    }

    fn value(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.word(&[key.as_bytes(), b"=", &quote(value)].concat());
        }
    }
}

impl Given {
    fn of(verb: Verb, words: Vec<Vec<u8>>) -> Result<Self> {
        let known = grammar(verb);
        let mut given = Self { name: None, values: Vec::new(), flags: Vec::new() };
        for word in words {
            let (key, value) = match word.iter().position(|byte| *byte == b'=') {
                Some(at) => (&word[..at], Some(&word[at + 1..])),
                None => (&word[..], None),
            };
            let key_known = known.keys.iter().find(|known| known.as_bytes() == key).copied();
            let flag_known = known.flags.iter().find(|known| known.as_bytes() == key).copied();
            let twice = |key: &str| usage(format!("{key} is given twice; {}", takes(verb)));
            match (key_known, flag_known, value) {
                (Some(key), _, None | Some([])) => {
                    return Err(usage(format!("{key}= has no value; {}", takes(verb))));
                }
                (Some(key), _, Some(value)) => {
                    if given.values.iter().any(|(other, _)| *other == key) {
                        return Err(twice(&format!("{key}=")));
                    }
                    given.values.push((key, value.to_vec()));
                }
                (_, Some(flag), Some(_)) => {
                    return Err(usage(format!("{flag} takes no value; {}", takes(verb))));
                }
                (_, Some(flag), None) => {
                    if given.flags.contains(&flag) {
                        return Err(twice(flag));
                    }
                    given.flags.push(flag);
                }
                (None, None, None) if known.name && given.name.is_none() => given.name = Some(word),
                (None, None, _) => return Err(usage(format!("unknown word {}; {}", show(&word), takes(verb)))),
            }
        }
        Ok(given)
    }

    fn value(&mut self, key: &str) -> Option<Vec<u8>> {
        let at = self.values.iter().position(|(known, _)| *known == key)?;
        Some(self.values.swap_remove(at).1)
    }

    fn flag(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }
}

/// "commit takes top= base= keep discard-internal".
fn takes(verb: Verb) -> String {
    let Grammar { name, keys, flags } = grammar(verb);
    let names = name.then(|| "NAME".to_string()).into_iter();
    let words: Vec<String> =
        names.chain(keys.iter().map(|key| format!("{key}="))).chain(flags.iter().map(ToString::to_string)).collect();
    let words = if words.is_empty() { "no words".to_string() } else { words.join(" ") };
    format!("{} takes {words}", verb.name())
}

fn check_snapshot(request: &SnapshotRequest) -> Result<()> {
    let SnapshotRequest { name, internal, file, description, chains } = request;
    let Grammar { keys, flags, .. } = grammar(Verb::Snapshot);
    if keys.iter().chain(flags).any(|word| word.as_bytes() == name) || name.contains(&b'=') {
        return Err(usage(format!("the name {} would be taken for another word; choose another one", show(name))));
    }
    check_file_name("the name", name, MAX_NAME_LEN)?;
    if name == crate::store::ACTIVE {
        return Err(usage("the name \"active\" is the active disk's; choose another one"));
    }
    if let Some(file) = file {
        if *internal {
            return Err(usage("an internal snapshot has no overlay; leave out file= or internal"));
        }
        check_file_name("file=", file, MAX_FILE_NAME_LEN)?;
    }
    if *internal && chains.len() > 1 {
        return Err(usage("internal snapshots of several disks are not of one instant; take them one by one"));
    }
    if description.len() > MAX_DESCRIPTION_LEN {
        let fact = format!("the description has {} bytes; at most {MAX_DESCRIPTION_LEN} are kept", description.len());
        return Err(usage(fact));
    }
    check_printable("the description", description.as_bytes())?;
    for (index, chain) in chains.iter().enumerate() {
        let is_plain = chain.components().all(|part| matches!(part, Component::Normal(_)));
        // As it was written, so that two spellings of one chain are not taken for two.
        let is_settled = chain.components().collect::<PathBuf>().as_os_str() == chain.as_os_str();
        if chain.as_os_str().is_empty() || !is_plain || !is_settled {
            let shown = show(chain.as_os_str().as_bytes());
            return Err(usage(format!("{shown} is no chain's path; name chains as the mount does, as in a/b/web01")));
        }
        check_printable("chains=", chain.as_os_str().as_bytes())?;
        if chains[..index].contains(chain) {
            return Err(usage(format!("chains= names {} twice", show(chain.as_os_str().as_bytes()))));
        }
    }
    Ok(())
}

/// Whether `name` can stand alone as the name of a file that tools take for one.
fn check_file_name(what: &str, name: &[u8], most: usize) -> Result<()> {
    let refuse = |why: &str| Err(usage(format!("{what} {} {why}", show(name))));
    check_printable(what, name)?;
    match name {
        [] => refuse("is empty"),
        b"." | b".." => refuse("means a directory"),
        [b'-', ..] => refuse("begins with -, which programs take for an option"),
        _ if name.contains(&b'/') => refuse("has a / in it; it is the name of a file, not a path"),
        _ if name.starts_with(OWN_PREFIX) => refuse("begins with .chainfs, which is for chainfs itself"),
        _ if name.len() > most => refuse(&format!("has {} bytes; at most {most} fit", name.len())),
        _ => Ok(()),
    }
}

fn check_view(key: &str, name: Option<&[u8]>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    check_printable(key, name)?;
    if name.is_empty() || name.len() > MAX_FILE_NAME_LEN || name.contains(&b'/') {
        let fact = format!("{key}= names no view: {}; the views are active and those in snapshots/", show(name));
        return Err(usage(fact));
    }
    Ok(())
}

/// What [`split`] refuses cannot be said in a command, so no request may hold it.
fn check_printable(what: &str, text: &[u8]) -> Result<()> {
    if text.iter().any(u8::is_ascii_control) {
        return Err(usage(format!("{what} has control characters: {}", show(text))));
    }
    Ok(())
}

/// `a,b`; a comma or a backslash within a path is written `\,` and `\\`.
fn parse_chains(text: &[u8]) -> Result<Vec<PathBuf>> {
    let mut chains = vec![Vec::new()];
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        let current = chains.last_mut().expect("there is one from the start");
        match byte {
            b',' => chains.push(Vec::new()),
            b'\\' => match bytes.next() {
                Some(escaped @ (b',' | b'\\')) => current.push(*escaped),
                _ => return Err(usage("in chains= a backslash escapes only a comma or a backslash")),
            },
            _ => current.push(*byte),
        }
    }
    Ok(chains.into_iter().map(|chain| PathBuf::from(std::ffi::OsString::from_vec(chain))).collect())
}

fn print_chains(chains: &[PathBuf]) -> Vec<u8> {
    let escape = |chain: &PathBuf| {
        let mut escaped = Vec::new();
        for byte in Path::as_os_str(chain).as_bytes() {
            if matches!(byte, b',' | b'\\') {
                escaped.push(b'\\');
            }
            escaped.push(*byte);
        }
        escaped
    };
    chains.iter().map(escape).collect::<Vec<_>>().join(&b',')
}

/// A word in a sentence: short, and in quotes.
fn show(word: &[u8]) -> String {
    const SHOWN: usize = 60;
    let text = String::from_utf8_lossy(word);
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_default).collect();
    if text.chars().count() > SHOWN {
        shown.push_str("...");
    }
    format!("\"{shown}\"")
}

fn usage(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, fact)
}

#[cfg(test)]
mod tests;
