//! The writer of qcow2 on hostile images and disks: entries that point at tables or past the end of the file,
//! a sync that fails during writes, disks that grow into other data.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use chainfs::error::{Error, ErrorKind, Result};
use chainfs::image::write::{BackingDisk, Writer, WriterOptions, Zeroing};
use chainfs::io::{Storage, WriteStorage};
use chainfs::units::{BlockStatus, Run, are_zero};
use support::oracle::Scratch;
use support::sim::in_turn;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 * KIB;
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;
/// No image here has a reason to become larger.
const CAP: u64 = 64 * MIB;

type Hook = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// A file in memory that records its operations.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Called at the end of each write.
    hook: Mutex<Option<Hook>>,
    fails_to_sync: AtomicBool,
    syncs: AtomicU64,
    /// First and end of ranges that were punched.
    punched: Mutex<Vec<(u64, u64)>>,
    /// The largest offset for which space was requested.
    farthest: AtomicU64,
    /// Some calls take their time before they do anything.
    is_slow: AtomicBool,
    calls: AtomicU64,
}

impl Memory {
    fn load(scratch: &Scratch, name: &str) -> Arc<Self> {
        Self::of(fs::read(scratch.path(name)).unwrap())
    }

    fn of(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), ..Self::default() })
    }

    fn save(&self, scratch: &Scratch, name: &str) {
        fs::write(scratch.path(name), &*self.bytes.lock().unwrap()).unwrap();
    }

    fn copy(&self, at: u64, len: u64) -> Vec<u8> {
        self.bytes.lock().unwrap()[at as usize..(at + len) as usize].to_vec()
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.copy(at, 8).try_into().unwrap())
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.copy(at, 4).try_into().unwrap())
    }

    fn poke(&self, at: u64, value: u64) {
        self.bytes.lock().unwrap()[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
    }

    /// The place of an L2 entry of an image whose disk has one L2 table.
    fn l2_entry(&self, index: u64) -> u64 {
        (self.u64(self.u64(40)) & 0x00ff_ffff_ffff_fe00) + index * 8
    }

    /// Sets a 16-bit refcount that the first block holds.
    fn count(&self, cluster: u64, count: u16) {
        let block = self.u64(self.u64(48)) as usize;
        self.bytes.lock().unwrap()[block + cluster as usize * 2..][..2].copy_from_slice(&count.to_be_bytes());
    }

    fn linger(&self) {
        if self.is_slow.load(Ordering::Relaxed) {
            let call = self.calls.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
            if call.is_multiple_of(8) {
                std::thread::sleep(std::time::Duration::from_micros(call % 200));
            }
        }
    }

    fn reach(&self, end: u64) -> Result<()> {
        self.farthest.fetch_max(end, Ordering::SeqCst);
        if end > CAP {
            return Err(Error::new(ErrorKind::Io, format!("a file of {end:#x} bytes is too much here")));
        }
        Ok(())
    }
}

impl Storage for Memory {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.linger();
        self.bytes.lock().unwrap().read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
}

impl WriteStorage for Memory {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let end = at + bytes.len() as u64;
        self.reach(end)?;
        self.linger();
        let mut all = self.bytes.lock().unwrap();
        let len = all.len().max(end as usize);
        all.resize(len, 0);
        all[at as usize..end as usize].copy_from_slice(bytes);
        drop(all);
        let hook = self.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(at, bytes.len() as u64);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.reach(len)?;
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.linger();
        self.punched.lock().unwrap().push((at, at + len));
        let mut all = self.bytes.lock().unwrap();
        let file_len = all.len() as u64;
        all[at.min(file_len) as usize..(at + len).min(file_len) as usize].fill(0);
        Ok(())
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.reach(at + len)?;
        let mut all = self.bytes.lock().unwrap();
        let len = all.len().max((at + len) as usize);
        all.resize(len, 0);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        if self.fails_to_sync.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Io, "the disk is gone"));
        }
        Ok(())
    }
}

/// A backing disk that is never known to be zero, and counts the queries.
struct Sevens {
    size: u64,
    asked: Mutex<Vec<u64>>,
    file: Arc<Memory>,
}

impl BackingDisk for Sevens {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let inside = self.size.saturating_sub(at).min(buf.len() as u64) as usize;
        buf[..inside].fill(7);
        buf[inside..].fill(0);
        Ok(())
    }

    fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        self.asked.lock().unwrap().push(self.file.syncs.load(Ordering::SeqCst));
        if at >= self.size {
            return Ok(Run::new(BlockStatus::Zero, len));
        }
        Ok(Run::new(BlockStatus::Data, len.min(self.size - at)))
    }
}

fn open(file: &Arc<Memory>) -> Arc<Writer> {
    Writer::qcow2("active.qcow2", Arc::clone(file) as _, None, None, WriterOptions::default()).unwrap()
}

fn read(writer: &Writer, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; len as usize];
    writer.read_at(at, &mut bytes).unwrap();
    bytes
}

/// An image of 1 MiB whose first cluster has data, and the places of its tables.
fn small(scratch: &Scratch) -> (Arc<Memory>, Vec<(&'static str, u64)>) {
    scratch.create("a.qcow2", "", "1M");
    scratch.io("a.qcow2", &["write -P 7 0 64k"]);
    let file = Memory::load(scratch, "a.qcow2");
    let tables = vec![
        ("L1 table", file.u64(40)),
        ("refcount table", file.u64(48)),
        ("refcount block", file.u64(file.u64(48))),
        ("L2 table", file.l2_entry(0)),
    ];
    (file, tables)
}

/// Runs `work` on the disk of an image whose second cluster overlaps a table, each in turn.
fn tables_survive(flags: u64, work: impl Fn(&Writer) -> Result<()>) {
    let scratch = Scratch::new();
    let (_, tables) = small(&scratch);
    for (what, at) in tables {
        let file = Memory::load(&scratch, "a.qcow2");
        file.poke(file.l2_entry(1), at | flags);
        let before = file.copy(at, CLUSTER);
        let outcome = open(&file).as_ref().pipe(&work);
        assert!(file.copy(at, CLUSTER) == before, "the {what} was overwritten by the guest ({outcome:?})");
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
    }
}

trait Pipe {
    fn pipe<T>(&self, work: impl Fn(&Self) -> T) -> T {
        work(self)
    }
}

impl Pipe for Writer {}

#[test]
// M3
fn a_write_in_place_never_hits_a_table() {
    tables_survive(COPIED, |writer| writer.write_at(CLUSTER, &[0xaa; 4096]));
}

#[test]
fn a_write_to_a_preallocated_cluster_never_hits_a_table() {
    tables_survive(COPIED | ZERO, |writer| writer.write_at(CLUSTER, &[0xaa; 4096]));
}

#[test]
// M3
fn a_discard_never_punches_a_table() {
    tables_survive(COPIED, |writer| writer.zero(CLUSTER, CLUSTER, Zeroing::Unmap));
}

#[test]
fn a_write_beyond_the_file_end_is_not_truncated_again() {
    let scratch = Scratch::new();
    let (file, _) = small(&scratch);
    let host = file.len().unwrap().div_ceil(CLUSTER) + 8;
    file.poke(file.l2_entry(1), (host * CLUSTER) | COPIED | ZERO);
    file.count(host, 1);
    let writer = open(&file);
    // Refusing it is as good as doing it.
    if writer.write_at(CLUSTER, &vec![0xaa; CLUSTER as usize]).is_err() {
        return;
    }
    writer.flush().unwrap();
    writer.write_at(5 * CLUSTER, &[0xbb; 512]).unwrap();
    assert!(file.len().unwrap() >= (host + 1) * CLUSTER, "the file was cut to {:#x}", file.len().unwrap());
    assert_eq!(read(&writer, CLUSTER, CLUSTER), vec![0xaa; CLUSTER as usize]);
}

#[test]
fn no_space_is_allocated_far_beyond_the_file_end() {
    let scratch = Scratch::new();
    for flags in [COPIED, COPIED | ZERO] {
        let (file, _) = small(&scratch);
        file.poke(file.l2_entry(1), 1 << 50 | flags);
        let outcome = open(&file).allocate(CLUSTER, CLUSTER);
        let farthest = file.farthest.load(Ordering::SeqCst);
        assert!(farthest < CAP, "the file was to have {farthest:#x} bytes ({outcome:?})");
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn an_l1_table_larger_than_a_refcount_block_is_allocated() {
    let scratch = Scratch::new();
    // One block of 512 bytes counts 256 clusters, or 64; the table wants 512.
    for options in ["cluster_size=512", "cluster_size=512,refcount_bits=64"] {
        scratch.create("a.qcow2", options, "1M");
        let file = Memory::load(&scratch, "a.qcow2");
        let writer = open(&file);
        writer.write_at(4096, &[0xaa; 4096]).unwrap();
        let outcome = writer.grow(1 << 30);
        let len = file.len().unwrap();
        assert!(outcome.is_ok() && len < 4 * MIB, "{options}: {outcome:?}, and the file has {len:#x} bytes");
        writer.write_at((1 << 30) - 4096, &[0xbb; 4096]).unwrap();
        writer.close().unwrap();
        file.save(&scratch, "a.qcow2");
        scratch.img("check -q a.qcow2");
        scratch.io("a.qcow2", &["read -P 0xaa 4k 4k", "read -P 0xbb 1073737728 4k"]);
    }
}

#[test]
// M7
fn after_a_failed_flush_running_writes_stop() {
    let scratch = Scratch::new();
    for prefilled in [false, true] {
        scratch.create("a.qcow2", "", "64M");
        if prefilled {
            // Scattered, so that each cluster is a write of its own.
            let commands: Vec<_> = (0..32).rev().map(|n| format!("write -P 1 {}k 64k", n * 64)).collect();
            scratch.io("a.qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let file = Memory::load(&scratch, "a.qcow2");
        let writer = open(&file);
        writer.write_at(40 * MIB, &[1; 512]).unwrap();
        let (failed, late) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let hook: Hook = {
            let (writer, file, failed, late) =
                (Arc::clone(&writer), Arc::clone(&file), Arc::clone(&failed), Arc::clone(&late));
            Arc::new(move |_, len| {
                if len < CLUSTER {
                    return;
                }
                if failed.swap(true, Ordering::SeqCst) {
                    late.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                file.fails_to_sync.store(true, Ordering::SeqCst);
                std::thread::scope(|scope| assert!(scope.spawn(|| writer.flush()).join().unwrap().is_err()));
            })
        };
        *file.hook.lock().unwrap() = Some(hook);
        let len = if prefilled { 2 * MIB } else { 20 * MIB };
        let outcome = writer.write_at(0, &vec![0xaa; len as usize]);
        *file.hook.lock().unwrap() = None;
        assert!(failed.load(Ordering::SeqCst));
        let late = late.load(Ordering::SeqCst);
        assert_eq!(late, 0, "prefilled: {prefilled}; writes after the flush had failed ({outcome:?})");
        assert!(outcome.is_err(), "prefilled: {prefilled}");
    }
}

#[test]
fn the_first_flush_syncs_writes_of_a_killed_writer() {
    let scratch = Scratch::new();
    let (file, _) = small(&scratch);
    open(&file).flush().unwrap();
    assert_eq!(file.syncs.load(Ordering::SeqCst), 1, "whoever reopens and syncs believes what is read");
}

#[test]
fn a_growth_that_is_refused_for_bitmaps_leaves_them_valid() {
    let scratch = Scratch::new();
    scratch.create("a.qcow2", "", "1M");
    scratch.img("bitmap --add a.qcow2 dirty");
    let file = Memory::load(&scratch, "a.qcow2");
    let before = file.copy(0, file.len().unwrap());
    let writer = open(&file);
    assert_eq!(writer.grow(2 * MIB).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(writer.grow(KIB).unwrap_err().kind(), ErrorKind::Forbidden);
    writer.grow(MIB).unwrap();
    writer.write_at(0, &[]).unwrap();
    assert!(file.copy(0, file.len().unwrap()) == before, "nothing was to be written");
}

#[test]
fn a_version_2_image_with_snapshots_does_not_grow_as_in_qemu() {
    let scratch = Scratch::new();
    scratch.create("a.qcow2", "compat=0.10", "1M");
    scratch.img("snapshot -c one a.qcow2");
    assert!(!scratch.run("qemu-img", &["resize", "a.qcow2", "2M"]).status.success(), "QEMU does not either");
    let file = Memory::load(&scratch, "a.qcow2");
    assert_eq!(open(&file).grow(2 * MIB).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn empty_ranges_allocate_nothing() {
    let scratch = Scratch::new();
    let (file, _) = small(&scratch);
    let writer = open(&file);
    writer.allocate(5 * CLUSTER + 512, 0).unwrap();
    assert!(!writer.is_dirty());
}

#[test]
fn a_discard_frees_a_preallocated_cluster() {
    let scratch = Scratch::new();
    let (file, _) = small(&scratch);
    let host = file.u64(file.l2_entry(0)) & !COPIED;
    let writer = open(&file);
    writer.zero(0, CLUSTER, Zeroing::Keep).unwrap();
    writer.zero(0, CLUSTER, Zeroing::Unmap).unwrap();
    writer.close().unwrap();
    assert!(file.punched.lock().unwrap().contains(&(host, host + CLUSTER)), "its blocks stay taken");
}

#[test]
fn growing_over_a_larger_backing_disk_uses_little_memory() {
    let scratch = Scratch::new();
    scratch.create("a.qcow2", "", "1M");
    let file = Memory::load(&scratch, "a.qcow2");
    let below = Arc::new(Sevens { size: 16 << 30, asked: Mutex::default(), file: Arc::clone(&file) });
    let options = WriterOptions { cache: 256 << 10 };
    let writer =
        Writer::qcow2("a", Arc::clone(&file) as _, None, Some(Arc::clone(&below) as _), options).unwrap();
    // 32 L2 tables, 2 MiB of them.
    writer.grow(16 << 30).unwrap();
    assert_eq!(read(&writer, 9 << 30, 512), [0; 512]);
    let asked: BTreeSet<_> = below.asked.lock().unwrap().iter().copied().collect();
    assert!(asked.len() > 1, "all changed tables were kept until the end");
}

/// Truncates the disk, grows it again with the writer, and checks it with QEMU.
fn regrown(options: &str, is_compressed: bool, cut: u64) {
    let scratch = Scratch::new();
    scratch.create("a.qcow2", options, "2M");
    scratch.io("a.qcow2", &["write -P 7 0 2M"]);
    if is_compressed {
        let options = if options.is_empty() { String::new() } else { format!("-o {options}") };
        scratch.img(&format!("convert -c -O qcow2 {options} a.qcow2 b.qcow2"));
        fs::rename(scratch.path("b.qcow2"), scratch.path("a.qcow2")).unwrap();
    }
    let file = Memory::load(&scratch, "a.qcow2");
    file.poke(24, cut);
    let writer = open(&file);
    writer.grow(cut + 512).unwrap();
    writer.grow(2 * MIB).unwrap();
    let bytes = read(&writer, 0, 2 * MIB);
    let (old, new) = bytes.split_at(cut as usize);
    assert!(old.iter().all(|byte| *byte == 7), "{options}: what was there stays");
    assert!(are_zero(new), "{options}: what is new is zero");
    writer.close().unwrap();
    file.save(&scratch, "a.qcow2");
    scratch.img("check -q a.qcow2");
    let tail = format!("read -P 0 {cut} {}", 2 * MIB - cut);
    scratch.io("a.qcow2", &[&format!("read -P 7 0 {cut}"), &tail]);
}

#[test]
fn growing_does_not_bring_back_data_beyond_the_old_end() {
    for options in
        ["", "compat=0.10", "extended_l2=on", "cluster_size=512", "cluster_size=2M", "refcount_bits=1"]
    {
        for cut in [512, 64 * KIB, 100 * KIB + 512] {
            regrown(options, false, cut);
            regrown(options, true, cut);
        }
    }
}

#[test]
fn a_disk_that_grows_over_vm_state_reads_zeroes_there() {
    let scratch = Scratch::new();
    scratch.create("a.qcow2", "", "2G");
    scratch.io("a.qcow2", &["write -P 1 0 64k", "write -P 7 600M 1M", "write -P 8 1600M 1M"]);
    scratch.img("snapshot -c one a.qcow2");
    let file = Memory::load(&scratch, "a.qcow2");
    assert_eq!(file.u32(36), 4);
    file.poke(24, MIB);
    let writer = open(&file);
    writer.grow(1 << 30).unwrap();
    assert!(are_zero(&read(&writer, 600 * MIB, MIB)));
    writer.grow(5 << 30).unwrap();
    assert!(are_zero(&read(&writer, 1600 * MIB, MIB)));
    writer.close().unwrap();
    file.save(&scratch, "a.qcow2");
    scratch.img("check -q a.qcow2");
    scratch.io("a.qcow2", &["read -P 1 0 64k", "read -P 0 600M 1M", "read -P 0 1600M 1M"]);
    scratch.img("snapshot -a one a.qcow2");
    scratch.io("a.qcow2", &["read -P 7 600M 1M", "read -P 8 1600M 1M"]);
}

/// A crash of QEMU while it took a snapshot leaves such flags.
#[test]
fn a_wrong_copied_flag_is_ignored_where_a_snapshot_shares() {
    for (options, is_table_shared) in
        [("", true), ("", false), ("extended_l2=on", true), ("extended_l2=on", false), ("compat=0.10", false)]
    {
        let scratch = Scratch::new();
        scratch.create("a.qcow2", options, "4M");
        scratch.io("a.qcow2", &["write -P 1 0 1M"]);
        scratch.img("snapshot -c one a.qcow2");
        if !is_table_shared {
            scratch.io("a.qcow2", &["write -P 2 2M 64k"]);
        }
        let file = Memory::load(&scratch, "a.qcow2");
        let (l1, l2) = (file.u64(40), file.l2_entry(0));
        assert_eq!((file.u64(l1) >> 63 == 0, file.u64(l2) >> 63), (is_table_shared, 0), "what QEMU leaves");
        file.poke(l1, file.u64(l1) | 1 << 63);
        file.poke(l2, file.u64(l2) | 1 << 63);
        let writer = open(&file);
        writer.write_at(4096, &[9; 8192]).unwrap();
        writer.close().unwrap();
        file.save(&scratch, "a.qcow2");
        scratch.img("check -q a.qcow2");
        scratch.io("a.qcow2", &["read -P 1 0 4k", "read -P 9 4k 8k", "read -P 1 12k 1012k"]);
        scratch.img("snapshot -a one a.qcow2");
        scratch.io("a.qcow2", &["read -P 1 0 1M"]);
    }
}

#[test]
fn a_disk_of_no_size_grows_and_leaks_nothing() {
    let scratch = Scratch::new();
    for options in ["", "compat=0.10", "cluster_size=512"] {
        scratch.create("a.qcow2", options, "0");
        let file = Memory::load(&scratch, "a.qcow2");
        let writer = open(&file);
        writer.grow(MIB).unwrap();
        writer.write_at(MIB - 512, &[7; 512]).unwrap();
        writer.close().unwrap();
        file.save(&scratch, "a.qcow2");
        scratch.img("check a.qcow2");
        scratch.io("a.qcow2", &["read -P 7 1048064 512"]);
    }
}

#[test]
fn garbage_past_the_last_counted_cluster_is_overwritten() {
    let scratch = Scratch::new();
    for garbage in [1, 512, 3 * CLUSTER + 5] {
        let (file, _) = small(&scratch);
        let len = file.len().unwrap() + garbage;
        file.bytes.lock().unwrap().resize(len as usize, 0xee);
        let writer = open(&file);
        for cluster in 1..16 {
            writer.write_at(cluster * CLUSTER + 1024, &[0xaa; 512]).unwrap();
        }
        for cluster in 1..16 {
            let bytes = read(&writer, cluster * CLUSTER, CLUSTER);
            assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if at / 512 == 2 { 0xaa } else { 0 }));
        }
        writer.close().unwrap();
        file.save(&scratch, "a.qcow2");
        scratch.img("check -q a.qcow2");
    }
}

/// Pseudo-random numbers.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Each thread owns every fourth sector; thread 0 has whole clusters, too.
fn crowd(name: &str, file: &Arc<Memory>, below: bool, before: &[u8], seed: u64) -> Vec<u8> {
    const SIZE: u64 = 4 * MIB;
    let below = below.then(|| {
        Arc::new(Sevens { size: SIZE - 100 * KIB, asked: Mutex::default(), file: Arc::clone(file) })
            as Arc<dyn BackingDisk>
    });
    let options = WriterOptions { cache: 64 << 10 };
    let writer = Writer::qcow2("a", Arc::clone(file) as _, None, below, options).unwrap();
    let run = |thread: u64| {
        let mut dice = Dice(seed * 1000 + thread + 1);
        let mut model = before.to_vec();
        for step in 0..3000u64 {
            let sector = dice.below(SIZE / 512 / 4) * 4 + thread;
            let (mut at, mut len) = (sector * 512, 512);
            let is_own_cluster = |at: u64| at / CLUSTER % 8 == 7;
            if thread == 0 && dice.below(4) == 0 {
                at = (dice.below(SIZE / CLUSTER / 8) * 8 + 7) * CLUSTER;
                len = CLUSTER;
            } else if is_own_cluster(at) && thread != 0 {
                continue;
            }
            let part = at as usize..(at + len) as usize;
            match dice.below(12) {
                0..6 => {
                    let byte = (step * 4 + thread) as u8;
                    writer.write_at(at, &vec![byte; len as usize]).unwrap();
                    model[part].fill(byte);
                }
                6 | 7 => {
                    writer.zero(at, len, Zeroing::Unmap).unwrap();
                    model[part].fill(0);
                }
                8 => {
                    writer.zero(at, len, Zeroing::Keep).unwrap();
                    model[part].fill(0);
                }
                9 if dice.below(8) == 0 => writer.flush().unwrap(),
                10 if dice.below(8) == 0 => {
                    let from = dice.below(SIZE - 300 * KIB);
                    writer.allocate(from, 300 * KIB).unwrap();
                }
                _ => {
                    let found = read(&writer, at, len);
                    assert!(
                        found == model[part],
                        "{name}, seed {seed}, thread {thread}, step {step}: {at:#x}"
                    );
                }
            }
        }
        model
    };
    let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|thread| scope.spawn(move || run(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    writer.close().unwrap();
    let all = read(&writer, 0, SIZE);
    for (sector, found) in all.chunks(512).enumerate() {
        let owner = if sector as u64 * 512 / CLUSTER % 8 == 7 { 0 } else { sector % 4 };
        assert!(
            found == &models[owner][sector * 512..][..512],
            "{name}, seed {seed}: sector {sector} in the end"
        );
    }
    all
}

#[test]
fn neighbours_in_a_cluster_do_not_lose_each_others_sectors() {
    let scratch = Scratch::new();
    let seeds = std::env::var("CHAINFS_SEEDS").map_or(1, |seeds| seeds.parse().unwrap());
    let formats = ["", "extended_l2=on", "compat=0.10", "cluster_size=512", "cluster_size=2M,extended_l2=on"];
    for seed in 1..=seeds {
        for (number, options) in formats.into_iter().enumerate() {
            for start in in_turn(["empty", "below", "compressed", "snapshot"], number % 2) {
                let name = format!("{start} {options}");
                scratch.create("a.qcow2", options, "4M");
                let mut before = vec![0; 4 << 20];
                match start {
                    "below" => before[..(4 << 20) - (100 << 10)].fill(7),
                    "empty" => {}
                    _ => {
                        scratch.io("a.qcow2", &["write -P 9 0 3M"]);
                        before[..3 << 20].fill(9);
                    }
                }
                if start == "compressed" {
                    let words = if options.is_empty() { String::new() } else { format!("-o {options}") };
                    scratch.img(&format!("convert -c -O qcow2 {words} a.qcow2 b.qcow2"));
                    fs::rename(scratch.path("b.qcow2"), scratch.path("a.qcow2")).unwrap();
                }
                if start == "snapshot" {
                    scratch.img("snapshot -c one a.qcow2");
                }
                let file = Memory::load(&scratch, "a.qcow2");
                file.is_slow.store(seed % 2 == 1, Ordering::Relaxed);
                let all = crowd(&name, &file, start == "below", &before, seed);
                file.save(&scratch, "a.qcow2");
                scratch.img("check -q a.qcow2");
                if start != "below" {
                    fs::write(scratch.path("all.raw"), all).unwrap();
                    scratch.img("compare -q -f qcow2 -F raw a.qcow2 all.raw");
                }
                if start == "snapshot" {
                    fs::write(scratch.path("all.raw"), before).unwrap();
                    scratch.img("snapshot -a one a.qcow2");
                    scratch.img("compare -q -f qcow2 -F raw a.qcow2 all.raw");
                    scratch.img("check -q a.qcow2");
                }
            }
        }
    }
}

#[test]
fn damaged_tables_are_an_error_without_panic_or_growth() {
    let scratch = Scratch::new();
    let seeds = std::env::var("CHAINFS_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    for options in ["", "extended_l2=on", "compat=0.10", "cluster_size=512", "refcount_bits=1"] {
        scratch.create("a.qcow2", options, "1M");
        scratch.io("a.qcow2", &["write -P 7 0 300k", "write -c -P 8 448k 64k", "write -P 8 600k 64k"]);
        if options != "refcount_bits=1" {
            scratch.img("snapshot -c one a.qcow2");
            scratch.io("a.qcow2", &["write -P 7 0 100k"]);
        }
        let whole =
            Memory::load(&scratch, "a.qcow2").copy(0, fs::metadata(scratch.path("a.qcow2")).unwrap().len());
        for seed in 1..=seeds {
            let mut dice = Dice(seed * 7919);
            dice.below(1);
            let file = Memory::of(whole.clone());
            let len = file.len().unwrap();
            let cluster = 1u64 << file.u32(20);
            let l2 = file.u64(file.u64(40)) & !COPIED;
            let tables =
                [file.u64(40), file.u64(48), file.u64(file.u64(48)), l2, l2 + 8 * dice.below(64), l2];
            for _ in 0..=dice.below(3) {
                let at = tables[dice.below(6) as usize] + 8 * dice.below(24);
                let flags = [0, COPIED, ZERO, COPIED | ZERO, 1 << 62, 1 << 62 | COPIED, u64::MAX << 56];
                let offset = match dice.below(6) {
                    0 => 0,
                    1 => dice.below(len),
                    2 => 1 << (9 + dice.below(54)),
                    3 => dice.below(u64::MAX),
                    4 => len / cluster * cluster + cluster * dice.below(4),
                    _ => dice.below(len / cluster) * cluster,
                };
                file.poke(at, offset | flags[dice.below(7) as usize]);
            }
            let Ok(writer) = Writer::qcow2("a", Arc::clone(&file) as _, None, None, WriterOptions::default())
            else {
                continue;
            };
            for _ in 0..40 {
                let at = dice.below(MIB);
                let len = dice.below((MIB - at).min(200 * KIB) + 1);
                let outcome = match dice.below(9) {
                    0..3 => writer.write_at(at, &vec![1; len as usize]),
                    3 => writer.zero(at, len, Zeroing::Keep),
                    4 => writer.zero(at, len, Zeroing::Unmap),
                    5 => writer.allocate(at, len),
                    6 => writer.read_at(at, &mut vec![0; len as usize]),
                    7 => writer.flush(),
                    _ => writer.grow(writer.size() + dice.below(2) * MIB),
                };
                drop(outcome);
            }
            drop(writer.close());
            let farthest = file.farthest.load(Ordering::SeqCst);
            assert!(farthest < CAP, "{options}, seed {seed}: {farthest:#x}");
        }
    }
}
