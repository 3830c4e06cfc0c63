//! LZO1X: literals and copies of earlier output, in instructions of one to a few bytes.
//!
//! The upper bits of an instruction's first byte say its form, and its last two how many literals follow.
//! What the smallest forms mean depends on the literals before them.

use super::InvalidStream;

/// Distances of the farthest form begin here; exactly this one ends the stream.
const FAR: usize = 16 << 10;

/// The literals before an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    None,
    /// One to three, which followed a copy.
    Few,
    /// Four or more.
    Run,
}

/// Decompresses `input` into `out`, and returns how many bytes that gave.
pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<usize, InvalidStream> {
    let mut stream = Stream { input, at: 0, out, done: 0 };
    let mut before = Before::None;
    // The first byte may be a number of literals.
    if let Some(first @ 18..) = input.first().copied() {
        stream.at = 1;
        let count = usize::from(first) - 17;
        stream.literals(count)?;
        before = if count < 4 { Before::Few } else { Before::Run };
    }
    while stream.done < stream.out.len() {
        let Some(code) = stream.input.get(stream.at).copied() else { break };
        stream.at += 1;
        let code = usize::from(code);
        let (distance, len, literals) = match code {
            64.. => (((code >> 2) & 7) + (stream.byte()? << 3) + 1, (code >> 5) + 1, code & 3),
            32.. => {
                let len = stream.long(code & 31, 31)? + 2;
                let word = stream.word()?;
                ((word >> 2) + 1, len, word & 3)
            }
            16.. => {
                let len = stream.long(code & 7, 7)? + 2;
                let word = stream.word()?;
                let distance = FAR + ((code & 8) << 11) + (word >> 2);
                if distance == FAR {
                    break;
                }
                (distance, len, word & 3)
            }
            _ if before == Before::None => {
                let count = stream.long(code, 15)? + 3;
                stream.literals(count)?;
                before = Before::Run;
                continue;
            }
            _ if before == Before::Run => ((code >> 2) + (stream.byte()? << 2) + 2049, 3, code & 3),
            _ => ((code >> 2) + (stream.byte()? << 2) + 1, 2, code & 3),
        };
        stream.copy(distance, len)?;
        stream.literals(literals)?;
        before = if literals == 0 { Before::None } else { Before::Few };
    }
    Ok(stream.done)
}

struct Stream<'a> {
    input: &'a [u8],
    at: usize,
    out: &'a mut [u8],
    done: usize,
}

impl Stream<'_> {
    fn byte(&mut self) -> Result<usize, InvalidStream> {
        let byte = self.input.get(self.at).copied().ok_or(InvalidStream)?;
        self.at += 1;
        Ok(byte.into())
    }

    fn word(&mut self) -> Result<usize, InvalidStream> {
        Ok(self.byte()? | self.byte()? << 8)
    }

    /// A length: `short`, or if that is zero, `base` and what follows, where each zero byte adds 255.
    fn long(&mut self, short: usize, base: usize) -> Result<usize, InvalidStream> {
        if short > 0 {
            return Ok(short);
        }
        let mut len = base;
        loop {
            let byte = self.byte()?;
            len += if byte == 0 { 255 } else { byte };
            if byte != 0 {
                return Ok(len);
            }
        }
    }

    /// Copies literals, up to the end of the output.
    fn literals(&mut self, count: usize) -> Result<(), InvalidStream> {
        let from = self.input.get(self.at..).and_then(|rest| rest.get(..count)).ok_or(InvalidStream)?;
        let now = count.min(self.out.len() - self.done);
        self.out[self.done..][..now].copy_from_slice(&from[..now]);
        self.at += count;
        self.done += now;
        Ok(())
    }

    /// Repeats earlier output, up to the end of the output. The copy may overlap what it is copied from.
    fn copy(&mut self, distance: usize, len: usize) -> Result<(), InvalidStream> {
        let start = self.done.checked_sub(distance).ok_or(InvalidStream)?;
        let now = len.min(self.out.len() - self.done);
        for index in 0..now {
            self.out[self.done + index] = self.out[start + index];
        }
        self.done += now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(input: &[u8]) -> Result<String, InvalidStream> {
        let mut out = [0; 5000];
        let len = decompress(input, &mut out)?;
        Ok(String::from_utf8_lossy(&out[..len]).into_owned())
    }

    #[test]
    fn every_form_of_an_instruction() {
        let end = [0x11, 0, 0];
        let stream = |parts: &[&[u8]]| [parts.concat(), end.to_vec()].concat();
        // A run at the beginning, in both forms.
        assert_eq!(text(&stream(&[&[22], b"abcde"])).unwrap(), "abcde");
        assert_eq!(text(&stream(&[&[0, 1], &[b'x'; 19]])).unwrap(), "x".repeat(19));
        // 3 to 4 and 5 to 8 bytes from near, then literals.
        assert_eq!(text(&stream(&[&[21], b"abcd", &[0x40 | 3 << 2 | 1, 0], b"z"])).unwrap(), "abcdabcz");
        assert_eq!(text(&stream(&[&[21], b"abcd", &[0xe0, 0]])).unwrap(), "abcddddddddd");
        // From up to 16 KiB, with a long length.
        let long = stream(&[&[21], b"abcd", &[32, 0, 5, 3 << 2, 0]]);
        assert_eq!(text(&long).unwrap(), "abcd".repeat(1 + (31 + 255 + 5 + 2) / 4) + "a");
        // Two bytes after few literals.
        let few = stream(&[&[21], b"abcd", &[0x40 | 3 << 2 | 1, 0], b"z", &[1 << 2, 0]]);
        assert_eq!(text(&few).unwrap(), "abcdabczcz");
        // Three bytes from beyond 2 KiB after a run.
        let mut far = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 255];
        far.extend([b'q'; 15 + 8 * 255 + 255 + 3]);
        far.extend([1 << 2, 0]);
        far.extend(end);
        assert_eq!(text(&far).unwrap().len(), 15 + 8 * 255 + 255 + 3 + 3);
    }

    #[test]
    fn damaged_streams_are_refused_and_full_buffers_end_them() {
        assert!(text(&[22, b'a']).is_err());
        assert!(text(&[21, b'a', b'b', b'c', b'd', 0xe0, 1]).is_err());
        assert!(text(&[0]).is_err());
        assert_eq!(text(&[]), Ok(String::new()));
        let mut out = [0; 3];
        assert_eq!(decompress(&[21, b'a', b'b', b'c', b'd', 0xe0, 1], &mut out), Ok(3));
    }
}
