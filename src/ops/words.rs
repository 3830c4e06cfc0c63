//! The words of commands: which words a verb takes, how they are parsed and written.
//!
//! Every refusal names the wrong word and the known words. The verb itself interprets a word's value.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{join_list, split_list};

use super::tokenize::quote;

/// The specification of a verb.
#[derive(Debug)]
pub(super) struct VerbSpec {
    /// The verb's name, and the name of its control file.
    pub(super) name: &'static str,
    /// The text that its control file returns when read.
    pub(super) usage: &'static str,
    /// The positional word.
    pub(super) positional: Option<&'static str>,
    /// The words that take a value.
    pub(super) keys: &'static [&'static str],
    /// The words that take none.
    pub(super) flags: &'static [&'static str],
    /// Whether one command for several chains may be given to the store as a whole.
    pub(super) is_for_store: bool,
}

impl VerbSpec {
    /// Whether the verb has a word of this spelling.
    pub(super) fn is_word(&self, name: &[u8]) -> bool {
        self.keys.iter().chain(self.flags).any(|word| word.as_bytes() == name)
    }

    /// "commit takes top= base= keep discard-internal".
    fn takes(&self) -> String {
        let names = self.positional.map(str::to_owned).into_iter();
        let keys = self.keys.iter().map(|key| format!("{key}="));
        let words: Vec<String> =
            names.chain(keys).chain(self.flags.iter().map(ToString::to_string)).collect();
        let words = if words.is_empty() { "no words".to_string() } else { words.join(" ") };
        format!("{} takes {words}", self.name)
    }
}

/// The words of one command, each known and given once.
pub(super) struct ParsedWords {
    spec: &'static VerbSpec,
    positional: Option<Vec<u8>>,
    values: Vec<(&'static str, Vec<u8>)>,
    flags: Vec<&'static str>,
}

/// What a command may discard beyond its purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Discards {
    /// Internal snapshots in the layers concerned.
    pub(super) internal: bool,
    /// Their persistent bitmaps.
    pub(super) bitmaps: bool,
}

impl ParsedWords {
    pub(super) fn of(spec: &'static VerbSpec, words: Vec<Vec<u8>>) -> Result<Self> {
        let mut given = Self { spec, positional: None, values: Vec::new(), flags: Vec::new() };
        for word in words {
            let (key, value) = match word.iter().position(|byte| *byte == b'=') {
                Some(at) => (&word[..at], Some(&word[at + 1..])),
                None => (&word[..], None),
            };
            let key_known = spec.keys.iter().find(|known| known.as_bytes() == key).copied();
            let flag_known = spec.flags.iter().find(|known| known.as_bytes() == key).copied();
            let twice = |key: &str| usage(format!("{key} is given twice; {}", spec.takes()));
            match (key_known, flag_known, value) {
                (Some(key), _, None | Some([])) => {
                    return Err(usage(format!("{key}= has no value; {}", spec.takes())));
                }
                (Some(key), _, Some(value)) => {
                    if given.values.iter().any(|(other, _)| *other == key) {
                        return Err(twice(&format!("{key}=")));
                    }
                    given.values.push((key, value.to_vec()));
                }
                (_, Some(flag), Some(_)) => {
                    return Err(usage(format!("{flag} takes no value; {}", spec.takes())));
                }
                (_, Some(flag), None) => {
                    if given.flags.contains(&flag) {
                        return Err(twice(flag));
                    }
                    given.flags.push(flag);
                }
                // A view may have any name.
                (None, None, value)
                    if spec.positional.is_some_and(|what| what == "VIEW" || value.is_none())
                        && given.positional.is_none() =>
                {
                    given.positional = Some(word);
                }
                (None, None, _) => {
                    return Err(usage(format!("unknown word {}; {}", show(&word), spec.takes())));
                }
            }
        }
        Ok(given)
    }

    /// The positional word; refused if it is missing.
    pub(super) fn positional(&mut self) -> Result<Vec<u8>> {
        let what = self.spec.positional.unwrap_or_default();
        self.positional.take().ok_or_else(|| usage(format!("{what} is missing; {}", self.spec.takes())))
    }

    /// The value of a key; refused if it is missing.
    pub(super) fn needed(&mut self, key: &str) -> Result<Vec<u8>> {
        self.value(key).ok_or_else(|| usage(format!("{key}= is missing; {}", self.spec.takes())))
    }

    /// The value of a key, if it is given.
    pub(super) fn value(&mut self, key: &str) -> Option<Vec<u8>> {
        let at = self.values.iter().position(|(known, _)| *known == key)?;
        Some(self.values.swap_remove(at).1)
    }

    /// Whether a flag is given.
    pub(super) fn flag(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }
}

/// Builds the line of a command.
#[derive(Default)]
pub(super) struct LineBuilder(pub(super) Vec<u8>);

impl LineBuilder {
    pub(super) fn word(&mut self, word: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b' ');
        }
        self.0.extend_from_slice(word);
    }

    pub(super) fn flag(&mut self, flag: &str, given: bool) {
        if given {
            self.word(flag.as_bytes());
        }
    }

    pub(super) fn discards(&mut self, internal: bool, bitmaps: bool) {
        self.flag("discard-internal", internal);
        self.flag("discard-bitmaps", bitmaps);
    }

    pub(super) fn value(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.word(&[key.as_bytes(), b"=", &quote(value)].concat());
        }
    }
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

pub(super) fn print_chains(chains: &[PathBuf]) -> Vec<u8> {
    join_list(chains.iter().map(|chain| chain.as_os_str().as_bytes()))
}
