//! `README.txt` at the top of a mount: what this mount shows, with its own names.
//!
//! Short and plain. From the catalog alone, so that it costs nothing to look at.

use std::fmt::Write as _;

use crate::report::safe::{clipped, terminal};
use crate::store::{Catalog, Store};

use super::examples::{Example, ExampleChain};
use super::{Live, path_text};

/// Columns of a path in a sentence.
const PATH_WIDTH: usize = 500;

/// The text.
pub fn readme(store: &Store, catalog: &Catalog, live: &Live<'_>) -> String {
    let example = Example::of(store, catalog, live.mount, None, live.has_files);
    let mut text = String::new();
    opening(&mut text, store, catalog);
    names(&mut text, catalog, &example, live);
    let _ = writeln!(text, "\nCOMMANDS\n");
    for (what, command) in example.commands() {
        let _ = writeln!(text, "  # {what}\n  {command}");
    }
    let is_writable = store.read_only().is_none();
    text.push_str("\nGOOD TO KNOW\n\n  Snapshots are read-only: whatever opens one, it cannot change it.\n");
    if is_writable {
        text.push_str(
            "  An active.raw can be written, while a machine runs on it or not. Give it to one machine at a \
             time.\n",
        );
    } else {
        text.push_str("  This mount is read-only: no disk can be written, and no command changes a chain.\n");
    }
    let _ = write!(
        text,
        "  What cannot be shown is named in .chainfs/problems.txt, with the remedy: {}.\n  The images stay \
         plain files in the store. Do not change them there with other programs while\n  they are in use \
         here.\n",
        problems(catalog.problems.len())
    );
    let _ = writeln!(
        text,
        "\nTO UNMOUNT\n\n  chainfs umount {}\n\nMORE\n\n  chainfs --help, and .chainfs/index.html in a \
         browser",
        example.mount
    );
    text
}

fn opening(text: &mut String, store: &Store, catalog: &Catalog) {
    let path = clipped(&path_text(store.given()), PATH_WIDTH);
    let images = catalog.images.iter().filter(|image| image.chain_count > 0).count();
    let images = counted(images, "image", "images");
    if catalog.single.is_some() {
        let _ = writeln!(
            text,
            "This is a mount of chainfs. It shows the disk image\n\n  {path}\n\nas a disk with its history: \
             {images}, {}.",
            problems(catalog.problems.len())
        );
        return;
    }
    let chains = counted(catalog.chains().count(), "chain", "chains");
    let _ = writeln!(
        text,
        "This is a mount of chainfs. It shows the disk images in\n\n  {path}\n\nas disks with their history: \
         {chains}, {images}, {}.",
        problems(catalog.problems.len())
    );
}

/// What each name means, as a table.
fn names(text: &mut String, catalog: &Catalog, example: &Example, live: &Live<'_>) {
    let mut lines: Vec<(String, &str)> = Vec::new();
    let chain = example.chain.as_ref();
    let at = |rest: &str| match chain.map(|chain| chain.inner.as_str()) {
        Some("") => rest.to_owned(),
        Some(inner) => format!("{inner}/{rest}"),
        None if catalog.single.is_some() => rest.to_owned(),
        None => format!("CHAIN/{rest}"),
    };
    if catalog.single.is_none() {
        lines.push((at(""), "one directory per chain: a disk with all its earlier states"));
    }
    let snapshot = chain.and_then(|chain| chain.snapshot.as_deref()).unwrap_or("SNAPSHOT");
    if chain.is_none_or(|chain| chain.is_active) {
        lines.push((at("active.raw"), "its present disk, as one file"));
    }
    lines.push((at("snapshots/"), "its earlier states, one read-only disk each"));
    if let Some(ExampleChain { snapshot: Some(name), .. }) = chain {
        lines.push((at(&format!("snapshots/{name}.raw")), "such a disk"));
    }
    if live.has_files {
        lines.push((
            at(&format!("files/{snapshot}/")),
            "the guest's own files in that state; read on first access",
        ));
        lines.push((at(&format!("partitions/{snapshot}/")), "the partitions of that disk, as disks"));
    }
    lines.push((at("info/"), "what is known about the chain: index.html, tree.txt, os.txt, ..."));
    lines.push((at("control/"), "write commands here; status and progress tell how they do"));
    lines.push((".chainfs/index.html".to_owned(), "open it in a browser: all of this mount on one page"));
    lines.push((".chainfs/problems.txt".to_owned(), "what cannot be shown, and what to do"));
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(40);
    text.push_str("\nWHAT IS WHERE\n\n");
    for (name, what) in lines {
        let _ = writeln!(text, "  {:width$}  {what}", terminal(&name));
    }
}

fn problems(count: usize) -> String {
    if count == 0 { "no problems".to_owned() } else { counted(count, "problem", "problems") }
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
