//! Any bytes as a snapshot table and as a bitmap directory.
#![no_main]

use chainfs::format::snapshot::parse_table;
use chainfs::format::{Version, bitmap};
use chainfs::units::ClusterBits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let [count, bits, table @ ..] = bytes else { return };
    let Some(cluster) = ClusterBits::new(u32::from(*bits)) else { return };
    for version in [Version::V2, Version::V3] {
        if let Ok(snapshots) = parse_table(table, (*count).into(), cluster, version) {
            assert_eq!(snapshots.len(), usize::from(*count));
        }
    }
    let _ = bitmap::parse_directory(table, (*count).into(), cluster);
});
