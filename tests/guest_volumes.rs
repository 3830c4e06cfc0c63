//! Partition tables, volume groups and what volumes hold, judged by the programs that made them: sfdisk, sgdisk and partx,
//! LVM, blkid. Loop devices need root; the device mapper is not used, so a machine's own volumes are never touched.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod common;
mod volumes;
