//! Finds possible users: files that cannot be read, or are read in another format than they may have, and
//! names that are not followed.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};
use crate::format::foreign::{ForeignFormat, Parents};

use super::build::CatalogBuilder;
use super::catalog::{FileReference, ImageIndex, UnlinkedImage};
use super::describe::{DetectedContent, MIN_HEADER_LEN, parents_without_magic};
use super::file_names::has_extension;
use super::options::{Format, StoreOptions};
use super::possible_uses::{PossibleUse, UseReach, pattern, standalone_remedy};
use super::resolve::{StorePath, names_in_json, protocol, traced};
use super::scan::{Problem, ScannedFile, Unread, looks_like_image};

/// Drivers of QEMU whose files are on other machines, or are none.
const REMOTE: [&str; 14] = [
    "nbd", "ssh", "http", "https", "ftp", "ftps", "iscsi", "rbd", "nfs", "gluster", "vxhs", "nvme",
    "null-co", "null-aio",
];

/// The names in a file that is no readable qcow2 image.
pub(super) fn names_of(content: &DetectedContent) -> &[Vec<u8>] {
    match parents_of(content) {
        Some(Parents::Named(names)) => names,
        Some(Parents::None | Parents::Unknown) | None => &[],
    }
}

fn parents_of(content: &DetectedContent) -> Option<&Parents> {
    match content {
        DetectedContent::Malformed(header) => Some(&header.parents),
        DetectedContent::Foreign(foreign) => Some(&foreign.parents),
        DetectedContent::Qcow2(_) | DetectedContent::Plain | DetectedContent::Unseen => None,
    }
}

/// The foreign format of a file: its content's, unless a guest may have written it, else its name's.
pub(super) fn foreign_kind(file: &ScannedFile) -> Option<ForeignFormat> {
    match &file.content {
        DetectedContent::Foreign(foreign) if !file.is_plain => Some(foreign.kind),
        _ if file.stat.size == 0 => None,
        _ => ForeignFormat::of_name(&file.place.path),
    }
}

/// Divides the names in a file into links to a backing file and possible uses. `is_drawn`: the file is shown
/// with a backing file.
pub(super) fn claims_of(
    file: &ScannedFile,
    references: Vec<FileReference>,
    is_drawn: bool,
    options: &StoreOptions,
) -> (Option<FileReference>, Vec<UseReach>) {
    // A file smaller than a header cannot be read by any program.
    let is_too_short = file.stat.size < MIN_HEADER_LEN;
    let is_standalone = is_too_short || options.is_standalone(&file.place.path);
    let is_read = matches!(file.content, DetectedContent::Qcow2(_));
    if is_drawn && (is_read || !is_standalone) {
        let mut meant: Vec<UseReach> =
            references.iter().flat_map(|reference| reference.meant.clone()).collect();
        if is_standalone {
            meant.clear();
        }
        if matches!(parents_of(&file.content), Some(Parents::Unknown)) {
            meant.push(UseReach::All);
        }
        return (references.into_iter().next(), meant);
    }
    // A file that is known to be raw has no backing file, whatever its guest has written into it.
    if file.is_plain || is_standalone || options.stated_format(&file.place.path) == Some(Format::Raw) {
        return (None, Vec::new());
    }
    if matches!(parents_of(&file.content), Some(Parents::Unknown)) {
        return (None, vec![UseReach::All]);
    }
    let meant = references.into_iter().flat_map(|reference| match reference.target {
        Ok(target) => vec![UseReach::Image(target)],
        Err(_) => reference.meant,
    });
    (None, meant.collect())
}

impl CatalogBuilder<'_> {
    /// The owner of a file of the store; root if unknown.
    fn owner_of(&self, path: &Path) -> u32 {
        self.roots[0].stat_itself(path).map_or(0, |stat| stat.uid)
    }

    /// A file or directory that could not be read.
    pub(super) fn unread(&mut self, Unread { path, fact }: Unread) {
        let is_known =
            self.options.is_standalone(&path) || self.options.stated_format(&path) == Some(Format::Raw);
        if is_known {
            self.problems
                .push(Problem { path, sentence: format!("{fact}; make it readable, or move it elsewhere") });
            return;
        }
        let remedy = format!("make it readable, or move it elsewhere; {}", standalone_remedy(&path));
        let (uid, why) = (self.owner_of(&path), format!("{fact}; {remedy}").into());
        self.claims.push(PossibleUse { by: path, owner: None, uid, reach: UseReach::All, why });
    }

    /// A file that a header names and that cannot be opened, outside of the scan.
    pub(super) fn unopened(&mut self, place: &StorePath, error: &Error) {
        if place.root != 0 {
            let path = self.roots[place.root].canonical().join(&place.path);
            self.unread(Unread { path, fact: format!("cannot be read ({error})") });
        }
    }

    /// The images that a name may mean that is not followed.
    pub(super) fn meant(&mut self, from: &StorePath, name: &[u8]) -> Vec<UseReach> {
        if name.starts_with(b"json:") {
            return self.meant_by_json(from, name);
        }
        match protocol(name) {
            // QEMU's word for a file that is none of those.
            Some(b"file") => {
                let path = &name[b"file:".len()..];
                let found = self.traced_image(from, path).map(UseReach::Image);
                found.into_iter().chain([UseReach::Named(path.to_vec())]).collect()
            }
            Some(_) => vec![UseReach::Mentioned(name.to_vec())],
            None => vec![
                self.traced_image(from, name).map_or_else(|| UseReach::Named(name.to_vec()), UseReach::Image),
            ],
        }
    }

    /// Names in a description are relative to QEMU's working directory, which is unknown.
    fn meant_by_json(&mut self, from: &StorePath, name: &[u8]) -> Vec<UseReach> {
        let text = String::from_utf8_lossy(name);
        match names_in_json(name) {
            Some(names) if !names.is_empty() => {
                let found =
                    names.iter().filter_map(|name| self.traced_image(from, name)).map(UseReach::Image);
                let found: Vec<UseReach> = found.collect();
                found.into_iter().chain([UseReach::Mentioned(name.to_vec())]).collect()
            }
            Some(_) if REMOTE.iter().any(|driver| text.contains(&format!("\"{driver}\""))) => {
                vec![UseReach::Mentioned(name.to_vec())]
            }
            _ => vec![UseReach::All],
        }
    }

    /// The image that a name leads to, all links followed.
    fn traced_image(&mut self, from: &StorePath, name: &[u8]) -> Option<ImageIndex> {
        let place = traced(self.roots, &self.options.maps, from, name)?;
        if let Some(index) = self.by_place.get(&place) {
            return Some(*index);
        }
        match self.look_at(&place) {
            Ok(file) => Some(self.met(place, file)),
            Err(_) => None,
        }
    }

    /// A symbolic link is another name, not another image. A link that cannot be followed is a problem if its
    /// name looks like an image, and that image may use any layer.
    pub(super) fn link(&mut self, path: PathBuf) {
        let error = match self.roots[0].stat(&path) {
            Ok(stat) => {
                if let Some(index) = self.by_id.get(&stat.id).filter(|_| stat.is_file()) {
                    self.by_place.insert(StorePath { root: 0, path }, *index);
                }
                return;
            }
            Err(error) => error,
        };
        let name = path.file_name().unwrap_or_default().to_owned();
        let place = StorePath { root: 0, path: path.clone() };
        let is_there = error.kind() != ErrorKind::NotFound;
        if is_there && let Some(index) = self.traced_image(&place, name.as_encoded_bytes()) {
            // By a full path that ends in the store.
            self.by_place.insert(place, index);
            return;
        }
        // If the path ends in the store, its absence can be proven.
        let is_there = is_there && !self.leads_to_nothing(&place, name.as_encoded_bytes());
        if is_there && !self.options.is_standalone(&path) && self.promises_image(&path) {
            let fact = format!("is a symbolic link that cannot be followed ({error})");
            let remedy =
                format!("put the file itself here, or remove the link; {}", standalone_remedy(&path));
            let why = format!("{fact}; {remedy}").into();
            let uid = self.owner_of(&path);
            self.claims.push(PossibleUse { by: path, owner: None, uid, reach: UseReach::All, why });
            return;
        }
        if looks_like_image(&path) {
            let sentence =
                format!("is a symbolic link that cannot be followed: {error}; put the file itself here");
            self.problems.push(Problem { path, sentence });
        }
    }

    /// Whether a link leads to a path beneath a root without a file.
    fn leads_to_nothing(&self, link: &StorePath, name: &[u8]) -> bool {
        let target = traced(self.roots, &self.options.maps, link, name);
        let is_gone = |place: StorePath| {
            self.roots[place.root].stat(&place.path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
        };
        target.is_some_and(is_gone)
    }

    /// Whether the target of a link may be an image with a backing file, by the names of both.
    fn promises_image(&self, path: &Path) -> bool {
        let is_one = |path: &Path| {
            (looks_like_image(path) && !has_extension(path, "raw")) || ForeignFormat::of_name(path).is_some()
        };
        is_one(path) || self.roots[0].link_target(path).is_some_and(|target| is_one(&target))
    }

    /// The images that a file may use that is read in another format than it may have, or whose names are not
    /// followed.
    pub(super) fn claim(&mut self, index: ImageIndex, reach: UseReach, is_drawn: bool) {
        let file = &self.files[index];
        let path = &file.place.path;
        let why = match &file.content {
            DetectedContent::Qcow2(_) if is_drawn => {
                format!(
                    "may name it in a way that cannot be followed; repair its header, or {}",
                    standalone_remedy(path)
                )
            }
            DetectedContent::Malformed(header) if is_drawn => {
                format!(
                    "cannot be read ({}); restore it from a copy, or {}",
                    header.reason,
                    standalone_remedy(path)
                )
            }
            DetectedContent::Foreign(foreign) => {
                let kind = foreign.kind.name();
                let remedy = format!("if it is a raw disk, say so with -o format={}:raw", pattern(path));
                format!(
                    "is an image of the format {kind}; convert it, or {}; {remedy}",
                    standalone_remedy(path)
                )
            }
            _ => {
                let remedy = format!("if it is a raw disk, say so with -o format={}:raw", pattern(path));
                let or = standalone_remedy(path);
                format!("begins with a qcow2 header, though it is not read as qcow2; {remedy}; {or}")
            }
        };
        let (owner, uid) = (Some(file.stat.id), file.stat.uid);
        let claim = PossibleUse { by: path.clone(), owner, uid, reach, why: why.into() };
        self.claims.push(claim);
    }

    /// The images that a file may use whose name indicates qcow2 and whose content does not.
    pub(super) fn claim_without_magic(&mut self, index: ImageIndex) {
        let file = &self.files[index];
        let (place, len) = (file.place.clone(), file.stat.size);
        if len < MIN_HEADER_LEN || self.options.is_standalone(&place.path) {
            return;
        }
        let found =
            self.roots[place.root].open_file(&place.path).and_then(|file| parents_without_magic(&*file, len));
        let reaches = match found {
            Ok(Parents::None) => return,
            Ok(Parents::Named(names)) => {
                names.iter().flat_map(|name| self.known_meaning(&place, name)).collect()
            }
            Ok(Parents::Unknown) | Err(_) => vec![UseReach::All],
        };
        for reach in reaches {
            let remedy = format!(
                "restore it from a copy, or rename it if it is raw; {}",
                standalone_remedy(&place.path)
            );
            let why = format!("does not begin with qcow2's magic; {remedy}").into();
            let (owner, uid) = (Some(self.files[index].stat.id), self.files[index].stat.uid);
            self.claims.push(PossibleUse { by: place.path.clone(), owner, uid, reach, why });
        }
    }

    /// The known files that a name may mean.
    fn known_meaning(&self, from: &StorePath, name: &[u8]) -> Vec<UseReach> {
        let found = traced(self.roots, &self.options.maps, from, name);
        let image = found.and_then(|place| self.by_place.get(&place).copied()).map(UseReach::Image);
        image.into_iter().chain([UseReach::Mentioned(name.to_vec())]).collect()
    }

    /// Files that are no images here though they are elsewhere, and those that a guest may have made look
    /// like one.
    pub(super) fn name_foreign(&mut self, drafts: &[UnlinkedImage]) {
        for (file, draft) in self.files.iter().zip(drafts) {
            let path = &file.place.path;
            if !draft.is_scanned
                || draft.is_data_file
                || draft.entry.format.is_some()
                || draft.entry.problem.is_some()
            {
                continue;
            }
            let sentence = if let Some(kind) = foreign_kind(file) {
                format!(
                    "is taken for an image of the format {}, which chainfs does not read; convert it with \
                        qemu-img convert \
                     -O qcow2, or, if it is a raw disk, say so with -o format={}:raw",
                    kind.name(),
                    pattern(path)
                )
            } else if file.content.has_magic() {
                format!(
                    "begins with qcow2's magic, but has been seen without: a guest may have written that \
                        into its raw \
                     disk; say what it is with -o format={0}:raw or -o format={0}:qcow2",
                    pattern(path)
                )
            } else {
                continue;
            };
            self.problems.push(Problem { path: path.clone(), sentence });
        }
    }
}
