//! `chainfs diff`: lists the ranges or the files in which two disks differ.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::super::args::{DiffArgs, Output};
use super::images::OpenStores;
use super::operands::{self, DiskName, DiskPath, GuestOperand};
use super::store_disk::StoreDisk;
use super::{about, complain};
use crate::browse::DiskContents;
use crate::browse::difference::{
    Counted, DifferenceVisitor, PathDifference, Side, compare, is_same_raw, is_surely_same,
};
use crate::browse::ranges::differing_ranges;
use crate::browse::walk::{FinalSymlink, GuestEntry, GuestTree};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::content::VolumeContent;
use crate::guest::volumes::{VolumeLayout, VolumeMapping as Lies};
use crate::guest::{TOP_LEVEL_SUFFIX, TreeId};
use crate::report::difference::{
    ChangeObject, FilesObject, RangeObject, RangesObject, Tally, line, range_line, ranges_summary, summary,
    volume_line,
};
use crate::report::json::pretty;

const SAME: u8 = 0;
const DIFFERENT: u8 = 1;
const TROUBLE: u8 = 2;
/// Output is buffered up to this many bytes.
const BUFFER_LEN: usize = 1 << 16;

/// Runs the command.
pub(in crate::cli) fn run(args: &DiffArgs) -> Result<u8> {
    match look(args) {
        // The reader has closed the pipe, as `| head` does, after it read a difference.
        Err(error) if error.kind() == ErrorKind::Cancelled => Ok(DIFFERENT),
        other => other,
    }
}

fn look(args: &DiffArgs) -> Result<u8> {
    let mut a = operands::parse(&args.a)?;
    let mut b = operands::parse(&args.b)?;
    let of_files = args.files || a.has_inner || b.has_inner;
    // A path given with one operand applies to both.
    a.inner = a.inner.take().or_else(|| b.inner.clone());
    b.inner = b.inner.take().or_else(|| a.inner.clone());
    (a.has_inner, b.has_inner) = (of_files, of_files);
    let mut images = OpenStores::new(
        &args.look,
        &[(image(&a), args.formats.a_format), (image(&b), args.formats.b_format)],
    )?;
    let disks = images.pair(&a, &b)?;
    let out = DiffOutput { args, text: String::new() };
    let found = if of_files { files(args, (&a, &b), &disks, out) } else { ranges(args, &disks, out) };
    // With journals that are not replayed, the comparison says nothing about the guests' latest state.
    if images.warn_stale() { found.map(|_| TROUBLE) } else { found }
}

fn image(place: &GuestOperand) -> &Path {
    match &place.disk {
        DiskName::Image { path, .. } => path,
        DiskName::Mounted { .. } => Path::new(""),
    }
}

/// Prints differences as they are found.
struct DiffOutput<'a> {
    args: &'a DiffArgs,
    text: String,
}

impl DiffOutput<'_> {
    fn is_json(&self) -> bool {
        self.args.output.format() == Output::Json
    }

    fn line(&mut self, line: &str) -> Result<()> {
        if !self.args.quiet && !self.is_json() {
            self.text.push_str(line);
        }
        if self.text.len() > BUFFER_LEN { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let written = out.write_all(self.text.as_bytes()).and_then(|()| out.flush());
        self.text.clear();
        written.map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Error::new(ErrorKind::Cancelled, "the output was closed"),
            _ => Error::io("writing the result", error),
        })
    }

    fn object(&mut self, object: &impl serde::Serialize) -> Result<()> {
        if !self.args.quiet && self.is_json() {
            self.text = pretty(object);
        }
        self.flush()
    }
}

fn ranges(args: &DiffArgs, (a, b): &(StoreDisk, StoreDisk), mut out: DiffOutput<'_>) -> Result<u8> {
    let (view_a, view_b) = (a.view()?, b.view()?);
    // Volume names are optional: some disks cannot be parsed.
    let layout = [b, a].iter().find_map(|disk| disk.contents().ok()).map(|inside| inside.layout().clone());
    let (mut count, mut different, mut found) = (0, 0, Vec::new());
    let mut each = |start, length| {
        count += 1;
        different += length;
        let volumes = layout.as_ref().map(|layout| names_at(layout, start, length)).unwrap_or_default();
        let range = RangeObject { start, length, volumes };
        out.line(&range_line(&range))?;
        if args.output.format() == Output::Json {
            found.push(range);
        }
        Ok(())
    };
    let read = differing_ranges(&view_a.view, &view_b.view, &mut each)?;
    let (size_a, size_b) = (view_a.view.size(), view_b.view.size());
    out.line(&ranges_summary(count, different, size_a.max(size_b), read))?;
    out.object(&RangesObject {
        identical: count == 0,
        size_mismatch: size_a != size_b,
        ranges: found,
        bytes_different: different,
        bytes_read: read,
    })?;
    Ok(if count > 0 { DIFFERENT } else { SAME })
}

/// The volumes with data in a range of the first disk.
fn names_at(layout: &VolumeLayout, start: u64, len: u64) -> Vec<String> {
    let meets = |from: u64, of: u64| from < start.saturating_add(len) && start < from.saturating_add(of);
    let has_part = |volume: &&crate::guest::volumes::Volume| {
        volume.segments.iter().any(|segment| match &segment.place {
            Lies::Linear(leg) => leg.disk == 0 && meets(leg.offset, segment.len),
            Lies::Striped(stripes) => {
                let row = stripes.chunk_len.saturating_mul(stripes.legs.len() as u64).max(1);
                let rows = segment.len.saturating_add(stripes.start).div_ceil(row);
                let of_each = rows.saturating_mul(stripes.row_len);
                stripes.legs.iter().flatten().any(|leg| leg.disk == 0 && meets(leg.offset, of_each))
            }
            // Of what an encrypted volume holds, that volume is named.
            Lies::Zero | Lies::Encrypted(_) | Lies::Computed => false,
        })
    };
    layout.volumes.iter().filter(has_part).map(|volume| volume.name.clone()).collect()
}

/// A comparison of two disks' files and its results so far.
struct FileComparison<'a> {
    out: DiffOutput<'a>,
    counted: Counted,
    tally: Tally,
    changes: Vec<ChangeObject>,
}

impl FileComparison<'_> {
    fn found(&mut self, path: &[u8], finding: &PathDifference) -> Result<()> {
        self.tally.count(finding);
        self.out.line(&line(path, finding))?;
        if self.out.is_json() {
            self.changes.push(ChangeObject::of(path, finding));
        }
        Ok(())
    }

    /// Compares a path of both.
    fn trees(
        &mut self,
        prefix: &[u8],
        a: (&GuestTree, Option<GuestEntry>),
        b: (&GuestTree, Option<GuestEntry>),
    ) -> Result<()> {
        let counted = self.counted;
        let each: &mut DifferenceVisitor<'_> =
            &mut |path, finding| self.found(&[prefix, path].concat(), &finding);
        compare(a, b, counted, each)
    }

    /// Compares a volume of both.
    fn volume(
        &mut self,
        name: &str,
        a: (&Arc<DiskContents>, usize),
        b: (&Arc<DiskContents>, usize),
    ) -> Result<()> {
        let path = [b"/", name.as_bytes()].concat();
        let described =
            |(inside, volume): (&Arc<DiskContents>, usize)| inside.layout().volumes[volume].clone();
        let (of_a, of_b) = (described(a), described(b));
        self.tally.bytes_total += of_a.size + of_b.size;
        // The content of physical volumes and members is compared as logical volumes and arrays.
        let is_holder = |content| matches!(content, VolumeContent::LvmPhysicalVolume | VolumeContent::MdRaid);
        if is_holder(of_a.content) && is_holder(of_b.content) || is_surely_same(a, b) {
            return Ok(());
        }
        if of_a.problem.is_some()
            && of_b.problem.is_some()
            && !of_a.segments.is_empty()
            && !of_b.segments.is_empty()
        {
            return match is_same_raw(a, b) {
                Ok(true) => Ok(()),
                Ok(false) => self.found(&path, &PathDifference::Bytes),
                Err((side, error)) => self.found(&path, &PathDifference::Unreadable(side, error)),
            };
        }
        // Where the volume shows one of several subvolumes, all of them are compared.
        let top_level = |(inside, volume): (&Arc<DiskContents>, usize)| inside.top_level(volume);
        let (top_a, top_b) = (top_level(a), top_level(b));
        let has_several = matches!((&top_a, &top_b), (Ok(Some(_)), _) | (_, Ok(Some(_))));
        let open = |(inside, volume), top: Result<Option<TreeId>>| {
            GuestTree::open(inside, top?.unwrap_or(TreeId::main(volume)))
        };
        match (open(a, top_a), open(b, top_b)) {
            (Ok(tree_a), Ok(tree_b)) => {
                let (root_a, root_b) = (Some(tree_a.root()), Some(tree_b.root()));
                let path = if has_several { [&path, TOP_LEVEL_SUFFIX.as_bytes()].concat() } else { path };
                self.trees(&path, (&tree_a, root_a), (&tree_b, root_b))
            }
            (a, b) => {
                for (side, tree) in [(Side::A, a), (Side::B, b)] {
                    if let Err(error) = tree {
                        self.found(&path, &PathDifference::Unreadable(side, error))?;
                    }
                }
                Ok(())
            }
        }
    }
}

fn files(
    args: &DiffArgs,
    places: (&GuestOperand, &GuestOperand),
    disks: &(StoreDisk, StoreDisk),
    out: DiffOutput<'_>,
) -> Result<u8> {
    let (inside_a, inside_b) = (disks.0.contents()?, disks.1.contents()?);
    let counted = Counted { directory_times: args.all, changed: args.all };
    let mut files = FileComparison { out, counted, tally: Tally::default(), changes: Vec::new() };
    let (mut only_in_a, mut only_in_b) = (Vec::new(), Vec::new());
    if let (Some(inner_a), Some(inner_b)) = (&places.0.inner, &places.1.inner) {
        let (tree_a, entry_a) = at(&inside_a, inner_a).map_err(|error| about(&args.a, error))?;
        let (tree_b, entry_b) = at(&inside_b, inner_b).map_err(|error| about(&args.b, error))?;
        if entry_a.is_none() && entry_b.is_none() {
            return Err(about(&args.a, Error::new(ErrorKind::NotFound, "neither disk has it")));
        }
        let size = |inside: &DiskContents, inner: &DiskPath| {
            operands::tree(inside, &inner.volume).map_or(0, |tree| inside.layout().volumes[tree.volume].size)
        };
        files.tally.bytes_total = size(&inside_a, inner_a) + size(&inside_b, inner_b);
        let prefix = [b"/", inner_b.volume.as_slice(), &inner_b.path].concat();
        let end = prefix.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        files.trees(&prefix[..end], (&tree_a, entry_a), (&tree_b, entry_b))?;
    } else {
        let (of_a, of_b) = (&inside_a.layout().volumes, &inside_b.layout().volumes);
        for (index, volume) in of_a.iter().enumerate() {
            match of_b.iter().position(|other| other.name == volume.name) {
                Some(other) => files.volume(&volume.name, (&inside_a, index), (&inside_b, other))?,
                None => only_in_a.push(volume.name.clone()),
            }
        }
        let is_new = |name: &&String| !of_a.iter().any(|volume| volume.name == **name);
        only_in_b.extend(of_b.iter().map(|volume| &volume.name).filter(is_new).cloned());
        for (side, names) in [(Side::A, &only_in_a), (Side::B, &only_in_b)] {
            for name in names {
                files.out.line(&volume_line(name, side))?;
            }
        }
    }
    let (a, b) = (&disks.0.opened, &disks.1.opened);
    files.tally.bytes_read =
        a.browser.bytes_read() + if Arc::ptr_eq(a, b) { 0 } else { b.browser.bytes_read() };
    let FileComparison { mut out, tally, changes, .. } = files;
    let differs = tally.differs() || !only_in_a.is_empty() || !only_in_b.is_empty();
    out.line(&summary(&tally))?;
    out.object(&FilesObject {
        identical: !differs && tally.unreadable == 0,
        only_in_a,
        only_in_b,
        changes,
        bytes_read: tally.bytes_read,
        bytes_total: tally.bytes_total,
    })?;
    if tally.unreadable > 0 {
        let fact = format!("{} could not be read and may differ", tally.unreadable);
        complain(&mut false, &Error::new(ErrorKind::Corrupt, fact));
        return Ok(TROUBLE);
    }
    Ok(if differs { DIFFERENT } else { SAME })
}

/// The entry at a path of a disk. Symbolic links are followed: their targets are compared.
fn at(inside: &Arc<DiskContents>, inner: &DiskPath) -> Result<(GuestTree, Option<GuestEntry>)> {
    let tree = GuestTree::open(inside, operands::tree(inside, &inner.volume)?)?;
    match tree.resolve(&inner.path, FinalSymlink::Followed) {
        Ok(entry) => Ok((tree, Some(entry))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((tree, None)),
        Err(error) => Err(error),
    }
}
