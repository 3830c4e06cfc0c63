//! The reader for each content.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::content::VolumeContent;
use super::ext::Ext;
use super::fat::Fat;
use super::{FileSystem, Source};

/// Opens the file system of a volume that holds `content`. `Unsupported` if it has no reader.
pub fn open(content: VolumeContent, source: Arc<dyn Source>) -> Result<Arc<dyn FileSystem>> {
    match content {
        VolumeContent::Ext2 | VolumeContent::Ext3 | VolumeContent::Ext4 => Ok(Arc::new(Ext::open(source)?)),
        VolumeContent::Fat12 | VolumeContent::Fat16 | VolumeContent::Fat32 => {
            Ok(Arc::new(Fat::open(source)?))
        }
        _ => {
            let problem = content.problem().unwrap_or_else(|| format!("{} has no reader", content.name()));
            Err(Error::new(ErrorKind::Unsupported, problem))
        }
    }
}
