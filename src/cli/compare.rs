//! `chainfs compare`: whether two disks have the same content, by the rules of `qemu-img compare`.

use serde::Serialize;

use super::args::{CompareArgs, Output};
use super::output::print;
use super::target::Target;
use crate::chain::{MapRun, View};
use crate::error::Result;
use crate::report::json::pretty;
use crate::units::SECTOR_SIZE;

const SAME: u8 = 0;
const DIFFERENT: u8 = 1;
/// Bytes read from each disk at a time.
const CHUNK: u64 = 2 << 20;

/// Runs the command.
pub(super) fn run(args: &CompareArgs) -> Result<u8> {
    let a = Target::find(&args.a, args.formats.a_format, &args.image)?;
    let b = Target::find(&args.b, args.formats.b_format, &args.image)?;
    let (a, b) = (a.open()?, b.open()?);
    let sizes_differ = a.view.size() != b.view.size();
    let difference = compare(&a.view, &b.view, args.strict)?;
    if !args.quiet {
        print(&match args.output.format() {
            Output::Human => sentences(difference, sizes_differ),
            Output::Json => pretty(&CompareReport::of(difference, sizes_differ)),
        })?;
    }
    Ok(if difference.is_some() { DIFFERENT } else { SAME })
}

/// The first difference found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstDifference {
    /// The bytes at this offset.
    Content { at: u64, sizes_seen: bool },
    /// The sizes (strict mode).
    Size,
    /// How the same bytes are stored (strict mode).
    Status(u64),
}

/// The result as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CompareReport {
    identical: bool,
    size_mismatch: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl CompareReport {
    fn of(difference: Option<FirstDifference>, size_mismatch: bool) -> Self {
        let (word, offset) = match difference {
            None => (None, None),
            Some(FirstDifference::Content { at, .. }) => (Some("content"), Some(at)),
            Some(FirstDifference::Size) => (Some("size"), None),
            Some(FirstDifference::Status(at)) => (Some("status"), Some(at)),
        };
        Self { identical: difference.is_none(), size_mismatch, difference: word, offset }
    }
}

fn sentences(difference: Option<FirstDifference>, sizes_differ: bool) -> String {
    const SIZES: &str = "Warning: Image size mismatch!\n";
    match difference {
        None => format!("{}Images are identical.\n", if sizes_differ { SIZES } else { "" }),
        Some(FirstDifference::Content { at, sizes_seen }) => {
            format!("{}Content mismatch at offset {at}!\n", if sizes_seen { SIZES } else { "" })
        }
        Some(FirstDifference::Size) => "Strict mode: Image size mismatch!\n".to_owned(),
        Some(FirstDifference::Status(at)) => format!("Strict mode: Offset {at} block status mismatch!\n"),
    }
}

fn compare(a: &View, b: &View, strict: bool) -> Result<Option<FirstDifference>> {
    if strict && a.size() != b.size() {
        return Ok(Some(FirstDifference::Size));
    }
    let common = a.size().min(b.size());
    let mut buffers = (Vec::new(), Vec::new());
    let mut runs = (None, None);
    let mut at = 0;
    while at < common {
        let run_a = run_at(a, at, common, &mut runs.0)?;
        let run_b = run_at(b, at, common, &mut runs.1)?;
        let end = (run_a.start + run_a.len).min(run_b.start + run_b.len);
        if strict && status(&run_a) != status(&run_b) {
            return Ok(Some(FirstDifference::Status(at)));
        }
        if is_zero(&run_a) && is_zero(&run_b) {
            at = end;
            continue;
        }
        let len = (end - at).min(CHUNK);
        let different = match (run_a.present, run_b.present) {
            (false, false) => None,
            (true, true) => {
                let (one, other) = (read(a, at, len, &mut buffers.0)?, read(b, at, len, &mut buffers.1)?);
                first_difference(one, other)
            }
            (true, false) => first_nonzero(read(a, at, len, &mut buffers.0)?),
            (false, true) => first_nonzero(read(b, at, len, &mut buffers.1)?),
        };
        if let Some(within) = different {
            return Ok(Some(FirstDifference::Content { at: at + within, sizes_seen: false }));
        }
        at += len;
    }
    // The rest of the longer disk must be zero.
    let longer = if a.size() > b.size() { a } else { b };
    let mut run = None;
    while at < longer.size() {
        let found = run_at(longer, at, longer.size(), &mut run)?;
        let end = found.start + found.len;
        if is_zero(&found) || !found.present {
            at = end;
            continue;
        }
        let len = (end - at).min(CHUNK);
        if let Some(within) = first_nonzero(read(longer, at, len, &mut buffers.0)?) {
            return Ok(Some(FirstDifference::Content { at: at + within, sizes_seen: true }));
        }
        at += len;
    }
    Ok(None)
}

/// The run at `at`; `known` caches the last run.
fn run_at(view: &View, at: u64, end: u64, known: &mut Option<MapRun>) -> Result<MapRun> {
    match known {
        Some(run) if at < run.start + run.len => Ok(*run),
        _ => Ok(*known.insert(view.map_run(at, end - at)?)),
    }
}

/// The flags of a run that QEMU compares in strict mode, without the host offset.
fn status(run: &MapRun) -> [bool; 5] {
    [run.present, run.zero, run.data, run.compressed, run.offset.is_some()]
}

fn is_zero(run: &MapRun) -> bool {
    run.zero
}

fn read<'a>(view: &View, at: u64, len: u64, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
    if buffer.is_empty() {
        buffer.resize(CHUNK as usize, 0);
    }
    let buffer = &mut buffer[..len as usize];
    view.read_at(at, buffer)?;
    Ok(buffer)
}

/// The first sector that differs.
fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    let sector = SECTOR_SIZE as usize;
    let index = a.chunks(sector).zip(b.chunks(sector)).position(|(a, b)| a != b)?;
    Some((index * sector) as u64)
}

/// The first sector that is not all zeroes.
fn first_nonzero(bytes: &[u8]) -> Option<u64> {
    let index = bytes.iter().position(|byte| *byte != 0)? as u64;
    Some(index - index % SECTOR_SIZE)
}
