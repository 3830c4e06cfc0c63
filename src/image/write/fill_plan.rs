//! Assigns clusters when an image is filled from below: planned and finally named under the tables' lock; in
//! between [`super::fill`] writes the data.
//!
//! A cluster of data serves all views that are unallocated there; its count is their number. If a part of a
//! cluster is allocated already, the rest is written beside it if no other view has data there; else all
//! views that are known to use it get merged clusters of their own.

use std::collections::HashMap;

use crate::error::Result;
use crate::format::entry::SUBCLUSTERS;
use crate::format::refcount::max_refcount;
use crate::format::{EntryFormat, Mapping, RawL2Entry, SubclusterEntry};
use crate::units::{GuestOffset, HostOffset};

use super::allocate::{Attempt, ClusterCount};
use super::qcow2::subclusters;
use super::reservation::Reservation;
use super::roots::TableGroup;
use super::tables::{ImageFile, Tables};

/// A cluster of the disk at which some view is unallocated. Masks have a bit for each subcluster; without
/// subclusters, the first bit stands for the cluster.
pub(super) struct ClusterFill {
    pub(super) guest: u64,
    /// Where some view is unallocated.
    pub(super) unallocated: u32,
    /// Where data is added.
    pub(super) data: u32,
    /// The part of that which is zeroes, because the format cannot express them otherwise.
    pub(super) blank: u32,
    /// Where the tables will say zero.
    pub(super) zero: u32,
}

/// Views that will share one new cluster.
pub(super) struct SharedCluster {
    pub(super) guest: u64,
    /// The part of the cluster that is filled.
    pub(super) mask: u32,
    pub(super) roots: Vec<usize>,
    /// The cluster that they had, and their data there.
    pub(super) old: Option<(HostOffset, u32)>,
}

/// The share of a group in a cluster.
struct GroupShare<'a> {
    group: &'a TableGroup,
    /// Where it is unallocated and gets data.
    data: u32,
    /// Where it has data.
    allocated: u32,
    /// Whether its cluster belongs to the active disk alone.
    is_own: bool,
}

/// Data for a cluster that they have already and that no other view uses.
pub(super) struct InPlace {
    pub(super) host: HostOffset,
    pub(super) guest: u64,
    pub(super) mask: u32,
}

/// All the work of one turn.
#[derive(Default)]
pub(super) struct FillPlan {
    pub(super) shared: Vec<SharedCluster>,
    pub(super) in_place: Vec<InPlace>,
    /// Clusters for the shared ones, in their order.
    pub(super) places: Vec<Reservation>,
    /// The location of each shared cluster, by position and view, and how many share it.
    pub(super) hosts: HashMap<(u64, usize), (HostOffset, usize)>,
}

pub(super) fn unit_len(image: &ImageFile) -> u64 {
    let size = image.cluster().size();
    if image.format.extended { size / u64::from(SUBCLUSTERS) } else { size }
}

/// The runs of set bits, as first and end.
pub(super) fn runs_of(mask: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = mask.checked_shr(from).unwrap_or(0);
        if rest == 0 {
            return None;
        }
        let start = from + rest.trailing_zeros();
        let end = start + (mask >> start).trailing_ones();
        from = end;
        Some((start.into(), end.into()))
    })
}

/// Where an entry is unallocated, up to `end` of the disk, and where it has data.
fn unallocated(image: &ImageFile, words: RawL2Entry, guest: u64, end: u64) -> Result<(u32, u32)> {
    let corrupt = |reason: crate::format::Malformed| {
        image.corrupt(format_args!("the L2 entry of guest offset {guest:#x}: {}", reason.fact()))
    };
    if !image.format.extended {
        let entry = image.format.l2(words.entry, GuestOffset(guest)).map_err(corrupt)?;
        return Ok((u32::from(entry.mapping == Mapping::Hole && guest < end), 0));
    }
    let entry = image.format.l2_extended(words.entry, words.bitmap, GuestOffset(guest)).map_err(corrupt)?;
    let count = end.saturating_sub(guest).div_ceil(unit_len(image)).min(SUBCLUSTERS.into());
    if entry.compressed().is_some() || count == 0 {
        return Ok((0, entry.allocated()));
    }
    Ok((!(entry.allocated() | entry.zero()) & subclusters(0, count), entry.allocated()))
}

impl Tables {
    /// The clusters of `[at, at + len)` at which some view is unallocated.
    pub(super) fn find_gaps(
        &mut self,
        image: &ImageFile,
        at: u64,
        len: u64,
        size: u64,
    ) -> Result<Vec<ClusterFill>> {
        let groups = self.groups(image, at, size)?;
        let mut gaps = Vec::new();
        for guest in (at..at + len).step_by(image.cluster().size() as usize) {
            let mut all = 0;
            for group in &groups {
                let words = self.entry_in(image, group.table, guest)?;
                all |= unallocated(image, words, guest, group.end)?.0;
            }
            if all != 0 {
                gaps.push(ClusterFill { guest, unallocated: all, data: 0, blank: 0, zero: 0 });
            }
        }
        Ok(gaps)
    }

    /// Whether a table or a cluster of a position waits for a flush to lose references.
    pub(super) fn is_losing_references(
        &mut self,
        image: &ImageFile,
        gaps: &[ClusterFill],
        size: u64,
    ) -> Result<bool> {
        for group in self.groups(image, gaps[0].guest, size)? {
            let Some(table) = group.table.filter(|_| !group.is_active_alone()) else { continue };
            if self.is_pending(image, image.cluster().index(table.0))? {
                return Ok(true);
            }
            for gap in gaps.iter().filter(|_| image.format.extended) {
                let words = self.entry_in(image, group.table, gap.guest)?;
                let host = image.cluster().index(EntryFormat::raw_offset(words.entry));
                if host != 0 && !EntryFormat::is_compressed(words.entry) && self.is_pending(image, host)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Assigns clusters, and allocates them.
    pub(super) fn plan(&mut self, image: &ImageFile, gaps: &[ClusterFill], size: u64) -> Attempt<FillPlan> {
        let mut plan = FillPlan::default();
        let Some(first) = gaps.first() else { return Ok(plan) };
        let groups = self.groups(image, first.guest, size)?;
        for gap in gaps.iter().filter(|gap| gap.data != 0) {
            self.plan_gap(image, gap, &groups, &mut plan)?;
        }
        let mut left = plan.shared.len() as u64;
        while left > 0 {
            let place = self.allocate(image, ClusterCount::UpTo(left))?;
            left -= place.clusters().count;
            plan.places.push(place);
        }
        let clusters = plan.places.iter().flat_map(|place| place.clusters().numbers());
        for (job, cluster) in plan.shared.iter().zip(clusters) {
            let host = HostOffset(cluster * image.cluster().size());
            plan.hosts.extend(job.roots.iter().map(|root| ((job.guest, *root), (host, job.roots.len()))));
        }
        Ok(plan)
    }

    fn plan_gap(
        &mut self,
        image: &ImageFile,
        gap: &ClusterFill,
        groups: &[TableGroup],
        plan: &mut FillPlan,
    ) -> Result<()> {
        let mut by_host: Vec<(Option<HostOffset>, Vec<GroupShare<'_>>)> = Vec::new();
        for group in groups {
            let words = self.entry_in(image, group.table, gap.guest)?;
            let (unallocated, allocated) = unallocated(image, words, gap.guest, group.end)?;
            let host = match EntryFormat::raw_offset(words.entry) {
                _ if EntryFormat::is_compressed(words.entry) => continue,
                0 => None,
                host => Some(HostOffset(host)),
            };
            let data = unallocated & gap.data;
            // Without subclusters a cluster is unallocated as a whole.
            if data == 0 && (host.is_none() || !image.format.extended) {
                continue;
            }
            let is_own = group.is_active_alone() && EntryFormat::copied(words.entry);
            let share = GroupShare { group, data, allocated, is_own };
            match by_host.iter_mut().find(|(other, _)| *other == host) {
                Some((_, all)) => all.push(share),
                None => by_host.push((host, vec![share])),
            }
        }
        for (host, all) in by_host {
            let data = all.iter().fold(0, |mask, share| mask | share.data);
            let allocated = all.iter().fold(0, |mask, share| mask | share.allocated);
            if data == 0 {
                continue;
            }
            if image.data_file.is_some() {
                let host = HostOffset(gap.guest);
                plan.in_place.push(InPlace { host, guest: gap.guest, mask: data });
                continue;
            }
            let Some(host) = host else {
                plan.share(image, gap.guest, &all);
                continue;
            };
            let users: u64 = all.iter().map(|share| share.group.roots.len() as u64).sum();
            let cluster = image.cluster().index(host.0);
            let is_all =
                matches!(all[..], [GroupShare { is_own: true, .. }]) || self.count(image, cluster)? == users;
            self.may_be_data(image, host, image.cluster().size())?;
            if is_all && data & allocated == 0 {
                plan.in_place.push(InPlace { host, guest: gap.guest, mask: data });
            } else {
                // Another view has data there: all known views get a new cluster.
                plan.shared.extend(all.iter().map(|share| SharedCluster {
                    guest: gap.guest,
                    mask: share.data,
                    roots: share.group.roots.clone(),
                    old: Some((host, share.allocated)),
                }));
            }
        }
        Ok(())
    }

    /// Lets all tables name the filled clusters, and counts them.
    pub(super) fn name_filled(
        &mut self,
        image: &ImageFile,
        plan: &FillPlan,
        gaps: &[ClusterFill],
        at: u64,
        size: u64,
    ) -> Result<()> {
        // Read again: the active table may have been unshared meanwhile.
        let groups = self.groups(image, at, size)?;
        for (host, count) in plan.hosts.values() {
            if *count > 1 {
                self.set_count(image, image.cluster().index(host.0), *count as u64)?;
            }
        }
        for gap in gaps {
            for group in &groups {
                let Some(table) = group.table else { continue };
                let words = self.entry_in(image, group.table, gap.guest)?;
                let (unallocated, _) = unallocated(image, words, gap.guest, group.end)?;
                let (data, zero) = (unallocated & gap.data, unallocated & gap.zero);
                let new = plan.hosts.get(&(gap.guest, group.roots[0])).copied();
                let new = new.filter(|_| {
                    data != 0 || EntryFormat::raw_offset(words.entry) != 0 && image.format.extended
                });
                let entry = match new {
                    Some((host, 1)) => EntryFormat::owned(host),
                    Some((host, _)) => EntryFormat::shared(EntryFormat::owned(host)),
                    None if data != 0 && image.data_file.is_some() => {
                        EntryFormat::owned(HostOffset(gap.guest))
                    }
                    None if zero != 0 && !image.format.extended => EntryFormat::zero(None),
                    None => words.entry,
                };
                let bitmap = if image.format.extended && !EntryFormat::is_compressed(words.entry) {
                    let (had, was_zero) = (words.bitmap as u32, (words.bitmap >> 32) as u32);
                    SubclusterEntry::bitmap(had | data, was_zero | zero)
                } else {
                    words.bitmap
                };
                self.set_entry_in(image, table, gap.guest, RawL2Entry { entry, bitmap })?;
                if new.is_some() {
                    group.roots.iter().try_for_each(|_| self.release(image, words))?;
                }
            }
        }
        Ok(())
    }
}

impl FillPlan {
    /// One new cluster for all that have none, or as many as counts of this width need.
    fn share(&mut self, image: &ImageFile, guest: u64, all: &[GroupShare<'_>]) {
        let most = max_refcount(image.order);
        let mut job: Option<SharedCluster> = None;
        for GroupShare { group, data, .. } in all {
            let fits = |job: &SharedCluster| (job.roots.len() + group.roots.len()) as u64 <= most;
            match &mut job {
                Some(job) if fits(job) => {
                    job.mask |= data;
                    job.roots.extend(&group.roots);
                }
                _ => {
                    let next = SharedCluster { guest, mask: *data, roots: group.roots.clone(), old: None };
                    self.shared.extend(job.replace(next));
                }
            }
        }
        self.shared.extend(job);
    }
}
