//! Finds the other disks of a guest's volumes and file systems in other chains.
//!
//! Promises: all disks are of the same moment; every reader of the requested disk may read the others as
//! well; an ambiguous match is never used.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::guest::volumes::{MissingMembers, SetKind, SetMember};
use crate::store::{ACTIVE, Catalog, ViewId, shown};

use super::disk::BrowsedDisk;
use super::disk_contents::Exchange;
use super::worker::Worker;
use super::worker::protocol::{Answer, Request};
use super::{Browser, validate};

/// Chains that are searched for the other disks of a volume group or an array, at most.
const CANDIDATES: usize = 256;
/// Disks of one set, at most.
const DISKS: usize = 32;

impl Browser {
    /// Disks of other chains that hold the missing members, in the view of the same moment, and remarks about
    /// the search. A guest's other disks are identified by their metadata of the group or array. Clones
    /// of guests have the same metadata, so a disk in the same directory has precedence; if that leaves a
    /// choice, none is used.
    pub(super) fn more_disks(
        &self,
        worker: &Worker,
        disks: &[BrowsedDisk],
        missing: &[MissingMembers],
        remarks: &mut Vec<String>,
    ) -> Option<Vec<BrowsedDisk>> {
        if missing.is_empty() || disks.len() >= DISKS {
            return None;
        }
        let catalog = self.store.catalog();
        let id = disks[0].id();
        let mut candidates = Vec::new();
        for other in self.same_moment(&catalog, id) {
            if disks.iter().any(|disk| disk.id() == &other) || !self.has_same_readers(id, &other) {
                continue;
            }
            // A disk that cannot be opened now counts as absent, which is reported.
            let Ok(disk) = BrowsedDisk::new(&self.store, &other, &self.read) else { continue };
            let request = Request::SetMembers { size: disk.size() };
            let exchange = Exchange::new(std::slice::from_ref(&disk), &self.digests);
            if let Ok((Answer::SetMembers(held), _)) = worker.ask(&request, &exchange)
                && validate::check_set_members(&held).is_ok()
            {
                drop(exchange);
                candidates.push((disk, held));
            }
        }
        let mut chosen = BTreeSet::new();
        for group in missing {
            for absent in &group.absent {
                let is_it = |held: &SetMember| {
                    let is_of_group = held.set.as_ref().is_none_or(|id| *id == group.id);
                    let has_state = |state| group.state.is_none_or(|expected| state == expected);
                    held.id == *absent && is_of_group && held.state.is_none_or(has_state)
                };
                let mut found: Vec<usize> =
                    (0..candidates.len()).filter(|at| candidates[*at].1.iter().any(is_it)).collect();
                let is_near = |at: &usize| candidates[*at].0.id().chain.parent() == id.chain.parent();
                if found.iter().any(is_near) {
                    found.retain(is_near);
                }
                match found[..] {
                    [] => {}
                    [one] => {
                        chosen.insert(one);
                    }
                    _ => {
                        let names: Vec<_> =
                            found.iter().map(|at| shown(&candidates[*at].0.id().chain)).collect();
                        let what = match group.kind {
                            SetKind::VolumeGroup => "physical volume",
                            SetKind::Array => "member",
                            SetKind::FileSystem => "device",
                        };
                        let fact = format!("{what} {absent} of {} is on several disks", group.name);
                        let names = names.join(", ");
                        remarks.push(format!(
                            "{fact}, and none of them is used: {names}; keep the disks of each guest in a \
                                directory of its own, which tells clones apart"
                        ));
                    }
                }
            }
        }
        let used = candidates
            .into_iter()
            .enumerate()
            .filter(|(at, _)| chosen.contains(at))
            .map(|(_, (disk, _))| disk);
        let used: Vec<BrowsedDisk> = used.take(DISKS - disks.len()).collect();
        (!used.is_empty()).then_some(used)
    }

    /// Whether the readers of one disk may all read the other: then nothing secret is shown.
    fn has_same_readers(&self, one: &ViewId, other: &ViewId) -> bool {
        let owner = |id: &ViewId| {
            let stat = self.store.find_view(id).ok()?.image().stat;
            Some((stat.uid, stat.gid, stat.mode & 0o444))
        };
        owner(one).is_some_and(|known| owner(other) == Some(known))
    }

    /// The views of other chains for the same moment as `id`: their active disks for an active one, else the
    /// views of the same name, or of the name that a snapshot of several chains uses. Chains in the same
    /// directory come first.
    fn same_moment(&self, catalog: &Catalog, id: &ViewId) -> Vec<ViewId> {
        let directory = id.chain.parent();
        let mut chains: Vec<_> = catalog.chains().filter(|(path, _)| *path != *id.chain).collect();
        chains.sort_by_key(|(path, _)| path.parent() != directory);
        let name = without_stem(&id.name, &id.chain);
        let ids = chains.into_iter().take(CANDIDATES).filter_map(|(path, leaf)| {
            let path = Arc::new(path);
            let views = self.store.chain_views(catalog, leaf);
            let is_it = |other: &[u8]| {
                let is_same = other == &*id.name || without_stem(other, &path) == name;
                if id.is_active() { other == ACTIVE } else { is_same }
            };
            let view = views.views.iter().find(|view| view.active == id.is_active() && is_it(&view.name))?;
            Some(self.store.view_id(catalog, &path, &views, view, false))
        });
        ids.collect()
    }
}

/// A view's name without its chain's name: a snapshot of several chains names its views `CHAIN-NAME`.
fn without_stem<'a>(name: &'a [u8], chain: &Path) -> &'a [u8] {
    let stem = chain.file_name().map_or(&b""[..], OsStrExt::as_bytes);
    name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(b"-")).unwrap_or(name)
}
