//! Kinds of damage to a file of a store that its owner could repair: each can be undone, and then the layers
//! below the file must be unchanged.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use support::Rng;

/// One file's damage.
#[derive(Clone, Debug)]
pub(crate) enum Damage {
    /// These bytes were there.
    Bytes {
        at: u64,
        saved: Vec<u8>,
        #[allow(dead_code, reason = "messages show it")]
        what: &'static str,
    },
    /// It has another name.
    Renamed { to: String },
}

impl Damage {
    /// Damages the qcow2 file `name`. `is_leaf`: no header names it.
    pub(crate) fn cause(root: &Path, name: &str, is_leaf: bool, rng: &mut Rng) -> Self {
        let stem = name.split('.').next().unwrap_or(name);
        let (at, bytes, what): (u64, Vec<u8>, _) = match rng.below(if is_leaf { 13 } else { 9 }) {
            0 => (7, vec![4], "a version of the future"),
            1 => (20, vec![0, 0, 0, 99], "cluster bits"),
            2 => (40, vec![0, 0, 0, 0, 0, 0, 0, 3], "an L1 table that is not aligned"),
            3 => (48, vec![0, 0, 0, 0, 0, 0, 0, 3], "a refcount table that is not aligned"),
            4 => (60, vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3], "a snapshot table that is not aligned"),
            5 => (72, vec![0x40], "a feature of the future"),
            6 => (0, vec![0; 4], "no magic"),
            7 => (24, vec![0xff; 8], "a disk of exabytes"),
            8 if rng.below(4) > 0 => (36, vec![0xff; 4], "an endless L1 table"),
            8 => (0, vec![0; 512], "no header"),
            // A command on a raw file of that stem would take the name that is free then.
            _ if root.join(format!("{stem}.raw")).exists() => (0, vec![0; 4], "no magic"),
            kind => {
                let to = match kind {
                    9 => format!("{stem}-was.img"),
                    10 => format!("{stem}-was.raw"),
                    11 => format!(".chainfs-{stem}.qcow2"),
                    _ => format!("{stem}-was"),
                };
                fs::rename(root.join(name), root.join(&to)).expect("another name");
                return Self::Renamed { to };
            }
        };
        let file = File::options().read(true).write(true).open(root.join(name)).expect("an image");
        let mut saved = vec![0; bytes.len()];
        file.read_exact_at(&mut saved, at).expect("its header");
        file.write_all_at(&bytes, at).expect("a damaged header");
        Self::Bytes { at, saved, what }
    }

    /// The name that the file has instead of its own.
    pub(crate) fn present_name(&self) -> Option<&str> {
        match self {
            Self::Bytes { .. } => None,
            Self::Renamed { to } => Some(to),
        }
    }

    /// Undoes it in the bytes read from the file.
    pub(crate) fn undo_in(&self, bytes: &mut [u8]) {
        if let Self::Bytes { at, saved, .. } = self
            && let Some(part) = bytes.get_mut(*at as usize..*at as usize + saved.len())
        {
            part.copy_from_slice(saved);
        }
    }

    /// Undoes it.
    pub(crate) fn undo(&self, root: &Path, name: &str) {
        match self {
            Self::Bytes { at, saved, .. } => {
                let file = File::options().write(true).open(root.join(name)).expect("the damaged image");
                file.write_all_at(saved, *at).expect("its header");
            }
            Self::Renamed { to } => fs::rename(root.join(to), root.join(name)).expect("its own name"),
        }
    }
}
