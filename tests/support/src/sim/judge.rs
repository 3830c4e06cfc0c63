//! The checks of an image after any crash.
//!
//! No corruption, every sector one of its allowed versions, internal snapshots unchanged; the writer opens it
//! without writing, sees the same bytes, writes on, and leaves no new leaks. QEMU checks some states as well.

use std::cell::Cell;

use chainfs::format::Version;
use chainfs::image::check::{CheckReport, check};
use chainfs::image::write::{Writer, WriterOptions, Zeroing};

use super::guest::open_writer;
use super::history::{History, Moment};
use super::images::{DATA_FILE, Opened};
use super::value::pattern_range;
use super::{IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, SimDisk, StartImage, is_long, mix};
use crate::first_difference;

/// Bytes of one piece of the disk that is read.
const PIECE: u64 = 64 * KIB;
/// Larger disks are not converted by QEMU.
const MAX_CONVERTED: u64 = 1 << 30;
/// The tag of writes after the crash.
const AFTER_TAG: u64 = 0xAF7E;

/// Bytes of the disk, by position.
type Content = Vec<(u64, Vec<u8>)>;

/// A state that a crash may have left.
pub struct State {
    pub files: Vec<Pages>,
    /// Events of the tape, of which some may be lost.
    pub cut: usize,
    /// For random choices of the judge.
    pub seed: u64,
}

/// Judges states of one image with one history.
pub struct Judge<'a> {
    image: &'a StartImage,
    history: &'a History,
    options: WriterOptions,
    pieces: Vec<(u64, u64)>,
    /// One state in so many is shown to QEMU as well.
    pub qemu_one_in: u64,
    pub by_qemu: Cell<u64>,
}

/// The checker's sentences, if there is more than leaks.
fn judge_report(files: &[Pages], may_share: bool) -> Result<CheckReport, String> {
    let report = check(&files[0], IMAGE).map_err(|error| format!("check: {error}"))?;
    // Each finding that is not a leak.
    let is_flag = |finding: &String| finding.contains("OFLAG_COPIED") && !finding.contains("refcount=1");
    let flags = report.findings.iter().filter(|finding| is_flag(finding)).count() as u64;
    let corruptions =
        if may_share { report.corruptions - flags.min(report.corruptions) } else { report.corruptions };
    if corruptions == 0 && report.check_errors == 0 {
        return Ok(report);
    }
    Err(format!("check: {}", report.findings.iter().take(8).cloned().collect::<Vec<_>>().join("\n  ")))
}

fn differ(at: u64, have: &[u8], want: &[u8], what: &str) -> Result<(), String> {
    match first_difference(have, want) {
        None => Ok(()),
        Some(index) => {
            let start = index / SECTOR as usize * SECTOR as usize;
            let of = |bytes: &[u8]| super::value::describe(&bytes[start..start + SECTOR as usize]);
            let sector = (at + start as u64) / SECTOR;
            Err(format!("{what}: sector {sector:#x} holds {}, not {}", of(have), of(want)))
        }
    }
}

impl<'a> Judge<'a> {
    pub fn new(image: &'a StartImage, history: &'a History, options: WriterOptions) -> Self {
        let header = Opened::new(&image.files).unwrap().header;
        let size = history.legal_sizes(Moment::Cut(usize::MAX)).into_iter().max().expect("the first size");
        let touched = history.touched(header.cluster.size().min(PIECE), size);
        let split = |(at, len): (u64, u64)| {
            (at..at + len).step_by(PIECE as usize).map(move |p| (p, PIECE.min(at + len - p)))
        };
        let pieces = touched.into_iter().flat_map(split).collect();
        Self { image, history, options, pieces, qemu_one_in: u64::MAX, by_qemu: Cell::new(0) }
    }

    /// The range to check: all that was written, or as much of it as is quick; and a part of the rest.
    fn choose(&self, random: &mut Random, size: u64) -> Vec<(u64, u64)> {
        let limit = if is_long() { 64 * MIB } else { MIB };
        let all: u64 = self.pieces.iter().map(|(_, len)| len).sum();
        let mut chosen: Vec<(u64, u64)> =
            self.pieces.iter().copied().filter(|_| all <= limit || random.next() % all < limit).collect();
        for _ in 0..4 {
            let at = random.next() % size.max(1) / SECTOR * SECTOR;
            chosen.push((at, 4 * KIB));
        }
        chosen.retain_mut(|(at, len)| {
            *len = (*len).min(size.saturating_sub(*at));
            *len > 0
        });
        chosen
    }

    pub fn judge(&self, state: &State) -> Result<(), String> {
        let mut random = Random::new(mix(state.seed));
        let opened = Opened::new(&state.files)?;
        let header = &opened.header;
        if header.corrupt() {
            return Err("it is marked corrupt".into());
        }
        // While an internal snapshot is being taken, counts and flags may differ, and the image is marked if
        // its version has the mark.
        let is_sharing = self.history.is_sharing(Moment::Cut(state.cut));
        if header.dirty() && !self.image.is_dirty && !is_sharing {
            return Err("it is marked dirty".into());
        }
        let may_share = is_sharing && header.version == Version::V2;
        let leaks = if header.dirty() { u64::MAX } else { judge_report(&state.files, may_share)?.leaks };
        let sizes = self.history.legal_sizes(Moment::Cut(state.cut));
        if !sizes.contains(&header.virtual_size) {
            return Err(format!("the disk has {} bytes, legal are {sizes:?}", header.virtual_size));
        }
        let content = self.read(&opened, self.choose(&mut random, header.virtual_size))?;
        for (at, bytes) in &content {
            self.history.judge(*at, bytes, Moment::Cut(state.cut))?;
        }
        self.judge_snapshots(&opened, &content, state.cut)?;
        if mix(state.seed).is_multiple_of(self.qemu_one_in) {
            self.ask_qemu(&state.files, header.dirty(), may_share, &content)?;
        }
        self.write_on(state, (leaks, may_share), content, &mut random)
    }

    fn read(&self, opened: &Opened, ranges: Vec<(u64, u64)>) -> Result<Content, String> {
        let view = opened.view(None, self.image.backing.as_ref())?;
        let read = |(at, len): (u64, u64)| {
            let mut bytes = vec![0; len as usize];
            view.read_at(at, &mut bytes).map_err(|error| format!("reading {at:#x}: {error}"))?;
            Ok((at, bytes))
        };
        ranges.into_iter().map(read).collect()
    }

    fn judge_snapshots(&self, opened: &Opened, content: &Content, cut: usize) -> Result<(), String> {
        let (taken, certain) = self.history.snapshots(Moment::Cut(cut));
        let expected: Vec<&Pages> = self.image.snapshots.iter().chain(taken).collect();
        let legal = self.image.snapshots.len() + certain..=expected.len();
        if !legal.contains(&opened.snapshots.len()) {
            return Err(format!(
                "{} internal snapshots are left, legal are {legal:?}",
                opened.snapshots.len()
            ));
        }
        for (index, expected) in expected.into_iter().take(opened.snapshots.len()).enumerate() {
            let view = opened.view(Some(index), self.image.backing.as_ref())?;
            for (at, bytes) in content {
                let len = (bytes.len() as u64).min(expected.len().saturating_sub(*at));
                let mut have = vec![0; len as usize];
                view.read_at(*at, &mut have)
                    .map_err(|error| format!("snapshot {index} at {at:#x}: {error}"))?;
                differ(*at, &have, &expected.bytes(*at, len), &format!("internal snapshot {index}"))?;
            }
        }
        Ok(())
    }

    /// The next step of a user: open it and continue.
    fn write_on(
        &self,
        state: &State,
        (leaks, may_share): (u64, bool),
        content: Content,
        random: &mut Random,
    ) -> Result<(), String> {
        let text = |what: &str| {
            let what = what.to_owned();
            move |error: chainfs::error::Error| format!("after the crash, {what}: {error}")
        };
        let machine = Machine::honest();
        let disks: Vec<_> = state
            .files
            .iter()
            .enumerate()
            .map(|(file, pages)| SimDisk::new(&machine, file, pages.clone()))
            .collect();
        let backing = self.image.backing.as_ref();
        let writer = open_writer(&disks, backing, self.options).map_err(text("opening"))?;
        if leaks != u64::MAX && !may_share && machine.changes() > 0 {
            return Err("opening it for writing has changed the files".into());
        }
        let opened: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
        judge_report(&opened, false)
            .map_err(|sentence| format!("opened for writing after the crash, {sentence}"))?;
        let mut content = content;
        let same = |writer: &Writer, content: &Content, when: &str| {
            for (at, bytes) in content {
                let mut have = vec![0; bytes.len()];
                writer.read_at(*at, &mut have).map_err(text("reading"))?;
                differ(*at, &have, bytes, when)?;
            }
            Ok::<_, String>(())
        };
        same(&writer, &content, "the writer, after opening")?;
        for turn in 0..3 {
            let Some((at, len)) = self.place(random, writer.size()) else { break };
            let bytes = if turn == 1 {
                let zeroing = if random.once_in(2) { Zeroing::Keep } else { Zeroing::Unmap };
                writer.zero(at, len, zeroing).map_err(text("zeroing"))?;
                vec![0; len as usize]
            } else {
                let bytes = pattern_range(AFTER_TAG + turn, at, len);
                writer.write_at(at, &bytes).map_err(text("writing"))?;
                bytes
            };
            patch(&mut content, at, &bytes);
        }
        writer.flush().map_err(text("flushing"))?;
        same(&writer, &content, "the writer, after writing on")?;
        writer.close().map_err(text("closing"))?;
        drop(writer);
        let files: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
        let report =
            judge_report(&files, false).map_err(|sentence| format!("after writing on, {sentence}"))?;
        if report.leaks > leaks || leaks == u64::MAX && report.leaks > 0 {
            // Counts of clusters past the end of the file are no leaks until the file grows over them.
            let mut before = state.files.clone();
            let len = before[0].len().max(files[0].len());
            before[0].set_len(len);
            let leaks = if leaks == u64::MAX { 0 } else { judge_report(&before, true)?.leaks };
            if report.leaks > leaks {
                return Err(format!("writing on after the crash has leaked: {} of {leaks}", report.leaks));
            }
        }
        let opened = Opened::new(&files)?;
        if opened.header.dirty() {
            return Err("writing on after the crash has left it dirty".into());
        }
        let again =
            self.read(&opened, content.iter().map(|(at, bytes)| (*at, bytes.len() as u64)).collect())?;
        again
            .iter()
            .zip(&content)
            .try_for_each(|((at, have), (_, want))| differ(*at, have, want, "after writing on"))
    }

    /// Near a written range, or anywhere.
    fn place(&self, random: &mut Random, size: u64) -> Option<(u64, u64)> {
        let len = (1 + random.next() % 24) * SECTOR;
        let at = match self.pieces.get(random.below(self.pieces.len() + 1)) {
            Some((at, len)) => at + random.next() % len / SECTOR * SECTOR,
            None => random.next() % size.max(1) / SECTOR * SECTOR,
        };
        (at < size).then(|| (at, len.min(size - at)))
    }

    /// The same questions to QEMU.
    fn ask_qemu(
        &self,
        files: &[Pages],
        is_dirty: bool,
        may_share: bool,
        content: &Content,
    ) -> Result<(), String> {
        self.by_qemu.set(self.by_qemu.get() + 1);
        let scratch = &self.image.scratch;
        files[0].save(scratch.path("state.qcow2"));
        if let Some(data) = files.get(1) {
            data.save(scratch.path(DATA_FILE));
        }
        let said = |output: std::process::Output| {
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
        };
        if !is_dirty && !may_share {
            let output = scratch.run("qemu-img", &["check", "-f", "qcow2", "state.qcow2"]);
            if !matches!(output.status.code(), Some(0 | 3)) {
                return Err(format!("qemu-img check: {}", said(output)));
            }
        }
        if Opened::new(files)?.header.virtual_size > MAX_CONVERTED {
            return Ok(());
        }
        let words = ["convert", "-f", "qcow2", "-O", "raw", "state.qcow2", "content.raw"];
        let output = scratch.run("qemu-img", &words);
        if !output.status.success() {
            return Err(format!("qemu-img convert: {}", said(output)));
        }
        let theirs = Pages::load(scratch.path("content.raw"));
        let same = |(at, bytes): &(u64, Vec<u8>)| {
            differ(*at, bytes, &theirs.bytes(*at, bytes.len() as u64), "our view, against QEMU's")
        };
        content.iter().try_for_each(same)
    }

    /// Keeps the files of a state for inspection.
    pub fn keep(&self, name: &str, files: &[Pages]) -> String {
        let directory = std::env::temp_dir().join(format!("chainfs-crash-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        files[0].save(directory.join("state.qcow2"));
        if let Some(data) = files.get(1) {
            data.save(directory.join(DATA_FILE));
        }
        if let Some(backing) = &self.image.backing {
            backing.0.save(directory.join("backing.raw"));
        }
        let path = directory.join("state.qcow2");
        let output = std::process::Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let said: Vec<&str> = said.lines().take(12).collect();
        format!(
            "kept in {}; qemu-img check {:?}:\n  {}",
            path.display(),
            output.status.code(),
            said.join("\n  ")
        )
    }
}

/// Puts bytes into the pieces of a disk that cover them.
fn patch(content: &mut Content, at: u64, bytes: &[u8]) {
    for (start, piece) in content {
        let (from, to) = (at.max(*start), (at + bytes.len() as u64).min(*start + piece.len() as u64));
        if from < to {
            piece[(from - *start) as usize..(to - *start) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
        }
    }
}

/// Judges the state of a writer without a crash: as after a crash that lost nothing.
pub fn judge_end(image: &StartImage, history: &History, files: &[Pages]) -> Result<(), String> {
    let judge = Judge { qemu_one_in: 1, ..Judge::new(image, history, WriterOptions::default()) };
    judge.judge(&State { files: files.to_vec(), cut: usize::MAX, seed: 1 }).map_err(|sentence| {
        let kept = judge.keep("end", files);
        format!("{sentence}\n{kept}")
    })
}
