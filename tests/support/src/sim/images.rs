//! The images on which a test begins: made by qemu-img, loaded into memory.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use chainfs::cache::Cache;
use chainfs::chain::View;
use chainfs::error::Result;
use chainfs::format::header::{PROBE_LEN, needed_len};
use chainfs::format::snapshot::SnapshotParser;
use chainfs::format::{Header, Snapshot};
use chainfs::image::write::BackingDisk;
use chainfs::image::{Caches, Image, Layer};
use chainfs::io::{Expect, Storage};
use chainfs::units::{BlockStatus, Run, Stability};

use super::value::{BACKING_TAG, pattern_range};
use super::{KIB, Pages, SECTOR, mix};
use crate::oracle::Scratch;

/// The image, in its directory.
pub const IMAGE: &str = "disk.qcow2";
const BACKING: &str = "backing.raw";
/// What options call the external data file.
pub const DATA_FILE: &str = "data.raw";

/// A disk below the image.
#[derive(Clone)]
pub struct Backing(pub Arc<Pages>);

impl Backing {
    /// Its own pattern, with a hole in each fourth run of 96 KiB.
    pub fn new(size: u64) -> Self {
        let mut pages = Pages::default();
        let piece = 96 * KIB;
        for at in (0..size).step_by(piece as usize) {
            if !(at / piece).is_multiple_of(4) || at == 0 {
                pages.write(at, &pattern_range(BACKING_TAG, at, piece.min(size - at)));
            }
        }
        pages.set_len(size);
        Self(Arc::new(pages))
    }
}

impl BackingDisk for Backing {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.0.fill(at, buf);
        Ok(())
    }

    fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        if at >= self.0.len() {
            return Ok(Run::new(BlockStatus::Zero, len));
        }
        Ok(self.0.extent(at, at + len))
    }
}

/// How an image is made.
pub struct Start {
    backing: Option<u64>,
    make: Box<dyn Fn(&Scratch)>,
}

/// Fills places of an image with something to begin with, so that not all is new.
pub fn scribble(scratch: &Scratch, size: u64) {
    let unit = (size / 16).next_multiple_of(SECTOR);
    let commands: Vec<String> = (0..size / unit)
        .filter_map(|index| match index % 5 {
            0 => Some(format!("write -q -P {} {} {}", index + 1, index * unit, unit.min(128 * KIB))),
            1 => Some(format!("write -q -z {} {}", index * unit, unit.min(192 * KIB))),
            2 => Some(format!("write -q -P {} {} {SECTOR}", index + 1, index * unit + SECTOR)),
            _ => None,
        })
        .collect();
    scratch.io(IMAGE, &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

impl Start {
    /// `make` leaves an image named [`IMAGE`].
    pub fn made(make: impl Fn(&Scratch) + 'static) -> Self {
        Self { backing: None, make: Box::new(make) }
    }

    /// An empty image.
    pub fn new(options: &str, size: u64) -> Self {
        let options = options.to_owned();
        Self::made(move |scratch| scratch.create(IMAGE, &options, &size.to_string()))
    }

    /// One that has some data.
    pub fn scribbled(options: &str, size: u64) -> Self {
        Self::new(options, size).then(move |scratch| scribble(scratch, size))
    }

    /// An empty image over a raw one of `backing` bytes.
    pub fn over(backing: u64, options: &str, size: u64) -> Self {
        let comma = if options.is_empty() { "" } else { "," };
        let start = Self::new(&format!("backing_file={BACKING},backing_fmt=raw{comma}{options}"), size);
        Self { backing: Some(backing), ..start }
    }

    /// Does more with it.
    pub fn then(self, more: impl Fn(&Scratch) + 'static) -> Self {
        let make = self.make;
        Self {
            backing: self.backing,
            make: Box::new(move |scratch| {
                make(scratch);
                more(scratch);
            }),
        }
    }

    pub fn load(&self) -> StartImage {
        let scratch = Scratch::new();
        let backing = self.backing.map(Backing::new);
        if let Some(backing) = &backing {
            backing.0.save(scratch.path(BACKING));
        }
        (self.make)(&scratch);
        let mut files = vec![Pages::load(scratch.path(IMAGE))];
        if Path::new(&scratch.path(DATA_FILE)).exists() {
            files.push(Pages::load(scratch.path(DATA_FILE)));
        }
        let convert = |words: &str| {
            scratch.img(&format!("convert -f qcow2 -O raw {words} {IMAGE} content.raw"));
            Pages::load(scratch.path("content.raw"))
        };
        let initial = convert("");
        let opened = Opened::new(&files).unwrap();
        let snapshots = opened.snapshots.iter().map(|snapshot| {
            let id = String::from_utf8(snapshot.id.clone()).unwrap();
            convert(&format!("-l snapshot.id={id}"))
        });
        let snapshots = snapshots.collect();
        let is_dirty = opened.header.dirty();
        StartImage {
            scratch,
            initial_size: opened.header.virtual_size,
            files,
            backing,
            initial,
            snapshots,
            is_dirty,
        }
    }
}

impl StartImage {
    /// The same image, in a directory of its own.
    pub fn elsewhere(&self) -> Self {
        let scratch = Scratch::new();
        if let Some(backing) = &self.backing {
            backing.0.save(scratch.path(BACKING));
        }
        Self {
            scratch,
            files: self.files.clone(),
            backing: self.backing.clone(),
            initial: self.initial.clone(),
            snapshots: self.snapshots.clone(),
            ..*self
        }
    }

    /// Without its directory, for a caller that keeps it until the process ends;
    /// [`elsewhere`](Self::elsewhere) makes one to be used.
    pub fn kept(self) -> Self {
        drop(std::fs::remove_dir_all(self.scratch.path("")));
        self
    }
}

/// An image in memory, and its expected bytes.
pub struct StartImage {
    /// Where it was made; its backing file is there for QEMU.
    pub scratch: Scratch,
    /// The image, and its external data file if it has one.
    pub files: Vec<Pages>,
    pub backing: Option<Backing>,
    /// The bytes of the guest's disk, as QEMU reads it.
    pub initial: Pages,
    pub initial_size: u64,
    /// The bytes of the internal snapshots.
    pub snapshots: Vec<Pages>,
    pub is_dirty: bool,
}

/// An image as the read path sees it.
pub struct Opened {
    pub header: Arc<Header>,
    pub snapshots: Vec<Snapshot>,
    image: Arc<Image>,
}

impl Opened {
    /// Opens the files of an image. The text is the error.
    pub fn new(files: &[Pages]) -> std::result::Result<Self, String> {
        let file = &files[0];
        let first = file.bytes(0, (PROBE_LEN as u64).min(file.len()));
        let need = needed_len(&first).map_err(|reason| format!("header: {reason}"))?;
        let header = Header::parse(&file.bytes(0, need.min(file.len())), file.len())
            .map_err(|reason| reason.to_string())?;
        let mut parser = SnapshotParser::new(&header);
        let (mut at, mut done) = (header.snapshots.offset.0, header.snapshots.count == 0);
        while !done {
            let piece = file.bytes(at, 4096.min(file.len().saturating_sub(at)));
            if piece.is_empty() {
                return Err("the snapshot table is cut".into());
            }
            done = parser.feed(&piece).map_err(|reason| format!("snapshot table: {reason}"))?;
            at += piece.len() as u64;
        }
        let snapshots = parser.finish().map_err(|reason| reason.to_string())?;
        let header = Arc::new(header);
        let storage = |pages: &Pages| Arc::new(pages.clone()) as Arc<dyn Storage>;
        let data_file = files.get(1).map(storage);
        let caches = Caches::new(1 << 20, 4 << 20);
        let image =
            Image::qcow2(IMAGE, storage(file), data_file, Arc::clone(&header), Expect::SameVersion, &caches)
                .map_err(|error| error.to_string())?;
        Ok(Self { header, snapshots, image })
    }

    /// The disk as the active layer (or an internal snapshot) over `backing` shows it.
    pub fn view(
        &self,
        snapshot: Option<usize>,
        backing: Option<&Backing>,
    ) -> std::result::Result<Arc<View>, String> {
        let text = |error: chainfs::error::Error| error.to_string();
        let top = match snapshot {
            None => Layer::active(&self.image),
            Some(index) => Layer::snapshot(&self.image, &self.snapshots[index]),
        };
        let mut layers = vec![top.map_err(text)?];
        if let Some(backing) = backing {
            let caches = Caches::new(0, 0);
            let storage: Arc<dyn Storage> = Arc::new(Pages::clone(&backing.0));
            let image = Image::raw(BACKING, storage, Expect::SameVersion, &caches).map_err(text)?;
            layers.push(Layer::active(&image).map_err(text)?);
        }
        Ok(View::new(layers, Stability::Frozen, &Arc::new(Cache::new(1 << 20))))
    }
}

/// A file of random bytes that compress to about a third.
pub fn compressible(path: &str, size: u64) {
    use std::io::Write;
    let mut file = std::io::BufWriter::new(File::create(path).unwrap());
    for word in 0..size / 8 {
        let value = mix(word / 3) & 0x0f0f_0f0f;
        file.write_all(&value.to_le_bytes()).unwrap();
    }
}
