//! The entries of each directory of the mount and their names.
//!
//! Names come from the current catalog; no file is opened. Lookup finds exactly the names that a listing has.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{ACTIVE, Catalog, ImageIndex, STORE_DIRECTORY, stale};

use super::super::control::{CONTROL, ControlScope};
use super::super::node::{ChainDocument, Node, StoreDocument};
use super::guests::{FILES, PARTITIONS};
use super::{MountTree, NodeEntry, leaf};

const SNAPSHOTS: &str = "snapshots";
const INFO: &str = "info";
const DISK_SUFFIX: &[u8] = b".raw";
const VM_STATE_SUFFIX: &[u8] = b".vmstate";

impl MountTree {
    pub(super) fn child(&self, parent: &Node, name: &OsStr) -> Result<Option<Node>> {
        let catalog = self.store.catalog();
        let path = |parent: &Path| Arc::new(parent.join(name));
        Ok(match parent {
            Node::Root if name.as_bytes() == STORE_DIRECTORY => Some(Node::Store),
            Node::Root if catalog.single.is_some() => self.chain_child(&catalog, &Arc::default(), name),
            Node::Root => directory_child(&catalog, Path::new(""), name, path),
            Node::Directory(directory) => directory_child(&catalog, directory, name, path),
            Node::Store if name == CONTROL => Some(Node::Control(ControlScope::Store)),
            Node::Store => StoreDocument::ALL
                .iter()
                .find(|(_, known)| name == *known)
                .map(|(document, _)| Node::StoreDocument(*document)),
            Node::Chain(chain) => self.chain_child(&catalog, chain, name),
            Node::Snapshots(chain) => self.snapshot_child(&catalog, chain, name),
            Node::Info(chain) => {
                let leaf = leaf(&catalog, chain)?;
                let found = ChainDocument::ALL.iter().find(|(_, known)| name == *known);
                found
                    .filter(|(document, _)| self.has_document(&catalog, leaf, *document))
                    .map(|(document, _)| Node::ChainDocument(Arc::clone(chain), *document))
            }
            Node::Control(scope) => {
                self.control_owner(&catalog, scope)?;
                let found = scope.files().iter().find(|(_, known)| name == *known);
                found.map(|(file, _)| Node::ControlFile(scope.clone(), *file))
            }
            Node::StoreDocument(_) | Node::ChainDocument(..) | Node::ControlFile(..) | Node::View(_) => None,
            _ => self.guest_child(parent, name)?,
        })
    }

    fn has_document(&self, catalog: &Catalog, leaf: ImageIndex, document: ChainDocument) -> bool {
        match document {
            ChainDocument::Problem => {
                self.documents.of_chain(&self.store, catalog, leaf, document, &|_| None).is_some()
            }
            ChainDocument::OperatingSystem => self.guest_options.shown,
            ChainDocument::Chain | ChainDocument::TreeText | ChainDocument::TreeSvg => true,
        }
    }

    fn chain_child(&self, catalog: &Arc<Catalog>, chain: &Arc<PathBuf>, name: &OsStr) -> Option<Node> {
        let leaf = catalog.chain(chain)?;
        if name == SNAPSHOTS {
            return Some(Node::Snapshots(Arc::clone(chain)));
        }
        if name == INFO {
            return Some(Node::Info(Arc::clone(chain)));
        }
        if name == CONTROL {
            return Some(Node::Control(ControlScope::Chain(Arc::clone(chain))));
        }
        if self.guest_options.shown && name == PARTITIONS {
            return Some(Node::Partitions(Arc::clone(chain)));
        }
        if self.guest_options.shown && name == FILES {
            return Some(Node::Files(Arc::clone(chain)));
        }
        let base = name.as_bytes().strip_suffix(DISK_SUFFIX)?;
        let views = self.store.chain_views(catalog, leaf);
        let view = views.active().filter(|_| base == ACTIVE)?;
        Some(Node::View(self.store.view_id(catalog, chain, &views, view, false)))
    }

    fn snapshot_child(&self, catalog: &Arc<Catalog>, chain: &Arc<PathBuf>, name: &OsStr) -> Option<Node> {
        let views = self.store.chain_views(catalog, catalog.chain(chain)?);
        let name = name.as_bytes();
        let (base, vm_state) = match name.strip_suffix(DISK_SUFFIX) {
            Some(base) => (base, false),
            None => (name.strip_suffix(VM_STATE_SUFFIX)?, true),
        };
        let view = views.find(base).filter(|view| !view.active && (!vm_state || view.has_vm_state))?;
        Some(Node::View(self.store.view_id(catalog, chain, &views, view, vm_state)))
    }

    /// The present entries of a directory.
    pub fn list(&self, inode: u64) -> Result<Vec<NodeEntry>> {
        let catalog = self.store.catalog();
        let mut found: Vec<(OsString, Node)> = Vec::new();
        let node = self.node(inode)?;
        match &node {
            Node::Root => {
                found.push((OsString::from_vec(STORE_DIRECTORY.to_vec()), Node::Store));
                if catalog.single.is_some() {
                    self.list_chain(&catalog, &Arc::default(), &mut found)?;
                } else {
                    list_directory(&catalog, Path::new(""), &mut found)?;
                }
            }
            Node::Directory(path) => list_directory(&catalog, path, &mut found)?,
            Node::Store => {
                found.push((CONTROL.into(), Node::Control(ControlScope::Store)));
                found.extend(
                    StoreDocument::ALL
                        .iter()
                        .map(|(document, name)| (OsString::from(name), Node::StoreDocument(*document))),
                );
            }
            Node::Control(scope) => {
                self.control_owner(&catalog, scope)?;
                let files = scope.files().iter();
                found.extend(
                    files.map(|(file, name)| ((*name).into(), Node::ControlFile(scope.clone(), *file))),
                );
            }
            Node::Chain(chain) => self.list_chain(&catalog, chain, &mut found)?,
            Node::Snapshots(chain) => {
                let views = self.store.chain_views(&catalog, leaf(&catalog, chain)?);
                for view in views.snapshots() {
                    let node = Node::View(self.store.view_id(&catalog, chain, &views, view, false));
                    found.push((file_name(&view.name, DISK_SUFFIX), node));
                    if view.has_vm_state {
                        let node = Node::View(self.store.view_id(&catalog, chain, &views, view, true));
                        found.push((file_name(&view.name, VM_STATE_SUFFIX), node));
                    }
                }
            }
            Node::Info(chain) => {
                let leaf = leaf(&catalog, chain)?;
                let shown = ChainDocument::ALL
                    .iter()
                    .filter(|(document, _)| self.has_document(&catalog, leaf, *document));
                found.extend(shown.map(|(document, name)| {
                    (OsString::from(name), Node::ChainDocument(Arc::clone(chain), *document))
                }));
            }
            Node::StoreDocument(_) | Node::ChainDocument(..) | Node::ControlFile(..) | Node::View(_) => {
                return Err(Error::new(ErrorKind::Usage, "not a directory"));
            }
            _ => self.guest_list(&node, &mut found)?,
        }
        Ok(found
            .into_iter()
            .map(|(name, node)| NodeEntry { inode: self.inodes.number(&node), name, node })
            .collect())
    }

    fn list_chain(
        &self,
        catalog: &Arc<Catalog>,
        chain: &Arc<PathBuf>,
        found: &mut Vec<(OsString, Node)>,
    ) -> Result<()> {
        let views = self.store.chain_views(catalog, leaf(catalog, chain)?);
        if let Some(view) = views.active() {
            let node = Node::View(self.store.view_id(catalog, chain, &views, view, false));
            found.push((file_name(&view.name, DISK_SUFFIX), node));
        }
        found.push((CONTROL.into(), Node::Control(ControlScope::Chain(Arc::clone(chain)))));
        if self.guest_options.shown {
            found.push((FILES.into(), Node::Files(Arc::clone(chain))));
        }
        found.push((INFO.into(), Node::Info(Arc::clone(chain))));
        if self.guest_options.shown {
            found.push((PARTITIONS.into(), Node::Partitions(Arc::clone(chain))));
        }
        found.push((SNAPSHOTS.into(), Node::Snapshots(Arc::clone(chain))));
        Ok(())
    }
}

fn file_name(base: &[u8], suffix: &[u8]) -> OsString {
    OsString::from_vec([base, suffix].concat())
}

fn directory_child(
    catalog: &Catalog,
    directory: &Path,
    name: &OsStr,
    path: impl Fn(&Path) -> Arc<PathBuf>,
) -> Option<Node> {
    let content = catalog.directories.get(directory)?;
    if content.directories.contains(name) {
        return Some(Node::Directory(path(directory)));
    }
    content.chains.contains_key(name).then(|| Node::Chain(path(directory)))
}

fn list_directory(catalog: &Catalog, directory: &Path, found: &mut Vec<(OsString, Node)>) -> Result<()> {
    let content = catalog.directories.get(directory).ok_or_else(|| stale("the directory was removed"))?;
    let path = |name: &OsString| Arc::new(directory.join(name));
    found.extend(content.directories.iter().map(|name| (name.clone(), Node::Directory(path(name)))));
    found.extend(content.chains.keys().map(|name| (name.clone(), Node::Chain(path(name)))));
    Ok(())
}
