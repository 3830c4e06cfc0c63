//! The worker: a process that parses guest data and can do nothing else.
//!
//! Each channel has a thread. The worker's state can be rebuilt at any time, so that the daemon may stop and
//! restart it.

use std::io::Read as _;
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Barrier, Mutex as StdMutex};

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::inspect::{OpenedVolume, inspect};
use crate::guest::luks::{Attempt, ContainerKeys, KnownKeys};
use crate::guest::volumes::{Assembly, Volume, VolumeLayout, assemble, set_members};
use crate::guest::{FileKind, FileSystem, Ino, READERS, Reader, Source, SourceSet, Subvolume, TreeId, open};

use super::channel::Channel;
use super::confine;
use super::process::{WorkerTask, channel_name};
use super::protocol::{
    Answer, FIRST_RUNS_LEN, Failure, FoundEntry, FromWorker, LIST_LEN, ListedEntry, Listing, Mounted,
    OpenedFile, READ_LEN, RUNS_LEN, RUNS_SPAN, Request, SetTree, ToWorker, Trees,
};
use super::remote::{ChunkCache, RemoteDisk, fail_on_transient, set_channel, with_channel};

/// Sets of disks that are kept at most: each has file systems with caches of their own.
const SETS: NonZero<usize> = NonZero::new(24).expect("not zero");

/// Paths of trees that the daemon is told, and characters of each.
const TREE_PATHS: usize = 8;
const TREE_PATH_LEN: usize = 200;

/// A set of disks.
struct DiskSet {
    assembly: Assembly,
    /// The trees of each volume. Held while a file system is opened, so that it is opened once.
    open: Vec<Mutex<Option<Arc<[Subvolume]>>>>,
}

/// The state of a worker.
struct WorkerState {
    sets: Mutex<LruCache<u32, Arc<DiskSet>>>,
    chunks: Arc<ChunkCache>,
}

/// Runs the program as a worker: standard input and output are its channels, and standard error ends with the
/// daemon. `confined`: by seccomp.
pub fn serve(confined: bool, task: WorkerTask) -> ExitCode {
    match run(confined, task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(confined: bool, task: WorkerTask) -> Result<()> {
    let fail = |error: std::io::Error| Error::io("taking over the channels", error);
    close_others();
    if task == WorkerTask::Unlock {
        // Where memory is short, this process ends, and no other.
        let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    }
    confine::drop_rights()?;
    let channels: [OwnedFd; 2] = [
        std::io::stdin().as_fd().try_clone_to_owned().map_err(fail)?,
        std::io::stdout().as_fd().try_clone_to_owned().map_err(fail)?,
    ];
    // A panic's message has no reader; the daemon reports it.
    std::panic::set_hook(Box::new(|_| {}));
    let state =
        Arc::new(WorkerState { sets: Mutex::new(LruCache::new(SETS)), chunks: Arc::new(ChunkCache::new()) });
    // Threads cannot be created in the sandbox, and none may work outside it.
    let ready = Arc::new(Barrier::new(channels.len() + 1));
    let is_confined: Arc<StdMutex<bool>> = Arc::default();
    let mut life = UnixStream::from(std::io::stderr().as_fd().try_clone_to_owned().map_err(fail)?);
    for (number, socket) in channels.into_iter().enumerate() {
        let socket = UnixStream::from(socket);
        let (state, ready, is_confined) = (Arc::clone(&state), Arc::clone(&ready), Arc::clone(&is_confined));
        let work = move || {
            set_channel(Channel::new(socket).with_large_messages());
            ready.wait();
            if is_confined.lock().is_ok_and(|done| *done) {
                let _ = state.serve_requests();
            }
            std::process::exit(0);
        };
        std::thread::Builder::new().name(channel_name(number)).spawn(work).map_err(fail)?;
    }
    let mut done = is_confined.lock().expect("no thread panics with this lock");
    ready.wait();
    confine::limit(task)?;
    if confined {
        confine::filter()?;
    }
    *done = true;
    drop(done);
    // The exit of the daemon closes the socket, whatever the other threads do. poll(2) cannot wait for it: it
    // fails if there are more descriptors than the process may open.
    loop {
        match life.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => std::process::exit(0),
        }
    }
}

/// Closes descriptors that the daemon inherited: a worker needs none of them.
fn close_others() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<i32> = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // The directory's own descriptor is among them, and closed by now.
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = nix::unistd::close(number);
    }
}

impl WorkerState {
    /// Serves requests until the daemon closes the channel.
    fn serve_requests(&self) -> Result<()> {
        loop {
            let (message, _) = with_channel(|channel| channel.receive::<ToWorker>(&mut || Ok(())))?;
            let mut payload = Vec::new();
            let answer = match message {
                ToWorker::Request(request) => {
                    if request.secret_len().is_some() {
                        with_channel(|channel| {
                            channel.wipe();
                            Ok(())
                        })?;
                    }
                    catch_unwind(AssertUnwindSafe(|| self.answer(request, &mut payload)))
                        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a bug in a file-system reader")))
                }
                ToWorker::Keys(_) | ToWorker::Bytes | ToWorker::Refused(_) => {
                    Err(Error::new(ErrorKind::Io, "an answer without a question"))
                }
            };
            if answer.is_err() {
                payload.clear();
            }
            let message = FromWorker::Answer(answer.map_err(|error| Failure::of(&error)));
            with_channel(|channel| channel.send(&message, &payload))?;
        }
    }

    fn answer(&self, request: Request, payload: &mut Vec<u8>) -> Result<Answer> {
        match request {
            Request::Open { set, sizes, keys } => self.open_set(set, &sizes, &keys),
            Request::Unlock { sizes, keys, id, secrets } => {
                let attempt = Attempt::new(&keys, id);
                fail_on_transient(|| {
                    assemble(&self.disks(0, &sizes), Some(&attempt));
                    Ok(Answer::Unlocked(attempt.unlock(&secrets)))
                })
            }
            Request::SetMembers { size } => {
                let disk = RemoteDisk { set: None, index: 0, size, chunks: Arc::clone(&self.chunks) };
                fail_on_transient(|| {
                    Ok(Answer::SetMembers(set_members(&(Arc::new(disk) as Arc<dyn Source>))))
                })
            }
            Request::Mount(at) => {
                let Some(set) = self.set(at.set) else { return Ok(Answer::NoSuchSet) };
                set.mounted(at.tree).map(Answer::Mounted)
            }
            Request::Lookup(volume, directory, name) => self.with(volume, |fs| {
                let Some(ino) = fs.lookup(directory, &name)? else { return Ok(Answer::Found(None)) };
                let (attributes, crossing) = (fs.attributes(ino)?, fs.crossing(ino));
                Ok(Answer::Found(Some(FoundEntry { ino, attributes, crossing })))
            }),
            Request::List(volume, directory, from) => {
                self.with(volume, |fs| listing(fs, directory, from).map(Answer::Listed))
            }
            Request::Attributes(volume, ino) => {
                self.with(volume, |fs| fs.attributes(ino).map(Answer::Attributes))
            }
            Request::ReadLink(volume, ino) => self.with(volume, |fs| fs.read_link(ino).map(Answer::Link)),
            Request::OpenFile(volume, ino) => self.with(volume, |fs| {
                let found = fs.attributes(ino)?;
                if found.kind != FileKind::File {
                    return Err(Error::new(ErrorKind::Usage, "not a regular file"));
                }
                let runs = fs.runs(ino, 0, found.size.min(RUNS_SPAN), FIRST_RUNS_LEN)?;
                Ok(Answer::OpenedFile(OpenedFile { size: found.size, runs }))
            }),
            Request::Runs(volume, ino, at, len) => {
                self.with(volume, |fs| fs.runs(ino, at, len, RUNS_LEN).map(Answer::Runs))
            }
            Request::Read(volume, ino, at, len) => self.with(volume, |fs| {
                payload.resize((len as usize).min(READ_LEN), 0);
                let len = fs.read_at(ino, at, payload)?;
                payload.truncate(len);
                Ok(Answer::Bytes)
            }),
            Request::ExtendedAttributes(volume, ino) => {
                self.with(volume, |fs| fs.extended_attributes(ino).map(Answer::ExtendedAttributes))
            }
            Request::ReadVolume(set, volume, at, len) => {
                let Some(set) = self.set(set) else { return Ok(Answer::NoSuchSet) };
                payload.resize((len as usize).min(READ_LEN), 0);
                set.assembly.source(volume as usize).read_at(at, payload)?;
                Ok(Answer::Bytes)
            }
            Request::Inspect(set) => fail_on_transient(|| Ok(self.inspect(set))),
        }
    }

    fn disks(&self, set: u32, sizes: &[u64]) -> Vec<Arc<dyn Source>> {
        let disk = |(index, size): (usize, &u64)| -> Arc<dyn Source> {
            let chunks = Arc::clone(&self.chunks);
            Arc::new(RemoteDisk { set: Some(set), index: index as u32, size: *size, chunks })
        };
        sizes.iter().enumerate().map(disk).collect()
    }

    fn open_set(&self, set: u32, sizes: &[u64], keys: &ContainerKeys) -> Result<Answer> {
        let disks = self.disks(set, sizes);
        // Parsers treat unreadable parts as absent. A fully unreadable disk is not empty: it is an error.
        for disk in &disks {
            disk.read_at(0, &mut vec![0; disk.size().min(512) as usize])?;
        }
        let assembly = fail_on_transient(|| Ok(assemble(&disks, Some(&KnownKeys(keys)))))?;
        let open = assembly.layout.volumes.iter().map(|_| Mutex::default()).collect();
        let answer = Answer::Layout(Box::new(assembly.layout.clone()));
        let old = self.sets.lock().push(set, Arc::new(DiskSet { assembly, open }));
        drop(old);
        Ok(answer)
    }

    /// Calls `work` with a file system, which is opened on first use.
    fn with(&self, at: SetTree, work: impl FnOnce(&dyn FileSystem) -> Result<Answer>) -> Result<Answer> {
        let Some(set) = self.set(at.set) else { return Ok(Answer::NoSuchSet) };
        work(&*set.file_system(at.tree)?)
    }

    fn set(&self, number: u32) -> Option<Arc<DiskSet>> {
        self.sets.lock().get(&number).cloned()
    }

    fn inspect(&self, set: u32) -> Answer {
        let Some(set) = self.set(set) else { return Answer::NoSuchSet };
        // A volume that cannot be opened contains no system that could be shown.
        let trees: Vec<_> = (0..set.open.len()).map(|index| set.trees(index).unwrap_or_default()).collect();
        Answer::OperatingSystems(inspect(&opened(&set.assembly.layout, &trees)))
    }
}

impl DiskSet {
    /// The trees of the file system on a volume, which is opened on first use.
    fn trees(&self, volume: usize) -> Result<Arc<[Subvolume]>> {
        let mut slot = self.open.get(volume).ok_or_else(|| unknown("volume"))?.lock();
        if slot.is_none() {
            *slot = Some(fail_on_transient(|| open(READERS, volume, &self.assembly))?.into());
        }
        Ok(Arc::clone(slot.as_ref().expect("it was just put there")))
    }

    fn file_system(&self, TreeId { volume, subvolume }: TreeId) -> Result<Arc<dyn FileSystem>> {
        let trees = self.trees(volume)?;
        let tree = trees.get(subvolume as usize).ok_or_else(|| unknown("subvolume"))?;
        Ok(Arc::clone(&tree.files))
    }

    fn mounted(&self, tree: TreeId) -> Result<Mounted> {
        let fs = self.file_system(tree)?;
        let (root, statistics) = (fs.root(), fs.statistics());
        let is_main = tree == TreeId::main(tree.volume);
        let trees = if is_main { described(&self.trees(tree.volume)?) } else { Trees::default() };
        Ok(Mounted { root, statistics, remarks: fs.remarks(), stale: fs.stale(), trees })
    }
}

fn unknown(what: &str) -> Error {
    Error::new(ErrorKind::Stale, format!("there is no such {what}"))
}

/// What one who sees the main tree is told about the others.
fn described(trees: &[Subvolume]) -> Trees {
    let top_level = Subvolume::top_level(trees);
    let shown = |tree: &Subvolume| {
        let path = tree.path.as_deref().unwrap_or(b"?");
        String::from_utf8_lossy(path).chars().take(TREE_PATH_LEN).collect::<String>()
    };
    let others = || trees.iter().enumerate().filter(|(index, _)| *index != 0 && *index != top_level);
    Trees {
        main: (top_level != 0).then(|| shown(&trees[0])),
        top_level: (top_level != 0).then_some(top_level as u32),
        count: others().count() as u32,
        paths: others().take(TREE_PATHS).map(|(_, tree)| shown(tree)).collect(),
    }
}

/// The volumes with their names in an fstab, and the trees of those that can be opened.
fn opened<'a>(layout: &'a VolumeLayout, trees: &'a [Arc<[Subvolume]>]) -> Vec<OpenedVolume<'a>> {
    let described = |(index, volume): (usize, &'a Volume)| {
        let partition =
            layout.partitions.iter().find(|partition| volume.name == format!("p{}", partition.number));
        // A file system on several volumes is one.
        let is_it = |other: &Volume| other.content == volume.content && other.uuid == volume.uuid;
        let has_several = Reader::of(READERS, volume.content)
            .is_some_and(|reader| reader.sources == SourceSet::SameUuid && volume.uuid.is_some());
        let is_known = has_several && layout.volumes[..index].iter().any(is_it);
        OpenedVolume {
            name: &volume.name,
            trees: if is_known { &[] } else { &trees[index] },
            content: volume.content,
            label: volume.label.as_deref(),
            uuid: volume.uuid.as_deref(),
            partition_uuid: partition.and_then(|partition| partition.uuid.as_deref()),
            partition_label: partition.and_then(|partition| partition.name.as_deref()),
        }
    };
    layout.volumes.iter().enumerate().map(described).collect()
}

fn listing(fs: &dyn FileSystem, directory: Ino, from: u64) -> Result<Listing> {
    let mut listing = Listing { entries: Vec::new(), ends: true };
    let listed = fs.list(directory, from, &mut |entry| {
        if listing.entries.len() == LIST_LEN {
            listing.ends = false;
            return false;
        }
        listing.entries.push(ListedEntry { entry, attributes: None, is_plain: false, crossing: None });
        true
    });
    // Entries before the damage are returned first; the next request gets the error.
    match listed {
        Err(error) if listing.entries.is_empty() => return Err(error),
        Err(_) => listing.ends = false,
        Ok(()) => {}
    }
    for listed in &mut listing.entries {
        listed.attributes = fs.attributes(listed.entry.ino).ok();
        listed.crossing = fs.crossing(listed.entry.ino);
        listed.is_plain = fs.extended_attributes(listed.entry.ino).is_ok_and(|found| found.is_empty());
    }
    Ok(listing)
}
