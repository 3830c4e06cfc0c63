//! Every state in which a crash can leave the changes of a log.
//!
//! The log is cut at each point. Of the changes that no sync covers there, none has survived, or all, all but
//! one, one alone, two, some, or one in part without the others, there or randomly. The log itself knows what
//! it changes (files in memory, a directory with names): it implements [`CrashLog`].
//!
//! Each state is visited once. A state without the newest change was there at an earlier cut, so only those
//! with it are made; when a flush is acknowledged, all are visited again, because more is promised then.

use std::collections::HashSet;

use crate::sim::{Random, mix};

/// The meaning of a log's event for a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Changes something; with `can_tear`, it can be there in part.
    Change { can_tear: bool },
    /// Makes the changes durable that it covers.
    Sync,
    /// The changes that it covers may be lost, and no later sync makes them durable.
    FailedSync,
    /// A flush was acknowledged.
    Flushed,
    /// Something began or ended.
    Mark,
}

/// A log of changes.
pub trait CrashLog {
    /// The target of the changes.
    type State: Clone;

    /// The state before the first event, which is durable.
    fn start(&self) -> Self::State;
    /// The number of events.
    fn len(&self) -> usize;
    fn effect(&self, index: usize) -> Effect;
    /// Whether the sync covers the change.
    fn covers(&self, sync: usize, change: usize) -> bool;
    fn apply(&self, change: usize, state: &mut Self::State);
    /// Applies a part of a change that can be torn.
    fn tear(&self, change: usize, random: &mut Random, state: &mut Self::State);
    /// Equal for equal states.
    fn hash(&self, state: &Self::State) -> u64;
    fn describe(&self, index: usize) -> String;

    /// Removes changes that depend on a lost one.
    fn settle(&self, _state: &mut Self::State) {}

    /// Whether cuts here deserve more states than others: they get half of them.
    fn is_focus(&self, _cut: usize) -> bool {
        false
    }
}

/// How many states are made, and of which kinds.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Other changes of a cut that are left out, or left alone, one at a time.
    pub width: usize,
    /// States of each cut in which changes survive by chance.
    pub draws: usize,
    /// Whether two changes alone survive.
    pub pairs: bool,
    /// How often the newest change is torn, for each fate of the others.
    pub tears: usize,
    /// Whether states without the newest changes are made at each sync and mark, too.
    pub at_syncs: bool,
    /// Whether a flush is always followed by the state that lost all it could.
    pub always_flushed: bool,
    /// States that are visited, chosen by chance, where there are more.
    pub limit: usize,
}

/// Which of the changes that no sync covers have survived.
#[derive(Clone, Copy, Debug)]
pub enum Choice {
    All,
    None,
    Only(usize),
    Without(usize),
    Pair(usize, usize),
    /// Each with even chances, some of them torn; this one for sure.
    Random(Option<usize>),
    /// This one in part, the others...
    Torn(usize, Others),
}

/// The fate of the changes beside a torn one.
#[derive(Clone, Copy, Debug)]
pub enum Others {
    Lost,
    There,
    Random,
}

/// A state, before it is made.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Events of the log that have happened.
    pub cut: usize,
    pub choice: Choice,
    pub seed: u64,
}

/// How many states there could be of the kinds that are made, and how many different ones were visited.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visited {
    pub possible: usize,
    pub visited: usize,
}

/// Visits states, in the order of the log, until `visit` returns false.
pub fn each_state<L: CrashLog>(
    log: &L,
    effort: &Effort,
    seed: u64,
    mut visit: impl FnMut(&Candidate, L::State) -> bool,
) -> Visited {
    let mut random = Random::new(mix(seed));
    let all = candidates(log, effort, &mut random);
    let mut count = Visited { possible: all.len(), visited: 0 };
    let (mut volatile, mut flushes, mut known) = (Volatile::new(log), 0, HashSet::new());
    for candidate in choose(log, all, effort, &mut random) {
        while volatile.done < candidate.cut {
            flushes += u64::from(log.effect(volatile.done) == Effect::Flushed);
            volatile.step();
        }
        let state = volatile.state(candidate.choice, &mut Random::new(candidate.seed));
        if known.insert(mix(flushes) ^ log.hash(&state)) {
            count.visited += 1;
            if !visit(&candidate, state) {
                break;
            }
        }
    }
    count
}

/// The state without losses.
pub fn last_state<L: CrashLog>(log: &L) -> (Candidate, L::State) {
    state_after(log, log.len())
}

/// The state after `cut` changes of which none is lost.
pub fn state_after<L: CrashLog>(log: &L, cut: usize) -> (Candidate, L::State) {
    let candidate = Candidate { cut, choice: Choice::All, seed: 1 };
    (candidate, at(log, &candidate))
}

/// After the whole log, some of the unsynced changes are lost: one such state for each seed.
pub fn random_state<L: CrashLog>(log: &L, seed: u64) -> L::State {
    let choice = match seed % 4 {
        0 => Choice::All,
        1 => Choice::None,
        _ => Choice::Random(None),
    };
    at(log, &Candidate { cut: log.len(), choice, seed: mix(seed) })
}

fn at<L: CrashLog>(log: &L, candidate: &Candidate) -> L::State {
    let mut volatile = Volatile::new(log);
    (0..candidate.cut).for_each(|_| volatile.step());
    volatile.state(candidate.choice, &mut Random::new(candidate.seed))
}

/// The candidate, and the newest changes that no sync covers there.
pub fn describe<L: CrashLog>(log: &L, candidate: &Candidate) -> String {
    let mut volatile = Volatile::new(log);
    (0..candidate.cut).for_each(|_| volatile.step());
    let mut lines = vec![format!("{candidate:?} of {} events; not synced there:", log.len())];
    let from = volatile.changes.len().saturating_sub(40);
    lines.extend(volatile.changes[from..].iter().map(|index| format!("  {index}: {}", log.describe(*index))));
    lines.join("\n")
}

/// All states worth making, in the order of the log.
fn candidates<L: CrashLog>(log: &L, effort: &Effort, random: &mut Random) -> Vec<Candidate> {
    let mut found = Vec::new();
    let mut pending: Vec<usize> = Vec::new();
    for index in 0..log.len() {
        let mut push = |choice: Choice, random: &mut Random| {
            found.push(Candidate { cut: index + 1, choice, seed: random.next() });
        };
        let effect = log.effect(index);
        match effect {
            Effect::Change { can_tear } => {
                let others = pending.clone();
                pending.push(index);
                push(Choice::All, random);
                if !others.is_empty() {
                    push(Choice::Only(index), random);
                }
                for other in some_of(&others, effort.width, random) {
                    push(Choice::Without(other), random);
                    if effort.pairs {
                        push(Choice::Pair(other, index), random);
                    }
                }
                for _ in 0..if others.len() > 1 { effort.draws } else { 0 } {
                    push(Choice::Random(Some(index)), random);
                }
                for _ in 0..if can_tear { effort.tears } else { 0 } {
                    push(Choice::Torn(index, Others::There), random);
                    if !others.is_empty() {
                        push(Choice::Torn(index, Others::Lost), random);
                        push(Choice::Torn(index, Others::Random), random);
                    }
                }
            }
            Effect::Flushed => {
                push(Choice::None, random);
                push(Choice::All, random);
                for one in some_of(&pending, effort.width, random) {
                    push(Choice::Without(one), random);
                    push(Choice::Only(one), random);
                }
                for _ in 0..if pending.len() > 1 { effort.draws } else { 0 } {
                    push(Choice::Random(None), random);
                }
            }
            Effect::Sync | Effect::FailedSync | Effect::Mark => {
                if effect != Effect::Mark {
                    pending.retain(|change| !log.covers(index, *change));
                }
                if effort.at_syncs {
                    push(Choice::None, random);
                    for one in some_of(&pending, 2, random) {
                        push(Choice::Only(one), random);
                    }
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

/// As many as may be visited, by chance: half of them where the log has its focus, if it has one.
fn choose<L: CrashLog>(log: &L, all: Vec<Candidate>, effort: &Effort, random: &mut Random) -> Vec<Candidate> {
    let limit = effort.limit;
    if all.len() <= limit {
        return all;
    }
    let is_near: Vec<bool> = (0..=log.len()).map(|cut| log.is_focus(cut)).collect();
    let near = all.iter().filter(|candidate| is_near[candidate.cut]).count();
    let far = all.len() - near;
    let wanted = (limit / 2).min(near).max(limit.saturating_sub(far).min(near));
    let mut kept = all;
    kept.retain(|candidate| {
        let (count, wanted) = if is_near[candidate.cut] { (near, wanted) } else { (far, limit - wanted) };
        let is_flushed = effort.always_flushed
            && matches!(candidate.choice, Choice::None)
            && log.effect(candidate.cut - 1) == Effect::Flushed;
        is_flushed || random.below(count.max(1)) < wanted
    });
    kept
}

/// The changes that a crash cannot lose any more, and those that it can.
struct Volatile<'a, L: CrashLog> {
    log: &'a L,
    /// Events that have happened.
    done: usize,
    durable: L::State,
    live: L::State,
    /// Those whose sync has failed: the kernel takes them for clean and never writes them.
    changes: Vec<usize>,
    /// Those whose sync has failed: the kernel takes them for clean and writes them no more.
    doomed: HashSet<usize>,
}

impl<'a, L: CrashLog> Volatile<'a, L> {
    fn new(log: &'a L) -> Self {
        let start = log.start();
        Self {
            log,
            done: 0,
            durable: start.clone(),
            live: start,
            changes: Vec::new(),
            doomed: HashSet::new(),
        }
    }

    /// The next event happens.
    fn step(&mut self) {
        let (log, index) = (self.log, self.done);
        self.done += 1;
        match log.effect(index) {
            Effect::Change { .. } => {
                log.apply(index, &mut self.live);
                self.changes.push(index);
            }
            Effect::Sync => {
                let (durable, doomed) = (&mut self.durable, &self.doomed);
                self.changes.retain(|change| {
                    let is_covered = log.covers(index, *change);
                    // After a failed sync, the next one does not cover earlier changes.
                    if is_covered && !doomed.contains(change) {
                        log.apply(*change, durable);
                    }
                    !is_covered
                });
            }
            Effect::FailedSync => {
                self.doomed.extend(self.changes.iter().filter(|change| log.covers(index, **change)));
            }
            Effect::Flushed | Effect::Mark => {}
        }
    }

    fn state(&self, choice: Choice, random: &mut Random) -> L::State {
        if matches!(choice, Choice::All) {
            return self.live.clone();
        }
        let mut state = self.durable.clone();
        for index in &self.changes {
            match fate(choice, *index, random) {
                Fate::Lost => {}
                Fate::Torn if matches!(self.log.effect(*index), Effect::Change { can_tear: true }) => {
                    self.log.tear(*index, random, &mut state);
                }
                // A change that cannot be torn is applied in one step, or not at all.
                Fate::There | Fate::Torn => self.log.apply(*index, &mut state),
            }
        }
        self.log.settle(&mut state);
        state
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
        Choice::Pair(one, other) => there(index == one || index == other),
        Choice::Random(sure) => match random.below(8) {
            0 if sure != Some(index) => Fate::Torn,
            1..=3 if sure != Some(index) => Fate::Lost,
            _ => Fate::There,
        },
        Choice::Torn(one, _) if index == one => Fate::Torn,
        Choice::Torn(_, others) => match others {
            Others::Lost => Fate::Lost,
            Others::There => Fate::There,
            Others::Random => there(random.once_in(2)),
        },
    }
}
