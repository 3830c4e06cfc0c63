//! Tests docs/NOTES.md: every step of the libvirt notes, by chainfs' commands and by qemu-img's.
//!
//! A section of the page draws the store before and after it, with the commands between: for the control
//! files of a mount, for the program on a mount or on an unmounted store, and for qemu-img. Unless time is
//! taken for all of them, a section runs two of these. Each variant starts from a copy of one store, and must
//! end in the chains of the drawing; QEMU must read in every view the bytes that the drawing's view had at
//! the beginning.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use support::active::rw;
use support::examples::{blocks, document, examples};
use support::lab::extension;
use support::sim::in_turn;
use support::*;

const SIZE: u64 = 2 * MIB;
const BLOCK: usize = 4096;
/// Number of sections run at one time; most of the time is waiting.
const WORKERS: usize = 3;
/// Where a guest writes before the commands, and where after them.
const GUEST_PLACES: [(u64, u8); 2] = [(0, 0xa5), (8192, 0x5a)];

/// The tool of a block, as its marker says.
const CONTROL: &str = "console control";
const PROGRAM: &str = "console program";
const UNMOUNTED: &str = "console unmounted";
const QEMU: &str = "console qemu-img";

/// A view and the one whose bytes it shows.
#[derive(Clone, Debug)]
struct Item {
    name: String,
    shows: String,
}

impl Item {
    fn parse(text: &str) -> Self {
        let text = text.trim();
        let (name, shows) = text.split_once('=').unwrap_or((text, text));
        Self { name: name.to_owned(), shows: shows.to_owned() }
    }

    fn is_inner(&self) -> bool {
        self.name.contains('@')
    }

    /// The image that holds it, and its name in there if it is an internal snapshot.
    fn place(&self) -> (String, Option<&str>) {
        let (layer, inner) =
            self.name.split_once('@').map_or((&*self.name, None), |(l, inner)| (l, Some(inner)));
        (if extension(layer) == "raw" { layer.to_owned() } else { format!("{layer}.qcow2") }, inner)
    }

    fn file(&self) -> String {
        self.place().0
    }

    fn stem(&self) -> &str {
        self.name.trim_end_matches(".raw")
    }
}

/// The chains of a store, each base first; those after the first begin where they branch off. Internal
/// snapshots are on lines of their own.
type Chains = Vec<Vec<Item>>;

/// A section that has commands.
struct Section<'a> {
    title: &'a str,
    text: &'a str,
    before: Chains,
    after: Chains,
    /// Whether the first chain's disk is open and written all the time.
    has_guest: bool,
    /// Files that are no longer valid.
    invalid: Vec<String>,
}

fn sections(page: &str) -> Vec<Section<'_>> {
    let mut found = Vec::new();
    for text in page.split("\n#") {
        let title = text.lines().next().unwrap_or_default().trim_start_matches('#').trim();
        let blocks = blocks(text);
        let Some((_, drawing)) = blocks.iter().find(|(info, _)| *info == "chains") else {
            assert!(blocks.iter().all(|(info, _)| !info.starts_with("console")), "{title}: no drawing");
            continue;
        };
        let mut section =
            Section { title, text, before: vec![], after: vec![], has_guest: false, invalid: vec![] };
        let mut key = "";
        for line in drawing {
            let (word, rest) = line.trim_end().split_at(line.len().min(9));
            if !word.trim().is_empty() {
                key = word.trim();
            }
            let chain = || rest.split("<-").map(Item::parse).collect();
            match key {
                "before" => section.before.push(chain()),
                "after" => section.after.push(chain()),
                "guest" => section.has_guest = rest == "running",
                "invalid" => section.invalid.push(rest.to_owned()),
                _ => panic!("{title}: {line}"),
            }
        }
        assert!(!section.before.is_empty() && !section.after.is_empty(), "{title}");
        found.push(section);
    }
    found
}

/// Makes the chains, each layer with bytes of its own.
fn build(chains: &Chains) -> Store {
    let store = Store::new();
    let mut seed = 0;
    for chain in chains {
        let mut below: Option<&Item> = None;
        for item in chain {
            let file = item.file();
            let format = extension(&file);
            seed += 1;
            match below {
                _ if item.is_inner() => {
                    store.img(["snapshot", "-c", item.place().1.expect("a name"), &file]);
                }
                _ if store.path(&file).exists() => {
                    below = Some(item);
                    continue;
                }
                None if format == "raw" => store.raw(&file, SIZE, seed),
                None => store.create(&file, SIZE, ""),
                Some(below) => store.overlay(&file, &below.file(), extension(&below.file()), ""),
            }
            store.scribble(&file, format, seed);
            below = Some(item);
        }
    }
    store
}

/// Another store with the same files.
fn copy(of: &Store) -> Store {
    let store = Store::new();
    for name in files(of) {
        fs::copy(of.path(&name), store.path(&name)).expect("a copy");
    }
    store
}

/// The files of a store, without chainfs' own.
fn files(store: &Store) -> BTreeSet<String> {
    mount::names_in(&store.root()).into_iter().filter(|name| !name.starts_with(".chainfs")).collect()
}

/// QEMU's list of an image's internal snapshots: names and ids.
fn inner(store: &Store, file: &str) -> BTreeMap<String, String> {
    let info = store.info(file, extension(file));
    let listed = info["snapshots"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    listed.iter().map(|snapshot| (text(&snapshot["name"]), text(&snapshot["id"]))).collect()
}

/// The bytes that QEMU reads of a view.
fn content(store: &Store, item: &Item) -> Vec<u8> {
    let (file, name) = item.place();
    let id = name.map(|name| inner(store, &file).remove(name).unwrap_or_else(|| panic!("no {}", item.name)));
    let path = store.try_oracle(Path::new(&file), extension(&file), id.as_deref());
    let path = path.unwrap_or_else(|error| panic!("{}: {error}", item.name));
    let bytes = fs::read(&path).expect("what QEMU reads");
    fs::remove_file(path).expect("room");
    bytes
}

/// The names of the files in the chain of an image, top first, as QEMU follows them.
fn chain_of(store: &Store, file: &str) -> Vec<String> {
    let text = store.img(["info", "-U", "--backing-chain", "--output=json", file]);
    let layers: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    layers.iter().map(|layer| layer["filename"].as_str().expect("a name").to_owned()).collect()
}

/// The disk that a virtual machine would have: the end of the first chain.
fn guest_disk(chains: &Chains) -> &Item {
    chains[0].last().expect("a chain has layers")
}

/// Writes as the guest does, here into the expected disk.
fn guest_wrote(content: &mut [u8], write: usize) {
    let (at, byte) = GUEST_PLACES[write];
    content[at as usize..][..BLOCK].fill(byte);
}

fn guest_writes(disk: &File, write: usize) {
    let (at, byte) = GUEST_PLACES[write];
    disk.write_all_at(&[byte; BLOCK], at).expect("a write");
}

/// Names the section that has failed, and the tool.
struct Teller<'a>(&'a str, &'a str);

impl Drop for Teller<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("this was {:?}, {:?}", self.0, self.1);
        }
    }
}

/// Whether no chain has a running command, and no intent is left.
fn is_idle(store: &Store, mount: &Mount) -> bool {
    let chains = mount.top().into_iter();
    // A chain may disappear with the command that was given to it.
    let status =
        |chain: String| fs::read_to_string(mount.path(chain).join("control/status")).unwrap_or_default();
    let intents = store.path(".chainfs/intents");
    !chains.map(status).any(|text| text.contains("state: running"))
        && (!intents.exists() || mount::names_in(&intents).is_empty())
}

impl Section<'_> {
    /// Every way from the first drawing to the second.
    fn run_all(&self, marks: &[&str]) {
        let template = build(&self.before);
        let items = self.before.iter().flatten();
        let before: BTreeMap<String, Vec<u8>> =
            items.map(|item| (item.name.clone(), content(&template, item))).collect();
        for mark in marks {
            self.run(&template, mark, &before);
        }
    }

    /// One way from the first drawing to the second.
    fn run(&self, template: &Store, mark: &str, before: &BTreeMap<String, Vec<u8>>) {
        let examples = examples(self.text, mark);
        if examples.is_empty() {
            return;
        }
        let _teller = Teller(self.title, mark);
        let store = copy(template);
        let mut before = before.clone();
        let is_mounted = mark == CONTROL || mark == PROGRAM;
        let has_guest = self.has_guest && is_mounted;
        if has_guest {
            guest_wrote(before.get_mut(&guest_disk(&self.before).name).expect("the guest's disk"), 0);
        }
        let mut wanted = BTreeMap::new();
        for item in self.after.iter().flatten() {
            // Where one chain branches off another, the shared layer is explained at its first place.
            wanted.entry(item.name.clone()).or_insert_with(|| before[&item.shows].clone());
        }
        if has_guest {
            guest_wrote(wanted.get_mut(&guest_disk(&self.after).name).expect("the guest's disk"), 1);
        }
        if is_mounted {
            let mount = Mount::new(&store);
            let guest =
                has_guest.then(|| rw(&mount.path(guest_disk(&self.before).stem()).join("active.raw")));
            if let Some(guest) = &guest {
                guest_writes(guest, 0);
            }
            for example in examples {
                example.run(&store.beside(""));
            }
            eventually("all commands are done", || is_idle(&store, &mount));
            if let Some(guest) = &guest {
                guest_writes(guest, 1);
                let mut have = vec![0; SIZE as usize];
                guest.read_exact_at(&mut have, 0).expect("the disk");
                assert!(have == wanted[&guest_disk(&self.after).name], "the guest's disk has changed");
            }
            drop(guest);
            self.judge_mount(&mount, &wanted);
            mount.umount();
        } else {
            let place = if mark == QEMU { store.root() } else { store.beside("") };
            for example in examples {
                example.run(&place);
            }
        }
        self.judge(&store, &wanted);
    }

    /// Whether the mount has the chains of the drawing, and shows the right bytes.
    fn judge_mount(&self, mount: &Mount, wanted: &BTreeMap<String, Vec<u8>>) {
        for chain in self.after.iter().filter(|chain| !chain[0].is_inner()) {
            let leaf = chain.last().expect("a chain has layers");
            let active = mount.path(leaf.stem()).join("active.raw");
            for item in chain {
                let path = if item.name == leaf.name && active.exists() {
                    active.clone()
                } else {
                    mount.path(leaf.stem()).join("snapshots").join(format!("{}.raw", item.stem()))
                };
                let have = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                assert!(have == wanted[&item.name], "{} shows something else", path.display());
            }
        }
        assert_eq!(mount.text(".chainfs/problems.txt"), "");
    }

    /// Whether the store is that of the drawing, as QEMU sees it.
    fn judge(&self, store: &Store, wanted: &BTreeMap<String, Vec<u8>>) {
        let items: BTreeMap<&str, &Item> =
            self.after.iter().flatten().map(|item| (&*item.name, item)).collect();
        let mut expected: BTreeSet<String> = items.values().map(|item| item.file()).collect();
        expected.extend(self.invalid.iter().cloned());
        let found = files(store);
        assert_eq!(found, expected, "the files of the store");
        for item in items.values() {
            assert!(content(store, item) == wanted[&item.name], "{} shows something else", item.name);
            let file = item.file();
            if extension(&file) == "qcow2" {
                store.img(["check", "-q", &file]);
                let listed: BTreeSet<String> = inner(store, &file).into_keys().collect();
                let drawn = items.values().filter(|inner| inner.file() == file);
                let drawn = drawn.filter_map(|item| item.place().1).map(str::to_owned).collect();
                assert_eq!(listed, drawn, "internal snapshots of {file}");
            }
        }
        for (number, chain) in self.after.iter().enumerate().filter(|(_, chain)| !chain[0].is_inner()) {
            let mut expected: Vec<String> = chain.iter().rev().map(Item::file).collect();
            // A chain that begins within another continues like it.
            let others = self.after[..number].iter();
            let branched = others.clone().find_map(|other| {
                let at = other.iter().position(|item| item.name == chain[0].name)?;
                Some(other[..at].iter().rev().map(Item::file).collect::<Vec<_>>())
            });
            expected.extend(branched.unwrap_or_default());
            assert_eq!(chain_of(store, &expected[0]), expected);
        }
    }
}

#[test]
fn every_step_of_the_notes_page_leaves_the_drawn_chains() {
    let page = document("docs/NOTES.md");
    let sections = sections(&page);
    let marks = [CONTROL, PROGRAM, UNMOUNTED, QEMU];
    let known =
        blocks(&page).iter().all(|(info, _)| info.is_empty() || *info == "chains" || marks.contains(info));
    assert!(known, "a block is marked as nobody knows");
    for mark in marks {
        let count = sections.iter().filter(|section| !examples(section.text, mark).is_empty()).count();
        println!("{mark}: {count} sections");
        assert!(
            count >= if mark == UNMOUNTED { 3 } else { 20 },
            "the page has lost its commands: {mark}: {count}"
        );
    }
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(section) = sections.get(number) else { break };
                    section.run_all(&in_turn(marks, number % 2).collect::<Vec<_>>());
                }
            });
        }
    });
}
