//! A toy file system on two volumes, with two subvolumes and objects of 64 bits.

use super::*;
use crate::guest::volumes::{DiskPosition, Volume, VolumeLayout, VolumeMapping, VolumeSegment};
use crate::guest::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, Ino, RunKind, Statistics, Time,
};

/// The root of a tree, and its only file.
const ROOT: Ino = Ino(256);
const FILE: Ino = Ino(u64::MAX - 1);

/// A tree with one file, `a`, whose bytes are the first of each source.
struct ToyTree(Vec<Arc<dyn Source>>);

impl FileSystem for ToyTree {
    fn root(&self) -> Ino {
        ROOT
    }

    fn statistics(&self) -> Statistics {
        Statistics::default()
    }

    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        Ok((directory == ROOT && name == b"a").then_some(FILE))
    }

    fn list(&self, _directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        if from == 0 {
            each(DirectoryEntry { name: b"a".to_vec(), ino: FILE, kind: Some(FileKind::File), next: 1 });
        }
        Ok(())
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        let kind = if ino == FILE { FileKind::File } else { FileKind::Directory };
        let (time, size) = (Time::default(), self.0.len() as u64);
        Ok(FileAttributes {
            kind,
            mode: 0o444,
            uid: 0,
            gid: 0,
            size,
            blocks: 0,
            links: 1,
            device: (0, 0),
            accessed: time,
            modified: time,
            changed: time,
            created: None,
        })
    }

    fn read_link(&self, _ino: Ino) -> Result<Vec<u8>> {
        Err(Error::new(ErrorKind::Usage, "not a symbolic link"))
    }

    fn runs(&self, _ino: Ino, at: u64, len: u64, _most: usize) -> Result<Vec<FileRun>> {
        let len = len.min((self.0.len() as u64).saturating_sub(at));
        Ok((len > 0).then_some(FileRun { len, kind: RunKind::Opaque }).into_iter().collect())
    }

    fn read_at(&self, _ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        let sources = self.0.iter().skip(at as usize);
        sources
            .zip(buf.chunks_mut(1))
            .map(|(source, byte)| source.read_at(0, byte))
            .collect::<Result<Vec<()>>>()
            .map(|read| read.len())
    }

    fn extended_attributes(&self, _ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        Ok(Vec::new())
    }
}

const TOYS: &[Reader] = &[Reader {
    contents: &[VolumeContent::Btrfs],
    sources: SourceSet::SameUuid,
    open: |sources| {
        let tree = |path: &[u8], id| Subvolume {
            path: Some(path.to_vec()),
            id,
            files: Arc::new(ToyTree(sources.to_vec())),
        };
        Ok(vec![tree(b"home", 256), tree(b"", 5)])
    },
}];

fn volume(name: &str, disk: u32, content: VolumeContent, uuid: Option<&str>) -> Volume {
    let place = VolumeMapping::Linear(DiskPosition { disk, offset: 0 });
    Volume {
        name: name.to_owned(),
        size: 1,
        segments: vec![VolumeSegment { at: 0, len: 1, place }],
        content,
        label: None,
        uuid: uuid.map(str::to_owned),
        problem: None,
    }
}

#[test]
fn a_reader_gets_all_volumes_of_its_file_system_and_gives_several_trees() {
    let disks: Vec<Arc<dyn Source>> = [b'x', b'y', b'z'].map(|byte| Arc::new(vec![byte]) as _).to_vec();
    let volumes = vec![
        volume("p1", 2, VolumeContent::Btrfs, Some("one")),
        volume("p2", 1, VolumeContent::Btrfs, Some("another")),
        volume("p3", 0, VolumeContent::Btrfs, Some("one")),
        volume("p4", 0, VolumeContent::Xfs, Some("one")),
        volume("p5", 1, VolumeContent::Btrfs, None),
    ];
    let layout = VolumeLayout { volumes, ..VolumeLayout::default() };
    let assembly = Assembly::with_segments(layout, &disks);
    let read = |index: usize| {
        let trees = open(TOYS, index, &assembly)?;
        let paths: Vec<Option<&[u8]>> = trees.iter().map(|tree| tree.path.as_deref()).collect();
        assert_eq!(paths, [Some(&b"home"[..]), Some(b"")]);
        assert_eq!((Subvolume::top_level(&trees), Subvolume::top_level(&trees[..1])), (1, 0));
        let files = &trees[1].files;
        let file = files.lookup(files.root(), b"a")?.expect("its file");
        let mut bytes = vec![0; files.attributes(file)?.size as usize];
        files.read_at(file, 0, &mut bytes)?;
        Ok::<_, Error>(bytes)
    };
    assert_eq!((read(0).unwrap(), read(2).unwrap()), (b"zx".to_vec(), b"xz".to_vec()));
    assert_eq!((read(1).unwrap(), read(4).unwrap()), (b"y".to_vec(), b"y".to_vec()));
    assert_eq!(read(3).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn every_content_has_one_reader_or_a_reason_why_it_has_none() {
    let all: Vec<VolumeContent> = READERS.iter().flat_map(|reader| reader.contents).copied().collect();
    for (index, content) in all.iter().enumerate() {
        assert!(!all[index + 1..].contains(content), "{content} has two readers");
        assert_eq!(content.problem(), None);
    }
    assert!(VolumeContent::Bcachefs.problem().is_some());
}
