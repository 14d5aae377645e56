//! Several ways in at once, who may come in by them, and what happens when one who came leaves.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rmpv::Value;
use stockade_tests::{Client, Key, PATIENCE, Process, Server, Worker, map, registration, tokens};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

const PASSWORD: &str = "correct horse battery staple";

/// A configuration with a PLAIN listener on one local socket and an open one on another.
fn configuration(directory: &Path) -> (String, String, String) {
    let users = directory.join("users");
    std::fs::write(&users, format!("# engines\nann:{PASSWORD}\n")).unwrap();
    std::fs::set_permissions(&users, std::fs::Permissions::from_mode(0o600)).unwrap();
    let (closed, open) = (directory.join("closed.sock"), directory.join("open.sock"));
    let config = directory.join("stockade.toml");
    std::fs::write(
        &config,
        format!(
            "[[listener]]\nname = 'closed'\nendpoint = 'ipc://{}'\nmechanism = 'plain'\nusers-file = '{}'\nipc-mode = '0660'\n\n[[listener]]\nname = 'open'\nendpoint = 'ipc://{}'\n",
            closed.display(), users.display(), open.display(),
        ),
    )
    .unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    (text(&config), text(&closed), text(&open))
}

/// A PLAIN client by hand: what the server sends after HELLO, then after INITIATE and a noop.
async fn plain_noop(path: &str, username: &str, password: &str) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let mut greeting = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    greeting.extend_from_slice(b"PLAIN");
    greeting.resize(64, 0);
    let command = |body: Vec<u8>| [&[0x04, u8::try_from(body.len()).unwrap()], &body[..]].concat();
    let mut hello = b"\x05HELLO".to_vec();
    for text in [username, password] {
        hello.push(u8::try_from(text.len()).unwrap());
        hello.extend_from_slice(text.as_bytes());
    }
    let initiate = b"\x08INITIATE\x0bSocket-Type\x00\x00\x00\x06DEALER".to_vec();
    stream
        .write_all(&[greeting, command(hello)].concat())
        .await
        .unwrap();
    let mut answer = Vec::new();
    let mut sent = false;
    let exchange = async {
        loop {
            let mut buffer = [0; 1024];
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(read) => answer.extend_from_slice(&buffer[..read]),
            }
            let welcomed = answer.windows(7).any(|part| part == b"WELCOME");
            if welcomed && !sent {
                sent = true;
                let noop = b"\x01\x01\x05\x00\x01\x18".to_vec();
                stream
                    .write_all(&[command(initiate.clone()), noop].concat())
                    .await
                    .unwrap();
            }
            if answer.ends_with(b"\xa2OK") {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, exchange)
        .await
        .expect("no end of the exchange");
    answer
}

#[tokio::test]
async fn listeners_serve_side_by_side_each_with_its_own_rule() {
    let directory = tempfile::tempdir().unwrap();
    let (config, closed, open) = configuration(directory.path());
    let extra = directory.path().join("extra.sock");
    let extra = format!("ipc://{}", extra.display());
    let server = Server::start(&[
        "--config",
        &config,
        "--listen",
        &extra,
        "--log-level",
        "debug",
    ]);
    assert_eq!(
        std::fs::metadata(&closed).unwrap().permissions().mode() & 0o777,
        0o660
    );
    assert_eq!(
        std::fs::metadata(&open).unwrap().permissions().mode() & 0o777,
        0o600
    );
    for url in [server.url.clone(), format!("ipc://{open}"), extra] {
        let mut client = Client::connect(&url).await;
        assert_eq!(
            client.call(24, &[]).await.value(),
            Value::from("OK"),
            "{url}"
        );
    }
    assert!(
        plain_noop(&closed, "ann", PASSWORD)
            .await
            .ends_with(b"\xa2OK")
    );
    for (username, password) in [("ann", "wrong"), ("eve", PASSWORD), ("", ""), ("ann", "")] {
        let answer = plain_noop(&closed, username, password).await;
        assert!(
            answer.windows(5).any(|part| part == b"ERROR"),
            "{username}: {answer:?}"
        );
        assert!(!answer.ends_with(b"\xa2OK"));
    }
    // Who comes without a password is cut off, and what is secret is nowhere to be read.
    let mut null = UnixStream::connect(&closed).await.unwrap();
    null.write_all(&super::hostile::handshake()).await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, null.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    server
        .metric_becomes("stockade_handshake_failures_total", |failures| {
            failures >= 5.0
        })
        .await;
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    let denied = "stockade_tenant_denied_total{tenant=\"(none)\",reason=\"unauthenticated\"} 5";
    assert!(metrics.lines().any(|line| line == denied), "{metrics}");
    for path in ["/config", "/status", "/metrics", "/v1/plugins"] {
        let body = server.http("GET", path, "").await.1;
        assert!(!body.contains("horse"), "{path}: {body}");
    }
    assert!(!server.log().join("\n").contains("horse"));
    assert!(!server.log().join("\n").contains("wrong\""));
}

#[tokio::test]
async fn plugins_learn_nothing_of_passwords() {
    let directory = tempfile::tempdir().unwrap();
    let (config, ..) = configuration(directory.path());
    let plugin = directory.path().join("shows_all.sh");
    std::fs::write(&plugin, "#!/bin/bash\nenv | sort\necho that was all\n").unwrap();
    let plugin = plugin.to_str().unwrap();
    let mut server = Server::start(&["--config", &config, "--runtime-plugin-locations", plugin]);
    server.wait_for_line("that was all");
    let log = server.log().join("\n");
    assert!(log.contains("LMCACHE_RUNTIME_PLUGIN_CONFIG"), "{log}");
    assert!(
        !log.contains("horse") && !log.contains("users-file"),
        "{log}"
    );
}

/// The environment variable that turns the next test into a worker.
const WORKER_OF: &str = "STOCKADE_TEST_WORKER_OF";

/// Not a test by itself: a worker in a process of its own, which waits to be killed.
#[tokio::test]
async fn a_worker_that_waits_to_be_killed() {
    let Ok(url) = std::env::var(WORKER_OF) else {
        return;
    };
    let mut client = Client::connect(&url).await;
    client.call(14, &[registration(77, "m")]).await.value();
    let key = Key::new("m", &tokens(32, 1), Some(0), "w");
    client.call(16, &[key.value(), 77.into()]).await.value();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn spawn_worker(url: &str) -> Process {
    let worker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "listeners::a_worker_that_waits_to_be_killed"])
        .env(WORKER_OF, url)
        .stdout(Stdio::null())
        .spawn();
    Process(worker.unwrap())
}

/// Waits for a number of bytes that are reserved and not committed.
async fn staging_becomes(server: &Server, wanted: impl Fn(u64) -> bool) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = server.json("/status").await;
        let bytes = status["storage_manager"]["l1_manager"]["staging_bytes"]
            .as_u64()
            .unwrap();
        if wanted(bytes) {
            return bytes;
        }
        assert!(Instant::now() < deadline, "{bytes} bytes are staged");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_dead_process_on_a_local_socket_gives_back_what_it_held_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("workers.sock");
    let url = format!("ipc://{}", path.display());
    let server = Server::start(&["--listen", &url]);
    let mut worker = spawn_worker(&url);
    staging_becomes(&server, |bytes| bytes > 0).await;
    worker.0.kill().unwrap();
    // The budgets for silence are minutes, and nobody has reaped the process yet.
    staging_becomes(&server, |bytes| bytes == 0).await;
    let status = server.json("/status").await;
    assert_eq!(status["worker_liveness"]["tracked_instances"], 0);
    drop(worker);
}

#[tokio::test]
async fn a_closed_connection_alone_ends_no_worker() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("workers.sock");
    let url = format!("ipc://{}", path.display());
    let server = Server::start(&["--listen", &url]);
    // By a local socket whose process lives, and by TCP, where nobody can tell.
    let mut client = Client::connect(&url).await;
    client.call(14, &[registration(77, "m")]).await.value();
    let key = Key::new("m", &tokens(16, 1), Some(0), "w");
    client.call(16, &[key.value(), 77.into()]).await.value();
    drop(client);
    let mut worker = Worker::register(&server, 78, "m").await;
    let other = Key::new("m", &tokens(16, 2), Some(0), "w");
    assert_eq!(worker.prepare_store(&other).await.len(), 1);
    drop(worker);
    server
        .metric_becomes("stockade_connections_open", |open| open == 0.0)
        .await;
    let status = server.json("/status").await;
    assert_eq!(status["worker_liveness"]["tracked_instances"], 2);
    // Both come back and go on with what they had.
    let mut client = Client::connect(&url).await;
    for (id, key) in [(77, &key), (78, &other)] {
        assert_eq!(client.call(22, &[id.into()]).await.value(), true.into());
        let commit = [key.value(), id.into(), Value::Binary(Vec::new())];
        assert_eq!(client.call(17, &commit).await.value(), true.into());
    }
}

#[tokio::test]
async fn lookups_of_peers_find_as_many_nothings_as_they_asked_for() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    let key = map(&[("model_name", "m".into())]);
    for count in [0, 1, 3] {
        let task = client
            .call(
                29,
                &[
                    Value::Array(vec![key.clone(); count]),
                    Value::Map(Vec::new()),
                ],
            )
            .await
            .value();
        let nothing = map(&[("offset", (-1).into()), ("size", 0.into())]);
        let found = client.call(30, std::slice::from_ref(&task)).await.value();
        assert_eq!(found, Value::Array(vec![nothing; count]));
        assert_eq!(
            client.call(30, &[task]).await.value(),
            Value::Nil,
            "told once"
        );
    }
    assert_eq!(
        client.call(31, &[Value::Array(vec![key])]).await.value(),
        Value::Nil
    );
}
