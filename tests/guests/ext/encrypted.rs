//! Directories that the file system encrypts, judged by the kernel's own mount without the key. The kernel
//! makes them itself, with its key for tests (`test_dummy_encryption`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use chainfs::guest::ext::Ext;
use chainfs::guest::{FileKind, FileSystem as _, Ino};

use super::MIB;
use crate::disk::*;

/// Linux's view of encrypted directories without the key: names, kinds and targets of links.
#[test]
fn encrypted_directories_have_the_names_that_linux_gives_them_without_a_key() {
    let formats = [
        "mkfs.ext4 -b 4096 -O encrypt",
        "mkfs.ext4 -b 1024 -O encrypt,^dir_index",
        "mkfs.ext4 -b 4096 -O encrypt,inline_data -I 256",
        "mkfs.ext4 -b 1024 -O encrypt,^metadata_csum -E hash_seed=6a2f0c9e-0d4b-4a55-9d1c-2d8c7a1e5b10",
    ];
    for format in formats {
        let disk = Disk::format(format, 64 * MIB);
        disk.mounted("rw,test_dummy_encryption", |dir| {
            for (directory, count) in [("few", 5), ("many", 300)] {
                fs::create_dir(dir.join(directory)).expect("a directory");
                for number in 0..count {
                    let name = format!("{number} {}", "n".repeat(number * 7 % 230));
                    fs::write(dir.join(directory).join(name), "secret").expect("a file");
                }
            }
            symlink("few/0 ", dir.join("few/link")).expect("a link");
            symlink("t".repeat(500), dir.join("few/long")).expect("a link");
            fs::create_dir(dir.join("few/deeper")).expect("a directory");
            for number in 0..20 {
                fs::write(dir.join("few/deeper").join(format!("File {number}")), "x").expect("a file");
            }
        });
        let shown = disk.mounted("ro", kernel_names);
        let ours = disk.open();
        let mut have = BTreeMap::new();
        our_names(&ours, ours.root(), Path::new(""), &mut have);
        assert!(shown.len() > 320, "{format}: {}", shown.len());
        let odd: Vec<_> =
            shown.iter().filter(|(path, seen)| have.get(*path) != Some(*seen)).take(5).collect();
        assert!(
            shown.len() == have.len() && odd.is_empty(),
            "{format}: {odd:?}\nours: {:?}",
            have.iter().take(5)
        );
        let encrypted =
            shown.keys().find(|path| path.components().count() == 2).expect("a name in a directory");
        let mut few = ours.root();
        for part in encrypted.parent().expect("a directory").components() {
            few = ours.lookup(few, part.as_os_str().as_bytes()).expect("an answer").expect("a directory");
        }
        for wrong in ["0 ", "few", "AAAA", &"A".repeat(40), &"-".repeat(252)] {
            assert_eq!(ours.lookup(few, wrong.as_bytes()).expect("an answer"), None, "{wrong}");
        }
    }
}

/// Inode, size and target of everything but `lost+found`, by path.
type Names = BTreeMap<PathBuf, (u64, u64, Option<Vec<u8>>)>;

fn kernel_names(dir: &Path) -> Names {
    let mut names = Names::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).expect("a directory").map(|entry| entry.expect("an entry")) {
            let (path, found) = (entry.path(), entry.metadata().expect("attributes"));
            let target = found
                .is_symlink()
                .then(|| fs::read_link(&path).expect("a target").into_os_string().into_vec());
            if found.is_dir() && entry.file_name() != "lost+found" {
                left.push(path.clone());
            }
            let size = if found.is_dir() { 0 } else { found.len() };
            names.insert(path.strip_prefix(dir).expect("beneath").to_path_buf(), (found.ino(), size, target));
        }
    }
    names
}

fn our_names(ours: &Ext, directory: Ino, path: &Path, names: &mut Names) {
    let mut entries = Vec::new();
    let listed = ours.list(directory, 0, &mut |entry| {
        entries.push(entry);
        true
    });
    listed.expect("a listing");
    for entry in entries {
        let found = ours.attributes(entry.ino).expect("attributes");
        let path = path.join(std::ffi::OsStr::from_bytes(&entry.name));
        assert_eq!(
            ours.lookup(directory, &entry.name).expect("an answer"),
            Some(entry.ino),
            "{}",
            path.display()
        );
        let target = (found.kind == FileKind::Symlink).then(|| ours.read_link(entry.ino).expect("a target"));
        let is_directory = found.kind == FileKind::Directory;
        names.insert(path.clone(), (entry.ino.0, if is_directory { 0 } else { found.size }, target));
        if is_directory && entry.name != b"lost+found" {
            our_names(ours, entry.ino, &path, names);
        }
    }
}
