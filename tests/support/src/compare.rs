//! Compares the mount's views with QEMU's reads.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use chainfs::units::are_zero;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde_json::Value;

use super::damage::Damage;
use super::mount::Mount;
use super::rng::Rng;
use super::store::Store;
use super::tools::{Outcome as _, tool};
use super::{KIB, MIB, chainfs_binary};
use crate::first_difference;

/// One file of a chain's directory, and how QEMU names the same thing.
#[derive(Debug, Clone)]
pub struct View {
    /// Beneath the chain's directory, as `snapshots/base.raw`.
    pub name: String,
    pub image: PathBuf,
    pub format: String,
    pub snapshot: Option<String>,
}

/// The expected views of a chain according to `qemu-img info --backing-chain` of its leaf: `active.raw`, and
/// every layer and internal snapshot by the plain naming rule (no clashes, no odd bytes).
pub fn views_of(store: &Store, leaf: &str, format: &str) -> Vec<View> {
    let path = store.path(leaf);
    let layers = layers_of(store, &path, format);
    let mut views = Vec::new();
    for (depth, layer) in layers.iter().enumerate() {
        let image = PathBuf::from(layer["filename"].as_str().expect("a layer has a file name"));
        let stem = image.file_stem().expect("a stem").to_string_lossy().into_owned();
        let stem = if depth == 0 { "active".to_owned() } else { stem };
        let format = layer["format"].as_str().expect("a layer has a format").to_owned();
        let view =
            |name: String, snapshot| View { name, image: image.clone(), format: format.clone(), snapshot };
        views
            .push(view(if depth == 0 { "active.raw".into() } else { format!("snapshots/{stem}.raw") }, None));
        for snapshot in layer["snapshots"].as_array().into_iter().flatten() {
            let (id, name) =
                (snapshot["id"].as_str().expect("an id"), snapshot["name"].as_str().expect("a name"));
            views.push(view(format!("snapshots/{stem}@{name}.raw"), Some(id.to_owned())));
        }
    }
    views
}

/// `qemu-img info --backing-chain`, leaf first.
pub fn layers_of(store: &Store, leaf: &Path, format: &str) -> Vec<Value> {
    let args = ["info", "-U", "-f", format, "--backing-chain", "--output=json"];
    let text = with_many_files("qemu-img").args(args).arg(leaf).current_dir(store.root()).succeeds();
    serde_json::from_str(&text).expect("qemu-img info speaks JSON")
}

/// Deep chains need more descriptors than a login gets.
fn with_many_files(program: &str) -> std::process::Command {
    let mut shell = tool("sh");
    shell.args(["-c", "ulimit -n 8192 && exec \"$@\"", "sh", program]);
    shell
}

/// The whole contract of one chain: its files are exactly the expected views, each equal to QEMU's
/// reading of it in size, bytes and holes; maps and descriptions of its layers agree with qemu-img.
pub fn assert_chain(store: &Store, mount: &Mount, chain: &str, leaf: &str, format: &str) {
    let views = views_of(store, leaf, format);
    let mut expected: Vec<&str> = views.iter().filter_map(|v| v.name.strip_prefix("snapshots/")).collect();
    expected.sort_unstable();
    let shown = mount.names(format!("{chain}/snapshots"));
    let shown: Vec<&String> = shown.iter().filter(|n| !n.ends_with(".vmstate")).collect();
    assert_eq!(shown, expected, "snapshots of {chain}");
    for view in &views {
        assert_view(store, mount, chain, view);
    }
    assert_described(store, mount, chain, leaf, format);
    let problem = mount.path(chain).join("info/problem.txt");
    assert!(!problem.exists(), "{chain} has a problem: {}", fs::read_to_string(&problem).unwrap_or_default());
}

/// One view against QEMU: size, bytes, holes; for a layer the maps as well.
pub fn assert_view(store: &Store, mount: &Mount, chain: &str, view: &View) {
    let shown = mount.path(chain).join(&view.name);
    let oracle = store
        .try_oracle(&view.image, &view.format, view.snapshot.as_deref())
        .unwrap_or_else(|e| panic!("QEMU cannot read {view:?}: {e}"));
    if let Some(id) = &view.snapshot {
        // QEMU reads a snapshot at the disk's present size; the view has the size of its time.
        let size = Damage::to(&view.image).snapshot_disk_size(id);
        File::options().write(true).open(&oracle).and_then(|f| f.set_len(size)).expect("the oracle's file");
    }
    assert_same(&shown, &oracle);
    let seen = runs_by_seek(&shown);
    assert_holes_are_zero(&shown, &seen, &oracle);
    // chainfs names an internal snapshot as its views do: IMAGE@NAME.
    let suffix = view.snapshot.as_ref().and_then(|_| view.name.trim_end_matches(".raw").split_once('@'));
    let image =
        suffix.map_or(view.image.clone(), |(_, name)| format!("{}@{name}", view.image.display()).into());
    let by_us = runs_by_map(store, chainfs_binary(), &image, &view.format);
    // qemu-img has no map of internal snapshots.
    let judge = match &view.snapshot {
        None => runs_by_map(store, "qemu-img", &view.image, &view.format),
        Some(_) => by_us.clone(),
    };
    assert_maps_agree(&format!("SEEK_DATA of {}", shown.display()), &seen, &judge);
    assert_maps_agree(&format!("chainfs map {}", image.display()), &by_us, &judge);
    fs::remove_file(oracle).expect("the oracle's file");
}

/// Byte for byte, first by small reads all over, then from beginning to end.
pub fn assert_same(shown: &Path, oracle: &Path) {
    let open = |path: &Path| File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (ours, theirs) = (open(shown), open(oracle));
    let size = theirs.metadata().expect("metadata").len();
    assert_eq!(ours.metadata().expect("metadata").len(), size, "size of {}", shown.display());
    let mut rng = Rng::new(size ^ 0x0dd5);
    if size > 0 {
        for _ in 0..32 {
            let at = rng.below(size);
            let len = (1 + rng.below(5000)).min(size - at);
            assert_range(&ours, &theirs, shown, at, len as usize);
        }
    }
    for at in (0..size).step_by(MIB as usize) {
        assert_range(&ours, &theirs, shown, at, MIB.min(size - at) as usize);
    }
    let mut past = [0; 16];
    assert_eq!(ours.read_at(&mut past, size).expect("a read at the end"), 0, "{} goes on", shown.display());
}

fn assert_range(ours: &File, theirs: &File, shown: &Path, at: u64, len: usize) {
    let (mut have, mut want) = (vec![0; len], vec![0; len]);
    ours.read_exact_at(&mut have, at).unwrap_or_else(|e| panic!("{} at {at}+{len}: {e}", shown.display()));
    theirs.read_exact_at(&mut want, at).expect("what QEMU reads");
    if let Some(differs) = first_difference(&have, &want) {
        let at = at + differs as u64;
        let (have, want) = (have[differs], want[differs]);
        panic!("{} differs at {at}: {have:#04x} instead of {want:#04x}", shown.display());
    }
}

/// Adjacent runs of one kind are one run; `data` is false where the guest sees zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub start: u64,
    pub end: u64,
    pub data: bool,
}

fn merged(runs: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::new();
    for run in runs.into_iter().filter(|r| r.start < r.end) {
        match all.last_mut() {
            Some(last) if last.data == run.data && last.end == run.start => last.end = run.end,
            _ => all.push(run),
        }
    }
    all
}

/// The file's holes and data by `SEEK_HOLE` and `SEEK_DATA`.
pub fn runs_by_seek(path: &Path) -> Vec<Run> {
    let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let size = file.metadata().expect("metadata").len();
    let (mut at, mut runs) = (0, Vec::new());
    while at < size {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => size,
            Err(e) => panic!("SEEK_DATA of {} at {at}: {e}", path.display()),
        };
        assert!(data >= at, "SEEK_DATA of {} goes backwards: {data} from {at}", path.display());
        runs.push(Run { start: at, end: data, data: false });
        if data < size {
            let hole =
                seek(&file, SeekFrom::Hole(data)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(hole > data && hole <= size, "SEEK_HOLE of {} from {data} says {hole}", path.display());
            runs.push(Run { start: data, end: hole, data: true });
            at = hole;
        } else {
            at = size;
        }
    }
    let past = seek(&file, SeekFrom::Data(size));
    assert_eq!(past, Err(Errno::NXIO), "SEEK_DATA at the end of {}", path.display());
    merged(runs)
}

/// The same from `map --output json` of qemu-img or chainfs.
pub fn runs_by_map(store: &Store, program: &str, image: &Path, format: &str) -> Vec<Run> {
    let mut map = with_many_files(program);
    // Names of external data files are relative to where QEMU runs.
    map.current_dir(store.root());
    if program == chainfs_binary() {
        // A single image's store is its own directory, unless more is allowed.
        map.args(["map", "-f", format, "--output", "json", "-o"]);
        map.arg(format!("backing_dir={}", store.beside("").display())).arg(image);
    } else {
        map.args(["map", "-U", "-f", format, "--output=json"]).arg(image);
    }
    let entries: Vec<Value> = serde_json::from_str(&map.succeeds()).expect("a map in JSON");
    let mut at = 0;
    merged(entries.iter().map(|entry| {
        let number = |key: &str| entry[key].as_u64().unwrap_or_else(|| panic!("{key} in {entry}"));
        let flag = |key: &str| entry[key].as_bool().unwrap_or_else(|| panic!("{key} in {entry}"));
        let (start, end) = (number("start"), number("start") + number("length"));
        assert_eq!(start, at, "{program} leaves a gap in the map of {}", image.display());
        at = end;
        Run { start, end, data: flag("data") && !flag("zero") }
    }))
}

fn assert_maps_agree(what: &str, ours: &[Run], theirs: &[Run]) {
    if ours == theirs {
        return;
    }
    let differing = ours.iter().zip(theirs).position(|(a, b)| a != b).unwrap_or(ours.len().min(theirs.len()));
    let near = |runs: &[Run]| runs[differing.min(runs.len())..].iter().take(4).copied().collect::<Vec<_>>();
    panic!("{what} differs from qemu-img map, ours {:?}.. theirs {:?}..", near(ours), near(theirs));
}

pub fn assert_holes_are_zero(shown: &Path, runs: &[Run], oracle: &Path) {
    let oracle = File::open(oracle).expect("the oracle's file");
    let mut buffer = vec![0; 64 * KIB as usize];
    for hole in runs.iter().filter(|r| !r.data) {
        for at in (hole.start..hole.end).step_by(buffer.len()) {
            let part = &mut buffer[..(64 * KIB).min(hole.end - at) as usize];
            oracle.read_exact_at(part, at).expect("what QEMU reads");
            assert!(are_zero(part), "{} calls data near {at} a hole", shown.display());
        }
    }
}

/// `info/chain.json` agrees with `qemu-img info --backing-chain`, and has one more object for each layer.
fn assert_described(store: &Store, mount: &Mount, chain: &str, leaf: &str, format: &str) {
    let theirs = layers_of(store, &store.path(leaf), format);
    let text = mount.text(format!("{chain}/info/chain.json"));
    let ours: Vec<Value> =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{chain}/info/chain.json: {e}\n{text}"));
    assert_eq!(ours.len(), theirs.len(), "layers of {chain} in chain.json");
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(ours["chainfs"].is_object(), "a chainfs object in {ours}");
        for key in [
            "virtual-size",
            "format",
            "cluster-size",
            "backing-filename",
            "backing-filename-format",
            "dirty-flag",
        ] {
            assert_eq!(ours.get(key), theirs.get(key), "{key} of a layer of {chain}\n{ours}\n{theirs}");
        }
        let details = theirs["format-specific"]["data"].as_object().filter(|_| theirs["format"] == "qcow2");
        for (key, value) in details.into_iter().flatten().filter(|(key, _)| *key != "bitmaps") {
            assert_eq!(&ours["format-specific"]["data"][key], value, "{key} of a layer of {chain}");
        }
        let snapshots = |layer: &Value| {
            let all = layer["snapshots"].as_array().cloned().unwrap_or_default();
            all.iter()
                .map(|s| (s["id"].clone(), s["name"].clone(), s["date-sec"].clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(snapshots(ours), snapshots(theirs), "internal snapshots of a layer of {chain}");
    }
}
