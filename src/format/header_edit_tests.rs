use super::super::frozen::Frozen;
use super::super::header::Header;
use super::super::testing::{Image, extension};
use super::*;

const UNKNOWN: u32 = 0x0BAD_CAFE;

fn mark(len: usize) -> Frozen {
    Frozen { seconds: 7, nanoseconds: 8, description: "d".repeat(len) }
}

fn feature_names() -> Vec<u8> {
    let mut rows = vec![0; 8 * 48];
    rows.chunks_exact_mut(48).enumerate().for_each(|(bit, row)| (row[1], row[2]) = (bit as u8, b'a'));
    rows
}

/// A header with these extensions, and the name of a backing file behind them if it is not empty.
fn image(start: Image, len: usize, extensions: &[Vec<u8>], name: &[u8]) -> Image {
    let at = if be_u32(&start.bytes, 4) == 2 { 72 } else { 112 };
    let area = [extensions.concat(), vec![0; 8]].concat();
    let start = start.at(at, &area);
    let mut image = if name.is_empty() { start } else { start.backing(at + area.len(), name) };
    image.bytes.truncate(len);
    image
}

/// The expected header after an edit.
fn wanted(old: &Header, edit: &HeaderEdit<'_>) -> Header {
    let mut new = old.clone();
    if let Some(backing) = edit.backing {
        new.backing = backing.map(|(name, format)| super::super::header::BackingFile {
            name: name.to_vec(),
            format: Some(String::from_utf8(format.to_vec()).unwrap()),
        });
    }
    if let Some(frozen) = edit.frozen {
        new.frozen = frozen.map(|payload| Frozen::parse(payload).unwrap());
    }
    new
}

/// Every header that a crash may leave: each sector of the writes of a step written or not.
fn crashes(before: &[u8], step: &HeaderStep) -> Vec<Vec<u8>> {
    let mut after = before.to_vec();
    step.writes
        .iter()
        .for_each(|(at, bytes)| after[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes));
    let sectors: Vec<usize> = (0..before.len() / 512)
        .filter(|sector| before[sector * 512..][..512] != after[sector * 512..][..512])
        .collect();
    assert!(sectors.len() <= 8, "an edit touches a few sectors");
    let state = |some: usize| {
        let mut state = before.to_vec();
        for (_, sector) in sectors.iter().enumerate().filter(|(index, _)| some >> index & 1 == 1) {
            state[sector * 512..][..512].copy_from_slice(&after[sector * 512..][..512]);
        }
        state
    };
    (0..1 << sectors.len()).map(state).collect()
}

/// Without the feature names, which may be missing for a while.
fn nameless(header: &Header) -> Header {
    Header { feature_names: Vec::new(), ..header.clone() }
}

/// Edits the header, checks every crash state, and returns the result; `None` if the edit is refused.
fn edited(image: &Image, edit: &HeaderEdit<'_>) -> Option<Image> {
    let file_len = 1 << 20;
    let old = Header::parse(&image.bytes, file_len).unwrap();
    let new = wanted(&old, edit);
    let mut bytes = image.bytes.clone();
    for step in plan(&bytes, edit)? {
        for state in crashes(&bytes, &step) {
            let found = Header::parse(&state, file_len).unwrap();
            let (found, old, new) = (nameless(&found), nameless(&old), nameless(&new));
            assert!(found == old || found == new, "{found:#?}\nis neither\n{old:#?}\nnor\n{new:#?}");
        }
        for (at, written) in &step.writes {
            bytes[*at as usize..*at as usize + written.len()].copy_from_slice(written);
        }
    }
    let found = Header::parse(&bytes, file_len).unwrap();
    assert_eq!(nameless(&found), nameless(&new));
    assert!(found == new || bytes.len() <= 1024, "the names of features are left out where there is no room");
    Some(Image { bytes, file_len: image.file_len })
}

/// Headers as QEMU and chainfs write them, of every relevant cluster size.
fn images() -> Vec<(String, Image)> {
    let features = extension(FEATURE_NAMES, &feature_names());
    let format = extension(BACKING_FORMAT, b"qcow2");
    let mut found = Vec::new();
    for bits in [9, 10, 12, 16u32] {
        for version in [2, 3] {
            for (what, extensions) in [
                ("nothing", vec![]),
                ("format", vec![format.clone()]),
                ("format, unknown", vec![format.clone(), extension(UNKNOWN, b"kept as it is")]),
                ("features", vec![features.clone()]),
                ("format, features", vec![format.clone(), features.clone()]),
                ("format, mark, features", {
                    vec![format.clone(), extension(FROZEN_MAGIC, &mark(30).encode()), features.clone()]
                }),
                ("format, features, unknown, mark", {
                    let unknown = extension(UNKNOWN, b"kept as it is, too");
                    vec![
                        format.clone(),
                        features.clone(),
                        unknown,
                        extension(FROZEN_MAGIC, &mark(30).encode()),
                    ]
                }),
            ] {
                for name in [b"".as_slice(), b"base.qcow2", &[b'x'; 300]] {
                    let size = 1usize << bits;
                    let start = if version == 2 { Image::v2() } else { Image::v3() };
                    let start = start.u32(20, bits).u64(24, 1 << 12);
                    let used = 120 + extensions.concat().len() + name.len();
                    if used <= size {
                        let name_of = format!("{what}, {size}, version {version}, name of {}", name.len());
                        found.push((name_of, image(start, size, &extensions, name)));
                    }
                }
            }
        }
    }
    found
}

#[test]
fn a_crash_leaves_the_old_header_or_the_new_one() {
    let long = [b'y'; 1023];
    let names: [Option<BackingBytes<'_>>; 5] = [
        None,
        Some((b"new.raw", b"raw")),
        Some((b"base.qcow2", b"qcow2")),
        Some((&long[..200], b"qcow2")),
        Some((&long, b"raw")),
    ];
    let marks = [Some(mark(0).encode()), Some(mark(30).encode()), Some(mark(90).encode()), None];
    let (mut done, mut refused) = (0, Vec::new());
    for (what, image) in images() {
        for backing in &names {
            match edited(&image, &HeaderEdit { backing: Some(*backing), frozen: None }) {
                Some(_) => done += 1,
                None => refused
                    .push((what.clone(), format!("a name of {:?}", backing.map(|(name, _)| name.len())))),
            }
        }
        // Set, removed and set again; each on the result of the last.
        let mut image = image;
        for payload in marks.iter().chain(&marks) {
            match edited(&image, &HeaderEdit { backing: None, frozen: Some(payload.as_deref()) }) {
                Some(next) => {
                    image = next;
                    done += 1;
                }
                None => {
                    refused.push((what.clone(), format!("a mark of {:?}", payload.as_ref().map(Vec::len))));
                }
            }
        }
    }
    // Where clusters are large, every edit is possible.
    for (what, edit) in &refused {
        let is_small = what.contains(" 512,") || what.contains(" 1024,");
        assert!(is_small, "{what}: {edit} is refused");
    }
    assert!(done > 800, "{done} done, refused:\n{refused:#?}");
}

#[test]
fn two_edits_at_once_are_one_change_or_none() {
    let payload = mark(10).encode();
    let edit = HeaderEdit { backing: Some(Some((b"other", b"raw"))), frozen: Some(Some(&payload)) };
    let done = images().iter().filter(|(_, image)| edited(image, &edit).is_some()).count();
    assert!(done > 100, "{done}");
}

#[test]
fn a_refused_or_needless_edit_has_no_steps() {
    let full = image(Image::v3().u32(20, 9).u64(24, 1 << 12), 512, &[], &[b'x'; 380]);
    let payload = mark(10).encode();
    assert_eq!(
        plan(&full.bytes, &HeaderEdit { frozen: Some(Some(&payload)), ..HeaderEdit::default() }),
        None
    );
    let same: BackingBytes<'_> = (b"base", b"raw");
    let tidy = image(Image::v3(), 65_536, &[extension(BACKING_FORMAT, b"raw")], b"base");
    assert_eq!(plan(&tidy.bytes, &HeaderEdit { backing: Some(Some(same)), frozen: None }), Some(Vec::new()));
}

#[test]
fn a_header_whose_extensions_end_with_the_name_gets_an_end_mark() {
    let area = [extension(BACKING_FORMAT, b"raw"), extension(UNKNOWN, b"12345678")].concat();
    let tight = Image::v3().at(112, &area).backing(112 + area.len(), b"base.raw and more");
    for edit in [
        HeaderEdit { backing: Some(None), frozen: None },
        HeaderEdit { backing: Some(Some((b"other", b"qcow2"))), frozen: None },
        HeaderEdit { backing: None, frozen: Some(Some(&mark(3).encode())) },
    ] {
        edited(&tight, &edit).unwrap();
    }
}
