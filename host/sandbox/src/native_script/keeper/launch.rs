//! The last step before a script: the process that becomes it.

use std::{
    convert::Infallible,
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    process::{Command, Stdio},
};

use nix::{
    sys::signal::SigSet,
    unistd::{Gid, Uid},
};
use rustix::{
    fs::Mode,
    process::{Resource, Rlimit, Signal},
    thread::CapabilitySet,
};

use super::{call_filter, file_rules, namespace, take_control};
use crate::native_script::{
    confinement::{Confinement, Granted, Identity, Protection, Restrictions},
    messages::LaunchWord,
};

/// What the process says before it waits for [`GO`].
pub(super) const READY: u8 = b'r';
/// What the guard answers, which proves that it lived after the death signal was set.
pub(super) const GO: u8 = b'g';

/// Prepares this process and executes the program of `arguments`: restrictions, what holds
/// of them already, program, its arguments. The guard is told in [`LaunchWord`]s.
pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let mut guard = take_control()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    guard.write_all(&[READY])?;
    let mut answer = [0];
    guard.read_exact(&mut answer)?;

    let error = match become_script(&mut guard, &mut arguments) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let reason = error.to_string();
    let word = match error.kind() {
        io::ErrorKind::Unsupported => LaunchWord::Refused { reason },
        _ => LaunchWord::Failed { reason },
    };
    let _ = say(&mut guard, &word);
    Err(error)
}

/// Does not return but with the reason; [`io::ErrorKind::Unsupported`] when the machine
/// does not give what is required.
fn become_script(
    guard: &mut UnixStream,
    arguments: &mut impl Iterator<Item = OsString>,
) -> io::Result<Infallible> {
    let restrictions: Restrictions = from_json(arguments.next(), "the restrictions")?;
    let mut granted: Granted = from_json(arguments.next(), "what holds already")?;
    let Some(program) = arguments.next() else {
        return Err(io::Error::other("there is no program to run"));
    };
    prepare(&restrictions, &mut granted)?;
    if let Some(lacking) = granted.lacks(&restrictions.required) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, lacking));
    }
    say(guard, &LaunchWord::Granted(granted))?;
    let error = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .exec();
    Err(io::Error::other(format!(
        "{} cannot be executed: {error}",
        program.display()
    )))
}

fn from_json<T: serde::de::DeserializeOwned>(text: Option<OsString>, what: &str) -> io::Result<T> {
    text.and_then(|text| serde_json::from_str(text.to_str()?).ok())
        .ok_or_else(|| io::Error::other(format!("{what} cannot be read")))
}

fn say(guard: &mut UnixStream, word: &LaunchWord) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    guard.write_all(&line)
}

fn prepare(restrictions: &Restrictions, granted: &mut Granted) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let limits = &restrictions.limits;
    limit(Resource::Core, Some(0))?;
    limit(Resource::Nofile, limits.open_files)?;
    limit(Resource::As, limits.address_space_bytes)?;
    limit(Resource::Cpu, limits.cpu_seconds)?;
    limit(Resource::Fsize, limits.file_size_bytes)?;
    if let Some(confinement) = &restrictions.confinement {
        limit_processes(confinement, granted)?;
        if let Some(user) = confinement.user {
            become_user(user).map_err(|error| context("change of user", error))?;
        }
        drop_capabilities().map_err(|error| context("capabilities", error))?;
        granted.note(Protection::NoCapabilities, Ok(()));
        // Both changes make the kernel forget it.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    rustix::thread::set_no_new_privs(true)?;
    if let Some(confinement) = &restrictions.confinement {
        if granted.protections.contains(&Protection::PidNamespace) {
            granted.note(Protection::SignalScope, Ok(()));
        }
        if !granted.protections.contains(&Protection::PidNamespace) {
            let reason = "no namespace could be made".to_owned();
            granted.note(Protection::ReadOnlySystem, Err(reason));
        }
        file_rules::apply(confinement, granted);
        let filter = call_filter::apply(confinement).map_err(|error| error.to_string());
        if !confinement.network {
            granted.note(Protection::NoNetwork, filter.clone());
        }
        granted.note(Protection::Seccomp, filter);
    }
    // The guard reads its signals from a descriptor; the script must not inherit that.
    SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Bounds the script's processes by its user's, where that counts nobody else's: in a user
/// namespace of its own, or as a user of its own. Never holds for root.
fn limit_processes(confinement: &Confinement, granted: &mut Granted) -> io::Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    let has_namespace = granted.protections.contains(&Protection::PidNamespace);
    let is_counted_alone = match confinement.user {
        Some(user) => user.uid != 0,
        None => !is_root && has_namespace,
    };
    let outcome = if is_counted_alone {
        limit(Resource::Nproc, Some(confinement.processes.into()))?;
        Ok(())
    } else {
        Err(match is_root {
            true => "root's processes are only counted in a namespace, since Linux 6.14; set process.user",
            false => "the server's user has other processes, and no namespace could be made",
        }
        .to_owned())
    };
    granted.note(Protection::ProcessLimit, outcome);
    Ok(())
}

fn become_user(user: Identity) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    nix::unistd::setgroups(&[])?;
    nix::unistd::setgid(gid)?;
    nix::unistd::setuid(uid)?;
    Ok(())
}

/// Leaves nothing that an execution as root could give back.
fn drop_capabilities() -> io::Result<()> {
    let held = rustix::thread::capabilities(None)?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all() {
            // Those that this kernel does not know are not there to be removed.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    namespace::give_up_privilege()
}

fn context(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Sets both the soft and the hard limit, never above the hard limit there is.
fn limit(resource: Resource, wanted: Option<u64>) -> io::Result<()> {
    let Some(wanted) = wanted else {
        return Ok(());
    };
    let held = rustix::process::getrlimit(resource).maximum;
    let granted = Some(held.map_or(wanted, |held| held.min(wanted)));
    rustix::process::setrlimit(
        resource,
        Rlimit {
            current: granted,
            maximum: granted,
        },
    )?;
    Ok(())
}
