//! Small operations, both spellings of each, and the HTTP API beside them.

use rmpv::Value;
use stockade_tests::{Client, Key, Server, registration, tokens};

#[tokio::test]
async fn small_operations_answer_to_numbers_and_names() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    client.call(14, &[registration(1, "m")]).await.value();
    for (number, name, arguments, answer) in [
        (22, "ping", vec![Value::from(1)], true.into()),
        (24, "noop", vec![], Value::from("OK")),
        (22, "ping", vec![Value::Nil], true.into()),
        (21, "get_chunk_size", vec![], 16.into()),
        (
            32,
            "get_experimental",
            vec![],
            Value::Array(vec!["kv_event_stream".into()]),
        ),
        (9, "query_prefetch_status", vec!["nobody".into()], 0.into()),
        (
            10,
            "wait_prefetch_status",
            vec!["nobody".into(), 0.5.into()],
            0.into(),
        ),
        (13, "end_session", vec!["nobody".into()], Value::Nil),
        (
            15,
            "unregister_kv_cache_engine_driven_context",
            vec![7.into()],
            Value::Nil,
        ),
        (20, "clear", vec![false.into()], Value::Nil),
    ] {
        assert_eq!(
            client.call(number, &arguments).await.value(),
            answer,
            "{name} by number"
        );
        assert_eq!(
            client.call(name, &arguments).await.value(),
            answer,
            "{name} by name"
        );
    }
}

#[tokio::test]
async fn what_is_not_served_is_refused_at_once_with_the_way_out() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    for (operation, way_out) in [
        (Value::from(33), "CacheBlend"),
        ("cb_reorder_plan".into(), "CacheBlend"),
        (5.into(), "query transfer"),
    ] {
        let error = client.call(operation.clone(), &[1.into()]).await.error();
        assert!(error.contains(way_out), "{operation}: {error}");
    }
    for unknown in [Value::from(11), 999.into(), "no_such_operation".into()] {
        assert!(
            client
                .call(unknown, &[])
                .await
                .error()
                .contains("unknown operation")
        );
    }
    let error = client.call("ping", &[]).await.error();
    assert!(error.contains("ping") && error.contains('1'), "{error}");
    let errors = server.http("GET", "/metrics", "").await.1;
    assert!(errors.contains("stockade_request_errors_total"), "{errors}");
}

#[tokio::test]
async fn what_takes_too_long_is_answered_all_the_same() {
    let server = Server::start(&["--request-deadline-seconds", "0.001"]);
    let mut client = Client::connect(&server.url).await;
    // It takes longer than that to read a million tokens.
    let key = Key::new("m", &tokens(1 << 20, 1), None, "r");
    let error = client.call(8, &[key.value(), 1.into()]).await.error();
    assert!(error.contains("--request-deadline-seconds"), "{error}");
    // An operation with a negative result says that instead.
    let key = Key::new("m", &tokens(1 << 20, 2), Some(0), "r");
    let arguments = [key.value(), 1.into(), Value::Binary(vec![1])];
    assert_eq!(
        client.call(17, &arguments).await.value(),
        Value::from(false)
    );
    assert_eq!(
        client.call(24, &[]).await.value(),
        Value::from("OK"),
        "others go on"
    );
}

#[tokio::test]
async fn a_registration_shows_in_status_until_it_ends() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    let reply = client.call(14, &[registration(4242, "m")]).await.value();
    assert_eq!(
        stockade_tests::field(&reply, "pool_size").as_u64(),
        Some(64 << 20)
    );
    let status = server.json("/status").await;
    assert_eq!(
        status["registered_non_cuda_instance_ids"],
        serde_json::json!([4242])
    );
    assert_eq!(
        status["non_cuda_context_meta"]["4242"],
        serde_json::json!({"model_name": "m", "world_size": 1, "block_size": 16, "use_mla": false})
    );
    client.call(15, &[4242.into()]).await.value();
    assert_eq!(
        server.json("/status").await["registered_non_cuda_instance_ids"],
        serde_json::json!([])
    );
}

#[tokio::test]
async fn http_answers_as_lmcache_does_and_says_what_is_wrong() {
    let server = Server::start(&[]);
    assert_eq!(
        server.json("/healthcheck").await,
        serde_json::json!({"status": "healthy"})
    );
    assert_eq!(server.json("/status").await["hash_algorithm"], "blake3");
    assert_eq!(server.http("POST", "/cache/clear", "").await.0, 200);
    let (status, problem) = server
        .http("POST", "/cache/clear", "{\"tier\": \"l2\"}")
        .await;
    assert!(
        status == 400 && problem.contains("bad-clear-request"),
        "{problem}"
    );
    let (status, problem) = server.http("GET", "/v1/plugins/nobody", "").await;
    assert!(
        status == 404 && problem.contains("plugin-not-found"),
        "{problem}"
    );
    for route in ["/env", "/run_script", "/no/such"] {
        assert_eq!(server.http("GET", route, "").await.0, 404, "{route}");
    }
}
