//! The values of mount options: text in, a valid value or an error out.

use crate::error::{Error, ErrorKind, Result};
use crate::report::safe::terminal_bytes;
use crate::units::parse_size;
use glob::Pattern;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// A directory that moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMap {
    /// Prefix of the names in image headers.
    pub old: PathBuf,
    /// The directory to use instead.
    pub new: PathBuf,
}

/// The format of images whose path in the store matches.
#[derive(Clone, Debug, PartialEq)]
pub struct FormatRule {
    /// Matched against the path within the store.
    pub glob: Pattern,
    /// The format of these images.
    pub format: ImageFormat,
}

/// The name of the chains of leaves whose path in the store matches.
#[derive(Clone, Debug, PartialEq)]
pub struct NameRule {
    /// Matched against the path within the store.
    pub glob: Pattern,
    /// The name in the mount.
    pub name: Vec<u8>,
}

/// The formats that a user can declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum ImageFormat {
    /// The plain bytes of the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
}

pub(super) fn refuse(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("mount option '{name}': {why}"))
}

pub(super) fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

pub(super) fn utf8<'a>(name: &str, value: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(value).map_err(|_| refuse(name, &format!("'{}' is not text", terminal_bytes(value))))
}

pub(super) fn number(name: &str, value: &[u8], min: u64, max: u64) -> Result<u64> {
    let digits = utf8(name, value)?;
    let parsed = digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
    parsed.filter(|number| (min..=max).contains(number)).ok_or_else(|| {
        refuse(name, &format!("'{}' must be a number from {min} to {max}", terminal_bytes(value)))
    })
}

/// A size with an optional unit.
pub(super) fn size(name: &str, value: &[u8]) -> Result<u64> {
    parse_size(utf8(name, value)?).map_err(|error| error.within(format!("mount option '{name}'")))
}

pub(super) fn octal(name: &str, value: &[u8]) -> Result<u32> {
    let bits = u32::from_str_radix(utf8(name, value)?, 8).ok();
    bits.filter(|bits| *bits <= 0o777 && value.iter().all(u8::is_ascii_digit))
        .ok_or_else(|| refuse(name, &format!("'{}' must be octal, as in 027", terminal_bytes(value))))
}

pub(super) fn glob(name: &str, text: &str) -> Result<Pattern> {
    Pattern::new(text).map_err(|error| {
        let shown = terminal_bytes(text.as_bytes());
        refuse(name, &format!("'{shown}' is not a pattern: {} at position {}", error.msg, error.pos))
    })
}

/// `GLOB:NAME`.
pub(super) fn name_rule(value: &[u8]) -> Result<NameRule> {
    let at = value.iter().rposition(|byte| *byte == b':').filter(|at| *at > 0);
    let at = at.ok_or_else(|| refuse("name", "must be GLOB:NAME, as in vm.snap*:vm"))?;
    let (text, name) = (&value[..at], &value[at + 1..]);
    if name.is_empty() || name.contains(&b'/') || matches!(name, b"." | b"..") {
        let shown = terminal_bytes(name);
        return Err(refuse("name", &format!("'{shown}' is not the name of a directory")));
    }
    Ok(NameRule { glob: glob("name", utf8("name", text)?)?, name: name.to_vec() })
}

/// `OLD=NEW`; an equals sign in OLD is written `\=`.
pub(super) fn path_map(value: &[u8]) -> Result<PathMap> {
    let mut old = Vec::new();
    let mut bytes = value.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => old.push(bytes.next_if_eq(&b'=').unwrap_or(b'\\')),
            b'=' => {
                let new: Vec<u8> = bytes.collect();
                if old.is_empty() || new.is_empty() {
                    break;
                }
                return Ok(PathMap { old: path_of(&old), new: path_of(&new) });
            }
            _ => old.push(byte),
        }
    }
    Err(refuse("map", &format!("'{}' must be OLD=NEW, two directories", terminal_bytes(value))))
}

/// `GLOB:FORMAT`; the pattern may contain colons.
pub(super) fn format_rule(value: &str) -> Result<FormatRule> {
    let format = |word| match word {
        "raw" => Some(ImageFormat::Raw),
        "qcow2" => Some(ImageFormat::Qcow2),
        _ => None,
    };
    match value.rsplit_once(':').map(|(pattern, word)| (pattern, format(word))) {
        Some((pattern, Some(format))) if !pattern.is_empty() => {
            Ok(FormatRule { glob: glob("format", pattern)?, format })
        }
        _ => {
            let shown = terminal_bytes(value.as_bytes());
            Err(refuse("format", &format!("'{shown}' must be GLOB:raw or GLOB:qcow2")))
        }
    }
}
