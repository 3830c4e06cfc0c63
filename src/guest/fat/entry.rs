//! Directory entries: short ones are files, long ones only hold the name of the short one that follows.

use crate::guest::bytes::{array, le16, le32};
use crate::guest::filesystem::Time;

use super::names::{checksum, long_name, short_name};
use super::volume::ENTRY_LEN;

const READ_ONLY: u8 = 0x01;
const VOLUME: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG: u8 = 0x0f;
const DELETED: u8 = 0xe5;
/// Set in the first long entry, which has the end of the name.
const LAST_PART: u8 = 0x40;
/// UTF-16 units of a name in each long entry.
const PART_LEN: usize = 13;
const MOST_PARTS: u8 = 20;

/// A short entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FatEntry {
    pub(super) is_directory: bool,
    pub(super) is_read_only: bool,
    /// Its first cluster; 0 if it has none.
    pub(super) start: u32,
    pub(super) size: u32,
    pub(super) modified: Time,
    pub(super) accessed: Time,
    pub(super) created: Option<Time>,
}

impl FatEntry {
    /// A file or directory, if the entry is in use and is one; `.` and `..` are not.
    pub(super) fn parse(bytes: &[u8], has_wide_clusters: bool) -> Option<Self> {
        let (first, attributes) = (*bytes.first()?, *bytes.get(11)?);
        if matches!(first, 0 | DELETED | b'.') || attributes & VOLUME != 0 {
            return None;
        }
        let high = if has_wide_clusters { u32::from(le16(bytes, 20)) << 16 } else { 0 };
        let created = le16(bytes, 16);
        Some(Self {
            is_directory: attributes & DIRECTORY != 0,
            is_read_only: attributes & READ_ONLY != 0,
            start: high | u32::from(le16(bytes, 26)),
            size: le32(bytes, 28),
            modified: time(le16(bytes, 24), le16(bytes, 22), 0),
            accessed: time(le16(bytes, 18), 0, 0),
            created: (created != 0).then(|| time(created, le16(bytes, 14), bytes[13])),
        })
    }
}

/// A short entry with its names.
#[derive(Debug)]
pub(super) struct NamedFatEntry {
    /// The entry's number within the part of its directory that was read with it.
    pub(super) index: usize,
    pub(super) is_directory: bool,
    pub(super) name: String,
    /// The short name; a lookup finds it as well.
    pub(super) alias: String,
}

/// Reads a directory's entries in order.
#[derive(Default)]
pub(super) struct EntryReader {
    long: Option<LongName>,
    /// No entry follows one that was never used.
    pub(super) has_ended: bool,
}

/// The parts of a long name so far.
struct LongName {
    units: Vec<u16>,
    checksum: u8,
    /// The number of the last part read; 1 is the name's beginning.
    part: u8,
}

impl EntryReader {
    /// Parses the next entries, and adds each file and directory to `found`.
    pub(super) fn read(&mut self, entries: &[u8], found: &mut Vec<NamedFatEntry>) {
        for (index, entry) in entries.chunks_exact(ENTRY_LEN).enumerate() {
            if entry[0] == 0 {
                self.has_ended = true;
                return;
            }
            if entry[0] == DELETED {
                self.long = None;
            } else if entry[11] & 0x3f == LONG {
                self.add_part(entry);
            } else {
                let long = self.long.take();
                let Some(parsed) = FatEntry::parse(entry, true) else { continue };
                let short = array(entry, 0);
                let alias = short_name(short, entry[12]);
                // A long name belongs to the next short entry only if its checksum matches: old systems
                // change short entries alone.
                let long = long.filter(|long| long.part == 1 && long.checksum == checksum(short));
                let name = long.and_then(|long| long_name(&long.units)).unwrap_or_else(|| alias.clone());
                found.push(NamedFatEntry { index, is_directory: parsed.is_directory, name, alias });
            }
        }
    }

    fn add_part(&mut self, entry: &[u8]) {
        let (number, sum) = (entry[0] & !LAST_PART, entry[13]);
        let follows = |long: &LongName| long.part == number + 1 && long.checksum == sum;
        if entry[0] & LAST_PART != 0 {
            let is_possible = (1..=MOST_PARTS).contains(&number);
            let units = vec![0; usize::from(number) * PART_LEN];
            self.long = is_possible.then_some(LongName { units, checksum: sum, part: number });
        } else if number == 0 || !self.long.as_ref().is_some_and(follows) {
            self.long = None;
        }
        if let Some(long) = &mut self.long {
            long.part = number;
            let at = usize::from(number - 1) * PART_LEN;
            let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain([28, 30]);
            for (unit, place) in long.units[at..at + PART_LEN].iter_mut().zip(places) {
                *unit = le16(entry, place);
            }
        }
    }
}

/// A date and a time of day plus hundredths of a second; in UTC, like the kernel with `tz=UTC`.
fn time(date: u16, time: u16, hundredths: u8) -> Time {
    const DAYS_BEFORE: [i64; 16] = [0, 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 0, 0, 0];
    /// From 1970 to 1980.
    const FIRST_DAY: i64 = 3652;
    /// The only year divisible by four that is not a leap year.
    const YEAR_2100: i64 = 120;
    let (year, month) = (i64::from(date >> 9), i64::from(date >> 5 & 0xf).max(1));
    let day = i64::from(date & 0x1f).max(1) - 1;
    let is_leap = year % 4 == 0 && year != YEAR_2100;
    let leap_days = (year + 3) / 4 - i64::from(year > YEAR_2100) + i64::from(is_leap && month > 2);
    let days = FIRST_DAY + year * 365 + leap_days + DAYS_BEFORE[usize::from(date >> 5 & 0xf).max(1)] + day;
    let (hour, minute, second) =
        (i64::from(time >> 11), i64::from(time >> 5 & 0x3f), i64::from(time & 0x1f) * 2);
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second + i64::from(hundredths) / 100;
    Time { seconds, nanoseconds: u32::from(hundredths) % 100 * 10_000_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_match_the_calendar() {
        let at = |year: u16, month: u16, day: u16| {
            time((year - 1980) << 9 | month << 5 | day, 0, 0).seconds / 86_400
        };
        // The output of date(1): `date -ud 2000-02-29 +%s`, and so on.
        let known = [(1980, 1, 1, 3652), (2000, 2, 29, 11016), (2000, 3, 1, 11017), (2024, 12, 31, 20088)];
        for (year, month, day, days) in known {
            assert_eq!(at(year, month, day), days, "{year}-{month}-{day}");
        }
        for (year, month, day, days) in [(2100, 3, 1, 47541), (2101, 1, 1, 47847), (2107, 12, 31, 50402)] {
            assert_eq!(at(year, month, day), days, "{year}-{month}-{day}");
        }
        let late = time(0, (23 << 11) + (59 << 5) + 29, 199);
        assert_eq!((late.seconds % 86_400, late.nanoseconds), (86_399, 990_000_000));
    }
}
