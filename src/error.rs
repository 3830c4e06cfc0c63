//! What can go wrong, in three kinds that are never mixed.
//!
//! The world fails with an [`Error`]; a bad file is [`ErrorKind::Corrupt`], a good file with a
//! feature that chainfs lacks is [`ErrorKind::Unsupported`]; our own bugs are assertions.
//! Every error says what it is about: the file, the fact and, where there is one, the remedy.

mod printable;

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use printable::{escaped, is_plain, printable};

/// The result of everything that touches the world.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a program needs to know. [`errno`] maps each to its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// There is nothing of that name.
    NotFound,
    /// The words of a request are wrong.
    Usage,
    /// There is something of that name already.
    Exists,
    /// Something else would be lost with it: other images stand on it, or snapshots are kept in it.
    NotEmpty,
    /// The user has stopped it.
    Cancelled,
    /// Somebody else uses what is needed.
    Busy,
    /// The caller may not do this.
    Denied,
    /// The thing can only be read.
    ReadOnly,
    /// A good file that needs a feature which chainfs does not have.
    Unsupported,
    /// The file has changed or gone since it was looked up.
    Stale,
    /// A file that breaks its format's rules.
    Corrupt,
    /// A view whose chain is broken: a layer is missing, loops, or cannot be read.
    Broken,
    /// A name that leads out of the store.
    Escape,
    /// What is asked for is more than a limit of chainfs or of a format allows.
    Limit,
    /// The process has no more files, threads or processes to give; it may have some again in a moment.
    Exhausted,
    /// The change is not one that may be made this way.
    Forbidden,
    /// The file system that holds the image is full.
    NoSpace,
    /// The owner of the image has used up what the file system allows.
    Quota,
    /// A file would become larger than its file system, its format or a limit allows.
    TooLarge,
    /// The image's tables could not be written: nothing is written to it any more.
    Poisoned,
    /// The system refused to read or write.
    Io,
}

/// Every kind, for tests and tables.
pub const ERROR_KINDS: [ErrorKind; 21] = [
    ErrorKind::NotFound,
    ErrorKind::Usage,
    ErrorKind::Exists,
    ErrorKind::NotEmpty,
    ErrorKind::Cancelled,
    ErrorKind::Busy,
    ErrorKind::Denied,
    ErrorKind::ReadOnly,
    ErrorKind::Unsupported,
    ErrorKind::Stale,
    ErrorKind::Corrupt,
    ErrorKind::Broken,
    ErrorKind::Escape,
    ErrorKind::Limit,
    ErrorKind::Exhausted,
    ErrorKind::Forbidden,
    ErrorKind::NoSpace,
    ErrorKind::Quota,
    ErrorKind::TooLarge,
    ErrorKind::Poisoned,
    ErrorKind::Io,
];

/// The errno that a caller of the file system sees; docs/SEMANTICS.md shows the same table.
pub fn errno(kind: ErrorKind) -> rustix::io::Errno {
    use rustix::io::Errno;
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

/// An error with a sentence for people and a kind for programs.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Arc<io::Error>>,
}

impl Error {
    /// An error of our own finding. `context` is a lower-case sentence that names file, fact and remedy.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// An error of the system while doing `context` ("reading web01.qcow2").
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::ResourceBusy => ErrorKind::Busy,
            io::ErrorKind::StaleNetworkFileHandle => ErrorKind::Stale,
            io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            io::ErrorKind::QuotaExceeded => ErrorKind::Quota,
            io::ErrorKind::FileTooLarge => ErrorKind::TooLarge,
            _ if source.raw_os_error().is_some_and(is_exhaustion) => ErrorKind::Exhausted,
            _ => ErrorKind::Io,
        };
        Self { kind, context: context.into(), source: Some(Arc::new(source)) }
    }

    /// An error while beginning a thread or a process: there may be no more of them.
    pub fn beginning(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let mut error = Self::io(context, source);
        let is_again = |source: &Arc<io::Error>| source.kind() == io::ErrorKind::WouldBlock;
        if error.source.as_ref().is_some_and(is_again) {
            error.kind = ErrorKind::Exhausted;
        }
        error
    }

    /// What a program needs to know.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with more said in front: "`context`: ...".
    #[must_use]
    pub fn within(mut self, context: impl fmt::Display) -> Self {
        self.context = format!("{context}: {}", self.context);
        self
    }
}

/// Whether a number says that the process or the system has no more files open to give.
fn is_exhaustion(errno: i32) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|known| known.raw_os_error() == errno)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            // Names in sentences are whatever an image or a directory says.
            Some(source) => write!(f, "{}: {}", printable(&self.context), printable(&system_fact(source))),
            None => f.write_str(&printable(&self.context)),
        }
    }
}

/// What the system says, without its number; where its words explain nothing, what they mean here.
fn system_fact(source: &io::Error) -> String {
    let said = source.to_string();
    let Some(number) = source.raw_os_error() else { return said };
    match rustix::io::Errno::from_raw_os_error(number) {
        rustix::io::Errno::XDEV => {
            "it lies on another file system, or behind a symbolic link that leads out of the store".to_owned()
        }
        rustix::io::Errno::NOTCONN => {
            "the mount is dead, for its daemon has gone; take it away with chainfs umount, and \
                                       mount the store again"
                .to_owned()
        }
        _ => said.split(" (os error ").next().unwrap_or_default().to_owned(),
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_words_come_without_numbers_and_with_what_they_mean() {
        let said = |number: i32| Error::io("opening x", io::Error::from_raw_os_error(number)).to_string();
        assert_eq!(said(2), "opening x: No such file or directory");
        let crossing = "it lies on another file system, or behind a symbolic link that leads out of the store";
        assert_eq!(said(rustix::io::Errno::XDEV.raw_os_error()), format!("opening x: {crossing}"));
        assert!(said(rustix::io::Errno::NOTCONN.raw_os_error()).contains("take it away with chainfs umount"));
        assert_eq!(
            Error::io("x", io::Error::other("words (os error of ours)")).to_string(),
            "x: words (os error of ours)"
        );
    }
}
