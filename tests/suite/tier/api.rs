//! What operators and LMCache's coordinator ask of the second tier over HTTP.

use std::time::Instant;

use serde_json::{Value as Json, json};
use stockade_tests::{Key, PATIENCE, Server, Worker, tokens};

use super::{
    CHUNK, CHUNK_BYTES, STORED, chunks, data_files, end, fs, in_memory, leave_stored, lookup, start,
};

async fn ask(server: &Server, method: &str, path: &str, body: &Json) -> (u16, Json) {
    let (status, text) = server.http(method, path, &body.to_string()).await;
    (status, serde_json::from_str(&text).unwrap())
}

/// Waits for the end of a prefetch.
async fn completed(server: &Server, request_id: &str) -> Json {
    let path = format!("/cache/prefetches/{request_id}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (status, answer) = ask(server, "GET", &path, &json!({})).await;
        assert_eq!(status, 200, "{answer}");
        if answer["status"] != "pending" {
            return answer;
        }
        assert!(Instant::now() < deadline, "{answer}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_prompt_is_loaded_before_anybody_asks_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(4 * CHUNK, 90);
    leave_stored(&directory, &prompt).await;
    // So slow that it is seen on its way.
    let slow = json!({"type": "fault_inject", "delay_ms": 300, "inner": fs(&directory)});
    let server = start(&slow, &super::PATIENT);
    let request = json!({"model_name": "org/m", "world_size": 1, "token_ids": prompt});
    let (status, answer) = ask(&server, "POST", "/cache/prefetches", &request).await;
    assert_eq!(
        (status, &answer["code"]),
        (503, &json!("no-layout")),
        "{answer}"
    );
    let mut worker = Worker::register(&server, 1, "org/m").await;

    let (status, answer) = ask(&server, "POST", "/cache/prefetches", &request).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(
        (&answer["chunks"], &answer["status"]),
        (&json!(4), &json!("submitted"))
    );
    let id = answer["request_id"].as_str().unwrap().to_owned();
    let (_, pending) = ask(
        &server,
        "GET",
        &format!("/cache/prefetches/{id}"),
        &json!({}),
    )
    .await;
    assert_eq!(pending, json!({"request_id": id, "status": "pending"}));
    let over = completed(&server, &id).await;
    let expected =
        json!({"request_id": id, "status": "completed", "found_keys": 4, "total_keys": 4});
    assert_eq!(over, expected);
    let (status, _) = ask(
        &server,
        "GET",
        &format!("/cache/prefetches/{id}"),
        &json!({}),
    )
    .await;
    assert_eq!(status, 404, "told once");
    assert_eq!(in_memory(&server).await, 4, "it stays without a lock");
    let key = Key::new("org/m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 4);
    assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(1, 4));

    let mut salted = request.clone();
    salted["cache_salt"] = json!("other");
    let (_, answer) = ask(&server, "POST", "/cache/prefetches", &salted).await;
    let over = completed(&server, answer["request_id"].as_str().unwrap()).await;
    assert_eq!(over["found_keys"], 0, "another tenant's");
    let mut short = request.clone();
    short["token_ids"] = json!([1, 2, 3]);
    let (status, answer) = ask(&server, "POST", "/cache/prefetches", &short).await;
    assert_eq!(
        (status, answer),
        (202, json!({"chunks": 0, "status": "noop"}))
    );
    let mut wrong = request;
    wrong["target_tier"] = json!("l2");
    let (status, answer) = ask(&server, "POST", "/cache/prefetches", &wrong).await;
    assert_eq!((status, &answer["code"]), (400, &json!("bad-tier")));
}

#[tokio::test]
async fn objects_are_listed_in_pages_and_deleted_by_key() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(&fs(&directory), &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let prompt = tokens(5 * CHUNK, 91);
    let key = Key::new("org/m", &prompt, Some(0), "w");
    assert!(worker.store(&key, |index| 1 + index as u8).await);
    let mut other = Worker::register(&server, 2, "org/other").await;
    let others = Key::new("org/other", &prompt[..CHUNK], Some(0), "w");
    assert!(other.store(&others, |_| 9).await);
    server.metric_becomes(STORED, |it| it == 6.0).await;

    let mut keys = Vec::new();
    let mut path = "/cache/objects?model_name=org/m&page_size=2".to_owned();
    for left in [3, 1, 0] {
        let (status, page) = ask(&server, "GET", &path, &json!({})).await;
        assert_eq!(status, 200, "{page}");
        assert_eq!(
            (&page["adapter"], &page["shared"]),
            (&json!("fs"), &json!(false))
        );
        for entry in page["entries"].as_array().unwrap() {
            assert_eq!(entry["size_bytes"], CHUNK_BYTES);
            keys.push(entry["key"].clone());
        }
        assert_eq!(keys.len(), 5 - left);
        match page["next_page_token"].as_str() {
            Some(token) => {
                path = format!("/cache/objects?model_name=org/m&page_size=2&page_token={token}");
            }
            None => assert_eq!(left, 0),
        }
    }
    let mut distinct: Vec<_> = keys
        .iter()
        .map(|key| key["chunk_hash_hex"].as_str().unwrap())
        .collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 5);
    assert_eq!(keys[0]["model_name"], "org/m");
    for (query, status) in [
        ("page_token=x", 400),
        ("page_size=0", 400),
        ("tier=l1", 400),
        ("adapter=s3", 404),
    ] {
        let (found, answer) = ask(
            &server,
            "GET",
            &format!("/cache/objects?{query}"),
            &json!({}),
        )
        .await;
        assert_eq!(found, status, "{query}: {answer}");
    }

    let (status, answer) = ask(
        &server,
        "DELETE",
        "/cache/objects",
        &json!({"keys": keys[..2]}),
    )
    .await;
    assert_eq!(
        (status, answer),
        (200, json!({"deleted": 2, "skipped": 0, "ok": true}))
    );
    assert_eq!(data_files(directory.path()).len(), 4);
    // A lookup holds all five in memory.
    assert_eq!(lookup(&mut worker.client, &key).await, 5);
    let everywhere = json!({"keys": keys, "tier": "l1"});
    let (_, answer) = ask(&server, "DELETE", "/cache/objects", &everywhere).await;
    assert_eq!(answer, json!({"deleted": 0, "skipped": 5, "ok": true}));
    end(&mut worker.client, &key).await;
    let everywhere = json!({"keys": keys, "tier": "all"});
    let (_, answer) = ask(&server, "DELETE", "/cache/objects", &everywhere).await;
    assert_eq!(
        answer,
        json!({"deleted": 8, "skipped": 0, "ok": true}),
        "five there, three here"
    );
    assert_eq!(lookup(&mut worker.client, &key).await, 0);
    assert_eq!(in_memory(&server).await, 1, "the other model's");
    let mut bad = keys[0].clone();
    bad["chunk_hash_hex"] = json!("zz");
    let (status, answer) = ask(&server, "DELETE", "/cache/objects", &json!({"keys": [bad]})).await;
    assert_eq!((status, &answer["code"]), (400, &json!("bad-key")));
    assert!(
        answer["detail"]
            .as_str()
            .unwrap()
            .starts_with("keys[0].chunk_hash_hex"),
        "{answer}"
    );
}

#[tokio::test]
async fn without_a_second_tier_the_answer_says_so() {
    let server = Server::start(&[]);
    for (method, path, body) in [
        ("GET", "/cache/objects", json!({})),
        ("DELETE", "/cache/objects", json!({"keys": []})),
        (
            "POST",
            "/cache/prefetches",
            json!({"model_name": "m", "world_size": 1, "token_ids": []}),
        ),
    ] {
        let (status, answer) = ask(&server, method, path, &body).await;
        assert_eq!(
            (status, &answer["code"]),
            (503, &json!("no-second-tier")),
            "{method} {path}"
        );
    }
    // What is in memory can go all the same.
    let body = json!({"keys": [], "tier": "l1"});
    assert_eq!(ask(&server, "DELETE", "/cache/objects", &body).await.0, 200);
}

#[tokio::test]
async fn a_bounded_adapter_tells_what_it_holds_and_what_it_evicts() {
    let directory = tempfile::tempdir().unwrap();
    // Room for 16 chunks; eviction begins at 80 %.
    let gib = (16 * CHUNK_BYTES) as f64 / f64::from(1_u32 << 30);
    let mut adapter = fs(&directory);
    adapter["max_capacity_gb"] = json!(gib);
    let server = start(&adapter, &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let key = Key::new("org/m", &tokens(10 * CHUNK, 92), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    let used = "lmcache_mp_l2_usage_bytes";
    server
        .metric_becomes(used, |it| it == (10 * CHUNK_BYTES) as f64)
        .await;
    assert_eq!(
        server
            .metric("lmcache_mp_l2_store_submitted_requests_total")
            .await,
        10.0
    );
    let key = Key::new("org/m", &tokens(10 * CHUNK, 93), Some(0), "w");
    assert!(worker.store(&key, |_| 2).await);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, metrics) = server.http("GET", "/metrics", "").await;
        let line = "lmcache_mp_l2_evicted_chunks_total{cache_salt=\"\"} ";
        let evicted = metrics.lines().find_map(|it| it.strip_prefix(line));
        if evicted.is_some_and(|it| it.parse::<u64>().unwrap() >= 4) {
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
    }
    assert!(server.metric(used).await <= (16 * CHUNK_BYTES) as f64);
    server
        .metric_becomes("lmcache_mp_num_inflight_l2_stores", |it| it == 0.0)
        .await;
}

#[tokio::test]
async fn writes_on_their_way_are_counted() {
    let hung = json!({"type": "fault_inject", "store": "hang",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10}});
    let server = start(&hung, &["--l2-store-deadline-seconds", "3600"]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    for number in 0..8 {
        let key = Key::new("org/m", &tokens(CHUNK, 940 + number), Some(0), "w");
        assert!(worker.store(&key, |_| 1).await);
    }
    // As many as `mock` writes at once.
    server
        .metric_becomes("lmcache_mp_num_inflight_l2_stores", |it| it > 0.0)
        .await;
}
