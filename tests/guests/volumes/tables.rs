//! Partition tables of sfdisk and sgdisk, read back by partx (libblkid).

use std::fs;
use std::path::{Path, PathBuf};

use chainfs::guest::content::VolumeContent;
use chainfs::guest::volumes::{Partition, VolumeLayout, layout};
use tempfile::TempDir;

use super::{Loop, blank, disk, layout_of, names, told, volume};
use support::*;

struct Lab {
    dir: TempDir,
}

impl Lab {
    fn new(size: u64) -> Self {
        let lab = Self { dir: TempDir::new().expect("a directory") };
        blank(&lab.disk(), size);
        lab
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// A table by sfdisk's words.
    fn table(size: u64, orders: &str) -> Self {
        let lab = Self::new(size);
        told("sfdisk", &["--quiet"], &lab.disk(), orders);
        lab
    }

    fn layout(&self) -> VolumeLayout {
        layout_of(&self.disk())
    }

    /// The layout once some bytes have been changed.
    fn changed(&self, change: impl FnOnce(&mut Vec<u8>)) -> VolumeLayout {
        let mut bytes = fs::read(self.disk()).expect("the disk");
        change(&mut bytes);
        layout(&[std::sync::Arc::new(bytes)])
    }
}

/// partx's result: number, start, sectors of 512 bytes, UUID and name.
fn judged(device: &Path) -> Vec<String> {
    let mut partx = tool("partx");
    partx.args(["--raw", "--bytes", "--noheadings", "--output", "NR,START,SIZE,UUID,NAME"]).arg(device);
    // Raw output escapes all but ASCII letters.
    partx.succeeds().lines().map(|line| line.trim_end().replace("\\x20", " ")).collect()
}

fn shown(partitions: &[Partition]) -> Vec<String> {
    let line = |part: &Partition| {
        let uuid = part.uuid.as_deref().unwrap_or_default();
        let name = part.name.as_deref().unwrap_or_default();
        format!("{} {} {} {uuid} {name}", part.number, part.start / 512, part.len).trim_end().to_owned()
    };
    partitions.iter().map(line).collect()
}

fn assert_judged(layout: &VolumeLayout, device: &Path) {
    assert_eq!(shown(&layout.partitions), judged(device));
}

const GPT: &str = "label: gpt
    size=4M, type=U, name=\"EFI system partition\"
    size=10M, type=L, name=\"root\"
    start=40M, size=8M, type=E6D6D379-F507-44C2-A23C-238F2A3DF928
    size=1M, type=21686148-6449-6E6F-744E-656564454649\n";

#[test]
fn a_gpt_is_read_as_partx_reads_it() {
    let lab = Lab::table(64 * MIB, GPT);
    let layout = lab.layout();
    assert_judged(&layout, &lab.disk());
    assert_eq!((layout.table.as_deref(), layout.sector_size), (Some("gpt"), Some(512)));
    assert_eq!(names(&layout), ["p1", "p2", "p3", "p4"]);
    let types: Vec<&str> = layout.partitions.iter().map(|part| part.type_name.as_str()).collect();
    assert_eq!(types, ["EFI System", "Linux filesystem", "Linux LVM", "BIOS boot"]);
    assert!(layout.remarks.is_empty(), "{:?}", layout.remarks);

    // Numbers stay when a partition is removed, and are the kernel's wherever the partition is.
    tool("sgdisk").args(["--delete=2", "--new=77:30M:+3M"]).arg(lab.disk()).succeeds();
    let layout = lab.layout();
    assert_judged(&layout, &lab.disk());
    assert_eq!(names(&layout), ["p1", "p3", "p4", "p77"]);
}

#[test]
fn sectors_of_4096_bytes_are_detected() {
    for orders in [
        GPT,
        "label: dos\nsize=4M, type=ef\n3: size=40M, type=5\n5: size=8M\n6: size=9M, type=82\n2: start=50M, \
            size=6M\n",
    ] {
        let lab = Lab::new(64 * MIB);
        let device = Loop::new(&lab.disk(), 4096);
        told("sfdisk", &["--quiet"], device.path(), orders);
        let layout = lab.layout();
        assert_judged(&layout, device.path());
        assert_eq!(layout.sector_size, Some(4096), "{:?}", layout.remarks);
        assert!(layout.remarks.is_empty() && layout.partitions.len() >= 4, "{:?}", layout.remarks);
    }
    // Without a chain as evidence, the content of the partitions decides.
    let lab = Lab::new(64 * MIB);
    let device = Loop::new(&lab.disk(), 4096);
    told("sfdisk", &["--quiet"], device.path(), "label: dos\nsize=30M\nsize=20M\n");
    drop(device);
    let second = 31 * MIB / KIB;
    tool("mke2fs")
        .args(["-q", "-t", "ext4", "-E", &format!("offset={}", second * KIB)])
        .arg(lab.disk())
        .arg("10M")
        .succeeds();
    let layout = lab.layout();
    assert_eq!((layout.sector_size, volume(&layout, "p2").content), (Some(4096), VolumeContent::Ext4));
}

#[test]
fn a_damaged_gpt_is_read_from_its_copy() {
    let lab = Lab::table(64 * MIB, GPT);
    let whole = lab.layout();
    let header = |bytes: &mut Vec<u8>| bytes[512 + 60] ^= 1;
    let entries = |bytes: &mut Vec<u8>| bytes[1024 + 40] ^= 1;
    let gone = |bytes: &mut Vec<u8>| bytes[512..2048].fill(0);
    for damage in [&header as &dyn Fn(&mut Vec<u8>), &entries, &gone] {
        let layout = lab.changed(damage);
        assert_eq!(layout.partitions, whole.partitions);
        assert!(
            layout.remarks.len() == 1 && layout.remarks[0].contains("the second is used"),
            "{:?}",
            layout.remarks
        );
    }
    let last = 64 * MIB as usize - 512;
    let layout = lab.changed(|bytes| bytes[last + 60] ^= 1);
    assert_eq!((&layout.partitions, layout.remarks.len()), (&whole.partitions, 0));
    let layout = lab.changed(|bytes| {
        bytes[last + 60] ^= 1;
        bytes[512 + 60] ^= 1;
    });
    assert!(
        layout.partitions.is_empty() && layout.remarks[0].contains("cannot be used"),
        "{:?}",
        layout.remarks
    );

    // On a grown disk, the copy is not at the end any more, but where the first header says.
    let layout = lab.changed(|bytes| {
        bytes.extend(vec![0; MIB as usize]);
        bytes[512 + 60] ^= 1;
    });
    assert_eq!(layout.partitions, whole.partitions);
    // No MBR protects it; or an older table has taken the disk back.
    let layout = lab.changed(|bytes| bytes[440..512].fill(0));
    assert_eq!((&layout.partitions, layout.remarks.len()), (&whole.partitions, 1));
    let layout = lab.changed(|bytes| bytes[446 + 4] = 0x83);
    assert_eq!((layout.table.as_deref(), names(&layout)), (Some("dos"), vec!["p1"]));
}

#[test]
fn a_table_of_512_byte_sectors_on_a_hybrid_disk_is_the_gpt() {
    let lab = Lab::table(64 * MIB, GPT);
    tool("sgdisk").args(["--hybrid=1:2:EE"]).arg(lab.disk()).succeeds();
    let layout = lab.layout();
    assert_eq!(layout.table.as_deref(), Some("gpt"));
    assert_judged(&layout, &lab.disk());
}

#[test]
fn logical_partitions_are_read_as_partx_reads_them() {
    let orders = "label: dos
        label-id: 0xdeadbeef
        size=5M, type=7, bootable
        size=40M, type=f
        start=50M, size=4M, type=8e
        5: size=3M
        6: size=4M, type=82
        7: size=5M
        8: size=6M, type=b\n";
    let lab = Lab::table(64 * MIB, orders);
    let whole = lab.layout();
    assert_judged(&whole, &lab.disk());
    assert_eq!(names(&whole), ["p1", "p3", "p5", "p6", "p7", "p8"]);
    assert_eq!(whole.partitions[1].uuid.as_deref(), Some("deadbeef-02"));
    assert_eq!(whole.partitions[4].type_name, "Linux swap / Solaris");
    assert!(whole.remarks.is_empty());

    // One taken out of the chain makes the others move up, as the kernel counts them.
    told("sfdisk", &["--quiet", "--delete"], &lab.disk(), "");
    let lab = Lab::table(64 * MIB, orders);
    tool("sfdisk").args(["--quiet", "--delete"]).arg(lab.disk()).arg("6").succeeds();
    let layout = lab.layout();
    assert_judged(&layout, &lab.disk());
    assert_eq!(names(&layout), ["p1", "p3", "p5", "p6", "p7"]);
}

#[test]
fn chains_that_loop_or_break_end() {
    let lab = Lab::table(64 * MIB, "label: dos\nsize=40M, type=5\n5: size=3M\n6: size=4M\n");
    let whole = lab.layout();
    let first = whole.partitions[0].start as usize;
    // The second record of the chain, which begins a MiB before its partition.
    let second = whole.partitions[2].start as usize - MIB as usize;
    let next = |bytes: &mut Vec<u8>, record: usize, kind: u8, start: u32| {
        let at = record + 446 + 16;
        bytes[at + 4] = kind;
        bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        bytes[at + 12..at + 16].copy_from_slice(&100u32.to_le_bytes());
    };
    let layout = lab.changed(|bytes| next(bytes, second, 5, 0));
    assert!(layout.partitions.len() <= 255 && !layout.remarks.is_empty());
    let layout = lab.changed(|bytes| {
        next(bytes, second, 5, 0);
        bytes[first + 446..first + 462].fill(0);
        bytes[second + 446..second + 462].fill(0);
    });
    assert!(layout.remarks[0].contains("has no end"), "{:?}", layout.remarks);
    let layout = lab.changed(|bytes| bytes[second + 510] = 0);
    assert_eq!(names(&layout), ["p5"]);
    assert!(layout.remarks[0].contains("is broken"), "{:?}", layout.remarks);
}

#[test]
fn partitions_outside_the_disk_or_overlapping_are_cut_and_reported() {
    let lab = Lab::table(64 * MIB, "label: dos\nsize=10M\nstart=20M, size=10M\nstart=40M, size=10M\n");
    let start = |bytes: &mut Vec<u8>, number: usize, mib: u32| {
        bytes[446 + 16 * number + 8..][..4].copy_from_slice(&(mib * 2048).to_le_bytes());
    };
    let layout = lab.changed(|bytes| {
        start(bytes, 1, 60);
        start(bytes, 2, 70);
    });
    assert_eq!((volume(&layout, "p2").size, volume(&layout, "p3").size), (4 * MIB, 0));
    assert!(volume(&layout, "p3").problem.is_some());
    assert_eq!(layout.remarks.len(), 2, "{:?}", layout.remarks);
    let layout = lab.changed(|bytes| start(bytes, 1, 5));
    assert_eq!(layout.remarks, ["partitions 1 and 2 overlap"]);
}

/// A file system on the whole disk, whatever its first sector looks like.
#[test]
fn disks_without_a_table_are_one_volume() {
    type Make = (&'static str, &'static [&'static str], VolumeContent);
    let makes: [Make; 5] = [
        ("mkfs.vfat", &["-F", "32"], VolumeContent::Fat32),
        ("mkfs.vfat", &["-F", "16", "-D", "0x80"], VolumeContent::Fat16),
        ("mkntfs", &["-q", "-F"], VolumeContent::Ntfs),
        ("mkfs.exfat", &[], VolumeContent::Exfat),
        ("mke2fs", &["-q", "-t", "ext3"], VolumeContent::Ext3),
    ];
    for (program, args, content) in makes {
        let lab = Lab::new(64 * MIB);
        tool(program).args(args).arg(lab.disk()).succeeds();
        // Boot code that looks like entries of a table.
        let layout = lab.changed(|bytes| {
            bytes[510..512].copy_from_slice(b"\x55\xaa");
            if content != VolumeContent::Ext3 {
                bytes[446 + 4] = 0x20;
                bytes[446 + 12] = 0x63;
            }
        });
        assert_eq!(names(&layout), ["disk"], "{program}");
        assert_eq!((volume(&layout, "disk").content, layout.table), (content, None));
    }
    let lab = Lab::new(MIB);
    assert_eq!(volume(&lab.layout(), "disk").content, VolumeContent::Empty);
    assert_eq!(lab.changed(|bytes| bytes[700] = 1).volumes[0].content, VolumeContent::Unknown);
    assert!(layout(&[]).volumes.is_empty());
    let layout = layout(&[disk(Path::new("/dev/null"))]);
    assert_eq!((volume(&layout, "disk").size, volume(&layout, "disk").segments.len()), (0, 0));
}

#[test]
fn tables_that_are_not_read_are_named() {
    let lab = Lab::new(8 * MIB);
    let layout = lab.changed(|bytes| {
        bytes[..2].copy_from_slice(b"ER");
        bytes[512..514].copy_from_slice(b"PM");
    });
    assert!(layout.remarks[0].contains("Apple"), "{:?}", layout.remarks);
    let layout = lab.changed(|bytes| bytes[512..516].copy_from_slice(&0x8256_4557_u32.to_le_bytes()));
    assert!(layout.remarks[0].contains("BSD"), "{:?}", layout.remarks);
}

#[test]
fn the_comparison_notices_what_changes() {
    let lab = Lab::table(64 * MIB, "label: dos\nsize=10M\n");
    let judged = judged(&lab.disk());
    assert_eq!(shown(&lab.layout().partitions), judged);
    for place in [440, 446 + 8, 446 + 13] {
        assert_ne!(shown(&lab.changed(|bytes| bytes[place] ^= 1).partitions), judged, "{place}");
    }
}
