//! A file in memory that records every change, fails on request, and lists the states in which a crash could
//! have left it; and the reads of every disk of an image in memory.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use chainfs::cache::Cache;
use chainfs::chain::View;
use chainfs::error::{Error, ErrorKind, Result};
use chainfs::format::header::{PROBE_LEN, needed_len};
use chainfs::format::snapshot::SnapshotParser;
use chainfs::format::{Header, Snapshot};
use chainfs::image::{Caches, Image, Layer};
use chainfs::io::{Expect, Storage, WriteStorage};
use chainfs::units::Stability;

use crate::crash::{CrashLog, Effect, Effort, Visited, each_state};
use crate::sim::Random;

/// A disk writes whole sectors, in any order.
const SECTOR: usize = 512;

/// A change of the file.
#[derive(Clone, Debug)]
pub enum Event {
    Write(u64, Vec<u8>),
    Len(u64),
    Sync,
}

impl Event {
    pub fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write(at, bytes) => {
                let (at, end) = (*at as usize, *at as usize + bytes.len());
                file.resize(file.len().max(end), 0);
                file[at..end].copy_from_slice(bytes);
            }
            Self::Len(len) => file.resize(*len as usize, 0),
            Self::Sync => {}
        }
    }
}

#[derive(Default)]
struct State {
    file: Vec<u8>,
    events: Vec<Event>,
    /// The number of the change that fails, and whether all later ones do, too.
    fault: Option<(usize, bool)>,
    calls: usize,
}

/// The file.
pub struct Tape(Mutex<State>);

impl Tape {
    pub fn new(file: Vec<u8>) -> Self {
        Self(Mutex::new(State { file, ..State::default() }))
    }

    /// The changing call number `number` (from 0) fails, and if `lasting` all later ones.
    pub fn failing(file: Vec<u8>, number: usize, lasting: bool) -> Self {
        Self(Mutex::new(State { file, fault: Some((number, lasting)), ..State::default() }))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().file.clone()
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().events.clone()
    }

    fn change(&self, event: Event) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        let number = state.calls;
        state.calls += 1;
        if let Some((fault, lasting)) = state.fault
            && (number == fault || (lasting && number > fault))
        {
            // Half of it may have been done.
            if let Event::Write(at, bytes) = &event {
                Event::Write(*at, bytes[..bytes.len() / 2].to_vec()).apply(&mut state.file);
            }
            return Err(Error::new(ErrorKind::NoSpace, "the file is full"));
        }
        event.apply(&mut state.file);
        state.events.push(event);
        Ok(())
    }
}

impl Storage for Tape {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.lock().unwrap().file.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().file.len() as u64)
    }
}

impl WriteStorage for Tape {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.change(Event::Write(at, bytes.to_vec()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(Event::Len(len))
    }

    fn punch_hole(&self, _at: u64, _len: u64) -> Result<()> {
        panic!("a repair keeps all bytes")
    }

    fn write_zeroes(&self, _at: u64, _len: u64) -> Result<()> {
        panic!("a repair keeps all bytes")
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _at: u64, _len: u64) -> Result<()> {
        panic!("a repair needs no space of its own")
    }

    fn sync(&self) -> Result<()> {
        self.change(Event::Sync)
    }
}

/// The changes of one file, as the enumerator of crashes takes them.
struct FileChanges<'a> {
    start: &'a [u8],
    events: &'a [Event],
}

impl CrashLog for FileChanges<'_> {
    type State = Vec<u8>;

    fn start(&self) -> Vec<u8> {
        self.start.to_vec()
    }

    fn len(&self) -> usize {
        self.events.len()
    }

    fn effect(&self, index: usize) -> Effect {
        match &self.events[index] {
            Event::Write(_, bytes) => Effect::Change { can_tear: bytes.len() > SECTOR },
            Event::Len(_) => Effect::Change { can_tear: false },
            Event::Sync => Effect::Sync,
        }
    }

    fn covers(&self, _sync: usize, _change: usize) -> bool {
        true
    }

    fn apply(&self, change: usize, file: &mut Vec<u8>) {
        self.events[change].apply(file);
    }

    /// Sectors of the file up to one, or from there on.
    fn tear(&self, change: usize, random: &mut Random, file: &mut Vec<u8>) {
        let Event::Write(at, bytes) = &self.events[change] else { return };
        let first = SECTOR - *at as usize % SECTOR;
        let cut = first + random.below((bytes.len() - first).div_ceil(SECTOR).max(1)) * SECTOR;
        let cut = cut.min(bytes.len());
        let part = if random.once_in(2) {
            Event::Write(*at, bytes[..cut].to_vec())
        } else {
            Event::Write(at + cut as u64, bytes[cut..].to_vec())
        };
        part.apply(file);
    }

    fn hash(&self, file: &Vec<u8>) -> u64 {
        let mut hasher = DefaultHasher::new();
        file.hash(&mut hasher);
        hasher.finish()
    }

    fn describe(&self, index: usize) -> String {
        match &self.events[index] {
            Event::Write(at, bytes) => format!("{} bytes at {at:#x}", bytes.len()),
            Event::Len(len) => format!("length {len:#x}"),
            Event::Sync => "sync".to_owned(),
        }
    }
}

/// States in which a crash could leave the file: all that are worth making, each content once.
pub fn crash_states(start: &[u8], events: &[Event], mut judge: impl FnMut(&str, &[u8])) -> Visited {
    let log = FileChanges { start, events };
    let effort = Effort {
        width: 20,
        draws: 8,
        pairs: true,
        tears: 8,
        at_syncs: true,
        always_flushed: false,
        limit: usize::MAX,
    };
    each_state(&log, &effort, 1, |candidate, file| {
        judge(&format!("{:?} at {}", candidate.choice, candidate.cut), &file);
        true
    })
}

/// The reads of an image's disks: the active one and those of its snapshots, in pieces; `None` where they
/// cannot be read.
pub type Views = Vec<Vec<Option<u64>>>;

pub fn views(file: &[u8]) -> Views {
    let all = Arc::new(file.to_vec());
    let parse = || {
        let need = needed_len(&file[..file.len().min(PROBE_LEN)])?;
        Header::parse(&file[..file.len().min(need as usize)], file.len() as u64)
    };
    let Ok(header) = parse() else { return Vec::new() };
    let snapshots = snapshots(file, &header);
    let chunk = header.cluster.size().min(4096);
    let caches = Caches::new(1 << 20, 1 << 20);
    let data = header.data_file.is_some().then(|| Arc::new(vec![7u8; 1 << 20]) as Arc<dyn Storage>);
    let Ok(image) = Image::qcow2("image", all, data, Arc::new(header), Expect::SameVersion, &caches) else {
        return Vec::new();
    };
    let layers = std::iter::once(Layer::active(&image))
        .chain(snapshots.iter().map(|snapshot| Layer::snapshot(&image, snapshot)))
        .chain(snapshots.iter().map(|snapshot| Layer::vm_state(&image, snapshot)));
    let pieces = |layer: Result<Layer>| {
        let Ok(layer) = layer else { return Vec::new() };
        let view = View::new(vec![layer], Stability::Frozen, &Arc::new(Cache::new(1 << 20)));
        let mut buffer = vec![0; chunk as usize];
        let piece = |at: u64| {
            let buffer = &mut buffer[..chunk.min(view.size() - at) as usize];
            view.read_at(at, buffer).ok().map(|()| {
                let mut hasher = DefaultHasher::new();
                buffer.hash(&mut hasher);
                hasher.finish()
            })
        };
        (0..view.size().min(8 << 20)).step_by(chunk as usize).map(piece).collect()
    };
    layers.map(pieces).collect()
}

fn snapshots(file: &[u8], header: &Header) -> Vec<Snapshot> {
    let mut parser = SnapshotParser::new(header);
    let table = file.get(header.snapshots.offset.0 as usize..).unwrap_or_default();
    match parser.feed(table) {
        Ok(true) => parser.finish().unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// All readable bytes read the same.
pub fn assert_unchanged(before: &Views, after: &Views, case: &str) {
    for (number, view) in before.iter().enumerate() {
        for (piece, bytes) in view.iter().enumerate().filter(|(_, bytes)| bytes.is_some()) {
            let now = after.get(number).and_then(|view| view.get(piece)).copied().flatten();
            assert_eq!(now, *bytes, "{case}: piece {piece} of view {number}");
        }
    }
}
