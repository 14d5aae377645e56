//! Messages that are no requests, and requests that make no sense.

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{Client, Key, Worker, field, map, pack, registration, tokens};

use super::Siege;

/// A map with one of its fields replaced.
fn with(value: Value, name: &str, replacement: Value) -> Value {
    let Value::Map(mut fields) = value else {
        panic!("{value} is no map");
    };
    let known = fields
        .iter_mut()
        .find(|(key, _)| key.as_str() == Some(name));
    known.unwrap_or_else(|| panic!("no field {name}")).1 = replacement;
    Value::Map(fields)
}

/// Values of which at most one or two suit any field.
fn all_kinds() -> Vec<Value> {
    vec![
        Value::Nil,
        true.into(),
        (-1).into(),
        u64::MAX.into(),
        Value::F64(f64::NAN),
        "text".into(),
        Value::Binary(vec![0; 3]),
        Value::Array(vec![Value::Nil]),
        map(&[("a", 1.into())]),
        Value::Ext(1, vec![0; 8]),
    ]
}

#[tokio::test]
async fn wrong_types_in_each_field_are_answered_and_named() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    client.call(14, &[registration(1, "m")]).await.value();
    let key = Key::new("m", &tokens(32, 1), Some(0), "r").value();
    let mut refused = 0;
    for name in [
        "model_name",
        "world_size",
        "worker_id",
        "token_ids",
        "start",
        "end",
        "request_id",
        "cache_salt",
        "request_configs",
        "num_kv_readers",
    ] {
        for value in all_kinds() {
            let sent = with(key.clone(), name, value.clone());
            if let stockade_tests::Reply::Error(error) = client.call(8, &[sent, 1.into()]).await {
                assert!(error.contains(name), "{name} = {value}: {error}");
                refused += 1;
            }
        }
    }
    for name in [
        "instance_id",
        "model_name",
        "world_size",
        "block_size",
        "num_layers",
        "hidden_dim_size",
        "dtype_str",
        "use_mla",
        "num_physical_slots",
    ] {
        for value in all_kinds() {
            let sent = with(registration(2, "m"), name, value.clone());
            if let stockade_tests::Reply::Error(error) = client.call(14, &[sent]).await {
                assert!(
                    error.contains(name) || error.contains("chunk"),
                    "{name} = {value}: {error}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 120, "only {refused} of 190 were refused");
    // Every operation, with every kind of value in place of every argument.
    for operation in (1..=33).filter(|&operation| operation != 11) {
        for value in all_kinds() {
            for count in 0..5 {
                let _ = client.call(operation, &vec![value.clone(); count]).await;
            }
        }
    }
    drop(client);
    siege.withstood("wrong types").await;
}

#[tokio::test]
async fn msgpack_that_nests_or_lies_is_refused() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    let nested = |opening: &[u8]| [&opening.repeat(100_000)[..], &[0xc0]].concat();
    let announcing = |header: &[u8]| {
        let mut key = pack(&map(&[("token_ids", Value::Nil)])).to_vec();
        key.pop();
        key.extend_from_slice(header);
        key
    };
    for (name, payload) in [
        ("arrays in arrays", nested(b"\x91")),
        ("maps in maps", nested(b"\x81\xa1a")),
        ("2^32 tokens", announcing(b"\xdd\xff\xff\xff\xff")),
        ("2^32 bytes of text", announcing(b"\xdb\xff\xff\xff\xff")),
        ("a map of 2^32 entries", b"\xdf\xff\xff\xff\xff".to_vec()),
        (
            "an extension of 4 GiB",
            announcing(b"\xc9\xff\xff\xff\xff\x01"),
        ),
        ("the byte that is never used", vec![0xc1]),
        ("two values", b"\x80\x80".to_vec()),
        (
            "a key cut short",
            pack(&Key::new("m", &[1; 16], None, "r").value())[..40].to_vec(),
        ),
    ] {
        for operation in [8, 12, 14] {
            let mut frames = vec![
                pack(&1.into()),
                pack(&operation.into()),
                payload.clone().into(),
            ];
            if operation != 14 {
                frames.push(pack(&1.into()));
            }
            client.send(frames).await;
            let reply = client.receive().await;
            let operation = rmpv::decode::read_value(&mut &reply[1][..]).unwrap();
            assert!(
                operation
                    .as_str()
                    .is_some_and(|it| it.starts_with("error: ")),
                "{name}: {operation}"
            );
        }
        siege.withstood(name).await;
    }
}

#[tokio::test]
async fn salts_with_forbidden_characters_are_refused_everywhere() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let good = Key::new("m", &tokens(16, 2), Some(0), "r");
    for salt in [
        "a@b",
        "a/b",
        "..",
        "a\\b",
        "a\0b",
        &"x".repeat(129),
        &"\u{e9}".repeat(129),
    ] {
        let key = Key {
            salt: salt.to_owned(),
            ..good.clone()
        };
        if salt == ".." {
            // Only characters are forbidden: this names a tenant, and no file.
            assert!(worker.store(&key, |_| 1).await);
            continue;
        }
        for operation in [8, 12, 16] {
            let second = if operation == 16 {
                worker.id.into()
            } else {
                Value::from(1)
            };
            let error = worker
                .client
                .call(operation, &[key.value(), second])
                .await
                .error();
            assert!(error.contains("cache_salt"), "{salt:?}: {error}");
        }
        let refused = [key.value(), worker.id.into()];
        let reply = worker.client.call(18, &refused).await.value();
        assert_eq!(field(&reply, "success"), &false.into(), "{salt:?}");
        assert_eq!(worker.client.call(19, &refused).await.value(), false.into());
    }
    // At the limit it is a salt like any other.
    let longest = Key {
        salt: "\u{e9}".repeat(128),
        ..good
    };
    assert!(worker.store(&longest, |_| 1).await);
    drop(worker);
    siege.withstood("forbidden salts").await;
}

#[tokio::test]
async fn registrations_that_cannot_be_are_refused() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    for (name, value) in [
        ("world_size", Value::from(1u64 << 31)),
        ("world_size", u64::MAX.into()),
        ("world_size", 0.into()),
        ("world_size", (-1).into()),
        ("world_size", 256.into()),
        ("num_physical_slots", 0.into()),
        ("num_physical_slots", (-16).into()),
        ("num_physical_slots", (1u64 << 62).into()),
        ("num_layers", 0.into()),
        ("num_layers", (1u64 << 40).into()),
        ("hidden_dim_size", u64::MAX.into()),
        ("dtype_str", "no_such_dtype".into()),
        ("dtype_str", "os.system".into()),
        ("model_name", "a@b".into()),
    ] {
        let refused = with(registration(2, "m"), name, value.clone());
        let error = client.call(14, &[refused]).await.error();
        assert!(error.len() > 20, "{name} = {value}: {error}");
    }
    // A lookup for 2^31 ranks of a model that is known at one rank.
    client.call(14, &[registration(1, "m")]).await.value();
    for world_size in [0u64, 2, 255, 256, 1 << 31, (1 << 32) - 1] {
        let key = with(
            Key::new("m", &tokens(32, 3), None, "r").value(),
            "world_size",
            world_size.into(),
        );
        let _ = client.call(8, &[key.clone(), 1.into()]).await;
        assert_eq!(client.call(9, &["r".into()]).await.value(), 0.into());
        let _ = client.call(12, &[key, 1.into()]).await;
    }
    let status = siege.server.json("/status").await;
    assert_eq!(status["worker_liveness"]["tracked_instances"], 2);
    drop(client);
    siege.withstood("impossible registrations").await;
}

#[tokio::test]
async fn a_request_over_the_limit_is_answered_and_the_connection_goes_on() {
    let mut siege = Siege::begin(&["--max-message-mib", "1"]).await;
    let mut client = Client::connect(&siege.server.url).await;
    let large = Bytes::from(vec![0xc4; 3 << 20]);
    for operation in [8, 17] {
        let frames = vec![
            pack(&5.into()),
            pack(&operation.into()),
            pack(&1.into()),
            large.clone(),
        ];
        client.send(frames).await;
        let reply = client.receive().await;
        assert_eq!(reply[0], pack(&5.into()));
        if operation == 17 {
            // A store that did not happen, as the type of the reply can say.
            assert_eq!(reply[1..], [pack(&operation.into()), pack(&false.into())]);
        } else {
            let error = rmpv::decode::read_value(&mut &reply[1][..]).unwrap();
            assert!(
                error.as_str().unwrap().contains("--max-message-mib"),
                "{error}"
            );
        }
        assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
    }
    siege.server.wait_for_line("commit_store from");
    drop(client);
    siege.withstood("requests over the limit").await;
}

#[tokio::test]
async fn what_clients_send_cannot_forge_log_lines() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    let forged = "m\n[2026-01-01T00:00:00Z] Stockade ERROR: all is lost\x1b[2J";
    client.call(14, &[registration(1, forged)]).await.value();
    client.call(13, &[forged.into()]).await.value();
    let key = Key::new(forged, &tokens(16, 4), Some(0), "r");
    let _ = client.call(16, &[key.value(), 2.into()]).await;
    let key = Key::new("other", &tokens(16, 4), Some(0), "r");
    let _ = client.call(16, &[key.value(), 1.into()]).await.error();
    siege.server.wait_for_line("is of model `other`");
    let log = siege.server.log();
    assert!(
        log.iter()
            .all(|line| line.contains("Stockade") && !line.contains('\x1b')),
        "{log:?}"
    );
    assert!(
        !log.iter().any(|line| line.starts_with("[2026-01-01")),
        "{log:?}"
    );
    drop(client);
    siege.withstood("forged log lines").await;
}
