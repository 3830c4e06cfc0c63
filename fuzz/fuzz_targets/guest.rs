//! Any bytes as a guest's disk: its volumes are assembled, and everything in them is asked for.
#![no_main]

use std::sync::Arc;

use chainfs::guest::volumes::assemble;
use chainfs::guest::{FileSystem, Ino, READERS, Source, open};
use libfuzzer_sys::fuzz_target;

/// Inodes of a tree that are looked at: damage can make them endless.
const INODES: usize = 200;

fuzz_target!(|bytes: &[u8]| {
    let disks: Vec<Arc<dyn Source>> = vec![Arc::new(bytes.to_vec())];
    let assembly = assemble(&disks, None);
    for index in 0..assembly.layout.volumes.len() {
        let mut sector = [0; 512];
        let _ = assembly.source(index).read_at(0, &mut sector);
        for tree in open(READERS, index, &assembly).unwrap_or_default() {
            look_at(&*tree.files);
        }
    }
});

fn look_at(files: &dyn FileSystem) {
    let (mut seen, mut left) = (std::collections::HashSet::new(), vec![files.root()]);
    files.statistics();
    while let Some(ino) = left.pop() {
        if seen.len() == INODES || !seen.insert(ino) {
            continue;
        }
        let _ = (files.attributes(ino), files.extended_attributes(ino), files.read_link(ino));
        let _ = files.runs(ino, 0, u64::MAX, 64);
        let _ = files.read_at(ino, 0, &mut [0; 4096]);
        let mut names: Vec<(Vec<u8>, Ino)> = Vec::new();
        let _ = files.list(ino, 0, &mut |entry| {
            names.push((entry.name, entry.ino));
            names.len() < INODES
        });
        for (name, found) in names {
            let _ = files.lookup(ino, &name);
            left.push(found);
        }
    }
}
