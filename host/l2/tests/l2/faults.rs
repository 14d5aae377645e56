//! Storage that fails: each fault has its outcome, within its deadline.

use std::{
    os::unix::fs::PermissionsExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use stockade_l2::{AdapterError, BreakerState, Guarded};

use super::{form, name, open, value};

fn faulty(fields: Value) -> Guarded {
    let mut spec = json!({"type": "fault_inject",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 1000}});
    for (field, fault) in fields.as_object().unwrap() {
        spec[field] = fault.clone();
    }
    Guarded::new(open(&spec))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(200)
}

#[tokio::test]
async fn each_fault_ends_by_its_deadline_in_its_own_error() {
    for (fault, reason) in [
        ("full", "full"),
        ("denied", "denied"),
        ("unavailable", "unavailable"),
        ("hang", "deadline"),
    ] {
        let guarded = faulty(json!({"store": fault, "load": fault, "find": fault}));
        let began = Instant::now();
        let deadline = began + Duration::from_secs(2);
        let results = [
            guarded
                .store(&name(1), &value(1, 64), 7, deadline)
                .await
                .unwrap_err(),
            guarded
                .load(&name(1), form(64), deadline)
                .await
                .unwrap_err(),
            guarded.find(&[name(1)], deadline).await.unwrap_err(),
        ];
        for error in results {
            assert_eq!(error.reason(), reason, "{fault}");
        }
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}

#[tokio::test]
async fn storage_that_keeps_failing_is_left_alone_for_reads_and_writes_apart() {
    let guarded = faulty(json!({"store": "full"}));
    for _ in 0..5 {
        let error = guarded
            .store(&name(1), &value(1, 64), 7, soon())
            .await
            .unwrap_err();
        assert_eq!(error.reason(), "full");
    }
    assert_eq!(guarded.writes().state(), BreakerState::Open);
    let error = guarded.store(&name(1), &value(1, 64), 7, soon()).await;
    assert_eq!(error, Err(AdapterError::Open));
    // A full disk still serves.
    assert_eq!(guarded.find(&[name(1)], soon()).await, Ok(vec![false]));
    assert_eq!(guarded.reads().state(), BreakerState::Closed);
}

#[tokio::test]
async fn a_miss_or_a_damaged_value_is_no_failure_of_the_storage() {
    let guarded = faulty(json!({"rate": 1.0}));
    guarded
        .store(&name(1), &value(1, 64), 7, soon())
        .await
        .unwrap();
    for _ in 0..20 {
        assert_eq!(
            guarded.load(&name(1), form(64), soon()).await,
            Err(AdapterError::NotFound)
        );
    }
    assert_eq!(guarded.reads().state(), BreakerState::Closed);
}

#[tokio::test]
async fn the_same_values_are_dropped_each_time_and_about_as_many_as_asked_for() {
    let guarded = faulty(json!({"rate": 0.3, "seed": 7}));
    let mut dropped = Vec::new();
    for number in 0..200 {
        guarded
            .store(&name(number), &value(number, 64), 7, soon())
            .await
            .unwrap();
        dropped.push(guarded.load(&name(number), form(64), soon()).await.is_err());
    }
    for number in 0..200 {
        let again = guarded.load(&name(number), form(64), soon()).await.is_err();
        assert_eq!(again, dropped[usize::from(number)]);
    }
    let count = dropped.iter().filter(|&&it| it).count();
    assert!((30..=90).contains(&count), "{count}");
}

#[tokio::test]
async fn a_slow_store_costs_its_deadline_and_leaves_nothing_half() {
    let guarded = faulty(json!({"delay_ms": 60_000}));
    let began = Instant::now();
    let result = guarded.store(&name(1), &value(1, 64), 7, soon()).await;
    assert_eq!(result, Err(AdapterError::Deadline));
    assert!(began.elapsed() < Duration::from_secs(30));
}

/// Root passes all permissions by, so that this needs another user or a read-only mount.
#[tokio::test]
async fn permission_that_is_lost_is_denied() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open(&json!({"type": "fs", "base_path": directory.path()}));
    adapter.store(&name(1), value(1, 64), 7).await.unwrap();
    let set = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(directory.path(), permissions).unwrap();
    };
    set(0o500);
    let stored = Guarded::new(Arc::clone(&adapter))
        .store(&name(2), &value(2, 64), 7, soon())
        .await;
    set(0o700);
    if rustix::process::geteuid().is_root() {
        assert_eq!(stored, Ok(()));
    } else {
        assert!(matches!(stored, Err(AdapterError::Denied(_))), "{stored:?}");
    }
    assert_eq!(adapter.load(&name(1), form(64)).await, Ok(value(1, 64)));
}

/// A directory that vanishes and comes back, as a mount does.
#[tokio::test]
async fn a_directory_that_is_gone_is_unavailable_until_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("mount");
    let adapter = open(&json!({"type": "fs", "base_path": base}));
    adapter.store(&name(1), value(1, 64), 7).await.unwrap();
    let aside = directory.path().join("aside");
    std::fs::rename(&base, &aside).unwrap();
    for error in [
        adapter.load(&name(1), form(64)).await.unwrap_err(),
        adapter.store(&name(2), value(2, 64), 7).await.unwrap_err(),
        adapter.find(&[name(1)]).await.unwrap_err(),
    ] {
        assert_eq!(error.reason(), "unavailable");
    }
    std::fs::rename(&aside, &base).unwrap();
    assert_eq!(adapter.load(&name(1), form(64)).await, Ok(value(1, 64)));
}
