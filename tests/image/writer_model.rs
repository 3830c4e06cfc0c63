//! The writer against a plain vector of bytes: any operations in any order, on every kind of image, and its
//! bytes equal the vector's.
//!
//! `CHAINFS_SEED` replays a run, `CHAINFS_MODEL_OPS` is the number of operations of all kinds of image
//! together; `CHAINFS_LONG=1` makes it a million.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use chainfs::image::check::check;
use chainfs::image::write::{Writer, WriterOptions, Zeroing};
use chainfs::units::{BlockStatus, are_zero};
use support::first_difference;
use support::sim::guest::open_writer;
use support::sim::images::{Opened, compressible};
use support::sim::value::pattern;
use support::sim::{
    Backing, IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, SimDisk, Start, StartImage, SyncRule,
    from_environment, is_long, mix, seed,
};

/// Default number of operations over all kinds of image.
const OPERATIONS: u64 = 55_000;

/// Operations for each of `kinds` kinds of image.
fn operations(kinds: usize) -> u64 {
    let total =
        from_environment("CHAINFS_MODEL_OPS").unwrap_or(if is_long() { 1_000_000 } else { OPERATIONS });
    (total / kinds as u64).max(20)
}

/// A writable disk, and its expected bytes.
struct Model<'a> {
    image: &'a StartImage,
    disks: Vec<Arc<SimDisk>>,
    options: WriterOptions,
    writer: Arc<Writer>,
    bytes: Pages,
    random: Random,
    longest: u64,
    largest: u64,
    leaks: u64,
}

impl<'a> Model<'a> {
    fn new(image: &'a StartImage, seed: u64, longest: u64) -> Self {
        let machine = Machine::forgetful();
        let disks: Vec<_> = image
            .files
            .iter()
            .enumerate()
            .map(|(file, pages)| SimDisk::new(&machine, file, pages.clone()))
            .collect();
        let mut random = Random::new(mix(seed));
        let options = WriterOptions { cache: random.one_of(&[16 << 10, 256 << 10, 16 << 20]) };
        let writer = open_writer(&disks, image.backing.as_ref(), options).unwrap();
        let mut bytes = image.initial.clone();
        bytes.set_len(image.initial_size);
        let leaks = check(&image.files[0], IMAGE).unwrap().leaks;
        // Bitmaps do not grow.
        let has_bitmaps = Opened::new(&image.files).unwrap().header.bitmaps.is_some();
        let largest = if has_bitmaps { image.initial_size } else { image.initial_size * 2 };
        Self { image, disks, options, writer, bytes, random, longest, largest, leaks }
    }

    fn size(&self) -> u64 {
        self.bytes.len()
    }

    /// A range of the disk: mostly of sectors, and sometimes one that begins or ends at a cluster's edge.
    fn range(&mut self) -> (u64, u64) {
        let size = self.size();
        let unit = self.random.one_of(&[1, SECTOR, SECTOR, SECTOR, 4 * KIB, 64 * KIB]);
        let at = self.random.next() % size / unit * unit;
        let longest = self.random.one_of(&[SECTOR, 8 * KIB, self.longest]);
        let len = (1 + self.random.next() % longest).next_multiple_of(unit);
        (at, len.min(size - at))
    }

    fn step(&mut self) -> Result<(), String> {
        let text = |error: chainfs::error::Error| error.to_string();
        match self.random.below(40) {
            0..=13 => {
                let (at, len) = self.range();
                let fill = self.random.next();
                let bytes: Vec<u8> = (0..len).map(|index| mix(fill ^ index >> 3) as u8 | 1).collect();
                self.writer.write_at(at, &bytes).map_err(text)?;
                self.bytes.write(at, &bytes);
            }
            14..=21 => {
                let (at, len) = self.range();
                let zeroing = self.random.one_of(&[Zeroing::Keep, Zeroing::Unmap]);
                self.writer.zero(at, len, zeroing).map_err(text)?;
                self.bytes.punch(at, len);
            }
            22 | 23 => {
                let (at, len) = self.range();
                self.writer.allocate(at, len).map_err(text)?;
            }
            24 if self.size() < self.largest => {
                let size = (self.size() + self.random.next() % (self.largest / 4)).min(self.largest);
                self.writer.grow(size).map_err(text)?;
                self.bytes.set_len(size.next_multiple_of(SECTOR));
            }
            25 => self.writer.flush().map_err(text)?,
            26 if self.random.once_in(4) => self.reopen()?,
            27..=29 => self.seek()?,
            _ => {
                let (at, len) = self.range();
                self.compare(at, len)?;
            }
        }
        Ok(())
    }

    fn compare(&self, at: u64, len: u64) -> Result<(), String> {
        let mut have = vec![0xA5; len as usize];
        self.writer.read_at(at, &mut have).map_err(|error| error.to_string())?;
        same(at, &have, &self.bytes.bytes(at, len), "the writer")
    }

    /// A reported hole is zero; reported data comes after a hole.
    fn seek(&mut self) -> Result<(), String> {
        let size = self.size();
        let mut at = self.random.next() % size;
        for _ in 0..8 {
            let data = self.writer.seek(at, BlockStatus::Data).map_err(|error| error.to_string())?;
            let end = data.unwrap_or(size);
            if end < at || end > size || data == Some(size) {
                return Err(format!("seeking data from {at:#x} finds {data:x?}"));
            }
            if !are_zero(&self.bytes.bytes(at, end - at)) {
                return Err(format!("{at:#x}..{end:#x} is said to be a hole, but has data"));
            }
            let hole = self.writer.seek(end, BlockStatus::Zero).map_err(|error| error.to_string())?;
            let Some(hole) = hole else { break };
            if hole <= end && data.is_some() || hole >= size {
                return Err(format!("data at {end:#x}, yet a hole is found at {hole:#x}"));
            }
            at = hole;
        }
        Ok(())
    }

    /// Closes, checks the file by all other means, and opens again.
    fn reopen(&mut self) -> Result<(), String> {
        let text = |error: chainfs::error::Error| error.to_string();
        self.writer.close().map_err(text)?;
        if self.writer.is_dirty() {
            return Err("closed, and still dirty".into());
        }
        let files: Vec<_> = self.disks.iter().map(|disk| disk.snapshot()).collect();
        let report = check(&files[0], IMAGE).map_err(text)?;
        if report.corruptions > 0 || report.check_errors > 0 || report.leaks > self.leaks {
            return Err(report.to_string());
        }
        let opened = Opened::new(&files)?;
        let view = opened.view(None, self.image.backing.as_ref())?;
        if view.size() != self.size() {
            return Err(format!("the read path sees {} bytes, not {}", view.size(), self.size()));
        }
        compare_view(&view, &self.bytes, "the read path")?;
        for (index, expected) in self.image.snapshots.iter().enumerate() {
            let view = opened.view(Some(index), self.image.backing.as_ref())?;
            compare_view(&view, expected, "an internal snapshot")?;
        }
        self.writer = open_writer(&self.disks, self.image.backing.as_ref(), self.options).map_err(text)?;
        if self.writer.size() == self.size() {
            self.compare(0, self.size())
        } else {
            Err(format!("opened again, it has {} bytes, not {}", self.writer.size(), self.size()))
        }
    }
}

fn compare_view(view: &chainfs::chain::View, expected: &Pages, what: &str) -> Result<(), String> {
    let mut bytes = vec![0; MIB as usize];
    for at in (0..view.size()).step_by(MIB as usize) {
        let len = MIB.min(view.size() - at);
        let piece = &mut bytes[..len as usize];
        view.read_at(at, piece).map_err(|error| format!("{what} at {at:#x}: {error}"))?;
        same(at, piece, &expected.bytes(at, len), what)?;
    }
    Ok(())
}

fn same(at: u64, have: &[u8], want: &[u8], what: &str) -> Result<(), String> {
    match first_difference(have, want) {
        None => Ok(()),
        Some(index) => {
            let place = at + index as u64;
            Err(format!("{what} has {:#x} at {place:#x}, not {:#x}", have[index], want[index]))
        }
    }
}

/// Runs the model on one kind of image.
fn run(name: &str, start: &Start, longest: u64, count: u64) {
    let image = start.load();
    // New images now and then: the first operations are the ones that change most.
    for (turn, first) in (0..count).step_by(1500).enumerate() {
        let seed = seed().wrapping_add(turn as u64);
        let mut model = Model::new(&image, seed, longest);
        for number in 0..(count - first).min(1500) {
            if let Err(sentence) = model.step() {
                panic!("{name}: CHAINFS_SEED={seed}: operation {number}: {sentence}");
            }
        }
        model
            .reopen()
            .unwrap_or_else(|sentence| panic!("{name}: CHAINFS_SEED={seed}: at the end: {sentence}"));
    }
}

fn run_all(kinds: Vec<(String, Start, u64)>) {
    println!("CHAINFS_SEED={}", seed());
    // Five tests share the operations.
    let count = operations(kinds.len() * 5);
    let number = kinds.len();
    for (name, start, longest) in kinds {
        run(&name, &start, longest, count);
    }
    println!("{number} kinds of image, {count} operations each");
}

fn snapshot(scratch: &support::oracle::Scratch) {
    scratch.img(&format!("snapshot -c one {IMAGE}"));
    scratch.io(IMAGE, &["write -q -P 9 0 20k"]);
    scratch.img(&format!("snapshot -c two {IMAGE}"));
}

#[test]
fn every_cluster_size_with_and_without_a_backing_image() {
    let mut kinds = Vec::new();
    for bits in 9..=21u32 {
        let cluster = 1u64 << bits;
        let options = format!("cluster_size={cluster}");
        let size = (12 * cluster).clamp(600 * KIB, 8 * MIB) + SECTOR;
        let longest = (2 * cluster).clamp(16 * KIB, 256 * KIB);
        kinds.push((format!("{options} alone"), Start::scribbled(&options, size - SECTOR), longest));
        kinds.push((format!("{options} shorter"), Start::over(size / 2 + SECTOR, &options, size), longest));
        kinds.push((format!("{options} longer"), Start::over(size * 3, &options, size), longest));
    }
    run_all(kinds);
}

#[test]
fn subclusters() {
    let mut kinds = Vec::new();
    for cluster in [16 * KIB, 64 * KIB, 2 * MIB] {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        let size = (12 * cluster).min(8 * MIB);
        let longest = (2 * cluster).min(256 * KIB);
        kinds.push((options.clone(), Start::scribbled(&options, size), longest));
        kinds.push((format!("{options} over"), Start::over(size / 2 + SECTOR, &options, size), longest));
        kinds.push((
            format!("{options} snapshots"),
            Start::scribbled(&options, size).then(snapshot),
            longest,
        ));
    }
    run_all(kinds);
}

#[test]
fn every_refcount_width_and_internal_snapshots() {
    let mut kinds = Vec::new();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for cluster in [512, 4096] {
            let options = format!("refcount_bits={bits},cluster_size={cluster}");
            let start = Start::scribbled(&options, MIB);
            kinds.push((options, if bits > 1 { start.then(snapshot) } else { start }, 32 * KIB));
        }
    }
    kinds.push((
        "snapshots over".into(),
        Start::over(MIB, "cluster_size=2k", 2 * MIB).then(snapshot),
        32 * KIB,
    ));
    run_all(kinds);
}

#[test]
fn every_feature() {
    let mut kinds = Vec::new();
    for options in [
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "lazy_refcounts=on,cluster_size=4k",
        "preallocation=metadata,cluster_size=4k",
        "preallocation=metadata,extended_l2=on",
        "preallocation=falloc",
    ] {
        kinds.push((options.to_owned(), Start::scribbled(options, 2 * MIB), 100 * KIB));
    }
    kinds.push((
        "version 2 over".into(),
        Start::over(MIB, "compat=0.10,cluster_size=4k", 2 * MIB),
        100 * KIB,
    ));
    kinds.push(("lazy over".into(), Start::over(3 * MIB, "lazy_refcounts=on", 2 * MIB), 100 * KIB));
    for kind in ["zlib", "zstd"] {
        for cluster in [4 * KIB, 64 * KIB] {
            let options = format!("compression_type={kind},cluster_size={cluster}");
            let make = move |snapshots: bool| {
                let options = options.clone();
                Start::made(move |scratch| {
                    compressible(&scratch.path("source.raw"), MIB);
                    scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} source.raw {IMAGE}"));
                    if snapshots {
                        snapshot(scratch);
                    }
                })
            };
            kinds.push((format!("{kind} {cluster}"), make(false), 100 * KIB));
            kinds.push((format!("{kind} {cluster} snapshots"), make(true), 100 * KIB));
        }
    }
    let bitmaps =
        Start::scribbled("", 2 * MIB).then(|scratch| drop(scratch.img(&format!("bitmap --add {IMAGE} one"))));
    kinds.push(("bitmaps".into(), bitmaps, 100 * KIB));
    run_all(kinds);
}

#[test]
fn external_data_files() {
    let mut kinds = Vec::new();
    for options in [
        "data_file=data.raw",
        "data_file=data.raw,cluster_size=512",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,data_file_raw=on,cluster_size=4k",
        "data_file=data.raw,extended_l2=on",
        "data_file=data.raw,preallocation=metadata",
    ] {
        kinds.push((options.to_owned(), Start::scribbled(options, 2 * MIB), 100 * KIB));
    }
    kinds.push(("data file over".into(), Start::over(MIB, "data_file=data.raw", 2 * MIB), 100 * KIB));
    run_all(kinds);
}

/// The number of threads with their own sectors.
const WRITERS: u64 = 4;
/// The number of threads with a stripe of their own: the last one is shared by two threads, which ignore each
/// other's writes.
const OWNERS: u64 = WRITERS + 1;

/// The bytes that one thread has written to its sectors.
struct Stripe {
    owner: u64,
    /// Bytes of each stripe of the disk.
    unit: u64,
    /// The tag of each sector's last write; 0 for zeroes.
    tags: std::collections::HashMap<u64, u64>,
}

impl Stripe {
    /// A random range of this thread's own.
    fn range(&self, random: &mut Random, size: u64) -> (u64, u64) {
        let round = self.unit * OWNERS;
        let start = random.next() % (size / round) * round + self.owner * self.unit;
        let first = random.next() % (self.unit / SECTOR);
        let count = 1 + random.next() % (self.unit / SECTOR - first);
        (start + first * SECTOR, count * SECTOR)
    }

    fn work(&mut self, writer: &Writer, turns: u64, size: u64, seed: u64) {
        let mut random = Random::new(mix(seed));
        for turn in 1..=turns {
            let (at, len) = self.range(&mut random, size);
            let sectors = at / SECTOR..(at + len) / SECTOR;
            match random.below(8) {
                0 | 1 => {
                    let zeroing = random.one_of(&[Zeroing::Keep, Zeroing::Unmap]);
                    writer.zero(at, len, zeroing).unwrap();
                    self.note(sectors, 0);
                }
                2 => {
                    let mut bytes = vec![0; len as usize];
                    writer.read_at(at, &mut bytes).unwrap();
                    self.verify(at, &bytes);
                }
                3 => writer.allocate(at, len).unwrap(),
                _ => {
                    let tag = (turn << 8) | (self.owner + 1);
                    let bytes: Vec<u8> = sectors.clone().flat_map(|sector| pattern(tag, sector)).collect();
                    writer.write_at(at, &bytes).unwrap();
                    self.note(sectors, tag);
                }
            }
        }
    }

    fn note(&mut self, sectors: std::ops::Range<u64>, tag: u64) {
        if self.owner < WRITERS {
            self.tags.extend(sectors.map(|sector| (sector, tag)));
        }
    }

    fn verify(&self, at: u64, bytes: &[u8]) {
        for (index, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = at / SECTOR + index as u64;
            let Some(tag) = self.tags.get(&sector) else { continue };
            let want = if *tag == 0 { [0; SECTOR as usize] } else { pattern(*tag, sector) };
            assert!(
                bytes == want,
                "sector {sector:#x} of thread {} holds {}",
                self.owner,
                support::sim::value::describe(bytes)
            );
        }
    }
}

/// Threads that read anywhere: each sector holds bytes that its owner may have written, never others.
fn read_anywhere(
    writer: &Writer,
    image: &StartImage,
    unit: u64,
    size: u64,
    seed: u64,
    done: &AtomicBool,
) -> u64 {
    let mut random = Random::new(mix(seed));
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        let at = random.next() % size / SECTOR * SECTOR;
        let mut bytes = vec![0; (16 * KIB).min(size - at) as usize];
        writer.read_at(at, &mut bytes).unwrap();
        for (index, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = at / SECTOR + index as u64;
            let tag = u64::from_be_bytes(bytes[..8].try_into().unwrap());
            let owner = sector * SECTOR / unit % OWNERS + 1;
            let is_legal = are_zero(bytes)
                || tag & 0xff == owner && bytes == pattern(tag, sector)
                || bytes == image.initial.bytes(sector * SECTOR, SECTOR);
            assert!(is_legal, "sector {sector:#x} holds {}", support::sim::value::describe(bytes));
        }
        if random.once_in(16) {
            writer.seek(at, if random.once_in(2) { BlockStatus::Data } else { BlockStatus::Zero }).unwrap();
        }
        count += 1;
    }
    count
}

fn in_parallel(name: &str, start: &Start, unit: u64, turns: u64) {
    println!("{name}: CHAINFS_SEED={}", seed());
    let image = start.load();
    let size = image.initial_size / (unit * OWNERS) * unit * OWNERS;
    let machine = Machine::new(SyncRule::Honest, true, true).forget();
    let disks: Vec<_> = image
        .files
        .iter()
        .enumerate()
        .map(|(file, pages)| SimDisk::new(&machine, file, pages.clone()))
        .collect();
    let backing: Option<&Backing> = image.backing.as_ref();
    let options = WriterOptions { cache: 64 << 10 };
    let writer = open_writer(&disks, backing, options).unwrap();
    let (done, flushes, reads) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let stripes: Vec<Stripe> = thread::scope(|scope| {
        for reader in 0..2 {
            let (writer, image, done, reads) = (&writer, &image, &done, &reads);
            scope.spawn(move || {
                // A panic here must not leave the others waiting.
                let count = read_anywhere(writer, image, unit, size, reader + 99, done);
                reads.fetch_add(count, Ordering::Relaxed);
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                writer.flush().unwrap();
                flushes.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        let threads: Vec<_> = (0..WRITERS + 2)
            .map(|number| {
                let writer = &writer;
                scope.spawn(move || {
                    let owner = number.min(WRITERS);
                    let mut stripe = Stripe { owner, unit, tags: std::collections::HashMap::new() };
                    stripe.work(writer, turns, size, seed() ^ (number << 8) ^ unit);
                    stripe
                })
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        results.into_iter().map(|result| result.expect("a writing thread")).collect()
    });
    let verify_all = |writer: &Writer| {
        let mut bytes = vec![0; size as usize];
        writer.read_at(0, &mut bytes).unwrap();
        for stripe in &stripes {
            stripe.verify(0, &bytes);
        }
    };
    verify_all(&writer);
    writer.close().unwrap();
    drop(writer);
    let files: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
    let (report, before) = (check(&files[0], IMAGE).unwrap(), check(&image.files[0], IMAGE).unwrap());
    assert!(
        report.corruptions == 0 && report.check_errors == 0 && report.leaks <= before.leaks,
        "{name}: {report}"
    );
    verify_all(&open_writer(&disks, backing, options).unwrap());
    println!("{name}: {turns} turns of {WRITERS} threads, {flushes:?} flushes, {reads:?} reads");
}

#[test]
fn threads_that_share_every_cluster() {
    let turns = if is_long() { 20_000 } else { 700 };
    for (options, backing) in [
        ("", 3 * MIB),
        ("cluster_size=4k", 3 * MIB),
        ("cluster_size=512", MIB),
        ("extended_l2=on,cluster_size=16k", 3 * MIB),
        ("compat=0.10,cluster_size=8k", 3 * MIB),
    ] {
        in_parallel(options, &Start::over(backing, options, 4 * MIB), SECTOR, turns);
    }
    let snapshots = Start::scribbled("cluster_size=4k", 2 * MIB).then(snapshot);
    in_parallel("snapshots", &snapshots, SECTOR, turns);
    let data_file = Start::scribbled("data_file=data.raw,cluster_size=4k", 2 * MIB);
    in_parallel("data file", &data_file, SECTOR, turns);
}

#[test]
fn threads_whose_clusters_are_their_own() {
    let turns = if is_long() { 20_000 } else { 700 };
    for options in ["cluster_size=4k", "cluster_size=512", "extended_l2=on,cluster_size=16k"] {
        in_parallel(options, &Start::over(3 * MIB, options, 4 * MIB), 16 * KIB, turns);
    }
    // So few clusters that each is reallocated all the time.
    for options in ["cluster_size=4k", "cluster_size=8k"] {
        in_parallel(options, &Start::new(options, 160 * KIB), 16 * KIB, 2 * turns);
    }
}
