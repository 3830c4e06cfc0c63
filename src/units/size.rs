//! Sizes as people write and read them, in the units of qemu-img.

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
    if whole.is_empty()
        || !digits(whole)
        || !digits(fraction)
        || (number.contains('.') && fraction.is_empty())
    {
        return Err(bad("not a number; write it as 512, 10G or 1.5T"));
    }
    if !fraction.is_empty() && shift == 0 {
        return Err(bad("bytes have no fractions; add a unit, as in 1.5K"));
    }
    let too_large = || bad("larger than a disk can be (8 EiB)");
    let whole = whole.parse::<u64>().map_err(|_| too_large())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    // Exact: the fraction's digits times the unit, over a power of ten. 18 digits are finer than a byte of an
    // EiB.
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

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A size as qemu-img prints it: three significant digits, "10 GiB", "1.5 GiB", "204 KiB", "0.977 MiB".
pub fn human_size(len: u64) -> String {
    let (value, unit) = scaled(len);
    let decimals = match value {
        v if v < 1.0 => 3,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    let mut digits = format!("{value:.decimals$}");
    if digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{digits} {unit}")
}

/// A size for a column of them: "3.1 GiB", "25 MiB", "512 B". Two digits are enough to see who is heavy.
pub fn brief_size(len: u64) -> String {
    let (value, unit) = scaled(len);
    if unit == "B" || value >= 9.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// The value in the largest unit of which there is nearly one: qemu-img goes on to the next at 1000, not at
/// 1024.
#[allow(clippy::cast_precision_loss)] // three digits are shown of sixteen
fn scaled(len: u64) -> (f64, &'static str) {
    let mut value = len as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    (value, UNITS[unit])
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

    #[test]
    fn sizes_are_printed_as_qemu_img_prints_them() {
        let printed = [
            (0, "0 B"),
            (512, "512 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10240, "10 KiB"),
            (208_896, "204 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_000_000_000, "954 MiB"),
            (1_040_187_392, "992 MiB"),
            (1_072_693_248, "0.999 GiB"),
            (1_610_612_736, "1.5 GiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (len, text) in printed {
            assert_eq!(human_size(len), text);
        }
    }

    #[test]
    fn brief_sizes_have_two_digits() {
        let printed = [(7, "7 B"), (3_328_599_654, "3.1 GiB"), (204 << 10, "204 KiB"), (1 << 30, "1.0 GiB")];
        for (len, text) in printed {
            assert_eq!(brief_size(len), text);
        }
    }
}
