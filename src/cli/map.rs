//! `chainfs map`: where each part of a disk is stored.

use super::args::{MapArgs, Output};
use super::output::print;
use super::target::Target;
use crate::chain::{MapRun, View};
use crate::error::Result;
use crate::report::map::{MapEntry, human, json};
use crate::report::store::layer_files;

/// Runs the command.
pub(super) fn run(args: &MapArgs) -> Result<u8> {
    let target = Target::find(&args.path, args.format, &args.image)?;
    let open = target.open()?;
    let files = layer_files(&target.store, &target.catalog, &target.disk()?.layers, &target.filename);
    let entries = entries(&open.view, &files)?;
    print(&match args.output.format() {
        Output::Human => human(&entries),
        Output::Json => json(&entries),
    })?;
    Ok(0)
}

/// The runs of the whole disk, joined where possible.
fn entries(view: &View, files: &[String]) -> Result<Vec<MapEntry>> {
    let mut entries: Vec<MapEntry> = Vec::new();
    let mut at = 0;
    while at < view.size() {
        let run = view.map_run(at, view.size() - at)?;
        at += run.len;
        match entries.last_mut() {
            Some(last) if continues(last, &run) => last.length += run.len,
            _ => entries.push(entry(&run, files)),
        }
    }
    Ok(entries)
}

fn entry(run: &MapRun, files: &[String]) -> MapEntry {
    MapEntry {
        start: run.start,
        length: run.len,
        depth: run.depth,
        present: run.present,
        zero: run.zero,
        data: run.data,
        compressed: run.compressed,
        lost: run.lost,
        offset: run.offset,
        filename: files.get(run.depth).filter(|_| run.data).cloned(),
    }
}

/// Whether `run` continues `last`, on the disk and in the file.
fn continues(last: &MapEntry, run: &MapRun) -> bool {
    let flags = (last.depth, last.present, last.zero, last.data, last.compressed, last.lost);
    flags == (run.depth, run.present, run.zero, run.data, run.compressed, run.lost)
        && last.offset.map(|offset| offset + last.length) == run.offset
}
