//! Bytes that are no ZMTP, and ZMTP that is no message.

use std::time::Duration;

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{Client, PATIENCE, pack};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Siege, closed_by_server, handshake, raw};

#[tokio::test]
async fn bytes_that_are_no_zmtp_end_their_connection() {
    let mut siege = Siege::begin(&[]).await;
    for (name, bytes) in [
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        (
            "TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        ),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("ZMTP 1", vec![0x01, 0x00]),
        ("unknown flags", [&handshake()[..], &[0xf8, 1, 1]].concat()),
        (
            "a lying command",
            [&handshake()[..], b"\x04\x05\xffXXXX"].concat(),
        ),
        ("an empty command", [&handshake()[..], b"\x04\x00"].concat()),
        (
            "a command before READY",
            [&handshake()[..64], b"\x04\x05\x04PING"].concat(),
        ),
    ] {
        let mut stream = raw(&siege.server, &bytes).await;
        closed_by_server(&mut stream).await;
        siege.withstood(name).await;
    }
}

#[tokio::test]
async fn lengths_are_believed_only_as_bytes_arrive() {
    let mut siege = Siege::begin(&[]).await;
    for (name, length) in [
        ("1 GiB announced", 1u64 << 30),
        ("1 TiB announced", 1 << 40),
        ("8 EiB announced", 1 << 63),
        ("16 EiB announced", u64::MAX),
    ] {
        let mut bytes = handshake();
        bytes.push(0x02);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&[0; 1000]);
        let _stream = raw(&siege.server, &bytes).await;
        siege.withstood(name).await;
    }
}

#[tokio::test]
async fn messages_of_one_frame_two_frames_and_empty_frames_are_survived() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    let uid = pack(&1.into());
    for (name, frames) in [
        ("one empty frame", vec![Bytes::new()]),
        ("two empty frames", vec![Bytes::new(); 2]),
        ("three empty frames", vec![Bytes::new(); 3]),
        ("one frame", vec![uid.clone()]),
        ("a control frame alone", vec![uid.clone(), Bytes::new()]),
        (
            "a control frame of nobody",
            vec![uid.clone(), Bytes::new(), "ack".into()],
        ),
        (
            "an unknown control frame",
            vec![uid.clone(), Bytes::new(), "nack".into()],
        ),
        (
            "a uid that is no msgpack",
            vec![Bytes::from_static(b"\xc1"), pack(&24.into())],
        ),
    ] {
        // None of these has an address or is waited for: silence is right, and so is going on.
        client.send(frames).await;
        assert_eq!(
            client.call(24, &[]).await.value(),
            Value::from("OK"),
            "{name}"
        );
        siege.withstood(name).await;
    }
    for (name, frames) in [
        ("two frames", vec![uid.clone(), pack(&8.into())]),
        (
            "an operation that is no msgpack",
            vec![uid.clone(), Bytes::from_static(b"\xc1")],
        ),
        (
            "a payload that is empty",
            vec![uid.clone(), pack(&22.into()), Bytes::new()],
        ),
    ] {
        client.send(frames).await;
        let reply = client.receive().await;
        assert_eq!(reply[0], uid, "{name}");
        let operation = rmpv::decode::read_value(&mut &reply[1][..]).unwrap();
        assert!(
            operation.as_str().unwrap().starts_with("error: "),
            "{name}: {operation}"
        );
        siege.withstood(name).await;
    }
}

#[tokio::test]
async fn a_message_of_too_many_frames_is_answered_and_the_connection_goes_on() {
    let mut siege = Siege::begin(&[]).await;
    let mut bytes = handshake();
    bytes.extend_from_slice(b"\x01\x01\x07\x01\x01\x18");
    bytes.extend(b"\x01\x01x".repeat(1_000_000));
    bytes.extend_from_slice(b"\x00\x00\x01\x01\x09\x00\x01\x18");
    let mut stream = raw(&siege.server, &bytes).await;
    let mut answer = Vec::new();
    // The reply to the noop after it ends the exchange.
    let read = async {
        while !answer.ends_with(b"\x01\x01\x09\x01\x01\x18\x00\x03\xa2OK") {
            let mut buffer = [0; 4096];
            let read = stream.read(&mut buffer).await.unwrap();
            assert!(read > 0, "the connection ended: {answer:?}");
            answer.extend_from_slice(&buffer[..read]);
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap();
    let says = |text: &[u8]| answer.windows(text.len()).any(|part| part == text);
    assert!(says(b"error: the message has too many frames"));
    drop(stream);
    siege.withstood("a million frames").await;
}

#[tokio::test]
async fn endless_handshakes_end() {
    let mut siege = Siege::begin(&[]).await;
    let greeting = handshake();
    let mut streams = Vec::new();
    for cut in 0..200 {
        streams.push(raw(&siege.server, &greeting[..cut % 90]).await);
    }
    siege.withstood("200 handshakes that stop half-way").await;
    // One that goes on, a byte at a time, for as long as it may.
    let mut slow = raw(&siege.server, &[]).await;
    let mut sent = 0;
    while let Some(byte) = greeting.get(sent..=sent) {
        if slow.write_all(byte).await.is_err() {
            break;
        }
        sent += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    closed_by_server(&mut slow).await;
    // The handshake timeout is five seconds, and no byte prolongs it.
    for stream in &mut streams {
        closed_by_server(stream).await;
    }
    siege
        .server
        .metric_becomes("stockade_connections_open", |open| open == 0.0)
        .await;
    siege.withstood("a handshake of one byte at a time").await;
}
