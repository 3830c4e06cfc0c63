//! The documents, held to the code: invariants, names of types and modules, links, and the width of lines.
//!
//! docs/DESIGN.md defines each invariant once, in a row `| **M5** | ... |`. Code that upholds it and a test
//! that would notice have a comment line `// M5: ...` or `// M5`. The list of these at the end of that page
//! is written by this test when it is run with `BLESS=1`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Columns of a line of a document.
const WIDTH: usize = 110;
/// Start of the list that this test writes.
const HEADING: &str = "## Where each is upheld\n";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `directory` with that extension, sorted, relative to the repository.
fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![root().join(directory)]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path.strip_prefix(root()).expect("a path below").to_owned());
            }
        }
    }
    found.sort();
    found
}

fn text(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents() -> Vec<PathBuf> {
    let mut found = files("docs", "md");
    found.extend(["README.md", "CHANGELOG.md", "tests/README.md"].map(PathBuf::from));
    found
}

fn is_number(word: &str) -> bool {
    let mut chars = word.chars();
    let is_family = chars.next().is_some_and(|first| first.is_ascii_uppercase());
    let digits = chars.as_str();
    is_family && !digits.is_empty() && digits.chars().all(|digit| digit.is_ascii_digit())
}

/// The invariants that a page defines, in its order.
fn defined(page: &str) -> Vec<&str> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| **")?.split_once("** |"));
    rows.map(|(number, _)| number).filter(|number| is_number(number)).collect()
}

/// The invariants that comment lines of a source cite: `// M5: ...`, or `// M4, M5` beside a test.
fn cited(source: &str) -> Vec<&str> {
    let comments = source.lines().filter_map(|line| line.trim_start().strip_prefix("//"));
    let lists = comments.map(|comment| comment.split(':').next().unwrap_or_default().trim().split(", "));
    lists.filter(|list| list.clone().all(is_number)).flatten().collect()
}

/// The invariants that a text names in parentheses: `(M5)`, `(M1, M4, at the end)`.
fn named(page: &str) -> Vec<&str> {
    let lists = page.split('(').skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    lists.flat_map(|list| list.split(", ")).filter(|word| is_number(word)).collect()
}

type Places<'a> = BTreeMap<&'a str, BTreeSet<&'a Path>>;

fn places<'a>(sources: impl Iterator<Item = (&'a Path, &'a str)>) -> Places<'a> {
    let mut found = Places::new();
    for (path, source) in sources {
        for number in cited(source) {
            found.entry(number).or_default().insert(path);
        }
    }
    found
}

/// The code of a source of the program, and its unit tests.
fn parts((path, source): &(PathBuf, String)) -> (&Path, &str, &str) {
    let is_tests = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
    let at = if is_tests { 0 } else { source.find("\nmod tests {").unwrap_or(source.len()) };
    (path, &source[..at], &source[at..])
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    files(folder, "rs").into_iter().map(|path| (path.clone(), text(&path))).collect()
}

fn listed(places: &BTreeSet<&Path>) -> String {
    places.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ")
}

/// A list entry, in lines that are not too long.
fn wrapped(entry: &str) -> String {
    let (mut lines, mut line) = (Vec::new(), String::from("-"));
    for word in entry.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(std::mem::replace(&mut line, String::from(" ")));
        }
        line.push(' ');
        line.push_str(word);
    }
    lines.push(line);
    lines.join("\n") + "\n"
}

#[test]
fn each_invariant_is_cited_by_code_and_by_a_test() {
    let page = text(Path::new("docs/DESIGN.md"));
    let invariants = defined(&page);
    assert!(invariants.len() > 40, "the page has lost its invariants");
    let known: BTreeSet<&str> = invariants.iter().copied().collect();
    assert_eq!(known.len(), invariants.len(), "a number is given twice");

    let (code, tests) = (sources("src"), sources("tests"));
    let upheld = places(code.iter().map(parts).map(|(path, code, _)| (path, code)));
    let unit_tests = code.iter().map(parts).map(|(path, _, tests)| (path, tests));
    let tested = places(unit_tests.chain(tests.iter().map(|(path, source)| (&**path, &**source))));
    let missing = |places: &Places| -> Vec<&str> {
        invariants.iter().filter(|number| !places.contains_key(*number)).copied().collect()
    };
    assert_eq!(missing(&upheld), Vec::<&str>::new(), "no code says that it upholds these");
    assert_eq!(missing(&tested), Vec::<&str>::new(), "no test says that it would notice these");
    let families: BTreeSet<char> = known.iter().filter_map(|number| number.chars().next()).collect();
    let is_strange =
        |number: &&str| families.contains(&number.chars().next().unwrap_or(' ')) && !known.contains(number);
    let strange: Vec<&str> = upheld.keys().chain(tested.keys()).copied().filter(is_strange).collect();
    assert_eq!(strange, Vec::<&str>::new(), "cited, and not in docs/DESIGN.md");
    for path in documents() {
        let page = text(&path);
        let strange: Vec<&str> = named(&page).into_iter().filter(is_strange).collect();
        assert_eq!(strange, Vec::<&str>::new(), "{}", path.display());
    }

    let (above, list) = page.split_once(HEADING).expect("the list at the end of docs/DESIGN.md");
    let mut made = String::from(
        "\nThis list is made by the test that checks it: `BLESS=1 cargo test --test cli documentation`.\n\n",
    );
    for number in &invariants {
        let (code, tests) = (listed(&upheld[number]), listed(&tested[number]));
        made += &wrapped(&format!("**{number}**: {code}; tested by {tests}"));
    }
    if std::env::var_os("BLESS").is_some() {
        fs::write(root().join("docs/DESIGN.md"), format!("{above}{HEADING}{made}")).expect("a document");
    } else {
        assert!(
            list == made,
            "the list at the end of docs/DESIGN.md is out of date: BLESS=1 cargo test --test cli \
                documentation"
        );
    }
}

/// The names that a source defines: all definitions, and, since these come first in their lines, variants and
/// fields. Comments and uses do not count.
fn names(source: &str) -> HashSet<&str> {
    let is_word = |char: char| char.is_alphanumeric() || char == '_';
    let mut found = HashSet::new();
    for line in source.lines().map(str::trim_start).filter(|line| !line.starts_with("//")) {
        let words: Vec<&str> = line.split(|char| !is_word(char)).filter(|word| !word.is_empty()).collect();
        let is_definition = |word: &&str| {
            ["struct", "enum", "trait", "type", "union", "fn", "mod", "const", "static"].contains(word)
        };
        found.extend(words.windows(2).filter(|pair| is_definition(&pair[0])).map(|pair| pair[1]));
        found.extend(
            words.iter().find(|word| !word.starts_with("pub") && !["crate", "super", "in"].contains(word)),
        );
    }
    found
}

/// The inline code of a page, outside of its blocks.
fn inline_code(page: &str) -> Vec<&str> {
    let mut is_block = false;
    let prose = page.lines().filter(move |line| {
        let is_fence = line.starts_with("```");
        is_block ^= is_fence;
        !is_block && !is_fence
    });
    prose.flat_map(|line| line.split('`').skip(1).step_by(2)).collect()
}

/// The parts of a word that looks like a path or a type of Rust.
fn rust_name(code: &str) -> Option<Vec<&str>> {
    let parts: Vec<&str> = code.split("::").collect();
    let is_word =
        |part: &&str| !part.is_empty() && part.chars().all(|char| char.is_alphanumeric() || char == '_');
    let is_type = |part: &str| {
        part.starts_with(|first: char| first.is_ascii_uppercase())
            && part.contains(|char: char| char.is_lowercase())
    };
    (parts.iter().all(is_word) && (parts.len() > 1 || is_type(code))).then_some(parts)
}

#[test]
fn names_in_the_documents_are_in_the_code() {
    let all = sources("src");
    let mut known: HashSet<&str> = all.iter().flat_map(|(_, source)| names(source)).collect();
    known.extend(all.iter().filter_map(|(path, _)| path.file_stem()?.to_str()));
    known.extend(all.iter().flat_map(|(path, _)| path.iter().filter_map(|part| part.to_str())));
    let (mut judged, mut dead) = (0, Vec::new());
    for path in documents() {
        let page = text(&path);
        let names = inline_code(&page).into_iter().filter_map(|code| Some((code, rust_name(code)?)));
        for (code, parts) in names {
            judged += 1;
            if parts.iter().any(|part| !known.contains(*part)) {
                dead.push(format!("{}: {code}", path.display()));
            }
        }
    }
    assert!(dead.is_empty(), "the code has none of these:\n{}", dead.join("\n"));
    assert!(judged > 100, "the test has lost sight of the names that it is to judge ({judged})");
}

#[test]
fn links_between_the_documents_resolve() {
    for path in documents() {
        let page = text(&path);
        let directory = root().join(&path).parent().expect("a directory").to_owned();
        for target in page.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0)) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            if file.contains("://") {
                continue;
            }
            let linked = if file.is_empty() { root().join(&path) } else { directory.join(file) };
            assert!(linked.exists(), "{}: {target}", path.display());
            let slug = |line: &str| {
                let title = line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
                title.replace(|char: char| !char.is_alphanumeric() && char != '-', "")
            };
            if linked.extension().is_some_and(|kind| kind == "png") {
                continue;
            }
            let headings = fs::read_to_string(&linked).expect("a document");
            let has_anchor =
                headings.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == anchor);
            assert!(anchor.is_empty() || has_anchor, "{}: {target}", path.display());
        }
    }
}

#[test]
fn no_line_is_too_long() {
    let mut long = Vec::new();
    for path in documents() {
        let mut is_block = false;
        for (number, line) in text(&path).lines().enumerate() {
            is_block ^= line.starts_with("```");
            // Output of programs may be wider.
            let is_output = is_block && !line.starts_with("$ ");
            if line.chars().count() > WIDTH && !is_output {
                long.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert!(long.is_empty(), "lines of more than {WIDTH} columns:\n{}", long.join("\n"));
}
