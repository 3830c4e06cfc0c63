//! LUKS containers of every kind that cryptsetup and dm-crypt make, also on arrays and logical volumes, and
//! with volume groups inside. With `tests/run.sh --long`.

use std::sync::Arc;

use chainfs::guest::Source;

use super::{BEFORE, Scenario, bytes_of, judge, sum};
use crate::luks::{CHEAP, PASSPHRASE, SMALL, opened};
use support::*;

const MODULES: [&str; 16] = [
    "md-mod",
    "raid1",
    "raid456",
    "dm-crypt",
    "aesni-intel",
    "xts",
    "cbc",
    "ecb",
    "essiv",
    "serpent_generic",
    "twofish_generic",
    "sha512_generic",
    "rmd160",
    "algif_skcipher",
    "algif_hash",
    "trusted",
];

/// Containers: their names, and words for cryptsetup.
const KINDS: [(&str, &str); 19] = [
    ("old-xts-256", "--type luks1 -c aes-xts-plain64 -s 256 -h sha1"),
    ("old-xts-512", "--type luks1 -c aes-xts-plain64 -s 512 -h sha512"),
    ("old-essiv", "--type luks1 -c aes-cbc-essiv:sha256 -s 256 -h sha256"),
    ("old-plain", "--type luks1 -c aes-cbc-plain -s 128 -h ripemd160"),
    ("old-plain64", "--type luks1 -c aes-cbc-plain64 -s 192 -h sha256"),
    ("old-serpent", "--type luks1 -c serpent-xts-plain64 -s 512 -h sha256"),
    ("old-twofish", "--type luks1 -c twofish-cbc-essiv:sha256 -s 256 -h sha256"),
    ("old-ecb", "--type luks1 -c aes-ecb -s 256 -h sha256"),
    ("new", "--type luks2"),
    ("new-1024", "--type luks2 --sector-size 1024"),
    ("new-2048", "--type luks2 --sector-size 2048 -s 256"),
    ("new-4096", "--type luks2 --sector-size 4096"),
    ("new-offset", "--type luks2 --offset 4096"),
    ("new-essiv", "--type luks2 -c aes-cbc-essiv:sha256 -s 256 --sector-size 4096"),
    ("new-be", "--type luks2 -c aes-xts-plain64be"),
    ("new-serpent", "--type luks2 -c serpent-xts-plain64 --sector-size 4096"),
    ("new-twofish", "--type luks2 -c twofish-xts-plain64"),
    ("new-argon2i", "--type luks2 --pbkdf argon2i --pbkdf-memory 64 --pbkdf-force-iterations 4"),
    ("new-argon2id", "--type luks2 --pbkdf argon2id --pbkdf-memory 96 --pbkdf-force-iterations 5"),
];

/// Shell functions beside those of volume groups: a new container `$1` on a device `$2`, opened.
const FUNCTIONS: &str = "export DM_DISABLE_UDEV=1; mkdir -p /run/cryptsetup\n\
    mknod /dev/urandom c 1 9 2>/dev/null\n\
    crypt() { name=$1 device=$2; shift 2\n\
    try cryptsetup luksFormat -q --use-urandom --disable-locks --key-file /key $* $device\n\
    try cryptsetup open --disable-keyring --disable-locks --key-file /key $device $name; }\n\
    shut() { sync; try cryptsetup close --disable-locks $1; }\n";

fn words(kind: &str) -> String {
    let small = if kind.contains("luks2") { SMALL } else { "" };
    let cheap = if kind.contains("argon2") { "" } else { CHEAP };
    format!("{kind} {small} {cheap}")
}

#[test]
#[ignore = "takes minutes"]
fn encrypted_volumes_are_read_as_by_the_kernel() {
    let mut scenarios: Vec<Scenario> = KINDS
        .iter()
        .map(|(name, kind)| {
            let script = format!(
                "crypt c $P0 {}\nfill /dev/mapper/c\njudge luks /dev/mapper/c\nshut c\n",
                words(kind)
            );
            Scenario { name: (*name).to_owned(), script }
        })
        .collect();
    let mut add = |name: &str, script: String| scenarios.push(Scenario { name: name.to_owned(), script });
    let plain = words("--type luks2");
    let lv = "L lvcreate -n lv -l 100%FREE vg\n";
    let use_lv = "fill /dev/vg/lv\njudge lv /dev/vg/lv\n";
    let end = "L vgchange -an vg\n";
    add("group-inside", format!("crypt c $P0 {plain}\ngroup /dev/mapper/c\n{lv}{use_lv}{end}shut c\n"));
    add(
        "on-a-volume",
        format!(
            "group $P0 $P1\n{lv}crypt c /dev/vg/lv {plain}\nfill /dev/mapper/c\n\
            judge luks /dev/mapper/c\nshut c\n{end}"
        ),
    );
    let five = "try mdadm --create /dev/md9 --run --force --name=five --homehost=guest --level=5 --chunk=16 \
        --raid-devices=3 $P0 $P1 $P2\nmdadm --wait /dev/md9 >/dev/null 2>&1\n";
    add(
        "on-an-array",
        format!(
            "{five}crypt c /dev/md9 {plain}\ngroup /dev/mapper/c\n{lv}{use_lv}{end}shut c\n\
            try mdadm --stop /dev/md9\n"
        ),
    );
    add(
        "in-itself",
        format!(
            "crypt c $P0 {plain}\ncrypt d /dev/mapper/c {}\nfill /dev/mapper/d\n\
            judge luks /dev/mapper/d\nshut d\nshut c\n",
            words(KINDS[2].1)
        ),
    );
    let before = format!("{BEFORE}{FUNCTIONS}printf '%s' '{PASSPHRASE}' >/key\n");
    let sizes = [10 * MIB, 10 * MIB, 10 * MIB, MIB, MIB, MIB];
    let programs = ["cryptsetup", "lvm", "mdadm", "dmsetup"];
    let judged = judge(&scenarios, sizes, &programs, &MODULES, &before);
    let check = |scenario: &str, disks: &[usize]| {
        let of = |disk: &usize| Arc::new(judged.parts[scenario][*disk].clone()) as Arc<dyn Source>;
        let disks: Vec<Arc<dyn Source>> = disks.iter().map(of).collect();
        let (assembly, _) = opened(&disks, &[b"wrong", PASSPHRASE.as_bytes()]);
        let (volume, expected, size) = &judged.sums[scenario][0];
        let volumes = &assembly.layout.volumes;
        let is_it = |name: &str| if volume == "lv" { name == "vg-lv" } else { name.starts_with("luks-") };
        let found = volumes.iter().rev().find(|volume| is_it(&volume.name));
        let found = found.unwrap_or_else(|| panic!("{scenario}: {volumes:?} {:?}", assembly.layout.remarks));
        let bytes =
            bytes_of(&assembly, &found.name, &disks).unwrap_or_else(|fact| panic!("{scenario}: {fact}"));
        assert_eq!((bytes.len() as u64, &sum(&bytes)), (*size, expected), "{scenario}");
        println!("{scenario}: as the kernel's");
    };
    for (name, _) in KINDS {
        check(name, &[0]);
    }
    check("group-inside", &[0]);
    check("on-a-volume", &[0, 1]);
    check("on-an-array", &[0, 1, 2]);
    check("on-an-array", &[2, 0]);
    check("in-itself", &[0]);
}
