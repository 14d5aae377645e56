//! Attacks on the processor and on time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    KILL, Proof, ProveError,
    arena::{Arena, Silence, WINDOW, at_most},
};
use crate::{
    limit::Limit,
    wasm::{Launch, WasmLimits},
};

/// The longest a guest may live once it is killed, in milliseconds.
const KILL_MILLISECONDS: u64 = 1000;

impl Arena<'_> {
    pub(super) async fn cpu(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../../tests/guests/endless_loop.wat");
        let mut limits = self.applied.limits.clone();
        limits.run_time = None;
        let attack = self.attack(spin, limits, WINDOW).await?;
        let burst = self.declared.limits.cpu_burst;
        let cpu = attack.usage.cpu_time.saturating_sub(burst).as_secs_f64();
        let percent = cpu / attack.took.as_secs_f64() * 100.0;
        let declared = self.declared.limits.cpu_percent;
        Ok(Proof {
            what: Limit::Cpu.name(),
            declared: declared.to_string(),
            measured: format!("{percent:.1} over {WINDOW:?}, after the burst"),
            // A turn is not cut short, and 5 ms of 2 s are a quarter of a percent.
            holds: percent <= f64::from(declared) + 1.0,
        })
    }

    /// Sleeps for as long as a burst takes to be earned, then spins: what it takes at once.
    pub(super) async fn cpu_burst(&self) -> Result<Proof, ProveError> {
        let sleep_then_spin = r#"(module
            (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 1)
            (func (export "_start")
              (i32.store (i32.const 16) (i32.const 1))
              (i64.store (i32.const 24) (i64.const 1500000000))
              (drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))
              (loop $forever (br $forever))))"#;
        let percent = 5;
        let limits = WasmLimits {
            cpu_percent: percent,
            run_time: None,
            ..self.applied.limits.clone()
        };
        let window = Duration::from_millis(2700);
        let attack = self.attack(sleep_then_spin, limits, window).await?;
        // What the share gives after the sleep is no burst, and neither is its last turn.
        let share = attack.took.saturating_sub(Duration::from_millis(1500)) * percent / 100;
        let burst = attack.usage.cpu_time.saturating_sub(share);
        let declared = self.declared.limits.cpu_burst;
        Ok(Proof {
            what: Limit::CpuBurst.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{:.1}", burst.as_secs_f64() * 1000.0),
            holds: burst <= declared + Duration::from_millis(15),
        })
    }

    pub(super) async fn start_time(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../../tests/guests/endless_loop_in_start_function.wat");
        let limits = WasmLimits {
            run_time: None,
            ..self.applied.limits.clone()
        };
        let declared = self.declared.limits.start_time;
        self.timed(Limit::StartTime, spin, limits, declared).await
    }

    pub(super) async fn run_time(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../../tests/guests/endless_loop.wat");
        let declared = self.declared.limits.run_time.unwrap_or_default();
        let limits = self.applied.limits.clone();
        self.timed(Limit::RunTime, spin, limits, declared).await
    }

    pub(super) async fn timed(
        &self,
        limit: Limit,
        text: &str,
        limits: WasmLimits,
        declared: Duration,
    ) -> Result<Proof, ProveError> {
        // A second beyond the limit is for a loaded machine.
        let slack = Duration::from_secs(1);
        let attack = self.attack(text, limits, declared + slack * 2).await?;
        Ok(Proof {
            what: limit.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.end()),
            holds: attack.end.is_some()
                && attack.took <= declared + slack
                && attack.usage.hits.of(limit) == 1,
        })
    }

    pub(super) async fn kill(&self) -> Result<Proof, ProveError> {
        let module = self.module(include_str!(
            "../../../../tests/guests/endless_loop_in_host_calls.wat"
        ))?;
        let kill = CancellationToken::new();
        let launch = Launch {
            limits: WasmLimits {
                run_time: None,
                ..self.applied.limits.clone()
            },
            kill: kill.clone(),
            ..Launch::new(Arc::new(Silence))
        };
        let run = self.runtime.spawn(&module, launch);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let begun = Instant::now();
        kill.cancel();
        let patience = Duration::from_millis(KILL_MILLISECONDS * 2);
        let has_ended = tokio::time::timeout(patience, run.ended()).await.is_ok();
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut proof = at_most(KILL, KILL_MILLISECONDS, took);
        if !has_ended {
            proof.measured = format!("it lived on for {took}");
            proof.holds = false;
        }
        Ok(proof)
    }
}
