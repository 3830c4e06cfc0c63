//! The bytes of RAID 4, 5 and 6 whose members may be missing: reconstructed from the others.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::source::within;

use super::field::{add_times, inverse, power, scale};
use super::parity::{ParityLayout, ParityRow};

/// All bytes of a set.
pub(super) struct ParitySource {
    layout: ParityLayout,
    chunk_len: u64,
    members: Vec<Option<Arc<dyn Source>>>,
    size: u64,
}

impl ParitySource {
    pub(super) fn new(
        layout: ParityLayout,
        chunk_len: u64,
        members: Vec<Option<Arc<dyn Source>>>,
        size: u64,
    ) -> Self {
        Self { layout, chunk_len, members, size }
    }

    /// Fills `buf` with a part of the chunk with number `index` of a row, which begins at `at` of the
    /// members.
    fn read_chunk(&self, row: &ParityRow, index: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        if let Some(member) = &self.members[row.data[index]] {
            return member.read_at(at, buf);
        }
        let part = |member: usize| -> Option<ReadPart<'_>> {
            let member = self.members[member].as_ref()?;
            Some(Box::new(move |buf| member.read_at(at, buf)))
        };
        let parts = RowParts {
            data: row.data.iter().map(|member| part(*member)).collect(),
            first: part(row.first),
            second: row.second.and_then(part),
            powers: row.powers.clone(),
        };
        parts.reconstruct(index, buf)
    }
}

/// Reads one part of a row.
pub(crate) type ReadPart<'a> = Box<dyn Fn(&mut [u8]) -> Result<()> + 'a>;

/// The parts of a row; `None` for those that are missing.
pub(crate) struct RowParts<'a> {
    /// The data, in order.
    pub(crate) data: Vec<Option<ReadPart<'a>>>,
    /// The sum of the data.
    pub(crate) first: Option<ReadPart<'a>>,
    /// RAID 6's second parity.
    pub(crate) second: Option<ReadPart<'a>>,
    /// The power of the generator that each of `data` has in the second parity; empty without one.
    pub(crate) powers: Vec<usize>,
}

impl RowParts<'_> {
    /// Fills `buf` with the data with number `index`, which is missing. One other data can be missing as
    /// well. `Corrupt` if the others are too few.
    pub(crate) fn reconstruct(&self, index: usize, buf: &mut [u8]) -> Result<()> {
        let missing = self.data.iter().enumerate().filter(|(other, part)| part.is_none() && *other != index);
        let missing: Vec<usize> = missing.map(|(other, _)| other).collect();
        match (&missing[..], &self.first, &self.second) {
            // The sum of all data and the parity is zero.
            ([], Some(first), _) => {
                first(buf)?;
                self.add_data(index, buf, |_| 1)
            }
            ([], None, Some(second)) => {
                second(buf)?;
                self.add_data(index, buf, |data| power(self.powers[data]))?;
                scale(buf, inverse(power(self.powers[index])));
                Ok(())
            }
            // Two equations with two unknowns, x and y: x + y = p, and gx * x + gy * y = q.
            ([other], Some(first), Some(second)) => {
                let mut sum = vec![0; buf.len()];
                first(&mut sum)?;
                self.add_data(index, &mut sum, |_| 1)?;
                second(buf)?;
                self.add_data(index, buf, |data| power(self.powers[data]))?;
                let (of_this, of_other) = (power(self.powers[index]), power(self.powers[*other]));
                add_times(buf, of_other, &sum);
                scale(buf, inverse(of_this ^ of_other));
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::Corrupt, "too many members of the RAID set are missing")),
        }
    }

    /// Adds the data that are there, but for one, each times its factor.
    fn add_data(&self, index: usize, sum: &mut [u8], factor: impl Fn(usize) -> u8) -> Result<()> {
        let mut bytes = vec![0; sum.len()];
        for (other, part) in self.data.iter().enumerate() {
            if let Some(part) = part.as_ref().filter(|_| other != index) {
                part(&mut bytes)?;
                add_times(sum, factor(other), &bytes);
            }
        }
        Ok(())
    }
}

impl Source for ParitySource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let data_count = self.layout.data_count() as u64;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let (chunk, within) = (at / self.chunk_len, at % self.chunk_len);
            let (number, index) = (chunk / data_count, (chunk % data_count) as usize);
            let len = (self.chunk_len - within).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            let member_at = number.saturating_mul(self.chunk_len).saturating_add(within);
            self.read_chunk(&self.layout.row(number), index, member_at, piece)?;
            at += len as u64;
            rest = more;
        }
        Ok(())
    }
}
