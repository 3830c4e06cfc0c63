//! Whether a request makes sense by itself, whoever has put it together.
//!
//! Promises: what passes has names that can be file names and texts of bounded length, and can be said in
//! words that are read as the same request.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, PathBuf};

use crate::error::Result;

use super::parse::{is_word, show, usage};
use super::request::{
    CloneRequest, CommitRequest, DeleteRequest, NewSize, PullRequest, RebaseRequest, Request, RevertRequest,
    SnapshotRequest, Verb,
};

/// Bytes of a snapshot's name, at most: with a suffix and a digest it is still a file name.
pub(super) const MAX_NAME_LEN: usize = 200;
/// Bytes of the name of a file or a view, at most (`NAME_MAX`).
const MAX_FILE_NAME_LEN: usize = 255;
/// Bytes of a description, at most.
pub(super) const MAX_DESCRIPTION_LEN: usize = 1024;
/// What chainfs keeps for itself in a store begins like this.
const OWN_PREFIX: &[u8] = b".chainfs";

/// Bytes of a path, at most (`PATH_MAX`).
const MAX_PATH_LEN: usize = 4096;

impl Request {
    /// Whether it makes sense by itself: what was parsed does, what was put together may not.
    pub fn check(&self) -> Result<()> {
        match self {
            Request::Snapshot(request) => check_snapshot(request),
            Request::Commit(CommitRequest { top, base, .. }) => {
                check_view("top=", top.as_deref())?;
                check_view("base=", base.as_deref())
            }
            Request::Pull(PullRequest { base, into, .. }) => {
                assert!(base.as_deref() != Some(b"none"), "standing on nothing is no name");
                check_view("base=", base.as_deref())?;
                check_view("into=", into.as_deref())
            }
            Request::Delete(DeleteRequest { name, .. }) => {
                if is_word(Verb::Delete, name) || name.starts_with(b"method=") {
                    return Err(usage(format!("{} is a word of delete, and names no view", show(name))));
                }
                check_view("the name", Some(name))
            }
            Request::Revert(RevertRequest { to, save, .. }) => {
                check_view("to=", Some(to))?;
                save.as_deref().map_or(Ok(()), |name| check_new_name(Verb::Revert, name))
            }
            Request::Rebase(RebaseRequest { drop_layers: true, is_unsafe: false, .. }) => {
                Err(usage("drop-layers goes with unsafe; a safe rebase loses nothing"))
            }
            Request::Rebase(RebaseRequest { layer, base, .. }) => {
                assert!(base.as_deref() != Some(b"none"), "standing on nothing is no name");
                check_view("layer=", layer.as_deref())?;
                base.as_deref().map_or(Ok(()), check_path)
            }
            Request::Clone(CloneRequest { name, from }) => {
                check_new_name(Verb::Clone, name)?;
                check_view("from=", from.as_deref())
            }
            Request::Resize(request) => match request.size {
                NewSize::To(0) => Err(usage("a disk of 0 bytes holds nothing; say how long it is to be")),
                NewSize::More(0) | NewSize::Less(0) => Err(usage("the size would stay what it is")),
                NewSize::To(_) | NewSize::More(_) | NewSize::Less(_) => Ok(()),
            },
            Request::Cancel => Ok(()),
        }
    }
}

fn check_snapshot(request: &SnapshotRequest) -> Result<()> {
    let SnapshotRequest { name, internal, file, description, chains } = request;
    check_new_name(Verb::Snapshot, name)?;
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

/// Whether `name` can be given to something new by `verb`.
fn check_new_name(verb: Verb, name: &[u8]) -> Result<()> {
    if is_word(verb, name) || name.contains(&b'=') {
        return Err(usage(format!("the name {} would be taken for another word; choose another one", show(name))));
    }
    check_file_name("the name", name, MAX_NAME_LEN)?;
    if name == crate::store::ACTIVE {
        return Err(usage("the name \"active\" is the active disk's; choose another one"));
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
        let fact = format!("{key} names no view: {}; the views are active and those in snapshots/", show(name));
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

/// Whether `base=` can be the name of a file.
fn check_path(path: &[u8]) -> Result<()> {
    check_printable("base=", path)?;
    if path.is_empty() || path.len() > MAX_PATH_LEN {
        return Err(usage(format!("base= names no file: {}", show(path))));
    }
    Ok(())
}
