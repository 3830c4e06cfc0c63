//! The effects of a command, compared with the rights that the kernel would give its user, and with the
//! expected bytes of each file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::image::{backing_name, chain, disk, is_raw, is_same_disk};
use super::people::text;
use super::seen::{May, Seen, SeenFile};

/// The bit of a directory in which only owners take names away.
const STICKY: u32 = 0o1000;

/// A command as it was given.
pub(crate) struct Given {
    pub(crate) verb: String,
    /// The command's user, and that user's rights by the kernel at that time; none for root.
    pub(crate) by: Option<(u32, May)>,
    pub(crate) before: Seen,
    /// Files of its chain, top first.
    pub(crate) layers: Vec<PathBuf>,
    /// By user: whether the kernel lets that user read the first of them.
    pub(crate) readers: Vec<bool>,
}

/// Whether a file has the name of a draft.
fn is_draft(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".chainfs"))
}

impl Given {
    /// Drops drafts of former commands that this one has left and that the mount has swept afterwards: its
    /// user has not changed them. `half`: the files that the command itself has left.
    pub(crate) fn forget_swept(&mut self, half: &Seen, after: &Seen) {
        let is_swept = |path: &Path, inode: u64| {
            half.files.get(path).is_some_and(|left| left.inode == inode) && !after.files.contains_key(path)
        };
        self.before.files.retain(|path, file| !(is_draft(path) && is_swept(path, file.inode)));
    }

    /// Why the user had no right to the change of the store, if so.
    pub(crate) fn overstepped(&self, after: &Seen) -> Option<String> {
        let Some((uid, may)) = &self.by else { return None };
        for (path, file) in &self.before.files {
            let Some(now) = after.place_of(path, file.inode) else { continue };
            if after.files[now].bytes != file.bytes && !may.write.contains(path) {
                return Some(format!("{} was written, which uid {uid} may not write", path.display()));
            }
        }
        let (was, is) = (self.before.names(), after.names());
        let all: BTreeSet<&PathBuf> = was.keys().chain(is.keys()).collect();
        for path in all.into_iter().filter(|path| was.get(*path) != is.get(*path)) {
            let directory = path.parent().unwrap_or(Path::new(""));
            if !may.change.contains(directory) {
                return Some(format!(
                    "{} came or went, and uid {uid} may not change its directory",
                    path.display()
                ));
            }
            let found = &self.before.directories[directory];
            let owner = self.before.files.get(path).map_or(*uid, |file| file.uid);
            if found.mode & STICKY != 0 && owner != *uid && found.uid != *uid {
                return Some(format!(
                    "{} was another's in a sticky directory, not uid {uid}'s",
                    path.display()
                ));
            }
        }
        None
    }

    /// Why files do not belong to whom they should, or let in more than they should, if so. `reads`: whether
    /// each user may read a file now.
    pub(crate) fn misowned(&self, after: &Seen, reads: impl Fn(&Path) -> Vec<bool>) -> Option<String> {
        for (path, file) in &after.files {
            let name = path.display();
            let own = |file: &SeenFile| (file.uid, file.gid, file.mode, file.has_list);
            if let Some(was) = self.before.place_of(path, file.inode) {
                let was = &self.before.files[was];
                if own(was) != own(file) {
                    return Some(format!("{name} had {:?}, and has {:?}", own(was), own(file)));
                }
                continue;
            }
            let Some((leaf, like)) =
                self.layers.first().and_then(|leaf| Some((leaf, self.before.files.get(leaf)?)))
            else {
                continue;
            };
            if (file.uid, file.gid) != (like.uid, like.gid)
                && !(is_draft(path) && file.mode.trailing_zeros() >= 6)
            {
                return Some(format!(
                    "{name} is {}:{}'s, made like {}:{}'s",
                    file.uid, file.gid, like.uid, like.gid
                ));
            }
            if path.parent() == leaf.parent()
                && reads(path).iter().zip(&self.readers).any(|(now, was)| *now && !was)
            {
                return Some(format!(
                    "{name} is new, and is read by some who could not read {}",
                    leaf.display()
                ));
            }
        }
        None
    }

    /// Whether the command takes the name of a raw file that `overlay` names.
    fn is_snapshot_of_raw(&self, overlay: &Path) -> bool {
        let leaf = self.layers.first().filter(|leaf| is_raw(leaf));
        let named = chain(&self.before, overlay).unwrap_or_default();
        ["snapshot", "revert"].contains(&&*self.verb) && leaf.is_some_and(|leaf| named.contains(leaf))
    }

    /// Why an image was backed by a file that its owner may not read, if so. `is_shut`: whether the second
    /// file certainly does not count in the first.
    pub(crate) fn cut_off_from(
        &self,
        after: &Seen,
        is_shut: impl Fn(&Path, &Path) -> bool,
    ) -> Option<String> {
        let is_wrong = |(path, file): &(&PathBuf, &SeenFile)| {
            let Some(target) = &file.backing else { return false };
            let was =
                self.before.place_of(path, file.inode).map(|was| backing_name(&self.before.files[was].bytes));
            was != Some(backing_name(&file.bytes)) && !is_draft(path) && is_shut(path, target)
        };
        let (path, file) = after.files.iter().find(is_wrong)?;
        let target = file.backing.as_ref().map(|target| target.display().to_string()).unwrap_or_default();
        Some(format!("{} was put on {target}, which its owner may not read", path.display()))
    }

    /// Whether the command may change a file: a layer, or a file that it has made itself until `half`.
    fn is_own(&self, inode: u64, half: &Seen) -> bool {
        self.layers.iter().filter_map(|layer| self.before.files.get(layer)).any(|file| file.inode == inode)
            || (half.path_of(inode).is_some() && self.before.path_of(inode).is_none())
    }

    /// Why a file that others have made or changed since the interruption was changed, if so. `half`: the
    /// store at the interruption; `mid`: when the command was resumed.
    pub(crate) fn trespassed(&self, half: &Seen, mid: &Seen, after: &Seen) -> Option<String> {
        for (path, file) in &mid.files {
            let (name, is_own) = (path.display(), self.is_own(file.inode, half));
            let now = after.place_of(path, file.inode);
            let Some(now) = now.filter(|now| is_own || *now == path) else {
                if is_own || text(path).contains(".chainfs") {
                    continue;
                }
                return Some(format!("{name} is none of the command's, and has lost its name"));
            };
            let now = &after.files[now];
            let own = |file: &SeenFile| (file.uid, file.gid, file.mode, file.has_list);
            let is_made = self.before.path_of(file.inode).is_none() && is_own;
            if !is_made && own(file) != own(now) {
                return Some(format!("{name} had {:?}, and has {:?}", own(file), own(now)));
            }
            if is_own || now.bytes == file.bytes {
                continue;
            }
            let (was, is) = (disk(mid, path), disk(after, path));
            let is_same = was.zip(is).is_none_or(|(was, is)| is_same_disk(&is, &was));
            if self.before.path_of(file.inode).is_none() || !is_same {
                return Some(format!("{name} is none of the command's, and was written"));
            }
            if let Some((uid, _)) = self.by.as_ref().filter(|(_, may)| !may.write.contains(path)) {
                return Some(format!("{name} was written, which uid {uid} could not write"));
            }
        }
        None
    }

    /// Why a file shows other bytes than expected, if so: only layers of the chain may get the bytes of
    /// others in it, or be removed.
    pub(crate) fn spoilt(&self, after: &Seen) -> Option<String> {
        let old: Vec<Vec<u8>> = self.layers.iter().filter_map(|layer| disk(&self.before, layer)).collect();
        for (path, file) in &self.before.files {
            let is_layer =
                |layer: &PathBuf| self.before.files.get(layer).is_some_and(|found| found.inode == file.inode);
            let (name, is_of_chain) = (path.display(), self.layers.iter().any(is_layer));
            let Some(now) = after.place_of(path, file.inode) else {
                if is_of_chain || text(path).contains(".chainfs") {
                    continue;
                }
                return Some(format!("{name} has gone, which is none of the chain's"));
            };
            if now != path && !is_of_chain {
                return Some(format!("{name} has another name, and is none of the chain's"));
            }
            let Some(wanted) = disk(&self.before, path) else { continue };
            let is_right = |disk: &Vec<u8>| {
                is_same_disk(disk, &wanted)
                    || (is_of_chain && old.iter().any(|other| is_same_disk(disk, other)))
            };
            match disk(after, now) {
                Some(shown) if is_right(&shown) => {}
                // The state of a command that is resumed at the next start.
                None if now.extension().is_some_and(|extension| extension == "invalid") => {}
                // A disk named by a user who may not read it is another file now.
                None if !is_of_chain && self.is_snapshot_of_raw(path) => {}
                Some(_) => return Some(format!("{name} shows other bytes than it has to")),
                None => return Some(format!("{name} cannot be read any more")),
            }
        }
        None
    }
}

/// Whether a file's name in its overlay has no effect: the overlay's owner certainly may not read it. `may`:
/// the kernel's answer for that owner, in no group.
pub(crate) fn is_surely_uncounted(seen: &Seen, overlay: &Path, target: &Path, may: &May) -> bool {
    let owner = seen.files[overlay].uid;
    if owner == 0 || may.read.contains(target) {
        return false;
    }
    let shut: Vec<&Path> =
        target.ancestors().skip(1).filter(|directory| !may.search.contains(*directory)).collect();
    // The outermost directory that shuts the owner out.
    match shut.last() {
        None => seen.files[target].uid != owner,
        Some(directory) => seen.directories[*directory].uid != owner && !overlay.starts_with(directory),
    }
}

/// Whether a user may access a file by any class of its mode, and by all directories above it: then no class
/// is shut out by modes.
pub(crate) fn is_open_to(seen: &Seen, path: &Path, uid: u32, is_owner: bool, want: u32) -> bool {
    let all = |want: u32| want << 6 | want << 3 | want;
    let is_open = |of: u32, mode: u32, has_list: bool, want: u32| {
        !has_list
            && if of == uid && is_owner { mode >> 6 & want == want } else { mode & all(want) == all(want) }
    };
    let file = &seen.files[path];
    is_open(file.uid, file.mode, file.has_list, want)
        && seen.way(path).iter().all(|step| is_open(step.uid, step.mode, step.has_list, 1))
}

/// Whether the chain of a file is all there.
pub(crate) fn is_sound(seen: &Seen, path: &Path) -> bool {
    chain(seen, path).is_some()
        && disk(seen, path).is_some()
        && (is_raw(path) || seen.files.contains_key(path))
}
