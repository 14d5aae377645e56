//! Which system calls and sockets a script may use (seccomp).

use std::{collections::BTreeMap, io};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use crate::native_script::confinement::Confinement;

/// What administrators, debuggers and container runtimes use, and plugins do not. Most of it
/// needs a capability that a confined script does not have; a flaw in the kernel behind one of
/// these calls must not be within its reach all the same.
const REFUSED: [i64; 54] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    // Opens files and sockets without the calls that are looked at here.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_name_to_handle_at,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// The same calls under the numbers that 32-bit programs with 64-bit registers use, which
/// share x86-64's architecture in the eyes of a filter.
#[cfg(target_arch = "x86_64")]
const X32: i64 = 0x4000_0000;
/// `ptrace`, `kexec_load`, `process_vm_readv` and `process_vm_writev`, which x32 numbers anew.
#[cfg(target_arch = "x86_64")]
const X32_ONLY: [i64; 4] = [521, 528, 539, 540];

/// Namespaces that `clone` can make.
const NEW_NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];

/// Restricts this thread, and what it becomes and starts.
///
/// # Errors
/// What the kernel or the container says against filters.
pub(super) fn apply(confinement: &Confinement) -> io::Result<()> {
    let refused = program(refused_calls(confinement)?, libc::EPERM)?;
    // `clone3` hides its flags in memory that a filter cannot see; libc falls back to `clone`.
    let hidden = program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        libc::ENOSYS,
    )?;
    for program in [refused, hidden] {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn refused_calls(confinement: &Confinement) -> io::Result<Rules> {
    let mut rules: Rules = REFUSED.iter().map(|&call| (call, Vec::new())).collect();
    let mut families = Vec::new();
    if confinement.network {
        // Netlink tells which addresses the machine has.
        families.extend([libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]);
    }
    if confinement.unix_sockets {
        families.push(libc::AF_UNIX);
    }
    let is_other_family: Vec<_> = families
        .into_iter()
        .map(|family| condition(SeccompCmpOp::Ne, family))
        .collect::<io::Result<_>>()?;
    // A rule without conditions cannot be made; a call without rules always matches.
    let socket = match is_other_family.is_empty() {
        true => Vec::new(),
        false => vec![SeccompRule::new(is_other_family).map_err(backend)?],
    };
    rules.insert(libc::SYS_socket, socket);
    let clone = NEW_NAMESPACES.map(|flag| {
        let flag_bits = u64::from(flag.cast_unsigned());
        let is_set = condition(SeccompCmpOp::MaskedEq(flag_bits), flag)?;
        SeccompRule::new(vec![is_set]).map_err(backend)
    });
    let clone = clone.into_iter().collect::<io::Result<_>>()?;
    rules.insert(libc::SYS_clone, clone);
    #[cfg(target_arch = "x86_64")]
    {
        let twins: Rules = rules
            .iter()
            .map(|(&call, rules)| (call | X32, rules.clone()))
            .collect();
        rules.extend(twins);
        rules.extend(X32_ONLY.map(|call| (call | X32, Vec::new())));
    }
    Ok(rules)
}

/// A condition on a call's first argument.
fn condition(operator: SeccompCmpOp, value: i32) -> io::Result<SeccompCondition> {
    let value = u64::from(value.cast_unsigned());
    SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, value).map_err(backend)
}

fn program(rules: Rules, errno: i32) -> io::Result<BpfProgram> {
    let architecture = std::env::consts::ARCH.try_into().map_err(backend)?;
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        architecture,
    )
    .and_then(TryInto::try_into)
    .map_err(backend)
}

fn backend(error: BackendError) -> io::Error {
    io::Error::other(error)
}
