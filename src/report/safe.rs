//! Makes names safe for the place where they are shown.
//!
//! Names in images are bytes that a guest or a third party chose. On a terminal an escape sequence could
//! overwrite earlier text and a bidirectional control could reorder a line; in a picture a `<` could start a
//! script. The output of these functions cannot.

use std::fmt::Write as _;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::error::{escaped, is_plain, printable};

/// `text` for a terminal: control, invisible and reordering characters become `\x1b` or `\u{202e}`.
pub fn terminal(text: &str) -> String {
    printable(text)
}

/// Bytes from an image for a terminal: like [`terminal`], with bytes that are not UTF-8 as `\xff`.
pub fn terminal_bytes(bytes: &[u8]) -> String {
    terminal(&text(bytes))
}

/// Bytes as text, with bytes that are not UTF-8 as `\xff`. The other functions here must still make it safe.
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

/// `text` in ASCII, for `--ascii` and for terminals without UTF-8.
pub fn ascii(text: &str) -> String {
    escaped(text, |c| !is_plain(c) || !c.is_ascii())
}

/// `text` as the content or a quoted attribute of XML. Characters that XML cannot contain are escaped as on a
/// terminal.
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

/// A path, as any bytes, as the path of a URL: nothing in it has a meaning to a browser.
pub fn url(path: &[u8]) -> String {
    let mut safe = String::with_capacity(path.len());
    for byte in path {
        if byte.is_ascii_alphanumeric() || b"-._~/@".contains(byte) {
            safe.push(char::from(*byte));
        } else {
            let _ = write!(safe, "%{byte:02X}");
        }
    }
    safe
}

/// A text of at most `most` columns that ends in an ellipsis if it was cut. Safe for a terminal.
pub fn clipped(text: &str, most: usize) -> String {
    let text = terminal(text);
    if text.width() <= most {
        return text;
    }
    let (mut short, mut width) = (String::new(), 0);
    for c in text.chars() {
        width += c.width().unwrap_or(0);
        if width + 1 > most {
            break;
        }
        short.push(c);
    }
    short.push('…');
    short
}

/// `text` within the double quotes of a Graphviz string, shown literally: escapes such as `\N` or `\l` have
/// no effect.
pub fn dot(text: &str) -> String {
    terminal(text).replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_movements_and_reordering_are_escaped() {
        assert_eq!(terminal("a\x1b[2Jb\n\u{9b}"), "a\\x1b[2Jb\\x0a\\u{9b}");
        assert_eq!(terminal("gpj\u{202e}.exe"), "gpj\\u{202e}.exe");
        assert_eq!(terminal("Füße 日本"), "Füße 日本");
        assert_eq!(terminal_bytes(b"a\xff\x07\xc3\xbc"), "a\\xff\\x07ü");
        assert_eq!(ascii("Füße"), "F\\u{fc}\\u{df}e");
    }

    #[test]
    fn paths_are_urls_byte_by_byte() {
        assert_eq!(url(b"a/snapshots/x@y.raw"), "a/snapshots/x@y.raw");
        assert_eq!(url(b"a b%2F#?:\"<\n\xff"), "a%20b%252F%23%3F%3A%22%3C%0A%FF");
        assert_eq!(url("ü\\".as_bytes()), "%C3%BC%5C");
    }

    #[test]
    fn long_texts_end_in_an_ellipsis() {
        assert_eq!(clipped("abcd", 4), "abcd");
        assert_eq!(clipped("abcde", 4), "abc…");
        assert_eq!(clipped("日本語", 4), "日…");
        assert_eq!(clipped("\u{202e}", 4), "\\u{…");
    }

    #[test]
    fn names_cannot_break_out_of_pictures() {
        assert_eq!(xml("<b a='\"&'>\u{0}\u{ffff}"), "&lt;b a=&#39;&quot;&amp;&#39;&gt;\\x00\\u{ffff}");
        assert_eq!(dot("a\"];\\N"), "a\\\"];\\\\N");
    }
}
