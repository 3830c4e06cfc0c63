//! Translates mount(8)'s arguments into those of `chainfs mount`. Pure, so that all cases can be tested.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// The usage text for errors and `--help`.
pub(crate) const USAGE: &str = "\
usage: mount.chainfs STORE DIR [-sfnvrwV] [-o OPTIONS] [-t TYPE]
Called by mount(8): mount -t chainfs STORE DIR -o OPTIONS; see chainfs mount --help for the options.";

/// The action that the arguments request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `-f`: do nothing.
    Nothing,
    /// `-V`.
    Version,
    /// `-h`.
    Help,
    /// Execute `chainfs` with these arguments.
    Mount {
        /// "mount", its options, `--`, store and directory.
        words: Vec<OsString>,
        /// Print the command.
        verbose: bool,
    },
}

/// Translates the arguments after the program's name; the error is a message.
pub(crate) fn translate(words: impl IntoIterator<Item = OsString>) -> Result<Action, String> {
    let mut words = words.into_iter();
    let (mut places, mut lists) = (Vec::new(), Vec::new());
    let (mut fake, mut sloppy, mut verbose, mut only_places) = (false, false, false, false);
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if only_places || bytes == b"-" || !bytes.starts_with(b"-") {
            places.push(word);
            continue;
        }
        match bytes {
            b"--" => only_places = true,
            b"--help" => return Ok(Action::Help),
            b"--version" => return Ok(Action::Version),
            _ if bytes.starts_with(b"--") => return Err(format!("{word:?}: unknown option")),
            _ => {
                for (at, letter) in bytes.iter().enumerate().skip(1) {
                    match letter {
                        b'f' => fake = true,
                        b's' => sloppy = true,
                        b'v' => verbose = true,
                        b'r' => lists.push("ro".into()),
                        // n: no mtab; there is none. w: read-write, the default.
                        b'n' | b'w' => {}
                        b'V' => return Ok(Action::Version),
                        b'h' => return Ok(Action::Help),
                        b'o' | b't' | b'N' => {
                            let attached = &bytes[at + 1..];
                            let value = match attached {
                                [] => words
                                    .next()
                                    .ok_or_else(|| format!("-{} needs a value", char::from(*letter)))?,
                                attached => OsStr::from_bytes(attached).to_owned(),
                            };
                            match letter {
                                b'o' => lists.push(value),
                                b'N' => {
                                    return Err(format!(
                                        "-N {value:?}: mounting in another namespace is not supported; enter \
                                            it first: \
                                         nsenter --mount=NAMESPACE mount ..."
                                    ));
                                }
                                // -t: the type is known.
                                _ => {}
                            }
                            break;
                        }
                        _ => {
                            return Err(format!("-{}: unknown option", char::from(*letter).escape_default()));
                        }
                    }
                }
            }
        }
    }
    let [source, dir] = <[OsString; 2]>::try_from(places)
        .map_err(|places| format!("got {} operands, need STORE and DIR", places.len()))?;
    if fake {
        return Ok(Action::Nothing);
    }
    let mut store = store_of(&source).to_owned();
    let mut translated = vec![OsString::from("mount")];
    for list in lists {
        let (list, named) = without_store(list.as_bytes());
        store = named.unwrap_or(store);
        if !list.is_empty() {
            translated.extend(["-o".into(), list]);
        }
    }
    translated.extend(sloppy.then(|| "--sloppy".into()));
    translated.extend(verbose.then(|| "--verbose".into()));
    translated.extend(["--".into(), store, dir]);
    Ok(Action::Mount { words: translated, verbose })
}

/// The source without the prefix `chainfs#` of old fstab entries.
fn store_of(source: &OsStr) -> &OsStr {
    OsStr::from_bytes(source.as_bytes().strip_prefix(b"chainfs#").unwrap_or(source.as_bytes()))
}

/// The list without `store=`, and the value of `store=`. systemd normalises What= as a path, so units may
/// name the store in this option. The other options keep their escapes, which `chainfs mount` parses.
fn without_store(list: &[u8]) -> (OsString, Option<OsString>) {
    let (mut rest, mut store) = (Vec::new(), None);
    for option in split(list) {
        match option.strip_prefix(b"store=") {
            Some(path) if !path.is_empty() => store = Some(OsString::from_vec(unescaped(path))),
            _ => rest.push(option),
        }
    }
    (OsString::from_vec(rest.join(&b','.to_owned())), store)
}

/// Splits at commas that are not escaped by a backslash.
fn split(list: &[u8]) -> Vec<&[u8]> {
    let (mut options, mut start, mut escaped) = (Vec::new(), 0, false);
    for (at, byte) in list.iter().enumerate() {
        if *byte == b',' && !escaped {
            options.push(&list[start..at]);
            start = at + 1;
        }
        escaped = *byte == b'\\' && !escaped;
    }
    options.push(&list[start..]);
    options.retain(|option| !option.is_empty());
    options
}

fn unescaped(value: &[u8]) -> Vec<u8> {
    let mut bytes = value.iter().copied().peekable();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        let next = if byte == b'\\' { bytes.next_if(|next| matches!(next, b',' | b'\\')) } else { None };
        plain.push(next.unwrap_or(byte));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<Action, String> {
        translate(words.iter().map(OsString::from))
    }

    fn mounts(words: &[&str]) -> Vec<OsString> {
        match run(words) {
            Ok(Action::Mount { words, .. }) => words,
            other => panic!("{words:?} became {other:?}"),
        }
    }

    #[test]
    fn the_arguments_of_mount_8_are_translated() {
        let called =
            mounts(&["/s", "/d", "-s", "-n", "-v", "-o", "ro,nosuid,uid=5,_netdev", "-t", "fuse.chainfs"]);
        assert_eq!(
            called,
            ["mount", "-o", "ro,nosuid,uid=5,_netdev", "--sloppy", "--verbose", "--", "/s", "/d"]
        );
        assert_eq!(mounts(&["/s", "/d", "-o", "rw"]), ["mount", "-o", "rw", "--", "/s", "/d"]);
        assert_eq!(mounts(&["-o", "ro", "/s", "/d"]), mounts(&["/s", "-oro", "/d"]));
        assert_eq!(mounts(&["-r", "--", "-s", "/d"]), ["mount", "-o", "ro", "--", "-s", "/d"]);
        assert_eq!(
            mounts(&["-nsoprobe", "/s", "/d"]),
            ["mount", "-o", "probe", "--sloppy", "--", "/s", "/d"]
        );
    }

    #[test]
    fn the_store_can_be_named_in_three_ways() {
        for words in [
            ["chainfs#/a,b", "/d", "-o", "ro"],
            ["/mangled", "/d", "-o", "ro,store=/a\\,b"],
            ["none", "/d", "-o", "store=/a\\,b,ro"],
        ] {
            assert_eq!(mounts(&words), ["mount", "-o", "ro", "--", "/a,b", "/d"]);
        }
        let called = mounts(&["/s", "/d", "-o", "map=/a\\,store=/b=/c,ro"]);
        assert_eq!(called[2], "map=/a\\,store=/b=/c,ro", "an escaped comma separates nothing");
    }

    #[test]
    fn fake_does_nothing_and_is_not_foreground() {
        assert_eq!(run(&["/s", "/d", "-f"]), Ok(Action::Nothing));
        assert_eq!(run(&["/s", "/d", "-sfn", "-o", "ro"]), Ok(Action::Nothing));
        assert_eq!(run(&["-V"]), Ok(Action::Version));
        assert_eq!(run(&["--help"]), Ok(Action::Help));
    }

    #[test]
    fn invalid_arguments_are_refused_with_a_message() {
        for (words, said) in [
            (&["/s"][..], "got 1 operands, need STORE and DIR"),
            (&["/s", "/d", "/e"], "got 3 operands, need STORE and DIR"),
            (&["/s", "/d", "-o"], "-o needs a value"),
            (&["/s", "/d", "-x"], "-x: unknown option"),
            (&["/s", "/d", "--bind"], "\"--bind\": unknown option"),
        ] {
            assert_eq!(run(words), Err(said.to_owned()));
        }
        assert!(run(&["/s", "/d", "-N", "/proc/1/ns/mnt"]).unwrap_err().contains("nsenter"));
    }

    #[test]
    fn paths_may_be_any_bytes() {
        let store = OsString::from_vec(b"/\xff".to_vec());
        let Ok(Action::Mount { words, .. }) = translate([store.clone(), "/d".into()]) else { panic!() };
        assert_eq!(words[2], store);
    }
}
