//! A reader of qcow2 and raw files that shares no code with the one under test: the bytes of a file once its
//! damage is undone.
//!
//! Knows standard clusters and zero clusters only: the model's images have no others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::damage::Damage;

/// No chain of the model is deeper.
const MAX_DEPTH: usize = 40;

/// Reads files of one store.
pub(crate) struct Reader<'a> {
    pub(crate) root: &'a Path,
    /// Damage by the file's name in the store.
    pub(crate) damage: &'a BTreeMap<String, Damage>,
}

/// Whether a file of the model is raw, by its name.
pub(crate) fn is_raw(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "raw")
}

fn be(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    Some(bytes.get(at..at + len)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

impl Reader<'_> {
    /// The current path of the file, and its bytes without the damage.
    fn file(&self, name: &str) -> Option<Vec<u8>> {
        let damage = self.damage.get(name);
        let path = self.root.join(damage.and_then(Damage::present_name).unwrap_or(name));
        let mut bytes = fs::read(path).ok()?;
        if let Some(damage) = damage {
            damage.undo_in(&mut bytes);
        }
        Some(bytes)
    }

    /// The name, in the store, of the file that `backing` names in a header at `name`.
    pub(crate) fn resolve(&self, name: &str, backing: &[u8]) -> Option<String> {
        let text = std::str::from_utf8(backing).ok()?;
        let text = match text.strip_prefix("json:") {
            Some(json) => {
                let value: serde_json::Value = serde_json::from_str(json).ok()?;
                value["file"]["filename"].as_str()?.to_owned()
            }
            None => text.to_owned(),
        };
        let from = self.root.join(name);
        let path: PathBuf = from.parent()?.join(text);
        // A link of the store leads to a file of it.
        let path = match fs::read_link(&path) {
            Ok(target) => path.parent()?.join(target),
            Err(_) => path,
        };
        let file = path.file_name()?.to_str()?.to_owned();
        Some(file)
    }

    /// The backing file in the header, if the file is qcow2.
    pub(crate) fn backing(&self, name: &str) -> Option<String> {
        let bytes = self.file(name)?;
        if be(&bytes, 0, 4)? != 0x5146_49FB || is_raw(name) {
            return None;
        }
        let (at, len) = (be(&bytes, 8, 8)? as usize, be(&bytes, 16, 4)? as usize);
        if at == 0 {
            return None;
        }
        self.resolve(name, bytes.get(at..at + len)?)
    }

    /// The disk that the file shows; `None` if it or a file below it is not there or makes no sense.
    pub(crate) fn disk(&self, name: &str) -> Option<Vec<u8>> {
        self.disk_within(name, MAX_DEPTH)
    }

    fn disk_within(&self, name: &str, depth: usize) -> Option<Vec<u8>> {
        let depth = depth.checked_sub(1)?;
        let bytes = self.file(name)?;
        if is_raw(name) {
            return Some(bytes);
        }
        if be(&bytes, 0, 4)? != 0x5146_49FB {
            return None;
        }
        let (cluster, size) = (1_u64 << be(&bytes, 20, 4)?, be(&bytes, 24, 8)?);
        let mut disk = match self.backing(name) {
            Some(backing) => self.disk_within(&backing, depth)?,
            None if be(&bytes, 8, 8)? == 0 => Vec::new(),
            None => return None,
        };
        disk.resize(size as usize, 0);
        let (l1, per_table) = (be(&bytes, 40, 8)?, cluster / 8);
        for (number, part) in disk.chunks_mut(cluster as usize).enumerate() {
            let number = number as u64;
            let entry = be(&bytes, (l1 + number / per_table * 8) as usize, 8)?;
            let table = entry & 0x00FF_FFFF_FFFF_FE00;
            if table == 0 {
                continue;
            }
            let entry = be(&bytes, (table + number % per_table * 8) as usize, 8)?;
            let host = (entry & 0x00FF_FFFF_FFFF_FE00) as usize;
            if entry & 1 != 0 {
                part.fill(0);
            } else if host != 0 {
                part.copy_from_slice(bytes.get(host..host + part.len())?);
            }
        }
        Some(disk)
    }
}
