//! Checks the arrows of docs/ARCHITECTURE.md: a layer uses only those to its right.

use std::fs;
use std::path::{Path, PathBuf};

use support::project;

/// From the outermost to the innermost. `format`, `io` and `guest` are side by side.
const LAYERS: [(&str, usize); 15] = [
    ("cli", 9),
    ("fs", 8),
    ("report", 7),
    ("ops", 6),
    ("browse", 6),
    ("store", 5),
    ("chain", 4),
    ("image", 3),
    ("format", 2),
    ("io", 2),
    ("guest", 2),
    ("cache", 0),
    ("codec", 0),
    ("units", 1),
    ("error", 0),
];

fn rank(layer: &str) -> usize {
    LAYERS
        .iter()
        .find(|(name, _)| *name == layer)
        .unwrap_or_else(|| panic!("a new layer: {layer}; place it"))
        .1
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_layer_uses_one_to_its_left() {
    let src = project().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut judged = 0;
    for file in files {
        let inner = file.strip_prefix(&src).unwrap();
        let layer = inner.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if matches!(layer, "lib" | "main") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for used in text.split("crate::").skip(1) {
            let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if used.is_empty() || used == layer {
                continue;
            }
            judged += 1;
            let allowed = rank(&used) < rank(layer);
            assert!(allowed, "{}: {layer} must not use {used}", inner.display());
        }
    }
    assert!(judged > 50, "the test has lost sight of the uses it is to judge ({judged})");
}

/// Whether a line of code, not of comments, has the word.
fn names(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
        line.match_indices(word)
            .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
    })
}

#[test]
fn only_their_users_name_packages_of_transports() {
    let src = project().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    for (package, transports) in [
        ("fuser", &["fs/fuse"][..]),
        ("fuse_ring", &["fs/fuse", "fs/ring"]),
        ("chainfs_objects", &["io/remote"]),
    ] {
        let naming: Vec<_> = files
            .iter()
            .filter(|file| names(&fs::read_to_string(file).unwrap(), package))
            .map(|file| file.strip_prefix(&src).unwrap().with_extension(""))
            .collect();
        let is_transport = |file: &PathBuf| transports.iter().any(|transport| file.starts_with(transport));
        assert!(!naming.is_empty() && naming.iter().all(is_transport), "{package}: {naming:?}");
    }
    assert!(names("use fuser::Errno;", "fuser") && !names("// fuser\n\"fusermount3\"", "fuser"));
}

/// What the service decides is named by no transport: a transport has plain calls and replies.
#[test]
fn the_transports_name_neither_kinds_of_errors_nor_handles() {
    let fs = project().join("src/fs");
    let mut files = vec![fs.join("fuse.rs"), fs.join("ring.rs")];
    sources(&fs.join("fuse"), &mut files);
    sources(&fs.join("ring"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for word in ["ErrorKind", "Handle", "Node", "Duration", "thread", "spawn"] {
            assert!(!names(&text, word), "{} names {word}", file.display());
        }
    }
}

/// Words for what a local directory is made of: only `io` may use them of a store's files.
const OF_FILES: [&str; 8] =
    ["os::fd", "OwnedFd", "rustix::fs", "nix::fcntl", "MetadataExt", "io::Root", "st_ino", "inotify::"];

/// Makes image files for `chainfs create`, in no store.
const MAKES_FILES: &str = "image/create.rs";

#[test]
fn only_the_backend_knows_descriptors_and_inode_numbers_of_a_store() {
    let src = project().join("src");
    let mut files = Vec::new();
    for layer in ["store", "ops", "chain", "image", "report"] {
        sources(&src.join(layer), &mut files);
    }
    assert!(files.len() > 100, "{} files", files.len());
    for file in files.iter().filter(|file| !file.ends_with(MAKES_FILES)) {
        let text = fs::read_to_string(file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let found = code.lines().find(|line| OF_FILES.iter().any(|word| line.contains(word)));
        assert_eq!(found, None, "{} knows what its store lives in", file.display());
    }
}
