//! Refcounts: the table's entries and the packed counts within a block.

use super::bytes::{be_u16, be_u32, be_u64};
use super::malformed::Malformed;
use crate::units::{ClusterBits, HostOffset};

const RESERVED: u64 = 0x1ff;

/// Decodes an entry of the refcount table: the block's offset, or `None` if all counts are 0.
pub fn table_entry(entry: u64, cluster: ClusterBits) -> Result<Option<HostOffset>, Malformed> {
    if entry & RESERVED != 0 {
        return Err(Malformed::Reserved { what: "refcount table entry", found: entry });
    }
    if !cluster.aligned(entry) {
        return Err(Malformed::Unaligned { what: "refcount block", offset: entry, unit: cluster.size() });
    }
    Ok((entry != 0).then_some(HostOffset(entry)))
}

/// Counts in a block, which is one cluster.
pub fn block_entries(cluster: ClusterBits, order: u32) -> u64 {
    (cluster.size() * 8) >> order
}

/// Count number `index` of a block of counts that are `1 << order` bits wide.
///
/// # Panics
/// If `order` is above 6 or the block is shorter: the header and the caller have checked both.
pub fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        // Below a byte, the first count is in the least significant bits.
        0..=2 => {
            let (width, per_byte) = (1 << order, 8 >> order);
            let shift = (index % per_byte) * width;
            u64::from(block[index / per_byte]) >> shift & ((1 << width) - 1)
        }
        3 => block[index].into(),
        4 => be_u16(block, index * 2).into(),
        5 => be_u32(block, index * 4).into(),
        6 => be_u64(block, index * 8),
        _ => panic!("a header has a refcount order of at most 6"),
    }
}

/// Writes count number `index`; the reverse of [`refcount`].
///
/// # Panics
/// If the count does not fit its width, or as [`refcount`] does.
pub fn set_refcount(block: &mut [u8], index: usize, order: u32, count: u64) {
    assert!(order <= 6 && count <= max_refcount(order), "a refcount never wraps");
    if order < 3 {
        let (width, per_byte) = (1 << order, 8 >> order);
        let shift = (index % per_byte) * width;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !(((1u8 << width) - 1) << shift) | (count as u8) << shift;
    } else {
        let len = 1 << (order - 3);
        block[index * len..][..len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
    }
}

/// The largest count that is `1 << order` bits wide.
pub fn max_refcount(order: u32) -> u64 {
    u64::MAX >> (64 - (1 << order))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: [u8; 16] =
        [0xe4, 0x1b, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07];

    #[test]
    fn every_width_reads_as_the_specification_lays_it_out() {
        let first = |order| (0..4).map(|index| refcount(&BLOCK, index, order)).collect::<Vec<_>>();
        assert_eq!(first(0), [0, 0, 1, 0]);
        assert_eq!(first(1), [0, 1, 2, 3]);
        assert_eq!(first(2), [4, 0xe, 0xb, 1]);
        assert_eq!(first(3), [0xe4, 0x1b, 0x23, 0x45]);
        assert_eq!(first(4), [0xe41b, 0x2345, 0x6789, 0xabcd]);
        assert_eq!(first(5), [0xe41b_2345, 0x6789_abcd, 0xef01_0203, 0x0405_0607]);
        assert_eq!(refcount(&BLOCK, 1, 6), 0xef01_0203_0405_0607);
    }

    #[test]
    fn every_width_writes_what_it_reads_and_leaves_its_neighbours_alone() {
        for order in 0..=6 {
            let count = (BLOCK.len() * 8) >> order;
            for index in 0..count {
                let mut block = BLOCK;
                set_refcount(&mut block, index, order, max_refcount(order));
                for other in 0..count {
                    let before = refcount(&BLOCK, other, order);
                    let expected = if other == index { max_refcount(order) } else { before };
                    assert_eq!(refcount(&block, other, order), expected, "order {order}, {index}, {other}");
                }
                set_refcount(&mut block, index, order, refcount(&BLOCK, index, order));
                assert_eq!(block, BLOCK);
            }
        }
    }

    #[test]
    fn a_block_holds_as_many_counts_as_fit_a_cluster() {
        let cluster = ClusterBits::new(16).unwrap();
        assert_eq!(
            (block_entries(cluster, 0), block_entries(cluster, 4), block_entries(cluster, 6)),
            (524_288, 32_768, 8192)
        );
        assert_eq!((max_refcount(0), max_refcount(4), max_refcount(6)), (1, 65_535, u64::MAX));
    }

    #[test]
    fn a_table_entry_is_a_block_or_nothing() {
        let cluster = ClusterBits::new(16).unwrap();
        assert_eq!(table_entry(0, cluster), Ok(None));
        assert_eq!(table_entry(0x20000, cluster), Ok(Some(HostOffset(0x20000))));
        let unaligned = Malformed::Unaligned { what: "refcount block", offset: 0x20200, unit: 65_536 };
        assert_eq!(table_entry(0x20200, cluster), Err(unaligned));
        for bit in 0..9 {
            let found = 0x20000 | 1 << bit;
            assert_eq!(
                table_entry(found, cluster),
                Err(Malformed::Reserved { what: "refcount table entry", found })
            );
        }
    }
}
