//! The end of a server.

use std::sync::Arc;
use std::time::Duration;

use stockade_transport::{Config, ListenOptions, Listener, Outcome, Server};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::harness::*;

#[tokio::test]
async fn requests_in_flight_are_answered_before_the_end() {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let (handler, mut ends) = with(move |_, message| {
        let gate = Arc::clone(&gate);
        Outcome::Later(Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Some(echo(message))
        }))
    });
    let server = TestServer::start(Config::default(), handler).await;
    let (address, stats) = (server.address(), Arc::clone(&server.stats));
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    let payload = vec![5; 1 << 20];
    raw.send(&message(&[b"uid", &payload])).await;
    until("received", || stats.messages_in() == 1).await;
    let stopped = server.stop();
    soon(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // What comes after the stop is not read.
    raw.send(&message(&[b"late"])).await;
    opened.add_permits(2);
    raw.expect_message(&[b"uid", &payload]).await;
    raw.expect_end().await;
    drop(raw);
    soon(stopped).await.unwrap();
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "shutdown");
    assert_eq!((stats.messages_in(), stats.connections_open()), (1, 0));
}

#[tokio::test]
async fn what_does_not_finish_is_dropped_after_the_grace() {
    struct Held(tokio::sync::mpsc::UnboundedSender<()>);
    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }
    let (dropped, mut drops) = tokio::sync::mpsc::unbounded_channel();
    let (handler, mut ends) = with(move |_, _| {
        let held = Held(dropped.clone());
        Outcome::Later(Box::pin(async move {
            let _held = held;
            std::future::pending().await
        }))
    });
    let config = Config {
        drain_grace: Duration::from_millis(200),
        ..Config::default()
    };
    let server = TestServer::start(config, handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(&message(&[b"waits for ever"])).await;
    until("received", || server.stats.messages_in() == 1).await;
    soon(server.stop()).await.unwrap();
    soon(drops.recv()).await.unwrap();
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "shutdown");
}

#[tokio::test]
async fn idle_silent_and_half_greeted_connections_do_not_hold_the_end_up() {
    let config = Config {
        drain_grace: Duration::from_secs(600),
        handshake_timeout: Duration::from_secs(600),
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let mut idle = server.raw().await;
    idle.handshake(1).await;
    let silent = server.raw().await;
    let mut half = server.raw().await;
    half.send(&greeting(1, "NULL")[..20]).await;
    let dealer = server.dealer().await;
    until("four open", || server.stats.connections_open() == 4).await;
    soon(server.stop()).await.unwrap();
    drop((idle, silent, half, dealer));
}

#[tokio::test]
async fn a_server_dropped_without_a_word_closes_its_connections() {
    let endpoint = "tcp://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&endpoint, ListenOptions::default())
        .await
        .unwrap();
    let address = listener.endpoint().to_string().replace("tcp://", "");
    let server = Server::new(Echo, Config::default()).unwrap();
    let stats = server.stats();
    let serving = tokio::spawn(server.serve(vec![listener], std::future::pending()));
    let mut raw = Raw(TcpStream::connect(address).await.unwrap());
    raw.handshake(1).await;
    serving.abort();
    raw.expect_end().await;
    drop(raw);
    until("closed", || stats.connections_open() == 0).await;
    assert_eq!(stats.disconnects("shutdown"), 1);
}
