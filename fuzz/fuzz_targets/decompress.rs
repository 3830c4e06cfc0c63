//! Any bytes as a compressed cluster.
#![no_main]

use chainfs::format::compressed::decompress;
use chainfs::format::header::Compression;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut out = vec![0; 65_536];
    let _ = decompress(Compression::Deflate, bytes, &mut out);
    let _ = decompress(Compression::Zstd, bytes, &mut out);
});
