//! LUKS containers that cryptsetup and QEMU make of known bytes: these bytes must be read, and nothing
//! without the key. The kernel's dm-crypt judges in `volumes/kernel/luks.rs`.

mod mounts;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::luks::{Attempt, ContainerKeys, KnownKeys, Secret, Unlocked};
use chainfs::guest::volumes::{Assembly, assemble};
use tempfile::TempDir;

use crate::disk::FileSource;
use support::foreign::amount;
use support::*;

/// A passphrase, in a file without an end of line as cryptsetup wants it.
pub(crate) const PASSPHRASE: &str = "correct horse, battery";

/// Words for a small and quick container of LUKS2.
pub(crate) const SMALL: &str = "--type luks2 --luks2-metadata-size 16k --luks2-keyslots-size 512k";
/// Words for a cheap key slot.
pub(crate) const CHEAP: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";

/// cryptsetup with these words, a passphrase or key file, and a container.
pub(crate) fn cryptsetup(words: &str, key: &Path, container: &Path) -> String {
    let mut command = tool("cryptsetup");
    command.args(words.split_whitespace()).arg("-q").arg("--key-file").arg(key).arg(container).succeeds()
}

/// A file that only its owner can read.
pub(crate) fn private(path: PathBuf, bytes: &[u8]) -> PathBuf {
    fs::write(&path, bytes).expect("room");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its mode");
    path
}

/// Makes a container of LUKS2 out of plain bytes.
pub(crate) fn encrypt(plain: &[u8], words: &str, key: &Path, container: &Path) {
    fs::write(container, [plain, &vec![0; 8 * MIB as usize]].concat()).expect("room");
    let words = format!("reencrypt --encrypt {SMALL} --reduce-device-size 8M {words}");
    cryptsetup(&words, key, container);
}

/// Disks opened with secrets, as the daemon and its workers do it.
pub(crate) fn opened(disks: &[Arc<dyn Source>], secrets: &[&[u8]]) -> (Assembly, ContainerKeys) {
    let secrets: Vec<Secret> = secrets.iter().map(|bytes| Secret::from(bytes.to_vec())).collect();
    let mut keys = ContainerKeys::default();
    loop {
        let assembly = assemble(disks, Some(&KnownKeys(&keys)));
        let Some(locked) = assembly.layout.locked.first() else { return (assembly, keys) };
        let attempt = Attempt::new(&keys, locked.id);
        assemble(disks, Some(&attempt));
        let unlocked = attempt.unlock(&secrets);
        keys.0.push((locked.id, unlocked));
    }
}

/// The bytes of the unlocked volume of a container.
fn decrypted(container: &Path, secrets: &[&[u8]]) -> Result<Vec<u8>, String> {
    let disks: [Arc<dyn Source>; 1] = [Arc::new(FileSource::open(container))];
    let (assembly, _) = opened(&disks, secrets);
    let volumes = &assembly.layout.volumes;
    let Some(index) = volumes.iter().position(|volume| volume.name.starts_with("luks-")) else {
        return Err(volumes.iter().filter_map(|volume| volume.problem.clone()).collect());
    };
    let source = assembly.source(index);
    let mut bytes = vec![0; source.size() as usize];
    source.read_at(0, &mut bytes).map_err(|error| error.to_string())?;
    // Pieces that begin and end within sectors.
    let mut random = Rng::new(11);
    for _ in 0..50 {
        let at = random.below(source.size());
        let len = random.below((source.size() - at).min(20_000) + 1);
        let mut piece = vec![0; len as usize];
        source.read_at(at, &mut piece).map_err(|error| error.to_string())?;
        assert!(piece == bytes[at as usize..][..piece.len()], "{len} bytes at {at}");
    }
    Ok(bytes)
}

fn assert_decrypts(container: &Path, secrets: &[&[u8]], plain: &[u8], what: &str) {
    let found = decrypted(container, secrets).unwrap_or_else(|fact| panic!("{what}: {fact}"));
    assert!(found.len() >= plain.len() && found[..plain.len()] == *plain, "{what}: other bytes");
    let fact = decrypted(container, &[b"wrong"]).expect_err("there is no key");
    assert_eq!(fact, "it is encrypted (crypto_LUKS); no given key fits", "{what}");
}

#[test]
fn containers_of_luks2_show_the_bytes_they_were_made_of() {
    let dir = TempDir::new().expect("a directory");
    let key = private(dir.path().join("key"), PASSPHRASE.as_bytes());
    let plain = Rng::new(1).bytes(MIB);
    for words in [
        "",
        "--sector-size 4096",
        "--sector-size 1024 --hash sha512 -s 256",
        "-c aes-cbc-essiv:sha256 -s 256 --sector-size 2048",
        "-c aes-cbc-plain64 -s 128 --hash sha1",
        "-c aes-cbc-plain -s 192",
        "-c aes-xts-plain --hash ripemd160",
    ] {
        let container = dir.path().join("container");
        encrypt(&plain, &format!("{CHEAP} {words}"), &key, &container);
        assert_decrypts(&container, &[b"other", PASSPHRASE.as_bytes()], &plain, words);
    }
}

#[test]
fn argon2_is_derived_with_the_costs_of_the_header() {
    let dir = TempDir::new().expect("a directory");
    // Bytes that are no text, and an end of line that counts.
    let secret = b"\0\xff binary\n";
    let key = private(dir.path().join("key"), secret);
    let plain = Rng::new(2).bytes(MIB);
    for words in ["--pbkdf argon2id --pbkdf-parallel 3", "--pbkdf argon2i --pbkdf-parallel 1"] {
        let container = dir.path().join("container");
        let words = format!("{words} --pbkdf-memory 64 --pbkdf-force-iterations 4");
        encrypt(&plain, &words, &key, &container);
        assert_decrypts(&container, &[secret], &plain, &words);
        assert!(decrypted(&container, &[b"\0\xff binary"]).is_err(), "the end of the line counts");
    }
}

#[test]
fn containers_of_luks1_show_the_bytes_they_were_made_of() {
    let dir = TempDir::new().expect("a directory");
    let plain = dir.path().join("plain");
    let bytes = Rng::new(3).bytes(256 * KIB);
    fs::write(&plain, &bytes).expect("room");
    let kinds = [
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=plain,hash-alg=sha1",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=ripemd160",
        "cipher-alg=serpent-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha384",
        "cipher-alg=twofish-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
        "cipher-alg=twofish-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha224",
        "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=ecb,ivgen-alg=plain,hash-alg=sha256",
    ];
    for words in kinds.into_iter().step_by(amount(4, 1) as usize) {
        let container = dir.path().join("container");
        let secret = format!("secret,id=s,data={}", PASSPHRASE.replace(',', ",,"));
        let mut command = tool("qemu-img");
        command.args(["convert", "--object", &secret, "-f", "raw", "-O", "luks"]);
        command.args(["-o", &format!("key-secret=s,iter-time=1,{words}")]);
        command.arg(&plain).arg(&container).succeeds();
        assert_decrypts(&container, &[PASSPHRASE.as_bytes()], &bytes, words);
    }
}

#[test]
fn each_slot_opens_with_its_own_secret_and_unbound_ones_with_none() {
    let dir = TempDir::new().expect("a directory");
    let key = private(dir.path().join("key"), PASSPHRASE.as_bytes());
    for kind in ["luks1", "luks2"] {
        let container = dir.path().join(kind);
        fs::File::create(&container).and_then(|file| file.set_len(20 * MIB)).expect("a container");
        cryptsetup(&format!("luksFormat --type {kind} {CHEAP}"), &key, &container);
        let long = Rng::new(4).bytes(700_001);
        let other = private(dir.path().join("other"), &long);
        let add = |words: &str, new: &Path| {
            let mut command = tool("cryptsetup");
            command.args(["luksAddKey", "-q", "--key-file"]).arg(&key).args(words.split_whitespace());
            command.arg(&container).arg(new).succeeds();
        };
        add(CHEAP, &other);
        let part = private(dir.path().join("part"), b"a part");
        add(&format!("{CHEAP} --new-keyfile-offset 2 --new-keyfile-size 4"), &part);
        if kind == "luks2" {
            let unbound = private(dir.path().join("unbound"), b"unbound");
            add(&format!("{CHEAP} --unbound --key-size 512 --key-slot 9"), &unbound);
            assert!(decrypted(&container, &[b"unbound"]).is_err());
            cryptsetup("config --key-slot 0 --priority ignore", &key, &container);
        }
        let volume_key = dir.path().join("volume-key");
        let _ = fs::remove_file(&volume_key);
        let dump = format!("luksDump --dump-volume-key --volume-key-file {}", volume_key.display());
        cryptsetup(&dump, &other, &container);
        let volume_key = fs::read(&volume_key).expect("the volume key");
        for secret in [PASSPHRASE.as_bytes(), &long, b"part"] {
            let disks: [Arc<dyn Source>; 1] = [Arc::new(FileSource::open(&container))];
            let (assembly, keys) = opened(&disks, &[secret]);
            assert_eq!(assembly.layout.volumes.len(), 2, "{kind}");
            let [(_, Unlocked::Keys(keys))] = &keys.0[..] else { panic!("{kind}: {keys:?}") };
            assert_eq!(keys.all().map(Secret::bytes).collect::<Vec<_>>(), [&volume_key[..]], "{kind}");
        }
    }
}

#[test]
fn a_volume_is_read_while_it_is_re_encrypted() {
    let dir = TempDir::new().expect("a directory");
    let key = private(dir.path().join("key"), PASSPHRASE.as_bytes());
    let secret: &[&[u8]] = &[PASSPHRASE.as_bytes()];
    let plain = Rng::new(5).bytes(24 * MIB);
    let container = dir.path().join("container");
    // Before the first step, nothing is encrypted.
    encrypt(&plain[..MIB as usize], &format!("{CHEAP} --init-only"), &key, &container);
    let disks: [Arc<dyn Source>; 1] = [Arc::new(FileSource::open(&container))];
    let (assembly, _) = opened(&disks, &[]);
    let mut found = vec![0; MIB as usize];
    assembly.source(1).read_at(0, &mut found).expect("its bytes");
    assert!(found == plain[..MIB as usize]);
    // In the middle, the beginning has the new key, and the rest the old one.
    encrypt(&plain, CHEAP, &key, &container);
    // It stops in order when it is interrupted: here, by one of its writes, most of which are the data's.
    let mut command = tool("strace");
    command.args(["-f", "-o", "/dev/null", "-e", "trace=write", "-e", "inject=write:signal=SIGINT:when=32"]);
    command.args(["cryptsetup", "reencrypt", "-q", "--force-offline-reencrypt", "--resilience", "none"]);
    command.args(["--hotzone-size", "1M", "--key-file"]).arg(&key).args(CHEAP.split_whitespace());
    let said = command.arg(&container).outcome();
    let dump = tool("cryptsetup").args(["luksDump"]).arg(&container).succeeds();
    assert!(dump.matches(": crypt\n").count() > 1, "it was not interrupted: {said:?}, {dump}");
    assert_decrypts(&container, secret, &plain, "during re-encryption");
}

#[test]
fn costs_that_are_absurd_are_refused_at_once() {
    let dir = TempDir::new().expect("a directory");
    let key = private(dir.path().join("key"), PASSPHRASE.as_bytes());
    let container = dir.path().join("container");
    fs::File::create(&container).and_then(|file| file.set_len(20 * MIB)).expect("a container");
    cryptsetup(&format!("luksFormat --type luks1 {CHEAP}"), &key, &container);
    let slot = Damage::to(&container);
    slot.put(208 + 4, &u32::MAX.to_be_bytes());
    let fact = decrypted(&container, &[b"any"]).expect_err("it would take hours");
    assert!(fact.contains("PBKDF2 with 4294967295 rounds (at most 100000000)"), "{fact}");
}
