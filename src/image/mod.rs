//! One image: the locations of its guest disk's bytes, and reading them.
//!
//! An [`Image`] knows its file, its header and, through shared caches, its tables; it knows nothing of other
//! images. [`Layer::map`] is a table lookup and reads no guest data.

mod bitmaps;
pub mod check;
pub mod create;
mod cursor;
mod header;
mod layer;
mod snapshots;
mod tables;
pub mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
pub use crate::format::Mapping;
use crate::format::compressed::decompress;
use crate::format::header::{Encryption, PROBE_LEN, needed_len};
use crate::format::{Compressed, Header, Malformed};
use crate::io::{Expect, Storage};
use crate::units::{BlockStatus, HostOffset, Run, round_up_to_sector};

pub(crate) use bitmaps::read_bitmaps;
pub use header::{HeaderChange, change_header, check_header_change};
pub use layer::{Layer, LayerWalk};
pub(crate) use snapshots::{read_readable_snapshots, read_snapshots, read_snapshots_with};

/// Caches shared by all images of a store, keyed by image.
#[derive(Debug)]
pub struct Caches {
    /// Slices of L1 and L2 tables: (image, file offset, bytes) -> entries.
    pub(crate) tables: Cache<(u64, u64, u64), Arc<[u64]>>,
    /// Decompressed clusters: (image, file offset of the stream) -> bytes of the stream that were enough, and
    /// the cluster's bytes.
    pub(crate) clusters: Cache<(u64, u64), Decompressed>,
}

/// Bytes of the stream that were enough, and the cluster.
type Decompressed = (u32, Arc<[u8]>);

impl Caches {
    /// Caches of `tables` and `clusters` bytes.
    pub fn new(tables: usize, clusters: usize) -> Arc<Self> {
        Arc::new(Self { tables: Cache::new(tables), clusters: Cache::new(clusters) })
    }

    /// Bytes held by tables and by decompressed clusters.
    pub fn weights(&self) -> (usize, usize) {
        (self.tables.weight(), self.clusters.weight())
    }
}

/// What kind of image it is.
#[derive(Debug)]
enum ImageBody {
    Raw,
    Qcow2(Arc<Header>),
    /// The image is missing, for this reason: every access is an error.
    Lost(String),
}

/// An open image.
pub struct Image {
    /// Distinguishes this opening from all others, so that no cache entry outlives it in use.
    serial: u64,
    name: String,
    file: Arc<dyn Storage>,
    /// Holds the guest's data instead of `file`, where the header says so.
    data_file: Option<Arc<dyn Storage>>,
    /// Length of the file that holds guest data, as of opening; `None` if a guest may make it grow. A job
    /// that fills the image may, too: the file never shrinks.
    data_len: Option<u64>,
    body: ImageBody,
    caches: Arc<Caches>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("name", &self.name).finish_non_exhaustive()
    }
}

fn next_serial() -> u64 {
    static SERIAL: AtomicU64 = AtomicU64::new(1);
    SERIAL.fetch_add(1, Ordering::Relaxed)
}

impl Image {
    /// A raw image.
    pub fn raw(
        name: &str,
        file: Arc<dyn Storage>,
        expect: Expect,
        caches: &Arc<Caches>,
    ) -> Result<Arc<Self>> {
        let data_len = data_len(&file, expect)?;
        Ok(Arc::new(Self {
            serial: next_serial(),
            name: name.to_string(),
            file,
            data_file: None,
            data_len,
            body: ImageBody::Raw,
            caches: Arc::clone(caches),
        }))
    }

    /// A placeholder for a lost image; `sentence` gives the reason.
    pub fn lost(sentence: &str, caches: &Arc<Caches>) -> Arc<Self> {
        Arc::new(Self {
            serial: next_serial(),
            name: sentence.to_owned(),
            file: Arc::new(Vec::new()),
            data_file: None,
            data_len: Some(0),
            body: ImageBody::Lost(sentence.to_owned()),
            caches: Arc::clone(caches),
        })
    }

    /// Whether it is a placeholder for a lost image.
    pub fn is_lost(&self) -> bool {
        matches!(self.body, ImageBody::Lost(_))
    }

    /// A qcow2 image whose header has been parsed. `Unsupported` if its content cannot be read,
    /// naming the feature.
    pub fn qcow2(
        name: &str,
        file: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
        header: Arc<Header>,
        expect: Expect,
        caches: &Arc<Caches>,
    ) -> Result<Arc<Self>> {
        if let Some(sentence) = unreadable(&header) {
            return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {sentence}")));
        }
        if header.data_file.is_some() && data_file.is_none() {
            return Err(Error::new(
                ErrorKind::Broken,
                format!("{name}: its external data file is not there"),
            ));
        }
        let data_len = data_len(data_file.as_ref().unwrap_or(&file), expect)?;
        Ok(Arc::new(Self {
            serial: next_serial(),
            name: name.to_string(),
            file,
            data_file,
            data_len,
            body: ImageBody::Qcow2(header),
            caches: Arc::clone(caches),
        }))
    }

    /// The image's name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Distinguishes this opening of an image from every other one.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Its header; `None` for a raw image.
    pub fn header(&self) -> Option<&Arc<Header>> {
        match &self.body {
            ImageBody::Raw | ImageBody::Lost(_) => None,
            ImageBody::Qcow2(header) => Some(header),
        }
    }

    /// Bytes of the guest's disk.
    pub fn virtual_size(&self) -> Result<u64> {
        match &self.body {
            ImageBody::Raw => Ok(round_up_to_sector(self.data_end()?)),
            ImageBody::Qcow2(header) => Ok(header.virtual_size),
            // Longer than any disk above it: beyond its end it would be known to be zero.
            ImageBody::Lost(_) => Ok(u64::MAX),
        }
    }

    /// The file that holds guest data.
    pub fn data(&self) -> &Arc<dyn Storage> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Whether guest data is at the same offset in the data file, so that the file can serve as the disk.
    pub fn is_raw(&self) -> bool {
        matches!(self.body, ImageBody::Raw)
    }

    fn data_end(&self) -> Result<u64> {
        match self.data_len {
            Some(len) => Ok(len),
            None => self.data().len(),
        }
    }

    /// Reads guest data that a [`Mapping::Data`] has named. The padding of a raw image to a whole sector
    /// reads as zeroes; any other missing byte is an error, never zeroes.
    pub fn read_data(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let len = self.data().read_at(at.0, buf)?;
        if len == buf.len() {
            return Ok(());
        }
        let end = at.0 + len as u64;
        let data_end = self.data_end()?;
        // R2: only the padding of a raw image to a whole sector is zero.
        if self.is_raw() && end >= data_end && at.0 + buf.len() as u64 <= round_up_to_sector(data_end) {
            buf[len..].fill(0);
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Io,
            format!(
                "{}: the file ends at {end:#x}, before the data it should hold; it was cut short",
                self.name
            ),
        ))
    }

    /// The bytes of a compressed cluster.
    pub fn read_compressed(&self, stream: Compressed) -> Result<Arc<[u8]>> {
        let ImageBody::Qcow2(header) = &self.body else {
            unreachable!("a raw image has no compressed clusters")
        };
        let key = (self.serial, stream.at.0);
        // A damaged entry may name the stream of another cluster with too short a length: that fails each
        // time.
        if let Some((enough, cluster)) = self.caches.clusters.get(&key)
            && stream.len >= enough
        {
            return Ok(cluster);
        }
        let mut input = vec![0; stream.len as usize];
        let len = self.file.read_at(stream.at.0, &mut input)?;
        let mut cluster = vec![0; header.cluster.size() as usize];
        // The last stream of a file may be shorter than its count of whole sectors.
        decompress(header.compression, &input[..len], &mut cluster)
            .map_err(|reason| self.corrupt(&format!("compressed cluster at {}: {reason}", stream.at)))?;
        let cluster: Arc<[u8]> = cluster.into();
        self.caches.clusters.put(key, (stream.len, Arc::clone(&cluster)), cluster.len());
        Ok(cluster)
    }

    /// The first run of the data file's `[at, end)` that is all data or all hole, and its length: a raw image
    /// has its holes there, and clusters that were only preallocated are holes as well, which read as zeroes.
    /// In a truncated file everything is data, so that a copying program reads it and sees the error.
    pub fn file_extent(&self, at: HostOffset, end: HostOffset) -> Result<Run<BlockStatus>> {
        let run = self.data().extent(at.0, end.0)?;
        let is_cut = run.value == BlockStatus::Zero && self.data().len()? < self.data_len.unwrap_or(0);
        Ok(if is_cut { Run::new(BlockStatus::Data, end.0 - at.0) } else { run })
    }

    fn corrupt(&self, reason: &str) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{}: {reason}", self.name))
    }
}

fn data_len(data: &Arc<dyn Storage>, expect: Expect) -> Result<Option<u64>> {
    match expect {
        Expect::SameVersion => data.len().map(Some),
        Expect::AnyVersion => Ok(None),
    }
}

/// Reads the header of the image in `storage`, by one of [`Header`]'s parsers, and the length of the file.
fn read_header_with<S: Storage + ?Sized>(
    name: &str,
    storage: &S,
    parse: impl Fn(&[u8], u64) -> std::result::Result<Header, Malformed>,
) -> Result<(Header, u64)> {
    let malformed = |reason: Malformed| Error::new(reason.kind(), format!("{name}: {reason}"));
    let file_len = storage.len()?;
    let read = |len: u64| {
        let mut bytes = vec![0; len.min(file_len) as usize];
        let have = storage.read_at(0, &mut bytes)?;
        bytes.truncate(have);
        Ok(bytes)
    };
    let need = needed_len(&read(PROBE_LEN as u64)?).map_err(malformed)?;
    Ok((parse(&read(need)?, file_len).map_err(malformed)?, file_len))
}

/// Why the content of an image with this header cannot be read, if so.
pub fn unreadable(header: &Header) -> Option<String> {
    if let Some(encryption) = &header.encryption {
        let method = match encryption {
            Encryption::AesCbc => "AES-CBC, the legacy method",
            Encryption::Luks => "LUKS",
        };
        return Some(format!(
            "it is encrypted ({method}), which chainfs cannot read; decrypt it with qemu-img convert"
        ));
    }
    header.unsupported.as_ref().map(ToString::to_string)
}
