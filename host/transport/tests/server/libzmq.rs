//! The peers that matter most: libzmq through pyzmq, which the engines' clients use.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use crypto_box::SecretKey;
use stockade_transport::{
    Authenticator, Config, Curve, ListenOptions, Mechanism, Message, Outcome, Principal,
};
use tokio::process::Command;

use crate::harness::*;

struct TeamA;

impl Authenticator for TeamA {
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal> {
        (username == b"team-a" && password == b"secret").then(|| Principal::new("team-a"))
    }

    fn curve(&self, public_key: &[u8; 32]) -> Option<Principal> {
        let is_known = *public_key == *SecretKey::from(CLIENT).public_key().as_bytes();
        is_known.then(|| Principal::new("team-a"))
    }
}

/// Secret keys of CURVE.
const SERVER: [u8; 32] = [7; 32];
const CLIENT: [u8; 32] = [9; 32];

/// Runs where `python3`, or the interpreter in `STOCKADE_TEST_PYTHON`, has pyzmq;
/// elsewhere it says so and passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libzmq_is_content() {
    let python = std::env::var("STOCKADE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&python)
        .args(["-c", "import zmq"])
        .stderr(Stdio::null())
        .status()
        .await;
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: {python} has no pyzmq; set STOCKADE_TEST_PYTHON to one that has");
        return;
    }
    let config = Config {
        heartbeat_interval: Duration::from_millis(300),
        heartbeat_timeout: Duration::from_secs(2),
        ..Config::default()
    };
    let handler = || {
        let (handler, _) = with(|_, message| match message {
            Message::Frames(frames) if frames[0] == "close me" => Outcome::Close,
            message => Outcome::Reply(echo(message)),
        });
        handler
    };
    let null = TestServer::start(config.clone(), handler()).await;
    let options = ListenOptions {
        mechanism: Mechanism::Plain(Arc::new(TeamA)),
        ..ListenOptions::default()
    };
    let plain = TestServer::listen("tcp://127.0.0.1:0", options, config.clone(), handler()).await;
    let curve = Curve::new(SERVER, Arc::new(TeamA));
    let hex = |key: [u8; 32]| key.map(|byte| format!("{byte:02x}")).concat();
    let keys = [
        hex(curve.public_key()),
        hex(SecretKey::from(CLIENT).public_key().to_bytes()),
        hex(CLIENT),
    ];
    let options = ListenOptions {
        mechanism: Mechanism::Curve(Arc::new(curve)),
        ..ListenOptions::default()
    };
    let curve = TestServer::listen("tcp://127.0.0.1:0", options, config, handler()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/server/libzmq_peer.py");
    let peer = Command::new(&python)
        .arg(script)
        .args([&null, &plain, &curve].map(|server| server.endpoint.to_string()))
        .args(keys)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(60), peer)
        .await
        .expect("the peer hangs")
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for (name, server) in [("null", null), ("plain", plain), ("curve", curve)] {
        assert_eq!(server.stats.disconnects("heartbeat_timeout"), 0, "{name}");
    }
}
