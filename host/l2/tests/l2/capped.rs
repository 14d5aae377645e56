//! Bounded adapters.

use std::{
    fs::File,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::json;
use stockade_l2::Adapter;

use super::{eventually, form, list, name, open, open_fs, value};

const KIB: usize = 1024;

fn open_capped(directory: &tempfile::TempDir, kib: usize) -> Arc<dyn Adapter> {
    let gib = (kib * KIB) as f64 / f64::from(1 << 30);
    open(
        &json!({"type": "fs", "base_path": directory.path(), "max_capacity_gb": gib,
        "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.5}}),
    )
}

fn used(adapter: &Arc<dyn Adapter>) -> u64 {
    adapter.status()["used_bytes"].as_u64().unwrap()
}

#[tokio::test]
async fn the_bound_is_kept_and_what_was_used_last_stays() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_capped(&directory, 100);
    for number in 0..60 {
        adapter
            .store(&name(number), value(number, 10 * KIB), 7)
            .await
            .unwrap();
        // The first one is used all the time.
        assert_eq!(
            adapter.load(&name(0), form(10 * KIB as u64)).await,
            Ok(value(0, 10 * KIB))
        );
        let kept: u64 = list(&adapter, None)
            .await
            .iter()
            .map(|entry| entry.bytes)
            .sum();
        assert!(kept <= 100 * KIB as u64, "{kept}");
    }
    assert_eq!(
        adapter.find(&[name(1), name(59)]).await,
        Ok(vec![false, true])
    );
    let error = adapter
        .store(&name(61), value(61, 101 * KIB), 7)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "full");
}

#[tokio::test]
async fn use_and_order_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    for number in 0..8 {
        adapter
            .store(&name(number), value(number, 10 * KIB), 7)
            .await
            .unwrap();
        let file = directory.path().join(name(number).file_name().unwrap());
        let minutes_ago = SystemTime::now() - Duration::from_secs(3600 - 60 * u64::from(number));
        let times = std::fs::FileTimes::new()
            .set_accessed(minutes_ago)
            .set_modified(minutes_ago);
        File::options()
            .write(true)
            .open(file)
            .unwrap()
            .set_times(times)
            .unwrap();
    }
    // Reading the oldest one makes it the newest, and the file system remembers.
    adapter.load(&name(0), form(10 * KIB as u64)).await.unwrap();
    drop(adapter);

    let again = open_capped(&directory, 1000);
    eventually("the scan has found everything", || {
        used(&again) == 80 * KIB as u64
    })
    .await;
    drop(again);
    // 80 of 100 KiB are the watermark: half of it goes, the oldest first.
    let again = open_capped(&directory, 100);
    eventually("half of it was evicted", || used(&again) == 40 * KIB as u64).await;
    let names: Vec<_> = (0..8).map(name).collect();
    let left = again.find(&names).await.unwrap();
    assert_eq!(left, [true, false, false, false, false, true, true, true]);
    assert_eq!(again.status()["evicted_values"], 4);
}
