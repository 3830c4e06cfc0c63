//! Reads files with secrets: only those that no other user can read.

use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use zeroize::{Zeroize as _, Zeroizing};

use crate::error::{Error, ErrorKind, Result};
use crate::store::shown;

/// The version of a file: it changes when the file is written, replaced, or given to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileStamp([i64; 7]);

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// It must be a regular file, which never blocks.
    Never,
    /// It may be a pipe, whose writer is waited for.
    ForWriter,
}

impl FileStamp {
    fn of(file: &Metadata) -> Self {
        let [device, inode, size] = [file.dev(), file.ino(), file.size()].map(u64::cast_signed);
        Self([device, inode, size, file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()])
    }

    /// The version of the file at a path now; `None` if there is none.
    pub(super) fn now(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|file| Self::of(&file))
    }
}

/// The bytes of a file with secrets, at most `limit` of them. `Denied` if others can read it.
pub(super) fn read(path: &Path, limit: usize, wait: Wait) -> Result<(Zeroizing<Vec<u8>>, FileStamp)> {
    let name = shown(path);
    let fail = |error| Error::io(format!("reading {name}"), error);
    let mut options = File::options();
    options.read(true);
    if wait == Wait::Never {
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(fail)?;
    let found = file.metadata().map_err(fail)?;
    if wait == Wait::Never && !found.is_file() {
        return Err(Error::new(ErrorKind::Usage, format!("{name}: not a regular file")));
    }
    check_owner(&found, &name)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit.min(found.len() as usize) + 1));
    read_all(file, limit, &mut bytes).map_err(fail)?;
    if bytes.len() > limit {
        let fact = format!("{name}: longer than {limit} bytes, the limit for keys");
        return Err(Error::new(ErrorKind::Limit, fact));
    }
    Ok((bytes, FileStamp::of(&found)))
}

/// Reads up to one byte more than `limit`, without leaving copies behind where the buffer grows.
pub(super) fn read_all(
    mut file: impl std::io::Read,
    limit: usize,
    bytes: &mut Zeroizing<Vec<u8>>,
) -> std::io::Result<()> {
    let mut piece = Zeroizing::new([0; 4096]);
    while bytes.len() <= limit {
        let len = match file.by_ref().take((limit + 1 - bytes.len()) as u64).read(&mut *piece) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if bytes.capacity() - bytes.len() < len {
            let mut larger = Zeroizing::new(Vec::with_capacity(bytes.capacity() * 2 + len));
            larger.extend_from_slice(bytes);
            bytes.zeroize();
            *bytes = larger;
        }
        bytes.extend_from_slice(&piece[..len]);
    }
    Ok(())
}

/// Refuses a file that belongs to another user, or that others can read or write.
fn check_owner(file: &Metadata, name: &str) -> Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let refuse = |fact: String| Err(Error::new(ErrorKind::Denied, fact));
    if file.uid() != own && file.uid() != 0 {
        let uid = file.uid();
        return refuse(format!(
            "{name}: belongs to uid {uid}, so its keys are not used; make it owned by uid {own}"
        ));
    }
    let mode = file.mode() & 0o777;
    if mode & 0o077 != 0 {
        let fact = format!("{name}: other users have access (mode {mode:o}), so its keys are not used");
        return refuse(format!("{fact}; run chmod 600 {name}"));
    }
    Ok(())
}
