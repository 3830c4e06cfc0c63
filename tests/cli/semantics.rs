//! Tests docs/SEMANTICS.md and README.md: the examples of the former are run, its errno table is compared; of
//! the latter the pictures, the tree, every one-liner, the commands of its installation and its configuration
//! file.

use std::fs;
use std::path::{Path, PathBuf};

use chainfs::error::ERROR_KINDS;
use chainfs::fs::errno;
use support::examples::{Ending, Example, blocks, document, example_blocks, examples, matches};
use support::{Outcome as _, chainfs_binary, project, tool};

const DOCUMENT: &str = "docs/SEMANTICS.md";

#[test]
fn the_examples_do_what_they_say() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().canonicalize().expect("its path");
    let _ending = Ending(place.clone());
    let examples = examples(&document(DOCUMENT), "console");
    assert!(examples.len() > 30, "the document has lost its examples");
    for example in examples {
        example.run(&place);
    }
}

/// The store that the README shows, made by its script, with a place for its mount.
struct Readme {
    place: PathBuf,
    _ending: Ending,
    _directory: tempfile::TempDir,
}

impl Readme {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let place = directory.path().canonicalize().expect("its path");
        for name in ["images", "mnt", "guest", "bin", "config"] {
            fs::create_dir(place.join(name)).expect("a directory");
        }
        // No machine of the tests boots another; that it would find its disk is enough.
        let stub = "#!/bin/sh\nfor word; do case $word in file=*) word=${word#file=}; exec test \
            -r \"${word%%,*}\"; esac; done; exit 1\n";
        // No browser either.
        let browser = "#!/bin/sh\nexec grep -q '^<!DOCTYPE html>' \"$1\"\n";
        for (name, stub) in [("qemu-system-x86_64", stub), ("xdg-open", browser)] {
            let program = place.join("bin").join(name);
            fs::write(&program, stub).expect("a program");
            tool("chmod").arg("755").arg(&program).succeeds();
        }
        let script = project().join("examples/store.sh");
        tool(script.to_str().expect("text")).arg(place.join("images")).succeeds();
        let made = Self { _ending: Ending(place.clone()), place, _directory: directory };
        made.runs("cp -a --sparse=never /srv/images ../kept");
        made.runs("cp -a /srv/images ../small");
        made
    }

    /// Makes the store again what it was; `copy`: `kept`, or `small`, where other holes change what commands
    /// have to copy.
    fn renew(&self, copy: &str) {
        self.runs("rm -rf /srv/images/* /srv/images/.chainfs /srv/restored*");
        self.runs(&format!(
            "cp -a --sparse={} ../{copy}/. /srv/images/",
            if copy == "kept" { "never" } else { "auto" }
        ));
    }

    /// Gives a line of the README to a shell in the directory of the images, with places of this test for the
    /// README's.
    fn run(&self, line: &str) -> (i32, String, String) {
        let place = self.place.to_str().expect("text");
        let line = line
            .replace("/mnt/guest", &format!("{place}/guest"))
            .replace("/mnt/images", &format!("{place}/mnt"))
            .replace("/srv/restored", &format!("{place}/restored"))
            .replace("/srv/images", &format!("{place}/images"));
        let program = Path::new(chainfs_binary()).parent().expect("its directory").display();
        let path = format!("{place}/bin:{program}:{}", std::env::var("PATH").expect("PATH"));
        let mut shell = tool("bash");
        shell.args(["-c", &format!("set -o pipefail; {line}")]).current_dir(self.place.join("images"));
        shell
            .env("PATH", path)
            .env("XDG_CONFIG_HOME", self.place.join("config"))
            .env("LC_ALL", "C.UTF-8")
            .outcome()
    }

    fn runs(&self, line: &str) -> String {
        let (code, out, err) = self.run(line);
        assert_eq!(code, 0, "{line}\n{out}{err}");
        out
    }
}

/// The commands of the README: the lines of its `sh` blocks that are no comments.
fn one_liners(readme: &str) -> Vec<String> {
    let blocks = blocks(readme).into_iter().filter(|(info, _)| *info == "sh");
    blocks.flat_map(|(_, lines)| lines).filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn every_one_liner_of_the_readme_works_on_its_store() {
    let made = Readme::new();
    let commands = one_liners(&document("README.md"));
    assert!(commands.len() >= 30, "the README has lost its commands");
    for command in &commands {
        made.renew("small");
        if command.contains("moved/") {
            made.runs("mkdir moved && mv base.raw moved/");
        }
        made.runs("chainfs mount /srv/images /mnt/images -o trash=7");
        let mut command = command.clone();
        if command.contains(" ID") {
            made.runs("chainfs delete /mnt/images/web01 tuesday --method pull");
            let id = made.runs("chainfs trash /srv/images --json | jq -r .[0].id");
            command = command.replace(" ID", &format!(" {}", id.trim()));
        }
        let (code, out, err) = made.run(&command);
        let differs = ["diff ", "chainfs diff ", "chainfs compare ", "chainfs who "]
            .iter()
            .any(|begin| command.starts_with(begin));
        assert_eq!(code, i32::from(differs), "{command}\n{out}{err}");
        if command.starts_with("mount ") {
            made.runs("cat /mnt/guest/etc/motd && umount /mnt/guest");
        }
        if command.starts_with("cp --sparse") {
            made.runs("test -w /srv/restored.raw && [ $(stat -c %a /srv/restored.raw) != 444 ]");
        }
        made.runs("chainfs umount /mnt/images");
    }
}

#[test]
fn the_readme_s_picture_and_tree_show_its_store() {
    let made = Readme::new();
    let readme = document("README.md");
    let all = blocks(&readme);
    let tree = all.iter().find(|(_, lines)| lines[0] == "$ chainfs tree /srv/images").expect("the tree").1
        [1..]
        .to_vec();
    // Sizes and dates are another day's.
    let shape = |line: &str| {
        let words = line
            .split("  ")
            .map(str::trim)
            .filter(|word| !word.is_empty() && !word.starts_with("20") && !word.ends_with("iB"));
        words.map(|word| word.split(" · 4").next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let drawn = made.runs("chainfs tree /srv/images");
    let drawn: Vec<_> = drawn.lines().map(shape).collect();
    assert_eq!(tree.iter().map(|line| shape(line)).collect::<Vec<_>>(), drawn);
    made.runs("chainfs mount /srv/images /mnt/images");
    let picture = &all.iter().find(|(_, lines)| lines[0] == "/mnt/images/").expect("the picture").1;
    let names = |line: &&str| {
        let name = line.trim_start_matches(['│', '├', '└', '─', ' ']).split(' ').next().unwrap_or_default();
        name.replace("VIEW", "monday").trim_end_matches('…').to_owned()
    };
    let is_entry = |line: &&&str| line.contains("── ");
    let shown: Vec<String> = picture.iter().filter(is_entry).map(names).collect();
    for name in &shown {
        let found = ["", "web01/", "web01/snapshots/"]
            .iter()
            .any(|place| made.place.join("mnt").join(place).join(name).exists());
        assert!(found, "{name} is not there");
    }
    let listed = made.runs("ls -A /mnt/images /mnt/images/web01 /mnt/images/web01/snapshots");
    for name in listed.lines().filter(|line| !line.is_empty() && !line.ends_with(':')) {
        assert!(
            shown.iter().any(|shown| shown.split('/').next() == Some(name)),
            "{name} is not in the picture"
        );
    }
    made.runs("chainfs umount /mnt/images");
}

#[test]
fn the_readme_s_output_is_the_program_s() {
    let made = Readme::new();
    let blocks = example_blocks(&document("README.md"), "console");
    assert!(blocks.iter().flatten().count() >= 10, "the README has lost its output");
    for block in blocks {
        made.renew("kept");
        made.runs("chainfs mount /srv/images /mnt/images");
        for Example { command, expected } in block {
            let (_, out, _) = made.run(&command);
            assert!(matches(&out, &expected), "$ {command}\nsaid:\n{out}\nbut the README shows:\n{expected}");
        }
        made.runs("chainfs umount /mnt/images");
    }
}

#[test]
fn the_readme_s_svg_shows_its_store() {
    let made = Readme::new();
    // Sizes and dates are another day's.
    let shape = |svg: &str| {
        let texts = svg.split("<text ").skip(1).filter_map(|text| text.split(['>', '<']).nth(1));
        let texts = texts.filter(|text| !text.ends_with("iB") && !text.starts_with("20"));
        texts.map(|text| text.split(" on disk").last().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let drawn = shape(&made.runs("chainfs tree --output svg /srv/images"));
    assert!(drawn.len() > 15, "{drawn:?}");
    assert_eq!(drawn, shape(&document("docs/pictures/tree.svg")));
}

#[test]
fn the_readme_s_installation_and_configuration_work() {
    let made = Readme::new();
    let readme = document("README.md");
    let all = blocks(&readme);
    let install =
        &all.iter().find(|(_, lines)| lines[0].starts_with("cargo build --release")).expect("a block").1;
    let root = made.place.join("root");
    for directory in ["usr/local/bin", "sbin", "target/release"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    for program in ["chainfs", "mount-chainfs"] {
        fs::write(root.join("target/release").join(program), "").expect("a file");
    }
    // As on a fresh system, but beneath a directory, and without a second build.
    let script: Vec<String> = install[1..]
        .iter()
        .map(|line| {
            line.replace(" /usr", &format!(" {0}/usr", root.display()))
                .replace(" /sbin", &format!(" {}/sbin", root.display()))
        })
        .collect();
    made.runs(&format!("set -e; cd {}\n{}", root.display(), script.join("\n")));
    for made in [
        "usr/local/share/man/man8/mount.chainfs.8",
        "usr/local/share/man/man1/chainfs.1",
        "usr/local/bin/mount-chainfs",
    ] {
        assert!(root.join(made).exists(), "{made}");
    }
    let config = all.iter().find(|(info, _)| *info == "toml").expect("a configuration file").1.join("\n");
    fs::write(made.place.join("bin/chainfs.toml"), config).expect("a file");
    made.runs(&format!(
        "chainfs mount /srv/images /mnt/images -o config={}/bin/chainfs.toml",
        made.place.display()
    ));
    made.runs("chainfs umount /mnt/images");
}

#[test]
fn a_wildcard_stands_for_anything_in_its_line_only() {
    assert!(matches("a 12 b\nc\n", "a [..] b\nc\n"));
    assert!(matches("a 12 b", "[..]"));
    assert!(!matches("a 12 b\n", "a [..] c\n"));
    assert!(!matches("a\nb\n", "[..]\n"));
    assert!(!matches("", "a\n"));
}

#[test]
fn the_table_of_errors_is_the_programs() {
    let text = document(DOCUMENT);
    let rows: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let kind = cells.get(2)?.strip_prefix('`')?.strip_suffix('`')?;
            Some((kind.to_string(), (*cells.get(1)?).to_string()))
        })
        .collect();
    let expected: Vec<(String, String)> =
        ERROR_KINDS.iter().map(|kind| (format!("{kind:?}"), name(errno(*kind)))).collect();
    assert_eq!(rows, expected);
}

fn name(errno: rustix::io::Errno) -> String {
    let names = [
        (rustix::io::Errno::NOENT, "ENOENT"),
        (rustix::io::Errno::INVAL, "EINVAL"),
        (rustix::io::Errno::EXIST, "EEXIST"),
        (rustix::io::Errno::NOTEMPTY, "ENOTEMPTY"),
        (rustix::io::Errno::CANCELED, "ECANCELED"),
        (rustix::io::Errno::BUSY, "EBUSY"),
        (rustix::io::Errno::ACCESS, "EACCES"),
        (rustix::io::Errno::ROFS, "EROFS"),
        (rustix::io::Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (rustix::io::Errno::STALE, "ESTALE"),
        (rustix::io::Errno::IO, "EIO"),
        (rustix::io::Errno::PERM, "EPERM"),
        (rustix::io::Errno::MFILE, "EMFILE"),
        (rustix::io::Errno::NOSPC, "ENOSPC"),
        (rustix::io::Errno::DQUOT, "EDQUOT"),
        (rustix::io::Errno::FBIG, "EFBIG"),
    ];
    names.iter().find(|(known, _)| *known == errno).expect("an errno with a name").1.to_string()
}
