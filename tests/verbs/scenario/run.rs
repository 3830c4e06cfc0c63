//! A command, run on a store of its own while a guest writes, and every crash in the course of it.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::ops::{Engine, JobState};
use chainfs::store::Store;
use tempfile::TempDir;

use super::crash::{describe, effort};
use super::guest::Guest;
use super::judge::{Judge, options, recover};
use super::scene::Scene;
use super::shape::{Shape, by_qemu, checked_by_qemu, is_qcow2, pages, seen};
use super::strace;
use super::tape::{Event, Recorder, Tape};
use support::crash::{Candidate, each_state, last_state, state_after};
use support::lab::{Kind, Lab, run};
use support::sim::history::{History, Moment};
use support::sim::{is_long, mix, seed};

/// States of each command that are judged where not all are.
const STATES: usize = 24;
/// Recoveries that are interrupted themselves, and states of each.
const RECOVERIES: (usize, usize) = (4, 5);
/// One state in so many is shown to QEMU.
const QEMU_ONE_IN: u64 = 60;
/// The default size of the disks of these tests.
pub(crate) const SIZE: u64 = 512 << 10;

/// Options of images whose clusters are small, or have parts.
pub(crate) const SMALL: &str = "cluster_size=512";
pub(crate) const EXTENDED: &str = "extended_l2=on,cluster_size=16k";

/// A fast directory where there is one.
pub(crate) fn scratch() -> TempDir {
    let builder = |builder: &mut tempfile::Builder<'_, '_>| {
        builder.prefix("chainfs-verbs-");
    };
    let (mut fast, mut any) = (tempfile::Builder::new(), tempfile::Builder::new());
    builder(&mut fast);
    builder(&mut any);
    fast.tempdir_in("/dev/shm").or_else(|_| any.tempdir()).expect("a temporary directory")
}

/// A command to be interrupted.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// The operations on the store before.
    pub(crate) prepare: fn(&Lab),
    /// The chain of the command; empty for the store's own control file.
    pub(crate) chain: &'static str,
    pub(crate) command: &'static str,
    /// The leaf that a guest writes, before and after.
    pub(crate) live: (&'static str, &'static str),
    /// Other leaves that are active, before and after.
    pub(crate) active: &'static [&'static str],
    /// The view that freezes the guest's disk, where the moment is not the test's.
    pub(crate) frozen: Option<&'static str>,
    /// How many states are judged, where not very many are.
    pub(crate) states: usize,
    /// Whether the guest does anything.
    pub(crate) is_busy: bool,
}

/// Its properties, in a word each.
impl Scenario {
    pub(crate) fn kind(self, change: impl FnOnce(Kind) -> Kind) -> Self {
        Self { kind: change(self.kind), ..self }
    }

    pub(crate) fn options(self, options: &'static str) -> Self {
        self.kind(|kind| kind.with(options))
    }

    pub(crate) fn raw_base(self) -> Self {
        self.kind(|kind| Kind { raw_base: true, ..kind })
    }

    pub(crate) fn sizes(self, sizes: [u64; 5]) -> Self {
        self.kind(|kind| Kind { sizes, ..kind })
    }

    pub(crate) fn inner(self, inner: &'static [&'static str]) -> Self {
        self.kind(|kind| Kind { inner, ..kind })
    }

    pub(crate) fn becomes(self, leaf: &'static str) -> Self {
        Self { live: (self.live.0, leaf), ..self }
    }
}

impl Scenario {
    pub(crate) fn new(name: &'static str, command: &'static str) -> Self {
        let kind = Kind { sizes: [SIZE; 5], ..Kind::PLAIN };
        let live = ("web.qcow2", "web.qcow2");
        Self {
            name,
            kind,
            prepare: |_| {},
            chain: "web",
            command,
            live,
            active: &[],
            frozen: None,
            states: STATES,
            is_busy: true,
        }
    }

    /// Makes the store, in a directory of its own.
    pub(crate) fn make(&self) -> (TempDir, PathBuf) {
        let lab = Lab::new(self.kind);
        (self.prepare)(&lab);
        let place = scratch();
        let root = place.path().join("store");
        fs::create_dir(&root).expect("a directory");
        Scene::load(&lab.store.root()).save(&root);
        (place, root)
    }

    /// The guest's disk at first, by chainfs' own read path.
    pub(crate) fn initial(&self, start: &Scene) -> Vec<u8> {
        let place = scratch();
        start.save(place.path());
        let store = Store::open(place.path(), options(true)).expect("a store");
        let (_, mut views) = seen(&store);
        views.remove(self.live.0).expect("its view").bytes.expect("its bytes")
    }

    /// The views before.
    pub(crate) fn before(&self, root: &Path, scratch: &Path) -> Shape {
        let active: Vec<&str> = self.active.iter().copied().chain([self.live.0]).collect();
        Shape::of(root, &active, Some(self.live.0), scratch)
    }

    /// The views when the command is done.
    pub(crate) fn after(&self, root: &Path, scratch: &Path) -> Shape {
        let active: Vec<&str> = self.active.iter().copied().chain([self.live.1]).collect();
        Shape::of(root, &active, Some(self.live.1), scratch)
    }

    /// Runs the command on a recording host; returns the tape, and a judge with the expected views.
    pub(crate) fn record(&self, host: impl FnOnce(&Path) -> Recorder) -> (Tape, Judge) {
        let (place, root) = self.make();
        let before = self.before(&root, place.path());
        let initial = by_qemu(&root, self.live.0, place.path()).expect("the disk");
        let recorder = host(&root);
        let store =
            Store::open_on(&root, options(false), &|directory| recorder.open(directory)).expect("a store");
        let engine = Engine::new(&store);
        let (history, done) = if self.is_busy {
            let mut guest =
                Guest::open(&store, &recorder, self.live.0, &initial, seed() ^ self.name.len() as u64);
            (0..10).for_each(|_| guest.step());
            let done = guest.while_at_it(|| {
                self.command_on(&engine);
                recorder.mark(Event::Mark)
            });
            (0..4).for_each(|_| guest.step());
            (std::mem::take(&mut guest.history), done)
        } else {
            self.command_on(&engine);
            (History::new(pages(&initial), initial.len() as u64), recorder.mark(Event::Mark))
        };
        engine.stop();
        drop((engine, store));
        let after = self.after(&root, place.path());
        for file in after.files.iter().filter(|file| is_qcow2(file)) {
            checked_by_qemu(&root, file).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        }
        let disk = by_qemu(&root, self.live.1, place.path()).expect("the disk");
        history
            .judge(0, &disk, Moment::Now)
            .unwrap_or_else(|error| panic!("{}: without a crash: {error}", self.name));
        let tape = recorder.tape();
        (tape, self.judge(before, after, history, done))
    }

    /// Whether the interrupted command leaves an intent that is resumed.
    fn has_intent(&self) -> bool {
        let is_inner = self.command.contains(" internal")
            || self.command.contains("delete active@")
            || self.command.contains("delete sn2@");
        let is_applied = self.command.starts_with("revert to=active@");
        let is_one_step = self.command.contains("unsafe")
            || (self.command.starts_with("clone") && !self.command.contains('@'));
        !is_inner && !is_applied && !is_one_step
    }

    fn judge(&self, before: Shape, after: Shape, history: History, done: usize) -> Judge {
        Judge {
            before,
            frozen: None,
            after,
            history,
            done,
            may_share: self.command.contains("internal"),
            may_own: self.command.contains('@'),
            qemu_one_in: QEMU_ONE_IN,
            by_qemu: Cell::default(),
            leaks: Cell::default(),
            ends: Cell::default(),
            resumed: Cell::default(),
        }
    }

    /// Runs another program on the store, instead of the command.
    pub(crate) fn record_program(&self, program: &[&str]) -> (Tape, Judge) {
        let (place, root) = self.make();
        let before = self.before(&root, place.path());
        let initial = by_qemu(&root, self.live.0, place.path()).expect("the disk");
        let tape = strace::record(&root, program, &place.path().join("log"));
        let history = History::new(pages(&initial), initial.len() as u64);
        let judge = self.judge(before, self.after(&root, place.path()), history, usize::MAX);
        (tape, judge)
    }

    fn command_on(&self, engine: &Arc<Engine>) {
        let status =
            run(engine, self.chain, self.command).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        assert_eq!(status.state, JobState::Done, "{}: {:?}", self.name, status.error);
    }

    /// Runs it, crashes it everywhere, crashes some of the recoveries, and panics with the first bad states.
    pub(crate) fn survives(&self) {
        let (tape, judge) = self.record(|root| Recorder::new(root, true));
        let tally = walk(&tape, &judge, if is_long() { 60 * self.states } else { self.states }, 3);
        let mut failures = tally.failures;
        if failures.is_empty() && self.has_intent() {
            failures.extend(judge_both_ways(&tape, &judge));
        }
        let mut recoveries = 0;
        if failures.is_empty() {
            let (count, states) = if is_long() { (60, 60) } else { RECOVERIES };
            let count = (count * self.states / STATES).max(1);
            let mut bad = |sentence: String| failures.push(sentence);
            recoveries = cut_recoveries(&tape, &judge, count, states, &mut bad);
        }
        let (back, end) = judge.ends.get();
        let (own, copied) = judge.resumed.get();
        println!(
            "{}: {} events, {} of {} states and {recoveries} of recoveries judged ({} by QEMU); {own} were \
                taken up and \
             {copied} as copies; {back} went back, {end} to the end; clusters leaked {:?}",
            self.name,
            tape.events.len(),
            tally.visited,
            tally.possible,
            judge.by_qemu.get(),
            judge.leaks.get(),
        );
        assert!(
            failures.is_empty(),
            "{}: {} bad states:\n{}",
            self.name,
            failures.len(),
            failures.join("\n---\n")
        );
        assert!(end > 0, "{}: no state led to its end", self.name);
        let is_taken_up = own > 0 && copied > 0;
        assert_eq!(is_taken_up, self.has_intent(), "{}: {own} and {copied} states were taken up", self.name);
    }
}

/// The result of a walk.
pub(crate) struct Tally {
    pub(crate) possible: usize,
    pub(crate) visited: usize,
    pub(crate) failures: Vec<String>,
}

/// Judges states of a tape, until so many are bad.
pub(crate) fn walk(tape: &Tape, judge: &Judge, limit: usize, stop_after: usize) -> Tally {
    let mut failures = Vec::new();
    let count = each_state(tape, &effort(limit), seed(), |candidate, scene| {
        if let Err(error) = judge_scene(&scene, candidate, judge) {
            failures.push(format!("{error}\nstate: {}\n", describe(tape, candidate)));
        }
        failures.len() < stop_after
    });
    // Of few states none may be one at the end.
    let (candidate, scene) = last_state(tape);
    if failures.is_empty()
        && let Err(error) = judge_scene(&scene, &candidate, judge)
    {
        failures.push(format!("{error}\nnothing was lost\n"));
    }
    Tally { possible: count.possible, visited: count.visited + 1, failures }
}

fn judge_scene(scene: &Scene, candidate: &Candidate, judge: &Judge) -> Result<(), String> {
    let place = scratch();
    let root = place.path().join("store");
    fs::create_dir(&root).expect("a directory");
    // Every other time it is resumed in a copy of the store.
    let (own, copied) = judge.resumed.get();
    scene.save_as(&root, own > copied);
    judge.judge(&root, candidate.cut, candidate.seed).map_err(|error| {
        // For any error, QEMU's message on it helps.
        let theirs = judge.ask_qemu(&root, candidate.cut).err();
        let kept = std::env::var_os("CHAINFS_KEEP").map(|kept| {
            let kept = Path::new(&kept).join(format!("{:x}", mix(candidate.seed)));
            fs::create_dir_all(&kept).expect("a directory to keep it in");
            scene.save(&kept);
            format!("\nkept in {}", kept.display())
        });
        format!(
            "{error}{}{}",
            theirs.map_or_else(String::new, |said| format!("\n{said}")),
            kept.unwrap_or_default()
        )
    })
}

/// Judges states with an intent until one was resumed in the store itself and one in a copy: the visited
/// states may have had none. Returns what is bad.
fn judge_both_ways(tape: &Tape, judge: &Judge) -> Option<String> {
    for cut in 0..=tape.events.len() {
        let (own, copied) = judge.resumed.get();
        if own > 0 && copied > 0 {
            break;
        }
        let (candidate, scene) = state_after(tape, cut);
        if has_intent(&scene)
            && let Err(error) = judge_scene(&scene, &candidate, judge)
        {
            return Some(format!("{error}\nafter {cut} events, of which none was lost\n"));
        }
    }
    None
}

/// Whether there is something to resume.
fn has_intent(scene: &Scene) -> bool {
    scene.names.keys().any(|path| {
        path.starts_with(".chainfs/intents") && path.extension().is_some_and(|extension| extension == "toml")
    })
}

/// Cuts off recoveries: from `count` states of the tape, `limit` states of each.
fn cut_recoveries(
    tape: &Tape,
    judge: &Judge,
    count: usize,
    limit: usize,
    bad: &mut dyn FnMut(String),
) -> usize {
    let mut scenes = Vec::new();
    // Only where there is something to resume.
    each_state(tape, &effort(12 * count), seed() ^ 1, |candidate, scene| {
        if has_intent(&scene) {
            scenes.push((*candidate, scene));
        }
        true
    });
    let mut visited = 0;
    let step = scenes.len().div_ceil(count).max(1);
    for (candidate, scene) in scenes.into_iter().step_by(step) {
        let place = scratch();
        let root = place.path().join("store");
        fs::create_dir(&root).expect("a directory");
        scene.save(&root);
        let recorder = Recorder::new(&root, false);
        if let Err(error) = recover(&root, &|directory| recorder.open(directory)) {
            bad(format!("{error}\nstate: {}", describe(tape, &candidate)));
            break;
        }
        let again = recorder.tape();
        let mut is_bad = false;
        visited += each_state(&again, &effort(limit), candidate.seed, |second, scene| {
            let moment = Candidate { cut: candidate.cut, ..*second };
            if let Err(error) = judge_scene(&scene, &moment, judge) {
                is_bad = true;
                bad(format!(
                    "{error}\na recovery cut off: {}\nof the state: {}",
                    describe(&again, second),
                    describe(tape, &candidate)
                ));
            }
            !is_bad
        })
        .visited;
        if is_bad {
            break;
        }
    }
    visited
}
