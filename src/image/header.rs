//! Changing the header of an image that is in use.
//!
//! [`header_edit`] decides what is written in which order; here the header is read, checked before the first
//! write, and written, with a sync after each step.

use crate::error::{Error, ErrorKind, Result};
use crate::format::header_edit::{HeaderEdit, HeaderStep, plan};
use crate::format::{Frozen, Header};
use crate::image::create::NewBacking;
use crate::image::write::refcounts_damaged;
use crate::image::{read_header_with, unreadable};
use crate::io::{Storage, WriteStorage};

/// The changes of a header; `None` keeps a field.
#[derive(Clone, Debug, Default)]
pub struct HeaderChange {
    /// Another backing file, or none.
    pub backing: Option<Option<NewBacking>>,
    /// Another freeze mark, or none.
    pub frozen: Option<Option<Frozen>>,
}

/// Changes the header of a qcow2 file that no [`Writer`](crate::image::write::Writer) has open. A crash
/// leaves the old header or the new one.
///
/// `Unsupported`, before anything is written: the header's layout does not allow it, or the image may not be
/// written.
pub fn change_header(name: &str, file: &dyn WriteStorage, change: &HeaderChange) -> Result<()> {
    apply(file, &steps(name, file, change)?)
}

/// The refusal that [`change_header`] would return; nothing is written.
pub fn check_header_change<S: Storage + ?Sized>(name: &str, file: &S, change: &HeaderChange) -> Result<()> {
    steps(name, file, change).map(drop)
}

/// Carries out the steps that [`steps`] has found.
pub(super) fn apply(file: &dyn WriteStorage, steps: &[HeaderStep]) -> Result<()> {
    for step in steps {
        for (at, bytes) in &step.writes {
            file.write_at(*at, bytes)?;
        }
        file.sync()?;
    }
    Ok(())
}

/// The steps, in this order; nothing is written.
pub(super) fn steps<S: Storage + ?Sized>(
    name: &str,
    file: &S,
    change: &HeaderChange,
) -> Result<Vec<HeaderStep>> {
    let (old, file_len) = read_header_with(name, file, Header::parse)?;
    if let Some(sentence) = unreadable(&old) {
        return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {sentence}")));
    }
    if let Some(reason) = &old.refcount_damage {
        return Err(refcounts_damaged(name, reason));
    }
    if old.corrupt() {
        let sentence = "it is marked as corrupt and is not written to; run chainfs check --repair all";
        return Err(Error::new(ErrorKind::Corrupt, format!("{name}: {sentence}")));
    }
    let mut cluster = vec![0; old.cluster.size() as usize];
    file.read_at(0, &mut cluster)?;

    let backing = match &change.backing {
        None => None,
        Some(None) => Some(None),
        Some(Some(backing)) => Some(Some((backing.guarded_name()?, backing.checked_format()?))),
    };
    let payload = change.frozen.as_ref().map(|frozen| frozen.as_ref().map(Frozen::encode));
    let edit = HeaderEdit {
        backing: backing
            .as_ref()
            .map(|backing| backing.as_ref().map(|(name, format)| (name.as_slice(), *format))),
        frozen: payload.as_ref().map(Option::as_deref),
    };
    let steps = plan(&cluster, &edit).ok_or_else(|| {
        let fact = match &change.frozen {
            Some(Some(_)) if old.frozen.is_some() => {
                "has no room for a longer freeze mark in place of the old one; remove that first"
            }
            _ => "has no room for the change; rewrite the header with qemu-img rebase -u, and try again",
        };
        Error::new(ErrorKind::Unsupported, format!("{name}: its header {fact}"))
    })?;

    // Checked before the first write: each header on the way is the old or the new one, except that the
    // feature names may be missing.
    let nameless = |header: Header| Header { feature_names: Vec::new(), ..header };
    let old = nameless(old);
    for step in &steps {
        for (at, bytes) in &step.writes {
            cluster[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
        }
        let now = Header::parse(&cluster, file_len.max(old.cluster.size())).map_err(|reason| {
            let fact = format!("{name}: its header cannot be changed like this: {reason}");
            Error::new(ErrorKind::Unsupported, fact)
        })?;
        let now = nameless(now);
        // M10: every header on the way is the old one or the new one.
        assert!(now == old || is_wanted(&old, &now, change), "a step of a header's change leads astray");
    }
    Ok(steps)
}

/// Whether `now` is `old` except for the wanted changes.
fn is_wanted(old: &Header, now: &Header, change: &HeaderChange) -> bool {
    let backing = match &change.backing {
        None => old.backing == now.backing,
        Some(None) => now.backing.is_none(),
        Some(Some(wanted)) => now.backing.as_ref().is_some_and(|found| {
            found.format.as_deref() == Some(&*wanted.format)
                && wanted.guarded_name().is_ok_and(|name| name == found.name)
        }),
    };
    let frozen = change.frozen.as_ref().unwrap_or(&old.frozen);
    let rest = Header { backing: now.backing.clone(), frozen: now.frozen.clone(), ..old.clone() };
    backing && *frozen == now.frozen && rest == *now
}
