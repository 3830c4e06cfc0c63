//! COPIED flags, and invalid preallocated clusters of zero entries.
//!
//! A reader sees neither. An entry is written with its unchanged neighbours, so that a torn write leaves each
//! old or repaired.

use super::super::Without;
use super::super::tables::Verdict;
use super::super::window::Window;
use super::Actions;
use super::stage::{CountPolicy, Stage};
use super::survey::Survey;
use crate::error::Result;
use crate::format::EntryFormat;
use crate::format::entry::COPIED;
use crate::format::refcount::{max_refcount, refcount};

/// Bytes of an L1 table at a time.
const CHUNK: u64 = 256 << 10;

/// Counters of repaired flags.
#[derive(Default)]
pub(super) struct Flags {
    /// Flags that were wrong.
    pub(super) count: u64,
    /// Of those, flags of clusters that have another reference without there being a snapshot.
    pub(super) used_twice: u64,
}

impl Stage<'_> {
    /// Removes invalid preallocated clusters from zero entries. Returns how many there were.
    pub(super) fn drop_bad_preallocations(&self, survey: &Survey, actions: &mut Actions) -> Result<u64> {
        let mut repaired = 0;
        for (table, _) in
            self.references.l2_list.tables().iter().zip(&survey.is_trusted).filter(|(_, trusted)| **trusted)
        {
            let bytes = self.table_bytes(table)?;
            let mut changes = Vec::new();
            for (at, entry, verdict) in self.verdicts(table, &bytes) {
                if let Verdict::KeptPlace(without) = verdict {
                    changes.push((at, without));
                    actions.note(|| {
                        let offset = EntryFormat::raw_offset(entry);
                        format!(
                            "Repairing offset={offset:x}: Preallocated cluster is not properly aligned; \
                            L2 entry corrupted."
                        )
                    });
                }
            }
            self.put_words(table.at.0, bytes, &changes)?;
            repaired += changes.len() as u64;
        }
        Ok(repaired)
    }

    /// Sets the flags according to the future refcounts.
    pub(super) fn repair_flags(
        &self,
        survey: &Survey,
        policy: CountPolicy,
        actions: &mut Actions,
    ) -> Result<Flags> {
        let mut flags = Flags::default();
        for place in self.windows() {
            let window = self.window(place, Without::default())?;
            let judge = Judge { stage: self, window: &window, first: place.0 == 0, policy };
            if survey.l1_is_sole {
                self.mend_l1(&judge, &mut flags, actions)?;
            }
            let tables = self.references.l2_list.tables().iter();
            for (table, _) in tables.zip(&survey.is_trusted).filter(|(_, trusted)| **trusted) {
                let bytes = self.table_bytes(table)?;
                let mut changes = Vec::new();
                for (at, entry, verdict) in self.verdicts(table, &bytes) {
                    let wanted = match verdict {
                        Verdict::Cluster(host) if table.weight.active > 0 => {
                            judge.copied(entry, host.0, &mut flags)?
                        }
                        Verdict::DataFile if table.weight.active > 0 => Some(true),
                        Verdict::Compressed => Some(false),
                        _ => None,
                    };
                    if let Some(repaired) = wanted.and_then(|wanted| flagged(entry, wanted)) {
                        changes.push((at, repaired));
                        actions.note(|| format!("Repairing OFLAG_COPIED data cluster: l2_entry={entry:x}"));
                    }
                }
                self.put_words(table.at.0, bytes, &changes)?;
                flags.count += changes.len() as u64;
            }
        }
        Ok(flags)
    }

    fn mend_l1(&self, judge: &Judge<'_>, flags: &mut Flags, actions: &mut Actions) -> Result<()> {
        let l1 = self.audited.header.l1;
        for start in (0..l1.len_bytes()).step_by(CHUNK as usize) {
            let mut bytes = vec![0; CHUNK.min(l1.len_bytes() - start) as usize];
            self.audited.read(l1.offset.0 + start, &mut bytes)?;
            let mut changes = Vec::new();
            for (at, entry) in (0..).step_by(8).zip(bytes.chunks_exact(8)) {
                let entry = refcount(entry, 0, 6);
                let table = EntryFormat::raw_offset(entry);
                let wanted = if table == 0 { None } else { judge.copied(entry, table, flags)? };
                if let Some(repaired) = wanted.and_then(|wanted| flagged(entry, wanted)) {
                    changes.push((at, repaired));
                    let index = (start + at as u64) / 8;
                    actions.note(|| {
                        format!("Repairing OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x}")
                    });
                }
            }
            self.put_words(l1.offset.0 + start, bytes, &changes)?;
            flags.count += changes.len() as u64;
        }
        Ok(())
    }

    /// Writes back the range from the first to the last change.
    pub(super) fn put_words(&self, at: u64, mut bytes: Vec<u8>, changes: &[(usize, u64)]) -> Result<()> {
        let (Some(&(first, _)), Some(&(last, _))) = (changes.first(), changes.last()) else { return Ok(()) };
        for &(at, word) in changes {
            bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
        }
        self.storage.write_at(at + first as u64, &bytes[first..last + 8])
    }
}

/// The entry with its flag set or cleared, if that changes it.
fn flagged(entry: u64, copied: bool) -> Option<u64> {
    (EntryFormat::copied(entry) != copied).then_some(entry ^ COPIED)
}

/// Decides on flags, for clusters of one window.
struct Judge<'a> {
    stage: &'a Stage<'a>,
    window: &'a Window,
    first: bool,
    policy: CountPolicy,
}

impl Judge<'_> {
    /// Whether an entry that names `host` should have the flag. `None`: outside this window, or with more
    /// references than the image can count, which a flag cannot repair.
    fn copied(&self, entry: u64, host: u64, flags: &mut Flags) -> Result<Option<bool>> {
        let header = &self.stage.audited.header;
        let cluster = header.cluster.index(host);
        if cluster > self.stage.audited.file_clusters() {
            // Beyond all windows.
            let stored = || self.stage.references.refcounts.stored(&self.stage.audited, cluster);
            return if self.first { Ok(stored()?.map(|count| count == 1)) } else { Ok(None) };
        }
        let Some(references) = self.window.references(cluster) else { return Ok(None) };
        if u64::from(references) > max_refcount(header.refcount_order) {
            return Ok(None);
        }
        let count = match self.policy {
            CountPolicy::References => Some(references),
            CountPolicy::NeverLower => self.window.stored(cluster),
        };
        if references > 1 && EntryFormat::copied(entry) && header.snapshots.count == 0 {
            flags.used_twice += 1;
        }
        Ok(count.map(|count| count == 1))
    }
}
