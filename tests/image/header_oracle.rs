//! Changed headers before QEMU's judgement, after each step and at cuts of a crash: one in eight of them, or
//! all with `CHAINFS_LONG=1`. chainfs' own parser reads every one.

use std::sync::Arc;

use chainfs::error::ErrorKind;
use chainfs::format::{Frozen, Header};
use chainfs::image::create::{CreateOptions, NewBacking, initial_image};
use chainfs::image::write::{Writer, WriterOptions};
use chainfs::image::{HeaderChange, change_header};
use serde_json::Value;
use support::oracle::Scratch;
use support::sim::crash::each_state;
use support::sim::images::Opened;
use support::sim::{KIB, MIB, Machine, Pages, SimDisk, is_long};

const IMAGE: &str = "image.qcow2";
const DISK: &str = "8M";

fn backing(name: &str, format: &str) -> HeaderChange {
    let backing = NewBacking { name: name.into(), format: format.into() };
    HeaderChange { backing: Some(Some(backing)), frozen: None }
}

fn no_backing() -> HeaderChange {
    HeaderChange { backing: Some(None), frozen: None }
}

fn mark(words: &str) -> HeaderChange {
    let frozen = Frozen { seconds: 1_700_000_000, nanoseconds: 5, description: words.into() };
    HeaderChange { backing: None, frozen: Some(Some(frozen)) }
}

fn no_mark() -> HeaderChange {
    HeaderChange { backing: None, frozen: Some(None) }
}

/// QEMU's description of the image: name and format of its backing file. Panics unless it is clean.
fn by_qemu(scratch: &Scratch, pages: &Pages) -> (Option<String>, Option<String>) {
    pages.save(scratch.path(IMAGE));
    scratch.img(&format!("check -q -f qcow2 {IMAGE}"));
    let said = scratch.img(&format!("info --backing-chain --output=json -f qcow2 {IMAGE}"));
    let said: Value = serde_json::from_str(&said).unwrap();
    let word = |key: &str| said[0][key].as_str().map(str::to_owned);
    assert_eq!(said.as_array().unwrap().len(), 1 + usize::from(word("backing-filename").is_some()));
    (word("backing-filename"), word("backing-filename-format"))
}

fn header(pages: &Pages) -> Arc<Header> {
    // The data file may be missing; nothing is read from it.
    Opened::new(&[pages.clone(), Pages::default()]).unwrap().header
}

/// Without the names of features, which may be missing for a while.
fn nameless(header: &Header) -> Header {
    Header { feature_names: Vec::new(), ..header.clone() }
}

/// The same, by chainfs' parser.
fn by_us(pages: &Pages) -> (Option<String>, Option<String>) {
    let backing = header(pages).backing.clone();
    let name = backing.as_ref().map(|backing| String::from_utf8(backing.name.clone()).unwrap());
    (name, backing.and_then(|backing| backing.format))
}

/// Makes a change, checks every crash during it, and returns the result; `None` if it was refused.
fn changed(scratch: &Scratch, pages: &Pages, change: &HeaderChange, what: &str) -> Option<Pages> {
    let machine = Machine::honest();
    let disk = SimDisk::new(&machine, 0, pages.clone());
    match change_header(IMAGE, &*disk, change) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            assert_eq!(machine.changes(), 0, "{what}: refused after something was written");
            return None;
        }
        done => done.unwrap_or_else(|error| panic!("{what}: {error}")),
    }
    let new = disk.snapshot();
    let (old_header, new_header) = (header(pages), header(&new));
    let asked = if is_long() { 1 } else { 8 };
    let mut index = 0;
    each_state(&machine.tape(), std::slice::from_ref(pages), usize::MAX, |_, state| {
        let found = nameless(&header(&state[0]));
        assert!(found == nameless(&old_header) || found == nameless(&new_header), "{what}: {found:?}");
        if index % asked == asked / 2 {
            assert_eq!(by_qemu(scratch, &state[0]), by_us(&state[0]), "{what}");
        }
        index += 1;
    });
    assert_eq!(by_qemu(scratch, &new), by_us(&new), "{what}");
    if let Some(frozen) = &change.frozen {
        assert_eq!(new_header.frozen, *frozen, "{what}");
    }
    Some(new)
}

/// Headers as QEMU makes them, and as chainfs does.
fn images(scratch: &Scratch) -> Vec<(String, Pages)> {
    let mut found = Vec::new();
    for options in [
        "cluster_size=512",
        "cluster_size=1k",
        "cluster_size=4k",
        "cluster_size=64k",
        "compat=0.10,cluster_size=512",
        "compat=0.10,cluster_size=4k",
        "compat=0.10",
        "extended_l2=on",
        "data_file=data.raw",
        "compression_type=zstd",
    ] {
        for base in ["", "base.raw"] {
            let over =
                if base.is_empty() { String::new() } else { format!(",backing_file={base},backing_fmt=raw") };
            scratch.create(IMAGE, &format!("{options}{over}"), DISK);
            scratch.io(IMAGE, &["write -q -P 9 1M 3k"]);
            found.push((format!("{options} over {base:?}"), Pages::load(scratch.path(IMAGE))));
        }
    }
    scratch.create(IMAGE, "", DISK);
    scratch.img(&format!("bitmap --add {IMAGE} one"));
    found.push(("bitmaps".into(), Pages::load(scratch.path(IMAGE))));
    for cluster_bits in [9, 10, 12, 16] {
        for base in [None, Some(NewBacking { name: b"base.raw".to_vec(), format: "raw".into() })] {
            for frozen in [None, mark("ours").frozen.flatten()] {
                let what = format!("ours of 2^{cluster_bits}, {base:?}, {frozen:?}");
                let options = CreateOptions {
                    size: Some(8 * MIB),
                    backing: base.clone(),
                    cluster_bits,
                    frozen,
                    ..CreateOptions::default()
                };
                std::fs::write(scratch.path(IMAGE), initial_image(&options).unwrap()).unwrap();
                found.push((what, Pages::load(scratch.path(IMAGE))));
            }
        }
    }
    found
}

#[test]
// M10
fn qemu_accepts_every_intermediate_header() {
    let scratch = Scratch::new();
    let long = format!("{}base.raw", "./".repeat(507));
    let middle = format!("{}base.raw", "./".repeat(100));
    scratch.img(&format!("create -q -f raw base.raw {DISK}"));
    scratch.img(&format!("create -q -f raw data.raw {DISK}"));
    scratch.img(&format!("create -q -f qcow2 other.qcow2 {DISK}"));
    let (mut done, mut refused) = (0, Vec::new());
    for (number, (what, pages)) in images(&scratch).into_iter().enumerate() {
        let (mut pages, names) = (pages.clone(), header(&pages).feature_names.len());
        let steps = [
            ("other", backing("other.qcow2", "qcow2")),
            ("frozen", mark("before the upgrade")),
            ("long", backing(&long, "raw")),
            ("thawed", no_mark()),
            ("middle", backing(&middle, "raw")),
            ("none", no_backing()),
            ("frozen again", mark("once more")),
            ("base", backing("base.raw", "raw")),
        ];
        // Without much time: two of three, others for the next image.
        let is_tried = |place: usize| is_long() || !(place + number).is_multiple_of(3);
        for (_, (step, change)) in steps.into_iter().enumerate().filter(|(place, _)| is_tried(*place)) {
            match changed(&scratch, &pages, &change, &format!("{what}: {step}")) {
                Some(next) => {
                    pages = next;
                    done += 1;
                }
                None => refused.push(format!("{what}: {step}")),
            }
        }
        // QEMU rewrites the whole header, and keeps chainfs' extension.
        pages.save(scratch.path(IMAGE));
        assert_eq!(header(&pages).feature_names.len(), names, "{what}: the names of features");
        scratch.img(&format!("rebase -u -f qcow2 -F qcow2 -b other.qcow2 {IMAGE}"));
        let rebased = Pages::load(scratch.path(IMAGE));
        assert_eq!(header(&rebased).frozen, header(&pages).frozen, "{what}: QEMU has not kept the mark");
    }
    println!("{done} changes, refused: {refused:#?}");
    let small = |what: &String| {
        what.contains("512") || what.contains("1k") || what.contains("2^9") || what.contains("2^10")
    };
    assert!(refused.iter().all(small), "{refused:#?}");
    assert!(done > if is_long() { 250 } else { 160 }, "{done}");
}

#[test]
fn a_writer_changes_its_header_and_backing_while_in_use() {
    let scratch = Scratch::new();
    scratch.img(&format!("create -q -f raw base.raw {DISK}"));
    scratch.create(IMAGE, "backing_file=base.raw,backing_fmt=raw,cluster_size=4k", DISK);
    let machine = Machine::honest();
    let disk = SimDisk::new(&machine, 0, Pages::load(scratch.path(IMAGE)));
    let below = support::sim::Backing::new(8 * MIB);
    let options = WriterOptions { cache: 64 << 10 };
    let writer =
        Writer::qcow2(IMAGE, Arc::clone(&disk) as _, None, Some(Arc::new(below.clone())), options).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0..40 {
                let change = if turn % 2 == 0 { mark("held") } else { no_mark() };
                writer.change_header(&change).unwrap();
                writer.set_backing(Some(Arc::new(below.clone())));
                writer
                    .change_header(&backing(if turn % 3 == 0 { "base.raw" } else { "./base.raw" }, "raw"))
                    .unwrap();
            }
            writer.change_header(&mark("at last")).unwrap();
        });
        for at in 0..200 {
            writer.write_at(at * 40 * KIB, &[7; 512]).unwrap();
            let mut have = [0; 1024];
            writer.read_at(at * 40 * KIB, &mut have).unwrap();
            assert_eq!(have[..512], [7; 512]);
            assert_eq!(have[512..], below.0.bytes(at * 40 * KIB + 512, 512));
        }
        writer.grow(9 * MIB).unwrap();
    });
    writer.close().unwrap();
    let pages = disk.snapshot();
    assert_eq!(by_us(&pages), by_qemu(&scratch, &pages));
    let header = header(&pages);
    assert_eq!((header.frozen.clone(), header.virtual_size), (mark("at last").frozen.unwrap(), 9 * MIB));
    let raw = Writer::raw("raw", SimDisk::new(&machine, 1, Pages::default())).unwrap();
    raw.set_backing(None);
    assert_eq!(raw.change_header(&no_mark()).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_header_that_cannot_be_synced_poisons_the_writer_and_is_old_or_new() {
    let scratch = Scratch::new();
    scratch.create(IMAGE, "", DISK);
    let start = Pages::load(scratch.path(IMAGE));
    for number in 0..4 {
        let machine = Machine::honest();
        let disk = SimDisk::new(&machine, 0, start.clone());
        let writer =
            Writer::qcow2(IMAGE, Arc::clone(&disk) as _, None, None, WriterOptions::default()).unwrap();
        machine.arm(Some(support::sim::Fault {
            calls: support::sim::disk::Calls::Changes,
            number,
            failure: support::sim::Failure::Io,
            lasting: false,
        }));
        let done = writer.change_header(&mark("x"));
        assert_eq!(done.is_err(), machine.hit().is_some());
        assert_eq!(writer.poison().is_some(), done.is_err());
        let frozen = header(&disk.snapshot()).frozen.clone();
        assert!(frozen.is_none() || Some(frozen) == mark("x").frozen);
    }
}
