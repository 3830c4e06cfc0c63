//! Escapes text for terminals and logs: the only place that decides which characters are printed unchanged.

use std::fmt::Write as _;

/// `text` with control, invisible and reordering characters escaped as `\x1b` or `\u{202e}`.
pub fn printable(text: &str) -> String {
    escaped(text, |c| !is_plain(c))
}

/// `text` with each `hostile` character escaped as `\x1b` or `\u{202e}`.
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

/// A word of a remedy, quoted if a shell would interpret it: remedies are copied, and names are any bytes of
/// an image.
pub fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/+@%,:=".contains(c);
    let plain = !word.is_empty() && word.chars().all(is_plain);
    if plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Whether a character is visible and does not affect its neighbours.
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
