//! The record of one unfinished command, and the text of its file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::io::Identity;

use super::encoded;
use super::evidence::{FileRef, identity};
use super::operation::{Effects, Operation};

/// Written in each intent. An intent of another version cannot be parsed, and hides the whole store.
const VERSION: u32 = 2;

/// The record of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent<O = Operation> {
    pub(super) version: u32,
    /// The identity of its own file: a copied store has another one. None before it is written.
    #[serde(default, with = "identity_option", skip_serializing_if = "Option::is_none")]
    pub(super) own: Option<Identity>,
    /// The command's words.
    pub command: String,
    /// The chain of the command, by its path in the mount.
    #[serde(with = "encoded")]
    pub chain: PathBuf,
    /// Its operation.
    #[serde(flatten)]
    pub operation: O,
}

mod identity_option {
    use serde::{Deserializer, Serializer};

    use super::{Identity, identity};

    #[expect(clippy::ref_option, reason = "what serde calls")]
    pub(super) fn serialize<S: Serializer>(own: &Option<Identity>, serializer: S) -> Result<S::Ok, S::Error> {
        match own {
            Some(own) => identity::serialize(own, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Identity>, D::Error> {
        identity::deserialize(deserializer).map(Some)
    }
}

impl Intent {
    /// The text of its file.
    pub fn text(&self) -> String {
        toml::to_string(self).expect("strings, numbers and tables")
    }

    /// Parses the text of its file. A missing part makes it invalid: its own identity, and evidence for each
    /// file.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct IntentHeader {
            version: u32,
        }
        let fail = |error: toml::de::Error| error.message().to_owned();
        let IntentHeader { version } = toml::from_str(text).map_err(fail)?;
        if version != VERSION {
            return Err(format!("its version is {version}, and this chainfs knows {VERSION}"));
        }
        let intent: Self = toml::from_str(text).map_err(fail)?;
        if intent.own.is_none() {
            return Err("it does not say which file it is itself".to_owned());
        }
        match intent.files().iter().find(|named| named.evidence.is_none()) {
            Some(named) => Err(format!("it keeps no evidence of {}", named.path.display())),
            None => Ok(intent),
        }
    }
}

impl<O> Intent<O> {
    /// An intent of a command on a chain.
    pub fn new(command: &str, chain: &Path, operation: O) -> Self {
        Self {
            version: VERSION,
            own: None,
            command: command.to_owned(),
            chain: chain.to_path_buf(),
            operation,
        }
    }

    /// The same intent with its operation by another type.
    pub fn with<P>(&self, operation: P) -> Intent<P> {
        let Self { version, own, command, chain, .. } = self;
        Intent { version: *version, own: *own, command: command.clone(), chain: chain.clone(), operation }
    }

    /// All files that it changes, renames or removes, or on which these depend.
    pub(crate) fn files(&self) -> Vec<&FileRef>
    where
        O: Effects,
    {
        self.operation.files()
    }
}
