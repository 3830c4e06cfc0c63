//! Snapshot, commit and pull, interrupted by a crash at any point: every listed view has its bytes, and after
//! the next opening the command is complete or has not happened.

use crate::scenario::run::{EXTENDED, SIZE, SMALL, Scenario, walk};
use crate::scenario::tape::Recorder;
use support::lab::Lab;
use support::sim::is_long;

#[test]
fn a_snapshot_is_there_or_not() {
    Scenario::new("snapshot", "snapshot monday").survives();
    Scenario::new("snapshot 512", "snapshot monday description='before the upgrade'")
        .options(SMALL)
        .survives();
}

#[test]
fn a_snapshot_under_another_file_is_there_or_not() {
    Scenario::new("snapshot file", "snapshot monday file=other.qcow2")
        .options(EXTENDED)
        .becomes("other.qcow2")
        .survives();
}

#[test]
fn a_snapshot_of_a_raw_leaf_is_there_or_not() {
    let plain = |lab: &Lab| lab.store.raw("plain.raw", SIZE, 9);
    Scenario {
        prepare: plain,
        chain: "plain",
        live: ("plain.raw", "plain.qcow2"),
        active: &["web.qcow2"],
        ..Scenario::new("snapshot raw", "snapshot first")
    }
    .survives();
}

#[test]
fn an_internal_snapshot_is_there_or_not() {
    Scenario::new("snapshot internal", "snapshot monday internal").options(SMALL).survives();
}

#[test]
fn two_chains_have_a_snapshot_or_neither() {
    let second = |lab: &Lab| {
        lab.store.dir("more");
        lab.store.create("more/data.qcow2", SIZE, "");
        lab.store.scribble("more/data.qcow2", "qcow2", 31);
    };
    Scenario {
        prepare: second,
        chain: "",
        active: &["more/data.qcow2"],
        ..Scenario::new("snapshot two", "snapshot monday chains=web,more/data")
    }
    .survives();
}

#[test]
fn a_commit_down_to_a_qcow2_base_is_done_or_not() {
    Scenario::new("commit all", "commit top=sn3 base=base").options(SMALL).survives();
    Scenario::new("commit two", "commit top=sn2 base=base").survives();
    Scenario::new("commit one", "commit top=sn2 base=sn1").options(EXTENDED).survives();
}

#[test]
// C3, J2
fn a_commit_down_to_a_raw_base_is_done_or_not() {
    Scenario::new("commit raw", "commit top=sn2 base=base").raw_base().survives();
}

#[test]
fn a_commit_between_disks_of_other_sizes_is_done_or_not() {
    let (small, large) = (SIZE / 2, SIZE);
    Scenario::new("commit grows", "commit top=sn3 base=base")
        .sizes([small, large, large, large, large])
        .survives();
    Scenario::new("commit shorter", "commit top=sn3 base=base")
        .sizes([large, small, small, small, large])
        .survives();
}

#[test]
fn a_commit_that_keeps_its_top_is_done_or_not() {
    Scenario::new("commit keep", "commit top=sn3 base=base keep").survives();
    Scenario::new("commit keep raw", "commit top=sn3 base=base keep").raw_base().survives();
}

#[test]
fn all_overlays_of_a_merged_layer_are_rebased_or_none() {
    let clone = |lab: &Lab| {
        lab.store.overlay("clone.qcow2", "sn2.qcow2", "qcow2", "");
        lab.store.scribble("clone.qcow2", "qcow2", 77);
    };
    Scenario {
        prepare: clone,
        active: &["clone.qcow2"],
        ..Scenario::new("commit children", "commit top=sn2 base=base")
    }
    .survives();
}

#[test]
fn an_active_commit_is_done_or_not() {
    Scenario::new("fall", "commit").options(SMALL).survives();
    Scenario::new("fall far", "commit base=base").survives();
    Scenario::new("fall raw", "commit base=base").raw_base().becomes("web.raw").survives();
    let same_stem = |lab: &Lab| {
        std::fs::rename(lab.store.path("base.raw"), lab.store.path("web.raw")).expect("another name");
        lab.store.img(["rebase", "-u", "-b", "web.raw", "-F", "raw", "sn1.qcow2"]);
    };
    Scenario { prepare: same_stem, ..Scenario::new("fall onto its stem", "commit base=web") }
        .raw_base()
        .becomes("web.raw")
        .survives();
}

/// Larger than the pieces in which a disk is moved, so that its guest writes before, in and after them.
#[test]
fn writes_during_a_large_commit_are_kept() {
    let large = [20 << 20; 5];
    Scenario { states: 12, ..Scenario::new("fall large", "commit base=sn3") }.sizes(large).survives();
    Scenario { states: 12, ..Scenario::new("pull large", "pull base=sn2") }.sizes(large).survives();
}

#[test]
fn a_pull_is_done_or_not() {
    Scenario::new("pull", "pull").options(SMALL).survives();
    Scenario::new("pull part", "pull base=sn1").options(EXTENDED).survives();
    Scenario::new("pull raw", "pull base=base").raw_base().survives();
    Scenario::new("pull into", "pull into=sn2").survives();
}

#[test]
fn a_pull_keeps_internal_snapshots() {
    Scenario::new("pull inner", "pull base=base into=sn3").inner(&["sn3"]).survives();
    Scenario::new("pull inner web", "pull").inner(&["web"]).survives();
}

/// A safe rebase of QEMU 10.0.2 writes the header with the new backing file before the tables with the old
/// one's data: in between, the disk has lost those bytes, and its checker finds no error.
#[test]
fn the_judge_detects_data_lost_by_a_rebase_of_qemu() {
    let scenario = Scenario { active: &["sn3.qcow2"], ..Scenario::new("qemu-img rebase", "") }
        .options("cluster_size=4k");
    let (tape, judge) =
        scenario.record_program(&["qemu-img", "rebase", "-b", "sn1.qcow2", "-F", "qcow2", "web.qcow2"]);
    let tally = walk(&tape, &judge, if is_long() { 400 } else { 110 }, usize::MAX);
    let lost = |failure: &&String| failure.contains("web.qcow2: sector") && !failure.contains("ERROR");
    let count = tally.failures.iter().filter(lost).count();
    println!("qemu-img rebase: {count} of {} states have lost bytes", tally.visited);
    assert!(count > 0, "{} other failures of {}", tally.failures.len(), tally.visited);
    assert!(count < tally.visited, "some states are sound");
}

/// Nothing hides the views that a commit of QEMU invalidates.
#[test]
fn the_judge_detects_views_invalidated_by_a_qemu_commit() {
    let scenario = Scenario::new("qemu-img commit", "");
    let (tape, judge) =
        scenario.record_program(&["qemu-img", "commit", "-q", "-b", "base.qcow2", "web.qcow2"]);
    let tally = walk(&tape, &judge, if is_long() { 200 } else { 45 }, usize::MAX);
    let is_spoilt = |failure: &String| failure.starts_with("before the recovery: base.qcow2: at");
    assert!(tally.failures.iter().any(is_spoilt), "{:?}", tally.failures.first());
}

#[test]
fn the_judge_detects_a_machine_that_ignores_syncs() {
    for scenario in [
        Scenario::new("snapshot", "snapshot monday"),
        Scenario::new("commit", "commit top=sn3 base=base"),
        Scenario::new("fall", "commit"),
        Scenario::new("pull", "pull"),
    ] {
        let (tape, judge) = scenario.record(Recorder::swallowing_syncs);
        let tally = walk(&tape, &judge, 400, 1);
        assert!(!tally.failures.is_empty(), "{}: {} states and no objection", scenario.name, tally.visited);
    }
}
