//! What the compiling process gives up before it sees the component.
//!
//! **Threat.** A component whose bytes take over the compiler: it would read the keys of its parent, other users' files, or the network. What
//! it writes as compiled code is run by the server all the same, so this does not make its output trustworthy; it keeps the process
//! itself from reading, sending or outliving anything.
//!
//! **Layers.** Each is put on if the kernel has it, and named in the log if not. Hard limits of memory, time and output. Landlock: no file, no TCP,
//! no signal to others. Two seccomp filters: one ends the process at calls that a compiler never makes (SIGSYS), the other answers every
//! call that compiling does not need with ENOSYS, which every libc has an answer to.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetStatus, Scope,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule as Rule,
};

/// The newest rules that are asked for, and the oldest that have everything that is relied on.
const LANDLOCK: ABI = ABI::V6;

/// What addresses take beyond data: the program itself, and stacks.
const ADDRESSES_BEYOND_DATA: u64 = 1 << 30;

/// Largest compiled form of a component, in bytes.
const MAX_OUTPUT_BYTES: u64 = 1 << 30;

/// Seconds between the signal that CPU time is used up and the end.
const LAST_SECONDS: u64 = 5;

/// Gives up memory beyond `memory` bytes and CPU time beyond `seconds`, for good.
pub fn limit(memory: u64, seconds: u64) -> rustix::io::Result<()> {
    let addresses = memory.saturating_add(ADDRESSES_BEYOND_DATA);
    for (resource, soft, hard) in [
        (Resource::Data, memory, memory),
        (Resource::As, addresses, addresses),
        (Resource::Cpu, seconds, seconds.saturating_add(LAST_SECONDS)),
        (Resource::Fsize, MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES),
        (Resource::Core, 0, 0),
        (Resource::Memlock, 0, 0),
    ] {
        // Never above what is in force.
        let now = getrlimit(resource);
        let hard = now.maximum.unwrap_or(u64::MAX).min(hard);
        let current = now.current.unwrap_or(u64::MAX).min(soft).min(hard);
        setrlimit(resource, Rlimit { current: Some(current), maximum: Some(hard) })?;
    }
    Ok(())
}

/// Gives up everything else, while there is one thread. Returns the layers that this system does not have.
pub fn enter() -> Vec<String> {
    let mut missing = Vec::new();
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        missing.push(format!("dumpable: {error}"));
    }
    match files_and_network() {
        Ok(None) => {}
        Ok(Some(what)) => missing.push(format!("landlock: {what}")),
        Err(error) => missing.push(format!("landlock: {error}")),
    }
    // Nothing is opened from here on.
    let none = Rlimit { current: Some(3), maximum: Some(3) };
    if let Err(error) = setrlimit(Resource::Nofile, none) {
        missing.push(format!("limit of files: {error}"));
    }
    // The one that ends the process first: after the other, `seccomp` itself is refused.
    for (name, program) in
        [("seccomp, calls that end it", fatal()), ("seccomp, calls it needs", needed())]
    {
        if let Err(error) =
            program.and_then(|program| seccompiler::apply_filter_all_threads(&program))
        {
            missing.push(format!("{name}: {error}"));
        }
    }
    missing
}

/// Landlock without a rule: nothing is allowed. Says what of it is missing.
fn files_and_network() -> Result<Option<&'static str>, landlock::RulesetError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => None,
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Some("turned off (kernel option lsm=)")
        }
        (RulesetStatus::NotEnforced, _) => Some("not in this kernel, or a container forbids it"),
        (_, LandlockStatus::Available { effective_abi: ABI::V4 | ABI::V5, .. }) => {
            Some("this kernel lacks scopes (Linux 6.12)")
        }
        _ => Some("this kernel lacks rules for TCP (Linux 6.7) and scopes (Linux 6.12)"),
    })
}

type Rules = std::collections::BTreeMap<i64, Vec<Rule>>;

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> seccompiler::Result<BpfProgram> {
    let architecture = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, otherwise, matched, architecture)?.try_into()?)
}

/// A call whose arguments, by place, are so.
fn rule(conditions: &[(u8, Len, Op, u64)]) -> seccompiler::Result<Rule> {
    let conditions = conditions
        .iter()
        .map(|(place, len, op, value)| Condition::new(*place, len.clone(), op.clone(), *value));
    Ok(Rule::new(conditions.collect::<Result<_, _>>()?)?)
}

fn any(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

const THREAD: u64 = libc::CLONE_THREAD as u64;

/// Calls that a compiler never makes, and that whoever has taken one over would.
fn fatal() -> seccompiler::Result<BpfProgram> {
    #[rustfmt::skip]
    let mut rules = any(&[
        // Other programs and processes.
        libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open, libc::SYS_pidfd_getfd, libc::SYS_pidfd_send_signal, libc::SYS_kcmp,
        // The network.
        libc::SYS_socket, libc::SYS_socketpair, libc::SYS_connect, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept,
        libc::SYS_accept4, libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg,
        // The kernel.
        libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key,
        libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot, libc::SYS_unshare, libc::SYS_setns,
        libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_kexec_load, libc::SYS_reboot,
    ]);
    #[cfg(target_arch = "x86_64")]
    rules.extend(any(&[libc::SYS_fork, libc::SYS_vfork]));
    rules.insert(libc::SYS_clone, vec![rule(&[(0, Len::Qword, Op::MaskedEq(THREAD), 0)])?]);
    program(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// Calls that compiling needs.
fn needed() -> seccompiler::Result<BpfProgram> {
    #[rustfmt::skip]
    let mut rules = any(&[
        // Input and output, which are open.
        libc::SYS_read, libc::SYS_readv, libc::SYS_write, libc::SYS_writev, libc::SYS_close, libc::SYS_fstat,
        libc::SYS_lseek, libc::SYS_ppoll,
        // Memory; `mmap` and `mprotect` are below.
        libc::SYS_munmap, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_brk,
        // Threads. `clone3`, whose flags no filter sees, is not there, so that libc takes `clone`.
        libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_membarrier, libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity, libc::SYS_gettid, libc::SYS_getpid, libc::SYS_exit, libc::SYS_exit_group,
        libc::SYS_restart_syscall, libc::SYS_getcpu, libc::SYS_set_tid_address,
        // Signals to itself.
        libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sigaltstack,
        // Time and randomness.
        libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
        libc::SYS_gettimeofday, libc::SYS_getrandom,
    ]);
    #[cfg(target_arch = "x86_64")]
    rules.extend(any(&[libc::SYS_poll, libc::SYS_time]));
    // Never code of its own making.
    let exec = libc::PROT_EXEC as u64;
    let private = (3, Len::Dword, Op::MaskedEq(libc::MAP_TYPE as u64), libc::MAP_PRIVATE as u64);
    rules.insert(libc::SYS_mmap, vec![rule(&[(2, Len::Dword, Op::MaskedEq(exec), 0), private])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(&[(2, Len::Dword, Op::MaskedEq(exec), 0)])?]);
    rules.insert(libc::SYS_clone, vec![rule(&[(0, Len::Qword, Op::MaskedEq(THREAD), THREAD)])?]);
    // abort()
    rules.insert(
        libc::SYS_tgkill,
        vec![rule(&[(0, Len::Dword, Op::Eq, std::process::id().into())])?],
    );
    let option = |option: i32| rule(&[(0, Len::Dword, Op::Eq, option.cast_unsigned().into())]);
    let names =
        vec![option(libc::PR_SET_NAME)?, option(libc::PR_GET_NAME)?, option(libc::PR_SET_VMA)?];
    rules.insert(libc::SYS_prctl, names);
    program(rules, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()), SeccompAction::Allow)
}
