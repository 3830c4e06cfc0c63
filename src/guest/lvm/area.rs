//! A metadata area: a header that references the current text, and a ring buffer with that text and its
//! predecessors.

use crate::guest::Source;
use crate::guest::bytes::{le32, le64, slice};

use super::label::{Label, checksum};

const HEADER_LEN: u64 = 512;
const MAGIC: &[u8] = b" LVM2 x[5A%r0N*>";
/// The current text is in another area; this one is old.
const IGNORED: u32 = 1;
/// Bytes of text; a volume group of thousands of volumes has two MiB.
const TEXT_LIMIT: u64 = 8 << 20;

/// The texts of all usable areas of a physical volume, and a remark for each unusable one.
pub(super) fn texts(volume: &dyn Source, label: &Label) -> (Vec<String>, Vec<String>) {
    let (mut texts, mut remarks) = (Vec::new(), Vec::new());
    for (at, _) in &label.metadata_areas {
        match text(volume, *at) {
            Ok(Some(text)) => texts.push(text),
            Ok(None) => {}
            Err(fact) => {
                remarks.push(format!("physical volume {}: an unusable metadata area: {fact}", label.id));
            }
        }
    }
    (texts, remarks)
}

/// The current text, if the area has one.
fn text(volume: &dyn Source, at: u64) -> Result<Option<String>, &'static str> {
    let mut header = vec![0; HEADER_LEN as usize];
    volume.read_at(at, &mut header).map_err(|_| "its header cannot be read")?;
    if slice(&header, 4, 16) != MAGIC {
        return Err("it has no header");
    }
    if le32(&header, 0) != checksum(&header[4..]) {
        return Err("its header's checksum is wrong");
    }
    if le32(&header, 20) != 1 || le64(&header, 24) != at {
        return Err("its header states another position");
    }
    let area_len = le64(&header, 32);
    let (offset, len, sum, flags) =
        (le64(&header, 40), le64(&header, 48), le32(&header, 56), le32(&header, 60));
    if offset == 0 || len == 0 || flags & IGNORED != 0 {
        return Ok(None);
    }
    let is_inside =
        (HEADER_LEN..area_len).contains(&offset) && len <= TEXT_LIMIT && len <= area_len - HEADER_LEN;
    if !is_inside {
        return Err("its text lies outside of it");
    }
    // A text that reaches the end of the ring continues after the header.
    let first_len = len.min(area_len - offset) as usize;
    let mut bytes = vec![0; len as usize];
    let (first, rest) = bytes.split_at_mut(first_len);
    let place = at.checked_add(offset).ok_or("its text lies outside of it")?;
    volume.read_at(place, first).map_err(|_| "its text cannot be read")?;
    volume.read_at(at + HEADER_LEN, rest).map_err(|_| "its text cannot be read")?;
    if checksum(&bytes) != sum {
        return Err("its text's checksum is wrong");
    }
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
