//! Messages to users, provoked in their situations: each names the thing, the fact and the remedy.
//!
//! Also the behaviour behind some of them: an address means one disk, layers drop out of a chain only when
//! the user says so, and plans consider QEMU's locks.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::active::rw;
use support::command::Control;
use support::foreign::Qemu;
use support::*;

/// base.raw <- monday <- tuesday <- web01, which holds the internal snapshot inner.
fn chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("monday.qcow2", "base.raw", "raw", "");
    store.overlay("tuesday.qcow2", "monday.qcow2", "qcow2", "");
    store.overlay("web01.qcow2", "tuesday.qcow2", "qcow2", "");
    for (seed, name) in (1..).zip(["monday.qcow2", "tuesday.qcow2", "web01.qcow2"]) {
        store.scribble(name, "qcow2", seed);
    }
    store.img(["snapshot", "-c", "inner", "web01.qcow2"]);
    store.scribble("web01.qcow2", "qcow2", 9);
    store
}

/// `chainfs WORDS` beside the store, which is `store`; its mount is `mnt`.
fn chainfs(store: &Store, words: &str) -> Command {
    let mut command = tool(chainfs_binary());
    command
        .args(words.split_whitespace())
        .current_dir(store.beside(""))
        .env("XDG_CONFIG_HOME", store.beside("config"));
    command
}

/// The stderr of a command, which ends with that code; paths of this test are removed.
fn said(store: &Store, words: &str, code: i32) -> String {
    let (have, out, err) = chainfs(store, words).outcome();
    assert_eq!(have, code, "chainfs {words}\n{out}{err}");
    let place = store.beside("").canonicalize().expect("a path");
    err.replace(&format!("{}/", place.display()), "")
}

/// Each of these commands prints this, and ends with this code.
fn all_say(store: &Store, table: &[(&str, i32, &str)]) {
    for (words, code, sentence) in table {
        let said = said(store, words, *code);
        assert!(said.contains(sentence), "chainfs {words}\nsays: {said}and not: {sentence}");
        assert!(!said.contains("os error") && !said.contains("chainfs:  "), "chainfs {words}: {said}");
    }
}

/// A process that has an image locked as QEMU does.
struct Holder(Child);

impl Holder {
    /// A process that looks like the QEMU of a domain, and holds a writer's lock byte.
    fn domain(store: &Store, image: &str, name: &str) -> Self {
        let program = "import fcntl, struct, sys, time\n\
                       file = open(sys.argv[1], 'rb')\n\
                       fcntl.fcntl(file, 37, struct.pack('hhqqi4x', 0, 0, 101, 1, 0))\n\
                       print('held', flush=True)\n\
                       time.sleep(60)\n";
        let script = "export PYTHONHOME=$(python3 -c 'import sys; print(sys.base_prefix)'); exec -a \
            /usr/bin/qemu-system-x86_64 \
                      \"$(python3 -c 'import sys; print(sys.executable)')\" -c \"$0\" \"$1\" -name \"$2\"";
        let mut child = Command::new("bash")
            .args(["-c", script, program])
            .arg(store.path(image))
            .arg(format!("guest={name},debug-threads=on"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its word");
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // timeout(1) forwards the signal.
        let pid = Pid::from_raw(self.0.id().cast_signed()).expect("a process");
        let _ = kill_process(pid, Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
fn wrong_words_are_refused_with_the_right_ones() {
    let store = chain();
    all_say(
        &store,
        &[
            ("mount --allow-other store mnt", 1, "tip: mount options are given with -o: -o allow_other\n"),
            ("mount --uid=5 store mnt", 1, "tip: mount options are given with -o: -o uid=...\n"),
            ("info --nonsense store", 2, "unexpected argument '--nonsense' found\n\nUsage"),
            (
                "map store/web01.qcow2@nope",
                1,
                "store/web01.qcow2 has no view nope; there is active, tuesday, monday, base, active@inner\n",
            ),
            (
                "map store/web01.qcow2@monday.raw",
                1,
                "has no view monday.raw; write monday, without the suffix\n",
            ),
            (
                "ls store/web01.qcow2@nope:",
                1,
                "has no view nope; there is active, tuesday, monday, base, active@inner\n",
            ),
            ("tree nope", 1, "chainfs: opening nope: No such file or directory\n"),
            (
                "commit store/web01.qcow2 --store store --top nope",
                1,
                "web01 has no view nope; there is active, tuesday, monday, base\n",
            ),
            ("rebase store/web01.qcow2 -b base.raw --drop-layers", 2, "--unsafe"),
        ],
    );
}

#[test]
fn a_command_in_a_mount_names_its_chain() {
    let store = chain();
    let mount = Mount::new(&store);
    all_say(
        &store,
        &[
            ("commit mnt/nope", 2, "there is no chain mnt/nope; name a chain, as in mnt/web01\n"),
            ("commit mnt", 2, "mnt takes no commands; name a chain, as in mnt/web01\n"),
            ("commit mnt/web01/snapshots/monday.raw", 2, "takes no commands; name its chain, mnt/web01\n"),
            (
                "snapshot mnt/web01 x --chains web01",
                2,
                "takes no commands for several chains; name the mount itself\n",
            ),
            (
                "commit mnt/web01 --top monday.raw",
                1,
                "web01 has no view monday.raw; write monday, without the suffix\n",
            ),
            (
                "revert mnt/web01 nope",
                1,
                "web01 has no view nope; there is active, tuesday, monday, base, active@inner\n",
            ),
            ("umount mnt/web01", 1, "mnt/web01 is not a mount point; it is in the mount at mnt: name that\n"),
        ],
    );
    let control = Control::of(&mount, "web01");
    let sentence = control.refused("delete tuesday.qcow2", Errno::NOENT);
    assert_eq!(sentence, "web01 has no view tuesday.qcow2; write tuesday, without the suffix");
    mount.umount();
}

#[test]
fn a_plan_uses_common_terms_and_readable_sizes() {
    let store = chain();
    let mount = Mount::new(&store);
    let plan = |words: &str| {
        let (_, out, _) = chainfs(&store, words).outcome();
        out
    };
    assert!(plan("commit mnt/web01 --top tuesday --dry-run").contains("\ninvalidated: monday\n"));
    let grown = plan("resize mnt/web01 +1G --dry-run");
    assert!(
        grown.contains("command: resize +1G\n")
            && grown.contains("note: from 1 MiB (1048576 bytes) to 1 GiB ("),
        "{grown}"
    );
    let huge = plan("clone mnt/web01 copy --from active@inner --dry-run");
    assert!(huge.contains("copied: "), "{huge}");
    mount.umount();
}

#[test]
fn a_revert_reports_the_new_chain_of_newer_snapshots() {
    for (words, note) in [
        (
            "revert mnt/web01 monday --save old",
            "tuesday.qcow2 is newer, and goes on in the chain old, beside this one\n",
        ),
        (
            "revert mnt/web01 base --discard-internal",
            "tuesday.qcow2, monday.qcow2 are newer, and go on in the chain tuesday, beside this one\n",
        ),
        ("revert mnt/web01 tuesday --save old", "old.qcow2 becomes a chain of its own\n"),
    ] {
        let store = chain();
        let mount = Mount::new(&store);
        let plan = chainfs(&store, &format!("{words} --dry-run")).succeeds();
        assert!(plan.contains(&format!("note: {note}")), "{words}: {plan}");
        assert!(said(&store, words, 0).contains(note), "{words}");
        mount.umount();
        // The same without a mount.
        let store = chain();
        let words = format!("{} --store store", words.replace("mnt/web01", "store/web01.qcow2"));
        assert!(said(&store, &words, 0).contains(note), "{words}");
    }
}

#[test]
fn a_mount_reports_hidden_files_and_allowed_users() {
    let store = chain();
    for (options, hint) in [
        (
            "ro,uid=4711",
            "uid=4711 only changes the owner shown: still only uid 0 has access; add -o allow_other\n",
        ),
        ("ro,uid=4711,allow_other", ""),
        ("ro", ""),
    ] {
        assert_eq!(
            said(&store, &format!("mount store mnt -o {options}"), 0).trim_start_matches("chainfs: "),
            hint
        );
        said(&store, "umount mnt", 0);
    }
    fs::write(store.beside("mnt/hidden"), "").expect("a file");
    let hint = "mnt is not empty: its 1 entry is hidden while the store is mounted\n";
    all_say(&store, &[("mount store mnt", 0, hint), ("umount mnt", 0, "")]);
    fs::remove_file(store.beside("mnt/hidden")).expect("still there");

    let raw = Store::new();
    raw.put("disk1", &[0; 4096]);
    let remedy = "store holds no disk images, but a file of unknown format (disk1): if they are raw disks, \
        say so with \
                  -o format=GLOB:raw, as in format=disk1:raw\n";
    all_say(&raw, &[("tree store", 0, remedy), ("mount store mnt", 0, remedy), ("umount mnt", 0, "")]);
    assert!(!said(&raw, "tree store -o format=disk1:raw", 0).contains("no disk images"));
}

#[test]
fn a_fault_of_a_configuration_file_is_found_by_file_line_and_key() {
    let store = chain();
    let file = store.beside("config/chainfs/config.toml");
    fs::create_dir_all(file.parent().expect("a directory")).expect("it");
    for (text, sentence) in [
        (
            "ro = true\nbacking_dir = [\"/nonexistent\"]\n",
            "line 2: key 'backing_dir': opening /nonexistent: No such file or directory\n",
        ),
        ("\n\nuid = \"root\"\n", "line 3: key 'uid': mount option 'uid': 'root' must be a number"),
        ("ro = true\nreadnly = \"x\"\n", "line 2: key 'readnly': unknown; did you mean 'readonly'?\n"),
        ("ro = true\nuid = = 1\n", "line 2: "),
    ] {
        fs::write(&file, text).expect("a file");
        let mounted = chainfs(&store, "mount store mnt").fails();
        assert!(mounted.contains(&format!("config/chainfs/config.toml: {sentence}")), "{text}: {mounted}");
    }
    fs::remove_file(&file).expect("it");
    all_say(
        &store,
        &[(
            "mount store mnt -o backing_dir=/nonexistent",
            32,
            "backing_dir: opening directory /nonexistent: No such file",
        )],
    );
}

#[test]
fn the_use_of_a_missing_file_decides_the_remedy() {
    let store = Store::new();
    store.create("data.qcow2", MIB, "data_file=disk.raw");
    fs::remove_file(store.path("disk.raw")).expect("the data file");
    store.raw("base.raw", MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    fs::remove_file(store.path("base.raw")).expect("the base");
    store.create("cut.qcow2", MIB, "");
    fs::File::options()
        .write(true)
        .open(store.path("cut.qcow2"))
        .and_then(|file| file.set_len(100 << 10))
        .expect("cut off");
    store.create("marked.qcow2", MIB, "");
    Damage::to(store.path("marked.qcow2")).put_u64(72, 2);
    let outside = store.beside("outside");
    fs::create_dir(&outside).expect("a directory");
    store.overlay_unchecked("mapped.qcow2", "/old/base.raw", "raw");
    let mount = Mount::with(&store, &format!("map=/old={}", outside.display()));
    for (chain, sentence) in [
        (
            "data",
            "; put it back, or name it anew: qemu-img amend -o data_file=NEW --image-opts driver=qcow2,",
        ),
        ("web", "; put it back, or point the header elsewhere with qemu-img rebase -u\n"),
        ("cut", "the file is cut off; restore it from a backup\n"),
        ("marked", "is marked as corrupt, so it is read-only; run chainfs check --repair all\n"),
        (
            "mapped",
            &format!(
                "leads out of the store to {0}/base.raw by a map=, and is never followed there; allow that \
                    as well with -o backing_dir={0}\n",
                outside.display()
            ),
        ),
    ] {
        let text = mount.text(format!("{chain}/info/problem.txt"));
        assert!(text.contains(sentence), "{chain}: {text}");
        assert!(mount.text(".chainfs/problems.txt").contains(sentence.trim_end()), "{chain}");
    }
    mount.umount();
    // And the remedy works.
    store.raw("new.raw", MIB, 2);
    store.img([
        "amend",
        "-o",
        "data_file=new.raw",
        "--image-opts",
        "driver=qcow2,file.filename=data.qcow2,data-file.filename=new.raw",
    ]);
    assert!(!said(&store, "tree store", 0).contains("data.qcow2"));
}

#[test]
fn the_writer_of_a_disk_is_named_with_a_remedy() {
    let store = chain();
    let mount = Mount::new(&store);
    let held = Qemu::running_on(&store, "web01.qcow2", &[]);
    let by = "web01.qcow2 is being written by another process (qemu-nbd[";
    let rest =
        "]); wait until it is closed, or read it while it changes with -U (for a mount: -o force_share)\n";
    for words in ["map store/web01.qcow2", "ls mnt/web01/active.raw:", "info -U store/web01.qcow2"] {
        let (code, _, err) = chainfs(&store, words).outcome();
        let is_refused = !words.contains("-U");
        assert_eq!(
            (code != 0, err.contains(by) && err.contains(rest)),
            (is_refused, is_refused),
            "{words}: {err}"
        );
    }
    eventually("problems.txt tells", || {
        let text = mount.text(".chainfs/problems.txt");
        text.starts_with("web01.qcow2: is being written by qemu-nbd[")
            && text
                .ends_with("]: its active disk cannot be opened until that ends; its snapshots can be read\n")
    });
    drop(held);
    eventually("problems.txt is empty again", || mount.text(".chainfs/problems.txt").is_empty());
    let held = Holder::domain(&store, "web01.qcow2", "db,,7");
    let domain = " of domain db,7); take a snapshot with virsh snapshot-create-as db,7 \
                  --disk-only and read that, or shut db,7 down\n";
    all_say(&store, &[("map store/web01.qcow2", 1, domain)]);
    drop(held);
    mount.umount();
}

#[test]
fn virsh_s_command_is_named_where_a_domain_prevents_ours() {
    let store = chain();
    let mount = Mount::new(&store);
    let held = Holder::domain(&store, "web01.qcow2", "db 7");
    let size = fs::metadata(mount.path("web01/snapshots/tuesday.raw")).expect("the disk").len() + (1 << 20);
    let path = |name: &str| fs::canonicalize(store.path(name)).expect("an image").display().to_string();
    let (leaf, tuesday, monday) = (path("web01.qcow2"), path("tuesday.qcow2"), path("monday.qcow2"));
    let control = Control::of(&mount, "web01");
    let planned = |command: &str| plan_of(&mount, command);
    for (verb, words, command) in [
        ("resize", "+1M", format!("blockresize 'db 7' {leaf} {size}B")),
        ("snapshot", "new", "snapshot-create-as 'db 7' new --disk-only".to_owned()),
        ("pull", "base=monday", format!("blockpull 'db 7' {leaf} --base {monday} --wait")),
        (
            "commit",
            "base=monday discard-internal",
            format!("blockcommit 'db 7' {leaf} --base {monday} --active --pivot --wait"),
        ),
        (
            "delete",
            "tuesday method=commit discard-internal",
            format!("blockcommit 'db 7' {leaf} --base {tuesday} --active --pivot --wait"),
        ),
    ] {
        let remedy = format!(" of domain db 7); while db 7 runs, use virsh {command}, or shut it down first");
        let sentence = control.refused(&format!("{verb} {words}"), Errno::BUSY);
        assert!(sentence.ends_with(&remedy), "{sentence}\n{remedy}");
        let plan = planned(&format!("{verb} {words}"));
        assert!(plan.contains(&remedy), "{verb}: {plan}");
    }
    // virsh has no such command, or would change a file that another chain depends on.
    store.overlay("other.qcow2", "monday.qcow2", "qcow2", "");
    for command in ["commit base=monday discard-internal", "rebase base=monday", "revert to=monday"] {
        let plan = planned(command);
        assert!(plan.contains(" of domain db 7)") && !plan.contains("virsh"), "{command}: {plan}");
    }
    drop(held);
    mount.umount();
}

/// The plan of a command on the chain web01.
fn plan_of(mount: &Mount, command: &str) -> String {
    let plan = Control::of(mount, "web01").file("plan");
    let mut file = fs::File::options().read(true).write(true).open(plan).expect("the plan");
    let mut text = String::new();
    std::io::Write::write_all(&mut file, command.as_bytes()).expect("a plan");
    file.read_to_string(&mut text).expect("its text");
    text
}

#[test]
fn a_plan_says_what_qemu_s_locks_would_refuse() {
    let store = chain();
    let mount = Mount::new(&store);
    let refused = |command: &str| -> Vec<String> {
        let text = plan_of(&mount, command);
        text.lines().filter_map(|line| line.strip_prefix("refused: ")).map(str::to_owned).collect()
    };
    let commands = [
        "snapshot new",
        "snapshot new internal",
        "commit top=active base=tuesday discard-internal",
        "pull",
        "delete tuesday method=pull",
        "delete active@inner",
        "revert to=active@inner",
        "rebase base=none",
        "rebase base=none unsafe drop-layers",
        "resize +1M",
    ];
    for command in commands {
        assert_eq!(refused(command), Vec::<String>::new(), "{command}");
    }
    let held = Qemu::running_on(&store, "web01.qcow2", &[]);
    for command in commands {
        let all = refused(command);
        let is_told =
            all.iter().any(|fact| fact.starts_with("web01.qcow2 is being ") && fact.contains("qemu-nbd["));
        assert!(is_told, "{command}: {all:?}");
    }
    // The layers below a running machine's disk can be cloned.
    assert_eq!(refused("clone new from=tuesday"), Vec::<String>::new());
    drop(held);
    // Disks that this mount itself writes cause no refusal, neither here nor in a plan beside it.
    let disk = rw(&mount.path("web01/active.raw"));
    for command in ["snapshot new", "pull", "resize +1M"] {
        assert_eq!(refused(command), Vec::<String>::new(), "{command}");
        let words = format!("tree mnt/web01 --dry-run {command}");
        assert!(!said(&store, &words, 0).contains("refused"), "{words}");
    }
    drop(disk);
    mount.umount();
}

#[test]
fn an_unmount_names_the_users_that_block_it() {
    let store = chain();
    let mount = Mount::new(&store);
    let loop_device =
        tool("losetup").args(["-r", "-f", "--show"]).arg(mount.path("web01/snapshots/monday.raw")).succeeds();
    let name = loop_device.trim();
    all_say(
        &store,
        &[(
            "umount mnt",
            1,
            &format!("mnt is in use by {name} (detach it: losetup -d {name}); close its files"),
        )],
    );
    tool("losetup").arg("-d").arg(name).succeeds();
    // A shell that becomes chainfs, in the mount itself.
    let script = format!("cd {}/web01 && exec {} umount ..", mount.dir().display(), chainfs_binary());
    let said = tool("bash").args(["-c", &script]).fails();
    assert!(
        said.contains("is in use by ")
            && said.contains("this command, which has its current directory there"),
        "{said}"
    );
    mount.umount();
}

#[test]
fn an_unmount_that_waits_names_the_processes() {
    let store = chain();
    let mount = Mount::new(&store);
    let mut other = Command::new("timeout")
        .args(["60", "unshare", "-m", "sh", "-c", "echo here; exec sleep 50"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("another namespace");
    let mut line = String::new();
    BufReader::new(other.stdout.take().expect("piped")).read_line(&mut line).expect("its word");
    let mut waiting = Command::new("timeout")
        .args(["40", chainfs_binary(), "umount"])
        .arg(mount.dir())
        .stderr(Stdio::piped())
        .spawn()
        .expect("chainfs");
    let mut sentence = String::new();
    BufReader::new(waiting.stderr.take().expect("piped")).read_line(&mut sentence).expect("its word");
    let fact = "to end: the store is still mounted in the mount namespace of sleep[";
    assert!(sentence.contains(fact), "{sentence}");
    let pid = Pid::from_raw(other.id().cast_signed()).expect("a process");
    kill_process(pid, Signal::TERM).expect("ours");
    other.wait().expect("a child");
    assert!(waiting.wait().expect("a child").success());
    mount.abandon();
}

#[test]
fn a_dead_mount_is_distinguished_from_a_missing_one() {
    let store = chain();
    let mount = Mount::new(&store);
    let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
    kill_process(daemon, Signal::KILL).expect("ours");
    eventually("the mount is dead", || fs::metadata(mount.dir()).is_err());
    let remedy = "the mount is dead because its daemon has ended; unmount it with chainfs umount, and mount \
        the store again\n";
    all_say(
        &store,
        &[
            ("commit mnt/web01", 1, remedy),
            ("snapshot mnt/web01 new", 1, remedy),
            ("snapshot mnt new --chains web01", 1, remedy),
            ("resize mnt/web01 +1G --dry-run", 1, remedy),
            ("cancel mnt/web01", 1, remedy),
        ],
    );
    mount.abandon();
}

#[test]
fn commands_on_an_image_outside_any_store_report_notes_and_users() {
    let store = chain();
    let made = ".chainfs-lock and .chainfs-intents were made in store, for the lock and notes of commands";
    all_say(
        &store,
        &[
            ("snapshot store/web01.qcow2 new", 0, made),
            (
                "commit store/web01.qcow2",
                1,
                "web01.qcow2 is a single image outside any store, so other users of its layers are unknown; \
                    say --store DIR",
            ),
            (
                "commit store/web01.qcow2 --top nope",
                1,
                "chainfs: web01.qcow2 has no view nope; there is active, new, tuesday",
            ),
        ],
    );
    assert!(!said(&store, "snapshot store/web01.qcow2 second", 0).contains("were made"));
    assert!(
        said(&store, "snapshot store/web01.qcow2 third --store store", 0)
            .contains("store/.chainfs was made: it marks the store")
    );
    // A layer at the end of no chain: the subject is there.
    let frozen = Store::new();
    frozen.create("gold.qcow2", MIB, "");
    tool("chmod").arg("444").arg(frozen.path("gold.qcow2")).succeeds();
    let mount =
        Mount::try_new(&frozen, &frozen.path("gold.qcow2"), &frozen.beside("mnt"), "").expect("a mount");
    all_say(
        &frozen,
        &[("pull mnt", 2, "chainfs: gold.qcow2 has no active layer; say into= with one of its layers\n")],
    );
    mount.umount();
}

#[test]
fn an_address_means_the_same_in_every_command() {
    let store = chain();
    let monday = store.oracle("monday.qcow2", "qcow2");
    let inner = store.try_oracle(Path::new("web01.qcow2"), "qcow2", Some("1")).expect("the snapshot");
    for (address, oracle) in [
        ("store/web01.qcow2@monday", &monday),
        ("store/web01.qcow2@monday.qcow2", &monday),
        ("store/tuesday.qcow2@monday", &monday),
        ("store/web01.qcow2@inner", &inner),
        ("store/web01.qcow2@active@inner", &inner),
        ("store/web01.qcow2@1", &inner),
    ] {
        for command in ["compare -F raw", "diff -F raw"] {
            said(&store, &format!("{command} {address} {}", oracle.display()), 0);
        }
        for command in ["map", "info", "check"] {
            said(&store, &format!("{command} {address}"), 0);
        }
        said(&store, &format!("ls {address}:"), 0);
    }
    let info = chainfs(&store, "info --json store/web01.qcow2@monday").succeeds();
    assert!(info.contains("monday.qcow2\"") && !info.contains("web01.qcow2\""), "{info}");
    let mount = Mount::new(&store);
    said(&store, &format!("compare -F raw mnt/web01/active.raw@inner {}", inner.display()), 0);
    said(&store, &format!("diff -F raw mnt/web01/active.raw@monday {}", monday.display()), 0);
    mount.umount();
}

#[test]
fn an_ambiguous_address_is_refused_with_both_meanings() {
    let store = chain();
    store.img(["snapshot", "-c", "monday", "web01.qcow2"]);
    let both = "store/web01.qcow2@monday is ambiguous: the layer (store/web01.qcow2@monday.qcow2) or the \
        internal snapshot \
                (store/web01.qcow2@active@monday); name one of them\n";
    let (sector, oracle) = ("store/web01.qcow2@monday", store.oracle("monday.qcow2", "qcow2"));
    all_say(
        &store,
        &[
            (&format!("compare {sector} store/base.raw"), 2, both),
            (&format!("diff {sector} store/base.raw"), 2, both),
            (&format!("map {sector}"), 2, both),
            (&format!("info {sector}"), 2, both),
            (&format!("check {sector}"), 1, both),
            (&format!("ls {sector}:"), 1, both),
        ],
    );
    said(&store, &format!("compare -F raw store/web01.qcow2@monday.qcow2 {}", oracle.display()), 0);
    said(&store, &format!("compare -F raw store/web01.qcow2@active@monday {}", oracle.display()), 1);
    // Two internal snapshots of one name.
    store.img(["snapshot", "-c", "twice", "web01.qcow2"]);
    store.img(["snapshot", "-c", "twice", "web01.qcow2"]);
    let two = "the internal snapshot (store/web01.qcow2@active@twice~3) or the internal snapshot \
        (store/web01.qcow2@active@twice~4)";
    all_say(
        &store,
        &[("map store/web01.qcow2@twice", 2, two), ("map store/web01.qcow2@active@twice~4", 0, "")],
    );
}

#[test]
fn no_snapshot_name_makes_an_address_ambiguous() {
    let store = chain();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "web01");
    for (command, sentence) in [
        ("snapshot inner", "web01.qcow2@inner means an internal snapshot; choose another name"),
        ("snapshot 1", "web01.qcow2@1 means an internal snapshot; choose another name"),
        ("snapshot monday internal", "web01.qcow2@monday means the layer monday; choose another name"),
        ("snapshot 1 internal", "web01.qcow2@1 means the internal snapshot of that id; choose another name"),
        (
            "revert to=active@inner save=monday",
            "web01.qcow2@monday means the layer monday; choose another name",
        ),
    ] {
        assert_eq!(control.refused(command, Errno::EXIST), sentence, "{command}");
    }
    control.done("snapshot wednesday");
    control.done("snapshot later internal");
    mount.umount();
}

#[test]
fn layers_drop_out_of_a_chain_only_with_drop_layers() {
    // (what is done to the store, the command, a part of the refusal, whether drop-layers is enough)
    let keep: fn(&Store) = |_| ();
    let moved: fn(&Store) = |store| {
        store.dir("moved");
        fs::rename(store.path("base.raw"), store.path("moved/base.raw")).expect("moved");
    };
    let all_moved: fn(&Store) = |store| {
        store.dir("moved");
        for name in ["base.raw", "monday.qcow2", "tuesday.qcow2"] {
            fs::rename(store.path(name), store.path(format!("moved/{name}"))).expect("moved");
        }
    };
    let short: fn(&Store) = |store| {
        fs::remove_file(store.path("base.raw")).expect("the base");
        store.raw("short.raw", MIB / 2, 3);
    };
    let other_format: fn(&Store) = |store| {
        fs::remove_file(store.path("base.raw")).expect("the base");
        store.create("other.qcow2", MIB, "");
    };
    let renamed: fn(&Store) =
        |store| fs::rename(store.path("base.raw"), store.path("golden.raw")).expect("renamed");
    let other_raw: fn(&Store) = |store| {
        fs::remove_file(store.path("base.raw")).expect("the base");
        store.raw("other.raw", MIB, 4);
    };
    let changed: fn(&Store) = |store| {
        fs::copy(store.path("tuesday.qcow2"), store.path("copy.qcow2")).expect("a copy");
        store.io("copy.qcow2", "qcow2", ["write -q -P 7 0 512"]);
    };
    let refused = [
        (
            moved,
            "rebase base=moved/base.raw unsafe",
            "web01.qcow2 would be backed by moved/base.raw instead of tuesday.qcow2: tuesday.qcow2, \
                monday.qcow2 drop out of the chain with what they hold; the layer whose backing file is \
                missing is monday: say layer=monday, or say drop-layers if that is wanted",
        ),
        (
            keep,
            "rebase base=base.raw unsafe",
            "tuesday.qcow2, monday.qcow2 drop out of the chain with what they hold; leave out unsafe, and \
                differing ranges are copied, or say drop-layers",
        ),
        (keep, "rebase base=monday unsafe", "tuesday.qcow2 drops out of the chain with what it holds"),
        (
            keep,
            "rebase base=none unsafe",
            "web01.qcow2 would be backed by nothing instead of tuesday.qcow2: tuesday.qcow2, monday.qcow2, \
                base.raw drop out",
        ),
        (keep, "rebase layer=monday base=none unsafe", "base.raw drops out of the chain with what it holds"),
        (
            moved,
            "rebase layer=monday base=none unsafe",
            "monday.qcow2 names base.raw as its backing file, and nothing is not that file moved: the \
                content of the missing file would read as zeroes",
        ),
        (
            all_moved,
            "rebase base=moved/monday.qcow2 unsafe",
            "moved/monday.qcow2 is not that file moved: moved/tuesday.qcow2 is there",
        ),
        (
            short,
            "rebase layer=monday base=short.raw unsafe",
            "short.raw is not that file moved: its disk is shorter",
        ),
        (
            other_format,
            "rebase layer=monday base=other.qcow2 unsafe",
            "other.qcow2 is not that file moved: it is qcow2, and the header says raw",
        ),
        (changed, "rebase base=copy.qcow2 unsafe", "tuesday.qcow2 drops out of the chain"),
        (
            renamed,
            "rebase layer=monday base=golden.raw unsafe",
            "golden.raw is not that file moved: it has another name, and nothing of the missing file is \
                left to compare it with; restore the missing file, or name its new path, \
                or say drop-layers",
        ),
        (
            other_raw,
            "rebase layer=monday base=other.raw unsafe",
            "other.raw is not that file moved: it has another name",
        ),
    ];
    for (prepare, command, sentence) in refused {
        let store = chain();
        prepare(&store);
        let header = store.info("web01.qcow2", "qcow2")["backing-filename"].clone();
        let mount = Mount::new(&store);
        let control = Control::of(&mount, "web01");
        let said = control.refused(command, Errno::NOTEMPTY);
        assert!(said.contains(sentence), "{command}\nsays: {said}\nand not: {sentence}");
        assert_eq!(store.info("web01.qcow2", "qcow2")["backing-filename"], header, "{command}");
        control.done(&format!("{command} drop-layers"));
        mount.umount();
    }
    let copied: fn(&Store) = |store| {
        fs::copy(store.path("tuesday.qcow2"), store.path("copy.qcow2")).expect("a copy");
    };
    for (prepare, command) in [
        (moved, "rebase layer=monday base=moved/base.raw unsafe"),
        (all_moved, "rebase base=moved/tuesday.qcow2 unsafe"),
        (copied, "rebase base=copy.qcow2 unsafe"),
        (keep, "rebase base=tuesday.qcow2 unsafe"),
    ] {
        let store = chain();
        let before = store.oracle("web01.qcow2", "qcow2");
        prepare(&store);
        let mount = Mount::new(&store);
        Control::of(&mount, "web01").done(command);
        mount.umount();
        assert_same(&before, &store.oracle("web01.qcow2", "qcow2"));
    }
}

#[test]
fn program_and_control_file_read_a_list_of_chains_alike() {
    let store = Store::new();
    store.create("a.qcow2", MIB, "");
    store.dir("x,y");
    store.create("x,y/b.qcow2", MIB, "");
    let mount = Mount::new(&store);
    said(&store, r"snapshot mnt first --chains a,x\,y/b", 0);
    said(&store, r"snapshot mnt second --chains a --chains x\,y/b", 0);
    let control = mount.path(".chainfs/control/snapshot");
    assert_eq!(support::command::give(&control, br"third 'chains=a,x\,y/b'"), None);
    for name in ["first", "second", "third"] {
        assert!(
            store.path(format!("{name}.qcow2")).exists() && store.path(format!("x,y/{name}.qcow2")).exists(),
            "{name}"
        );
    }
    mount.umount();
}

#[test]
fn the_creation_of_the_control_directory_is_reported_once() {
    const MADE: &str = "store/.chainfs was made: it marks the store, and holds its lock and notes; keep it";
    let output =
        |store: &Store| fs::read_to_string(store.beside("mount.output")).expect("what the mount said");
    // Which disks are raw is remembered.
    let store = chain();
    Mount::with(&store, "ro").umount();
    assert!(!output(&store).contains("made") && !store.path(".chainfs").exists(), "{}", output(&store));
    Mount::new(&store).umount();
    assert!(output(&store).contains(MADE) && store.path(".chainfs").exists(), "{}", output(&store));
    Mount::new(&store).umount();
    assert!(!output(&store).contains("made"), "{}", output(&store));
    // Else it is the first command that needs a directory for its intents.
    let store = Store::new();
    store.create("a.qcow2", MIB, "");
    let mount = Mount::new(&store);
    assert!(!output(&store).contains("made") && !store.path(".chainfs").exists(), "{}", output(&store));
    let first = said(&store, "snapshot mnt/a monday", 0);
    assert!(first.contains(MADE), "{first}");
    let second = said(&store, "snapshot mnt/a tuesday", 0);
    assert!(!second.contains("made"), "{second}");
    mount.umount();
    // A single image creates no file beside it without a command.
    let store = Store::new();
    store.raw("a.raw", MIB, 1);
    Mount::try_new(&store, &store.path("a.raw"), &store.beside("mnt"), "").expect("a mount").umount();
    assert_eq!(mount::names_in(&store.root()), ["a.raw"], "{}", output(&store));
}
