//! Stores made with qemu-img, which these tests require.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::ops::Status;
use crate::report::text::{self, TextOptions};
use crate::report::tree::{NodeMark, TreeNodeKind};
use crate::store::{Catalog, Store, StoreOptions};
use jiff::tz::TimeZone;

use super::*;

struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Command::new("qemu-img").arg("--version").output().expect("qemu-img is needed: install qemu-utils");
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// Runs qemu-img in the store's directory.
    fn qemu(&self, line: &str) -> String {
        let output = Command::new("qemu-img")
            .args(line.split(' '))
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn base(&self, name: &str) {
        self.qemu(&format!("create -q -f qcow2 {name} 1M"));
    }

    fn overlay(&self, name: &str, backing: &str) {
        self.qemu(&format!("create -q -f qcow2 -b {backing} -F qcow2 {name}"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self) -> (Arc<Store>, Arc<Catalog>) {
        let store = Store::open(self.directory.path(), StoreOptions::default()).unwrap();
        let catalog = store.catalog();
        (store, catalog)
    }
}

/// The text without dates and sizes.
fn drawn(forest: &crate::report::tree::Forest) -> Vec<String> {
    let mut forest = forest.clone();
    for tree in &mut forest.trees {
        for node in &mut tree.nodes {
            (node.date, node.own_size) = (None, None);
        }
        tree.on_disk = 0;
    }
    let options = TextOptions { full: false, ascii: false, color: false, zone: TimeZone::UTC };
    let squeeze = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text::forest(&forest, &options).lines().map(squeeze).collect()
}

#[test]
fn the_page_lists_shared_snapshots_under_the_chain_of_their_tree() {
    let lab = Lab::new();
    lab.base("base.qcow2");
    lab.overlay("a-side.qcow2", "base.qcow2");
    lab.overlay("sn1.qcow2", "base.qcow2");
    lab.overlay("web01.qcow2", "sn1.qcow2");
    let (store, catalog) = lab.open();
    let (status, system) = (|_: &Path| Status::default(), |_: &Path| None);
    let live = Live { mount: None, has_files: false, status: &status, system: &system };
    let page = store_page(&store, &catalog, &live);
    let mut listed: Vec<_> =
        page.snapshots.shown.iter().map(|line| (line.name.as_str(), line.chain.as_str())).collect();
    listed.sort_unstable();
    assert_eq!(listed, [("base", "web01"), ("sn1", "web01")]);
}

#[test]
fn the_base_is_first_and_the_longest_chain_straight() {
    let lab = Lab::new();
    lab.base("base.qcow2");
    lab.overlay("sn1.qcow2", "base.qcow2");
    lab.qemu("snapshot -c before sn1.qcow2");
    lab.overlay("web01.qcow2", "sn1.qcow2");
    lab.overlay("side.qcow2", "base.qcow2");
    let (store, catalog) = lab.open();
    let expected = [
        "web01 · 1 MiB virtual · 0 B on disk · 4 layers, 2 branches, 1 internal",
        "● base qcow2 shared by 2",
        "├─◆ side qcow2 writable",
        "● sn1 qcow2",
        "├○ before int",
        "◆ active qcow2 writable",
    ];
    assert_eq!(drawn(&forest(&store, &catalog)), expected);
    let side = catalog.chain(Path::new("side")).unwrap();
    assert_eq!(drawn(&chain_forest(&store, &catalog, side)), expected);
}

#[test]
fn a_missing_base_is_under_all_images_that_name_it() {
    let lab = Lab::new();
    lab.base("gone.qcow2");
    lab.overlay("a.qcow2", "gone.qcow2");
    lab.overlay("b.qcow2", "gone.qcow2");
    std::fs::remove_file(lab.path("gone.qcow2")).unwrap();
    let (store, catalog) = lab.open();
    let found = forest(&store, &catalog);
    let expected = [
        "a · 1 MiB virtual · 0 B on disk · 3 layers, 2 branches",
        "✗ gone.qcow2 ? missing",
        "├─✗ b qcow2",
        "✗ active qcow2",
    ];
    assert_eq!(drawn(&found), expected);
    assert_eq!(
        (found.trees[0].nodes[0].kind, found.trees[0].nodes[0].mark),
        (TreeNodeKind::Missing, NodeMark::Broken)
    );
    let b = catalog.chain(Path::new("b")).unwrap();
    assert_eq!(drawn(&chain_forest(&store, &catalog, b)), expected);
    assert_eq!(problems_text(&catalog).lines().count(), 2);
    let problem = chain_problem(&catalog, b).unwrap();
    assert!(
        problem.starts_with("b.qcow2 cannot be read: its backing file \"gone.qcow2\" is missing"),
        "{problem}"
    );
}

#[test]
fn a_broken_link_is_described_in_a_word() {
    let lab = Lab::new();
    lab.base("a.qcow2");
    lab.overlay("b.qcow2", "a.qcow2");
    lab.qemu("rebase -u -b b.qcow2 -F qcow2 a.qcow2");
    lab.qemu("create -q -u -f qcow2 -b /etc/passwd -F raw outside.qcow2 1M");
    lab.qemu("create -q -u -f qcow2 -b nbd://host/x -F raw protocol.qcow2 1M");
    lab.base("plain.img");
    std::fs::write(lab.path("broken.qcow2"), b"QFI\xfb").unwrap();
    std::fs::write(lab.path("empty.qcow2"), b"").unwrap();
    let (store, catalog) = lab.open();
    let text = drawn(&forest(&store, &catalog)).join("\n");
    for word in ["loop", "outside of the store", "not followed", "format unclear", "malformed", "unreadable"]
    {
        assert!(text.contains(word), "{word} in\n{text}");
    }
    assert!(text.contains("✗ nbd://host/x ?"), "{text}");
}

#[test]
fn the_writer_of_an_active_image_is_named() {
    use std::io::{BufRead, BufReader, Write};
    let lab = Lab::new();
    lab.base("disk.qcow2");
    let (store, catalog) = lab.open();
    let spawned = Command::new("qemu-io")
        .arg(lab.path("disk.qcow2"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut writer = spawned.expect("qemu-io is needed: install qemu-utils");
    let mut input = writer.stdin.take().unwrap();
    input.write_all(b"write 0 512\n").unwrap();
    let mut line = String::new();
    BufReader::new(writer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let expected = format!("locked by qemu-io[{}]", writer.id());
    let flags = || forest(&store, &catalog).trees[0].nodes[0].flags.clone();
    // The search for the holder has a time limit, which it may exceed on a busy machine.
    let mut found = flags();
    for _ in 0..100 {
        if found.contains(&expected) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        found = flags();
    }
    drop(input);
    writer.wait().unwrap();
    assert_eq!(found, ["writable", &expected]);
    assert_eq!(forest(&store, &catalog).trees[0].nodes[0].flags, ["writable"]);
}

/// The part of the output that qemu-img and chainfs have in common.
fn common(text: &str) -> serde_json::Value {
    let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
    for image in value.as_array_mut().unwrap() {
        image.as_object_mut().unwrap().remove("chainfs");
    }
    value
}

#[test]
fn a_chain_is_described_like_qemu_img_does() {
    let lab = Lab::new();
    lab.qemu("create -q -f raw base.raw 3M");
    lab.qemu("create -q -f qcow2 -o compat=0.10 -b base.raw -F raw old.qcow2");
    lab.qemu(
        "create -q -f qcow2 -o cluster_size=128k,extended_l2=on,refcount_bits=8 -b old.qcow2 -F qcow2 \
        mid.qcow2",
    );
    lab.qemu("bitmap --add mid.qcow2 daily");
    lab.qemu("bitmap --add --disable -g 32k mid.qcow2 weekly");
    lab.qemu("snapshot -c s1 mid.qcow2");
    lab.qemu(
        "create -q -f qcow2 -o compression_type=zstd,lazy_refcounts=on -b mid.qcow2 -F qcow2 top.qcow2 4M",
    );
    let (store, catalog) = lab.open();
    let leaf = catalog.chain(Path::new("top")).unwrap();
    let path = lab.path("top.qcow2");
    let expected = lab.qemu(&format!("info --output=json --backing-chain {}", path.display()));
    assert_eq!(common(&pretty(&chain_info(&store, &catalog, leaf))), common(&expected));
    let relative = lab.qemu("info --output=json --backing-chain top.qcow2");
    let ours = chain_info_as(&store, &catalog, leaf, Path::new("top.qcow2"));
    assert_eq!(common(&pretty(&ours)), common(&relative));
    let layer = ours[1].chainfs.clone().unwrap();
    assert_eq!(
        (layer.view.as_str(), layer.chains, layer.depth, layer.frozen),
        ("mid", vec!["top".into()], 1, true)
    );
}

#[test]
fn chains_are_listed_with_layers_views_and_problems() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("sub")).unwrap();
    lab.base("base.qcow2");
    lab.overlay("sub/web.qcow2", "../base.qcow2");
    lab.qemu("snapshot -c a/b sub/web.qcow2");
    std::fs::write(lab.path("bad\n\u{1b}.qcow2"), b"").unwrap();
    let (store, catalog) = lab.open();
    let pieces = ChainsJson::new(&store, &catalog);
    let text: String = (0..pieces.count()).map(|index| pieces.piece(index)).collect();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(text.starts_with("{\n    \"store\": \"") && text.ends_with("\n    ]\n}\n"), "{text}");
    assert!(text.contains("\n        {\n            \"path\": "), "{text}");
    let chains = value["chains"].as_array().unwrap();
    let web = chains.iter().find(|chain| chain["path"] == "sub/web").unwrap();
    assert_eq!(web["layers"][0]["view"], "active");
    assert_eq!(web["layers"][0]["snapshots"][0]["view"], "active@a%2Fb");
    assert_eq!(web["layers"][1]["file"], "base.qcow2");
    assert_eq!(value["problems"].as_array().unwrap().len(), 1);
    let problems = problems_text(&catalog);
    assert_eq!(problems.lines().count(), 1);
    assert!(problems.starts_with("bad\\x0a\\x1b.qcow2: cannot be read"), "{problems}");
    assert!(chain_problem(&catalog, catalog.chain(Path::new("sub/web")).unwrap()).is_none());
}

#[test]
fn a_store_that_is_one_image_is_named_after_it() {
    let lab = Lab::new();
    lab.base("base.qcow2");
    lab.overlay("web.qcow2", "base.qcow2");
    let store = Store::open(&lab.path("web.qcow2"), StoreOptions::default()).unwrap();
    let catalog = store.catalog();
    let trees = forest(&store, &catalog).trees;
    assert_eq!((trees.len(), trees[0].title.as_str(), trees[0].layer_count), (1, "web", 2));
    assert_eq!(chain_info(&store, &catalog, 0)[1].chainfs.as_ref().unwrap().chains, ["web"]);
}
