//! Arithmetic in GF(256) with the polynomial of RAID 6, x^8 + x^4 + x^3 + x^2 + 1 (0x11d), generator 2.

/// Powers of the generator, twice, so that sums of two logarithms need no reduction.
const POWERS: [u8; 512] = powers();
/// Logarithms of 1 to 255; that of 0 does not exist.
const LOGS: [u8; 256] = logs();

const fn powers() -> [u8; 512] {
    let mut table = [0; 512];
    let (mut value, mut index) = (1u16, 0);
    while index < table.len() {
        table[index] = value as u8;
        value <<= 1;
        if value & 0x100 != 0 {
            value ^= 0x11d;
        }
        index += 1;
    }
    table
}

const fn logs() -> [u8; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 255 {
        table[POWERS[index] as usize] = index as u8;
        index += 1;
    }
    table
}

/// The generator's power.
pub(super) fn power(exponent: usize) -> u8 {
    POWERS[exponent % 255]
}

pub(super) fn times(one: u8, other: u8) -> u8 {
    if one == 0 || other == 0 {
        return 0;
    }
    POWERS[usize::from(LOGS[usize::from(one)]) + usize::from(LOGS[usize::from(other)])]
}

/// The inverse; that of 0 is 0, which callers exclude.
pub(super) fn inverse(value: u8) -> u8 {
    if value == 0 { 0 } else { POWERS[255 - usize::from(LOGS[usize::from(value)])] }
}

/// Adds `factor` times `bytes` to `sum`.
pub(super) fn add_times(sum: &mut [u8], factor: u8, bytes: &[u8]) {
    if factor == 1 {
        sum.iter_mut().zip(bytes).for_each(|(sum, byte)| *sum ^= byte);
        return;
    }
    let mut table = [0; 256];
    for (value, product) in (0..=255).zip(&mut table) {
        *product = times(factor, value);
    }
    sum.iter_mut().zip(bytes).for_each(|(sum, byte)| *sum ^= table[usize::from(*byte)]);
}

/// Multiplies all bytes by `factor`.
pub(super) fn scale(bytes: &mut [u8], factor: u8) {
    for byte in bytes {
        *byte = times(*byte, factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication bit by bit, by the polynomial alone.
    fn slowly(one: u8, other: u8) -> u8 {
        let (mut a, mut sum) = (u16::from(one), 0u16);
        for bit in 0..8 {
            if other & (1 << bit) != 0 {
                sum ^= a;
            }
            a <<= 1;
            if a & 0x100 != 0 {
                a ^= 0x11d;
            }
        }
        sum as u8
    }

    #[test]
    fn products_are_those_of_the_polynomial() {
        for one in 0..=255 {
            for other in 0..=255 {
                assert_eq!(times(one, other), slowly(one, other), "{one} * {other}");
            }
            assert!(one == 0 || times(one, inverse(one)) == 1);
        }
        assert_eq!((power(0), power(8), power(255)), (1, 0x1d, 1));
    }
}
