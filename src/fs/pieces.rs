//! A long info file, generated piece by piece as it is read: it needs memory for one piece only, in a store
//! of any size.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::report::store::ChainsJson;

/// Shorter files are generated at once.
const WHOLE_LEN: usize = 2 << 20;

/// An info file in pieces.
#[derive(Debug)]
pub struct Pieces {
    source: ChainsJson,
    /// The start of each piece, and the end of the last one.
    places: Vec<u64>,
    /// The whole text, if it is short.
    whole: Option<Arc<[u8]>>,
    /// The last piece read. A leaf.
    last: Mutex<Option<(usize, Arc<str>)>>,
}

impl Pieces {
    /// Measures the file: generates each piece, and keeps the text only if it is short.
    pub(super) fn new(source: ChainsJson) -> Self {
        let mut places = Vec::with_capacity(source.count() + 1);
        let (mut len, mut whole) = (0, Some(Vec::new()));
        places.push(0);
        for index in 0..source.count() {
            let piece = source.piece(index);
            len += piece.len() as u64;
            places.push(len);
            whole = whole.filter(|whole| whole.len() + piece.len() <= WHOLE_LEN);
            if let Some(whole) = &mut whole {
                whole.extend_from_slice(piece.as_bytes());
            }
        }
        Self { source, places, whole: whole.map(Into::into), last: Mutex::default() }
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.places.last().copied().unwrap_or(0)
    }

    /// Reads from `at` into `buf`.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> usize {
        let len = self.len().saturating_sub(at).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        if let Some(whole) = &self.whole {
            let at = at.min(whole.len() as u64) as usize;
            buf.copy_from_slice(&whole[at..at + len]);
            return len;
        }
        let mut done = 0;
        while done < len {
            let place = at + done as u64;
            // The last piece that starts there or before: pieces may be empty.
            let index = self.places.partition_point(|begin| *begin <= place) - 1;
            let piece = self.piece(index);
            let rest = &piece.as_bytes()[(place - self.places[index]) as usize..];
            let part = rest.len().min(len - done);
            buf[done..done + part].copy_from_slice(&rest[..part]);
            done += part;
        }
        len
    }

    fn piece(&self, index: usize) -> Arc<str> {
        if let Some((last, text)) = &*self.last.lock()
            && *last == index
        {
            return Arc::clone(text);
        }
        // Not under the lock: readers at other offsets must not wait.
        let mut text = self.source.piece(index);
        let len = (self.places[index + 1] - self.places[index]) as usize;
        // The catalog is unchanged, so the length is the same. If it differs all the same, offsets stay
        // valid.
        if text.len() != len {
            text = " ".repeat(len);
        }
        let text: Arc<str> = text.into();
        *self.last.lock() = Some((index, Arc::clone(&text)));
        text
    }
}
