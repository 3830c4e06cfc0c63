//! The processors, and how many threads serve the queue of each.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A machine with more has no rings: each processor that is possible costs threads and memory.
const MAX_QUEUES: usize = 1024;

/// The queue of each thread: the kernel wants a queue for each processor that is possible. That of one which
/// is not there has a single thread.
pub(crate) fn queues(threads_per_queue: usize) -> io::Result<Vec<u16>> {
    let list = |name: &str| std::fs::read_to_string(format!("/sys/devices/system/cpu/{name}"));
    let possible = count(&list("possible")?).ok_or(io::ErrorKind::InvalidData)?;
    if possible > MAX_QUEUES {
        return Err(io::Error::other(format!("{possible} processors are too many")));
    }
    let allowed = sched_getaffinity(None)?;
    let is_usable = |cpu: usize| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu);
    // What came from another processor could not be nudged (`nudge`).
    let online = count(&list("online")?).ok_or(io::ErrorKind::InvalidData)?;
    if (0..possible).filter(|cpu| is_usable(*cpu)).count() < online {
        return Err(io::Error::other("not all processors may be used"));
    }
    let queues = (0..possible).flat_map(|cpu| {
        std::iter::repeat_n(cpu as u16, if is_usable(cpu) { threads_per_queue.max(1) } else { 1 })
    });
    Ok(queues.collect())
}

/// Does `work` on the processor of a queue, if it is there.
pub(crate) fn on(queue: u16, work: impl FnOnce()) {
    let before = sched_getaffinity(None);
    let mut one = CpuSet::new();
    one.set(queue.into());
    let has_moved = sched_setaffinity(None, &one).is_ok();
    work();
    if has_moved && let Ok(before) = before {
        // Without success the thread stays here, which costs time only.
        let _ = sched_setaffinity(None, &before);
    }
}

/// The number of processors in a list such as `0-3,8`.
fn count(list: &str) -> Option<usize> {
    let mut total = 0;
    for range in list.trim().split(',') {
        let (begin, end) = range.split_once('-').unwrap_or((range, range));
        let (begin, end): (usize, usize) = (begin.parse().ok()?, end.parse().ok()?);
        total += end.checked_sub(begin)?.checked_add(1)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted() {
        for (list, expected) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,8,10-11", Some(7)),
            ("", None),
            ("3-0", None),
            ("a", None),
        ] {
            assert_eq!(count(list), expected, "{list:?}");
        }
    }

    #[test]
    fn each_processor_has_a_queue() {
        let queues: std::collections::BTreeSet<_> = queues(2).expect("this machine").into_iter().collect();
        let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").expect("sysfs");
        assert_eq!(Some(queues.len()), count(&list));
    }

    #[test]
    fn work_is_done_on_the_processor_of_its_queue() {
        let here = || sched_getaffinity(None).expect("the processors");
        let before = here();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)).expect("a processor");
        let mut seen = before;
        on(first as u16, || seen = here());
        assert_eq!((seen.count(), seen.is_set(first)), (1, true));
        assert_eq!(here(), before);
    }
}
