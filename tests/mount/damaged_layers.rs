//! Manual damage where a layer ends, is truncated, or confuses two tables: cases that once read wrongly,
//! panicked or took forever.

use std::io::Write;
use std::sync::Arc;

use chainfs::cache::Cache;
use chainfs::chain::View;
use chainfs::format::snapshot::parse_table;
use chainfs::format::{Header, L1Table, Snapshot};
use chainfs::image::create::{CreateOptions, initial_image};
use chainfs::image::{Caches, Image, Layer};
use chainfs::io::Expect;
use chainfs::units::Stability;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const EXTENDED_L2: u8 = 16;

/// An image of one layer that is assembled by hand.
struct Bench {
    bytes: Vec<u8>,
    cluster: usize,
    caches: Arc<Caches>,
}

impl Bench {
    fn new(cluster_bits: u32, size: u64) -> Self {
        let options = CreateOptions { size: Some(size), cluster_bits, ..CreateOptions::default() };
        let bytes = initial_image(&options).unwrap();
        Self { bytes, cluster: 1 << cluster_bits, caches: Caches::new(1 << 20, 1 << 20) }
    }

    /// Appends a cluster of the byte `fill`, and returns where.
    fn cluster_of(&mut self, fill: u8) -> u64 {
        let at = self.bytes.len();
        self.bytes.resize(at + self.cluster, fill);
        at as u64
    }

    fn put(&mut self, at: u64, word: u64) {
        self.bytes[at as usize..][..8].copy_from_slice(&word.to_be_bytes());
    }

    fn header(&self) -> Header {
        Header::parse(&self.bytes, self.bytes.len() as u64).unwrap()
    }

    fn image(&self) -> Arc<Image> {
        Image::qcow2(
            "image",
            Arc::new(self.bytes.clone()),
            None,
            Arc::new(self.header()),
            Expect::SameVersion,
            &self.caches,
        )
        .unwrap()
    }

    /// A raw layer of the byte `fill`.
    fn raw(&self, fill: u8, len: usize) -> Layer {
        let image = Image::raw("base", Arc::new(vec![fill; len]), Expect::SameVersion, &self.caches).unwrap();
        Layer::active(&image).unwrap()
    }
}

fn frozen(layers: Vec<Layer>) -> Arc<View> {
    View::new(layers, Stability::Frozen, &Arc::new(Cache::new(1 << 20)))
}

fn read(view: &View, at: u64, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; len];
    view.read_at(at, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// An internal snapshot with the table `l1`, and a disk and VM state of those sizes.
fn snapshot(l1: L1Table, virtual_size: u64, vm_state_size: u64) -> Snapshot {
    let mut entry = vec![0; 40 + 16];
    entry[39] = 16;
    let header = Bench::new(16, 512).header();
    let snapshot = parse_table(&entry, 1, header.cluster, header.version).unwrap().remove(0);
    Snapshot { l1, virtual_size: Some(virtual_size), vm_state_size, ..snapshot }
}

#[test]
fn a_disk_that_ends_within_a_sector_is_read_to_its_last_byte() {
    // Two L1 entries of 32 KiB: a disk, and the VM state after it.
    let mut bench = Bench::new(9, 64 << 10);
    let l1 = bench.header().l1;
    for entry in 0..2 {
        let (l2, data) = (bench.cluster_of(0), bench.cluster_of(0x77));
        bench.put(l1.offset.0 + entry * 8, l2 | COPIED);
        bench.put(l2, data | COPIED);
    }
    let (image, saved) = (bench.image(), snapshot(l1, 300, 500));
    let disk = frozen(vec![Layer::snapshot(&image, &saved).unwrap(), bench.raw(0x55, 4096)]);
    assert_eq!(read(&disk, 0, 300), Ok(vec![0x77; 300]));
    let state = frozen(vec![Layer::vm_state(&image, &saved).unwrap()]);
    assert_eq!(read(&state, 0, 500), Ok(vec![0x77; 500]));
}

#[test]
fn one_offset_may_hold_a_short_and_a_long_table() {
    // The only L1 entry names the L1 table itself as the L2 table: 8 bytes and 512.
    let mut bench = Bench::new(9, 32 << 10);
    let l1 = bench.header().l1.offset.0;
    bench.put(l1, l1 | COPIED);
    let view = frozen(vec![Layer::active(&bench.image()).unwrap()]);
    assert_eq!(read(&view, 0, 8), Ok((l1 | COPIED).to_be_bytes().to_vec()));
    assert_eq!(read(&view, 512, 31 << 10), Ok(vec![0; 31 << 10]));
}

#[test]
fn a_truncated_subcluster_does_not_hide_the_layer_below() {
    let mut bench = Bench::new(14, 64 << 10);
    bench.bytes[79] |= EXTENDED_L2;
    let (l1, l2) = (bench.header().l1.offset.0, bench.cluster_of(0));
    bench.put(l1, l2 | COPIED);
    // Of 32 subclusters, only the first is here, and the file ends before it.
    bench.put(l2, bench.bytes.len() as u64 | COPIED);
    bench.put(l2 + 8, 1);
    let view = frozen(vec![Layer::active(&bench.image()).unwrap(), bench.raw(0x55, 64 << 10)]);
    assert!(read(&view, 0, 512).unwrap_err().contains("cut short"));
    assert_eq!(read(&view, 512, 16 << 10), Ok(vec![0x55; 16 << 10]));
}

#[test]
fn a_truncated_compressed_cluster_fails_despite_the_cache() {
    let mut bench = Bench::new(12, 64 << 10);
    let (l1, l2) = (bench.header().l1.offset.0, bench.cluster_of(0));
    bench.put(l1, l2 | COPIED);
    let cluster: Vec<u8> = (0..4096u32).map(|at| (at * at / 7 % 251) as u8).collect();
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    deflate.write_all(&cluster).unwrap();
    let stream = deflate.finish().unwrap();
    assert!((513..=4096).contains(&stream.len()), "of several sectors: {}", stream.len());
    let at = bench.cluster_of(0);
    bench.bytes[at as usize..][..stream.len()].copy_from_slice(&stream);
    // Eight sectors of the stream, and one. 58 bits are the place, the next the further sectors.
    bench.put(l2, COMPRESSED | 7 << 58 | at);
    bench.put(l2 + 8, COMPRESSED | at);
    let view = frozen(vec![Layer::active(&bench.image()).unwrap()]);
    for _ in 0..2 {
        assert!(read(&view, 4096, 512).unwrap_err().contains("compressed cluster"));
        assert_eq!(read(&view, 0, 4096).as_ref(), Ok(&cluster));
    }
}
