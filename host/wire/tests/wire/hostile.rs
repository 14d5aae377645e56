//! Arbitrary, mutated and re-encoded requests.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use stockade_wire::{CacheKey, Limits, Operation, Request, TokenIds, decode};

use crate::{frames, golden_lines, packed_str};

/// A change to the key that [`key_frame`] writes.
pub(crate) enum Field {
    /// The field holds these bytes; unknown names and second ones are added.
    Is(&'static str, Box<[u8]>),
    /// The field is left out.
    Gone(&'static str),
}

impl Field {
    pub(crate) fn is(name: &'static str, bytes: impl AsRef<[u8]>) -> Self {
        Self::Is(name, bytes.as_ref().into())
    }
}

/// A key of four tokens with changes.
pub(crate) fn key_frame(changes: &[Field]) -> Bytes {
    let mut fields: Vec<(&str, Vec<u8>)> = vec![
        ("model_name", b"\xa1m".to_vec()),
        ("world_size", b"\x01".to_vec()),
        ("worker_id", b"\xc0".to_vec()),
        ("token_ids", b"\x94\x01\x02\x03\x04".to_vec()),
        ("start", b"\x00".to_vec()),
        ("end", b"\x04".to_vec()),
        ("request_id", b"\xa1r".to_vec()),
        ("cache_salt", b"\xa0".to_vec()),
        ("request_configs", b"\xc0".to_vec()),
        ("num_kv_readers", b"\x01".to_vec()),
    ];
    let mut changed = Vec::new();
    for change in changes {
        match change {
            Field::Is(name, bytes) => {
                if !changed.contains(name) {
                    fields.retain(|(field, _)| field != name);
                }
                changed.push(name);
                fields.push((name, bytes.to_vec()));
            }
            Field::Gone(name) => fields.retain(|(field, _)| field != name),
        }
    }
    map(&fields)
}

fn map(fields: &[(&str, Vec<u8>)]) -> Bytes {
    let mut out = Vec::new();
    rmp::encode::write_map_len(&mut out, u32::try_from(fields.len()).unwrap()).unwrap();
    for (name, value) in fields {
        out.extend(packed_str(name));
        out.extend(value);
    }
    out.into()
}

/// A whole number in any of the widths that hold it.
fn packed_int(value: u64, width: usize) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    let forms: [(u8, usize, u64); 9] = [
        (0, 0, 0x7f),
        (0xcc, 1, u8::MAX.into()),
        (0xd0, 1, i8::MAX as u64),
        (0xcd, 2, u16::MAX.into()),
        (0xd1, 2, i16::MAX as u64),
        (0xce, 4, u32::MAX.into()),
        (0xd2, 4, i32::MAX as u64),
        (0xd3, 8, i64::MAX as u64),
        (0xcf, 8, u64::MAX),
    ];
    let fitting: Vec<_> = forms.iter().filter(|form| value <= form.2).collect();
    match fitting[width % fitting.len()] {
        (_, 0, _) => vec![bytes[7]],
        (marker, len, _) => [&[*marker], &bytes[8 - len..]].concat(),
    }
}

fn array(items: &[Vec<u8>], wide: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if wide {
        out.push(0xdd);
        out.extend(u32::try_from(items.len()).unwrap().to_be_bytes());
    } else {
        rmp::encode::write_array_len(&mut out, u32::try_from(items.len()).unwrap()).unwrap();
    }
    out.extend(items.concat());
    out
}

fn lookup(key: Bytes) -> CacheKey {
    let frames = vec![
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"\x08"),
        key,
        Bytes::from_static(b"\x01"),
    ];
    match decode(frames, &Limits::default()).unwrap() {
        (_, Request::Lookup { key }) => key,
        other => panic!("{other:?}"),
    }
}

/// Tokens of all sizes, in runs and mixed.
fn any_token() -> impl Strategy<Value = u32> {
    prop_oneof![
        0..0x80_u32,
        0x80..0x100_u32,
        0x100..0x1_0000_u32,
        0x1_0000..200_000_u32,
        any::<u32>()
    ]
}

/// Any msgpack value, a few levels deep.
fn any_msgpack() -> impl Strategy<Value = Vec<u8>> {
    let bytes_of = |marker: u8| {
        vec(any::<u8>(), 0..20).prop_map(move |bytes| {
            [&[marker, u8::try_from(bytes.len()).unwrap()][..], &bytes].concat()
        })
    };
    let leaf = prop_oneof![
        Just(b"\xc0".to_vec()),
        Just(b"\xc3".to_vec()),
        (any::<u64>(), any::<usize>()).prop_map(|(value, width)| packed_int(value, width)),
        any::<f64>().prop_map(|value| [&[0xcb][..], &value.to_be_bytes()].concat()),
        "[ -~]{0,40}".prop_map(|text| packed_str(&text).to_vec()),
        bytes_of(0xd9),
        bytes_of(0xc4),
        (any::<u8>(), any::<u8>()).prop_map(|(kind, byte)| vec![0xd4, kind, byte]),
        prop::sample::select(FIELD_NAMES).prop_map(|name| packed_str(name).to_vec()),
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        let name = prop::sample::select(FIELD_NAMES).prop_map(|name| packed_str(name).to_vec());
        prop_oneof![
            vec(inner.clone(), 0..8).prop_map(|items| array(&items, false)),
            vec((name, inner.clone()), 0..12).prop_map(|entries| {
                let mut out = vec![0xde, 0, u8::try_from(entries.len()).unwrap()];
                out.extend(
                    entries
                        .into_iter()
                        .flat_map(|(name, value)| [name, value].concat()),
                );
                out
            }),
            vec((inner.clone(), inner), 0..8).prop_map(|entries| {
                let mut out = vec![0x80 | u8::try_from(entries.len()).unwrap()];
                out.extend(
                    entries
                        .into_iter()
                        .flat_map(|(name, value)| [name, value].concat()),
                );
                out
            }),
        ]
    })
}

const FIELD_NAMES: &[&str] = &[
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
    "instance_id",
    "block_size",
    "num_layers",
    "hidden_dim_size",
    "dtype_str",
    "use_mla",
    "num_physical_slots",
    "req_id",
    "new_block_ids",
    "new_token_ids",
    "method",
    "payload",
    "lmcache.ttl",
    "lmcache.tag.a",
    "lmcache.skip_save",
];

fn any_operation() -> impl Strategy<Value = Bytes> {
    prop::sample::select(Operation::ALL).prop_map(|operation| packed_str(operation.name()))
}

/// Decodes and drops the outcome; its display must work too.
fn survive(frames: Vec<Bytes>) {
    match decode(frames, &Limits::default()) {
        Ok((_, request)) => drop(format!("{request:?}")),
        Err(rejected) => drop(rejected.to_string()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_frames_do_not_panic(frames in vec(vec(any::<u8>(), 0..64), 0..6)) {
        survive(frames.into_iter().map(Bytes::from).collect());
    }

    #[test]
    fn arbitrary_bytes_as_payloads_do_not_panic(
        operation in any_operation(),
        payloads in vec(vec(any::<u8>(), 0..64), 0..5),
    ) {
        let mut frames = vec![Bytes::from_static(b"\x01"), operation];
        frames.extend(payloads.into_iter().map(Bytes::from));
        survive(frames);
    }

    #[test]
    fn arbitrary_values_as_payloads_do_not_panic(
        operation in any_operation(),
        payloads in vec(any_msgpack(), 0..5),
    ) {
        let mut frames = vec![Bytes::from_static(b"\x01"), operation];
        frames.extend(payloads.into_iter().map(Bytes::from));
        survive(frames);
    }

    #[test]
    fn mutated_recorded_requests_do_not_panic(
        line in any::<prop::sample::Index>(),
        frame in any::<prop::sample::Index>(),
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..6),
    ) {
        let lines = golden_lines("recorded.jsonl");
        let requests: Vec<_> = lines.iter().filter(|line| line["from"] == "client").collect();
        let mut frames = frames(&line.get(&requests)["frames"]);
        let frame = frame.get_mut(&mut frames);
        *frame = mutate(frame, &edits).into();
        survive(frames);
    }

    #[test]
    fn tokens_come_out_as_they_went_in_whatever_their_width(
        tokens in vec((any_token(), any::<usize>()), 0..300),
        wide in any::<bool>(),
        rest in vec(any::<u8>(), 0..16),
    ) {
        let items: Vec<_> = tokens.iter().map(|&(token, width)| packed_int(token.into(), width)).collect();
        // What follows the tokens may end anywhere near the last of them.
        let rest = [b"\xc4", &[u8::try_from(rest.len()).unwrap()][..], &rest].concat();
        let changes = [
            Field::is("token_ids", array(&items, wide)),
            Field::is("unknown", rest),
        ];
        let expected: Vec<u32> = tokens.into_iter().map(|(token, _)| token).collect();
        let decoded = lookup(key_frame(&changes)).tokens;
        prop_assert_eq!(decoded.len(), expected.len());
        prop_assert_eq!(decoded.iter().collect::<Vec<_>>(), expected.clone());
        let bytes: Vec<u8> = expected.iter().flat_map(|token| token.to_be_bytes()).collect();
        prop_assert_eq!(decoded.as_be_bytes(), &bytes[..]);
        prop_assert_eq!(&decoded, &expected.into_iter().collect::<TokenIds>());
    }

    #[test]
    fn keys_come_out_as_they_went_in(
        model_name in "\\PC{0,40}", request_id in "\\PC{0,40}", cache_salt in "[a-z0-9é]{0,128}",
        world_size in any::<u32>(), worker_id in any::<Option<u32>>(), tokens in vec(any_token(), 0..50),
        start in any::<u64>(), end in any::<u64>(), readers in 0..i64::MAX,
        width in any::<usize>(), rotate in 0..10_usize, unknown in any_msgpack(),
    ) {
        let int = |value: u64| packed_int(value, width);
        let items: Vec<_> = tokens.iter().map(|&token| packed_int(token.into(), 0)).collect();
        let mut fields = vec![
            ("model_name", packed_str(&model_name).to_vec()),
            ("world_size", int(world_size.into())),
            ("worker_id", worker_id.map_or(b"\xc0".to_vec(), |id| int(id.into()))),
            ("token_ids", array(&items, false)),
            ("start", int(start)),
            ("end", int(end)),
            ("request_id", packed_str(&request_id).to_vec()),
            ("cache_salt", packed_str(&cache_salt).to_vec()),
            ("flavour", unknown),
            ("num_kv_readers", int(readers.cast_unsigned())),
        ];
        fields.rotate_left(rotate);
        let key = lookup(map(&fields));
        prop_assert_eq!(&*key.model_name, model_name);
        prop_assert_eq!(&*key.request_id, request_id);
        prop_assert_eq!(&*key.cache_salt, cache_salt);
        prop_assert_eq!((key.world_size, key.worker_id), (world_size, worker_id));
        prop_assert_eq!((key.start, key.end, key.num_kv_readers), (start, end, readers));
        prop_assert_eq!(key.tokens.iter().collect::<Vec<_>>(), tokens);
    }
}

/// Overwrites, inserts, removes and cuts.
pub(crate) fn mutate(bytes: &[u8], edits: &[(prop::sample::Index, u8, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, byte, kind) in edits {
        let at = at.index(bytes.len() + 1);
        match kind {
            0 if at < bytes.len() => bytes[at] = *byte,
            1 => bytes.insert(at, *byte),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
            _ => bytes.truncate(at.saturating_sub(usize::from(*byte))),
        }
    }
    bytes
}
