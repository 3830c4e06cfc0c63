//! The sandbox of a worker: it can only compute and talk to its daemon.
//!
//! Every kernel enforces: no rights, bounded memory, no new descriptors. seccomp allows only the system calls
//! listed here; any other call kills the worker.

use std::collections::BTreeMap;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use crate::error::{Error, ErrorKind, Result};

use super::process::WorkerTask;

/// Bytes of address space of a worker: its caches, the parsers' memory, and the program itself.
const ADDRESSES: u64 = 1 << 30;
/// The same for a worker that derives keys: what Argon2 may take in addition.
const UNLOCKER_ADDRESSES: u64 = ADDRESSES + (4 << 30);

/// The system calls of a worker with running threads: channels, memory, locks, the clock, and exit.
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

/// A call that fails instead of killing the worker: the C library opens a file in /proc when it frees memory,
/// and works without it.
const REFUSED: libc::c_long = libc::SYS_openat;

/// Calls with a restricted argument: its index, the bits that are checked, and their required value. A worker
/// may signal only itself (on abort), and may not create executable memory.
fn bound_calls() -> [(libc::c_long, u8, u64, u64); 3] {
    let exec = libc::PROT_EXEC.unsigned_abs().into();
    let own = std::process::id().into();
    [
        (libc::SYS_mmap, 2, exec, 0),
        (libc::SYS_mprotect, 2, exec, 0),
        (libc::SYS_tgkill, 0, u32::MAX.into(), own),
    ]
}

/// Drops all rights that the daemon's user has, root's among them: without them no limit can be raised again.
/// Rights are per thread, so no other thread may exist yet.
pub(super) fn drop_rights() -> Result<()> {
    let fail = |error: rustix::io::Errno| Error::io("dropping a worker's rights", error);
    // A worker may have keys of its guest: its memory is for no other process of the same user.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(fail)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(fail)?;
    set_no_new_privs(true).map_err(fail)
}

/// Limits memory and descriptors. After this nothing can be opened.
pub(super) fn limit(task: WorkerTask) -> Result<()> {
    let addresses = match task {
        WorkerTask::Read => ADDRESSES,
        WorkerTask::Unlock => UNLOCKER_ADDRESSES,
    };
    // Guest data must not appear in core dumps. If a core pattern pipes dumps to a program, the kernel checks
    // this limit only if it is 1; no dump file is that short.
    // G1: the parser cannot open descriptors, whatever it is made to do.
    let limits =
        [(Resource::As, addresses), (Resource::Nofile, 0), (Resource::Fsize, 0), (Resource::Core, 1)];
    for (resource, limit) in limits {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
            .map_err(|error| Error::io("limiting a worker", error))?;
    }
    Ok(())
}

/// Restricts all threads to the listed system calls; any other call kills the process.
pub(super) fn filter() -> Result<()> {
    let fail =
        |error: String| Error::new(ErrorKind::Io, format!("installing a worker's seccomp filter: {error}"));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, bits, value) in bound_calls() {
        let equal = SeccompCmpOp::MaskedEq(bits);
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, equal, value);
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        rules.insert(call, vec![rule.map_err(|error| fail(error.to_string()))?]);
    }
    // The stricter of two filters wins. This one comes first: the other forbids installing more.
    let refusal = SeccompAction::Errno(libc::EMFILE.unsigned_abs());
    install(BTreeMap::from([(REFUSED, Vec::new())]), SeccompAction::Allow, refusal).map_err(fail)?;
    rules.insert(REFUSED, Vec::new());
    install(rules, SeccompAction::KillProcess, SeccompAction::Allow).map_err(fail)
}

/// Installs one filter: the actions for calls that match no rule, and for those that match.
fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> std::result::Result<(), String> {
    let architecture = std::env::consts::ARCH.try_into().map_err(|error| format!("{error}"))?;
    let filter =
        SeccompFilter::new(rules, others, listed, architecture).map_err(|error| error.to_string())?;
    let program: BpfProgram =
        filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    apply_filter_all_threads(&program).map_err(|error| error.to_string())
}
