//! md members written from the format's description: what mdadm and this machine's kernel cannot make, such
//! as metadata of the other byte order, and what is refused. `kernel` compares whole arrays.

use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::content::{VolumeContent, probe};
use chainfs::guest::volumes::{SetKind, assemble, set_members};

use super::{names, volume};
use support::*;

/// What a member of the model says. All of its arrays have chunks of 4 KiB.
#[derive(Clone, Copy)]
pub(crate) struct Says {
    /// Bytes of each member.
    pub(crate) used: usize,
    pub(crate) level: i32,
    pub(crate) layout: u32,
    pub(crate) members: u32,
    pub(crate) number: u32,
    pub(crate) events: u64,
    pub(crate) features: u32,
    /// The roles of devices 0 to 3.
    pub(crate) roles: [u16; 4],
}

const CHUNK: usize = 4096;
const USED: usize = 64 << 10;

impl Says {
    pub(crate) fn new(level: i32, members: u32, number: u32) -> Self {
        Self { used: USED, level, layout: 2, members, number, events: 7, features: 0, roles: [0, 1, 2, 3] }
    }

    /// A disk with version 1.2 metadata and these data.
    pub(crate) fn disk(&self, data: &[u8]) -> Vec<u8> {
        const BEGIN: usize = 16 << 10;
        let mut disk = vec![0; BEGIN + self.used + 4096];
        disk[BEGIN..BEGIN + data.len()].copy_from_slice(data);
        let block = &mut disk[4096..4096 + 264];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &0xa92b_4efc_u32.to_le_bytes());
        put(4, &1u32.to_le_bytes());
        put(8, &self.features.to_le_bytes());
        put(16, &[9; 16]);
        put(32, b"host:data");
        put(72, &self.level.to_le_bytes());
        put(76, &self.layout.to_le_bytes());
        put(80, &(self.used as u64 / 512).to_le_bytes());
        put(88, &(CHUNK as u32 / 512).to_le_bytes());
        put(92, &self.members.to_le_bytes());
        put(128, &(BEGIN as u64 / 512).to_le_bytes());
        put(136, &(self.used as u64 / 512).to_le_bytes());
        put(144, &8u64.to_le_bytes());
        put(160, &self.number.to_le_bytes());
        put(168, &[self.number as u8 + 1; 16]);
        put(200, &self.events.to_le_bytes());
        put(208, &u64::MAX.to_le_bytes());
        put(220, &4u32.to_le_bytes());
        for (index, role) in self.roles.iter().enumerate() {
            put(256 + 2 * index, &role.to_le_bytes());
        }
        seal(&mut disk);
        disk
    }

    /// A disk with version 0.90 metadata of a machine of the other byte order.
    fn big_endian_disk(&self, data: &[u8]) -> Vec<u8> {
        let mut words = vec![0u32; 1024];
        let plain: [(usize, u32); 13] = [
            (0, 0xa92b_4efc),
            (2, 90),
            (5, 0x0102_0304),
            (7, self.level.cast_unsigned()),
            (8, USED as u32 / 1024),
            (10, self.members),
            (11, 5),
            (13, 0x0506_0708),
            (33, 1),
            (39, 0),
            (40, self.events as u32),
            (64, self.layout),
            (65, CHUNK as u32),
        ];
        for (at, word) in plain {
            words[at] = word;
        }
        for number in 0..self.members as usize {
            let descriptor = [number as u32, 8, 0, self.roles[number].into(), 0b110];
            words[128 + 32 * number..][..5].copy_from_slice(&descriptor);
        }
        words[992] = self.number;
        let sum: u64 = words.iter().map(|word| u64::from(*word)).sum();
        words[38] = (sum as u32).wrapping_add((sum >> 32) as u32);
        let mut disk = data.to_vec();
        disk.resize(USED, 0);
        disk.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        disk.resize(USED + 0x1_0000, 0);
        disk
    }
}

/// Gives a version 1.2 superblock its checksum.
pub(super) fn seal(disk: &mut [u8]) {
    let Some(block) = disk.get_mut(4096..8192) else { return };
    block[216..220].fill(0);
    let count = u32::from_le_bytes([block[220], block[221], block[222], block[223]]) as usize;
    let len = (256 + 2 * count).min(block.len());
    let sum: u64 = block[..len]
        .chunks(4)
        .map(|word| word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        .sum();
    let sum = (sum as u32).wrapping_add((sum >> 32) as u32);
    block[216..220].copy_from_slice(&sum.to_le_bytes());
}

/// The members' data of a RAID 5 in the default layout: parity moves left from the last member, and the data
/// begin behind it.
pub(crate) fn left_symmetric(all: &[u8], members: usize) -> Vec<Vec<u8>> {
    let mut data = vec![Vec::new(); members];
    for (row, bytes) in all.chunks(CHUNK * (members - 1)).enumerate() {
        let parity = members - 1 - row % members;
        let mut sum = vec![0; CHUNK];
        for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
            sum.iter_mut().zip(chunk).for_each(|(sum, byte)| *sum ^= byte);
            data[(parity + 1 + index) % members].extend_from_slice(chunk);
        }
        data[parity].extend(sum);
    }
    data
}

fn sources(disks: impl IntoIterator<Item = Vec<u8>>) -> Vec<Arc<dyn Source>> {
    disks.into_iter().map(|disk| Arc::new(disk) as Arc<dyn Source>).collect()
}

fn read(disks: &[Arc<dyn Source>], name: &str) -> Vec<u8> {
    let assembly = assemble(disks, None);
    let found = volume(&assembly.layout, name);
    assert!(!found.segments.is_empty(), "{:?}", found.problem);
    let mut bytes = vec![0; found.size as usize];
    let index = assembly.layout.volumes.iter().position(|volume| volume.name == name).unwrap();
    assembly.source(index).read_at(0, &mut bytes).unwrap();
    bytes
}

fn problem(disks: Vec<Vec<u8>>) -> String {
    let layout = assemble(&sources(disks), None).layout;
    volume(&layout, "md-data").problem.clone().expect("a problem")
}

#[test]
fn metadata_of_the_other_byte_order_are_read() {
    let all = Rng::new(4).bytes(2 * USED as u64);
    let data = left_symmetric(&all, 3);
    let disk = |number: usize| Says::new(5, 3, number as u32).big_endian_disk(&data[number]);
    assert_eq!(probe(&disk(0)).content, VolumeContent::MdRaid);
    for order in [&[0, 1, 2][..], &[2, 0], &[1, 2], &[1, 0]] {
        let disks = sources(order.iter().map(|number| disk(*number)));
        assert!(read(&disks, "md5") == all, "{order:?}");
    }
}

#[test]
fn stale_and_faulty_members_are_never_used() {
    let all = Rng::new(5).bytes(2 * USED as u64);
    let data = left_symmetric(&all, 3);
    let says = |number: usize| Says::new(5, 3, number as u32);
    let junk = vec![0xee; USED];
    let good = |number: usize| says(number).disk(&data[number]);
    // One change behind is in order; two are not.
    let behind = Says { events: 6, ..says(1) }.disk(&data[1]);
    assert!(read(&sources([good(0), behind, good(2)]), "md-data") == all);
    let stale = Says { events: 5, ..says(1) }.disk(&junk);
    let layout = |disks: &[Arc<dyn Source>]| assemble(disks, None).layout;
    let disks = sources([good(0), stale.clone(), good(2)]);
    assert!(read(&disks, "md-data") == all);
    let said = layout(&disks).remarks.join("\n");
    assert!(said.contains("disk 1 is not used: its state is 5") && said.contains("degraded"), "{said}");
    // The others say that it failed; it does not know.
    let faulty = |number: usize| Says { roles: [0, 0xfffe, 2, 3], ..says(number) }.disk(&data[number]);
    let failed = Says { events: 6, ..says(1) }.disk(&junk);
    assert!(read(&sources([faulty(0), failed, faulty(2)]), "md-data") == all);
    // Being rebuilt: the data behind the mark are old.
    let mut rebuilt = Says { features: 2, ..says(1) }.disk(&junk);
    rebuilt[4096 + 152..4096 + 160].copy_from_slice(&16u64.to_le_bytes());
    seal(&mut rebuilt);
    let disks = sources([good(0), rebuilt, good(2)]);
    assert!(read(&disks, "md-data") == all);
    assert!(layout(&disks).remarks.iter().any(|remark| remark.contains("being rebuilt")));
    // A damaged superblock is none.
    let mut damaged = good(1);
    damaged[4096 + 80] ^= 1;
    let disks = sources([good(0), damaged, good(2)]);
    assert!(read(&disks, "md-data") == all);
    assert!(problem(vec![good(0), stale]).contains("2 of its 3 members"));
}

#[test]
fn what_is_not_supported_is_refused_aloud() {
    let data = vec![1; USED];
    let member = |features: u32, level: i32| {
        let says = |number| Says { features, ..Says::new(level, 2, number) };
        vec![says(0).disk(&data), says(1).disk(&data)]
    };
    assert!(problem(member(4, 5)).contains("shape is being changed"));
    assert!(problem(member(0x200, 5)).contains("journal"));
    assert!(problem(member(0, -4)).contains("level -4 is not supported"));
    let odd = Says { layout: 77, ..Says::new(5, 2, 0) };
    let other = Says { number: 1, ..odd };
    assert!(problem(vec![odd.disk(&data), other.disk(&data)]).contains("layout 77 is unknown"));
}

#[test]
fn members_identify_the_other_disks_of_an_array() {
    let data = vec![1; USED];
    let disk = |number| Arc::new(Says::new(1, 2, number).disk(&data)) as Arc<dyn Source>;
    let found = set_members(&disk(1));
    let id = "09090909-0909-0909-0909-090909090909";
    assert_eq!((found.len(), &*found[0].id), (1, &*format!("{id}:1")));
    assert_eq!((found[0].set.as_deref(), found[0].state), (Some(id), Some(7)));
    let layout = assemble(&[disk(0)], None).layout;
    assert_eq!(names(&layout), ["disk", "md-data"]);
    let missing = &layout.missing[0];
    assert_eq!((missing.kind, &*missing.id, &missing.absent), (SetKind::Array, id, &vec![format!("{id}:1")]));
}

/// A member of an array whose other member is missing. Nearly all of its bytes are metadata.
pub(super) fn sample() -> Vec<u8> {
    Says::new(5, 2, 1).disk(&[7; 16])
}

#[test]
fn arrays_on_each_other_end() {
    // A mirror inside of its own data, as deep as it fits, with other identities.
    let mut inner = vec![3; 4096];
    for depth in 0..40u8 {
        let mut disk = Says::new(1, 1, 0).disk(&inner[..inner.len().min(USED)]);
        disk[4096 + 16..4096 + 32].fill(depth + 1);
        seal(&mut disk);
        inner = disk;
    }
    let layout = assemble(&sources([inner]), None).layout;
    assert!(layout.volumes.len() <= 12, "{:?}", names(&layout));
}
