//! Process 1 of a script's PID namespace.

use std::{
    ffi::OsString,
    io::{self, Write},
};

use nix::sys::signal::Signal as NixSignal;
use rustix::process::{Signal, WaitOptions};

use super::{
    namespace::{self, SIGN_CHILDLESS, SIGN_READY, SIGN_READY_BOUNDED},
    signal_descriptor, take_control, wait_readable,
};

/// Reaps orphans until the guard ends. Signals from inside the namespace, SIGKILL included,
/// do not reach process 1; when it ends, the kernel kills all the others. The first of
/// `arguments` bounds the number of processes, where the kernel can do that.
pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let mut guard = take_control()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let signals = signal_descriptor(&[NixSignal::SIGCHLD])?;
    namespace::mount_proc()?;
    let processes: Option<u32> = arguments
        .next()
        .and_then(|text| text.to_str()?.parse().ok());
    let is_bounded =
        processes.is_some_and(|processes| namespace::bound_processes(processes).is_ok());
    namespace::give_up_privilege()?;
    // From inside the namespace this process shows up in /proc: nothing in it is worth a look.
    std::env::set_current_dir("/")?;
    guard.write_all(&[match is_bounded {
        true => SIGN_READY_BOUNDED,
        false => SIGN_READY,
    }])?;
    guard.set_nonblocking(true)?;
    loop {
        let [guard_ended, child_ended] = wait_readable([Some(&guard), Some(&signals)], None)?;
        if guard_ended {
            return Ok(()); // The guard never writes: this is its end.
        }
        if child_ended {
            while signals.read_signal()?.is_some() {}
            if reap_all() {
                // A full socket holds signs already that the guard has not read.
                let _ = guard.write(&[SIGN_CHILDLESS]);
            }
        }
    }
}

/// Whether no child is left after reaping those that ended.
fn reap_all() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}
