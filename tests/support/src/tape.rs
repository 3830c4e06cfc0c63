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

/// Every state in which a crash could leave the file: at each call, the synced changes, and of the rest all,
/// none, one less, one alone, and one torn at a sector.
pub fn crash_states(start: &[u8], events: &[Event], mut judge: impl FnMut(&str, &[u8])) {
    let mut durable = start.to_vec();
    let mut pending: Vec<&Event> = Vec::new();
    for (number, event) in events.iter().enumerate() {
        if matches!(event, Event::Sync) {
            pending.drain(..).for_each(|event| event.apply(&mut durable));
            judge(&format!("synced at {number}"), &durable);
            continue;
        }
        pending.push(event);
        let last = pending.len() - 1;
        let mut state = |what: &str, keep: &dyn Fn(usize) -> bool| {
            let mut file = durable.clone();
            (0..)
                .zip(&pending)
                .filter(|(index, _)| keep(*index))
                .for_each(|(_, event)| event.apply(&mut file));
            judge(&format!("at {number}: {what}"), &file);
        };
        state("all", &|_| true);
        state("the last alone", &|index| index == last);
        if last < 20 {
            for one in 0..last {
                state(&format!("without {one}"), &|index| index != one);
            }
        }
        if let Event::Write(at, bytes) = event {
            for cut in [512, 4096, bytes.len() / 2 / 512 * 512] {
                // Sectors of the file, not of the write.
                let cut = cut.saturating_sub((*at % 512) as usize);
                if cut > 0 && cut < bytes.len() {
                    let mut file = durable.clone();
                    Event::Write(at + cut as u64, bytes[cut..].to_vec()).apply(&mut file);
                    judge(&format!("at {number}: from {cut} on"), &file);
                    let mut file = durable.clone();
                    Event::Write(*at, bytes[..cut].to_vec()).apply(&mut file);
                    judge(&format!("at {number}: up to {cut}"), &file);
                }
            }
        }
    }
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
