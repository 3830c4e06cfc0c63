//! The daemon's log in the journal: a listener of the test's own in journald's place.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use support::command::Control;
use support::*;

struct Journal(UnixDatagram);

impl Journal {
    /// Listens beside a store.
    fn new(store: &Store) -> Self {
        let socket = UnixDatagram::bind(store.beside("journal")).expect("a socket");
        socket.set_read_timeout(Some(support::tools::hang())).expect("a limit");
        Self(socket)
    }

    /// The fields of the next record; none of these values has a line end.
    fn next(&self) -> BTreeMap<String, String> {
        let mut bytes = [0; 16 << 10];
        let len = self.0.recv(&mut bytes).expect("a record");
        let text = std::str::from_utf8(&bytes[..len]).expect("text");
        let fields = text.lines().map(|line| line.split_once('=').unwrap_or_else(|| panic!("{text}")));
        fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// The next record whose message has these words.
    fn of(&self, words: &str) -> BTreeMap<String, String> {
        std::iter::repeat_with(|| self.next()).find(|record| record["MESSAGE"].contains(words)).expect("one")
    }
}

/// chainfs with this variable, and with stderr as the journal.
fn as_service(store: &Store, stream: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("JOURNAL_STREAM={stream} exec \"$0\" \"$@\"");
    command.args(["-c", &script, chainfs_binary()]);
    command.env("CHAINFS_TEST_JOURNAL", store.beside("journal"));
    command
}

const STDERR: &str = "$(stat -L -c %d:%i /dev/fd/2)";

#[test]
fn the_journal_gets_each_message_with_its_fields() {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    let journal = Journal::new(&store);
    let mount = Mount::foreground(&store, as_service(&store, STDERR), "");
    let first = journal.of("mounted ");
    for (name, value) in [
        ("PRIORITY", "6"),
        ("SYSLOG_IDENTIFIER", "chainfs"),
        ("SYSLOG_FACILITY", "3"),
        ("CHAINFS_STORE", &*store.root().to_string_lossy()),
        ("CHAINFS_MOUNT", &*mount.dir().to_string_lossy()),
    ] {
        assert_eq!(first.get(name).map(String::as_str), Some(value), "{first:?}");
    }
    let control = Control::of(&mount, "web");
    control.done("snapshot wednesday");
    let done = journal.of("done");
    for (name, value) in [
        ("CHAINFS_COMMAND", "snapshot wednesday"),
        ("CHAINFS_CHAIN", "web"),
        ("CHAINFS_JOB", "1"),
        ("PRIORITY", "6"),
    ] {
        assert_eq!(done.get(name).map(String::as_str), Some(value), "{done:?}");
    }
    // One that runs in a thread of its own.
    control.done("commit");
    let done = journal.of("done");
    assert_eq!(done.get("CHAINFS_JOB").map(String::as_str), Some("2"), "{done:?}");
    assert_eq!(done.get("CHAINFS_COMMAND").map(String::as_str), Some("commit"), "{done:?}");
    // A refusal, and what its writer sees.
    assert!(control.give("delete nothing").is_some());
    let refused = journal.of("nothing");
    assert_eq!(refused.get("CHAINFS_COMMAND").map(String::as_str), Some("delete nothing"), "{refused:?}");
    assert_eq!(refused.get("CHAINFS_ERROR").map(String::as_str), Some("NotFound"), "{refused:?}");
    // Nothing comes twice: as text, too.
    let said = fs::read_to_string(store.beside("mount.output")).expect("stderr");
    assert!(!said.contains("mounted") && !said.contains("wednesday"), "{said}");
    mount.umount();
}

/// A terminal or a file is no journal, even if a service has started the program.
#[test]
fn a_redirected_stderr_gets_the_messages_itself() {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    let journal = Journal::new(&store);
    let mount = Mount::foreground(&store, as_service(&store, "1:1"), "");
    mount.umount();
    let said = fs::read_to_string(store.beside("mount.output")).expect("stderr");
    assert!(said.contains("mounted"), "{said}");
    // People need no fields.
    assert!(!said.contains("store="), "{said}");
    journal.0.set_nonblocking(true).expect("an option");
    assert!(journal.0.recv(&mut [0; 16]).is_err());
}

/// In the background the journal comes before syslog; its end is no harm.
#[test]
fn a_daemon_in_the_background_writes_to_the_journal_and_lives_without_it() {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    let journal = Journal::new(&store);
    let mut command = tool("env");
    command.arg(format!("CHAINFS_TEST_JOURNAL={}", store.beside("journal").display())).arg(chainfs_binary());
    let mount = Mount::by(&store, command, &store.root(), &store.beside("mnt"), "").expect("a mount");
    let control = Control::of(&mount, "web");
    assert!(control.give("snapshot base").is_some());
    let refused = journal.of("refused");
    assert_eq!(refused.get("PRIORITY").map(String::as_str), Some("4"), "{refused:?}");
    assert_eq!(refused.get("ERRNO").map(String::as_str), Some("17"), "{refused:?}");
    assert_eq!(refused.get("CHAINFS_ERROR").map(String::as_str), Some("Exists"), "{refused:?}");
    drop(journal);
    fs::remove_file(store.beside("journal")).expect("a socket");
    assert!(control.give("snapshot base").is_some());
    control.done("snapshot wednesday");
    mount.umount();
}
