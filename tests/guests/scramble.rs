//! Random damage to the metadata of a disk.

use chainfs::units::are_zero;
use support::Rng;

/// Blocks of a kibibyte that hold more than file content: the numbers of those worth damaging.
pub(crate) fn telling_blocks(bytes: &[u8]) -> Vec<usize> {
    let tells = |block: &[u8]| !are_zero(block) && block[..1000] != [block[0]; 1000];
    (0..bytes.len() / 1024).filter(|at| tells(&bytes[at * 1024..][..1024])).collect()
}

/// Changes up to 40 places of those blocks: bits, bytes, numbers, and pieces of other blocks.
pub(crate) fn scramble(bytes: &mut [u8], blocks: &[usize], rng: &mut Rng) {
    for _ in 0..=rng.below(40) {
        let at = blocks[rng.below(blocks.len() as u64) as usize] * 1024 + rng.below(1024) as usize;
        match rng.below(4) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = [0, 0xff, 0x7f, 0x80][rng.below(4) as usize],
            2 => bytes[at & !3..][..4].copy_from_slice(&(rng.next() as u32).to_le_bytes()),
            _ => {
                let from = rng.below(bytes.len() as u64 - 64) as usize;
                let to = (at & !15).min(bytes.len() - 64);
                bytes.copy_within(from..from + 64, to);
            }
        }
    }
}
