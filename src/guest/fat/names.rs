//! Names: eleven bytes of an old code page, or UTF-16.
//!
//! A character that a name cannot contain (`/`, a control character, half a surrogate pair) is shown as
//! U+FFFD. The code page is 437, the kernel's default; the volume does not record the real one.

/// The upper half of code page 437.
const CODE_PAGE: [char; 128] = [
    'Ç', 'ü', 'é', 'â', 'ä', 'à', 'å', 'ç', 'ê', 'ë', 'è', 'ï', 'î', 'ì', 'Ä', 'Å', 'É', 'æ', 'Æ', 'ô', 'ö',
    'ò', 'û', 'ù', 'ÿ', 'Ö', 'Ü', '¢', '£', '¥', '₧', 'ƒ', 'á', 'í', 'ó', 'ú', 'ñ', 'Ñ', 'ª', 'º', '¿', '⌐',
    '¬', '½', '¼', '¡', '«', '»', '░', '▒', '▓', '│', '┤', '╡', '╢', '╖', '╕', '╣', '║', '╗', '╝', '╜', '╛',
    '┐', '└', '┴', '┬', '├', '─', '┼', '╞', '╟', '╚', '╔', '╩', '╦', '╠', '═', '╬', '╧', '╨', '╤', '╥', '╙',
    '╘', '╒', '╓', '╫', '╪', '┘', '┌', '█', '▄', '▌', '▐', '▀', 'α', 'ß', 'Γ', 'π', 'Σ', 'σ', 'µ', 'τ', 'Φ',
    'Θ', 'Ω', 'δ', '∞', 'φ', 'ε', '∩', '≡', '±', '≥', '≤', '⌠', '⌡', '÷', '≈', '°', '∙', '·', '√', 'ⁿ', '²',
    '■', '\u{a0}',
];

/// Bits of the byte after a short name: its base is in lower case, its extension is.
const LOWER_BASE: u8 = 0x08;
const LOWER_EXTENSION: u8 = 0x10;

/// The checksum that ties a long name to its short one.
pub(super) fn checksum(short: [u8; 11]) -> u8 {
    short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// A short name as Windows NT and Linux show it.
pub(super) fn short_name(mut short: [u8; 11], case: u8) -> String {
    // 0x05 stands for 0xe5, which would mark the entry as deleted.
    if short[0] == 0x05 {
        short[0] = 0xe5;
    }
    let mut name = part(&short[..8], case & LOWER_BASE != 0);
    let extension = part(&short[8..], case & LOWER_EXTENSION != 0);
    if !extension.is_empty() {
        name.push('.');
        name.push_str(&extension);
    }
    name
}

fn part(bytes: &[u8], is_lower: bool) -> String {
    let len = bytes.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
    let decoded = bytes[..len].iter().map(|byte| match byte {
        0x80.. => CODE_PAGE[usize::from(byte - 0x80)],
        _ => shown(char::from(*byte)),
    });
    decoded.map(|c| if is_lower { one(c, c.to_lowercase()) } else { c }).collect()
}

/// A long name; `None` if it is empty or invalid.
pub(super) fn long_name(units: &[u16]) -> Option<String> {
    let len = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
    let chars = char::decode_utf16(units[..len].iter().copied())
        .map(|c| c.map_or(char::REPLACEMENT_CHARACTER, shown));
    let name: String = chars.collect();
    // Windows' own limit. It also keeps the name within the limit for directory entries.
    (!matches!(name.as_str(), "" | "." | "..") && len <= 255).then_some(name)
}

fn shown(c: char) -> char {
    if c == '/' || c.is_control() { char::REPLACEMENT_CHARACTER } else { c }
}

/// The form in which names are compared: case does not count.
pub(super) fn folded(name: &str) -> String {
    name.chars().map(|c| one(c, c.to_uppercase())).collect()
}

/// A character's other case, if that is a single character.
fn one(c: char, mut other: impl ExactSizeIterator<Item = char>) -> char {
    if other.len() == 1 { other.next().unwrap_or(c) } else { c }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_match_the_kernels() {
        assert_eq!(short_name(*b"README  TXT", 0), "README.TXT");
        assert_eq!(short_name(*b"README  TXT", LOWER_BASE), "readme.TXT");
        assert_eq!(short_name(*b"README  TXT", LOWER_EXTENSION), "README.txt");
        assert_eq!(short_name(*b"A B        ", 0), "A B");
        assert_eq!(short_name(*b"\x05\x8a\x9a/    \x01  ", LOWER_BASE), "σèü\u{fffd}.\u{fffd}");
    }

    #[test]
    fn long_names_replace_only_invalid_characters() {
        let units = |text: &str| text.encode_utf16().collect::<Vec<u16>>();
        assert_eq!(long_name(&units("ä 😀.txt\0\u{ffff}")).as_deref(), Some("ä 😀.txt"));
        assert_eq!(long_name(&[0x61, 0xd800, 0x62]).as_deref(), Some("a\u{fffd}b"));
        assert_eq!(long_name(&units("a/b")).as_deref(), Some("a\u{fffd}b"));
        for nothing in ["", ".", "..", "\0a"] {
            assert_eq!(long_name(&units(nothing)), None);
        }
        assert_eq!(folded("ÄßñÑa"), "ÄßÑÑA");
    }
}
