//! The roots that boot loaders name: the entries of systemd-boot and of GRUB (`root=` and `rootflags=`).

use crate::guest::{FileSystem, TreeId};

use super::OpenedVolume;
use super::device::{Crypttab, find_device};
use super::fstab;
use super::path::{list_names, read_text};
use super::system::FILE_LIMIT;

/// Entries that are read of one directory.
const ENTRY_LIMIT: usize = 32;
/// Where the entries of the Boot Loader Specification are, from the root of a system or of its boot volume.
const ENTRIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];
/// Where GRUB's configuration is.
const GRUB: [&str; 4] = ["/grub/grub.cfg", "/grub2/grub.cfg", "/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"];

/// The trees that the boot loader's entries in a tree name as the root.
pub(super) fn roots(files: &dyn FileSystem, all: &[OpenedVolume<'_>]) -> Vec<TreeId> {
    let mut found: Vec<TreeId> = Vec::new();
    let mut add = |command_line: &str| {
        let root = root(files, command_line, all).filter(|root| !found.contains(root));
        found.extend(root);
    };
    for directory in ENTRIES {
        for name in list_names(files, directory, ENTRY_LIMIT) {
            let path = format!("{directory}/{}", String::from_utf8_lossy(&name));
            let text = read_text(files, &path, FILE_LIMIT).unwrap_or_default();
            text.lines().filter_map(|line| line.trim().strip_prefix("options")).for_each(&mut add);
        }
    }
    for path in GRUB {
        let text = read_text(files, path, FILE_LIMIT).unwrap_or_default();
        let is_kernel = |line: &&str| {
            let word = line.split_whitespace().next();
            matches!(word, Some("linux" | "linux16" | "linuxefi"))
        };
        // The first entry is the default. Later ones may be snapshots, and other systems.
        text.lines().find(is_kernel).into_iter().for_each(&mut add);
    }
    found
}

/// The root of a kernel's command line.
fn root(files: &dyn FileSystem, command_line: &str, all: &[OpenedVolume<'_>]) -> Option<TreeId> {
    let words = || command_line.split_whitespace();
    let device = words().find_map(|word| word.strip_prefix("root="))?;
    let flags = words().find_map(|word| word.strip_prefix("rootflags=")).unwrap_or_default();
    let volume = find_device(device, &Crypttab::read(files), all)?;
    Some(TreeId { volume, subvolume: fstab::tree(&all[volume], flags)? })
}
