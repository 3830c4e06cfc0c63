//! Data lost from a truncated file, made explicit: reading it was an error, and returns zeroes afterwards.
//!
//! Nothing can restore it, but as long as entries point beyond the end of the file the image must not be
//! written, since growth over them would silently make the same zeroes of it. So each place is reported. Lost
//! data loses its entry. A lost L2 table is replaced by one that is all zeroes at the end of the file;
//! without a table the layers below would be visible. A partly lost cluster keeps its remaining part.

use super::super::tables::Verdict;
use super::Actions;
use super::stage::Stage;
use super::survey::Survey;
use crate::error::Result;
use crate::format::compressed::decompress;
use crate::format::entry::SUBCLUSTERS;
use crate::format::entry::{COPIED, ZERO};
use crate::format::header::SNAPSHOTS_AT;
use crate::format::refcount::{refcount, set_refcount};
use crate::format::snapshot::{check_l1, places};
use crate::format::{EntryFormat, SubclusterEntry, Version};

/// Bytes of an L1 table at a time.
const CHUNK: u64 = 256 << 10;

/// Lost ranges of one state of the disk, joined.
struct Lost<'a> {
    lines: &'a mut Actions,
    run: Option<(u64, u64, bool)>,
}

impl Lost<'_> {
    fn note(&mut self, guest: u64, len: u64, is_active: bool) {
        match &mut self.run {
            Some((_, end, active)) if *end == guest && *active == is_active => *end += len,
            _ => {
                self.report();
                self.run = Some((guest, guest + len, is_active));
            }
        }
    }

    fn report(&mut self) {
        if let Some((start, end, is_active)) = self.run.take() {
            let of = if is_active { "the disk" } else { "an internal snapshot" };
            self.lines.note(|| {
                format!(
                    "Lost: {} bytes of {of} at guest offset {start:#x} read as zeroes from now on",
                    end - start
                )
            });
        }
    }
}

impl Stage<'_> {
    /// Removes all references beyond the end of the file. Returns how many there were.
    pub(super) fn accept_loss(
        &self,
        survey: &Survey,
        lost: &mut Actions,
        notes: &mut Vec<String>,
    ) -> Result<u64> {
        let header = &self.audited.header;
        let (size, len) = (header.cluster.size(), self.audited.file_len);
        let can_say_zero = header.version == Version::V3 || header.backing.is_none();
        if !can_say_zero {
            notes.push(
                "What is lost was left as it is: version 2 cannot say that a place reads as zeroes above a \
                    backing file. \
                 Amend the image to version 3 (qemu-img amend -o compat=1.1), and repair it again."
                    .to_owned(),
            );
            return Ok(0);
        }
        let mut lost = Lost { lines: lost, run: None };
        let (snapshots, _) = self.audited.read_snapshots()?;
        let longest =
            snapshots.iter().filter_map(|snapshot| snapshot.virtual_size).fold(header.virtual_size, u64::max);
        let (mut repaired, mut is_cut) = (0, false);
        let tables = self.references.l2_list.tables().iter().zip(&survey.is_trusted);
        for (table, _) in tables.filter(|(_, trusted)| **trusted) {
            let bytes = self.table_bytes(table)?;
            let mut changes = Vec::new();
            for (at, entry, verdict) in self.verdicts(table, &bytes) {
                let index = at as u64 / header.entry_format().l2_entry_len();
                let (guest, is_active) = (table.guest_of(index, size), table.weight.active > 0);
                let bitmap = if header.extended_l2() { refcount(&bytes[at..], 1, 6) } else { 0 };
                let is_lost = match verdict {
                    Verdict::Cluster(host) if host.0 >= len => true,
                    Verdict::Cluster(host) if host.0 + size > len => {
                        // The rest of it becomes zeroes as the file is extended to whole clusters.
                        let disk_end = if is_active { header.virtual_size } else { longest };
                        let end = if guest < disk_end { disk_end.min(guest + size) } else { guest + size };
                        let from = guest + (len - host.0);
                        if from < end && (header.extended_l2() || entry & ZERO == 0) {
                            is_cut = true;
                            lost.note(from, end - from, is_active);
                            repaired += 1;
                        }
                        false
                    }
                    Verdict::Compressed => self.is_stream_lost(entry)?,
                    _ => false,
                };
                if !is_lost {
                    continue;
                }
                if header.extended_l2() {
                    let (had, zero) = (bitmap as u32, (bitmap >> 32) as u32);
                    let had = if EntryFormat::is_compressed(entry) { u32::MAX } else { had };
                    let unit = size / u64::from(SUBCLUSTERS);
                    for bit in (0..SUBCLUSTERS).filter(|bit| had >> bit & 1 == 1) {
                        lost.note(guest + u64::from(bit) * unit, unit, is_active);
                    }
                    changes.extend([(at, 0), (at + 8, SubclusterEntry::bitmap(0, zero | had))]);
                } else {
                    if entry & ZERO == 0 || EntryFormat::is_compressed(entry) {
                        lost.note(guest, size, is_active);
                    }
                    changes.push((at, if header.version == Version::V3 { ZERO } else { 0 }));
                }
                repaired += 1;
            }
            self.put_words(table.at.0, bytes, &changes)?;
        }
        repaired += self.accept_lost_tables(&mut lost)?;
        lost.report();
        repaired += self.accept_lost_snapshots(lost.lines, notes)?;
        // Durable before the file grows over the clusters that were named.
        self.storage.sync()?;
        if is_cut && !len.is_multiple_of(size) {
            let end = len.next_multiple_of(size);
            if self.storage.len()? < end {
                self.storage.set_len(end)?;
            }
        }
        Ok(repaired)
    }

    /// Sets the counts of clusters beyond the end of the file to 0.
    pub(super) fn clear_counts_beyond_end(&self) -> Result<()> {
        let header = &self.audited.header;
        let (size, end) = (header.cluster.size(), self.audited.file_clusters());
        let per_block = self.references.refcounts.per_block();
        for index in end / per_block..self.references.refcounts.entries().len() as u64 {
            let Ok(Some(block)) = self.references.refcounts.block(index * per_block) else { continue };
            if block.0 + size > self.audited.file_len {
                continue;
            }
            let mut bytes = vec![0; size as usize];
            self.audited.read(block.0, &mut bytes)?;
            let old = bytes.clone();
            for at in end.saturating_sub(index * per_block)..per_block {
                set_refcount(&mut bytes, at as usize, header.refcount_order, 0);
            }
            if bytes != old {
                self.storage.write_at(block.0, &bytes)?;
            }
        }
        Ok(())
    }

    /// L1 entries that point beyond the end get a table that is all zeroes.
    fn accept_lost_tables(&self, lost: &mut Lost<'_>) -> Result<u64> {
        let header = &self.audited.header;
        let (size, len) = (header.cluster.size(), self.audited.file_len);
        let span = header.l1_entry_span();
        let mut repaired = 0;
        for l1 in &self.references.places.l1_tables {
            if l1.end > len {
                continue; // a snapshot's
            }
            let is_active = l1.weight.active > 0;
            for start in (l1.start..l1.end).step_by(CHUNK as usize) {
                let mut bytes = vec![0; CHUNK.min(l1.end - start) as usize];
                self.audited.read(start, &mut bytes)?;
                let mut changes = Vec::new();
                for (at, entry) in (0..).step_by(8).zip(bytes.chunks_exact(8)) {
                    let table = EntryFormat::raw_offset(refcount(entry, 0, 6));
                    if table == 0 || table + size <= len {
                        continue;
                    }
                    let index = (start - l1.start + at as u64) / 8;
                    lost.note(index * span, span, is_active);
                    let new = if header.backing.is_some() { self.zero_table()? | COPIED } else { 0 };
                    changes.push((at, if is_active { new } else { new & !COPIED }));
                    repaired += 1;
                }
                // A table is written before it is named.
                self.storage.sync()?;
                self.put_words(start, bytes, &changes)?;
            }
        }
        Ok(repaired)
    }

    /// Internal snapshots whose L1 table is lost get an empty one.
    fn accept_lost_snapshots(&self, lost: &mut Actions, notes: &mut Vec<String>) -> Result<u64> {
        let (header, len) = (&self.audited.header, self.audited.file_len);
        let (snapshots, table_len) = self.audited.read_snapshots()?;
        let mut table = vec![0; table_len as usize];
        self.audited.read(header.snapshots.offset.0, &mut table)?;
        let places = places(&table, snapshots.len() as u32);
        let ends = places.iter().skip(1).map(|next| *next as u64).chain([table_len]);
        let kept = ends.filter(|end| header.snapshots.offset.0 + end <= len).count();
        let mut repaired = 0;
        if kept < snapshots.len() {
            let gone = snapshots.len() - kept;
            lost.note(|| {
                format!("Lost: {gone} of {} internal snapshots; they are no longer listed", snapshots.len())
            });
            let mut field = (kept as u32).to_be_bytes().to_vec();
            field.extend(if kept == 0 { 0 } else { header.snapshots.offset.0 }.to_be_bytes());
            self.storage.write_at(SNAPSHOTS_AT, &field)?;
            repaired += 1;
        }
        for (snapshot, place) in snapshots.iter().zip(places).take(kept) {
            let l1 = snapshot.l1;
            if check_l1(l1, header.cluster).is_err() || l1.offset.0 + l1.len_bytes() <= len {
                continue;
            }
            let name = String::from_utf8_lossy(&snapshot.name).into_owned();
            let name = name.escape_debug();
            if header.backing.is_some() {
                // Without tables the layers below would be visible.
                notes.push(format!(
                    "All of the internal snapshot \"{name}\" is lost: delete it with qemu-img snapshot -d, \
                        and repair again."
                ));
                continue;
            }
            lost.note(|| {
                format!("Lost: all of the internal snapshot \"{name}\" reads as zeroes from now on")
            });
            self.storage.write_at(header.snapshots.offset.0 + place as u64, &[0; 12])?;
            repaired += 1;
        }
        Ok(repaired)
    }

    /// Writes an L2 table that reads as zeroes to the end of the file, and returns its offset.
    fn zero_table(&self) -> Result<u64> {
        let header = &self.audited.header;
        let size = header.cluster.size();
        let at = self.storage.len()?.next_multiple_of(size);
        let entry: Vec<u8> = if header.extended_l2() {
            [0u64.to_be_bytes(), SubclusterEntry::bitmap(0, u32::MAX).to_be_bytes()].concat()
        } else {
            ZERO.to_be_bytes().to_vec()
        };
        self.storage.write_at(at, &entry.repeat(size as usize / entry.len()))?;
        Ok(at)
    }

    /// Whether a compressed cluster is unreadable because the file ends within it.
    fn is_stream_lost(&self, entry: u64) -> Result<bool> {
        let header = &self.audited.header;
        let stream = header.entry_format().raw_compressed(entry);
        if stream.at.0 + u64::from(stream.len) <= self.audited.file_len {
            return Ok(false);
        }
        let mut input = vec![0; self.audited.file_len.saturating_sub(stream.at.0) as usize];
        let have = self.audited.storage.read_at(stream.at.0, &mut input)?;
        let mut cluster = vec![0; header.cluster.size() as usize];
        Ok(decompress(header.compression, &input[..have], &mut cluster).is_err())
    }
}
