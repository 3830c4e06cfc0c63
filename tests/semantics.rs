//! docs/SEMANTICS.md, held to its word: its examples are run, its errno table is compared.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod common;

use chainfs::error::{ERROR_KINDS, errno};
use common::examples::{Ending, document, examples, matches};

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
