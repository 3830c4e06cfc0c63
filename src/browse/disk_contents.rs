//! What one disk of a chain holds: its volumes, and the files in them.
//!
//! Answers come from a worker; bytes of files are read here, straight from the disk, wherever the worker says that they lie. Nothing that the worker
//! says is believed further than it can be: names are names, places lie within the disks of this set.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::chain::Origin;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::inspect::OperatingSystem;
use crate::guest::volumes::{Volume, VolumeLayout};
use crate::guest::{ExtendedAttribute, FileAttributes, FileRun, Ino, RunKind};
use crate::store::ViewId;

use super::disk::{BrowsedDisk, Digests, LeasedDisk};
use super::validate::{
    check_extended_attributes, check_ino, check_mounted, check_runs, check_systems, confused, usual,
};
use super::worker::protocol::{Answer, ChunkKey, READ_LEN, Request, VolumeId};
use super::worker::{Disks, Listing, Mounted, OpenedFile, Worker};

/// How often a set is opened for one question: it may have been put away for others each time, but not for ever.
const OPENINGS: usize = 8;
/// Bytes of a symbolic link's target, at most: what the kernel takes.
const LINK_LEN: usize = 4095;

/// What one disk holds.
pub struct DiskContents {
    pub(super) worker: Arc<Worker>,
    pub(super) digests: Arc<Digests>,
    pub(super) set: u32,
    /// The disk itself, and those others that its volume groups lie on.
    pub(super) disks: Vec<BrowsedDisk>,
    pub(super) layout: VolumeLayout,
    /// What should be known of how the disks were found.
    pub(super) remarks: Vec<String>,
    /// What has been asked of file systems as a whole, by volume.
    pub(super) mounted: Vec<Mutex<Option<Mounted>>>,
    pub(super) systems: OnceLock<Vec<OperatingSystem>>,
}

impl std::fmt::Debug for DiskContents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inside").field("id", self.id()).finish_non_exhaustive()
    }
}

/// Keeps the disks open, and locked, as long as it lives.
pub struct DiskLease {
    inside: Arc<DiskContents>,
}

impl std::fmt::Debug for DiskLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inside.fmt(f)
    }
}

impl Drop for DiskLease {
    fn drop(&mut self) {
        for disk in &self.inside.disks {
            disk.release();
        }
    }
}

/// The disks of a set, held from the first byte that is asked of each to the end of a conversation.
pub(super) struct Exchange<'a> {
    disks: &'a [BrowsedDisk],
    digests: &'a Digests,
    held: Mutex<Vec<Option<LeasedDisk<'a>>>>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(disks: &'a [BrowsedDisk], digests: &'a Digests) -> Self {
        Self { disks, digests, held: Mutex::new(disks.iter().map(|_| None).collect()) }
    }

    fn with<T>(&self, disk: u32, work: impl FnOnce(&LeasedDisk<'a>) -> Result<T>) -> Result<T> {
        let mut held = self.held.lock();
        let (Some(disk), Some(slot)) = (self.disks.get(disk as usize), held.get_mut(disk as usize)) else {
            return Err(Error::new(ErrorKind::Corrupt, "a volume lies on a disk that is not there"));
        };
        if slot.is_none() {
            *slot = Some(disk.hold()?);
        }
        work(slot.as_ref().expect("it was just put there"))
    }
}

impl Disks for Exchange<'_> {
    fn keys(&self, disk: u32, first: u64, count: u64) -> Result<Vec<ChunkKey>> {
        self.with(disk, |held| held.keys(self.digests, first, count))
    }

    fn read(&self, disk: u32, at: u64, buf: &mut [u8]) -> Result<()> {
        self.with(disk, |held| held.read_at(at, buf))
    }
}

impl DiskContents {
    /// Which disk this is the inside of.
    pub fn id(&self) -> &ViewId {
        self.disks[0].id()
    }

    /// Its partitions and volumes.
    pub fn layout(&self) -> &VolumeLayout {
        &self.layout
    }

    /// What should be known of them, a sentence each.
    pub fn remarks(&self) -> impl Iterator<Item = &String> {
        self.layout.remarks.iter().chain(&self.remarks)
    }

    /// The volume of that name, by index.
    pub fn volume(&self, name: &[u8]) -> Option<usize> {
        self.layout.volumes.iter().position(|volume| volume.name.as_bytes() == name)
    }

    /// Keeps the disks as they are, until that is dropped. `Stale` if they are no longer.
    pub fn hold(self: &Arc<Self>) -> Result<DiskLease> {
        for (index, disk) in self.disks.iter().enumerate() {
            if let Err(error) = disk.keep() {
                for kept in &self.disks[..index] {
                    kept.release();
                }
                return Err(error);
            }
        }
        Ok(DiskLease { inside: Arc::clone(self) })
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Vec<u8>)> {
        let session = Exchange::new(&self.disks, &self.digests);
        // The one that is told of the set is the one that is asked.
        let _kept = self.worker.hold()?;
        for _ in 0..OPENINGS {
            let answered = self.worker.ask(request, &session)?;
            if !matches!(answered.0, Answer::NoSuchSet) {
                return Ok(answered);
            }
            // Another process than the one that was told of it, or it has been put away for others.
            let sizes = self.disks.iter().map(BrowsedDisk::size).collect();
            match self.worker.ask(&Request::Open { set: self.set, sizes }, &session)?.0 {
                Answer::Layout(layout) if *layout == self.layout => {}
                Answer::Layout(_) => return Err(crate::store::stale("the disk's partitions have changed")),
                _ => return Err(confused()),
            }
        }
        Err(confused())
    }

    fn id_of(&self, volume: usize) -> VolumeId {
        VolumeId { set: self.set, volume: volume as u32 }
    }

    fn described(&self, volume: usize) -> Result<&Volume> {
        let described = &self.layout.volumes[volume];
        match &described.problem {
            Some(problem) => {
                Err(Error::new(ErrorKind::Unsupported, format!("{} cannot be looked into: {problem}", described.name)))
            }
            None => Ok(described),
        }
    }

    /// What is known of a volume's file system as a whole.
    pub fn mount(&self, volume: usize) -> Result<Mounted> {
        self.described(volume)?;
        if let Some(known) = &*self.mounted[volume].lock() {
            return Ok(known.clone());
        }
        match self.ask(&Request::Mount(self.id_of(volume)))?.0 {
            Answer::Mounted(mounted) => {
                check_mounted(&mounted)?;
                Ok(self.mounted[volume].lock().insert(mounted).clone())
            }
            _ => Err(confused()),
        }
    }

    /// Why what is shown of volumes is not what was written last, as far as they have been asked: name and sentence.
    pub fn stale(&self) -> Vec<(&str, String)> {
        let volumes = self.layout.volumes.iter().zip(&self.mounted);
        let stale =
            volumes.filter_map(|(volume, mounted)| Some((&*volume.name, mounted.lock().as_ref()?.stale.clone())));
        stale.flat_map(|(name, all)| all.into_iter().map(move |sentence| (name, sentence))).collect()
    }

    /// The operating systems that the volumes hold; the first is the one to show where one is wanted.
    pub fn operating_systems(&self) -> Result<&[OperatingSystem]> {
        if let Some(known) = self.systems.get() {
            return Ok(known);
        }
        match self.ask(&Request::Inspect(self.set))?.0 {
            Answer::OperatingSystems(mut found) => {
                // Their volumes become targets of links.
                found.retain(|system| self.volume(system.volume.as_bytes()).is_some());
                check_systems(&found, self.layout.volumes.len())?;
                Ok(self.systems.get_or_init(|| found))
            }
            _ => Err(confused()),
        }
    }

    /// The same, if that has been asked before: nobody has to wait.
    pub fn known_operating_systems(&self) -> Option<&[OperatingSystem]> {
        self.systems.get().map(Vec::as_slice)
    }

    /// What a name in a directory stands for.
    pub fn lookup(&self, volume: usize, directory: Ino, name: &[u8]) -> Result<Option<(Ino, FileAttributes)>> {
        match self.ask(&Request::Lookup(self.id_of(volume), directory, name.to_vec()))?.0 {
            Answer::Found(found) => {
                if let Some((ino, _)) = found {
                    check_ino(ino)?;
                }
                Ok(found)
            }
            _ => Err(confused()),
        }
    }

    /// Entries of a directory from a place on (0: the beginning; else some entry's `next`).
    pub fn list(&self, volume: usize, directory: Ino, from: u64) -> Result<Listing> {
        match self.ask(&Request::List(self.id_of(volume), directory, from))?.0 {
            Answer::Listed(listing) => usual(listing, from),
            _ => Err(confused()),
        }
    }

    /// What stat(2) says.
    pub fn attributes(&self, volume: usize, ino: Ino) -> Result<FileAttributes> {
        match self.ask(&Request::Attributes(self.id_of(volume), ino))?.0 {
            Answer::Attributes(attributes) => Ok(attributes),
            _ => Err(confused()),
        }
    }

    /// The target of a symbolic link, as the guest has it.
    pub fn read_link(&self, volume: usize, ino: Ino) -> Result<Vec<u8>> {
        match self.ask(&Request::ReadLink(self.id_of(volume), ino))?.0 {
            Answer::Link(target) if target.is_empty() || target.len() > LINK_LEN || target.contains(&0) => {
                Err(Error::new(ErrorKind::Corrupt, "a symbolic link with a target that no link can have"))
            }
            Answer::Link(target) => Ok(target),
            _ => Err(confused()),
        }
    }

    /// All extended attributes, as the guest's kernel lists them.
    pub fn extended_attributes(&self, volume: usize, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        match self.ask(&Request::ExtendedAttributes(self.id_of(volume), ino))?.0 {
            Answer::ExtendedAttributes(found) => {
                check_extended_attributes(&found)?;
                Ok(found)
            }
            _ => Err(confused()),
        }
    }

    /// Size of a regular file, and where its first bytes are.
    pub fn open_file(&self, volume: usize, ino: Ino) -> Result<OpenedFile> {
        match self.ask(&Request::OpenFile(self.id_of(volume), ino))?.0 {
            Answer::OpenedFile(opened) => {
                check_runs(0, &opened.runs)?;
                Ok(opened)
            }
            _ => Err(confused()),
        }
    }

    /// Where the bytes of a file are, from `at` on, up to `at + len` or the end of the file, or for as many runs as one
    /// answer holds. Empty at and beyond the end.
    pub fn runs(&self, volume: usize, ino: Ino, at: u64, len: u64) -> Result<Vec<FileRun>> {
        match self.ask(&Request::Runs(self.id_of(volume), ino, at, len))?.0 {
            Answer::Runs(runs) => {
                check_runs(at, &runs)?;
                Ok(runs)
            }
            _ => Err(confused()),
        }
    }

    /// Reads a range of a file that is one run of `kind`.
    pub fn read_run(&self, volume: usize, ino: Ino, at: u64, kind: RunKind, buf: &mut [u8]) -> Result<()> {
        match kind {
            RunKind::Hole => {
                buf.fill(0);
                Ok(())
            }
            RunKind::Stored(offset) => self.read_volume(volume, offset, buf),
            RunKind::Asked => self.read_asked(volume, ino, at, buf),
        }
    }

    fn read_asked(&self, volume: usize, ino: Ino, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let len = (buf.len() - done).min(READ_LEN);
            let request = Request::Read(self.id_of(volume), ino, at + done as u64, len as u32);
            match self.ask(&request)? {
                (Answer::Bytes, bytes) if !bytes.is_empty() && bytes.len() <= len => {
                    buf[done..done + bytes.len()].copy_from_slice(&bytes);
                    done += bytes.len();
                }
                _ => return Err(confused()),
            }
        }
        Ok(())
    }

    /// Reads bytes of a volume.
    pub fn read_volume(&self, volume: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        let session = Exchange::new(&self.disks, &self.digests);
        let described = &self.layout.volumes[volume];
        let mut done = 0;
        while done < buf.len() {
            let here = at.checked_add(done as u64).ok_or_else(confused)?;
            let Some(stretch) = described.locate(here, (buf.len() - done) as u64) else {
                let fact = format!("{} has nothing at {here:#x}", described.name);
                return Err(Error::new(ErrorKind::Corrupt, fact));
            };
            let end = done + stretch.len as usize;
            session.read(stretch.disk, stretch.offset, &mut buf[done..end])?;
            done = end;
        }
        Ok(())
    }

    /// Where the bytes of a volume from `at` on come from, and for how many of `max` that holds; `None` where only
    /// reading can tell. `Corrupt` where the volume has nothing.
    pub fn origin(&self, volume: usize, at: u64, max: u64) -> Result<(Option<Origin>, u64)> {
        let described = &self.layout.volumes[volume];
        let stretch = described.locate(at, max);
        let found = stretch.and_then(|stretch| Some((stretch, self.disks.get(stretch.disk as usize)?)));
        let Some((stretch, disk)) = found else {
            return Err(Error::new(ErrorKind::Corrupt, format!("{} has nothing at {at:#x}", described.name)));
        };
        let origin = disk.hold()?.origin(stretch.offset, stretch.len)?;
        let len = origin.map_or(stretch.len, |origin| origin.len);
        Ok((origin, len))
    }

    /// Whether this is still what the disks hold, for somebody who is about to look into them.
    pub(super) fn is_good(&self) -> bool {
        self.disks.iter().all(BrowsedDisk::is_good)
    }

    /// Whether nothing has been changed since it was looked into first.
    pub(super) fn is_unchanged(&self) -> bool {
        self.disks.iter().all(BrowsedDisk::is_unchanged)
    }

    /// Lets go of what costs others something, after a while without use.
    pub(super) fn rest(&self) {
        self.disks.iter().for_each(BrowsedDisk::rest);
    }
}

#[cfg(test)]
impl DiskContents {
    /// That of a disk with one volume, of which everything is known that is asked when it is shown.
    pub(crate) fn with_one_volume(store: &Arc<crate::store::Store>, id: &ViewId) -> Arc<Self> {
        use crate::guest::{Statistics, content::VolumeContent};
        let volume = Volume {
            name: "disk".into(),
            size: 0,
            segments: Vec::new(),
            content: VolumeContent::Ext4,
            label: None,
            uuid: None,
            problem: None,
        };
        let mounted =
            Mounted { root: Ino(2), statistics: Statistics::default(), remarks: Vec::new(), stale: Vec::new() };
        Arc::new(Self {
            worker: Worker::new(&super::Pool::new(super::WorkerProgram::this(true), store.descriptors())),
            digests: Arc::new(Digests::new()),
            set: 0,
            disks: vec![BrowsedDisk::new(store, id, &Arc::default()).expect("a disk")],
            layout: VolumeLayout { volumes: vec![volume], ..VolumeLayout::default() },
            remarks: Vec::new(),
            mounted: vec![Mutex::new(Some(mounted))],
            systems: OnceLock::new(),
        })
    }
}
