//! Intents: small durable records of unfinished commands in the store.
//!
//! Promises: an intent is on disk, completely, before the first step that it records, and is removed after
//! the last. Its owner holds a lock on it throughout, and only the holder of that lock may resume it. Views
//! that an intent invalidates are not shown to any scan of the store until the intent is removed. Other
//! modules carry out the steps; the files alone show which steps are done.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{
    Directory, EntryKind, Existing, FileLock, MountPoints, ObjectId, OpenObject, directory_of, read_text,
};

use super::Store;
use super::bind::{FileBinding, bind};
use super::catalog::Catalog;
use super::control_dir::{ControlDir, MARKER};
use super::evidence::FileRef;
use super::file_names::shown;
use super::freeze_list;
use super::intent::Intent;
use super::kept_states::ChangingFiles;
use super::known_intents::{BEGUN, LiveIntent, LiveIntents, ResumeRefusal, SeenIntent};
use super::leftovers::{DRAFT, is_intents_draft};
use super::operation::{Effects, Operation};

use super::trust;

/// The problem of intents that another user may have written.
pub(super) const UNTRUSTED: &str = "records commands that were begun, and none is resumed";
/// Longer files are no intents.
const MAX_LEN: u64 = 4 << 20;
/// Maximum number of intents of others that are kept open for that: each costs a descriptor.
const MOST_SEEN: usize = 64;
/// Interval of retries after a refusal that another process caused.
const RETRY: Duration = Duration::from_secs(3);

/// Files that should be intents, and what is wrong with each.
pub(super) type UnreadableIntents = Vec<(PathBuf, String)>;

/// An intent as found in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundIntent {
    /// The name of its file.
    pub name: OsString,
    /// Its content. In a copied store: with the files that were found to be the named ones.
    pub intent: Intent,
    /// Whether the store was copied since: then devices and inode numbers do not match.
    pub is_copied: bool,
    /// Whether it may be resumed. If not, other users may have written it: it only hides views that it may
    /// have invalidated.
    pub is_trusted: bool,
}

impl ControlDir {
    /// Creates the directories for intents and notes, if missing. Without the store's lock; taking that lock
    /// creates the freeze list.
    pub fn prepare(&self, names: &dyn Directory) -> Result<()> {
        let has_place = self.root.stat(self.intents()).is_ok();
        if !has_place {
            if self.is_marked {
                names.create_directory(Path::new(MARKER))?;
                names.sync(Path::new(""))?;
            }
            names.create_directory(self.intents())?;
            self.is_new_place.store(true, Ordering::Release);
            names.sync(self.intents().parent().unwrap_or(Path::new("")))?;
        }
        Ok(())
    }

    /// Writes an intent, durably, and owns it.
    pub fn begin<O: Clone + Into<Operation>>(
        &self,
        names: &dyn Directory,
        name: &str,
        intent: &Intent<O>,
    ) -> Result<OwnedIntent<O>> {
        let name = OsString::from(format!("{name}.toml"));
        match self.write(names, &name, &intent.with(intent.operation.clone().into())) {
            Ok((written, claim)) => {
                Ok(self.own(&name, written, claim, Vec::new()).with(intent.operation.clone()))
            }
            Err(error) => {
                let _ = names.unlink(&self.intents().join(&name));
                Err(error)
            }
        }
    }

    /// Rewrites an intent that this process owns, durably: at every moment there is the old one or the new.
    pub fn rewrite<O: Clone + Into<Operation>>(
        &self,
        names: &dyn Directory,
        owned: &mut OwnedIntent<O>,
    ) -> Result<()> {
        // A concurrent restore of a removed intent waits.
        let mut live = self.known.live.lock();
        let operation = owned.intent.operation.clone();
        let (written, claim) =
            self.write(names, owned.name(), &owned.intent.with(operation.clone().into()))?;
        owned.intent = written.with(operation);
        if let Some(entry) = live.get_mut(owned.name()) {
            entry.replace(written, claim);
        }
        Ok(())
    }

    fn write(&self, names: &dyn Directory, name: &OsStr, intent: &Intent) -> Result<(Intent, FileLock)> {
        let path = self.intents().join(name);
        let draft = path.with_extension(DRAFT);
        let written = self.in_place(names, || {
            // The process that had it before may have been interrupted while writing it.
            match names.unlink(&draft) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let file = names.create(&draft, None)?;
            let intent = Intent { own: Some(self.root.identify(&draft)?), ..intent.clone() };
            file.write_at(0, format!("{BEGUN}{}", intent.text()).as_bytes())?;
            file.sync()?;
            let claim = FileLock::take(self.root.open_file_for_writing(&draft)?, &draft, Duration::ZERO)?;
            // J2: the file and its name are on disk before this returns.
            names.rename(&draft, &path, Existing::Replace)?;
            names.sync(self.intents())?;
            Ok((intent, claim))
        });
        written.inspect_err(|_| {
            let _ = names.unlink(&draft);
        })
    }

    fn own(&self, name: &OsStr, intent: Intent, claim: FileLock, former: Vec<FileLock>) -> OwnedIntent {
        let entry = LiveIntent { intent: intent.clone(), claim, former, is_ending: false };
        self.known.live.lock().insert(name.to_owned(), entry);
        let ownership = Ownership { name: name.to_owned(), live: Arc::clone(&self.known.live) };
        OwnedIntent { path: self.intents().join(name), intent, ownership, changing: None }
    }

    /// Writes those intents of this process again whose files another process has removed.
    pub(super) fn restore(&self, names: &dyn Directory) {
        // A thread that ends one records that before its file is removed.
        let mut live = self.known.live.lock();
        for (name, entry) in live.iter_mut().filter(|(_, entry)| !entry.is_ending) {
            let found = self.root.stat(&self.intents().join(name));
            if !found.is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                continue;
            }
            tracing::warn!(
                "{} was removed while its command is running, and is written again",
                shown_name(name)
            );
            match self.prepare(names).and_then(|()| self.write(names, name, &entry.intent)) {
                Ok((intent, claim)) => entry.replace(intent, claim),
                Err(error) => tracing::error!("{}: {error}", shown_name(name)),
            }
        }
    }

    /// Drafts of intents, of running or interrupted processes.
    pub(super) fn drafts(&self) -> Vec<PathBuf> {
        let directories = [self.intents(), Path::new(MARKER)];
        let drafts = directories.into_iter().flat_map(|directory| {
            let listed = self
                .root
                .open_directory(directory, MountPoints::Skip)
                .ok()
                .flatten()
                .map(|found| found.list());
            let entries = listed.and_then(Result::ok).unwrap_or_default().into_iter();
            let paths =
                entries.filter(|entry| entry.kind == EntryKind::File).map(|entry| directory.join(entry.name));
            paths.filter(|path| is_intents_draft(path) || freeze_list::is_draft(path)).collect::<Vec<_>>()
        });
        drafts.collect()
    }

    /// Takes over an intent that its process has left. `Busy` if it has not; `Stale` if any of its files is
    /// not proven to be the named one. Under the store's lock.
    pub fn take_up(&self, names: &dyn Directory, found: &FoundIntent) -> Result<OwnedIntent> {
        let path = self.intents().join(&found.name);
        let former = self.write_lost(names, &found.name)?;
        let file = self.root.open_file_for_writing(&path)?;
        let seen = file.identity()?;
        let claim = FileLock::take(file, &path, Duration::ZERO)?;
        // Its owner may have finished it in between.
        if self.root.identify(&path)? != seen {
            return Err(Error::new(ErrorKind::Stale, format!("{} has another owner now", path.display())));
        }
        let (intent, is_copied, findings) = self.examine(&found.name)?;
        if let Some(doubt) = findings.into_iter().find_map(FileBinding::into_doubt) {
            let fact = "nothing is written or removed until that is certain: see chainfs recover";
            return Err(Error::new(ErrorKind::Stale, format!("{doubt}; {fact}")));
        }
        let mut owned = self.own(&found.name, intent, claim, Vec::from_iter(former));
        if is_copied {
            // From here on it is the store's own again.
            self.rewrite(names, &mut owned)?;
        }
        Ok(owned)
    }

    /// Writes an intent again that another process has removed, and whose owner has ended without doing that.
    /// Returns its former file.
    fn write_lost(&self, names: &dyn Directory, name: &OsStr) -> Result<Option<FileLock>> {
        let seen = self.known.seen.lock();
        let Some(entry) = seen.get(name).filter(|entry| entry.is_lost()) else { return Ok(None) };
        let path = self.intents().join(name);
        if self.root.stat(&path).is_ok() {
            return Ok(None);
        }
        let file = entry.file.reopen_for_writing()?;
        let claim = FileLock::take(file, &path, Duration::ZERO)?;
        tracing::warn!("{} was removed before its command was done, and is written again", shown_name(name));
        self.prepare(names)?;
        self.write(names, name, &entry.intent)?;
        Ok(Some(claim))
    }

    /// Reads an intent again, with the files that are proven to be the named ones; whether the store was
    /// copied; and the result for each file.
    pub fn examine(&self, name: &OsStr) -> Result<(Intent, bool, Vec<FileBinding>)> {
        let path = self.intents().join(name);
        let (mut intent, is_copied, _) = self.read_one(&path).map_err(|reason| {
            Error::new(ErrorKind::Corrupt, format!("{} cannot be understood: {reason}", path.display()))
        })?;
        let findings = bind(&*self.root, &mut intent, is_copied, true);
        Ok((intent, is_copied, findings))
    }

    /// Whether a process is working on an intent. If that is unknown, the answer is no: taking it over checks
    /// the lock itself.
    pub fn is_owned(&self, found: &FoundIntent) -> bool {
        let path = self.intents().join(&found.name);
        let held = match self.root.open_file(&path) {
            Ok(file) => FileLock::is_held(&*file, &path),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let is_ours = self.known.live.lock().contains_key(&found.name);
                match self.known.seen.lock().get(&found.name) {
                    _ if is_ours => Ok(true),
                    Some(entry) => FileLock::is_held(&*entry.file, &path),
                    None => Ok(false),
                }
            }
            Err(error) => Err(error),
        };
        held.unwrap_or(false)
    }

    /// Records why an intent was not resumed, for the store's problems, and whether that is final. Returns
    /// whether it is news.
    pub fn note_refusal(&self, name: &OsStr, sentence: String, is_final: bool) -> bool {
        let mut refused = self.known.refused.lock();
        let is_news = refused.get(name).is_none_or(|refusal| refusal.sentence != sentence);
        refused.insert(name.to_owned(), ResumeRefusal { sentence, is_final, when: Instant::now() });
        is_news
    }

    /// An intent is resumed, or discarded.
    pub fn forget_refusal(&self, name: &OsStr) {
        self.known.refused.lock().remove(name);
    }

    /// Why it was not resumed, if it was tried.
    pub fn refusal(&self, name: &OsStr) -> Option<String> {
        self.known.refused.lock().get(name).map(|refusal| refusal.sentence.clone())
    }

    /// Whether it was tried, and need not be tried again yet.
    pub fn is_refused(&self, name: &OsStr) -> bool {
        let refused = self.known.refused.lock();
        refused.get(name).is_some_and(|refusal| refusal.is_final || refusal.when.elapsed() < RETRY)
    }

    /// Moves an intent that the user discards, or a file that is no intent, aside, durably, where it is
    /// ignored. Under the store's lock. Returns its path relative to the guarded directory.
    pub fn discard(&self, names: &dyn Directory, path: &Path) -> Result<PathBuf> {
        let name = path.file_name().unwrap_or_default();
        if let Ok(file) = self.root.open_file_for_writing(path) {
            let _claim = FileLock::take(file, path, Duration::ZERO)?;
        }
        let mut aside = name.to_owned();
        aside.push(".discarded");
        let aside = path.with_file_name(aside);
        names.rename(path, &aside, Existing::Replace)?;
        names.sync(&directory_of(path))?;
        self.forget_refusal(name);
        Ok(aside)
    }

    /// The path of that intent, relative to the guarded directory.
    pub fn path_of(&self, name: &OsStr) -> PathBuf {
        self.intents().join(name)
    }

    /// All intents of the store, and the errors of those that are invalid or unreadable: their effects are
    /// unknown.
    pub(super) fn read(&self) -> (Vec<FoundIntent>, UnreadableIntents) {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        let trust = self.check_trust();
        let is_trusted = trust.is_ok();
        problems
            .extend(trust.err().map(|error| (self.intents().to_path_buf(), format!("{UNTRUSTED}: {error}"))));
        let listed = match self.root.open_directory(self.intents(), MountPoints::Enter) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Ok(Some(directory)) => directory.list(),
            Ok(None) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let entries = listed.unwrap_or_else(|error| {
            if is_trusted {
                problems.push((self.intents().to_path_buf(), error.to_string()));
            }
            Vec::new()
        });
        for entry in entries {
            let path = self.intents().join(&entry.name);
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            match self.read_one(&path) {
                Ok((mut intent, is_copied, file)) => {
                    if is_trusted {
                        self.has_seen(&entry.name, &intent, is_copied, file);
                    } else if !self.is_owners(&*file, &intent) {
                        // An untrusted intent does not hide images of other users.
                        continue;
                    }
                    bind(&*self.root, &mut intent, is_copied, false);
                    found.push(FoundIntent { name: entry.name, intent, is_copied, is_trusted });
                }
                Err(_) if !is_trusted => {}
                Err(_)
                    if entry.kind == EntryKind::File
                        && self.root.stat(&path).is_err_and(|error| error.kind() == ErrorKind::NotFound) => {}
                Err(reason) => problems.push((path, reason)),
            }
        }
        let live = self.known.live.lock();
        let is_lost = |(name, entry): &(&OsString, &LiveIntent)| {
            !entry.is_ending && found.iter().all(|found| found.name != **name)
        };
        let lost = live.iter().filter(is_lost);
        let lost: Vec<FoundIntent> = lost
            .map(|(name, entry)| FoundIntent {
                name: name.clone(),
                intent: entry.intent.clone(),
                is_copied: false,
                is_trusted: true,
            })
            .collect();
        found.extend(lost);
        // Commands of other processes stay begun even if their intents were removed.
        let mut seen = self.known.seen.lock();
        let is_here = |found: &[FoundIntent], name: &OsStr| found.iter().any(|found| *found.name == *name);
        seen.retain(|name, entry| is_here(&found, name) && !live.contains_key(name) || entry.is_lost());
        for (name, SeenIntent { intent, is_copied, .. }) in &*seen {
            if !is_here(&found, name) && problems.iter().all(|(path, _)| path.file_name() != Some(name)) {
                let mut intent = intent.clone();
                bind(&*self.root, &mut intent, *is_copied, false);
                found.push(FoundIntent {
                    name: name.clone(),
                    intent,
                    is_copied: *is_copied,
                    is_trusted: true,
                });
            }
        }
        (found, problems)
    }

    fn has_seen(&self, name: &OsStr, intent: &Intent, is_copied: bool, file: Arc<dyn OpenObject>) {
        let mut seen = self.known.seen.lock();
        if seen.len() < MOST_SEEN || seen.contains_key(name) {
            seen.insert(name.to_owned(), SeenIntent { intent: intent.clone(), is_copied, file });
        }
    }

    /// Whether a note is of a user who could have given the command: one who is trusted with the control
    /// directory, or the owner of all files that it names.
    fn is_owners(&self, note: &dyn OpenObject, intent: &Intent) -> bool {
        let Ok(note) = note.stat() else { return false };
        let is_own = |named: &&FileRef| self.root.stat(&named.path).map_or(true, |stat| stat.uid == note.uid);
        trust::is_known(&*self.root, note.uid) || intent.files().iter().all(is_own)
    }

    /// An intent, and whether the store was copied since it was written: then the file is not the recorded
    /// one.
    fn read_one(&self, path: &Path) -> std::result::Result<(Intent, bool, Arc<dyn OpenObject>), String> {
        let file = self.root.open_file(path).map_err(|error| error.to_string())?;
        let now = file.identity().map_err(|error| error.to_string())?;
        let text = read_text(&*file, MAX_LEN).map_err(|error| error.to_string())?;
        let mut intent = Intent::parse(&text)?;
        let was = intent.own.unwrap_or(now);
        let is_copied = now.is_copy_of(&was);
        if !is_copied && !was.id().is_near(now.id()) {
            // The same file system may have another number after the next start of the machine.
            for expected in intent.operation.expected(&|_| false) {
                expected.file.file.follow(&was, &now);
            }
            intent.own = Some(now);
        }
        Ok((intent, is_copied, file))
    }
}

fn shown_name(name: &OsStr) -> String {
    shown(Path::new(name))
}

/// An intent that this process has to finish.
#[derive(Debug)]
pub struct OwnedIntent<O = Operation> {
    path: PathBuf,
    /// Its content.
    pub intent: Intent<O>,
    ownership: Ownership,
    /// The files that the command is changing.
    changing: Option<Arc<ChangingFiles>>,
}

/// Records in this process that an intent is being carried out, until dropped.
#[derive(Debug)]
struct Ownership {
    name: OsString,
    live: LiveIntents,
}

impl Drop for Ownership {
    fn drop(&mut self) {
        self.live.lock().remove(&self.name);
    }
}

impl<O> OwnedIntent<O> {
    /// The name of its file.
    pub fn name(&self) -> &OsStr {
        &self.ownership.name
    }

    /// The command begins to change its files, of which `before` has the versions. What the layers above show
    /// does not change, except for `changed`.
    pub(crate) fn change_files(&mut self, store: &Store, before: &Arc<Catalog>, changed: Option<ObjectId>)
    where
        O: Effects,
    {
        let named: Vec<ObjectId> = self.intent.files().iter().map(|named| named.file.id()).collect();
        let all = before.images.iter().map(|image| image.stat.id);
        let files = all.filter(|id| named.contains(id)).collect();
        self.changing = Some(store.change_files(before, files, changed));
    }

    /// The same with its operation by another type.
    pub fn with<P>(self, operation: P) -> OwnedIntent<P> {
        let Self { path, intent, ownership, changing } = self;
        OwnedIntent { path, intent: intent.with(operation), ownership, changing }
    }

    /// The command is done, or undone: removes the intent, durably.
    pub fn end(self, names: &dyn Directory) -> Result<()> {
        if let Some(entry) = self.ownership.live.lock().get_mut(self.name()) {
            entry.is_ending = true;
            entry.say_ended();
        }
        match names.unlink(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match names.sync(self.path.parent().unwrap_or(Path::new(""))) {
            // Another process has removed all intents.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;
    use crate::io::Identity;
    use crate::io::LocalDirectory;
    use crate::store::{
        CommitOperation, CopyOperation, Digest, Evidence, Format, NewTop, PullOperation, SectorSample,
        ShrinkOperation, SnapshotOperation,
    };

    fn named(path: impl Into<PathBuf>, inode: u64) -> FileRef {
        let file = Identity::parse(&format!("3:{inode:x}:6553f100.5")).unwrap();
        let evidence = Evidence::Raw {
            size: 512,
            samples: vec![SectorSample { at: 0, was: Digest::of(b"a"), becomes: None }],
            written: None,
        };
        FileRef { path: path.into(), file, evidence: Some(evidence), data: None }
    }

    fn commit() -> Intent {
        let odd = PathBuf::from(OsString::from_vec(b"sub/\xff 100%\n.qcow2".to_vec()));
        let deed = Operation::Commit(CommitOperation {
            top: named(odd, u64::MAX),
            base: named("base.raw", 1),
            between: vec![named("sn1.qcow2", 2)],
            children: vec![],
            keep: true,
            is_copied: true,
            rename: Some("web01.raw".into()),
        });
        Intent::new("commit top=\"a b\"", Path::new("web01"), deed)
    }

    #[test]
    fn a_written_intent_is_read_back() {
        let pull = Operation::Pull(PullOperation {
            into: vec![named("a", 1)],
            base: None,
            remove: vec![],
            between: vec![named("b", 2)],
        });
        let qcow2 = Evidence::Qcow2 {
            size: 1,
            shape: Digest::of(b""),
            backing: Digest::of(b"b"),
            tables: None,
            samples: vec![SectorSample { at: 65536, was: Digest::of(b"y"), becomes: None }],
            disk: vec![SectorSample { at: 512, was: Digest::of(b"y"), becomes: Some(Digest::of(b"z")) }],
            head: Digest::of(b"x"),
            written: None,
        };
        let disks = vec![NewTop {
            old: FileRef { evidence: Some(qcow2), ..named("a", 1) },
            frozen: "b".into(),
            overlay: named(".c", 3),
            name: "a".into(),
            backing: Some(named("d", 4)),
        }];
        let snapshot = Operation::Snapshot(SnapshotOperation {
            seconds: -5,
            nanoseconds: 6,
            description: "x\n\"".into(),
            disks,
        });
        let copy = Operation::Copy(CopyOperation { draft: named(".x.new", 5), name: "y\u{fc}".into() });
        let shrink = Operation::Shrink(ShrinkOperation { image: named("a", 1), size: 512 });
        let more = [pull, snapshot, copy, shrink].map(|deed| Intent::new("x", Path::new(""), deed));
        let own = Some(named("own", 9).file);
        for intent in std::iter::once(commit()).chain(more) {
            let intent = Intent { own, ..intent };
            assert_eq!(Intent::parse(&intent.text()), Ok(intent.clone()), "{}", intent.text());
        }
    }

    #[test]
    fn an_intent_without_a_part_is_invalid() {
        let intent = Intent { own: Some(named("own", 9).file), ..commit() };
        let text = intent.text();
        assert!(Intent::parse(&text).is_ok());
        let fails = |text: &str| assert!(Intent::parse(text).is_err(), "{text}");
        fails("");
        fails("version = 2");
        fails(&text.replace("version = 2", "version = 1"));
        fails(&text.replace("version = 2", "version = 3"));
        fails(&commit().text());
        let without = Operation::Shrink(ShrinkOperation {
            image: FileRef { evidence: None, ..named("a", 1) },
            size: 512,
        });
        fails(&Intent { operation: without, ..intent.clone() }.text());
        for len in (0..text.len()).step_by(7) {
            fails(&text[..len]);
        }
    }

    #[test]
    fn an_intent_that_is_removed_each_time_it_is_written_is_known_to_who_saw_the_first() {
        let place = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(place.path()).unwrap();
        let names = root.names().unwrap();
        let [first, other, third] =
            [(); 3].map(|()| ControlDir::of_directory(&root, &LocalDirectory::open).unwrap());
        std::fs::write(place.path().join("a"), "a").unwrap();
        let image = FileRef::witness(&*root, Path::new("a"), Format::Raw, true).unwrap();
        let intent = Intent::new("x", Path::new(""), Operation::Shrink(ShrinkOperation { image, size: 1 }));
        let remove = || std::fs::remove_dir_all(place.path().join(".chainfs")).unwrap();
        let known = |guard: &ControlDir, is_owned: bool, at: &str| {
            let found = guard.read().0;
            assert_eq!(found.len(), 1, "{at}");
            assert_eq!(guard.is_owned(&found[0]), is_owned, "{at}");
        };
        let both_know = |is_owned: bool, at: &str| {
            known(&other, is_owned, at);
            known(&third, is_owned, at);
        };
        for is_ended in [true, false] {
            first.prepare(&*names).unwrap();
            let mut owned = first.begin(&*names, "1", &intent).unwrap();
            both_know(true, "begun");
            // Only the owner sees the second and the third file.
            remove();
            first.restore(&*names);
            first.rewrite(&*names, &mut owned).unwrap();
            remove();
            both_know(true, "removed");
            if is_ended {
                owned.end(&*names).unwrap();
                assert!(other.read().0.is_empty() && third.read().0.is_empty(), "it has ended");
                continue;
            }
            drop(owned);
            both_know(false, "its owner has ended");
            first.prepare(&*names).unwrap();
            std::fs::write(place.path().join(".chainfs/intents/1.new"), "# beg").unwrap();
            let found = other.read().0;
            let mut owned = other.take_up(&*names, &found[0]).unwrap();
            std::fs::write(place.path().join(".chainfs/intents/1.new"), "# beg").unwrap();
            other.rewrite(&*names, &mut owned).unwrap();
            remove();
            known(&third, true, "resumed, and removed");
            owned.end(&*names).unwrap();
            assert!(third.read().0.is_empty(), "taken up, and ended");
        }
    }

    /// Others remove the directory again and again, at any moment of a write.
    #[test]
    fn no_write_fails_because_its_directory_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(place.path()).unwrap();
        let names = root.names().unwrap();
        let guard = ControlDir::of_directory(&root, &LocalDirectory::open).unwrap();
        std::fs::write(place.path().join("a"), "a").unwrap();
        let image = FileRef::witness(&*root, Path::new("a"), Format::Raw, true).unwrap();
        let intent = Intent::new("x", Path::new(""), Operation::Shrink(ShrinkOperation { image, size: 1 }));
        let (is_over, removals) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Acquire) {
                    let removed = std::fs::remove_dir_all(place.path().join(MARKER));
                    let count = removals.fetch_add(usize::from(removed.is_ok()), Ordering::Relaxed);
                    // A write of a slow disk fits into the longest pause.
                    std::thread::sleep(Duration::from_millis(1 << (count % 9)));
                }
            });
            let work = || {
                let mut owned = guard.begin(&*names, "1", &intent)?;
                for _ in 0..2 {
                    drop(guard.lock(&*names)?);
                    drop(guard.lock_for_job(&*names, &|| Ok(()))?);
                    guard.rewrite(&*names, &mut owned)?;
                }
                owned.end(&*names)
            };
            let mut failed = None;
            while failed.is_none() && removals.load(Ordering::Relaxed) < 18 {
                failed = work().err();
            }
            is_over.store(true, Ordering::Release);
            assert_eq!(failed.map(|error| error.to_string()), None);
        });
    }

    #[test]
    fn an_intent_is_its_owners_until_he_goes() {
        let place = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(place.path()).unwrap();
        let names = root.names().unwrap();
        let guard = ControlDir::of_directory(&root, &LocalDirectory::open).unwrap();
        guard.prepare(&*names).unwrap();
        std::fs::write(place.path().join("a"), "a").unwrap();
        let image = FileRef::witness(&*root, Path::new("a"), Format::Raw, true).unwrap();
        let intent = Intent::new("x", Path::new(""), Operation::Shrink(ShrinkOperation { image, size: 1 }));
        let owned = guard.begin(&*names, "1", &intent).unwrap();
        let (found, problems) = guard.read();
        assert_eq!((found.len(), problems.len(), &found[0].intent.operation), (1, 0, &intent.operation));
        assert!(guard.is_owned(&found[0]));
        assert_eq!(guard.take_up(&*names, &found[0]).unwrap_err().kind(), ErrorKind::Busy);
        // Another process removes it.
        std::fs::remove_dir_all(place.path().join(".chainfs")).unwrap();
        assert_eq!(guard.read().0.len(), 1, "who is at work knows");
        guard.restore(&*names);
        assert!(guard.is_owned(&guard.read().0[0]), "and others can know again");
        drop(owned);
        let found = guard.read().0;
        assert!(!guard.is_owned(&found[0]));
        let written = std::fs::metadata(place.path().join("a")).unwrap().modified().unwrap();
        std::fs::write(place.path().join("a"), "another").unwrap();
        assert_eq!(guard.take_up(&*names, &found[0]).unwrap_err().kind(), ErrorKind::Stale);
        std::fs::write(place.path().join("a"), "a").unwrap();
        std::fs::File::options()
            .write(true)
            .open(place.path().join("a"))
            .unwrap()
            .set_modified(written)
            .unwrap();
        guard.take_up(&*names, &found[0]).unwrap().end(&*names).unwrap();
        assert!(guard.read().0.is_empty());
        std::fs::write(place.path().join(".chainfs/intents/2.toml"), "nonsense").unwrap();
        std::fs::create_dir(place.path().join(".chainfs/intents/3.toml")).unwrap();
        assert_eq!(guard.read().1.len(), 2);
        let lock = guard.lock(&*names).unwrap();
        drop(lock);
        guard.lock(&*names).unwrap();
    }
}
