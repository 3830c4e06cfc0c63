//! Which reader a content needs.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::content::Content;
use super::ext::Ext;
use super::fat::Fat;
use super::{FileSystem, Source};

/// Opens the file system of a volume that holds `content`. `Unsupported` if there is no reader for it.
pub fn open(content: Content, source: Arc<dyn Source>) -> Result<Arc<dyn FileSystem>> {
    match content {
        Content::Ext2 | Content::Ext3 | Content::Ext4 => Ok(Arc::new(Ext::open(source)?)),
        Content::Fat12 | Content::Fat16 | Content::Fat32 => Ok(Arc::new(Fat::open(source)?)),
        _ => {
            let problem = content.problem().unwrap_or_else(|| format!("{} has no reader", content.name()));
            Err(Error::new(ErrorKind::Unsupported, problem))
        }
    }
}
