//! Reads a chain of images to its end, in every way, and compares the results.
//!
//! Any bytes will do. The library may refuse them and may fail to read them; it may not panic, nor give two
//! answers: the flattened map, a live top layer and a walk through the layers without any map have to read
//! the same, and ranges reported as zero have to read as zeroes.

use std::sync::Arc;

use chainfs::cache::Cache;
use chainfs::chain::{FlatCache, View};
use chainfs::error::Result;
use chainfs::format::header::{PROBE_LEN, needed_len};
use chainfs::format::snapshot::SnapshotParser;
use chainfs::format::{Header, Malformed, Snapshot};
use chainfs::image::check::check;
use chainfs::image::{Caches, Image, Layer, Mapping};
use chainfs::io::{Expect, Storage};
use chainfs::units::{BlockStatus, GuestOffset, Run, Stability, are_zero};

use super::random::Random;
use crate::first_difference;

/// Disks of up to this size are read as a whole; of larger ones both ends, and places.
const WHOLE: u64 = 1 << 20;
/// The limit of a walk by runs, or by seeking.
const MAX_RUNS: usize = 200;
const MAX_SEEKS: usize = 60;
/// A seek may give up after this.
const LONG: u64 = 4 << 20;
/// The number of sectors that are read one by one where a range cannot be read.
const MAX_SECTORS: usize = 100;
/// Bytes of a run that are read, at its start and at its end.
const RUN_HEAD: u64 = 64 << 10;
const RUN_TAIL: u64 = 4096;

/// A file that may be an image, and its data file.
#[derive(Clone)]
pub struct File {
    pub bytes: Arc<Vec<u8>>,
    pub data: Arc<Vec<u8>>,
}

/// The bytes read.
#[derive(Debug, Default)]
pub struct Tally {
    /// Images that were read to their end.
    pub read: u64,
    /// Images that were refused, which is all that can be done with them.
    pub refused: u64,
    pub views: u64,
    /// Bytes that all ways have read alike.
    pub bytes: u64,
    /// Ranges that no way could read.
    pub errors: u64,
    pub runs: u64,
    pub seeks: u64,
}

/// A raw file whose holes are its blocks of zeroes.
struct Sparse(Arc<Vec<u8>>);

impl Sparse {
    const BLOCK: u64 = 4096;

    fn is_data(&self, at: u64) -> bool {
        let block = self.0.chunks(Self::BLOCK as usize).nth((at / Self::BLOCK) as usize);
        block.is_some_and(|block| !are_zero(block))
    }
}

impl Storage for Sparse {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Storage::len(&*self.0)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        assert!(at < end, "an extent has bytes");
        let (data, mut next) = (self.is_data(at), at);
        while next < end && self.is_data(next) == data {
            next = (next / Self::BLOCK + 1) * Self::BLOCK;
        }
        Ok(Run::new(if data { BlockStatus::Data } else { BlockStatus::Zero }, next.min(end) - at))
    }
}

/// One opening of a file.
struct Opened {
    image: Arc<Image>,
    /// None where their table is damaged: the active state can be read all the same.
    snapshots: Vec<Snapshot>,
    damage: Option<Malformed>,
}

/// The requests to the top image.
#[expect(clippy::enum_variant_names, reason = "a state of the machine is what it is called")]
#[derive(Clone, Copy, Debug)]
enum State {
    Active,
    Snapshot(usize),
    VmState(usize),
}

/// Reads the chain of `files`, top first, each through the library's own parsers.
pub fn read_chain(files: &[File], random: &mut Random, tally: &mut Tally) {
    let sound: Vec<bool> = files.iter().map(is_sound).collect();
    let caches = || Caches::new(1 << 20, 1 << 20);
    let (frozen_caches, live_caches) =
        (caches(), if random.once_in(4) { Caches::new(0, 0) } else { caches() });
    let flat: Arc<FlatCache> = Arc::new(Cache::new(if random.once_in(8) { 0 } else { 1 << 20 }));

    let top = match open(&files[0], "layer 0", Expect::SameVersion, &frozen_caches) {
        Ok(top) => top,
        Err(reason) => {
            let excused = reason.unsupported || is_excused(&reason.sentence);
            assert!(excused || !sound[0], "sound, but not to be opened: {}", reason.sentence);
            tally.refused += 1;
            return;
        }
    };
    let damage = top.damage.as_ref().map(ToString::to_string);
    assert!(!sound[0] || damage.as_ref().is_none_or(|damage| is_excused(damage)), "sound, but {damage:?}");
    // As under a writer, whose file may grow.
    let grows = random.once_in(4);
    let expect = if grows { Expect::AnyVersion } else { Expect::SameVersion };
    let live_top =
        open(&files[0], "layer 0", expect, &live_caches).unwrap_or_else(|_| unreachable!("it was opened"));
    let below = |caches| -> Vec<Opened> {
        let open = |(file, index): (&File, usize)| open_or_raw(file, &format!("layer {index}"), caches);
        files.iter().zip(0..).skip(1).map(open).collect()
    };
    let (frozen_below, live_below) = (below(&frozen_caches), below(&live_caches));

    for state in states(&top.snapshots, random) {
        let (Ok(frozen), Ok(live)) =
            (layers(&top, &frozen_below, state), layers(&live_top, &live_below, state))
        else {
            assert!(is_huge(&top, state), "{state:?} is refused");
            continue;
        };
        let (frozen, live) =
            (View::new(frozen, Stability::Frozen, &flat), View::new(live, Stability::Live, &flat));
        assert_eq!(frozen.size(), live.size());
        let patience = MAX_SECTORS;
        let seeks = MAX_SEEKS;
        Ways { frozen, live, grows, sound: &sound, state, patience, seeks, random, tally }.read();
        tally.views += 1;
    }
    tally.read += 1;
}

/// Whether an audit finds no error that forbids reading.
fn is_sound(file: &File) -> bool {
    let Ok(report) = check(&*file.bytes, "image") else { return false };
    assert_eq!(report.exit_code() == 0, report.findings.is_empty());
    matches!(report.exit_code(), 0 | 3)
}

/// Whether an audit does not check it: whether streams unpack, how much of its last cluster the file has, and
/// the stated size of a snapshot.
fn is_excused(sentence: &str) -> bool {
    let excused = [
        "compressed cluster at",
        "past the end of the file",
        "the file ends at",
        "cut off",
        "the size of a snapshot's",
    ];
    excused.iter().any(|words| sentence.contains(words))
}

/// Why a file was not opened.
struct Refusal {
    sentence: String,
    unsupported: bool,
}

impl From<Malformed> for Refusal {
    fn from(reason: Malformed) -> Self {
        Self { sentence: reason.to_string(), unsupported: false }
    }
}

fn open(
    file: &File,
    name: &str,
    expect: Expect,
    caches: &Arc<Caches>,
) -> std::result::Result<Opened, Refusal> {
    let header = Arc::new(header(&file.bytes)?);
    let data = header.data_file.is_some().then(|| Arc::clone(&file.data) as Arc<dyn Storage>);
    let storage = Arc::clone(&file.bytes) as Arc<dyn Storage>;
    let image = Image::qcow2(name, storage, data, Arc::clone(&header), expect, caches)
        .map_err(|error| Refusal { sentence: error.to_string(), unsupported: true })?;
    let (snapshots, damage) = match snapshots(&file.bytes, &header) {
        Ok(snapshots) => (snapshots, None),
        Err(reason) => (Vec::new(), Some(reason)),
    };
    Ok(Opened { image, snapshots, damage })
}

fn open_or_raw(file: &File, name: &str, caches: &Arc<Caches>) -> Opened {
    open(file, name, Expect::SameVersion, caches).unwrap_or_else(|_| {
        let image = Image::raw(name, Arc::new(Sparse(Arc::clone(&file.bytes))), Expect::SameVersion, caches);
        Opened { image: image.expect("memory has a length"), snapshots: Vec::new(), damage: None }
    })
}

fn header(bytes: &[u8]) -> std::result::Result<Header, Malformed> {
    let need = needed_len(&bytes[..bytes.len().min(PROBE_LEN)])?;
    Header::parse(&bytes[..bytes.len().min(need as usize)], bytes.len() as u64)
}

fn snapshots(bytes: &[u8], header: &Header) -> std::result::Result<Vec<Snapshot>, Malformed> {
    let mut parser = SnapshotParser::new(header);
    let table =
        usize::try_from(header.snapshots.offset.0).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    for chunk in table.chunks(4096) {
        if parser.feed(chunk)? {
            break;
        }
    }
    parser.finish()
}

/// The active state, and parts of the snapshots.
fn states(snapshots: &[Snapshot], random: &mut Random) -> Vec<State> {
    let mut states = vec![State::Active];
    // Damaged entries are refused.
    let good: Vec<usize> = (0..snapshots.len()).filter(|index| snapshots[*index].damage.is_none()).collect();
    if let Some(last) = good.last() {
        let first = random.below(good.len());
        states.extend([State::Snapshot(good[first]), State::Snapshot(*last)]);
        let mut around = good[first..].iter().chain(&good[..first]).copied();
        let with_state = around.find(|index| snapshots[*index].vm_state_size > 0);
        states.extend(with_state.map(State::VmState));
    }
    states
}

/// Whether the state has more bytes than a file can.
fn is_huge(top: &Opened, state: State) -> bool {
    let sizes = match state {
        State::Active => return false,
        State::Snapshot(index) => [top.snapshots[index].virtual_size, None],
        State::VmState(index) => {
            [top.snapshots[index].virtual_size, Some(top.snapshots[index].vm_state_size)]
        }
    };
    sizes.into_iter().flatten().any(|size| i64::try_from(size).is_err())
}

fn layers(top: &Opened, below: &[Opened], state: State) -> Result<Vec<Layer>> {
    let (first, below) = match state {
        State::Active => (Layer::active(&top.image), below),
        State::Snapshot(index) => (Layer::snapshot(&top.image, &top.snapshots[index]), below),
        // VM state was never in a lower layer.
        State::VmState(index) => (Layer::vm_state(&top.image, &top.snapshots[index]), &[][..]),
    };
    std::iter::once(first).chain(below.iter().map(|opened| Layer::active(&opened.image))).collect()
}

/// One disk, by all the ways to read it.
struct Ways<'a> {
    /// Every layer flattened.
    frozen: Arc<View>,
    /// The top layer asked each time; an opening of its own.
    live: Arc<View>,
    /// Whether the live layer's file may grow.
    grows: bool,
    /// Of each layer, whether an audit found it fit to be read.
    sound: &'a [bool],
    state: State,
    /// The remaining number of sectors that may be read one by one.
    patience: usize,
    /// Seeks that may yet be made.
    seeks: usize,
    random: &'a mut Random,
    tally: &'a mut Tally,
}

impl Ways<'_> {
    fn read(&mut self) {
        let size = self.frozen.size();
        if size == 0 {
            return;
        }
        self.compare(0, size.min(WHOLE));
        if size > WHOLE {
            self.compare(size - (size - WHOLE).min(WHOLE), (size - WHOLE).min(WHOLE));
        }
        for _ in 0..6 {
            let (at, len) = (self.place(), 1 + self.random.below(20_000) as u64);
            self.compare(at, len.min(size - at));
        }
        let middle = self.place();
        for start in [0, middle] {
            self.walk(start);
            self.seek(start);
        }
    }

    /// A place of the disk, more often near its start, where small images have their data.
    fn place(&mut self) -> u64 {
        let size = self.frozen.size();
        let shift = if self.random.once_in(2) { 0 } else { self.random.below(64) as u32 };
        self.random.next() % (size >> shift).max(1)
    }

    /// Reads a range by all ways, in pieces; where none can, sector by sector.
    fn compare(&mut self, at: u64, len: u64) {
        let chunk = self.random.one_of(&[512, 4096, 12_345, 64 << 10, 1 << 20]);
        // Small pieces of much would take long.
        let chunk = chunk.max(len / 64);
        for (from, len) in pieces(at, len, chunk) {
            if self.alike(from, len).is_some() {
                continue;
            }
            for (from, len) in pieces(from, len, 512) {
                if self.patience == 0 {
                    break;
                }
                self.patience -= 1;
                self.alike(from, len);
            }
        }
    }

    /// The bytes of a range, which all ways read alike; `None` if none of them can.
    fn alike(&mut self, at: u64, len: u64) -> Option<Vec<u8>> {
        let read = |how: &dyn Fn(&mut [u8]) -> Result<()>| {
            let mut bytes = vec![0xa5; len as usize];
            how(&mut bytes).map(|()| bytes)
        };
        let frozen = read(&|buf| self.frozen.read_at(at, buf));
        let live = read(&|buf| self.live.read_at(at, buf));
        let plain = read(&|buf| read_by_layer(&self.live, at, buf));
        let state = self.state;
        match (frozen, live, plain) {
            (Ok(frozen), Ok(live), Ok(plain)) => {
                for (way, bytes) in [("live", live), ("layer by layer", plain)] {
                    let differs = || first_difference(&frozen, &bytes);
                    assert!(frozen == bytes, "{state:?} {at:#x}+{len:#x}: not as {way} at {:?}", differs());
                }
                self.tally.bytes += len;
                Some(frozen)
            }
            (Err(frozen), Err(_), Err(_)) => {
                self.tally.errors += 1;
                self.expect_damage(&frozen.to_string());
                None
            }
            outcomes => {
                let [frozen, live, plain] =
                    <[_; 3]>::from(outcomes).map(|outcome| outcome.err().map(|e| e.to_string()));
                panic!(
                    "{state:?} {at:#x}+{len:#x}: flattened {frozen:?}, live {live:?}, layer by layer \
                        {plain:?}"
                );
            }
        }
    }

    /// A sound image fails only for the reasons of [`is_excused`].
    fn expect_damage(&self, sentence: &str) {
        let layer =
            sentence.strip_prefix("layer ").and_then(|rest| rest.split(':').next()?.parse::<usize>().ok());
        let layer = layer.unwrap_or_else(|| panic!("an error names its image: {sentence}"));
        assert!(is_excused(sentence) || !self.sound[layer], "sound, but {:?} says: {sentence}", self.state);
    }

    /// Follows the runs of `map`.
    fn walk(&mut self, start: u64) {
        let size = self.frozen.size();
        let mut at = start;
        for _ in 0..MAX_RUNS {
            if at >= size {
                return;
            }
            self.tally.runs += 1;
            let view = if self.random.once_in(2) { &self.frozen } else { &self.live };
            let run = match view.map_run(at, size - at) {
                Ok(run) => run,
                Err(error) => {
                    let extent = view.resolve(at, size - at).expect("damage is an extent, too");
                    assert!(extent.mapping.is_none(), "{:?} {at:#x}: {error}", self.state);
                    assert!(self.alike(at, 1).is_none(), "{:?} {at:#x} reads, but: {error}", self.state);
                    at += extent.len;
                    continue;
                }
            };
            assert!(run.start == at && run.len > 0 && run.len <= size - at, "{run:?}");
            assert!(run.depth < view.layers().len() && !(run.zero && run.data), "{run:?}");
            if run.zero {
                self.expect_zeroes(at, run.len);
            } else if let Some(bytes) = self.alike(at, run.len.min(RUN_TAIL)) {
                assert!(run.present && run.data, "{run:?}");
                self.expect_at_offset(run.depth, run.offset, &bytes);
            }
            at += run.len;
        }
    }

    /// Checks that the data file has `bytes` where `map` says.
    fn expect_at_offset(&self, depth: usize, offset: Option<u64>, bytes: &[u8]) {
        let Some(offset) = offset else { return };
        let mut there = vec![0; bytes.len()];
        let have = self.frozen.layers()[depth]
            .image()
            .data()
            .read_at(offset, &mut there)
            .expect("memory can be read");
        // A raw image is padded to a whole sector.
        assert!(there == bytes && bytes.len() - have < 512, "{:?}: not what lies at {offset:#x}", self.state);
    }

    fn expect_zeroes(&mut self, at: u64, len: u64) {
        let tail = len.saturating_sub(RUN_TAIL);
        for (at, len) in [(at, len.min(RUN_HEAD)), (at + tail, len - tail)] {
            let bytes =
                self.alike(at, len).unwrap_or_else(|| panic!("zeroes at {at:#x}, which cannot be read"));
            let zero = bytes.iter().fold(0, |all, byte| all | byte) == 0;
            assert!(zero, "{:?} {at:#x}+{len:#x} is said to be zero", self.state);
        }
    }

    /// Walks from data to hole to data.
    fn seek(&mut self, start: u64) {
        let size = self.frozen.size();
        let (mut at, mut data) = (start, true);
        while self.seeks > 0 {
            self.seeks -= 1;
            self.tally.seeks += 1;
            let wanted = if data { BlockStatus::Data } else { BlockStatus::Zero };
            let found = self.frozen.seek(at, wanted).expect("memory can be read");
            let live = self.live.seek(at, wanted).expect("memory can be read");
            let end = found.unwrap_or(size);
            // The missing end of a growing file is not known to be missing; and a seek that gives up does so
            // after a number of runs, which are longer if flattened.
            let excused = self.grows || end.min(live.unwrap_or(size)) - at > LONG;
            assert!(
                found == live || excused,
                "{:?}: from {at:#x}, {data}: {found:x?}, live {live:x?}",
                self.state
            );
            assert!((at..=size).contains(&end));
            if data && end > at {
                self.expect_zeroes(at, end - at);
            }
            if found.is_none() {
                return;
            }
            // An unreadable range is data.
            let is_data = self.frozen.map_run(end, 1).map_or(true, |run| run.data);
            if is_data != data {
                // It has had enough, which takes a while.
                assert!(end - at > LONG, "{:?}: seeking from {at:#x}, {data}, finds {end:#x}", self.state);
                self.seeks = 0;
            }
            (at, data) = (end, !data);
        }
    }
}

/// `at..at + len` in pieces of `chunk` bytes.
fn pieces(at: u64, len: u64, chunk: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len).step_by(chunk as usize).map(move |done| (at + done, chunk.min(len - done)))
}

/// Reads without any map: each extent from the layer that holds it.
fn read_by_layer(view: &View, at: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let (position, left) = (at + done as u64, (buf.len() - done) as u64);
        let extent = view.resolve(position, left)?;
        assert!(extent.len > 0 && extent.len <= left);
        let piece = &mut buf[done..done + extent.len as usize];
        done += piece.len();
        if let Some(Mapping::Zero(_)) = extent.mapping {
            piece.fill(0);
            continue;
        }
        let layer = &view.layers()[extent.layer];
        match (extent.mapping, layer.map(GuestOffset(position), extent.len)?.value) {
            (Some(Mapping::Data(host)), _) => layer.image().read_data(host, piece)?,
            (Some(Mapping::Compressed(_)), Mapping::Compressed(stream)) => {
                let within = layer.within_cluster(GuestOffset(position)) as usize;
                piece.copy_from_slice(&layer.image().read_compressed(stream)?[within..within + piece.len()]);
            }
            (resolved, mapping) => panic!("{position:#x}: {resolved:?}, but {mapping:?}"),
        }
    }
    Ok(())
}
