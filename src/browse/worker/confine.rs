//! What keeps a worker from doing anything but computing and speaking with its daemon.
//!
//! Bounded memory and no more descriptors by resource limits, which every kernel has; no system calls but those that
//! are listed here by seccomp. Whatever else it tries ends it.

use std::collections::BTreeMap;

use nix::libc;
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter_all_threads};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of addresses that a worker may have: its caches, what parsers need, and the program itself.
const ADDRESSES: u64 = 1 << 30;

/// What a worker needs once its threads are there: its lanes, memory, locks, the clock, and its end.
const CALLS: [libc::c_long; 31] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_close,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Limits memory and descriptors. From here on nothing can be opened.
pub(super) fn limit() -> Result<()> {
    let limits = [(Resource::As, ADDRESSES), (Resource::Nofile, 0), (Resource::Fsize, 0), (Resource::Core, 0)];
    for (resource, limit) in limits {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
            .map_err(|error| Error::io("limiting a worker", error))?;
    }
    Ok(())
}

/// Lets all threads make no system call but the listed ones; any other ends the process.
pub(super) fn filter() -> Result<()> {
    let fail = |error: String| Error::new(ErrorKind::Io, format!("confining a worker with seccomp: {error}"));
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let architecture = std::env::consts::ARCH.try_into().map_err(|error| fail(format!("{error}")))?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)
        .map_err(|error| fail(error.to_string()))?;
    let program: BpfProgram = filter.try_into().map_err(|error: seccompiler::BackendError| fail(error.to_string()))?;
    apply_filter_all_threads(&program).map_err(|error| fail(error.to_string()))
}
