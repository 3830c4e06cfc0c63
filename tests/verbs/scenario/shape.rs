//! The shape of a store: chains with their layers, and views with their bytes. By QEMU, as expected; and by a
//! chainfs store, as found.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use chainfs::store::{ChainView, Store, ViewPart};
use chainfs::units::Stability;

use support::sim::Pages;
use support::{Outcome as _, tool};

/// A chain by its leaf: the files of its layers, top first, and whether the leaf's disk is active.
pub(crate) type Chains = BTreeMap<String, (Vec<String>, bool)>;
/// Views by file, and for an internal snapshot `file@name`.
pub(crate) type Views<T> = BTreeMap<String, T>;

/// The bytes of a view.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Fixed(Vec<u8>),
    /// A guest's content.
    Live,
    /// The guest's content at this point of the tape.
    LiveUntil(usize),
}

/// The expected shape of a store.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) files: BTreeSet<String>,
    pub(crate) chains: Chains,
    pub(crate) views: Views<Content>,
}

/// The format that a name indicates.
fn format(file: &str) -> &'static str {
    if is_qcow2(file) { "qcow2" } else { "raw" }
}

/// Whether a name indicates a qcow2 image.
pub(crate) fn is_qcow2(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|extension| extension == "qcow2")
}

/// QEMU's read of a view.
pub(crate) fn by_qemu(root: &Path, view: &str, scratch: &Path) -> Result<Vec<u8>, String> {
    let (file, inner) = view.split_once('@').map_or((view, None), |(file, inner)| (file, Some(inner)));
    let target = scratch.join("converted.raw");
    let mut convert = tool("qemu-img");
    convert.current_dir(root).args(["convert", "-U", "-f", format(file), "-O", "raw"]);
    if let Some(inner) = inner {
        convert.args(["-l", &format!("snapshot.name={inner}")]);
    }
    let (code, _, said) = convert.arg(file).arg(&target).outcome();
    if code != 0 {
        return Err(format!("qemu-img convert of {view}: {said}"));
    }
    let bytes = fs::read(&target).expect("what QEMU reads");
    fs::remove_file(target).expect("a file of ours");
    Ok(bytes)
}

/// Whether QEMU finds an image free of corruption; leaks are none.
pub(crate) fn checked_by_qemu(root: &Path, file: &str) -> Result<(), String> {
    let (code, out, said) =
        tool("qemu-img").current_dir(root).args(["check", "-U", "-f", "qcow2", file]).outcome();
    if matches!(code, 0 | 3) { Ok(()) } else { Err(format!("qemu-img check of {file}: {code}\n{out}{said}")) }
}

/// The files of a store, without those in chainfs' own directory.
pub(crate) fn files(root: &Path) -> BTreeSet<String> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![String::new()]);
    while let Some(directory) = waiting.pop() {
        for entry in
            fs::read_dir(root.join(&directory)).expect("the store").map(|entry| entry.expect("an entry"))
        {
            let name = format!("{directory}{}", entry.file_name().to_str().expect("plain"));
            match entry.file_type().expect("its kind").is_dir() {
                true if name == ".chainfs" => {}
                true => waiting.push(format!("{name}/")),
                false => drop(found.insert(name)),
            }
        }
    }
    found
}

impl Shape {
    /// The shape by QEMU. `active`: leaves whose disks are active; `live`: the one that a guest writes.
    pub(crate) fn of(root: &Path, active: &[&str], live: Option<&str>, scratch: &Path) -> Self {
        let files = files(root);
        let mut below = BTreeMap::new();
        let mut names = Vec::new();
        for file in files
            .iter()
            .filter(|file| Path::new(file).extension().is_none_or(|extension| extension != "invalid"))
        {
            names.push(file.clone());
            if format(file) == "raw" {
                continue;
            }
            let text =
                tool("qemu-img").current_dir(root).args(["info", "-U", "--output=json", file]).succeeds();
            let info: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            if let Some(backing) = info["backing-filename"].as_str() {
                below.insert(
                    file.clone(),
                    file[..file.rfind('/').map_or(0, |at| at + 1)].to_owned() + backing,
                );
            }
            let inner = info["snapshots"].as_array().cloned().unwrap_or_default();
            names.extend(
                inner.iter().map(|inner| format!("{file}@{}", inner["name"].as_str().expect("a name"))),
            );
        }
        let mut chains = Chains::new();
        for leaf in
            names.iter().filter(|name| !name.contains('@') && !below.values().any(|file| file == *name))
        {
            let layers: Vec<String> =
                std::iter::successors(Some(leaf), |file| below.get(*file)).cloned().collect();
            chains.insert(leaf.clone(), (layers, active.contains(&leaf.as_str())));
        }
        let content = |name: &String| match live {
            Some(live) if live == name => Content::Live,
            _ => Content::Fixed(by_qemu(root, name, scratch).unwrap_or_else(|error| panic!("{error}"))),
        };
        let views = names.iter().map(|name| (name.clone(), content(name))).collect();
        Self { files, chains, views }
    }
}

/// A view by chainfs.
pub(crate) struct Seen {
    pub(crate) bytes: Result<Vec<u8>, String>,
    pub(crate) is_active: bool,
    /// The inode number of the file.
    pub(crate) inode: u64,
}

/// The shape by a chainfs store: its chains, and its listed views.
pub(crate) fn seen(store: &Arc<Store>) -> (Chains, Views<Seen>) {
    let catalog = store.catalog();
    let (mut chains, mut views) = (Chains::new(), Views::new());
    let name = |index: usize| catalog.images[index].place.path.to_str().expect("plain").to_owned();
    for (_, leaf) in catalog.chains() {
        let shown = store.chain_views(&catalog, leaf);
        let layers = shown.layers.iter().map(|layer| name(*layer)).collect();
        chains.insert(name(leaf), (layers, catalog.is_active(leaf)));
        for view in &shown.views {
            let ChainView { layer, snapshot, active, .. } = view;
            let image = &catalog.images[shown.layers[*layer]];
            let inner = snapshot.map(|index| {
                let name = &image.qcow2().expect("an image with snapshots").snapshots[index].name;
                format!("@{}", String::from_utf8_lossy(name))
            });
            let key = format!("{}{}", name(shown.layers[*layer]), inner.unwrap_or_default());
            let part = snapshot.map_or(ViewPart::Active, ViewPart::Snapshot);
            let bytes = store
                .open_view(&catalog, &shown.layers[*layer..], part, Stability::live_if(*active))
                .and_then(|open| {
                    let mut bytes = vec![0; open.view.size() as usize];
                    open.view.read_at(0, &mut bytes)?;
                    Ok(bytes)
                });
            let bytes = bytes.map_err(|error| error.to_string());
            let inode = fs::metadata(store.host_path(&image.place)).map_or(0, |metadata| metadata.ino());
            views.insert(key, Seen { bytes, is_active: *active, inode });
        }
    }
    (chains, views)
}

/// Bytes as the history of a guest wants them.
pub(crate) fn pages(bytes: &[u8]) -> Pages {
    let mut pages = Pages::default();
    pages.write(0, bytes);
    pages
}
