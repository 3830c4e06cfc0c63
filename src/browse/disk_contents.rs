//! The content of one disk of a chain: its volumes, and the files in them.
//!
//! Answers come from a worker. Bytes of files are read here, directly from the disk, at the positions that
//! the worker reports. The worker is not trusted: names and positions are validated.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::chain::Origin;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::content::VolumeContent;
use crate::guest::inspect::OperatingSystem;
use crate::guest::luks::{CipherId, ContainerKeys, Decryptor, Unlocked};
use crate::guest::volumes::{ContainerPosition, OpenContainer, RunPlace, Volume, VolumeLayout};
use crate::guest::{ExtendedAttribute, FileAttributes, FileRun, Ino, RunKind, TOP_LEVEL_SUFFIX, TreeId};
use crate::store::ViewId;

use super::disk::{BrowsedDisk, Digests, LeasedDisk};
use super::validate::{
    check_extended_attributes, check_mounted, check_runs, check_systems, protocol_violation, sanitise_listing,
};
use super::worker::protocol::{Answer, ChunkKey, READ_LEN, Request, SetTree};
use super::worker::{Disks, FoundEntry, Listing, Mounted, OpenedFile, Worker};

/// How often a set is opened for one request: the worker may have evicted it each time, but not forever.
const OPENINGS: usize = 8;
/// Bytes of a symbolic link's target at most; the kernel's limit.
const LINK_LEN: usize = 4095;

/// The content of one disk.
pub struct DiskContents {
    pub(super) worker: Arc<Worker>,
    pub(super) digests: Arc<Digests>,
    pub(super) set: u32,
    /// The disk itself, and the other disks of its volume groups and arrays.
    pub(super) disks: Vec<BrowsedDisk>,
    /// The keys of its encrypted volumes, and the version of the table that they are of.
    pub(super) keys: (ContainerKeys, u64),
    /// Those of the layout's containers.
    pub(super) decryptors: Vec<Decryptor>,
    pub(super) layout: VolumeLayout,
    /// Facts about how the disks were found that the user should know.
    pub(super) remarks: Vec<String>,
    /// The answers about whole file systems so far, by volume.
    pub(super) mounted: Vec<Mutex<Option<Mounted>>>,
    pub(super) systems: OnceLock<Vec<OperatingSystem>>,
}

impl std::fmt::Debug for DiskContents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskContents").field("id", self.id()).finish_non_exhaustive()
    }
}

/// The origin of bytes of a volume: equal ones are of equal bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeOrigin {
    /// Where the stored bytes come from.
    pub origin: Origin,
    /// How they are decrypted: the cipher, the number of the first byte's sector, and that byte in it.
    pub cipher: Option<(CipherId, u64, u64)>,
}

/// How the opened containers of a layout are decrypted.
pub(super) fn decryptors(layout: &VolumeLayout, keys: &ContainerKeys) -> Result<Vec<Decryptor>> {
    let of = |container: &OpenContainer| match keys.get(container.id) {
        Some(Unlocked::Keys(keys)) => Decryptor::new(&container.data, keys).map_err(|_| protocol_violation()),
        _ => Err(protocol_violation()),
    };
    layout.containers.iter().map(of).collect()
}

/// Keeps the disks open, and locked, until it is dropped.
pub struct DiskLease {
    contents: Arc<DiskContents>,
}

impl std::fmt::Debug for DiskLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.contents.fmt(f)
    }
}

impl Drop for DiskLease {
    fn drop(&mut self) {
        for disk in &self.contents.disks {
            disk.release();
        }
    }
}

/// The disks of a set during one exchange with the worker: each is leased from its first use to the end.
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
            return Err(Error::new(ErrorKind::Corrupt, "a volume is on a disk that does not exist"));
        };
        if slot.is_none() {
            *slot = Some(disk.lease()?);
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
    /// The requested disk.
    pub fn id(&self) -> &ViewId {
        self.disks[0].id()
    }

    /// Its partitions and volumes.
    pub fn layout(&self) -> &VolumeLayout {
        &self.layout
    }

    /// Facts about them that the user should know, one sentence each.
    pub fn remarks(&self) -> impl Iterator<Item = &String> {
        self.layout.remarks.iter().chain(&self.remarks)
    }

    /// The index of the volume with this name.
    pub fn volume(&self, name: &[u8]) -> Option<usize> {
        self.layout.volumes.iter().position(|volume| volume.name.as_bytes() == name)
    }

    /// The tree that has all others of a volume in it, if that is not the one that is shown as the volume.
    pub fn top_level(&self, volume: usize) -> Result<Option<TreeId>> {
        let subvolume = self.mount(TreeId::main(volume))?.trees.top_level;
        Ok(subvolume.map(|subvolume| TreeId { volume, subvolume }))
    }

    /// The volume whose top level has this name: `VOLUME.subvolumes`. A volume of that name has precedence.
    pub fn volume_of_top_level(&self, name: &[u8]) -> Option<usize> {
        if self.volume(name).is_some() {
            return None;
        }
        self.volume(name.strip_suffix(TOP_LEVEL_SUFFIX.as_bytes())?)
    }

    /// Leases the disks until the result is dropped. `Stale` if their point in time is no longer known.
    pub fn lease(self: &Arc<Self>) -> Result<DiskLease> {
        for (index, disk) in self.disks.iter().enumerate() {
            if let Err(error) = disk.acquire() {
                for leased in &self.disks[..index] {
                    leased.release();
                }
                return Err(error);
            }
        }
        Ok(DiskLease { contents: Arc::clone(self) })
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Vec<u8>)> {
        let exchange = Exchange::new(&self.disks, &self.digests);
        // The process that receives `Open` must also receive the request.
        let _hold = self.worker.hold()?;
        for _ in 0..OPENINGS {
            let answered = self.worker.ask(request, &exchange)?;
            if !matches!(answered.0, Answer::NoSuchSet) {
                return Ok(answered);
            }
            // The set was opened in another process, or it was evicted.
            let sizes = self.disks.iter().map(BrowsedDisk::size).collect();
            let request = Request::Open { set: self.set, sizes, keys: self.keys.0.clone() };
            match self.worker.ask(&request, &exchange)?.0 {
                Answer::Layout(layout) if *layout == self.layout => {}
                Answer::Layout(_) => return Err(crate::store::stale("the disk's partitions have changed")),
                _ => return Err(protocol_violation()),
            }
        }
        Err(protocol_violation())
    }

    fn id_of(&self, tree: TreeId) -> SetTree {
        SetTree { set: self.set, tree }
    }

    fn described(&self, volume: usize) -> Result<&Volume> {
        let described = &self.layout.volumes[volume];
        match &described.problem {
            Some(problem) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the files of {} cannot be shown: {problem}", described.name),
            )),
            None => Ok(described),
        }
    }

    /// The root, the statistics and the remarks of a tree.
    pub fn mount(&self, tree: TreeId) -> Result<Mounted> {
        self.described(tree.volume)?;
        // What the main tree says is said of the volume.
        let known = (tree.subvolume == 0).then(|| &self.mounted[tree.volume]);
        if let Some(known) = known.and_then(|known| known.lock().clone()) {
            return Ok(known);
        }
        match self.ask(&Request::Mount(self.id_of(tree)))?.0 {
            Answer::Mounted(mounted) => {
                check_mounted(&mounted)?;
                if let Some(known) = known {
                    *known.lock() = Some(mounted.clone());
                }
                Ok(mounted)
            }
            _ => Err(protocol_violation()),
        }
    }

    /// Why the shown state of volumes is not the last one, as far as they have been mounted: name and
    /// sentence.
    pub fn stale(&self) -> Vec<(&str, String)> {
        let volumes = self.layout.volumes.iter().zip(&self.mounted);
        let stale = volumes
            .filter_map(|(volume, mounted)| Some((&*volume.name, mounted.lock().as_ref()?.stale.clone())));
        stale.flat_map(|(name, all)| all.into_iter().map(move |sentence| (name, sentence))).collect()
    }

    /// The operating systems on the volumes. Callers that show only one show the first.
    pub fn operating_systems(&self) -> Result<&[OperatingSystem]> {
        if let Some(known) = self.systems.get() {
            return Ok(known);
        }
        match self.ask(&Request::Inspect(self.set))?.0 {
            Answer::OperatingSystems(mut found) => {
                check_systems(&mut found, &self.layout)?;
                Ok(self.systems.get_or_init(|| found))
            }
            _ => Err(protocol_violation()),
        }
    }

    /// The same if they are known already, without waiting.
    pub fn known_operating_systems(&self) -> Option<&[OperatingSystem]> {
        self.systems.get().map(Vec::as_slice)
    }

    /// What a name in a directory means.
    pub fn lookup(&self, tree: TreeId, directory: Ino, name: &[u8]) -> Result<Option<FoundEntry>> {
        match self.ask(&Request::Lookup(self.id_of(tree), directory, name.to_vec()))?.0 {
            Answer::Found(found) => Ok(found),
            _ => Err(protocol_violation()),
        }
    }

    /// Entries of a directory from a position on (0: the beginning; else some entry's `next`).
    pub fn list(&self, tree: TreeId, directory: Ino, from: u64) -> Result<Listing> {
        match self.ask(&Request::List(self.id_of(tree), directory, from))?.0 {
            Answer::Listed(listing) => sanitise_listing(listing, from),
            _ => Err(protocol_violation()),
        }
    }

    /// The stat(2) attributes.
    pub fn attributes(&self, tree: TreeId, ino: Ino) -> Result<FileAttributes> {
        match self.ask(&Request::Attributes(self.id_of(tree), ino))?.0 {
            Answer::Attributes(attributes) => Ok(attributes),
            _ => Err(protocol_violation()),
        }
    }

    /// The target of a symbolic link, as the guest has it.
    pub fn read_link(&self, tree: TreeId, ino: Ino) -> Result<Vec<u8>> {
        match self.ask(&Request::ReadLink(self.id_of(tree), ino))?.0 {
            Answer::Link(target) if target.is_empty() || target.len() > LINK_LEN || target.contains(&0) => {
                Err(Error::new(ErrorKind::Corrupt, "a symbolic link with an invalid target"))
            }
            Answer::Link(target) => Ok(target),
            _ => Err(protocol_violation()),
        }
    }

    /// All extended attributes, as the guest's kernel lists them.
    pub fn extended_attributes(&self, tree: TreeId, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        match self.ask(&Request::ExtendedAttributes(self.id_of(tree), ino))?.0 {
            Answer::ExtendedAttributes(found) => {
                check_extended_attributes(&found)?;
                Ok(found)
            }
            _ => Err(protocol_violation()),
        }
    }

    /// The size of a regular file, and its first runs.
    pub fn open_file(&self, tree: TreeId, ino: Ino) -> Result<OpenedFile> {
        match self.ask(&Request::OpenFile(self.id_of(tree), ino))?.0 {
            Answer::OpenedFile(opened) => {
                check_runs(0, &opened.runs)?;
                Ok(opened)
            }
            _ => Err(protocol_violation()),
        }
    }

    /// The runs of a file from `at` on, up to `at + len` or the end of the file, or as many as one answer
    /// holds. Empty at and beyond the end.
    pub fn runs(&self, tree: TreeId, ino: Ino, at: u64, len: u64) -> Result<Vec<FileRun>> {
        match self.ask(&Request::Runs(self.id_of(tree), ino, at, len))?.0 {
            Answer::Runs(runs) => {
                check_runs(at, &runs)?;
                Ok(runs)
            }
            _ => Err(protocol_violation()),
        }
    }

    /// Reads a range of a file that is one run of `kind`.
    pub fn read_run(&self, tree: TreeId, ino: Ino, at: u64, kind: RunKind, buf: &mut [u8]) -> Result<()> {
        match kind {
            RunKind::Hole => {
                buf.fill(0);
                Ok(())
            }
            RunKind::Stored(offset) => self.read_volume(tree.volume, offset, buf),
            RunKind::Verified(_) | RunKind::Opaque => self.read_by_worker(tree, ino, at, buf),
        }
    }

    fn read_by_worker(&self, tree: TreeId, ino: Ino, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let len = (buf.len() - done).min(READ_LEN);
            let request = Request::Read(self.id_of(tree), ino, at + done as u64, len as u32);
            match self.ask(&request)? {
                (Answer::Bytes, bytes) if !bytes.is_empty() && bytes.len() <= len => {
                    buf[done..done + bytes.len()].copy_from_slice(&bytes);
                    done += bytes.len();
                }
                _ => return Err(protocol_violation()),
            }
        }
        Ok(())
    }

    /// Reads bytes of a volume: from the disks where they lie there unchanged, and else by the worker.
    pub fn read_volume(&self, volume: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        let exchange = Exchange::new(&self.disks, &self.digests);
        let described = &self.layout.volumes[volume];
        let mut done = 0;
        while done < buf.len() {
            let here = at.checked_add(done as u64).ok_or_else(protocol_violation)?;
            let Some(run) = described.locate(here, (buf.len() - done) as u64) else {
                let fact = format!("{} has no bytes at {here:#x}", described.name);
                return Err(Error::new(ErrorKind::Corrupt, fact));
            };
            let end = done + run.len as usize;
            let piece = &mut buf[done..end];
            match run.place {
                RunPlace::Disk(position) => exchange.read(position.disk, position.offset, piece)?,
                RunPlace::Zero => piece.fill(0),
                RunPlace::Encrypted(position) => {
                    let (decryptor, below) = self.container(position)?;
                    decryptor
                        .read_at(position.offset, piece, &mut |at, buf| self.read_volume(below, at, buf))?;
                }
                RunPlace::Computed => self.read_computed(volume, here, piece)?,
            }
            done = end;
        }
        Ok(())
    }

    /// The decryptor of a container, and the index of its volume, which is below those of the volumes in it.
    fn container(&self, position: ContainerPosition) -> Result<(&Decryptor, usize)> {
        let number = position.container as usize;
        let (decryptor, container) = (self.decryptors.get(number), self.layout.containers.get(number));
        Ok((decryptor.ok_or_else(protocol_violation)?, container.ok_or_else(protocol_violation)?.volume))
    }

    fn read_computed(&self, volume: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        for (index, part) in buf.chunks_mut(READ_LEN).enumerate() {
            let at = at.checked_add((index * READ_LEN) as u64).ok_or_else(protocol_violation)?;
            let request = Request::ReadVolume(self.set, volume as u32, at, part.len() as u32);
            match self.ask(&request)? {
                (Answer::Bytes, bytes) if bytes.len() == part.len() => part.copy_from_slice(&bytes),
                _ => return Err(protocol_violation()),
            }
        }
        Ok(())
    }

    /// The origin of the bytes of a volume from `at` on, and the number of bytes (of `max`) that share it;
    /// `None` where it is unknown without reading. `Corrupt` where the volume has no bytes.
    pub fn origin(&self, volume: usize, at: u64, max: u64) -> Result<(Option<VolumeOrigin>, u64)> {
        let plain = |origin| VolumeOrigin { origin, cipher: None };
        let described = &self.layout.volumes[volume];
        let absent = || {
            let fact = format!("{} has no bytes at {at:#x}", described.name);
            Error::new(ErrorKind::Corrupt, fact)
        };
        let run = described.locate(at, max).ok_or_else(absent)?;
        match run.place {
            RunPlace::Disk(position) => {
                let disk = self.disks.get(position.disk as usize).ok_or_else(absent)?;
                let origin = disk.lease()?.origin(position.offset, run.len)?;
                Ok((origin.map(plain), origin.map_or(run.len, |origin| origin.len)))
            }
            RunPlace::Zero => {
                let zero = Origin { image: 0, place: 0, within: None, len: run.len };
                Ok((Some(plain(zero)), run.len))
            }
            RunPlace::Encrypted(position) => self.encrypted_origin(position, run.len),
            RunPlace::Computed => Ok((None, run.len)),
        }
    }

    /// The same for bytes of a container's data. What whole sectors come from is known, or nothing.
    fn encrypted_origin(&self, position: ContainerPosition, max: u64) -> Result<(Option<VolumeOrigin>, u64)> {
        let (decryptor, below) = self.container(position)?;
        let place = decryptor.place(position.offset).ok_or_else(protocol_violation)?;
        let Some((id, sector_len, number)) = place.cipher else {
            return self.origin(below, place.start, max.min(place.len));
        };
        let needed = (place.into + max).next_multiple_of(sector_len).min(place.len);
        let (origin, len) = self.origin(below, place.start, needed)?;
        let whole = len - len % sector_len;
        match origin {
            Some(VolumeOrigin { origin, cipher: None }) if whole > 0 => {
                let cipher = Some((id, number, place.into));
                Ok((Some(VolumeOrigin { origin, cipher }), (whole - place.into).min(max)))
            }
            _ => Ok((None, (len.max(sector_len) - place.into).min(max))),
        }
    }

    /// Whether it is opened with the keys of this version of the table, or needs none.
    pub(super) fn has_keys_of(&self, version: u64) -> bool {
        let is_encrypted =
            |volume: &Volume| matches!(volume.content, VolumeContent::Luks1 | VolumeContent::Luks2);
        self.keys.1 == version || !self.layout.volumes.iter().any(is_encrypted)
    }

    /// Whether the disks' point in time is still known, for a new client.
    pub(super) fn is_valid(&self) -> bool {
        self.disks.iter().all(BrowsedDisk::is_valid)
    }

    /// Whether the disks are the same as at their point in time.
    pub(super) fn is_unchanged(&self) -> bool {
        self.disks.iter().all(BrowsedDisk::is_unchanged)
    }

    /// Releases resources that cost other processes something, after a while without use.
    pub(super) fn release_idle(&self) {
        self.disks.iter().for_each(BrowsedDisk::release_idle);
    }
}

#[cfg(test)]
impl DiskContents {
    /// The contents of a disk with one volume, with all answers that showing it needs.
    pub(crate) fn with_one_volume(store: &Arc<crate::store::Store>, id: &ViewId) -> Arc<Self> {
        use crate::guest::Statistics;
        let volume = Volume {
            name: "disk".into(),
            size: 0,
            segments: Vec::new(),
            content: VolumeContent::Ext4,
            label: None,
            uuid: None,
            problem: None,
        };
        let mounted = Mounted {
            root: Ino(2),
            statistics: Statistics::default(),
            remarks: Vec::new(),
            stale: Vec::new(),
            trees: super::Trees::default(),
        };
        Arc::new(Self {
            worker: Worker::new(&super::Pool::new(super::WorkerProgram::this(true), store.descriptors())),
            digests: Arc::new(Digests::new()),
            set: 0,
            disks: vec![BrowsedDisk::new(store, id, &Arc::default()).expect("a disk")],
            keys: (ContainerKeys::default(), 0),
            decryptors: Vec::new(),
            layout: VolumeLayout { volumes: vec![volume], ..VolumeLayout::default() },
            remarks: Vec::new(),
            mounted: vec![Mutex::new(Some(mounted))],
            systems: OnceLock::new(),
        })
    }
}
