//! New images before QEMU's judgement.

use std::fs;
use std::path::Path;

use chainfs::error::ErrorKind;
use chainfs::image::create::{CreateOptions, NewBacking, create};
use serde_json::Value;
use support::oracle::Scratch;

fn info(scratch: &Scratch, name: &str) -> Value {
    serde_json::from_str(&scratch.tool("qemu-img", &["info", "--output=json", name])).unwrap()
}

#[test]
fn qemu_finds_every_size_and_geometry_clean_and_can_write_to_it() {
    let scratch = Scratch::new();
    for cluster_bits in 9..=21 {
        for size in [0u64, 1, 512, 4097, 1 << 20, 1 << 30, (8 << 30) + 5, 1 << 40, 1 << 50] {
            let options = CreateOptions { size: Some(size), cluster_bits, ..CreateOptions::default() };
            let path = scratch.path("new.qcow2");
            match create(Path::new(&path), &options) {
                Ok(()) => {}
                Err(error) if cluster_bits < 16 => {
                    // QEMU refuses them as well.
                    let words = format!(
                        "create -q -f qcow2 -o cluster_size={} refused.qcow2 {size}",
                        1u64 << cluster_bits
                    );
                    let output = scratch.run("qemu-img", &words.split(' ').collect::<Vec<_>>());
                    assert!(!output.status.success(), "{error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
            let found = info(&scratch, "new.qcow2");
            assert_eq!(found["virtual-size"], size.next_multiple_of(512));
            assert_eq!(found["cluster-size"], 1u64 << cluster_bits);
            assert_eq!(found["format-specific"]["data"]["compat"], "1.1");
            scratch.img("check -q new.qcow2");
            if size >= 1 << 20 {
                scratch.io(
                    "new.qcow2",
                    &["write -P 7 0 100k", &format!("write -P 8 {} 4k", size / 512 * 512 - 4096)],
                );
                scratch.img("check -q new.qcow2");
                scratch.io("new.qcow2", &["read -P 7 0 100k", "read -P 0 100k 100k"]);
            }
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn qemu_reads_through_to_the_backing_file_whatever_its_name() {
    let scratch = Scratch::new();
    for (name, stored) in [
        ("base.raw", "base.raw"),
        ("we:ird.raw", "./we:ird.raw"),
        ("b\u{e4}se \"1\".raw", "b\u{e4}se \"1\".raw"),
    ] {
        fs::write(scratch.path(name), [0x55; 8192]).unwrap();
        let backing = Some(NewBacking { name: name.into(), format: "raw".into() });
        let options = CreateOptions { size: Some(1 << 20), backing, ..CreateOptions::default() };
        let path = scratch.path("top.qcow2");
        create(Path::new(&path), &options).unwrap();
        let found = info(&scratch, "top.qcow2");
        assert_eq!(
            (&found["backing-filename"], &found["backing-filename-format"]),
            (&stored.into(), &"raw".into())
        );
        scratch.io("top.qcow2", &["read -P 0x55 0 8k", "read -P 0 8k 1016k", "write -P 1 4k 512"]);
        scratch.img("check -q top.qcow2");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn existing_files_are_kept_and_failures_leave_no_file() {
    let scratch = Scratch::new();
    let (path, options) =
        (scratch.path("there"), CreateOptions { size: Some(512), ..CreateOptions::default() });
    fs::write(&path, "mine").unwrap();
    let error = create(Path::new(&path), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("exists already"));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    let missing = create(Path::new(&scratch.path("no/such/directory")), &options).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let refused = scratch.path("refused");
    create(Path::new(&refused), &CreateOptions::default()).unwrap_err();
    assert!(!Path::new(&refused).exists());
}
