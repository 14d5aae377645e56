//! Endpoints: what is bound, who may connect, and what is left behind.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use stockade_transport::{
    BindError, Config, Endpoint, ListenOptions, Listener, Outcome, PeerAddress, Server,
};

use crate::harness::*;

async fn bind(endpoint: &str) -> Result<Listener, BindError> {
    Listener::bind(&endpoint.parse().unwrap(), ListenOptions::default()).await
}

fn in_dir(dir: &tempfile::TempDir, name: &str) -> (String, std::path::PathBuf) {
    let path = dir.path().join(name);
    (format!("ipc://{}", path.display()), path)
}

#[tokio::test]
async fn ipc_peers_are_served_and_known_by_their_process() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, path) = in_dir(&dir, "s");
    let (handler, _ends) = with(|peer, message| {
        let credentials = peer.credentials().unwrap();
        assert_eq!(credentials.pid, Some(std::process::id() as i32));
        assert_eq!(credentials.uid, rustix::process::getuid().as_raw());
        assert_eq!(&**peer.listener(), "local");
        assert!(matches!(peer.address(), PeerAddress::Ipc(_)));
        Outcome::Reply(echo(message))
    });
    let options = ListenOptions {
        name: "local".into(),
        ..ListenOptions::default()
    };
    let server = TestServer::listen(&endpoint, options, Config::default(), handler).await;
    let mut dealer = server.dealer().await;
    for len in [0, 10, 1 << 20] {
        let payload = vec![3; len];
        assert_eq!(
            call(&mut dealer, &[b"u", &payload]).await,
            [&b"u"[..], &payload]
        );
    }
    drop(dealer);
    soon(server.stop()).await.unwrap();
    assert!(!path.exists(), "the socket file outlived its server");
}

#[tokio::test]
async fn the_user_of_a_tcp_peer_of_this_machine_is_known() {
    let (handler, _ends) = with(|peer, message| {
        assert_eq!(peer.credentials(), None);
        let me = rustix::process::getuid().as_raw();
        assert_eq!(peer.local_user(), Some(me));
        Outcome::Reply(echo(message))
    });
    let options = ListenOptions::default();
    let server = TestServer::listen("tcp://127.0.0.1:0", options, Config::default(), handler).await;
    let mut dealer = server.dealer().await;
    assert_eq!(call(&mut dealer, &[b"u", b"x"]).await, [&b"u"[..], b"x"]);
    drop(dealer);
    soon(server.stop()).await.unwrap();
}

#[tokio::test]
async fn the_socket_file_has_the_mode_asked_for_and_never_more_than_0660() {
    let dir = tempfile::tempdir().unwrap();
    for (asked, given) in [(0o600, 0o600), (0o660, 0o660), (0o777, 0o660)] {
        let (endpoint, path) = in_dir(&dir, "s");
        let options = ListenOptions {
            ipc_mode: asked,
            ..ListenOptions::default()
        };
        let listener = Listener::bind(&endpoint.parse().unwrap(), options)
            .await
            .unwrap();
        let mode = path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, given, "{mode:o}");
        drop(listener);
    }
}

#[tokio::test]
async fn a_dead_socket_file_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, path) = in_dir(&dir, "s");
    // A standard listener leaves its file behind, as a killed server does.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = bind(&endpoint).await.unwrap();
    let error = bind(&endpoint).await.unwrap_err();
    assert!(matches!(error, BindError::PathInUse(_)));
    assert!(error.to_string().contains(&endpoint));

    // Another server's file in the same place is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(live);
    assert!(path.exists());
    drop(other);
}

#[tokio::test]
async fn what_cannot_be_bound_is_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, path) = in_dir(&dir, "file");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(
        bind(&endpoint).await,
        Err(BindError::NotASocket(_))
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let (endpoint, _) = in_dir(&dir, &"x".repeat(120));
    assert!(matches!(
        bind(&endpoint).await,
        Err(BindError::PathTooLong(_))
    ));
    let missing = in_dir(&dir, "no/s").0;
    assert!(matches!(bind(&missing).await, Err(BindError::Io { .. })));

    let taken = bind("tcp://127.0.0.1:0").await.unwrap();
    let error = bind(&taken.endpoint().to_string()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "another server listens on {}: stop it or choose --port",
            taken.endpoint()
        )
    );
    assert!(matches!(
        bind("tcp://192.0.2.1:0").await,
        Err(BindError::NotLocal(_))
    ));
    assert!(matches!(
        bind("tcp://host.invalid:0").await,
        Err(BindError::Resolve { .. })
    ));
}

#[tokio::test]
async fn one_server_serves_many_listeners() {
    let dir = tempfile::tempdir().unwrap();
    let mut listeners = Vec::new();
    for endpoint in ["tcp://localhost:0", "tcp://*:0", &in_dir(&dir, "s").0] {
        listeners.push(bind(endpoint).await.unwrap());
    }
    if let Ok(v6) = bind("tcp://[::1]:0").await {
        listeners.push(v6);
    }
    let endpoints: Vec<_> = listeners.iter().map(|l| l.endpoint().clone()).collect();
    let server = Server::new(Arc::new(Echo), Config::default()).unwrap();
    let serving = tokio::spawn(server.serve(listeners, std::future::pending()));
    for endpoint in endpoints {
        let reachable = match endpoint {
            Endpoint::Tcp { host, port } if host == "0.0.0.0" => Endpoint::Tcp {
                host: "127.0.0.1".into(),
                port,
            },
            other => other,
        };
        let mut dealer = zeromq::DealerSocket::new();
        use zeromq::Socket;
        soon(dealer.connect(&reachable.to_string())).await.unwrap();
        assert_eq!(call(&mut dealer, &[b"hi"]).await, [&b"hi"[..]]);
    }
    serving.abort();
}
