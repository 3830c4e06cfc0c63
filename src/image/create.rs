//! Fresh, empty qcow2 images of version 3.
//!
//! [`initial_image`] is pure; [`create`] puts its bytes into a new file, durably and so that a half-written
//! file is never taken for an image. The caller knows whether the backing file exists and how large its disk
//! is.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::extension::{BACKING_FORMAT, FEATURE_NAMES};
use crate::format::feature::{self, FEATURE_NAME_LEN};
use crate::format::frozen::{FROZEN_MAGIC, Frozen};
use crate::format::header::{MAGIC, MAX_BACKING_NAME_LEN, MAX_L1_LEN};
use crate::format::refcount::{block_entries, set_refcount};
use crate::units::{ClusterBits, SECTOR_SIZE, are_zero};

const HEADER_LEN: usize = 112;
const REFCOUNT_ORDER: u32 = 4;

/// The properties of a new image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of its disk, rounded up to whole sectors. Required; the caller fills in the size
    /// of the backing file's disk where the user gave none.
    pub size: Option<u64>,
    /// Its backing file.
    pub backing: Option<NewBacking>,
    /// The cluster size as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// Whether each cluster has 32 subclusters (extended L2 entries), which needs clusters of 16 KiB at
    /// least.
    pub extended_l2: bool,
    /// A freeze mark.
    pub frozen: Option<Frozen>,
}

/// The backing file of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBacking {
    /// The name for the header, except that a colon which QEMU would take for the end of a protocol's name is
    /// guarded by `./`.
    pub name: Vec<u8>,
    /// Its format. Never left out: formats are not guessed.
    pub format: String,
}

impl NewBacking {
    /// The name as written in a header.
    pub(super) fn guarded_name(&self) -> Result<Vec<u8>> {
        guarded_name(&self.name)
    }

    /// The format as written in a header.
    pub(super) fn checked_format(&self) -> Result<&[u8]> {
        let format = self.format.as_bytes();
        if (1..=15).contains(&format.len()) && format.iter().all(u8::is_ascii_graphic) {
            return Ok(format);
        }
        Err(usage(format!("backing format {:?} is not a word of 1 to 15 characters", self.format)))
    }
}

impl Default for CreateOptions {
    /// No size, no backing file, clusters of 64 KiB: QEMU's default.
    fn default() -> Self {
        Self { size: None, backing: None, cluster_bits: 16, extended_l2: false, frozen: None }
    }
}

/// Creates the file `path`, which must not exist yet, and returns when it is durable.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let image = initial_image(options)?;
    let context = |doing: &str| format!("{doing} {}", path.display());
    let file =
        File::options().write(true).create_new(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let fact = format!("{} exists already; remove it or choose another name", path.display());
                Error::new(ErrorKind::Usage, fact)
            }
            _ => Error::io(context("creating"), error),
        })?;
    let own = file
        .metadata()
        .map(|own| (own.dev(), own.ino()))
        .map_err(|error| Error::io(context("creating"), error))?;
    let unfinished = Unfinished(Some((path.to_owned(), own)));
    write_image(&file, &image).map_err(|error| Error::io(context("writing"), error))?;
    unfinished.keep();
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::io(format!("syncing {}", directory.display()), error))
}

/// A file that is removed when its creation fails.
struct Unfinished(Option<(PathBuf, (u64, u64))>);

impl Unfinished {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some((path, own)) = self.0.take()
            // Another process may have put something there since.
            && fs::symlink_metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == own)
        {
            // The error that caused this is the one to report.
            drop(fs::remove_file(path));
        }
    }
}

fn write_image(file: &File, image: &[u8]) -> io::Result<()> {
    const BLOCK: usize = 4096;
    file.set_len(image.len() as u64)?;
    for (at, block) in (0..).step_by(BLOCK).zip(image.chunks(BLOCK)).skip(1) {
        // Zeros stay holes.
        if !are_zero(block) {
            file.write_all_at(block, at)?;
        }
    }
    file.sync_all()?;
    // The magic comes last: before, the file is no image.
    file.write_all_at(&image[..image.len().min(BLOCK)], 0)?;
    file.sync_all()
}

/// The bytes of a fresh image: header, refcount table, refcount blocks, empty L1 table.
pub fn initial_image(options: &CreateOptions) -> Result<Vec<u8>> {
    let plan = ImageLayout::new(options)?;
    let first_cluster = plan.first_cluster(options)?;
    let cluster_len = plan.cluster.size() as usize;
    let mut image = vec![0; plan.clusters() as usize * cluster_len];
    image[..first_cluster.len()].copy_from_slice(&first_cluster);

    let block_at = |index: u64| (1 + plan.table_clusters + index) << plan.cluster.bits();
    let table = cluster_len;
    for index in 0..plan.blocks {
        let at = table + index as usize * 8;
        image[at..at + 8].copy_from_slice(&block_at(index).to_be_bytes());
    }
    let per_block = block_entries(plan.cluster, REFCOUNT_ORDER);
    for cluster in 0..plan.clusters() {
        let block = &mut image[block_at(cluster / per_block) as usize..][..cluster_len];
        set_refcount(block, (cluster % per_block) as usize, REFCOUNT_ORDER, 1);
    }
    Ok(image)
}

/// How the clusters of a fresh image are used, in this order: the header, the refcount table,
/// its blocks, the L1 table.
struct ImageLayout {
    cluster: ClusterBits,
    extended_l2: bool,
    size: u64,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
}

impl ImageLayout {
    fn new(options: &CreateOptions) -> Result<Self> {
        let bits = options.cluster_bits;
        let Some(cluster) = ClusterBits::new(bits) else {
            return Err(usage(format!(
                "clusters of 2^{bits} bytes are not allowed; 2^9 (512) to 2^21 (2 MiB) are"
            )));
        };
        let Some(size) = options.size else {
            return Err(usage("no size is given; an image without a backing file needs one".into()));
        };
        if options.extended_l2 && bits < 14 {
            return Err(usage(format!(
                "clusters of 2^{bits} bytes are too small for subclusters; 2^14 (16 KiB) is the least"
            )));
        }
        let l1_span = cluster.size() * (cluster.size() / if options.extended_l2 { 16 } else { 8 });
        let max = MAX_L1_LEN / 8 * l1_span;
        if size > max {
            let larger = if bits < 21 { "; use larger clusters" } else { "" };
            let fact =
                format!("{size} bytes are too many for clusters of {} bytes: at most {max}", cluster.size());
            return Err(usage(fact + larger));
        }
        let size = size.next_multiple_of(SECTOR_SIZE);
        let (extended_l2, l1_entries) = (options.extended_l2, size.div_ceil(l1_span));
        let mut plan = Self { cluster, extended_l2, size, table_clusters: 1, blocks: 1, l1_entries };
        // Table and blocks count themselves, too: they grow until they cover everything.
        loop {
            let blocks = plan.clusters().div_ceil(block_entries(cluster, REFCOUNT_ORDER));
            let table_clusters = (blocks * 8).div_ceil(cluster.size());
            if (blocks, table_clusters) == (plan.blocks, plan.table_clusters) {
                return Ok(plan);
            }
            (plan.blocks, plan.table_clusters) = (blocks, table_clusters);
        }
    }

    fn l1_at(&self) -> u64 {
        (1 + self.table_clusters + self.blocks) << self.cluster.bits()
    }

    fn clusters(&self) -> u64 {
        1 + self.table_clusters + self.blocks + (self.l1_entries * 8).div_ceil(self.cluster.size())
    }

    /// The header, its extensions and the backing name.
    fn first_cluster(&self, options: &CreateOptions) -> Result<Vec<u8>> {
        let mut extensions = Vec::new();
        let mut name = Vec::new();
        if let Some(backing) = &options.backing {
            name = backing.guarded_name()?;
            push_extension(&mut extensions, BACKING_FORMAT, backing.checked_format()?);
        }
        if let Some(mark) = &options.frozen {
            push_extension(&mut extensions, FROZEN_MAGIC, &mark.encode());
        }
        // As QEMU does: where clusters are small, the space is for the backing name.
        if self.cluster.size() >= 4096 {
            push_extension(&mut extensions, FEATURE_NAMES, &feature_names());
        }
        extensions.extend([0; 8]);
        let name_at = HEADER_LEN + extensions.len();
        let room = self.cluster.size() as usize;
        if name_at + name.len() > room {
            let len = name_at + name.len();
            let fact = format!(
                "header and backing file name have {len} bytes, but clusters of {room} are to hold them"
            );
            return Err(usage(fact + "; use larger clusters"));
        }
        let mut bytes = self.header(if name.is_empty() { 0 } else { name_at as u64 }, name.len() as u32);
        bytes.extend(extensions);
        bytes.extend(name);
        Ok(bytes)
    }

    fn header(&self, name_at: u64, name_len: u32) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        let l1_at = if self.l1_entries == 0 { 0 } else { self.l1_at() };
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes()); // version
        put(8, &name_at.to_be_bytes());
        put(16, &name_len.to_be_bytes());
        put(20, &self.cluster.bits().to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(self.l1_entries as u32).to_be_bytes());
        put(40, &l1_at.to_be_bytes());
        put(48, &self.cluster.size().to_be_bytes()); // refcount_table_offset
        put(56, &(self.table_clusters as u32).to_be_bytes());
        put(72, &(if self.extended_l2 { feature::EXTENDED_L2 } else { 0 }).to_be_bytes());
        put(96, &REFCOUNT_ORDER.to_be_bytes());
        put(100, &(HEADER_LEN as u32).to_be_bytes());
        out
    }
}

/// A colon in the first component of a path makes it a protocol for QEMU.
fn guarded_name(name: &[u8]) -> Result<Vec<u8>> {
    let first_part = name.split(|&byte| byte == b'/').next().unwrap_or_default();
    let guard: &[u8] = if first_part.contains(&b':') { b"./" } else { b"" };
    let guarded = [guard, name].concat();
    if name.is_empty() {
        return Err(usage("the name of the backing file is empty".into()));
    }
    if name.contains(&0) {
        return Err(usage("the name of the backing file contains a NUL byte".into()));
    }
    let (found, max) = (guarded.len(), MAX_BACKING_NAME_LEN);
    if found as u64 > max {
        return Err(usage(format!(
            "the name of the backing file has {found} bytes; at most {max} are allowed"
        )));
    }
    Ok(guarded)
}

fn push_extension(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend(magic.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Names of feature bits, for programs that do not know them.
fn feature_names() -> Vec<u8> {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = vec![0; names.len() * FEATURE_NAME_LEN];
    for (row, (kind, bit, name)) in out.chunks_exact_mut(FEATURE_NAME_LEN).zip(names) {
        (row[0], row[1]) = (kind, bit);
        row[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    out
}

fn usage(fact: String) -> Error {
    Error::new(ErrorKind::Usage, fact)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Header;

    fn sized(size: u64, cluster_bits: u32) -> CreateOptions {
        CreateOptions { size: Some(size), cluster_bits, ..CreateOptions::default() }
    }

    fn backed(name: &[u8], format: &str) -> CreateOptions {
        let backing = Some(NewBacking { name: name.to_vec(), format: format.into() });
        CreateOptions { backing, ..sized(1 << 20, 16) }
    }

    fn header(options: &CreateOptions) -> Header {
        let image = initial_image(options).unwrap();
        Header::parse(&image, image.len() as u64).unwrap()
    }

    fn refusal(options: &CreateOptions) -> String {
        let error = initial_image(options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        error.to_string()
    }

    #[test]
    fn a_fresh_image_parses_to_its_options() {
        let mark = Frozen { seconds: 5, nanoseconds: 6, description: "for good".into() };
        let parsed = header(&CreateOptions { frozen: Some(mark.clone()), ..backed(b"base.raw", "raw") });
        assert_eq!((parsed.virtual_size, parsed.cluster.bits(), parsed.frozen), (1 << 20, 16, Some(mark)));
        let backing = parsed.backing.unwrap();
        assert_eq!(
            (backing.name.as_slice(), backing.format.as_deref()),
            (b"base.raw".as_slice(), Some("raw"))
        );
        assert_eq!(parsed.feature_names.len(), 8);
    }

    #[test]
    fn sizes_round_up_to_sectors_from_nothing_to_the_limit() {
        for (size, virtual_size) in [(0, 0), (1, 512), (512, 512), (1_000_001, 1_000_448)] {
            assert_eq!(header(&sized(size, 16)).virtual_size, virtual_size);
        }
        for bits in [9, 12, 16] {
            let max = (4u64 << 20) * (1 << bits) * (1 << (bits - 3));
            assert_eq!(header(&sized(max, bits)).virtual_size, max);
            assert!(refusal(&sized(max + 1, bits)).ends_with(&format!("at most {max}; use larger clusters")));
        }
        assert!(refusal(&sized(u64::MAX, 21)).ends_with(&format!("at most {}", 1u64 << 61)));
    }

    #[test]
    fn names_that_look_like_protocols_are_guarded() {
        let name = |name: &[u8]| header(&backed(name, "raw")).backing.unwrap().name;
        assert_eq!(name(b"we:ird.raw"), b"./we:ird.raw");
        assert_eq!(name(b"json:{}"), b"./json:{}");
        assert_eq!(name(b"dir/we:ird.raw"), b"dir/we:ird.raw");
        assert_eq!(name(b"/abs:olute"), b"/abs:olute");
        assert_eq!(name(&[b'x'; 1023]), [b'x'; 1023]);
    }

    #[test]
    fn each_refusal_says_why() {
        assert!(refusal(&CreateOptions::default()).starts_with("no size is given"));
        assert!(refusal(&sized(1, 8)).starts_with("clusters of 2^8 bytes are not allowed"));
        assert!(refusal(&backed(b"", "raw")).ends_with("is empty"));
        assert!(refusal(&backed(b"a\0b", "raw")).ends_with("contains a NUL byte"));
        assert!(refusal(&backed(&[b'x'; 1024], "raw")).ends_with("has 1024 bytes; at most 1023 are allowed"));
        assert!(refusal(&backed(&[b':'; 1022], "raw")).ends_with("has 1024 bytes; at most 1023 are allowed"));
        assert!(refusal(&backed(b"base", "")).contains("is not a word"));
        assert!(refusal(&backed(b"base", "a b")).contains("is not a word"));
        let tight = CreateOptions { cluster_bits: 9, ..backed(&[b'x'; 400], "raw") };
        assert!(refusal(&tight).ends_with("use larger clusters"));
    }
}
