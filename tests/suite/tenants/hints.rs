//! What requests ask for beside the usual, with real frames.

use super::*;

/// A worker's chunks, each stored with settings of its own.
async fn found(worker: &mut Worker, seed: u64) -> u64 {
    lookup_free(&mut worker.client, &chunk(seed)).await
}

fn chunk(seed: u64) -> Key {
    Key::new("m", &tokens(CHUNK, seed), Some(0), &format!("r{seed}"))
}

#[tokio::test]
async fn pins_and_priorities_outlive_a_flood_as_far_as_the_tenant_may() {
    let tables = "[tenants.may]\nsalts = ['m']\nlisteners = ['may']\ncap_gb = 0.001\nmax_pin_seconds = 3600\n\
                  [tenants.must]\nsalts = ['n']\nlisteners = ['must']\ncap_gb = 0.001\n";
    let house = House::start(&["may", "must"], tables, &[]);
    for (listener, kept) in [("may", 1), ("must", 0)] {
        let mut worker = Worker::register_at(&house.url(listener), 1, "m").await;
        let wishes = [
            vec![("lmcache.pin", Value::from(true))],
            vec![("lmcache.priority", 5.into())],
            vec![("lmcache.priority", (-1).into())],
            vec![],
        ];
        for (seed, configs) in wishes.iter().enumerate() {
            let stored = store_inline(&mut worker, &chunk(seed as u64), configs).await;
            assert_eq!(stored, true.into());
        }
        // More than the tenant may have, so that its own oldest chunks go.
        let flood = Key::new("m", &tokens(1000 * CHUNK, 50), Some(0), "flood");
        for part in 0..4 {
            let flood = Key {
                tokens: tokens(200 * CHUNK, 50 + part),
                request_id: format!("flood{part}"),
                end: 200 * CHUNK as i64,
                ..flood.clone()
            };
            assert!(worker.store(&flood, |_| 1).await);
        }
        assert_eq!(
            found(&mut worker, 0).await,
            kept,
            "{listener}: the pinned one"
        );
        assert_eq!(
            found(&mut worker, 1).await,
            kept,
            "{listener}: half as long"
        );
        for seed in [2, 3] {
            assert_eq!(
                found(&mut worker, seed).await,
                0,
                "{listener}: as any other"
            );
        }
    }
}

#[tokio::test]
async fn what_is_stored_again_does_not_end_with_its_former_time() {
    let tables = "[tenants.a]\nsalts = ['s']\nlisteners = ['a']\n";
    let house = House::start(&["a"], tables, &[]);
    let mut worker = Worker::register_at(&house.url("a"), 1, "m").await;
    let second = [("lmcache.ttl", Value::from(1))];
    assert_eq!(
        store_inline(&mut worker, &chunk(1), &second).await,
        true.into()
    );
    assert_eq!(
        store_inline(&mut worker, &chunk(2), &second).await,
        true.into()
    );
    worker.client.call("clear", &[true.into()]).await.value();
    assert_eq!(found(&mut worker, 1).await, 0);
    // For ever, for long, and last the one whose end shows that the former times are over.
    let hour = [("lmcache.ttl", Value::from(3600))];
    assert_eq!(store_inline(&mut worker, &chunk(1), &[]).await, true.into());
    assert_eq!(
        store_inline(&mut worker, &chunk(2), &hour).await,
        true.into()
    );
    assert_eq!(
        store_inline(&mut worker, &chunk(3), &second).await,
        true.into()
    );
    let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
    while found(&mut worker, 3).await > 0 {
        assert!(std::time::Instant::now() < deadline, "it does not end");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(
        (found(&mut worker, 1).await, found(&mut worker, 2).await),
        (1, 1)
    );
}
