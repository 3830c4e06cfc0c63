//! Any bytes as an image, over itself, to be read to its end in every way there is.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use support::fuzz::random::Random;
use support::fuzz::reader::{File, Tally, read_chain};

fuzz_target!(|bytes: &[u8]| {
    let bytes = Arc::new(bytes.to_vec());
    let file = File { bytes: Arc::clone(&bytes), data: Arc::clone(&bytes) };
    read_chain(&[file.clone(), file], &mut Random::new(bytes.len() as u64), &mut Tally::default());
});
