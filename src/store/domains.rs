//! What libvirt's definitions say of the files of a store: which are disks of domains, which hold the states
//! of snapshots, and which were left behind.
//!
//! virsh names an overlay after the disk and the snapshot (`vm.snap1` on `vm.qcow2`), and leaves files behind
//! when it commits or pulls. Without the definitions, such a leaf cannot be told from the disk of another
//! virtual machine: both are overlays with the disk's stem. So only definitions decide, and without them
//! nothing is left behind. Paths are compared as they are written: none of them is opened.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::io::{Backend, HostFileVersion, host_files, host_text};

use super::definitions::Definition;
use super::options::StoreOptions;
use super::resolve::StorePath;

/// A snapshot of a domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DomainSnapshot {
    /// The domain's name.
    pub domain: String,
    /// The snapshot's.
    pub name: String,
}

/// What libvirt's definitions say of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManagedFile {
    /// The domains whose disk it is, in order.
    pub domains: BTreeSet<String>,
    /// The snapshots whose state it holds.
    pub states: BTreeSet<DomainSnapshot>,
    /// The snapshots after which it was made. It holds what came after them.
    pub made_after: BTreeSet<DomainSnapshot>,
    /// The domain that left it behind.
    pub left_behind_by: Option<String>,
    /// When the last definition was written that has it as a disk, in seconds and nanoseconds since 1970.
    pub(super) defined: (i64, i64),
}

/// The files of a store that definitions name.
pub(super) type ManagedFiles = HashMap<StorePath, ManagedFile>;

/// A file that was read, and what it defines, if anything.
type KnownDefinition = (HostFileVersion, Arc<Option<Definition>>);

/// The definitions that were read, by file, so that unchanged files are not read again.
#[derive(Debug, Default)]
pub(super) struct Domains {
    known: Mutex<BTreeMap<PathBuf, KnownDefinition>>,
}

impl Domains {
    /// What the definitions in the directories of `options` say of the files of these roots.
    pub(super) fn files(&self, options: &StoreOptions, roots: &[Arc<dyn Backend>]) -> ManagedFiles {
        let mut known = self.known.lock();
        let before = std::mem::take(&mut *known);
        for (path, version) in options.domains.iter().flat_map(|directory| host_files(directory, "xml")) {
            let definition = match before.get(&path) {
                Some((same, definition)) if *same == version => Arc::clone(definition),
                _ => Arc::new(host_text(&path).as_deref().and_then(Definition::parse)),
            };
            known.insert(path, (version, definition));
        }
        let definitions = known
            .values()
            .filter_map(|(version, definition)| Some((version.written(), definition.as_ref().as_ref()?)));
        managed(definitions, &|path| place(path, options, roots))
    }
}

/// The files that the definitions name, where `place` finds them in the store.
fn managed<'a>(
    definitions: impl Iterator<Item = ((i64, i64), &'a Definition)>,
    place: &dyn Fn(&Path) -> Option<StorePath>,
) -> ManagedFiles {
    let mut files = ManagedFiles::new();
    let mut each = |paths: &[PathBuf], note: &dyn Fn(&mut ManagedFile)| {
        paths.iter().filter_map(|path| place(path)).for_each(|place| note(files.entry(place).or_default()));
    };
    for (written, definition) in definitions {
        match definition {
            Definition::Domain { name, disks } => each(disks, &|file| {
                file.domains.insert(name.clone());
                file.defined = file.defined.max(written);
            }),
            Definition::Snapshot { domain, name, states, overlays } => {
                let snapshot = DomainSnapshot { domain: domain.clone(), name: name.clone() };
                each(states, &|file| {
                    file.states.insert(snapshot.clone());
                });
                each(overlays, &|file| {
                    file.made_after.insert(snapshot.clone());
                });
            }
        }
    }
    files
}

/// The place of a file in the store, by the user's translations of names and the paths of the roots.
fn place(path: &Path, options: &StoreOptions, roots: &[Arc<dyn Backend>]) -> Option<StorePath> {
    let mapped = options.maps.iter().find_map(|(old, new)| Some(new.join(path.strip_prefix(old).ok()?)));
    let path = mapped.as_deref().unwrap_or(path);
    roots.iter().enumerate().find_map(|(root, backend)| {
        let path = backend.relative(path)?;
        let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        is_plain.then_some(StorePath { root, path })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gathers_what_all_definitions_say_of_it() {
        let path = |name: &str| PathBuf::from(format!("/images/{name}"));
        let domain =
            |name: &str, disk: &str| Definition::Domain { name: name.into(), disks: vec![path(disk)] };
        let snapshot = Definition::Snapshot {
            domain: "vm".into(),
            name: "snap1".into(),
            states: vec![path("vm.qcow2")],
            overlays: vec![path("vm.snap1"), "/elsewhere/x".into()],
        };
        let definitions =
            [domain("vm", "vm.snap1"), domain("vm", "vm.snap1"), domain("b", "vm.snap1"), snapshot];
        let place = |path: &Path| {
            let path = path.strip_prefix("/images").ok()?.to_owned();
            Some(StorePath { root: 0, path })
        };
        let files = managed(definitions.iter().map(|definition| ((7, 0), definition)), &place);
        let of = |name: &str| &files[&StorePath { root: 0, path: name.into() }];
        let snap1 = BTreeSet::from([DomainSnapshot { domain: "vm".into(), name: "snap1".into() }]);
        assert_eq!(files.len(), 2);
        assert_eq!(of("vm.qcow2").states, snap1);
        assert_eq!(of("vm.snap1").made_after, snap1);
        assert_eq!(of("vm.snap1").domains.iter().collect::<Vec<_>>(), ["b", "vm"]);
    }
}
