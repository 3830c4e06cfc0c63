//! The files of a store that have once been seen without qcow2's magic: a header that appears in those later
//! may be the guest's, and does not decide their format.
//!
//! `.chainfs/plain` in the guarded directory: a line with the identity of the list, then one line a file, of
//! inode number, birth time, path, and a checksum over these. Lines are only ever added. A line that a crash
//! has truncated is completed by the next write; any other damage makes all files suspect. A file is
//! recognised by inode and birth time, under any name; in a list that was copied with its store, or where
//! files have no birth time, by its path as well.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Directory, OpenObject, Timestamp, read_all};
use crate::units::are_zero;

use super::control_dir::ControlDir;

/// The file, relative to the guarded directory.
pub(super) const PLAIN: &str = ".chainfs/plain";
/// The name alone: appended lines change nothing that is shown.
pub(super) const PLAIN_NAME: &[u8] = b"plain";
const TITLE: &str = "chainfs-plain-1";
/// Longer files are not this list.
const MAX_LEN: u64 = 1 << 30;

/// A file in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlainFile {
    /// Its number (of a file: inode number).
    pub number: u64,
    /// When it was made; zero where its file system does not say.
    pub birth: Timestamp,
    /// Its path relative to the guarded directory.
    pub path: PathBuf,
}

/// The list of one store.
#[derive(Debug, Default)]
pub(super) struct PlainList {
    files: HashSet<(u64, Timestamp)>,
    paths: HashSet<PathBuf>,
    /// Whether the list came with a copy of the store, so that paths are compared.
    is_copied: bool,
    /// Why it is damaged, if so.
    damage: Option<String>,
    /// The entries that are not in the file yet.
    new: Vec<PlainFile>,
    /// How much of the file has been read.
    read_len: u64,
}

impl PlainList {
    /// Reads the entries that other processes have added since. An unreadable list makes all files suspect.
    pub(super) fn refresh(&mut self, guard: &ControlDir) {
        if let Err(error) = self.try_refresh(guard) {
            self.damage = Some(error.to_string());
        }
    }

    /// Why every file counts as seen without the magic, if so.
    pub(super) fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    fn try_refresh(&mut self, guard: &ControlDir) -> Result<()> {
        let file = match guard.root.open_file(Path::new(PLAIN)) {
            // Known entries stay known.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.read_len = 0;
                return Ok(());
            }
            opened => opened?,
        };
        let len = file.len()?;
        if len == self.read_len && self.damage.is_none() {
            return Ok(());
        }
        let bytes = read_all(&*file, MAX_LEN)?;
        self.damage = None;
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            let is_cut = line.last() != Some(&b'\n');
            match parsed(line) {
                Some(found) if number == 0 => {
                    self.is_copied = !is_of(&found, &*file);
                }
                Some(found) => {
                    self.files.insert((found.number, found.birth));
                    self.paths.insert(found.path);
                }
                None if is_cut && lines.peek().is_none() => {}
                None => {
                    let fact = "is damaged, so that no file becomes qcow2 by its content alone; restore it, \
                        or remove it \
                                once all files of the store have names that say what they are";
                    return Err(Error::new(ErrorKind::Corrupt, format!("line {} {fact}", number + 1)));
                }
            }
        }
        self.read_len = bytes.len() as u64;
        Ok(())
    }

    /// Whether a file was seen without the magic, as far as known.
    pub(super) fn knows(&self, trace: &PlainFile) -> bool {
        let has_no_birth = trace.birth == Timestamp::default();
        self.damage.is_some()
            || self.files.contains(&(trace.number, trace.birth))
            || (self.is_copied || has_no_birth) && self.paths.contains(&trace.path)
    }

    /// Adds a file that is seen without the magic.
    pub(super) fn note(&mut self, trace: PlainFile) {
        if self.files.insert((trace.number, trace.birth)) {
            self.paths.insert(trace.path.clone());
            self.new.push(trace);
        }
    }

    /// Whether there are entries to write.
    pub(super) fn is_ahead(&self) -> bool {
        !self.new.is_empty()
    }

    /// Appends new entries to the file, durably. If that is impossible, they are remembered for the lifetime
    /// of this process.
    pub(super) fn save(&mut self, guard: &ControlDir, names: &dyn Directory) -> Result<()> {
        if self.new.is_empty() || self.damage.is_some() {
            return Ok(());
        }
        if !guard.is_marked() {
            return Err(Error::new(ErrorKind::NotFound, "there is no store around the image"));
        }
        guard.prepare(names)?;
        let path = Path::new(PLAIN);
        let is_new = guard.root.stat(path).is_err();
        if is_new {
            match names.create(path, None) {
                Err(error) if error.kind() != ErrorKind::Exists => return Err(error),
                _ => names.sync(path.parent().unwrap_or(Path::new("")))?,
            }
        }
        let file = guard.root.open_file_for_writing(path)?;
        // A second process appends after the first one's lines.
        file.locks().wait_for_turn().map_err(|error| Error::io(format!("writing {PLAIN}"), error))?;
        let (number, birth) = (file.stat()?.id.number(), birth_of(&*file));
        let own = PlainFile { number, birth, path: "".into() };
        let bytes = read_all(&*file, MAX_LEN)?;
        // A list that another process has replaced since is not truncated.
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let is_whole = |line: &[u8]| parsed(line).is_some() || line.last() != Some(&b'\n');
        // Or the very first line was truncated.
        let title = line(&own, TITLE);
        let is_begun = bytes.contains(&b'\n') || title.as_bytes().starts_with(&bytes) || are_zero(&bytes);
        if !is_begun || !lines.all(is_whole) {
            self.read_len = 0;
            return Err(Error::new(ErrorKind::Stale, format!("{PLAIN} has been replaced by something else")));
        }
        // No line may follow a truncated one.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1) as u64;
        file.set_len(whole)?;
        let title = if whole == 0 { line(&own, TITLE) } else { String::new() };
        let lines: String = self.new.iter().map(|trace| line(trace, "")).collect();
        file.write_at(whole, (title + &lines).as_bytes())?;
        file.sync()?;
        self.new.clear();
        Ok(())
    }
}

/// When a file was made; zero where its file system does not say.
pub(super) fn birth_of(file: &dyn OpenObject) -> Timestamp {
    file.identity().ok().and_then(|found| found.birth()).unwrap_or_default()
}

/// Whether that file is the list that its first line records.
fn is_of(found: &PlainFile, file: &dyn OpenObject) -> bool {
    let number = file.stat().map(|stat| stat.id.number());
    number.is_ok_and(|number| number == found.number) && birth_of(file) == found.birth
}

fn line(trace: &PlainFile, title: &str) -> String {
    let mut text = format!("{} {}.{:09} ", trace.number, trace.birth.seconds, trace.birth.nanoseconds);
    for byte in if title.is_empty() { trace.path.as_os_str().as_bytes() } else { title.as_bytes() } {
        match byte {
            b'!'..=b'~' if *byte != b'%' => text.push(char::from(*byte)),
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    let sum = sum(text.as_bytes());
    let _ = writeln!(text, " {sum:08x}");
    text
}

fn parsed(line: &[u8]) -> Option<PlainFile> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (body, check) = text.rsplit_once(' ')?;
    if check.len() != 8 || u32::from_str_radix(check, 16).ok()? != sum(body.as_bytes()) {
        return None;
    }
    let mut words = body.split(' ');
    let number = words.next()?.parse().ok()?;
    let (seconds, nanoseconds) = words.next()?.split_once('.')?;
    let birth = Timestamp { seconds: seconds.parse().ok()?, nanoseconds: nanoseconds.parse().ok()? };
    let mut path = Vec::new();
    let mut bytes = words.next()?.bytes();
    while let Some(byte) = bytes.next() {
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        path.push(if byte == b'%' { (digit(bytes.next())? * 16 + digit(bytes.next())?) as u8 } else { byte });
    }
    Some(PlainFile { number, birth, path: PathBuf::from(std::ffi::OsString::from_vec(path)) })
}

/// FNV-1a: enough to detect a line that a crash has truncated.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LocalDirectory;
    use std::sync::Arc;

    fn trace(number: u64, path: &str) -> PlainFile {
        PlainFile { number, birth: Timestamp { seconds: 7, nanoseconds: 9 }, path: path.into() }
    }

    fn lab() -> (tempfile::TempDir, ControlDir, Arc<dyn Directory>) {
        let place = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(place.path()).unwrap();
        let names = root.names().unwrap();
        (place, ControlDir::of_directory(&root, &LocalDirectory::open).unwrap(), names)
    }

    fn read(guard: &ControlDir) -> PlainList {
        let mut list = PlainList::default();
        list.refresh(guard);
        list
    }

    #[test]
    fn recorded_files_are_known_to_every_reader_of_the_list() {
        let (_place, guard, names) = lab();
        let mut list = PlainList::default();
        let odd = PlainFile {
            path: PathBuf::from(std::ffi::OsString::from_vec(b"a b\n%\xff".to_vec())),
            ..trace(5, "")
        };
        list.note(trace(3, "x"));
        list.note(odd.clone());
        list.save(&guard, &*names).unwrap();
        list.note(trace(4, "y"));
        list.save(&guard, &*names).unwrap();
        let known = read(&guard);
        assert!(known.damage().is_none());
        assert!([trace(3, "renamed"), odd, trace(4, "y")].iter().all(|trace| known.knows(trace)));
        // Another file of the same number, or of the same name.
        assert!(
            !known.knows(&PlainFile { birth: Timestamp { seconds: 8, nanoseconds: 0 }, ..trace(3, "x") })
        );
        assert!(!known.knows(&trace(9, "x")));
        assert!(
            known.knows(&PlainFile { birth: Timestamp::default(), ..trace(9, "x") }),
            "without a birth the path counts"
        );
    }

    #[test]
    fn a_copied_list_compares_paths() {
        let (place, guard, names) = lab();
        let mut list = PlainList::default();
        list.note(trace(3, "x"));
        list.save(&guard, &*names).unwrap();
        let path = place.path().join(PLAIN);
        std::fs::copy(&path, path.with_extension("copy")).unwrap();
        std::fs::rename(path.with_extension("copy"), &path).unwrap();
        let known = read(&guard);
        assert!(known.knows(&trace(99, "x")) && !known.knows(&trace(99, "y")));
    }

    #[test]
    fn a_foreign_file_in_place_of_the_list_is_not_truncated() {
        let (place, guard, names) = lab();
        let mut list = PlainList::default();
        list.note(trace(3, "x"));
        list.save(&guard, &*names).unwrap();
        for theirs in ["somebody's", "somebody's\nwords\nunfinished"] {
            std::fs::write(place.path().join(PLAIN), theirs).unwrap();
            list.note(trace(4, theirs));
            assert_eq!(list.save(&guard, &*names).unwrap_err().kind(), ErrorKind::Stale);
            assert_eq!(std::fs::read_to_string(place.path().join(PLAIN)).unwrap(), theirs);
        }
    }

    #[test]
    fn a_truncated_line_is_completed_and_other_damage_makes_all_suspect() {
        let (place, guard, names) = lab();
        let path = place.path().join(PLAIN);
        let mut list = PlainList::default();
        list.note(trace(3, "x"));
        list.save(&guard, &*names).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(read(&guard).damage().is_none(), "cut at {cut}");
            let mut next = PlainList::default();
            next.note(trace(4, "y"));
            next.save(&guard, &*names).unwrap();
            let known = read(&guard);
            assert!(known.damage().is_none() && known.knows(&trace(4, "y")), "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let known = read(&guard);
            let is_cut = at + 1 == whole.len();
            assert!(is_cut || known.damage().is_some() && known.knows(&trace(77, "z")), "damage at {at}");
        }
    }
}
