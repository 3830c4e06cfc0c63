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
        let mut others = row.data.iter().enumerate().filter(|(other, _)| *other != index);
        let other = others.find(|(_, member)| self.members[**member].is_none()).map(|(other, _)| other);
        let first = self.members[row.first].as_ref();
        let second = row.second.and_then(|second| self.members[second].as_ref());
        match (other, first, second) {
            // The sum of all data and the parity is zero.
            (None, Some(first), _) => {
                first.read_at(at, buf)?;
                self.add_data(row, at, buf, |_| 1)
            }
            (None, None, Some(second)) => {
                second.read_at(at, buf)?;
                self.add_data(row, at, buf, |data| power(row.powers[data]))?;
                scale(buf, inverse(power(row.powers[index])));
                Ok(())
            }
            // Two equations with two unknowns, x and y: x + y = p, and gx * x + gy * y = q.
            (Some(other), Some(first), Some(second)) => {
                let mut sum = vec![0; buf.len()];
                first.read_at(at, &mut sum)?;
                self.add_data(row, at, &mut sum, |_| 1)?;
                second.read_at(at, buf)?;
                self.add_data(row, at, buf, |data| power(row.powers[data]))?;
                let (of_this, of_other) = (power(row.powers[index]), power(row.powers[other]));
                add_times(buf, of_other, &sum);
                scale(buf, inverse(of_this ^ of_other));
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::Corrupt, "too many members of the RAID set are missing")),
        }
    }

    /// Adds the present data of a row, each times its factor.
    fn add_data(&self, row: &ParityRow, at: u64, sum: &mut [u8], factor: impl Fn(usize) -> u8) -> Result<()> {
        let mut bytes = vec![0; sum.len()];
        for (index, member) in row.data.iter().enumerate() {
            if let Some(member) = &self.members[*member] {
                member.read_at(at, &mut bytes)?;
                add_times(sum, factor(index), &bytes);
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
