//! Decompression, for compressed clusters of images and for guests' file systems.
//!
//! Promises: the output is bounded by the caller's buffer, and nothing that a stream claims about itself
//! makes the decoder allocate more than a fixed window. Bytes after the end of a stream, or after a full
//! buffer, are ignored. Each thread keeps its decoders: the setup of one costs about as much as decoding a
//! small cluster.

mod lzo;

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Largest zstd window, as a power of two: 8 MiB. A cluster has at most 2 MiB, so a writer that compresses it
/// in one call needs no larger window; one that streams without stating the length gets up to 8 MiB at the
/// customary levels. Zstd's own limit is 128 MiB, which an image could make every thread allocate.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate, without a header.
    Deflate,
    /// Frames of zstd, one after the other.
    Zstd,
    /// One frame of zstd.
    ZstdFrame,
    /// LZO1X, without a header.
    Lzo,
}

impl Codec {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deflate => "deflate",
            Self::Zstd | Self::ZstdFrame => "zstd",
            Self::Lzo => "lzo",
        }
    }
}

/// The input is no stream of the codec, or one that needs too much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidStream;

thread_local! {
    static DEFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) };
}

/// Decompresses `input` into `out`, and returns how many bytes that gave: fewer than `out.len()` only if the
/// stream ends before, or is cut short.
pub fn decompress(codec: Codec, input: &[u8], out: &mut [u8]) -> Result<usize, InvalidStream> {
    match codec {
        Codec::Deflate => DEFLATE.with_borrow_mut(|decoder| inflate(decoder, input, out)),
        Codec::Zstd => ZSTD.with_borrow_mut(|decoder| unzstd(decoder, input, out, false)),
        Codec::ZstdFrame => ZSTD.with_borrow_mut(|decoder| unzstd(decoder, input, out, true)),
        Codec::Lzo => lzo::decompress(input, out),
    }
}

fn inflate(decoder: &mut Decompress, input: &[u8], out: &mut [u8]) -> Result<usize, InvalidStream> {
    decoder.reset(false);
    let want = out.len() as u64;
    loop {
        let (read, got) = (decoder.total_in(), decoder.total_out());
        if got == want {
            return Ok(out.len());
        }
        let (rest, room) = (&input[read as usize..], &mut out[got as usize..]);
        let status = decoder.decompress(rest, room, FlushDecompress::None).map_err(|_| InvalidStream)?;
        let stuck = decoder.total_in() == read && decoder.total_out() == got;
        if decoder.total_out() < want && (stuck || status == Status::StreamEnd) {
            return Ok(decoder.total_out() as usize);
        }
    }
}

fn unzstd(
    slot: &mut Option<Decoder<'static>>,
    input: &[u8],
    out: &mut [u8],
    is_one_frame: bool,
) -> Result<usize, InvalidStream> {
    let invalid = |_| InvalidStream;
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
        let left = decoder.run(&mut input, &mut out).map_err(invalid)?;
        let is_end = is_one_frame && left == 0;
        if is_end || (input.pos(), out.pos()) == before {
            break;
        }
    }
    Ok(out.pos())
}
