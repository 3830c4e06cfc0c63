//! A daemon that is killed during a command while a guest writes; before the store is mounted again, other
//! programs change it. No view shows other bytes, no foreign change is undone, and the guest's synced data is
//! there.
//!
//! `CHAINFS_ROUNDS` says how many times; needs root.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::active::rw;
use support::block_guest::{BLOCK, BlockGuest, PLACE};
use support::command::Control;
use support::foreign::amount;
use support::lab::{Kind, LAYERS, Lab};
use support::*;

/// The commands to kill in turn; for a commit its top and base.
const COMMANDS: [(&str, Option<(&str, &str)>); 10] = [
    ("commit top=sn2 base=base", Some(("sn2", "base"))),
    ("commit top=sn3 base=sn1", Some(("sn3", "sn1"))),
    ("commit base=sn1", Some(("web", "sn1"))),
    ("commit base=base", Some(("web", "base"))),
    ("pull into=sn3 base=base", None),
    ("pull", None),
    ("delete sn2 method=pull", None),
    ("delete sn1 method=commit", None),
    ("rebase layer=sn3 base=none", None),
    ("snapshot monday", None),
];

/// Counters of events, so that a run without any is noticed.
#[derive(Debug, Default)]
struct Tally {
    cut_off: u64,
    changed_by_others: u64,
    resumed: u64,
    kept_hidden: u64,
    compared: u64,
}

/// Changes by other programs.
#[derive(Default)]
struct Others {
    /// Foreign files, with their expected bytes.
    files: BTreeMap<String, Vec<u8>>,
    /// Options of the next mount.
    options: String,
    said: String,
}

fn intents(lab: &Lab) -> u64 {
    fs::read_dir(lab.store.path(".chainfs/intents")).map_or(0, |found| found.count() as u64)
}

/// Other programs change the unmounted store.
fn others(lab: &Lab, raw_base: bool, rng: &mut Rng) -> Others {
    let mut others = Others::default();
    let (base, format) = (lab.file("base"), if raw_base { "raw" } else { "qcow2" });
    // Leftovers of a command may depend on a file that has another name by now.
    let is_readable = |name: &str| {
        let info = ["info", "--backing-chain", name];
        tool("qemu-img").args(info).current_dir(lab.store.root()).outcome().0 == 0
    };
    match rng.below(7) {
        0 | 1 if is_readable(&base) => {
            // Whatever base shows now, a new overlay of it relies on that.
            lab.store.overlay("theirs.qcow2", &base, format, "");
            others.files.insert("theirs.qcow2".to_owned(), lab.content("theirs.qcow2"));
        }
        2 if is_readable("sn1.qcow2") => {
            lab.store.overlay("theirs.qcow2", "sn1.qcow2", "qcow2", "");
            others.files.insert("theirs.qcow2".to_owned(), lab.content("theirs.qcow2"));
        }
        3 if lab.store.path(&base).exists() => {
            let mode = fs::Permissions::from_mode(0o444);
            fs::set_permissions(lab.store.path(&base), mode).expect("another mode");
        }
        4 if lab.store.path(&base).exists() => {
            fs::hard_link(lab.store.path(&base), lab.store.beside("backup")).expect("another name");
        }
        5 => others.options = format!("readonly={base}"),
        _ => {
            let copy = lab.store.beside("copy");
            tool("cp").arg("-a").arg(lab.store.root()).arg(&copy).succeeds();
            fs::remove_dir_all(lab.store.root()).expect("the store");
            fs::rename(&copy, lab.store.root()).expect("the copy");
            "copied".clone_into(&mut others.said);
        }
    }
    others
}

/// Waits until no command runs any more; returns whether every command was completed.
fn settled(lab: &Lab, mount: &Mount, context: &str) -> bool {
    let (control, start) = (Control::of(mount, "web"), Instant::now());
    let mut quiet = 0;
    while intents(lab) > 0 && quiet < 20 {
        assert!(start.elapsed() < hang(), "{context}: it never ends");
        quiet = if control.status("state") == "running" { 0 } else { quiet + 1 };
        thread::sleep(Duration::from_millis(10));
    }
    control.wait();
    intents(lab) == 0
}

/// Every listed snapshot has its bytes, or those that a commit was to give it.
fn assert_snapshots(mount: &Mount, before: &BTreeMap<String, Vec<u8>>, legal: &[&str], context: &str) -> u64 {
    let mut compared = 0;
    for chain in mount.top().iter().filter(|name| *name != "theirs") {
        let dir = Path::new(chain).join("snapshots");
        for name in mount.names(&dir) {
            let layer = name.strip_suffix(".raw").expect("a disk");
            let Some(own) = before.get(layer) else { continue };
            let shown = fs::read(mount.path(&dir).join(&name));
            let shown = shown.unwrap_or_else(|e| panic!("{context}: {chain}/{name}: {e}"));
            let is_merged = legal.contains(&layer) && legal.iter().any(|top| before[*top] == shown);
            assert!(shown == *own || is_merged, "{context}: {chain}/{name} shows other bytes");
            compared += 1;
        }
    }
    compared
}

fn round(number: u64, tally: &mut Tally) {
    let mut rng = Rng::new(number * 13 + 5);
    let (command, merged) = COMMANDS[number as usize % COMMANDS.len()];
    let raw_base = (number / COMMANDS.len() as u64).is_multiple_of(2);
    let kind = Kind { raw_base, options: "cluster_size=512", sizes: [8 << 20; 5], inner: &[] };
    // The first command is certainly interrupted while running: its chain takes long.
    let is_slow = number == 0;
    let lab = if is_slow { Lab::slow(raw_base) } else { Lab::new(kind) };
    let before: BTreeMap<String, Vec<u8>> =
        LAYERS.iter().map(|layer| ((*layer).to_owned(), lab.content(&lab.file(layer)))).collect();
    let mount = Mount::new(&lab.store);
    let active = mount.path("web/active.raw");
    let mut guest = BlockGuest::new(&active, 64);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let disk = rw(&active);
        let (guest, stop) = (&mut guest, &stop);
        let writing = scope.spawn(move || guest.work(&disk, number, stop));
        let control = Control::of(&mount, "web");
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
        let giving = scope.spawn(move || {
            // The daemon may be unable to answer.
            let _ = control.give(command);
        });
        if is_slow {
            Control::of(&mount, "web").begun();
        } else {
            thread::sleep(Duration::from_micros(rng.below(70_000)));
        }
        kill_process(daemon, Signal::KILL).expect("the daemon is ours");
        giving.join().expect("a command");
        writing.join().expect("a writer");
        stop.store(true, Ordering::Relaxed);
    });
    mount.abandon();
    let is_cut_off = intents(&lab) > 0;
    tally.cut_off += u64::from(is_cut_off);
    let others = others(&lab, raw_base, &mut rng);
    tally.changed_by_others += u64::from(is_cut_off);
    let context =
        format!("round {number}, {command}, raw base {raw_base}, {}{:?}", others.said, others.files.keys());
    let mount = Mount::with(&lab.store, &others.options);
    let is_over = settled(&lab, &mount, &context);
    tally.resumed += u64::from(is_cut_off && is_over);
    tally.kept_hidden += u64::from(!is_over);
    let (top, base) = merged.unwrap_or(("web", "web"));
    let layers: Vec<&str> = LAYERS.iter().copied().skip_while(|layer| *layer != base).collect();
    let until = layers.iter().position(|layer| *layer == top).unwrap_or(0);
    // A delete downwards gives one layer the bytes of the one above it.
    let legal: &[&str] = if command.starts_with("delete sn1") { &["sn1", "sn2"] } else { &layers[..=until] };
    tally.compared += assert_snapshots(&mount, &before, legal, &context);
    let disk = mount.path("web/active.raw");
    // If the base is protected, an active disk that it has become is no longer active.
    let disk =
        if disk.exists() { disk } else { mount.path("web/snapshots").join(&mount.names("web/snapshots")[0]) };
    guest.assert_there(&disk, &context);
    let shown = fs::read(&disk).expect("the disk");
    let (from, to) = (PLACE as usize, (PLACE + 64 * BLOCK) as usize);
    assert!(
        shown[..from] == before["web"][..from] && shown[to..] == before["web"][to..],
        "{context}: the disk"
    );
    mount.umount();
    for (name, wanted) in &others.files {
        assert!(lab.content(name) == *wanted, "{context}: {name}, of others, shows other bytes");
    }
}

#[test]
fn killed_daemons_and_foreign_changes_lose_no_data() {
    let rounds = std::env::var("CHAINFS_ROUNDS")
        .map_or_else(|_| amount(11, 1000), |text| text.parse().expect("a number"));
    let mut tally = Tally::default();
    for number in 0..rounds {
        round(number, &mut tally);
        // A run that is ended early has reported its progress.
        if (number + 1).is_multiple_of(100) {
            eprintln!("{} rounds: {tally:?}", number + 1);
        }
    }
    println!("{rounds} rounds: {tally:?}");
    assert!(tally.cut_off > 0 && tally.compared > 0, "no command was cut off: {tally:?}");
}
