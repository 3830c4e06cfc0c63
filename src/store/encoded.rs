//! Paths as text in the store's own files: bytes that are not plain ASCII are percent-encoded.

use std::ffi::OsString;
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serializer};

pub(in crate::store) fn text(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_graphic() && *byte != b'%' || *byte == b' ' {
            text.push(*byte as char);
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

pub(in crate::store) fn path(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(more.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &more[2..];
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    Some(PathBuf::from(OsString::from_vec(bytes)))
}

pub(in crate::store) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text(path))
}

pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    path(&text).ok_or_else(|| serde::de::Error::custom("a path that is not percent-encoded"))
}

/// The same for a path that may be missing.
pub(in crate::store) mod option {
    use std::path::PathBuf;

    use serde::{Deserializer, Serializer};

    #[expect(clippy::ref_option, reason = "what serde calls")]
    pub(in crate::store) fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match path {
            Some(path) => super::serialize(path, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        super::deserialize(deserializer).map(Some)
    }
}
