//! For any image by QEMU, every view shows QEMU's bytes, size, holes and description, over the options of
//! image creation. The reference is `qemu-img convert`, `map` and `info`.

use std::fs;
use std::os::unix::fs::FileExt as _;

use support::compare::assert_view;
use support::damage::header;
use support::*;

const SIZE: u64 = 6 * MIB;

/// `dir/base.qcow2` <- `dir/mid.qcow2` <- `dir/web.qcow2`, each scribbled over.
fn three_layers(store: &Store, dir: &str, size: u64, options: &str, seed: u64) -> String {
    store.dir(dir);
    let leaf = format!("{dir}/web.qcow2");
    store.create(&format!("{dir}/base.qcow2"), size, options);
    store.scribble(&format!("{dir}/base.qcow2"), "qcow2", seed);
    store.overlay(&format!("{dir}/mid.qcow2"), "base.qcow2", "qcow2", options);
    store.scribble(&format!("{dir}/mid.qcow2"), "qcow2", seed + 1);
    store.overlay(&leaf, "mid.qcow2", "qcow2", options);
    store.scribble(&leaf, "qcow2", seed + 2);
    leaf
}

/// Mounts once and holds every chain to its contract. A chain is its leaf without the extension.
fn assert_chains(store: &Store, leaves: &[String]) {
    let mount = Mount::new(store);
    for leaf in leaves {
        let (chain, extension) = leaf.rsplit_once('.').expect("an extension");
        assert_chain(store, &mount, chain, leaf, if extension == "raw" { "raw" } else { "qcow2" });
    }
    assert_eq!(mount.text(".chainfs/problems.txt"), "", "a healthy store has no problems");
    mount.umount();
}

#[test]
fn every_cluster_size_reads_as_qemu_reads_it() {
    let store = Store::new();
    let leaves = ["512", "1K", "4K", "64K", "2M"].map(|cluster| {
        let options = format!("cluster_size={cluster}");
        three_layers(&store, &format!("c{cluster}"), SIZE + 1536, &options, 100)
    });
    assert_chains(&store, &leaves);
}

#[test]
fn both_versions_read_as_qemu_reads_them() {
    let store = Store::new();
    let leaves = ["0.10", "1.1"].map(|compat| {
        let options = format!("compat={compat}");
        three_layers(&store, &format!("v{compat}"), SIZE, &options, 200)
    });
    assert_chains(&store, &leaves);
}

#[test]
fn every_refcount_width_reads_as_qemu_reads_it() {
    let store = Store::new();
    let leaves = [1, 2, 4, 8, 16, 32, 64].map(|bits| {
        let options = format!("refcount_bits={bits}");
        three_layers(&store, &format!("r{bits}"), SIZE / 2, &options, 300)
    });
    assert_chains(&store, &leaves);
}

#[test]
fn compressed_clusters_read_as_qemu_reads_them() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for kind in ["zlib", "zstd"] {
        for (cluster, bytes) in [("4K", 4 * KIB), ("64K", 64 * KIB), ("2M", 2 * MIB)] {
            let dir = format!("{kind}-{cluster}");
            store.dir(&dir);
            let (raw, base, leaf) =
                (format!("{dir}.source"), format!("{dir}/base.qcow2"), format!("{dir}/web.qcow2"));
            // A size that ends inside a cluster: the last one is compressed as a whole all the same.
            compressible(&store, &raw, 5 * MIB + 512, 400);
            let options = format!("compression_type={kind},cluster_size={cluster}");
            store.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &raw, &base]);
            fs::remove_file(store.path(&raw)).expect("the source");
            store.overlay(&leaf, "base.qcow2", "qcow2", &options);
            let mut rng = Rng::new(401);
            let last = 5 * MIB / bytes;
            let commands = [
                format!("write -q -c -P 0x2a 0 {bytes}"),
                store.write_compressed(&mut rng, bytes, bytes),
                store.write_compressed(&mut rng, last * bytes, 5 * MIB + 512 - last * bytes),
                store.write(&mut rng, 3 * MIB + 100, 5000),
            ];
            store.io(&leaf, "qcow2", commands);
            leaves.push(leaf);
        }
    }
    assert_chains(&store, &leaves);
}

/// Text-like ranges, random ranges and empty ones, so that clusters compress well, badly and not at all.
fn compressible(store: &Store, name: &str, len: u64, seed: u64) {
    store.raw(name, len, seed);
    let mut rng = Rng::new(seed + 1);
    let file = fs::OpenOptions::new().write(true).open(store.path(name)).expect("the source");
    for at in (0..len).step_by(96 << 10) {
        let word = format!("line {} of a file that repeats itself\n", rng.below(9));
        let text = word.repeat(40 * KIB as usize / word.len());
        let part = &text.as_bytes()[..text.len().min((len - at) as usize)];
        file.write_all_at(part, at).expect("a stretch of text");
    }
}

#[test]
fn extended_l2_entries_read_as_qemu_reads_them() {
    let store = Store::new();
    let leaves = ["16K", "64K", "2M"].map(|cluster| {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        three_layers(&store, &format!("x{cluster}"), SIZE, &options, 500)
    });
    store.dir("compressed");
    store.create("compressed/web.qcow2", SIZE, "extended_l2=on");
    let mut rng = Rng::new(501);
    let commands =
        [store.write_compressed(&mut rng, 64 * KIB, 64 * KIB), store.write(&mut rng, 150 * KIB, 3 * KIB)];
    store.io("compressed/web.qcow2", "qcow2", commands);
    let mut leaves = leaves.to_vec();
    leaves.push("compressed/web.qcow2".into());
    assert_chains(&store, &leaves);
}

#[test]
fn zeroed_and_discarded_clusters_hide_the_backing_file() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for (dir, options) in [("v3", "compat=1.1"), ("v2", "compat=0.10"), ("x", "extended_l2=on")] {
        store.dir(dir);
        let (base, leaf) = (format!("{dir}/base.qcow2"), format!("{dir}/web.qcow2"));
        store.create(&base, 2 * MIB, options);
        store.io(&base, "qcow2", [store.write(&mut Rng::new(1), 0, 2 * MIB)]);
        store.overlay(&leaf, "base.qcow2", "qcow2", options);
        // Preallocated zeroes, plain zeroes, zeroes over nothing, part of a cluster, discards of both kinds.
        let mut commands = vec![
            store.write(&mut Rng::new(2), 0, 512 * KIB),
            "write -q -z 64k 64k".into(),
            "write -q -z -u 192k 64k".into(),
            "write -q -z 768k 128k".into(),
            "write -q -z -u 1M 128k".into(),
            "write -q -z 1300k 10k".into(),
        ];
        // Without zero clusters a discard would show the backing file, so QEMU refuses it there.
        if dir != "v2" {
            commands.extend(["discard -q 320k 64k".into(), "discard -q 1536k 64k".into()]);
        }
        store.io(&leaf, "qcow2", commands);
        leaves.push(leaf);
    }
    assert_chains(&store, &leaves);
}

#[test]
// R1
fn a_discard_that_leaves_a_hole_shows_the_backing_file_again() {
    let store = Store::new();
    three_layers(&store, "emptied", SIZE, "", 600);
    // Emptying by commit makes clusters unallocated, not zero.
    store.img(["commit", "-q", "emptied/web.qcow2"]);
    assert_chains(&store, &["emptied/web.qcow2".into()]);
}

#[test]
fn preallocated_images_read_as_qemu_reads_them() {
    let store = Store::new();
    let leaves = ["falloc", "full"].map(|kind| {
        store.dir(kind);
        let base = format!("{kind}/base.qcow2");
        store.create(&base, SIZE, &format!("preallocation={kind}"));
        store.scribble(&base, "qcow2", 700);
        store.overlay(&format!("{kind}/web.qcow2"), "base.qcow2", "qcow2", "");
        format!("{kind}/web.qcow2")
    });
    assert_chains(&store, &leaves);
}

/// QEMU looks through metadata-only preallocation into the holes of the file itself; chainfs need not, but
/// must not call data a hole.
#[test]
fn preallocated_metadata_reads_as_qemu_reads_it() {
    let store = Store::new();
    for (name, options) in
        [("plain", "preallocation=metadata"), ("subclusters", "preallocation=metadata,extended_l2=on")]
    {
        store.create(&format!("{name}.qcow2"), SIZE, options);
        store.scribble(&format!("{name}.qcow2"), "qcow2", 710);
    }
    let mount = Mount::new(&store);
    for name in ["plain", "subclusters"] {
        let view = mount.path(name).join("active.raw");
        let oracle = store.oracle(format!("{name}.qcow2"), "qcow2");
        assert_same(&view, &oracle);
        compare::assert_holes_are_zero(&view, &compare::runs_by_seek(&view), &oracle);
    }
    mount.umount();
}

#[test]
fn internal_snapshots_are_views() {
    let store = Store::new();
    let leaf = three_layers(&store, "vm", SIZE, "", 800);
    let names = ["monday", "before-upgrade", "a b", "ünïcode", "-dash", "1.5"];
    for layer in ["vm/base.qcow2", "vm/web.qcow2"] {
        for (number, name) in names.iter().enumerate() {
            store.img(["snapshot", "-c", name, layer]);
            let mut rng = Rng::new(810 + number as u64);
            let at = rng.below(SIZE - 300_000);
            let commands = [
                store.write(&mut rng, at, 200_000),
                format!("write -q -z {} 65536", number as u64 * 131_072),
                format!("discard -q {} 65536", number as u64 * 262_144 + 65_536),
            ];
            store.io(layer, "qcow2", commands);
        }
    }
    store.img(["snapshot", "-d", "a b", "vm/web.qcow2"]);
    // The oracle must not be fooled either: two snapshots of one layer differ.
    let two: Vec<_> = views_of(&store, &leaf, "qcow2")
        .into_iter()
        .filter(|v| v.name.starts_with("snapshots/active@"))
        .collect();
    assert_eq!(two.len(), names.len() - 1);
    assert_chains(&store, &[leaf]);
}

#[test]
fn internal_snapshots_keep_their_own_size_and_bytes_in_every_cluster_size() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for (dir, options) in [
        ("small", "cluster_size=512"),
        ("big", "cluster_size=2M"),
        ("sub", "extended_l2=on"),
        ("v2", "compat=0.10"),
    ] {
        store.dir(dir);
        let leaf = format!("{dir}/web.qcow2");
        store.create(&leaf, 2 * MIB, options);
        store.scribble(&leaf, "qcow2", 820);
        store.img(["snapshot", "-c", "early", &leaf]);
        store.scribble(&leaf, "qcow2", 821);
        if dir != "v2" {
            store.img(["resize", "-q", &leaf, "3M"]);
            store.scribble(&leaf, "qcow2", 822);
            store.img(["snapshot", "-c", "late", &leaf]);
        }
        leaves.push(leaf);
    }
    assert_chains(&store, &leaves);
}

#[test]
fn odd_names_of_internal_snapshots_are_percent_encoded_and_repeated_ones_bear_their_id() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    let names = ["with/slash", "twice", "twice", "two\nlines", ".."];
    for (number, name) in names.iter().enumerate() {
        store.io(
            "web.qcow2",
            "qcow2",
            [store.write(&mut Rng::new(number as u64), number as u64 * 70_000, 70_000)],
        );
        store.img(["snapshot", "-c", name, "web.qcow2"]);
    }
    let mount = Mount::new(&store);
    let shown = mount.names("web/snapshots");
    assert_eq!(shown.len(), names.len(), "{shown:?}");
    for (name, id) in
        [("active@with%2Fslash", "1"), ("active@twice~2", "2"), ("active@twice~3", "3"), ("active@..", "5")]
    {
        let name = format!("snapshots/{name}.raw");
        let view =
            View { name, image: "web.qcow2".into(), format: "qcow2".into(), snapshot: Some(id.into()) };
        let oracle = store.try_oracle(&view.image, "qcow2", Some(id)).expect("QEMU reads it");
        assert_same(&mount.path("web").join(&view.name), &oracle);
    }
    mount.umount();
}

#[test]
fn saved_vm_state_is_a_file_beside_its_snapshot() {
    let store = Store::new();
    store.create("web.qcow2", MIB + 512, "");
    let state_len = 100 * KIB;
    store.io(
        "web.qcow2",
        "qcow2",
        [
            store.write(&mut Rng::new(1), 0, 300_000),
            format!("write -q -b -P 0x77 0 {}", 64 * KIB),
            format!("write -q -b -P 0x33 {} {}", 64 * KIB, state_len - 64 * KIB),
        ],
    );
    store.img(["snapshot", "-c", "monday", "web.qcow2"]);
    let image = Damage::to(store.path("web.qcow2"));
    let entry = image.u64(header::SNAPSHOTS_OFFSET);
    image.put_u32(entry + 32, state_len as u32);
    image.put_u64(entry + 40, state_len);
    assert_eq!(store.info("web.qcow2", "qcow2")["snapshots"][0]["vm-state-size"], state_len);

    let mount = Mount::new(&store);
    assert_eq!(mount.names("web/snapshots"), ["active@monday.raw", "active@monday.vmstate"]);
    let state = fs::read(mount.path("web/snapshots/active@monday.vmstate")).expect("the VM state");
    let expected = [vec![0x77; 64 * KIB as usize], vec![0x33; (state_len - 64 * KIB) as usize]].concat();
    assert_eq!(state.len() as u64, state_len);
    assert!(state == expected, "the VM state's bytes");
    assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
    mount.umount();
}

#[test]
fn sizes_that_end_inside_a_cluster_or_a_sector_are_qemus() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for size in [0, 512, 65_536 - 512, MIB + 512, 3 * MIB - 1024] {
        let leaf = format!("s{size}.qcow2");
        store.create(&leaf, size, "");
        if size > 0 {
            store.scribble(&leaf, "qcow2", size);
        }
        leaves.push(leaf);
    }
    store.create("poked.qcow2", MIB, "");
    store.scribble("poked.qcow2", "qcow2", 900);
    Damage::to(store.path("poked.qcow2")).put_u64(header::SIZE, 1_000_001);
    assert_eq!(store.virtual_size("poked.qcow2", "qcow2"), 999_936, "QEMU cuts to whole sectors");
    leaves.push("poked.qcow2".into());
    assert_chains(&store, &leaves);
}

#[test]
// C4
fn overlays_may_be_longer_or_shorter_than_their_backing_file() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for (dir, base, middle, leaf) in [
        ("growing", 2 * MIB, 3 * MIB + 512, 5 * MIB),
        ("shrinking", 5 * MIB, 3 * MIB + 512, 2 * MIB - 1024),
        ("waist", 4 * MIB, MIB + 512, 4 * MIB),
        ("belly", MIB + 512, 4 * MIB, MIB + 1024),
    ] {
        store.dir(dir);
        store.create(&format!("{dir}/base.qcow2"), base, "");
        store.io(&format!("{dir}/base.qcow2"), "qcow2", [store.write(&mut Rng::new(base), 0, base)]);
        for (name, backing, size) in [("mid", "base", middle), ("web", "mid", leaf)] {
            let (name, backing, size) =
                (format!("{dir}/{name}.qcow2"), format!("{backing}.qcow2"), size.to_string());
            store.img(["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2", &name, &size]);
            store.io(&name, "qcow2", [store.write(&mut Rng::new(leaf), 100_000, 300_000)]);
        }
        leaves.push(format!("{dir}/web.qcow2"));
    }
    assert_chains(&store, &leaves);
}

#[test]
fn raw_bases_of_any_length_back_qcow2() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for len in [0, 100, 512, MIB, 2 * MIB + 1, 3 * MIB - 1] {
        let dir = format!("r{len}");
        store.dir(&dir);
        store.raw(&format!("{dir}/base.raw"), len, len);
        let leaf = format!("{dir}/web.qcow2");
        let size = (len + MIB).to_string();
        store.img(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &leaf, &size]);
        store.scribble(&leaf, "qcow2", len);
        leaves.push(leaf);
    }
    assert_chains(&store, &leaves);
}

#[test]
fn a_raw_file_alone_is_a_chain() {
    let store = Store::new();
    store.raw("plain.raw", 2 * MIB, 1000);
    store.raw("odd.raw", MIB + 77, 1001);
    store.raw("empty.raw", 0, 1002);
    assert_chains(&store, &["plain.raw".into(), "odd.raw".into(), "empty.raw".into()]);
}

#[test]
fn a_raw_file_with_the_magic_of_qcow2_is_raw_all_the_same() {
    let store = Store::new();
    store.create("inner.source", MIB, "");
    fs::rename(store.path("inner.source"), store.path("guest.raw")).expect("a rename");
    store.overlay("web.qcow2", "guest.raw", "raw", "");
    assert_chains(&store, &["web.qcow2".into()]);
}

#[test]
fn a_file_of_any_name_is_an_image_if_a_header_names_it_raw() {
    let store = Store::new();
    store.raw("disk.bin", MIB, 1100);
    store.raw("golden", MIB, 1101);
    store.raw("unrelated.bin", MIB, 1102);
    for (leaf, base) in [("a.qcow2", "disk.bin"), ("b.qcow2", "golden")] {
        store.overlay(leaf, base, "raw", "");
        store.scribble(leaf, "qcow2", 1103);
    }
    store.overlay("no-extension", "golden", "raw", "");
    let mount = Mount::new(&store);
    assert_chain(&store, &mount, "a", "a.qcow2", "qcow2");
    assert_chain(&store, &mount, "b", "b.qcow2", "qcow2");
    assert_chain(&store, &mount, "no-extension", "no-extension", "qcow2");
    assert_eq!(mount.top(), ["a", "b", "no-extension"], "other files are left alone");
    mount.umount();
}

#[test]
fn backing_names_may_be_relative_or_absolute_and_lead_through_the_stores_directories() {
    let store = Store::new();
    store.dir("pool/deep");
    store.dir("leaves");
    store.raw("pool/base.raw", 2 * MIB, 1200);
    let absolute = store.path("pool/one.qcow2");
    let absolute = absolute.to_str().expect("a plain path");
    for (name, backing, format) in [
        ("pool/one.qcow2", "base.raw", "raw"),
        ("pool/deep/two.qcow2", "../one.qcow2", "qcow2"),
        ("leaves/relative.qcow2", "../pool/deep/two.qcow2", "qcow2"),
        ("leaves/absolute.qcow2", absolute, "qcow2"),
        ("leaves/dotted.qcow2", "./../leaves/.././pool/one.qcow2", "qcow2"),
        ("atop.qcow2", "pool/deep/two.qcow2", "qcow2"),
        ("beside.qcow2", "./we:ird.qcow2", "qcow2"),
    ] {
        if name == "beside.qcow2" {
            store.create("./we:ird.qcow2", 2 * MIB, "");
        }
        store.overlay(name, backing, format, "");
        store.scribble(name, "qcow2", 1201);
    }
    assert_chains(
        &store,
        &[
            "leaves/relative.qcow2".into(),
            "leaves/absolute.qcow2".into(),
            "leaves/dotted.qcow2".into(),
            "atop.qcow2".into(),
            "beside.qcow2".into(),
        ],
    );
}

#[test]
fn dirty_and_corrupt_images_can_be_read() {
    let store = Store::new();
    for name in ["lazy", "dirty", "corrupt"] {
        store.create(&format!("{name}.qcow2"), SIZE, "lazy_refcounts=on");
        store.scribble(&format!("{name}.qcow2"), "qcow2", 1300);
    }
    let mut crash = tool("qemu-io");
    crash.current_dir(store.root()).args([
        "-f",
        "qcow2",
        "-c",
        &store.write(&mut Rng::new(7), 65_536, 70_000),
    ]);
    crash.args(["-c", "flush", "-c", "abort", "dirty.qcow2"]);
    // timeout(1) hands the signal on by raising it as well.
    let status = crash.output().expect("qemu-io runs").status;
    assert!(!status.success(), "qemu-io was to abort");
    assert_eq!(store.info("dirty.qcow2", "qcow2")["dirty-flag"], true);
    assert_chains(&store, &["lazy.qcow2".into(), "dirty.qcow2".into()]);
    let image = Damage::to(store.path("corrupt.qcow2"));
    image.put_u64(header::INCOMPATIBLE, image.u64(header::INCOMPATIBLE) | 2);
    let mount = Mount::new(&store);
    assert_same(&mount.path("corrupt/active.raw"), &store.oracle("corrupt.qcow2", "qcow2"));
    assert!(mount.text("corrupt/info/problem.txt").contains("is marked as corrupt, so it is read-only"));
    mount.umount();
}

#[test]
fn images_with_bitmaps_read_as_without() {
    let store = Store::new();
    let leaf = three_layers(&store, "vm", SIZE, "", 1400);
    for layer in ["vm/base.qcow2", "vm/web.qcow2"] {
        for (name, granularity) in [("nightly", "512"), ("weekly", "65536")] {
            store.img(["bitmap", "--add", "-g", granularity, layer, name]);
        }
        store.scribble(layer, "qcow2", 1410);
    }
    assert_chains(&store, &[leaf]);
}

#[test]
fn external_data_files_hold_the_bytes_and_are_no_chains_themselves() {
    let store = Store::new();
    let mut leaves = Vec::new();
    for (name, options) in [
        ("mapped", "data_file=mapped-data.raw"),
        ("rawbit", "data_file=rawbit-data.raw,data_file_raw=on"),
        ("named", "data_file=named.bin"),
    ] {
        let leaf = format!("{name}.qcow2");
        store.create(&leaf, 2 * MIB, options);
        store.scribble(&leaf, "qcow2", 1500);
        leaves.push(leaf);
    }
    store.overlay("atop.qcow2", "mapped.qcow2", "qcow2", "");
    store.scribble("atop.qcow2", "qcow2", 1501);
    let mount = Mount::new(&store);
    assert_eq!(mount.top(), ["atop", "named", "rawbit"]);
    for leaf in ["atop", "named", "rawbit"] {
        assert_chain(&store, &mount, leaf, &format!("{leaf}.qcow2"), "qcow2");
    }
    mount.umount();
}

#[test]
fn compatible_features_do_not_block_reading() {
    let store = Store::new();
    for name in ["compatible", "autoclear", "extension", "short", "long"] {
        store.create(&format!("{name}.qcow2"), MIB, "");
        store.scribble(&format!("{name}.qcow2"), "qcow2", 1600);
    }
    let at = |name: &str| Damage::to(store.path(format!("{name}.qcow2")));
    at("compatible").put_u64(header::COMPATIBLE, 1 << 40);
    at("autoclear").put_u64(header::AUTOCLEAR, 1 << 40);
    // An unknown extension and then the end, where the feature names were.
    at("extension")
        .put(header::V3_LEN, &[&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5][..], b"hello\0\0\0", &[0; 8]].concat());
    at("short").put_u32(header::HEADER_LEN, 104);
    at("short").put(104, &[0; 16]);
    // A header longer than any known one, its end filled.
    at("long").put_u32(header::HEADER_LEN, 160);
    at("long").put(112, &[[0x5a; 48], [0; 48]].concat());
    assert_chains(
        &store,
        &["compatible", "autoclear", "extension", "short", "long"].map(|n| format!("{n}.qcow2")),
    );
}

#[test]
fn many_leaves_share_one_base() {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1700);
    store.overlay("trunk.qcow2", "base.raw", "raw", "");
    store.scribble("trunk.qcow2", "qcow2", 1701);
    let mut leaves = Vec::new();
    for number in 0..12 {
        let leaf = format!("leaf{number:02}.qcow2");
        let (backing, format) = if number % 3 == 0 { ("base.raw", "raw") } else { ("trunk.qcow2", "qcow2") };
        store.overlay(&leaf, backing, format, "");
        store.scribble(&leaf, "qcow2", 1710 + number);
        leaves.push(leaf);
    }
    assert_chains(&store, &leaves);
}

#[test]
fn layers_whose_stems_clash_are_all_shown() {
    let store = Store::new();
    store.dir("a");
    store.dir("b");
    store.raw("a/disk.raw", MIB, 1800);
    for (name, backing, format) in [
        ("a/disk.qcow2", "disk.raw", "raw"),
        ("b/disk.qcow2", "../a/disk.qcow2", "qcow2"),
        ("b/active.qcow2", "disk.qcow2", "qcow2"),
        ("web.qcow2", "b/active.qcow2", "qcow2"),
    ] {
        store.overlay(name, backing, format, "");
        store.scribble(name, "qcow2", 1801 + u64::from(name.as_bytes()[0]) + name.len() as u64);
    }
    let mount = Mount::new(&store);
    let shown = mount.names("web/snapshots");
    assert_eq!(shown.len(), 4, "{shown:?}");
    assert!(shown.contains(&"disk.raw.raw".to_owned()), "{shown:?}");
    for (image, format) in [
        ("a/disk.raw", "raw"),
        ("a/disk.qcow2", "qcow2"),
        ("b/disk.qcow2", "qcow2"),
        ("b/active.qcow2", "qcow2"),
    ] {
        let want = fs::read(store.oracle(image, format)).expect("what QEMU reads");
        let equal =
            shown.iter().filter(|n| fs::read(mount.path("web/snapshots").join(n)).expect("a view") == want);
        assert_eq!(equal.count(), 1, "{image} is one of {shown:?}");
    }
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}

/// One way of making an overlay out of all that qemu-img offers, as for its `-o`.
fn any_options(rng: &mut Rng) -> String {
    let extended = rng.below(4) == 0;
    let cluster_bits = if extended { 14 + rng.below(4) } else { 9 + rng.below(11) };
    let old = !extended && rng.below(5) == 0;
    let mut options = vec![format!("cluster_size={}", 1 << cluster_bits)];
    if old {
        options.push("compat=0.10".into());
    } else {
        // A width of one bit has no room for internal snapshots.
        options.push(format!("refcount_bits={}", 1 << (1 + rng.below(6))));
        let mut maybe = |chance: u64, option: &str| (rng.below(chance) == 0).then(|| option.to_owned());
        options.extend(maybe(2, "compression_type=zstd"));
        options.extend(maybe(4, "lazy_refcounts=on"));
        options.extend(extended.then(|| "extended_l2=on".to_owned()));
    }
    options.join(",")
}

/// `dir/base` and up to six overlays, of any options and sizes, raw or qcow2, compressed, with internal
/// snapshots, each scribbled over. Returns the leaf.
fn any_chain(store: &Store, dir: &str, seed: u64) -> String {
    let mut rng = Rng::new(seed);
    store.dir(dir);
    let size = |rng: &mut Rng| MIB + rng.below(6 * MIB / 512) * 512;
    let mut below = match rng.below(3) {
        0 => {
            let len = size(&mut rng) - rng.below(512);
            store.raw(&format!("{dir}/base.raw"), len, rng.next());
            ("base.raw".to_owned(), "raw")
        }
        compressed => {
            let (name, options) = (format!("{dir}/base.qcow2"), any_options(&mut rng));
            if compressed == 1 {
                let source = format!("{dir}.source");
                compressible(store, &source, size(&mut rng), rng.next());
                store.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &source, &name]);
                fs::remove_file(store.path(source)).expect("the source");
            } else {
                store.create(&name, size(&mut rng), &options);
            }
            store.scribble(&name, "qcow2", rng.next());
            ("base.qcow2".to_owned(), "qcow2")
        }
    };
    for layer in 0..=rng.below(6) {
        let (file, options) = (format!("l{layer}.qcow2"), any_options(&mut rng));
        let (name, len) = (format!("{dir}/{file}"), size(&mut rng).to_string());
        let mut create =
            vec!["create", "-q", "-f", "qcow2", "-o", &options, "-b", &below.0, "-F", below.1, &name];
        if rng.below(2) == 0 {
            create.push(&len);
        }
        store.img(create);
        store.scribble(&name, "qcow2", rng.next());
        for snapshot in 0..rng.below(3) {
            store.img(["snapshot", "-c", &format!("s{snapshot}"), &name]);
            store.scribble(&name, "qcow2", rng.next());
        }
        below = (file, "qcow2");
    }
    format!("{dir}/{}", below.0)
}

#[test]
fn random_chains_read_as_qemu_reads_them() {
    let count = if std::env::var_os("CHAINFS_LONG").is_some() { 150 } else { 4 };
    for first in (0..count).step_by(8) {
        let store = Store::new();
        let leaves: Vec<String> = (first..count.min(first + 8))
            .map(|seed| any_chain(&store, &format!("seed{seed}"), seed))
            .collect();
        assert_chains(&store, &leaves);
    }
}

#[test]
fn chains_of_depth_1_2_and_10_read_as_qemu_reads_them() {
    let store = Store::new();
    let leaves = [1, 2, 10].map(|depth| {
        let growth = Growth { depth, size: 4 * MIB, cluster_size: 64 * KIB, seed: 1900 + depth };
        deep_chain(&store, &format!("d{depth}"), &growth)
    });
    assert_chains(&store, &leaves);
}

#[test]
fn a_chain_of_depth_128_reads_as_qemu_reads_it() {
    reads_at_depth(128, 9);
}

#[test]
fn a_chain_of_depth_1000_reads_as_qemu_reads_it_where_time_allows() {
    match std::env::var_os("CHAINFS_LONG") {
        Some(_) => reads_at_depth(1000, 101),
        None => reads_at_depth(160, 40),
    }
}

/// Holds every `stride`th view of a deep chain, its leaf and its base, to QEMU's reading.
fn reads_at_depth(depth: u64, stride: usize) {
    let store = Store::new();
    let growth = Growth { depth, size: 8 * MIB, cluster_size: 64 * KIB, seed: depth };
    let leaf = deep_chain(&store, "deep", &growth);
    let views = views_of(&store, &leaf, "qcow2");
    assert_eq!(views.len() as u64, depth);
    let mount = Mount::new(&store);
    assert_eq!(mount.names("deep/leaf/snapshots").len() as u64, depth - 1);
    for view in views.iter().step_by(stride).chain(views.last()) {
        assert_view(&store, &mount, "deep/leaf", view);
    }
    mount.umount();
}
