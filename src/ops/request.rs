//! The requests of users, as values that are valid by themselves: reading, checking and writing them.
//!
//! A verb is a file of its own: its words, its plan and its job. Its plan checks whether the store has the
//! files that a request names.

use crate::error::Result;

use super::command::Command;
use super::tokenize::split;
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec, show, usage};
use super::{Request, Verb};

/// Declares the verbs. A row has the verb's documentation, its name, and its module and request; the module
/// has the verb's [`VerbSpec`] as `SPEC`.
/// `cancel` has no row: it acts on the command of another verb.
macro_rules! verbs {
    ($($(#[doc = $doc:literal])+ $verb:ident = $module:ident::$request:ident;)+) => {
        $(pub use $module::$request;)+

        /// The verbs; each has a control file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Verb {
            $($(#[doc = $doc])+ $verb,)+
            /// Stops the running job.
            Cancel,
        }

        /// A request that is valid by itself.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Request {
            $($(#[doc = $doc])+ $verb($request),)+
            /// Stops the running job.
            Cancel,
        }

        impl Verb {
            /// All of them.
            pub const ALL: [Verb; [$(stringify!($verb)),+].len() + 1] = [$(Verb::$verb,)+ Verb::Cancel];

            fn spec(self) -> &'static words::VerbSpec {
                match self {
                    $(Verb::$verb => &$module::SPEC,)+
                    Verb::Cancel => &request::CANCEL,
                }
            }
        }

        impl Request {
            fn from_parsed(verb: Verb, words: &mut words::ParsedWords) -> crate::error::Result<Self> {
                Ok(match verb {
                    $(Verb::$verb => Request::$verb(<$request as command::Command>::parse(words)?),)+
                    Verb::Cancel => Request::Cancel,
                })
            }

            /// Its verb.
            pub fn verb(&self) -> Verb {
                match self {
                    $(Request::$verb(_) => Verb::$verb,)+
                    Request::Cancel => Verb::Cancel,
                }
            }

            /// The command to carry out; `None` for `cancel`, which acts on another command.
            fn command(&self) -> Option<&dyn command::Command> {
                match self {
                    $(Request::$verb(request) => Some(request),)+
                    Request::Cancel => None,
                }
            }
        }
    };
}

pub(super) use verbs;

/// The words of `cancel`: none.
pub(super) const CANCEL: VerbSpec = VerbSpec {
    name: "cancel",
    usage: "cancel\n\nStops the running command at its next chunk. There are no words.\n",
    positional: None,
    keys: &[],
    flags: &[],
    is_for_store: false,
};

impl Verb {
    /// Its name.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// The verb of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verb| verb.name() == name)
    }

    /// The text that its control file returns when read.
    pub fn usage(self) -> &'static str {
        self.spec().usage
    }

    /// The words that it takes with a value, and those that it takes without one.
    pub fn words(self) -> (&'static [&'static str], &'static [&'static str]) {
        (self.spec().keys, self.spec().flags)
    }

    /// Whether it has a control file for the store as a whole.
    pub fn is_for_store(self) -> bool {
        self.spec().is_for_store
    }
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
        let names = || Verb::ALL.map(Verb::name).join(" ");
        if words.is_empty() {
            return Err(usage(format!("there is no command; the verbs are {}", names())));
        }
        let first = words.remove(0);
        let verb = str::from_utf8(&first).ok().and_then(Verb::from_name);
        let verb =
            verb.ok_or_else(|| usage(format!("unknown verb {}; the verbs are {}", show(&first), names())))?;
        Self::from_words(verb, words)
    }

    fn from_words(verb: Verb, words: Vec<Vec<u8>>) -> Result<Self> {
        let request = Self::from_parsed(verb, &mut ParsedWords::of(verb.spec(), words)?)?;
        request.check()?;
        Ok(request)
    }

    /// Checks it without looking at the store: a parsed request passes, a constructed one may not.
    pub fn check(&self) -> Result<()> {
        self.command().map_or(Ok(()), Command::check)
    }

    /// What it may discard beyond its purpose.
    pub(super) fn discards(&self) -> Discards {
        self.command().map(Command::discards).unwrap_or_default()
    }

    /// Checks that it is a request for a chain's own control files.
    pub fn check_for_chain(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) if !request.chains.is_empty() => {
                Err(usage("chains= is for the store's own .chainfs/control/snapshot; leave it out here"))
            }
            _ => Ok(()),
        }
    }

    /// Checks that it is a request for the control files of the store as a whole.
    pub fn check_for_store(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) if !request.chains.is_empty() => Ok(()),
            Request::Snapshot(_) => {
                Err(usage("chains= is missing: name the chains, as in chains=web01,db01"))
            }
            _ => Err(usage(format!(
                "{} is given to one chain, in its own control directory",
                self.verb().name()
            ))),
        }
    }

    /// Its words without the verb, quoted for [`Request::parse`] and for a shell.
    pub fn words(&self) -> Vec<u8> {
        let mut line = LineBuilder::default();
        if let Some(command) = self.command() {
            command.print(&mut line);
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

#[cfg(test)]
mod tests;
