//! RAID sets: how chunks are distributed over members, and how missing ones are reconstructed.
//!
//! `parity` has the layouts of RAID 4, 5 and 6, `ten` those of RAID 10, `field` the arithmetic of RAID 6, and
//! `reconstruct` the bytes that must be computed. md and LVM use the same layouts; both are the kernel's.
//!
//! Promise: a set is a device whose chunks on present members are mapped to them, and the others are computed
//! if the set has enough members.

mod field;
mod parity;
mod reconstruct;
mod ten;

use std::sync::Arc;

use crate::guest::volumes::{Device, DeviceDisks, Stripes};

pub(crate) use parity::{Parity, ParityLayout};
pub(crate) use ten::Ten;

pub(crate) use reconstruct::{ReadPart, RowParts};

use reconstruct::ParitySource;

/// Legs of a striped map: above that, all of the set is computed, or it is refused.
const LEG_LIMIT: usize = 1 << 13;

/// The members of a set: the data area of each, or `None` if it is absent or not in sync.
pub(crate) type Members = [Option<Device>];

/// RAID 4, 5 or 6 of `len` bytes. An error is the reason why its bytes are unknown.
pub(crate) fn parity_device(
    layout: ParityLayout,
    chunk_len: u64,
    members: &Members,
    len: u64,
    disks: &DeviceDisks,
) -> Result<Device, String> {
    let absent = members.iter().filter(|member| member.is_none()).count();
    if absent > layout.parity_count() {
        return Err(format!("{absent} of its {} members are missing or out of sync", members.len()));
    }
    check_chunk(chunk_len, len)?;
    let (period, data_count) = (layout.period(), layout.data_count());
    if period.saturating_mul(data_count) > LEG_LIMIT {
        return Err(format!("it has {} members, which is not supported", members.len()));
    }
    let mut legs = Vec::with_capacity(period * data_count);
    for row in 0..period as u64 {
        for member in layout.row(row).data {
            legs.push(members[member].clone().map(|device| (device, row * chunk_len)));
        }
    }
    let stripes = Stripes { chunk_len, row_len: period as u64 * chunk_len, start: 0, legs };
    let sources = members.iter().map(|member| member.as_ref().map(|device| Arc::clone(device.source())));
    let computed = ParitySource::new(layout, chunk_len, sources.collect(), len);
    Ok(Device::striped(&stripes, len, Some(Arc::new(computed)), disks))
}

/// RAID 10 of `len` bytes.
pub(crate) fn ten_device(
    layout: &Ten,
    chunk_len: u64,
    members: &Members,
    len: u64,
    disks: &DeviceDisks,
) -> Result<Device, String> {
    check_chunk(chunk_len, len)?;
    let period = layout.period();
    if period > LEG_LIMIT {
        return Err(format!("it has {} members, which is not supported", members.len()));
    }
    let mut legs = Vec::with_capacity(period);
    for chunk in 0..period as u64 {
        let present = layout.copies(chunk, chunk_len).into_iter().find_map(|(member, at)| {
            let device = members.get(member)?.as_ref()?;
            Some((device.clone(), at))
        });
        if present.is_none() {
            return Err("all copies of some of its chunks are missing or out of sync".to_owned());
        }
        legs.push(present);
    }
    let stripes = Stripes { chunk_len, row_len: layout.period_rows() * chunk_len, start: 0, legs };
    Ok(Device::striped(&stripes, len, None, disks))
}

/// RAID 0 over members of equal lengths, and any other plain striping.
pub(crate) fn striped_device(
    chunk_len: u64,
    legs: Vec<(Device, u64)>,
    len: u64,
    disks: &DeviceDisks,
) -> Result<Device, String> {
    check_chunk(chunk_len, len)?;
    if legs.is_empty() || legs.len() > LEG_LIMIT {
        return Err(format!("it has {} members, which is not supported", legs.len()));
    }
    let legs = legs.into_iter().map(Some).collect();
    let stripes = Stripes { chunk_len, row_len: chunk_len, start: 0, legs };
    Ok(Device::striped(&stripes, len, None, disks))
}

fn check_chunk(chunk_len: u64, len: u64) -> Result<(), String> {
    /// The kernel's chunks are smaller; offsets of a period of rows must not overflow.
    const CHUNK_LIMIT: u64 = 1 << 36;
    if !(1..=CHUNK_LIMIT).contains(&chunk_len) {
        return Err("its chunks have an impossible length".to_owned());
    }
    if len > i64::MAX as u64 {
        return Err("it is too large".to_owned());
    }
    Ok(())
}
