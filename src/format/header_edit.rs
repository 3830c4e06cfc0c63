//! Changes of a header that is in use: another backing file, a freeze mark set or removed.
//!
//! Promises: after a crash, with any subset of the unsynced writes of a step on disk, the header is either
//! the old one or the new one. So an edit is a list of steps with a sync after each. A step either writes
//! bytes that the current header does not use (after the end of its extensions, beside the backing name), or
//! is one write within a sector. Between old and new there may be headers with the same meaning as one of
//! them in another layout, or without the feature names, which serve messages only and may be in the way
//! where they cross a sector. Every field that the edit does not change stays, known or not.
//!
//! If no such list is found, nothing is changed: small clusters have no room for every edit.

use std::ops::Range;

use super::bytes::{be_u32, be_u64};
use super::extension::{BACKING_FORMAT, END, FEATURE_NAMES};
use super::frozen::{FLAGS_AT, FROZEN_MAGIC, THAWED, is_thawed};
use super::header::{MAX_BACKING_NAME_LEN, V2_LEN};
use crate::units::SECTOR_SIZE;

/// Offset of the backing file name (8 bytes), then its length (4).
const BACKING_AT: usize = 8;

/// The new backing file of an edit: its name and its format.
pub type BackingBytes<'a> = (&'a [u8], &'a [u8]);

/// The fields to change; `None` keeps one as it is.
#[derive(Clone, Debug, Default)]
pub struct HeaderEdit<'a> {
    /// Another backing file, or none.
    pub backing: Option<Option<BackingBytes<'a>>>,
    /// The payload of another freeze mark, or none.
    pub frozen: Option<Option<&'a [u8]>>,
}

/// Writes that all have to be durable before the next step begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderStep {
    /// Offset in the file, and bytes.
    pub writes: Vec<(u64, Vec<u8>)>,
}

/// The steps of an edit; `None` if the layout does not allow it. `bytes` is the whole first cluster with a
/// valid header.
pub fn plan(bytes: &[u8], edit: &HeaderEdit<'_>) -> Option<Vec<HeaderStep>> {
    let variant = |names| EditVariant { edit, names };
    if let Some(steps) = route(bytes, &variant(Names::Stay)) {
        return Some(steps);
    }
    let layout = HeaderLayout::of(bytes);
    let names = layout.find(|extension| extension.magic == FEATURE_NAMES)?.data(bytes);
    let nothing = HeaderEdit::default();
    let mut steps = route(bytes, &EditVariant { edit: &nothing, names: Names::Go })?;
    let mut now = after(bytes, &steps);
    for variant in [variant(Names::Stay), EditVariant { edit: &nothing, names: Names::Come(names) }] {
        match route(&now, &variant) {
            Some(more) => {
                now = after(&now, &more);
                steps.extend(more);
            }
            // There is room for the change, but not for the names.
            None if matches!(variant.names, Names::Come(_)) => {}
            None => return None,
        }
    }
    Some(steps)
}

/// An edit, and the treatment of the feature names meanwhile.
#[derive(Clone, Copy)]
struct EditVariant<'a> {
    edit: &'a HeaderEdit<'a>,
    names: Names<'a>,
}

#[derive(Clone, Copy)]
enum Names<'a> {
    Stay,
    Go,
    Come(&'a [u8]),
}

/// The steps to a header, direct or through one with the same meaning as the old one.
fn route(bytes: &[u8], variant: &EditVariant<'_>) -> Option<Vec<HeaderStep>> {
    let old = HeaderLayout::of(bytes);
    if let Some(steps) = direct(bytes, &old, variant) {
        return Some(steps);
    }
    for rest in detours(bytes, &old, variant) {
        if let Some(mut steps) = switch(bytes, &rest)
            && let Some(more) = direct(&rest, &HeaderLayout::of(&rest), variant)
        {
            steps.extend(more);
            return Some(steps);
        }
    }
    None
}

/// The cluster after some steps.
fn after(bytes: &[u8], steps: &[HeaderStep]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, written) in steps.iter().flat_map(|step| &step.writes) {
        bytes[*at as usize..*at as usize + written.len()].copy_from_slice(written);
    }
    bytes
}

/// An extension: its data follows its 8 bytes of magic and length.
#[derive(Clone, Debug)]
struct Extension {
    magic: u32,
    at: usize,
    len: usize,
}

impl Extension {
    fn data<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.at + 8..self.at + 8 + self.len]
    }

    /// Bytes that its data may have without moving the next extension.
    fn room(&self) -> usize {
        self.len.next_multiple_of(8)
    }

    fn is_mark(&self, bytes: &[u8]) -> bool {
        self.magic == FROZEN_MAGIC && !is_thawed(self.data(bytes))
    }
}

/// The layout of a header.
#[derive(Debug)]
struct HeaderLayout {
    extensions: Vec<Extension>,
    /// Where the extensions start: after the fields.
    start: usize,
    /// Where they end: the offset of the end mark, if there is one.
    end: usize,
    /// The backing file name; empty if there is none.
    name: Range<usize>,
}

impl HeaderLayout {
    fn of(bytes: &[u8]) -> Self {
        let start = if be_u32(bytes, 4) == 2 { V2_LEN } else { be_u32(bytes, 100) as usize };
        let (offset, len) = (be_u64(bytes, BACKING_AT) as usize, be_u32(bytes, BACKING_AT + 8) as usize);
        let area_end = if offset == 0 { bytes.len() } else { offset };
        let (mut extensions, mut at) = (Vec::new(), start);
        while at + 8 <= area_end && be_u32(bytes, at) != END {
            let extension = Extension { magic: be_u32(bytes, at), at, len: be_u32(bytes, at + 4) as usize };
            at += 8 + extension.room();
            extensions.push(extension);
        }
        Self { extensions, start, end: at, name: if len == 0 { 0..0 } else { offset..offset + len } }
    }

    /// The end of all bytes that the header uses.
    fn behind(&self) -> usize {
        (self.end + 8).max(self.name.end).next_multiple_of(8)
    }

    fn find(&self, wanted: impl Fn(&Extension) -> bool) -> Option<&Extension> {
        self.extensions.iter().find(|extension| wanted(extension))
    }

    /// Which bytes of the cluster the header uses.
    fn meaning(&self, bytes: &[u8]) -> Vec<bool> {
        let mut meaning = vec![false; bytes.len()];
        let mut mark = |range: Range<usize>| {
            let end = range.end.min(bytes.len());
            meaning[range.start.min(end)..end].fill(true);
        };
        mark(0..self.start);
        for extension in &self.extensions {
            let is_place = extension.magic == FROZEN_MAGIC && !extension.is_mark(bytes);
            // Of the space of a removed mark, only version and flags are read.
            mark(extension.at..extension.at + 8 + if is_place { FLAGS_AT + 4 } else { extension.room() });
        }
        mark(self.end..self.end + 8);
        mark(self.name.clone());
        meaning
    }
}

/// The steps from one header to the other, if one write within a sector can switch between them.
fn switch(old: &[u8], new: &[u8]) -> Option<Vec<HeaderStep>> {
    let sector = SECTOR_SIZE as usize;
    let changed: Vec<usize> = (0..old.len()).filter(|at| old[*at] != new[*at]).collect();
    let (Some(first), Some(last)) = (changed.first(), changed.last()) else { return Some(Vec::new()) };
    let write = |first: usize, last: usize| (first as u64, new[first..=last].to_vec());
    if first / sector == last / sector {
        return Some(vec![HeaderStep { writes: vec![write(*first, *last)] }]);
    }
    let meaning = HeaderLayout::of(old).meaning(old);
    let decisive: Vec<usize> = changed.iter().copied().filter(|at| meaning[*at]).collect();
    let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
    for at in changed.iter().copied().filter(|at| !meaning[*at]) {
        match writes.last_mut() {
            Some((start, bytes)) if *start as usize + bytes.len() == at => bytes.push(new[at]),
            _ => writes.push(write(at, at)),
        }
    }
    let mut steps = vec![HeaderStep { writes }];
    if let (Some(first), Some(last)) = (decisive.first(), decisive.last()) {
        if first / sector != last / sector {
            return None;
        }
        steps.push(HeaderStep { writes: vec![write(*first, *last)] });
    }
    Some(steps)
}

/// The steps to the first of the wanted headers that can be reached directly.
fn direct(bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Option<Vec<HeaderStep>> {
    drafts(bytes, old, variant).iter().find_map(|draft| {
        draft
            .places(bytes, old, variant)
            .into_iter()
            .find_map(|place| switch(bytes, &draft.with_name(bytes, old, variant, place)?))
    })
}

/// A possible header, without the backing file name.
struct Draft {
    bytes: Vec<u8>,
    /// The end of its end mark.
    end: usize,
}

/// Possible headers: rewritten without gaps, or changed in place.
fn drafts(bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Vec<Draft> {
    [compact(bytes, old, variant), in_place(bytes, old, variant)].into_iter().flatten().collect()
}

fn compact(bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Option<Draft> {
    let edit = variant.edit;
    let mut area = Vec::new();
    let (mut format, mut frozen) = (edit.backing.flatten().map(|(_, format)| format), edit.frozen.flatten());
    if let Some(format) =
        format.take_if(|_| old.find(|extension| extension.magic == BACKING_FORMAT).is_none())
    {
        push(&mut area, BACKING_FORMAT, format);
    }
    for extension in &old.extensions {
        let data = match (extension.magic, edit) {
            (BACKING_FORMAT, HeaderEdit { backing: Some(_), .. }) => format.take(),
            (FROZEN_MAGIC, _) if !extension.is_mark(bytes) => None,
            (FROZEN_MAGIC, HeaderEdit { frozen: Some(_), .. }) => frozen.take(),
            (FEATURE_NAMES, _) if matches!(variant.names, Names::Go) => None,
            _ => Some(extension.data(bytes)),
        };
        if let Some(data) = data {
            push(&mut area, extension.magic, data);
        }
    }
    if let Some(mark) = frozen {
        push(&mut area, FROZEN_MAGIC, mark);
    }
    if let Names::Come(names) = variant.names {
        push(&mut area, FEATURE_NAMES, names);
    }
    area.extend([0; 8]);
    let mut new = bytes.to_vec();
    let end = old.start + area.len();
    new.get_mut(old.start..end)?.copy_from_slice(&area);
    Some(Draft { bytes: new, end })
}

fn in_place(bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Option<Draft> {
    let edit = variant.edit;
    let is_twice =
        |wanted: &dyn Fn(&Extension) -> bool| old.extensions.iter().filter(|found| wanted(found)).count() > 1;
    // The last of several marks counts, and all have to be removed.
    if is_twice(&|found| found.magic == BACKING_FORMAT) || is_twice(&|found| found.is_mark(bytes)) {
        return None;
    }
    let mut new = bytes.to_vec();
    let mut more = Vec::new();
    match variant.names {
        Names::Stay => {}
        Names::Go => return None,
        Names::Come(names) => push(&mut more, FEATURE_NAMES, names),
    }
    if let Some(Some((_, format))) = edit.backing {
        match old.find(|extension| extension.magic == BACKING_FORMAT) {
            None => push(&mut more, BACKING_FORMAT, format),
            Some(found) if found.room() == format.len().next_multiple_of(8) => {
                let mut whole = Vec::new();
                push(&mut whole, BACKING_FORMAT, format);
                new[found.at..found.at + whole.len()].copy_from_slice(&whole);
            }
            Some(_) => return None,
        }
    }
    if let Some(frozen) = edit.frozen {
        let mark = old.find(|extension| extension.is_mark(bytes));
        let fits = |extension: &&Extension| frozen.is_some_and(|mark| mark.len() <= extension.len);
        let place = mark
            .into_iter()
            .chain(old.extensions.iter().filter(|found| found.magic == FROZEN_MAGIC))
            .find(fits);
        if let Some(old_mark) = mark {
            let flags = old_mark.at + 8 + FLAGS_AT;
            new[flags..flags + 4].copy_from_slice(&THAWED.to_be_bytes());
        }
        match (frozen, place) {
            (Some(mark), Some(place)) => new[place.at + 8..place.at + 8 + mark.len()].copy_from_slice(mark),
            (Some(mark), None) => push(&mut more, FROZEN_MAGIC, mark),
            (None, _) => {}
        }
    }
    more.extend([0; 8]);
    let end = old.end + more.len();
    new.get_mut(old.end..end)?.copy_from_slice(&more);
    Some(Draft { bytes: new, end })
}

fn push(area: &mut Vec<u8>, magic: u32, data: &[u8]) {
    area.extend(magic.to_be_bytes());
    area.extend((data.len() as u32).to_be_bytes());
    area.extend(data);
    area.resize(area.len() + data.len().next_multiple_of(8) - data.len(), 0);
}

/// The name that the header will have; empty if none.
fn new_name<'a>(bytes: &'a [u8], old: &HeaderLayout, variant: &EditVariant<'a>) -> &'a [u8] {
    match variant.edit.backing {
        None => &bytes[old.name.clone()],
        Some(None) => &[],
        Some(Some((name, _))) => name,
    }
}

impl Draft {
    /// Possible offsets of the name, best first.
    fn places(&self, bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Vec<usize> {
        let name = new_name(bytes, old, variant);
        let stays = !old.name.is_empty() && name == &bytes[old.name.clone()];
        let end = bytes.len().saturating_sub(name.len());
        let mut places: Vec<usize> = if stays { vec![old.name.start] } else { Vec::new() };
        // No further back than necessary: a reader of the header reads up to the end of the name.
        places.extend([self.end, old.behind().max(self.end), end - end % 8]);
        places.retain(|place| *place >= self.end && place + name.len() <= bytes.len());
        places
    }

    fn with_name(
        &self,
        bytes: &[u8],
        old: &HeaderLayout,
        variant: &EditVariant<'_>,
        place: usize,
    ) -> Option<Vec<u8>> {
        named(&self.bytes, new_name(bytes, old, variant), place)
    }
}

/// The header with another backing file name, at `place`.
fn named(bytes: &[u8], name: &[u8], place: usize) -> Option<Vec<u8>> {
    if name.len() as u64 > MAX_BACKING_NAME_LEN {
        return None;
    }
    let mut new = bytes.to_vec();
    let place = if name.is_empty() { 0 } else { place };
    new[BACKING_AT..BACKING_AT + 8].copy_from_slice(&(place as u64).to_be_bytes());
    new[BACKING_AT + 8..BACKING_AT + 12].copy_from_slice(&(name.len() as u32).to_be_bytes());
    if !name.is_empty() {
        new.get_mut(place..place + name.len())?.copy_from_slice(name);
    }
    Some(new)
}

/// Headers with the same meaning as the old one that leave room for the new one.
fn detours(bytes: &[u8], old: &HeaderLayout, variant: &EditVariant<'_>) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    // An end mark where the name was the end.
    let mut ended = bytes.to_vec();
    if let Some(end) = ended.get_mut(old.end..old.end + 8) {
        end.fill(0);
    }
    for draft in drafts(bytes, old, variant) {
        let len = new_name(bytes, old, variant).len();
        for place in
            [old.behind().max(draft.end), old.behind().max(draft.end + len), bytes.len() - old.name.len()]
        {
            let place = place.next_multiple_of(8);
            if !old.name.is_empty() && place + old.name.len() <= bytes.len() {
                found.extend(named(&ended, &bytes[old.name.clone()], place));
            }
        }
    }
    // Without a backing file, its format has no meaning.
    if old.name.is_empty() {
        let edit = HeaderEdit { backing: variant.edit.backing, frozen: None };
        let draft = in_place(bytes, old, &EditVariant { edit: &edit, ..*variant });
        found.extend(draft.and_then(|draft| named(&draft.bytes, &[], 0)));
    }
    found
}

#[cfg(test)]
#[path = "header_edit_tests.rs"]
mod tests;
