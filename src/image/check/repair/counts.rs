//! Counts that are changed in place. Only if [`super::survey`] finds the refcounts sound.

use super::super::Without;
use super::Actions;
use super::stage::Stage;
use crate::error::Result;
use crate::format::refcount::{max_refcount, set_refcount};

use super::super::window::MANY;

impl Stage<'_> {
    /// Stores for each cluster the count that `wanted` returns for its count and its references. Returns how
    /// many counts changed.
    pub(super) fn store_counts(
        &self,
        wanted: impl Fn(u32, u32) -> u32,
        actions: &mut Actions,
    ) -> Result<u64> {
        let order = self.audited.header.refcount_order;
        let refcounts = &self.references.refcounts;
        let file_clusters = self.audited.file_clusters();
        let mut changed_count = 0;
        for place in self.windows() {
            let window = self.window(place, Without::default())?;
            for part in self.block_parts(window.clusters()) {
                let Ok(Some(block)) = refcounts.block(part.start) else { continue };
                let mut changes = Vec::new();
                for cluster in part.clone() {
                    let (Some(stored), Some(references)) =
                        (window.stored(cluster), window.references(cluster))
                    else {
                        continue;
                    };
                    // Beyond the file's end only referenced clusters matter, as in the audit; and that many
                    // references are not exact.
                    if (cluster >= file_clusters && references == 0) || references >= MANY {
                        continue;
                    }
                    let count = u64::from(wanted(stored, references)).min(max_refcount(order));
                    if count != u64::from(stored) {
                        changes.push((cluster, count));
                        actions.note(|| {
                            format!("Repairing cluster {cluster} refcount={stored} reference={references}")
                        });
                    }
                }
                let (Some((first, _)), Some((last, _))) = (changes.first(), changes.last()) else { continue };
                // From a whole byte to a whole byte, and no more.
                let base = first / 8 * 8;
                let byte = |cluster: u64| ((cluster % refcounts.per_block()) << order) / 8;
                let width = ((1 << order) / 8).max(1);
                let at = block.0 + byte(base);
                let mut bytes = vec![0; (byte(*last) + width - byte(base)) as usize];
                self.audited.read(at, &mut bytes)?;
                for (cluster, count) in &changes {
                    set_refcount(&mut bytes, (cluster - base) as usize, order, *count);
                }
                self.storage.write_at(at, &bytes)?;
                changed_count += changes.len() as u64;
            }
        }
        Ok(changed_count)
    }
}
