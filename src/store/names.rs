//! Names: what a chain and a view are called in the mount.
//!
//! Pure and deterministic. A clash never hides anything: whoever clashes is shown by its full
//! file name, and where that is not enough by its path.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The active disk's view name.
pub const ACTIVE: &[u8] = b"active";
/// The directory of the store as a whole, in the mount's root.
pub const STORE_DIRECTORY: &[u8] = b".chainfs";
/// What chainfs itself keeps in a store begins like this; a scan passes it over.
pub(super) const OWN_PREFIX: &[u8] = b".chainfs";

/// Longest part of a name that comes from an image, and longest name of several parts; with
/// digest and suffix it stays below 255 bytes.
const MAX_PART: usize = 200;

/// Makes any bytes a file name: `/` and NUL, which cannot stand in one, are percent-encoded, and so
/// are the dots of `.` and `..`, which mean something else. An empty name becomes `%`.
pub fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(bytes.len());
    for byte in bytes {
        if matches!(byte, b'/' | 0) || matches!(bytes, b"." | b"..") {
            name.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            name.push(*byte);
        }
    }
    if name.is_empty() {
        name.push(b'%');
    }
    shortened(name, bytes)
}

/// A name that is not too long; one that is ends in a digest of `meant`, all that it stands for.
fn shortened(mut name: Vec<u8>, meant: &[u8]) -> Vec<u8> {
    if name.len() > MAX_PART {
        // Two long names that begin alike must stay apart; a hash is stable over scans.
        let hash = meant
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        name.truncate(MAX_PART);
        name.extend_from_slice(format!("~{hash:016x}").as_bytes());
    }
    name
}

/// The file's name without its last extension.
pub(super) fn stem(path: &Path) -> &[u8] {
    path.file_stem().map_or(b"", OsStrExt::as_bytes)
}

fn file_name(path: &Path) -> &[u8] {
    path.file_name().map_or(b"", OsStrExt::as_bytes)
}

/// Names of the chains of one directory, in the order of `leaves` (paths of that directory).
/// `taken`: sub-directories that are shown, and reserved words.
pub(super) fn chain_names(leaves: &[&Path], taken: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    settle(&leaves.iter().map(|path| chain_forms(path)).collect::<Vec<_>>(), taken)
}

/// What the chain of the leaf at `path` may be called, best first.
pub(super) fn chain_forms(path: &Path) -> Vec<Vec<u8>> {
    vec![encode(stem(path)), encode(file_name(path))]
}

/// One view to be named: its layer's file and, for an internal snapshot, name and id.
#[derive(Clone, Copy, Debug)]
pub(super) struct ViewForm<'a> {
    /// The layer's place in the store.
    pub path: &'a Path,
    /// Whether the layer is the active one.
    pub active: bool,
    /// Name and id of the internal snapshot.
    pub snapshot: Option<(&'a [u8], &'a [u8])>,
}

/// Names of the views of one chain, without suffix, in the order of `views`. Layers come first.
pub(super) fn view_names(views: &[ViewForm<'_>]) -> Vec<Vec<u8>> {
    let (layers, snapshots): (Vec<_>, Vec<_>) = (0..views.len()).partition(|index| views[*index].snapshot.is_none());
    let mut names = vec![Vec::new(); views.len()];
    let layer_forms: Vec<_> = layers.iter().map(|index| layer_forms(&views[*index])).collect();
    let mut taken = BTreeSet::new();
    let mut by_layer: BTreeMap<(&Path, bool), Vec<u8>> = BTreeMap::new();
    for (index, name) in layers.iter().zip(settle(&layer_forms, &taken)) {
        taken.insert(name.clone());
        by_layer.insert((views[*index].path, views[*index].active), name.clone());
        names[*index] = name;
    }
    let snapshot_forms: Vec<_> = snapshots
        .iter()
        .map(|index| {
            let view = &views[*index];
            let layer = by_layer.get(&(view.path, view.active)).cloned().unwrap_or_else(|| encode(stem(view.path)));
            let (name, id) = view.snapshot.expect("a snapshot's form");
            let short = [&layer, &b"@"[..], &encode(name)].concat();
            let with_id = [&short, &b"~"[..], &encode(id)].concat();
            // Ids ought to be unique; where a bad table repeats them, the place in it is.
            let with_place = [&with_id, format!("~{index}").as_bytes()].concat();
            [short, with_id, with_place].into_iter().map(|name| shortened(name.clone(), &name)).collect()
        })
        .collect();
    for (index, name) in snapshots.iter().zip(settle(&snapshot_forms, &taken)) {
        names[*index] = name;
    }
    names
}

fn layer_forms(view: &ViewForm<'_>) -> Vec<Vec<u8>> {
    if view.active {
        return vec![ACTIVE.to_vec()];
    }
    let stem = encode(stem(view.path));
    let full = encode(file_name(view.path));
    let path = encode(view.path.as_os_str().as_bytes());
    if stem == ACTIVE { vec![full, path] } else { vec![stem, full, path] }
}

/// Gives each its first form; those that clash, with each other or with `taken`, move to their
/// next, until nobody does.
fn settle(forms: &[Vec<Vec<u8>>], taken: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut level = vec![0; forms.len()];
    loop {
        let mut users: BTreeMap<&[u8], Vec<usize>> = BTreeMap::new();
        for (index, forms) in forms.iter().enumerate() {
            users.entry(&forms[level[index]]).or_default().push(index);
        }
        let mut moved = false;
        for (name, users) in users {
            if users.len() > 1 || taken.contains(name) {
                for index in users {
                    if level[index] + 1 < forms[index].len() {
                        level[index] += 1;
                        moved = true;
                    }
                }
            }
        }
        if !moved {
            break;
        }
    }
    forms.iter().zip(level).map(|(forms, level)| forms[level].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(files: &[&str], taken: &[&str]) -> Vec<String> {
        let paths: Vec<_> = files.iter().map(Path::new).collect();
        let taken = taken.iter().map(|name| name.as_bytes().to_vec()).collect();
        chain_names(&paths, &taken).into_iter().map(|name| String::from_utf8(name).unwrap()).collect()
    }

    #[test]
    fn chains_are_named_after_stems_and_clashes_by_full_names() {
        assert_eq!(chains(&["web01.qcow2", "db.raw"], &[]), ["web01", "db"]);
        assert_eq!(chains(&["web01.qcow2", "web01.raw", "db.raw"], &[]), ["web01.qcow2", "web01.raw", "db"]);
        assert_eq!(chains(&["a.qcow2"], &["a"]), ["a.qcow2"]);
        // A full name that somebody else's stem would take moves that one on, too.
        assert_eq!(chains(&["x.qcow2", "x.raw", "x.raw.img"], &[]), ["x.qcow2", "x.raw", "x.raw.img"]);
    }

    #[test]
    fn views_are_named_after_layers_and_snapshots() {
        let name = |views: &[ViewForm<'_>]| -> Vec<String> {
            view_names(views).into_iter().map(|name| String::from_utf8_lossy(&name).into_owned()).collect()
        };
        let layer = |path| ViewForm { path: Path::new(path), active: false, snapshot: None };
        let active = ViewForm { active: true, ..layer("web01.qcow2") };
        let inner = |view: ViewForm<'static>, name: &'static str, id: &'static str| ViewForm {
            snapshot: Some((name.as_bytes(), id.as_bytes())),
            ..view
        };
        assert_eq!(
            name(&[active, inner(active, "monday", "1"), layer("sn1.qcow2"), inner(layer("sn1.qcow2"), "a/b", "1")]),
            ["active", "active@monday", "sn1", "sn1@a%2Fb"]
        );
        assert_eq!(name(&[inner(active, "x", "1"), inner(active, "x", "2")])[1], "web01@x~2");
        // Both full names clash as well, so both are shown by their paths.
        let clash = [active, layer("active.raw"), layer("sub/active.raw")];
        assert_eq!(name(&clash), ["active", "active.raw", "sub%2Factive.raw"]);
    }

    #[test]
    fn what_cannot_stand_in_a_name_is_encoded_and_nothing_else() {
        assert_eq!(encode(b"100%"), b"100%");
        assert_eq!(encode(b"%2F\n\xff"), b"%2F\n\xff");
        assert_eq!(encode(b"a/b\0c"), b"a%2Fb%00c");
        assert_eq!(encode(b""), b"%");
        let (one, two) = (encode(&[b'a'; 5000]), encode(&[b'a'; 5001]));
        assert!(one.len() < 255 && one != two);
        assert_eq!((encode(b"."), encode(b".."), encode(b"...")), (b"%2E".into(), b"%2E%2E".into(), b"...".into()));
        assert_eq!(chains(&["..qcow2", "...qcow2"], &[]), ["%2E", "%2E%2E"]);
    }

    #[test]
    fn a_name_of_many_long_parts_is_still_a_file_name() {
        let layer = "l".repeat(250);
        let path = Path::new(&layer);
        let (name, id) = ("n".repeat(250), "i".repeat(250));
        let (one, two) = (format!("{id}1"), format!("{id}2"));
        let view = |id| ViewForm { path, active: false, snapshot: Some((name.as_bytes(), id)) };
        let names = view_names(&[view(one.as_bytes()), view(two.as_bytes()), view(two.as_bytes())]);
        assert!(names.iter().all(|name| name.len() + ".vmstate".len() <= 255));
        assert!(names.iter().collect::<BTreeSet<_>>().len() == 3);
    }
}
