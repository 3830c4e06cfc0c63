//! A store's directory as a value: files, their names, and the directories of those.
//!
//! It can be made a directory again anywhere. Files have other inode numbers there: either intents, which
//! name files by them, are rewritten on the way, and it is the store as it was; or they are not, and it is a
//! copy of that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use chainfs::io::LocalDirectory;

use support::sim::{Pages, mix};

/// The directory of intents.
const INTENTS: &str = ".chainfs/intents";
/// No file is that.
const NOBODY: &str = "0:0:-";

/// The identity of the file, in the words of an intent.
fn identity(path: &Path) -> String {
    let directory = LocalDirectory::open(path.parent().expect("a file")).expect("its directory");
    directory.identify(Path::new(path.file_name().expect("a file"))).expect("its identity").to_string()
}

/// Names and the files that they mean.
#[derive(Clone, Default)]
pub(crate) struct Scene {
    pub(crate) files: Vec<Pages>,
    /// The inode number that each file had when it was recorded.
    pub(crate) inodes: Vec<u64>,
    pub(crate) names: BTreeMap<PathBuf, usize>,
    pub(crate) directories: BTreeSet<PathBuf>,
}

impl Scene {
    /// The files beneath `root`.
    pub(crate) fn load(root: &Path) -> Self {
        let mut scene = Self::default();
        let mut known = HashMap::new();
        let mut waiting = vec![PathBuf::new()];
        while let Some(directory) = waiting.pop() {
            for entry in fs::read_dir(root.join(&directory)).expect("a directory") {
                let entry = entry.expect("an entry");
                let (path, metadata) =
                    (directory.join(entry.file_name()), entry.metadata().expect("its attributes"));
                if metadata.is_dir() {
                    scene.directories.insert(path.clone());
                    waiting.push(path);
                    continue;
                }
                let file = *known.entry(metadata.ino()).or_insert_with(|| {
                    scene.files.push(Pages::load(entry.path()));
                    scene.inodes.push(metadata.ino());
                    scene.files.len() - 1
                });
                scene.names.insert(path, file);
            }
        }
        scene
    }

    /// Makes it be, beneath the empty directory `root`.
    pub(crate) fn save(&self, root: &Path) {
        self.save_as(root, false);
    }

    /// The same, as the store itself or as a copy of it.
    pub(crate) fn save_as(&self, root: &Path, is_copy: bool) {
        for directory in &self.directories {
            fs::create_dir_all(root.join(directory)).expect("a directory");
        }
        let mut made: HashMap<usize, &Path> = HashMap::new();
        let mut files: HashMap<u64, (String, i128)> = HashMap::new();
        for (path, file) in &self.names {
            if let Some(first) = made.get(file) {
                fs::hard_link(root.join(first), root.join(path)).expect("one more name");
                continue;
            }
            self.files[*file].save(root.join(path));
            made.insert(*file, path);
            let written = fs::metadata(root.join(path)).expect("a file");
            let written = i128::from(written.mtime()) * 1_000_000_000 + i128::from(written.mtime_nsec());
            files.insert(self.inodes[*file], (identity(&root.join(path)), written));
        }
        for path in self.names.keys().filter(|path| path.starts_with(INTENTS) && !is_copy) {
            let path = root.join(path);
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let own = identity(&path);
            let mut last = None;
            let line = |line: &str| match line.split_once(" = ") {
                Some(("own", _)) => format!("own = \"{own}\"\n"),
                Some(("file", text)) => {
                    let inode = text.split(':').nth(1).and_then(|inode| u64::from_str_radix(inode, 16).ok());
                    let found = inode.and_then(|inode| files.get(&inode));
                    last = found.map(|(_, written)| *written);
                    format!("file = \"{}\"\n", found.map_or(NOBODY, |(file, _)| file))
                }
                Some(("written", _)) => format!("written = {}\n", last.unwrap_or_default()),
                _ => format!("{line}\n"),
            };
            // A torn part stays as it is.
            if text.ends_with('\n') {
                fs::write(&path, text.lines().map(line).collect::<String>()).expect("room");
            }
        }
    }

    /// Equal for equal scenes.
    pub(crate) fn hash(&self) -> u64 {
        let mut hash = 0;
        for (path, file) in &self.names {
            let name =
                path.as_os_str().as_encoded_bytes().iter().fold(7, |hash, byte| mix(hash ^ u64::from(*byte)));
            hash = mix(hash ^ name) ^ mix(self.files[*file].hash() ^ *file as u64);
        }
        hash ^ self.directories.len() as u64
    }
}
