//! Finds files by path in many disks of a chain at once, and folds neighbouring disks that have the same
//! version.
//!
//! Promises:
//! - What counts as the same version is what [`versions`](super::versions) says.
//! - A volume that neighbouring disks surely have in common is walked once.
//! - Results come directory by directory, sorted by name in each; memory is bounded by one directory of each
//!   disk, and by the number of directories.
//! - What cannot be read is a result, and the search continues.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::{FileAttributes, FileKind, Ino, TOP_LEVEL_SUFFIX, TreeId};

use super::DiskContents;
use super::difference::{differing, is_surely_same};
use super::versions::SAME_VERSION;
use super::walk::{GuestEntry, GuestTree, NamedEntry, VisitedDirectories};

/// Results of one directory that are kept to be sorted; beyond that they come in the order of the disks.
const SORTED: usize = 1 << 16;

/// What a search finds.
#[derive(Debug)]
pub enum SearchResult {
    /// A version of a file.
    Found {
        /// Its path: `/VOLUME/PATH`.
        path: Vec<u8>,
        /// Its attributes.
        attributes: FileAttributes,
        /// Indices of the disks that have it.
        disks: Range<usize>,
    },
    /// Something cannot be read.
    Unreadable {
        /// Its path, or that of its volume.
        path: Vec<u8>,
        /// The index of the first disk where that is so.
        disk: usize,
        /// Why.
        error: Error,
    },
}

/// Decides by path, name and kind whether a file is wanted.
pub type Wanted<'a> = dyn Fn(&[u8], &[u8], FileKind) -> bool + 'a;
/// Receives each result; an error ends the search.
pub type ResultVisitor<'a> = dyn FnMut(SearchResult) -> Result<()> + 'a;

/// Searches all volumes of the disks, which are given in the order of their history. `None` stands for a disk
/// that cannot be searched; it has no version in common with its neighbours.
pub fn search(
    disks: &[Option<Arc<DiskContents>>],
    wanted: &Wanted<'_>,
    each: &mut ResultVisitor<'_>,
) -> Result<()> {
    let mut names: Vec<&str> = Vec::new();
    let layouts = disks.iter().flatten().map(|disk| disk.layout());
    for volume in layouts.flat_map(|layout| &layout.volumes).filter(|volume| volume.problem.is_none()) {
        if !names.contains(&volume.name.as_str()) {
            names.push(&volume.name);
        }
    }
    for name in names {
        let (prefix, columns) = columns(disks, name, each)?;
        let visited = columns.iter().map(|_| VisitedDirectories::default()).collect();
        Search { columns, visited, wanted }.volume(&prefix, each)?;
    }
    Ok(())
}

/// A volume of some neighbouring disks, which are surely the same.
struct Column {
    tree: GuestTree,
    disks: Range<usize>,
}

/// The trees of a volume, oldest first, and the path of their root.
fn columns(
    disks: &[Option<Arc<DiskContents>>],
    name: &str,
    each: &mut ResultVisitor<'_>,
) -> Result<(Vec<u8>, Vec<Column>)> {
    let path = [b"/", name.as_bytes()].concat();
    let mut columns: Vec<Column> = Vec::new();
    let mut last: Option<(&Arc<DiskContents>, usize)> = None;
    let mut last_error = String::new();
    let mut has_several = false;
    for (index, disk) in disks.iter().enumerate() {
        let volume = disk.as_ref().and_then(|disk| Some((disk, disk.volume(name.as_bytes())?)));
        let Some((disk, volume)) = volume.filter(|(disk, at)| disk.layout().volumes[*at].problem.is_none())
        else {
            last = None;
            continue;
        };
        if let (Some(known), Some(column)) = (last, columns.last_mut())
            && is_surely_same(known, (disk, volume))
        {
            column.disks.end = index + 1;
            last = Some((disk, volume));
            continue;
        }
        let opened = disk.top_level(volume).and_then(|top| {
            has_several |= top.is_some();
            // Where the volume shows one of several subvolumes, all of them are searched.
            GuestTree::open(disk, top.unwrap_or(TreeId::main(volume)))
        });
        match opened {
            Ok(tree) => {
                columns.push(Column { tree, disks: index..index + 1 });
                last = Some((disk, volume));
            }
            Err(error) => {
                last = None;
                let sentence = error.to_string();
                if sentence != last_error {
                    each(SearchResult::Unreadable { path: path.clone(), disk: index, error })?;
                    last_error = sentence;
                }
            }
        }
    }
    let suffix = if has_several { TOP_LEVEL_SUFFIX.as_bytes() } else { b"" };
    Ok(([&path, suffix].concat(), columns))
}

/// A directory, in each column that has it: the index of the column, and the inode.
type InColumns = Vec<(usize, Ino)>;

struct Search<'a> {
    columns: Vec<Column>,
    visited: Vec<VisitedDirectories>,
    wanted: &'a Wanted<'a>,
}

/// A version of a file, as far as it is known to reach.
struct VersionRun {
    disks: Range<usize>,
    /// The last column that has it, with its entry there.
    column: usize,
    entry: GuestEntry,
}

impl Search<'_> {
    fn volume(&mut self, prefix: &[u8], each: &mut ResultVisitor<'_>) -> Result<()> {
        let roots = self.columns.iter().enumerate();
        let roots = roots.map(|(index, column)| (index, column.tree.root().ino)).collect();
        // Each frame: the path of a directory, and those in it that are still to be searched.
        let mut frames = vec![(prefix.to_vec(), self.directory(prefix, roots, 0, each)?.into_iter())];
        while let Some((path, below)) = frames.last_mut() {
            let Some((name, places)) = below.next() else {
                frames.pop();
                continue;
            };
            let path = [path.as_slice(), b"/", &name].concat();
            let below = self.directory(&path, places, frames.len(), each)?;
            frames.push((path, below.into_iter()));
        }
        Ok(())
    }

    /// Searches one directory, and returns the directories in it.
    fn directory(
        &mut self,
        path: &[u8],
        places: InColumns,
        depth: usize,
        each: &mut ResultVisitor<'_>,
    ) -> Result<BTreeMap<Vec<u8>, InColumns>> {
        let mut runs: BTreeMap<Vec<u8>, VersionRun> = BTreeMap::new();
        let mut below: BTreeMap<Vec<u8>, InColumns> = BTreeMap::new();
        let mut found: Vec<(Vec<u8>, VersionRun)> = Vec::new();
        let mut last_error = String::new();
        for (column, directory) in places {
            let disk = self.columns[column].disks.start;
            let mut trouble = |path: &[u8], error: Error, each: &mut ResultVisitor<'_>| {
                let sentence = error.to_string();
                // The same in the next disk is no news.
                if sentence == last_error {
                    return Ok(());
                }
                last_error = sentence;
                each(SearchResult::Unreadable { path: path.to_vec(), disk, error })
            };
            if let Err(error) = self.visited[column].enter(directory, depth) {
                trouble(path, error, each)?;
                continue;
            }
            let (entries, ended) = self.columns[column].tree.entries(directory);
            if let Some(error) = ended {
                trouble(path, error, each)?;
            }
            for NamedEntry { name, entry } in entries {
                let inner = [path, b"/", &name].concat();
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(error) => {
                        trouble(&inner, error, each)?;
                        continue;
                    }
                };
                let kind = entry.attributes.kind;
                if kind == FileKind::Directory {
                    below.entry(name.clone()).or_default().push((column, entry.ino));
                }
                if !(self.wanted)(&inner, &name, kind) {
                    continue;
                }
                let disks = self.columns[column].disks.clone();
                if let Some(run) = runs.get_mut(&name) {
                    let is_same = run.disks.end == disks.start
                        && match self.is_same(run, column, &entry) {
                            Ok(is_same) => is_same,
                            Err(error) => {
                                trouble(&inner, error, each)?;
                                false
                            }
                        };
                    if is_same {
                        (run.disks.end, run.column, run.entry) = (disks.end, column, entry);
                        continue;
                    }
                }
                if let Some(old) = runs.insert(name.clone(), VersionRun { disks, column, entry }) {
                    found.push((name, old));
                }
                if found.len() > SORTED {
                    report(path, std::mem::take(&mut found), each)?;
                }
            }
        }
        found.extend(runs);
        report(path, found, each)?;
        Ok(below)
    }

    fn is_same(&self, run: &VersionRun, column: usize, entry: &GuestEntry) -> Result<bool> {
        let (old, new) = (&self.columns[run.column].tree, &self.columns[column].tree);
        let what = differing((old, &run.entry), (new, entry), SAME_VERSION).map_err(|(_, error)| error)?;
        Ok(what.is_empty())
    }
}

fn report(path: &[u8], mut found: Vec<(Vec<u8>, VersionRun)>, each: &mut ResultVisitor<'_>) -> Result<()> {
    found.sort_by(|(a, run_a), (b, run_b)| (a, run_a.disks.start).cmp(&(b, run_b.disks.start)));
    for (name, run) in found {
        let path = [path, b"/", &name].concat();
        each(SearchResult::Found { path, attributes: run.entry.attributes, disks: run.disks })?;
    }
    Ok(())
}
