//! Names of chains and views in the mount.
//!
//! Pure and deterministic. A clash never hides anything: clashing items are shown by their full file names,
//! and if that is not enough by their paths.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::file_names::layer_name;

/// The active disk's view name.
pub const ACTIVE: &[u8] = b"active";
/// The directory of the store as a whole, in the mount's root.
pub const STORE_DIRECTORY: &[u8] = b".chainfs";
/// The text that explains the mount, in its root. A directory of that name in the store has precedence.
pub const README: &[u8] = b"README.txt";
/// The prefix of chainfs' own files in a store; a scan skips them.
pub(super) const OWN_PREFIX: &[u8] = b".chainfs";

/// Maximum length of a file name, as in Linux (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// Bytes of `.raw` and of `.vmstate`, which follow a view's name in the mount.
const DISK_SUFFIX_LEN: usize = 4;
const VM_STATE_SUFFIX_LEN: usize = 8;

/// Makes any bytes part of a file name: `/` and NUL are percent-encoded. An empty name becomes `%`.
pub fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(bytes.len());
    for byte in bytes {
        if matches!(byte, b'/' | 0) {
            name.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            name.push(*byte);
        }
    }
    if name.is_empty() {
        name.push(b'%');
    }
    name
}

/// Shortens a name to at most `most` bytes. A hash of the whole name, which is stable over scans, keeps two
/// long ones with a common prefix distinct.
fn fit(mut name: Vec<u8>, most: usize) -> Vec<u8> {
    if name.len() > most {
        let hash = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let hash = format!("~{hash:016x}");
        name.truncate(most - hash.len());
        name.extend_from_slice(hash.as_bytes());
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

/// Names of the chains of one directory, in the order of `forms`: the possible names of each, best first.
/// `taken`: sub-directories that are shown, and reserved words.
pub(super) fn chain_names(forms: &[Vec<Vec<u8>>], taken: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    settle(forms.len(), &|index, level| forms[index].get(level).cloned(), taken)
}

/// The possible names of the chain of the leaf at `path`, best first; `stated` is the user's.
pub(super) fn chain_forms(path: &Path, stated: Option<&[u8]>) -> Vec<Vec<u8>> {
    let forms = stated.into_iter().chain([stem(path), file_name(path)]);
    forms.map(|name| fit(whole(encode(name)), MAX_NAME)).collect()
}

/// A complete name: `.` and `..` have a special meaning, and are encoded.
fn whole(name: Vec<u8>) -> Vec<u8> {
    if matches!(name.as_slice(), b"." | b"..") { b"%2E".repeat(name.len()) } else { name }
}

/// One view to be named: its layer's file and, for an internal snapshot, name and id.
#[derive(Clone, Copy, Debug)]
pub(super) struct ViewForm<'a> {
    /// The layer's path in the store.
    pub path: &'a Path,
    /// Whether the layer is the active one.
    pub active: bool,
    /// Name and id of the internal snapshot.
    pub snapshot: Option<(&'a [u8], &'a [u8])>,
}

/// Names of the views of one chain, without suffix, in the order of `views`. Layers come first.
pub(super) fn view_names(views: &[ViewForm<'_>]) -> Vec<Vec<u8>> {
    let (layers, snapshots): (Vec<_>, Vec<_>) =
        (0..views.len()).partition(|index| views[*index].snapshot.is_none());
    let mut names = vec![Vec::new(); views.len()];
    let mut taken = BTreeSet::new();
    let mut by_layer: BTreeMap<(&Path, bool), Vec<u8>> = BTreeMap::new();
    let form = |place: usize, level: usize| layer_forms(&views[layers[place]]).into_iter().nth(level);
    for (index, name) in layers.iter().zip(settle(layers.len(), &form, &taken)) {
        taken.insert(name.clone());
        by_layer.insert((views[*index].path, views[*index].active), name.clone());
        names[*index] = name;
    }
    let form = |place: usize, level: usize| {
        let (index, view) = (snapshots[place], &views[snapshots[place]]);
        let layer =
            by_layer.get(&(view.path, view.active)).cloned().unwrap_or_else(|| encode(layer_name(view.path)));
        let (name, id) = view.snapshot.expect("a snapshot's form");
        let mut form = [&layer, &b"@"[..], &encode(name)].concat();
        if level >= 1 {
            form = [&form, &b"~"[..], &encode(id)].concat();
        }
        // Ids should be unique; in a bad table that repeats them, the index is used.
        if level >= 2 {
            form.extend_from_slice(format!("~{index}").as_bytes());
        }
        (level <= 2).then(|| fit(form, MAX_NAME - VM_STATE_SUFFIX_LEN))
    };
    for (index, name) in snapshots.iter().zip(settle(snapshots.len(), &form, &taken)) {
        names[*index] = name;
    }
    names
}

fn layer_forms(view: &ViewForm<'_>) -> Vec<Vec<u8>> {
    if view.active {
        return vec![ACTIVE.to_vec()];
    }
    let stem = encode(layer_name(view.path));
    let full = encode(file_name(view.path));
    let path = encode(view.path.as_os_str().as_bytes());
    let forms = if stem == ACTIVE { vec![full, path] } else { vec![stem, full, path] };
    forms.into_iter().map(|name| fit(name, MAX_NAME - DISK_SUFFIX_LEN)).collect()
}

/// Gives each item its first form; those that clash, with each other or with `taken`, move to their next,
/// until none does. Forms are made when needed: there may be very many, and long ones.
fn settle(
    count: usize,
    form: &dyn Fn(usize, usize) -> Option<Vec<u8>>,
    taken: &BTreeSet<Vec<u8>>,
) -> Vec<Vec<u8>> {
    let mut level = vec![0; count];
    let mut names: Vec<Vec<u8>> = (0..count).map(|index| form(index, 0).unwrap_or_default()).collect();
    loop {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_unstable_by(|a, b| names[*a].cmp(&names[*b]));
        let clashing: Vec<usize> = order
            .chunk_by(|a, b| names[*a] == names[*b])
            .filter(|same| same.len() > 1 || taken.contains(&names[same[0]]))
            .flatten()
            .copied()
            .collect();
        if clashing.is_empty() {
            return names;
        }
        let mut moved = false;
        for index in clashing {
            if let Some(next) = form(index, level[index] + 1) {
                (level[index], names[index], moved) = (level[index] + 1, next, true);
            }
        }
        if !moved {
            break;
        }
    }
    let mut used = taken.clone();
    for (index, name) in names.iter_mut().enumerate() {
        // Even the last forms may clash in a crafted store; nothing is hidden.
        while !used.insert(name.clone()) {
            *name = fit([name, format!("~{index}").as_bytes()].concat(), MAX_NAME - VM_STATE_SUFFIX_LEN);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(files: &[&str], taken: &[&str]) -> Vec<String> {
        let forms: Vec<_> = files.iter().map(|file| chain_forms(Path::new(file), None)).collect();
        let taken = taken.iter().map(|name| name.as_bytes().to_vec()).collect();
        chain_names(&forms, &taken).into_iter().map(|name| String::from_utf8(name).unwrap()).collect()
    }

    #[test]
    fn chains_are_named_after_stems_and_clashes_by_full_names() {
        assert_eq!(chains(&["web01.qcow2", "db.raw"], &[]), ["web01", "db"]);
        assert_eq!(chains(&["web01.qcow2", "web01.raw", "db.raw"], &[]), ["web01.qcow2", "web01.raw", "db"]);
        assert_eq!(chains(&["a.qcow2"], &["a"]), ["a.qcow2"]);
        // A full name that another item's stem would take moves that one on, too.
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
            name(&[
                active,
                inner(active, "monday", "1"),
                layer("sn1.qcow2"),
                inner(layer("sn1.qcow2"), "a/b", "1")
            ]),
            ["active", "active@monday", "sn1", "sn1@a%2Fb"]
        );
        assert_eq!(name(&[inner(active, "x", "1"), inner(active, "x", "2")])[1], "web01@x~2");
        // Both full names clash as well, so both are shown by their paths.
        let clash = [active, layer("active.raw"), layer("sub/active.raw")];
        assert_eq!(name(&clash), ["active", "active.raw", "sub%2Factive.raw"]);
    }

    #[test]
    fn only_invalid_bytes_of_a_name_are_encoded() {
        assert_eq!(encode(b"100%"), b"100%");
        assert_eq!(encode(b"%2F\n\xff"), b"%2F\n\xff");
        assert_eq!(encode(b"a/b\0c"), b"a%2Fb%00c");
        assert_eq!(encode(b""), b"%");
        assert_eq!(chains(&["..qcow2", "...qcow2", "x.qcow2"], &[]), ["%2E", "%2E%2E", "x"]);
    }

    #[test]
    fn long_names_are_shortened_and_stay_apart() {
        let view =
            |name| ViewForm { path: Path::new("web.qcow2"), active: true, snapshot: Some((name, b"1")) };
        let (one, two) = ([b'a'; 5000], [b'a'; 5001]);
        let names = view_names(&[view(&one), view(&two)]);
        assert!(names.iter().all(|name| name.len() + ".vmstate".len() <= 255) && names[0] != names[1]);
        let stem = "x".repeat(251);
        assert_eq!(chains(&[&format!("{stem}.raw")], &[]), [stem]);
    }

    #[test]
    fn names_that_clash_to_the_end_are_numbered() {
        let layer = |path| ViewForm { path: Path::new(path), active: false, snapshot: None };
        let names = view_names(&[layer("a/d.qcow2"), layer("b/d.qcow2"), layer("c/a%2Fd.qcow2.raw")]);
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 3, "{names:?}");
    }
}
