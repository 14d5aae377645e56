//! `prove` is green where every limit holds, and red where any single one does not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{sync::Arc, time::Duration};

use stockade_sandbox::{
    Access, Compiler, Limit, Manifest,
    host_api::{Backlog, CacheGrant, EventBatch, EventSource, Pending},
    prove::{ATTACKS, Flood, Held, Proof, prove},
};
use tokio::sync::watch;

/// Numbered events.
struct Listening {
    newest: watch::Receiver<u64>,
    cursor: u64,
    most_behind: u64,
    batch: u64,
}

impl EventSource for Listening {
    fn backlog(&self) -> Backlog {
        Backlog::new(|| 0)
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        Box::pin(async move {
            loop {
                let newest = *self.newest.borrow_and_update();
                let oldest = newest.saturating_sub(self.most_behind).max(self.cursor);
                let lost = oldest - self.cursor;
                self.cursor = newest.min(oldest + self.batch);
                if self.cursor > oldest {
                    return Some(EventBatch {
                        cursor: self.cursor,
                        lost,
                        events: Box::new(Vec::new),
                    });
                }
                self.newest.changed().await.ok()?;
            }
        })
    }
}

fn flood() -> Flood {
    let numbers = watch::channel(0).0;
    let events = numbers.clone();
    Flood {
        subscribe: Arc::new(move |subscription, most_behind| {
            let newest = numbers.subscribe();
            let cursor = *newest.borrow();
            let source = Listening {
                newest,
                cursor,
                most_behind,
                batch: subscription.max_batch.unwrap() as u64,
            };
            (cursor, Box::new(source))
        }),
        events: Arc::new(move |count| events.send_modify(|newest| *newest += count)),
    }
}

/// A plugin with every grant and tight limits, so that attacks are over soon.
fn held() -> Held {
    let mut manifest = Manifest::default();
    manifest.limits.state_kib = 64;
    manifest.limits.call_ms = 200;
    manifest.limits.metrics = 3;
    manifest.limits.queued_events = 640;
    manifest.cache.insert(CacheGrant::Events);
    let mut held = Held::new(&manifest, Default::default());
    held.limits.memory_bytes = 8 << 20;
    held.limits.table_elements = 10_000;
    held.limits.cpu_percent = 1;
    held.limits.cpu_burst = Duration::from_millis(20);
    held.limits.start_time = Duration::from_millis(200);
    held.limits.run_time = Some(Duration::from_millis(2000));
    held.limits.host_call_time = Duration::from_millis(200);
    held.limits.environment_bytes = 4 << 10;
    held.limits.open_files = 4;
    held.limits.directory_bytes = 256 << 10;
    held.log.lines_per_second = 10;
    held.log.bytes_per_second = 64 << 10;
    held.form.functions = 1000;
    held.form.names = 100;
    held.form.bytes = 4 << 20;
    held.compile.time = Duration::from_secs(1);
    held.compile.memory_bytes = 1 << 30;
    held.bomb_depth = 180;
    held.directories = Some(Access::ReadWrite);
    held.http_hosts = 1;
    held.limits.outbound.timeout = Duration::from_millis(200);
    held.limits.outbound.body_bytes = 64 << 10;
    held.limits.outbound.per_second = 5;
    held.environment = vec![("GRANTED".to_owned(), "yes".to_owned())];
    held
}

async fn proofs(declared: &Held, applied: &Held, only: Option<&str>) -> Vec<Proof> {
    let scratch = tempfile::tempdir().unwrap();
    let compiler = Compiler::Child {
        program: env!("CARGO_BIN_EXE_stockade-keeper").into(),
    };
    let directory = scratch.path();
    let proven = prove(
        declared,
        applied,
        compiler,
        directory,
        only,
        flood(),
        |_| {},
    )
    .await;
    proven.unwrap()
}

fn failed(proofs: &[Proof]) -> Vec<&'static str> {
    let failed = proofs.iter().filter(|proof| !proof.holds);
    failed.map(|proof| proof.what).collect()
}

#[tokio::test]
async fn every_limit_holds_where_it_is_applied() {
    let all = proofs(&held(), &held(), None).await;
    let attacked: Vec<_> = all.iter().map(|proof| proof.what).collect();
    assert_eq!(attacked, ATTACKS);
    // Guests have the lowest priority, and so have the deadlines on their thread: beside builds one
    // may be seconds late. Each gets another chance, and none is let off.
    for what in failed(&all) {
        let mut again = Vec::new();
        for _attempt in 0..5 {
            again = proofs(&held(), &held(), Some(what)).await;
            if failed(&again).is_empty() {
                break;
            }
        }
        assert!(failed(&again).is_empty(), "{again:#?}");
    }
}

#[test]
fn there_is_an_attack_for_every_limit() {
    for limit in Limit::ALL {
        let is_attacked = |it: &&str| it.split(", ").any(|name| name == limit.name());
        assert!(ATTACKS.iter().any(is_attacked), "{limit:?}");
    }
}

/// Each limiter is lifted once, and its own attack is the one that says so.
#[cfg(debug_assertions)]
#[tokio::test]
async fn a_limit_that_is_not_applied_is_found() {
    // Four at a time: most of the time of an attack is waiting, and none needs much of a core.
    for some in ATTACKS.chunks(4) {
        let runs = some.iter().map(|&what| {
            tokio::spawn(async move {
                let mut declared = held();
                if what == "directories" {
                    // A grant that was never given is a limit that is not applied, too.
                    declared.directories = None;
                }
                let applied = declared.without(what).unwrap();
                // Beside builds and other tests, an attack may get too little of a processor to
                // take more than it should.
                let mut found = Vec::new();
                for _attempt in 0..5 {
                    found = proofs(&declared, &applied, Some(what)).await;
                    if failed(&found) == [what] {
                        break;
                    }
                }
                (what, found)
            })
        });
        for run in runs.collect::<Vec<_>>() {
            let (what, proofs) = run.await.unwrap();
            assert_eq!(failed(&proofs), [what], "{proofs:#?}");
        }
    }
    assert!(held().without("nonsense").is_err());
}
