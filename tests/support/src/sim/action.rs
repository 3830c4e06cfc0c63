//! A change of one file, whole or torn.

use std::sync::Arc;

use super::{Pages, Random, SECTOR};

/// A change of one file.
#[derive(Clone, Debug)]
pub enum Action {
    Write { at: u64, bytes: Arc<[u8]> },
    SetLen(u64),
    Punch { at: u64, len: u64 },
    Zero { at: u64, len: u64 },
    Allocate { at: u64, len: u64 },
}

impl Action {
    pub fn apply(&self, pages: &mut Pages) {
        match self {
            Self::Write { at, bytes } => pages.write(*at, bytes),
            Self::SetLen(len) => pages.set_len(*len),
            Self::Punch { at, len } => pages.punch(*at, *len),
            Self::Zero { at, len } => {
                pages.punch(*at, *len);
                pages.set_len(pages.len().max(at + len));
            }
            Self::Allocate { at, len } => pages.set_len(pages.len().max(at + len)),
        }
    }

    /// In a few words.
    pub fn describe(&self) -> String {
        match self {
            Self::Write { at, bytes } => format!("write {at:#x}+{:#x}", bytes.len()),
            Self::SetLen(len) => format!("set_len {len:#x}"),
            Self::Punch { at, len } => format!("punch {at:#x}+{len:#x}"),
            Self::Zero { at, len } => format!("zero {at:#x}+{len:#x}"),
            Self::Allocate { at, len } => format!("allocate {at:#x}+{len:#x}"),
        }
    }

    /// Whether a crash can leave it done in part.
    pub fn is_tearable(&self) -> bool {
        match self {
            Self::Write { at, bytes } => at / SECTOR != (at + bytes.len() as u64 - 1) / SECTOR,
            Self::Punch { len, .. } | Self::Zero { len, .. } => *len > SECTOR,
            Self::SetLen(_) | Self::Allocate { .. } => false,
        }
    }

    /// The possible remains of a torn change: its first part, its last, or some of its sectors. Sometimes of
    /// a write that extended the file nothing but the length.
    pub fn torn(&self, random: &mut Random) -> Vec<Self> {
        let (at, len) = match self {
            Self::Write { at, bytes } => (*at, bytes.len() as u64),
            Self::Punch { at, len } | Self::Zero { at, len } => (*at, *len),
            Self::SetLen(_) | Self::Allocate { .. } => return vec![self.clone()],
        };
        let end = at + len;
        let first_cut = (at / SECTOR + 1) * SECTOR;
        let cuts = end.saturating_sub(first_cut).div_ceil(SECTOR);
        if cuts == 0 {
            return vec![self.clone()];
        }
        let mut a_cut = || first_cut + random.next() % cuts * SECTOR;
        let piece = |from: u64, to: u64| match self {
            Self::Write { bytes, .. } => {
                Self::Write { at: from, bytes: bytes[(from - at) as usize..(to - at) as usize].into() }
            }
            Self::Punch { .. } => Self::Punch { at: from, len: to - from },
            _ => Self::Zero { at: from, len: to - from },
        };
        let mut bounds = vec![at, a_cut(), a_cut(), a_cut(), a_cut(), end];
        bounds.sort_unstable();
        bounds.dedup();
        let some = |keep: u64| {
            let runs = bounds.windows(2).enumerate().filter(|(index, _)| keep >> index & 1 == 1);
            runs.map(|(_, run)| piece(run[0], run[1])).collect()
        };
        match random.below(8) {
            0 | 1 => vec![piece(at, bounds[1])],
            2 | 3 => vec![piece(bounds[1], end)],
            // The length alone, as where a file system extends the file before the data: nothing to read but
            // zeroes.
            4 if !matches!(self, Self::Punch { .. }) => vec![Self::Allocate { at, len }],
            _ => some(random.next()),
        }
    }
}
