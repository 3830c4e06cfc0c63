//! `chainfs cp`: copies guests' files to the host.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::super::args::CpArgs;
use super::super::warn;
use super::images::OpenStores;
use super::operands::shown;
use super::out::{KeptAttributes, LostAttributes, OutputDirectory};
use super::{OpenedPath, about, complain, open};
use crate::browse::content::OpenContent;
use crate::browse::walk::{FinalSymlink, GuestEntry, GuestTree, NamedEntry, VisitedDirectories};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, FileKind, Ino, RunKind, TreeId};
use crate::report::files::kind;
use crate::report::safe::terminal_bytes;
use crate::store::ViewId;
use crate::units::Run;

/// Bytes copied at a time.
const STEP: u64 = 1 << 20;

/// Runs the command.
pub(in crate::cli) fn run(args: &CpArgs) -> Result<u8> {
    let is_directory = args.dest.is_dir();
    if args.sources.len() > 1 && !is_directory {
        let fact = format!(
            "{} is not a directory; give a directory to copy several files",
            shown(args.dest.as_os_str())
        );
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    let archive = args.archive;
    let keep = KeptAttributes {
        all: args.preserve || archive,
        set_id: archive && rustix::process::geteuid().is_root(),
        umask: umask(),
    };
    let mut copy = CopyRun {
        recursive: args.recursive || archive,
        archive,
        keep,
        failed: false,
        remarks: BTreeMap::new(),
        names: HashMap::new(),
    };
    let mut images = OpenStores::new(&args.look, &[])?;
    for word in &args.sources {
        if let Err(error) = copy.source(&mut images, word, &args.dest, is_directory) {
            complain(&mut copy.failed, &about(word, error));
        }
    }
    copy.print_remarks();
    let is_stale = images.warn_stale();
    Ok(u8::from(copy.failed || is_stale))
}

/// The options and the results of one run.
struct CopyRun {
    recursive: bool,
    archive: bool,
    keep: KeptAttributes,
    failed: bool,
    /// What was not kept: the number of files, and the first of them.
    remarks: BTreeMap<String, (u64, String)>,
    /// The first copy of each file with several hard links.
    names: HashMap<(ViewId, TreeId, Ino), (Rc<OutputDirectory>, PathBuf)>,
}

/// One source operand.
struct CopyOperand<'a> {
    word: &'a OsStr,
    tree: &'a GuestTree,
    place: &'a (ViewId, TreeId),
    /// The directory of the host that receives the copy.
    root: Rc<OutputDirectory>,
}

/// A directory that is being copied.
struct CopyFrame {
    folder: Rc<OutputDirectory>,
    entry: GuestEntry,
    entries: std::vec::IntoIter<NamedEntry>,
    /// From the source's root.
    path: PathBuf,
    /// Whether to set the source's attributes and times on it.
    finish: bool,
}

impl CopyRun {
    fn source(
        &mut self,
        images: &mut OpenStores,
        word: &OsStr,
        dest: &Path,
        is_directory: bool,
    ) -> Result<()> {
        let OpenedPath { tree, path, place } = open(images, word)?;
        let last = if self.recursive { FinalSymlink::Itself } else { FinalSymlink::Followed };
        let entry = tree.resolve(&path, last)?;
        let is_tree = entry.attributes.kind == FileKind::Directory;
        if is_tree && !self.recursive {
            return Err(Error::new(ErrorKind::Usage, "it is a directory; give -r to copy it"));
        }
        let mut names = path.rsplit(|byte| *byte == b'/').filter(|name| !name.is_empty());
        let name = names.next().unwrap_or_else(|| volume_name(word));
        if name == b".." {
            return Err(Error::new(ErrorKind::Usage, "its path ends in ..; give a path that ends in a name"));
        }
        let source = |root| CopyOperand { word, tree: &tree, place: &place, root };
        if name == b"." && is_tree && is_directory {
            let root = Rc::new(OutputDirectory::open(dest)?);
            return self.directories(&source(Rc::clone(&root)), root, entry, PathBuf::new(), self.keep.all);
        }
        let (folder, name) = if is_directory && name != b"." {
            (dest, OsStr::from_bytes(name))
        } else {
            let name = dest
                .file_name()
                .ok_or_else(|| Error::new(ErrorKind::Usage, "DEST has no file name; give one"))?;
            (dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")), name)
        };
        let root = Rc::new(OutputDirectory::open(folder)?);
        let source = source(Rc::clone(&root));
        self.entry(&source, &root, &entry, Path::new(name))?.map_or(Ok(()), |(folder, is_new)| {
            self.directories(&source, folder, entry, PathBuf::from(name), is_new || self.keep.all)
        })
    }

    /// Copies a directory's entries recursively into `folder`.
    fn directories(
        &mut self,
        source: &CopyOperand<'_>,
        folder: Rc<OutputDirectory>,
        top: GuestEntry,
        path: PathBuf,
        finish: bool,
    ) -> Result<()> {
        let mut visited = VisitedDirectories::default();
        let mut frames = Vec::new();
        frames.push(self.frame(source, &mut visited, 0, folder, top, path, finish)?);
        while let Some(frame) = frames.last_mut() {
            let Some(NamedEntry { name, entry }) = frame.entries.next() else {
                let Some(CopyFrame { folder, entry, path, finish, .. }) = frames.pop() else { break };
                // Creating an entry changes the directory's times, so they are set last.
                if finish {
                    let extended = self.extended(source, &entry, &path);
                    let lost = folder.finish(&entry.attributes, &extended, self.keep);
                    self.note(source, &path, lost);
                }
                continue;
            };
            let path = frame.path.join(OsStr::from_bytes(&name));
            let folder = Rc::clone(&frame.folder);
            let copied = entry.and_then(|entry| {
                let Some((folder, is_new)) = self.entry(source, &folder, &entry, &path)? else {
                    return Ok(None);
                };
                let finish = is_new || self.keep.all;
                self.frame(source, &mut visited, frames.len(), folder, entry, path.clone(), finish).map(Some)
            });
            match copied {
                Ok(frame) => frames.extend(frame),
                Err(error) => self.trouble(source, &path, error),
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a frame")]
    fn frame(
        &mut self,
        source: &CopyOperand<'_>,
        visited: &mut VisitedDirectories,
        depth: usize,
        folder: Rc<OutputDirectory>,
        entry: GuestEntry,
        path: PathBuf,
        finish: bool,
    ) -> Result<CopyFrame> {
        visited.enter(entry.ino, depth)?;
        let (entries, trouble) = source.tree.entries(entry.ino);
        if let Some(error) = trouble {
            self.trouble(source, &path, error);
        }
        Ok(CopyFrame { folder, entry, entries: entries.into_iter(), path, finish })
    }

    /// Copies one entry to the last name of `path`. Of a directory, only the directory itself is created; it
    /// is returned, with whether it is new.
    fn entry(
        &mut self,
        source: &CopyOperand<'_>,
        folder: &OutputDirectory,
        entry: &GuestEntry,
        path: &Path,
    ) -> Result<Option<(Rc<OutputDirectory>, bool)>> {
        let name = path.file_name().expect("a path of names").as_bytes();
        let found = &entry.attributes;
        if found.kind == FileKind::Directory {
            let (made, is_new) = folder.enter(name)?;
            return Ok(Some((Rc::new(made), is_new)));
        }
        let key = (source.place.0.clone(), source.place.1, entry.ino);
        let has_more_names = self.archive && found.links > 1;
        if has_more_names && let Some((root, first)) = self.names.get(&key) {
            folder.hard_link(name, root, first)?;
            return Ok(None);
        }
        let lost = match found.kind {
            FileKind::File => {
                let extended = self.extended(source, entry, path);
                folder.file(name, found, &extended, self.keep, |file| fill(file, source.tree, entry))?
            }
            FileKind::Symlink => {
                let extended = self.extended(source, entry, path);
                folder.link(name, &source.tree.read_link(entry.ino)?, found, &extended, self.keep)?
            }
            FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo | FileKind::Socket
                if self.archive =>
            {
                let extended = self.extended(source, entry, path);
                match folder.special(name, found, &extended, self.keep) {
                    Err(error) if error.kind() == ErrorKind::Denied => {
                        self.remark(
                            format!("not copied, because only root may create a {}", kind(found.kind)),
                            source,
                            path,
                        );
                        return Ok(None);
                    }
                    other => other?,
                }
            }
            _ => {
                self.remark(format!("not copied, because a {} needs -a", kind(found.kind)), source, path);
                return Ok(None);
            }
        };
        if has_more_names {
            self.names.insert(key, (Rc::clone(&source.root), path.to_path_buf()));
        }
        self.note(source, path, lost);
        Ok(None)
    }

    fn extended(
        &mut self,
        source: &CopyOperand<'_>,
        entry: &GuestEntry,
        path: &Path,
    ) -> Vec<ExtendedAttribute> {
        if !self.keep.all {
            return Vec::new();
        }
        source.tree.extended_attributes(entry.ino).unwrap_or_else(|error| {
            self.trouble(source, path, error);
            Vec::new()
        })
    }

    fn note(&mut self, source: &CopyOperand<'_>, path: &Path, lost: Vec<LostAttributes>) {
        for LostAttributes { what, why, matters } in lost {
            self.failed |= matters;
            self.remark(format!("{what} could not be kept ({why})"), source, path);
        }
    }

    fn remark(&mut self, fact: String, source: &CopyOperand<'_>, path: &Path) {
        let place = || format!("{} of {}", named(path), shown(source.word));
        self.remarks.entry(fact).or_insert_with(|| (0, place())).0 += 1;
    }

    fn trouble(&mut self, source: &CopyOperand<'_>, path: &Path, error: Error) {
        complain(&mut self.failed, &about(source.word, error.within(named(path))));
    }

    /// Prints each remark once, with the number of files.
    fn print_remarks(&self) {
        for (fact, (count, first)) in &self.remarks {
            let more = if *count > 1 { format!(", and {} more", count - 1) } else { String::new() };
            warn(&format!("{fact}: {first}{more}"));
        }
    }
}

/// A path below the destination, made safe for a message.
fn named(path: &Path) -> String {
    if path.as_os_str().is_empty() { ".".to_owned() } else { terminal_bytes(path.as_os_str().as_bytes()) }
}

/// Writes a file's bytes; holes stay holes.
fn fill(file: &File, tree: &GuestTree, entry: &GuestEntry) -> Result<()> {
    let fail = |error| Error::io("writing the copy", error);
    let size = entry.attributes.size;
    file.set_len(size).map_err(fail)?;
    let content = OpenContent::new(tree, entry);
    let mut buf = Vec::new();
    let mut at = 0;
    while at < size {
        let Run { value: kind, len } = content.run(at)?;
        if kind == RunKind::Hole {
            at += len;
            continue;
        }
        buf.resize(len.min(STEP) as usize, 0);
        content.read_at(at, &mut buf)?;
        file.write_all_at(&buf, at).map_err(fail)?;
        at += buf.len() as u64;
    }
    Ok(())
}

/// The volume that a word names.
fn volume_name(word: &OsStr) -> &[u8] {
    let mut names =
        word.as_bytes().rsplit(|byte| matches!(byte, b'/' | b':')).filter(|name| !name.is_empty());
    names.next().unwrap_or(b"disk")
}

/// The umask. No system call reads it without setting it.
fn umask() -> u16 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|octal| u16::from_str_radix(octal.trim(), 8).ok()).unwrap_or(0o022)
}
