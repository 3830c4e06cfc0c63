//! The images of RAID volumes: which of them are present and in sync, by LVM's metadata and dm-raid's own
//! superblocks.

use std::cmp::Reverse;

use crate::guest::bytes::{le32, le64};
use crate::guest::raid::Members;
use crate::guest::volumes::Device;

use super::group::MirrorImage;
use super::resolve::Resolver;

/// The images of a volume, in order.
pub(super) struct Images {
    images: Vec<Image>,
    /// Why an image is absent, if one is.
    absent: Option<String>,
}

struct Image {
    device: Option<Device>,
    is_in_sync: bool,
    /// It is only read if there is no other.
    is_last_choice: bool,
}

impl Images {
    /// The image to read from a set with equal content: one in sync, if there is one.
    pub(super) fn best(self) -> Result<Device, String> {
        let in_sync = self.images.iter().enumerate().filter(|(_, image)| image.is_in_sync);
        let best = in_sync
            .filter_map(|(index, image)| Some((image, image.device.as_ref()?, index)))
            .max_by_key(|(image, _, index)| (!image.is_last_choice, Reverse(*index)));
        let has_some = self.images.iter().any(|image| image.device.is_some());
        match (best, self.absent) {
            (Some((_, device, _)), _) => Ok(device.clone()),
            (None, Some(problem)) if has_some => {
                Err(format!("the present images are out of sync, and another cannot be used: {problem}"))
            }
            (None, Some(problem)) => Err(problem),
            (None, None) if has_some => Err("all its images are out of sync".to_owned()),
            (None, None) => Err("it has no images".to_owned()),
        }
    }

    /// A device of the images in sync. Its error also says why an image is absent.
    pub(super) fn named(
        self,
        device: impl FnOnce(&Members) -> Result<Device, String>,
    ) -> Result<Device, String> {
        let members = self.images.into_iter().map(|image| image.device.filter(|_| image.is_in_sync));
        device(&members.collect::<Vec<_>>()).map_err(|problem| match self.absent {
            Some(absent) => format!("{problem}: {absent}"),
            None => problem,
        })
    }
}

impl Resolver<'_> {
    /// The images of the volume `name`, of which `count` extents each are used.
    pub(super) fn images(
        &mut self,
        name: &str,
        images: &[MirrorImage],
        count: u64,
        depth: u32,
    ) -> Result<Images, String> {
        let len = self.bytes(count)?;
        let mut absent = None;
        let mut found = Vec::new();
        for image in images {
            // A RAID volume whose shape has been changed has room before or behind the data of its images.
            let state = self.state(image, depth);
            let offset = state.map_or(0, |state| state.data_offset);
            let device = if offset == 0 {
                self.area(&image.data, count, depth)
            } else {
                let image = self.logical(&image.data.name, depth + 1);
                image.map(|image| image.range(offset, len, self.disks))
            };
            match device {
                Ok(device) if device.size() == len => found.push((Some(device), state)),
                Ok(_) => found.push((None, state)),
                Err(problem) => {
                    absent = absent.or(Some(problem));
                    found.push((None, state));
                }
            }
        }
        let newest = found.iter().filter_map(|(_, state)| *state).max_by_key(|state| state.events);
        if newest.is_some_and(|newest| newest.is_reshaping) {
            return Err("its shape is being changed, which is not supported while it lasts".to_owned());
        }
        let judged = images.iter().zip(found).enumerate().map(|(number, (image, (device, state)))| {
            let logical = self.group.logical.get(&image.data.name);
            let is_rebuilding = logical.is_some_and(|logical| logical.is_rebuilding);
            let is_in_sync = match (state, newest) {
                (Some(state), Some(newest)) => {
                    let has_failed = number < 64 && newest.failed & (1 << number) != 0;
                    // The images' states are written one after the other.
                    state.is_whole && !has_failed && state.events + 1 >= newest.events
                }
                (None, Some(_)) => false,
                (_, None) => true,
            };
            let is_last_choice = logical.is_some_and(|logical| logical.is_write_mostly);
            Image { device, is_in_sync: is_in_sync && !is_rebuilding, is_last_choice }
        });
        let images: Vec<Image> = judged.collect();
        let used = images.iter().filter(|image| image.is_in_sync && image.device.is_some()).count();
        if used < images.len() && images.iter().any(|image| image.device.is_some()) {
            let all = images.len();
            self.remarks.push(format!("{name} is degraded: {used} of {all} images are used"));
        }
        Ok(Images { images, absent })
    }

    /// The kernel's state of an image; `None` if the image was never used.
    fn state(&mut self, image: &MirrorImage, depth: u32) -> Option<RaidSuperblock> {
        let device = self.logical(image.state.as_deref()?, depth + 1).ok()?;
        let mut block = vec![0; 512];
        device.source().read_at(0, &mut block).ok()?;
        RaidSuperblock::parse(&block)
    }
}

/// dm-raid's superblock at the beginning of each image's state.
#[derive(Clone, Copy)]
struct RaidSuperblock {
    /// The sequence number; it grows with every change of the set.
    events: u64,
    /// A bit for each failed image.
    failed: u64,
    /// The image is fully synchronised.
    is_whole: bool,
    /// The set's shape is being changed.
    is_reshaping: bool,
    /// Where the image's data begin, in bytes.
    data_offset: u64,
}

impl RaidSuperblock {
    fn parse(block: &[u8]) -> Option<Self> {
        const MAGIC: u32 = 0x6452_6d44;
        /// The fields behind the 60th byte are used (`compat_features`).
        const HAS_RESHAPES: u32 = 1;
        let has_reshapes = le32(block, 4) & HAS_RESHAPES != 0;
        (le32(block, 0) == MAGIC).then(|| Self {
            events: le64(block, 16).min(u64::MAX - 1),
            failed: le64(block, 24),
            is_whole: le64(block, 32) == u64::MAX,
            is_reshaping: has_reshapes && le32(block, 60) & 1 != 0,
            data_offset: if has_reshapes { le64(block, 96).saturating_mul(512) } else { 0 },
        })
    }
}
