//! Reading the table of internal snapshots from any storage.
//!
//! The header counts entries, not bytes: the table is read in growing pieces until it is complete.

use crate::error::{Error, Result};
use crate::format::snapshot::SnapshotParser;
use crate::format::{Header, Malformed, Snapshot};
use crate::io::Storage;

/// Bytes of the first piece: most tables are no longer.
const FIRST_PIECE: usize = 4 << 10;
const LARGEST_PIECE: usize = 1 << 20;

/// The internal snapshots of the image in `storage`, and the bytes of their table.
pub(crate) fn read_snapshots(
    name: &str,
    storage: &dyn Storage,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    let read = read_snapshots_with(SnapshotParser::new(header), header, |at, buf| storage.read_at(at, buf))?;
    read.map_err(|reason| Error::new(reason.kind(), format!("{name}: {reason}")))
}

/// The same by any parser, from any source; the caller reports errors of the table.
pub(crate) fn read_snapshots_with(
    parser: SnapshotParser,
    header: &Header,
    read: impl FnMut(u64, &mut [u8]) -> Result<usize>,
) -> Result<std::result::Result<(Vec<Snapshot>, u64), Malformed>> {
    let (parser, reason) = feed(parser, header, read)?;
    let len = parser.table_len();
    Ok(reason.map_or(Ok(()), Err).and_then(|()| parser.finish()).map(|snapshots| (snapshots, len)))
}

/// As many internal snapshots as can be parsed, and the error that ends the table early.
pub(crate) fn read_readable_snapshots(
    header: &Header,
    read: impl FnMut(u64, &mut [u8]) -> Result<usize>,
) -> Result<(Vec<Snapshot>, Option<Malformed>)> {
    let (parser, reason) = feed(SnapshotParser::new(header), header, read)?;
    if reason.is_some() || !parser.is_complete() {
        let cut = Malformed::Truncated {
            what: "snapshot table",
            need: parser.table_len() + 1,
            have: parser.table_len(),
        };
        return Ok((parser.understood(), Some(reason.unwrap_or(cut))));
    }
    Ok((parser.understood(), None))
}

/// Reads the table in growing pieces; also returns the error that ended it, if it is invalid.
fn feed(
    mut parser: SnapshotParser,
    header: &Header,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<usize>,
) -> Result<(SnapshotParser, Option<Malformed>)> {
    let mut at = header.snapshots.offset.0;
    let mut piece = vec![0; FIRST_PIECE];
    // Ends at the latest at the limit of the table's length.
    while !parser.is_complete() {
        let have = read(at, &mut piece)?;
        if have == 0 {
            break;
        }
        if let Err(reason) = parser.feed(&piece[..have]) {
            return Ok((parser, Some(reason)));
        }
        at += have as u64;
        piece.resize((piece.len() * 2).min(LARGEST_PIECE), 0);
    }
    Ok((parser, None))
}
