//! Traces when nobody takes them. What a receiver gets is tested with one that shares no code with
//! us, in `tests/traces`.

use std::{process::Command, time::Duration};

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{Client, Server, binary, pack};

#[test]
fn half_a_setting_is_refused_and_no_password_is_repeated() {
    let refusal = |flags: &[&str]| {
        let output = Command::new(binary())
            .args(["serve", "--l1-size-gb", "0.01"])
            .args(flags)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{text}");
        text
    };
    assert!(refusal(&["--enable-tracing"]).contains("--otlp-endpoint"));
    let alone = refusal(&["--otlp-endpoint", "http://localhost:4317"]);
    assert!(alone.contains("--enable-tracing"), "{alone}");
    let flags = [
        "--enable-tracing",
        "--otlp-endpoint",
        "http://me:s3cret@h:1",
    ];
    let password = refusal(&flags);
    assert!(
        password.contains("OTEL_EXPORTER_OTLP_HEADERS") && !password.contains("s3cret"),
        "{password}"
    );
    let flags = [
        "--enable-tracing",
        "--otlp-endpoint",
        "h:1",
        "--tracing-sample-rate",
        "2",
    ];
    assert!(refusal(&flags).contains("--tracing-sample-rate"));
}

/// The receiver takes the connection and never says a word: everything is answered all the same,
/// what does not fit the queue is counted, and the end of the server does not wait for long.
#[tokio::test]
async fn a_receiver_that_hangs_costs_spans_and_nothing_else() {
    const REQUESTS: usize = 20_000;
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", deaf.local_addr().unwrap());
    let mut server = Server::start(&["--enable-tracing", "--otlp-endpoint", &endpoint]);
    let mut client = Client::connect(&server.url).await;
    for batch in 0..REQUESTS / 500 {
        for number in 0..500 {
            let uid = Value::from(batch * 500 + number);
            client
                .send(vec![pack(&uid), pack(&Value::from("noop"))])
                .await;
        }
        for _ in 0..500 {
            let reply: Vec<Bytes> = client.receive().await;
            assert_eq!(reply.len(), 3);
        }
    }
    // The queue holds 16384, and every five seconds a batch of 512 is given up.
    let text = server.http("GET", "/metrics", "").await.1;
    let series = "stockade_trace_spans_dropped_total{reason=\"queue_full\"} ";
    let lost = text.lines().find_map(|line| line.strip_prefix(series));
    let lost: u64 = lost.unwrap().parse().unwrap();
    assert!(lost > 1000, "{lost}");
    assert_eq!(
        server.metric("stockade_trace_spans_exported_total").await,
        0.0
    );
    let health = server.http("GET", "/v1/health", "").await;
    assert_eq!(health.0, 200, "{health:?}");
    server.signal(rustix::process::Signal::TERM);
    let told = std::time::Instant::now();
    assert_eq!(server.wait(), Some(0));
    assert!(
        told.elapsed() < Duration::from_secs(15),
        "{:?}",
        told.elapsed()
    );
    server.wait_for_line("the last spans were not exported in time");
    drop(deaf);
}
