//! Kernel maps: frozen disks that the kernel reads by itself, whatever their depth.
//!
//! A map is an EROFS image (`erofs`) whose one file consists of chunks of the layers' own files (`image`). It
//! is mounted where no path leads, and its file is registered for passthrough as the snapshot's bytes: no
//! read asks the daemon. Names, attributes, locks and refusals stay the daemon's.
//!
//! - A map is of one state of its layers, named by the fingerprint of the view. It is made when the disk is
//!   opened, in a thread of its own. Who opens the disk waits for it a moment, then is served by the daemon.
//! - A user of a map also keeps a `MappedView` of what it was made of: locks, and what jobs see of it.
//! - An unused map is dropped after a moment. All of it is in unnamed files and in an unnamed mount:
//!   nothing stays behind if the process is killed.
//! - It is compared with the view at some places before it is used.

mod erofs;
mod image;

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::image::Layer;
use crate::io::{DescriptorReservation, Descriptors, LocalFile, detached};
use crate::store::OpenView;

use erofs::{FILE_NAME, Geometry, PAGE, entry};
use image::{MAX_COPIED, MAX_TABLE, agrees, descriptors, is_still_there, write_image, zero_beginning};

/// How long an open waits for a map: a moment for people, and enough for most disks.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long an unused map stays.
const IDLE: Duration = Duration::from_secs(10);
/// After an error that may pass.
const RETRY: Duration = Duration::from_secs(30);
/// Maps that are made at the same time.
const MAX_BUILDING: usize = 2;
/// B3: bytes on disk of all maps. One that is being made may need all that one may have.
const MAX_TOTAL: u64 = 1 << 30;
/// Disks that are remembered as unfit.
const MAX_REMEMBERED: usize = 4096;
/// Where maps lie if the user names no directory.
pub const DEFAULT_MAP_DIRECTORY: &str = "/var/cache/chainfs";
/// `f_type` of FUSE (statfs(2)): a map there would wait for a daemon, perhaps this one.
const FUSE_MAGIC: i64 = 0x6573_5546;

/// A mapped disk.
#[derive(Debug)]
pub(super) struct KernelMap {
    file: LocalFile,
    /// Its image, for looking up again what it refers to.
    image: File,
    geometry: Geometry,
    allocated: u64,
    _room: DescriptorReservation,
}

impl KernelMap {
    /// The file with the disk's bytes, for the kernel to read.
    pub(super) fn file(&self) -> LocalFile {
        self.file.clone()
    }

    /// Whether all that it refers to in the file of a layer, by its index from the top, is still there.
    pub(super) fn is_still_there(&self, index: usize, layer: &Layer) -> Result<bool> {
        is_still_there(&self.image, self.geometry, index, layer)
    }
}

/// The maps of a mount.
#[derive(Debug)]
pub struct KernelMaps {
    directory: OwnedFd,
    descriptors: Arc<Descriptors>,
    me: Weak<Self>,
    slots: Mutex<Slots>,
    changed: Condvar,
    /// Set when the kernel has refused the first of all maps.
    is_off: AtomicBool,
    made: AtomicU64,
}

#[derive(Debug, Default)]
struct Slots {
    by_fingerprint: HashMap<u64, Slot>,
    /// Whether a thread looks for idle maps.
    is_swept: bool,
}

#[derive(Debug)]
enum Slot {
    Building,
    Ready {
        map: Arc<KernelMap>,
        used: Instant,
    },
    /// `None`: for good.
    Unfit(Option<Instant>),
}

/// Numbers of the maps that there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelMapStatistics {
    /// Maps.
    pub maps: u64,
    /// Bytes that they take on disk.
    pub bytes: u64,
    /// Maps made since the mount.
    pub made: u64,
}

impl KernelMaps {
    /// Whether this process can make maps: it is the machine's root, and the kernel has EROFS. `Unsupported`
    /// says what is missing. `directory`: where their files lie for as long as they are used; it is made if
    /// it does not exist. It must be on a file system of a disk: the kernel reads no image from a tmpfs.
    pub fn new(directory: &Path, descriptors: &Arc<Descriptors>) -> Result<Arc<Self>> {
        let unsupported = |fact: String| Error::new(ErrorKind::Unsupported, fact);
        detached::can_mount(detached::EROFS).map_err(|error| {
            let remedy = "it needs root, and Linux 6.12 with EROFS (modprobe erofs)";
            unsupported(format!("the kernel mounts no EROFS here: {error}; {remedy}"))
        })?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| Error::io(format!("making {}", directory.display()), error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(directory, flags, Mode::empty());
        let opened = opened.map_err(|error| Error::io(format!("opening {}", directory.display()), error))?;
        let kind =
            rustix::fs::fstatfs(&opened).map_err(|error| Error::io("asking for a file system", error))?;
        if kind.f_type == FUSE_MAGIC {
            let fact =
                "is on a FUSE file system, whose daemon the kernel would wait for; choose another map_dir=";
            return Err(unsupported(format!("{} {fact}", directory.display())));
        }
        Ok(Arc::new_cyclic(|me| Self {
            directory: opened,
            descriptors: Arc::clone(descriptors),
            me: Weak::clone(me),
            slots: Mutex::default(),
            changed: Condvar::new(),
            is_off: AtomicBool::new(false),
            made: AtomicU64::new(0),
        }))
    }

    /// Has the kernel read a small file through a map. The error says what is in the way.
    pub fn try_out(&self) -> Result<()> {
        let bytes = [7; PAGE as usize];
        let failed = |error: std::io::Error| Error::io("trying a kernel map", error);
        let layer = self.unnamed_file()?;
        layer.write_all_at(&bytes, 0).map_err(failed)?;
        let file = self.unnamed_file()?;
        let geometry = Geometry { size: PAGE, block_bits: 12, chunk_bits: 12, devices: 1 };
        file.write_all_at(&geometry.head(geometry.data_at()), 0).map_err(failed)?;
        file.write_all_at(&entry(1, 0).to_le_bytes(), geometry.table_at()).map_err(failed)?;
        file.set_len(geometry.data_at()).map_err(failed)?;
        let mapped = open_image(&file, &[layer.as_fd()]).map_err(failed)?;
        let mut read = [0; PAGE as usize];
        mapped.read_at(0, &mut read)?;
        if read == bytes {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "the kernel has read other bytes through a kernel map"))
    }

    /// The map of a frozen disk, which is made if there is none. `None` if it has none, or not yet: the
    /// daemon serves the disk then.
    pub(super) fn get(&self, open: &Arc<OpenView>) -> Option<Arc<KernelMap>> {
        if self.is_off.load(Ordering::Relaxed) || !open.can_be_mapped() {
            return None;
        }
        let key = open.fingerprint;
        let begun = Instant::now();
        let mut slots = self.slots.lock();
        loop {
            match slots.by_fingerprint.get_mut(&key) {
                Some(Slot::Ready { map, used }) => {
                    *used = Instant::now();
                    return Some(Arc::clone(map));
                }
                Some(Slot::Unfit(until)) if until.is_none_or(|until| begun < until) => return None,
                Some(Slot::Building) => {
                    if self.changed.wait_until(&mut slots, begun + PATIENCE).timed_out() {
                        return None;
                    }
                }
                Some(Slot::Unfit(_)) | None => {
                    // B2: the layers' files are all open while the map is made, and it is one itself.
                    let has_room = self.descriptors.have_plenty(open.view.layers().len() + 4);
                    if !has_room || !slots.have_room() || !self.begin(key, open) {
                        return None;
                    }
                    slots.by_fingerprint.insert(key, Slot::Building);
                }
            }
        }
    }

    /// Numbers for the metrics.
    pub(super) fn statistics(&self) -> KernelMapStatistics {
        let slots = self.slots.lock();
        let made = self.made.load(Ordering::Relaxed);
        let (maps, bytes) =
            slots.ready().fold((0, 0), |(maps, bytes), map| (maps + 1, bytes + map.allocated));
        KernelMapStatistics { maps, bytes, made }
    }

    /// Starts the thread that makes a map.
    fn begin(&self, key: u64, open: &Arc<OpenView>) -> bool {
        let Some(maps) = self.me.upgrade() else { return false };
        let open = Arc::clone(open);
        let build = move || {
            let begun = Instant::now();
            let made = catch_unwind(AssertUnwindSafe(|| maps.make(&open)));
            let made = made.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unsupported, "a panic")));
            if let Ok(map) = &made {
                let (bytes, time) = (map.allocated, begun.elapsed());
                tracing::debug!(
                    "a kernel map of {} layers: {bytes} bytes, {time:?}",
                    open.view.layers().len()
                );
            }
            drop(open);
            maps.finished(key, made);
        };
        thread::Builder::new().name("kernel-map".into()).spawn(build).is_ok()
    }

    fn finished(&self, key: u64, made: Result<KernelMap>) {
        let slot = match made {
            Ok(map) => {
                self.made.fetch_add(1, Ordering::Relaxed);
                Slot::Ready { map: Arc::new(map), used: Instant::now() }
            }
            Err(error) => {
                tracing::debug!("no kernel map of a disk: {error}");
                let is_for_good = matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt);
                Slot::Unfit((!is_for_good).then(|| Instant::now() + RETRY))
            }
        };
        let mut slots = self.slots.lock();
        if matches!(slot, Slot::Ready { .. }) && !slots.is_swept {
            slots.is_swept = self.sweep_from_now_on();
        }
        slots.by_fingerprint.insert(key, slot);
        drop(slots);
        self.changed.notify_all();
    }

    /// Writes the image of a disk, and has the kernel mount it.
    fn make(&self, open: &Arc<OpenView>) -> Result<KernelMap> {
        let exhausted = || Error::new(ErrorKind::Exhausted, "there is no descriptor for a kernel map");
        let room = self.descriptors.try_reserve(2).ok_or_else(exhausted)?;
        let file = self.unnamed_file()?;
        let written = write_image(&open.view, &file, &|| self.me.strong_count() > 1)?;
        let mapped = open_image(&file, &descriptors(&written.devices)).map_err(|error| {
            if self.made.load(Ordering::Relaxed) == 0 && !self.is_off.swap(true, Ordering::Relaxed) {
                tracing::info!("the kernel reads no chains by itself here: {error}");
            }
            Error::io("mounting a kernel map", error)
        })?;
        if written.is_sparse {
            zero_beginning(&file, written.geometry)?;
        }
        if !agrees(&open.view, &mapped, written.geometry)? {
            self.is_off.store(true, Ordering::Relaxed);
            let fact = "the kernel has read other bytes through a kernel map; no maps are used from here on";
            tracing::error!("{fact}");
            return Err(Error::new(ErrorKind::Unsupported, fact));
        }
        let geometry = written.geometry;
        Ok(KernelMap { file: mapped, image: file, geometry, allocated: written.allocated, _room: room })
    }

    fn unnamed_file(&self) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&self.directory, ".", flags, Mode::RUSR | Mode::WUSR);
        made.map(File::from).map_err(|error| Error::io("making a kernel map", error))
    }

    /// Starts the thread that drops idle maps, and ends when there are none.
    fn sweep_from_now_on(&self) -> bool {
        let maps = Weak::clone(&self.me);
        let sweep = move || {
            loop {
                thread::sleep(IDLE / 4);
                let Some(maps) = maps.upgrade() else { return };
                let mut slots = maps.slots.lock();
                let dropped = slots.sweep(IDLE);
                let goes_on = slots.ready().next().is_some();
                slots.is_swept = goes_on;
                drop(slots);
                drop(dropped);
                if !goes_on {
                    return;
                }
            }
        };
        thread::Builder::new().name("kernel-map-end".into()).spawn(sweep).is_ok()
    }
}

/// The mapped disk of an image.
fn open_image(image: &File, devices: &[BorrowedFd<'_>]) -> std::io::Result<LocalFile> {
    detached::open_in_image(detached::EROFS, image.as_fd(), devices, FILE_NAME)
}

impl Slots {
    fn ready(&self) -> impl Iterator<Item = &Arc<KernelMap>> {
        self.by_fingerprint.values().filter_map(|slot| match slot {
            Slot::Ready { map, .. } => Some(map),
            _ => None,
        })
    }

    /// Takes out maps that were not used for so long.
    fn sweep(&mut self, idle: Duration) -> Vec<Slot> {
        let now = Instant::now();
        let is_idle = |_: &u64, slot: &mut Slot| match slot {
            Slot::Ready { map, used } => Arc::strong_count(map) == 1 && now.duration_since(*used) >= idle,
            _ => false,
        };
        self.by_fingerprint.extract_if(is_idle).map(|(_, slot)| slot).collect()
    }

    /// Whether one more map may be made; makes room.
    fn have_room(&mut self) -> bool {
        let building = self.by_fingerprint.values().filter(|slot| matches!(slot, Slot::Building)).count();
        if building >= MAX_BUILDING {
            return false;
        }
        if self.by_fingerprint.len() >= MAX_REMEMBERED {
            self.by_fingerprint.retain(|_, slot| !matches!(slot, Slot::Unfit(_)));
        }
        let most = MAX_TOTAL - (building as u64 + 1) * (MAX_TABLE + MAX_COPIED);
        let bytes = |slots: &Self| slots.ready().map(|map| map.allocated).sum::<u64>();
        if bytes(self) > most {
            self.sweep(Duration::ZERO);
        }
        bytes(self) <= most
    }
}
