//! A writer of a disk far larger than its cache stays within the cache.
//!
//! Measured where memory can be: in a process of its own, by the kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use chainfs::error::{Error, ErrorKind, Result};
use chainfs::image::check::check;
use chainfs::image::write::{Writer, WriterOptions};
use chainfs::io::{Storage, WriteStorage};
use chainfs::units::are_zero;
use support::is_alone;

const CACHE: usize = 2 << 20;
/// The writer's other memory: free lists, lists of tables and their offsets, buffers.
const BESIDES: u64 = 4 << 20;
const WRITES: u64 = 12_000;
const SIZE: u64 = 1 << 40;

struct RealFile(File);

impl Storage for RealFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let mut have = 0;
        while have < buf.len() {
            match self.0.read_at(&mut buf[have..], at + have as u64) {
                Ok(0) => break,
                Ok(len) => have += len,
                Err(error) => return Err(Error::io("reading", error)),
            }
        }
        Ok(have)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.metadata().map_err(|error| Error::io("asking for the length", error))?.len())
    }
}

impl WriteStorage for RealFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        // Zeroes stay holes: the test is about memory, not about the disk it runs on.
        if are_zero(bytes) && at >= self.len()? {
            return self.set_len(at + bytes.len() as u64);
        }
        self.0.write_all_at(bytes, at).map_err(|error| Error::io("writing", error))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len).map_err(|error| Error::io("resizing", error))
    }

    fn punch_hole(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "no holes here"))
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "no space to be taken here"))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// The most memory that this process has had, in bytes.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Sectors all over the disk, none twice.
fn place(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) % (SIZE / 512) * 512
}

fn write_all_over(path: &Path) {
    let open = || {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Writer::qcow2("disk.qcow2", Arc::new(RealFile(file)), None, None, WriterOptions { cache: CACHE })
            .unwrap()
    };
    let writer = open();
    let before = most_memory();
    for number in 0..WRITES {
        writer.write_at(place(number), &[number as u8 | 1; 512]).unwrap();
    }
    for number in 0..WRITES {
        let mut bytes = [0; 512];
        writer.read_at(place(number), &mut bytes).unwrap();
        assert_eq!(bytes, [number as u8 | 1; 512], "write {number}");
    }
    writer.close().unwrap();
    let taken = most_memory() - before;
    println!("{WRITES} writes took {} KiB with a cache of {} KiB", taken >> 10, CACHE >> 10);
    assert!(taken <= CACHE as u64 + BESIDES, "{taken} bytes with a cache of {CACHE}");
}

#[test]
// B3
fn a_disk_of_a_tebibyte_is_written_within_the_cache() {
    if !is_alone(module_path!(), "a_disk_of_a_tebibyte_is_written_within_the_cache") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(SIZE.to_string())
        .output();
    assert!(made.expect("qemu-img is needed: install qemu-utils").status.success());
    write_all_over(&path);
    let report = check(&RealFile(File::open(&path).unwrap()), "disk.qcow2").unwrap();
    assert_eq!(report.exit_code(), 0, "{report}");
}
