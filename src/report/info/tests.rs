//! The expected output was printed by qemu-img 10.0.2.

use super::super::json::pretty;
use super::*;

const MID: &str = r#"{
    "children": [{"name": "file", "info": {
        "children": [], "virtual-size": 852480, "filename": "mid.qcow2", "format": "file",
        "actual-size": 491520, "format-specific": {"type": "file", "data": {}}, "dirty-flag": false}}],
    "backing-filename-format": "raw",
    "snapshots": [{"icount": 0, "vm-clock-nsec": 0, "name": "before-up", "date-sec": 1795376895,
        "date-nsec": 887592000, "vm-clock-sec": 0, "id": "1", "vm-state-size": 0}],
    "virtual-size": 10485760, "filename": "mid.qcow2", "cluster-size": 65536, "format": "qcow2",
    "actual-size": 491520,
    "format-specific": {"type": "qcow2", "data": {
        "compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false,
        "bitmaps": [{"flags": ["auto"], "name": "bm0", "granularity": 65536}],
        "refcount-bits": 16, "corrupt": false, "extended-l2": false}},
    "full-backing-filename": "base.raw", "backing-filename": "base.raw", "dirty-flag": false
}"#;

const V2: &str = r#"{"virtual-size": 5242880, "filename": "v2.qcow2", "cluster-size": 65536,
    "format": "qcow2", "actual-size": 200704, "dirty-flag": false,
    "format-specific": {"type": "qcow2", "data": {
        "compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}}}"#;

const DATA_FILE: &str = r#"{"virtual-size": 5242880, "filename": "df.qcow2", "format": "qcow2",
    "dirty-flag": true, "encrypted": true, "format-specific": {"type": "qcow2", "data": {
        "compat": "1.1", "compression-type": "zstd", "lazy-refcounts": false, "refcount-bits": 16,
        "data-file": "dat.raw", "data-file-raw": true, "corrupt": false, "extended-l2": false,
        "encrypt": {"format": "luks", "slots": []}}}}"#;

#[test]
fn keys_and_nesting_match_qemu_img() {
    for text in [MID, V2, DATA_FILE] {
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        let image: ImageInfo = serde_json::from_str(text).unwrap();
        let written: serde_json::Value = serde_json::from_str(&pretty(&image)).unwrap();
        assert_eq!(written, expected);
    }
}

#[test]
fn the_text_matches_qemu_img() {
    let image: ImageInfo = serde_json::from_str(MID).unwrap();
    let zone = TimeZone::UTC;
    let expected = "\
image: mid.qcow2
file format: qcow2
virtual size: 10 MiB (10485760 bytes)
disk size: 480 KiB
cluster_size: 65536
backing file: base.raw
backing file format: raw
Snapshot list:
ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
1       before-up             0 B 2026-11-22 19:48:15  0000:00:00.000          0
Format specific information:
    compat: 1.1
    compression type: zlib
    lazy refcounts: false
    bitmaps:
        [0]:
            flags:
                [0]: auto
            name: bm0
            granularity: 65536
    refcount bits: 16
    corrupt: false
    extended l2: false
";
    assert_eq!(human(std::slice::from_ref(&image), &zone), expected);
    assert_eq!(human(&[image.clone(), image], &zone), format!("{expected}\n{expected}"));
}

#[test]
fn facts_of_chainfs_are_in_their_own_object() {
    let layer = LayerInfo {
        view: "sn1".into(),
        chains: vec!["web01".into(), "web02".into()],
        chain_count: 2,
        depth: 2,
        frozen: true,
        frozen_sec: Some(86_400),
        frozen_nsec: Some(5),
        description: Some("before the upgrade".into()),
        shared_by: 2,
        snapshots_left_out: None,
        problem: Some("base.raw: missing\x1b".into()),
    };
    let mut image: ImageInfo = serde_json::from_str(V2).unwrap();
    image.chainfs = Some(layer);
    let written: serde_json::Value = serde_json::from_str(&pretty(&image)).unwrap();
    assert_eq!(written["chainfs"]["shared-by"], 2);
    assert_eq!(written["chainfs"]["frozen-sec"], 86_400);
    let text = human(&[image], &TimeZone::UTC);
    assert!(
        text.contains("    frozen at: 1970-01-02 00:00:00\n    description: before the upgrade\n"),
        "{text}"
    );
    assert!(
        text.contains("    chains: web01, web02\n")
            && text.ends_with("    problem: base.raw: missing\\x1b\n")
    );
}

#[test]
fn hostile_names_and_dates_are_shown_on_one_line() {
    let mut image: ImageInfo = serde_json::from_str(V2).unwrap();
    image.backing_filename = Some("a\nimage: fake\x1b[2J".into());
    let snapshot = SnapshotInfo { name: "\r\n".into(), date_sec: u64::MAX, ..SnapshotInfo::default() };
    image.snapshots = Some(vec![snapshot]);
    let text = human(&[image], &TimeZone::UTC);
    assert!(
        text.contains("backing file: a\\x0aimage: fake\\x1b[2J (cannot determine actual path)\n"),
        "{text}"
    );
    assert!(text.lines().any(|line| line.contains("\\x0d\\x0a") && line.ends_with("--")), "{text}");
}
