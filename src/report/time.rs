//! Times as text, in a time zone that the caller chooses.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::SystemTime;

/// "2026-01-03 09:12"; a question mark for times outside the calendar.
pub fn minute(at: SystemTime, zone: &TimeZone) -> String {
    formatted(at, zone, "%Y-%m-%d %H:%M")
}

/// "2026-01-03 09:12:00".
pub fn second(at: SystemTime, zone: &TimeZone) -> String {
    formatted(at, zone, "%Y-%m-%d %H:%M:%S")
}

/// "2026-03-02 .. 26": a range of days; the second omits its common beginning with the first.
pub fn days(from: SystemTime, to: SystemTime, zone: &TimeZone) -> String {
    let (from, to) = (formatted(from, zone, "%Y-%m-%d"), formatted(to, zone, "%Y-%m-%d"));
    let common = match (from.rsplit_once('-'), to.rsplit_once('-')) {
        (Some((a, _)), Some((b, _))) if a == b => a.len() + 1,
        _ => match (from.split_once('-'), to.split_once('-')) {
            (Some((a, _)), Some((b, _))) if a == b => a.len() + 1,
            _ => 0,
        },
    };
    if from == to { from } else { format!("{from} .. {}", &to[common..]) }
}

/// "2026-01-03T09:12:00Z", for JSON.
pub fn rfc3339(at: SystemTime) -> Option<String> {
    Timestamp::try_from(at).ok().map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

fn formatted(at: SystemTime, zone: &TimeZone, format: &str) -> String {
    Timestamp::try_from(at)
        .map_or_else(|_| "?".to_owned(), |at| at.to_zoned(zone.clone()).strftime(format).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn ranges_of_days_omit_the_common_part() {
        let day = 86_400;
        let range = |from, to| days(at(from), at(to), &TimeZone::UTC);
        assert_eq!(range(0, 100), "1970-01-01");
        assert_eq!(range(day, 25 * day), "1970-01-02 .. 26");
        assert_eq!(range(day, 40 * day), "1970-01-02 .. 02-10");
        assert_eq!(range(day, 400 * day), "1970-01-02 .. 1971-02-05");
    }

    #[test]
    fn times_outside_the_calendar_are_a_question_mark() {
        assert_eq!(minute(at(1_767_431_520), &TimeZone::UTC), "2026-01-03 09:12");
        assert_eq!(second(at(1_767_431_520), &TimeZone::UTC), "2026-01-03 09:12:00");
        assert_eq!(rfc3339(at(1_767_431_520)).unwrap(), "2026-01-03T09:12:00Z");
        let beyond = at(1 << 60);
        assert_eq!((minute(beyond, &TimeZone::UTC), rfc3339(beyond)), ("?".to_owned(), None));
        assert_eq!(days(beyond, beyond, &TimeZone::UTC), "?");
    }
}
