//! Seeded numbers, and changes to bytes that tend to break readers.

/// A generator of numbers that replays from its seed (xorshift64*).
pub struct Random(u64);

impl Random {
    /// All seeds but 0 are different.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A number at which things tend to break, or any.
    pub fn number(&mut self) -> u64 {
        let around = |bit: usize| 1u64 << (bit % 64);
        match self.below(7) {
            0 => 0,
            1 => u64::MAX >> self.below(64),
            2 => around(self.below(64)),
            3 => around(self.below(64)).wrapping_sub(1),
            4 => around(self.below(64)) | around(self.below(64)),
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    pub fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            // Structures begin where they matter: half of all changes hit the first 128 bytes.
            let reach = if self.once_in(2) { bytes.len().min(128) } else { bytes.len() };
            let at = self.below(reach);
            match self.below(8) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.number() as u8,
                2 => self.put(bytes, at & !1, 2),
                3 => self.put(bytes, at & !3, 4),
                4 => self.put(bytes, at & !7, 8),
                5 => bytes.truncate(at),
                6 => {
                    let (from, len) = (self.below(bytes.len()), self.below(64));
                    let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let end = (at + self.below(16)).min(bytes.len());
                    bytes.drain(at..end);
                }
            }
        }
    }

    /// Writes a number of `len` bytes at `at`, or as much of it as there is room.
    pub fn put(&mut self, bytes: &mut [u8], at: usize, len: usize) {
        let value = self.number();
        put(bytes, at, len, value);
    }
}

/// Writes the low `len` bytes of `value` at `at`, big-endian, or as much of them as there is room.
pub fn put(bytes: &mut [u8], at: usize, len: usize, value: u64) {
    for (target, byte) in bytes[at..].iter_mut().zip(&value.to_be_bytes()[8 - len..]) {
        *target = *byte;
    }
}
