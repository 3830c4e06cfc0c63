//! A writer, and every crash while it writes: the tape of the simulated machine as a log that
//! [`crate::crash`] cuts.

use std::sync::atomic::{AtomicU64, Ordering};

use chainfs::image::write::WriterOptions;

use super::action::Action;
use super::disk::Event;
use super::guest::Guest;
use super::judge::{Judge, State};
use super::{Machine, Pages, Random, Start, StartImage, SyncRule, is_long, mix, seed};
use crate::crash::{self, CrashLog, Effect, Effort};

/// States of each workload that are judged where not all are.
const STATES: usize = 230;
/// One of so many is shown to QEMU.
const QEMU_ONE_IN: u64 = 50;

/// The result of a run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Changes and syncs on the tape.
    pub events: usize,
    /// States that there could be, of the kinds that are made.
    pub possible: usize,
    /// Different ones judged.
    pub judged: u64,
    pub by_qemu: u64,
    /// The errors of the first bad states.
    pub failures: Vec<String>,
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
        let mut tally = Tally {
            events: tape.iter().filter(|event| !matches!(event, Event::Mark | Event::Flushed)).count(),
            ..Tally::default()
        };
        let log = FileLog { tape, start: &image.files };
        let limit = if is_long() { usize::MAX } else { self.states };
        let seed = seed() ^ self.name.len() as u64;
        let visited = crash::each_state(&log, &effort(limit), seed, |candidate, files| {
            tally.judged += 1;
            let state = State { files, cut: candidate.cut, seed: candidate.seed };
            if let Err(sentence) = judge.judge(&state) {
                // A state that is expected to be bad is not inspected.
                let is_expected = self.sync_rule != SyncRule::Honest;
                let name = self.name.replace(' ', "-");
                let kept = if is_expected { String::new() } else { judge.keep(&name, &state.files) };
                tally
                    .failures
                    .push(format!("{sentence}\nstate: {}\n{kept}", crash::describe(&log, candidate)));
            }
            tally.failures.len() < self.stop_after
        });
        tally.possible = visited.possible;
        tally.by_qemu = judge.by_qemu.get();
        tally
    }
}

/// Adds to the totals of all workloads of this run.
fn count(tally: &Tally) {
    static JUDGED: AtomicU64 = AtomicU64::new(0);
    static BY_QEMU: AtomicU64 = AtomicU64::new(0);
    let judged = JUDGED.fetch_add(tally.judged, Ordering::Relaxed) + tally.judged;
    let by_qemu = BY_QEMU.fetch_add(tally.by_qemu, Ordering::Relaxed) + tally.by_qemu;
    println!("so far: {judged} states, {by_qemu} of them judged by qemu-img too");
}

/// The tape of a machine, and its files before.
struct FileLog<'a> {
    tape: &'a [Event],
    start: &'a [Pages],
}

impl FileLog<'_> {
    fn change(&self, index: usize) -> (usize, &Action) {
        match &self.tape[index] {
            Event::Did { file, action } => (*file, action),
            event => unreachable!("{event:?} is no change"),
        }
    }
}

impl CrashLog for FileLog<'_> {
    type State = Vec<Pages>;

    fn start(&self) -> Vec<Pages> {
        self.start.to_vec()
    }

    fn len(&self) -> usize {
        self.tape.len()
    }

    fn effect(&self, index: usize) -> Effect {
        match &self.tape[index] {
            Event::Did { action, .. } => Effect::Change { can_tear: action.is_tearable() },
            Event::Synced { .. } => Effect::Sync,
            Event::SyncFailed { .. } => Effect::FailedSync,
            Event::Flushed => Effect::Flushed,
            Event::Mark => Effect::Mark,
        }
    }

    fn covers(&self, sync: usize, change: usize) -> bool {
        let (Event::Synced { file } | Event::SyncFailed { file }) = &self.tape[sync] else { return false };
        self.change(change).0 == *file
    }

    fn apply(&self, change: usize, files: &mut Vec<Pages>) {
        let (file, action) = self.change(change);
        action.apply(&mut files[file]);
    }

    fn tear(&self, change: usize, random: &mut Random, files: &mut Vec<Pages>) {
        let (file, action) = self.change(change);
        action.torn(random).iter().for_each(|part| part.apply(&mut files[file]));
    }

    fn hash(&self, files: &Vec<Pages>) -> u64 {
        files.iter().fold(0, |hash, file| mix(hash) ^ file.hash())
    }

    fn describe(&self, index: usize) -> String {
        let (file, action) = self.change(index);
        format!("file {file}: {}", action.describe())
    }
}

/// At most `limit` states of each workload.
fn effort(limit: usize) -> Effort {
    let (width, draws) = if is_long() { (64, 12) } else { (12, 4) };
    Effort { width, draws, pairs: true, tears: 2, at_syncs: false, always_flushed: true, limit }
}

/// Visits the files after crashes, about `limit` of them where there are more, each content once between two
/// flushes that were acknowledged: how many events of the tape had happened, and the files.
pub fn each_state(tape: &[Event], start: &[Pages], limit: usize, mut visit: impl FnMut(usize, Vec<Pages>)) {
    let limit = if is_long() { usize::MAX } else { limit };
    crash::each_state(&FileLog { tape, start }, &effort(limit), seed(), |candidate, files| {
        visit(candidate.cut, files);
        true
    });
}

/// After everything on the tape, some unsynced changes are lost: one such state for each seed.
pub fn random_crash(tape: &[Event], start: &[Pages], seed: u64) -> Vec<Pages> {
    crash::random_state(&FileLog { tape, start }, seed)
}
