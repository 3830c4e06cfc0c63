//! The superblock of an md member: metadata 0.90 of either byte order at the end, 1.0 at the end, 1.1 at the
//! beginning, 1.2 behind the first 4 KiB.
//!
//! Promise: a superblock that exists has a valid checksum, lies where it says, and its lengths do not
//! overflow. What an array needs beyond that is judged in `array`.

use crate::guest::Source;
use crate::guest::bytes::{array, le16, le32, le64, slice, text, uuid};

const MAGIC: u32 = 0xa92b_4efc;
const SECTOR: u64 = 512;
/// Bytes of a 0.90 superblock.
const OLD_LEN: usize = 4096;
/// Bytes of a version 1 superblock without its table of roles.
const HEAD_LEN: usize = 256;
/// Entries of the table of roles that fit into the space the kernel reserves.
const ROLES_LIMIT: u32 = (4096 - HEAD_LEN as u32) / 2;
/// Members of an array with 0.90 metadata.
const OLD_MEMBERS: usize = 27;

/// The part that a device has in an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// An active member with this number.
    Active(u32),
    Spare,
    Faulty,
    /// It has the journal of a RAID 5.
    Journal,
}

/// What a member says of itself and its array.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent features of the format")]
pub(super) struct Superblock {
    /// The array's identity, as blkid(8) writes it.
    pub(super) uuid: String,
    /// The array's name, without the host's; of 0.90 the device's number.
    pub(super) name: Option<String>,
    /// RAID level: 0, 1, 4, 5, 6, 10; -1 is linear.
    pub(super) level: i32,
    pub(super) layout: u32,
    /// For RAID 0 of members of several lengths: whether `layout` says how they are used.
    pub(super) has_layout: bool,
    /// Bytes; 0 where the level has none.
    pub(super) chunk_len: u64,
    pub(super) members: u32,
    /// Bytes of each member that the array uses; 0 if that is a member's own affair.
    pub(super) member_len: u64,
    /// Where the member's data begin, and their room.
    pub(super) data_offset: u64,
    pub(super) data_len: u64,
    /// This device's number in the tables of roles.
    pub(super) number: u32,
    /// The sequence number; it grows with every change of the array.
    pub(super) events: u64,
    /// The roles of all devices, by number.
    pub(super) roles: Vec<Role>,
    /// Bytes of the member that are rebuilt already, if it is being rebuilt.
    pub(super) recovered: Option<u64>,
    /// It replaces a member that is still active.
    pub(super) is_replacement: bool,
    /// The array was not stopped, or is being synchronised: parity and copies may differ.
    pub(super) is_dirty: bool,
    /// The array's shape is being changed.
    pub(super) is_reshaping: bool,
    /// Writes are in a journal of their own device first.
    pub(super) has_journal: bool,
    /// Some of its blocks cannot be read, and are recorded.
    pub(super) has_bad_blocks: bool,
}

impl Superblock {
    /// The role of a device by this superblock's table.
    pub(super) fn role_of(&self, number: u32) -> Role {
        self.roles.get(number as usize).copied().unwrap_or(Role::Spare)
    }

    /// The superblock of a device, if it has a valid one; an error if it has a damaged one.
    pub(super) fn find(device: &dyn Source) -> Option<Result<Self, String>> {
        let size = device.size();
        let late = (size / SECTOR).checked_sub(16).map(|sectors| (sectors & !7) * SECTOR);
        // Versions 1.1, 1.2 and 1.0.
        for at in [Some(0), Some(4096), late].into_iter().flatten() {
            let mut head = [0; HEAD_LEN];
            // The offset stated in the superblock decides: the start of one array may be the end of another.
            if device.read_at(at, &mut head).is_ok()
                && le32(&head, 0) == MAGIC
                && le32(&head, 4) == 1
                && le64(&head, 144).checked_mul(SECTOR) == Some(at)
            {
                return Some(Self::new(device, at, &head));
            }
        }
        let at = (size & !0xffff).checked_sub(0x1_0000)?;
        let mut block = vec![0; OLD_LEN];
        device.read_at(at, &mut block).ok()?;
        let is_little = le32(&block, 0) == MAGIC;
        if !is_little && le32(&block, 0).swap_bytes() != MAGIC {
            return None;
        }
        let word = |bytes: &[u8]| {
            let word = le32(bytes, 0);
            if is_little { word } else { word.swap_bytes() }
        };
        let words: Vec<u32> = block.chunks_exact(4).map(word).collect();
        (words[1] == 0).then(|| Self::old(&words, at, is_little))
    }

    /// Version 1. Fields are those of `mdp_superblock_1`.
    fn new(device: &dyn Source, at: u64, head: &[u8; HEAD_LEN]) -> Result<Self, String> {
        let features = le32(head, 8);
        let has = |feature: u32| features & feature != 0;
        let role_count = le32(head, 220);
        if role_count > ROLES_LIMIT {
            return Err("its superblock has too many roles".to_owned());
        }
        let mut roles = vec![0; role_count as usize * 2];
        let read = device.read_at(at + HEAD_LEN as u64, &mut roles);
        read.map_err(|_| "its superblock cannot be read".to_owned())?;
        let mut all = head.to_vec();
        all[216..220].fill(0);
        all.extend_from_slice(&roles);
        let sum = all.chunks(4).fold(0u64, |sum, word| {
            sum + u64::from(if word.len() == 2 { le16(word, 0).into() } else { le32(word, 0) })
        });
        if ((sum as u32).wrapping_add((sum >> 32) as u32)) != le32(head, 216) {
            return Err("its superblock's checksum is wrong".to_owned());
        }
        let bytes = |at: usize| {
            let bytes = le64(head, at).checked_mul(SECTOR).filter(|bytes| i64::try_from(*bytes).is_ok());
            bytes.ok_or("its superblock has an impossible length")
        };
        let role = |entry: &[u8]| match le16(entry, 0) {
            0xffff => Role::Spare,
            0xfffe => Role::Faulty,
            0xfffd => Role::Journal,
            number => Role::Active(number.into()),
        };
        let full_name = text(slice(head, 32, 32));
        // The name is `HOST:NAME`, of an array of this host.
        let name =
            full_name.map(|name| name.split_once(':').map_or(name.clone(), |(_, name)| name.to_owned()));
        Ok(Self {
            uuid: uuid(array(head, 16)).ok_or("its array has no identity")?,
            name: name.filter(|name| !name.is_empty()),
            level: le32(head, 72).cast_signed(),
            layout: le32(head, 76),
            has_layout: has(0x1000),
            chunk_len: u64::from(le32(head, 88)) * SECTOR,
            members: le32(head, 92),
            member_len: bytes(80)?,
            data_offset: bytes(128)?,
            data_len: bytes(136)?,
            number: le32(head, 160),
            events: le64(head, 200),
            roles: roles.chunks_exact(2).map(role).collect(),
            recovered: if has(2) { Some(bytes(152)?) } else { None },
            is_replacement: has(0x10),
            is_dirty: le64(head, 208) != u64::MAX,
            is_reshaping: has(4),
            has_journal: has(0x200),
            has_bad_blocks: has(8) && Self::has_bad_blocks(device, at, head),
        })
    }

    /// Whether the log of bad blocks has an entry.
    fn has_bad_blocks(device: &dyn Source, at: u64, head: &[u8]) -> bool {
        let offset = i64::from(le32(head, 188).cast_signed()).saturating_mul(SECTOR.cast_signed());
        let mut first = [0; 8];
        let is_read = at.checked_add_signed(offset).is_some_and(|at| device.read_at(at, &mut first).is_ok());
        is_read && first != [0xff; 8] && first != [0; 8]
    }

    /// Version 0.90, as words in the machine's own byte order. Fields are those of `mdp_super_t`.
    fn old(words: &[u32], at: u64, is_little: bool) -> Result<Self, String> {
        const SUM: usize = 38;
        let sum = words.iter().enumerate().filter(|(index, _)| *index != SUM);
        let sum: u64 = sum.map(|(_, word)| u64::from(*word)).sum();
        if (sum as u32).wrapping_add((sum >> 32) as u32) != words[SUM] {
            return Err("its superblock's checksum is wrong".to_owned());
        }
        // The order of the two halves of 64 bits is the machine's, too.
        let wide = |at: usize| {
            let (low, high) = if is_little { (words[at], words[at + 1]) } else { (words[at + 1], words[at]) };
            u64::from(high) << 32 | u64::from(low)
        };
        let mut id = [0; 16];
        for (to, from) in id.chunks_exact_mut(4).zip([5, 13, 14, 15]) {
            to.copy_from_slice(&words[from].to_be_bytes());
        }
        // The descriptors of devices: number, major, minor, role, state.
        let role = |number: usize| {
            let descriptor = &words[128 + number * 32..][..5];
            match (descriptor[4] & 1 != 0, descriptor[4] & 0b110 == 0b110) {
                (true, _) => Role::Faulty,
                (false, true) => Role::Active(descriptor[3]),
                (false, false) => Role::Spare,
            }
        };
        Ok(Self {
            uuid: uuid(id).ok_or("its array has no identity")?,
            name: Some(words[11].to_string()),
            level: words[7].cast_signed(),
            layout: words[64],
            has_layout: false,
            chunk_len: words[65].into(),
            members: words[10],
            member_len: u64::from(words[8]) * 1024,
            data_offset: 0,
            data_len: at,
            number: words[992],
            events: wide(39),
            roles: (0..OLD_MEMBERS).map(role).collect(),
            recovered: None,
            is_replacement: false,
            is_dirty: words[33] & 1 == 0,
            is_reshaping: words[2] > 90,
            has_journal: false,
            has_bad_blocks: false,
        })
    }
}
