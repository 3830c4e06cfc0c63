//! Abandoned drafts: files that a command had made when it was interrupted before its intent was written.
//!
//! Promises: only files made by chainfs are removed, and none that an intent names. A command holds the
//! store's lock from the creation of a draft until an intent names it or it is removed, so that under the
//! lock all other drafts are abandoned. An image is a draft of chainfs if its name is exactly one that a
//! command gives, its birth time matches the time in the name, it has no other name, and it is empty or the
//! beginning of a qcow2 image; its owner is no evidence, since it is that of the model image. All other files
//! stay, even if that leaves a draft behind: in a copied store.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Result;
use crate::format::header::MAGIC;
use crate::io::{Backend, Timestamp, directory_of};
use crate::units::are_zero;

use super::Store;
use super::file_names::shown;
use super::operation::Effects;
use super::plain::birth_of;

/// The suffix of drafts.
pub(super) const DRAFT: &str = "new";

/// How much later than its name says a draft may have been made: its process may have been stopped meanwhile.
const LATEST: Duration = Duration::from_mins(10);
/// The clock of a file system lags by a tick.
const LAG: Duration = Duration::from_secs(1);

/// The name of a command's intent, different from all others: time, process, and a number.
pub(crate) fn command_name(when: Duration, process: u32, number: u64) -> String {
    format!("{:x}-{process}-{number}", when.as_nanos())
}

/// The time of the command whose intent has that name.
fn when_named(name: &str) -> Option<Duration> {
    let mut parts = name.split('-');
    let (when, process, number) = (parts.next()?, parts.next()?, parts.next()?);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // Any time of this century has as many digits.
    let is_whole = when.len() == 16 && is_number(process) && is_number(number) && parts.next().is_none();
    is_whole.then(|| u64::from_str_radix(when, 16).ok().map(Duration::from_nanos)).flatten()
}

/// The name of a draft beside `name`, of the command called `of`.
pub(crate) fn draft_name(of: &str, number: usize) -> String {
    format!(".chainfs-{of}-{number}.{DRAFT}")
}

/// When a draft of an image, or a file that a command has replaced, was made, by its name; `None`: it is
/// neither.
fn when_drafted(path: &Path) -> Option<Duration> {
    let name = path.file_name()?.to_str()?;
    let (command, number) = name.strip_prefix(".chainfs-")?.strip_suffix(".new")?.rsplit_once('-')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    when_named(command).filter(|_| is_number)
}

/// Whether a file of that name, among the images, is a draft of an image, or a file that a command has
/// replaced.
pub(crate) fn is_draft(path: &Path) -> bool {
    when_drafted(path).is_some()
}

/// Whether a file of that name, among the intents, is the draft of one.
pub(super) fn is_intents_draft(path: &Path) -> bool {
    let is_named = |name: &str| when_named(name).is_some();
    path.extension().is_some_and(|own| own == DRAFT)
        && path.file_stem().and_then(OsStr::to_str).is_some_and(is_named)
}

/// Why the file of a draft's name is not proven to be one, if so.
fn doubt(root: &dyn Backend, path: &Path) -> Result<Option<&'static str>> {
    let file = root.open_file(path)?;
    let stat = file.stat()?;
    if stat.link_count != 1 {
        return Ok(Some("has another name"));
    }
    let Timestamp { seconds, nanoseconds } = birth_of(&*file);
    let birth = u64::try_from(seconds).map(|seconds| Duration::new(seconds, nanoseconds)).unwrap_or_default();
    let is_of_then = |when: Duration| birth + LAG >= when && birth <= when + LATEST;
    if birth != Duration::ZERO && !when_drafted(path).is_some_and(is_of_then) {
        return Ok(Some("was made at another time than its name says"));
    }
    let mut head = [0; 512];
    let len = file.read_at(0, &mut head)?;
    // Bytes written right before a power failure may be zeroes.
    let is_image = head[..len].starts_with(&MAGIC.to_be_bytes()) || are_zero(&head[..len]);
    Ok((!is_image).then_some("holds other data than a new image"))
}

impl Store {
    /// Removes abandoned drafts.
    pub fn sweep(&self) -> Result<()> {
        if self.options.read_only || (self.catalog().drafts.is_empty() && self.guard.drafts().is_empty()) {
            return Ok(());
        }
        let names = self.guard_names();
        self.guard.prepare(&*names)?;
        let _lock = self.guard.lock(&*names)?;
        self.rescan()?;
        let (intents, senseless) = self.guard.read();
        let files = intents.iter().flat_map(|found| found.intent.files()).map(|named| named.path.as_path());
        // A layer that a revert has replaced is removed, or moved to the trash, by the revert.
        let put_aside = intents.iter().flat_map(|found| found.intent.operation.new_tops());
        let spoken_of: HashSet<&Path> = files.chain(put_aside.map(|top| top.frozen.as_path())).collect();
        let images =
            self.catalog().drafts.iter().map(|path| self.guard.prefix.join(path)).collect::<Vec<PathBuf>>();
        // An intent that cannot be parsed may name any of them.
        let images =
            images.into_iter().filter(|path| senseless.is_empty() && !spoken_of.contains(path.as_path()));
        let (root, mut ours) = (&self.guard.root, self.guard.drafts());
        for path in images {
            match doubt(&**root, &path) {
                Ok(None) => ours.push(path),
                Ok(Some(fact)) => tracing::info!("{} {fact}: it is left alone", shown(&path)),
                Err(error) => tracing::info!("{}: {error}: not removed", shown(&path)),
            }
        }
        for path in ours {
            tracing::info!("removed {}, a draft of an interrupted command", path.display());
            names.unlink(&path)?;
            names.sync(&directory_of(&path))?;
        }
        self.rescan().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_commands_give_are_drafts() {
        let of = command_name(Duration::from_secs(1_750_000_000), 4711, 3);
        let draft = draft_name(&of, 12);
        assert!(is_draft(Path::new("a/b").join(&draft).as_path()), "{draft}");
        assert!(is_intents_draft(Path::new(&of).with_extension(DRAFT).as_path()), "{of}");
        let beside = [
            &draft[1..],
            &draft.replace(".new", ".new2"),
            &draft.replace("4711", "x"),
            &draft.replace("-12", ""),
        ];
        for name in [".chainfs.new", ".chainfs-notes.new", ".chainfs-1-2-3-0.new", ".chainfs-1.new"]
            .iter()
            .chain(&beside)
        {
            assert!(!is_draft(Path::new(name)), "{name}");
        }
        for name in ["mine.new", "1.new", "1-2-3.new", ".new"] {
            assert!(!is_intents_draft(Path::new(name)), "{name}");
        }
    }
}
