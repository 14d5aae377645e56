//! Redis and S3, each a real server of the test's own. Where there is none the test says so.

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use stockade_l2::AdapterError;

use super::{form, list, name, named, open, value};

/// A server that is killed with the test.
struct Running {
    child: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(program: &str, arguments: impl Fn(u16) -> Vec<String>) -> Option<Running> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let directory = tempfile::tempdir().unwrap();
    let child = Command::new(program)
        .args(arguments(port))
        .current_dir(directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        eprintln!("NOT TESTED: there is no {program}");
        return None;
    };
    let running = Running {
        child,
        port,
        _directory: directory,
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "{program} does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(running)
}

fn redis() -> Option<Running> {
    start("redis-server", |port| {
        let words = ["--bind", "127.0.0.1", "--save", "", "--port"];
        let mut words: Vec<_> = words.map(ToOwned::to_owned).to_vec();
        words.push(port.to_string());
        words
    })
}

/// Sends one command by hand, so that what the adapter wrote is seen as others see it.
async fn redis_command(port: u16, words: &[&[u8]]) -> redis::Value {
    let client = redis::Client::open(("127.0.0.1", port)).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut command = redis::Cmd::new();
    for word in words {
        command.arg(*word);
    }
    command.query_async(&mut connection).await.unwrap()
}

async fn goes_through_a_life(spec: &Value, lists: bool) {
    let adapter = open(spec);
    let bytes = value(1, 100_000);
    assert_eq!(adapter.find(&[name(1)]).await, Ok(vec![false]));
    let missing = adapter.load(&name(1), form(100_000)).await;
    assert_eq!(missing, Err(AdapterError::NotFound));
    adapter.store(&name(1), bytes.clone(), 7).await.unwrap();
    adapter
        .store(&named(2, "a b"), value(2, 10), 7)
        .await
        .unwrap();
    let names = [name(2), name(1), named(2, "a b")];
    assert_eq!(adapter.find(&names).await, Ok(vec![false, true, true]));
    assert_eq!(adapter.load(&name(1), form(100_000)).await, Ok(bytes));
    for other in [
        form(99_999),
        form(100_001),
        stockade_l2::Form {
            length: 100_000,
            layout: 8,
        },
    ] {
        let error = adapter.load(&name(1), other).await;
        assert_eq!(error, Err(AdapterError::OtherForm { found: 100_000 }));
    }
    if lists {
        let all = list(&adapter, None).await;
        let sizes: Vec<_> = all.iter().map(|entry| entry.bytes).collect();
        assert_eq!(sizes, [100_000, 10]);
        assert_eq!(list(&adapter, Some("a b")).await.len(), 1);
    }
    let deleted = adapter.delete(&names).await;
    assert_eq!(deleted, Ok(vec![false, true, true]));
    assert_eq!(adapter.find(&names).await, Ok(vec![false; 3]));
}

#[tokio::test]
async fn redis_goes_through_a_life_in_both_types() {
    let Some(redis) = redis() else { return };
    let port = redis.port;
    goes_through_a_life(
        &json!({"type": "resp", "host": "127.0.0.1", "port": port}),
        true,
    )
    .await;
    let nodes = format!("127.0.0.1:{port}");
    let valkey =
        json!({"type": "valkey", "startup_nodes": nodes, "key_prefix": "p", "database_id": 3});
    goes_through_a_life(&valkey, true).await;
}

#[tokio::test]
async fn redis_values_are_whole_or_a_miss() {
    let Some(redis) = redis() else { return };
    let port = redis.port;
    let adapter = open(&json!({"type": "resp", "host": "127.0.0.1", "port": port}));
    let key = name(1).key();
    // As LMCache writes it: without a seal, taken by its length.
    redis_command(port, &[b"SET", key.as_bytes(), &value(1, 500)]).await;
    assert_eq!(adapter.load(&name(1), form(500)).await, Ok(value(1, 500)));
    adapter.store(&name(1), value(2, 500), 7).await.unwrap();
    let stored = redis_command(port, &[b"GET", key.as_bytes()]).await;
    assert_eq!(stored, redis::Value::BulkString(value(2, 500).to_vec()));
    for damage in [
        &[&b"SETRANGE"[..], key.as_bytes(), b"77", b"?"][..],
        &[&b"APPEND"[..], key.as_bytes(), b"more"][..],
        &[&b"SET"[..], key.as_bytes(), b"short"][..],
    ] {
        adapter.store(&name(1), value(2, 500), 7).await.unwrap();
        redis_command(port, damage).await;
        let error = adapter.load(&name(1), form(500)).await.unwrap_err();
        assert!(
            matches!(error, AdapterError::Damaged { moved: true, .. }),
            "{error:?}"
        );
        assert_eq!(adapter.find(&[name(1)]).await, Ok(vec![false]));
        let aside = format!("stockade:quarantine:{{{key}}}");
        let life = redis_command(port, &[b"TTL", aside.as_bytes()]).await;
        assert!(matches!(life, redis::Value::Int(1..)), "{life:?}");
    }
}

#[tokio::test]
async fn a_redis_without_room_is_full_and_one_that_is_gone_unavailable() {
    let Some(redis) = redis() else { return };
    let port = redis.port;
    let adapter = open(&json!({"type": "resp", "host": "127.0.0.1", "port": port}));
    redis_command(port, &[b"CONFIG", b"SET", b"maxmemory", b"1"]).await;
    let error = adapter
        .store(&name(1), value(1, 5000), 7)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "full", "{error}");
    redis_command(port, &[b"CONFIG", b"SET", b"maxmemory", b"0"]).await;
    adapter.store(&name(1), value(1, 5000), 7).await.unwrap();
    redis_command(port, &[b"CONFIG", b"SET", b"requirepass", b"x"]).await;
    let shut_out = open(&json!({"type": "resp", "host": "127.0.0.1", "port": port}));
    let error = shut_out.find(&[name(1)]).await.unwrap_err();
    assert_eq!(error.reason(), "denied", "{error}");
    let let_in = open(&json!({"type": "resp", "host": "127.0.0.1", "port": port, "password": "x"}));
    assert_eq!(let_in.find(&[name(1)]).await, Ok(vec![true]));
    drop(redis);
    let error = adapter.find(&[name(1)]).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable", "{error}");
}

fn moto() -> Option<Running> {
    let program = std::env::var("STOCKADE_TEST_MOTO").unwrap_or_else(|_| "moto_server".to_owned());
    start(&program, |port| {
        [
            "-H".to_owned(),
            "127.0.0.1".to_owned(),
            "-p".to_owned(),
            port.to_string(),
        ]
        .to_vec()
    })
}

async fn bucket(port: u16) -> Value {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap();
    let request = format!(
        "PUT /bucket HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    json!({"type": "s3", "s3_endpoint": format!("127.0.0.1:{port}"), "s3_bucket": "bucket",
        "s3_region": "us-east-1", "disable_tls": true,
        "aws_access_key_id": "id", "aws_secret_access_key": "secret"})
}

#[tokio::test]
async fn s3_goes_through_a_life_and_damage_is_a_miss() {
    let Some(moto) = moto() else { return };
    let spec = bucket(moto.port).await;
    goes_through_a_life(&spec, true).await;

    let adapter = open(&spec);
    // As LMCache writes it: no metadata.
    put(moto.port, &name(1).key(), b"12345", None).await;
    assert_eq!(
        adapter.load(&name(1), form(5)).await.as_deref(),
        Ok(&b"12345"[..])
    );
    // A seal that does not fit the bytes.
    let wrong = "crc32c=00000000 length=5 layout=00000007";
    put(moto.port, &name(1).key(), b"12345", Some(wrong)).await;
    let error = adapter.load(&name(1), form(5)).await.unwrap_err();
    assert!(
        matches!(error, AdapterError::Damaged { moved: true, .. }),
        "{error:?}"
    );
    assert_eq!(adapter.find(&[name(1)]).await, Ok(vec![false]));
    put(moto.port, &name(1).key(), b"torn", None).await;
    let error = adapter.load(&name(1), form(5)).await.unwrap_err();
    assert!(
        matches!(error, AdapterError::Damaged { moved: true, .. }),
        "{error:?}"
    );
    assert!(
        list(&adapter, None).await.is_empty(),
        "what is aside is no value"
    );
    drop(moto);
    let error = adapter.find(&[name(1)]).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable", "{error}");
}

const SIGNED: &str = "authorization: AWS4-HMAC-SHA256 \
    Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\n";

/// Puts an object by hand; the server wants a signature and does not check it.
async fn put(port: u16, key: &str, body: &[u8], seal: Option<&str>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap();
    let path = key.replace('@', "%40");
    let seal = seal.map_or(String::new(), |seal| {
        format!("x-amz-meta-stockade-seal: {seal}\r\n")
    });
    let head = format!(
        "PUT /bucket/{path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {}\r\n{SIGNED}{seal}connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
