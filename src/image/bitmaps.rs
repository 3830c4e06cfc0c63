//! Reading the directory of persistent bitmaps from any storage.

use crate::error::{Error, Result};
use crate::format::Header;
use crate::format::bitmap::{Bitmap, parse_directory};
use crate::io::Storage;
use crate::units::HostOffset;

/// The bitmaps of the image in `storage`, if they are in force, and the location of their directory.
pub(crate) fn read_bitmaps<S: Storage + ?Sized>(
    name: &str,
    storage: &S,
    header: &Header,
) -> Result<Option<(HostOffset, Vec<Bitmap>)>> {
    let Some(extension) = header.bitmaps.filter(|_| header.bitmaps_consistent()) else { return Ok(None) };
    let have = storage.len()?.saturating_sub(extension.directory.0).min(extension.directory_len);
    let mut directory = vec![0; have as usize];
    storage.read_at(extension.directory.0, &mut directory)?;
    let bitmaps = parse_directory(&directory, extension.count, header.cluster)
        .map_err(|reason| Error::new(reason.kind(), format!("{name}: {reason}")))?;
    Ok(Some((extension.directory, bitmaps)))
}
