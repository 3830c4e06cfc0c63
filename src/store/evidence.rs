//! Identifies the file that an intent or a note names, when it is found later.
//!
//! Promises: a file counts as the named one only if device, inode and birth time agree, and the recorded
//! evidence of its content as well; in a copied store, where the former cannot agree, the name and the
//! content. The evidence covers content that no step of the command itself changes: the properties of a qcow2
//! image and its backing file name; the tables and a few sectors of a layer that is not written; and a few
//! sectors of a written layer with their future content.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::chain::{FlatCache, View};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, Version};
use crate::image::{Caches, Image, Layer};
use crate::io::{Backend, Expect, Identity, OpenObject, Timestamp};
use crate::units::{BlockStatus, Stability};

use super::describe::{DetectedContent, describe};
use super::encoded;
use super::file_names::shown;
use super::options::Format;

/// Number of sampled sectors of a file.
pub const SAMPLES: u64 = 24;
const SECTOR: usize = 512;
/// Bytes of a table read at once.
const PIECE: u64 = 1 << 20;

/// A file that a note names, by path and identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Its path relative to the guarded directory.
    #[serde(with = "encoded")]
    pub path: PathBuf,
    /// Its identity: a path, and an inode number, can be reused.
    #[serde(with = "identity")]
    pub file: Identity,
    /// The evidence of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
    /// Its external data file, which is part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<DataFileRef>>,
}

/// An external data file, by path and identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFileRef {
    /// Its path relative to the guarded directory; outside of the store the full path, and it is not checked.
    #[serde(with = "encoded")]
    path: PathBuf,
    #[serde(with = "identity")]
    file: Identity,
    /// Bytes of the file.
    size: u64,
    /// A few sectors of it; none if guests write it.
    #[serde(default)]
    samples: Vec<SectorSample>,
    /// Its last modification, if it is not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    written: Option<FileTime>,
}

impl DataFileRef {
    /// The file at `path` beneath `root`, which a note calls `name`.
    pub(crate) fn witness(root: &dyn Backend, path: &Path, name: PathBuf, fixed: bool) -> Result<Self> {
        let file = root.open_file(path)?;
        let stat = file.stat()?;
        let samples = if fixed { samples(&*file, stat.size)? } else { Vec::new() };
        let written = fixed.then_some(FileTime::of(stat.modified));
        Ok(Self { path: name, file: file.identity()?, size: stat.size, samples, written })
    }

    /// The evidence against the file of its name, as a sentence. For a copy only name and content are
    /// compared.
    pub(super) fn against(&self, root: &dyn Backend, allowed: AllowedChange) -> Option<String> {
        if self.path.is_absolute() {
            return None;
        }
        let fact = match self.differs(root, allowed) {
            Ok(fact) => fact?.to_owned(),
            Err(error) => format!("cannot be checked: {error}"),
        };
        Some(format!("{}, an external data file, {fact}", shown(&self.path)))
    }

    fn differs(&self, root: &dyn Backend, allowed: AllowedChange) -> Result<Option<&'static str>> {
        let file = root.open_file(&self.path)?;
        if !allowed.is_copy && !self.file.is_met_as(&file.identity()?) {
            return Ok(Some("is another file than it was"));
        }
        let samples = if self.written.is_some() { &self.samples } else { allowed.of_copy(&self.samples) };
        other_bytes(&*file, allowed, self.size, samples, self.written)
    }
}

/// The evidence against a file without a header having its old content.
fn other_bytes(
    file: &dyn OpenObject,
    allowed: AllowedChange,
    size: u64,
    samples: &[SectorSample],
    written: Option<FileTime>,
) -> Result<Option<&'static str>> {
    let stat = file.stat()?;
    Ok(if !allowed.is_size(size, stat.size) {
        Some("has another size than it had")
    } else if !allowed.any_bytes && has_others(file, samples)? {
        Some("holds other bytes than it did")
    } else if !allowed.is_time(written, stat.modified) {
        Some("has been written since")
    } else {
        None
    })
}

/// The evidence of a file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "format", rename_all = "lowercase")]
pub enum Evidence {
    /// A qcow2 image.
    Qcow2 {
        /// Bytes of its disk.
        size: u64,
        /// Digest of the constant fields of its header.
        shape: Digest,
        /// Digest of the name and format of its backing file.
        backing: Digest,
        /// Digest of its L1 table, if it is not written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tables: Option<Digest>,
        /// A few sectors of the file after its header, if it is not written: images that were created alike
        /// have the same tables.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        samples: Vec<SectorSample>,
        /// A few sectors of its disk, by their offsets there, that the command is going to write.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        disk: Vec<SectorSample>,
        /// Digest of the cluster that holds its header.
        head: Digest,
        /// Its last modification, if it is not written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        written: Option<FileTime>,
    },
    /// A raw image.
    Raw {
        /// Bytes of the file.
        size: u64,
        /// A few sectors of it; none if guests write it.
        samples: Vec<SectorSample>,
        /// Its last modification, if it is not written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        written: Option<FileTime>,
    },
}

/// A time of a file, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileTime(i64);

impl FileTime {
    fn of(time: Timestamp) -> Self {
        Self(time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanoseconds)))
    }
}

/// One sector of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectorSample {
    /// Its offset.
    pub at: u64,
    /// Digest of its bytes.
    pub was: Digest,
    /// Digest of the bytes that the command will write there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub becomes: Option<Digest>,
}

/// A digest that is the same on every machine and in every version (FNV-1a). A forged one gains nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::EMPTY.and(bytes)
    }

    const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    fn and(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16)
            .map(Self)
            .map_err(|_| serde::de::Error::custom("a digest that is no number"))
    }
}

/// An identity as text.
pub(super) mod identity {
    use super::{Deserialize, Deserializer, Identity, Serializer};

    pub(crate) fn serialize<S: Serializer>(identity: &Identity, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(identity)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Identity, D::Error> {
        let text = String::deserialize(deserializer)?;
        Identity::parse(&text)
            .ok_or_else(|| serde::de::Error::custom("an identity that is not device:inode:birth"))
    }
}

/// The changes that a file may have undergone since its evidence was recorded.
#[expect(clippy::struct_excessive_bools, reason = "each is a change of its own")]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AllowedChange {
    /// It may have another backing file.
    pub(super) backing: bool,
    /// Its disk may have grown.
    pub(super) growth: bool,
    /// Its disk may have another size.
    pub(super) any_size: bool,
    /// Guests may have written it.
    pub(super) any_bytes: bool,
    /// It is a copy, with other timestamps.
    pub(super) is_copy: bool,
}

impl AllowedChange {
    fn is_size(self, old: u64, now: u64) -> bool {
        self.any_size || now == old || (self.growth && now > old)
    }

    /// Samples that count only in a copy: guest writes are committed, too, and may have changed all of a few
    /// samples.
    fn of_copy(self, samples: &[SectorSample]) -> &[SectorSample] {
        if self.is_copy && !self.any_bytes { samples } else { &[] }
    }

    fn is_time(self, written: Option<FileTime>, now: Timestamp) -> bool {
        self.is_copy || written.is_none_or(|written| written == FileTime::of(now))
    }
}

impl FileRef {
    /// A file by its identity alone.
    pub fn known(path: PathBuf, file: Identity) -> Self {
        Self { path, file, evidence: None, data: None }
    }

    /// The file at `path` beneath `root`, with evidence. `fixed`: it is not written until the command is
    /// done, which itself writes at most its header.
    pub fn witness(root: &dyn Backend, path: &Path, format: Format, fixed: bool) -> Result<Self> {
        let file = root.open_file(path)?;
        let evidence = evidence(&*file, path, format, fixed)?;
        Ok(Self { path: path.to_path_buf(), file: file.identity()?, evidence: Some(evidence), data: None })
    }

    /// Whether both are one file under one name.
    pub fn is(&self, other: &Self) -> bool {
        self.path == other.path && self.file.is(&other.file)
    }

    /// Whether the file at `path` beneath `root` is this one, by its identity.
    pub(crate) fn is_at(&self, root: &dyn Backend, path: &Path) -> bool {
        root.identify(path).is_ok_and(|found| found.is(&self.file))
    }

    /// Records that the command is going to write it.
    pub fn will_be_written(&mut self) {
        match &mut self.evidence {
            Some(Evidence::Raw { written, .. }) => *written = None,
            Some(Evidence::Qcow2 { samples, written, .. }) => {
                *written = None;
                samples.clear();
            }
            None => {}
        }
        if let Some(data) = &mut self.data {
            data.written = None;
            data.samples.clear();
        }
    }

    /// Records sectors of a qcow2 image that the command writes: of its external data file (`take(true)`), or
    /// of its disk, since clusters in the image itself are reused for other data.
    pub(crate) fn keep_samples(&mut self, take: impl FnOnce(bool) -> Vec<SectorSample>) {
        if let Some(data) = &mut self.data {
            data.samples = take(true);
        } else if let Some(Evidence::Qcow2 { disk, .. }) = &mut self.evidence {
            *disk = take(false);
        }
    }

    /// The sampled sectors of a raw image, for recording their future content.
    pub(crate) fn samples(&mut self) -> &mut [SectorSample] {
        match &mut self.evidence {
            Some(Evidence::Raw { samples, .. }) => samples,
            _ => &mut [],
        }
    }
}

impl SectorSample {
    /// Bytes of a sample.
    pub(crate) const LEN: usize = SECTOR;

    /// The bytes of a sample at that offset of a disk; zeroes beyond its end.
    pub(crate) fn read(view: &View, at: u64) -> Result<[u8; Self::LEN]> {
        let mut bytes = [0; Self::LEN];
        let have = view.size().saturating_sub(at).min(bytes.len() as u64) as usize;
        if have > 0 {
            view.read_at(at, &mut bytes[..have])?;
        }
        Ok(bytes)
    }
}

fn evidence(file: &dyn OpenObject, path: &Path, format: Format, fixed: bool) -> Result<Evidence> {
    let stat = file.stat()?;
    let (len, written) = (stat.size, fixed.then_some(FileTime::of(stat.modified)));
    if format == Format::Raw {
        let samples = if fixed { samples(file, len)? } else { Vec::new() };
        return Ok(Evidence::Raw { size: len, samples, written });
    }
    let header = header(file, len)?.ok_or_else(|| {
        Error::new(ErrorKind::Stale, format!("{} is no qcow2 image any more; scan it again", path.display()))
    })?;
    let tables = if fixed { Some(tables(file, &header)?) } else { None };
    let mut samples = if fixed { samples(file, len)? } else { Vec::new() };
    samples.retain(|sample| sample.at >= header.cluster.size());
    let (size, head) = (header.virtual_size, head(file, &header)?);
    let (shape, backing, disk) = (shape(&header), backing(&header), Vec::new());
    Ok(Evidence::Qcow2 { size, shape, backing, tables, samples, disk, head, written })
}

fn header(file: &dyn OpenObject, len: u64) -> Result<Option<std::sync::Arc<Header>>> {
    Ok(match describe(file, len)? {
        DetectedContent::Qcow2(qcow2) => Some(std::sync::Arc::clone(&qcow2.header)),
        DetectedContent::Plain
        | DetectedContent::Foreign(_)
        | DetectedContent::Malformed(_)
        | DetectedContent::Unseen => None,
    })
}

/// The fields of a header that no command changes.
fn shape(header: &Header) -> Digest {
    let data_file = header.data_file.as_ref().and_then(|file| file.name.as_deref());
    let numbers = [
        u8::from(header.version == Version::V3),
        header.cluster.bits() as u8,
        header.refcount_order as u8,
        u8::from(header.extended_l2()),
        u8::from(header.encryption.is_some()),
        u8::from(header.data_file.is_some()),
    ];
    Digest::of(&numbers).and(data_file.unwrap_or_default())
}

fn backing(header: &Header) -> Digest {
    let Some(backing) = &header.backing else { return Digest::EMPTY };
    let format = backing.format.as_deref().unwrap_or_default();
    Digest::of(&backing.name).and(&[0]).and(format.as_bytes())
}

/// The part of the file that a change of the header may touch.
fn head(file: &dyn OpenObject, header: &Header) -> Result<Digest> {
    let mut bytes = vec![0; header.cluster.size().min(PIECE) as usize];
    let read = file.read_at(0, &mut bytes).map_err(|error| error.within("reading its header"))?;
    Ok(Digest::of(&bytes[..read]))
}

fn tables(file: &dyn OpenObject, header: &Header) -> Result<Digest> {
    let (mut digest, len) = (Digest::EMPTY, header.l1.len_bytes());
    let mut at = 0;
    while at < len {
        let mut bytes = vec![0; PIECE.min(len - at) as usize];
        let read = file.read_at(header.l1.offset.0 + at, &mut bytes);
        let read = read.map_err(|error| error.within("reading its L1 table"))?;
        digest = digest.and(&bytes[..read]);
        at += bytes.len() as u64;
    }
    Ok(digest)
}

fn samples(file: &dyn OpenObject, len: u64) -> Result<Vec<SectorSample>> {
    let sectors = len.div_ceil(SECTOR as u64);
    let mut places: Vec<u64> =
        (0..SAMPLES.min(sectors)).map(|n| sectors * n / SAMPLES.min(sectors)).collect();
    places.extend(sectors.checked_sub(1));
    let mut found: Vec<SectorSample> = Vec::new();
    for place in places {
        let place = place * SECTOR as u64;
        // A sector with data is better evidence than a hole.
        let first = file.extent(place, len.max(place + 1))?;
        let data = (first.value == BlockStatus::Zero).then(|| place + first.len).filter(|data| *data < len);
        let at = data.map_or(place, |data| data / SECTOR as u64 * SECTOR as u64);
        if found.iter().all(|sample| sample.at != at) {
            found.push(SectorSample { at, was: sector(file, at)?, becomes: None });
        }
    }
    Ok(found)
}

/// The digest of a sector; zeroes beyond the end of the file.
fn sector(file: &dyn OpenObject, at: u64) -> Result<Digest> {
    let mut bytes = [0; SECTOR];
    file.read_at(at, &mut bytes).map_err(|error| error.within("reading a sector of it"))?;
    Ok(Digest::of(&bytes))
}

impl Evidence {
    /// The evidence against the file at `path` being the recorded one, to follow its name; `None` if there is
    /// none.
    pub(super) fn against(
        &self,
        root: &dyn Backend,
        path: &Path,
        allowed: AllowedChange,
        has_data: bool,
    ) -> Result<Option<&'static str>> {
        let file = root.open_file(path)?;
        let stat = file.stat()?;
        let verdict = match self {
            Self::Raw { size, samples, written } => other_bytes(&*file, allowed, *size, samples, *written)?,
            Self::Qcow2 {
                size,
                shape: old_shape,
                backing: old_backing,
                tables: old_tables,
                samples,
                disk,
                head: old_head,
                written,
            } => {
                let Some(header) = header(&*file, stat.size)? else {
                    return Ok(Some("is no qcow2 image any more"));
                };
                if shape(&header) != *old_shape {
                    Some("is another qcow2 image than before")
                } else if header.data_file.is_some() && !has_data {
                    Some("has an external data file without evidence")
                } else if !allowed.is_size(*size, header.virtual_size) {
                    Some("holds a disk of another size than before")
                } else if !allowed.backing && backing(&header) != *old_backing {
                    Some("names another backing file than it did")
                } else if let Some(old) = old_tables
                    && tables(&*file, &header)? != *old
                {
                    Some("has other tables than it had")
                } else if has_others(&*file, samples)?
                    || is_other_disk(root, path, &header, allowed.of_copy(disk))?
                {
                    Some("holds other bytes than it did")
                } else if !allowed.is_time(*written, stat.modified) && head(&*file, &header)? == *old_head {
                    // Steps of the command itself write its header only. An interrupted one may have changed
                    // no field of the header yet.
                    Some("has been written since")
                } else {
                    None
                }
            }
        };
        Ok(verdict)
    }
}

/// Whether too many of the sectors have neither their old nor their future content: a guest that wrote
/// meanwhile changes a few of those that change, and none of the others.
fn has_others(file: &dyn OpenObject, samples: &[SectorSample]) -> Result<bool> {
    are_others(samples, |at| sector(file, at))
}

/// The same for offsets in the disk of a qcow2 image, as far as the image itself holds them.
fn is_other_disk(
    root: &dyn Backend,
    path: &Path,
    header: &Arc<Header>,
    samples: &[SectorSample],
) -> Result<bool> {
    if samples.is_empty() || header.data_file.is_some() {
        return Ok(false);
    }
    let (name, caches) = (shown(path), Caches::new(PIECE as usize, PIECE as usize));
    let image =
        Image::qcow2(&name, root.open_file(path)?, None, Arc::clone(header), Expect::AnyVersion, &caches)?;
    let view = View::new(vec![Layer::active(&image)?], Stability::Frozen, &Arc::new(FlatCache::new(0)));
    are_others(samples, |at| SectorSample::read(&view, at).map(|bytes| Digest::of(&bytes)))
}

fn are_others(samples: &[SectorSample], read: impl Fn(u64) -> Result<Digest>) -> Result<bool> {
    let (mut others, mut is_other) = (0, false);
    for SectorSample { at, was, becomes } in samples {
        let now = read(*at)?;
        if now != *was && *becomes != Some(now) {
            others += 1;
            is_other |= becomes.is_none();
        }
    }
    Ok(is_other || 2 * others > samples.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LocalDirectory;

    #[test]
    fn other_bytes_and_sizes_speak_against_a_raw_file() {
        let place = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(place.path()).unwrap();
        let mut bytes: Vec<u8> = (0..196 * 512_u32).map(|n| (n / 512) as u8).collect();
        std::fs::write(place.path().join("a"), &bytes).unwrap();
        let mut named = FileRef::witness(&*root, Path::new("a"), Format::Raw, true).unwrap();
        named.will_be_written();
        let against = |named: &FileRef, allowed| {
            named
                .evidence
                .as_ref()
                .unwrap()
                .against(&*root, Path::new("a"), allowed, false)
                .unwrap()
                .is_some()
        };
        assert!(!against(&named, AllowedChange::default()));
        bytes.push(1);
        std::fs::write(place.path().join("a"), &bytes).unwrap();
        assert!(against(&named, AllowedChange::default()));
        assert!(!against(&named, AllowedChange { growth: true, ..AllowedChange::default() }));
        bytes.fill(7);
        std::fs::write(place.path().join("a"), &bytes).unwrap();
        let grown = AllowedChange { growth: true, ..AllowedChange::default() };
        assert!(against(&named, grown));
        let seven = Digest::of(&[7; SectorSample::LEN]);
        let last = named.samples().len() - 1;
        named.samples()[..last].iter_mut().for_each(|sample| sample.becomes = Some(seven));
        assert!(against(&named, grown), "the last one was not to change");
        named.samples()[last].becomes = Some(seven);
        assert!(!against(&named, grown));
    }
}
