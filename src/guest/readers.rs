//! Which contents have a reader, and how it is opened.
//!
//! A new guest file system is a module beside this one, and a row of [`READERS`].

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::btrfs::Btrfs;
use super::content::VolumeContent;
use super::ext::Ext;
use super::fat::Fat;
use super::volumes::Assembly;
use super::xfs::Xfs;
use super::{FileSystem, Source};

/// The top level of a volume is shown beside it with its name and this suffix, where the volume shows another
/// tree.
pub const TOP_LEVEL_SUFFIX: &str = ".subvolumes";

/// The reader of some contents.
pub struct Reader {
    /// The contents that it reads.
    pub contents: &'static [VolumeContent],
    /// Which volumes it is opened from.
    pub sources: SourceSet,
    /// Opens it. There is at least one source, and the result has at least one tree.
    pub open: OpenTrees,
}

/// Opens a file system from its sources.
pub type OpenTrees = fn(&[Arc<dyn Source>]) -> Result<Vec<Subvolume>>;

/// Which volumes a file system is opened from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceSet {
    /// The one volume.
    Single,
    /// All volumes and devices of other disks with the same content and UUID: the one volume is the first.
    SameUuid,
}

/// One tree of files of a file system. The first is shown as the volume.
pub struct Subvolume {
    /// Its path from the top level: the tree that has all others in it, whose own path is empty. `None` if it
    /// is unknown.
    pub path: Option<Vec<u8>>,
    /// Its number: the value of `subvolid=` in an fstab.
    pub id: u64,
    /// Its files.
    pub files: Arc<dyn FileSystem>,
}

impl Subvolume {
    /// The index of the top level among the trees of a file system; that of the first if it is not known.
    pub fn top_level(trees: &[Self]) -> usize {
        trees.iter().position(|tree| tree.path.as_deref() == Some(b"")).unwrap_or(0)
    }

    /// The only tree of a file system.
    fn only(files: impl FileSystem + 'static) -> Vec<Self> {
        vec![Self { path: Some(Vec::new()), id: 0, files: Arc::new(files) }]
    }
}

impl std::fmt::Debug for Subvolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subvolume").field("path", &self.path).finish_non_exhaustive()
    }
}

/// All readers.
pub const READERS: &[Reader] = &[
    Reader {
        contents: &[VolumeContent::Ext2, VolumeContent::Ext3, VolumeContent::Ext4],
        sources: SourceSet::Single,
        open: |sources| Ok(Subvolume::only(Ext::open(Arc::clone(&sources[0]))?)),
    },
    Reader {
        contents: &[VolumeContent::Fat12, VolumeContent::Fat16, VolumeContent::Fat32],
        sources: SourceSet::Single,
        open: |sources| Ok(Subvolume::only(Fat::open(Arc::clone(&sources[0]))?)),
    },
    Reader {
        contents: &[VolumeContent::Xfs],
        sources: SourceSet::Single,
        open: |sources| Ok(Subvolume::only(Xfs::open(Arc::clone(&sources[0]))?)),
    },
    Reader { contents: &[VolumeContent::Btrfs], sources: SourceSet::SameUuid, open: Btrfs::open },
];

impl Reader {
    /// The reader of a content, of `readers`.
    pub fn of(readers: &'static [Self], content: VolumeContent) -> Option<&'static Self> {
        readers.iter().find(|reader| reader.contents.contains(&content))
    }
}

/// Opens the trees of the file system on the volume with this index. `Unsupported` if it has no reader.
pub fn open(readers: &'static [Reader], index: usize, assembly: &Assembly) -> Result<Vec<Subvolume>> {
    let volumes = &assembly.layout.volumes;
    let volume = &volumes[index];
    let content = volume.content;
    let Some(reader) = Reader::of(readers, content) else {
        let problem = content.problem().unwrap_or_else(|| format!("{} has no reader", content.name()));
        return Err(Error::new(ErrorKind::Unsupported, problem));
    };
    let sources = match reader.sources {
        SourceSet::SameUuid => assembly.file_system_sources(index),
        SourceSet::Single => vec![assembly.source(index)],
    };
    let trees = (reader.open)(&sources)?;
    if trees.is_empty() {
        return Err(Error::new(ErrorKind::Corrupt, format!("{} without a tree of files", content.name())));
    }
    Ok(trees)
}
