//! A disk with its internal snapshots, and the expected bytes of each: for operations that change the set of
//! snapshots, or the size of the disk.

use std::sync::Arc;

use chainfs::error::{ErrorKind, Result};
use chainfs::format::Snapshot;
use chainfs::format::Version;
use chainfs::image::check::check;
use chainfs::image::write::{Fill, Writer, WriterOptions, Zeroing};
use chainfs::units::{BlockStatus, Run};

use super::guest::{new_snapshot, open_writer};
use super::images::{DATA_FILE, Opened};
use super::value::pattern_range;
use super::{IMAGE, KIB, Machine, Pages, Random, SECTOR, SimDisk, StartImage};
use crate::first_difference;

/// The views of an image.
#[derive(Clone, PartialEq, Eq)]
pub struct Views {
    pub disk: Vec<u8>,
    /// The internal snapshots, in the order of their table.
    pub snapshots: Vec<Vec<u8>>,
}

fn whole(pages: &Pages) -> Vec<u8> {
    pages.bytes(0, pages.len())
}

impl Views {
    /// The views of an image at the start, also by QEMU.
    pub fn of(image: &StartImage) -> Self {
        let views = Self::read(image, &Opened::new(&image.files).unwrap()).unwrap();
        let theirs =
            Self { disk: whole(&image.initial), snapshots: image.snapshots.iter().map(whole).collect() };
        assert_eq!(views.differ_from_qemu(&theirs), None, "at the start");
        views
    }

    /// The views in the files, by the read path.
    pub fn read(image: &StartImage, opened: &Opened) -> std::result::Result<Self, String> {
        let read = |snapshot: Option<usize>, size: u64| {
            let view = opened.view(snapshot, image.backing.as_ref())?;
            let mut bytes = vec![0; size as usize];
            view.read_at(0, &mut bytes).map_err(|error| format!("{snapshot:?}: {error}"))?;
            Ok::<_, String>(bytes)
        };
        let size = opened.header.virtual_size;
        let disk = read(None, size)?;
        let snapshots = opened.snapshots.iter().enumerate();
        let snapshots = snapshots.map(|(n, snapshot)| read(Some(n), snapshot.virtual_size.unwrap_or(size)));
        Ok(Self { disk, snapshots: snapshots.collect::<std::result::Result<_, _>>()? })
    }

    /// As [`Self::differ`]; QEMU shows internal snapshots with the length of the active disk.
    fn differ_from_qemu(&self, theirs: &Self) -> Option<String> {
        let (mut ours, mut theirs) = (self.clone(), theirs.clone());
        for (ours, theirs) in ours.snapshots.iter_mut().zip(&mut theirs.snapshots) {
            let len = ours.len().min(theirs.len());
            ours.truncate(len);
            theirs.truncate(len);
        }
        ours.differ(&theirs)
    }

    /// In a few words, where they are not `other`.
    pub fn differ(&self, other: &Self) -> Option<String> {
        let one = |what: &str, have: &[u8], want: &[u8]| {
            if have.len() != want.len() {
                return Some(format!("{what} has {} bytes, not {}", have.len(), want.len()));
            }
            let at = first_difference(have, want)?;
            Some(format!("{what} differs at {at:#x}: {:x?}", &have[at..(at + 8).min(have.len())]))
        };
        if self.snapshots.len() != other.snapshots.len() {
            return Some(format!("{} snapshots, not {}", self.snapshots.len(), other.snapshots.len()));
        }
        let mut pairs = self.snapshots.iter().zip(&other.snapshots).enumerate();
        one("the disk", &self.disk, &other.disk)
            .or_else(|| pairs.find_map(|(n, (have, want))| one(&format!("snapshot {n}"), have, want)))
    }
}

/// The allowed errors of an image after a crash.
#[derive(Clone, Copy, Default)]
pub struct Tolerance {
    pub leaks: u64,
    /// COPIED may be missing where a count is 1, in an image with the mark, or of version 2 without it.
    pub missing_flags: bool,
}

/// The image is sound, and shows one of these, whose index is returned.
pub fn judge(
    image: &StartImage,
    files: &[Pages],
    legal: &[&Views],
    tolerance: Tolerance,
) -> std::result::Result<usize, String> {
    let report = check(&files[0], IMAGE).map_err(|error| error.to_string())?;
    let is_missing = |finding: &&String| finding.contains("OFLAG_COPIED") && finding.contains("refcount=1");
    let missing = report.findings.iter().filter(is_missing).count() as u64;
    let header = Opened::new(files)?.header;
    let may_miss = tolerance.missing_flags && (header.dirty() || header.version == Version::V2);
    let corruptions = report.corruptions - if may_miss { missing } else { 0 };
    if corruptions > 0 || report.check_errors > 0 || report.leaks > tolerance.leaks {
        return Err(format!("check: {report}"));
    }
    let views = Views::read(image, &Opened::new(files)?)?;
    let said: Vec<_> = legal.iter().map(|legal| views.differ(legal)).collect();
    said.iter().position(Option::is_none).ok_or_else(|| format!("it shows nothing legal: {said:?}"))
}

/// QEMU finds no fault with the image, and sees the same.
pub fn judge_by_qemu(image: &StartImage, files: &[Pages], expected: &Views) {
    let scratch = &image.scratch;
    files[0].save(scratch.path(IMAGE));
    if let Some(data) = files.get(1) {
        data.save(scratch.path(DATA_FILE));
    }
    scratch.img(&format!("check -q {IMAGE}"));
    let snapshots = Opened::new(files).unwrap().snapshots;
    let ids = snapshots.iter().map(|snapshot| String::from_utf8(snapshot.id.clone()).unwrap());
    let convert = |words: &str| {
        scratch.img(&format!("convert -f qcow2 -O raw {words} {IMAGE} content.raw"));
        whole(&Pages::load(scratch.path("content.raw")))
    };
    let theirs = Views {
        disk: convert(""),
        snapshots: ids.map(|id| convert(&format!("-l snapshot.id={id}"))).collect(),
    };
    assert_eq!(expected.differ_from_qemu(&theirs), None, "as QEMU sees it");
}

/// Everything is to be filled from below.
struct All;

impl Fill for All {
    fn wanted(&self, _at: u64, len: u64) -> Result<Run<Option<BlockStatus>>> {
        Ok(Run::new(Some(BlockStatus::Data), len))
    }
}

/// A writer, and its expected views.
pub struct Ledger {
    pub machine: Arc<Machine>,
    pub disks: Vec<Arc<SimDisk>>,
    pub writer: Arc<Writer>,
    pub views: Views,
    tag: u64,
}

impl Ledger {
    pub fn new(image: &StartImage, machine: &Arc<Machine>, options: WriterOptions) -> Self {
        Self::with(image, machine, options, &image.files, Views::of(image)).unwrap()
    }

    /// On other files of the same image.
    pub fn with(
        image: &StartImage,
        machine: &Arc<Machine>,
        options: WriterOptions,
        files: &[Pages],
        views: Views,
    ) -> Result<Self> {
        let disks: Vec<_> =
            files.iter().enumerate().map(|(n, pages)| SimDisk::new(machine, n, pages.clone())).collect();
        let writer = open_writer(&disks, image.backing.as_ref(), options)?;
        Ok(Self { machine: Arc::clone(machine), disks, writer, views, tag: 9000 })
    }

    pub fn files(&self) -> Vec<Pages> {
        self.disks.iter().map(|disk| disk.snapshot()).collect()
    }

    pub fn listed(&self) -> Vec<Snapshot> {
        self.writer.snapshots().unwrap()
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.views.disk[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn write(&mut self, at: u64, len: u64) -> Result<()> {
        self.tag += 1;
        let bytes = pattern_range(self.tag, at, len);
        self.writer.write_at(at, &bytes)?;
        self.put(at, &bytes);
        Ok(())
    }

    pub fn take(&mut self, name: &str) -> Result<()> {
        self.writer.take_snapshot(&new_snapshot(name))?;
        self.views.snapshots.push(self.views.disk.clone());
        Ok(())
    }

    pub fn delete(&mut self, index: usize) -> Result<()> {
        self.writer.delete_snapshot(&self.writer.snapshots()?[index])?;
        self.views.snapshots.remove(index);
        Ok(())
    }

    pub fn apply(&mut self, index: usize) -> Result<()> {
        self.writer.apply_snapshot(&self.writer.snapshots()?[index], None)?;
        self.views.disk = self.views.snapshots[index].clone();
        Ok(())
    }

    /// Applies one, and saves the disk as another.
    pub fn apply_and_save(&mut self, index: usize, name: &str) -> Result<()> {
        self.writer.apply_snapshot(&self.writer.snapshots()?[index], Some(&new_snapshot(name)))?;
        let disk = self.views.snapshots[index].clone();
        self.views.snapshots.push(std::mem::replace(&mut self.views.disk, disk));
        Ok(())
    }

    pub fn shrink(&mut self, size: u64) -> Result<()> {
        self.writer.shrink(size)?;
        self.views.disk.truncate(size.next_multiple_of(SECTOR) as usize);
        Ok(())
    }

    pub fn grow(&mut self, size: u64) -> Result<()> {
        self.writer.grow(size)?;
        self.views.disk.resize(size.next_multiple_of(SECTOR) as usize, 0);
        Ok(())
    }

    /// Does one thing of the kinds that do not change sizes or snapshots.
    pub fn step(&mut self, random: &mut Random, longest: u64) -> Result<()> {
        let size = self.views.disk.len() as u64;
        if size == 0 {
            return Ok(());
        }
        let at = random.next() % size / SECTOR * SECTOR;
        let len = ((1 + random.next() % longest.div_ceil(SECTOR)) * SECTOR).min(size - at);
        match random.below(12) {
            0 => self.writer.flush(),
            kind @ 1..=3 => {
                let zeroing = if kind == 1 { Zeroing::Keep } else { Zeroing::Unmap };
                self.writer.zero(at, len, zeroing)?;
                self.put(at, &vec![0; len as usize]);
                Ok(())
            }
            4 => self.writer.allocate(at, len),
            _ => self.write(at, len),
        }
    }

    /// Does one operation of any kind. Operations that an image of its kind does not support are left out.
    pub fn any_step(&mut self, random: &mut Random, longest: u64) -> Result<()> {
        let (size, count) = (self.views.disk.len() as u64, self.views.snapshots.len());
        let done = match random.below(24) {
            0 | 1 if count < 5 => self.take("any"),
            2 | 3 if count > 0 => self.delete(random.below(count)),
            4 | 5 if count > 0 => self.apply(random.below(count)),
            6 => self.shrink(size - (random.next() % (size / 3 + 1)).min(size)),
            7 => self.grow(size + random.next() % (96 * KIB)),
            8 | 9 => self.writer.fill(random.next() % (size + 1), longest, &All).map(drop),
            _ => self.step(random, longest),
        };
        done.or_else(|error| if error.kind() == ErrorKind::Unsupported { Ok(()) } else { Err(error) })
    }

    /// The writer shows the expected bytes.
    pub fn verify(&self) -> std::result::Result<(), String> {
        let mut have = vec![0; self.views.disk.len()];
        if self.writer.size() != have.len() as u64 {
            return Err(format!("the disk has {} bytes, not {}", self.writer.size(), have.len()));
        }
        self.writer.read_at(0, &mut have).map_err(|error| error.to_string())?;
        let wrong = first_difference(&have, &self.views.disk);
        wrong.map_or(Ok(()), |at| Err(format!("the writer shows other bytes at {at:#x}")))
    }
}
