//! Manual pages as man(1) and mandoc(1) read them, and completions as bash, zsh and fish ask for them.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use support::*;

/// A directory with all pages.
fn pages(store: &Store) -> Vec<PathBuf> {
    let directory = store.beside("pages");
    fs::create_dir(&directory).expect("a directory");
    tool(chainfs_binary()).arg("man").arg(&directory).succeeds();
    let entries = fs::read_dir(&directory).expect("pages");
    let mut pages: Vec<PathBuf> = entries.map(|entry| entry.expect("a page").path()).collect();
    pages.sort();
    pages
}

#[test]
fn manual_pages_are_read_without_a_warning() {
    let store = Store::new();
    let pages = pages(&store);
    assert!(pages.len() > 25, "{pages:?}");
    for page in &pages {
        let mut man = tool("man");
        let man = man.args(["--warnings=all", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]).arg(page);
        let (code, _, said) = man.stdout(Stdio::null()).env("MANROFFSEQ", "").outcome();
        assert!(code == 0 && said.is_empty(), "{}: {said}", page.display());
        let (_, said, _) = tool("mandoc").args(["-Tlint", "-Wwarning"]).arg(page).outcome();
        // What clap's generator writes around paragraphs of the pages of commands.
        let is_generated = page.extension().is_some_and(|section| section == "1");
        let is_known = |line: &&str| {
            line.contains("missing date")
                || (is_generated && line.contains("cannot parse date"))
                || (is_generated && line.contains("skipping paragraph macro"))
        };
        let said: Vec<&str> = said.lines().filter(|line| !is_known(line)).collect();
        assert!(said.is_empty(), "{}: {said:#?}", page.display());
    }
    let names: Vec<_> = pages.iter().filter_map(|page| page.file_name()?.to_str()).collect();
    for name in ["chainfs.1", "chainfs-control.7", "chainfs-store.5", "chainfs.toml.5", "mount.chainfs.8"] {
        assert!(names.contains(&name), "{name}");
    }
}

/// Every page that a page of ours names is there.
#[test]
fn pages_name_pages_that_exist() {
    let store = Store::new();
    let pages = pages(&store);
    let names: Vec<String> =
        pages.iter().map(|page| page.file_name().expect("a name").to_string_lossy().into_owned()).collect();
    let mut judged = 0;
    for page in &pages {
        let text = fs::read_to_string(page).expect("a page").replace("\\-", "-");
        for line in text.lines().filter_map(|line| line.strip_prefix(".BR ")) {
            let Some((name, section)) = line.split_once(" (") else { continue };
            if name.contains("chainfs") {
                judged += 1;
                let section = section.split(')').next().expect("a section");
                assert!(names.contains(&format!("{name}.{section}")), "{}: {line}", page.display());
            }
        }
    }
    assert!(judged > 10, "{judged}");
}

/// A store of a chain with an internal snapshot, a directory of programs, and the scripts.
fn with_scripts() -> Store {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("monday.qcow2", "base.raw", "raw", "");
    store.overlay("web 01.qcow2", "monday.qcow2", "qcow2", "");
    store.overlay("db.qcow2", "monday.qcow2", "qcow2", "");
    store.img(["snapshot", "-c", "before", "db.qcow2"]);
    fs::create_dir(store.beside("bin")).expect("a directory");
    std::os::unix::fs::symlink(chainfs_binary(), store.beside("bin/chainfs")).expect("a link");
    for shell in ["bash", "zsh", "fish"] {
        let script = tool(chainfs_binary()).args(["completions", shell]).succeeds();
        fs::write(store.beside(shell), script).expect("a script");
    }
    store
}

/// What a shell would offer, sorted.
fn offered(store: &Store, shell: &str, words: &[&str], script: &str, line: &str) -> Vec<String> {
    let path = format!("{}:{}", store.beside("bin").display(), std::env::var("PATH").unwrap_or_default());
    let mut command = tool(shell);
    command.args(words).args(["-c", script]).current_dir(store.root()).env("PATH", path);
    // As the child that does the work: the time that a shell waits is no matter of this test.
    command.env("CHAINFS_COMPLETE", "1").env("LINE", line).env("SCRIPT", store.beside(shell));
    let out = command.env("HOME", store.beside("")).succeeds();
    let mut found: Vec<String> = out.lines().map(str::to_owned).collect();
    found.sort();
    found
}

/// bash cuts the line into words as readline does, at its own characters, too.
const BASH: &str = r#"
. "$SCRIPT"
COMP_LINE=$LINE COMP_POINT=${#LINE} COMP_WORDS=() COMP_TYPE=9
rest=$LINE
while [[ $rest =~ ^[[:space:]]*(([^][:space:]\\@=:]|\\.)+|[@=:]+)(.*)$ ]]; do
    COMP_WORDS+=("${BASH_REMATCH[1]}"); rest=${BASH_REMATCH[3]}
done
last=${COMP_WORDS[-1]}
[[ $LINE != *' ' || $LINE == *'\ ' ]] || { COMP_WORDS+=(''); last=; }
[[ $last != [@=:] ]] || last=
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_chainfs chainfs "$last" x
printf '%s\n' "${COMPREPLY[@]}"
"#;

/// zsh gives the words to the function, which calls its builtins.
const ZSH: &str = r#"
compdef() { :; }
compadd() { local -a all; local name=${@[-1]}; [[ $1 == -S ]] && suffix=none; print -l -- ${(P)name}; }
_files() { [[ $1 == -/ ]] && print -l -- "$PREFIX"*(/N) || print -l -- "$PREFIX"*(N); }
. "$SCRIPT"
words=(${(z)LINE}); [[ $LINE == *' ' ]] && words+=('')
CURRENT=$#words PREFIX=${words[-1]}
_chainfs
"#;

const FISH: &str = r"source $SCRIPT; complete -C $LINE | string replace -r '\t.*' ''; true";

#[test]
fn shells_complete_commands_options_views_and_words_of_verbs() {
    let store = with_scripts();
    for (line, expected) in [
        ("chainfs re", &["rebase", "recover", "resize", "revert"][..]),
        ("chainfs check --rep", &["--repair"]),
        ("chainfs check --repair ", &["all", "leaks"]),
        ("chainfs commit db.qcow2 --top ", &["active@before", "base", "monday"]),
        ("chainfs delete db.qcow2 m", &["monday"]),
        ("chainfs tree db.qcow2 --dry-run pu", &["pull"]),
        ("chainfs tree db.qcow2 --dry-run commit to", &["top="]),
        ("chainfs mount -o ro,tras", &["ro,trash="]),
        ("chainfs tree db", &["db.qcow2"]),
        ("chainfs nonsense ", &[]),
    ] {
        for (shell, words, script) in
            [("bash", &[][..], BASH), ("zsh", &["-f"], ZSH), ("fish", &["-N"], FISH)]
        {
            let found = offered(&store, shell, words, script, line);
            let found: Vec<&str> = found.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
            // fish looks for files that contain the word, too, and offers short options by themselves.
            assert_eq!(found, expected, "{shell}: {line}");
        }
    }
    // Behind an at sign, each shell replaces what it takes for the word.
    let line = "chainfs compare db.qcow2@mo";
    assert_eq!(offered(&store, "bash", &[], BASH, line), ["monday"]);
    assert_eq!(offered(&store, "zsh", &["-f"], ZSH, line), ["db.qcow2@monday"]);
    assert_eq!(offered(&store, "fish", &["-N"], FISH, line), ["db.qcow2@monday"]);
    assert_eq!(
        offered(&store, "bash", &[], BASH, "chainfs compare db.qcow2@"),
        ["active@before", "base", "monday"]
    );
    assert_eq!(offered(&store, "bash", &[], BASH, "chainfs commit --top=mon"), [""], "no image is named yet");
    assert_eq!(offered(&store, "bash", &[], BASH, r"chainfs delete web\ 01.qcow2 b"), ["base"]);
}

#[test]
fn views_of_a_mount_are_completed_and_a_stopped_daemon_holds_no_shell_up() {
    let store = with_scripts();
    let mount = Mount::new(&store);
    let at = mount.path("db").display().to_string();
    let answer = |words: &[&str]| {
        let mut command = tool(chainfs_binary());
        command.args(["complete", "--", "chainfs"]).args(words).env("CHAINFS_COMPLETE", "1").succeeds()
    };
    assert_eq!(answer(&["revert", &at, "mon"]), "monday\t\n");
    assert!(answer(&["umount", ""]).contains(&format!("{}\tshows", mount.dir().display())));
    let daemon = mount.daemon().to_string();
    tool("kill").args(["-STOP", &daemon]).succeeds();
    let said = tool(chainfs_binary()).args(["complete", "--", "chainfs", "revert", &at, "mon"]).succeeds();
    tool("kill").args(["-CONT", &daemon]).succeeds();
    assert_eq!(said, "", "there was no answer, and no error");
    mount.umount();
}
