//! Containers made here, byte for byte: read, damaged and changed at random.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guest::content::{DetectedVolume, VolumeContent};
use crate::guest::volumes::{VolumeLayout, assemble};
use crate::guest::{Source, content};

use super::hash::Hash;
use super::*;

/// Where the only key slot and the data of the containers are.
const SLOT_AT: usize = 0x8000;
const DATA_AT: usize = 0x10000;
const KEY: [u8; 64] = *b"a volume key of sixty-four bytes, which nobody else has........!";
const STRIPES: usize = 7;

/// A split key as cryptsetup stores it, not encrypted.
fn split(hash: Hash) -> Vec<u8> {
    let mut split: Vec<u8> = (0..KEY.len() * STRIPES).map(|at| (at * 31 % 253) as u8).collect();
    let last = KEY.len() * (STRIPES - 1);
    let others = hash.merge(&[&split[..last], &[0; 64]].concat(), KEY.len());
    split[last..].iter_mut().zip(KEY.iter().zip(&*others)).for_each(|(to, (key, other))| *to = key ^ other);
    split
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let is_there = digit <= group.len();
            let value = DIGITS[(bits >> (18 - 6 * digit) & 63) as usize];
            text.push(if is_there { char::from(value) } else { '=' });
        }
    }
    text
}

fn json(data: &str) -> String {
    let digest = Hash::Sha256.pbkdf2(&KEY, b"other salt", 3, 32);
    let slot = format!(
        "\"0\":{{\"type\":\"luks2\",\"key_size\":64,\"af\":{{\"type\":\"luks1\",\"stripes\":{STRIPES},\
         \"hash\":\"sha256\"}},\"area\":{{\"type\":\"raw\",\"offset\":\"{SLOT_AT}\",\"size\":\"4096\",\
         \"encryption\":\"cipher_null-ecb\",\"key_size\":32}},\"kdf\":{{\"type\":\"pbkdf2\",\
         \"hash\":\"sha256\",\
         \"iterations\":2,\"salt\":\"{}\"}}}}",
        base64(b"salt")
    );
    format!(
        "{{\"keyslots\":{{{slot}}},\"tokens\":{{}},\"segments\":{{{data}}},\"digests\":{{\"0\":{{\
         \"type\":\"pbkdf2\",\"keyslots\":[\"0\"],\"segments\":[\"0\"],\"hash\":\"sha256\",\"iterations\":3,\
         \"salt\":\"{}\",\"digest\":\"{}\"}}}},\
         \"config\":{{\"json_size\":\"12288\",\"keyslots_size\":\"4096\"}}}}",
        base64(b"other salt"),
        base64(&digest)
    )
}

/// The data segment of an ordinary container.
fn segment() -> String {
    format!(
        "\"0\":{{\"type\":\"crypt\",\"offset\":\"{DATA_AT}\",\"size\":\"dynamic\",\"iv_tweak\":\"0\",\
         \"encryption\":\"cipher_null-ecb\",\"sector_size\":512}}"
    )
}

/// A copy of the header of LUKS2.
fn copy(at: usize, sequence: u64, json: &str) -> Vec<u8> {
    let mut bytes = vec![0; 0x4000];
    let magic = if at == 0 { b"LUKS\xba\xbe" } else { b"SKUL\xba\xbe" };
    bytes[..6].copy_from_slice(magic);
    bytes[6..8].copy_from_slice(&2_u16.to_be_bytes());
    bytes[8..16].copy_from_slice(&0x4000_u64.to_be_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_be_bytes());
    bytes[72..78].copy_from_slice(b"sha256");
    bytes[168..172].copy_from_slice(b"1234");
    bytes[256..264].copy_from_slice(&(at as u64).to_be_bytes());
    bytes[4096..4096 + json.len()].copy_from_slice(json.as_bytes());
    sum(&mut bytes);
    bytes
}

/// Puts the right checksum into a copy.
fn sum(bytes: &mut [u8]) {
    bytes[448..512].fill(0);
    let sum = Hash::Sha256.of(&[bytes]);
    bytes[448..480].copy_from_slice(&sum);
}

/// A container of LUKS2: the two copies, the key slot, and 64 KiB of data.
fn luks2(first: &[u8], second: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; DATA_AT];
    bytes[..first.len()].copy_from_slice(first);
    bytes[0x4000..0x4000 + second.len()].copy_from_slice(second);
    let split = split(Hash::Sha256);
    bytes[SLOT_AT..SLOT_AT + split.len()].copy_from_slice(&split);
    bytes.extend((0..1 << 16).map(|at: u32| (at / 512) as u8));
    bytes
}

fn usual() -> Vec<u8> {
    let json = json(&segment());
    luks2(&copy(0, 5, &json), &copy(0x4000, 5, &json))
}

/// A container of LUKS1 with its only key slot.
fn luks1() -> Vec<u8> {
    let mut bytes = vec![0; DATA_AT];
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    bytes[8..19].copy_from_slice(b"cipher_null");
    bytes[40..43].copy_from_slice(b"ecb");
    bytes[72..76].copy_from_slice(b"sha1");
    bytes[104..108].copy_from_slice(&((DATA_AT / 512) as u32).to_be_bytes());
    bytes[108..112].copy_from_slice(&64_u32.to_be_bytes());
    let digest = Hash::Sha1.pbkdf2(&KEY, &[7; 32], 3, 20);
    bytes[112..132].copy_from_slice(&digest);
    bytes[132..164].fill(7);
    bytes[164..168].copy_from_slice(&3_u32.to_be_bytes());
    bytes[168..172].copy_from_slice(b"1234");
    let slot = &mut bytes[208 + 48 * 3..][..48];
    slot[..4].copy_from_slice(&0x00ac_71f3_u32.to_be_bytes());
    slot[4..8].copy_from_slice(&2_u32.to_be_bytes());
    slot[40..44].copy_from_slice(&((SLOT_AT / 512) as u32).to_be_bytes());
    slot[44..48].copy_from_slice(&(STRIPES as u32).to_be_bytes());
    let split = split(Hash::Sha1);
    bytes[SLOT_AT..SLOT_AT + split.len()].copy_from_slice(&split);
    bytes.extend((0..1 << 16).map(|at: u32| (at / 512) as u8));
    bytes
}

/// The layout of a disk that is such a container, opened with a secret as the daemon does it, and the bytes
/// of its last volume.
fn opened(container: Vec<u8>) -> (VolumeLayout, Vec<u8>) {
    let disks: [Arc<dyn Source>; 1] = [Arc::new(container)];
    let mut keys = ContainerKeys::default();
    let first = assemble(&disks, Some(&KnownKeys(&keys))).layout;
    if let [locked] = &first.locked[..] {
        let attempt = Attempt::new(&keys, locked.id);
        assemble(&disks, Some(&attempt));
        let unlocked = attempt.unlock(&[Secret::from(b"wrong".to_vec()), Secret::from(b"right".to_vec())]);
        keys.0.push((locked.id, unlocked));
    }
    let assembly = assemble(&disks, Some(&KnownKeys(&keys)));
    let source = assembly.source(assembly.layout.volumes.len() - 1);
    let mut bytes = vec![0; source.size().min(1 << 20) as usize];
    let read = source.read_at(0, &mut bytes);
    if read.is_err() {
        bytes.clear();
    }
    (assembly.layout, bytes)
}

fn problem(container: Vec<u8>) -> String {
    let (layout, _) = opened(container);
    assert_eq!(layout.volumes.len(), 1, "{layout:?}");
    layout.volumes[0].problem.clone().expect("a problem")
}

fn assert_opens(container: Vec<u8>) {
    let (layout, bytes) = opened(container);
    let names: Vec<&str> = layout.volumes.iter().map(|volume| &*volume.name).collect();
    assert_eq!(names, ["disk", "luks-1234"], "{layout:?}");
    assert!(bytes.len() == 1 << 16 && bytes.iter().zip(0_u32..).all(|(byte, at)| *byte == (at / 512) as u8));
}

#[test]
fn containers_of_both_versions_are_opened() {
    assert_opens(luks1());
    assert_opens(usual());
}

#[test]
fn the_newer_valid_copy_counts() {
    let (good, other) = (json(&segment()), json(&segment().replace("dynamic", "512")));
    let (old, new) = (copy(0, 5, &other), copy(0x4000, 6, &good));
    assert_opens(luks2(&old, &new));
    let mut damaged = new.clone();
    damaged[5000] ^= 1;
    let (_, bytes) = opened(luks2(&old, &damaged));
    assert_eq!(bytes.len(), 512, "the older one is whole");
    // Of the first copy, nothing is left at all.
    assert_opens(luks2(&[0; 4096], &new));
    let mut first = old.clone();
    first[5000] ^= 1;
    let fact = "it is encrypted (crypto_LUKS); both copies of its header are damaged";
    assert_eq!(problem(luks2(&first, &damaged)), fact);
}

#[test]
fn what_is_not_supported_is_named() {
    let with = |from: &str, to: &str| {
        let json = json(&segment());
        assert!(json.contains(from), "{from}");
        let json = json.replacen(from, to, 1);
        problem(luks2(&copy(0, 5, &json), &copy(0x4000, 5, &json)))
    };
    for (from, to, fact) in [
        ("\"sector_size\":512", "\"sector_size\":513", "an impossible size of 513 bytes"),
        ("\"sector_size\":512", "\"sector_size\":512,\"integrity\":{\"type\":\"hmac(sha256)\"}", "integrity"),
        ("\"sector_size\":512", "\"sector_size\":512,\"flags\":[\"in-reencryption\"]", "re-encryption"),
        ("\"type\":\"crypt\"", "\"type\":\"hw-opal\"", "of the kind \"hw-opal\""),
        ("\"offset\":\"65536\"", "\"offset\":\"0\"", "its header is detached"),
        ("\"offset\":\"65536\"", "\"offset\":\"99999999999\"", "ends beyond the volume"),
        ("\"offset\":\"65536\"", "\"offset\":\"99999999999999999999999\"", "a number of its header"),
        ("\"json_size\"", "\"requirements\":{\"mandatory\":[\"new\"]},\"json_size\"", "it requires \"new\""),
        ("\"type\":\"pbkdf2\",\"hash\"", "\"type\":\"scrypt\",\"hash\"", "its key derivation \"scrypt\""),
        ("\"iterations\":2", "\"iterations\":400000000", "PBKDF2 with 400000000 rounds"),
        ("\"iterations\":3", "\"iterations\":0", "PBKDF2 with 0 rounds"),
        (
            "\"type\":\"pbkdf2\",\"hash\"",
            "\"type\":\"argon2id\",\"time\":9,\"memory\":9999999,\"cpus\":1,\"hash\"",
            "Argon2 with 9 rounds over 9999999 KiB",
        ),
        (
            "\"type\":\"pbkdf2\",\"hash\"",
            "\"type\":\"argon2i\",\"time\":4000000000,\"memory\":99999,\"cpus\":4,\"hash\"",
            "Argon2 with 4000000000 rounds",
        ),
        ("\"stripes\":7", "\"stripes\":70000000", "larger than its area"),
        ("\"key_size\":64", "\"key_size\":0", "a key of an impossible length"),
        ("\"keyslots\":[\"0\"]", "\"keyslots\":[]", "it has no key slot in use"),
        ("\"segments\":[\"0\"]", "\"segments\":[]", "no digest for the key"),
        ("\"encryption\":\"cipher_null-ecb\",\"sector", "\"encryption\":\"aes-wide\",\"sector", "\"wide\""),
    ] {
        let said = with(from, to);
        assert!(said.starts_with("it is encrypted (crypto_LUKS); ") && said.contains(fact), "{to}: {said}");
    }
    let mut wrong = usual();
    wrong[SLOT_AT] ^= 1;
    assert_eq!(problem(wrong), "it is encrypted (crypto_LUKS); no given key fits");
    let mut detached = luks1();
    detached[104..108].fill(0);
    assert!(problem(detached).contains("its header is detached"));
}

#[test]
fn segments_with_and_without_encryption_follow_each_other() {
    let mut data = String::new();
    for (number, kind, at, len) in [(10, "linear", 65536 + 1024, "dynamic"), (2, "crypt", 65536 + 512, "512")]
    {
        let sector = "\"iv_tweak\":\"8\",\"encryption\":\"cipher_null-ecb\",\"sector_size\":512";
        let _ = write!(
            data,
            "\"{number}\":{{\"type\":\"{kind}\",\"offset\":\"{at}\",\"size\":\"{len}\",{sector}}},"
        );
    }
    data += "\"11\":{\"type\":\"linear\",\"offset\":\"65536\",\"size\":\"512\",\"flags\":[\"backup-final\"]}";
    let json = json(&data).replace("\"segments\":[\"0\"]", "\"segments\":[\"2\"]");
    let (layout, bytes) = opened(luks2(&copy(0, 5, &json), &copy(0x4000, 5, &json)));
    assert_eq!(layout.volumes[1].size, (1 << 16) - 512);
    assert!(bytes.iter().zip(512_u32..).all(|(byte, at)| *byte == (at / 512) as u8));
}

#[test]
fn an_unbound_slot_is_not_tried() {
    let unbound = json(&segment()).replace("\"keyslots\":[\"0\"]", "\"keyslots\":[\"1\"]");
    let fact = "it is encrypted (crypto_LUKS); it has no key slot in use";
    assert_eq!(problem(luks2(&copy(0, 5, &unbound), &copy(0x4000, 5, &unbound))), fact);
}

/// A generator of pseudo-random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}

#[test]
fn changed_headers_get_an_answer_in_a_bounded_time() {
    let mut random = Random(4711);
    let numbers = ["0", "-1", "1", "4294967295", "99999999999", "18446744073709551615", "\"\"", "null", "[]"];
    let (json, plain) = (json(&segment()), luks1());
    let mut slowest = Duration::ZERO;
    let rounds = if std::env::var_os("CHAINFS_LONG").is_some() { 20_000 } else { 600 };
    for round in 0..rounds {
        let container = if round % 3 == 0 {
            let mut bytes = plain.clone();
            for _ in 0..=random.below(6) {
                let at = random.below(592);
                bytes[at] = [0, 1, 0x7f, 0xff, random.below(256) as u8][random.below(5)];
            }
            // Many rounds are allowed, and take their time.
            bytes[164..167].fill(0);
            (0..8).for_each(|slot| bytes[208 + 48 * slot + 4..][..3].fill(0));
            bytes
        } else {
            let mut text = json.clone();
            for _ in 0..=random.below(4) {
                let digits: Vec<usize> = text
                    .bytes()
                    .enumerate()
                    .filter(|(_, byte)| byte.is_ascii_digit())
                    .map(|(at, _)| at)
                    .collect();
                if round % 3 == 1 && !digits.is_empty() {
                    let at = digits[random.below(digits.len())];
                    text.replace_range(at..=at, numbers[random.below(numbers.len())]);
                } else if !text.is_empty() {
                    let at = random.below(text.len());
                    let byte = char::from(b' ' + random.below(95) as u8);
                    text.replace_range(at..=at, &byte.to_string());
                }
            }
            text.truncate(12000);
            let mut first = copy(0, 5, &text);
            for _ in 0..random.below(3) {
                let at = random.below(512);
                first[at] = random.below(256) as u8;
            }
            if random.below(4) > 0 {
                sum(&mut first);
            }
            luks2(&first, &copy(0x4000, random.below(9) as u64, &text))
        };
        let started = Instant::now();
        let _ = opened(container);
        slowest = slowest.max(started.elapsed());
    }
    assert!(slowest < Duration::from_mins(1), "{slowest:?}");
}

#[test]
fn json_of_any_shape_is_bounded() {
    let deep = "[".repeat(11_000);
    let slots: Vec<String> = (0..1000).map(|number| format!("\"{number}\":1")).collect();
    let many = format!("{{\"keyslots\":{{{}}}}}", slots.join(","));
    for text in
        [deep.as_str(), &many, "", "{}", "null", "\u{0}", "{\"keyslots\":{},\"segments\":{},\"digests\":{}}"]
    {
        let said = problem(luks2(&copy(0, 5, text), &copy(0x4000, 5, text)));
        assert!(said.contains("its header is not valid"), "{said}");
    }
    let empty = "{\"keyslots\":{},\"segments\":{},\"digests\":{},\"config\":{}}";
    let said = problem(luks2(&copy(0, 5, empty), &copy(0x4000, 5, empty)));
    assert!(said.contains("names no data"), "{said}");
}

#[test]
fn a_header_is_detected_by_its_second_copy_only_if_nothing_else_is_there() {
    let json = json(&segment());
    let mut bytes = luks2(&[0; 4096], &copy(0x4000, 5, &json));
    let found = |bytes: &Vec<u8>| {
        let DetectedVolume { content, uuid, .. } = content::probe(bytes);
        (content, uuid)
    };
    assert_eq!(found(&bytes), (VolumeContent::Luks2, Some("1234".to_owned())));
    bytes[..4].copy_from_slice(b"XFSB");
    assert_eq!(found(&bytes).0, VolumeContent::Xfs);
}
