//! What the server and a script's keeper say to each other: one JSON object per line
//! over a socket pair. The end of the stream says that the other side is gone.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::confinement::Granted;

/// How the processes of one script are held together, so that none outlives the plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Containment {
    /// A PID namespace made with the server's own privilege (`CAP_SYS_ADMIN`). The kernel
    /// kills every process in it as one when the keeper ends, however they detached
    /// themselves. The script sees only its own processes in `/proc` and cannot signal others.
    PidNamespace,
    /// The same inside a user namespace, for servers that run without privilege. The
    /// script keeps its user id; other users' files show as owned by `nobody`.
    UserPidNamespace,
    /// The keeper adopts every orphan (`PR_SET_CHILD_SUBREAPER`) and kills what descends
    /// from it. Holds against `setsid`, double forks and ignored signals. A hostile script
    /// with the server's user id can stop or kill the keeper itself: then the script and its
    /// process group still die, but not what it moved into another session before.
    Subreaper,
}

impl Containment {
    /// The name in logs, reports and the keeper's arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::PidNamespace => "pid-namespace",
            Self::UserPidNamespace => "user-pid-namespace",
            Self::Subreaper => "subreaper",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::PidNamespace, Self::UserPidNamespace, Self::Subreaper]
            .into_iter()
            .find(|containment| containment.name() == name)
    }
}

/// Limits that the kernel applies to each process of a script (`setrlimit`); `None` leaves
/// what the server itself runs under. Core dumps are always off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// Descriptors open at once in one process (`RLIMIT_NOFILE`). Default 1024.
    pub open_files: Option<u64>,
    /// Bytes of address space of one process (`RLIMIT_AS`). Default none.
    pub address_space_bytes: Option<u64>,
    /// Seconds of CPU time of one process (`RLIMIT_CPU`), after which the kernel kills it. Default none.
    pub cpu_seconds: Option<u64>,
    /// Bytes of the largest file that a process may write (`RLIMIT_FSIZE`). Default none.
    pub file_size_bytes: Option<u64>,
}

impl Default for ProcessLimits {
    fn default() -> Self {
        Self {
            // What `select` can handle; the server's own limit is far higher for its clients.
            open_files: Some(1024),
            address_space_bytes: None,
            cpu_seconds: None,
            file_size_bytes: None,
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessEnd {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
}

/// From the server to the keeper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Order {
    /// SIGTERM now, SIGKILL to all that is left after `grace`.
    Stop { grace: Duration },
}

/// From the keeper to the server, in the order of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Report {
    /// The containment asked for does not work on this machine; nothing was started.
    Unavailable { reason: String },
    /// The script could not be started.
    Failed { reason: String },
    /// The machine does not give what the script's manifest requires; nothing was started.
    Refused { reason: String },
    /// The script runs, as `pid` in the server's own numbering, held to what is `granted`.
    Started { pid: i32, granted: Granted },
    /// The script's own process ended.
    Ended { end: ProcessEnd },
    /// The script ended with code 0 and left `processes` running, as daemons do.
    Detached { processes: usize },
    /// No process of the script is left; `killed` of them had to be killed.
    Gone { killed: usize },
    /// `processes` did not die of SIGKILL in time (stuck in the kernel).
    Stuck { processes: usize },
}

/// From the process that becomes the script to its keeper, one JSON object per line. The end
/// of the stream after `Granted` alone says that it has become the script.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LaunchWord {
    /// What holds from here on.
    Granted(Granted),
    /// The manifest requires what this machine does not give.
    Refused { reason: String },
    /// The script could not be started.
    Failed { reason: String },
}
