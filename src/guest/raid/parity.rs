//! The layouts of RAID 4, 5 and 6: which member of a row has which data, and which has parity.
//!
//! The numbers of layouts are those of md's superblock (and of `dm-raid`). Rows are counted from the
//! beginning of the members' data areas; each has one chunk of every member.

/// How parity moves from row to row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parity {
    /// Parity moves from the last member to the first; data begins at the first member.
    LeftAsymmetric,
    /// Parity moves from the first member to the last; data begins at the first member.
    RightAsymmetric,
    /// Parity moves from the last member to the first; data begins behind it. The default of md and LVM.
    LeftSymmetric,
    /// Parity moves from the first member to the last; data begins behind it.
    RightSymmetric,
    /// The first members have all parity.
    First,
    /// The last members have all parity.
    Last,
    /// DDF's RAID 6: parity moves right, its second part behind it.
    ZeroRestart,
    /// DDF's RAID 6: parity moves left, a row ahead of [`Parity::LeftAsymmetric`].
    NRestart,
    /// DDF's RAID 6: parity moves left, its second part before it; data begins behind it.
    NContinue,
    /// A RAID 5 of all but the last member, which has the second parity.
    LeftAsymmetric6,
    /// The same with another RAID 5.
    RightAsymmetric6,
    /// The same with another RAID 5.
    LeftSymmetric6,
    /// The same with another RAID 5.
    RightSymmetric6,
    /// The same with another RAID 5.
    First6,
}

/// The layout of a set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParityLayout {
    parity: Parity,
    members: usize,
    /// RAID 6.
    has_second: bool,
}

/// A row: the members' numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ParityRow {
    /// Of the data, in order.
    pub(super) data: Vec<usize>,
    /// The parity: the sum of the data.
    pub(super) first: usize,
    /// RAID 6's second parity.
    pub(super) second: Option<usize>,
    /// The power of the generator that each of `data` has in the second parity.
    pub(super) powers: Vec<usize>,
}

impl Parity {
    /// The layout with this number in a superblock of level 5 or 6.
    pub(crate) fn of_number(level: u32, number: u32) -> Option<Self> {
        Some(match (level, number) {
            (_, 0) => Self::LeftAsymmetric,
            (_, 1) => Self::RightAsymmetric,
            (_, 2) => Self::LeftSymmetric,
            (_, 3) => Self::RightSymmetric,
            (_, 4) => Self::First,
            (_, 5) => Self::Last,
            (6, 8) => Self::ZeroRestart,
            (6, 9) => Self::NRestart,
            (6, 10) => Self::NContinue,
            (6, 16) => Self::LeftAsymmetric6,
            (6, 17) => Self::RightAsymmetric6,
            (6, 18) => Self::LeftSymmetric6,
            (6, 19) => Self::RightSymmetric6,
            (6, 20) => Self::First6,
            _ => return None,
        })
    }

    /// The powers in the second parity count the members instead of the data, from the first on.
    fn is_ddf(self) -> bool {
        matches!(self, Self::ZeroRestart | Self::NRestart | Self::NContinue)
    }
}

impl ParityLayout {
    /// Members that a set may have; the kernel's limit of RAID 6.
    const MEMBER_LIMIT: usize = 255;

    /// A layout of level 4, 5 (`has_second`: 6); `None` if there are too few or too many members.
    pub(crate) fn new(parity: Parity, members: usize, has_second: bool) -> Option<Self> {
        let least = if has_second { 3 } else { 2 };
        (least..=Self::MEMBER_LIMIT).contains(&members).then_some(Self { parity, members, has_second })
    }

    pub(crate) fn parity_count(&self) -> usize {
        1 + usize::from(self.has_second)
    }

    pub(crate) fn data_count(&self) -> usize {
        self.members - self.parity_count()
    }

    /// Rows after which the layout repeats.
    pub(super) fn period(&self) -> usize {
        match self.parity {
            Parity::First | Parity::Last | Parity::First6 => 1,
            Parity::LeftAsymmetric6
            | Parity::RightAsymmetric6
            | Parity::LeftSymmetric6
            | Parity::RightSymmetric6 => self.members - 1,
            Parity::LeftAsymmetric
            | Parity::RightAsymmetric
            | Parity::LeftSymmetric
            | Parity::RightSymmetric
            | Parity::ZeroRestart
            | Parity::NRestart
            | Parity::NContinue => self.members,
        }
    }

    /// The row with this number.
    pub(super) fn row(&self, number: u64) -> ParityRow {
        let (members, turn) = (self.members, (number % self.period() as u64) as usize);
        if !self.has_second {
            let (first, begin) = one_parity(self.parity, members, turn);
            let data = data_behind(members, begin, &[first]);
            let powers = Vec::new();
            return ParityRow { data, first, second: None, powers };
        }
        let last = members - 1;
        // The parities, and the member with the first data; data follow around the set.
        let (first, second, begin) = match self.parity {
            Parity::LeftAsymmetric => (last - turn, (last - turn + 1) % members, 0),
            Parity::RightAsymmetric | Parity::ZeroRestart => (turn, (turn + 1) % members, 0),
            Parity::NRestart => {
                let first = last - (turn + 1) % members;
                (first, (first + 1) % members, 0)
            }
            Parity::LeftSymmetric => (last - turn, (last - turn + 1) % members, (last - turn + 2) % members),
            Parity::RightSymmetric => (turn, (turn + 1) % members, (turn + 2) % members),
            Parity::NContinue => (last - turn, (last - turn + last) % members, (last - turn + 1) % members),
            Parity::First => (0, 1, 2 % members),
            Parity::Last => (members - 2, last, 0),
            Parity::LeftAsymmetric6
            | Parity::RightAsymmetric6
            | Parity::LeftSymmetric6
            | Parity::RightSymmetric6
            | Parity::First6 => {
                let (first, begin) = one_parity(self.parity, last, turn);
                (first, last, begin)
            }
        };
        let data = data_behind(members, begin, &[first, second]);
        let powers = self.powers(&data, first, second);
        ParityRow { data, first, second: Some(second), powers }
    }

    /// The powers of the generator of each of `data`: counted around the set from behind the second parity,
    /// or for DDF's layouts, the members' numbers.
    fn powers(&self, data: &[usize], first: usize, second: usize) -> Vec<usize> {
        if self.parity.is_ddf() {
            return data.to_vec();
        }
        let around = (1..=self.members).map(|step| (second + step) % self.members);
        let order: Vec<usize> = around.filter(|member| *member != first && *member != second).collect();
        let power = |member: &usize| order.iter().position(|other| other == member).unwrap_or(0);
        data.iter().map(power).collect()
    }
}

/// The member with the only parity of a row, and the member where the data begin.
fn one_parity(parity: Parity, members: usize, turn: usize) -> (usize, usize) {
    let last = members - 1;
    match parity {
        Parity::LeftAsymmetric | Parity::LeftAsymmetric6 => (last - turn, 0),
        Parity::RightAsymmetric | Parity::RightAsymmetric6 => (turn, 0),
        Parity::LeftSymmetric | Parity::LeftSymmetric6 => (last - turn, (last - turn + 1) % members),
        Parity::RightSymmetric | Parity::RightSymmetric6 => (turn, (turn + 1) % members),
        Parity::First | Parity::First6 => (0, 1 % members),
        // Only RAID 6 has the last three.
        Parity::Last | Parity::ZeroRestart | Parity::NRestart | Parity::NContinue => (last, 0),
    }
}

/// The members with data, around the set from `begin` on, without those with parity.
fn data_behind(members: usize, begin: usize, parity: &[usize]) -> Vec<usize> {
    (0..members).map(|step| (begin + step) % members).filter(|member| !parity.contains(member)).collect()
}
