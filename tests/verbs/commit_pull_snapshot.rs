//! Commands on whole chains: QEMU reads the same bytes before and after.

use chainfs::error::ErrorKind;
use chainfs::ops::JobState;
use chainfs::units::are_zero;
use support::lab::{Kind, Lab};
use support::sim::in_turn;

const SIZES: [Kind; 3] = [
    Kind::PLAIN,
    Kind { options: "cluster_size=512", sizes: [1 << 20; 5], ..Kind::PLAIN },
    Kind { options: "extended_l2=on,cluster_size=16k", ..Kind::PLAIN },
];

/// The six cases of a commit below the active layer: top, base, and the layers left above base.
const CASES: [(&str, &str, &[&str]); 6] = [
    ("sn3", "base", &["web.qcow2"]),
    ("sn2", "base", &["web.qcow2", "sn3.qcow2"]),
    ("sn1", "base", &["web.qcow2", "sn3.qcow2", "sn2.qcow2"]),
    ("sn2", "sn1", &["web.qcow2", "sn3.qcow2"]),
    ("sn3", "sn2", &["web.qcow2"]),
    ("sn3", "sn1", &["web.qcow2"]),
];

/// All kinds of chains in the long run, each kind of cluster and of base in the usual one.
fn kinds() -> Vec<Kind> {
    let [plain, small, extended] = SIZES;
    let raw = |kind| Kind { raw_base: true, ..kind };
    let inner = |kind| Kind { inner: &["sn1", "sn3", "web"], ..kind };
    if std::env::var_os("CHAINFS_LONG").is_some() {
        return SIZES.into_iter().flat_map(|kind| [kind, raw(kind), inner(kind), raw(inner(kind))]).collect();
    }
    vec![plain, raw(small), inner(extended)]
}

fn assert_done(lab: &Lab, command: &str) {
    let status = lab.run(command);
    assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
}

#[test]
// C3
fn the_six_cases_of_a_commit_change_no_view_that_is_left() {
    for kind in in_turn(kinds(), 0) {
        for (top, base, left) in CASES {
            let lab = Lab::new(kind);
            let inner = left.iter().filter(|file| kind.inner.iter().any(|layer| lab.file(layer) == **file));
            let inner: Vec<String> = inner.map(|file| format!("{file}@inner")).collect();
            let mut before = lab.contents(left);
            before.extend(lab.contents(&inner.iter().map(String::as_str).collect::<Vec<_>>()));
            let top_content = lab.content(&lab.file(top));
            assert_done(&lab, &format!("commit top={top} base={base} discard-internal"));
            let base = lab.file(base);
            before.insert(base.clone(), top_content);
            let views: Vec<&str> = before.keys().map(String::as_str).collect();
            assert!(before == lab.contents(&views), "{top} into {base}, {}", kind.options);
            lab.assert_clean();
            let chain = lab.chain("web.qcow2");
            assert_eq!(chain[..left.len()], *left, "{top} into {base}");
            assert_eq!(chain[left.len()], base);
            assert_eq!(lab.files().len(), chain.len(), "nothing else is left");
        }
    }
}

#[test]
fn an_active_commit_into_any_base_keeps_the_disk_s_name() {
    for kind in in_turn(kinds(), 1) {
        for base in ["base", "sn1", "sn3"] {
            let lab = Lab::new(kind);
            let before = lab.content("web.qcow2");
            let below: Vec<String> = lab.chain(&lab.file(base))[1..].to_vec();
            assert_done(&lab, &format!("commit base={base} discard-internal"));
            let name = format!("web.{}", lab.format(base));
            assert!(before == lab.content(&name), "{base}, {}", kind.options);
            lab.assert_clean();
            let expected: Vec<String> = [name].into_iter().chain(below).collect();
            if lab.format(base) == "qcow2" {
                assert_eq!(lab.chain(&expected[0]), expected);
            }
            assert_eq!(lab.files().len(), expected.len(), "{:?}", lab.files());
        }
    }
}

#[test]
// C3
fn pulls_change_no_view() {
    let inner = Kind { inner: &["sn3", "web"], ..Kind::PLAIN };
    let cases = [
        ("pull", "web", None),
        ("pull base=sn1", "web", Some("sn1")),
        ("pull base=base into=sn3", "sn3", Some("base")),
        ("pull into=sn2", "sn2", None),
    ];
    for kind in SIZES.into_iter().chain([inner, Kind { raw_base: true, ..inner }]) {
        for (command, into, base) in cases {
            let lab = Lab::new(kind);
            let mut views: Vec<String> = support::lab::LAYERS.iter().map(|layer| lab.file(layer)).collect();
            views.extend(kind.inner.iter().map(|layer| format!("{}@inner", lab.file(layer))));
            let views: Vec<&str> = views.iter().map(String::as_str).collect();
            let before = lab.contents(&views);
            assert_done(&lab, command);
            assert!(before == lab.contents(&views), "{command}, {}", kind.options);
            lab.assert_clean();
            let chain = lab.chain(&lab.file(into));
            assert_eq!(chain.get(1).cloned(), base.map(|base| lab.file(base)), "{command}");
        }
    }
}

#[test]
fn layers_of_different_sizes_merge_correctly() {
    let mib = 1 << 20;
    for sizes in
        [[2 * mib, 4 * mib, 4 * mib, 4 * mib, 4 * mib], [4 * mib, 2 * mib, 3 * mib, 3 * mib, 5 * mib]]
    {
        for raw_base in [false, true] {
            let kind = Kind { raw_base, sizes, ..Kind::PLAIN };
            let lab = Lab::new(kind);
            let before = lab.content("web.qcow2");
            assert_done(&lab, "commit top=sn3 base=base");
            assert!(before == lab.content("web.qcow2"));
            lab.assert_clean();
            let lab = Lab::new(kind);
            assert_done(&lab, "pull base=base");
            assert!(before == lab.content("web.qcow2"));
            lab.assert_clean();
            let lab = Lab::new(kind);
            assert_done(&lab, "commit base=base");
            let after = lab.content(&format!("web.{}", lab.format("base")));
            let (same, rest) = after.split_at(before.len());
            assert!(same == before && are_zero(rest));
        }
    }
}

#[test]
fn a_snapshot_freezes_the_old_content_and_the_disk_keeps_its_name() {
    for kind in SIZES {
        let lab = Lab::new(kind);
        let before = lab.content("web.qcow2");
        assert_done(&lab, "snapshot monday description='before the upgrade'");
        assert_eq!(lab.chain("web.qcow2")[..2], ["web.qcow2", "monday.qcow2"]);
        assert!(lab.content("web.qcow2") == before && lab.content("monday.qcow2") == before);
        assert_done(&lab, "snapshot tuesday file=other.qcow2");
        let chain = lab.open().catalog().chain(std::path::Path::new("other")).map(drop);
        assert!(chain.is_some(), "{:?}", lab.files());
        assert_eq!(lab.chain("other.qcow2")[..2], ["other.qcow2", "web.qcow2"]);
        lab.assert_clean();
    }
}

#[test]
fn a_raw_leaf_becomes_a_snapshot_under_a_qcow2_overlay() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("plain.raw", 3 << 20, 9);
    let before = lab.content("plain.raw");
    let engine = chainfs::ops::Engine::new(&lab.open());
    let status = support::lab::run(&engine, "plain", "snapshot first").unwrap();
    assert_eq!(status.state, JobState::Done);
    assert_eq!(lab.chain("plain.qcow2"), ["plain.qcow2", "first.raw"]);
    assert!(lab.content("plain.qcow2") == before && !lab.store.path("plain.raw").exists());
    // Frozen for good, even without an overlay.
    std::fs::remove_file(lab.store.path("plain.qcow2")).unwrap();
    let store = lab.open();
    let catalog = store.catalog();
    let leaf = catalog.chain(std::path::Path::new("first")).unwrap();
    assert!(!catalog.is_active(leaf));
}

#[test]
fn qemu_reads_an_internal_snapshot_of_chainfs() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.content("web.qcow2");
    assert_done(&lab, "snapshot monday internal");
    assert!(lab.content("web.qcow2@monday") == before);
    lab.assert_clean();
    assert_eq!(lab.refused("snapshot monday internal").kind(), ErrorKind::Exists);
}

#[test]
fn with_keep_the_top_stays_valid_step_by_step() {
    let lab = Lab::new(Kind::PLAIN);
    let (web, sn3) = (lab.content("web.qcow2"), lab.content("sn3.qcow2"));
    assert_done(&lab, "commit top=sn3 base=sn2");
    assert!(lab.content("sn2.qcow2") == sn3);
    assert_done(&lab, "commit top=sn2 base=sn1 keep");
    assert_eq!(lab.chain("web.qcow2"), ["web.qcow2", "sn1.qcow2", "base.qcow2"]);
    assert!(
        lab.content("web.qcow2") == web && lab.content("sn2.qcow2") == sn3 && lab.content("sn1.qcow2") == sn3
    );
    let store = lab.open();
    let catalog = store.catalog();
    let kept = catalog.chain(std::path::Path::new("sn2")).unwrap();
    assert!(!catalog.is_active(kept), "a frozen layer never becomes active");
    lab.assert_clean();
    let lab = Lab::new(Kind::PLAIN);
    assert_done(&lab, "commit top=sn3 base=base keep");
    assert!(lab.content("web.qcow2") == web && lab.content("sn3.qcow2") == sn3);
    let left = ["base.qcow2", "sn1.qcow2.invalid", "sn2.qcow2.invalid", "sn3.qcow2", "web.qcow2"];
    assert_eq!(lab.files(), left);
    assert_eq!(lab.open().catalog().chains().count(), 2);
}

#[test]
fn layers_that_others_depend_on_are_not_changed() {
    let lab = Lab::new(Kind { inner: &["sn2"], ..Kind::PLAIN });
    lab.store.overlay("clone.qcow2", "sn1.qcow2", "qcow2", "");
    let hashes = |lab: &Lab| {
        lab.files().iter().map(|name| std::fs::read(lab.store.path(name)).unwrap()).collect::<Vec<_>>()
    };
    let before = hashes(&lab);
    for (command, kind, word) in [
        ("commit top=sn3 base=sn1", ErrorKind::NotEmpty, "clone.qcow2"),
        ("commit top=sn3 base=base", ErrorKind::NotEmpty, "clone.qcow2"),
        ("commit top=sn3 base=sn2", ErrorKind::NotEmpty, "inner"),
        ("commit top=sn2 base=sn3", ErrorKind::Usage, "above"),
        ("commit top=sn2 base=sn2", ErrorKind::Usage, "same"),
        ("commit top=nobody", ErrorKind::NotFound, "nobody"),
        ("commit top=base", ErrorKind::Usage, "has no backing file"),
        ("commit top=sn2@inner", ErrorKind::Usage, "internal snapshot"),
        ("pull base=active", ErrorKind::Usage, "same"),
        ("snapshot sn1", ErrorKind::Exists, "sn1"),
        ("cancel", ErrorKind::NotFound, "no command"),
    ] {
        let error = lab.refused(command);
        assert!(error.kind() == kind && error.to_string().contains(word), "{command}: {error}");
    }
    assert!(before == hashes(&lab));
    assert_done(&lab, "commit top=sn3 base=sn2 discard-internal");
    // All overlays of top are rebased onto base.
    let lab = Lab::new(Kind::PLAIN);
    lab.store.overlay("clone.qcow2", "sn2.qcow2", "qcow2", "");
    lab.store.scribble("clone.qcow2", "qcow2", 77);
    let views = ["clone.qcow2", "sn3.qcow2", "web.qcow2"];
    let before = lab.contents(&views);
    assert_done(&lab, "commit top=sn2 base=base");
    assert!(before == lab.contents(&views));
    assert_eq!(lab.chain("clone.qcow2"), ["clone.qcow2", "base.qcow2"]);
    lab.assert_clean();
}

#[test]
fn lack_of_room_in_a_header_is_found_before_any_change() {
    let lab = Lab::new(Kind { options: "cluster_size=512", sizes: [1 << 20; 5], ..Kind::PLAIN });
    // A directory whose name leaves no room for the way to the base in a header of 512 bytes.
    let long = "d".repeat(200);
    lab.store.dir(&format!("{long}/{long}"));
    let place = format!("{long}/{long}/base.qcow2");
    std::fs::rename(lab.store.path("base.qcow2"), lab.store.path(&place)).unwrap();
    // The layer above finds it by a short name all the same.
    std::os::unix::fs::symlink(&place, lab.store.path("base.qcow2")).unwrap();
    let before = lab.content("web.qcow2");
    let error = lab.refused("commit top=sn3 base=base");
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("web.qcow2"), "{error}");
    assert!(lab.content("web.qcow2") == before);
}
