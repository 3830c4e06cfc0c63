//! Every state in which a crash could leave the files: the tape cut at each point, and of what was
//! not yet synced there nothing, all, all but one, one alone, some, or a torn part.
//!
//! Each state is judged once. A state that misses the newest change was there at an earlier cut,
//! so that only those with it are made; when a flush is acknowledged, all are looked at anew.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use chainfs::image::write::WriterOptions;

use super::disk::{Action, Event};
use super::guest::Guest;
use super::judge::{Judge, State};
use super::{Machine, Pages, Random, SECTOR, Start, StartImage, SyncRule, is_long, mix, seed};

/// States of each workload that are judged where not all are.
const STATES: usize = 450;
/// One of so many is shown to QEMU.
const QEMU_ONE_IN: u64 = 50;

/// What a run amounted to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Changes and syncs on the tape.
    pub events: usize,
    /// States that there could be, of the kinds that are made.
    pub possible: usize,
    /// Different ones judged.
    pub judged: u64,
    pub by_qemu: u64,
    /// What was wrong with the first bad ones.
    pub failures: Vec<String>,
}

/// Which of the volatile changes have survived.
#[derive(Clone, Copy, Debug)]
enum Choice {
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

#[derive(Clone, Copy, Debug)]
enum Others {
    Lost,
    There,
    Random,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    cut: usize,
    choice: Choice,
    seed: u64,
}

/// Something that writes, and every crash while it does.
pub struct Workload {
    name: &'static str,
    start: Start,
    sync_rule: SyncRule,
    jitter: bool,
    can_punch: bool,
    options: WriterOptions,
    states: usize,
    stop_after: usize,
}

impl Workload {
    pub fn new(name: &'static str, start: Start) -> Self {
        Self {
            name,
            start,
            sync_rule: SyncRule::Honest,
            jitter: false,
            can_punch: true,
            options: WriterOptions::default(),
            states: STATES,
            stop_after: 3,
        }
    }

    /// On a machine that breaks its promises.
    #[must_use]
    pub fn with_syncs(self, sync_rule: SyncRule) -> Self {
        Self { sync_rule, ..self }
    }

    /// With calls of several threads in changing order.
    #[must_use]
    pub fn threaded(self) -> Self {
        Self { jitter: true, ..self }
    }

    /// On a file system without holes.
    #[must_use]
    pub fn without_holes(self) -> Self {
        Self { can_punch: false, ..self }
    }

    /// With so many bytes of tables in memory.
    #[must_use]
    pub fn cache(self, cache: usize) -> Self {
        Self { options: WriterOptions { cache }, ..self }
    }

    /// Judges so many states, where not all are.
    #[must_use]
    pub fn states(self, states: usize) -> Self {
        Self { states, ..self }
    }

    /// Runs it, crashes it everywhere, and panics with the first bad state.
    pub fn survives(self, run: impl FnOnce(&Guest)) {
        let name = self.name;
        let tally = self.tally(run);
        assert!(tally.failures.is_empty(), "{name}: {} bad states; the first:\n{}", tally.failures.len(), {
            tally.failures.join("\n---\n")
        });
    }

    /// Runs it, crashes it everywhere, and counts.
    pub fn tally(self, run: impl FnOnce(&Guest)) -> Tally {
        let image = self.start.load();
        let machine = Machine::new(self.sync_rule, self.jitter, self.can_punch);
        let guest = Guest::new(&machine, &image, self.options);
        run(&guest);
        if self.sync_rule == SyncRule::Honest
            && let Err(sentence) = guest.verify()
        {
            return Tally { failures: vec![format!("without any crash: {sentence}")], ..Tally::default() };
        }
        guest.abandon();
        let tape = machine.tape();
        let history = guest.history();
        let mut judge = Judge::new(&image, &history, self.options);
        judge.qemu_one_in = QEMU_ONE_IN;
        let tally = self.walk(&tape, &image, &judge);
        println!(
            "{}: {} operations, {} events, {} of {} states judged, {} by qemu-img",
            self.name,
            history.len(),
            tally.events,
            tally.judged,
            tally.possible,
            tally.by_qemu
        );
        count(&tally);
        tally
    }

    fn walk(&self, tape: &[Event], image: &StartImage, judge: &Judge<'_>) -> Tally {
        let mut random = Random::new(mix(seed() ^ self.name.len() as u64));
        let all = candidates(tape, image.files.len(), &mut random);
        let mut tally = Tally {
            events: tape.iter().filter(|event| !matches!(event, Event::Mark | Event::Flushed)).count(),
            possible: all.len(),
            ..Tally::default()
        };
        let chosen = choose(all, self.states, &mut random);
        let mut disk = Volatile::new(&image.files);
        let mut seen = HashSet::new();
        let (mut done, mut flushes) = (0, 0);
        for Candidate { cut, choice, seed } in chosen {
            while done < cut {
                disk.take(tape, done);
                flushes += usize::from(matches!(tape[done], Event::Flushed));
                done += 1;
            }
            let files = disk.state(tape, choice, &mut Random::new(seed));
            let hash = files.iter().fold(flushes as u64, |hash, file| mix(hash) ^ file.hash());
            if !seen.insert(hash) {
                continue;
            }
            tally.judged += 1;
            let state = State { files, cut, seed };
            if let Err(sentence) = judge.judge(&state) {
                // What is expected to be bad is nothing to look at.
                let is_expected = self.sync_rule != SyncRule::Honest;
                let name = self.name.replace(' ', "-");
                let kept = if is_expected { String::new() } else { judge.keep(&name, &state.files) };
                let text = format!("{sentence}\nstate: {}\n{kept}", disk.describe(tape, cut, choice));
                tally.failures.push(text);
                if tally.failures.len() == self.stop_after {
                    break;
                }
            }
        }
        tally.by_qemu = judge.by_qemu.get();
        tally
    }
}

/// Adds to what all workloads of this run have judged.
fn count(tally: &Tally) {
    static JUDGED: AtomicU64 = AtomicU64::new(0);
    static BY_QEMU: AtomicU64 = AtomicU64::new(0);
    let judged = JUDGED.fetch_add(tally.judged, Ordering::Relaxed) + tally.judged;
    let by_qemu = BY_QEMU.fetch_add(tally.by_qemu, Ordering::Relaxed) + tally.by_qemu;
    println!("so far: {judged} states, {by_qemu} of them judged by qemu-img too");
}

/// All states worth making, in the order of the tape.
fn candidates(tape: &[Event], files: usize, random: &mut Random) -> Vec<Candidate> {
    let (width, draws) = if is_long() { (64, 12) } else { (12, 4) };
    let mut found = Vec::new();
    let mut volatile: Vec<Vec<usize>> = vec![Vec::new(); files];
    for (index, event) in tape.iter().enumerate() {
        let cut = index + 1;
        let mut push = |choice: Choice, random: &mut Random| {
            found.push(Candidate { cut, choice, seed: random.next() });
        };
        match event {
            Event::Did { file, action } => {
                let others = volatile.concat();
                volatile[*file].push(index);
                push(Choice::All, random);
                if !others.is_empty() {
                    push(Choice::Only(index), random);
                }
                for other in some_of(&others, width, random) {
                    push(Choice::Without(other), random);
                    push(Choice::Pair(other, index), random);
                }
                for _ in 0..if others.len() > 1 { draws } else { 0 } {
                    push(Choice::Random(Some(index)), random);
                }
                if is_tearable(action) {
                    for _ in 0..2 {
                        push(Choice::Torn(index, Others::There), random);
                        if !others.is_empty() {
                            push(Choice::Torn(index, Others::Lost), random);
                            push(Choice::Torn(index, Others::Random), random);
                        }
                    }
                }
            }
            Event::Synced { file } | Event::SyncFailed { file } => volatile[*file].clear(),
            Event::Mark => {}
            Event::Flushed => {
                let all = volatile.concat();
                push(Choice::None, random);
                push(Choice::All, random);
                for one in some_of(&all, width, random) {
                    push(Choice::Without(one), random);
                    push(Choice::Only(one), random);
                }
                for _ in 0..if all.len() > 1 { draws } else { 0 } {
                    push(Choice::Random(None), random);
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

/// As many as may be judged: what is there after a flush always, the others by chance.
fn choose(all: Vec<Candidate>, limit: usize, random: &mut Random) -> Vec<Candidate> {
    if is_long() || all.len() <= limit {
        return all;
    }
    let (len, mut kept) = (all.len(), all);
    kept.retain(|candidate| matches!(candidate.choice, Choice::None) || random.below(len) < limit);
    kept
}

pub fn is_tearable(action: &Action) -> bool {
    match action {
        Action::Write { at, bytes } => at / SECTOR != (at + bytes.len() as u64 - 1) / SECTOR,
        Action::Punch { len, .. } | Action::Zero { len, .. } => *len > SECTOR,
        Action::SetLen(_) | Action::Allocate { .. } => false,
    }
}

/// What may be left of a change that was cut: its first part, its last, or some of its sectors.
/// Sometimes of a write that made the file longer nothing but the length.
pub fn torn(action: &Action, random: &mut Random) -> Vec<Action> {
    let (at, len) = match action {
        Action::Write { at, bytes } => (*at, bytes.len() as u64),
        Action::Punch { at, len } | Action::Zero { at, len } => (*at, *len),
        Action::SetLen(_) | Action::Allocate { .. } => return vec![action.clone()],
    };
    let end = at + len;
    let first_cut = (at / SECTOR + 1) * SECTOR;
    let cuts = end.saturating_sub(first_cut).div_ceil(SECTOR);
    if cuts == 0 {
        return vec![action.clone()];
    }
    let mut a_cut = || first_cut + random.next() % cuts * SECTOR;
    let piece = |from: u64, to: u64| match action {
        Action::Write { bytes, .. } => {
            Action::Write { at: from, bytes: bytes[(from - at) as usize..(to - at) as usize].into() }
        }
        Action::Punch { .. } => Action::Punch { at: from, len: to - from },
        _ => Action::Zero { at: from, len: to - from },
    };
    let mut bounds = vec![at, a_cut(), a_cut(), a_cut(), a_cut(), end];
    bounds.sort_unstable();
    bounds.dedup();
    let some = |keep: u64| {
        let runs = bounds.windows(2).enumerate().filter(|(index, _)| keep >> index & 1 == 1);
        runs.map(|(_, run)| piece(run[0], run[1])).collect()
    };
    match random.below(8) {
        0 | 1 => vec![piece(at, bounds[1])],
        2 | 3 => vec![piece(bounds[1], end)],
        // The length alone, as where a file system adds it before the data: nothing to read but zeroes.
        4 if !matches!(action, Action::Punch { .. }) => vec![Action::Allocate { at, len }],
        _ => some(random.next()),
    }
}

/// The files, and what of them a crash may lose.
struct Volatile {
    durable: Vec<Pages>,
    live: Vec<Pages>,
    /// Changes since the last sync of their file, oldest first.
    changes: Vec<usize>,
    /// Those whose sync has failed: the kernel takes them for clean and writes them no more.
    doomed: HashSet<usize>,
}

impl Volatile {
    fn new(files: &[Pages]) -> Self {
        Self { durable: files.to_vec(), live: files.to_vec(), changes: Vec::new(), doomed: HashSet::new() }
    }

    /// The event at `index` happens.
    fn take(&mut self, tape: &[Event], index: usize) {
        let of = |index: usize| match &tape[index] {
            Event::Did { file, .. } => Some(*file),
            _ => None,
        };
        match &tape[index] {
            Event::Did { file, action } => {
                action.apply(&mut self.live[*file]);
                self.changes.push(index);
            }
            Event::Synced { file } if self.doomed.is_empty() => {
                self.durable[*file] = self.live[*file].clone();
                self.changes.retain(|change| of(*change) != Some(*file));
            }
            // Once a sync has failed, the next one says nothing of what came before.
            Event::Synced { file } => {
                for change in &self.changes {
                    if let Event::Did { file: of, action } = &tape[*change]
                        && of == file
                        && !self.doomed.contains(change)
                    {
                        action.apply(&mut self.durable[*file]);
                    }
                }
                self.changes.retain(|change| of(*change) != Some(*file));
            }
            Event::SyncFailed { file } => {
                self.doomed.extend(self.changes.iter().filter(|change| of(**change) == Some(*file)));
            }
            Event::Mark | Event::Flushed => {}
        }
    }

    fn state(&self, tape: &[Event], choice: Choice, random: &mut Random) -> Vec<Pages> {
        if matches!(choice, Choice::All) {
            return self.live.clone();
        }
        let mut files = self.durable.clone();
        for index in &self.changes {
            let Event::Did { file, action } = &tape[*index] else { unreachable!("changes are changes") };
            match fate(choice, *index, random) {
                Fate::Lost => {}
                Fate::There => action.apply(&mut files[*file]),
                Fate::Torn => torn(action, random).iter().for_each(|part| part.apply(&mut files[*file])),
            }
        }
        files
    }

    fn describe(&self, tape: &[Event], cut: usize, choice: Choice) -> String {
        let mut lines = vec![format!("cut after {cut} events, {choice:?}; volatile there:")];
        for index in self.changes.iter().rev().take(40).rev() {
            if let Event::Did { file, action } = &tape[*index] {
                lines.push(format!("  {index}: file {file}: {}", action.describe()));
            }
        }
        lines.join("\n")
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

/// Visits the files after crashes, `limit` of them where there are more, each content once between two flushes
/// that were acknowledged: how many events of the tape had happened, and the files.
pub fn each_state(tape: &[Event], start: &[Pages], limit: usize, mut visit: impl FnMut(usize, Vec<Pages>)) {
    let mut random = Random::new(mix(seed()));
    let (mut disk, mut done, mut flushes, mut seen) = (Volatile::new(start), 0, 0, HashSet::new());
    let all = candidates(tape, start.len(), &mut random);
    for Candidate { cut, choice, seed } in choose(all, limit, &mut random) {
        while done < cut {
            disk.take(tape, done);
            flushes += u64::from(matches!(tape[done], Event::Flushed));
            done += 1;
        }
        let files = disk.state(tape, choice, &mut Random::new(seed));
        if seen.insert(files.iter().fold(flushes, |hash, file| mix(hash) ^ file.hash())) {
            visit(cut, files);
        }
    }
}

/// After everything on the tape, some of what was not synced is lost: one such state for each seed.
pub fn random_crash(tape: &[Event], start: &[Pages], seed: u64) -> Vec<Pages> {
    let mut disk = Volatile::new(start);
    for index in 0..tape.len() {
        disk.take(tape, index);
    }
    let mut random = Random::new(mix(seed));
    let choice = match seed % 4 {
        0 => Choice::All,
        1 => Choice::None,
        _ => Choice::Random(None),
    };
    disk.state(tape, choice, &mut random)
}
