//! Extended L2 entries: one cluster in 32 subclusters, each with its own mapping.

use super::entry::{Allocation, Compressed, EntryFormat, Mapping, SUBCLUSTERS, ZeroOffset};
use super::malformed::Malformed;
use crate::units::{GuestOffset, HostOffset};

/// A 16-byte entry of an L2 table. No subcluster is both allocated and zero, and none is
/// allocated without a host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubclusterEntry {
    allocation: Allocation,
    allocated: u32,
    zero: u32,
    subcluster_len: u64,
    /// The COPIED flag: accurate in active tables only.
    pub copied: bool,
}

impl EntryFormat {
    /// Decodes a 16-byte L2 entry, the one for the cluster at `guest`.
    pub fn l2_extended(
        self,
        entry: u64,
        bitmap: u64,
        guest: GuestOffset,
    ) -> Result<SubclusterEntry, Malformed> {
        let (zero, allocated) = ((bitmap >> 32) as u32, bitmap as u32);
        let (copied, subcluster_len) = (Self::copied(entry), self.cluster.size() / u64::from(SUBCLUSTERS));
        if Self::is_compressed(entry) {
            if bitmap != 0 {
                return Err(Malformed::CompressedSubclusters(bitmap));
            }
            let allocation = Allocation::Compressed(self.compressed(entry)?);
            return Ok(SubclusterEntry { allocation, allocated, zero, subcluster_len, copied });
        }
        if Self::reserved(entry) {
            return Err(Malformed::Reserved { what: "L2 entry", found: entry });
        }
        if allocated & zero != 0 {
            return Err(Malformed::SubclusterTwice(allocated & zero));
        }
        let allocation = match self.data_place(entry, guest, ZeroOffset::MayBePlace)? {
            Some(at) => Allocation::Cluster(at),
            None if allocated != 0 => return Err(Malformed::SubclusterWithoutCluster(allocated)),
            None => Allocation::None,
        };
        Ok(SubclusterEntry { allocation, allocated, zero, subcluster_len, copied })
    }
}

impl SubclusterEntry {
    /// The mapping of subcluster 0 to 31. A compressed cluster is one whole.
    ///
    /// # Panics
    /// If there is no such subcluster.
    pub fn mapping(&self, subcluster: u32) -> Mapping {
        assert!(subcluster < SUBCLUSTERS);
        let host = match self.allocation {
            Allocation::Compressed(compressed) => return Mapping::Compressed(compressed),
            Allocation::Cluster(at) => Some(HostOffset(at.0 + u64::from(subcluster) * self.subcluster_len)),
            Allocation::None => None,
        };
        match host {
            _ if self.zero >> subcluster & 1 == 1 => Mapping::Zero(host),
            Some(at) if self.allocated >> subcluster & 1 == 1 => Mapping::Data(at),
            _ => Mapping::Hole,
        }
    }

    /// The mapping of subcluster `from`, and the number of contiguous subclusters (itself included) within
    /// this cluster that continue it; at least 1.
    ///
    /// # Panics
    /// If there is no such subcluster.
    pub fn run(&self, from: u32) -> (Mapping, u32) {
        let mapping = self.mapping(from);
        let alike = match mapping {
            Mapping::Compressed(_) => u32::MAX,
            Mapping::Data(_) => self.allocated,
            Mapping::Zero(_) => self.zero,
            Mapping::Hole => !(self.allocated | self.zero),
        };
        let run = (alike >> from).trailing_ones().min(SUBCLUSTERS - from);
        assert!(run >= 1, "a subcluster is like itself");
        (mapping, run)
    }

    /// The compressed cluster, if it is one.
    pub fn compressed(&self) -> Option<Compressed> {
        match self.allocation {
            Allocation::Compressed(compressed) => Some(compressed),
            Allocation::None | Allocation::Cluster(_) => None,
        }
    }

    /// Which subclusters have data in the host cluster, the first in the least significant bit.
    pub fn allocated(&self) -> u32 {
        self.allocated
    }

    /// Which subclusters read as zeroes.
    pub fn zero(&self) -> u32 {
        self.zero
    }

    /// The second word of an entry with these bits.
    pub fn bitmap(allocated: u32, zero: u32) -> u64 {
        assert!(allocated & zero == 0, "a subcluster has one answer");
        u64::from(zero) << 32 | u64::from(allocated)
    }

    /// The host cluster, whether any subcluster uses it or not.
    pub fn host_cluster(&self) -> Option<HostOffset> {
        match self.allocation {
            Allocation::Cluster(at) => Some(at),
            Allocation::None | Allocation::Compressed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::Version;
    use super::*;
    use crate::units::ClusterBits;

    const COPIED: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;

    fn format() -> EntryFormat {
        EntryFormat {
            version: Version::V3,
            cluster: ClusterBits::new(16).unwrap(),
            extended: true,
            data_file: false,
        }
    }

    fn decode(entry: u64, zero: u32, allocated: u32) -> Result<SubclusterEntry, Malformed> {
        format().l2_extended(entry, u64::from(zero) << 32 | u64::from(allocated), GuestOffset(0))
    }

    #[test]
    fn each_subcluster_has_its_own_mapping() {
        let entry = decode(COPIED | 0x40000, 0b0100, 0b0011).unwrap();
        assert_eq!(entry.run(0), (Mapping::Data(HostOffset(0x40000)), 2));
        assert_eq!(entry.run(1), (Mapping::Data(HostOffset(0x40800)), 1));
        assert_eq!(entry.run(2), (Mapping::Zero(Some(HostOffset(0x41000))), 1));
        assert_eq!(entry.run(3), (Mapping::Hole, 29));
        assert_eq!(entry.run(31), (Mapping::Hole, 1));
        assert!(entry.copied);
    }

    #[test]
    fn a_run_ends_with_the_cluster() {
        let data = decode(0x40000, 0, u32::MAX).unwrap();
        assert_eq!(data.run(0), (Mapping::Data(HostOffset(0x40000)), 32));
        assert_eq!(data.run(31), (Mapping::Data(HostOffset(0x4f800)), 1));
        assert_eq!(decode(0, u32::MAX, 0).unwrap().run(5), (Mapping::Zero(None), 27));
        assert_eq!(decode(0, 0, 0).unwrap().run(0), (Mapping::Hole, 32));
    }

    #[test]
    fn a_host_cluster_without_allocated_subclusters_is_a_hole() {
        let entry = decode(COPIED | 0x40000, 0, 0).unwrap();
        assert_eq!((entry.run(0), entry.host_cluster()), ((Mapping::Hole, 32), Some(HostOffset(0x40000))));
    }

    #[test]
    fn a_compressed_cluster_is_one_whole() {
        let entry = decode(COMPRESSED | 0x12345, 0, 0).unwrap();
        let whole = Mapping::Compressed(Compressed { at: HostOffset(0x12345), len: 512 - 0x145 });
        assert_eq!((entry.run(0), entry.run(7)), ((whole, 32), (whole, 25)));
    }

    #[test]
    fn an_extended_entry_breaks_rules_with_a_reason() {
        assert_eq!(decode(0x40000, 0b110, 0b011), Err(Malformed::SubclusterTwice(0b010)));
        assert_eq!(decode(COPIED, 0, 0b011), Err(Malformed::SubclusterWithoutCluster(0b011)));
        assert_eq!(decode(COMPRESSED, 1, 0), Err(Malformed::CompressedSubclusters(1 << 32)));
        let unaligned = Malformed::Unaligned { what: "data cluster", offset: 0x40200, unit: 65_536 };
        assert_eq!(decode(0x40200, 0, 0), Err(unaligned));
        for bit in (0..9).chain(56..62) {
            let found = 0x40000 | 1 << bit;
            assert_eq!(decode(found, 0, 0), Err(Malformed::Reserved { what: "L2 entry", found }));
        }
    }

    #[test]
    fn in_an_external_data_file_offset_0_is_valid() {
        let format = EntryFormat { data_file: true, ..format() };
        let entry = format.l2_extended(COPIED, 1, GuestOffset(0)).unwrap();
        assert_eq!(entry.run(0), (Mapping::Data(HostOffset(0)), 1));
        let wrong = format.l2_extended(COPIED, 1, GuestOffset(0x10000));
        assert_eq!(wrong, Err(Malformed::DataFileOffset { host: 0, guest: 0x10000 }));
    }
}
