//! Compressed clusters: one stream in, exactly one cluster out.
//!
//! A descriptor counts whole sectors, so bytes of the next cluster may follow the stream: bytes after a full
//! cluster are ignored. No length in a stream can make the decoder allocate more than a fixed window.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::header::Compression;
use super::malformed::Malformed;

/// Largest zstd window, as a power of two: 8 MiB. A cluster has at most 2 MiB, so a writer that compresses it
/// in one call needs no larger window; one that streams without stating the length gets up to 8 MiB at the
/// customary levels. Zstd's own limit is 128 MiB, which an image could make every thread allocate.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

thread_local! {
    // A decoder needs some tens of KiB, and its setup costs about as much as decoding a small cluster.
    static DEFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) };
}

/// Fills `out`, which is one cluster, from `input`.
pub fn decompress(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
    match kind {
        Compression::Deflate => DEFLATE.with_borrow_mut(|decoder| inflate(decoder, input, out)),
        Compression::Zstd => ZSTD.with_borrow_mut(|decoder| unzstd(decoder, input, out)),
    }
}

fn inflate(decoder: &mut Decompress, input: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
    decoder.reset(false);
    let want = out.len() as u64;
    loop {
        let (read, got) = (decoder.total_in(), decoder.total_out());
        if got == want {
            return Ok(());
        }
        let (rest, room) = (&input[read as usize..], &mut out[got as usize..]);
        let status = decoder.decompress(rest, room, FlushDecompress::None);
        let status = status.map_err(|_| Malformed::CompressedInvalid("deflate"))?;
        let stuck = decoder.total_in() == read && decoder.total_out() == got;
        if decoder.total_out() < want && (stuck || status == Status::StreamEnd) {
            return Err(Malformed::CompressedShort { got: decoder.total_out(), want });
        }
    }
}

fn unzstd(slot: &mut Option<Decoder<'static>>, input: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
    let invalid = |_| Malformed::CompressedInvalid("zstd");
    if slot.is_none() {
        let mut fresh = Decoder::new().map_err(invalid)?;
        fresh.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).map_err(invalid)?;
        *slot = Some(fresh);
    }
    let decoder = slot.as_mut().expect("made above");
    decoder.reinit().map_err(invalid)?;
    let want = out.len();
    let (mut input, mut out) = (InBuffer::around(input), OutBuffer::around(out));
    while out.pos() < want {
        let before = (input.pos(), out.pos());
        // A frame that ends early is followed by the next one; the decoder continues by itself.
        decoder.run(&mut input, &mut out).map_err(invalid)?;
        if (input.pos(), out.pos()) == before {
            return Err(Malformed::CompressedShort { got: out.pos() as u64, want: want as u64 });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression as Level, write::DeflateEncoder};
    use zstd::stream::Encoder;

    use super::*;

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
