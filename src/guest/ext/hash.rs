//! The hashes by which large directories are sorted.

/// The hash function, as a directory's index names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HashVersion {
    Legacy,
    HalfMd4,
    Tea,
}

/// The parameters of a name's hash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hasher {
    pub(super) kind: HashVersion,
    /// Whether the bytes of a name are unsigned, as on file systems made on ARM.
    pub(super) unsigned: bool,
    /// All zero: the hash's default seed.
    pub(super) seed: [u32; 4],
}

impl Hasher {
    /// The kind by its number in an index; 3 to 5 are 0 to 2 with unsigned bytes, regardless of the
    /// superblock.
    pub(super) fn new(number: u8, unsigned: bool, seed: [u32; 4]) -> Option<Self> {
        let kind = match number % 3 {
            _ if number > 5 => return None,
            0 => HashVersion::Legacy,
            1 => HashVersion::HalfMd4,
            _ => HashVersion::Tea,
        };
        Some(Self { kind, unsigned: unsigned || number > 2, seed })
    }

    /// The hash; its lowest bit is 0: an index uses that bit to mark a hash that continues in the next block.
    pub(super) fn hash(&self, name: &[u8]) -> u32 {
        self.hashes(name).0
    }

    /// The hash, and the minor hash that distinguishes names with equal hashes.
    pub(super) fn hashes(&self, name: &[u8]) -> (u32, u32) {
        let own = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
        let mut state = if self.seed == [0; 4] { own } else { self.seed };
        let (hash, minor) = match self.kind {
            HashVersion::Legacy => (self.legacy(name), 0),
            HashVersion::HalfMd4 => {
                for rest in pieces(name, 32) {
                    half_md4(&mut state, self.words(rest));
                }
                (state[1], state[2])
            }
            HashVersion::Tea => {
                for rest in pieces(name, 16) {
                    tea(&mut state, self.words(rest));
                }
                (state[0], state[1])
            }
        };
        let hash = hash & !1;
        // The largest value marks the end of a directory.
        (if hash == 0xffff_fffe { 0xffff_fffc } else { hash }, minor)
    }

    fn byte(&self, byte: u8) -> u32 {
        if self.unsigned { byte.into() } else { i32::from(byte.cast_signed()).cast_unsigned() }
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut last, mut before) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
        for byte in name {
            let mut hash = before.wrapping_add(last ^ self.byte(*byte).wrapping_mul(7_152_373));
            if hash & 0x8000_0000 != 0 {
                hash = hash.wrapping_sub(0x7fff_ffff);
            }
            (before, last) = (last, hash);
        }
        last << 1
    }

    /// The next bytes of a name as words, padded with the length of the remainder.
    fn words<const N: usize>(&self, rest: &[u8]) -> [u32; N] {
        let len = rest.len() as u32;
        let pad = len | len << 8;
        let pad = pad | pad << 16;
        let mut words = [pad; N];
        for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
            *word = bytes.iter().fold(pad, |word, byte| self.byte(*byte).wrapping_add(word << 8));
        }
        words
    }
}

/// The remainder of a name at each step of `len` bytes.
fn pieces(name: &[u8], len: usize) -> impl Iterator<Item = &[u8]> {
    (0..name.len()).step_by(len).map(|at| &name[at..])
}

fn half_md4(state: &mut [u32; 4], input: [u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (|x, y, z| (x & y).wrapping_add((x ^ y) & z), 0x5a82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (|x, y, z| x ^ y ^ z, 0x6ed9_eba1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (step, index) in order.into_iter().enumerate() {
            let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(input[index]).wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

fn tea(state: &mut [u32; 4], [a, b, c, d]: [u32; 4]) {
    let (mut sum, mut left, mut right) = (0u32, state[0], state[1]);
    let mix = |word: u32, sum: u32, one: u32, two: u32| {
        (word << 4).wrapping_add(one) ^ word.wrapping_add(sum) ^ (word >> 5).wrapping_add(two)
    };
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        left = left.wrapping_add(mix(right, sum, a, b));
        right = right.wrapping_add(mix(left, sum, c, d));
    }
    state[0] = state[0].wrapping_add(left);
    state[1] = state[1].wrapping_add(right);
}
