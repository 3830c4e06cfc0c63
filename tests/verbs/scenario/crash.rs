//! A store's directory as a log of changes to files and names, for every crash that can cut it.

use std::path::Path;

use support::crash::{self, Candidate, CrashLog, Effect, Effort};
use support::sim::{Random, is_long};

use super::scene::Scene;
use super::tape::{Event, Tape};

/// At most `limit` states of each command.
pub(crate) fn effort(limit: usize) -> Effort {
    let (width, draws) = if is_long() { (24, 6) } else { (8, 3) };
    Effort { width, draws, pairs: false, tears: 1, at_syncs: true, always_flushed: false, limit }
}

impl CrashLog for Tape {
    type State = Scene;

    fn start(&self) -> Scene {
        let mut scene = self.start.clone();
        scene.files.resize_with(self.inodes.len(), Default::default);
        scene.inodes.clone_from(&self.inodes);
        scene
    }

    fn len(&self) -> usize {
        self.events.len()
    }

    fn effect(&self, index: usize) -> Effect {
        match &self.events[index] {
            Event::Did { action, .. } => Effect::Change { can_tear: action.is_tearable() },
            Event::Named(_) => Effect::Change { can_tear: false },
            Event::Synced { .. } | Event::NamesSynced(_) => Effect::Sync,
            Event::Flushed => Effect::Flushed,
            Event::Mark => Effect::Mark,
        }
    }

    fn covers(&self, sync: usize, change: usize) -> bool {
        match (&self.events[sync], &self.events[change]) {
            (Event::Synced { file }, Event::Did { file: of, .. }) => file == of,
            (Event::NamesSynced(directory), Event::Named(naming)) => naming.directory() == *directory,
            _ => false,
        }
    }

    fn apply(&self, change: usize, scene: &mut Scene) {
        match &self.events[change] {
            Event::Did { file, action } => action.apply(&mut scene.files[*file]),
            Event::Named(naming) => naming.apply(&mut scene.names, &mut scene.directories),
            event => unreachable!("{event:?} is no change"),
        }
    }

    fn tear(&self, change: usize, random: &mut Random, scene: &mut Scene) {
        let Event::Did { file, action } = &self.events[change] else { return self.apply(change, scene) };
        action.torn(random).iter().for_each(|part| part.apply(&mut scene.files[*file]));
    }

    fn hash(&self, scene: &Scene) -> u64 {
        scene.hash()
    }

    fn describe(&self, index: usize) -> String {
        match &self.events[index] {
            Event::Did { file, action } => format!("file {file}: {}", action.describe()),
            event => format!("{event:?}"),
        }
    }

    /// A lost directory takes its files along.
    fn settle(&self, scene: &mut Scene) {
        let is_there = |path: &Path| {
            let mut above = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
            above.all(|above| scene.directories.contains(above))
        };
        let lost: Vec<_> = scene.names.keys().filter(|path| !is_there(path)).cloned().collect();
        let gone: Vec<_> = scene.directories.iter().filter(|path| !is_there(path)).cloned().collect();
        scene.names.retain(|path, _| !lost.contains(path));
        scene.directories.retain(|path| !gone.contains(path));
    }

    /// Where names change, commands begin, switch and end.
    fn is_focus(&self, cut: usize) -> bool {
        let near = cut.saturating_sub(4)..(cut + 4).min(self.events.len());
        self.events[near].iter().any(|event| matches!(event, Event::Named(_) | Event::NamesSynced(_)))
    }
}

/// A state, the names that led to it, and what was not synced there.
pub(crate) fn describe(tape: &Tape, candidate: &Candidate) -> String {
    let naming = |index: &usize| matches!(tape.events[*index], Event::Named(_) | Event::NamesSynced(_));
    let line = |index: usize| format!("  {index}: {:?}", tape.events[index]);
    let names: Vec<String> = (0..candidate.cut).filter(naming).map(line).collect();
    let files: Vec<String> =
        tape.start.names.iter().map(|(path, file)| format!("{file}={}", path.display())).collect();
    format!(
        "{}\nfiles {}\nnames so far:\n{}",
        crash::describe(tape, candidate),
        files.join(" "),
        names.join("\n")
    )
}
