//! Sandbox of the compiler process, entered before the process reads a component.
//!
//! **Threat.** A component exploits a bug in the compiler and runs code in the compiler process.
//! Such code could read the keys of the parent process, read other users' files, open connections,
//! start programs, or stay alive after the server has stopped.
//!
//! **Layers.** Each layer works without the others, because a kernel or a container may lack one.
//! [`enter`] returns the layers that the system lacks, and the server logs them once.
//! - *Limits* ([`limit`]): hard limits of memory, address space, CPU time and output size. No core
//!   file, no locked memory. A hard limit cannot be raised again.
//! - *Not dumpable*: other processes of the same user cannot attach to this one or read its memory,
//!   and the kernel writes no core file.
//! - *Landlock*: access to no file, no TCP port, and no abstract socket or signal outside of the
//!   process. The ruleset handles all rights of one ABI and grants none.
//! - *Open files*: at most three, which are standard input, output and error.
//! - *seccomp kill filter*: system calls that a compiler never makes, such as `execve` or `socket`,
//!   kill the process with SIGSYS. The host reports the component as hostile.
//! - *seccomp allow filter*: all other system calls that compiling does not need fail with ENOSYS.
//!   A libc has a fallback for ENOSYS, so a new version of libc does not crash the compiler.
//!
//! From then on the process maps no memory as executable: it writes code and never runs it.
//!
//! **Order.** Landlock and the limit of open files come before seccomp, whose filters forbid the
//! calls that set them. The kill filter comes before the allow filter, which forbids `seccomp`
//! itself. All layers are set while the process has one thread, so that they hold for all threads.
//!
//! **Limit of this defense.** The server runs the code that the process writes. A compiler that was
//! taken over can write harmful code, so the sandbox does not make the output trustworthy. The
//! sandbox only keeps the process from reading, sending or outliving anything.

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

/// Landlock version that has all rights this sandbox relies on (Linux 6.12).
const LANDLOCK_ABI: ABI = ABI::V6;

/// Address space beyond data: the program itself, and stacks.
const ADDRESS_SPACE_OVERHEAD_BYTES: u64 = 1 << 30;

/// Largest compiled code of a component.
const MAX_OUTPUT_BYTES: u64 = 1 << 30;

/// Time between SIGXCPU at the soft limit of CPU time and SIGKILL at the hard one.
const CPU_KILL_GRACE_SECONDS: u64 = 5;

/// Sets hard limits: `memory` bytes of data and `seconds` of CPU time, over all threads.
pub(crate) fn limit(memory: u64, seconds: u64) -> rustix::io::Result<()> {
    let addresses = memory.saturating_add(ADDRESS_SPACE_OVERHEAD_BYTES);
    for (resource, soft, hard) in [
        (Resource::Data, memory, memory),
        (Resource::As, addresses, addresses),
        (Resource::Cpu, seconds, seconds.saturating_add(CPU_KILL_GRACE_SECONDS)),
        (Resource::Fsize, MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES),
        (Resource::Core, 0, 0),
        (Resource::Memlock, 0, 0),
    ] {
        // A value above the current hard limit is an error.
        let now = getrlimit(resource);
        let hard = now.maximum.unwrap_or(u64::MAX).min(hard);
        let current = now.current.unwrap_or(u64::MAX).min(soft).min(hard);
        setrlimit(resource, Rlimit { current: Some(current), maximum: Some(hard) })?;
    }
    Ok(())
}

/// Enters the sandbox. The process must have one thread. Returns the layers that this system lacks.
pub(crate) fn enter() -> Vec<String> {
    let mut missing = Vec::new();
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        missing.push(format!("dumpable: {error}"));
    }
    match restrict_files_and_network() {
        Ok(None) => {}
        Ok(Some(gap)) => missing.push(format!("landlock: {gap}")),
        Err(error) => missing.push(format!("landlock: {error}")),
    }
    // Standard input, output and error are open, so no other file can be opened.
    let no_more = Rlimit { current: Some(3), maximum: Some(3) };
    if let Err(error) = setrlimit(Resource::Nofile, no_more) {
        missing.push(format!("open file limit: {error}"));
    }
    // The allow filter comes last, as it refuses `seccomp` itself.
    for (name, program) in
        [("seccomp kill filter", kill_filter()), ("seccomp allow filter", allow_filter())]
    {
        if let Err(error) =
            program.and_then(|program| seccompiler::apply_filter_all_threads(&program))
        {
            missing.push(format!("{name}: {error}"));
        }
    }
    missing
}

/// Restricts the process by a Landlock ruleset without rules, which allows nothing. Returns the gap
/// if this kernel enforces only a part.
fn restrict_files_and_network() -> Result<Option<&'static str>, landlock::RulesetError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))?
        .handle_access(AccessNet::from_all(LANDLOCK_ABI))?
        .scope(Scope::from_all(LANDLOCK_ABI))?
        .create()?
        .restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => None,
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Some("disabled (kernel option lsm=)")
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

/// Returns a rule for calls whose arguments, given by index, meet all conditions.
fn rule(conditions: &[(u8, Len, Op, u64)]) -> seccompiler::Result<Rule> {
    let conditions = conditions
        .iter()
        .map(|(index, len, op, value)| Condition::new(*index, len.clone(), op.clone(), *value));
    Ok(Rule::new(conditions.collect::<Result<_, _>>()?)?)
}

/// Returns rules that match these calls whatever their arguments are.
fn unconditional(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Flag of `clone` that starts a thread instead of a process.
const CLONE_THREAD_FLAG: u64 = libc::CLONE_THREAD as u64;

/// Returns the filter that kills the process at calls which only an exploit makes.
fn kill_filter() -> seccompiler::Result<BpfProgram> {
    #[rustfmt::skip]
    let mut rules = unconditional(&[
        // Other programs and processes.
        libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace,
        libc::SYS_process_vm_readv, libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open, libc::SYS_pidfd_getfd, libc::SYS_pidfd_send_signal, libc::SYS_kcmp,
        // Network.
        libc::SYS_socket, libc::SYS_socketpair, libc::SYS_connect, libc::SYS_bind,
        libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4,
        libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg,
        // Kernel.
        libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
        libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key,
        libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot,
        libc::SYS_unshare, libc::SYS_setns,
        libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module,
        libc::SYS_kexec_load, libc::SYS_reboot,
    ]);
    #[cfg(target_arch = "x86_64")]
    rules.extend(unconditional(&[libc::SYS_fork, libc::SYS_vfork]));
    let no_thread = (0, Len::Qword, Op::MaskedEq(CLONE_THREAD_FLAG), 0);
    rules.insert(libc::SYS_clone, vec![rule(&[no_thread])?]);
    program(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// Returns the filter that allows the calls which compiling needs. All others fail with ENOSYS.
fn allow_filter() -> seccompiler::Result<BpfProgram> {
    #[rustfmt::skip]
    let mut rules = unconditional(&[
        // Input and output, on files that are open.
        libc::SYS_read, libc::SYS_readv, libc::SYS_write, libc::SYS_writev,
        libc::SYS_close, libc::SYS_fstat, libc::SYS_lseek, libc::SYS_ppoll,
        // Memory; `mmap` and `mprotect` are below.
        libc::SYS_munmap, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_brk,
        // Threads. A filter cannot read the flags of `clone3`. The call fails with ENOSYS, so libc
        // falls back to `clone`.
        libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_membarrier,
        libc::SYS_sched_yield, libc::SYS_sched_getaffinity, libc::SYS_gettid, libc::SYS_getpid,
        libc::SYS_exit, libc::SYS_exit_group, libc::SYS_restart_syscall, libc::SYS_getcpu,
        libc::SYS_set_tid_address,
        // Signal handlers of the process.
        libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        // Time and randomness.
        libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep, libc::SYS_gettimeofday, libc::SYS_getrandom,
    ]);
    #[cfg(target_arch = "x86_64")]
    rules.extend(unconditional(&[libc::SYS_poll, libc::SYS_time]));
    // No executable memory.
    let exec = libc::PROT_EXEC as u64;
    let private = (3, Len::Dword, Op::MaskedEq(libc::MAP_TYPE as u64), libc::MAP_PRIVATE as u64);
    rules.insert(libc::SYS_mmap, vec![rule(&[(2, Len::Dword, Op::MaskedEq(exec), 0), private])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(&[(2, Len::Dword, Op::MaskedEq(exec), 0)])?]);
    let is_thread = (0, Len::Qword, Op::MaskedEq(CLONE_THREAD_FLAG), CLONE_THREAD_FLAG);
    rules.insert(libc::SYS_clone, vec![rule(&[is_thread])?]);
    // `abort` sends a signal to the own process.
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
