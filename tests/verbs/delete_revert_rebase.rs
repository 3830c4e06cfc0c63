//! Delete, revert, rebase, clone and resize on whole chains: QEMU reads the same bytes of every other view,
//! and the results equal those of `qemu-img` on a twin.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use chainfs::error::ErrorKind;
use chainfs::ops::{Engine, JobState};
use chainfs::store::{Access, Store as Opened, StoreOptions, ViewPart};
use chainfs::units::are_zero;
use support::foreign::amount;
use support::lab::{Kind, LAYERS, Lab, run};
use support::sim::in_turn;

const KINDS: [Kind; 3] = [
    Kind::PLAIN,
    Kind { options: "cluster_size=512", sizes: [1 << 20; 5], ..Kind::PLAIN },
    Kind { options: "extended_l2=on,cluster_size=16k", ..Kind::PLAIN },
];

/// Every kind of clusters, on a base of either format.
fn kinds() -> impl Iterator<Item = Kind> {
    KINDS.into_iter().flat_map(|kind| [kind, Kind { raw_base: true, ..kind }])
}

/// Whether a case is tried with the kind of this number. Without much time it is a third of them: every case
/// with two kinds of clusters, on a base of one format and of the other.
fn is_tried(number: usize, case: usize) -> bool {
    let (kind, raw_base) = (number / 2, number % 2);
    amount(0, 1) == 1 || (kind + 2 * raw_base + case).is_multiple_of(3)
}

fn assert_done(lab: &Lab, command: &str) {
    let status = lab.run(command);
    assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
}

/// The files of all layers.
fn files(lab: &Lab) -> Vec<String> {
    LAYERS.iter().map(|layer| lab.file(layer)).collect()
}

/// Two clones beside the chain, each with bytes of its own, so that `layer` has two children.
fn branch(lab: &Lab, layer: &str) {
    lab.store.overlay("clone.qcow2", &lab.file(layer), lab.format(layer), "");
    lab.store.scribble("clone.qcow2", "qcow2", 77);
}

#[test]
fn a_delete_by_pull_copies_a_snapshot_into_all_overlays() {
    for (number, kind) in in_turn(kinds(), 0).enumerate() {
        for (depth, name) in (1..).zip(["sn1", "sn2", "sn3"]) {
            for has_two in
                [false, true].into_iter().filter(|has_two| is_tried(number, depth + usize::from(*has_two)))
            {
                let lab = Lab::new(kind);
                let twin = Lab::new(kind);
                let mut views = files(&lab);
                views.retain(|file| *file != lab.file(name));
                if has_two {
                    branch(&lab, name);
                    branch(&twin, name);
                    views.push("clone.qcow2".into());
                }
                let views: Vec<&str> = views.iter().map(String::as_str).collect();
                let before = lab.contents(&views);
                let (above, below) = (LAYERS[depth + 1], LAYERS[depth - 1]);
                let method = if has_two { "" } else { "method=pull" };
                assert_done(&lab, &format!("delete {name} {method}"));
                assert!(before == lab.contents(&views), "{name}, {}", kind.options);
                lab.assert_clean();
                assert!(!lab.store.path(lab.file(name)).exists());
                // The notes' second method, by QEMU.
                let children: Vec<String> =
                    [lab.file(above)].into_iter().chain(has_two.then(|| "clone.qcow2".into())).collect();
                for child in &children {
                    twin.store.img(["rebase", "-b", &twin.file(below), "-F", twin.format(below), child]);
                    assert!(lab.content(child) == twin.content(child));
                    assert_eq!(lab.chain(child), twin.chain(child), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_delete_by_commit_merges_the_overlay_and_keeps_its_name() {
    for (number, kind) in in_turn(kinds(), 1).enumerate() {
        for name in ["base", "sn1", "sn2", "sn3"] {
            let depth = LAYERS.iter().position(|layer| *layer == name).unwrap();
            if !is_tried(number, depth) {
                continue;
            }
            let lab = Lab::new(kind);
            let twin = Lab::new(kind);
            let above = LAYERS[depth + 1];
            if lab.format(name) == "raw" {
                // The headers above state another format than the one that it would be.
                assert_eq!(
                    lab.refused(&format!("delete {name} method=commit")).kind(),
                    ErrorKind::Unsupported
                );
                continue;
            }
            let views: Vec<String> = files(&lab).into_iter().filter(|file| *file != lab.file(name)).collect();
            let views: Vec<&str> = views.iter().map(String::as_str).collect();
            let before = lab.contents(&views);
            assert_done(&lab, &format!("delete {name} method=commit"));
            assert!(before == lab.contents(&views), "{name}, {}", kind.options);
            lab.assert_clean();
            assert_eq!(lab.files().len(), 4, "{:?}", lab.files());
            // The notes' first method on the layer above, by QEMU: it is merged into the snapshot's file, and
            // all its overlays are then rebased onto that file.
            twin.store.img(["commit", "-q", "-d", &twin.file(above)]);
            if let Some(next) = LAYERS.get(depth + 2) {
                twin.store.img(["rebase", "-u", "-b", &twin.file(name), "-F", "qcow2", &twin.file(next)]);
                assert!(lab.content(&lab.file(next)) == twin.content(&twin.file(next)));
            }
            assert!(lab.content(&lab.file(above)) == twin.content(&twin.file(name)));
            let chain = lab.chain("web.qcow2");
            assert_eq!(chain.len(), 4);
            assert!(!chain.contains(&lab.file(name)));
        }
    }
}

#[test]
fn a_raw_base_takes_the_place_of_its_only_overlay() {
    let lab = Lab::new(Kind { raw_base: true, ..Kind::PLAIN });
    for name in ["sn1", "sn2", "sn3"] {
        assert_done(&lab, &format!("delete {name}"));
    }
    let before = lab.content("web.qcow2");
    assert_done(&lab, "delete base method=commit");
    assert!(lab.content("web.raw") == before);
    assert_eq!(lab.files(), ["web.raw"]);
}

#[test]
fn the_cheaper_method_is_used_and_shared_layers_are_pulled() {
    let lab = Lab::new(Kind::PLAIN);
    // Much above, little in it.
    lab.store.io("web.qcow2", "qcow2", ["write -P 9 0 3M"]);
    let engine = Engine::new(&lab.open());
    let plan = |engine: &std::sync::Arc<Engine>, command: &str| {
        let request = chainfs::ops::Request::parse_command(command.as_bytes()).unwrap();
        engine.plan(Path::new("web"), &request).unwrap()
    };
    let method = |command: &str| plan(&engine, command).notes[0].clone();
    assert_eq!(method("delete sn3"), "method: pull");
    lab.store.io("sn3.qcow2", "qcow2", ["write -P 8 0 4M"]);
    assert_eq!(method("delete sn3"), "method: commit");
    branch(&lab, "sn3");
    assert_eq!(method("delete sn3"), "method: pull");
    let error = lab.refused("delete sn3 method=commit");
    assert!(error.kind() == ErrorKind::NotEmpty && error.to_string().contains("clone.qcow2"), "{error}");
    let copied = plan(&engine, "delete sn3");
    assert_eq!((copied.removed.len(), copied.invalid.len()), (1, 1));
    assert!(copied.bytes >= 8 << 20, "into both: {}", copied.bytes);
}

#[test]
fn internal_snapshots_are_deleted_without_other_changes() {
    for kind in KINDS {
        let lab = Lab::new(Kind { inner: &["sn2", "web"], ..kind });
        lab.store.img(["snapshot", "-c", "second", "web.qcow2"]);
        lab.store.scribble("web.qcow2", "qcow2", 33);
        let views = ["web.qcow2", "sn2.qcow2", "sn3.qcow2", "sn2.qcow2@inner"];
        let before = lab.contents(&views);
        assert_done(&lab, "delete active@inner");
        assert!(before == lab.contents(&views), "{}", kind.options);
        let listed = lab.store.img(["snapshot", "-l", "web.qcow2"]);
        assert!(listed.contains("second") && !listed.contains("inner"), "{listed}");
        assert_done(&lab, "delete sn2@inner");
        assert!(
            before
                .iter()
                .filter(|(view, _)| !view.contains('@'))
                .all(|(view, bytes)| lab.content(view) == *bytes)
        );
        assert_eq!(lab.store.img(["snapshot", "-l", "sn2.qcow2"]).trim(), "");
        lab.assert_clean();
    }
}

#[test]
fn an_impossible_delete_is_refused_with_a_reason() {
    let lab = Lab::new(Kind { inner: &["sn2"], ..Kind::PLAIN });
    branch(&lab, "base");
    for (command, kind, word) in [
        ("delete active", ErrorKind::Usage, "active"),
        ("delete nobody", ErrorKind::NotFound, "sn3"),
        ("delete base", ErrorKind::NotEmpty, "clone.qcow2"),
        ("delete sn2", ErrorKind::NotEmpty, "inner"),
        ("delete sn2@nobody", ErrorKind::NotFound, "sn2@inner"),
        ("revert to=active", ErrorKind::Usage, "active"),
        ("revert to=nobody", ErrorKind::NotFound, "sn3"),
        ("revert to=sn1 save=sn2", ErrorKind::Exists, "sn2"),
        ("rebase base=web.qcow2", ErrorKind::Usage, "loop"),
        ("rebase layer=sn1 base=sn3", ErrorKind::Usage, "loop"),
        ("rebase base=../outside.qcow2", ErrorKind::Escape, "out of the store"),
        ("rebase base=nothing.qcow2", ErrorKind::NotFound, "nothing.qcow2"),
        ("clone sn1", ErrorKind::Exists, "sn1"),
        ("clone new from=active", ErrorKind::Usage, "snapshot"),
        ("resize 1M", ErrorKind::Forbidden, "shrink"),
        ("resize 4M", ErrorKind::Usage, "already"),
        ("resize -8M shrink", ErrorKind::Usage, "nothing would be left"),
        ("resize 7E", ErrorKind::TooLarge, "L1 table"),
    ] {
        let before: Vec<Vec<u8>> =
            lab.files().iter().map(|name| fs::read(lab.store.path(name)).unwrap()).collect();
        let error = lab.refused(command);
        assert!(
            error.kind() == kind && error.to_string().contains(word),
            "{command}: {:?}: {error}",
            error.kind()
        );
        let after: Vec<Vec<u8>> =
            lab.files().iter().map(|name| fs::read(lab.store.path(name)).unwrap()).collect();
        assert!(before == after, "{command}");
    }
    // The last layer, and a single one.
    let store = lab.open();
    let engine = Engine::new(&store);
    assert_eq!(run(&engine, "clone", "delete active").unwrap_err().kind(), ErrorKind::Usage);
    fs::set_permissions(lab.store.path("sn1.qcow2"), fs::Permissions::from_mode(0o444)).unwrap();
    for command in ["delete sn1", "rebase layer=sn1 base=none"] {
        assert_eq!(lab.refused(command).kind(), ErrorKind::ReadOnly, "{command}");
    }
}

#[test]
fn a_revert_resets_the_disk_to_a_snapshot() {
    for kind in KINDS {
        for (to, save) in [("sn3", None), ("sn1", None), ("base", Some("kept")), ("sn3", Some("kept"))] {
            let lab = Lab::new(kind);
            let wanted = lab.content(&lab.file(to));
            let views = ["base.qcow2", "sn1.qcow2", "sn2.qcow2", "sn3.qcow2"];
            let (before, web) = (lab.contents(&views), lab.content("web.qcow2"));
            let command =
                format!("revert to={to}{}", save.map(|name| format!(" save={name}")).unwrap_or_default());
            assert_done(&lab, &command);
            assert!(lab.content("web.qcow2") == wanted, "{command}");
            assert!(before == lab.contents(&views), "{command}");
            assert_eq!(lab.chain("web.qcow2")[1], lab.file(to));
            let store = lab.open();
            let catalog = store.catalog();
            let is_active = |chain: &str| catalog.is_active(catalog.chain(Path::new(chain)).expect(chain));
            assert!(is_active("web"));
            match save {
                Some(_) => {
                    assert!(lab.content("kept.qcow2") == web, "{command}");
                    assert!(!is_active("kept"), "what is saved is a snapshot");
                }
                None if to == "sn1" => assert!(!is_active("sn3"), "what is left alone stays frozen"),
                None => assert_eq!(catalog.chains().count(), 1),
            }
            lab.assert_clean();
        }
    }
}

#[test]
fn internal_snapshots_are_applied_or_copied() {
    for kind in KINDS {
        let lab = Lab::new(Kind { inner: &["sn2", "web"], ..kind });
        let twin = Lab::new(Kind { inner: &["sn2", "web"], ..kind });
        let web = lab.content("web.qcow2");
        let views = ["web.qcow2@inner", "sn2.qcow2@inner", "sn2.qcow2", "sn3.qcow2"];
        let before = lab.contents(&views);
        assert_done(&lab, "revert to=active@inner save=then");
        twin.store.img(["snapshot", "-a", "inner", "web.qcow2"]);
        assert!(lab.content("web.qcow2") == twin.content("web.qcow2") && before == lab.contents(&views));
        assert!(lab.store.img(["snapshot", "-l", "web.qcow2"]).contains("then"));
        assert_done(&lab, "revert to=active@then");
        assert!(lab.content("web.qcow2") == web && before == lab.contents(&views), "{}", kind.options);
        lab.assert_clean();
        // One of a layer below: it cannot back an image.
        assert_eq!(
            lab.refused("revert to=sn2@inner").kind(),
            ErrorKind::NotEmpty,
            "the disk's own would be lost"
        );
        assert_done(&lab, "revert to=sn2@inner discard-internal");
        assert!(lab.content("web.qcow2") == before["sn2.qcow2@inner"]);
        assert_eq!(lab.chain("web.qcow2")[1..], ["sn1.qcow2", "base.qcow2"]);
        lab.assert_clean();
    }
}

#[test]
fn clones_are_backed_by_their_snapshot() {
    for kind in in_turn(kinds(), 0) {
        let lab = Lab::new(Kind { inner: &["sn2", "web"], ..kind });
        let inner = lab.contents(&["sn2.qcow2@inner", "web.qcow2@inner"]);
        let mut views = files(&lab);
        views.extend(inner.keys().cloned());
        let views: Vec<&str> = views.iter().map(String::as_str).collect();
        let before = lab.contents(&views);
        for (name, from, wanted, below) in [
            ("one", "", "sn3.qcow2", "sn3.qcow2".to_owned()),
            ("two", "from=base", &*lab.file("base"), lab.file("base")),
            ("three", "from=sn2@inner", "sn2.qcow2@inner", "sn1.qcow2".to_owned()),
            ("four", "from=active@inner", "web.qcow2@inner", "sn3.qcow2".to_owned()),
        ] {
            assert_done(&lab, &format!("clone {name} {from}"));
            let file = format!("{name}.qcow2");
            assert!(lab.content(&file) == before[wanted], "{name}, {}", kind.options);
            assert_eq!(lab.chain(&file)[1], below);
            assert!(lab.open().catalog().chain(Path::new(name)).is_some());
        }
        assert!(before == lab.contents(&views));
        lab.assert_clean();
        // A clone's writes are its own.
        lab.store.io("three.qcow2", "qcow2", ["write -P 1 0 1M"]);
        assert!(before == lab.contents(&views));
    }
}

#[test]
fn a_read_only_golden_image_has_a_writable_clone() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("golden.qcow2", 2 << 20, "");
    lab.store.scribble("golden.qcow2", "qcow2", 5);
    fs::set_permissions(lab.store.path("golden.qcow2"), fs::Permissions::from_mode(0o444)).unwrap();
    let wanted = lab.content("golden.qcow2");
    let engine = Engine::new(&lab.open());
    assert_eq!(run(&engine, "golden", "clone web02").unwrap().state, JobState::Done);
    let store = lab.open();
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new("web02")).unwrap();
    let disk = store.open_active(&catalog, &catalog.layers(leaf), Access::Write).unwrap();
    disk.write_at(0, b"mine").unwrap();
    drop(disk);
    assert_eq!(&lab.content("web02.qcow2")[..4], b"mine");
    assert!(lab.content("golden.qcow2") == wanted);
    let mode = fs::metadata(lab.store.path("web02.qcow2")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644, "as the golden one, but for its owner's right to write");
}

#[test]
fn a_rebased_layer_keeps_its_bytes() {
    for kind in KINDS {
        for raw in [false, true] {
            let lab = Lab::new(kind);
            let twin = Lab::new(kind);
            let other = if raw { "other.raw" } else { "other.qcow2" };
            let format = if raw { "raw" } else { "qcow2" };
            for lab in [&lab, &twin] {
                // Of another size, and the same in some places.
                let size = kind.sizes[0] / 2 + 512 * 3;
                if raw {
                    lab.store.raw(other, size, 9);
                } else {
                    lab.store.create(other, size, "");
                }
                lab.store.io(other, format, ["write -P 100 0 64k", "write -P 3 100k 30k"]);
                lab.store.io("sn1.qcow2", "qcow2", ["write -P 3 100k 20k"]);
            }
            let views: Vec<String> = files(&lab);
            let views: Vec<&str> = views.iter().map(String::as_str).chain([other]).collect();
            let before = lab.contents(&views);
            for (layer, base) in
                [("sn2", other), ("active", "none"), ("active", other), ("active", "base.qcow2")]
            {
                assert_done(&lab, &format!("rebase layer={layer} base={base}"));
                let file = if layer == "active" { "web.qcow2" } else { "sn2.qcow2" };
                assert!(before == lab.contents(&views), "{layer} onto {base}, {}", kind.options);

                let chain = lab.chain(file);
                assert_eq!(chain.get(1).map(String::as_str), Some(base).filter(|base| *base != "none"));
            }
            lab.assert_clean();
            twin.store.img(["rebase", "-b", other, "-F", format, "sn2.qcow2"]);
            assert!(lab.content("sn2.qcow2") == twin.content("sn2.qcow2"));
            // It has no overlay any more, and stays unchanged.
            let store = lab.open();
            let catalog = store.catalog();
            assert!(!catalog.is_active(catalog.chain(Path::new("sn3")).unwrap()));
        }
    }
}

#[test]
fn an_unsafe_rebase_names_a_moved_backing_file() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.contents(&["web.qcow2", "sn3.qcow2", "sn2.qcow2"]);
    lab.store.dir("moved");
    fs::rename(lab.store.path("sn1.qcow2"), lab.store.path("moved/first.qcow2")).unwrap();
    fs::rename(lab.store.path("base.qcow2"), lab.store.path("moved/base.qcow2")).unwrap();
    let error = lab.refused("rebase layer=sn2 base=moved/first.qcow2");
    assert!(error.kind() == ErrorKind::Broken && error.to_string().contains("sn1.qcow2"), "{error}");
    // There is no evidence that a file of another name is the missing one.
    let error = lab.refused("rebase layer=sn2 base=moved/first.qcow2 unsafe");
    assert!(error.to_string().contains("say drop-layers"), "{error}");
    assert_done(&lab, "rebase layer=sn2 base=moved/first.qcow2 unsafe drop-layers");
    assert!(before == lab.contents(&["web.qcow2", "sn3.qcow2", "sn2.qcow2"]));
    let chain = lab.chain("web.qcow2");
    assert_eq!(chain[2..], ["sn2.qcow2", "moved/first.qcow2", "moved/base.qcow2"]);
    let text = lab.store.img(["info", "--output=json", "sn2.qcow2"]);
    assert!(text.contains("\"backing-filename-format\": \"qcow2\""), "{text}");
    // Absolute names stay absolute.
    let full = lab.store.path("moved/first.qcow2");
    lab.store.img(["rebase", "-u", "-b", full.to_str().unwrap(), "-F", "qcow2", "sn2.qcow2"]);
    assert_done(&lab, "rebase layer=sn2 base=moved/base.qcow2");
    let text = lab.store.img(["info", "--output=json", "sn2.qcow2"]);
    assert!(
        text.contains(&format!("\"backing-filename\": \"{}\"", lab.store.path("moved/base.qcow2").display())),
        "{text}"
    );
    assert!(before == lab.contents(&["web.qcow2", "sn3.qcow2", "sn2.qcow2"]));
}

#[test]
fn a_disk_grows_and_shrinks_without_showing_old_data() {
    for kind in in_turn(kinds(), 1) {
        let size = kind.sizes[0] as usize;
        let lab = Lab::new(kind);
        let before = lab.contents(&["sn3.qcow2", "sn1.qcow2"]);
        let web = lab.content("web.qcow2");
        assert_done(&lab, &format!("resize {} shrink", size / 2 + 700));
        let half = (size / 2 + 700).next_multiple_of(512);
        assert!(lab.content("web.qcow2") == web[..half], "{}", kind.options);
        lab.assert_clean();
        assert_done(&lab, &format!("resize +{size}"));
        let now = lab.content("web.qcow2");
        assert_eq!(now.len(), half + size);
        assert!(now[..half] == web[..half] && are_zero(&now[half..]), "{}", kind.options);
        assert!(before == lab.contents(&["sn3.qcow2", "sn1.qcow2"]));
        lab.assert_clean();
        // Also where QEMU makes it longer.
        assert_done(&lab, &format!("resize {half} shrink"));
        lab.store.img(["resize", "-q", "web.qcow2", &(half + size).to_string()]);
        let now = lab.content("web.qcow2");
        assert!(now[..half] == web[..half] && are_zero(&now[half..]), "{}", kind.options);
    }
}

/// The disk after QEMU has applied its internal snapshot: read beside a disk of another size, it gets that
/// one's size.
fn applied_by_qemu(lab: &Lab) -> Vec<u8> {
    fs::copy(lab.store.path("web.qcow2"), lab.store.path("copy.qcow2")).unwrap();
    lab.store.img(["snapshot", "-a", "inner", "copy.qcow2"]);
    let content = lab.content("copy.qcow2");
    fs::remove_file(lab.store.path("copy.qcow2")).unwrap();
    content
}

#[test]
fn internal_snapshots_keep_their_sizes() {
    let lab = Lab::new(Kind { inner: &["web"], ..Kind::PLAIN });
    let before = lab.content("web.qcow2@inner");
    assert_done(&lab, "resize 1M shrink");
    assert!(applied_by_qemu(&lab) == before);
    lab.assert_clean();
    assert_done(&lab, "resize 6M");
    assert!(applied_by_qemu(&lab) == before);
    assert_done(&lab, "revert to=active@inner");
    assert!(lab.content("web.qcow2") == before, "with its size");
    lab.assert_clean();
}

#[test]
fn a_raw_disk_is_resized() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("plain.raw", 3 << 20, 9);
    let before = lab.content("plain.raw");
    let engine = Engine::new(&lab.open());
    let done = |command: &str| {
        assert_eq!(run(&engine, "plain", command).unwrap().state, JobState::Done, "{command}");
    };
    done("resize 1M shrink");
    done("resize 2M");
    let now = lab.content("plain.raw");
    assert!(now.len() == 2 << 20 && now[..1 << 20] == before[..1 << 20]);
    assert!(are_zero(&now[1 << 20..]));
}

#[test]
fn open_disks_are_neither_reverted_shrunk_nor_rebased_unsafely() {
    let lab = Lab::new(Kind { inner: &["sn2", "web"], ..Kind::PLAIN });
    let store = lab.open();
    let engine = Engine::new(&store);
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new("web")).unwrap());
    let busy = |command: &str| {
        let error = run(&engine, "web", command).expect_err(command);
        assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("open"), "{command}: {error}");
    };
    for access in [Access::Read, Access::Write] {
        let disk = store.open_active(&catalog, &layers, access).unwrap();
        for command in [
            "revert to=sn1 discard-internal",
            "revert to=active@inner",
            "resize 1M shrink",
            "rebase base=sn2 unsafe drop-layers",
        ] {
            busy(command);
        }
        drop(disk);
    }
    let place = catalog.images.iter().position(|image| image.place.path == Path::new("sn2.qcow2")).unwrap();
    let view = store.open_disk(&catalog, &catalog.layers(place), ViewPart::Snapshot(0)).unwrap();
    busy("delete sn2@inner");
    drop(view);
    assert_eq!(run(&engine, "web", "delete sn2@inner").unwrap().state, JobState::Done);
}

#[test]
fn persistent_bitmaps_are_named_before_they_are_lost() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.img(["bitmap", "--add", "sn2.qcow2", "nightly"]);
    lab.store.img(["bitmap", "--add", "web.qcow2", "hourly"]);
    for (command, word) in [
        ("delete sn2 method=pull", "nightly"),
        ("delete sn1 method=commit", "nightly"),
        ("commit top=sn2 base=sn1", "nightly"),
        ("commit top=sn3 base=sn2", "nightly"),
        ("pull base=base delete", "nightly"),
        ("revert to=sn1", "hourly"),
        ("resize 8M", "hourly"),
    ] {
        // A pull removes only layers that this store froze.
        if command.starts_with("pull") {
            continue;
        }
        let error = lab.refused(command);
        assert!(
            error.to_string().contains(word) && error.to_string().contains("bitmap"),
            "{command}: {error}"
        );
    }
    lab.store.img(["bitmap", "--add", "sn3.qcow2", "weekly"]);
    assert_done(&lab, "delete sn2 method=pull discard-bitmaps");
    // No guest-visible byte of the filled layer has changed: the bitmap still shows that.
    let info = lab.store.img(["info", "--output=json", "sn3.qcow2"]);
    assert!(info.contains("weekly") && info.contains("auto") && !info.contains("in-use"), "{info}");
    lab.assert_clean();
    assert_done(&lab, "revert to=sn1 save=old");
    let info = lab.store.img(["info", "--output=json", "old.qcow2"]);
    assert!(info.contains("hourly"), "{info}");
}

/// The flags of each bitmap of an image, by QEMU.
fn bitmaps(lab: &Lab, file: &str) -> Vec<Vec<String>> {
    let info = lab.store.info(file, "qcow2");
    let all = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let flags = |bitmap: &serde_json::Value| {
        let flags = bitmap["flags"].as_array().expect("a list").iter();
        let mut flags: Vec<String> = flags.map(|flag| flag.as_str().expect("a word").to_owned()).collect();
        flags.sort();
        flags
    };
    all.iter().map(flags).collect()
}

#[test]
// M12
fn commands_that_change_no_byte_of_a_disk_leave_its_bitmaps_in_force() {
    let kind = Kind { inner: &["web"], ..Kind::PLAIN };
    for command in [
        "pull",
        "pull base=sn1",
        "pull into=sn3 base=base",
        "rebase base=sn1.qcow2",
        "rebase base=none",
        "rebase layer=sn3 base=none",
        "snapshot new internal",
        "delete active@inner",
        "delete sn3 method=pull discard-bitmaps",
        "commit top=sn2 base=sn1",
    ] {
        let lab = Lab::new(kind);
        for file in ["web.qcow2", "sn3.qcow2"] {
            lab.store.img(["bitmap", "--add", file, "follows"]);
        }
        let engine = Engine::new(&lab.open());
        let status = run(&engine, "web", command).unwrap_or_else(|error| panic!("{command}: {error}"));
        assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
        drop(engine);
        for file in lab.files().iter().filter(|file| ["web.qcow2", "sn3.qcow2"].contains(&file.as_str())) {
            assert_eq!(bitmaps(&lab, file), [["auto"]], "{command}: {file}");
        }
        lab.assert_clean();
    }
    // A guest's write changes it, also during a command on the disk.
    let lab = Lab::new(kind);
    lab.store.img(["bitmap", "--add", "web.qcow2", "follows"]);
    let store = lab.open();
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new("web")).expect("the chain");
    let job = store.take_active(&catalog, &catalog.layers(leaf)).expect("a job");
    let disk = store.open_active(&catalog, &catalog.layers(leaf), Access::Write).expect("the disk");
    disk.write_at(0, b"a guest").expect("a write");
    drop((job, disk));
    assert_eq!(bitmaps(&lab, "web.qcow2"), [["auto", "in-use"]]);
}

#[test]
fn a_repeated_command_has_nothing_to_do() {
    let lab = Lab::new(Kind { raw_base: true, ..Kind::PLAIN });
    let before = fs::read(lab.store.path("web.qcow2")).expect("the image");
    let absolute = format!("rebase base={}", lab.store.path("sn3.qcow2").display());
    let store = lab.open();
    let engine = Engine::new(&store);
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new("web")).expect("the chain");
    let disk = store.open_active(&catalog, &catalog.layers(leaf), Access::Write).expect("the disk");
    for command in [
        "pull base=sn3",
        "pull into=sn3 base=sn2 delete",
        "pull into=sn1 base=base",
        "pull into=base",
        "rebase base=sn3.qcow2",
        "rebase base=./sn3.qcow2",
        "rebase base=sn3",
        &absolute,
        "rebase layer=sn1 base=base.raw",
        "rebase base=sn3.qcow2 unsafe",
    ] {
        let status = run(&engine, "web", command).unwrap_or_else(|error| panic!("{command}: {error}"));
        assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
        let request = chainfs::ops::Request::parse_command(command.as_bytes()).expect("a command");
        let plan = engine.plan(Path::new("web"), &request).expect("a plan");
        assert!(plan.refusals.is_empty() && plan.bytes == 0, "{command}");
        assert!(plan.notes.iter().any(|note| note.contains("nothing to do")), "{command}: {:?}", plan.notes);
    }
    drop(disk);
    assert!(fs::read(lab.store.path("web.qcow2")).expect("the image") == before, "nothing was written");
    // Its backing file is unknown: the command is not "already done".
    fs::remove_file(lab.store.path("sn3.qcow2")).expect("a layer");
    assert_eq!(lab.refused("pull").kind(), ErrorKind::Broken);
    assert_eq!(lab.refused("rebase base=none").kind(), ErrorKind::Broken);
}

#[test]
fn holes_of_lower_layers_cost_no_space_and_no_time() {
    const LARGE: u64 = 1 << 40;
    for (base, format) in [("thin.raw", "raw"), ("promised.qcow2", "qcow2")] {
        for command in ["pull", "rebase base=none", "clone copy from=active@inner", "delete sn1 method=pull"]
        {
            let lab = Lab::new(Kind { sizes: [1 << 20; 5], ..Kind::PLAIN });
            let store = &lab.store;
            lab.files().iter().for_each(|file| fs::remove_file(store.path(file)).expect("a layer"));
            if format == "raw" {
                store.img(["create", "-q", "-f", "raw", base, &LARGE.to_string()]);
            } else {
                store.create(base, 8 << 30, "preallocation=metadata");
            }
            store.io(base, format, ["write -q -P 7 1G 64k"]);
            let on = |name: &str, below: &str, format: &str| store.overlay(name, below, format, "");
            on("sn1.qcow2", base, format);
            on("web.qcow2", "sn1.qcow2", "qcow2");
            store.img(["snapshot", "-c", "inner", "web.qcow2"]);
            let engine = Engine::new(&lab.open());
            let request = chainfs::ops::Request::parse_command(command.as_bytes()).expect("a command");
            let plan = engine.plan(Path::new("web"), &request).expect("a plan");
            assert!(plan.refusals.is_empty(), "{base}, {command}: {:?}", plan.refusals);
            assert!(plan.bytes <= 256 << 10, "{base}, {command}: {} bytes", plan.bytes);
            let status =
                run(&engine, "web", command).unwrap_or_else(|error| panic!("{base}, {command}: {error}"));
            assert_eq!(status.state, JobState::Done, "{base}, {command}: {:?}", status.error);
            drop(engine);
            for file in lab.files().iter().filter(|file| **file != base) {
                let taken = fs::metadata(store.path(file)).expect("an image").blocks() * 512;
                assert!(taken < 4 << 20, "{base}, {command}: {file} takes {taken} bytes");
            }
            store.io("web.qcow2", "qcow2", ["read -q -P 7 1G 64k", "read -q -P 0 0 1M"]);
        }
    }
}

/// A relative backing name is resolved from the directory of the image's name: of several names only one may
/// lead there, and a new header has to name the image by that one.
#[test]
fn an_image_that_finds_its_base_by_another_name_is_shown_by_it() {
    // The name that leads to base, the other one, and whether the former is a symbolic link to the latter.
    let cases = [
        ("b/mid.qcow2", "a/other.qcow2", false),
        ("b/mid.qcow2", "z/other.qcow2", false),
        ("b/mid.qcow2", "a/mid.qcow2", true),
    ];
    for (found, other, is_symlink) in cases {
        let store = support::Store::new();
        for name in ["a", "b", "z"] {
            store.dir(name);
        }
        store.create("b/base.qcow2", 1 << 20, "");
        store.scribble("b/base.qcow2", "qcow2", 1);
        store.overlay(found, "base.qcow2", "qcow2", "");
        store.scribble(found, "qcow2", 2);
        if is_symlink {
            fs::rename(store.path(found), store.path(other)).unwrap();
            std::os::unix::fs::symlink(Path::new("..").join(other), store.path(found)).unwrap();
        } else {
            fs::hard_link(store.path(found), store.path(other)).unwrap();
        }
        store.overlay("b/web.qcow2", "base.qcow2", "qcow2", "");
        store.scribble("b/web.qcow2", "qcow2", 3);
        let shows = |name: &str| fs::read(store.oracle(name, "qcow2")).unwrap();
        let (web, mid) = (shows("b/web.qcow2"), shows(found));
        let engine = Engine::new(&Opened::open(&store.root(), StoreOptions::default()).unwrap());
        let status = run(&engine, "b/web", "rebase base=mid.qcow2").unwrap();
        assert_eq!(status.state, JobState::Done, "{other}: {:?}", status.error);
        assert!(shows("b/web.qcow2") == web && shows(found) == mid, "{other}");
        assert_eq!(store.info("b/web.qcow2", "qcow2")["backing-filename"], "mid.qcow2", "{other}");
        let refused = run(&engine, "b/web", "commit base=mid").map(|status| status.error);
        assert!(refused.is_err(), "{other}: its own header would name nothing: {refused:?}");
        assert!(shows("b/web.qcow2") == web && shows(found) == mid, "{other}");
    }
}

/// An owner whose name for a base does not count keeps the base unchanged, by whichever of the image's names
/// it is found.
#[test]
fn the_base_of_an_uncounted_image_with_several_names_is_not_changed() {
    for other in ["a/other.qcow2", "z/other.qcow2"] {
        let store = support::Store::new();
        for name in ["a", "b", "base", "z"] {
            store.dir(name);
        }
        store.create("base/base.qcow2", 1 << 20, "");
        store.scribble("base/base.qcow2", "qcow2", 1);
        std::os::unix::fs::symlink("../base/base.qcow2", store.path("b/link.qcow2")).unwrap();
        store.overlay("b/theirs.qcow2", "link.qcow2", "qcow2", "");
        fs::hard_link(store.path("b/theirs.qcow2"), store.path(other)).unwrap();
        store.overlay("base/web.qcow2", "base.qcow2", "qcow2", "");
        store.scribble("base/web.qcow2", "qcow2", 2);
        std::os::unix::fs::chown(store.path(other), Some(2002), Some(2002)).unwrap();
        fs::set_permissions(store.path("base/base.qcow2"), fs::Permissions::from_mode(0o600)).unwrap();
        let theirs = fs::read(store.oracle("b/theirs.qcow2", "qcow2")).unwrap();
        let options = StoreOptions { owners_count: true, ..StoreOptions::default() };
        let engine = Engine::new(&Opened::open(&store.root(), options).unwrap());
        let refused = run(&engine, "base/web", "commit base=base").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotEmpty, "{other}: {refused}");
        assert!(fs::read(store.oracle("b/theirs.qcow2", "qcow2")).unwrap() == theirs, "{other}");
    }
}
