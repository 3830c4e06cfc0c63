//! `chainfs ls`: lists the volumes of a guest's disk, or the files in them.

use std::ffi::OsStr;
use std::io::IsTerminal;

use jiff::tz::TimeZone;
use serde::Serialize;

use super::super::args::{LsArgs, Output};
use super::super::output::print;
use super::images::OpenStores;
use super::operands::shown;
use super::{OpenedPath, about, complain, open, operands};
use crate::browse::walk::{FinalSymlink, GuestEntry, GuestTree, NamedEntry, VisitedDirectories};
use crate::error::Result;
use crate::guest::FileKind;
use crate::report::files::{FileObject, Listed, long, short};
use crate::report::json::pretty;
use crate::report::safe::{terminal_bytes, text};
use crate::report::volumes;

/// Runs the command.
pub(in crate::cli) fn run(args: &LsArgs) -> Result<u8> {
    let mut images = OpenStores::new(&args.look, &[])?;
    let mut list =
        Listing { args, zone: TimeZone::system(), failed: false, printed: false, objects: Vec::new() };
    for word in &args.places {
        if let Err(error) = list.place(&mut images, word) {
            complain(&mut list.failed, &about(word, error));
        }
    }
    if args.output.format() == Output::Json {
        print(&pretty(&list.objects))?;
    }
    let is_stale = images.warn_stale();
    Ok(u8::from(list.failed || is_stale))
}

/// The listing so far.
struct Listing<'a> {
    args: &'a LsArgs,
    zone: TimeZone,
    failed: bool,
    /// Whether a section was printed before: a blank line separates sections.
    printed: bool,
    objects: Vec<Object>,
}

/// The result as JSON.
#[derive(Serialize)]
#[serde(untagged)]
enum Object {
    Volumes { place: String, volumes: Vec<volumes::VolumeObject> },
    Directory { place: String, path: String, entries: Vec<FileObject> },
}

impl Listing<'_> {
    fn place(&mut self, images: &mut OpenStores, word: &OsStr) -> Result<()> {
        let place = operands::parse(word)?;
        if place.inner.is_none() {
            let inside = images.disk(&place)?.contents()?;
            if self.args.output.format() == Output::Json {
                self.objects.push(Object::Volumes { place: shown(word), volumes: volumes::objects(&inside) });
                return Ok(());
            }
            self.head(&shown(word), self.args.places.len() > 1)?;
            return print(&volumes::listed(&inside));
        }
        let OpenedPath { tree, path, .. } = open(images, word)?;
        let is_listed = !self.args.directory;
        // As ls does: a link given as operand is followed, unless -l or -d describes it.
        let is_itself = self.args.long || self.args.directory;
        let last = if is_itself { FinalSymlink::Itself } else { FinalSymlink::Followed };
        let found = tree.resolve(&path, last)?;
        if found.attributes.kind != FileKind::Directory || !is_listed {
            let file = NamedEntry { name: word.as_encoded_bytes().to_vec(), entry: Ok(found) };
            return self.show(word, b"", &tree, vec![file], false);
        }
        self.directories(word, &tree, found)
    }

    /// Lists a directory, with -R recursively.
    fn directories(&mut self, word: &OsStr, tree: &GuestTree, top: GuestEntry) -> Result<()> {
        let mut visited = VisitedDirectories::default();
        // A stack: the last element is listed next.
        let mut left = vec![(Vec::new(), top, 0)];
        while let Some((path, directory, depth)) = left.pop() {
            if let Err(error) = visited.enter(directory.ino, depth) {
                self.trouble(word, &path, error);
                continue;
            }
            let (mut entries, trouble) = tree.entries(directory.ino);
            entries.retain(|named| self.args.all || !named.name.starts_with(b"."));
            if self.args.recursive {
                for named in entries.iter().rev() {
                    if let Ok(entry) = &named.entry
                        && entry.attributes.kind == FileKind::Directory
                    {
                        left.push(([path.as_slice(), b"/", &named.name].concat(), *entry, depth + 1));
                    }
                }
            }
            let has_head = self.args.recursive || self.args.places.len() > 1;
            self.show(word, &path, tree, entries, has_head)?;
            if let Some(error) = trouble {
                self.trouble(word, &path, error);
            }
        }
        Ok(())
    }

    fn trouble(&mut self, word: &OsStr, path: &[u8], error: crate::error::Error) {
        let place = format!("{}{}", shown(word), terminal_bytes(path));
        complain(&mut self.failed, &error.within(place));
    }

    fn show(
        &mut self,
        word: &OsStr,
        path: &[u8],
        tree: &GuestTree,
        entries: Vec<NamedEntry>,
        has_head: bool,
    ) -> Result<()> {
        let is_json = self.args.output.format() == Output::Json;
        let mut files = Vec::with_capacity(entries.len());
        for NamedEntry { name, entry } in entries {
            let mut listed = Listed { name, attributes: None, target: None };
            match entry {
                Ok(GuestEntry { ino, attributes, .. }) => {
                    listed.attributes = Some(attributes);
                    if attributes.kind == FileKind::Symlink && (self.args.long || is_json) {
                        match tree.read_link(ino) {
                            Ok(target) => listed.target = Some(target),
                            Err(error) => self.trouble(word, &[path, b"/", &listed.name].concat(), error),
                        }
                    }
                }
                Err(error) => self.trouble(word, &[path, b"/", &listed.name].concat(), error),
            }
            files.push(listed);
        }
        let place = format!("{}{}", shown(word).trim_end_matches('/'), terminal_bytes(path));
        if is_json {
            let entries = files.iter().map(FileObject::of).collect();
            self.objects.push(Object::Directory { place: shown(word), path: text(path), entries });
            return Ok(());
        }
        self.head(&place, has_head)?;
        let width = (!self.args.one && std::io::stdout().is_terminal()).then(terminal_width);
        print(&if self.args.long { long(&files, &self.zone) } else { short(&files, width) })
    }

    /// Prints the heading of a section.
    fn head(&mut self, place: &str, is_needed: bool) -> Result<()> {
        if is_needed {
            print(&format!("{}{place}:\n", if self.printed { "\n" } else { "" }))?;
        }
        self.printed = true;
        Ok(())
    }
}

fn terminal_width() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|width| *width > 0).unwrap_or(80)
}
