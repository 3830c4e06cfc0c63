//! What programs of the host note on the disks of a mount: an owner, and extended attributes `trusted.*`.
//!
//! A program that starts virtual machines, such as libvirt, gives the disk to the user of the virtual machine
//! (chown(2)) and remembers the former owner in attributes. Both are kept in memory for the life of the
//! mount, and never reach an image: other programs and chains use that, too. Only root can set them. An owner
//! may use the disk as if all its layers were his; a group gains nothing (A4).

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::error::{Error, ErrorKind, Result};

use super::node::{Node, PartitionNode};

/// Prefix of the names of attributes that only root can see.
const TRUSTED_PREFIX: &[u8] = b"trusted.";
/// Maximum number of attributes of one disk, and maximum length of a value in bytes.
const MAX_ATTRIBUTES: usize = 32;
const MAX_VALUE: usize = 4096;
/// The number of labelled disks from which on those that are gone are removed.
const MANY_DISKS: usize = 1024;

/// An owner that a disk was given to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GivenOwner {
    /// The user; `None`: the image's.
    pub(super) uid: Option<u32>,
    /// The group; `None`: the image's.
    pub(super) gid: Option<u32>,
}

impl GivenOwner {
    /// Owner, group and permissions of a disk that has these without the label. The user has the rights of an
    /// owner. A group that is not the image's has the rights of others.
    pub(super) fn apply(self, (uid, gid, bits): (u32, u32, u16), is_writable: bool) -> (u32, u32, u16) {
        let mut bits = bits;
        if self.uid.is_some_and(|given| given != uid) {
            bits |= if is_writable { 0o600 } else { 0o400 };
        }
        if self.gid.is_some_and(|given| given != gid) {
            bits = bits & !0o070 | (bits & 0o007) << 3;
        }
        (self.uid.unwrap_or(uid), self.gid.unwrap_or(gid), bits)
    }
}

/// How an attribute is set, as by the flags of setxattr(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetMode {
    /// Whether or not there is one of that name.
    Any,
    /// There is none.
    Create,
    /// There is one.
    Replace,
}

#[derive(Debug, Default)]
struct Label {
    owner: GivenOwner,
    attributes: BTreeMap<OsString, Vec<u8>>,
}

impl Label {
    fn is_empty(&self) -> bool {
        self.owner == GivenOwner::default() && self.attributes.is_empty()
    }
}

/// The labels of all disks and partitions of a mount.
#[derive(Debug, Default)]
pub(super) struct DiskLabels {
    /// By chain, so that a directory is judged by the disks of its own chain alone. A leaf.
    labels: RwLock<HashMap<Arc<PathBuf>, HashMap<Node, Label>>>,
}

impl DiskLabels {
    /// Whether a node can have a label.
    pub(super) fn is_labelled_kind(node: &Node) -> bool {
        matches!(node, Node::View(_) | Node::Partition(_))
    }

    /// Whether attributes of this name are kept.
    pub(super) fn is_kept(name: &OsStr) -> bool {
        name.as_bytes().starts_with(TRUSTED_PREFIX)
    }

    /// Gives a disk to a user, a group or both. Root and its group stand for the image's own: root needs no
    /// label, and libvirt gives a disk whose former owner it does not know to root. `exists`: whether a
    /// labelled node is still there.
    pub(super) fn give(&self, node: &Node, to: GivenOwner, exists: impl Fn(&Node) -> bool) {
        self.change(node, exists, |label| {
            let own = |given: Option<u32>, before| match given {
                None => before,
                Some(0) => None,
                given => given,
            };
            label.owner = GivenOwner { uid: own(to.uid, label.owner.uid), gid: own(to.gid, label.owner.gid) };
            Ok(())
        })
        .expect("giving a disk cannot fail");
    }

    /// The owner that a disk was given to.
    pub(super) fn owner(&self, node: &Node) -> Option<GivenOwner> {
        let labels = self.labels.read();
        let label = labels.get(chain_of(node)?).and_then(|disks| disks.get(node))?;
        (label.owner != GivenOwner::default()).then_some(label.owner)
    }

    /// Whether a disk was given to a user.
    pub(super) fn is_given_to(&self, node: &Node, uid: u32) -> bool {
        self.owner(node).is_some_and(|owner| owner.uid == Some(uid))
    }

    /// Whether a disk in a directory was given to a user; `None`: to any.
    pub(super) fn leads_to_given(&self, directory: &Node, uid: Option<u32>) -> bool {
        let leads = |node: &Node| match (directory, node) {
            (Node::Chain(_), _) | (Node::Partitions(_), Node::Partition(_)) => true,
            (Node::Snapshots(_), Node::View(view)) => !view.is_active(),
            (Node::PartitionsOf(view), Node::Partition(partition)) => partition.view == *view,
            _ => false,
        };
        let labels = self.labels.read();
        let disks = chain_of(directory).and_then(|chain| labels.get(chain));
        disks.into_iter().flatten().any(|(node, label)| {
            label.owner.uid.is_some_and(|given| uid.is_none_or(|uid| uid == given)) && leads(node)
        })
    }

    /// The value of an attribute.
    pub(super) fn attribute(&self, node: &Node, name: &OsStr) -> Option<Vec<u8>> {
        let labels = self.labels.read();
        labels.get(chain_of(node)?)?.get(node)?.attributes.get(name).cloned()
    }

    /// Sets an attribute. `NoSpace` beyond the limits, `Exists` if one must not be there. `exists`: as in
    /// [`DiskLabels::give`]. Returns whether it was set; not if one must be there and is not.
    pub(super) fn set_attribute(
        &self,
        node: &Node,
        (name, value): (&OsStr, &[u8]),
        mode: SetMode,
        exists: impl Fn(&Node) -> bool,
    ) -> Result<bool> {
        self.change(node, exists, |label| {
            let is_there = label.attributes.contains_key(name);
            if mode == SetMode::Replace && !is_there {
                return Ok(false);
            }
            if mode == SetMode::Create && is_there {
                return Err(Error::new(ErrorKind::Exists, "the attribute exists"));
            }
            if value.len() > MAX_VALUE || label.attributes.len() >= MAX_ATTRIBUTES && !is_there {
                let fact = format!(
                    "a disk of the mount keeps at most {MAX_ATTRIBUTES} attributes of {MAX_VALUE} bytes each"
                );
                return Err(Error::new(ErrorKind::NoSpace, fact));
            }
            label.attributes.insert(name.to_owned(), value.to_vec());
            Ok(true)
        })
    }

    /// Removes an attribute; whether it was there.
    pub(super) fn remove_attribute(&self, node: &Node, name: &OsStr) -> bool {
        let removed = self.change(node, |_| true, |label| Ok(label.attributes.remove(name).is_some()));
        removed.expect("removing cannot fail")
    }

    fn change<T>(
        &self,
        node: &Node,
        exists: impl Fn(&Node) -> bool,
        change: impl FnOnce(&mut Label) -> Result<T>,
    ) -> Result<T> {
        let chain = chain_of(node).expect("a disk's node");
        let is_new = !self.labels.read().get(chain).is_some_and(|disks| disks.contains_key(node));
        if is_new && self.labels.read().values().map(HashMap::len).sum::<usize>() >= MANY_DISKS {
            // The catalog is asked without the lock.
            let nodes: Vec<Node> = self.labels.read().values().flat_map(HashMap::keys).cloned().collect();
            let gone: Vec<Node> = nodes.into_iter().filter(|node| !exists(node)).collect();
            self.labels.write().retain(|_, disks| {
                disks.retain(|node, _| !gone.contains(node));
                !disks.is_empty()
            });
        }
        let mut labels = self.labels.write();
        let disks = labels.entry(Arc::clone(chain)).or_default();
        let label = disks.entry(node.clone()).or_default();
        let changed = change(label);
        if label.is_empty() {
            disks.remove(node);
        }
        if disks.is_empty() {
            labels.remove(chain);
        }
        changed
    }
}

/// The chain of a disk, or of a directory on the way to one.
fn chain_of(node: &Node) -> Option<&Arc<PathBuf>> {
    match node {
        Node::View(view) | Node::Partition(PartitionNode { view, .. }) | Node::PartitionsOf(view) => {
            Some(&view.chain)
        }
        Node::Chain(chain) | Node::Snapshots(chain) | Node::Partitions(chain) => Some(chain),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::store::{ViewId, ViewIdentity};

    use super::*;

    fn disk(chain: &str, number: u64) -> Node {
        let chain = Arc::new(PathBuf::from(chain));
        Node::View(ViewId { chain, name: Arc::from(&b"active"[..]), part: ViewIdentity::Active(number) })
    }

    fn give(labels: &DiskLabels, node: &Node, uid: Option<u32>, gid: Option<u32>) {
        labels.give(node, GivenOwner { uid, gid }, |_| true);
    }

    #[test]
    fn a_given_disk_is_its_users_and_a_group_gains_nothing() {
        let given = GivenOwner { uid: Some(107), gid: Some(108) };
        assert_eq!(given.apply((0, 0, 0o600), true), (107, 108, 0o600));
        assert_eq!(given.apply((0, 0, 0o660), true), (107, 108, 0o600));
        assert_eq!(given.apply((0, 0, 0o664), true), (107, 108, 0o644));
        assert_eq!(given.apply((0, 0, 0o040), false), (107, 108, 0o400));
        assert_eq!(given.apply((107, 108, 0o240), true), (107, 108, 0o240), "what it is, it stays");
        let group = GivenOwner { uid: None, gid: Some(108) };
        assert_eq!(group.apply((5, 6, 0o640), true), (5, 108, 0o600));
    }

    #[test]
    fn giving_to_root_takes_the_label_away() {
        let (labels, node) = (DiskLabels::default(), disk("web", 1));
        give(&labels, &node, Some(107), Some(108));
        assert!(labels.is_given_to(&node, 107) && !labels.is_given_to(&node, 108));
        give(&labels, &node, None, Some(0));
        assert_eq!(labels.owner(&node), Some(GivenOwner { uid: Some(107), gid: None }));
        give(&labels, &node, Some(0), Some(0));
        assert!(labels.owner(&node).is_none() && labels.labels.read().is_empty());
    }

    #[test]
    fn only_directories_on_the_way_lead_to_a_given_disk() {
        let labels = DiskLabels::default();
        give(&labels, &disk("web", 1), Some(107), None);
        let path = |chain: &str| Arc::new(PathBuf::from(chain));
        assert!(labels.leads_to_given(&Node::Chain(path("web")), Some(107)));
        assert!(labels.leads_to_given(&Node::Chain(path("web")), None));
        assert!(!labels.leads_to_given(&Node::Chain(path("web")), Some(5)));
        assert!(!labels.leads_to_given(&Node::Chain(path("db")), None));
        assert!(!labels.leads_to_given(&Node::Snapshots(path("web")), None));
        assert!(!labels.leads_to_given(&Node::Info(path("web")), None));
    }

    #[test]
    fn attributes_are_set_as_by_setxattr_within_limits() {
        let (labels, node) = (DiskLabels::default(), disk("web", 1));
        let set = |name: &str, value: &[u8], mode| {
            labels.set_attribute(&node, (OsStr::new(name), value), mode, |_| true).map_err(|e| e.kind())
        };
        assert_eq!(set("trusted.a", b"1", SetMode::Replace), Ok(false));
        assert_eq!(set("trusted.a", b"1", SetMode::Create), Ok(true));
        assert_eq!(set("trusted.a", b"2", SetMode::Create), Err(ErrorKind::Exists));
        assert_eq!(set("trusted.a", b"3", SetMode::Replace), Ok(true));
        assert_eq!(labels.attribute(&node, OsStr::new("trusted.a")).unwrap(), b"3");
        assert_eq!(set("trusted.b", &[0; MAX_VALUE + 1], SetMode::Any), Err(ErrorKind::NoSpace));
        for index in 1..MAX_ATTRIBUTES {
            assert_eq!(set(&format!("trusted.{index}"), b"", SetMode::Any), Ok(true));
        }
        assert_eq!(set("trusted.more", b"", SetMode::Any), Err(ErrorKind::NoSpace));
        assert_eq!(set("trusted.a", b"4", SetMode::Any), Ok(true));
        assert!(labels.remove_attribute(&node, OsStr::new("trusted.a")));
        assert!(!labels.remove_attribute(&node, OsStr::new("trusted.a")));
    }

    #[test]
    fn labels_of_disks_that_are_gone_are_dropped() {
        let labels = DiskLabels::default();
        for number in 0..MANY_DISKS as u64 {
            give(&labels, &disk("web", number), Some(107), None);
        }
        let alive = disk("web", 7);
        labels.give(&disk("db", 1), GivenOwner { uid: Some(107), gid: None }, |node| *node == alive);
        assert_eq!(labels.labels.read().len(), 2);
        assert!(labels.is_given_to(&alive, 107) && labels.is_given_to(&disk("db", 1), 107));
    }
}
