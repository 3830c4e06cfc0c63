//! The entries of each directory of the mount and their names.
//!
//! [`MountTree::directory`] decides for each node where its entries come from: the only match on that. Each
//! source of entries finds a name and lists all names in one place. So a lookup finds exactly the names that
//! a listing has. Names come from the current catalog; no file is opened.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::report::store as report;
use crate::store::{Catalog, ChainView, ImageIndex, README, STORE_DIRECTORY, ViewId, stale};

use super::super::control::{CONTROL, ControlScope};
use super::super::guest_numbers::GuestNode;
use super::super::node::{ChainDocument, Node, StoreDocument};
use super::volumes::Volumes;
use super::{MountTree, leaf};

/// Suffix of a view's disk.
const DISK: &[u8] = b".raw";
/// Suffix of the VM state that was saved with a view.
const VM_STATE: &[u8] = b".vmstate";

/// A name and its node.
pub(super) type NamedNode = (OsString, Node);

/// Where the entries of a node come from.
pub(super) enum Directory<'a> {
    /// The store, or the layout of a disk.
    Nodes(Box<dyn Entries + 'a>),
    /// A guest's directory. Its file system finds, lists and pages its entries itself.
    Guest(GuestNode),
    /// The node is no directory.
    None,
}

/// A source of entries. Promise: `find` finds exactly the names that `list` adds, each with the same node.
pub(super) trait Entries {
    /// The node of `name`.
    fn find(&self, name: &OsStr) -> Result<Option<Node>>;
    /// Adds all entries.
    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()>;
}

/// The directories and files in each chain's directory, beside its active disk.
#[derive(Clone, Copy)]
enum ChainEntry {
    Control,
    Files,
    Info,
    Partitions,
    Snapshots,
}

const CHAIN_ENTRIES: [(ChainEntry, &str); 5] = [
    (ChainEntry::Control, CONTROL),
    (ChainEntry::Files, "files"),
    (ChainEntry::Info, "info"),
    (ChainEntry::Partitions, "partitions"),
    (ChainEntry::Snapshots, "snapshots"),
];

impl MountTree {
    /// Where the entries of a node come from.
    pub(super) fn directory(&self, node: &Node) -> Result<Directory<'_>> {
        let catalog = self.store.catalog();
        Ok(Directory::Nodes(match node {
            Node::Root => {
                let path = Arc::default();
                let readme = OsStr::from_bytes(README);
                // No chain has this name, but a directory of the store may.
                let is_taken = catalog
                    .directories
                    .get(Path::new(""))
                    .is_some_and(|root| root.directories.contains(readme));
                let readme =
                    (!is_taken).then(|| (readme.to_owned(), Node::StoreDocument(StoreDocument::Readme)));
                let own =
                    [(OsStr::from_bytes(STORE_DIRECTORY).to_owned(), Node::Store)].into_iter().chain(readme);
                let own: Box<dyn Entries> = Box::new(Listed(own.collect()));
                let content = if catalog.single.is_some() {
                    self.chain_entries(catalog, &path)
                } else {
                    Box::new(StoreContent { catalog, path })
                };
                Box::new(Joined([own, content]))
            }
            Node::Directory(path) => Box::new(StoreContent { catalog, path: Arc::clone(path) }),
            Node::Store => Box::new(Joined([
                Box::new(One(OsStr::new(CONTROL), Node::Control(ControlScope::Store))),
                Box::new(Table::new(&StoreDocument::ALL, |document| Some(Node::StoreDocument(*document)))),
            ])),
            Node::Chain(chain) => self.chain_entries(catalog, chain),
            Node::Snapshots(chain) => {
                let leaf = catalog.chain(chain);
                self.views(catalog, chain, leaf, Shown::Snapshots)
            }
            Node::Partitions(chain) => {
                let leaf = leaf(&catalog, chain)?;
                self.views(catalog, chain, Some(leaf), Shown::Partitions)
            }
            Node::Files(chain) => {
                let leaf = leaf(&catalog, chain)?;
                self.views(catalog, chain, Some(leaf), Shown::Files)
            }
            Node::Info(chain) => {
                let (leaf, chain) = (leaf(&catalog, chain)?, Arc::clone(chain));
                Box::new(Table::new(&ChainDocument::ALL, move |document| {
                    let is_shown = self.has_document(&catalog, leaf, *document);
                    is_shown.then(|| Node::ChainDocument(Arc::clone(&chain), *document))
                }))
            }
            Node::Control(scope) => {
                self.control_owner(&catalog, scope)?;
                let files = scope.files();
                let scope = scope.clone();
                Box::new(Table::new(files, move |file| Some(Node::ControlFile(scope.clone(), *file))))
            }
            Node::PartitionsOf(view) => {
                let partitions = self.partitions(view)?.into_iter();
                Box::new(Listed(partitions.map(|(name, found)| (name, Node::Partition(found))).collect()))
            }
            Node::FilesOf(view) => Box::new(Volumes { tree: self, view: view.clone() }),
            Node::Guest(node) => return Ok(Directory::Guest(*node)),
            Node::StoreDocument(_)
            | Node::ChainDocument(..)
            | Node::ControlFile(..)
            | Node::View(_)
            | Node::Partition(_)
            | Node::VolumeList(_)
            | Node::VolumeProblem(..)
            | Node::FormerName(_)
            | Node::RootLink(_) => return Ok(Directory::None),
        }))
    }

    /// The entries of a chain's directory.
    fn chain_entries(&self, catalog: Arc<Catalog>, chain: &Arc<PathBuf>) -> Box<dyn Entries + '_> {
        let leaf = catalog.chain(chain);
        let disk = self.views(catalog, chain, leaf, Shown::Active);
        let (chain, shows_guests) = (Arc::clone(chain), self.guest_options.shown);
        let others = Table::new(&CHAIN_ENTRIES, move |entry| {
            let chain = Arc::clone(&chain);
            leaf?;
            Some(match entry {
                ChainEntry::Control => Node::Control(ControlScope::Chain(chain)),
                ChainEntry::Info => Node::Info(chain),
                ChainEntry::Snapshots => Node::Snapshots(chain),
                ChainEntry::Files | ChainEntry::Partitions if !shows_guests => return None,
                ChainEntry::Files => Node::Files(chain),
                ChainEntry::Partitions => Node::Partitions(chain),
            })
        });
        Box::new(Joined([disk, Box::new(others)]))
    }

    fn views(
        &self,
        catalog: Arc<Catalog>,
        chain: &Arc<PathBuf>,
        leaf: Option<ImageIndex>,
        shown: Shown,
    ) -> Box<dyn Entries + '_> {
        Box::new(Views { tree: self, catalog, chain: Arc::clone(chain), leaf, shown })
    }

    fn has_document(&self, catalog: &Catalog, leaf: ImageIndex, document: ChainDocument) -> bool {
        match document {
            ChainDocument::Problem => report::chain_problem(catalog, leaf).is_some(),
            ChainDocument::OperatingSystem => self.guest_options.shown,
            ChainDocument::Chain | ChainDocument::Page | ChainDocument::TreeText | ChainDocument::TreeSvg => {
                true
            }
        }
    }
}

/// A single entry.
struct One<'a>(&'a OsStr, Node);

impl Entries for One<'_> {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        Ok((name == self.0).then(|| self.1.clone()))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        found.push((self.0.to_owned(), self.1.clone()));
        Ok(())
    }
}

/// The entries of one source, then those of the other. The first has precedence.
struct Joined<'a>([Box<dyn Entries + 'a>; 2]);

impl Entries for Joined<'_> {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        let Self([first, second]) = self;
        Ok(match first.find(name)? {
            Some(node) => Some(node),
            None => second.find(name)?,
        })
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        self.0.iter().try_for_each(|entries| entries.list(found))
    }
}

/// Entries that were made before: few, and cheap to make.
struct Listed(Vec<NamedNode>);

impl Entries for Listed {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        Ok(self.0.iter().find(|(known, _)| known == name).map(|(_, node)| node.clone()))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        found.extend(self.0.iter().cloned());
        Ok(())
    }
}

/// Entries with fixed names. `node`: `None` if the entry is not shown.
struct Table<T: 'static, F> {
    names: &'static [(T, &'static str)],
    node: F,
}

impl<T, F: Fn(&T) -> Option<Node>> Table<T, F> {
    fn new(names: &'static [(T, &'static str)], node: F) -> Self {
        Self { names, node }
    }
}

impl<T, F: Fn(&T) -> Option<Node>> Entries for Table<T, F> {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        let found = self.names.iter().find(|(_, known)| name == *known);
        Ok(found.and_then(|(entry, _)| (self.node)(entry)))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        let shown = self.names.iter().filter_map(|(entry, name)| Some((name.into(), (self.node)(entry)?)));
        found.extend(shown);
        Ok(())
    }
}

/// The chains and sub-directories of a directory of the store.
struct StoreContent {
    catalog: Arc<Catalog>,
    path: Arc<PathBuf>,
}

impl Entries for StoreContent {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        let Some(content) = self.catalog.directories.get(self.path.as_path()) else { return Ok(None) };
        let path = || Arc::new(self.path.join(name));
        if content.directories.contains(name) {
            return Ok(Some(Node::Directory(path())));
        }
        if content.chains.contains_key(name) {
            return Ok(Some(Node::Chain(path())));
        }
        Ok(content.former.contains_key(name).then(|| Node::FormerName(path())))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        let content = self.catalog.directories.get(self.path.as_path());
        let content = content.ok_or_else(|| stale("the directory was removed"))?;
        let path = |name: &OsString| Arc::new(self.path.join(name));
        found.extend(content.directories.iter().map(|name| (name.clone(), Node::Directory(path(name)))));
        found.extend(content.chains.keys().map(|name| (name.clone(), Node::Chain(path(name)))));
        found.extend(content.former.keys().map(|name| (name.clone(), Node::FormerName(path(name)))));
        Ok(())
    }
}

/// Which views of a chain a directory has, and as what.
#[derive(Clone, Copy)]
enum Shown {
    /// The active disk.
    Active,
    /// All others, and their VM state.
    Snapshots,
    /// All, as directories of partitions.
    Partitions,
    /// All, as directories of volumes.
    Files,
}

/// Views of a chain.
struct Views<'a> {
    tree: &'a MountTree,
    catalog: Arc<Catalog>,
    chain: Arc<PathBuf>,
    /// `None`: the chain was removed.
    leaf: Option<ImageIndex>,
    shown: Shown,
}

impl Views<'_> {
    /// Suffixes of the names of a view's entries.
    fn suffixes(&self) -> &'static [&'static [u8]] {
        match self.shown {
            Shown::Active => &[DISK],
            Shown::Snapshots => &[DISK, VM_STATE],
            Shown::Partitions | Shown::Files => &[b""],
        }
    }

    /// Whether a view has an entry with this suffix.
    fn shows(&self, view: &ChainView, suffix: &[u8]) -> bool {
        let is_shown = match self.shown {
            Shown::Active => view.active,
            Shown::Snapshots => !view.active,
            Shown::Partitions | Shown::Files => true,
        };
        is_shown && (suffix != VM_STATE || view.has_vm_state)
    }

    fn node(&self, view: ViewId) -> Node {
        match self.shown {
            Shown::Active | Shown::Snapshots => Node::View(view),
            Shown::Partitions => Node::PartitionsOf(view),
            Shown::Files => Node::FilesOf(view),
        }
    }
}

impl Entries for Views<'_> {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        let Some(leaf) = self.leaf else { return Ok(None) };
        let strip = |suffix: &&'static [u8]| Some((name.as_bytes().strip_suffix(*suffix)?, *suffix));
        let Some((base, suffix)) = self.suffixes().iter().find_map(strip) else { return Ok(None) };
        let store = &self.tree.store;
        let views = store.chain_views(&self.catalog, leaf);
        let view = views.find(base).filter(|view| self.shows(view, suffix));
        let id = |view| store.view_id(&self.catalog, &self.chain, &views, view, suffix == VM_STATE);
        Ok(view.map(|view| self.node(id(view))))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        let leaf = self.leaf.ok_or_else(|| stale("the chain was removed"))?;
        let store = &self.tree.store;
        let views = store.chain_views(&self.catalog, leaf);
        for view in &views.views {
            for suffix in self.suffixes().iter().filter(|suffix| self.shows(view, suffix)) {
                let name = OsString::from_vec([&view.name, *suffix].concat());
                let id = store.view_id(&self.catalog, &self.chain, &views, view, *suffix == VM_STATE);
                found.push((name, self.node(id)));
            }
        }
        Ok(())
    }
}
