//! Text made harmless for a terminal and for a log: the one place that says which characters show as themselves.

use std::fmt::Write as _;

/// `text` with control, invisible and reordering characters as `\x1b` or `\u{202e}`.
pub fn printable(text: &str) -> String {
    escaped(text, |c| !is_plain(c))
}

/// `text` with each character that is `hostile` as `\x1b` or `\u{202e}`.
pub fn escaped(text: &str, hostile: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if !hostile(c) {
            safe.push(c);
        } else if u32::from(c) < 0x80 {
            let _ = write!(safe, "\\x{:02x}", u32::from(c));
        } else {
            let _ = write!(safe, "\\u{{{:x}}}", u32::from(c));
        }
    }
    safe
}

/// Whether a character shows as itself and leaves the ones around it alone.
pub fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}'   // zero width, left-to-right and right-to-left marks
            | '\u{2028}'..='\u{202e}'   // line and paragraph ends, embeddings, overrides
            | '\u{2060}'..='\u{206f}'   // joiners, isolates
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
            | '\u{e0000}'..='\u{e007f}')
}
