//! The last step before a script: the process that becomes it.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use nix::sys::signal::SigSet;
use rustix::{
    fs::Mode,
    process::{Resource, Rlimit, Signal},
};

use super::take_control;
use crate::native_script::messages::ProcessLimits;

/// What the process says before it waits for [`GO`].
pub(super) const READY: u8 = b'r';
/// What the guard answers, which proves that it lived after the death signal was set.
pub(super) const GO: u8 = b'g';

/// Prepares this process and executes the program of `arguments`; what goes wrong is
/// written to the guard, while success closes the socket without a word.
pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let mut guard = take_control()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    guard.write_all(&[READY])?;
    let mut answer = [0];
    guard.read_exact(&mut answer)?;

    let error = become_script(&mut arguments);
    let _ = write!(guard, "{error}");
    Err(error)
}

fn become_script(arguments: &mut impl Iterator<Item = OsString>) -> io::Error {
    let limits = arguments.next().and_then(|text| text.into_string().ok());
    let Some(limits) = limits.and_then(|text| serde_json::from_str(&text).ok()) else {
        return io::Error::other("the limits cannot be read");
    };
    let Some(program) = arguments.next() else {
        return io::Error::other("there is no program to run");
    };
    if let Err(error) = prepare(&limits) {
        return error;
    }
    let error = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .exec();
    io::Error::new(
        error.kind(),
        format!("{} cannot be executed: {error}", program.display()),
    )
}

fn prepare(limits: &ProcessLimits) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    limit(Resource::Core, Some(0))?;
    limit(Resource::Nofile, limits.open_files)?;
    limit(Resource::As, limits.address_space_bytes)?;
    limit(Resource::Cpu, limits.cpu_seconds)?;
    limit(Resource::Fsize, limits.file_size_bytes)?;
    limit(Resource::Nproc, limits.user_processes)?;
    rustix::thread::set_no_new_privs(true)?;
    // The guard reads its signals from a descriptor; the script must not inherit that.
    SigSet::empty().thread_set_mask()?;
    Ok(())
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
