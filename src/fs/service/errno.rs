//! The errno of each failure.
//!
//! [`errno`] maps the kinds of errors, and [`Refusal`] has those answers of the service that are no errors of
//! the store, of an image or of a guest. docs/SEMANTICS.md shows the same table.

use crate::error::{Error, ErrorKind};

/// The number that a client sees.
pub type Errno = rustix::io::Errno;

/// The errno of each kind of error.
pub fn errno(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::Usage => Errno::INVAL,
        ErrorKind::Exists => Errno::EXIST,
        ErrorKind::NotEmpty => Errno::NOTEMPTY,
        ErrorKind::Cancelled => Errno::CANCELED,
        ErrorKind::Busy => Errno::BUSY,
        ErrorKind::Denied => Errno::ACCESS,
        ErrorKind::ReadOnly => Errno::ROFS,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::Stale => Errno::STALE,
        ErrorKind::Corrupt | ErrorKind::Broken | ErrorKind::Poisoned | ErrorKind::Io => Errno::IO,
        ErrorKind::Escape | ErrorKind::Forbidden => Errno::PERM,
        ErrorKind::NoSpace => Errno::NOSPC,
        ErrorKind::Quota => Errno::DQUOT,
        ErrorKind::TooLarge => Errno::FBIG,
        ErrorKind::Limit | ErrorKind::Exhausted => Errno::MFILE,
    }
}

/// An answer that is no success. It is neither counted as an error nor logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A name would be created, removed or renamed.
    FixedNames,
    /// The node has no extended attribute of that name.
    NoAttribute,
    /// The mount has no extended attributes. The kernel does not ask again.
    WithoutAttributes,
    /// The client's buffer is shorter than the extended attribute.
    ShortBuffer,
    /// lseek(2) found neither data nor a hole there.
    NothingThere,
    /// An lseek(2) other than `SEEK_DATA` and `SEEK_HOLE`.
    UnknownSeek,
    /// A mode of fallocate(2) that disks do not have.
    UnknownFallocate,
    /// A page of a mapped control file was written back.
    CommandFromMapping,
    /// Direct reads of a disk that the kernel reads through its page cache for others.
    NoDirectReads,
    /// A client retries the open of a busy disk without end.
    BusyRetried,
}

impl Refusal {
    fn errno(self) -> Errno {
        match self {
            Refusal::FixedNames => Errno::PERM,
            Refusal::NoAttribute => Errno::NODATA,
            Refusal::WithoutAttributes => Errno::NOSYS,
            Refusal::ShortBuffer => Errno::RANGE,
            Refusal::NothingThere => Errno::NXIO,
            Refusal::UnknownSeek | Refusal::CommandFromMapping | Refusal::NoDirectReads => Errno::INVAL,
            Refusal::UnknownFallocate => Errno::OPNOTSUPP,
            Refusal::BusyRetried => Errno::TXTBSY,
        }
    }
}

/// Why a call fails.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    /// The error to count and to log.
    pub(super) error: Option<Error>,
}

impl Failure {
    /// The same failure with the number of `refusal`.
    pub(super) fn shown_as(self, refusal: Refusal) -> Self {
        Self { errno: refusal.errno(), ..self }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { errno: errno(error.kind()), error: Some(error) }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self { errno: refusal.errno(), error: None }
    }
}
