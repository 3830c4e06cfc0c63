//! Images in the terms of `qemu-img info`, filled in from the catalog.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::format::header::{Compression, Encryption};
use crate::format::{Header, Snapshot, Version, bitmap};
use crate::image::read_bitmaps;
use crate::io::Expect;
use crate::report::info::{
    BitmapInfo, ChildInfo, FileInfo, FormatSpecific, ImageInfo, LayerInfo, Qcow2Info, SnapshotInfo,
};
use crate::report::safe::{self, terminal};
use crate::store::{Catalog, DetectedContent, Format, ImageEntry, ImageIndex, Qcow2Description, Store};
use crate::units::round_up_to_sector;

use super::{ListingBudget, chain_name, path_text};

/// Longer bitmap directories are not listed.
const MAX_BITMAP_DIRECTORY: u64 = 4 << 20;
/// Chains of a shared layer that are listed; of more, only the number is given.
const MAX_CHAINS_NAMED: usize = 100;

/// The layers of a chain, leaf first, named by their paths on the host.
pub fn chain_info(store: &Store, catalog: &Catalog, leaf: ImageIndex) -> Vec<ImageInfo> {
    let place = &catalog.images[leaf].place;
    let filename = store.roots()[place.root].given().join(&place.path);
    infos(store, catalog, leaf, &filename, ListingBudget::endless())
}

/// The same for a file that is rendered as a whole: of very many internal snapshots, only the first ones.
pub fn chain_info_in_short(store: &Store, catalog: &Catalog, leaf: ImageIndex) -> Vec<ImageInfo> {
    let place = &catalog.images[leaf].place;
    let filename = store.roots()[place.root].given().join(&place.path);
    infos(store, catalog, leaf, &filename, ListingBudget::default())
}

/// The same, for a leaf that the user calls `filename`: as in QEMU, the names of the other layers follow from
/// it.
pub fn chain_info_as(store: &Store, catalog: &Catalog, leaf: ImageIndex, filename: &Path) -> Vec<ImageInfo> {
    infos(store, catalog, leaf, filename, ListingBudget::endless())
}

fn infos(
    store: &Store,
    catalog: &Catalog,
    leaf: ImageIndex,
    filename: &Path,
    room: ListingBudget,
) -> Vec<ImageInfo> {
    let views = store.chain_views(catalog, leaf);
    let mut names: Vec<Option<&[u8]>> = vec![None; views.layers.len()];
    for view in views.views.iter().filter(|view| view.snapshot.is_none()) {
        names[view.layer] = Some(&view.name);
    }
    let mut sharers = Sharers::new(catalog, leaf);
    let filenames = filenames(store, catalog, &views.layers, filename);
    let mut room = room;
    let mut infos: Vec<ImageInfo> = Vec::with_capacity(views.layers.len());
    for (depth, ((index, name), filename)) in views.layers.iter().zip(names).zip(filenames).enumerate() {
        let image = &catalog.images[*index];
        let mut info = one(store, image, &filename, &mut room);
        let omitted = image.qcow2().map_or(0, |qcow2| qcow2.snapshots.len())
            - info.snapshots.as_ref().map_or(0, Vec::len);
        let sentences = catalog.sentences(*index);
        let frozen = image.frozen.as_ref();
        info.chainfs = Some(LayerInfo {
            view: name.map(safe::text).unwrap_or_default(),
            chains: sharers.down_to(*index).to_vec(),
            chain_count: image.chain_count,
            depth,
            frozen: depth > 0 || image.is_frozen(),
            frozen_sec: frozen.map(|frozen| frozen.seconds),
            frozen_nsec: frozen.map(|frozen| frozen.nanoseconds),
            description: frozen.map(|frozen| frozen.description.clone()).filter(|words| !words.is_empty()),
            shared_by: image.users.len(),
            snapshots_left_out: (omitted > 0).then_some(omitted),
            problem: (!sentences.is_empty()).then(|| terminal(&sentences.join("; "))),
        });
        infos.push(info);
    }
    infos
}

/// The files with the guest's data of these layers, top first, for a top layer that the user calls
/// `filename`.
pub fn layer_files(store: &Store, catalog: &Catalog, layers: &[ImageIndex], filename: &Path) -> Vec<String> {
    let files = layers.iter().zip(filenames(store, catalog, layers, filename)).map(|(index, filename)| {
        let data_file =
            content(&catalog.images[*index]).and_then(|qcow2| qcow2.header.data_file.as_ref()?.name.clone());
        path_text(&data_file.map_or(filename.clone(), |name| full_name(&filename, &name)))
    });
    files.collect()
}

/// The name of each layer, derived from the one above it as in QEMU.
fn filenames(store: &Store, catalog: &Catalog, layers: &[ImageIndex], filename: &Path) -> Vec<PathBuf> {
    let mut next = filename.to_path_buf();
    let mut names = Vec::with_capacity(layers.len());
    for (depth, index) in layers.iter().enumerate() {
        let image = &catalog.images[*index];
        if depth > 0 && !store.options().maps.is_empty() {
            // The names in the headers are from another host.
            next = store.host_path(&image.place);
        }
        let backing = content(image).and_then(|qcow2| qcow2.header.backing.as_ref());
        let backing = backing.map(|backing| full_name(&next, &backing.name)).unwrap_or_default();
        names.push(std::mem::replace(&mut next, backing));
    }
    names
}

/// One image under the user's name, without the facts that depend on its chain.
pub fn image_info(store: &Store, catalog: &Catalog, index: ImageIndex, filename: &Path) -> ImageInfo {
    one(store, &catalog.images[index], filename, &mut ListingBudget::endless())
}

fn one(store: &Store, image: &ImageEntry, filename: &Path, room: &mut ListingBudget) -> ImageInfo {
    let file_size = round_up_to_sector(image.stat.size);
    let actual_size = Some(image.stat.blocks * 512);
    let qcow2 = content(image);
    let mut info = ImageInfo {
        filename: path_text(filename),
        format: format_of(image).to_owned(),
        virtual_size: qcow2.map(|qcow2| qcow2.header.virtual_size).or(image.virtual_size()),
        actual_size,
        dirty_flag: Some(false),
        ..ImageInfo::default()
    };
    let file = ImageInfo {
        children: Some(Vec::new()),
        format: "file".to_owned(),
        virtual_size: Some(file_size),
        format_specific: Some(FormatSpecific::File(FileInfo::default())),
        ..info.clone()
    };
    info.children = Some(vec![ChildInfo { name: "file".to_owned(), info: file }]);
    if let Some(qcow2) = qcow2 {
        let header = &qcow2.header;
        info.cluster_size = Some(header.cluster.size());
        info.dirty_flag = Some(header.dirty());
        info.encrypted = header.encryption.map(|_| true);
        if let Some(backing) = &header.backing {
            info.backing_filename = Some(safe::text(&backing.name));
            info.full_backing_filename = Some(path_text(&full_name(filename, &backing.name)));
            info.backing_filename_format.clone_from(&backing.format);
        }
        if !qcow2.snapshots.is_empty() {
            info.snapshots =
                Some(qcow2.snapshots.iter().take_while(|found| room.take(found)).map(snapshot).collect());
        }
        info.format_specific = Some(FormatSpecific::Qcow2(details(header, bitmaps(store, image, header))));
    }
    info
}

/// QEMU's name of an image's format, as far as it is known: an unreadable image is not called raw.
fn format_of(image: &ImageEntry) -> &'static str {
    match (image.format, &image.content) {
        (Some(format), _) => format.name(),
        (None, DetectedContent::Foreign(foreign)) => foreign.kind.name(),
        (None, content) if content.has_magic() => Format::Qcow2.name(),
        (None, _)
            if image.place.path.extension().is_some_and(|found| found.eq_ignore_ascii_case("qcow2")) =>
        {
            Format::Qcow2.name()
        }
        (None, _) => crate::format::foreign::ForeignFormat::of_name(&image.place.path)
            .map_or("unknown", |kind| kind.name()),
    }
}

/// The image's qcow2 header if it is qcow2, whether or not it can be read as such.
fn content(image: &ImageEntry) -> Option<&Qcow2Description> {
    match (&image.content, image.format) {
        (DetectedContent::Qcow2(qcow2), Some(Format::Qcow2) | None) => Some(qcow2),
        _ => None,
    }
}

fn snapshot(snapshot: &Snapshot) -> SnapshotInfo {
    const SECOND: u64 = 1_000_000_000;
    SnapshotInfo {
        id: safe::text(&snapshot.id),
        name: safe::text(&snapshot.name),
        vm_state_size: snapshot.vm_state_size,
        date_sec: snapshot.seconds.into(),
        date_nsec: snapshot.nanoseconds,
        vm_clock_sec: snapshot.vm_clock_nanoseconds / SECOND,
        vm_clock_nsec: (snapshot.vm_clock_nanoseconds % SECOND) as u32,
        icount: snapshot.icount,
    }
}

fn details(header: &Header, bitmaps: Option<Vec<BitmapInfo>>) -> Qcow2Info {
    let compression = match header.compression {
        Compression::Deflate => "zlib",
        Compression::Zstd => "zstd",
    };
    let encrypt = header.encryption.map(|method| match method {
        Encryption::AesCbc => json!({"format": "aes"}),
        Encryption::Luks => json!({"format": "luks"}),
    });
    let common = Qcow2Info {
        compression_type: Some(compression.to_owned()),
        refcount_bits: 1 << header.refcount_order,
        encrypt,
        ..Qcow2Info::default()
    };
    match header.version {
        Version::V2 => Qcow2Info { compat: "0.10".to_owned(), ..common },
        Version::V3 => Qcow2Info {
            compat: "1.1".to_owned(),
            lazy_refcounts: Some(header.lazy_refcounts()),
            corrupt: Some(header.corrupt()),
            extended_l2: Some(header.extended_l2()),
            data_file: header.data_file.as_ref().and_then(|file| file.name.as_deref()).map(safe::text),
            data_file_raw: header.data_file.as_ref().map(|file| file.raw),
            bitmaps,
            ..common
        },
    }
}

/// The bitmaps, if there are any and their directory can be read.
fn bitmaps(store: &Store, image: &ImageEntry, header: &Header) -> Option<Vec<BitmapInfo>> {
    let len = header.bitmaps.map_or(0, |extension| extension.directory_len);
    if len > MAX_BITMAP_DIRECTORY.min(image.stat.size) {
        return None;
    }
    let file = store.file(&image.place, &image.stat, Expect::SameVersion);
    let (_, found) = read_bitmaps(&image.shown(), &*file, header).ok()??;
    let flags = |bitmap: &bitmap::Bitmap| {
        let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
        flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, word)| word.to_owned()).collect()
    };
    let infos = found.iter().map(|bitmap| BitmapInfo {
        flags: flags(bitmap),
        name: safe::text(&bitmap.name),
        granularity: 1 << bitmap.granularity_bits,
    });
    Some(infos.collect())
}

/// A backing file's path as seen by the user, built like QEMU does: relative names start at the image's
/// directory, and the path is not normalised.
fn full_name(filename: &Path, backing: &[u8]) -> PathBuf {
    let backing_path = Path::new(OsStr::from_bytes(backing));
    let colon = backing.iter().position(|byte| matches!(byte, b':' | b'/')).filter(|at| backing[*at] == b':');
    if colon.is_some() {
        return backing_path.to_path_buf();
    }
    match filename.parent() {
        Some(directory) => directory.join(backing_path),
        None => backing_path.to_path_buf(),
    }
}

/// Collects the names of the chains that share the layers of a chain, from the leaf to the base.
struct Sharers<'a> {
    catalog: &'a Catalog,
    names: Vec<String>,
    /// Images whose chains are named already.
    seen: HashSet<ImageIndex>,
}

impl<'a> Sharers<'a> {
    fn new(catalog: &'a Catalog, leaf: ImageIndex) -> Self {
        Self { catalog, names: vec![chain_name(catalog, leaf)], seen: HashSet::from([leaf]) }
    }

    /// The chains of `layer`; must be called for each layer in turn.
    fn down_to(&mut self, layer: ImageIndex) -> &[String] {
        self.seen.insert(layer);
        let mut pending = self.catalog.images[layer].users.clone();
        while let Some(index) = pending.pop() {
            if self.names.len() >= MAX_CHAINS_NAMED {
                break;
            }
            if self.catalog.images[index].chain_count == 0 || !self.seen.insert(index) {
                continue;
            }
            let users = &self.catalog.images[index].users;
            if users.is_empty() {
                self.names.push(chain_name(self.catalog, index));
            }
            pending.extend(users);
        }
        &self.names
    }
}
