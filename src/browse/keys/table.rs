//! The table of keys: which passphrase or key file belongs to which encrypted volumes.
//!
//! ```toml
//! [[key]]
//! uuid = "9c448801-9c28-427e-beaa-6c656f92b030"
//! passphrase = "correct horse"
//!
//! [[key]]
//! chain = "customers/acme/*"
//! key_file = "/etc/chainfs/acme.key"
//! ```
//!
//! Promise: no message quotes the file. A misplaced passphrase stays secret.

use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::{Error, ErrorKind, Result};
use crate::guest::luks::Secret;
use crate::store::shown;

use super::file::{self, FileStamp, Wait};

/// Bytes of the table at most.
const TABLE_LEN: usize = 1 << 20;
/// Entries of the table at most.
const ENTRY_LIMIT: usize = 1024;
/// Bytes of a key file at most; cryptsetup's limit.
pub(super) const KEY_FILE_LEN: usize = 8 << 20;
/// Bytes of all secrets together at most.
const SECRETS_LEN: usize = 32 << 20;

/// A secret, and the encrypted volumes that it is tried on.
#[derive(Clone, Debug)]
pub(super) struct KeyRule {
    /// Matches the identity of the volume; `None`: any.
    uuid: Option<Pattern>,
    /// Matches the chain that the volume is on; `None`: any.
    chain: Option<Pattern>,
    pub(super) secret: Secret,
}

/// A table that was read.
#[derive(Debug, Default)]
pub(super) struct KeyTable {
    pub(super) rules: Vec<KeyRule>,
    /// The files that it was read from, with their versions.
    pub(super) files: Vec<(PathBuf, Option<FileStamp>)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableFile {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    uuid: Option<String>,
    chain: Option<String>,
    passphrase: Option<Zeroizing<String>>,
    passphrase_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    key_offset: Option<u64>,
    key_size: Option<u64>,
}

impl KeyRule {
    /// A secret for every encrypted volume.
    pub(super) fn for_all(secret: Secret) -> Self {
        Self { uuid: None, chain: None, secret }
    }

    /// Whether it is for a volume with this identity, on this chain.
    pub(super) fn is_for(&self, uuid: &str, chain: &Path) -> bool {
        let any_case = MatchOptions { case_sensitive: false, ..MatchOptions::default() };
        let is_chain = |pattern: &Pattern| {
            // As the globs of mount options: without a slash, the name counts.
            if pattern.as_str().contains('/') {
                return pattern.matches_path(chain);
            }
            chain.file_name().is_some_and(|name| pattern.matches_path(Path::new(name)))
        };
        self.uuid.as_ref().is_none_or(|pattern| pattern.matches_with(uuid, any_case))
            && self.chain.as_ref().is_none_or(is_chain)
    }
}

impl KeyTable {
    /// Reads a table and the key files that it names.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let (text, stamp) = file::read(path, TABLE_LEN, Wait::Never)?;
        let mut table = Self { rules: Vec::new(), files: vec![(path.to_path_buf(), Some(stamp))] };
        table.parse(&text).map_err(|error| error.within(shown(path)))?;
        Ok(table)
    }

    fn parse(&mut self, text: &[u8]) -> Result<()> {
        let refuse = |fact: String| Error::new(ErrorKind::Usage, fact);
        let text = std::str::from_utf8(text).map_err(|_| refuse("is not text".to_owned()))?;
        // toml's own message may quote a value.
        let found: TableFile = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
            refuse(format!(
                "line {line}: not a table of keys; each [[key]] has texts called uuid, chain, passphrase, \
                    passphrase_file or key_file, and numbers called key_offset or key_size"
            ))
        })?;
        if found.key.len() > ENTRY_LIMIT {
            return Err(refuse(format!("has more than {ENTRY_LIMIT} keys")));
        }
        for (number, entry) in (1..).zip(found.key) {
            let rule = entry.rule(&mut self.files).map_err(|error| error.within(format!("key {number}")))?;
            self.rules.push(rule);
        }
        if self.rules.iter().map(|rule| rule.secret.bytes().len()).sum::<usize>() > SECRETS_LEN {
            return Err(Error::new(ErrorKind::Limit, format!("has keys of more than {SECRETS_LEN} bytes")));
        }
        Ok(())
    }
}

impl Entry {
    fn rule(self, files: &mut Vec<(PathBuf, Option<FileStamp>)>) -> Result<KeyRule> {
        let refuse = |fact: &str| Error::new(ErrorKind::Usage, fact);
        let pattern = |text: Option<String>| {
            let pattern = text.map(|text| Pattern::new(&text)).transpose();
            pattern
                .map_err(|error| refuse(&format!("not a pattern: {} at position {}", error.msg, error.pos)))
        };
        if self.uuid.is_none() && self.chain.is_none() {
            return Err(refuse("has neither uuid nor chain; uuid = \"*\" is every encrypted volume"));
        }
        let (uuid, chain) = (pattern(self.uuid)?, pattern(self.chain)?);
        let mut read = |path: PathBuf| {
            if !path.is_absolute() {
                return Err(refuse("the path of its file is not absolute"));
            }
            let (bytes, stamp) = file::read(&path, KEY_FILE_LEN, Wait::Never)?;
            files.push((path, Some(stamp)));
            Ok(bytes)
        };
        let has_range = self.key_offset.is_some() || self.key_size.is_some();
        if has_range && self.key_file.is_none() {
            return Err(refuse("key_offset and key_size are for key_file"));
        }
        let secret = match (self.passphrase, self.passphrase_file, self.key_file) {
            (Some(text), None, None) => Secret::from(text.as_bytes().to_vec()),
            (None, Some(path), None) => Secret::from(first_line(&read(path)?)),
            (None, None, Some(path)) => {
                let bytes = read(path)?;
                Secret::from(
                    range(&bytes, self.key_offset, self.key_size)
                        .ok_or_else(|| refuse("its key file ends before key_offset and key_size"))?,
                )
            }
            _ => return Err(refuse("needs one of passphrase, passphrase_file and key_file")),
        };
        if secret.bytes().is_empty() {
            return Err(refuse("is empty"));
        }
        Ok(KeyRule { uuid, chain, secret })
    }
}

/// A passphrase as cryptsetup reads it from a pipe: up to the first end of a line.
fn first_line(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == b'\n').next().unwrap_or_default().to_vec()
}

/// A part of a key file.
fn range(bytes: &[u8], offset: Option<u64>, size: Option<u64>) -> Option<Vec<u8>> {
    let rest = bytes.get(usize::try_from(offset.unwrap_or(0)).ok()?..)?;
    let part = match size {
        Some(size) => rest.get(..usize::try_from(size).ok()?)?,
        None => rest,
    };
    Some(part.to_vec())
}

/// A passphrase or key file given alone: its whole bytes.
pub(super) fn whole_file(path: &Path) -> Result<Secret> {
    let mut bytes = Zeroizing::new(Vec::new());
    if path == Path::new("-") {
        let fail = |error| Error::io("reading the key from standard input", error);
        file::read_all(std::io::stdin().lock(), KEY_FILE_LEN, &mut bytes).map_err(fail)?;
        if bytes.len() > KEY_FILE_LEN {
            bytes.zeroize();
            return Err(Error::new(ErrorKind::Limit, format!("the key is longer than {KEY_FILE_LEN} bytes")));
        }
    } else {
        bytes = file::read(path, KEY_FILE_LEN, Wait::ForWriter)?.0;
    }
    if bytes.is_empty() {
        return Err(Error::new(ErrorKind::Usage, format!("{}: the key is empty", shown(path))));
    }
    Ok(Secret::from(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn table(text: &str) -> Result<Vec<KeyRule>> {
        let mut table = KeyTable::default();
        table.parse(text.as_bytes())?;
        Ok(table.rules)
    }

    fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn rules_match_identities_and_chains() {
        let rules = table(
            "[[key]]\nuuid = \"9C448801-*\"\npassphrase = \"one\"\n\
             [[key]]\nchain = \"web*\"\npassphrase = \"two\"\n\
             [[key]]\nuuid = \"9c*\"\nchain = \"acme/*\"\npassphrase = \"three\"\n",
        )
        .unwrap();
        let found = |uuid: &str, chain: &str| {
            let fitting = rules.iter().filter(|rule| rule.is_for(uuid, Path::new(chain)));
            fitting.map(|rule| String::from_utf8_lossy(rule.secret.bytes()).into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found("9c448801-1", "db"), ["one"]);
        assert_eq!(found("x", "acme/web01"), ["two"]);
        assert_eq!(found("9c44", "acme/db"), ["three"]);
        assert_eq!(found("9c44", "acme"), [""; 0]);
    }

    #[test]
    fn refusals_quote_nothing_of_the_table() {
        let refused = |text: &str| table(text).unwrap_err().to_string();
        for text in [
            "[[key]]\nuuid = \"*\"\npassphrase = hunter2\n",
            "[[key]]\nuuid = \"*\"\npassphrase = 1234567\n",
            "[[key]]\nuuid = \"*\"\nhunter2 = \"\"\n",
            "hunter2 = 1234567\n",
            "[[key]]\nuuid = \"*\"\npassphrase = \"hunter2\n",
            "[[key]]\nuuid = \"*\"\npassphrase = \"hunter2\"\nkey_size = \"1234567\"\n",
        ] {
            let fact = refused(text);
            assert!(
                fact.contains("line ") && !fact.contains("hunter2") && !fact.contains("1234567"),
                "{fact}"
            );
        }
        for (text, fact) in [
            ("[[key]]\npassphrase = \"a\"\n", "key 1: has neither uuid nor chain"),
            ("[[key]]\nuuid = \"*\"\n", "key 1: needs one of"),
            ("[[key]]\nuuid = \"*\"\npassphrase = \"a\"\nkey_file = \"/b\"\n", "key 1: needs one of"),
            ("[[key]]\nuuid = \"*\"\npassphrase = \"\"\n", "key 1: is empty"),
            ("[[key]]\nuuid = \"*\"\nkey_file = \"b\"\n", "key 1: the path of its file is not absolute"),
            ("[[key]]\nuuid = \"[\"\npassphrase = \"a\"\n", "key 1: not a pattern"),
            (
                "[[key]]\nuuid = \"*\"\npassphrase = \"a\"\nkey_size = 1\n",
                "key 1: key_offset and key_size are",
            ),
        ] {
            assert!(refused(text).starts_with(fact), "{text}: {}", refused(text));
        }
    }

    #[test]
    fn files_of_others_and_for_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o644, 0o640, 0o620, 0o601, 0o604] {
            let path = file(&dir, "keys", b"", mode);
            let error = KeyTable::read(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{mode:o}");
            assert!(error.to_string().contains(&format!("(mode {mode:o})")), "{error}");
        }
        assert!(KeyTable::read(&file(&dir, "keys", b"", 0o400)).is_ok());
        assert_eq!(KeyTable::read(dir.path()).unwrap_err().kind(), ErrorKind::Usage);
        let large = file(&dir, "large", &vec![0; KEY_FILE_LEN + 1], 0o600);
        assert_eq!(whole_file(&large).unwrap_err().kind(), ErrorKind::Limit);
    }

    #[test]
    fn key_files_count_whole_and_passphrase_files_up_to_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "key", b"\0\n\xffbytes\n", 0o600);
        let secret = |words: &str| {
            let text =
                format!("[[key]]\nuuid = \"*\"\n{words}\n").replace("PATH", &path.display().to_string());
            table(&text).map(|rules| rules[0].secret.bytes().to_vec())
        };
        assert_eq!(secret("key_file = \"PATH\"").unwrap(), b"\0\n\xffbytes\n");
        assert_eq!(secret("passphrase_file = \"PATH\"").unwrap(), b"\0");
        assert_eq!(secret("key_file = \"PATH\"\nkey_offset = 2\nkey_size = 3").unwrap(), b"\xffby");
        assert!(secret("key_file = \"PATH\"\nkey_size = 10").is_err());
        assert_eq!(whole_file(&path).unwrap().bytes(), b"\0\n\xffbytes\n");
    }
}
