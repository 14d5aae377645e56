//! What one run is given and held to.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::GuestOutput;
pub use crate::grants::Access;
use crate::outbound::OutboundLimits;

/// A directory as a guest gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// The path that the guest sees.
    pub guest: String,
    /// Where it is.
    pub host: PathBuf,
    /// What may be done in it.
    pub access: Access,
}

/// A limiter that is switched off, so that `prove` can be seen to find that. Only a build with
/// debug assertions can name one; in others there is no way to make a value of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lift(&'static str);

impl Lift {
    /// Kills are not heard.
    pub(crate) const KILL: Self = Self("kill_ms");
    /// Components get sockets.
    pub(crate) const NETWORK: Self = Self("network");
    /// Symbolic links can be made.
    pub(crate) const LINKS: Self = Self("symbolic links");

    /// What `prove` calls it.
    pub(crate) const fn name(self) -> &'static str {
        self.0
    }
}

/// What one run may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WasmLimits {
    /// Linear memory, in bytes, over all memories. The C library that zig brings starts at
    /// 16.4 MiB, so anything below 17 MiB refuses its programs.
    pub memory_bytes: u64,
    /// Elements over all tables, of 8 bytes each.
    pub table_elements: u64,
    /// Processor time, in percent of one core, 1 to 100; what is outside is taken as the nearer.
    pub cpu_percent: u32,
    /// Processor time that a guest which slept may take before its share counts.
    pub cpu_burst: Duration,
    /// Turns when several guests want to run, against the others' weights; 10 to 1000.
    pub cpu_weight: u32,
    /// Wall time until the guest is instantiated, its start function included.
    pub start_time: Duration,
    /// Wall time of the whole run.
    pub run_time: Option<Duration>,
    /// Wall time of one call into the file system.
    pub host_call_time: Duration,
    /// Arguments and environment, in bytes.
    pub environment_bytes: u64,
    /// Files and directories open at once, besides those that were granted.
    pub open_files: u32,
    /// What may lie in the writable directories, in bytes.
    pub directory_bytes: u64,
    /// Where it may send HTTP requests, and how many of which size.
    pub outbound: OutboundLimits,
    /// Tables; C, Rust and Go make one, a component a few.
    pub tables: usize,
    /// Memories: a module has one, of a component each core instance.
    pub memories: usize,
    /// Instances of core modules: what `wasm-tools` makes of a program and the preview 1 adapter
    /// are four.
    pub instances: usize,
    /// Nothing, but in tests of `prove`.
    pub lifted: Option<Lift>,
}

impl Default for WasmLimits {
    /// Those of a plugin without manifest.
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            table_elements: 100_000,
            cpu_percent: 50,
            cpu_burst: Duration::from_millis(50),
            cpu_weight: 100,
            start_time: Duration::from_secs(60),
            run_time: None,
            host_call_time: Duration::from_secs(10),
            environment_bytes: 256 << 10,
            open_files: 32,
            directory_bytes: 64 << 20,
            outbound: OutboundLimits::default(),
            tables: 16,
            memories: 16,
            instances: 16,
            lifted: None,
        }
    }
}

/// Everything one run gets.
pub struct Launch {
    /// The whole argument list, the program's name first; empty becomes the module's name.
    pub arguments: Vec<String>,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// What it may reach of the file system.
    pub directories: Vec<Directory>,
    /// What it may use.
    pub limits: WasmLimits,
    /// Where its output goes.
    pub output: Arc<dyn GuestOutput>,
    /// Cancelled, the guest's stdin reaches its end, and it may go on for as long as it wants.
    pub stop: CancellationToken,
    /// Cancelled, it ends when the turn is over that is under way, of whichever guest: after 5 ms,
    /// where the turn is not in a call that cannot be interrupted.
    pub kill: CancellationToken,
}

impl Launch {
    /// A run without arguments, environment and directories, under the default limits.
    pub fn new(output: Arc<dyn GuestOutput>) -> Self {
        Self {
            arguments: Vec::new(),
            environment: Vec::new(),
            directories: Vec::new(),
            limits: WasmLimits::default(),
            output,
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
        }
    }
}
