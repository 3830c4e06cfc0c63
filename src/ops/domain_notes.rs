//! What a plan says of libvirt's snapshots whose files the command removes or changes.

use std::path::Path;

use crate::error::printable;
use crate::store::ImageEntry;

use super::plan::Plan;
use super::scanned_store::ScannedStore;

/// A sentence for each snapshot of a domain that libvirt could not revert to afterwards.
pub(super) fn domain_notes(scan: &ScannedStore, plan: &Plan) -> Vec<String> {
    let invalid = plan.before.iter().filter(|line| plan.invalid.contains(&line.name)).map(|line| &line.path);
    let renamed = plan.renamed.iter().map(|(old, _)| old);
    let changed: Vec<&Path> = plan.removed.iter().chain(renamed).chain(invalid).map(AsRef::as_ref).collect();
    let notes = |image: &ImageEntry| -> Vec<String> {
        let snapshots = image.domain_snapshots().map(|of| (printable(&of.name), printable(&of.domain)));
        let note = |(name, domain): (String, String)| {
            let fact =
                format!("libvirt cannot revert domain {domain} to snapshot {name} without {}", image.shown());
            format!("{fact}; remove its record afterwards: virsh snapshot-delete {domain} {name} --metadata")
        };
        snapshots.map(note).collect()
    };
    let images = scan.catalog.images.iter().filter(|image| changed.contains(&image.place.path.as_path()));
    images.flat_map(notes).collect()
}
