//! Changes by users and root to the store's files themselves, as far as the kernel allows them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use super::image::{self, SIZE, is_raw};
use super::people::{GIDS, Person, UIDS, access_list, text};
use super::seen::{May, Seen};
use super::world::World;

/// Headers of files as their owners damage them.
const DAMAGE: [(u64, &[u8]); 5] =
    [(7, &[4]), (20, &[0, 0, 0, 99]), (72, &[0x40]), (0, &[0; 4]), (24, &[0xff; 8])];

fn make(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode))
}

impl World<'_> {
    /// A user who owns files; root now and then.
    pub(crate) fn somebody(&mut self) -> Option<usize> {
        let number = self.rng.below(7) as usize;
        (number < 6).then_some(number % 3)
    }

    pub(crate) fn person(&self, who: Option<usize>) -> Option<&Person> {
        who.map(|number| &self.people.users[number])
    }

    pub(crate) fn called(&self, who: Option<usize>) -> String {
        self.person(who).map_or("root".into(), |person| format!("uid {}", person.uid))
    }

    /// Runs it as a user.
    pub(crate) fn as_somebody<T>(&self, who: Option<usize>, work: impl FnOnce() -> T) -> T {
        match self.person(who) {
            Some(person) => person.does(work),
            None => work(),
        }
    }

    pub(crate) fn put(&self, who: Option<usize>, path: &Path, bytes: Vec<u8>, mode: u32) -> io::Result<()> {
        let path = self.root.join(path);
        self.as_somebody(who, move || make(&path, &bytes, mode))
    }

    /// A directory in which a user may make files.
    pub(crate) fn room(&mut self, who: Option<usize>, seen: &Seen) -> Option<PathBuf> {
        let all: Vec<PathBuf> = match self.person(who) {
            Some(person) => May::of(person, &self.root, seen).change.into_iter().collect(),
            None => seen.directories.keys().cloned().collect(),
        };
        self.pick(&all)
    }

    pub(crate) fn file_mode(&mut self) -> u32 {
        [0o600, 0o644, 0o640, 0o660, 0o604, 0o664, 0o666][self.rng.below(7) as usize]
    }

    /// A disk of which no cluster is like another, with zeroes at its end.
    pub(crate) fn content(&mut self) -> Vec<u8> {
        let (seed, end) = (self.rng.bytes(24), self.rng.below(SIZE));
        let mut content: Vec<u8> =
            (0..SIZE / 32).flat_map(|at| [&seed[..], &at.to_le_bytes()].concat()).collect();
        content[end as usize..].fill(0);
        content
    }

    pub(crate) fn base(&mut self) {
        let (who, seen) = (self.somebody(), self.seen());
        let Some(directory) = self.room(who, &seen) else { return };
        let (content, mode, stem) = (self.content(), self.file_mode(), self.next());
        let (name, bytes) = if self.rng.below(3) == 0 {
            (format!("{stem}.raw"), content)
        } else {
            (format!("{stem}.qcow2"), image::qcow2(SIZE, None, &image::clusters(&content)))
        };
        let path = directory.join(name);
        let done = self.put(who, &path, bytes, mode);
        self.say(format!("{} makes {} ({mode:o}): {done:?}", self.called(who), path.display()));
    }

    /// An image backed by any other, whether its maker may read that or not.
    pub(crate) fn overlay(&mut self) {
        let (who, seen) = (self.somebody(), self.seen());
        let Some(directory) = self.room(who, &seen) else { return };
        let targets: Vec<PathBuf> =
            seen.files.keys().filter(|path| !text(path).contains(".chainfs")).cloned().collect();
        let readable = self.person(who).map(|person| May::of(person, &self.root, &seen).read);
        let near: Vec<PathBuf> = targets
            .iter()
            .filter(|path| readable.as_ref().is_none_or(|may| may.contains(*path)))
            .cloned()
            .collect();
        let is_near = !near.is_empty() && self.rng.below(3) > 0;
        let far: Vec<PathBuf> = targets.iter().filter(|path| !near.contains(path)).cloned().collect();
        let Some(target) = self.pick(if is_near || far.is_empty() { &near } else { &far }) else { return };
        let (stem, mode) = (self.next(), self.file_mode());
        let path = directory.join(format!("{stem}.qcow2"));
        let format = if is_raw(&target) { "raw" } else { "qcow2" };
        let relative = relative(&directory, &target);
        let name = match self.rng.below(8) {
            0 => self.root.join(&target).display().to_string(),
            1 => {
                format!(r#"json:{{"driver":"{format}","file":{{"driver":"file","filename":"{relative}"}}}}"#)
            }
            kind @ 2..=4 => {
                // A link to the file or to its directory; all of its own, or the whole way from the root.
                let link = format!("{stem}-link{}", if kind == 4 { "" } else { "." });
                let link = if kind == 4 { link } else { format!("{link}{format}") };
                let to = match kind {
                    2 => PathBuf::from(&relative),
                    3 => self.root.join(&target),
                    _ => Path::new(&relative).parent().unwrap_or(Path::new("")).to_path_buf(),
                };
                let (to, at) =
                    (if to.as_os_str().is_empty() { ".".into() } else { to }, self.root.join(&directory));
                let at = at.join(&link);
                if self.as_somebody(who, move || symlink(to, at)).is_err() {
                    return;
                }
                let file = target.file_name().unwrap_or_default().display();
                if kind == 4 { format!("{link}/{file}") } else { link }
            }
            _ => relative,
        };
        let size = image::disk(&seen, &target).map_or(SIZE, |disk| disk.len() as u64);
        let mut clusters = BTreeMap::new();
        for _ in 0..self.rng.below(3) {
            clusters.insert(self.rng.below(SIZE >> 12) as usize, self.rng.bytes(4 << 10));
        }
        let done = self.put(who, &path, image::qcow2(size, Some((&name, format)), &clusters), mode);
        self.say(format!(
            "{} makes {} on {} by {name}: {done:?}",
            self.called(who),
            path.display(),
            target.display()
        ));
    }

    /// Root gives files and directories other owners, modes and lists.
    pub(crate) fn allow(&mut self) {
        for _ in 0..=self.rng.below(3) {
            let seen = self.seen();
            let is_directory = self.rng.below(3) == 0;
            let all: Vec<PathBuf> = if is_directory {
                seen.directories.keys().filter(|path| !path.as_os_str().is_empty()).cloned().collect()
            } else {
                seen.files.keys().cloned().collect()
            };
            let Some(path) = self.pick(&all) else { return };
            self.let_in(&path, is_directory);
        }
    }

    pub(crate) fn let_in(&mut self, path: &Path, is_directory: bool) {
        let at = self.root.join(path);
        let owner = [0, UIDS[0], UIDS[1], UIDS[2]][self.rng.below(4) as usize];
        let group = GIDS[self.rng.below(3) as usize];
        let mode = if is_directory {
            [0o700, 0o711, 0o755, 0o750, 0o770, 0o775, 0o1777, 0o1775, 0o705, 0o777]
                [self.rng.below(10) as usize]
        } else {
            self.file_mode()
        };
        let is_owner_kept = self.rng.below(2) == 0;
        if !is_owner_kept {
            chown(&at, Some(owner), Some(group)).expect("an owner");
        }
        let _ = rustix::fs::removexattr(&at, "system.posix_acl_access");
        fs::set_permissions(&at, fs::Permissions::from_mode(mode)).expect("a mode");
        let mut list = None;
        if self.rng.below(3) == 0 {
            let bits = |world: &mut Self| world.rng.below(8) as u16;
            let user = (false, UIDS[self.rng.below(3) as usize], bits(self));
            let group = (true, GIDS[self.rng.below(3) as usize], bits(self));
            let named = [user, group];
            let (first, len, mask) = (self.rng.below(2) as usize, 1 + self.rng.below(2) as usize, bits(self));
            let named = &named[first..(first + len).min(2)];
            let bytes = access_list(mode, named, mask);
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(&at, "system.posix_acl_access", &bytes, flags).expect("an access list");
            list = Some((named.to_vec(), mask));
        }
        let to = if is_owner_kept { "kept".into() } else { format!("{owner}:{group}") };
        self.say(format!("root: {} is {to} {mode:o} {list:?}", path.display()));
        self.tally.modes += 1;
    }

    /// A user removes, replaces or moves a file, if the kernel allows it.
    pub(crate) fn replace(&mut self) {
        let (who, seen) = (self.somebody(), self.seen());
        let is_any = self.rng.below(5) == 0;
        let all: Vec<PathBuf> =
            seen.files.keys().filter(|path| is_any || seen.overlays_of(path).is_empty()).cloned().collect();
        if let Some(path) = self.pick(&all) {
            self.replace_it(who, &path);
        }
    }

    fn replace_it(&mut self, who: Option<usize>, path: &Path) {
        let (at, called, seen) = (self.root.join(path), self.called(who), self.seen());
        if self.rng.below(3) == 0 {
            let Some(to) = self.room(who, &seen) else { return };
            let to = to.join(path.file_name().unwrap_or_default());
            if self.root.join(&to).exists() {
                return;
            }
            let target = self.root.join(&to);
            let done = self.as_somebody(who, move || fs::rename(at, target));
            return self.say(format!("{called} moves {} to {}: {done:?}", path.display(), to.display()));
        }
        let done = self.as_somebody(who, move || fs::remove_file(at));
        self.say(format!("{called} removes {}: {done:?}", path.display()));
        if done.is_ok() && self.rng.below(2) == 0 {
            let (content, mode) = (self.content(), self.file_mode());
            let bytes =
                if is_raw(path) { content } else { image::qcow2(SIZE, None, &image::clusters(&content)) };
            let done = self.put(who, path, bytes, mode);
            self.say(format!("{called} makes it anew ({mode:o}): {done:?}"));
        }
    }

    /// A user gives a file a further name, or copies it.
    pub(crate) fn link(&mut self) {
        let (who, seen) = (self.somebody(), self.seen());
        let all: Vec<PathBuf> = seen.files.keys().cloned().collect();
        match self.pick(&all) {
            Some(path) if self.rng.below(2) == 0 => self.link_it(who, &path),
            Some(path) => self.copy_it(who, &path),
            None => {}
        }
    }

    fn link_it(&mut self, who: Option<usize>, path: &Path) {
        let Some(to) = self.room(who, &self.seen()) else { return };
        let to = to.join(self.next()).with_extension(if is_raw(path) { "raw" } else { "qcow2" });
        let (old, new) = (self.root.join(path), self.root.join(&to));
        let done = self.as_somebody(who, move || fs::hard_link(old, new));
        self.tally.linked += u64::from(done.is_ok());
        self.say(format!("{} links {} to {}: {done:?}", self.called(who), path.display(), to.display()));
    }

    /// A user copies a file that the kernel lets him read.
    fn copy_it(&mut self, who: Option<usize>, path: &Path) {
        let Some(to) = self.room(who, &self.seen()) else { return };
        let to = to.join(self.next()).with_extension(if is_raw(path) { "raw" } else { "qcow2" });
        let (old, new, mode) = (self.root.join(path), self.root.join(&to), self.file_mode());
        let done = self.as_somebody(who, move || make(&new, &fs::read(old)?, mode));
        self.tally.copied += u64::from(done.is_ok());
        if done.is_ok() {
            // A damaged file is damaged in the copy, too.
            let seen = self.seen();
            let [from, copy] = [path, &to].map(|path| seen.files[path].inode);
            let damage = self.damage.iter().filter(|(inode, ..)| *inode == from).cloned();
            let copied: Vec<_> = damage.map(|(_, place, saved)| (copy, place, saved)).collect();
            self.damage.extend(copied);
        }
        self.say(format!("{} copies {} to {}: {done:?}", self.called(who), path.display(), to.display()));
    }

    /// Other users change the files of an interrupted command, or any.
    pub(crate) fn interfere(&mut self, layers: &[PathBuf]) {
        for _ in 0..=self.rng.below(3) {
            let (who, seen) = (self.somebody(), self.seen());
            let all: Vec<PathBuf> = seen.files.keys().cloned().collect();
            let is_near = |path: &&PathBuf| layers.contains(path) || text(path).contains(".chainfs");
            let near: Vec<PathBuf> = all.iter().filter(is_near).cloned().collect();
            let is_any = near.is_empty() || self.rng.below(3) == 0;
            let Some(path) = self.pick(if is_any { &all } else { &near }) else { return };
            match self.rng.below(5) {
                0 => self.let_in(&path, false),
                1 => self.copy_it(who, &path),
                2 => self.link_it(who, &path),
                _ => self.replace_it(who, &path),
            }
        }
    }

    /// A user damages or repairs a header that the kernel lets him write.
    pub(crate) fn damage(&mut self) {
        if let Some((inode, at, saved)) = self.damage.pop() {
            let seen = self.seen();
            if let Some(path) = seen.path_of(inode) {
                let file = File::options().write(true).open(self.root.join(path)).expect("the damaged file");
                file.write_all_at(&saved, at).expect("its header");
                let path = path.display().to_string();
                self.say(format!("{path} is mended"));
            }
            return;
        }
        let (who, seen) = (self.somebody(), self.seen());
        let all: Vec<PathBuf> = seen.files.keys().filter(|path| !is_raw(path)).cloned().collect();
        let Some(path) = self.pick(&all) else { return };
        let (place, bytes) = DAMAGE[self.rng.below(DAMAGE.len() as u64) as usize];
        let file = &seen.files[&path];
        let Some(saved) = file.bytes.get(place as usize..place as usize + bytes.len()) else { return };
        let at = self.root.join(&path);
        let done =
            self.as_somebody(who, move || File::options().write(true).open(at)?.write_all_at(bytes, place));
        if done.is_ok() {
            self.damage.push((file.inode, place, saved.to_vec()));
            self.tally.damaged += 1;
        }
        self.say(format!("{} damages {} at {place}: {done:?}", self.called(who), path.display()));
    }
}

/// The way from a directory to a file, both beneath the root.
pub(crate) fn relative(directory: &Path, file: &Path) -> String {
    let up = "../".repeat(directory.components().count());
    format!("{up}{}", file.display())
}
