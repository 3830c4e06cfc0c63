//! Delete, revert, rebase, clone and resize, interrupted by a crash at any point: every listed view has its
//! bytes, and after the next opening the command is complete or has not happened.

use crate::scenario::run::{EXTENDED, SIZE, SMALL, Scenario};
use support::lab::Lab;

/// A command for which the disk has to be closed: the guest is busy with another one.
fn closed(name: &'static str, command: &'static str) -> Scenario {
    let other = |lab: &Lab| {
        lab.store.create("other.qcow2", SIZE, "");
        lab.store.scribble("other.qcow2", "qcow2", 31);
    };
    Scenario {
        prepare: other,
        live: ("other.qcow2", "other.qcow2"),
        active: &["web.qcow2"],
        ..Scenario::new(name, command)
    }
}

fn with_clone(name: &'static str, command: &'static str) -> Scenario {
    let clone = |lab: &Lab| {
        lab.store.overlay("clone.qcow2", "sn2.qcow2", "qcow2", "");
        lab.store.scribble("clone.qcow2", "qcow2", 77);
    };
    Scenario { prepare: clone, active: &["clone.qcow2"], ..Scenario::new(name, command) }
}

#[test]
// C3
fn a_snapshot_is_deleted_by_pull_or_not() {
    Scenario::new("delete up", "delete sn3 method=pull").options(SMALL).survives();
    Scenario::new("delete up below", "delete sn1 method=pull").survives();
    Scenario::new("delete up raw", "delete base method=pull").raw_base().survives();
    Scenario::new("delete up inner", "delete sn2 method=pull").inner(&["sn3"]).survives();
    with_clone("delete up two", "delete sn2").options(EXTENDED).survives();
}

#[test]
fn a_snapshot_is_deleted_by_commit_or_not() {
    Scenario::new("delete down", "delete sn1 method=commit").options(SMALL).survives();
    Scenario::new("delete down below", "delete sn2 method=commit").options(EXTENDED).survives();
    Scenario::new("delete down active", "delete sn3 method=commit").survives();
}

#[test]
fn an_internal_snapshot_is_deleted_or_not() {
    Scenario::new("delete internal", "delete active@inner").inner(&["web"]).survives();
    Scenario::new("delete internal below", "delete sn2@inner").options(SMALL).inner(&["sn2"]).survives();
}

#[test]
fn a_disk_is_reverted_or_not() {
    closed("revert", "revert to=sn2").survives();
    closed("revert save", "revert to=sn1 save=kept").options(SMALL).survives();
    closed("revert internal", "revert to=active@inner").inner(&["web"]).survives();
    closed("revert internal save", "revert to=active@inner save=then")
        .options(SMALL)
        .inner(&["web"])
        .survives();
    closed("revert internal below", "revert to=sn2@inner").inner(&["sn2"]).survives();
}

#[test]
fn a_layer_is_rebased_or_not() {
    let elsewhere = |lab: &Lab| {
        lab.store.create("elsewhere.qcow2", SIZE / 2, "");
        lab.store.scribble("elsewhere.qcow2", "qcow2", 31);
    };
    // It is an active disk until it has an overlay.
    let onto = |name, command| Scenario { prepare: elsewhere, ..Scenario::new(name, command) };
    Scenario { active: &["elsewhere.qcow2"], ..onto("rebase", "rebase base=elsewhere.qcow2") }.survives();
    Scenario {
        active: &["elsewhere.qcow2"],
        ..onto("rebase below", "rebase layer=sn2 base=elsewhere.qcow2")
    }
    .options(SMALL)
    .survives();
    Scenario::new("rebase within", "rebase base=sn1").options(EXTENDED).survives();
    Scenario::new("rebase none", "rebase layer=sn3 base=none").survives();
}

#[test]
fn a_layer_names_another_backing_file_or_not() {
    let renamed = |lab: &Lab| {
        std::fs::copy(lab.store.path("sn1.qcow2"), lab.store.path("same.qcow2")).expect("a copy");
        lab.store.create("other.qcow2", SIZE, "");
        lab.store.scribble("other.qcow2", "qcow2", 31);
    };
    Scenario {
        prepare: renamed,
        active: &["web.qcow2", "same.qcow2"],
        ..closed("rebase unsafe", "rebase layer=sn2 base=same.qcow2 unsafe")
    }
    .survives();
}

#[test]
fn a_clone_is_there_or_not() {
    Scenario { active: &["new.qcow2"], ..Scenario::new("clone", "clone new from=sn2") }.survives();
    Scenario { active: &["new.qcow2"], ..Scenario::new("clone internal", "clone new from=sn2@inner") }
        .options(SMALL)
        .inner(&["sn2"])
        .survives();
}

#[test]
fn a_disk_is_shorter_or_not() {
    closed("shrink", "resize 200K shrink").options(SMALL).survives();
    closed("shrink extended", "resize 333K shrink").options(EXTENDED).survives();
}
