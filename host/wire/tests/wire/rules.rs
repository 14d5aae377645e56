//! What is refused and how it is said.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use stockade_wire::{
    CacheKey, DecodeError, Dtype, Envelope, Limits, Operation, Rejected, Request, decode,
    error_reply,
};

use crate::hostile::{Field, key_frame};
use crate::packed_str;

fn request(frames: &[&[u8]]) -> Result<(Envelope, Request), Rejected> {
    let frames = frames
        .iter()
        .map(|frame| Bytes::copy_from_slice(frame))
        .collect();
    decode(frames, &Limits::default())
}

fn lookup_with(limits: &Limits, key: Bytes) -> Result<CacheKey, DecodeError> {
    let frames = vec![
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"\x08"),
        key,
        Bytes::from_static(b"\x01"),
    ];
    match decode(frames, limits) {
        Ok((_, Request::Lookup { key })) => Ok(key),
        Ok(other) => panic!("{other:?}"),
        Err(rejected) => Err(rejected.error),
    }
}

fn lookup(changes: &[Field]) -> Result<CacheKey, DecodeError> {
    lookup_with(&Limits::default(), key_frame(changes))
}

fn problem(changes: &[Field]) -> String {
    lookup(changes).unwrap_err().to_string()
}

#[test]
fn frames_that_nobody_can_answer_have_no_envelope() {
    let unanswerable: [&[&[u8]]; 8] = [
        &[],
        &[b"\x01"],
        &[b"", b"\x18"],
        &[b"\xc1", b"\x18"],
        &[b"\x01\x02", b"\x18"],
        &[b"\xdd\xff\xff\xff\xff", b"\x18"],
        &[b"\x01", b"", b"stop"],
        &[b"\x01", b""],
    ];
    for frames in unanswerable {
        let rejected = request(frames).unwrap_err();
        assert_eq!(rejected.envelope, None, "{frames:?}");
        assert_eq!(rejected.operation, None);
    }
    assert_eq!(
        request(&[b"\x01"]).unwrap_err().error.reason(),
        "not_addressed"
    );
    let control = request(&[b"\x01", b"", b"ack", b"ack"]).unwrap_err();
    assert_eq!(control.error.reason(), "stream_control");
}

#[test]
fn the_uid_and_operation_are_kept_as_they_were_written() {
    // A wide number and a name in a longer form than needed.
    let uid = b"\xcf\0\0\0\0\0\0\0\x01";
    let operation = b"\xd9\x04noop";
    let (envelope, request) = request(&[uid, operation]).unwrap();
    assert!(matches!(request, Request::Noop));
    assert_eq!(
        (envelope.uid.as_ref(), envelope.operation.as_ref()),
        (&uid[..], &operation[..])
    );
}

#[test]
fn operations_are_known_by_number_in_any_width_and_by_name() {
    for noop in [
        &b"\x18"[..],
        b"\xcc\x18",
        b"\xd3\0\0\0\0\0\0\0\x18",
        b"\xa4noop",
    ] {
        assert!(matches!(
            request(&[b"\x01", noop]).unwrap().1,
            Request::Noop
        ));
    }
    for (unknown, shown) in [
        (
            &b"\x0b"[..],
            "unknown operation number 11; use a name or number of LMCache 0.5.6",
        ),
        (
            b"\xff",
            "unknown operation number -1; use a name or number of LMCache 0.5.6",
        ),
        (
            b"\xa3\nN\xff",
            "unknown operation `\\nN\\xff`; use a name or number of LMCache 0.5.6",
        ),
        (
            b"\xc3",
            "unknown operation of type bool; use a name or number of LMCache 0.5.6",
        ),
    ] {
        let rejected = request(&[b"\x01", unknown]).unwrap_err();
        assert_eq!(rejected.error.to_string(), shown);
        assert_eq!(rejected.error.reason(), "unknown_operation");
        assert!(rejected.envelope.is_some() && rejected.operation.is_none());
    }
    let long = packed_str(&"x".repeat(10_000));
    let shown = request(&[b"\x01", &long]).unwrap_err().error.to_string();
    assert!(shown.len() < 200 && shown.contains("xxx..."), "{shown}");
    for trailing in [&b"\x18\x18"[..], b"\xa4noop\0"] {
        assert!(request(&[b"\x01", trailing]).is_err());
    }
}

#[test]
fn unserved_operations_come_back_whatever_their_payload() {
    let unserved = [
        Operation::RegisterQCache,
        Operation::UnregisterQCache,
        Operation::StoreQ,
        Operation::CbRegisterRope,
        Operation::CbUnregisterRope,
        Operation::CbRetrievePreComputed,
        Operation::CbUnifiedLookup,
        Operation::CbProtocolHandshake,
        Operation::CbReorderPlan,
    ];
    for operation in unserved {
        let frames = [
            &b"\x01"[..],
            &packed_str(operation.name()),
            b"\xc1garbage",
            b"",
        ];
        match request(&frames).unwrap().1 {
            Request::Unsupported(unsupported) => assert_eq!(unsupported, operation),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn wrong_numbers_of_frames_are_named() {
    for (op, expected) in [
        ("noop", 0),
        ("ping", 1),
        ("lookup", 2),
        ("commit_store", 3),
        ("subscribe_kv_events", 4),
    ] {
        let mut frames = vec![Bytes::from_static(b"\x01"), packed_str(op)];
        frames.extend(vec![Bytes::from_static(b"\xc0"); expected + 1]);
        let error = decode(frames, &Limits::default()).unwrap_err().error;
        assert_eq!(
            error.to_string(),
            format!("{op} takes {expected} payload frames, got {}", expected + 1)
        );
        assert_eq!(error.reason(), "arity");
    }
}

#[test]
fn problems_name_the_operation_the_field_and_what_was_found() {
    for (field, value, shown) in [
        (
            "start",
            &b"\xc3"[..],
            "lookup: key.start expected int, found bool",
        ),
        (
            "end",
            b"\xff",
            "lookup: key.end -1 is outside 0..=18446744073709551615",
        ),
        ("world_size", b"\xce\xff\xff\xff\xff", ""),
        (
            "world_size",
            b"\xcf\0\0\0\x01\0\0\0\0",
            "lookup: key.world_size 4294967296 is outside 0..=4294967295",
        ),
        (
            "token_ids",
            b"\x92\x01\xff",
            "lookup: key.token_ids -1 is outside 0..=4294967295",
        ),
        (
            "token_ids",
            b"\x91\xcf\0\0\0\x01\0\0\0\0",
            "lookup: key.token_ids 4294967296 is outside 0..=4294967295",
        ),
        ("token_ids", b"\x91\xce\xff\xff\xff\xff", ""),
        (
            "token_ids",
            b"\x91\xc0",
            "lookup: key.token_ids expected int, found nil",
        ),
        (
            "request_id",
            b"\xa1\xff",
            "lookup: key.request_id is not valid UTF-8",
        ),
        (
            "cache_salt",
            b"\xa1@",
            "lookup: key.cache_salt must hold none of `@`, `/`, `\\` and NUL",
        ),
        (
            "worker_id",
            b"\xca\0\0\0\0",
            "lookup: key.worker_id expected int or nil, found float",
        ),
    ] {
        match lookup(&[Field::is(field, value)]) {
            Ok(_) => assert_eq!(shown, "", "{field} {value:?}"),
            Err(error) => assert_eq!(error.to_string(), shown),
        }
    }
    assert_eq!(
        problem(&[Field::Gone("end")]),
        "lookup: key.end is missing; it has no default"
    );
}

#[test]
fn a_reader_count_beyond_any_is_as_good_as_the_largest() {
    let key = lookup(&[Field::is(
        "num_kv_readers",
        b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    )]);
    assert_eq!(key.unwrap().num_kv_readers, i64::MAX);
    let key = lookup(&[Field::Gone("num_kv_readers")]);
    assert_eq!(key.unwrap().num_kv_readers, 0);
}

#[test]
fn of_long_arrays_others_are_let_in_between() {
    static TIMES: AtomicUsize = AtomicUsize::new(0);
    let limits = Limits {
        between: || {
            TIMES.fetch_add(1, Ordering::Relaxed);
        },
        ..Limits::default()
    };
    // Of all widths, 64 bits among them, which the fast path leaves to the slow one.
    let tokens = |count: u32| -> Vec<u32> {
        (0..count)
            .map(|at| [at, at % 200, at * 40, at << 8][at as usize * 7 / 3 % 4])
            .collect()
    };
    for (count, times) in [(1024, 0), (1025, 1), (2048, 1), (20_001, 19)] {
        let mut bytes = Vec::new();
        rmp::encode::write_array_len(&mut bytes, count).unwrap();
        for (at, &token) in tokens(count).iter().enumerate() {
            match at % 1000 {
                999 => rmp::encode::write_u64(&mut bytes, token.into()).unwrap(),
                _ => drop(rmp::encode::write_uint(&mut bytes, token.into()).unwrap()),
            }
        }
        TIMES.store(0, Ordering::Relaxed);
        let key = lookup_with(&limits, key_frame(&[Field::is("token_ids", bytes)])).unwrap();
        assert!(key.tokens.iter().eq(tokens(count)), "{count}");
        assert_eq!(TIMES.load(Ordering::Relaxed), times, "{count}");
    }
}

#[test]
fn limits_are_enforced_and_named() {
    let limits = Limits {
        max_tokens: 4,
        max_string_bytes: 4,
        max_depth: 2,
        ..Limits::default()
    };
    let with = |name, value: &[u8]| lookup_with(&limits, key_frame(&[Field::is(name, value)]));
    assert!(with("token_ids", b"\x94\x01\x02\x03\x04").is_ok());
    let error = with("token_ids", b"\x95\x01\x02\x03\x04\x05").unwrap_err();
    assert_eq!(
        error.to_string(),
        "lookup: key.token_ids has 5 tokens, the limit is 4"
    );
    assert_eq!(error.reason(), "too_large");
    assert!(with("model_name", b"\xa4abcd").is_ok());
    let error = with("model_name", b"\xa5abcde").unwrap_err();
    assert_eq!(
        error.to_string(),
        "lookup: key.model_name has 5 bytes, the limit is 4"
    );
    assert!(with("unknown", b"\x91\x91\x01").is_ok());
    let error = with("unknown", b"\x91\x91\x91\x01").unwrap_err();
    assert_eq!(
        error.to_string(),
        "lookup: key is nested deeper than 2 levels"
    );
    // No setting lets recursion run out of stack.
    let limits = Limits {
        max_depth: usize::MAX,
        ..Limits::default()
    };
    let deep = [&[0x91; 100_000][..], b"\x01"].concat();
    let error = lookup_with(&limits, key_frame(&[Field::is("unknown", deep)])).unwrap_err();
    assert!(
        error.to_string().contains("deeper than 128 levels"),
        "{error}"
    );
}

#[test]
fn the_last_of_two_fields_of_a_name_counts() {
    let twice = [Field::is("start", b"\x05"), Field::is("start", b"\x07")];
    assert_eq!(lookup(&twice).unwrap().start, 7);
}

#[test]
fn request_settings_are_read_leniently_and_within_bounds() {
    let configs = |map: &[u8]| {
        lookup(&[Field::is("request_configs", map)])
            .unwrap()
            .request_configs
    };
    let mut map = vec![0x84];
    for (name, value) in [
        ("lmcache.skip_save", &b"\xc3"[..]),
        ("lmcache.ttl", b"\xcb\x40\x04\0\0\0\0\0\0"),
        ("lmcache.tag.team", b"\xa3red"),
        ("unknown", b"\x91\xc0"),
    ] {
        map.extend(packed_str(name));
        map.extend(value);
    }
    let read = configs(&map);
    assert!(read.skip_save);
    assert_eq!(read.ttl, Some(Duration::from_millis(2500)));
    assert_eq!(read.tags, [("team".into(), "red".into())]);
    assert_eq!(configs(b"\xc0"), configs(b"\x80"));

    let one = |name: &str, value: &[u8]| configs(&[b"\x81", &packed_str(name)[..], value].concat());
    assert_eq!(one("lmcache.ttl", b"\xa1x").ttl, None);
    assert_eq!(
        one("lmcache.ttl", b"\xcb\x7f\xf8\0\0\0\0\0\0").ttl,
        Some(Duration::ZERO)
    );
    let longest = one("lmcache.ttl", b"\xcb\x7f\xf0\0\0\0\0\0\0").ttl;
    assert_eq!(longest, Some(Duration::from_secs(10 * 365 * 24 * 3600)));
    assert!(one("lmcache.tag.number", b"\x05").tags.is_empty());
    assert!(
        one(&format!("lmcache.tag.{}", "n".repeat(65)), b"\xa1v")
            .tags
            .is_empty()
    );

    let mut many = vec![0xdc_u8 + 2, 0, 100];
    for tag in 0..100 {
        many.extend(packed_str(&format!("lmcache.tag.{tag}")));
        many.extend(b"\xa1v");
    }
    assert_eq!(configs(&many).tags.len(), 16);
}

#[test]
fn registration_gives_the_shape_of_a_chunk() {
    let register = |use_mla: u8, slots: &[u8]| {
        let mut payload = vec![0x89];
        for (name, value) in [
            ("instance_id", &b"\x01"[..]),
            ("model_name", b"\xa1m"),
            ("world_size", b"\x01"),
            ("block_size", b"\x10"),
            ("num_layers", b"\x03"),
            ("hidden_dim_size", b"\x05"),
            ("dtype_str", b"\xa4half"),
            ("use_mla", &[use_mla]),
            ("num_physical_slots", slots),
        ] {
            payload.extend(packed_str(name));
            payload.extend(value);
        }
        match request(&[b"\x01", b"\x0e", &payload]) {
            Ok((_, Request::Register(context))) => Ok(context),
            Ok(other) => panic!("{other:?}"),
            Err(rejected) => Err(rejected.error.to_string()),
        }
    };
    let context = register(0xc2, b"\xc0").unwrap();
    assert_eq!(context.dtype, Dtype::Float16);
    assert_eq!(context.shape(256), [2, 3, 256, 5]);
    assert_eq!(context.chunk_bytes(256), Some(2 * 3 * 256 * 5 * 2));
    assert_eq!(register(0xc3, b"\x07").unwrap().shape(256), [3, 7, 5]);
    let name = "register_kv_cache_engine_driven_context: payload.num_physical_slots";
    for none in [&b"\x00"[..], b"\xff"] {
        assert!(register(0xc2, none).unwrap_err().starts_with(name));
    }
}

#[test]
fn error_replies_are_one_printable_string_beside_the_uid() {
    let envelope = Envelope {
        uid: Bytes::from_static(b"\x2a"),
        operation: Bytes::from_static(b"\x08"),
    };
    let sent = error_reply(&envelope, "bad\n\x1b[31mthing\u{85}");
    assert_eq!(
        sent,
        [envelope.uid.clone(), packed_str("error: bad  [31mthing ")]
    );
    // Cut between characters, not inside of one.
    let sent = error_reply(&envelope, &"ü".repeat(2000));
    assert_eq!(sent[1], packed_str(&format!("error: {}", "ü".repeat(512))));
    let sent = error_reply(&envelope, &format!("x{}", "ü".repeat(2000)));
    assert_eq!(sent[1], packed_str(&format!("error: x{}", "ü".repeat(511))));
}
