//! The snapshot table: one entry of variable length per internal snapshot.
//!
//! The header states the number of entries, not of bytes: a [`SnapshotParser`] is fed chunks of the file
//! until it has all entries. A snapshot's L1 table may cover less than its disk (the rest is a hole), and its
//! offset may be in the file or not.

use super::bytes::{be_u16, be_u32, be_u64};
use super::header::{Header, L1Table, SnapshotTable, Version, at_most, check_table};
use super::malformed::Malformed;
use crate::units::{ClusterBits, GuestOffset, HostOffset, SECTOR_SIZE};

/// Limit of the whole table, in bytes; QEMU's.
pub const MAX_TABLE_LEN: u64 = 64 << 20;
/// Limit of one entry's extra data, in bytes; QEMU's.
pub const MAX_EXTRA_LEN: u64 = 1024;
const MAX_L1_LEN: u64 = 32 << 20;
/// Files and disks are no larger: their offsets are signed.
const MAX_SIZE: u64 = i64::MAX as u64;

const FIXED_LEN: usize = 40;
/// Extra data that version 3 requires: VM state size and disk size.
const V3_EXTRA_LEN: u32 = 16;
/// And the count of instructions.
const FULL_EXTRA_LEN: u32 = 24;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id: unique if the writer was sane.
    pub id: Vec<u8>,
    /// Its name: may repeat.
    pub name: Vec<u8>,
    /// Its L1 table.
    pub l1: L1Table,
    /// When it was taken, in seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds, as found.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of saved VM state; 0 if only the disk was saved.
    pub vm_state_size: u64,
    /// Size of its disk in bytes; `None` in a table too old to state it: the image's own size then.
    pub virtual_size: Option<u64>,
    /// Executed instructions, if they were counted.
    pub icount: Option<u64>,
    /// Bytes of extra data in the entry.
    pub extra_len: u32,
    /// Why it cannot be read, if so. Other entries of the table may still be readable.
    pub damage: Option<Malformed>,
}

impl Snapshot {
    /// The offset of the VM state on the guest's disk as the snapshot's L1 table maps it: at the first entry
    /// that no longer belongs to a disk of `virtual_size`. `l1_entry_span` is the header's. `None` if that is
    /// beyond the address range.
    pub fn vm_state_offset(virtual_size: u64, l1_entry_span: u64) -> Option<GuestOffset> {
        virtual_size.checked_next_multiple_of(l1_entry_span).map(GuestOffset)
    }
}

/// The properties that decide how entries are parsed.
#[derive(Clone, Copy, Debug)]
struct Rules {
    cluster: ClusterBits,
    extra_required: u32,
    l1_unchecked: bool,
}

/// Reads a table from chunks of any size.
#[derive(Debug)]
pub struct SnapshotParser {
    rules: Rules,
    left: u32,
    /// Bytes of the table that have been parsed, padding included.
    consumed: u64,
    pending: Vec<u8>,
    snapshots: Vec<Snapshot>,
}

impl SnapshotParser {
    /// A parser for the table of `header`.
    pub fn new(header: &Header) -> Self {
        Self::with(header.snapshots, header.cluster, header.version)
    }

    /// As [`Self::new`], but leaves to the checker the damage that it reports as corruptions: entries of
    /// version 3 that lack the extra data which that version requires (see [`Snapshot::extra_len`]), L1
    /// tables that are too large or at impossible offsets, and impossible sizes.
    pub fn for_check(header: &Header) -> Self {
        let mut parser = Self::new(header);
        parser.rules = Rules { extra_required: 0, l1_unchecked: true, ..parser.rules };
        parser
    }

    fn with(table: SnapshotTable, cluster: ClusterBits, version: Version) -> Self {
        let extra_required = if version == Version::V3 { V3_EXTRA_LEN } else { 0 };
        let rules = Rules { cluster, extra_required, l1_unchecked: false };
        Self { rules, left: table.count, consumed: 0, pending: Vec::new(), snapshots: Vec::new() }
    }

    /// Takes the next bytes of the table. `true` once all entries are there: later bytes do not belong to the
    /// table.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<bool, Malformed> {
        if self.left == 0 {
            return Ok(true);
        }
        self.pending.extend_from_slice(bytes);
        let mut start = 0;
        while self.left > 0 {
            let begin = start + padding(self.consumed + start as u64);
            let Some(rest) = self.pending.get(begin..) else { break };
            let Some((snapshot, len)) = parse_entry(rest, self.rules)? else { break };
            start = begin + len;
            at_most("length of the snapshot table", self.consumed + start as u64, MAX_TABLE_LEN)?;
            self.snapshots.push(snapshot);
            self.left -= 1;
        }
        self.consumed += start as u64;
        self.pending.drain(..start);
        Ok(self.left == 0)
    }

    /// Whether all entries are there.
    pub fn is_complete(&self) -> bool {
        self.left == 0
    }

    /// Bytes of the table parsed so far; once complete, its length.
    pub fn table_len(&self) -> u64 {
        self.consumed
    }

    /// The snapshots that were parsed before the table ended or became invalid.
    pub fn understood(self) -> Vec<Snapshot> {
        self.snapshots
    }

    /// The snapshots, or the reason why the table is incomplete.
    pub fn finish(self) -> Result<Vec<Snapshot>, Malformed> {
        if self.left > 0 {
            let have = self.consumed + self.pending.len() as u64;
            let need = self.consumed + u64::from(self.left) * FIXED_LEN as u64;
            return Err(Malformed::Truncated { what: "snapshot table", need: need.max(have + 1), have });
        }
        Ok(self.snapshots)
    }
}

/// Parses a complete table. As from a parser, a damaged entry is among the others, with its reason.
pub fn parse_table(
    bytes: &[u8],
    count: u32,
    cluster: ClusterBits,
    version: Version,
) -> Result<Vec<Snapshot>, Malformed> {
    let table = SnapshotTable { offset: HostOffset(0), count };
    let mut parser = SnapshotParser::with(table, cluster, version);
    parser.feed(bytes)?;
    parser.finish()
}

/// A table whose entries all have the extra data that version 3 requires: fields that an entry of `table`
/// lacks get the values that a reader assumes. Entries that have them stay as they are.
///
/// # Panics
/// If `table` is not `count` whole entries: a parser has checked that.
pub fn with_required_extra(table: &[u8], count: u32, virtual_size: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(table.len() + count as usize * V3_EXTRA_LEN as usize);
    for entry in entries(table, count) {
        out.resize(out.len() + padding(out.len() as u64), 0);
        let extra_len = be_u32(entry, 36);
        let strings_at = FIXED_LEN + extra_len as usize;
        if extra_len < V3_EXTRA_LEN {
            let vm_state_size = if extra_len < 8 { be_u32(entry, 32).into() } else { be_u64(entry, 40) };
            out.extend(&entry[..36]);
            out.extend(V3_EXTRA_LEN.to_be_bytes());
            out.extend(vm_state_size.to_be_bytes());
            out.extend(virtual_size.to_be_bytes());
        } else {
            out.extend(&entry[..strings_at]);
        }
        out.extend(&entry[strings_at..]);
    }
    out
}

/// A table without one of its entries; the others stay as they are, whatever extra data they have.
///
/// # Panics
/// As [`with_required_extra`].
pub fn without(table: &[u8], count: u32, index: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(table.len());
    for (_, entry) in entries(table, count).enumerate().filter(|(number, _)| *number != index) {
        out.resize(out.len() + padding(out.len() as u64), 0);
        out.extend(entry);
    }
    out
}

/// The entries of a table that a parser has found complete.
fn entries(table: &[u8], count: u32) -> impl Iterator<Item = &[u8]> {
    let mut at = 0;
    (0..count).map(move |_| {
        at += padding(at as u64);
        let entry = &table[at..];
        let strings = usize::from(be_u16(entry, 12)) + usize::from(be_u16(entry, 14));
        let len = FIXED_LEN + be_u32(entry, 36) as usize + strings;
        at += len;
        &entry[..len]
    })
}

/// The offset of each entry of a table of whole entries.
///
/// # Panics
/// If `table` is not `count` whole entries: a parser has checked that.
pub fn places(table: &[u8], count: u32) -> Vec<usize> {
    let mut at = 0;
    let place = |entry: &[u8]| {
        let begin = at + padding(at as u64);
        at = begin + entry.len();
        begin
    };
    entries(table, count).map(place).collect()
}

/// Adds the entry of `snapshot` to a table of whole entries, which stay as they are. All of the extra
/// data that QEMU knows is written, in version 2 too, as QEMU does.
///
/// # Panics
/// If id or name have more bytes than an entry can hold: names are checked when they are parsed.
pub fn append(table: &mut Vec<u8>, snapshot: &Snapshot) {
    table.resize(table.len() + padding(table.len() as u64), 0);
    let len_of =
        |bytes: &[u8]| u16::try_from(bytes.len()).expect("a name that an entry can hold").to_be_bytes();
    table.extend(snapshot.l1.offset.0.to_be_bytes());
    table.extend(snapshot.l1.entries.to_be_bytes());
    table.extend(len_of(&snapshot.id));
    table.extend(len_of(&snapshot.name));
    table.extend(snapshot.seconds.to_be_bytes());
    table.extend(snapshot.nanoseconds.to_be_bytes());
    table.extend(snapshot.vm_clock_nanoseconds.to_be_bytes());
    // Readers that know no extra data read it here.
    table.extend(u32::try_from(snapshot.vm_state_size).unwrap_or(0).to_be_bytes());
    table.extend(FULL_EXTRA_LEN.to_be_bytes());
    table.extend(snapshot.vm_state_size.to_be_bytes());
    table.extend(snapshot.virtual_size.unwrap_or(0).to_be_bytes());
    table.extend(snapshot.icount.unwrap_or(u64::MAX).to_be_bytes());
    table.extend(&snapshot.id);
    table.extend(&snapshot.name);
}

/// The id for a new snapshot: the smallest number above those of all others. `None` if there is none.
pub fn next_id(snapshots: &[Snapshot]) -> Option<u64> {
    let number = |snapshot: &Snapshot| {
        let digits = snapshot.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |number, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    };
    snapshots.iter().map(number).max().unwrap_or(0).checked_add(1)
}

/// The checks that [`SnapshotParser::for_check`] leaves out.
pub fn check_l1(l1: L1Table, cluster: ClusterBits) -> Result<(), Malformed> {
    at_most("length of a snapshot's L1 table", l1.len_bytes(), MAX_L1_LEN)?;
    check_table("L1 table of a snapshot", l1.offset, l1.len_bytes(), cluster)
}

/// Entries start at multiples of 8 from the table's start.
fn padding(at: u64) -> usize {
    (at.next_multiple_of(8) - at) as usize
}

/// One entry and its length without padding, or `None` if it continues beyond `bytes`.
fn parse_entry(bytes: &[u8], rules: Rules) -> Result<Option<(Snapshot, usize)>, Malformed> {
    if bytes.len() < FIXED_LEN {
        return Ok(None);
    }
    let extra_len = be_u32(bytes, 36);
    at_most("length of a snapshot's extra data", extra_len.into(), MAX_EXTRA_LEN)?;
    let l1 = L1Table { offset: HostOffset(be_u64(bytes, 0)), entries: be_u32(bytes, 8) };
    let id_at = FIXED_LEN + extra_len as usize;
    let name_at = id_at + usize::from(be_u16(bytes, 12));
    let end = name_at + usize::from(be_u16(bytes, 14));
    let Some(entry) = bytes.get(..end) else { return Ok(None) };
    let extra = |at: usize| (at + 8 <= id_at).then(|| be_u64(entry, at));
    let vm_state_size = extra(40).unwrap_or_else(|| be_u32(entry, 32).into());
    // As with the header's size, a partial sector at the end is no part of the disk.
    let virtual_size = extra(48).map(|size| size - size % SECTOR_SIZE);
    let damage = || {
        if extra_len < rules.extra_required {
            return Err(Malformed::SnapshotExtraShort(extra_len));
        }
        check_l1(l1, rules.cluster)?;
        at_most("size of a snapshot's VM state", vm_state_size, MAX_SIZE)?;
        at_most("size of a snapshot's disk", virtual_size.unwrap_or(0), MAX_SIZE)
    };
    let snapshot = Snapshot {
        id: entry[id_at..name_at].to_vec(),
        name: entry[name_at..].to_vec(),
        l1,
        seconds: be_u32(entry, 16),
        nanoseconds: be_u32(entry, 20),
        vm_clock_nanoseconds: be_u64(entry, 24),
        vm_state_size,
        virtual_size,
        // All ones: not counted.
        icount: extra(56).filter(|&count| count != u64::MAX),
        extra_len,
        damage: if rules.l1_unchecked { None } else { damage().err() },
    };
    Ok(Some((snapshot, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry without its padding: extra data as given, name and id of a test.
    fn entry(extra: &[u8], id: &str, name: &str) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(0x50000u64.to_be_bytes());
        out.extend(2u32.to_be_bytes());
        out.extend((id.len() as u16).to_be_bytes());
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(1_700_000_000u32.to_be_bytes());
        out.extend(5u32.to_be_bytes());
        out.extend(77u64.to_be_bytes());
        out.extend(4096u32.to_be_bytes());
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(id.bytes().chain(name.bytes()));
        out
    }

    fn extra(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// The entries of a table without damage, or the reason of the first damaged one.
    fn parse(bytes: &[u8], count: u32, version: Version) -> Result<Vec<Snapshot>, Malformed> {
        let snapshots = parse_table(bytes, count, ClusterBits::new(16).unwrap(), version)?;
        match snapshots.iter().find_map(|snapshot| snapshot.damage.clone()) {
            Some(damage) => Err(damage),
            None => Ok(snapshots),
        }
    }

    #[test]
    fn entries_follow_each_other_at_multiples_of_8() {
        let table = [
            padded(entry(&extra(&[1 << 33, 1 << 30, 9]), "1", "monday")),
            entry(&extra(&[0, 512]), "12", "m"),
        ]
        .concat();
        let snapshots = parse(&table, 2, Version::V3).unwrap();
        let expected = Snapshot {
            id: b"1".to_vec(),
            name: b"monday".to_vec(),
            l1: L1Table { offset: HostOffset(0x50000), entries: 2 },
            seconds: 1_700_000_000,
            nanoseconds: 5,
            vm_clock_nanoseconds: 77,
            vm_state_size: 1 << 33,
            virtual_size: Some(1 << 30),
            icount: Some(9),
            extra_len: 24,
            damage: None,
        };
        assert_eq!(snapshots[0], expected);
        assert_eq!(
            (snapshots[1].id.as_slice(), snapshots[1].name.as_slice()),
            (b"12".as_slice(), b"m".as_slice())
        );
        assert_eq!((snapshots[1].virtual_size, snapshots[1].icount), (Some(512), None));
    }

    #[test]
    fn chunks_of_any_size_give_the_same_and_the_tables_length() {
        let table =
            [padded(entry(&extra(&[0, 512]), "1", "monday")), entry(&extra(&[0, 512]), "2", "x")].concat();
        let whole = parse(&table, 2, Version::V3).unwrap();
        for chunk in 1..table.len() {
            let mut parser = SnapshotParser::with(
                SnapshotTable { offset: HostOffset(0), count: 2 },
                ClusterBits::new(16).unwrap(),
                Version::V3,
            );
            let done: Vec<bool> = table.chunks(chunk).map(|part| parser.feed(part).unwrap()).collect();
            assert!(done.last() == Some(&true) && done[..done.len() - 1].iter().all(|done| !done), "{chunk}");
            assert_eq!(parser.table_len(), table.len() as u64);
            assert_eq!(parser.finish().unwrap(), whole);
        }
    }

    #[test]
    fn version_2_may_lack_the_extra_data_and_icount_may_be_off() {
        let old = &parse(&entry(&[], "1", "old"), 1, Version::V2).unwrap()[0];
        assert_eq!((old.vm_state_size, old.virtual_size, old.icount), (4096, None, None));
        let off = &parse(&entry(&extra(&[0, 512, u64::MAX]), "1", "off"), 1, Version::V3).unwrap()[0];
        assert_eq!(off.icount, None);
    }

    #[test]
    fn removing_an_entry_keeps_the_others_byte_for_byte() {
        let all = [
            entry(&extra(&[1, 512, 9, 77]), "1", "a"),
            entry(&[], "22", "bcd"),
            entry(&extra(&[0, 512]), "3", "x"),
        ];
        let joined = |parts: &[&Vec<u8>]| {
            let mut table = Vec::new();
            for part in parts {
                table = padded(table);
                table.extend_from_slice(part);
            }
            table
        };
        let table = joined(&[&all[0], &all[1], &all[2]]);
        assert_eq!(without(&table, 3, 0), joined(&[&all[1], &all[2]]));
        assert_eq!(without(&table, 3, 1), joined(&[&all[0], &all[2]]));
        assert_eq!(without(&table, 3, 2), joined(&[&all[0], &all[1]]));
        assert!(without(&all[0], 1, 0).is_empty());
    }

    #[test]
    fn missing_extra_data_gets_the_values_that_readers_assume() {
        for (short, vm_state_size) in [(vec![], 4096), (extra(&[1 << 33]), 1 << 33)] {
            let whole = entry(&extra(&[7, 512, 9]), "2", "whole");
            let table = [padded(entry(&short, "1", "monday")), whole].concat();
            let snapshots = parse(&with_required_extra(&table, 2, 1 << 30), 2, Version::V3).unwrap();
            assert_eq!(
                (snapshots[0].vm_state_size, snapshots[0].virtual_size),
                (vm_state_size, Some(1 << 30))
            );
            assert_eq!(
                (snapshots[0].id.as_slice(), snapshots[0].name.as_slice()),
                (&b"1"[..], &b"monday"[..])
            );
            assert_eq!(snapshots[1], parse(&table, 2, Version::V2).unwrap()[1]);
        }
    }

    #[test]
    fn each_violation_has_its_reason() {
        let good = entry(&extra(&[0, 512]), "1", "monday");
        let poked = |at: usize, bytes: &[u8]| {
            let mut entry = good.clone();
            entry[at..at + bytes.len()].copy_from_slice(bytes);
            parse(&entry, 1, Version::V3).unwrap_err()
        };
        let unaligned =
            Malformed::Unaligned { what: "L1 table of a snapshot", offset: 0x50200, unit: 65_536 };
        assert_eq!(poked(0, &0x50200u64.to_be_bytes()), unaligned);
        let offset = 0x7fff_ffff_ffff_0000;
        let range = Malformed::OutOfRange { what: "L1 table of a snapshot", offset, len: 0x20000 };
        let long = [offset.to_be_bytes().as_slice(), &0x4000u32.to_be_bytes()].concat();
        assert_eq!(poked(0, &long), range);
        let (what, found) = ("length of a snapshot's L1 table", (32 << 20) + 8);
        assert_eq!(poked(8, &0x40_0001u32.to_be_bytes()), Malformed::TooLarge { what, found, max: 32 << 20 });
        let what = "length of a snapshot's extra data";
        assert_eq!(poked(36, &1025u32.to_be_bytes()), Malformed::TooLarge { what, found: 1025, max: 1024 });
        for (what, sizes) in
            [("size of a snapshot's VM state", [u64::MAX, 512]), ("size of a snapshot's disk", [0, !511])]
        {
            let found = sizes[0].max(sizes[1]);
            let reason = Malformed::TooLarge { what, found, max: i64::MAX as u64 };
            assert_eq!(parse(&entry(&extra(&sizes), "1", "x"), 1, Version::V3), Err(reason));
        }
        assert_eq!(parse(&entry(&[0; 15], "1", "x"), 1, Version::V3), Err(Malformed::SnapshotExtraShort(15)));
        let (need, have) = (good.len() as u64, good.len() as u64 - 1);
        let cut = Malformed::Truncated { what: "snapshot table", need, have };
        assert_eq!(parse(&good[..good.len() - 1], 1, Version::V3), Err(cut));
    }

    #[test]
    fn a_damaged_entry_does_not_hide_the_others() {
        let good = |id: &str| padded(entry(&extra(&[0, 512]), id, "x"));
        let mut bad = good("2");
        bad[..8].copy_from_slice(&0x50200u64.to_be_bytes());
        let table = SnapshotTable { offset: HostOffset(0), count: 3 };
        let mut parser = SnapshotParser::with(table, ClusterBits::new(16).unwrap(), Version::V3);
        assert_eq!(parser.feed(&[good("1"), bad, good("3")].concat()), Ok(true));
        let found = parser.finish().unwrap();
        let damaged: Vec<(&[u8], bool)> =
            found.iter().map(|s| (s.id.as_slice(), s.damage.is_some())).collect();
        assert_eq!(damaged, [(&b"1"[..], false), (b"2", true), (b"3", false)]);
    }

    #[test]
    fn an_appended_entry_parses_after_the_old_ones() {
        let mut table = entry(&extra(&[0, 512]), "7", "odd");
        let old = table.clone();
        let new = Snapshot {
            id: b"8".to_vec(),
            name: b"new one".to_vec(),
            l1: L1Table { offset: HostOffset(0x70000), entries: 3 },
            seconds: 1_700_000_001,
            nanoseconds: 999,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            virtual_size: Some(1 << 30),
            icount: None,
            extra_len: 24,
            damage: None,
        };
        append(&mut table, &new);
        assert_eq!(table[..old.len()], old);
        for version in [Version::V2, Version::V3] {
            let found = parse(&table, 2, version).unwrap();
            assert_eq!((found[0].name.as_slice(), &found[1]), (&b"odd"[..], &new));
        }
    }

    #[test]
    fn a_new_id_is_above_all_numbers() {
        let with = |id: &str| parse(&entry(&extra(&[0, 512]), id, "x"), 1, Version::V3).unwrap();
        assert_eq!(next_id(&[]), Some(1));
        let all: Vec<_> = ["3", "name", "12x", "7"].into_iter().flat_map(with).collect();
        assert_eq!(next_id(&all), Some(13));
        assert_eq!(next_id(&with("99999999999999999999999")), None);
    }

    #[test]
    fn a_disk_ends_with_a_whole_sector() {
        let odd = &parse(&entry(&extra(&[1000, 1000]), "1", "odd"), 1, Version::V3).unwrap()[0];
        assert_eq!((odd.vm_state_size, odd.virtual_size), (1000, Some(512)));
    }

    #[test]
    fn a_table_beyond_its_limit_is_refused() {
        let long = "x".repeat(65_535);
        let one = padded(entry(&extra(&[0, 512]), &long, &long));
        let mut parser = SnapshotParser::with(
            SnapshotTable { offset: HostOffset(0), count: 65_536 },
            ClusterBits::new(16).unwrap(),
            Version::V3,
        );
        let fits = MAX_TABLE_LEN as usize / one.len();
        for _ in 0..fits {
            assert_eq!(parser.feed(&one), Ok(false));
        }
        let what = "length of the snapshot table";
        assert!(matches!(parser.feed(&one), Err(Malformed::TooLarge { what: found, .. }) if found == what));
    }

    #[test]
    fn vm_state_lies_at_the_first_l1_entry_past_the_disk() {
        let span = 8192 * 65_536;
        assert_eq!(Snapshot::vm_state_offset(1, span), Some(GuestOffset(span)));
        assert_eq!(Snapshot::vm_state_offset(span, span), Some(GuestOffset(span)));
        assert_eq!(Snapshot::vm_state_offset(span + 1, span), Some(GuestOffset(2 * span)));
        assert_eq!(Snapshot::vm_state_offset(0, span), Some(GuestOffset(0)));
        assert_eq!(Snapshot::vm_state_offset(u64::MAX, span), None);
    }
}
