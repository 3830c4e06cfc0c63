//! Encrypted guests through mounts and commands: whole trees, keys that are missing, wrong or changed, and
//! that no secret is anywhere but where it is needed.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::luks::Unlocked;
use chainfs::guest::volumes::layout;
use support::foreign::{Loop, amount};
use support::*;

use super::{CHEAP, PASSPHRASE, cryptsetup, encrypt, opened, private};
use crate::disk::FileSource;

const DISK: u64 = 24 * MIB;

/// A tree of files of all sizes.
fn tree(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("etc/deep/er")).expect("directories");
    let mut random = Rng::new(21);
    for number in 0..60 {
        let len = random.below(40_000) * (1 + number % 4);
        let bytes = random.bytes(len);
        fs::write(tree.join(format!("etc/deep/{number}")), bytes).expect("a file");
    }
    fs::write(tree.join("etc/hostname"), "sealed\n").expect("a file");
    fs::write(tree.join("big"), random.bytes(5 * MIB)).expect("a file");
    std::os::unix::fs::symlink("../hostname", tree.join("etc/deep/link")).expect("a link");
    tree
}

/// A disk that is a physical volume, with the tree in an ext4 file system on `vg-root`.
fn group(dir: &Path, tree: &Path) -> Vec<u8> {
    let disk = dir.join("group");
    File::create(&disk).and_then(|file| file.set_len(DISK)).expect("a disk");
    let device = Loop::new(&disk);
    let name = device.0.display().to_string();
    let etc = dir.join("lvm");
    fs::create_dir_all(&etc).expect("a directory");
    let config = format!(
        "devices {{ use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source \
            = \"none\"\n\
         filter = [ \"a|^{name}$|\", \"r|.*|\" ] global_filter = [ \"a|^{name}$|\", \"r|.*|\" ] }}\n\
         activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\n\
         backup {{ backup = 0 archive = 0 }}\n\
         global {{ etc = \"{0}\" event_activation = 0 use_lvmpolld = 0 locking_dir = \"{0}/lock\" }}\n",
        etc.display()
    );
    fs::write(etc.join("lvm.conf"), config).expect("a configuration");
    for words in [
        format!("pvcreate -q -y {name}"),
        format!("vgcreate -q -s 1m vg {name}"),
        "lvcreate -q -y -an -Zn -Wn -l 3 -n other vg".to_owned(),
        "lvcreate -q -y -an -Zn -Wn -l 100%FREE -n root vg".to_owned(),
    ] {
        let mut words = words.split_whitespace();
        let mut command = tool(words.next().expect("a program"));
        command.env("LVM_SYSTEM_DIR", &etc).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.args(["--driverloaded", "n"]).args(words).succeeds();
    }
    device.detach();
    let mut bytes = fs::read(&disk).expect("the disk");
    let found = layout(&[Arc::new(bytes.clone()) as Arc<dyn Source>]);
    let volume = found.volumes.iter().find(|volume| volume.name == "vg-root").expect("the volume");
    let image = file_system(dir, tree, volume.size);
    let mut at = 0;
    while at < volume.size {
        let run = volume.locate(at, volume.size - at).expect("a place");
        let place = run.on_disk().expect("a place on the disk").offset as usize;
        bytes[place..place + run.len as usize].copy_from_slice(&image[at as usize..][..run.len as usize]);
        at += run.len;
    }
    bytes
}

/// An ext4 file system with the tree.
fn file_system(dir: &Path, tree: &Path, size: u64) -> Vec<u8> {
    let image = dir.join("file-system");
    let _ = fs::remove_file(&image);
    let mut command = tool("mkfs.ext4");
    command.args(["-q", "-F", "-d"]).arg(tree).arg(&image).arg(format!("{}k", size / KIB)).succeeds();
    fs::read(&image).expect("the file system")
}

/// A guest's image in the store: a container of these bytes, below an empty overlay.
fn guest(store: &Store, name: &str, plain: &[u8], words: &str, passphrase: &str) -> PathBuf {
    let key = private(store.beside(format!("{name}.key")), passphrase.as_bytes());
    let container = store.beside(format!("{name}.luks"));
    encrypt(plain, words, &key, &container);
    let container_text = container.to_str().expect("a plain path");
    store.img(["convert", "-f", "raw", "-O", "qcow2", container_text, &format!("{name}-base.qcow2")]);
    store.overlay(&format!("{name}.qcow2"), &format!("{name}-base.qcow2"), "qcow2", "");
    container
}

fn keys(store: &Store, text: &str) -> PathBuf {
    private(store.beside("keys.toml"), text.as_bytes())
}

fn same_trees(tree: &Path, shown: &Path) {
    let mut command = tool("diff");
    command.args(["-r", "--no-dereference", "--exclude=lost+found"]).arg(tree).arg(shown).succeeds();
}

#[test]
fn a_tree_on_lvm_on_luks_is_read_in_every_view() {
    let store = Store::new();
    let dir = store.beside("made");
    fs::create_dir(&dir).expect("a directory");
    let tree = tree(&dir);
    let disk = group(&dir, &tree);
    guest(&store, "vm", &disk, &format!("{CHEAP} --sector-size 4096"), PASSPHRASE);
    let keys = keys(&store, &format!("[[key]]\nchain = \"v*\"\npassphrase = \"{PASSPHRASE}\"\n"));
    let mount = Mount::with(&store, &format!("keys={}", keys.display().to_string().replace(',', "\\,")));
    for view in ["active", "vm-base"] {
        let files = mount.path(format!("vm/files/{view}"));
        same_trees(&tree, &files.join("vg-root"));
        let said = mount.text(format!("vm/files/{view}/volumes.txt"));
        assert!(said.contains("it is encrypted (crypto_LUKS); its files are in luks-"), "{said}");
        assert!(said.contains("LVM2_member") && said.contains("vg-root"), "{said}");
    }
    assert_eq!(mount.text("vm/files/active/vg-root/etc/deep/link"), "sealed\n");
    mount.umount();
}

#[test]
fn a_container_without_its_key_is_named_and_opened_once_there_is_one() {
    let store = Store::new();
    let dir = store.beside("made");
    fs::create_dir(&dir).expect("a directory");
    let tree = tree(&dir);
    let plain = file_system(&dir, &tree, 16 * MIB);
    let container = guest(&store, "vm", &plain, CHEAP, PASSPHRASE);
    let uuid = tool("cryptsetup").arg("luksUUID").arg(&container).succeeds().trim().to_owned();
    let volumes = "vm/files/active/volumes.txt";

    let mount = Mount::new(&store);
    let said = mount.text(volumes);
    assert!(said.contains("not shown: it is encrypted (crypto_LUKS)\n"), "{said}");
    mount.umount();

    let table = |uuid: &str, secret: &str| format!("[[key]]\nuuid = \"{uuid}\"\npassphrase = \"{secret}\"\n");
    let path = keys(&store, &table("0000-*", PASSPHRASE));
    let mount = Mount::with(&store, &format!("keys={}", path.display()));
    let said = mount.text(volumes);
    assert!(said.contains("not shown: it is encrypted (crypto_LUKS)\n"), "{said}");
    // The table is read again when it changes, and one that cannot be used changes nothing.
    keys(&store, &table(&uuid, "a wrong one"));
    let fact = "it is encrypted (crypto_LUKS); no given key fits";
    eventually("the wrong key is tried", || mount.text(volumes).contains(fact));
    fs::write(&path, "[[key]]\n").expect("room");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(mount.text(volumes).contains(fact));
    keys(&store, &table(&uuid.to_uppercase(), PASSPHRASE));
    let shown = mount.path(format!("vm/files/active/luks-{uuid}"));
    eventually("the right key is used", || shown.join("etc").is_dir());
    same_trees(&tree, &shown);
    // And without it, the container is closed.
    keys(&store, "");
    eventually("the key is taken away", || !mount.names("vm/files/active").contains(&format!("luks-{uuid}")));
    mount.umount();

    // A table that others can read is refused.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("its mode");
    let refused =
        Mount::try_new(&store, &store.root(), &store.beside("mnt"), &format!("keys={}", path.display()));
    let said = refused.err().expect("others can read it").message;
    assert!(said.contains("other users have access (mode 644)") && said.contains("chmod 600"), "{said}");
}

/// Whether the memory of a process has these bytes.
fn has_in_memory(process: u32, bytes: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("a process");
    let memory = File::open(format!("/proc/{process}/mem")).expect("its memory");
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').expect("a range");
        if !rest.starts_with("rw") {
            continue;
        }
        let ends: Vec<u64> = range.split('-').map(|end| u64::from_str_radix(end, 16).expect("hex")).collect();
        let mut at = ends[0];
        while at < ends[1] {
            // Pieces overlap by the length of what is looked for.
            let mut piece = vec![0; (ends[1] - at).min(4 * MIB) as usize];
            if memory.read_exact_at(&mut piece, at).is_err() {
                break;
            }
            if piece.windows(bytes.len()).any(|window| window == bytes) {
                return true;
            }
            at += piece.len() as u64;
            if at < ends[1] {
                at -= bytes.len() as u64;
            }
        }
    }
    false
}

/// The processes that this one has started.
fn children(process: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).expect("a process") {
        let path = task.expect("a thread").path().join("children");
        let text = fs::read_to_string(path).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    found
}

#[test]
fn secrets_are_in_the_worker_of_their_chain_and_nowhere_else() {
    let store = Store::new();
    let dir = store.beside("made");
    fs::create_dir(&dir).expect("a directory");
    let tree = tree(&dir);
    let plain = file_system(&dir, &tree, 16 * MIB);
    let secrets = ["passphrase-of-one", "passphrase-of-two"];
    let mut volume_keys = Vec::new();
    for (name, secret) in ["one", "two"].into_iter().zip(secrets) {
        let container = guest(&store, name, &plain, CHEAP, secret);
        let disks: [Arc<dyn Source>; 1] = [Arc::new(FileSource::open(&container))];
        let (_, keys) = opened(&disks, &[secret.as_bytes()]);
        let [(_, Unlocked::Keys(keys))] = &keys.0[..] else { panic!("{keys:?}") };
        // The half that decrypts.
        volume_keys.push(keys.all().next().expect("a key").bytes()[..32].to_vec());
    }
    let table = format!(
        "[[key]]\nchain = \"one\"\npassphrase = \"{}\"\n[[key]]\nchain = \"two\"\npassphrase = \"{}\"\n",
        secrets[0], secrets[1]
    );
    let path = keys(&store, &table);
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" -v", chainfs_binary()]);
    let mount = Mount::foreground(&store, command, &format!("keys={}", path.display()));
    let files = ["one", "two"].map(|name| mount.path(format!("{name}/files/active")));
    for files in &files {
        let volume =
            fs::read_dir(files).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let volume = volume.into_iter().find(|name| name.to_string_lossy().starts_with("luks-"));
        same_trees(&tree, &files.join(volume.expect("an opened volume")));
    }
    let daemon = mount.daemon();
    eventually("only the two workers are left", || children(daemon).len() == 2);
    let workers = children(daemon);
    let holders: Vec<Vec<u32>> = volume_keys
        .iter()
        .map(|key| workers.iter().copied().filter(|worker| has_in_memory(*worker, key)).collect())
        .collect();
    assert_eq!([holders[0].len(), holders[1].len()], [1, 1], "{holders:?}");
    assert_ne!(holders[0], holders[1]);
    for process in workers.iter().chain([&daemon]) {
        for file in ["cmdline", "environ"] {
            let text = fs::read(format!("/proc/{process}/{file}")).expect("a process");
            let is_in = |secret: &&str| text.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!secrets.iter().any(is_in), "{process}: {file}");
        }
    }
    for worker in &workers {
        assert!(!secrets.iter().any(|secret| has_in_memory(*worker, secret.as_bytes())));
    }
    mount.umount();
    let mut said = Vec::new();
    File::open(store.beside("mount.output")).and_then(|mut file| file.read_to_end(&mut said)).expect("a log");
    let said = String::from_utf8_lossy(&said);
    assert!(!said.contains("passphrase-of") && said.contains("mounted"), "{said}");
}

#[test]
fn commands_open_containers_with_a_key_file() {
    let store = Store::new();
    let dir = store.beside("made");
    fs::create_dir(&dir).expect("a directory");
    let tree = tree(&dir);
    let plain = file_system(&dir, &tree, 16 * MIB);
    let container = guest(&store, "vm", &plain, CHEAP, PASSPHRASE);
    let uuid = tool("cryptsetup").arg("luksUUID").arg(&container).succeeds().trim().to_owned();
    let key = store.beside("vm.key").display().to_string();
    let chainfs = |args: &[&str]| {
        let mut command = tool(chainfs_binary());
        command.args(args).current_dir(store.root());
        command
    };
    let place = format!("vm.qcow2:/luks-{uuid}");
    let hostname = format!("{place}/etc/hostname");
    assert_eq!(chainfs(&["cat", "--key-file", &key, &hostname]).succeeds(), "sealed\n");
    let listed = chainfs(&["ls", "--key-file", &key, "vm.qcow2:"]).succeeds();
    assert!(listed.contains(&format!("luks-{uuid}")), "{listed}");
    let copy = store.beside("copy");
    let from = format!("{place}/.");
    chainfs(&["cp", "-a", "--key-file", &key, &from, copy.to_str().expect("a plain path")]).succeeds();
    same_trees(&tree, &copy);
    let (code, said, _) =
        chainfs(&["diff", "--files", "--key-file", &key, "vm-base.qcow2", "vm.qcow2"]).outcome();
    assert!(code == 0 && said.starts_with("0 added, 0 removed, 0 changed;"), "{code}: {said}");
    assert!(said.contains(" KiB of "), "what both share is not read: {said}");
    let versions = chainfs(&["versions", "--key-file", &key, &hostname]).succeeds();
    assert!(versions.contains("vm-base"), "{versions}");
    // The table serves as well.
    let keys = keys(&store, &format!("[[key]]\nuuid = \"*\"\npassphrase_file = \"{key}\"\n"));
    let option = format!("keys={}", keys.display());
    assert_eq!(chainfs(&["cat", "-o", &option, &hostname]).succeeds(), "sealed\n");

    let wrong = private(store.beside("wrong"), b"secret-but-wrong").display().to_string();
    let listed = chainfs(&["ls", "--key-file", &wrong, "vm.qcow2:"]).succeeds();
    assert!(listed.contains("no given key fits") && !listed.contains("secret-but"), "{listed}");
    assert!(!chainfs(&["cat", "--key-file", &wrong, &hostname]).fails().contains("secret-but"));
    fs::set_permissions(&wrong, fs::Permissions::from_mode(0o640)).expect("its mode");
    let said = chainfs(&["ls", "--key-file", &wrong, "vm.qcow2:"]).fails();
    assert!(said.contains("other users have access (mode 640)"), "{said}");
}

/// The costs that cryptsetup chooses by itself, for two seconds of this machine.
#[test]
fn the_usual_costs_are_paid_once() {
    if amount(0, 1) == 0 {
        return;
    }
    let store = Store::new();
    let dir = store.beside("made");
    fs::create_dir(&dir).expect("a directory");
    let tree = tree(&dir);
    let plain = file_system(&dir, &tree, 16 * MIB);
    guest(&store, "vm", &plain, "", PASSPHRASE);
    let key = store.beside("vm.key");
    let container = store.beside("vm.luks");
    cryptsetup("luksDump", &key, &container);
    let keys = keys(&store, &format!("[[key]]\nchain = \"*\"\nkey_file = \"{}\"\n", key.display()));
    let mount = Mount::with(&store, &format!("keys={}", keys.display()));
    let times: Vec<_> = ["active", "vm-base"]
        .into_iter()
        .map(|view| {
            let started = std::time::Instant::now();
            assert!(mount.text(format!("vm/files/{view}/volumes.txt")).contains("ext4"));
            started.elapsed()
        })
        .collect();
    println!("first and second view: {times:?}");
    assert!(times[1] < times[0] / 2, "{times:?}");
    mount.umount();
}
