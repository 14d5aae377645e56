//! The process that watches over one script on the server's behalf.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::{signal::Signal as NixSignal, signalfd::SignalFd};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::{
    close_inherited_descriptors,
    launch::{GO, READY},
    namespace::{self, Namespace},
    own_command, private_tmp,
    process_tree::ProcessTree,
    signal_descriptor, take_control, wait_readable,
};
use crate::native_script::{
    confinement::{Granted, Restrictions},
    messages::{Containment, LaunchWord, Order, ProcessEnd, Report},
};

/// Longest line that is taken from the server or from the launching process.
const MAX_MESSAGE_BYTES: usize = 4096;

/// After this the server is told that processes are stuck in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// For this long the keeper stays to kill what is stuck as soon as the kernel lets go of it.
const STUCK_LIMIT: Duration = Duration::from_secs(60);

/// Pause between two rounds of killing, while the kernel takes the processes apart.
const KILL_ROUND: Duration = Duration::from_millis(5);

/// Guards the script that `arguments` name: server's pid, containment, grace in
/// milliseconds, restrictions, program, its arguments.
///
/// 1. Leave the server's session and descriptors, and ask to be told when it dies.
/// 2. Set up the containment; where that fails, nothing has been started.
/// 3. Start the script, and from then on only watch.
/// 4. End the tree: at the script's failure, an order's deadline, or the server's end.
pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    close_inherited_descriptors();
    let server = take_control()?;
    server.set_nonblocking(true)?;
    let server_pid: i32 = parse(arguments.next(), "the server's process id")?;
    let containment = arguments
        .next()
        .and_then(|name| Containment::parse(name.to_str()?))
        .ok_or_else(|| io::Error::other("no such containment"))?;
    let grace = Duration::from_millis(parse(arguments.next(), "the grace period")?);
    let mut restrictions: Restrictions = arguments
        .next()
        .and_then(|text| serde_json::from_str(text.to_str()?).ok())
        .ok_or_else(|| io::Error::other("the restrictions cannot be read"))?;

    // EPERM: the server made us a group leader already, and a session of our own is a comfort only.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let signals = signal_descriptor(&[
        NixSignal::SIGCHLD,
        NixSignal::SIGHUP,
        NixSignal::SIGINT,
        NixSignal::SIGQUIT,
        NixSignal::SIGTERM,
        NixSignal::SIGUSR1,
        NixSignal::SIGUSR2,
    ])?;
    // The signal also comes when only the thread that started us ends, hence not SIGKILL.
    rustix::process::set_parent_process_death_signal(Some(Signal::HUP))?;

    let mut granted = Granted::default();
    let confinement = restrictions.confinement.as_mut();
    let contained = ProcessTree::open().and_then(|tree| {
        let namespace = match containment {
            Containment::Subreaper => None,
            kind => Some(namespace::enter(kind, confinement, &mut granted)?),
        };
        Ok((tree, namespace))
    });
    let (tree, namespace) = match contained {
        Ok(contained) => contained,
        Err(error) => {
            let reason = error.to_string();
            return send(&server, &Report::Unavailable { reason });
        }
    };
    // Removed when the last process is gone.
    let stand_in = match &mut restrictions.confinement {
        Some(confinement) => private_tmp::stand_in(confinement, &mut granted),
        None => None,
    };
    let tmp = match (&stand_in, &namespace) {
        (Some(directory), _) => Some(directory.path()),
        (None, Some(namespace)) => namespace.tmp,
        (None, None) => None,
    };
    let started = start_script(&restrictions, &granted, tmp, arguments);
    let (launch, script) = match started {
        Ok(started) => started,
        Err(error) => {
            let reason = format!("the keeper cannot start a process: {error}");
            return send(&server, &Report::Failed { reason });
        }
    };
    Guard {
        server,
        server_pid,
        orders: Vec::new(),
        signals,
        tree,
        namespace,
        launch: Some(launch),
        launch_text: Vec::new(),
        script,
        end: None,
        grace,
        deadline: None,
    }
    .run()
}

struct Guard {
    server: UnixStream,
    server_pid: i32,
    /// What came from the server and is no whole line yet.
    orders: Vec<u8>,
    signals: SignalFd,
    tree: ProcessTree,
    namespace: Option<Namespace>,
    /// Open until the launching process has become the script.
    launch: Option<UnixStream>,
    launch_text: Vec<u8>,
    script: Pid,
    /// How the script's own process ended; what it started may still run.
    end: Option<ProcessEnd>,
    /// What a SIGTERM to the keeper itself grants the script.
    grace: Duration,
    /// Set once the script is being stopped.
    deadline: Option<Instant>,
}

/// What the events of one round ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Watch,
    EndTree,
}

impl Guard {
    fn run(mut self) -> io::Result<()> {
        // A guard that cannot watch any more must still leave nothing behind.
        let watched = self.watch();
        self.end_tree();
        watched
    }

    fn watch(&mut self) -> io::Result<()> {
        loop {
            let timeout = self
                .deadline
                .map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let [server, signal, launch, init] = wait_readable(
                [
                    Some(&self.server),
                    Some(&self.signals),
                    self.launch.as_ref().map(|launch| launch as &dyn AsFd),
                    self.namespace
                        .as_ref()
                        .map(|namespace| &namespace.signs as &dyn AsFd),
                ],
                timeout,
            )?;
            let is_over = (launch && self.read_launch()? == Next::EndTree)
                || (signal && self.read_signals()? == Next::EndTree)
                || (init && self.read_signs() == Next::EndTree)
                || (server && self.read_orders()? == Next::EndTree)
                || self.reap()? == Next::EndTree
                // Orphans end without a word to us; a sign of any kind is a reason to count.
                || (self.end.is_some() && (signal || init) && self.members()? == 0)
                || self.deadline.is_some_and(|deadline| deadline <= Instant::now());
            if is_over {
                return Ok(());
            }
        }
    }

    /// Follows the launching process until it has become the script.
    fn read_launch(&mut self) -> io::Result<Next> {
        let Some(launch) = &mut self.launch else {
            return Ok(Next::Watch);
        };
        loop {
            let mut bytes = [0; 512];
            let count = match launch.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Next::Watch),
                Err(_) => break, // It died; how, the reaping tells.
            };
            let is_first = self.launch_text.is_empty();
            let room = MAX_MESSAGE_BYTES.saturating_sub(self.launch_text.len());
            self.launch_text
                .extend_from_slice(bytes.get(..count.min(room)).unwrap_or_default());
            if is_first {
                launch.write_all(&[GO])?;
            }
        }
        self.launch = None;
        let report = self.launch_report();
        self.tell(&report);
        match report {
            Report::Started { .. } => Ok(Next::Watch),
            _ => Ok(Next::EndTree),
        }
    }

    /// What the launching process's words mean, all of which have arrived.
    fn launch_report(&self) -> Report {
        let early = || Report::Failed {
            reason: "the launching process ended early".to_owned(),
        };
        let Some((&READY, words)) = self.launch_text.split_first() else {
            return early();
        };
        let last = words
            .split(|&byte| byte == b'\n')
            .rfind(|word| !word.is_empty());
        match last.map(serde_json::from_slice) {
            Some(Ok(LaunchWord::Granted(granted))) => Report::Started {
                pid: self.script.as_raw_pid(),
                granted,
            },
            Some(Ok(LaunchWord::Refused { reason })) => Report::Refused { reason },
            Some(Ok(LaunchWord::Failed { reason })) => Report::Failed { reason },
            _ => early(),
        }
    }

    fn read_signals(&mut self) -> io::Result<Next> {
        while let Some(info) = self.signals.read_signal()? {
            match i32::try_from(info.ssi_signo).map(NixSignal::try_from) {
                Ok(Ok(NixSignal::SIGTERM | NixSignal::SIGINT | NixSignal::SIGQUIT)) => {
                    self.stop(self.grace)?;
                }
                Ok(Ok(NixSignal::SIGHUP)) => {
                    let parent = Pid::as_raw(rustix::process::getppid());
                    if parent != self.server_pid {
                        return Ok(Next::EndTree);
                    }
                }
                _ => {}
            }
        }
        Ok(Next::Watch)
    }

    /// Process 1 of the namespace only ends when someone outside kills it.
    fn read_signs(&self) -> Next {
        let Some(namespace) = &self.namespace else {
            return Next::Watch;
        };
        let mut bytes = [0; 512];
        match (&namespace.signs).read(&mut bytes) {
            Ok(0) => Next::EndTree,
            Ok(_) => Next::Watch,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Watch,
            Err(_) => Next::EndTree,
        }
    }

    fn read_orders(&mut self) -> io::Result<Next> {
        let mut bytes = [0; 512];
        match self.server.read(&mut bytes) {
            Ok(0) => return Ok(Next::EndTree),
            Ok(count) => self
                .orders
                .extend_from_slice(bytes.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Next::Watch),
            Err(_) => return Ok(Next::EndTree),
        }
        while let Some(end) = self.orders.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.orders.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Order::Stop { grace }) => self.stop(grace)?,
                // A server that speaks nonsense is as good as gone.
                Err(_) => return Ok(Next::EndTree),
            }
        }
        if self.orders.len() > MAX_MESSAGE_BYTES {
            return Ok(Next::EndTree);
        }
        Ok(Next::Watch)
    }

    /// Asks the script to end, and sets or shortens the time it has for that.
    fn stop(&mut self, grace: Duration) -> io::Result<()> {
        let deadline = Instant::now().checked_add(grace);
        let deadline = deadline.unwrap_or_else(Instant::now);
        let is_first = self.deadline.is_none();
        self.deadline = Some(self.deadline.map_or(deadline, |set| set.min(deadline)));
        if !is_first {
            return Ok(());
        }
        if self.end.is_some() {
            return self.terminate_members();
        }
        // Not reaped, so the number is still the script's. It has no group of its own
        // for an instant after its start; then the deadline does the work.
        let _ = rustix::process::kill_process_group(self.script, Signal::TERM);
        Ok(())
    }

    /// Notes the script's end, and reaps the orphans that fell to the keeper.
    fn reap(&mut self) -> io::Result<Next> {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.script => {
                    if self.script_ended(status)? == Next::EndTree {
                        return Ok(Next::EndTree);
                    }
                }
                Ok(Some((pid, _))) if self.init() == Some(pid) => {
                    self.namespace = None;
                    return Ok(Next::EndTree);
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return Ok(Next::Watch),
            }
        }
    }

    fn script_ended(&mut self, status: WaitStatus) -> io::Result<Next> {
        if self.launch.is_some() {
            // The end of the socket comes with the process's; it says whether it was a script yet.
            if self.read_launch()? == Next::EndTree {
                return Ok(Next::EndTree);
            }
        }
        let Some(end) = self.note_end(status) else {
            return Ok(Next::Watch);
        };
        let processes = self.members()?;
        if processes == 0 {
            return Ok(Next::EndTree);
        }
        if self.deadline.is_some() {
            self.terminate_members()?;
            return Ok(Next::Watch);
        }
        if end != ProcessEnd::Exited(0) {
            return Ok(Next::EndTree);
        }
        self.tell(&Report::Detached { processes });
        Ok(Next::Watch)
    }

    fn note_end(&mut self, status: WaitStatus) -> Option<ProcessEnd> {
        let end = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ProcessEnd::Exited(code),
            (None, signal) => ProcessEnd::Signaled(signal?),
        };
        self.end = Some(end);
        // Before it was the script, only why it did not become it matters.
        if self.launch.is_none() {
            self.tell(&Report::Ended { end });
        }
        Some(end)
    }

    /// How many processes the script has left.
    fn members(&self) -> io::Result<usize> {
        Ok(self.tree.descendants(self.init())?.len())
    }

    fn init(&self) -> Option<Pid> {
        self.namespace.as_ref().map(|namespace| namespace.init)
    }

    /// SIGTERM to each process that is left, when the script's own is gone.
    fn terminate_members(&self) -> io::Result<()> {
        for process in self.tree.descendants(self.init())? {
            let _ = rustix::process::kill_process(process.pid, Signal::TERM);
        }
        Ok(())
    }

    /// Kills whatever is left, and stays until it is gone.
    fn end_tree(&mut self) {
        let started = Instant::now();
        let killed = self.members().unwrap_or(0);
        let mut has_told_stuck = false;
        loop {
            match self.init() {
                // The kernel kills the whole namespace with its process 1.
                Some(init) => {
                    let _ = rustix::process::kill_process(init, Signal::KILL);
                }
                // What cannot be listed now may be in the next round.
                None => {
                    let _ = self.tree.kill_descendants();
                }
            }
            if self.reap_rest() {
                return self.tell(&Report::Gone { killed });
            }
            let elapsed = started.elapsed();
            if elapsed > KILL_LIMIT && !has_told_stuck {
                has_told_stuck = true;
                let processes = self.members().unwrap_or(0);
                self.tell(&Report::Stuck { processes });
            }
            if elapsed > STUCK_LIMIT {
                return;
            }
            let _ = wait_readable([Some(&self.signals)], Some(KILL_ROUND));
            while matches!(self.signals.read_signal(), Ok(Some(_))) {}
        }
    }

    /// Whether no child is left after reaping those that ended.
    fn reap_rest(&mut self) -> bool {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    // Once reaped, its number may become another process's.
                    if self.init() == Some(pid) {
                        self.namespace = None;
                    }
                    if pid == self.script && self.end.is_none() {
                        self.note_end(status);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    /// Tells the server, which may be gone already.
    fn tell(&self, report: &Report) {
        let _ = send(&self.server, report);
    }
}

fn start_script(
    restrictions: &Restrictions,
    granted: &Granted,
    tmp: Option<&Path>,
    command: impl Iterator<Item = OsString>,
) -> io::Result<(UnixStream, Pid)> {
    let (launch, theirs) = UnixStream::pair()?;
    let mut own = own_command("launch", theirs);
    if let Some(tmp) = tmp {
        own.env("TMPDIR", tmp);
        // Libraries that cache below HOME, which is not theirs to write, would fail instead.
        if std::env::var_os("XDG_CACHE_HOME").is_none() {
            own.env("XDG_CACHE_HOME", tmp);
        }
    }
    let child = own
        .arg(serde_json::to_string(restrictions)?)
        .arg(serde_json::to_string(granted)?)
        .args(command)
        .spawn()?;
    launch.set_nonblocking(true)?;
    let script = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the new process has no id"))?;
    Ok((launch, script))
}

fn send(mut server: &UnixStream, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    server.write_all(&line)
}

fn parse<T: std::str::FromStr>(argument: Option<OsString>, what: &str) -> io::Result<T> {
    argument
        .and_then(|text| text.to_str()?.parse().ok())
        .ok_or_else(|| io::Error::other(format!("{what} is missing or no number")))
}
