//! A server on a free port, and a raw client that writes ZMTP by hand.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stockade_transport::{
    Config, DisconnectReason, Endpoint, Frames, Handler, ListenOptions, Listener, Message, Outcome,
    Peer, Server, Stats,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Far longer than anything should take; a test that gets here has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Fails the test instead of hanging it.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("nothing happened for 20 s")
}

/// Waits for a condition that another task brings about.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "never happened: {what}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Answers each message with itself, and one that is too large with what came
/// before the limit and `too large`.
pub(crate) struct Echo;

impl Handler for Echo {
    fn message(&self, _: &Arc<Peer>, message: Message) -> Outcome {
        Outcome::Reply(echo(message))
    }
}

pub(crate) fn echo(message: Message) -> Frames {
    match message {
        Message::Frames(frames) => frames,
        Message::TooLarge {
            mut frames_before, ..
        } => {
            frames_before.push(Bytes::from_static(b"too large"));
            frames_before
        }
    }
}

/// Calls a closure for each message, and tells of every end.
pub(crate) struct With<F> {
    on_message: F,
    ends: mpsc::UnboundedSender<DisconnectReason>,
}

pub(crate) fn with<F>(on_message: F) -> (With<F>, mpsc::UnboundedReceiver<DisconnectReason>)
where
    F: Fn(&Arc<Peer>, Message) -> Outcome + Send + Sync + 'static,
{
    let (ends, ended) = mpsc::unbounded_channel();
    (With { on_message, ends }, ended)
}

impl<F: Fn(&Arc<Peer>, Message) -> Outcome + Send + Sync + 'static> Handler for With<F> {
    fn message(&self, peer: &Arc<Peer>, message: Message) -> Outcome {
        (self.on_message)(peer, message)
    }

    fn disconnected(&self, _: &Arc<Peer>, reason: DisconnectReason) {
        let _ = self.ends.send(reason);
    }
}

pub(crate) struct TestServer {
    pub(crate) endpoint: Endpoint,
    pub(crate) stats: Arc<Stats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl TestServer {
    pub(crate) async fn echo(config: Config) -> Self {
        Self::start(config, Echo).await
    }

    pub(crate) async fn start(config: Config, handler: impl Handler) -> Self {
        Self::listen(
            "tcp://127.0.0.1:0",
            ListenOptions::default(),
            config,
            handler,
        )
        .await
    }

    pub(crate) async fn listen(
        endpoint: &str,
        options: ListenOptions,
        config: Config,
        handler: impl Handler,
    ) -> Self {
        let server = Server::new(handler, config).unwrap();
        Self::serve(endpoint, options, server).await
    }

    pub(crate) async fn serve(
        endpoint: &str,
        options: ListenOptions,
        server: Server<impl Handler>,
    ) -> Self {
        let listener = Listener::bind(&endpoint.parse().unwrap(), options)
            .await
            .unwrap();
        let endpoint = listener.endpoint().clone();
        let stats = server.stats();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.serve(vec![listener], async {
            let _ = stopped.await;
        }));
        Self {
            endpoint,
            stats,
            stop,
            task,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        match &self.endpoint {
            Endpoint::Tcp { host, port } => format!("{host}:{port}").parse().unwrap(),
            Endpoint::Ipc(_) => panic!("not a TCP server"),
        }
    }

    /// A DEALER of an independent implementation.
    pub(crate) async fn dealer(&self) -> DealerSocket {
        let mut dealer = DealerSocket::new();
        soon(dealer.connect(&self.endpoint.to_string()))
            .await
            .unwrap();
        dealer
    }

    pub(crate) async fn raw(&self) -> Raw {
        Raw(TcpStream::connect(self.address()).await.unwrap())
    }

    /// Starts to stop; returns what ends when it has stopped.
    pub(crate) fn stop(self) -> JoinHandle<()> {
        let _ = self.stop.send(());
        self.task
    }

    /// The server is well: a new client gets its answer.
    pub(crate) async fn answers_a_fresh_client(&self) {
        let mut dealer = self.dealer().await;
        assert_eq!(call(&mut dealer, &[b"well?"]).await, [&b"well?"[..]]);
    }
}

pub(crate) async fn send(dealer: &mut DealerSocket, frames: &[&[u8]]) {
    let frames: Vec<Bytes> = frames.iter().map(|f| Bytes::copy_from_slice(f)).collect();
    let message = ZmqMessage::try_from(frames).unwrap();
    soon(dealer.send(message)).await.unwrap();
}

pub(crate) async fn receive(dealer: &mut DealerSocket) -> Vec<Bytes> {
    soon(dealer.recv()).await.unwrap().into_vec()
}

pub(crate) async fn call(dealer: &mut DealerSocket, frames: &[&[u8]]) -> Vec<Bytes> {
    send(dealer, frames).await;
    receive(dealer).await
}

/// A TCP connection on which ZMTP is written and read by hand.
pub(crate) struct Raw(pub(crate) TcpStream);

/// What a raw client receives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Message(Vec<Vec<u8>>),
    Command(Vec<u8>),
    /// The server closed the connection, in order or by a reset.
    End,
}

pub(crate) fn greeting(minor: u8, mechanism: &str) -> [u8; 64] {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, minor);
    greeting[12..12 + mechanism.len()].copy_from_slice(mechanism.as_bytes());
    greeting
}

pub(crate) fn command(body: &[u8]) -> Vec<u8> {
    let mut frame = vec![4, u8::try_from(body.len()).unwrap()];
    frame.extend_from_slice(body);
    frame
}

pub(crate) fn metadata(name: &[u8], socket_type: &str) -> Vec<u8> {
    let mut body = vec![name.len() as u8];
    body.extend_from_slice(name);
    body.extend_from_slice(b"\x0bSocket-Type");
    body.extend_from_slice(&(socket_type.len() as u32).to_be_bytes());
    body.extend_from_slice(socket_type.as_bytes());
    command(&body)
}

pub(crate) fn message(frames: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, frame) in frames.iter().enumerate() {
        bytes.push(2 | u8::from(at + 1 < frames.len()));
        bytes.extend_from_slice(&(frame.len() as u64).to_be_bytes());
        bytes.extend_from_slice(frame);
    }
    bytes
}

impl Raw {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        soon(self.0.write_all(bytes)).await.unwrap();
    }

    /// Greets as ZMTP 3.`minor` and becomes a DEALER without security.
    pub(crate) async fn handshake(&mut self, minor: u8) {
        self.send(&greeting(minor, "NULL")).await;
        self.send(&metadata(b"READY", "DEALER")).await;
        self.read_greeting().await;
        let Received::Command(ready) = self.receive().await else {
            panic!("not READY");
        };
        assert!(ready.starts_with(b"\x05READY\x0bSocket-Type\0\0\0\x06ROUTER"));
    }

    pub(crate) async fn read_greeting(&mut self) -> [u8; 64] {
        let mut greeting = [0; 64];
        soon(self.0.read_exact(&mut greeting)).await.unwrap();
        greeting
    }

    pub(crate) async fn receive(&mut self) -> Received {
        let mut frames = Vec::new();
        loop {
            let Some((flags, payload)) = soon(self.frame()).await else {
                return Received::End;
            };
            if flags & 4 != 0 {
                return Received::Command(payload);
            }
            frames.push(payload);
            if flags & 1 == 0 {
                return Received::Message(frames);
            }
        }
    }

    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let flags = self.0.read_u8().await.ok()?;
        let len = if flags & 2 != 0 {
            self.0.read_u64().await.ok()?
        } else {
            u64::from(self.0.read_u8().await.ok()?)
        };
        let mut payload = vec![0; usize::try_from(len).unwrap()];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((flags, payload))
    }

    pub(crate) async fn expect_message(&mut self, frames: &[&[u8]]) {
        let frames = frames.iter().map(|frame| frame.to_vec()).collect();
        assert_eq!(self.receive().await, Received::Message(frames));
    }

    pub(crate) async fn expect_end(&mut self) {
        assert_eq!(self.receive().await, Received::End);
    }
}
