//! The checksums of ext4 and its journal.
//!
//! All of them are raw: the caller passes the initial state and gets the final state. Nothing is inverted, so
//! that a checksum can span several pieces.

/// CRC32C, which `metadata_csum` and the journal's versions 2 and 3 use.
pub(super) fn crc32c(state: u32, bytes: &[u8]) -> u32 {
    // The library inverts before and after, as network protocols do.
    !crc32c::crc32c_append(!state, bytes)
}

/// CRC32C of `bytes` with `len` bytes at `at`, the checksum's own field, taken as zero.
pub(super) fn crc32c_without_field(state: u32, bytes: &[u8], at: usize, len: usize) -> u32 {
    let state = crc32c(state, &bytes[..at]);
    let state = crc32c(state, &[0; 4][..len]);
    crc32c(state, &bytes[at + len..])
}

/// CRC16 (polynomial 0x8005, reflected), which `uninit_bg` uses for group descriptors.
pub(super) fn crc16(state: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(state, |state, byte| {
        (0..8).fold(state ^ u16::from(*byte), |state, _| state >> 1 ^ if state & 1 == 1 { 0xa001 } else { 0 })
    })
}

/// CRC32 with the most significant bit first, which the journal's version 1 uses over whole transactions.
pub(super) fn crc32_be(state: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    bytes.iter().fold(state, |state, byte| state << 8 ^ TABLE[(state >> 24) as usize ^ usize::from(*byte)])
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = (index as u32) << 24;
        let mut bit = 0;
        while bit < 8 {
            value = value << 1 ^ if value >> 31 == 1 { 0x04c1_1db7 } else { 0 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_have_the_catalogues_check_values() {
        let check = b"123456789";
        assert_eq!(!crc32c(!0, check), 0xe306_9283);
        assert_eq!(crc16(0, check), 0xbb3d, "CRC-16/ARC");
        assert_eq!(crc32_be(!0, check), 0x0376_e6e7, "CRC-32/MPEG-2");
    }

    #[test]
    fn the_checksums_own_field_counts_as_zeroes() {
        assert_eq!(crc32c_without_field(7, b"ab????cd", 2, 4), crc32c(7, b"ab\0\0\0\0cd"));
        assert_eq!(crc32c_without_field(7, b"ab??cd", 2, 2), crc32c(7, b"ab\0\0cd"));
    }
}
