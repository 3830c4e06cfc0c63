//! Extended attributes. Their names and values are stored as the kernel shows them.

use crate::error::Result;
use crate::guest::filesystem::ExtendedAttribute;

use super::entry::Entry;
use super::format::{Key, corrupt, kind, limit};
use super::{Shared, about};

/// Bytes of all attributes of an inode at most.
const MAX_LEN: usize = 16 << 20;

impl Shared {
    pub(super) fn xattrs(&self, subvolume: usize, object: u64) -> Result<Vec<ExtendedAttribute>> {
        let mut found = Vec::new();
        let mut len = 0;
        for item in self.tree(subvolume).items_beside(&self.nodes, Key::new(object, kind::XATTR, 0)) {
            let item = item.map_err(about(object))?;
            for entry in Entry::all(item.data()) {
                let entry = entry.filter(|entry| !entry.name.is_empty() && !entry.name.contains(&0));
                let Some(entry) = entry else {
                    return Err(corrupt(format!("inode {object} has a damaged extended attribute")));
                };
                len += entry.name.len() + entry.value.len() + size_of::<ExtendedAttribute>();
                if len > MAX_LEN {
                    return Err(limit(format!("inode {object} has too many extended attributes")));
                }
                let (name, value) = (entry.name.to_vec(), entry.value.to_vec());
                found.push(ExtendedAttribute { name, value });
            }
        }
        Ok(found)
    }
}
