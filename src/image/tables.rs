//! Loading tables by the slice, through the shared cache.
//!
//! An L1 table may have 32 MiB and an image thousands of L2 tables; only the slices that are needed are read,
//! 4 KiB at a time.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::units::HostOffset;

use super::Image;
use super::cursor::{SLICE_LEN, decode, words_of};

impl Image {
    /// The slice of a table that holds the word `index`, and the index of that word in it. `table_len` is the
    /// whole table's length in bytes.
    pub(super) fn slice(&self, table: HostOffset, table_len: u64, index: u64) -> Result<(Arc<[u64]>, usize)> {
        let from = index * 8 / SLICE_LEN * SLICE_LEN;
        assert!(from < table_len, "an index beyond its table");
        let at = table.0 + from;
        let len = SLICE_LEN.min(table_len - from);
        // Keyed with its length: tables of a bad image may overlap, and one may end sooner.
        let key = (self.serial, at, len);
        if let Some(words) = self.caches.tables.get(&key) {
            return Ok((words, (index - from / 8) as usize));
        }
        let mut bytes = [0; SLICE_LEN as usize];
        let bytes = &mut bytes[..len as usize];
        if self.file.read_table_at(at, bytes)? < bytes.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: the table at {table} reaches past the end of the file; restore the image from a \
                        copy",
                    self.name
                ),
            ));
        }
        let words = words_of(bytes);
        self.caches.tables.put(key, Arc::clone(&words), bytes.len() + 64);
        Ok((words, (index - from / 8) as usize))
    }

    /// Reads as much of a table as the file has, past the cache, into memory that is used again and again.
    pub(super) fn read_whole_table(
        &self,
        table: HostOffset,
        table_len: u64,
        bytes: &mut Vec<u8>,
        words: &mut Vec<u64>,
    ) -> Result<()> {
        bytes.resize(table_len as usize, 0);
        let len = self.file.read_table_at(table.0, bytes)?;
        words.resize(len / 8, 0);
        decode(&bytes[..len], words);
        Ok(())
    }
}
