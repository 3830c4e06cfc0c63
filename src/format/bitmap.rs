//! The bitmap directory: QEMU's persistent dirty bitmaps, as far as listing and counting needs them. chainfs
//! does not interpret the bits.

use super::bytes::{be_u16, be_u32, be_u64};
use super::header::{at_most, check_table};
use super::malformed::Malformed;
use crate::units::{ClusterBits, HostOffset};

const FIXED_LEN: usize = 24;
const MAX_NAME_LEN: u64 = 1023;
/// Entries of one bitmap's table; QEMU's limit.
const MAX_TABLE_ENTRIES: u64 = 0x800_0000;

const IN_USE: u32 = 1 << 0;
const AUTO: u32 = 1 << 1;
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;

/// A bitmap, without its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Guest bytes behind one bit, as a power of two; 9 to 31.
    pub granularity_bits: u8,
    /// The bitmap's table: an array of 8-byte entries, cluster aligned.
    pub table: HostOffset,
    /// Entries of that table.
    pub table_entries: u32,
    /// It was not written back: its content is stale.
    pub in_use: bool,
    /// It follows every write to the disk.
    pub auto: bool,
    /// Offset of its flags in the directory: 4 bytes.
    pub flags_at: usize,
    /// The flags as found.
    pub flags: u32,
}

impl Bitmap {
    /// The flags which say that the bitmap no longer records changes.
    pub fn flags_in_use(&self) -> u32 {
        self.flags | IN_USE
    }
}

/// An entry of a bitmap's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are the same.
    All(bool),
    /// The bits are there, one cluster of them.
    At(HostOffset),
}

/// Parses a complete directory.
pub fn parse_directory(bytes: &[u8], count: u32, cluster: ClusterBits) -> Result<Vec<Bitmap>, Malformed> {
    let mut bitmaps = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let (bitmap, len) = parse_entry(bytes.get(at..).unwrap_or_default(), at, cluster)?;
        bitmaps.push(bitmap);
        at += len.next_multiple_of(8);
    }
    Ok(bitmaps)
}

/// One entry and its length without padding; `at` is its offset in the directory.
fn parse_entry(bytes: &[u8], at: usize, cluster: ClusterBits) -> Result<(Bitmap, usize), Malformed> {
    let short = |len: usize| Malformed::Truncated {
        what: "bitmap directory",
        need: (at + len) as u64,
        have: (at + bytes.len()) as u64,
    };
    if bytes.len() < FIXED_LEN {
        return Err(short(FIXED_LEN));
    }
    let (flags, kind, granularity_bits) = (be_u32(bytes, 12), bytes[16], bytes[17]);
    if flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) != 0 {
        return Err(Malformed::Reserved { what: "flags of a bitmap", found: flags.into() });
    }
    if kind != 1 {
        return Err(Malformed::BitmapType(kind));
    }
    if !(9..=31).contains(&granularity_bits) {
        return Err(Malformed::BitmapGranularity(granularity_bits));
    }
    let (name_len, extra_len) = (be_u16(bytes, 18), be_u32(bytes, 20));
    if name_len == 0 {
        return Err(Malformed::BitmapUnnamed);
    }
    at_most("length of a bitmap's name", name_len.into(), MAX_NAME_LEN)?;
    if extra_len != 0 && flags & EXTRA_DATA_COMPATIBLE == 0 {
        return Err(Malformed::BitmapExtraData(extra_len));
    }
    let (table, table_entries) = (HostOffset(be_u64(bytes, 0)), be_u32(bytes, 8));
    at_most("number of entries of a bitmap's table", table_entries.into(), MAX_TABLE_ENTRIES)?;
    check_table("table of a bitmap", table, u64::from(table_entries) * 8, cluster)?;
    if table.0 == 0 {
        return Err(Malformed::BitmapTableMissing);
    }
    let name_at = FIXED_LEN + extra_len as usize;
    let end = name_at + usize::from(name_len);
    let name = bytes.get(name_at..end).ok_or_else(|| short(end))?.to_vec();
    let (in_use, auto) = (flags & IN_USE != 0, flags & AUTO != 0);
    let flags_at = at + 12;
    Ok((Bitmap { name, granularity_bits, table, table_entries, in_use, auto, flags_at, flags }, end))
}

/// Decodes an entry of a bitmap's table.
pub fn table_entry(entry: u64, cluster: ClusterBits) -> Result<BitmapCluster, Malformed> {
    const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
    let (offset, ones) = (entry & OFFSET, entry & 1 == 1);
    // Bit 0 means "all ones" in an entry without an offset, and is reserved in one with an offset.
    if entry & !(OFFSET | 1) != 0 || (offset != 0 && ones) {
        return Err(Malformed::Reserved { what: "bitmap table entry", found: entry });
    }
    if !cluster.aligned(offset) {
        return Err(Malformed::Unaligned { what: "bitmap data", offset, unit: cluster.size() });
    }
    Ok(if offset == 0 { BitmapCluster::All(ones) } else { BitmapCluster::At(HostOffset(offset)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> ClusterBits {
        ClusterBits::new(16).unwrap()
    }

    fn entry(flags: u32, extra: &[u8], name: &str) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(0x70000u64.to_be_bytes());
        out.extend(3u32.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend([1, 16]);
        out.extend((name.len() as u16).to_be_bytes());
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(name.bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    #[test]
    fn a_directory_lists_its_bitmaps() {
        let directory =
            [entry(IN_USE, &[], "first"), entry(AUTO | EXTRA_DATA_COMPATIBLE, &[9; 3], "b")].concat();
        let bitmaps = parse_directory(&directory, 2, cluster()).unwrap();
        let names: Vec<_> =
            bitmaps.iter().map(|bitmap| (bitmap.name.as_slice(), bitmap.in_use, bitmap.auto)).collect();
        assert_eq!(names, [(b"first".as_slice(), true, false), (b"b".as_slice(), false, true)]);
        assert_eq!(
            (bitmaps[0].granularity_bits, bitmaps[0].table, bitmaps[0].table_entries),
            (16, HostOffset(0x70000), 3)
        );
    }

    #[test]
    fn each_violation_has_its_reason() {
        let poked = |at: usize, bytes: &[u8]| {
            let mut entry = entry(0, &[], "name");
            entry[at..at + bytes.len()].copy_from_slice(bytes);
            parse_directory(&entry, 1, cluster()).unwrap_err()
        };
        let what = "table of a bitmap";
        assert_eq!(
            poked(0, &0x70200u64.to_be_bytes()),
            Malformed::Unaligned { what, offset: 0x70200, unit: 65_536 }
        );
        assert_eq!(poked(0, &0u64.to_be_bytes()), Malformed::BitmapTableMissing);
        let offset = 0x7fff_ffff_ffff_0000u64;
        let far = [offset.to_be_bytes().as_slice(), &0x2000u32.to_be_bytes()].concat();
        assert_eq!(poked(0, &far), Malformed::OutOfRange { what, offset, len: 0x10000 });
        let (what, max) = ("number of entries of a bitmap's table", 0x800_0000);
        assert_eq!(poked(8, &0x800_0001u32.to_be_bytes()), Malformed::TooLarge { what, found: max + 1, max });
        assert_eq!(
            poked(12, &8u32.to_be_bytes()),
            Malformed::Reserved { what: "flags of a bitmap", found: 8 }
        );
        assert_eq!(poked(16, &[2]), Malformed::BitmapType(2));
        assert_eq!(poked(17, &[8]), Malformed::BitmapGranularity(8));
        assert_eq!(poked(17, &[32]), Malformed::BitmapGranularity(32));
        assert_eq!(poked(18, &[0, 0]), Malformed::BitmapUnnamed);
        let what = "length of a bitmap's name";
        assert_eq!(poked(18, &[4, 0]), Malformed::TooLarge { what, found: 1024, max: 1023 });
        assert_eq!(poked(20, &[0, 0, 0, 8]), Malformed::BitmapExtraData(8));
        assert_eq!(poked(18, &[0, 9]), Malformed::Truncated { what: "bitmap directory", need: 33, have: 32 });
        let none = Malformed::Truncated { what: "bitmap directory", need: 56, have: 32 };
        assert_eq!(parse_directory(&entry(0, &[], "name"), 2, cluster()), Err(none));
    }

    #[test]
    fn a_table_entry_is_uniform_or_an_offset() {
        assert_eq!(table_entry(0, cluster()), Ok(BitmapCluster::All(false)));
        assert_eq!(table_entry(1, cluster()), Ok(BitmapCluster::All(true)));
        assert_eq!(table_entry(0x70000, cluster()), Ok(BitmapCluster::At(HostOffset(0x70000))));
        for found in [0x70001, 0x70002, 1 << 56, 1 << 63] {
            assert_eq!(
                table_entry(found, cluster()),
                Err(Malformed::Reserved { what: "bitmap table entry", found })
            );
        }
        let unaligned = Malformed::Unaligned { what: "bitmap data", offset: 0x70200, unit: 65_536 };
        assert_eq!(table_entry(0x70200, cluster()), Err(unaligned));
    }
}
