//! Reading the table of internal snapshots, wherever it comes from.
//!
//! The header counts entries, not bytes: the table is read in growing pieces until it is whole.

use crate::error::{Error, Result};
use crate::format::snapshot::SnapshotParser;
use crate::format::{Header, Malformed, Snapshot};
use crate::io::Storage;

/// Bytes of the first piece: most tables are no longer.
const FIRST_PIECE: usize = 4 << 10;
const LARGEST_PIECE: usize = 1 << 20;

/// The internal snapshots of the image in `storage`, and the bytes of their table.
pub(crate) fn read_snapshots(name: &str, storage: &dyn Storage, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let read = read_snapshots_with(SnapshotParser::new(header), header, |at, buf| storage.read_at(at, buf))?;
    read.map_err(|reason| Error::new(reason.kind(), format!("{name}: {reason}")))
}

/// The same by any parser, from any source; what is wrong with the table is for the caller to say.
pub(crate) fn read_snapshots_with(
    mut parser: SnapshotParser,
    header: &Header,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<usize>,
) -> Result<std::result::Result<(Vec<Snapshot>, u64), Malformed>> {
    let mut at = header.snapshots.offset.0;
    let mut piece = vec![0; FIRST_PIECE];
    // Ends at the latest with the limit of the table's length.
    let mut is_whole = header.snapshots.count == 0;
    while !is_whole {
        let have = read(at, &mut piece)?;
        if have == 0 {
            break;
        }
        is_whole = match parser.feed(&piece[..have]) {
            Ok(is_whole) => is_whole,
            Err(reason) => return Ok(Err(reason)),
        };
        at += have as u64;
        piece.resize((piece.len() * 2).min(LARGEST_PIECE), 0);
    }
    let len = parser.table_len();
    Ok(parser.finish().map(|snapshots| (snapshots, len)))
}
