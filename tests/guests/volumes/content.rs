//! The content of volumes, compared with blkid.

use std::fs;
use std::path::Path;

use chainfs::guest::content::{VolumeContent, probe};
use tempfile::TempDir;

use super::blank;
use support::*;

/// A program that makes a format, its arguments, and the format. The volume's name comes last.
type Make = (&'static str, &'static [&'static str], VolumeContent);

const MAKES: [Make; 30] = [
    ("mke2fs", &["-q", "-t", "ext2", "-L", "a label"], VolumeContent::Ext2),
    ("mke2fs", &["-q", "-t", "ext3", "-L", "sixteen letters!"], VolumeContent::Ext3),
    ("mke2fs", &["-q", "-t", "ext4"], VolumeContent::Ext4),
    ("mke2fs", &["-q", "-t", "ext4", "-O", "^has_journal"], VolumeContent::Ext4),
    ("mke2fs", &["-q", "-O", "journal_dev"], VolumeContent::ExtJournal),
    ("mkfs.vfat", &["-F", "12", "-n", "TWELVE"], VolumeContent::Fat12),
    ("mkfs.vfat", &["-F", "16"], VolumeContent::Fat16),
    ("mkfs.vfat", &["-F", "32", "-n", "thirty two"], VolumeContent::Fat32),
    ("mkfs.vfat", &["-S", "4096", "-n", "LARGE"], VolumeContent::Fat16),
    ("mkfs.xfs", &["-q", "-L", "xfs label"], VolumeContent::Xfs),
    ("mkfs.btrfs", &["-q", "-L", "a btrfs of ours"], VolumeContent::Btrfs),
    ("mkswap", &["-L", "swap label"], VolumeContent::Swap),
    ("mkswap", &["-p", "65536"], VolumeContent::Swap),
    ("mkntfs", &["-q", "-F", "-L", "Windows Ü"], VolumeContent::Ntfs),
    ("mkfs.exfat", &["-L", "exfat ü"], VolumeContent::Exfat),
    ("mkfs.f2fs", &["-q", "-l", "f2fs label"], VolumeContent::F2fs),
    ("mkfs.jfs", &["-q", "-L", "jfs label"], VolumeContent::Jfs),
    ("mkfs.nilfs2", &["-q", "-f", "-L", "nilfs label"], VolumeContent::Nilfs2),
    ("mkfs.gfs2", &["-q", "-O", "-p", "lock_nolock", "-t", "web:shared", "-J", "8"], VolumeContent::Gfs2),
    ("mkfs.ocfs2", &["-q", "-F", "-M", "local", "-L", "shared"], VolumeContent::Ocfs2),
    ("mkudffs", &["--utf8", "--label=udf label"], VolumeContent::Udf),
    ("make-bcache", &["-B"], VolumeContent::Bcache),
    ("make-bcache", &["-C"], VolumeContent::Bcache),
    (
        "cryptsetup",
        &["luksFormat", "-q", "--type=luks1", "--pbkdf-force-iterations=1000"],
        VolumeContent::Luks1,
    ),
    (
        "cryptsetup",
        &[
            "luksFormat",
            "-q",
            "--type=luks2",
            "--pbkdf=pbkdf2",
            "--pbkdf-force-iterations=1000",
            "--label=secret",
        ],
        VolumeContent::Luks2,
    ),
    ("mdadm", &["--metadata=0.90"], VolumeContent::MdRaid),
    ("mdadm", &["--metadata=1.0"], VolumeContent::MdRaid),
    ("mdadm", &["--metadata=1.1"], VolumeContent::MdRaid),
    ("mdadm", &["--metadata=1.2"], VolumeContent::MdRaid),
    ("pvcreate", &["--driverloaded", "n", "-q", "-y"], VolumeContent::LvmPhysicalVolume),
];

/// blkid writes characters that a shell might interpret as `\x20`.
fn unescaped(text: &str) -> String {
    let mut parts = text.split("\\x");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let byte = u8::from_str_radix(&part[..2], 16).expect("two digits");
        text + &char::from(byte).to_string() + &part[2..]
    })
}

/// blkid's result: type, label, UUID.
fn judged(file: &Path) -> [Option<String>; 3] {
    let text = tool("blkid").args(["--probe", "--output", "udev"]).arg(file).succeeds();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map(unescaped)
    };
    [value("ID_FS_TYPE"), value("ID_FS_LABEL_ENC"), value("ID_FS_UUID")]
}

fn assert_judged(file: &Path, content: VolumeContent) {
    let found = probe(&fs::read(file).expect("the volume"));
    assert_eq!(found.content, content);
    let mut judged = judged(file);
    if content == VolumeContent::Udf {
        // Its name and identity take more than is worth the while: they are not read.
        judged[1..].fill(None);
    }
    assert_eq!([Some(found.content.to_string()), found.label, found.uuid], judged, "{content:?}");
}

#[test]
fn detected_content_matches_blkid() {
    for (program, args, content) in MAKES {
        let dir = TempDir::new().expect("a directory");
        let file = dir.path().join("volume");
        let size = match content {
            VolumeContent::Fat12 => 4,
            VolumeContent::Xfs => 320,
            VolumeContent::Btrfs | VolumeContent::Nilfs2 => 136,
            _ => 64,
        };
        blank(&file, size * MIB);
        match program {
            "mdadm" => array_part(&file, args[0]),
            "pvcreate" => super::groups::on_a_device(&file, program, args),
            "cryptsetup" => {
                fs::write(dir.path().join("key"), "key").expect("a key");
                tool(program).args(args).arg("--key-file").arg(dir.path().join("key")).arg(&file).succeeds();
            }
            "make-bcache" => {
                tool(program).args(args).arg(&file).succeeds();
            }
            _ => drop(tool(program).args(args).arg(&file).succeeds()),
        }
        assert_judged(&file, content);
    }
}

/// A member of an array; mdadm makes none without the kernel's help, so it is made from the format's
/// description, and mdadm and blkid identify it.
fn array_part(file: &Path, version: &str) {
    let mut bytes = fs::read(file).expect("the volume");
    let len = bytes.len();
    if version == "--metadata=0.90" {
        let at = len - 0x10000;
        let words: [(usize, u32); 9] = [
            (0, 0xa92b_4efc),
            (4, 0),
            (8, 90),
            (20, 0x1234_5678),
            (28, 1),
            (40, 2),
            (52, 0x9abc_def0),
            (56, 0x1122_3344),
            (60, 0x5566_7788),
        ];
        for (place, word) in words {
            bytes[at + place..at + place + 4].copy_from_slice(&word.to_le_bytes());
        }
        let sum = bytes[at..at + 4096].chunks(4).fold(0u64, |sum, word| {
            sum + u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        });
        let sum = (sum as u32).wrapping_add((sum >> 32) as u32);
        bytes[at + 152..at + 156].copy_from_slice(&sum.to_le_bytes());
    } else {
        let at = match version {
            "--metadata=1.0" => len - 8192,
            "--metadata=1.1" => 0,
            _ => 4096,
        };
        let mut block = vec![0; 256];
        block[..8].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]);
        block[16..32].copy_from_slice(&(1..17).collect::<Vec<u8>>());
        block[32..41].copy_from_slice(b"host:data");
        block[144..152].copy_from_slice(&(at as u64 / 512).to_le_bytes());
        let sum = block.chunks(4).fold(0u64, |sum, word| {
            sum + u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        });
        let sum = (sum as u32).wrapping_add((sum >> 32) as u32);
        block[216..220].copy_from_slice(&sum.to_le_bytes());
        bytes[at..at + 256].copy_from_slice(&block);
    }
    fs::write(file, bytes).expect("the volume");
}

#[test]
fn content_of_image_files_matches_blkid() {
    let dir = TempDir::new().expect("a directory");
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).expect("a directory");
    fs::write(tree.join("file"), "content").expect("a file");
    let image = dir.path().join("image");
    let made = |program: &str, args: &[&str], is_image_first: bool, content: VolumeContent| {
        let _ = fs::remove_file(&image);
        let places = if is_image_first { [&image, &tree] } else { [&tree, &image] };
        match program {
            "mksquashfs" => tool(program).args(places).args(args).succeeds(),
            _ => tool(program).args(args).args(places).succeeds(),
        };
        assert_judged(&image, content);
    };
    made("mksquashfs", &["-quiet", "-no-progress"], false, VolumeContent::Squashfs);
    made("mkfs.erofs", &["--quiet"], true, VolumeContent::Erofs);
    made("mkfs.cramfs", &["-n", "cramfs label"], false, VolumeContent::Cramfs);
    made("genisoimage", &["-quiet", "-V", "ISO label", "-o"], true, VolumeContent::Iso9660);
}

/// Formats without a program here: their signatures, from their descriptions, and blkid's result where it
/// needs no more.
#[test]
fn signatures_are_distinguished() {
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("volume");
    let mut judged_count = 0;
    let place = |at: usize, magic: &[u8]| {
        let mut bytes = vec![0u8; 1 << 20];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    };
    let id: Vec<u8> = (1..17).collect();
    let mut apfs = place(32, b"NXSB");
    apfs[72..88].copy_from_slice(&id);
    let mut bcachefs = place(4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef");
    bcachefs[4096 + 56..4096 + 72].copy_from_slice(&id);
    let mut reiserfs = place(0x10000 + 52, b"ReIsEr2Fs");
    reiserfs[0x10000 + 84..0x10000 + 100].copy_from_slice(&id);
    reiserfs[0x10000 + 100..0x10000 + 105].copy_from_slice(b"label");
    let mut zfs = vec![0u8; 8 << 20];
    for number in 0..8 {
        zfs[(128 << 10) + number * 1024..][..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
    }
    let pool = pool_config(&[(b"name", b"tank"), (b"pool_guid", &[]), (b"state", &[])]);
    zfs[16 << 10..][..pool.len()].copy_from_slice(&pool);
    let mut drbd = vec![0u8; 1 << 20];
    drbd[(1 << 20) - 4096 + 60..][..4].copy_from_slice(&0x8374_026d_u32.to_be_bytes());
    let mut ddf = vec![0u8; 1 << 20];
    ddf[(1 << 20) - 512..][..4].copy_from_slice(&0xde11_de11_u32.to_be_bytes());
    let mut verity = place(0, b"verity\0\0\x01\0\0\0\x01\0\0\0");
    verity[16..32].copy_from_slice(&id);
    let cases = [
        (place(0, b"bluestore block device\n01020304-0506-0708-090a-0b0c0d0e0f10"), VolumeContent::Ceph),
        (place(516, b"!Stra0tis\x86\xff\x02^\x41rh"), VolumeContent::Stratis),
        (drbd, VolumeContent::Drbd),
        (place((1 << 20) - 1024, b"Intel Raid ISM Cfg Sig. 1.0"), VolumeContent::IntelRaid),
        (ddf, VolumeContent::DdfRaid),
        (place(0, b"integrt\0\x01"), VolumeContent::Integrity),
        (verity, VolumeContent::Verity),
        (apfs, VolumeContent::Apfs),
        (bcachefs, VolumeContent::Bcachefs),
        (zfs, VolumeContent::Zfs),
        (reiserfs, VolumeContent::Reiserfs),
        (place(3, b"-FVE-FS-"), VolumeContent::BitLocker),
        (place(0, b"\0\0\0ReFS\0"), VolumeContent::Refs),
        (place(0, b"dmvdo001"), VolumeContent::Vdo),
        (place(1024, b"H+\0\x04"), VolumeContent::HfsPlus),
        (place(4086, b"S1SUSPEND\0"), VolumeContent::Hibernation),
        (place(1024, b"H+\0\x09"), VolumeContent::Unknown),
        (place(1024 + 6, b"\x34\x34"), VolumeContent::Unknown),
    ];
    for (bytes, content) in cases {
        let found = probe(&bytes);
        assert_eq!(found.content, content);
        fs::write(&file, &bytes).expect("the volume");
        let (code, _, _) = tool("blkid").args(["--probe", "--output", "udev"]).arg(&file).outcome();
        if code == 0 {
            judged_count += 1;
            let expected = (content != VolumeContent::Unknown).then(|| content.name().to_owned());
            assert_eq!(judged(&file)[0], expected, "{content:?}");
        }
        let has_id = matches!(
            content,
            VolumeContent::Apfs
                | VolumeContent::Bcachefs
                | VolumeContent::Reiserfs
                | VolumeContent::Ceph
                | VolumeContent::Verity
        );
        if has_id {
            assert_eq!(found.uuid.as_deref(), Some("01020304-0506-0708-090a-0b0c0d0e0f10"), "{content:?}");
        }
        if content == VolumeContent::Zfs {
            let pool = (found.label.as_deref(), found.uuid.as_deref());
            assert_eq!(pool, (Some("tank"), Some("20015998343868")));
        }
    }
    assert!(judged_count >= 5, "blkid has said something of {judged_count} only");
}

/// A pool's configuration: texts, and numbers where the value is empty.
fn pool_config(pairs: &[(&[u8], &[u8])]) -> Vec<u8> {
    let padded = |bytes: &[u8]| {
        let mut out = (bytes.len() as u32).to_be_bytes().to_vec();
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    };
    let mut config = vec![1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    for (name, value) in pairs {
        let mut pair = padded(name);
        let (kind, value) = if value.is_empty() {
            (8u32, 0x1234_5678_9abc_u64.to_be_bytes().to_vec())
        } else {
            (9, padded(value))
        };
        pair.extend([kind.to_be_bytes(), 1u32.to_be_bytes()].concat());
        pair.extend(value);
        let len = (pair.len() + 8) as u32;
        config.extend([len.to_be_bytes(), len.to_be_bytes()].concat());
        config.extend(pair);
    }
    config.extend([0; 8]);
    config
}
