//! Commands, and how the model follows them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::ops::{JobState, Plan, Request, Verb};

use super::checks::is_same_disk;
use super::reader::is_raw;
use super::world::World;
use support::lab::run;

/// Files whose own bytes a plan changes.
pub(super) fn changed_files(plan: &Plan, before: &[(String, String, bool)]) -> Vec<String> {
    let is_invalid = |name: &str| plan.invalid.iter().any(|invalid| invalid == name.as_bytes());
    let removed: Vec<String> = plan.removed.iter().map(|path| path.display().to_string()).collect();
    let changed = before.iter().filter(|(view, file, _)| is_invalid(view) && !removed.contains(file));
    changed.map(|(_, file, _)| file.clone()).collect()
}

/// Whether a command changes something although the chain stays as it is.
pub(super) fn is_small(request: &Request) -> bool {
    matches!(request.verb(), Verb::Clone | Verb::Resize)
}

impl World {
    pub(super) fn command(&mut self) -> Option<(String, String)> {
        let chains = self.chains();
        let chain = self.pick(&chains)?;
        let layers = self.layers(&chain);
        if layers
            .iter()
            .any(|layer| self.damage.values().any(|damage| damage.present_name() == Some(&layer.1)))
        {
            return None;
        }
        let names: Vec<String> =
            layers.iter().filter(|layer| !layer.2).map(|layer| layer.0.clone()).collect();
        let number = self.next("");
        // Two layers of which the first is above the second; no name for the active one.
        let pair = |world: &mut Self| {
            if layers.len() < 2 || world.rng.below(4) == 0 {
                return None;
            }
            let lower = 1 + world.rng.below(layers.len() as u64 - 1) as usize;
            let upper = &layers[world.rng.below(lower as u64) as usize];
            Some(((!upper.2).then(|| upper.0.clone()), layers[lower].0.clone()))
        };
        let any = |world: &mut Self, word: &str| match world.pick(&names) {
            Some(name) if world.rng.below(3) > 0 => format!(" {word}={name}"),
            _ => String::new(),
        };
        let is_raw_leaf = layers.first().is_some_and(|leaf| is_raw(&leaf.1));
        let command = match self.rng.below(16) {
            0..=2 | 8 if is_raw_leaf => format!("snapshot s{number}"),
            0..=2 => format!("snapshot s{number}"),
            3..=6 => {
                let (top, base) = match pair(self) {
                    Some((top, base)) => {
                        (top.map_or(String::new(), |top| format!(" top={top}")), format!(" base={base}"))
                    }
                    None => (any(self, "top"), any(self, "base")),
                };
                let keep = if self.rng.below(5) == 0 { " keep" } else { "" };
                format!("commit{top}{base}{keep}")
            }
            7..=9 => {
                let (base, into) = match pair(self) {
                    Some((into, base)) => {
                        (format!(" base={base}"), into.map_or(String::new(), |into| format!(" into={into}")))
                    }
                    None => (any(self, "base"), any(self, "into")),
                };
                let delete = if self.rng.below(2) == 0 { " delete" } else { "" };
                format!("pull{base}{into}{delete}")
            }
            10 | 11 => {
                let method = ["", " method=commit", " method=pull"][self.rng.below(3) as usize];
                format!("delete {}{method}", self.pick(&names)?)
            }
            12 => {
                let save = if self.rng.below(2) == 0 { format!(" save=v{number}") } else { String::new() };
                format!("revert to={}{save}", self.pick(&names)?)
            }
            13 => format!("rebase{}{}", any(self, "layer"), {
                let base = any(self, "base");
                if base.is_empty() { " base=none".to_owned() } else { base }
            }),
            14 => format!("clone c{number}{}", any(self, "from")),
            _ => format!("resize +{}", 512 * (1 + self.rng.below(8))),
        };
        Some((chain, command))
    }

    /// The expected effect of a command, if it is possible; `None` if not.
    pub(super) fn plan(&self, chain: &str, command: &str) -> Option<(Request, Plan)> {
        let (_, engine, _) = self.store.as_ref().expect("an open store");
        let request = Request::parse_command(command.as_bytes()).ok()?;
        let plan = engine.plan(Path::new(chain), &request).ok()?;
        Some((request, plan))
    }

    pub(super) fn give(&mut self) {
        let found = match self.rng.below(3) {
            0 => self.command(),
            _ => self.sensible().map(|(chain, command, _)| (chain, command)),
        };
        if let Some((chain, command)) = found {
            self.give_this(&chain, &command);
        }
    }

    pub(super) fn give_this(&mut self, chain: &str, command: &str) {
        let before = self.layers(chain);
        let Some((request, plan)) = self.plan(chain, command) else { return };
        let changed = changed_files(&plan, &before);
        let (_, engine, _) = self.store.as_ref().expect("an open store");
        let engine = Arc::clone(engine);
        let status = run(&engine, chain, command);
        let outcome = match &status {
            Ok(status) if status.state == JobState::Done => Ok(()),
            Ok(status) => Err(status.error.clone().unwrap_or_default()),
            Err(error) => Err(error.to_string()),
        };
        self.say(format!("{chain}: {command}: {outcome:?}"));
        self.await_jobs();
        if outcome.is_err() {
            self.tally.refused += 1;
            return;
        }
        self.tally.done += 1;
        for file in &changed {
            let Ok(found) = fs::metadata(self.root.join(file)) else { continue };
            if found.nlink() > 1 || found.permissions().mode() & 0o222 == 0 {
                self.fail(&format!("{file} was changed, which is protected"));
            }
        }
        self.follow(&request, &plan, &before);
    }

    /// A command that makes sense now, if one is found.
    pub(super) fn sensible(&mut self) -> Option<(String, String, Plan)> {
        for _ in 0..8 {
            let Some((chain, command)) = self.command() else { continue };
            match self.plan(&chain, &command) {
                Some((request, plan))
                    if plan.refusals.is_empty() && (plan.before != plan.after || is_small(&request)) =>
                {
                    return Some((chain, command, plan));
                }
                _ => {}
            }
        }
        None
    }

    /// A command is done: the model follows the plan.
    pub(super) fn follow(&mut self, request: &Request, plan: &Plan, before: &[(String, String, bool)]) {
        let text = |path: &PathBuf| path.display().to_string();
        let old = self.disks.clone();
        let verb = request.verb();
        let file_of = |view: &str| before.iter().find(|layer| layer.0 == view).map(|layer| layer.1.clone());
        // The names first.
        for (from, to) in &plan.renamed {
            let (from, to) = (text(from), text(to));
            if let Some(disk) = self.disks.remove(&from) {
                self.disks.insert(to.clone(), disk);
            }
            if let Some(damage) = self.damage.remove(&from) {
                self.damage.insert(to.clone(), damage);
            }
            let was_frozen = self.frozen.remove(&from) && verb != Verb::Commit && verb != Verb::Delete;
            if was_frozen || verb == Verb::Snapshot && is_raw(&to) {
                self.frozen.insert(to);
            }
        }
        for path in &plan.removed {
            let name = text(path);
            if !self.root.join(&name).exists() {
                self.disks.remove(&name);
                self.frozen.remove(&name);
            }
        }
        let gone: Vec<String> = self
            .names()
            .into_iter()
            .filter(|name| self.damage.get(name).is_none_or(|damage| damage.present_name().is_none()))
            .filter(|name| !self.root.join(name).exists())
            .collect();
        if let Some(name) = gone.first() {
            // A snapshot of a raw leaf gives the disk another file.
            let is_old_leaf = verb == Verb::Snapshot || verb == Verb::Revert;
            if !is_old_leaf || before.first().is_none_or(|leaf| leaf.1 != *name) {
                self.fail(&format!("{name} has gone, of which the plan says nothing: {plan:?}"));
            }
            self.disks.remove(name);
        }
        // What is new.
        for name in self.unknown_files() {
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !old.values().any(|known| is_same_disk(&disk, known)) {
                self.fail(&format!("{name} is new, and shows what nothing showed before"));
            }
            self.disks.insert(name, disk);
        }
        // Views that change on purpose.
        let active = before.first().filter(|leaf| leaf.2).map(|leaf| leaf.1.clone());
        for name in changed_files(plan, before) {
            let top = active.clone().unwrap_or_default();
            let legal: Vec<Vec<u8>> = before
                .iter()
                .take_while(|(_, file, _)| *file != name)
                .filter_map(|(_, file, _)| old.get(file).cloned())
                .chain(old.get(&top).cloned())
                .collect();
            if !self.disks.contains_key(&name) {
                continue;
            }
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !legal.iter().any(|wanted| is_same_disk(&disk, wanted)) {
                self.fail(&format!("{name} shows what no layer above it did"));
            }
            self.disks.insert(name, disk);
        }
        for (from, to) in &plan.renamed {
            let name = text(to);
            if name.ends_with(".invalid") {
                self.disks.remove(&name);
                continue;
            }
            // The file that has taken the name of a layer, except for the extension where it is raw, shows
            // that layer's bytes.
            let is_it = |layer: &&(String, String, bool)| {
                layer.1 != text(from) && Path::new(&layer.1).file_stem() == to.file_stem()
            };
            let layer = before.iter().find(is_it).filter(|_| verb == Verb::Commit || verb == Verb::Delete);
            let Some(wanted) = layer.and_then(|layer| old.get(&layer.1)) else { continue };
            let Some(disk) = self.reader().disk(&name) else { self.fail(&format!("{name} cannot be read")) };
            if !is_same_disk(&disk, wanted) {
                self.fail(&format!("{name} does not show what it did"));
            }
            self.disks.insert(name, disk);
        }
        match request {
            Request::Revert(request) => {
                let to = String::from_utf8_lossy(&request.to).into_owned();
                let leaf = before.first().map(|leaf| leaf.1.clone()).unwrap_or_default();
                let name = if self.root.join(&leaf).exists() { leaf } else { leaf.replace(".raw", ".qcow2") };
                let wanted = file_of(&to).and_then(|file| old.get(&file).cloned());
                let disk = self.reader().disk(&name);
                if let (Some(wanted), Some(disk)) = (wanted, disk) {
                    if !is_same_disk(&disk, &wanted) {
                        self.fail(&format!("{name} does not show what it was reverted to"));
                    }
                    self.disks.insert(name, disk);
                }
            }
            Request::Resize(_) => {
                if let Some(name) = active
                    && let Some(disk) = self.reader().disk(&name)
                {
                    if old.get(&name).is_some_and(|was| !is_same_disk(&disk, was)) {
                        self.fail(&format!("{name} shows something else behind its old end"));
                    }
                    self.disks.insert(name, disk);
                }
            }
            _ => {}
        }
    }
}
