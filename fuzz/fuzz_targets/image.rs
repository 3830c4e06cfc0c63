//! Any bytes as an image, over itself, to be read to its end in every way there is.
#![no_main]

#[path = "../../tests/fuzz/random.rs"]
#[allow(dead_code, reason = "the reader has use for a part of it")]
mod random;
#[path = "../../tests/fuzz/reader.rs"]
mod reader;

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use random::Random;
use reader::{File, Tally, read_chain};

fuzz_target!(|bytes: &[u8]| {
    let bytes = Arc::new(bytes.to_vec());
    let file = File { bytes: Arc::clone(&bytes), data: Arc::clone(&bytes) };
    read_chain(&[file.clone(), file], &mut Random::new(bytes.len() as u64), &mut Tally::default());
});
