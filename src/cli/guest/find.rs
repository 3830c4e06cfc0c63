//! `chainfs find`: finds files of guests by name, in all views of a store, a chain or one disk.
//!
//! Prints as it finds. Views that several chains share are searched once, with the longest of these chains,
//! as the tree draws them.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};
use jiff::tz::TimeZone;

use super::super::args::{FindArgs, Output};
use super::super::target::place_in_mount;
use super::super::warn;
use super::images::OpenStores;
use super::operands::{self, DiskName};
use super::store_disk::{self, OpenStore, StoreDisk};
use crate::browse::DiskContents;
use crate::browse::search::{SearchResult, search};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::FileKind;
use crate::io::is_address;
use crate::report::find::{FoundFile, FoundObject, line};
use crate::report::json::pretty;
use crate::report::safe::{terminal, terminal_bytes};

/// Runs the command.
pub(in crate::cli) fn run(args: &FindArgs) -> Result<u8> {
    let name = NamePattern::new(args)?;
    let mut images = OpenStores::new(&args.look, &[])?;
    let chains = searched(&mut images, &args.place)?;
    let mut out = FindOutput::new(args);
    let searched = chains.into_iter().try_for_each(|chain| chain.search(&name, &mut out));
    match searched.and_then(|()| out.finish()) {
        // The reader has closed the pipe, as `| head` does.
        Err(error) if error.kind() == ErrorKind::Cancelled => {}
        done => done?,
    }
    let is_stale = images.warn_stale();
    Ok(u8::from(out.failed || is_stale))
}

/// What is to be found.
struct NamePattern {
    pattern: Pattern,
    /// Whether it is for the whole path: it has a slash.
    is_path: bool,
    options: MatchOptions,
    kind: Option<FileKind>,
}

impl NamePattern {
    fn new(args: &FindArgs) -> Result<Self> {
        let text = args.name.to_str().ok_or_else(|| Error::new(ErrorKind::Usage, "the name is not UTF-8"))?;
        let pattern = Pattern::new(text).map_err(|error| {
            Error::new(ErrorKind::Usage, format!("{text:?} is not a pattern: {}", error.msg))
        })?;
        let options = MatchOptions {
            case_sensitive: !args.ignore_case,
            require_literal_separator: false,
            require_literal_leading_dot: false,
        };
        Ok(Self { pattern, is_path: text.contains('/'), options, kind: args.kind.map(Into::into) })
    }

    /// Bytes that are not UTF-8 are matched by `?` and `*`.
    fn is_wanted(&self, path: &[u8], name: &[u8], kind: FileKind) -> bool {
        let text = String::from_utf8_lossy(if self.is_path { path } else { name });
        self.kind.is_none_or(|wanted| wanted == kind) && self.pattern.matches_with(&text, self.options)
    }
}

/// The views that are searched together.
struct SearchedChain {
    /// Its name.
    name: Vec<u8>,
    /// The image by which its views are addressed.
    image: PathBuf,
    views: Vec<(Vec<u8>, StoreDisk)>,
}

/// The chains, with those of their views, that PLACE means.
fn searched(images: &mut OpenStores, word: &OsStr) -> Result<Vec<SearchedChain>> {
    let path = Path::new(word);
    if let Some((store, rest)) = place_in_mount(path)? {
        let opened = images.open(&store)?;
        let catalog = opened.store.catalog();
        if catalog.directories.contains_key(&rest)
            || (rest.as_os_str().is_empty() && catalog.single.is_none())
        {
            return Ok(whole(&opened, &rest));
        }
        if catalog.chain(&rest).is_some() {
            let disk = store_disk::in_chain(&opened, &rest, None, None);
            // A chain without an active disk has a top layer all the same.
            let disk = disk.or_else(|_| store_disk::top_of(&opened, &rest))?;
            return Ok(vec![chain_of(&disk, store_disk::history(&disk))]);
        }
    } else if path.is_dir() || is_address(path) && operands::names_no_view(word) {
        let opened = images.open(path)?;
        if opened.store.catalog().single.is_none() {
            return Ok(whole(&opened, Path::new("")));
        }
    }
    let place = operands::parse(word)?;
    if place.has_inner {
        let fact =
            "name a store, an image or IMAGE@VIEW; a pattern with a slash is matched with the whole path";
        return Err(Error::new(ErrorKind::Usage, format!("{}: {fact}", operands::shown(word))));
    }
    let disk = images.in_its_store(&place)?;
    let is_one_view = match &place.disk {
        DiskName::Image { snapshot, .. } => snapshot.is_some(),
        DiskName::Mounted { .. } => true,
    };
    let views =
        if is_one_view { vec![(disk.name().to_vec(), disk.clone())] } else { store_disk::history(&disk) };
    Ok(vec![chain_of(&disk, views)])
}

fn chain_of(disk: &StoreDisk, views: Vec<(Vec<u8>, StoreDisk)>) -> SearchedChain {
    let catalog = disk.opened.store.catalog();
    let leaf = disk.leaf();
    let name = match disk.id.chain.as_os_str().as_bytes() {
        // An image that was opened by itself.
        b"" => catalog.images[leaf].place.path.file_stem().unwrap_or_default().as_bytes(),
        chain => chain,
    };
    let image = disk.opened.store.host_path(&catalog.images[leaf].place);
    SearchedChain { name: name.to_vec(), image, views }
}

/// All chains below a directory of a store.
fn whole(opened: &Arc<OpenStore>, below: &Path) -> Vec<SearchedChain> {
    let catalog = opened.store.catalog();
    let mut chains: Vec<(PathBuf, usize)> =
        catalog.chains().map(|(chain, leaf)| (chain, catalog.layers(leaf).len())).collect();
    chains.retain(|(chain, _)| chain.starts_with(below));
    chains.sort_by(|(one, length), (other, other_length)| other_length.cmp(length).then(one.cmp(other)));
    let mut met = HashSet::new();
    let chain = |(chain, _): (PathBuf, usize)| {
        let disk = store_disk::top_of(opened, &chain).ok()?;
        let mut views = store_disk::history(&disk);
        views.retain(|(_, view)| met.insert(view.key()));
        (!views.is_empty()).then(|| chain_of(&disk, views))
    };
    let mut found: Vec<SearchedChain> = chains.into_iter().filter_map(chain).collect();
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

impl SearchedChain {
    fn search(self, name: &NamePattern, out: &mut FindOutput<'_>) -> Result<()> {
        let mut disks: Vec<Option<Arc<DiskContents>>> = Vec::with_capacity(self.views.len());
        let mut last = String::new();
        for (view, disk) in &self.views {
            match disk.contents() {
                Ok(contents) => disks.push(Some(contents)),
                Err(error) => {
                    disks.push(None);
                    // A layer that cannot be read makes all above it unreadable.
                    if error.to_string() != last {
                        out.trouble(&self, view, b"", &error);
                        last = error.to_string();
                    }
                }
            }
        }
        let names: Vec<Vec<u8>> = self.views.iter().map(|(view, _)| view.clone()).collect();
        let wanted = |path: &[u8], file: &[u8], kind: FileKind| name.is_wanted(path, file, kind);
        search(&disks, &wanted, &mut |result| match result {
            SearchResult::Unreadable { path, disk, error } => {
                out.trouble(&self, &names[disk], &path, &error);
                Ok(())
            }
            SearchResult::Found { path, attributes, disks } => {
                let address = self.address(disks.end - 1, &path);
                out.found(&FoundFile {
                    chain: &self.name,
                    views: &names[disks],
                    path: &path,
                    attributes: &attributes,
                    address: &address,
                })
            }
        })
    }

    /// What `cat`, `cp` and `ls` call a file of a view.
    fn address(&self, view: usize, path: &[u8]) -> Vec<u8> {
        let (name, disk) = &self.views[view];
        let image = self.image.as_os_str().as_bytes();
        let view = if disk.is_active_layer() { Vec::new() } else { [b"@", name.as_slice()].concat() };
        [image, &view, b":", path].concat()
    }
}

/// Prints results one by one.
struct FindOutput<'a> {
    args: &'a FindArgs,
    zone: TimeZone,
    count: usize,
    failed: bool,
}

impl<'a> FindOutput<'a> {
    fn new(args: &'a FindArgs) -> Self {
        Self { args, zone: TimeZone::system(), count: 0, failed: false }
    }

    fn found(&mut self, found: &FoundFile<'_>) -> Result<()> {
        let text = match self.args.output.format() {
            _ if self.args.print0 => [found.address, b"\0"].concat(),
            Output::Human => line(found, &self.zone).into_bytes(),
            Output::Json => {
                let object = pretty(&FoundObject::of(found));
                let begin = if self.count == 0 { "[\n" } else { ",\n" };
                format!("{begin}{}", object.trim_end()).into_bytes()
            }
        };
        self.count += 1;
        write(&text)
    }

    fn trouble(&mut self, chain: &SearchedChain, view: &[u8], path: &[u8], error: &Error) {
        self.failed = true;
        let (chain, view, path) = (terminal_bytes(&chain.name), terminal_bytes(view), terminal_bytes(path));
        let colon = if path.is_empty() { "" } else { ":" };
        warn(&terminal(&format!("{chain} {view}{colon}{path}: {error}")));
    }

    fn finish(&mut self) -> Result<()> {
        let is_json = self.args.output.format() == Output::Json && !self.args.print0;
        match (is_json, self.count) {
            (false, _) => Ok(()),
            (true, 0) => write(b"[]\n"),
            (true, _) => write(b"\n]\n"),
        }
    }
}

/// Writes at once: a search may take long, and its first result may be enough.
fn write(text: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Error::new(ErrorKind::Cancelled, "the output was closed"),
        _ => Error::io("writing the result", error),
    })
}
