//! The checks of a store after any crash: at once, read-only; and after interrupted commands were resumed.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::image::check::check;
use chainfs::io::LocalDirectory;
use chainfs::ops::{Engine, JobState};
use chainfs::store::{OpenBackend, Store, StoreOptions};
use support::first_difference;

use super::scene::Scene;
use super::shape::{Chains, Content, Seen, Shape, Views, by_qemu, checked_by_qemu, files, is_qcow2, seen};
use support::sim::history::{History, Moment};
use support::sim::{Pages, mix};

/// No recovery takes longer.
const LIMIT: Duration = Duration::from_mins(1);

/// Judges the states of one run.
pub(crate) struct Judge {
    pub(crate) before: Shape,
    pub(crate) after: Shape,
    pub(crate) history: History,
    /// The point of the tape from which on the command was known to be done.
    pub(crate) done: usize,
    /// The view that freezes the guest's disk, where only the guest knows its bytes, and the point of the
    /// tape before which that happened, unless the command has failed and is resumed.
    pub(crate) frozen: Option<(&'static str, usize)>,
    /// Whether an internal snapshot is being taken: until its table is there, COPIED flags may be wrong.
    pub(crate) may_share: bool,
    /// Whether one is being deleted or applied: when its table has gone, flags may be missing.
    pub(crate) may_own: bool,
    /// One state in so many is shown to QEMU as well.
    pub(crate) qemu_one_in: u64,
    pub(crate) by_qemu: Cell<u64>,
    /// Clusters that were leaked, before and after recoveries.
    pub(crate) leaks: Cell<(u64, u64)>,
    /// How many recoveries have led back, and how many to the end.
    pub(crate) ends: Cell<(u64, u64)>,
    /// How many of them had interrupted commands: in the store itself, and in a copy of it.
    pub(crate) resumed: Cell<(u64, u64)>,
}

impl Judge {
    /// One of the same command, whose guest has done these writes, and of it before a snapshot those before
    /// `frozen`.
    pub(crate) fn with(&self, history: History, frozen: Option<(&'static str, usize)>) -> Self {
        Self {
            before: self.before.clone(),
            after: self.after.clone(),
            history,
            frozen,
            by_qemu: Cell::default(),
            leaks: Cell::default(),
            ends: Cell::default(),
            resumed: Cell::default(),
            ..*self
        }
    }
}

/// How tests open a store.
pub(crate) fn options(read_only: bool) -> StoreOptions {
    StoreOptions { notify: false, read_only, cache: 4 << 20, ..StoreOptions::default() }
}

/// Opens a store, resumes interrupted commands, and waits for their end.
pub(crate) fn recover(root: &Path, open: &OpenBackend<'_>) -> Result<Arc<Store>, String> {
    let store = Store::open_on(root, options(false), open).map_err(|error| format!("opening: {error}"))?;
    let engine = Engine::new(&store);
    let intents = store.catalog().intents.clone();
    engine.resume();
    let mut troubles = Vec::new();
    for found in intents {
        let (chain, start) = (&found.intent.chain, Instant::now());
        let mut status = engine.status(chain);
        while status.state == JobState::Running {
            if start.elapsed() > LIMIT {
                return Err(format!("the recovery hangs: {status:?}"));
            }
            status = engine.wait(chain, status.version, Duration::from_millis(100));
        }
        troubles.extend(status.error);
    }
    engine.stop();
    store.rescan().map_err(|error| format!("scanning: {error}"))?;
    if !troubles.is_empty() {
        return Err(format!("the recovery failed: {}", troubles.join("; ")));
    }
    Ok(store)
}

impl Judge {
    /// Judges the state beneath `root`: the first `cut` events of the tape have happened.
    pub(crate) fn judge(&self, root: &Path, cut: usize, seed: u64) -> Result<(), String> {
        let is_copy = self.at_once(root, cut)?;
        let store = recover(root, &LocalDirectory::open)?;
        self.recovered(root, &store, cut)?;
        drop(store);
        let (own, copied) = self.resumed.get();
        match is_copy {
            Some(false) => self.resumed.set((own + 1, copied)),
            Some(true) => self.resumed.set((own, copied + 1)),
            None => {}
        }
        if mix(seed).is_multiple_of(self.qemu_one_in) {
            self.ask_qemu(root, cut)?;
        }
        Ok(())
    }

    /// A read-only opening finds no error. Whether the store is a copy, if anything is left to be resumed.
    pub(crate) fn at_once(&self, root: &Path, cut: usize) -> Result<Option<bool>, String> {
        let within = |error: String| format!("before the recovery: {error}");
        let leaks = self.sound(root).map_err(within)?;
        self.leaks.set((self.leaks.get().0 + leaks, self.leaks.get().1));
        let store = Store::open(root, options(true)).map_err(|error| within(error.to_string()))?;
        self.listed(&store, cut, self.live_inode(root)).map_err(within)?;
        Ok(store.catalog().intents.first().map(|found| found.is_copied))
    }

    /// Every view that `store` lists has its old or its future bytes.
    pub(crate) fn listed(&self, store: &Arc<Store>, cut: usize, live: Option<u64>) -> Result<(), String> {
        let (_, views) = seen(store);
        for (name, view) in &views {
            let is_live = live == Some(view.inode) && !name.contains('@');
            let mut legal: Vec<&Content> =
                [&self.before, &self.after].into_iter().filter_map(|shape| shape.views.get(name)).collect();
            let frozen = self.frozen(name);
            legal.extend(is_live.then_some(&Content::Live).into_iter().chain(&frozen));
            self.fits(name, view, &legal, cut)?;
            let may_be_active = |shape: &Shape| shape.chains.get(name).is_some_and(|(_, active)| *active);
            if view.is_active && !may_be_active(&self.before) && !may_be_active(&self.after) {
                return Err(format!("{name} is shown as an active disk"));
            }
        }
        Ok(())
    }

    /// The inode number of the file that the guest wrote at first.
    pub(crate) fn live_inode(&self, root: &Path) -> Option<u64> {
        let name = self.before.views.iter().find(|(_, content)| matches!(content, Content::Live))?.0;
        fs::metadata(root.join(name)).ok().map(|metadata| metadata.ino())
    }

    /// Other allowed bytes of the view if it is the frozen one.
    fn frozen(&self, name: &str) -> Vec<Content> {
        match self.frozen {
            Some((frozen, point)) if frozen == name && self.done == usize::MAX => {
                vec![Content::LiveUntil(point), Content::Live]
            }
            Some((frozen, point)) if frozen == name => vec![Content::LiveUntil(point)],
            _ => Vec::new(),
        }
    }

    fn fits(&self, name: &str, view: &Seen, legal: &[&Content], cut: usize) -> Result<(), String> {
        let bytes =
            view.bytes.as_ref().map_err(|error| format!("{name} is listed, and cannot be read: {error}"))?;
        if legal.is_empty() {
            return Err(format!("{name} is listed, which was not there before nor is to be"));
        }
        let mut complaints = Vec::new();
        for content in legal {
            match self.is_content(bytes, content, cut) {
                Ok(()) => return Ok(()),
                Err(error) => complaints.push(error),
            }
        }
        Err(format!("{name}: {}", complaints.join("; nor: ")))
    }

    fn is_content(&self, bytes: &[u8], content: &Content, cut: usize) -> Result<(), String> {
        match content {
            Content::Live => self.history.judge(0, bytes, Moment::Cut(cut)),
            Content::LiveUntil(point) => self.history.judge(0, bytes, Moment::Cut(cut.min(*point))),
            Content::Fixed(wanted) => match first_difference(bytes, wanted) {
                None if bytes.len() == wanted.len() => Ok(()),
                None => Err(format!("it has {} bytes, not {}", bytes.len(), wanted.len())),
                Some(at) => {
                    let (have, want) =
                        (&bytes[at..(at + 8).min(bytes.len())], &wanted[at..(at + 8).min(wanted.len())]);
                    Err(format!("at {at:#x} it holds {have:02x?}, not {want:02x?}"))
                }
            },
        }
    }

    /// Everything is in its old or in its future state, and nothing else is there.
    pub(crate) fn recovered(&self, root: &Path, store: &Arc<Store>, cut: usize) -> Result<(), String> {
        let catalog = store.catalog();
        if let Some(found) = catalog.intents.first() {
            return Err(format!("an intent is left: {:?}", found.intent));
        }
        if let Some(problem) = catalog.problems.first() {
            return Err(format!("a problem is left: {problem:?}"));
        }
        let leaks = self.sound(root)?;
        self.leaks.set((self.leaks.get().0, self.leaks.get().1 + leaks));
        let (chains, views) = seen(store);
        let old = self.is_shape(root, &chains, &views, &self.before, cut);
        let (back, end) = self.ends.get();
        if old.is_ok() && cut <= self.done {
            self.ends.set((back + 1, end));
            return no_strays(root);
        }
        let new = self.is_shape(root, &chains, &views, &self.after, cut);
        match (old, new) {
            (_, Ok(())) => {
                self.ends.set((back, end + 1));
                no_strays(root)
            }
            (Ok(()), Err(new)) => Err(format!("it was done before the crash, and is not: {new}")),
            (Err(old), Err(new)) => Err(format!("it is not as before: {old}\nnor as after: {new}")),
        }
    }

    fn is_shape(
        &self,
        root: &Path,
        chains: &Chains,
        views: &Views<Seen>,
        shape: &Shape,
        cut: usize,
    ) -> Result<(), String> {
        let (have, want) = (files(root), &shape.files);
        if have != *want {
            return Err(format!("its files are {have:?}, not {want:?}"));
        }
        if *chains != shape.chains {
            return Err(format!("its chains are {chains:?}, not {:?}", shape.chains));
        }
        let keys = |names: &mut dyn Iterator<Item = &String>| names.cloned().collect::<Vec<_>>();
        let (have, want) = (keys(&mut views.keys()), keys(&mut shape.views.keys()));
        if have != want {
            return Err(format!("its views are {have:?}, not {want:?}"));
        }
        shape.views.iter().try_for_each(|(name, content)| {
            let frozen = self.frozen(name);
            let legal: Vec<&Content> = std::iter::once(content).chain(&frozen).collect();
            self.fits(name, &views[name], &legal, cut)
        })
    }

    /// chainfs' checker finds no corruption in any image; returns the number of leaked clusters.
    fn sound(&self, root: &Path) -> Result<u64, String> {
        let mut leaks = 0;
        for name in files(root).iter().filter(|name| is_qcow2(name)) {
            let pages = Pages::load(root.join(name));
            let report = check(&pages, name).map_err(|error| format!("checking {name}: {error}"))?;
            // A cluster counted once more than it is used is written in place, and has no other user. One
            // that is counted once and not flagged is copied before it is written.
            let is_excused = |finding: &&String| {
                finding.contains("OFLAG_COPIED")
                    && if finding.contains("refcount=1") { self.may_own } else { self.may_share }
            };
            let excused = report.findings.iter().filter(is_excused).count() as u64;
            if report.corruptions > excused || report.check_errors > 0 {
                return Err(format!(
                    "{name}: {}",
                    report.findings[..report.findings.len().min(6)].join("\n  ")
                ));
            }
            leaks += report.leaks;
        }
        Ok(leaks)
    }

    /// The same by QEMU.
    pub(crate) fn ask_qemu(&self, root: &Path, cut: usize) -> Result<(), String> {
        self.by_qemu.set(self.by_qemu.get() + 1);
        let names = files(root);
        for file in names.iter().filter(|name| is_qcow2(name) && !self.may_share && !self.may_own) {
            checked_by_qemu(root, file)?;
        }
        let as_it_is = |shape: &Shape| {
            if shape.files != names {
                return Err(format!("other files than {:?}", shape.files));
            }
            shape.views.iter().try_for_each(|(name, content)| {
                let bytes = by_qemu(root, name, root.parent().expect("a scratch directory"))?;
                let is_frozen =
                    self.frozen(name).iter().any(|frozen| self.is_content(&bytes, frozen, cut).is_ok());
                let judged = if is_frozen { Ok(()) } else { self.is_content(&bytes, content, cut) };
                judged.map_err(|error| format!("{name}, as QEMU reads it: {error}"))
            })
        };
        as_it_is(&self.after).or_else(|new| {
            as_it_is(&self.before).map_err(|old| format!("QEMU: not as before: {old}\nnor as after: {new}"))
        })
    }
}

/// Nothing of a command is left in chainfs' own directory.
fn no_strays(root: &Path) -> Result<(), String> {
    let scene = Scene::load(root);
    let is_kept = |path: &Path| {
        [".chainfs/lock", ".chainfs/frozen.toml", ".chainfs/layout"]
            .iter()
            .any(|kept| path == Path::new(kept))
    };
    let stray = scene.names.keys().find(|path| path.starts_with(".chainfs") && !is_kept(path));
    stray.map_or(Ok(()), |path| Err(format!("{} is left", path.display())))
}
