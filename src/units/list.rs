//! Lists of words in one word: mount options, chains of a snapshot.
//!
//! The one reader and the one writer of lists, also of those that users type: a comma ends a word, `\\,` and
//! `\\\\` stand for a comma and a backslash within one, and any other backslash is itself, as mount(8) has
//! it.

/// The words of a list, empty ones as well.
pub fn split_list(list: &[u8]) -> Vec<Vec<u8>> {
    let (mut words, mut word) = (Vec::new(), Vec::new());
    let mut bytes = list.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => word.push(bytes.next_if(|next| matches!(next, b',' | b'\\')).unwrap_or(b'\\')),
            b',' => words.push(std::mem::take(&mut word)),
            _ => word.push(byte),
        }
    }
    words.push(word);
    words
}

/// A list that [`split_list`] reads as these words.
pub fn join_list<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut list = Vec::new();
    for (index, word) in words.into_iter().enumerate() {
        if index > 0 {
            list.push(b',');
        }
        for byte in word {
            if matches!(byte, b',' | b'\\') {
                list.push(b'\\');
            }
            list.push(*byte);
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_ends_a_word_unless_a_backslash_stands_before_it() {
        let read = |list: &str| -> Vec<String> {
            split_list(list.as_bytes()).into_iter().map(|word| String::from_utf8(word).unwrap()).collect()
        };
        assert_eq!(read(r"a,x\,y/b"), ["a", "x,y/b"]);
        assert_eq!(read(r"a\\,b"), [r"a\", "b"]);
        assert_eq!(read(r"a\b,\"), [r"a\b", r"\"]);
        assert_eq!(read(",a,"), ["", "a", ""]);
    }

    #[test]
    fn what_is_joined_is_split_into_the_same_words() {
        let words = ["", ",", r"\", r"a\,b\\", "x,y/b", r"\\,", "plain"];
        let list = join_list(words.iter().map(|word| word.as_bytes()));
        assert_eq!(split_list(&list), words.map(|word| word.as_bytes().to_vec()));
    }
}
