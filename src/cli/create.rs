//! `chainfs create`: creates an empty qcow2 image, for demonstrations and scripts without qemu-img.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use glob::Pattern;

use super::args::CreateArgs;
use super::mount_options::ImageFormat;
use super::output::print;
use super::store_options::format as store_format;
use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateOptions, NewBacking, create};
use crate::report::safe::{terminal, terminal_bytes};
use crate::store::{Store, StoreOptions};
use crate::units::parse_size;

/// Other options of `qemu-img create -o`, with the only values that chainfs supports.
const FIXED: [(&str, &[&str]); 6] = [
    ("compat", &["1.1", "v3"]),
    ("extended_l2", &["off"]),
    ("compression_type", &["zlib"]),
    ("lazy_refcounts", &["off"]),
    ("refcount_bits", &["16"]),
    ("preallocation", &["off"]),
];

/// Runs the command.
pub(super) fn run(args: &CreateArgs) -> Result<u8> {
    let mut options = CreateOptions { size: args.size, ..CreateOptions::default() };
    for (key, value) in &args.options {
        option(&mut options, key, value)?;
    }
    let mut backing_words = String::new();
    if let (Some(name), Some(format)) = (&args.backing, args.backing_format) {
        let size = backing_size(&args.image, name, format)?;
        options.size = options.size.or(Some(size));
        let format = store_format(format).name();
        options.backing =
            Some(NewBacking { name: name.as_os_str().as_bytes().to_vec(), format: format.to_owned() });
        backing_words =
            format!(" backing_file={} backing_fmt={format}", terminal_bytes(name.as_os_str().as_bytes()));
    }
    create(&args.image, &options)?;
    if !args.quiet {
        print(&format!(
            "Formatting '{}', fmt=qcow2 cluster_size={} extended_l2=off compression_type=zlib \
             size={}{backing_words} lazy_refcounts=off refcount_bits=16\n",
            terminal_bytes(args.image.as_os_str().as_bytes()),
            1u64 << options.cluster_bits,
            options.size.unwrap_or(0),
        ))?;
    }
    Ok(0)
}

fn option(options: &mut CreateOptions, key: &str, value: &str) -> Result<()> {
    let refuse = |why: String| {
        Error::new(ErrorKind::Usage, format!("option {}={}: {why}", terminal(key), terminal(value)))
    };
    if key == "cluster_size" {
        let size = parse_size(value)?;
        if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
            return Err(refuse("must be a power of two from 512 to 2M".to_owned()));
        }
        options.cluster_bits = size.trailing_zeros();
        return Ok(());
    }
    match FIXED.iter().find(|(known, _)| *known == key) {
        Some((_, values)) if values.contains(&value) => Ok(()),
        Some((_, values)) => Err(refuse(format!("chainfs writes {} only; use qemu-img create", values[0]))),
        None => Err(refuse("unknown; chainfs knows cluster_size".to_owned())),
    }
}

/// Size of the backing file's disk. The name is resolved relative to the new image, as readers will.
fn backing_size(image: &Path, name: &Path, format: ImageFormat) -> Result<u64> {
    let path: PathBuf = image.parent().unwrap_or(Path::new("")).join(name);
    let stated =
        (Pattern::escape(&path.file_name().unwrap_or_default().to_string_lossy()), store_format(format));
    let pattern = Pattern::new(&stated.0).expect("an escaped pattern is one");
    let options =
        StoreOptions { formats: vec![(pattern, stated.1)], notify: false, ..StoreOptions::default() };
    let store = Store::open(&path, options).map_err(|error| error.within("backing file"))?;
    let catalog = store.catalog();
    let Some(entry) = catalog.single.map(|leaf| &catalog.images[leaf]) else {
        let fact = format!("backing file {} is a directory", terminal_bytes(name.as_os_str().as_bytes()));
        return Err(Error::new(ErrorKind::Usage, fact));
    };
    if let Some(problem) = &entry.problem {
        return Err(Error::new(ErrorKind::Broken, format!("backing file {} {problem}", entry.shown())));
    }
    entry.virtual_size().ok_or_else(|| {
        Error::new(ErrorKind::Broken, format!("the size of backing file {} is unknown", entry.shown()))
    })
}
