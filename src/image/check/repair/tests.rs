use parking_lot::Mutex;

use super::super::check;
use super::*;
use crate::format::Header;
use crate::format::refcount::set_refcount;
use crate::image::create::{CreateOptions, initial_image};

/// A file in memory.
struct Memory(Mutex<Vec<u8>>);

impl Storage for Memory {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.lock().read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().len() as u64)
    }
}

impl WriteStorage for Memory {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let (mut file, end) = (self.0.lock(), at as usize + bytes.len());
        let len = file.len().max(end);
        file.resize(len, 0);
        file[at as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.lock().resize(len as usize, 0);
        Ok(())
    }

    fn punch_hole(&self, _at: u64, _len: u64) -> Result<()> {
        unreachable!("a repair keeps all bytes")
    }

    fn write_zeroes(&self, _at: u64, _len: u64) -> Result<()> {
        unreachable!("a repair keeps all bytes")
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _at: u64, _len: u64) -> Result<()> {
        unreachable!("a repair writes what it needs")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

const CLUSTER: usize = 512;

/// An image of 512-byte clusters, 700 of them data: three refcount blocks.
fn image() -> Vec<u8> {
    let options = CreateOptions { size: Some(400 << 10), cluster_bits: 9, ..CreateOptions::default() };
    let mut image = initial_image(&options).unwrap();
    let header = Header::parse(&image, image.len() as u64).unwrap();
    let (l1, table) = (header.l1.offset.0 as usize, header.refcount_table.offset.0 as usize);
    let add = |image: &mut Vec<u8>, named_at: usize, flag: u64| {
        let at = image.len().next_multiple_of(CLUSTER);
        image.resize(at + CLUSTER, 0);
        image[named_at..named_at + 8].copy_from_slice(&(at as u64 | flag).to_be_bytes());
        at
    };
    for (index, entry) in (0..700).zip((l1..).step_by(8).flat_map(|entry| [entry; 64])) {
        let l2 = if index % 64 == 0 {
            add(&mut image, entry, COPIED)
        } else {
            (u64::from_be_bytes(image[entry..entry + 8].try_into().unwrap()) & !COPIED) as usize
        };
        let data = add(&mut image, l2 + index % 64 * 8, COPIED);
        image[data..data + CLUSTER].fill(index as u8);
    }
    let blocks = [table, table + 8, table + 16].map(|entry| {
        match u64::from_be_bytes(image[entry..entry + 8].try_into().unwrap()) {
            0 => add(&mut image, entry, 0),
            at => at as usize,
        }
    });
    for cluster in 0..image.len() / CLUSTER {
        set_refcount(&mut image[blocks[cluster / 256]..][..CLUSTER], cluster % 256, 4, 1);
    }
    image
}

const COPIED: u64 = 1 << 63;

fn repaired(image: &[u8], window: u64) -> (Repaired, Vec<u8>) {
    let file = Memory(Mutex::new(image.to_vec()));
    let done = repair_in_windows(&file, "image", Scope::All, &mut |_| Ok(()), window).unwrap();
    (done, file.0.into_inner())
}

#[test]
fn the_size_of_the_windows_does_not_matter() {
    let good = image();
    assert_eq!(check(&good, "image").unwrap().exit_code(), 0);
    let header = Header::parse(&good, good.len() as u64).unwrap();
    let table = header.refcount_table.offset.0 as usize;
    let block = u64::from_be_bytes(good[table..table + 8].try_into().unwrap()) as usize;
    let mut wrong = good.clone();
    for (cluster, count) in [(4, 0), (7, 3), (9, 2), (100, 0), (255, 5)] {
        set_refcount(&mut wrong[block..block + CLUSTER], cluster, 4, count);
    }
    let mut flags = wrong.clone();
    flags[header.l1.offset.0 as usize] ^= 0x80;
    let mut gone = wrong.clone();
    gone[table + 8..table + 16].fill(0);
    for (case, damaged) in [("counts", wrong), ("flags", flags), ("a block is gone", gone)] {
        let (whole, bytes) = repaired(&damaged, WINDOW_CLUSTERS);
        assert_eq!((whole.report.exit_code(), whole.report.findings.as_slice()), (0, &[][..]), "{case}");
        assert!(whole.report.corruptions_fixed > 0 && whole.report.leaks_fixed > 0, "{case}");
        for window in [8, 16, 64, 128, 248, 256, 512, 1024] {
            let (parts, same) = repaired(&damaged, window);
            assert!(same == bytes, "{case}, windows of {window}");
            assert_eq!(parts.report, whole.report, "{case}, windows of {window}");
        }
    }
}

#[test]
fn a_dirty_image_is_recounted_and_a_corrupt_one_refused() {
    let mut dirty = image();
    dirty[79] = 1;
    let file = Memory(Mutex::new(dirty.clone()));
    assert_eq!(repair_dirty(&file, "image").unwrap().exit_code(), 0);
    assert_eq!(file.0.lock()[79], 0);
    // An entry that points nowhere is beyond what recounting repairs.
    let header = Header::parse(&dirty, dirty.len() as u64).unwrap();
    dirty[header.l1.offset.0 as usize + 4] = 0x7f;
    for bits in [1, 2, 3] {
        dirty[79] = bits;
        let file = Memory(Mutex::new(dirty.clone()));
        let error = repair_dirty(&file, "image").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(file.0.lock()[79], bits);
    }
}
