//! Sizes as people read them, in the units of qemu-img.

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

/// The value in the largest unit of which there is nearly one: qemu-img goes on to the next at 1000, not at 1024.
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
