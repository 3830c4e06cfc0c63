//! `README.txt` and the pages of a mount, read as users read them: through real mounts, as root and as
//! another user. Oracles: an HTML parser of Python, tidy(1), bash, du(1), and the kernel's stat(2) for every
//! link.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use support::*;

use super::rights::{acting, open_store};

const MIB: u64 = 1 << 20;
const PAGE: &str = ".chainfs/index.html";
const ODD: &str = "odd \"n\" <b>&amp; %2F #?:\u{202e}x\\ü";

/// Parses HTML from standard input, and complains about every element that is not closed where it has to be.
const STRICT: &str = r"
import sys
from html.parser import HTMLParser
VOID = {'meta', 'br'}
class Strict(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.open, self.count = [], 0
    def handle_starttag(self, tag, attrs):
        self.count += 1
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        assert tag in VOID or tag not in ('script', 'img', 'iframe', 'object', 'link', 'form'), tag
        self.open.append(tag)
    def handle_startendtag(self, tag, attrs):
        assert tag in VOID or 'svg' in self.open, tag
    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()
    def unknown_decl(self, data):
        raise AssertionError(data)
strict = Strict()
strict.feed(sys.stdin.buffer.read().decode('utf-8'))
strict.close()
assert not strict.open and strict.count > 50, (strict.open, strict.count)
";

/// The values of `href`, decoded as a browser does it: paths relative to the page.
fn links(html: &str) -> Vec<PathBuf> {
    let values =
        html.split("href=\"").skip(1).filter_map(|rest| rest.split_once('"').map(|(value, _)| value));
    let outward = values.filter(|value| !value.starts_with('#'));
    outward
        .map(|value| {
            assert!(!value.contains('&'), "a path is percent-encoded: {value}");
            let path = value.split_once('#').map_or(value, |(path, _)| path);
            let mut bytes = Vec::new();
            let mut rest = path.as_bytes();
            while let Some((first, after)) = rest.split_first() {
                if *first == b'%' {
                    let digits = std::str::from_utf8(&after[..2]).expect("two digits");
                    bytes.push(u8::from_str_radix(digits, 16).expect("two digits"));
                    rest = &after[2..];
                } else {
                    assert!(first.is_ascii_alphanumeric() || b"-._~/@".contains(first), "{value}");
                    bytes.push(*first);
                    rest = after;
                }
            }
            PathBuf::from(OsString::from_vec(bytes))
        })
        .collect()
}

/// Follows every link of the pages that are reached from this one. Returns the pages.
fn follow(root: &Path, from: &str) -> BTreeSet<PathBuf> {
    let (mut seen, mut left) = (BTreeSet::new(), vec![root.join(from)]);
    let root = fs::canonicalize(root).expect("the mount");
    while let Some(page) = left.pop() {
        if !seen.insert(fs::canonicalize(&page).unwrap_or_else(|error| panic!("{}: {error}", page.display())))
        {
            continue;
        }
        for link in links(&fs::read_to_string(&page).expect("a page")) {
            let target = page.parent().expect("a directory").join(&link);
            let found = fs::metadata(&target).unwrap_or_else(|error| panic!("{}: {error}", target.display()));
            let inside = fs::canonicalize(&target).expect("a place");
            assert!(inside.starts_with(&root), "{} leads out", link.display());
            assert_eq!(link.as_os_str().as_bytes().ends_with(b"/"), found.is_dir(), "{}", link.display());
            if target.file_name().is_some_and(|name| name == "index.html") {
                left.push(target);
            }
        }
    }
    seen
}

/// Has other programs check the page.
fn check_html(store: &Store, html: &str) {
    let file = store.beside("page.html");
    fs::write(&file, html).expect("a file");
    let script = store.beside("strict.py");
    fs::write(&script, STRICT).expect("a file");
    tool("bash").arg("-c").arg("exec python3 \"$1\" < \"$2\"").arg("-").arg(&script).arg(&file).succeeds();
    let (code, _, said) = tool("tidy").args(["-q", "-e", "--drop-empty-elements", "no"]).arg(&file).outcome();
    assert_eq!((code, said.as_str()), (0, ""), "tidy complains");
}

/// A store with most of what a page shows.
fn varied(store: &Store) {
    store.raw("base.raw", MIB, 1);
    store.overlay("monday.qcow2", "base.raw", "raw", "");
    store.io("monday.qcow2", "qcow2", ["write -q 0 256k"]);
    store.overlay("tuesday.qcow2", "monday.qcow2", "qcow2", "");
    store.overlay("web.qcow2", "tuesday.qcow2", "qcow2", "");
    store.io("web.qcow2", "qcow2", ["write -q 0 128k"]);
    store.img(["snapshot", "-c", "inner <i>", "web.qcow2"]);
    store.overlay("side.qcow2", "base.raw", "raw", "");
    // QEMU takes what is before a colon for a protocol.
    store.create("odd.qcow2", MIB, "");
    fs::rename(store.path("odd.qcow2"), store.path(format!("{ODD}.qcow2"))).expect("a name");
    store.create("README.txt.qcow2", MIB, "");
    store.dir("sub dir");
    store.create("sub dir/db.qcow2", MIB, "");
    store.overlay_unchecked("broken.qcow2", "gone.raw", "raw");
}

#[test]
fn every_link_leads_somewhere_and_every_page_is_valid() {
    let store = Store::new();
    varied(&store);
    let mount = Mount::new(&store);
    let pages = follow(mount.dir(), PAGE);
    assert_eq!(pages.len(), 1 + 6, "{pages:?}");
    for page in &pages {
        check_html(&store, &fs::read_to_string(page).expect("a page"));
    }
    let html = mount.text(PAGE);
    for text in [
        "broken.qcow2</b> cannot be read: its backing file &quot;gone.raw&quot; is missing",
        "<span class=\"remedy\">put it back",
        "web/files/active@inner%20%3Ci%3E/",
        "odd &quot;n&quot; &lt;b&gt;&amp;amp; %2F #?:\\u{202e}x\\ü",
        ">find out</a>",
        "README.txt.qcow2/info/index.html",
    ] {
        assert!(html.contains(text), "{text} in\n{html}");
    }
    mount.umount();
}

#[test]
fn files_that_are_not_shown_are_not_linked() {
    let store = Store::new();
    varied(&store);
    let mount = Mount::with(&store, "ro,nofiles");
    follow(mount.dir(), PAGE);
    let (page, readme) = (mount.text(PAGE), mount.text("README.txt"));
    assert!(!page.contains("files/") && !page.contains("os.txt"), "{page}");
    assert!(!readme.contains("files/") && !readme.contains("chainfs snapshot"), "{readme}");
    mount.umount();
}

#[test]
fn the_commands_of_the_readme_work() {
    let store = Store::new();
    varied(&store);
    let mount = Mount::new(&store);
    let readme = mount.text("README.txt");
    let dir = mount.dir().display().to_string();
    for text in [store.root().display().to_string(), format!("chainfs umount {dir}"), "web/snapshots/".into()]
    {
        assert!(readme.contains(&text), "{text} in\n{readme}");
    }
    assert!(readme.is_ascii() && readme.lines().all(|line| line.len() < 250) && readme.len() < 6000);
    let lines: Vec<&str> = readme.lines().collect();
    let commands: Vec<&str> = lines
        .windows(2)
        .filter(|pair| pair[0].starts_with("  # "))
        .map(|pair| pair[1].trim_start())
        .collect();
    assert_eq!(commands.len(), 10, "{commands:?}");
    let page = mount.text(PAGE);
    for (number, command) in commands.iter().enumerate() {
        assert!(page.contains(&format!("<code>{command}</code>")), "{command}");
        let name = format!("new-{number}");
        let (line, most) = match command.split(' ').next().expect("a program") {
            // It would boot; the disk that it names is there.
            "qemu-system-x86_64" => {
                let disk = command.split_once("file=").expect("a disk").1.trim_end_matches(",format=raw");
                (format!("qemu-img info -f raw {disk}"), 0)
            }
            // 1: the two disks differ.
            _ if command.contains(" diff ") => ((*command).to_owned(), 1),
            _ => (command.replace("NEW-NAME", &name), 0),
        };
        let line = line.replace("chainfs ", &format!("{} ", chainfs_binary()));
        let (code, said, wrong) = tool("bash").arg("-c").arg(&line).current_dir(store.beside("")).outcome();
        assert!((0..=most).contains(&code), "{line}: {said}{wrong}");
    }
    mount.umount();
}

#[test]
fn what_the_store_calls_readme_txt_is_not_hidden() {
    let store = Store::new();
    store.create("README.txt.qcow2", MIB, "");
    store.create("README.qcow2", MIB, "");
    fs::write(store.path("README.txt"), vec![7; 512]).expect("a raw disk");
    let mount = Mount::with(&store, "format=README.txt:raw");
    assert!(mount.text("README.txt").contains("3 chains"));
    let names: Vec<String> = mount.top();
    assert_eq!(names.len(), 3, "{names:?}");
    for name in &names {
        assert!(mount.path(name).join("active.raw").exists(), "{name}");
    }
    follow(mount.dir(), PAGE);
    mount.umount();

    let other = Store::new();
    other.dir("README.txt");
    other.create("README.txt/web.qcow2", MIB, "");
    let mount = Mount::new(&other);
    assert!(mount.path("README.txt/web/active.raw").exists(), "a directory has precedence");
    follow(mount.dir(), PAGE);
    mount.umount();
}

#[test]
fn a_mount_of_one_image_explains_itself() {
    let store = Store::new();
    varied(&store);
    let mount = Mount::try_new(&store, &store.path("web.qcow2"), &store.beside("mnt"), "")
        .expect("it can be mounted");
    let readme = mount.text("README.txt");
    assert!(readme.contains("\n  active.raw ") && readme.contains("\n  snapshots/tuesday.raw "), "{readme}");
    assert_eq!(follow(mount.dir(), PAGE).len(), 2);
    check_html(&store, &mount.text(PAGE));
    mount.umount();
}

#[test]
fn another_user_sees_no_hidden_name_and_no_dead_link() {
    let store = open_store();
    varied(&store);
    for file in fs::read_dir(store.root()).expect("the store") {
        let path = file.expect("a file").path();
        let bits = if path.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(bits)).expect("a mode");
    }
    store.create("secret.qcow2", MIB, "");
    for file in ["secret.qcow2", "monday.qcow2"] {
        fs::set_permissions(store.path(file), fs::Permissions::from_mode(0o600)).expect("a mode");
    }
    let mount = Mount::with(&store, "allow_other");
    let (page, readme, web) = acting(2001, &[], || {
        follow(mount.dir(), PAGE);
        (mount.text(PAGE), mount.text("README.txt"), mount.text("web/info/index.html"))
    });
    for text in [&page, &readme, &web] {
        assert!(!text.contains("secret"), "{text}");
    }
    // The overlay's own header names it.
    assert!(web.contains("backing file &quot;monday.qcow2&quot; may not be read by you"), "{web}");
    assert!(page.contains("web/info/index.html#problems"), "{page}");
    assert!(!page.contains("snapshots/monday.raw") && !page.contains("files/tuesday/"), "{page}");
    assert!(mount.text(PAGE).contains("secret/info/index.html"), "root sees all");
    assert!(mount.text(PAGE).contains("web/snapshots/monday.raw"), "root sees all");
    mount.umount();
}

/// The bytes in the tooltip of the first size after a mark in the page.
fn size_after(html: &str, mark: &str) -> u64 {
    let (_, rest) = html.split_once(mark).unwrap_or_else(|| panic!("{mark} in {html}"));
    let (_, rest) = rest.split_once("title=\"").expect("a tooltip");
    rest.split_once(" bytes").expect("a size").0.parse().expect("a number")
}

fn du(store: &Store) -> u64 {
    let said = tool("du").args(["-s", "--block-size=1", "--exclude=.chainfs"]).arg(store.root()).succeeds();
    said.split_whitespace().next().expect("a size").parse().expect("a number")
}

#[test]
fn what_is_freed_is_what_du_sees() {
    let store = Store::new();
    varied(&store);
    let mount = Mount::new(&store);
    // Deleting a snapshot frees at most its own size.
    let own = size_after(&mount.text("web/info/index.html"), "<th scope=\"row\">monday</th>");
    let before = du(&store);
    tool(chainfs_binary()).args(["delete"]).arg(mount.path("web")).arg("monday").succeeds();
    let freed = before - du(&store);
    assert!(freed > 0 && freed <= own, "{freed} of {own}");
    // Removing a chain frees exactly what the page says: base.raw is shared with another chain.
    let row = mount.text("web/info/index.html");
    let whole = size_after(&row, "freed if removed </span>");
    mount.umount();
    let before = du(&store);
    for file in ["tuesday.qcow2", "web.qcow2"] {
        fs::remove_file(store.path(file)).expect("a layer");
    }
    assert_eq!(before - du(&store), whole);
}

#[test]
fn snapshots_are_listed_by_date_and_lists_say_what_they_leave_out() {
    let store = Store::new();
    store.create("n00.qcow2", MIB, "");
    for number in 1..40 {
        store.overlay(&format!("n{number:02}.qcow2"), &format!("n{:02}.qcow2", number - 1), "qcow2", "");
    }
    // Not in the order of the chain.
    for number in 0..39_u64 {
        let file =
            File::options().write(true).open(store.path(format!("n{number:02}.qcow2"))).expect("an image");
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + (number * 7 % 39) * 86_400);
        file.set_modified(at).expect("a time");
    }
    for number in 0..1200 {
        File::create(store.path(format!("r{number:04}.raw"))).expect("a file").set_len(MIB).expect("a size");
    }
    let mount = Mount::new(&store);
    let dates = |html: &str| -> Vec<String> {
        let (_, section) = html.split_once("<h2>Snapshots by date</h2>").expect("a section");
        let cells = section.split("<td class=\"date\"><time datetime=\"").skip(1);
        cells.filter_map(|cell| Some(cell.split_once('"')?.0.to_owned())).collect()
    };
    let html = mount.text(PAGE);
    let of_store = dates(&html);
    assert!(of_store.is_sorted_by(|a, b| a > b) && of_store.len() == 30, "{of_store:?}");
    for more in ["201 more chains: ", "9 more snapshots: ", "1200 more chains are one image"] {
        assert!(html.contains(more), "{more}");
    }
    assert!(html.len() < 3 << 20, "{} bytes", html.len());
    let of_chain = dates(&mount.text("n39/info/index.html"));
    assert!(of_chain.is_sorted_by(|a, b| a > b) && of_chain.len() == 39, "{of_chain:?}");
    mount.umount();
}

#[test]
fn a_guest_is_named_only_after_it_was_looked_for() {
    let store = Store::new();
    let guest = store.beside("guest");
    for directory in ["etc", "usr/bin"] {
        fs::create_dir_all(guest.join(directory)).expect("a directory");
    }
    let release = "ID=debian\nPRETTY_NAME=\"Debian <b>12</b>\"\n";
    fs::write(guest.join("etc/os-release"), release).expect("a file");
    fs::write(guest.join("etc/hostname"), "vm01\n").expect("a file");
    tool("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&guest)
        .arg(store.path("vm.raw"))
        .arg("8M")
        .succeeds();
    let mount = Mount::new(&store);
    for _ in 0..2 {
        assert!(mount.text(PAGE).contains(">find out</a>"), "looking at the page parses no guest");
    }
    assert!(mount.text("vm/info/os.txt").contains("pretty-name: Debian <b>12</b>"));
    eventually("the page knows", || mount.text(PAGE).contains("Debian &lt;b&gt;12&lt;/b&gt; (vm01)"));
    mount.umount();
}
