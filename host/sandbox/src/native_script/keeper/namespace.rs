//! A PID namespace of the script's own, with a `/proc` that shows only what is in it.

use std::{fs, io, os::unix::net::UnixStream, path::Path, process::Stdio};

use nix::sched::CloneFlags;
use rustix::{
    mount::{MountFlags, MountPropagationFlags},
    process::Pid,
    thread::{CapabilitySet, CapabilitySets},
};

use super::{own_command, private_tmp, read_only, wait_readable};
use crate::native_script::{
    confinement::{Confinement, Granted, Protection},
    messages::Containment,
};

/// Process 1 of the namespace as the guard sees it.
pub(super) struct Namespace {
    pub(super) init: Pid,
    /// Readable when the last orphan in the namespace ended; open as long as init lives.
    pub(super) signs: UnixStream,
    /// Where a confined script's temporary files go.
    pub(super) tmp: Option<&'static Path>,
}

/// What init writes once `/proc` is mounted, and each time no process of its own is left.
pub(super) const SIGN_READY: u8 = b'r';
/// The same, with a bound on the number of processes.
pub(super) const SIGN_READY_BOUNDED: u8 = b'b';
pub(super) const SIGN_CHILDLESS: u8 = b'c';

/// Long enough for a process start on a loaded machine.
const INIT_START_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Puts all further children of this process into a new PID and mount namespace.
///
/// 1. Take the namespaces, with a user namespace first where we lack the privilege.
/// 2. Keep mounts made from now on to ourselves, while the host's still arrive.
/// 3. For a confined script: mount its own temporary directories, make what it may not change
///    read-only, and take a network namespace with nothing in it if it shall have no network.
/// 4. Start process 1, which mounts the new `/proc`.
/// 5. Give up what privilege the user namespace gave us.
///
/// # Errors
/// When the kernel or the container refuses one of these. Children can then no longer be
/// started from here: the keeper has to end.
pub(super) fn enter(
    containment: Containment,
    confinement: Option<&mut Confinement>,
    granted: &mut Granted,
) -> io::Result<Namespace> {
    let with_user = containment == Containment::UserPidNamespace;
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    if with_user && user == 0 {
        // Root would lose its rights over other users' files, and with them plugins that work today.
        return Err(io::Error::other("not used for root"));
    }
    let mut flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    if with_user {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    nix::sched::unshare(flags).map_err(|error| context("unshare", error.into()))?;
    if with_user {
        keep_identity(user, group).map_err(|error| context("user and group map", error))?;
        lend_mount_privilege().map_err(|error| context("capabilities", error))?;
    }
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(|error| context("mount propagation", error.into()))?;
    let processes = confinement.as_ref().map(|it| it.processes);
    let mut tmp = None;
    if let Some(confinement) = confinement {
        if !confinement.network {
            let outcome = nix::sched::unshare(CloneFlags::CLONE_NEWNET);
            granted.note(
                Protection::NoNetwork,
                outcome.map_err(|error| format!("network namespace: {error}")),
            );
        }
        match private_tmp::mount(confinement) {
            Ok(mounted) => tmp = mounted,
            Err(error) => {
                let reason = format!("file system for it: {error}");
                granted.note(Protection::PrivateTmp, Err(reason));
            }
        }
        if tmp.is_some() {
            granted.note(Protection::PrivateTmp, Ok(()));
        }
        let outcome = read_only::apply(confinement).map_err(|error| error.to_string());
        granted.note(Protection::ReadOnlySystem, outcome);
    }
    let namespace = start_init(processes, tmp, granted)?;
    granted.note(Protection::PidNamespace, Ok(()));
    if with_user {
        give_up_privilege().map_err(|error| context("capabilities", error))?;
    }
    Ok(namespace)
}

/// Mounts a `/proc` of the namespace that this process is in.
pub(super) fn mount_proc() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", flags, None)?;
    Ok(())
}

/// The first kernel that counts process numbers per namespace. Before it, the file that
/// [`bound_processes`] writes is the whole machine's.
const BOUND_SINCE: (u32, u32) = (6, 14);

/// The kernel hands out process numbers below this once only.
const RESERVED_PROCESSES: u32 = 300;

/// Bounds the processes and threads of the namespace whose `/proc` this is, to `processes`
/// and at most [`RESERVED_PROCESSES`] more.
pub(super) fn bound_processes(processes: u32) -> io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < BOUND_SINCE {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let highest = processes.saturating_add(RESERVED_PROCESSES + 1);
    fs::write("/proc/sys/kernel/pid_max", highest.to_string())
}

/// Leaves this process without any capability.
pub(super) fn give_up_privilege() -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

fn keep_identity(user: u32, group: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

/// A user that is not root loses its capabilities on exec, unless they are ambient.
fn lend_mount_privilege() -> io::Result<()> {
    let mut held = rustix::thread::capabilities(None)?;
    held.inheritable |= CapabilitySet::SYS_ADMIN;
    rustix::thread::set_capabilities(None, held)?;
    rustix::thread::configure_capability_in_ambient_set(CapabilitySet::SYS_ADMIN, true)?;
    Ok(())
}

fn start_init(
    processes: Option<u32>,
    tmp: Option<&'static Path>,
    granted: &mut Granted,
) -> io::Result<Namespace> {
    let (signs, theirs) = UnixStream::pair()?;
    let child = own_command("init", theirs)
        .args(processes.map(|processes| processes.to_string()))
        .env_clear()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| context("start of process 1", error))?;
    let init = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("process 1 has no id"))?;
    let [readable] = wait_readable([Some(&signs)], Some(INIT_START_LIMIT))?;
    let mut sign = [0];
    let is_there = readable && io::Read::read(&mut &signs, &mut sign)? > 0;
    match sign {
        [SIGN_READY_BOUNDED] if is_there => granted.note(Protection::ProcessLimit, Ok(())),
        [SIGN_READY] if is_there => {}
        _ => return Err(io::Error::other("/proc cannot be mounted here")),
    }
    signs.set_nonblocking(true)?;
    Ok(Namespace { init, signs, tmp })
}

fn context(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
