//! Attacks by the calls of `stockade:plugin/v1`, and by not answering them.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Proof, ProveError, Subscribe,
    arena::{Arena, PATIENCE, Silence, at_most},
};
use crate::{
    host_api::{
        Access, CacheRequest, CacheStats, CacheWork, Code, Counter, EventSource, KeysPage,
        KeysQuery, MAX_EVENT_BATCH, PluginHost, PluginRun, RankFailure, RankRequest, Refusal,
        Services, Subscription, link,
    },
    limit::Limit,
    wasm::{Launch, WasmLimits},
};

/// What a value has that is put into a plugin's state.
const VALUE_BYTES: u64 = 32 << 10;

/// A server that has events and nothing else.
struct EventsAlone(Arc<Subscribe>);

fn none<T>() -> Result<T, Refusal> {
    Err(Refusal::new(
        Code::Unavailable,
        "there is no cache here: limits are being proven",
    ))
}

impl PluginHost for EventsAlone {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        None
    }

    fn stats(&self, _run: &PluginRun) -> Result<CacheStats, Refusal> {
        none()
    }

    fn keys(&self, _run: &PluginRun, _query: &KeysQuery) -> Result<KeysPage, Refusal> {
        none()
    }

    fn request(&self, _run: &PluginRun, _request: &CacheRequest) -> Result<CacheWork, Refusal> {
        none()
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        subscription: &Subscription,
        most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        Ok((self.0)(subscription, most_behind))
    }

    fn ended(&self, _run: &PluginRun) {}
}

impl Arena<'_> {
    fn contract_launch(&self) -> Launch {
        Launch {
            limits: WasmLimits {
                run_time: None,
                ..self.unhurried()
            },
            ..Launch::new(Arc::new(Silence))
        }
    }

    /// A handler that does not end, called as soon as the guest has started.
    pub(super) async fn call_time(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.terms.call_time;
        // Ten milliseconds before it is called, and a second for a loaded machine.
        let slack = Duration::from_millis(1010);
        let launch = self.contract_launch();
        let loops = include_str!("../../../../tests/guests/abi-v1/timer_loops.wat");
        let attack = self.launch(loops, launch, declared + slack * 2).await?;
        Ok(Proof {
            what: Limit::CallTime.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.end()),
            holds: attack.usage.hits.of(Limit::CallTime) == 1 && attack.took <= declared + slack,
        })
    }

    /// Candidates that are never put into an order: how long the server waits for that.
    pub(super) async fn rank_time(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.terms.rank_time;
        let slack = Duration::from_secs(1);
        let launch = self.contract_launch();
        let (link, inbox) = link(launch.stop.clone());
        let mut access = Access {
            inbox,
            ..self.access(&launch)
        };
        // Its end by another limit is not what is attacked.
        access.terms.call_time = PATIENCE;
        let deadline = self.applied.terms.rank_time;
        let asking = tokio::task::spawn_blocking(move || {
            let request = RankRequest {
                tenant: "default".into(),
                bytes_wanted: 1,
                count: 0,
                candidates: Box::new(Vec::new),
            };
            let begun = Instant::now();
            (link.order(request, deadline), begun.elapsed())
        });
        let never = include_str!("../../../../tests/guests/abi-v1/rank_loops.wat");
        self.launch_with(never, launch, access, declared + slack * 2)
            .await?;
        let (order, took) = asking.await.map_err(std::io::Error::other)?;
        Ok(Proof {
            what: Limit::RankTime.name(),
            declared: declared.as_millis().to_string(),
            measured: took.as_millis().to_string(),
            holds: order == Err(RankFailure::Timeout) && took <= declared + slack,
        })
    }

    /// Puts values under one name after the other until it is told to stop.
    pub(super) async fn state_bytes(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.terms.state_bytes;
        let most = declared / VALUE_BYTES + 2;
        let hog = format!(
            r#"(module
            (import "stockade:plugin/v1" "state_set" (func $set (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 2)
            {NEXT_NAME}
            (func (export "_start") (local $left i32)
              (local.set $left (i32.const {most}))
              (loop $more
                (call $next_name)
                (if (i32.lt_s (call $set (i32.const 0) (i32.const 8) (i32.const 64) (i32.const {VALUE_BYTES})) (i32.const 0))
                  (then return))
                (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))"#
        );
        let launch = self.contract_launch();
        let access = self.access(&launch);
        let state = Arc::clone(&access.state);
        self.launch_with(&hog, launch, access, PATIENCE).await?;
        Ok(at_most(Limit::StateBytes.name(), declared, state.bytes()))
    }

    /// Subscribes, hears of nothing while twice as many events happen as may wait, and then of all
    /// that are left: those that are not lost have waited.
    pub(super) async fn queued_events(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.terms.queued_events;
        let batch = (declared / 64).clamp(1, MAX_EVENT_BATCH as u64);
        let request = format!(r#"{{"max_batch":{batch}}}"#);
        let (quoted, length) = (request.replace('"', "\\22"), request.len());
        let deaf = format!(
            r#"(module
            (import "stockade:plugin/v1" "events_subscribe" (func $subscribe (param i32 i32) (result i32)))
            (import "stockade:plugin/v1" "metric_set" (func $set (param i32 i32 f64) (result i32)))
            (import "stockade:plugin/v1" "state_get" (func $get (param i32 i32) (result i32)))
            (import "stockade:plugin/v1" "next_message" (func $next (param i32) (result i32)))
            (import "wasi_snapshot_preview1" "sched_yield" (func $yield (result i32)))
            (memory (export "memory") 1)
            (data (i32.const 0) "{quoted}")
            (data (i32.const 64) "listens")
            (func (export "_start")
              (if (i32.lt_s (call $subscribe (i32.const 0) (i32.const {length})) (i32.const 0))
                (then unreachable))
              (drop (call $set (i32.const 64) (i32.const 7) (f64.const 1)))
              (loop $deaf
                (drop (call $yield))
                (br_if $deaf (i32.lt_s (call $get (i32.const 64) (i32.const 7)) (i32.const 0))))
              (loop $again (br_if $again (call $next (i32.const 500))))))"#
        );
        let launch = self.contract_launch();
        let mut access = Access {
            counter: Counter::new(
                Services {
                    host: Some(Arc::new(EventsAlone(Arc::clone(&self.flood.subscribe)))),
                    ..Services::default()
                },
                "{}",
            ),
            ..self.access(&launch)
        };
        access.terms.metrics = 1;
        access.terms.state_bytes = 64;
        let (tally, state) = (Arc::clone(&access.tally), Arc::clone(&access.state));
        let events = declared * 2 + batch * 4;
        let told = Arc::clone(&tally);
        let flooding = async {
            while told.counts().custom.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            (self.flood.events)(events);
            // It could only fail for want of room.
            let _ = state.set("listens", b"", 64);
            std::future::pending::<Infallible>().await
        };
        let attack = tokio::select! {
            attack = self.launch_with(&deaf, launch, access, PATIENCE) => attack?,
            never = flooding => match never {},
        };
        let waited = events.saturating_sub(tally.counts().events_lost);
        // One batch is on its way and one stands behind it before any could be lost.
        let mut proof = at_most(
            Limit::QueuedEvents.name(),
            declared.saturating_add(batch * 2),
            waited,
        );
        proof.declared = declared.to_string();
        if attack.exit_code() != Some(0) {
            proof.measured = attack.end();
            proof.holds = false;
        }
        Ok(proof)
    }

    /// One name more than it may have.
    pub(super) async fn metrics(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.terms.metrics as u64;
        let hog = format!(
            r#"(module
            (import "stockade:plugin/v1" "metric_add" (func $add (param i32 i32 f64) (result i32)))
            (memory (export "memory") 1)
            {NEXT_NAME}
            (func (export "_start") (local $left i32)
              (local.set $left (i32.const {}))
              (loop $more
                (call $next_name)
                (drop (call $add (i32.const 0) (i32.const 8) (f64.const 1)))
                (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))"#,
            declared + 1
        );
        let launch = self.contract_launch();
        let access = self.access(&launch);
        let tally = Arc::clone(&access.tally);
        self.launch_with(&hog, launch, access, PATIENCE).await?;
        let names = tally.counts().custom.len() as u64;
        Ok(at_most(Limit::Metrics.name(), declared, names))
    }
}

/// A function that writes the next of many names of eight letters to the memory's begin.
const NEXT_NAME: &str = r#"
    (global $name (mut i32) (i32.const 0))
    (func $next_name (local $rest i32) (local $at i32)
      (global.set $name (i32.add (global.get $name) (i32.const 1)))
      (local.set $rest (global.get $name))
      (loop $letters
        (i32.store8 (local.get $at) (i32.add (i32.const 97) (i32.and (local.get $rest) (i32.const 15))))
        (local.set $rest (i32.shr_u (local.get $rest) (i32.const 4)))
        (br_if $letters (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 1))) (i32.const 8)))))"#;
