//! CURVE with a client by hand: what is proven, and what is noticed. `libzmq.rs` has the real one.

use std::sync::Arc;
use std::time::Duration;

use crypto_box::aead::{Aead, Payload};
use crypto_box::{Nonce, PublicKey, SalsaBox, SecretKey};
use stockade_transport::{
    Authenticator, Config, Curve, Limits, ListenOptions, Mechanism, Message, Outcome, Principal,
};

use crate::harness::*;

const SERVER: [u8; 32] = [7; 32];
const ANN: [u8; 32] = [9; 32];
const EVE: [u8; 32] = [11; 32];

const LIMITS: Limits = Limits {
    max_frame_bytes: 1000,
    max_message_bytes: 1500,
    max_frames: 3,
    skip_factor: 4,
};

struct Keys;

impl Authenticator for Keys {
    fn curve(&self, public_key: &[u8; 32]) -> Option<Principal> {
        (*public_key == *public(ANN).as_bytes()).then(|| Principal::new("ann"))
    }
}

fn public(secret: [u8; 32]) -> PublicKey {
    SecretKey::from(secret).public_key()
}

fn nonce(prefix: &[u8], rest: &[u8]) -> Nonce {
    Nonce::from(<[u8; 24]>::try_from([prefix, rest].concat()).unwrap())
}

fn seal(with: &SalsaBox, nonce: &Nonce, plain: &[u8]) -> Vec<u8> {
    with.encrypt(nonce, Payload::from(plain)).unwrap()
}

/// Echoes, and adds who asked.
async fn server() -> TestServer {
    let (handler, _ends) = with(|peer, message| {
        let name = peer.principal().unwrap().name().to_owned();
        let mut frames = match message {
            Message::Frames(frames) => frames,
            Message::TooLarge {
                mut frames_before, ..
            } => {
                frames_before.push("too large".into());
                frames_before
            }
        };
        frames.push(name.into());
        Outcome::Reply(frames)
    });
    let options = ListenOptions {
        mechanism: Mechanism::Curve(Arc::new(Curve::new(SERVER, Arc::new(Keys)))),
        ..ListenOptions::default()
    };
    let config = Config {
        // So long that only what the peer did can have ended its connection.
        handshake_timeout: Duration::from_secs(600),
        limits: LIMITS,
        ..Config::default()
    };
    TestServer::listen("tcp://127.0.0.1:0", options, config, handler).await
}

/// What may be wrong with a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    HelloIsForAnotherServer,
    CookieIsNotTheServers,
    /// The public key of somebody whose secret key the client does not have.
    KeyIsAnothers,
    KeyIsUnknown,
    /// A vouch that the one with the key gave for another connection.
    VouchIsForAnotherKey,
    SocketTypeIsSub,
}

struct Client {
    raw: Raw,
    between: SalsaBox,
    sent: u64,
}

impl Client {
    /// `None` if the server ended the connection.
    async fn connect(server: &TestServer, wrong: Wrong) -> Option<Self> {
        let mut raw = server.raw().await;
        raw.send(&greeting(1, "CURVE")).await;
        let greeting = raw.read_greeting().await;
        assert_eq!((&greeting[12..18], greeting[32]), (&b"CURVE\0"[..], 1));

        let known = match wrong {
            Wrong::HelloIsForAnotherServer => public(EVE),
            _ => public(SERVER),
        };
        let own = SecretKey::from([21; 32]);
        let short = 1_u64.to_be_bytes();
        let boxed = seal(
            &SalsaBox::new(&known, &own),
            &nonce(b"CurveZMQHELLO---", &short),
            &[0; 64],
        );
        let mut hello = b"\x05HELLO\x01\0".to_vec();
        hello.extend([0; 72]);
        hello.extend(own.public_key().as_bytes());
        hello.extend(short);
        hello.extend(boxed);
        assert_eq!(hello.len(), 200);
        raw.send(&command(&hello)).await;
        let Received::Command(welcome) = raw.receive().await else {
            return None;
        };
        assert_eq!((welcome.len(), &welcome[..8]), (168, &b"\x07WELCOME"[..]));
        let plain = SalsaBox::new(&public(SERVER), &own)
            .decrypt(&nonce(b"WELCOME-", &welcome[8..24]), &welcome[24..])
            .unwrap();
        let their = PublicKey::from(<[u8; 32]>::try_from(&plain[..32]).unwrap());
        let mut cookie = plain[32..].to_vec();
        cookie[5] ^= u8::from(wrong == Wrong::CookieIsNotTheServers);

        let (shown, held) = match wrong {
            Wrong::KeyIsAnothers => (ANN, EVE),
            Wrong::KeyIsUnknown => (EVE, EVE),
            _ => (ANN, ANN),
        };
        let mut vouch = own.public_key().as_bytes().to_vec();
        vouch[3] ^= u8::from(wrong == Wrong::VouchIsForAnotherKey);
        vouch.extend(public(SERVER).as_bytes());
        let vouch_nonce = [3; 16];
        let mut plain = public(shown).as_bytes().to_vec();
        plain.extend(vouch_nonce);
        plain.extend(seal(
            &SalsaBox::new(&their, &SecretKey::from(held)),
            &nonce(b"VOUCH---", &vouch_nonce),
            &vouch,
        ));
        let socket_type = match wrong {
            Wrong::SocketTypeIsSub => "SUB",
            _ => "DEALER",
        };
        // Without its frame's header and its name.
        plain.extend(&metadata(b"READY", socket_type)[8..]);
        let between = SalsaBox::new(&their, &own);
        let short = 2_u64.to_be_bytes();
        let mut initiate = b"\x08INITIATE".to_vec();
        initiate.extend(cookie);
        initiate.extend(short);
        initiate.extend(seal(&between, &nonce(b"CurveZMQINITIATE", &short), &plain));
        let mut frame = vec![6];
        frame.extend((initiate.len() as u64).to_be_bytes());
        frame.extend(initiate);
        raw.send(&frame).await;
        let Received::Command(ready) = raw.receive().await else {
            return None;
        };
        if ready.starts_with(b"\x05ERROR") {
            raw.expect_end().await;
            return None;
        }
        assert!(ready.starts_with(b"\x05READY"));
        let plain = between
            .decrypt(&nonce(b"CurveZMQREADY---", &ready[6..14]), &ready[14..])
            .unwrap();
        assert!(plain.ends_with(b"ROUTER"));
        Some(Self {
            raw,
            between,
            sent: 2,
        })
    }

    /// The body of a `MESSAGE`, with the next nonce.
    fn sealed(&mut self, flags: u8, payload: &[u8]) -> Vec<u8> {
        self.sent += 1;
        let short = self.sent.to_be_bytes();
        let mut body = b"\x07MESSAGE".to_vec();
        body.extend(short);
        let plain = [&[flags], payload].concat();
        let nonce = nonce(b"CurveZMQMESSAGEC", &short);
        body.extend(seal(&self.between, &nonce, &plain));
        body
    }

    async fn send(&mut self, frames: &[&[u8]]) {
        for (at, frame) in frames.iter().enumerate() {
            let body = self.sealed(u8::from(at + 1 < frames.len()), frame);
            self.raw.send(&message(&[&body])).await;
        }
    }

    async fn expect(&mut self, frames: &[&[u8]]) {
        for (at, frame) in frames.iter().enumerate() {
            let Received::Message(sealed) = self.raw.receive().await else {
                panic!("the connection has ended");
            };
            assert_eq!(sealed.len(), 1);
            let body = &sealed[0];
            assert!(body.starts_with(b"\x07MESSAGE"));
            let nonce = nonce(b"CurveZMQMESSAGES", &body[8..16]);
            let plain = self.between.decrypt(&nonce, &body[16..]).unwrap();
            assert_eq!(plain[0], u8::from(at + 1 < frames.len()));
            assert_eq!(&plain[1..], *frame);
        }
    }

    /// It still answers, or has ended.
    async fn expect_end(mut self) {
        self.raw.expect_end().await;
    }
}

#[tokio::test]
async fn who_has_the_key_gets_in_and_reads_and_writes() {
    let server = server().await;
    let mut client = Client::connect(&server, Wrong::Nothing).await.unwrap();
    for frames in [&[&b"a"[..], b""][..], &[&[5; 900]], &[b"", b"b"]] {
        client.send(frames).await;
        let mut answer = frames.to_vec();
        answer.push(b"ann");
        client.expect(&answer).await;
    }
}

#[tokio::test]
async fn nobody_else_gets_in() {
    let server = server().await;
    for (at, wrong) in [
        Wrong::HelloIsForAnotherServer,
        Wrong::CookieIsNotTheServers,
        Wrong::KeyIsAnothers,
        Wrong::KeyIsUnknown,
        Wrong::VouchIsForAnotherKey,
        Wrong::SocketTypeIsSub,
    ]
    .into_iter()
    .enumerate()
    {
        assert!(Client::connect(&server, wrong).await.is_none(), "{wrong:?}");
        let count = at as u64 + 1;
        until("counted", || server.stats.handshake_failures() == count).await;
    }
    assert_eq!(server.stats.messages_in(), 0);
    assert!(Client::connect(&server, Wrong::Nothing).await.is_some());
}

#[tokio::test]
async fn curve_cannot_be_skipped() {
    let server = server().await;
    let mut as_server = greeting(1, "CURVE");
    as_server[32] = 1;
    let mut long = b"\x05HELLO\x01\0".to_vec();
    long.extend([0; 193]);
    for (greeting, then) in [
        (greeting(1, "NULL"), metadata(b"READY", "DEALER")),
        (greeting(1, "PLAIN"), command(b"\x05HELLO\x03ann\x01x")),
        (greeting(1, "CURVE"), metadata(b"READY", "DEALER")),
        (greeting(1, "CURVE"), metadata(b"INITIATE", "DEALER")),
        (greeting(1, "CURVE"), command(b"\x05HELLO\x03ann\x01x")),
        (greeting(1, "CURVE"), command(&long[..200])),
        (greeting(1, "CURVE"), command(&long)),
        (greeting(1, "CURVE"), command(b"")),
        (greeting(1, "CURVE"), message(&[b"now"])),
        (as_server, vec![]),
    ] {
        let mut raw = server.raw().await;
        raw.send(&greeting).await;
        // The server may have closed already.
        let _ = raw.0.try_write(&then);
        raw.read_greeting().await;
        raw.expect_end().await;
    }
    until("counted", || server.stats.handshake_failures() == 10).await;
    assert_eq!(server.stats.messages_in(), 0);
}

#[tokio::test]
async fn what_was_changed_repeated_or_not_sealed_ends_the_connection() {
    let server = server().await;
    type Spoil = fn(&mut Client) -> Vec<u8>;
    let spoils: [Spoil; 8] = [
        |client| {
            let mut body = client.sealed(0, b"changed");
            *body.last_mut().unwrap() ^= 1;
            message(&[&body])
        },
        |client| {
            let body = client.sealed(0, b"repeated");
            client.sent -= 2;
            let older = client.sealed(0, b"older");
            [message(&[&body]), message(&[&older])].concat()
        },
        |_| message(&[b"not sealed"]),
        |_| command(b"\x04PING\0\0"),
        // Flags that are not defined, and a command that goes on.
        |client| message(&[&client.sealed(4, b"")]),
        |client| message(&[&client.sealed(3, b"\x04PING\0\0")]),
        // Two frames of the stream that claim to be one message.
        |client| {
            let body = client.sealed(0, b"a");
            message(&[&body, &body])
        },
        |_| message(&[b"\x07MESSAGE"]),
    ];
    for (at, spoil) in spoils.into_iter().enumerate() {
        let mut client = Client::connect(&server, Wrong::Nothing).await.unwrap();
        client.send(&[b"before"]).await;
        client.expect(&[b"before", b"ann"]).await;
        let bytes = spoil(&mut client);
        client.raw.send(&bytes).await;
        if at == 1 {
            client.expect(&[b"repeated", b"ann"]).await;
        }
        client.expect_end().await;
    }
    assert_eq!(server.stats.messages_in(), 9);
}

#[tokio::test]
async fn messages_over_the_limits_are_answered() {
    let server = server().await;
    let mut client = Client::connect(&server, Wrong::Nothing).await.unwrap();
    for frames in [
        &[&b"uid"[..], &[1; 900], &[1; 900], b"tail"][..],
        &[b"uid", b"", b"", b"", b""],
    ] {
        client.send(frames).await;
        let mut answer = frames[..frames.len().min(3)].to_vec();
        if frames[1].len() == 900 {
            answer.pop();
        }
        answer.extend([&b"too large"[..], b"ann"]);
        client.expect(&answer).await;
        client.send(&[b"next"]).await;
        client.expect(&[b"next", b"ann"]).await;
    }
    // One that is skipped for ever.
    let mut endless = Client::connect(&server, Wrong::Nothing).await.unwrap();
    for _ in 0..4 {
        let body = endless.sealed(1, &[1; 900]);
        endless.raw.send(&message(&[&body])).await;
    }
    endless.expect(&[&[1; 900], b"too large", b"ann"]).await;
    for _ in 0..5 {
        let body = endless.sealed(1, &[1; 900]);
        // The server may have closed already.
        let _ = endless.raw.0.try_write(&message(&[&body]));
    }
    endless.expect_end().await;
    // Of a frame that is too long to be opened, nobody knows whether its message goes on.
    let mut client = Client::connect(&server, Wrong::Nothing).await.unwrap();
    client.send(&[b"uid", &[1; 1001]]).await;
    client.expect(&[b"uid", b"too large", b"ann"]).await;
    client.expect_end().await;
}

/// Each frame of it is whole for the stream; it is the message that has begun and does not end.
#[tokio::test]
async fn a_message_that_does_not_end_is_not_waited_for() {
    let (handler, _ends) = with(|_, _| Outcome::Nothing);
    let options = ListenOptions {
        mechanism: Mechanism::Curve(Arc::new(Curve::new(SERVER, Arc::new(Keys)))),
        ..ListenOptions::default()
    };
    let config = Config {
        message_timeout: Duration::from_millis(200),
        ..Config::default()
    };
    let server = TestServer::listen("tcp://127.0.0.1:0", options, config, handler).await;
    let mut client = Client::connect(&server, Wrong::Nothing).await.unwrap();
    let body = client.sealed(1, b"and");
    client.raw.send(&message(&[&body])).await;
    client.expect_end().await;
    assert_eq!(server.stats.disconnects("message_timeout"), 1);
}
