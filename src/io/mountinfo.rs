//! Reads the list of mounts from `/proc/self/mountinfo` (proc(5)).

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fs::{self, Mode, OFlags};

use crate::error::{Error, Result};

use super::descriptors::with_descriptor;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Major and minor device number.
    pub device: (u32, u32),
    /// The mount point.
    pub directory: PathBuf,
    /// Type, with its subtype: `ext4`, `fuse.chainfs`.
    pub kind: String,
    /// The mount source.
    pub source: PathBuf,
    /// The options of the file system, as in `rw,user_id=0,allow_other`.
    pub options: String,
}

/// All mounts of this namespace, oldest first.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let fail = |error: std::io::Error| Error::io("reading the list of mounts", error);
    let open = || fs::open("/proc/self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut text = Vec::new();
    let mut file = File::from(with_descriptor(open).map_err(|error| fail(error.into()))?);
    file.read_to_end(&mut text).map_err(fail)?;
    Ok(parse(&text))
}

/// The mounts of a text in the format of `/proc/self/mountinfo`.
pub fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n').filter_map(entry).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn entry(line: &[u8]) -> Option<MountEntry> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let (major, minor) = str::from_utf8(words.get(2)?).ok()?.split_once(':')?;
    let dash = words.iter().position(|word| *word == b"-")?;
    Some(MountEntry {
        device: (major.parse().ok()?, minor.parse().ok()?),
        directory: unescape(words.get(4)?),
        kind: String::from_utf8_lossy(words.get(dash + 1)?).into_owned(),
        source: unescape(words.get(dash + 2)?),
        options: words
            .get(dash + 3)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .unwrap_or_default(),
    })
}

/// Decodes spaces, tabs, newlines and backslashes, which are written as three octal digits; in `/etc/fstab`,
/// too.
pub fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, more)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| {
                more.get(..3).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok())
            })
            .flatten();
        rest = if octal.is_some() { &more[3..] } else { more };
        bytes.push(octal.unwrap_or(*first));
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_parsed() {
        let line =
            br"36 35 0:98 / /mnt/my\040images rw,nosuid shared:1 - fuse.chainfs /srv/a\134b ro,user_id=0";
        let expected = MountEntry {
            device: (0, 98),
            directory: "/mnt/my images".into(),
            kind: "fuse.chainfs".into(),
            source: r"/srv/a\b".into(),
            options: "ro,user_id=0".into(),
        };
        assert_eq!(entry(line), Some(expected));
        assert_eq!(entry(b""), None);
    }
}
