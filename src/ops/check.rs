//! Checks names and texts of a command.
//!
//! Promises: names that pass are valid file names, texts are of bounded length, and both can be written in
//! words that parse to the same request.

use crate::error::Result;

use super::words::{VerbSpec, show, usage};

/// Maximum length of a snapshot's name: with a suffix and a digest it is still a file name.
pub(super) const MAX_NAME_LEN: usize = 200;
/// Maximum length of the name of a file or a view (`NAME_MAX`).
pub(super) const MAX_FILE_NAME_LEN: usize = 255;
/// Maximum length of a description.
pub(super) const MAX_DESCRIPTION_LEN: usize = 1024;
/// The prefix of files that chainfs keeps for itself in a store.
const OWN_PREFIX: &[u8] = b".chainfs";

/// Maximum length of a path (`PATH_MAX`).
const MAX_PATH_LEN: usize = 4096;

/// Checks that `verb` can give `name` to something new.
pub(super) fn check_new_name(verb: &VerbSpec, name: &[u8]) -> Result<()> {
    if verb.is_word(name) || name.contains(&b'=') {
        return Err(usage(format!(
            "the name {} would be taken for another word; choose another one",
            show(name)
        )));
    }
    check_file_name("the name", name, MAX_NAME_LEN)?;
    if name == crate::store::ACTIVE {
        return Err(usage("the name \"active\" is the active disk's; choose another one"));
    }
    Ok(())
}

/// Checks that `name` can stand alone as a file name that tools accept.
pub(super) fn check_file_name(what: &str, name: &[u8], most: usize) -> Result<()> {
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

pub(super) fn check_view(key: &str, name: Option<&[u8]>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    check_printable(key, name)?;
    if name.is_empty() || name.len() > MAX_FILE_NAME_LEN || name.contains(&b'/') {
        let fact =
            format!("{key} names no view: {}; the views are active and those in snapshots/", show(name));
        return Err(usage(fact));
    }
    Ok(())
}

/// [`split`] refuses these, so no request may contain them.
pub(super) fn check_printable(what: &str, text: &[u8]) -> Result<()> {
    if text.iter().any(u8::is_ascii_control) {
        return Err(usage(format!("{what} has control characters: {}", show(text))));
    }
    Ok(())
}

/// Checks that `base=` can be the name of a file.
pub(super) fn check_path(path: &[u8]) -> Result<()> {
    check_printable("base=", path)?;
    if path.is_empty() || path.len() > MAX_PATH_LEN {
        return Err(usage(format!("base= names no file: {}", show(path))));
    }
    Ok(())
}
