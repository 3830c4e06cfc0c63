//! Sizes as people write them, in the units of qemu-img.

use crate::error::{Error, ErrorKind, Result};

/// Reads `10G`, `1.5T`, `512`, `64KiB`: bytes, or a number with a binary unit, as qemu-img takes them.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = |why: &str| Error::new(ErrorKind::Usage, format!("size '{}': {why}", text.escape_debug()));
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[number.len()..];
    let shift = match unit.to_ascii_lowercase().trim_end_matches("ib") {
        "" if unit.is_empty() => 0,
        "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(bad("not a unit of size; use B, K, M, G, T, P or E")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || (number.contains('.') && fraction.is_empty()) {
        return Err(bad("not a number; write it as 512, 10G or 1.5T"));
    }
    if !fraction.is_empty() && shift == 0 {
        return Err(bad("bytes have no fractions; add a unit, as in 1.5K"));
    }
    let too_large = || bad("larger than a disk can be (8 EiB)");
    let whole = whole.parse::<u64>().map_err(|_| too_large())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    // Exact: the fraction's digits times the unit, over a power of ten. 18 digits are finer than a byte of an EiB.
    let fraction = &fraction[..fraction.len().min(18)];
    let part = if fraction.is_empty() {
        0
    } else {
        let numerator = u128::from(fraction.parse::<u64>().map_err(|_| too_large())?) << shift;
        let denominator = 10u128.pow(u32::try_from(fraction.len()).unwrap_or(18));
        (numerator / denominator) as u64
    };
    let len = whole.checked_add(part).ok_or_else(too_large)?;
    // Off by one sector from the end of i64: positions on disks are signed in the kernel and in QEMU.
    if len > i64::MAX as u64 & !511 { Err(too_large()) } else { Ok(len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        let read = [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("64KiB", 65536),
            ("1.5T", 3 << 39),
            ("0.5K", 512),
            ("7.999999999999999999999E", 9_223_372_036_854_774_784),
        ];
        for (text, len) in read {
            assert_eq!(parse_size(text).ok(), Some(len).filter(|len| *len < (1 << 62)), "{text}");
        }
    }

    #[test]
    fn nonsense_and_overflow_are_told_apart() {
        for text in ["", "G", "-1", "1.G", ".5G", "1,5G", "0x10", "1.5", "ten", "10Q", "10ib", "1e3", " 1"] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(error.starts_with("size '") && !error.contains("larger"), "{text}: {error}");
        }
        for text in ["8E", "16E", "99999999999999999999999", "9223372036854775807", "18446744073709551615"] {
            assert!(parse_size(text).unwrap_err().to_string().contains("larger"), "{text}");
        }
    }
}
