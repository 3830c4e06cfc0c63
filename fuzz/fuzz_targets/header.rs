//! Any bytes as the start of an image.
#![no_main]

use chainfs::format::header::needed_len;
use chainfs::format::{Frozen, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = needed_len(bytes);
    let _ = Header::parse_for_check(bytes, bytes.len() as u64);
    if let Ok(header) = Header::parse(bytes, bytes.len() as u64) {
        let covered = u128::from(header.l1.entries) * u128::from(header.l1_entry_span());
        assert!(covered >= header.virtual_size.into());
        if let Some(mark) = header.frozen {
            assert_eq!(Frozen::parse(&mark.encode()), Ok(mark));
        }
    }
});
