//! Finds the files that an intent of another process names.
//!
//! Promises: a file is bound to a name of the intent only if it is proven to be the intended one; otherwise
//! the reason is returned. In the intent's own store the proof is the file's identity and, before anything is
//! changed, its evidence; in a copied store it is one of the names that the command gives it, and the
//! evidence.

use std::path::{Path, PathBuf};

use crate::error::ErrorKind;
use crate::io::{Backend, Identity};

use super::evidence::{AllowedChange, FileRef};
use super::file_names::shown;
use super::intent::Intent;
use super::operation::{Effects, ExpectedFile};

/// The result for a file that an intent names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileBinding {
    /// It is there, by that name.
    Here(PathBuf),
    /// No file that could be it has any of its names.
    Gone(PathBuf),
    /// Unknown, with the reason.
    Doubt(String),
}

impl FileBinding {
    /// The reason why it is unknown, if so.
    pub fn into_doubt(self) -> Option<String> {
        match self {
            Self::Doubt(sentence) => Some(sentence),
            Self::Here(_) | Self::Gone(_) => None,
        }
    }
}

/// Finds the files of an intent, and records in it which they are. `thoroughly`: evidence is checked even
/// where identity could be enough.
pub(super) fn bind(
    root: &dyn Backend,
    intent: &mut Intent,
    is_copied: bool,
    thoroughly: bool,
) -> Vec<FileBinding> {
    let mut wanted = expected(root, intent);
    if is_copied {
        return bind_copies(root, &mut wanted);
    }
    let mut findings = Vec::new();
    for ExpectedFile { file: named, names, allowed } in &mut wanted {
        let here = names.iter().find_map(|name| {
            // I1: only the intended file.
            let found = root.identify(name).ok()?;
            named.file.is_met_as(&found).then_some((name, found))
        });
        let Some((name, found)) = here else {
            findings.push(FileBinding::Gone(named.path.clone()));
            continue;
        };
        named.file = found;
        let against = if thoroughly { against(root, name, named, *allowed) } else { None };
        findings.push(against.map_or_else(|| FileBinding::Here(name.clone()), FileBinding::Doubt));
    }
    findings
}

/// Why the file at `name` is not proven to be the intended one, if so.
fn against(root: &dyn Backend, name: &Path, named: &FileRef, allowed: AllowedChange) -> Option<String> {
    let Some(evidence) = &named.evidence else { return Some(format!("nothing is known of {}", shown(name))) };
    match evidence.against(root, name, allowed, named.data.is_some()) {
        Ok(None) => named.data.as_ref().and_then(|data| data.against(root, allowed)),
        Ok(Some(fact)) => Some(format!("{} {fact}", shown(name))),
        Err(error) => Some(format!("{} cannot be checked: {error}", shown(name))),
    }
}

fn bind_copies(root: &dyn Backend, wanted: &mut [ExpectedFile<'_>]) -> Vec<FileBinding> {
    // Each existing file, by its name, and the evidence against it.
    let candidates: Vec<Vec<(PathBuf, Identity, Option<String>)>> = wanted
        .iter()
        .map(|ExpectedFile { file: named, names, allowed }| {
            let look = |name: &PathBuf| match root.identify(name) {
                Ok(found) => {
                    let allowed = AllowedChange { is_copy: true, ..*allowed };
                    Some((name.clone(), found, against(root, name, named, allowed)))
                }
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => Some((name.clone(), Identity::NONE, Some(error.to_string()))),
            };
            names.iter().filter_map(look).collect()
        })
        .collect();
    let proven = |candidates: &[(PathBuf, Identity, Option<String>)]| {
        let mut files: Vec<(PathBuf, Identity)> = Vec::new();
        for (name, found, against) in candidates {
            if against.is_none() && files.iter().all(|(_, known)| known != found) {
                files.push((name.clone(), *found));
            }
        }
        files
    };
    let meant: Vec<Identity> = wanted.iter().map(|wanted| wanted.file.file).collect();
    let all: Vec<Vec<(PathBuf, Identity)>> = candidates.iter().map(|found| proven(found)).collect();
    let mut findings = Vec::new();
    for (number, ExpectedFile { file: named, .. }) in wanted.iter_mut().enumerate() {
        let path = named.path.clone();
        let others = || (0..meant.len()).filter(|other| meant[*other] != meant[number]);
        let is_anothers =
            |found: &Identity| others().any(|other| all[other].iter().any(|(_, known)| known == found));
        let finding = match all[number].as_slice() {
            [(name, found)] if !is_anothers(found) => {
                named.file = *found;
                findings.push(FileBinding::Here(name.clone()));
                continue;
            }
            [] => {
                let strange = candidates[number].iter().find(|(_, found, _)| !is_anothers(found));
                match strange.and_then(|(_, _, against)| against.clone()) {
                    None => FileBinding::Gone(path),
                    Some(against) => FileBinding::Doubt(format!("the store was copied, and {against}")),
                }
            }
            [(name, _)] => {
                FileBinding::Doubt(format!("{} could be either of two files of the command", shown(name)))
            }
            [(one, _), (other, _), ..] => {
                let fact = "could both be the file of the command; remove the one that is not";
                FileBinding::Doubt(format!("{} and {} {fact}", shown(one), shown(other)))
            }
        };
        named.file = Identity::NONE;
        findings.push(finding);
    }
    findings
}

/// The files of an intent that may have been changed or copied: a file outside of the store is never changed,
/// nor copied with it.
fn expected<'a>(root: &dyn Backend, intent: &'a mut Intent) -> Vec<ExpectedFile<'a>> {
    let is_free = |path: &Path| root.stat(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let mut expected = intent.operation.expected(&is_free);
    expected.retain(|expected| !expected.file.path.is_absolute());
    expected
}
