//! Snapshot, commit and pull while a system call fails: the command is done or refused, every listed view has
//! its bytes at once, and the next opening leads to the chain before or after.

use std::fs;
use std::sync::Arc;

use crate::scenario::guest::Guest;
use crate::scenario::judge::{Judge, options, recover};
use crate::scenario::run::{SIZE, Scenario, scratch};
use crate::scenario::scene::Scene;
use crate::scenario::shape::files;
use crate::scenario::tape::{Event, Fault, Recorder};
use chainfs::io::LocalDirectory;
use chainfs::ops::{Engine, JobState};
use chainfs::store::Store;
use rustix::io::Errno;
use support::lab::{Kind, Lab, run};
use support::sim::{is_long, seed};

/// Calls of each command that fail where not all do.
const FAULTS: u64 = 7;

/// The outcome of a command.
#[derive(Default)]
struct Tally {
    done: u64,
    failed: u64,
    /// Disks in use that have failed with it.
    poisoned: u64,
    by_qemu: u64,
}

/// Lets calls of the command fail, one at a time, and all from one on.
fn sweep(scenario: &Scenario) {
    let (tape, judge) = scenario.record(|root| Recorder::new(root, false));
    let calls = {
        let (_place, root) = made(&tape.start);
        let recorder = Recorder::new(&root, false);
        let store =
            Store::open_on(&root, options(false), &|directory| recorder.open(directory)).expect("a store");
        command(scenario, &Engine::new(&store)).expect("the command");
        recorder.calls()
    };
    let step = if is_long() { 1 } else { calls.div_ceil(FAULTS) };
    let first = seed() % step;
    let mut tally = Tally::default();
    for number in (first..calls).step_by(step as usize) {
        for (errno, lasting) in [(Errno::NOSPC, false), (Errno::IO, true)] {
            let fault = Fault { number, errno, lasting };
            if let Err(error) = one(scenario, &tape.start, &judge, fault, &mut tally) {
                panic!("{}: {fault:?} of {calls} calls: {error}", scenario.name);
            }
        }
    }
    println!(
        "{}: {calls} calls, {} times done, {} times failed, {} times with the disk, {} judged by QEMU",
        scenario.name, tally.done, tally.failed, tally.poisoned, tally.by_qemu
    );
    assert!(tally.failed > 0, "{}: no call that failed was noticed", scenario.name);
}

fn made(start: &Scene) -> (tempfile::TempDir, std::path::PathBuf) {
    let place = scratch();
    let root = place.path().join("store");
    fs::create_dir(&root).expect("a directory");
    start.save(&root);
    (place, root)
}

/// Gives the command to an open store.
fn command(scenario: &Scenario, engine: &Arc<Engine>) -> Result<(), String> {
    match run(engine, scenario.chain, scenario.command) {
        Ok(status) if status.state == JobState::Done => Ok(()),
        Ok(status) => Err(status.error.unwrap_or_default()),
        Err(error) => Err(error.to_string()),
    }
}

fn one(
    scenario: &Scenario,
    start: &Scene,
    judge: &Judge,
    fault: Fault,
    tally: &mut Tally,
) -> Result<(), String> {
    let (_place, root) = made(start);
    let recorder = Recorder::new(&root, false);
    let store =
        Store::open_on(&root, options(false), &|directory| recorder.open(directory)).expect("a store");
    let engine = Engine::new(&store);
    let mut guest = Guest::open(&store, &recorder, scenario.live.0, &scenario.initial(start), fault.number);
    (0..6).for_each(|_| guest.step());
    recorder.arm(Some(fault));
    let outcome = command(scenario, &engine);
    recorder.arm(None);
    let end = recorder.mark(Event::Mark);
    let told = |error: String| format!("{error}\nthe command: {outcome:?}");
    // A failed disk reports it; another continues.
    let is_well = (0..8).try_for_each(|_| guest.try_step()).and_then(|()| guest.flush()).is_ok();
    if is_well {
        guest.verify().map_err(|error| told(format!("the disk that is in use: {error}")))?;
    }
    let history = std::mem::take(&mut guest.history);
    let done = if outcome.is_ok() { 0 } else { usize::MAX };
    let judge = Judge { done, ..judge.with(history, scenario.frozen.map(|frozen| (frozen, end))) };
    // At once, to processes that have the store open, and to others.
    store.rescan().map_err(|error| told(error.to_string()))?;
    drop(guest);
    store.rescan().map_err(|error| told(error.to_string()))?;
    judge
        .listed(&store, usize::MAX, judge.live_inode(&root))
        .map_err(|error| told(format!("at once: {error}")))?;
    engine.stop();
    // A disk that fails permanently prevents even the removal of a draft.
    let is_left =
        !store.catalog().intents.is_empty() || files(&root).iter().any(|name| name.contains(".chainfs-"));
    drop((store, engine));
    judge.at_once(&root, usize::MAX).map_err(told)?;
    // If nothing is left to be resumed, it was completed or rolled back.
    if !is_left && fault.number.is_multiple_of(7) {
        tally.by_qemu += 1;
        judge.ask_qemu(&root, usize::MAX).map_err(|error| told(format!("called back: {error}")))?;
    }
    let store = recover(&root, &LocalDirectory::open).map_err(told)?;
    judge.recovered(&root, &store, usize::MAX).map_err(told)?;
    tally.poisoned += u64::from(!is_well);
    match outcome {
        Err(_) => tally.failed += 1,
        Ok(()) => tally.done += 1,
    }
    Ok(())
}

fn quiet(name: &'static str, command: &'static str) -> Scenario {
    Scenario { is_busy: false, ..Scenario::new(name, command) }
}

#[test]
fn a_snapshot_that_fails_is_not_there() {
    sweep(&Scenario { frozen: Some("monday.qcow2"), ..quiet("snapshot", "snapshot monday") });
    let file = quiet("snapshot file", "snapshot monday file=other.qcow2");
    sweep(&Scenario { live: ("web.qcow2", "other.qcow2"), frozen: Some("web.qcow2"), ..file });
    sweep(&Scenario {
        frozen: Some("web.qcow2@monday"),
        ..quiet("snapshot internal", "snapshot monday internal")
    });
}

#[test]
fn a_snapshot_of_a_raw_leaf_that_fails_is_not_there() {
    sweep(&Scenario {
        prepare: |lab: &Lab| lab.store.raw("plain.raw", SIZE, 9),
        chain: "plain",
        live: ("plain.raw", "plain.qcow2"),
        active: &["web.qcow2"],
        frozen: Some("first.raw"),
        ..quiet("snapshot raw", "snapshot first")
    });
}

#[test]
fn a_commit_that_fails_is_rolled_back_or_resumed() {
    sweep(&quiet("commit", "commit top=sn3 base=base"));
    sweep(&quiet("commit keep", "commit top=sn3 base=sn1 keep"));
    let raw = quiet("commit raw", "commit top=sn2 base=base");
    sweep(&Scenario { kind: Kind { raw_base: true, ..raw.kind }, ..raw });
}

#[test]
fn an_active_commit_that_fails_is_rolled_back_or_resumed() {
    sweep(&quiet("fall", "commit base=sn1"));
    let raw = quiet("fall raw", "commit base=base");
    sweep(&Scenario { kind: Kind { raw_base: true, ..raw.kind }, live: ("web.qcow2", "web.raw"), ..raw });
}

#[test]
fn a_pull_that_fails_has_changed_no_view() {
    sweep(&quiet("pull", "pull"));
    sweep(&quiet("pull into", "pull base=base into=sn3"));
}

#[test]
fn a_delete_that_fails_has_changed_no_other_view() {
    sweep(&quiet("delete up", "delete sn2 method=pull"));
    sweep(&quiet("delete down", "delete sn1 method=commit"));
    sweep(&quiet("delete down active", "delete sn3 method=commit"));
    sweep(&quiet("delete internal", "delete sn2@inner").inner(&["sn2"]));
}

/// The disk must be closed for this: the guest has another one.
fn closed(name: &'static str, command: &'static str) -> Scenario {
    let other = |lab: &Lab| {
        lab.store.create("other.qcow2", SIZE, "");
        lab.store.scribble("other.qcow2", "qcow2", 31);
    };
    Scenario {
        prepare: other,
        live: ("other.qcow2", "other.qcow2"),
        active: &["web.qcow2"],
        ..quiet(name, command)
    }
}

#[test]
fn a_revert_that_fails_leaves_the_old_disk_or_the_new_one() {
    sweep(&closed("revert", "revert to=sn1"));
    sweep(&closed("revert save", "revert to=sn2 save=kept"));
    sweep(&closed("revert apply", "revert to=active@inner save=then").inner(&["web"]));
    sweep(&closed("revert copied", "revert to=sn2@inner").inner(&["sn2"]));
}

#[test]
fn a_rebase_a_clone_or_a_resize_that_fails_has_done_nothing_or_all() {
    sweep(&quiet("rebase", "rebase base=none"));
    sweep(&quiet("rebase below", "rebase layer=sn2 base=base"));
    sweep(&Scenario { active: &["new.qcow2"], ..quiet("clone", "clone new from=sn2") });
    sweep(
        &Scenario { active: &["new.qcow2"], ..quiet("clone internal", "clone new from=sn2@inner") }
            .inner(&["sn2"]),
    );
    sweep(&closed("rebase unsafe", "rebase layer=sn2 base=base unsafe drop-layers"));
    sweep(&closed("shrink", "resize 200K shrink"));
}
