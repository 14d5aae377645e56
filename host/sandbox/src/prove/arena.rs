//! Where attacks take place, and what one leaves.

use std::{
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Flood, Held, Proof, ProveError};
use crate::{
    host_api::Access,
    log_stream::{LogLevel, LogStream},
    supervisor::GuestLog,
    wasm::{
        GuestOutput, GuestStream, Launch, WasmEnd, WasmLimits, WasmModule, WasmRuntime, WasmUsage,
    },
};

/// How long attacks on rates go on.
pub(super) const WINDOW: Duration = Duration::from_secs(2);
/// What an attack gets to end when it is not the time that is measured.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A sandbox that applies what is to be attacked.
pub(super) struct Arena<'a> {
    pub(super) runtime: Arc<WasmRuntime>,
    pub(super) declared: &'a Held,
    pub(super) applied: &'a Held,
    pub(super) scratch: PathBuf,
    pub(super) flood: Flood,
}

/// What an attack left.
pub(super) struct Attack {
    pub(super) end: Option<WasmEnd>,
    pub(super) usage: WasmUsage,
    pub(super) log: Arc<LogStream>,
    pub(super) took: Duration,
}

impl Attack {
    pub(super) fn exit_code(&self) -> Option<i32> {
        match self.end {
            Some(WasmEnd::Exited(code)) => Some(code),
            _ => None,
        }
    }

    pub(super) fn text(&self) -> String {
        let lines = self.log.tail(usize::MAX);
        let texts: Vec<&str> = lines.iter().map(|line| &*line.text).collect();
        texts.join("\n")
    }

    pub(super) fn end(&self) -> String {
        match &self.end {
            None => "it goes on".to_owned(),
            Some(WasmEnd::Exited(code)) => format!("exit code {code}"),
            Some(
                WasmEnd::Trapped(reason) | WasmEnd::LimitHit(reason) | WasmEnd::Refused(reason),
            ) => reason.clone(),
            Some(WasmEnd::Killed) => "killed".to_owned(),
        }
    }
}

impl Arena<'_> {
    pub(super) fn module(&self, text: &str) -> Result<WasmModule, ProveError> {
        Ok(self.runtime.prepare("attacker", text.as_bytes())?)
    }

    /// Limits that let an attack get on with what it attacks: all of the processor.
    pub(super) fn unhurried(&self) -> WasmLimits {
        WasmLimits {
            cpu_percent: 100,
            ..self.applied.limits.clone()
        }
    }

    pub(super) async fn attack(
        &self,
        text: &str,
        limits: WasmLimits,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let launch = Launch {
            limits,
            ..Launch::new(Arc::new(Silence))
        };
        self.launch(text, launch, time).await
    }

    /// Runs an attacker until it ends, or for `time`.
    pub(super) async fn launch(
        &self,
        text: &str,
        launch: Launch,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let access = self.access(&launch);
        self.launch_with(text, launch, access, time).await
    }

    /// The contract as it is applied, and no server behind it.
    pub(super) fn access(&self, launch: &Launch) -> Access {
        Access {
            terms: self.applied.terms.clone(),
            ..Access::none("attacker".into(), launch.stop.clone())
        }
    }

    pub(super) async fn launch_with(
        &self,
        text: &str,
        mut launch: Launch,
        access: Access,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let module = self.module(text)?;
        let log = Arc::new(LogStream::quiet(Arc::from("attacker"), self.applied.log));
        launch.output = Arc::new(GuestLog(Arc::clone(&log)));
        let kill = launch.kill.clone();
        let begun = Instant::now();
        let run = self.runtime.spawn_with(&module, launch, access);
        let end = tokio::time::timeout(time, run.ended()).await.ok();
        let (took, usage) = (begun.elapsed(), run.usage());
        kill.cancel();
        let _killed = tokio::time::timeout(PATIENCE, run.ended()).await;
        log.finish();
        Ok(Attack {
            end,
            usage,
            log,
            took,
        })
    }
}

pub(super) fn at_most(what: &'static str, declared: u64, measured: u64) -> Proof {
    Proof {
        what,
        declared: declared.to_string(),
        measured: measured.to_string(),
        holds: measured <= declared,
    }
}

/// Takes output that nobody reads.
pub(super) struct Silence;

impl GuestOutput for Silence {
    fn log(&self, _level: LogLevel, _line: &[u8]) {}

    fn push(&self, _stream: GuestStream, _bytes: &[u8]) {}

    fn budget(&self) -> usize {
        usize::MAX
    }

    fn ready(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}
