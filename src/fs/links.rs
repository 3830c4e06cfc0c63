//! Symbolic links of guests, rewritten so that they stay inside their volume.
//!
//! The kernel follows a link from where it stands in the mount: one that is absolute, or that climbs above the volume's
//! root, would lead to the host's own files. Here each becomes a relative path to what it names in the guest, from the
//! directory that holds it. Promise: the text that is given never climbs above the volume's root, wherever other links in it lead.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileKind, Ino};
use crate::store::stale;

use super::mounted_volumes::{GuestNode, MountedVolume};

/// Links that are followed one after the other, at most: as Linux does.
const FOLLOWED: usize = 40;
/// For how long a link is followed: each name on its way may be one among millions.
const FOLLOW_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a path, at most.
const PATH_LEN: usize = 4095;

/// Where a walk through a volume has got to, as seen from the directory that it began in.
struct LinkWalk<'a> {
    slot: &'a MountedVolume,
    /// How deep the directory is that it began in.
    depth: usize,
    /// How far up it has gone from there.
    ups: usize,
    /// The directory that it has come to by going up; `None` if nobody has told what that is.
    base: Option<Ino>,
    /// How it went down from there.
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
        let base = || self.base.ok_or_else(|| stale("it is not known any more which directory holds a link"));
        self.down.last().map_or_else(base, |(_, ino)| Ok(*ino))
    }

    fn text(&self, rest: &[&[u8]]) -> Result<Vec<u8>> {
        let ups = std::iter::repeat_n(&b".."[..], self.ups);
        let parts: Vec<&[u8]> =
            ups.chain(self.down.iter().map(|(name, _)| &name[..])).chain(rest.iter().copied()).collect();
        let text = if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') };
        if text.len() > PATH_LEN {
            return Err(Error::new(ErrorKind::Limit, "a link's target would be longer than any path may be"));
        }
        Ok(text)
    }
}

/// The parts of a path that name something.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect()
}

/// The target of the link `node`, which the guest has as `target`, from the directory that holds it.
pub(super) fn inside(slot: &MountedVolume, node: GuestNode, target: &[u8]) -> Result<Vec<u8>> {
    // G3: no text that is given climbs above the volume's root.
    let is_absolute = target.starts_with(b"/");
    let all = parts(target);
    let ups = all.iter().take_while(|part| **part == b"..").count();
    if !is_absolute && ups <= usize::from(node.depth) && !all[ups..].contains(&&b".."[..]) {
        return Ok(target.to_vec());
    }
    if node.depth == GuestNode::DEEPEST {
        return Err(Error::new(ErrorKind::Limit, "a link that leads up stands too deep in its volume to be rewritten"));
    }
    let mut walk =
        LinkWalk { slot, depth: usize::from(node.depth), ups: 0, base: slot.parent(node.ino), down: Vec::new() };
    if walk.depth == 0 || is_absolute {
        walk.go_to_root();
    }
    for _ in &all[..ups] {
        walk.up();
    }
    let rest = &all[ups..];
    if rest.contains(&&b".."[..]) { follow(walk, rest) } else { walk.text(rest) }
}

/// Goes on as the guest's kernel would: what is above a directory that a link has led to is above that directory,
/// not above the link.
fn follow(mut walk: LinkWalk<'_>, path: &[&[u8]]) -> Result<Vec<u8>> {
    let mut rest: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
    let mut followed = 0;
    let (slot, begun) = (walk.slot, Instant::now());
    while let Some(part) = rest.pop() {
        if begun.elapsed() > FOLLOW_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "following a link took too long and was broken off"));
        }
        if part == b".." {
            walk.up();
            continue;
        }
        let is_last = rest.is_empty();
        match slot.inside.lookup(slot.volume, walk.here()?, &part)? {
            Some((ino, found)) if found.kind == FileKind::Symlink && !is_last => {
                followed += 1;
                if followed > FOLLOWED {
                    return Err(Error::new(ErrorKind::Corrupt, "a link that leads through too many others"));
                }
                let target = slot.inside.read_link(slot.volume, ino)?;
                if target.starts_with(b"/") {
                    walk.go_to_root();
                }
                rest.extend(parts(&target).into_iter().rev().map(<[u8]>::to_vec));
                if rest.len() > PATH_LEN {
                    return Err(Error::new(ErrorKind::Corrupt, "a link that leads through too long a path"));
                }
            }
            Some((ino, found)) if found.kind == FileKind::Directory || is_last => walk.down.push((part, ino)),
            // Nothing that could be gone through: the kernel comes as far, and no further.
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
