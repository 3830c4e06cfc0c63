//! qcow2 files, made and read by the model itself: it shares no code with chainfs, and waits for no other
//! program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use chainfs::units::are_zero;

use super::seen::Seen;

/// Bytes of a disk.
pub(crate) const SIZE: u64 = 64 << 10;
const CLUSTER: usize = 4 << 10;
const MAGIC: u64 = 0x5146_49FB;
/// No chain of the model is deeper.
const MAX_DEPTH: usize = 40;

/// Whether a file of the model is raw, by its name.
pub(crate) fn is_raw(name: &Path) -> bool {
    name.extension().is_some_and(|extension| extension == "raw")
}

/// An image of `size` bytes, with a backing file (its name and format) and clusters by number.
pub(crate) fn qcow2(
    size: u64,
    backing: Option<(&str, &str)>,
    clusters: &BTreeMap<usize, Vec<u8>>,
) -> Vec<u8> {
    let mut file = vec![0; CLUSTER * (5 + clusters.len())];
    let put = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let (table, block, l1, l2) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 4 * CLUSTER);
    put(&mut file, 0, &(MAGIC as u32).to_be_bytes());
    put(&mut file, 4, &3_u32.to_be_bytes());
    put(&mut file, 20, &12_u32.to_be_bytes());
    put(&mut file, 24, &size.to_be_bytes());
    put(&mut file, 36, &1_u32.to_be_bytes());
    put(&mut file, 40, &(l1 as u64).to_be_bytes());
    put(&mut file, 48, &(table as u64).to_be_bytes());
    put(&mut file, 56, &1_u32.to_be_bytes());
    put(&mut file, 96, &4_u32.to_be_bytes());
    put(&mut file, 100, &104_u32.to_be_bytes());
    if let Some((name, format)) = backing {
        put(&mut file, 104, &0xE279_2ACA_u32.to_be_bytes());
        put(&mut file, 108, &(format.len() as u32).to_be_bytes());
        put(&mut file, 112, format.as_bytes());
        put(&mut file, 8, &200_u64.to_be_bytes());
        put(&mut file, 16, &(name.len() as u32).to_be_bytes());
        put(&mut file, 200, name.as_bytes());
    }
    put(&mut file, table, &(block as u64).to_be_bytes());
    for number in 0..5 + clusters.len() {
        put(&mut file, block + 2 * number, &1_u16.to_be_bytes());
    }
    put(&mut file, l1, &(l2 as u64 | 1 << 63).to_be_bytes());
    for (place, (number, bytes)) in clusters.iter().enumerate() {
        let at = CLUSTER * (5 + place);
        put(&mut file, l2 + 8 * number, &(at as u64 | 1 << 63).to_be_bytes());
        put(&mut file, at, bytes);
    }
    file
}

/// A whole disk as clusters.
pub(crate) fn clusters(disk: &[u8]) -> BTreeMap<usize, Vec<u8>> {
    disk.chunks(CLUSTER).map(<[u8]>::to_vec).enumerate().collect()
}

fn be(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    Some(bytes.get(at..at + len)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// The backing file in the header.
pub(crate) fn backing_name(bytes: &[u8]) -> Option<&str> {
    let (at, len) = (be(bytes, 8, 8)? as usize, be(bytes, 16, 4)? as usize);
    if be(bytes, 0, 4)? != MAGIC || at == 0 {
        return None;
    }
    std::str::from_utf8(bytes.get(at..at.checked_add(len)?)?).ok()
}

/// The name of its backing file that an image at `path` bears, if it does.
pub(crate) fn backing_file(path: &Path, bytes: &[u8]) -> Option<PathBuf> {
    if is_raw(path) {
        return None;
    }
    let name = backing_name(bytes)?;
    let Some(json) = name.strip_prefix("json:") else { return Some(name.into()) };
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    Some(value["file"]["filename"].as_str()?.into())
}

/// The files of an image's chain, top first; `None` if one is missing.
pub(crate) fn chain(seen: &Seen, path: &Path) -> Option<Vec<PathBuf>> {
    let mut found = vec![path.to_path_buf()];
    for _ in 0..MAX_DEPTH {
        let last = found.last()?;
        let file = seen.files.get(last)?;
        if is_raw(last) || (be(&file.bytes, 0, 4)? == MAGIC && be(&file.bytes, 8, 8)? == 0) {
            return Some(found);
        }
        found.push(file.backing.clone()?);
    }
    None
}

/// The disk that a file shows; `None` if it or a file below makes no sense.
pub(crate) fn disk(seen: &Seen, path: &Path) -> Option<Vec<u8>> {
    let chain = chain(seen, path)?;
    let mut disk = Vec::new();
    for path in chain.iter().rev() {
        let bytes = &seen.files.get(path)?.bytes;
        if is_raw(path) {
            disk.clone_from(&**bytes);
        } else {
            lay_over(&mut disk, bytes)?;
        }
    }
    Some(disk)
}

/// The bytes of a layer over those below it, marked as dirty or not. Standard and zero clusters: the model's
/// images have no others.
fn lay_over(disk: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    let (cluster_bits, size, version) = (be(bytes, 20, 4)?, be(bytes, 24, 8)?, be(bytes, 4, 4)?);
    if version != 3 || !(9..=21).contains(&cluster_bits) || size > 1 << 20 || be(bytes, 72, 8)? & !1 != 0 {
        return None;
    }
    let mut whole = vec![0; size as usize];
    let kept = disk.len().min(whole.len());
    whole[..kept].copy_from_slice(&disk[..kept]);
    *disk = whole;
    let cluster = 1 << cluster_bits;
    let (l1, per_table) = (be(bytes, 40, 8)?, cluster as u64 / 8);
    for (number, part) in disk.chunks_mut(cluster).enumerate() {
        let number = number as u64;
        let table = be(bytes, (l1 + number / per_table * 8) as usize, 8)? & 0x00FF_FFFF_FFFF_FE00;
        if table == 0 {
            continue;
        }
        let entry = be(bytes, (table + number % per_table * 8) as usize, 8)?;
        let host = (entry & 0x00FF_FFFF_FFFF_FE00) as usize;
        if entry & 1 != 0 {
            part.fill(0);
        } else if host != 0 {
            part.copy_from_slice(bytes.get(host..host + part.len())?);
        }
    }
    Some(())
}

/// Whether both show the same, but for zeroes at the end.
pub(crate) fn is_same_disk(have: &[u8], want: &[u8]) -> bool {
    let common = have.len().min(want.len());
    let is_zero = |bytes: &[u8]| are_zero(&bytes[common..]);
    have[..common] == want[..common] && is_zero(have) && is_zero(want)
}
