//! Bad input: each costs its sender. After it a fresh client is served within 100 ms, and the
//! server's memory returns to where it was.

mod floods;
mod framing;
mod requests;
mod transfers;

use std::time::{Duration, Instant};

use rmpv::Value;
use stockade_tests::{Client, PATIENCE, Server, Worker};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// In which a fresh client connects and has its answer.
const SERVED_WITHIN: Duration = Duration::from_millis(100);
/// What the allocator may keep over what the server held before.
const MEMORY_SLACK_KIB: u64 = 16 << 10;

/// A server, and what it held before anything was done to it.
struct Siege {
    server: Server,
    memory_before_kib: u64,
}

impl Siege {
    /// Starts a server with `flags` and lets it do each kind of work once.
    async fn begin(flags: &[&str]) -> Self {
        let server = Server::start(flags);
        Worker::register(&server, u64::MAX, "warm-up").await;
        fresh_client(&server).await;
        server.json("/status").await;
        let memory_before_kib = server.anonymous_memory_kib();
        Self {
            server,
            memory_before_kib,
        }
    }

    /// Waits for the server to be as it was before `attack`.
    ///
    /// Both are conditions with a deadline, because the machine may be busy with other things.
    async fn withstood(&mut self, attack: &str) {
        let deadline = Instant::now() + PATIENCE;
        let served = loop {
            let served = fresh_client(&self.server).await;
            if served < SERVED_WITHIN {
                break served;
            }
            assert!(
                Instant::now() < deadline,
                "{attack}: a fresh client waits {served:?}"
            );
        };
        let memory = loop {
            let memory = self.server.anonymous_memory_kib();
            if memory <= self.memory_before_kib + MEMORY_SLACK_KIB {
                break memory;
            }
            assert!(
                Instant::now() < deadline,
                "{attack}: the server holds {memory} KiB, {} before",
                self.memory_before_kib
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(self.server.is_running(), "{attack}");
        eprintln!(
            "{attack}: a fresh client is served in {served:?}, memory {memory} KiB, {} before",
            self.memory_before_kib
        );
    }
}

/// Connects, asks for a noop and returns how long that took.
async fn fresh_client(server: &Server) -> Duration {
    let started = Instant::now();
    let mut client = Client::connect(&server.url).await;
    assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
    started.elapsed()
}

/// A ZMTP 3.1 greeting with the NULL mechanism, and a READY command of a DEALER.
pub(crate) fn handshake() -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    bytes.extend_from_slice(b"NULL");
    bytes.resize(64, 0);
    bytes.extend_from_slice(b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER");
    bytes
}

/// A connection that has sent `bytes` and reads nothing.
async fn raw(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&server.addr).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// Waits until the server closes a connection; what it sends before that is dropped.
async fn closed_by_server(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    // A reset is an end too.
    let _ = tokio::time::timeout(PATIENCE, read)
        .await
        .expect("the server keeps the connection");
}
