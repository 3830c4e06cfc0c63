//! Detects the content of one file: its header and its internal snapshots, if it is qcow2.
//!
//! Reads the header cluster and the snapshot table, nothing else; the descriptor is closed again
//! at once. What is found stays valid while the file's version does.

use std::sync::Arc;

use crate::error::Result;
use crate::format::foreign::{self, ForeignFormat, Parents};
use crate::format::snapshot::Snapshot;
use crate::format::{Header, Malformed, header};
use crate::image::read_readable_snapshots;
use crate::io::Storage;

/// The detected content of a file.
#[derive(Clone, Debug)]
pub enum DetectedContent {
    /// Unread: only its name is known.
    Unseen,
    /// It begins with no known magic.
    Plain,
    /// A qcow2 image.
    Qcow2(Arc<Qcow2Description>),
    /// It has the magic, and an invalid header.
    Malformed(Arc<BadHeader>),
    /// An image of a format that chainfs does not read.
    Foreign(Arc<ForeignImage>),
}

/// A qcow2 image of which only the backing file is known.
#[derive(Debug)]
pub struct BadHeader {
    /// What is wrong with it.
    pub reason: String,
    /// Its backing file.
    pub parents: Parents,
}

/// An image of a format that chainfs does not read.
#[derive(Debug)]
pub struct ForeignImage {
    /// Its format.
    pub kind: ForeignFormat,
    /// The files that it needs.
    pub parents: Parents,
}

impl DetectedContent {
    /// Whether it begins with qcow2's magic.
    pub fn has_magic(&self) -> bool {
        matches!(self, DetectedContent::Qcow2(_) | DetectedContent::Malformed(_))
    }
}

/// Bytes of the smallest header that can name a file.
pub(super) const MIN_HEADER_LEN: u64 = header::V2_LEN as u64;

/// The parsed parts of a qcow2 image.
#[derive(Debug)]
pub struct Qcow2Description {
    /// Its header, shared with its openers.
    pub header: Arc<Header>,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Errors of its internal snapshots, to follow the file's name; the active state can be read all the
    /// same.
    pub snapshot_problem: Option<String>,
    /// What is wrong with its refcounts, to follow the file's name; only writers need them.
    pub refcount_problem: Option<String>,
    /// A digest of the bytes that were read as header.
    pub digest: u64,
}

/// Detects the content of `file`, of `len` bytes. `Err` only if it cannot be read.
pub(super) fn describe(file: &dyn Storage, len: u64) -> Result<DetectedContent> {
    let mut bytes = vec![0; foreign::PROBE_LEN];
    let got = read(file, 0, &mut bytes)?;
    if let Some(kind) = foreign::probe(&bytes[..got]) {
        let parents = foreign::parents(kind, len, &mut |at, buf| read(file, at, buf))?;
        return Ok(DetectedContent::Foreign(Arc::new(ForeignImage { kind, parents })));
    }
    if !header::has_magic(&bytes) {
        return Ok(DetectedContent::Plain);
    }
    bytes.truncate(header::PROBE_LEN);
    let malformed = |reason: String| {
        let parents = foreign::qcow(len, &mut |at, buf| read(file, at, buf))?;
        Ok(DetectedContent::Malformed(Arc::new(BadHeader { reason, parents })))
    };
    let needed = match header::needed_len(&bytes) {
        Ok(needed) => needed.min(len),
        Err(reason) => return malformed(reason.to_string()),
    };
    bytes = vec![0; needed as usize];
    read(file, 0, &mut bytes)?;
    let header = match Header::parse(&bytes, len) {
        Ok(header) => Arc::new(header),
        Err(reason) => return malformed(reason.to_string()),
    };
    let (snapshots, cut) = read_readable_snapshots(&header, |at, buf| read(file, at, buf))?;
    let snapshot_problem = match cut {
        Some(reason) => Some(missing_snapshots(&header, snapshots.len(), &reason)),
        None => damaged_snapshots(&snapshots).or_else(|| lost_snapshot(&snapshots, len)),
    };
    let refcount_problem = header.refcount_damage.as_ref().map(|reason| {
        let fact = format!("has damaged refcounts, so it is read-only: {}", reason.fact());
        format!("{fact}; unmount it and run chainfs check --repair all")
    });
    let digest = digest(&bytes);
    Ok(DetectedContent::Qcow2(Arc::new(Qcow2Description {
        header,
        snapshots,
        snapshot_problem,
        refcount_problem,
        digest,
    })))
}

/// Maximum number of damaged snapshots that are named.
const NAMED: usize = 8;

/// Reports a table that ends early.
fn missing_snapshots(header: &Header, found: usize, reason: &Malformed) -> String {
    let count = header.snapshots.count;
    let reason = match reason {
        Malformed::Truncated { .. } => {
            format!("the snapshot table of {count} entries is cut off by the end of the file")
        }
        reason => reason.to_string(),
    };
    match found {
        0 => format!("shows no internal snapshots: {reason}"),
        found => format!("shows {found} of {count} internal snapshots: {reason}"),
    }
}

/// Names the snapshots with a damaged entry; the others can be read all the same.
fn damaged_snapshots(snapshots: &[Snapshot]) -> Option<String> {
    let damaged: Vec<&Snapshot> = snapshots.iter().filter(|snapshot| snapshot.damage.is_some()).collect();
    let reason = damaged.first()?.damage.as_ref()?;
    let name =
        |snapshot: &&Snapshot| format!("\"{}\"", String::from_utf8_lossy(&snapshot.name).escape_debug());
    let names = damaged.iter().take(NAMED).map(name).collect::<Vec<_>>().join(", ");
    let more = damaged.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let what = if damaged.len() == 1 { "an internal snapshot" } else { "internal snapshots" };
    Some(format!("has {what} that cannot be read, {names}{more}: {reason}"))
}

/// The files that an image without the expected qcow2 magic needs, as far as its header still shows.
pub(super) fn parents_without_magic(file: &dyn Storage, len: u64) -> Result<Parents> {
    let mut head = vec![0; header::PROBE_LEN];
    let got = read(file, 0, &mut head)?;
    if foreign::is_qcow2_but_for_magic(&head[..got]) {
        foreign::qcow(len, &mut |at, buf| read(file, at, buf))
    } else {
        Ok(Parents::Unknown)
    }
}

/// Reports the first snapshot whose L1 table is not in the file.
fn lost_snapshot(snapshots: &[Snapshot], len: u64) -> Option<String> {
    let is_lost = |s: &&Snapshot| s.l1.offset.0.checked_add(s.l1.len_bytes()).is_none_or(|end| end > len);
    let lost = snapshots.iter().find(is_lost)?;
    let name = String::from_utf8_lossy(&lost.name).into_owned();
    Some(format!(
        "has an internal snapshot \"{}\" that cannot be read: its L1 table at {} reaches past the end of the \
            file \
         ({len:#x}); restore the image from a copy, or delete it with qemu-img snapshot -d",
        name.escape_debug(),
        lost.l1.offset
    ))
}

/// The current digest of a file's header, to compare with [`Qcow2Description::digest`].
pub(super) fn header_digest(file: &dyn Storage, len: u64) -> Result<u64> {
    let mut bytes = vec![0; header::PROBE_LEN];
    read(file, 0, &mut bytes)?;
    if !header::has_magic(&bytes) {
        return Ok(0);
    }
    let Ok(needed) = header::needed_len(&bytes) else { return Ok(0) };
    bytes = vec![0; needed.min(len) as usize];
    read(file, 0, &mut bytes)?;
    Ok(digest(&bytes))
}

fn read(file: &dyn Storage, at: u64, buf: &mut [u8]) -> Result<usize> {
    file.read_at(at, buf).map_err(|error| error.within("reading its header"))
}

fn digest(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}
