//! Rewrites symbolic links of guests so that they stay inside their volume.
//!
//! The kernel resolves a link relative to its place in the mount: an absolute link, or one with too many
//! `..`, would lead to the host's files. This module converts each to a relative path from the link's
//! directory to its target in the guest. Promise: the resulting text never leads above the volume's root,
//! even through other links.

use std::time::{Duration, Instant};

use crate::browse::FoundEntry;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileKind, Ino};
use crate::store::stale;

use super::guest_numbers::GuestNode;
use super::mounted_volumes::MountedVolume;

/// Maximum number of links to follow, as in Linux.
const MAX_FOLLOWED: usize = 40;
/// Time limit for following a link: each directory on the path may have millions of entries.
const FOLLOW_LIMIT: Duration = Duration::from_secs(5);
/// Maximum length of a path in bytes.
const PATH_LEN: usize = 4095;

/// The position of a walk through a volume, relative to the directory where it started.
struct LinkWalk<'a> {
    slot: &'a MountedVolume,
    /// Depth of the start directory.
    depth: usize,
    /// Levels above the start directory.
    ups: usize,
    /// The directory reached by going up; `None` if unknown.
    base: Option<Ino>,
    /// The path down from there.
    down: Vec<(Vec<u8>, Ino)>,
}

impl LinkWalk<'_> {
    fn go_to_root(&mut self) {
        (self.ups, self.base) = (self.depth, Some(self.slot.mounted.root));
        self.down.clear();
    }

    fn up(&mut self) {
        if self.down.pop().is_some() || self.ups == self.depth {
            return;
        }
        self.ups += 1;
        self.base = self.base.and_then(|base| self.slot.parent(base));
        if self.ups == self.depth {
            self.base = Some(self.slot.mounted.root);
        }
    }

    fn here(&self) -> Result<Ino> {
        let base = || self.base.ok_or_else(|| stale("the parent directory of the link is no longer known"));
        self.down.last().map_or_else(base, |(_, ino)| Ok(*ino))
    }

    fn text(&self, rest: &[&[u8]]) -> Result<Vec<u8>> {
        let ups = std::iter::repeat_n(&b".."[..], self.ups);
        let parts: Vec<&[u8]> =
            ups.chain(self.down.iter().map(|(name, _)| &name[..])).chain(rest.iter().copied()).collect();
        let text = if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') };
        if text.len() > PATH_LEN {
            return Err(Error::new(ErrorKind::Limit, "the rewritten target of the link is too long"));
        }
        Ok(text)
    }
}

/// The components of a path without empty ones and dots.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect()
}

/// The target of the link `node` relative to its directory; `target` is the guest's text.
pub(super) fn confined(slot: &MountedVolume, node: GuestNode, target: &[u8]) -> Result<Vec<u8>> {
    // G3: the resulting text never leads above the volume's root.
    let is_absolute = target.starts_with(b"/");
    let all = parts(target);
    let ups = all.iter().take_while(|part| **part == b"..").count();
    if !is_absolute && ups <= usize::from(node.depth) && !all[ups..].contains(&&b".."[..]) {
        return Ok(target.to_vec());
    }
    if node.depth == GuestNode::DEEPEST {
        return Err(Error::new(
            ErrorKind::Limit,
            "the link leads up and is too deep in its volume to be rewritten",
        ));
    }
    let mut walk = LinkWalk {
        slot,
        depth: usize::from(node.depth),
        ups: 0,
        base: slot.parent(node.ino),
        down: Vec::new(),
    };
    if walk.depth == 0 || is_absolute {
        walk.go_to_root();
    }
    for _ in &all[..ups] {
        walk.up();
    }
    let rest = &all[ups..];
    if rest.contains(&&b".."[..]) { follow(walk, rest) } else { walk.text(rest) }
}

/// Resolves the rest as the guest's kernel would: `..` after a link means the parent of the link's target,
/// not of the link.
fn follow(mut walk: LinkWalk<'_>, path: &[&[u8]]) -> Result<Vec<u8>> {
    let mut rest: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
    let mut followed = 0;
    let (slot, begun) = (walk.slot, Instant::now());
    while let Some(part) = rest.pop() {
        if begun.elapsed() > FOLLOW_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "following the link took too long"));
        }
        if part == b".." {
            walk.up();
            continue;
        }
        let is_last = rest.is_empty();
        match slot.inside.lookup(slot.tree, walk.here()?, &part)? {
            Some(FoundEntry { ino, attributes, .. }) if attributes.kind == FileKind::Symlink && !is_last => {
                followed += 1;
                if followed > MAX_FOLLOWED {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        "the link leads through too many other links",
                    ));
                }
                let target = slot.inside.read_link(slot.tree, ino)?;
                if target.starts_with(b"/") {
                    walk.go_to_root();
                }
                rest.extend(parts(&target).into_iter().rev().map(<[u8]>::to_vec));
                if rest.len() > PATH_LEN {
                    return Err(Error::new(ErrorKind::Corrupt, "the link leads through too long a path"));
                }
            }
            Some(FoundEntry { ino, attributes, .. }) if attributes.kind == FileKind::Directory || is_last => {
                walk.down.push((part, ino));
            }
            // Not a directory: the kernel's resolution ends here, too.
            _ => {
                rest.push(part);
                let beyond: Vec<&[u8]> =
                    rest.iter().rev().map(Vec::as_slice).take_while(|part| *part != b"..").collect();
                return walk.text(&beyond);
            }
        }
    }
    walk.text(&[])
}
