//! Compressed clusters: one stream in, exactly one cluster out.
//!
//! A descriptor counts whole sectors, so bytes of the next cluster may follow the stream: bytes after a full
//! cluster are ignored.

use crate::codec::{self, Codec};

use super::header::Compression;
use super::malformed::Malformed;

/// Fills `out`, which is one cluster, from `input`.
pub fn decompress(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
    let codec = match kind {
        Compression::Deflate => Codec::Deflate,
        Compression::Zstd => Codec::Zstd,
    };
    match codec::decompress(codec, input, out) {
        Ok(got) if got == out.len() => Ok(()),
        Ok(got) => Err(Malformed::CompressedShort { got: got as u64, want: out.len() as u64 }),
        Err(codec::InvalidStream) => Err(Malformed::CompressedInvalid(codec.name())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression as Level, write::DeflateEncoder};
    use zstd::stream::Encoder;

    use super::*;
    use crate::codec::ZSTD_WINDOW_LOG_MAX;

    const CLUSTER: usize = 65_536;

    /// Bytes with few patterns, but with repeats at the full distance of 32 KiB.
    fn cluster() -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let half: Vec<u8> = (0..CLUSTER / 2).map(|_| next()).collect();
        [half.clone(), half].concat()
    }

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Level::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8], window_log: u32) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn check(kind: Compression, input: &[u8]) -> Result<(), Malformed> {
        let mut out = vec![0xaa; CLUSTER];
        decompress(kind, input, &mut out)?;
        assert!(out == cluster());
        Ok(())
    }

    #[test]
    fn bytes_after_a_stream_are_ignored() {
        for (kind, stream) in
            [(Compression::Deflate, deflate(&cluster())), (Compression::Zstd, zstd(&cluster(), 17))]
        {
            check(kind, &stream).unwrap();
            check(kind, &[stream.as_slice(), &[0xff; 511]].concat()).unwrap();
        }
    }

    #[test]
    fn a_stream_longer_than_the_cluster_is_read_up_to_its_end() {
        let longer = [cluster(), vec![7; 100]].concat();
        check(Compression::Deflate, &deflate(&longer)).unwrap();
        check(Compression::Zstd, &zstd(&longer, 17)).unwrap();
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let cluster = cluster();
        let (first, second) = cluster.split_at(40_000);
        check(Compression::Zstd, &[zstd(first, 17), zstd(second, 17)].concat()).unwrap();
    }

    #[test]
    fn a_stream_that_ends_early_is_short() {
        let want = CLUSTER as u64;
        let whole = &cluster()[..CLUSTER - 1];
        for (kind, stream) in [(Compression::Deflate, deflate(whole)), (Compression::Zstd, zstd(whole, 17))] {
            assert_eq!(check(kind, &stream), Err(Malformed::CompressedShort { got: want - 1, want }));
            let cut = check(kind, &stream[..stream.len() / 2]);
            assert!(matches!(cut, Err(Malformed::CompressedShort { got, .. }) if got < want), "{cut:?}");
            assert_eq!(check(kind, &[]), Err(Malformed::CompressedShort { got: 0, want }));
        }
    }

    #[test]
    fn a_bad_stream_is_invalid_and_the_next_one_decodes() {
        assert_eq!(check(Compression::Deflate, &[0xff; 64]), Err(Malformed::CompressedInvalid("deflate")));
        assert_eq!(check(Compression::Zstd, &[0xff; 64]), Err(Malformed::CompressedInvalid("zstd")));
        check(Compression::Deflate, &deflate(&cluster())).unwrap();
        check(Compression::Zstd, &zstd(&cluster(), 17)).unwrap();
    }

    #[test]
    fn a_zstd_window_beyond_the_limit_is_refused_before_it_is_allocated() {
        check(Compression::Zstd, &zstd(&cluster(), ZSTD_WINDOW_LOG_MAX)).unwrap();
        let huge = zstd(&cluster(), ZSTD_WINDOW_LOG_MAX + 1);
        assert_eq!(check(Compression::Zstd, &huge), Err(Malformed::CompressedInvalid("zstd")));
    }
}
