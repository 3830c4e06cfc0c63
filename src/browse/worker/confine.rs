//! What keeps a worker from doing anything but computing and speaking with its daemon.
//!
//! No rights, bounded memory and no more descriptors, which every kernel can see to; no system calls but those that
//! are listed here by seccomp. Whatever else it tries ends it.

use std::collections::BTreeMap;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of addresses that a worker may have: its caches, what parsers need, and the program itself.
const ADDRESSES: u64 = 1 << 30;

/// What a worker needs once its threads are there: its lanes, memory, locks, the clock, and its end.
const CALLS: [libc::c_long; 27] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
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
    libc::SYS_close,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// One that fails and does not end the worker: the C library looks into /proc when it gives memory back, and gets along without.
const REFUSED: libc::c_long = libc::SYS_openat;

/// Those that may not be made in every way, each with the number of an argument, the bits of it that count, and what these have to be:
/// it ends itself where something is very wrong, but nobody else, and what it may run is what it began with.
fn bound_calls() -> [(libc::c_long, u8, u64, u64); 3] {
    let exec = libc::PROT_EXEC.unsigned_abs().into();
    let own = std::process::id().into();
    [(libc::SYS_mmap, 2, exec, 0), (libc::SYS_mprotect, 2, exec, 0), (libc::SYS_tgkill, 0, u32::MAX.into(), own)]
}

/// Gives up the rights that whoever has started the daemon had, root's among them: without them no limit can be raised again. Threads
/// have their own, so there may be no other yet.
pub(super) fn give_up_rights() -> Result<()> {
    let fail = |error: rustix::io::Errno| Error::io("giving up a worker's rights", error);
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).map_err(fail)?;
    set_no_new_privs(true).map_err(fail)
}

/// Limits memory and descriptors. From here on nothing can be opened.
pub(super) fn limit() -> Result<()> {
    // What a guest has written is in nobody's dumps, either. Where a program takes them, the kernel goes by this limit only if it is 1, and no
    // file is that short.
    // G1: no more descriptors, whatever the parser is made to do.
    let limits = [(Resource::As, ADDRESSES), (Resource::Nofile, 0), (Resource::Fsize, 0), (Resource::Core, 1)];
    for (resource, limit) in limits {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
            .map_err(|error| Error::io("limiting a worker", error))?;
    }
    Ok(())
}

/// Lets all threads make no system call but the listed ones; any other ends the process.
pub(super) fn filter() -> Result<()> {
    let fail = |error: String| Error::new(ErrorKind::Io, format!("confining a worker with seccomp: {error}"));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, bits, value) in bound_calls() {
        let equal = SeccompCmpOp::MaskedEq(bits);
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, equal, value);
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        rules.insert(call, vec![rule.map_err(|error| fail(error.to_string()))?]);
    }
    // Of two filters the stricter holds. This one comes first: the other lets no more be installed.
    let refusal = SeccompAction::Errno(libc::EMFILE.unsigned_abs());
    install(BTreeMap::from([(REFUSED, Vec::new())]), SeccompAction::Allow, refusal).map_err(fail)?;
    rules.insert(REFUSED, Vec::new());
    install(rules, SeccompAction::KillProcess, SeccompAction::Allow).map_err(fail)
}

/// One filter: what becomes of calls that meet none of the rules, and of those that do.
fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> std::result::Result<(), String> {
    let architecture = std::env::consts::ARCH.try_into().map_err(|error| format!("{error}"))?;
    let filter = SeccompFilter::new(rules, others, listed, architecture).map_err(|error| error.to_string())?;
    let program: BpfProgram = filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    apply_filter_all_threads(&program).map_err(|error| error.to_string())
}
