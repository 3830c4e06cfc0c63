//! Every state in which a crash could leave a store's directory: the tape cut at each point, and of the
//! changes to files and names that were not synced there nothing, all, all but one, one alone, some, or a torn part.

use std::collections::HashSet;

use super::scene::Scene;
use super::tape::{Event, Tape};
use support::sim::crash::{is_tearable, torn};
use support::sim::{Random, is_long, mix};

/// Which of the volatile changes have survived.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    All,
    None,
    Only(usize),
    Without(usize),
    /// Each with even chances, a few of them torn; the newest for sure.
    Random(usize),
    /// This one in part, the others there or not.
    Torn(usize, bool),
}

/// A state, before it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// Events of the tape that have happened.
    pub(crate) cut: usize,
    pub(crate) choice: Choice,
    pub(crate) seed: u64,
}

/// Visits `limit` of the states (all, where time is taken), each once between two acknowledged flushes.
/// Returns how many there could be, and how many were visited. The visitor says whether to go on.
pub(crate) fn each_state(
    tape: &Tape,
    limit: usize,
    seed: u64,
    mut visit: impl FnMut(&Candidate, Scene) -> bool,
) -> (usize, usize) {
    let mut random = Random::new(mix(seed));
    let all = candidates(tape, &mut random);
    let possible = all.len();
    let (mut disk, mut done, mut flushes, mut known) = (Volatile::new(tape), 0, 0, HashSet::new());
    let mut visited = 0;
    for candidate in choose(tape, all, limit, &mut random) {
        while done < candidate.cut {
            disk.take(done);
            flushes += u64::from(matches!(tape.events[done], Event::Flushed));
            done += 1;
        }
        let scene = disk.state(candidate.choice, &mut Random::new(candidate.seed));
        if known.insert(mix(flushes) ^ scene.hash()) {
            visited += 1;
            if !visit(&candidate, scene) {
                break;
            }
        }
    }
    (possible, visited)
}

/// The state in which nothing was lost.
pub(crate) fn last_state(tape: &Tape) -> (Candidate, Scene) {
    let mut disk = Volatile::new(tape);
    (0..tape.events.len()).for_each(|index| disk.take(index));
    let candidate = Candidate { cut: tape.events.len(), choice: Choice::All, seed: 1 };
    (candidate, disk.state(candidate.choice, &mut Random::new(candidate.seed)))
}

/// What the tape says of a state, for people.
pub(crate) fn describe(tape: &Tape, candidate: &Candidate) -> String {
    let mut disk = Volatile::new(tape);
    (0..candidate.cut).for_each(|index| disk.take(index));
    let line = |index: &usize| match &tape.events[*index] {
        Event::Did { file, action } => format!("  {index}: file {file}: {}", action.describe()),
        event => format!("  {index}: {event:?}"),
    };
    let from = disk.changes.len().saturating_sub(24);
    let volatile: Vec<String> = disk.changes[from..].iter().map(line).collect();
    let naming = |index: &usize| matches!(tape.events[*index], Event::Named(_) | Event::NamesSynced(_));
    let names: Vec<String> = (0..candidate.cut).filter(naming).map(|index| line(&index)).collect();
    let files: Vec<String> = tape.start.names.iter().map(|(path, file)| format!("{file}={}", path.display())).collect();
    format!(
        "{candidate:?} of {} events; files {}\nnames so far:\n{}\nvolatile there:\n{}",
        tape.events.len(),
        files.join(" "),
        names.join("\n"),
        volatile.join("\n")
    )
}

/// All states worth making, in the order of the tape.
fn candidates(tape: &Tape, random: &mut Random) -> Vec<Candidate> {
    let (width, draws) = if is_long() { (24, 6) } else { (8, 3) };
    let mut found = Vec::new();
    let mut disk = Volatile::new(tape);
    for (index, event) in tape.events.iter().enumerate() {
        disk.take(index);
        let mut push = |choice: Choice, random: &mut Random| {
            found.push(Candidate { cut: index + 1, choice, seed: random.next() });
        };
        let volatile = &disk.changes;
        let others: Vec<usize> = volatile.iter().copied().filter(|change| *change != index).collect();
        match event {
            Event::Did { .. } | Event::Named(_) => {
                push(Choice::All, random);
                if !others.is_empty() {
                    push(Choice::Only(index), random);
                }
                for other in some_of(&others, width, random) {
                    push(Choice::Without(other), random);
                }
                for _ in 0..if others.len() > 1 { draws } else { 0 } {
                    push(Choice::Random(index), random);
                }
                if let Event::Did { action, .. } = event
                    && is_tearable(action)
                {
                    push(Choice::Torn(index, true), random);
                    push(Choice::Torn(index, false), random);
                }
            }
            Event::Flushed | Event::Mark => {
                push(Choice::None, random);
                if matches!(event, Event::Flushed) {
                    push(Choice::All, random);
                    for one in some_of(volatile, 2, random) {
                        push(Choice::Only(one), random);
                    }
                }
            }
            Event::Synced { .. } | Event::NamesSynced(_) => {
                push(Choice::None, random);
                for one in some_of(volatile, 2, random) {
                    push(Choice::Only(one), random);
                }
            }
        }
    }
    found
}

fn some_of(all: &[usize], width: usize, random: &mut Random) -> Vec<usize> {
    if all.len() <= width {
        return all.to_vec();
    }
    (0..width).map(|_| all[random.below(all.len())]).collect()
}

/// As many as may be visited: half of them where names change, which is where commands begin, switch and end.
fn choose(tape: &Tape, all: Vec<Candidate>, limit: usize, random: &mut Random) -> Vec<Candidate> {
    if all.len() <= limit {
        return all;
    }
    let mut is_near = vec![false; tape.events.len() + 1];
    for (index, event) in tape.events.iter().enumerate() {
        if matches!(event, Event::Named(_) | Event::NamesSynced(_)) {
            is_near[index.saturating_sub(3)..(index + 5).min(tape.events.len() + 1)].fill(true);
        }
    }
    let near = all.iter().filter(|candidate| is_near[candidate.cut]).count();
    let share = |of: usize| (limit / 2).min(of).max(limit.saturating_sub(all.len() - of).min(of));
    let (near, far) = ((near, share(near)), (all.len() - near, limit - share(near)));
    let mut kept = all.clone();
    kept.retain(|candidate| {
        let (count, wanted) = if is_near[candidate.cut] { near } else { far };
        random.below(count.max(1)) < wanted
    });
    kept
}

/// The directory, and what of it a crash may lose.
struct Volatile<'a> {
    tape: &'a Tape,
    durable: Scene,
    live: Scene,
    /// Changes that no sync has covered, oldest first.
    changes: Vec<usize>,
}

impl<'a> Volatile<'a> {
    fn new(tape: &'a Tape) -> Self {
        let mut scene = tape.start.clone();
        scene.files.resize_with(tape.inodes.len(), Default::default);
        scene.inodes.clone_from(&tape.inodes);
        Self { tape, durable: scene.clone(), live: scene, changes: Vec::new() }
    }

    /// The event at `index` happens.
    fn take(&mut self, index: usize) {
        let events = &self.tape.events;
        match &events[index] {
            Event::Did { file, action } => {
                action.apply(&mut self.live.files[*file]);
                self.changes.push(index);
            }
            Event::Synced { file } => {
                self.durable.files[*file] = self.live.files[*file].clone();
                self.changes.retain(|change| !matches!(&events[*change], Event::Did { file: of, .. } if of == file));
            }
            Event::Named(naming) => {
                naming.apply(&mut self.live.names, &mut self.live.directories);
                self.changes.push(index);
            }
            Event::NamesSynced(directory) => {
                let durable = &mut self.durable;
                self.changes.retain(|change| match &events[*change] {
                    Event::Named(naming) if naming.directory() == *directory => {
                        naming.apply(&mut durable.names, &mut durable.directories);
                        false
                    }
                    _ => true,
                });
            }
            Event::Mark | Event::Flushed => {}
        }
    }

    fn state(&self, choice: Choice, random: &mut Random) -> Scene {
        let mut scene = self.durable.clone();
        for index in &self.changes {
            let fate = fate(choice, *index, random);
            match (&self.tape.events[*index], fate) {
                (_, Fate::Lost) => {}
                (Event::Did { file, action }, Fate::There) => action.apply(&mut scene.files[*file]),
                (Event::Did { file, action }, Fate::Torn) => {
                    for part in torn(action, random) {
                        part.apply(&mut scene.files[*file]);
                    }
                }
                // In one step, or not at all.
                (Event::Named(naming), Fate::There | Fate::Torn) => {
                    naming.apply(&mut scene.names, &mut scene.directories);
                }
                (event, _) => unreachable!("{event:?} is no change"),
            }
        }
        // A directory that is lost takes along what is in it.
        let is_there = |path: &std::path::Path| {
            let mut above = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
            above.all(|above| scene.directories.contains(above))
        };
        let lost: Vec<_> = scene.names.keys().filter(|path| !is_there(path)).cloned().collect();
        let gone: Vec<_> = scene.directories.iter().filter(|path| !is_there(path)).cloned().collect();
        scene.names.retain(|path, _| !lost.contains(path));
        scene.directories.retain(|path| !gone.contains(path));
        scene
    }
}

enum Fate {
    Lost,
    There,
    Torn,
}

fn fate(choice: Choice, index: usize, random: &mut Random) -> Fate {
    let there = |is_there: bool| if is_there { Fate::There } else { Fate::Lost };
    match choice {
        Choice::All => Fate::There,
        Choice::None => Fate::Lost,
        Choice::Only(one) => there(index == one),
        Choice::Without(one) => there(index != one),
        Choice::Random(sure) => match random.below(8) {
            0 if sure != index => Fate::Torn,
            1..=3 if sure != index => Fate::Lost,
            _ => Fate::There,
        },
        Choice::Torn(one, _) if index == one => Fate::Torn,
        Choice::Torn(_, others) => there(others),
    }
}
