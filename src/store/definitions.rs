//! libvirt's definitions of domains and of their snapshots, as far as they name disks.
//!
//! Pure: the text of a file in, a [`Definition`] out. Three kinds of files are known: a domain's definition,
//! the state of a running one (`domstatus`), and the metadata of a snapshot (`domainsnapshot`). Source:
//! <https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms> and
//! <https://libvirt.org/formatsnapshot.html>.

use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

/// What a file defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Definition {
    /// A domain, and the files of its disks.
    Domain { name: String, disks: Vec<PathBuf> },
    /// A snapshot of a domain.
    Snapshot {
        domain: String,
        name: String,
        /// The files that hold its state: those of the disks when it was taken.
        states: Vec<PathBuf>,
        /// The files that the domain went on in.
        overlays: Vec<PathBuf>,
    },
}

impl Definition {
    /// `None` if the text is no such definition.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let document = Document::parse(text).ok()?;
        let root = document.root_element();
        match root.tag_name().name() {
            "domain" => domain(root),
            "domstatus" => domain(child(root, "domain")?),
            "domainsnapshot" => snapshot(root),
            _ => None,
        }
    }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text(node: Node<'_, '_>, name: &str) -> Option<String> {
    Some(child(node, name)?.text()?.to_owned()).filter(|text| !text.is_empty())
}

/// The file of a disk element; not that of its backing chain or of a running copy.
fn file(disk: Node<'_, '_>) -> Option<PathBuf> {
    let file = Path::new(child(disk, "source")?.attribute("file")?);
    file.is_absolute().then(|| file.to_owned())
}

fn disks<'a, 'input>(domain: Node<'a, 'input>) -> impl Iterator<Item = Node<'a, 'input>> {
    let devices = child(domain, "devices").into_iter();
    devices.flat_map(|devices| devices.children().filter(|child| child.has_tag_name("disk")))
}

fn domain(domain: Node<'_, '_>) -> Option<Definition> {
    Some(Definition::Domain { name: text(domain, "name")?, disks: disks(domain).filter_map(file).collect() })
}

fn snapshot(root: Node<'_, '_>) -> Option<Definition> {
    let then = child(root, "domain")?;
    let mut states = Vec::new();
    let mut overlays = Vec::new();
    let listed = child(root, "disks").into_iter().flat_map(|disks| disks.children());
    for disk in listed.filter(|disk| disk.attribute("snapshot") == Some("external")) {
        overlays.extend(file(disk));
        let target = disk.attribute("name");
        let is_it = |of: &Node<'_, '_>| child(*of, "target").and_then(|to| to.attribute("dev")) == target;
        states.extend(disks(then).find(is_it).and_then(file));
    }
    Some(Definition::Snapshot { domain: text(then, "name")?, name: text(root, "name")?, states, overlays })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm' id='3'><name>web &amp; db</name><devices>\
        <disk type='file' device='disk'><source file='/images/vm.snap2' index='2'/>\
        <backingStore type='file'><format type='qcow2'/><source file='/images/vm.snap1'/></backingStore>\
        <mirror type='file' file='/images/copy.qcow2'><source file='/images/copy.qcow2'/></mirror>\
        <target dev='vda'/></disk>\
        <disk type='network' device='disk'><source protocol='rbd' name='x'/></disk>\
        <disk type='file' device='cdrom'><target dev='sda'/></disk>\
        <disk type='file'><source file='relative'/></disk></devices></domain>";

    #[test]
    fn a_domain_has_the_files_of_its_disks() {
        let name = "web & db".to_owned();
        let wanted = Some(Definition::Domain { name, disks: vec!["/images/vm.snap2".into()] });
        assert_eq!(Definition::parse(DOMAIN), wanted);
        let status = format!("<!-- a comment --><domstatus state='running'>{DOMAIN}</domstatus>");
        assert_eq!(Definition::parse(&status), wanted);
    }

    #[test]
    fn a_snapshot_has_the_files_of_external_disks() {
        let text = "<domainsnapshot><name>snap1</name><disks>\
            <disk name='vda' snapshot='external' type='file'><source file='/images/vm.snap1'/></disk>\
            <disk name='vdb' snapshot='internal'/></disks>\
            <domain><name>vm</name><devices>\
            <disk type='file'><source file='/images/data.qcow2'/><target dev='vdb'/></disk>\
            <disk type='file'><source file='/images/vm.qcow2'/><target dev='vda'/></disk>\
            </devices></domain><inactiveDomain><name>vm</name></inactiveDomain></domainsnapshot>";
        let (states, overlays) = (vec!["/images/vm.qcow2".into()], vec!["/images/vm.snap1".into()]);
        let (domain, name) = ("vm".to_owned(), "snap1".to_owned());
        assert_eq!(Definition::parse(text), Some(Definition::Snapshot { domain, name, states, overlays }));
    }

    #[test]
    fn other_texts_define_nothing() {
        let billion = "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><domain><name>&a;</name></domain>";
        for text in ["", "<", "<network><name>n</name></network>", "<domain/>", "<domainsnapshot/>", billion]
        {
            assert_eq!(Definition::parse(text), None, "{text}");
        }
    }
}
