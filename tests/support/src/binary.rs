//! Where the binary under test is, and that it is not older than its sources.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// The binary under test.
///
/// cargo names it to the tests that it runs, and has built it for them. Tests that are started without cargo
/// take the one of their own build directory, unless a source is newer than it.
pub fn chainfs_binary() -> &'static str {
    static PATH: LazyLock<String> = LazyLock::new(|| match env::var("CARGO_BIN_EXE_chainfs") {
        Ok(path) => path,
        Err(_) => in_build_directory().into_os_string().into_string().expect("a path of plain characters"),
    });
    &PATH
}

/// The project's root directory.
pub fn project() -> &'static Path {
    let support = Path::new(env!("CARGO_MANIFEST_DIR"));
    support.ancestors().nth(2).expect("this crate is beneath tests/")
}

/// `DIRECTORY/chainfs` of a test that runs as `DIRECTORY/deps/NAME`.
fn in_build_directory() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let binary = test.parent().and_then(Path::parent).expect("a build directory").join("chainfs");
    let built = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    let when =
        built(&binary).unwrap_or_else(|e| panic!("{}: {e}; run the tests through cargo", binary.display()));
    // cargo lists the sources of each binary beside it, as make would read it; spaces in names are escaped.
    let list =
        fs::read_to_string(binary.with_extension("d")).expect("cargo's list of the sources of chainfs");
    let list = list.split_once(": ").expect("TARGET: SOURCE...").1.trim_end().replace("\\ ", "\0");
    for source in list.split(' ').map(|name| PathBuf::from(name.replace('\0', " "))) {
        let is_older = built(&source).is_ok_and(|changed| changed <= when);
        assert!(is_older, "{} is newer than {}; run cargo build", source.display(), binary.display());
    }
    binary
}
