//! Errors, in three groups that are never mixed.
//!
//! Failures of the system and of requests are an [`Error`]. Among these, a damaged file is
//! [`ErrorKind::Corrupt`], and a valid file with a feature that chainfs lacks is [`ErrorKind::Unsupported`].
//! Bugs of chainfs are assertions. The message of an error names the file, the fact and, if there is one, the
//! remedy.

mod printable;

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use printable::{escaped, is_plain, printable, shell_word};

/// The result of operations that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of an error, for programs. The mount's service maps each to its errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The name does not exist.
    NotFound,
    /// A request is invalid.
    Usage,
    /// The name exists already.
    Exists,
    /// Other data would be lost: the image has overlays, or it holds snapshots.
    NotEmpty,
    /// The user has cancelled it.
    Cancelled,
    /// A needed file is in use.
    Busy,
    /// The caller has no permission.
    Denied,
    /// The file, file system or mount is read-only.
    ReadOnly,
    /// A valid file with a feature that chainfs does not support.
    Unsupported,
    /// The file was changed or removed since it was looked up.
    Stale,
    /// A file that violates its format.
    Corrupt,
    /// A view whose chain is broken: a layer is missing or unreadable, or the chain loops.
    Broken,
    /// A name that leads out of the store.
    Escape,
    /// The request exceeds a limit of chainfs or of a format.
    Limit,
    /// The process is out of descriptors, threads or processes; a retry may succeed.
    Exhausted,
    /// This change is not permitted on this file.
    Forbidden,
    /// The file system that holds the image is full.
    NoSpace,
    /// The quota of the image's owner is exhausted.
    Quota,
    /// A file would exceed a size limit of its file system, its format or the process.
    TooLarge,
    /// An earlier write of the image's tables failed: the image is no longer written.
    Poisoned,
    /// An I/O operation failed.
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

/// An error with a message for users and a kind for programs.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Arc<io::Error>>,
    hold: Option<Arc<DomainHold>>,
}

/// The running domain of libvirt that keeps something from being done, and what to do about that.
#[derive(Debug)]
struct DomainHold {
    domain: String,
    remedy: String,
}

impl Error {
    /// An error that chainfs detected. `context` is a lower-case message that names file, fact and remedy.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None, hold: None }
    }

    /// A system error during `context` ("reading web01.qcow2").
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
        Self { kind, context: context.into(), source: Some(Arc::new(source)), hold: None }
    }

    /// A system error at the start of a thread or process, which may mean a resource limit.
    pub fn beginning(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let mut error = Self::io(context, source);
        let is_again = |source: &Arc<io::Error>| source.kind() == io::ErrorKind::WouldBlock;
        if error.source.as_ref().is_some_and(is_again) {
            error.kind = ErrorKind::Exhausted;
        }
        error
    }

    /// The kind, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error, caused by a running domain of libvirt. `remedy` ends the message; it may be replaced
    /// by one who knows more.
    #[must_use]
    pub fn held_by(mut self, domain: impl Into<String>, remedy: impl Into<String>) -> Self {
        self.hold = Some(Arc::new(DomainHold { domain: domain.into(), remedy: remedy.into() }));
        self
    }

    /// The running domain of libvirt that is the cause, if one is.
    pub fn domain(&self) -> Option<&str> {
        self.hold.as_ref().map(|hold| &*hold.domain)
    }

    /// The same error with a prefix: "`context`: ...".
    #[must_use]
    pub fn within(mut self, context: impl fmt::Display) -> Self {
        self.context = format!("{context}: {}", self.context);
        self
    }
}

/// Whether an errno means that the process or the system is out of descriptors.
fn is_exhaustion(errno: i32) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|known| known.raw_os_error() == errno)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            // Messages contain names from images and directories, which are untrusted.
            Some(source) => write!(f, "{}: {}", printable(&self.context), printable(&system_fact(source)))?,
            None => f.write_str(&printable(&self.context))?,
        }
        self.hold.as_ref().map_or(Ok(()), |hold| write!(f, "; {}", printable(&hold.remedy)))
    }
}

/// The system's error text without its number, replaced where a clearer text is known.
fn system_fact(source: &io::Error) -> String {
    let said = source.to_string();
    let Some(number) = source.raw_os_error() else { return said };
    match rustix::io::Errno::from_raw_os_error(number) {
        rustix::io::Errno::XDEV => {
            "it is on another file system, or behind a symbolic link that leads out of the store".to_owned()
        }
        rustix::io::Errno::NOTCONN => {
            "the mount is dead because its daemon has ended; unmount it with chainfs umount, and \
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
    fn system_errors_are_shown_without_numbers_and_explained() {
        let said = |number: i32| Error::io("opening x", io::Error::from_raw_os_error(number)).to_string();
        assert_eq!(said(2), "opening x: No such file or directory");
        let crossing = "it is on another file system, or behind a symbolic link that leads out of the store";
        assert_eq!(said(rustix::io::Errno::XDEV.raw_os_error()), format!("opening x: {crossing}"));
        assert!(said(rustix::io::Errno::NOTCONN.raw_os_error()).contains("unmount it with chainfs umount"));
        assert_eq!(
            Error::io("x", io::Error::other("words (os error of ours)")).to_string(),
            "x: words (os error of ours)"
        );
    }
}
