//! Commands to copy, with the names of a mount. Only names that a shell takes as they are shown, or in
//! quotes, are used: of names with control characters, a copy would mean something else.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::ops::quote;
use crate::report::safe::terminal;
use crate::store::{Catalog, ImageIndex, Store};

/// Chains that are looked at for good examples.
const CHAINS_TRIED: usize = 200;
/// A chain of so many layers is as good an example as any longer one.
const GOOD_DEPTH: usize = 4;
/// Longer paths are no good examples.
const PATH_LEN: usize = 300;

/// The names that commands are shown with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The mount point.
    pub mount: String,
    /// A chain of it.
    pub chain: Option<ExampleChain>,
}

/// A chain that commands are shown with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExampleChain {
    /// Its directory, as a word of a shell.
    pub path: String,
    /// The same from the mount point on; empty if the mount is one chain.
    pub inner: String,
    /// A snapshot of it, as a word of a shell.
    pub snapshot: Option<String>,
    /// Whether it has an active disk.
    pub is_active: bool,
    /// Whether a command may change it.
    pub is_writable: bool,
    /// Whether its guest's files are shown.
    pub has_files: bool,
}

impl Example {
    /// For a mount at `mount`, if that is known. `chain`: that one, or a good one of all.
    pub fn of(
        store: &Store,
        catalog: &Catalog,
        mount: Option<&Path>,
        chain: Option<ImageIndex>,
        has_files: bool,
    ) -> Self {
        let is_usable =
            |path: &&Path| path.as_os_str().len() <= PATH_LEN && word(path.as_os_str().as_bytes()).is_some();
        let known = mount.filter(is_usable);
        let mount = known.map_or_else(|| PathBuf::from("MOUNT"), Path::to_path_buf);
        let is_writable = store.read_only().is_none();
        let of = |path: &Path, leaf: ImageIndex| -> Option<(ExampleChain, usize)> {
            let inner = word(path.as_os_str().as_bytes()).filter(|_| path.as_os_str().len() <= PATH_LEN);
            // The empty path of a single image is a good one.
            let inner = if path.as_os_str().is_empty() { String::new() } else { inner? };
            let views = store.chain_views(catalog, leaf);
            if catalog.view_problem(&views.layers).is_some() {
                return None;
            }
            // The latest layer below the active one; not an internal snapshot, for which fewer commands go.
            let snapshot = views.snapshots().find(|view| view.snapshot.is_none());
            let full = mount.join(path);
            let chain = ExampleChain {
                path: word(full.as_os_str().as_bytes())?,
                inner,
                snapshot: snapshot.and_then(|view| word(&view.name)),
                is_active: views.active().is_some(),
                is_writable,
                has_files,
            };
            Some((chain, views.layers.len()))
        };
        let found = if let Some(leaf) = chain {
            catalog.chain_path(leaf).and_then(|path| of(&path, leaf))
        } else {
            let tried = catalog.chains().take(CHAINS_TRIED).filter_map(|(path, leaf)| of(&path, leaf));
            // A disk with some history shows most. The first of these, so that it stays the same.
            let rank = |(chain, layers): &(ExampleChain, usize)| {
                (chain.is_active && chain.snapshot.is_some(), chain.is_active, (*layers).min(GOOD_DEPTH))
            };
            tried.reduce(|best, next| if rank(&next) > rank(&best) { next } else { best })
        };
        let found = found.map(|(chain, _)| chain);
        Self { mount: word(mount.as_os_str().as_bytes()).unwrap_or_default(), chain: found }
    }

    /// The ten commonest commands, as far as they make sense here, each after what it does.
    pub fn commands(&self) -> Vec<(&'static str, String)> {
        let mut all = vec![("draw the backing trees", format!("chainfs tree {}", self.mount))];
        let Some(chain) = &self.chain else { return all };
        let ExampleChain { path, snapshot, is_active, is_writable, has_files, .. } = chain;
        let mut add = |what, command: String| all.push((what, command));
        add("list the snapshots, with their sizes on disk", format!("ls -ls {}", inside(path, "snapshots")));
        if let Some(snapshot) = snapshot {
            let disk = inside(path, &format!("snapshots/{snapshot}.raw"));
            if *has_files {
                add(
                    "look at the guest's files in a snapshot",
                    format!("ls {}", inside(path, &format!("files/{snapshot}"))),
                );
            }
            if *is_active {
                add(
                    "see what differs between a snapshot and now",
                    format!("chainfs diff --files {disk} {}", inside(path, "active.raw")),
                );
            }
            add(
                "copy a disk out of a snapshot",
                format!("cp --sparse=always --no-preserve=mode {disk} restored.raw"),
            );
            add("boot a snapshot, and throw away what it writes", {
                // In an option of QEMU, a comma is written twice.
                let disk = disk.replace(',', ",,");
                format!("qemu-system-x86_64 -snapshot -drive file={disk},format=raw")
            });
        }
        if *is_writable && *is_active {
            add("keep the present state, in use or not", format!("chainfs snapshot {path} NEW-NAME"));
        }
        if let Some(snapshot) = snapshot.as_ref().filter(|_| *is_writable) {
            if *is_active {
                add(
                    "go back to a snapshot, and keep the present state, too",
                    format!("chainfs revert --save before-revert {path} {snapshot}"),
                );
            }
            add(
                "make a new machine from a snapshot",
                format!("chainfs clone --from {snapshot} {path} NEW-NAME"),
            );
            add(
                "see what deleting a snapshot would do (without --dry-run, it does it)",
                format!("chainfs delete --dry-run {path} {snapshot}"),
            );
        }
        all
    }
}

/// A path, which may be quoted, followed by more of it: a shell joins them.
fn inside(path: &str, rest: &str) -> String {
    format!("{path}/{rest}")
}

/// A word of a shell; `None` for names that are not shown as they are.
fn word(name: &[u8]) -> Option<String> {
    let text = String::from_utf8(quote(name)).ok()?;
    (terminal(&text) == text && !text.starts_with('-')).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_can_be_copied_are_words() {
        assert_eq!(word(b"web01").as_deref(), Some("web01"));
        assert_eq!(word(b"it's 1").as_deref(), Some("'it'\\''s 1'"));
        assert_eq!(word("a\u{202e}b".as_bytes()), None);
        assert_eq!((word(b"a\nb"), word(b"\xff"), word(b"-rf")), (None, None, None));
    }
}
