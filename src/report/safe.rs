//! Names made harmless for the place where they are shown.
//!
//! Names in images are bytes that a guest or a stranger chose. On a terminal an escape sequence
//! could rewrite what stands above it and a bidirectional control could reorder a line; in a
//! picture a `<` could open a script. Text that went through these functions cannot.

use std::fmt::Write as _;

use crate::error::{escaped, is_plain, printable};

/// `text` for a terminal: control, invisible and reordering characters become `\x1b` or `\u{202e}`.
pub fn terminal(text: &str) -> String {
    printable(text)
}

/// Bytes from an image for a terminal: as [`terminal`], and bytes that are not UTF-8 as `\xff`.
pub fn terminal_bytes(bytes: &[u8]) -> String {
    terminal(&text(bytes))
}

/// Bytes as text that other functions here still have to make harmless: what is not UTF-8 becomes `\xff`.
pub fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// `text` in ASCII alone, for `--ascii` and for terminals that know no better.
pub fn ascii(text: &str) -> String {
    escaped(text, |c| !is_plain(c) || !c.is_ascii())
}

/// `text` as the content or a quoted attribute of XML. What XML cannot say at all is escaped as on a terminal.
pub fn xml(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in terminal(text).chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(c),
        }
    }
    safe
}

/// `text` within the double quotes of a Graphviz string, shown as it is: no `\N` or `\l` of its own works.
pub fn dot(text: &str) -> String {
    terminal(text).replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_moves_a_cursor_or_turns_a_line_gets_through() {
        assert_eq!(terminal("a\x1b[2Jb\n\u{9b}"), "a\\x1b[2Jb\\x0a\\u{9b}");
        assert_eq!(terminal("gpj\u{202e}.exe"), "gpj\\u{202e}.exe");
        assert_eq!(terminal("Füße 日本"), "Füße 日本");
        assert_eq!(terminal_bytes(b"a\xff\x07\xc3\xbc"), "a\\xff\\x07ü");
        assert_eq!(ascii("Füße"), "F\\u{fc}\\u{df}e");
    }

    #[test]
    fn pictures_cannot_be_broken_out_of() {
        assert_eq!(xml("<b a='\"&'>\u{0}\u{ffff}"), "&lt;b a=&#39;&quot;&amp;&#39;&gt;\\x00\\u{ffff}");
        assert_eq!(dot("a\"];\\N"), "a\\\"];\\\\N");
    }
}
