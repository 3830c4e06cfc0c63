//! Splits the line of a command into words as a shell does, and quotes words again.
//!
//! Quotes and backslashes mean what they mean to sh(1). Nothing is expanded and nothing is a comment, so each
//! word is exactly the one that was written. Line ends and control characters, which would be displayed as
//! something else, are refused.

use crate::error::{Error, ErrorKind, Result};

/// Maximum number of bytes of a command.
pub const MAX_COMMAND_LEN: usize = 64 << 10;

/// The words of a line; its end may be marked by a newline. There may be none.
pub(super) fn split(text: &[u8]) -> Result<Vec<Vec<u8>>> {
    if text.len() > MAX_COMMAND_LEN {
        return Err(usage(format!(
            "a command has at most {MAX_COMMAND_LEN} bytes, this one has {}",
            text.len()
        )));
    }
    let line = text.strip_suffix(b"\n").unwrap_or(text);
    if line.contains(&b'\n') {
        return Err(usage("one write is one command of one line; give each command by itself"));
    }
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b' ' | b'\t' => words.extend(word.take()),
            b'\'' | b'"' => quoted(&mut bytes, byte, word.get_or_insert_default())?,
            b'\\' => {
                let escaped = bytes.next().ok_or_else(|| usage("a backslash at the end escapes nothing"))?;
                word.get_or_insert_default().push(plain(escaped)?);
            }
            _ => word.get_or_insert_default().push(plain(byte)?),
        }
    }
    words.extend(word);
    Ok(words)
}

/// The rest of a quoted part, into `word`.
fn quoted(bytes: &mut impl Iterator<Item = u8>, quote: u8, word: &mut Vec<u8>) -> Result<()> {
    let open = || usage(format!("a quotation that begins with {} does not end", char::from(quote)));
    loop {
        match bytes.next().ok_or_else(open)? {
            byte if byte == quote => return Ok(()),
            b'\\' if quote == b'"' => {
                let next = bytes.next().ok_or_else(open)?;
                if !matches!(next, b'"' | b'\\' | b'$' | b'`') {
                    word.push(b'\\');
                }
                word.push(plain(next)?);
            }
            byte => word.push(plain(byte)?),
        }
    }
}

/// A byte that may be part of a word.
fn plain(byte: u8) -> Result<u8> {
    if byte.is_ascii_control() {
        return Err(usage(format!("a command has no control characters, and this one has \\x{byte:02x}")));
    }
    Ok(byte)
}

/// A word in its quoted form, for the reader of commands and for a shell.
pub fn quote(word: &[u8]) -> Vec<u8> {
    let is_plain =
        |byte: &u8| byte.is_ascii_alphanumeric() || !byte.is_ascii() || b"._-/=@%+:,".contains(byte);
    if !word.is_empty() && word.iter().all(is_plain) {
        return word.to_vec();
    }
    let mut quoted = vec![b'\''];
    for byte in word {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            _ => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

fn usage(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, fact)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let words = split(line.as_bytes()).unwrap();
        words.into_iter().map(|word| String::from_utf8(word).unwrap()).collect()
    }

    #[test]
    fn words_are_split_as_by_a_shell() {
        for line in [
            "a  b\tc",
            r#""a b" 'c d'e\ f"#,
            r#"x="y z" ''"#,
            r#""\"\\\$\`\n" '\n' \n"#,
            r"a\'b 'it'\''s'",
            "ü='ö ä'",
        ] {
            let shell = std::process::Command::new("sh")
                .args(["-c", &format!("printf '%s\\n' {line}")])
                .output()
                .expect("a shell");
            let theirs: Vec<String> =
                String::from_utf8(shell.stdout).unwrap().lines().map(str::to_string).collect();
            assert_eq!(words(line), theirs, "{line}");
        }
        assert_eq!(words("a #b $c *; \n"), ["a", "#b", "$c", "*;"]);
        assert_eq!(words(" \n"), Vec::<String>::new());
    }

    #[test]
    fn a_shell_reads_quoted_words_unchanged() {
        for word in ["", "plain", "two words", "it's", "~", "$(date)", "a\\b", "#", "\"", "ü"] {
            let line = String::from_utf8(quote(word.as_bytes())).unwrap();
            assert_eq!(words(&line), [word]);
            let shell =
                std::process::Command::new("sh").args(["-c", &format!("printf %s {line}")]).output().unwrap();
            assert_eq!(shell.stdout, word.as_bytes());
        }
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in ["'a", "\"a", "a\\", "\"a\\", "a\nb", "a\n\n", "a\0b", "a\rb", "'\t'", "\x7f", "\\\x1b"] {
            assert_eq!(split(line.as_bytes()).unwrap_err().kind(), ErrorKind::Usage, "{line:?}");
        }
        let longest = vec![b'a'; MAX_COMMAND_LEN];
        assert_eq!(split(&longest).unwrap(), std::slice::from_ref(&longest));
        assert!(split(&vec![b'a'; MAX_COMMAND_LEN + 1]).is_err());
    }
}
