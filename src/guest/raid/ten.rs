//! The layouts of RAID 10: `near` copies of a chunk on neighbouring members, `far` ones in other rows.

/// The layout of a set.
#[derive(Clone, Debug)]
pub(crate) struct Ten {
    members: usize,
    near: usize,
    far: usize,
    /// Far copies are in the next row instead of the next part of the members.
    is_offset: bool,
    /// Far copies stay within sets of so many members; at most all.
    far_set_len: usize,
    /// Chunks from a copy to its far copy.
    stride: u64,
    /// Chunks of the set.
    chunk_count: u64,
}

impl Ten {
    /// The layout with md's number, over members with room for `member_chunks` chunks each.
    pub(crate) fn of_number(number: u32, members: usize, member_chunks: u64) -> Result<Self, String> {
        let (near, far) = ((number & 0xff) as usize, ((number >> 8) & 0xff) as usize);
        let is_offset = number & (1 << 16) != 0;
        let copies = near * far;
        let unknown = || format!("its layout {number:#x} is unknown");
        if copies == 0 || copies > members || members > 1 << 10 {
            return Err(unknown());
        }
        let far_set_len = match number >> 17 {
            0 => members,
            // The first version of sets had fewer members if they cannot be divided.
            1 => members / far,
            2 => far * near,
            _ => return Err(unknown()),
        };
        if far_set_len == 0 {
            return Err(unknown());
        }
        let too_large = || "it is too large".to_owned();
        let wide = |value: u64, factor: usize| value.checked_mul(factor as u64).ok_or_else(too_large);
        let chunk_count = wide(member_chunks / far as u64, members)? / near as u64;
        let used = wide(chunk_count, copies)?.div_ceil(members as u64);
        let stride = if is_offset { 1 } else { used / far as u64 };
        Ok(Self { members, near, far, is_offset, far_set_len, stride, chunk_count })
    }

    /// Chunks of the set.
    pub(crate) fn chunk_count(&self) -> u64 {
        self.chunk_count
    }

    /// Chunks after which the layout repeats.
    pub(super) fn period(&self) -> usize {
        self.members / common_divisor(self.members, self.near)
    }

    /// Rows of the members in one period.
    pub(super) fn period_rows(&self) -> u64 {
        let rows = self.near / common_divisor(self.members, self.near);
        (rows * if self.is_offset { self.far } else { 1 }) as u64
    }

    /// The copies of a chunk: members, and offsets in their data areas. The first one is the kernel's first
    /// choice.
    pub(super) fn copies(&self, chunk: u64, chunk_len: u64) -> Vec<(usize, u64)> {
        let members = self.members as u64;
        let place = chunk * self.near as u64;
        let (mut row, first) = (place / members, (place % members) as usize);
        if self.is_offset {
            row *= self.far as u64;
        }
        let mut copies = Vec::new();
        for near in 0..self.near {
            let member = (first + near) % self.members;
            let row = row + ((first + near) / self.members) as u64;
            copies.push((member, row.saturating_mul(chunk_len)));
            let mut member = member;
            for far in 1..self.far as u64 {
                member = self.far_member(member);
                let row = row.saturating_add(far.saturating_mul(self.stride));
                copies.push((member, row.saturating_mul(chunk_len)));
            }
        }
        copies
    }

    /// The member with the next far copy.
    fn far_member(&self, member: usize) -> usize {
        let (len, left) = (self.far_set_len, self.members % self.far_set_len);
        let last_set = (self.members / len - 1) * len;
        let next = member + self.near;
        if left > 0 && next > last_set {
            // The last set has the members that are left.
            (next - last_set) % (len + left) + last_set
        } else {
            next % len + member / len * len
        }
    }
}

fn common_divisor(one: usize, other: usize) -> usize {
    if other == 0 { one } else { common_divisor(other, one % other) }
}
