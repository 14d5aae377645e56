//! The keeper: a small process between the server and one script, so that nothing the
//! script starts outlives the plugin, whatever happens to the server.
//!
//! It is the server's own binary, executed again with [`KEEPER_ARGUMENT`], in one of three
//! roles, each a process with one thread and without a runtime:
//!
//! - `guard` is what the server starts. It watches the server and the script, and ends the tree;
//! - `init` is process 1 of the script's PID namespace, where there is one: it reaps orphans,
//!   and the kernel kills the namespace with it;
//! - `launch` confines the process (session, limits, files, calls) and becomes the script.

mod guard;
mod init;
mod launch;

mod call_filter;
mod file_rules;
mod namespace;
mod private_tmp;
mod process_tree;
mod read_only;

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Command, ExitCode, Stdio},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// The first argument that makes the server's binary a keeper instead of a server.
pub const KEEPER_ARGUMENT: &str = "__keeper";

/// This process's own binary, also when the file was replaced or deleted since the start.
pub(super) const OWN_BINARY: &str = "/proc/self/exe";

/// What `ps` shows for a keeper. Not the server's name, so that `pkill -9 stockade` does not
/// take with the server those that clean up after it.
pub(super) const PROCESS_NAME: &str = "plugin-keeper";

/// The exit code when a keeper could not do its work; the reason went to the server.
const EXIT_FAILED: u8 = 70;

/// Runs this process as a keeper until its script and all that the script started are gone.
///
/// A binary that embeds this crate calls it first of all in `main`, before it starts a
/// thread, when its first argument is [`KEEPER_ARGUMENT`]; `arguments` are those after it.
/// Only [`super::NativeScript`] starts keepers: the arguments are not an interface for people.
pub fn keeper_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let role = arguments.next().unwrap_or_default();
    // Started from `/proc/self/exe`, it would be called `exe`; a name is a comfort only.
    if let Ok(name) = std::ffi::CString::new(PROCESS_NAME) {
        let _ = rustix::thread::set_name(&name);
    }
    let done = match role.to_str() {
        Some("guard") => guard::run(arguments),
        Some("init") => init::run(arguments),
        Some("launch") => launch::run(arguments),
        _ => Err(io::Error::other(
            "a keeper is started by the server, not by hand",
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

/// Takes the socket that the starting process put on descriptor 0, and leaves `/dev/null` there.
fn take_control() -> io::Result<UnixStream> {
    let control = rustix::stdio::stdin().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(null_device()?)?;
    Ok(UnixStream::from(control))
}

/// Closes every descriptor but 0, 1 and 2. The server's own are closed on exec, but it may
/// itself have been started with some that are not.
fn close_inherited_descriptors() {
    let numbers: Vec<i32> = match std::fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect(),
        // Without /proc: what a process can have open, up to a bound that takes milliseconds.
        Err(_) => (3..65_536).collect(),
    };
    for number in numbers.into_iter().filter(|&number| number > 2) {
        // The listing's own descriptor is among them and closed already: EBADF is fine.
        let _ = nix::unistd::close(number);
    }
}

fn null_device() -> io::Result<OwnedFd> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    Ok(null.into())
}

/// Makes `signals` readable from a descriptor instead of interrupting this process.
fn signal_descriptor(signals: &[Signal]) -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for &signal in signals {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

/// Our own binary in another role, with `control` on its descriptor 0.
fn own_command(role: &str, control: UnixStream) -> Command {
    let mut command = Command::new(OWN_BINARY);
    command
        .arg0(PROCESS_NAME)
        .args([KEEPER_ARGUMENT, role])
        .stdin(Stdio::from(OwnedFd::from(control)));
    command
}

/// Waits until one of `descriptors` can be read or has ended, at most for `timeout`.
/// Says for each whether it is worth reading.
fn wait_readable<const N: usize>(
    descriptors: [Option<&dyn AsFd>; N],
    timeout: Option<std::time::Duration>,
) -> io::Result<[bool; N]> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    let mut polled: Vec<PollFd<'_>> = descriptors
        .iter()
        .flatten()
        .map(|descriptor| PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN))
        .collect();
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok([false; N]),
        Err(error) => return Err(error.into()),
    }
    let mut events = polled.iter().map(|polled| !polled.revents().is_empty());
    Ok(descriptors.map(|descriptor| descriptor.is_some() && events.next().unwrap_or(false)))
}
