use std::path::PathBuf;

use super::*;
use crate::error::ErrorKind;
use crate::ops::MAX_COMMAND_LEN;
use crate::ops::check::{MAX_DESCRIPTION_LEN, MAX_NAME_LEN};
use crate::ops::{
    CloneRequest, CommitRequest, DeleteMethod, DeleteRequest, NewSize, PullRequest, RebaseRequest,
    ResizeRequest, RevertRequest, SnapshotRequest,
};

fn refusal(command: &str) -> String {
    let error = Request::parse_command(command.as_bytes()).expect_err(command);
    assert_eq!(error.kind(), ErrorKind::Usage, "{command}");
    error.to_string()
}

fn request(command: &str) -> Request {
    Request::parse_command(command.as_bytes()).unwrap_or_else(|error| panic!("{command}: {error}"))
}

#[test]
fn each_word_fills_its_field() {
    let snapshot = request("snapshot description=\"before the upgrade\" file=next.qcow2 'a b'\n");
    let expected = SnapshotRequest {
        name: b"a b".to_vec(),
        file: Some(b"next.qcow2".to_vec()),
        description: "before the upgrade".to_string(),
        ..SnapshotRequest::default()
    };
    assert_eq!(snapshot, Request::Snapshot(expected));
    let Request::Snapshot(several) = request("snapshot n chains=a/b,c\\\\,d") else { panic!() };
    assert_eq!(several.chains, [PathBuf::from("a/b"), PathBuf::from("c,d")]);
    let all = CommitRequest {
        top: Some(b"sn3".to_vec()),
        base: Some(b"a=b".to_vec()),
        keep: true,
        discard_internal: true,
        discard_bitmaps: true,
    };
    assert_eq!(
        request("commit keep base=a=b discard-internal discard-bitmaps top=sn3"),
        Request::Commit(all)
    );
    assert_eq!(request("commit"), Request::Commit(CommitRequest::default()));
    assert_eq!(request("pull base=none"), Request::Pull(PullRequest::default()));
    let all = PullRequest {
        base: Some(b"b".to_vec()),
        into: Some(b"i".to_vec()),
        delete: true,
        discard_internal: true,
        discard_bitmaps: true,
    };
    assert_eq!(request("pull base=b into=i delete discard-internal discard-bitmaps"), Request::Pull(all));
    let delete =
        DeleteRequest { name: b"sn1@a=b".to_vec(), method: DeleteMethod::Commit, ..DeleteRequest::default() };
    assert_eq!(request("delete sn1@a=b method=commit"), Request::Delete(delete));
    let revert =
        RevertRequest { to: b"sn1".to_vec(), save: Some(b"old".to_vec()), ..RevertRequest::default() };
    assert_eq!(request("revert save=old to=sn1"), Request::Revert(revert));
    let rebase =
        RebaseRequest { layer: None, base: Some(b"../x/b.raw".to_vec()), is_unsafe: true, drop_layers: true };
    assert_eq!(request("rebase unsafe base=../x/b.raw drop-layers"), Request::Rebase(rebase));
    assert_eq!(request("rebase base=none"), Request::Rebase(RebaseRequest::default()));
    let clone = CloneRequest { name: b"web02".to_vec(), from: Some(b"sn1@x".to_vec()) };
    assert_eq!(request("clone web02 from=sn1@x"), Request::Clone(clone));
    for (text, size) in
        [("2G", NewSize::To(2 << 30)), ("+1K", NewSize::More(1024)), ("-512", NewSize::Less(512))]
    {
        assert_eq!(
            request(&format!("resize {text} shrink")),
            Request::Resize(ResizeRequest { size, shrink: true })
        );
    }
    assert_eq!(request("cancel"), Request::Cancel);
    assert_eq!(Request::parse(Verb::Cancel, b"\n").unwrap(), Request::Cancel);
}

#[test]
fn refusals_name_the_wrong_word_and_list_the_known_ones() {
    assert_eq!(
        refusal("commit foo"),
        "unknown word \"foo\"; commit takes top= base= keep discard-internal discard-bitmaps"
    );
    assert_eq!(refusal("cancel now"), "unknown word \"now\"; cancel takes no words");
    assert_eq!(
        refusal("pull into= delete"),
        "into= has no value; pull takes base= into= delete discard-internal discard-bitmaps"
    );
    assert_eq!(
        refusal("snapshot"),
        "NAME is missing; snapshot takes NAME file= description= chains= internal"
    );
    assert!(refusal("frob x").starts_with(
        "unknown verb \"frob\"; the verbs are snapshot commit pull delete revert rebase clone resize cancel"
    ));
    assert!(refusal("commit top=a top=b").starts_with("top= is given twice"));
    assert!(refusal("delete a b").starts_with("unknown word \"b\""));
    assert!(refusal("delete a method=up").contains("the methods are commit, pull and auto"));
    assert!(
        refusal("revert").starts_with("to= is missing") && refusal("rebase").starts_with("base= is missing")
    );
    for nonsense in
        ["delete", "delete a/b", "clone", "clone a/b", "clone ../x", "clone active", "clone x=y", "resize"]
    {
        refusal(nonsense);
    }
    for size in ["0", "+0", "-0", "ten", "1.5", "8E", "-", "+", "1,5G", "''"] {
        refusal(&format!("resize {size}"));
    }
    assert!(refusal("commit keep keep").starts_with("keep is given twice"));
    assert!(refusal("commit keep=yes").starts_with("keep takes no value"));
    assert!(refusal("commit top").starts_with("top= has no value"));
    for nonsense in
        ["", "\n", "  ", "commit \"top=a", "snapshot a b", "commit =a", "Commit", "commit\ncommit"]
    {
        refusal(nonsense);
    }
}

#[test]
fn names_that_cannot_be_file_names_are_refused() {
    let long = "n".repeat(MAX_NAME_LEN + 1);
    for name in ["''", ".", "..", "a/b", ".chainfs", ".chainfs-x", "active", "-x", "internal", "a=b", &long] {
        refusal(&format!("snapshot {name}"));
    }
    request(&format!("snapshot {}", &long[1..]));
    request("snapshot .hidden");
    for file in ["a/b", ".", "..", ".chainfs.qcow2", "-f"] {
        refusal(&format!("snapshot n file={file}"));
    }
    refusal("snapshot n internal file=f");
    refusal("snapshot n internal chains=a,b");
    request(&format!("snapshot n description={}", "d".repeat(MAX_DESCRIPTION_LEN)));
    refusal(&format!("snapshot n description={}", "d".repeat(MAX_DESCRIPTION_LEN + 1)));
    assert!(Request::parse(Verb::Snapshot, b"n description=\xff").is_err());
    for chains in ["", "a,", ",a", "a,a", "/a", "../a", "a/../b", "a//b", "a/", "./a"] {
        refusal(&format!("snapshot n chains={chains}"));
    }
    for view in ["a/b", &"v".repeat(256)] {
        refusal(&format!("commit top={view}"));
    }
}

#[test]
fn store_and_chain_commands_are_distinguished() {
    let several = request("snapshot n chains=a,b");
    assert!(several.check_for_store().is_ok() && several.check_for_chain().is_err());
    for one in ["snapshot n", "commit", "cancel"] {
        assert!(request(one).check_for_chain().is_ok() && request(one).check_for_store().is_err(), "{one}");
    }
}

/// A generator without an outside seed: the same bytes every time.
struct Bytes(u64);

impl Bytes {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
fn any_bytes_are_refused_or_round_trip() {
    const PIECES: [&[u8]; 38] = [
        b"snapshot ",
        b"commit ",
        b"pull ",
        b"delete ",
        b"revert ",
        b"rebase ",
        b"clone ",
        b"resize ",
        b"cancel ",
        b"to=",
        b"save=",
        b"layer=",
        b"from=",
        b"method=",
        b"unsafe ",
        b"drop-layers ",
        b"shrink ",
        b"+1G",
        b"top=",
        b"base=",
        b"into=",
        b"keep ",
        b"delete ",
        b"internal ",
        b"discard-internal ",
        b"file=",
        b"description=",
        b"chains=",
        b"none",
        b" ",
        b"'",
        b"\"",
        b"\\",
        b",",
        b"a/b",
        b"\n",
        b"\xc3\xbc",
        b"\xff",
    ];
    let mut bytes = Bytes(1);
    let mut understood = 0;
    for _ in 0..400_000 {
        let mut text = Vec::new();
        for _ in 0..bytes.below(9) {
            if bytes.below(4) == 0 {
                text.push(bytes.below(256) as u8);
            } else {
                text.extend_from_slice(PIECES[bytes.below(PIECES.len() as u64) as usize]);
            }
        }
        let Ok(request) = Request::parse_command(&text) else { continue };
        understood += 1;
        assert_eq!(
            Request::parse_command(&request.command_line()).unwrap(),
            request,
            "{}",
            text.escape_ascii()
        );
        assert_eq!(Request::parse(request.verb(), &request.words()).unwrap(), request);
    }
    assert!(understood > 2000, "only {understood} made sense");
}

#[test]
fn a_command_of_the_maximum_length_is_read_and_a_longer_one_refused() {
    let pad = |len: usize| format!("commit{}", " ".repeat(len - 6));
    request(&pad(MAX_COMMAND_LEN));
    assert!(refusal(&pad(MAX_COMMAND_LEN + 1)).contains("at most 65536 bytes"));
}

#[test]
fn the_usage_of_a_verb_names_all_its_words() {
    for verb in Verb::ALL {
        let name = verb.name();
        let VerbSpec { keys, flags, positional, .. } = verb.spec();
        assert!(verb.usage().starts_with(name));
        for word in keys.iter().chain(*flags).chain(positional) {
            assert!(verb.usage().contains(word), "{name}: {word}");
        }
    }
}
