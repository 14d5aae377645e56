//! Too few file descriptors. A process of its own: the limit holds for all of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stockade_transport::{
    Config, Handler, ListenOptions, Listener, Message, Outcome, Peer, Server,
};
use tokio::net::TcpStream;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend};

struct Echo;

impl Handler for Echo {
    fn message(&self, _: &Arc<Peer>, message: Message) -> Outcome {
        match message {
            Message::Frames(frames) => Outcome::Reply(frames),
            Message::TooLarge { .. } => Outcome::Nothing,
        }
    }
}

fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[tokio::test]
async fn accepting_goes_on_once_there_are_files_again() {
    let endpoint = "tcp://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&endpoint, ListenOptions::default())
        .await
        .unwrap();
    let endpoint = listener.endpoint().to_string();
    let address = endpoint.trim_start_matches("tcp://").to_owned();
    let server = Server::new(Echo, Config::default()).unwrap();
    let stats = server.stats();
    let serving = tokio::spawn(server.serve(vec![listener], std::future::pending()));

    // Sockets for the clients first; then nothing is left for the server's side.
    let mut sockets: Vec<_> = (0..20)
        .map(|_| tokio::net::TcpSocket::new_v4().unwrap())
        .collect();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let before = getrlimit(Resource::Nofile);
    let few = Rlimit {
        current: Some(open + 4),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, few).unwrap();
    let mut clients = Vec::new();
    while let Some(socket) = sockets.pop() {
        clients.push(socket.connect(address.parse().unwrap()).await.unwrap());
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while stats.accept_errors() < 3 {
        assert!(tokio::time::Instant::now() < deadline, "no accept failed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Time must pass here: the test is that little happens in it.
    let (errors, cpu) = (stats.accept_errors(), thread_cpu());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(stats.accept_errors() - errors < 20, "accept spins");
    assert!(thread_cpu() - cpu < Duration::from_millis(200));

    setrlimit(Resource::Nofile, before).unwrap();
    let answered = async {
        let mut dealer = DealerSocket::new();
        dealer.connect(&endpoint).await.unwrap();
        dealer.send("well?".into()).await.unwrap();
        dealer.recv().await.unwrap()
    };
    let reply = tokio::time::timeout(Duration::from_secs(20), answered)
        .await
        .expect("accepting did not go on");
    assert_eq!(reply.into_vec(), [&b"well?"[..]]);
    drop::<Vec<TcpStream>>(clients);
    serving.abort();
}
