//! Requests from words, and words from requests.
//!
//! Every refusal names the word that is wrong and the words that there are. Whether names and texts can be
//! what they are meant to be is for `check` to say.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{join_list, parse_size, split_list};

use super::request::{
    CloneRequest, CommitRequest, DeleteMethod, DeleteRequest, NewSize, PullRequest, RebaseRequest, Request,
    ResizeRequest, RevertRequest, SnapshotRequest, Verb,
};
use super::tokenize::{quote, split};

/// The words that a verb takes.
pub(super) struct Grammar {
    /// What stands alone.
    positional: Option<&'static str>,
    keys: &'static [&'static str],
    flags: &'static [&'static str],
}

const fn grammar(verb: Verb) -> Grammar {
    match verb {
        Verb::Snapshot => {
            Grammar { positional: Some("NAME"), keys: &["file", "description", "chains"], flags: &["internal"] }
        }
        Verb::Commit => Grammar {
            positional: None,
            keys: &["top", "base"],
            flags: &["keep", "discard-internal", "discard-bitmaps"],
        },
        Verb::Pull => Grammar {
            positional: None,
            keys: &["base", "into"],
            flags: &["delete", "discard-internal", "discard-bitmaps"],
        },
        Verb::Delete => {
            Grammar { positional: Some("VIEW"), keys: &["method"], flags: &["discard-internal", "discard-bitmaps"] }
        }
        Verb::Revert => {
            Grammar { positional: None, keys: &["to", "save"], flags: &["discard-internal", "discard-bitmaps"] }
        }
        Verb::Rebase => Grammar { positional: None, keys: &["layer", "base"], flags: &["unsafe", "drop-layers"] },
        Verb::Clone => Grammar { positional: Some("NAME"), keys: &["from"], flags: &[] },
        Verb::Resize => Grammar { positional: Some("SIZE"), keys: &[], flags: &["shrink"] },
        Verb::Cancel => Grammar { positional: None, keys: &[], flags: &[] },
    }
}

/// The words of one command, each known and given once.
struct ParsedWords {
    positional: Option<Vec<u8>>,
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
        let mut given = ParsedWords::of(verb, words)?;
        let request = match verb {
            Verb::Snapshot => Request::Snapshot(SnapshotRequest {
                name: given.positional(verb)?,
                internal: given.flag("internal"),
                file: given.value("file"),
                description: match given.value("description") {
                    Some(text) => String::from_utf8(text).map_err(|_| usage("the description is not UTF-8"))?,
                    None => String::new(),
                },
                chains: given.value("chains").map(|list| parse_chains(&list)).unwrap_or_default(),
            }),
            Verb::Commit => Request::Commit(CommitRequest {
                top: given.value("top"),
                base: given.value("base"),
                keep: given.flag("keep"),
                discard_internal: given.flag("discard-internal"),
                discard_bitmaps: given.flag("discard-bitmaps"),
            }),
            Verb::Pull => Request::Pull(PullRequest {
                base: given.value("base").filter(|base| base != b"none"),
                into: given.value("into"),
                delete: given.flag("delete"),
                discard_internal: given.flag("discard-internal"),
                discard_bitmaps: given.flag("discard-bitmaps"),
            }),
            Verb::Delete => Request::Delete(DeleteRequest {
                name: given.positional(verb)?,
                method: given.value("method").map_or(Ok(DeleteMethod::Auto), |word| DeleteMethod::parse(&word))?,
                discard_internal: given.flag("discard-internal"),
                discard_bitmaps: given.flag("discard-bitmaps"),
            }),
            Verb::Revert => Request::Revert(RevertRequest {
                to: given.needed(verb, "to")?,
                save: given.value("save"),
                discard_internal: given.flag("discard-internal"),
                discard_bitmaps: given.flag("discard-bitmaps"),
            }),
            Verb::Rebase => Request::Rebase(RebaseRequest {
                layer: given.value("layer"),
                base: Some(given.needed(verb, "base")?).filter(|base| base != b"none"),
                is_unsafe: given.flag("unsafe"),
                drop_layers: given.flag("drop-layers"),
            }),
            Verb::Clone => Request::Clone(CloneRequest { name: given.positional(verb)?, from: given.value("from") }),
            Verb::Resize => Request::Resize(ResizeRequest {
                size: NewSize::parse(&given.positional(verb)?)?,
                shrink: given.flag("shrink"),
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
            Request::Delete(_) => Verb::Delete,
            Request::Revert(_) => Verb::Revert,
            Request::Rebase(_) => Verb::Rebase,
            Request::Clone(_) => Verb::Clone,
            Request::Resize(_) => Verb::Resize,
            Request::Cancel => Verb::Cancel,
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
        let mut line = LineBuilder::default();
        match self {
            Request::Snapshot(SnapshotRequest { name, internal, file, description, chains }) => {
                line.word(&quote(name));
                line.flag("internal", *internal);
                line.value("file", file.as_deref());
                line.value("description", Some(description.as_bytes()).filter(|text| !text.is_empty()));
                line.value("chains", Some(print_chains(chains)).filter(|list| !list.is_empty()).as_deref());
            }
            Request::Commit(CommitRequest { top, base, keep, discard_internal, discard_bitmaps }) => {
                line.value("top", top.as_deref());
                line.value("base", base.as_deref());
                line.flag("keep", *keep);
                line.discards(*discard_internal, *discard_bitmaps);
            }
            Request::Pull(PullRequest { base, into, delete, discard_internal, discard_bitmaps }) => {
                line.value("base", base.as_deref());
                line.value("into", into.as_deref());
                line.flag("delete", *delete);
                line.discards(*discard_internal, *discard_bitmaps);
            }
            Request::Delete(DeleteRequest { name, method, discard_internal, discard_bitmaps }) => {
                line.word(&quote(name));
                line.value("method", Some(method.name().as_bytes()).filter(|_| *method != DeleteMethod::Auto));
                line.discards(*discard_internal, *discard_bitmaps);
            }
            Request::Revert(RevertRequest { to, save, discard_internal, discard_bitmaps }) => {
                line.value("to", Some(to));
                line.value("save", save.as_deref());
                line.discards(*discard_internal, *discard_bitmaps);
            }
            Request::Rebase(RebaseRequest { layer, base, is_unsafe, drop_layers }) => {
                line.value("layer", layer.as_deref());
                line.value("base", Some(base.as_deref().unwrap_or(b"none")));
                line.flag("unsafe", *is_unsafe);
                line.flag("drop-layers", *drop_layers);
            }
            Request::Clone(CloneRequest { name, from }) => {
                line.word(&quote(name));
                line.value("from", from.as_deref());
            }
            Request::Resize(ResizeRequest { size, shrink }) => {
                line.word(size.to_string().as_bytes());
                line.flag("shrink", *shrink);
            }
            Request::Cancel => {}
        }
        line.0
    }

    /// The whole command, verb first, quoted for [`Request::parse_command`] and for a shell.
    pub fn command_line(&self) -> Vec<u8> {
        let mut line = LineBuilder(self.verb().name().into());
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
struct LineBuilder(Vec<u8>);

impl LineBuilder {
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

    fn discards(&mut self, internal: bool, bitmaps: bool) {
        self.flag("discard-internal", internal);
        self.flag("discard-bitmaps", bitmaps);
    }

    fn value(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.word(&[key.as_bytes(), b"=", &quote(value)].concat());
        }
    }
}

impl ParsedWords {
    fn of(verb: Verb, words: Vec<Vec<u8>>) -> Result<Self> {
        let known = grammar(verb);
        let mut given = Self { positional: None, values: Vec::new(), flags: Vec::new() };
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
                // A view may be called anything.
                (None, None, value)
                    if known.positional.is_some_and(|what| what == "VIEW" || value.is_none())
                        && given.positional.is_none() =>
                {
                    given.positional = Some(word);
                }
                (None, None, _) => return Err(usage(format!("unknown word {}; {}", show(&word), takes(verb)))),
            }
        }
        Ok(given)
    }

    fn positional(&mut self, verb: Verb) -> Result<Vec<u8>> {
        let what = grammar(verb).positional.expect("a verb that takes one");
        self.positional.take().ok_or_else(|| usage(format!("{what} is missing; {}", takes(verb))))
    }

    fn needed(&mut self, verb: Verb, key: &str) -> Result<Vec<u8>> {
        self.value(key).ok_or_else(|| usage(format!("{key}= is missing; {}", takes(verb))))
    }

    fn value(&mut self, key: &str) -> Option<Vec<u8>> {
        let at = self.values.iter().position(|(known, _)| *known == key)?;
        Some(self.values.swap_remove(at).1)
    }

    fn flag(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }
}

/// Whether a word of `verb` is spelt like that.
pub(super) fn is_word(verb: Verb, name: &[u8]) -> bool {
    let Grammar { keys, flags, .. } = grammar(verb);
    keys.iter().chain(flags).any(|word| word.as_bytes() == name)
}

/// "commit takes top= base= keep discard-internal".
fn takes(verb: Verb) -> String {
    let Grammar { positional, keys, flags } = grammar(verb);
    let names = positional.map(str::to_owned).into_iter();
    let words: Vec<String> =
        names.chain(keys.iter().map(|key| format!("{key}="))).chain(flags.iter().map(ToString::to_string)).collect();
    let words = if words.is_empty() { "no words".to_string() } else { words.join(" ") };
    format!("{} takes {words}", verb.name())
}

/// A word in a sentence: short, and in quotes.
pub(super) fn show(word: &[u8]) -> String {
    const SHOWN: usize = 60;
    let text = String::from_utf8_lossy(word);
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_default).collect();
    if text.chars().count() > SHOWN {
        shown.push_str("...");
    }
    format!("\"{shown}\"")
}

pub(super) fn usage(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, fact)
}

/// The chains of a list, as [`split_list`] reads it.
pub fn parse_chains(list: &[u8]) -> Vec<PathBuf> {
    split_list(list).into_iter().map(|chain| PathBuf::from(std::ffi::OsString::from_vec(chain))).collect()
}

fn print_chains(chains: &[PathBuf]) -> Vec<u8> {
    join_list(chains.iter().map(|chain| chain.as_os_str().as_bytes()))
}

impl DeleteMethod {
    /// The words of `method=`.
    const ALL: [(Self, &'static str); 3] = [(Self::Commit, "commit"), (Self::Pull, "pull"), (Self::Auto, "auto")];

    fn parse(word: &[u8]) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, name)| name.as_bytes() == word);
        known
            .map(|(method, _)| *method)
            .ok_or_else(|| usage(format!("method= is {}; the methods are commit, pull and auto", show(word))))
    }

    /// Its word.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(method, _)| *method == self).expect("all of them").1
    }
}

impl NewSize {
    /// Reads `10G`, `+1.5T`, `-512`.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = str::from_utf8(text).map_err(|_| usage(format!("{} is no size", show(text))))?;
        match text.as_bytes().first() {
            Some(b'+') => Ok(Self::More(parse_size(&text[1..])?)),
            Some(b'-') => Ok(Self::Less(parse_size(&text[1..])?)),
            _ => Ok(Self::To(parse_size(text)?)),
        }
    }
}

/// A size in the largest unit of which it is a whole number.
fn shortest(size: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.into_iter().find(|(shift, _)| size > 0 && size.trailing_zeros() >= *shift);
    unit.map_or_else(|| size.to_string(), |(shift, unit)| format!("{}{unit}", size >> shift))
}

/// Exactly, for [`NewSize::parse`].
impl std::fmt::Display for NewSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::To(size) => f.write_str(&shortest(*size)),
            Self::More(more) => write!(f, "+{}", shortest(*more)),
            Self::Less(less) => write!(f, "-{}", shortest(*less)),
        }
    }
}

#[cfg(test)]
mod tests;
