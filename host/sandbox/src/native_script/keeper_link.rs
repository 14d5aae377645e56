//! The server's end of a keeper: starting it, and what it says.

use std::{
    collections::BTreeMap, ffi::OsString, io, os::fd::OwnedFd, path::Path, process::Stdio,
    time::Duration,
};

use rustix::{
    io::Errno,
    pipe::PipeFlags,
    process::{Pid, Signal},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    process::{Child, Command},
    time::Instant,
};

use super::{
    NativeConfig,
    confinement::Restrictions,
    interpreter::CommandLine,
    keeper::{KEEPER_ARGUMENT, PROCESS_NAME},
    messages::{Containment, Order, Report},
};

/// No report is longer; a keeper that says more is not ours.
const MAX_REPORT_BYTES: usize = 16 * 1024;

/// How long a keeper may take from its start to its first word, on a machine under load.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Between two looks at whether a process group is gone.
const GROUP_POLL: Duration = Duration::from_millis(5);

/// A keeper that runs. Dropping it closes the socket, on which the keeper kills the script
/// and everything it started.
pub(super) struct KeeperLink {
    child: Child,
    socket: UnixStream,
    /// What was read and is no whole report yet.
    received: Vec<u8>,
    /// The script's process, which is also its process group; known once it runs.
    script: Option<Pid>,
    /// The script's own process has ended, so its number may pass to another one.
    has_ended: bool,
}

impl KeeperLink {
    /// Starts a keeper for `command`, whose stdout and stderr come out of the pipe in the
    /// order in which they were written.
    pub(super) fn start(
        config: &NativeConfig,
        containment: Containment,
        restrictions: &Restrictions,
        command: &CommandLine,
        variables: &BTreeMap<OsString, OsString>,
    ) -> io::Result<(Self, pipe::Receiver)> {
        let (socket, theirs) = std::os::unix::net::UnixStream::pair()?;
        let (output, their_output) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let restrictions = serde_json::to_string(restrictions)?;
        let mut keeper = Command::new(&config.keeper_program);
        keeper
            .arg0(PROCESS_NAME)
            .args([KEEPER_ARGUMENT, "guard"])
            .arg(std::process::id().to_string())
            .arg(containment.name())
            .arg(config.grace.as_millis().to_string())
            .arg(restrictions)
            .arg(&command.program)
            .args(&command.arguments)
            .env_clear()
            .envs(variables)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(their_output.try_clone()?))
            .stderr(Stdio::from(their_output));
        if let Some(directory) = &config.working_directory {
            keeper.current_dir(directory);
        }
        let child = keeper.spawn()?;
        socket.set_nonblocking(true)?;
        let link = Self {
            child,
            socket: UnixStream::from_std(socket)?,
            received: Vec::new(),
            script: None,
            has_ended: false,
        };
        Ok((link, pipe::Receiver::from_owned_fd(output)?))
    }

    /// The first report, which says whether the script runs; `None` when the keeper ended
    /// or did not answer.
    pub(super) async fn first_report(&mut self) -> Option<Report> {
        tokio::time::timeout(START_LIMIT, self.report())
            .await
            .ok()?
    }

    /// The next report; `None` when the keeper has ended. Can be cancelled and called again.
    pub(super) async fn report(&mut self) -> Option<Report> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let report = serde_json::from_slice(&line).ok()?;
                match &report {
                    Report::Started { pid, .. } => self.script = Pid::from_raw(*pid),
                    Report::Ended { .. } => self.has_ended = true,
                    _ => {}
                }
                return Some(report);
            }
            if self.received.len() > MAX_REPORT_BYTES {
                return None;
            }
            match self.socket.read_buf(&mut self.received).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Tells the keeper to stop the script. A keeper that cannot be told has ended, which
    /// [`Self::report`] shows.
    pub(super) async fn stop(&mut self, grace: Duration) {
        let Ok(mut line) = serde_json::to_vec(&Order::Stop { grace }) else {
            return;
        };
        line.push(b'\n');
        let _ = self.socket.write_all(&line).await;
    }

    /// Waits for the end of a keeper that has said its last word.
    pub(super) async fn finish(mut self, limit: Duration) {
        // Past the limit the runtime reaps it whenever it ends.
        let _ = tokio::time::timeout(limit, self.child.wait()).await;
    }

    /// Ends a keeper that is dead or does not answer, and the script with it: the kernel
    /// kills the script (or its namespace) when the keeper dies, and we its process group.
    /// Says whether the group was gone within `limit`.
    pub(super) async fn abandon(mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let _ = self.child.start_kill();
        let _ = tokio::time::timeout(limit, self.child.wait()).await;
        let Some(group) = self.script else {
            return true;
        };
        // A number whose process was reaped stays the group's while the group lives. If a
        // process has it again, the group is gone, and the number is someone else's.
        let leader = format!("/proc/{}", group.as_raw_pid());
        if self.has_ended && Path::new(&leader).exists() {
            return true;
        }
        let mut is_gone = rustix::process::kill_process_group(group, Signal::KILL);
        while is_gone != Err(Errno::SRCH) && Instant::now() < deadline {
            tokio::time::sleep(GROUP_POLL).await;
            is_gone = rustix::process::test_kill_process_group(group);
        }
        is_gone == Err(Errno::SRCH)
    }
}
