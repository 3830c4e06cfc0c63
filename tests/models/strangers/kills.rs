//! An interrupted command, foreign changes before the store is opened again, and the checks afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use super::checks::is_same_disk;
use super::commands::changed_files;
use super::damage::Damage;
use super::reader::is_raw;
use super::world::{World, is_without};
use support::first_difference;
use support::lab::run;

/// An interrupted command.
pub(super) struct Pending {
    command: String,
    /// Files that may show other bytes now: the allowed bytes of each.
    pub(super) legal: BTreeMap<String, Vec<Vec<u8>>>,
    /// Files that may be gone, or renamed.
    leaving: BTreeSet<String>,
    /// Raw files that it freezes, by their names then; and the name that each has lost, if it had not yet at
    /// the interruption. If another file takes that name, it is no snapshot of the file there.
    freezing: BTreeMap<String, Option<String>>,
}

impl World {
    /// A command is interrupted by a kill; other programs change the store before it is opened again.
    pub(super) fn kill(&mut self) {
        let Some((chain, command, plan)) = self.sensible() else { return };
        let before = self.layers(&chain);
        let text = |path: &PathBuf| path.display().to_string();
        let old = self.disks.clone();
        let above = |file: &str| -> Vec<String> {
            before.iter().take_while(|layer| layer.1 != *file).map(|layer| layer.1.clone()).collect()
        };
        let mut legal: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
        let involved: Vec<String> = before
            .iter()
            .map(|layer| layer.1.clone())
            .chain(plan.removed.iter().map(text))
            .chain(plan.renamed.iter().flat_map(|(from, to)| [text(from), text(to)]))
            .collect();
        let verb = command.split(' ').next().unwrap_or_default().to_owned();
        let is_changing = changed_files(&plan, &before);
        for file in &involved {
            let mut may: Vec<Vec<u8>> = old.get(file).cloned().into_iter().collect();
            let is_renamed = plan.renamed.iter().any(|(from, to)| text(from) == *file || text(to) == *file);
            if is_changing.contains(file) || is_renamed || matches!(verb.as_str(), "revert" | "resize") {
                may.extend(above(file).iter().filter_map(|file| old.get(file).cloned()));
                may.extend(before.first().and_then(|leaf| old.get(&leaf.1)).cloned());
            }
            if verb == "revert" {
                may.extend(before.iter().filter_map(|layer| old.get(&layer.1).cloned()));
            }
            legal.insert(file.clone(), may);
        }
        let mut leaving: BTreeSet<String> =
            plan.removed.iter().map(text).chain(plan.renamed.iter().map(|(from, _)| text(from))).collect();
        if matches!(verb.as_str(), "snapshot" | "revert") {
            leaving.extend(before.first().map(|leaf| leaf.1.clone()));
        }
        let (_, engine, host) = self.store.as_ref().expect("an open store");
        let (engine, host) = (Arc::clone(engine), host.clone());
        // About as many changes as such a command makes.
        let usual = match verb.as_str() {
            "commit" | "delete" => 30,
            "clone" | "resize" => 8,
            "rebase" => 18,
            _ => 24,
        };
        let (calls, what) = if self.rng.below(2) == 0 {
            let calls = self.rng.below(usual);
            host.dies_after(calls);
            (calls, "changes")
        } else {
            let calls = self.rng.below(9);
            host.dies_after_names(calls);
            (calls, "names")
        };
        let status = run(&engine, &chain, &command);
        let was_killed = host.is_dead();
        self.say(format!("{chain}: {command}: killed after {calls} {what}: {:?}", status.map(|s| s.error)));
        drop(engine);
        self.close();
        if !was_killed {
            host.dies_after(i64::MAX as u64);
            host.dies_after_names(i64::MAX as u64);
        }
        self.tally.killed += u64::from(was_killed);
        let freezing = match verb.as_str() {
            "snapshot" => {
                let inode = |path: &PathBuf| fs::metadata(self.root.join(path)).ok().map(|found| found.ino());
                let renamed = plan.renamed.iter().filter(|(_, to)| is_raw(&text(to)));
                renamed.map(|(from, to)| (text(to), (inode(from) == inode(to)).then(|| text(from)))).collect()
            }
            _ => BTreeMap::new(),
        };
        let mut pending = Pending { command, legal, leaving, freezing };
        // The model does not know which files of the command are complete: other programs leave those alone.
        self.settle_names(&pending);
        self.focus = pending.legal.keys().cloned().collect();
        self.replaced.clear();
        if self.rng.below(3) == 0 {
            self.replace_all();
        }
        for _ in 0..self.rng.below(5) {
            match self.rng.below(12) {
                0..=2 => self.overlay(),
                3 | 4 | 11 => self.replace(),
                5 | 10 => self.protect(),
                6 if !is_without("damage") => self.damage(),
                7 => self.mend(),
                8 => self.spoil_intent(),
                _ => self.copy(),
            }
        }
        self.focus.clear();
        self.reopen_after(&mut pending);
    }

    /// Drops files from the model that an interrupted command has removed, before other programs act.
    pub(super) fn settle_names(&mut self, pending: &Pending) {
        for name in self.names() {
            let present = self.damage.get(&name).and_then(Damage::present_name).unwrap_or(&name).to_owned();
            if !self.root.join(present).exists() {
                if !pending.leaving.contains(&name) {
                    self.fail(&format!("{name} has gone in a command that was cut off"));
                }
                self.disks.remove(&name);
                self.frozen.remove(&name);
            }
        }
    }

    pub(super) fn reopen_after(&mut self, pending: &mut Pending) {
        // A foreign file in place of a file of the command is not the command's.
        pending.legal.retain(|name, _| !self.replaced.contains(name));
        pending.leaving.retain(|name| !self.replaced.contains(name));
        pending.freezing.retain(|name, lost| {
            let is_kept = |name: &String| !self.replaced.contains(name) && self.root.join(name).exists();
            is_kept(name) && lost.as_ref().is_none_or(is_kept)
        });
        let pending = &*pending;
        let by_others: BTreeMap<String, (u64, Vec<u8>)> = self
            .disks
            .iter()
            .filter(|(name, _)| !pending.legal.contains_key(*name))
            .map(|(name, disk)| {
                let inode = fs::metadata(self.root.join(name)).map_or(0, |found| found.ino());
                (name.clone(), (inode, disk.clone()))
            })
            .collect();
        let guarded = self.guarded();
        self.open();
        self.assert_guarded(&guarded, &pending.command);
        let (store, ..) = self.store.as_ref().expect("an open store");
        let catalog = store.catalog();
        let is_left = !catalog.intents.is_empty() || !catalog.senseless.is_empty();
        if is_left {
            self.tally.hidden += 1;
        } else {
            self.tally.resumed += 1;
        }
        self.say(format!("opened again: {} intents left", catalog.intents.len()));
        for (name, (inode, disk)) in &by_others {
            if self.damage.get(name).is_some_and(|damage| damage.present_name().is_some()) {
                continue;
            }
            match fs::metadata(self.root.join(name)) {
                Ok(found) if found.ino() == *inode || *inode == 0 => {}
                Ok(_) => self
                    .fail(&format!("{name}, which another made, is another file after {}", pending.command)),
                Err(_) => {
                    self.fail(&format!("{name}, which another made, has gone after {}", pending.command))
                }
            }
            if self.reader().disk(name).as_ref() != Some(disk) {
                self.fail(&format!("{name}, of others, shows something else after {}", pending.command));
            }
        }
        // The files of the command have their old or their new bytes, or are hidden.
        self.views(Some(pending));
        if is_left {
            // Hidden views stay hidden; the run ends here.
            for name in pending.legal.keys() {
                self.disks.remove(name);
            }
            self.log.push("hidden".to_owned());
            return;
        }
        for (name, legal) in &pending.legal {
            let present = self.damage.get(name).and_then(Damage::present_name).unwrap_or(name);
            if !self.root.join(present).exists() {
                if self.disks.contains_key(name) && !pending.leaving.contains(name) {
                    self.fail(&format!("{name} has gone after {}", pending.command));
                }
                self.disks.remove(name);
                self.frozen.remove(name);
                continue;
            }
            let Some(disk) = self.reader().disk(name) else {
                self.fail(&format!("{name} cannot be read after {}", pending.command))
            };
            let own = self.disks.get(name).cloned();
            if !legal.iter().chain(own.iter()).any(|wanted| is_same_disk(&disk, wanted)) {
                self.fail(&format!("{name} shows what it never did nor is to, after {}", pending.command));
            }
            if pending.freezing.contains_key(name) {
                self.frozen.insert(name.clone());
            }
            self.disks.insert(name.clone(), disk);
        }
        // The files that the command has made.
        for name in self.unknown_files() {
            if let Some(disk) = self.reader().disk(&name) {
                self.disks.insert(name, disk);
            }
        }
    }

    /// Files that no program may change: by their mode, or because they have another name outside of the
    /// store.
    pub(super) fn guarded(&self) -> BTreeMap<u64, (String, Vec<u8>)> {
        let outside: BTreeSet<u64> = fs::read_dir(self.scratch.path())
            .expect("what is beside the store")
            .map(|entry| entry.expect("an entry").metadata().expect("what it is").ino())
            .collect();
        let mut guarded = BTreeMap::new();
        for name in self.files_present().into_iter().filter(|name| !name.starts_with(".chainfs")) {
            let path = self.root.join(&name);
            let found = fs::metadata(&path).expect("a file of the store");
            if found.permissions().mode() & 0o222 == 0 || outside.contains(&found.ino()) {
                guarded.insert(found.ino(), (name, fs::read(&path).expect("its bytes")));
            }
        }
        guarded
    }

    pub(super) fn assert_guarded(&self, guarded: &BTreeMap<u64, (String, Vec<u8>)>, command: &str) {
        let mut left = guarded.clone();
        for name in self.files_present() {
            let path = self.root.join(&name);
            let Some((_, bytes)) = left.remove(&fs::metadata(&path).expect("a file of the store").ino())
            else {
                continue;
            };
            let now = fs::read(&path).expect("its bytes");
            if now != bytes {
                let at = first_difference(&now, &bytes);
                self.fail(&format!("{name} was protected, and {command} changed it, first at {at:?}"));
            }
        }
        if let Some((name, _)) = left.values().next() {
            self.fail(&format!("{name} was protected, and {command} removed it"));
        }
    }
}
