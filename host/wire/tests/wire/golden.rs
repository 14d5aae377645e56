//! Byte for byte and value for value against LMCache 0.5.6.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use stockade_wire::{
    CacheKey, DecodeError, Dtype, EngineKind, Envelope, IpcTensor, KvCacheRegistration, KvEvent,
    KvEventBatch, KvEventKind, KvLayout, KvListLayout, Limits, Operation, RegisterContext, Request,
    Response, ShmTensor, SlotDescriptor, StoreSlot, decode, reply, stream_end,
};

use crate::{frames, golden_lines, hex, packed_str, unhex};

/// What LMCache's server silently drops and we serve, because the field is read by nobody.
const SERVED_ALL_THE_SAME: [&str; 1] = ["LOOKUP tp_size nil"];

#[test]
fn every_recorded_request_is_decoded_to_the_values_that_were_sent() {
    let mut requests = 0;
    for line in golden_lines("recorded.jsonl")
        .iter()
        .filter(|line| line["from"] == "client")
    {
        let sent = frames(&line["frames"]);
        let op = line["op"].as_str().unwrap();
        let decoded = decode(sent.clone(), &Limits::default());
        if line["frames"][5] == "cd1388" {
            let error = decoded.unwrap_err().error.to_string();
            assert_eq!(
                error,
                "subscribe_kv_events: max_events 5000 is outside 1..=1024"
            );
            continue;
        }
        let (envelope, request) = decoded.unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!((&envelope.uid, &envelope.operation), (&sent[0], &sent[1]));
        requests += 1;
        match request {
            Request::StreamAck => assert_eq!(sent[2], "ack"),
            Request::StreamCancel => assert_eq!(sent[2], "cancel"),
            Request::Unsupported(operation) => assert_eq!(operation.name(), op),
            request => {
                assert_eq!(request.operation().unwrap().name(), op);
                assert_same_values(op, &values(&request), &line["values"]);
            }
        }
    }
    assert_eq!(requests, 67);
}

#[test]
fn payloads_are_accepted_and_dropped_as_by_lmcache() {
    let (mut accepted, mut dropped) = (0, 0);
    for line in golden_lines("payloads.jsonl") {
        let op = line["op"].as_str().unwrap();
        let name = line["name"].as_str().unwrap();
        let mut request = vec![Bytes::from_static(b"\x07"), packed_str(op)];
        request.extend(frames(&line["payload"]));
        match decode(request, &Limits::default()) {
            Ok((_, request)) if line["dropped"].is_null() => {
                assert_same_values(name, &values(&request), &line["values"]);
                accepted += 1;
            }
            Ok(_) => assert!(SERVED_ALL_THE_SAME.contains(&name), "{line}"),
            Err(rejected) => {
                assert!(!line["dropped"].is_null(), "{name}: {rejected}");
                assert_eq!(rejected.envelope.unwrap().uid, "\x07");
                assert_eq!(rejected.operation, Operation::from_name(op));
                assert!(matches!(
                    rejected.error,
                    DecodeError::Field { .. } | DecodeError::Arity { .. }
                ));
                dropped += 1;
            }
        }
    }
    assert_eq!((accepted, dropped), (127, 146));
}

#[test]
fn replies_are_the_bytes_that_lmcache_sends() {
    let envelope = Envelope {
        uid: Bytes::from_static(b"\xcd\x01\x00"),
        operation: Bytes::from_static(b"\x18"),
    };
    let lines = golden_lines("replies.jsonl");
    assert_eq!(lines.len(), 74);
    for line in lines {
        let response = response(line["op"].as_str().unwrap(), &line["result"]);
        let sent = reply(&envelope, &response);
        assert_eq!(
            sent[..2],
            [envelope.uid.clone(), envelope.operation.clone()]
        );
        assert_eq!(
            hex(&sent[2]),
            line["frame"].as_str().unwrap(),
            "{response:?}"
        );
        assert_eq!(sent.len(), 3);
    }
}

#[test]
fn every_recorded_reply_is_sent_byte_for_byte() {
    let mut replies = 0;
    for line in golden_lines("recorded.jsonl")
        .iter()
        .filter(|line| line["from"] == "server")
    {
        let recorded = frames(&line["frames"]);
        let envelope = Envelope {
            uid: recorded[0].clone(),
            operation: recorded[1].clone(),
        };
        let sent = match line["values"].as_array().unwrap().as_slice() {
            [] => {
                assert_eq!(stream_end(&envelope), recorded);
                reply(&envelope, &Response::OptionalInt(None))
            }
            [value] => reply(&envelope, &response(line["op"].as_str().unwrap(), value)),
            _ => panic!("more than one result in {line}"),
        };
        assert_eq!(sent, recorded, "{line}");
        replies += 1;
    }
    assert_eq!(replies, 39);
}

/// A request's payloads as LMCache's server would hand them to its handler.
fn values(request: &Request) -> Vec<Value> {
    match request {
        Request::Noop | Request::GetChunkSize | Request::GetExperimental => vec![],
        Request::Ping { instance_id } => vec![instance_id.map_or(Value::Null, |id| int(id.0))],
        Request::Register(context) => vec![register_value(context)],
        Request::Unregister { instance_id } => vec![int(instance_id.0)],
        Request::RegisterKvCache(registration) => kv_cache_values(registration),
        Request::UnregisterKvCache { instance_id } => vec![int(instance_id.0)],
        // The event handle that follows is not kept.
        Request::Store {
            key,
            instance_id,
            block_ids,
        } => vec![key_value(key), int(instance_id.0), json!(block_ids)],
        Request::Retrieve {
            key,
            instance_id,
            block_ids,
            skip_tokens,
        } => vec![
            key_value(key),
            int(instance_id.0),
            json!(block_ids),
            json!(skip_tokens),
        ],
        Request::PrepareStore { key, instance_id }
        | Request::PrepareRetrieve { key, instance_id }
        | Request::CommitRetrieve { key, instance_id } => vec![key_value(key), int(instance_id.0)],
        Request::CommitStore {
            key,
            instance_id,
            data,
        } => {
            vec![
                key_value(key),
                int(instance_id.0),
                json!({"bytes": hex(data)}),
            ]
        }
        // The tp_size that follows is not kept.
        Request::Lookup { key } | Request::FreeLookupLocks { key } => vec![key_value(key)],
        Request::QueryPrefetchStatus { request_id } | Request::EndSession { request_id } => {
            vec![json!(**request_id)]
        }
        Request::WaitPrefetchStatus {
            request_id,
            timeout,
        } => {
            vec![json!(**request_id), json!(timeout.as_secs_f64())]
        }
        Request::Clear { force } => vec![json!(force)],
        Request::ReportBlockAllocation {
            instance_id,
            model_name,
            records,
        } => {
            let records: Vec<_> = records
                .iter()
                .map(|record| {
                    json!({
                        "req_id": *record.req_id,
                        "new_block_ids": record.new_block_ids,
                        "new_token_ids": record.new_token_ids,
                    })
                })
                .collect();
            vec![int(instance_id.0), json!(**model_name), json!(records)]
        }
        Request::SubscribeKvEvents {
            instance_id,
            model_name,
            cursor,
            max_events,
        } => {
            vec![
                int(instance_id.0),
                json!(**model_name),
                json!(cursor),
                json!(max_events),
            ]
        }
        Request::ServerModuleCall {
            module,
            method,
            payload,
        } => {
            vec![json!({
                "method": format!("{module}.{method}"),
                "payload": {"bytes": hex(payload)},
            })]
        }
        Request::P2pLookupAndLock { keys } => vec![json!(keys)],
        Request::P2pQueryLookupResults { task_id } => vec![int(*task_id)],
        Request::P2pUnlockObjects => vec![],
        other => panic!("no values for {other:?}"),
    }
}

fn int(value: i128) -> Value {
    i64::try_from(value)
        .map(Value::from)
        .or_else(|_| u64::try_from(value).map(Value::from))
        .unwrap_or_else(|_| json!(value.to_string()))
}

fn key_value(key: &CacheKey) -> Value {
    json!({
        "model_name": *key.model_name,
        "world_size": key.world_size,
        "worker_id": key.worker_id,
        "token_ids": key.tokens.iter().collect::<Vec<_>>(),
        "start": key.start,
        "end": key.end,
        "request_id": *key.request_id,
        "cache_salt": *key.cache_salt,
        "num_kv_readers": key.num_kv_readers,
    })
}

fn register_value(context: &RegisterContext) -> Value {
    json!({
        "instance_id": int(context.instance_id.0),
        "model_name": *context.model_name,
        "world_size": context.world_size,
        "block_size": context.block_size,
        "num_layers": context.num_layers,
        "hidden_dim_size": context.hidden_dim_size,
        "dtype_str": context.dtype.torch_name(),
        "use_mla": context.use_mla,
        "num_physical_slots": context.num_physical_slots,
    })
}

fn kv_cache_values(registration: &KvCacheRegistration) -> Vec<Value> {
    let tensor = |tensor: &IpcTensor| match tensor {
        IpcTensor::Shm(ShmTensor {
            segment,
            segment_bytes,
            dtype,
            shape,
            strides,
            offset,
        }) => json!({
            "shm_name": **segment,
            "nbytes": segment_bytes,
            "version": 1,
            "metadata": {
                "dtype": dtype.torch_name(),
                "shape": **shape,
                "stride": **strides,
                "storage_offset": offset,
                "device_uuid": "cpu",
            },
        }),
        IpcTensor::Device(_) => Value::Null,
    };
    let engine = match registration.engine {
        EngineKind::Vllm => "vllm",
        EngineKind::Atom => "atom",
        EngineKind::Sglang => "sglang",
        EngineKind::TrtLlm => "trtllm",
        EngineKind::Mock => "mock",
    };
    let hints = &registration.hints;
    let layout = hints.kv_layout.map(|layout| match layout {
        KvLayout::Nhd => "NHD",
        KvLayout::Hnd => "HND",
        KvLayout::Blhnc => "BLHNC",
        KvLayout::Blnhc => "BLNHC",
    });
    let list = hints.kv_list_layout.map(|layout| match layout {
        KvListLayout::KThenV => "k_v",
        KvListLayout::Unified => "unified",
    });
    let hints = json!({
        "kv_layout": layout,
        "num_kv_heads": hints.num_kv_heads,
        "tokens_per_block": hints.tokens_per_block,
        "kv_list_layout": list,
        "head_dim": hints.head_dim,
    });
    let given = hints.as_object().unwrap().iter();
    let given = given.filter(|(_, value)| !value.is_null());
    let hints = given.map(|(name, value)| (name.clone(), value.clone()));
    let groups = registration.groups.iter().map(|group| {
        json!({
            "engine_group_id": group.engine_group_id,
            "layer_indices": group.layer_indices,
            "tokens_per_block": group.tokens_per_block,
            "sw_size_tokens": group.window_tokens.map_or(json!(-1), |tokens| json!(tokens)),
            "extra_object_group_tag": 0,
            "recurrent_state": false,
        })
    });
    vec![
        int(registration.instance_id.0),
        registration.tensors.iter().map(tensor).collect(),
        json!(*registration.model_name),
        json!(registration.world_size),
        json!(engine),
        Value::Object(hints.collect()),
        groups.collect(),
    ]
}

#[test]
fn recorded_handles_of_a_cpu_kv_cache_are_read_as_data() {
    let lines = golden_lines("recorded.jsonl");
    let line = lines
        .iter()
        .find(|line| line["op"] == "register_kv_cache")
        .unwrap();
    let (_, request) = decode(frames(&line["frames"]), &Limits::default()).unwrap();
    let Request::RegisterKvCache(registration) = request else {
        panic!("{request:?}");
    };
    let expected = ["/lmcache_kv_10954_0", "/lmcache_kv_10954_1"].map(|segment| {
        IpcTensor::Shm(ShmTensor {
            segment: segment.into(),
            segment_bytes: 65536,
            dtype: Dtype::BFloat16,
            shape: [2, 64, 2, 16, 8].into(),
            strides: [16384, 256, 128, 8, 1].into(),
            offset: 0,
        })
    });
    assert_eq!(registration.tensors, expected);
    assert_eq!(registration.engine, EngineKind::Vllm);
}

fn assert_same_values(name: &str, ours: &[Value], theirs: &Value) {
    let mut theirs = theirs.as_array().unwrap().clone();
    if let Some(key) = theirs.first_mut().and_then(Value::as_object_mut) {
        // What is read out of the settings is tested by itself.
        if key.remove("request_configs").is_some() && theirs.len() == 2 && ours.len() == 1 {
            theirs.pop();
        }
    }
    // Frames as recorded leave out what has a default.
    if let (Some(theirs), Some(ours)) = (theirs.first_mut(), ours.first())
        && let (Some(theirs), Some(ours)) = (theirs.as_object_mut(), ours.as_object())
    {
        for default in ["num_kv_readers", "cache_salt", "num_physical_slots"] {
            if ours.contains_key(default) {
                theirs.entry(default).or_insert(ours[default].clone());
            }
        }
    }
    if name.contains("wait_prefetch_status") {
        let seconds = match &theirs[1] {
            Value::String(text) if text == "inf" => f64::MAX,
            seconds => seconds.as_f64().unwrap_or(0.0),
        };
        let day = Duration::from_secs(24 * 3600).as_secs_f64();
        theirs[1] = json!(seconds.clamp(0.0, day));
    }
    if name.contains("p2p_lookup_and_lock") {
        theirs = vec![json!(theirs[0].as_array().unwrap().len())];
    }
    if name.starts_with("KV CACHE") || name == "register_kv_cache" {
        // Device handles are not looked into; those recorded are tested by themselves.
        if let Some(tensors) = theirs.get_mut(1).and_then(Value::as_array_mut) {
            let recorded = tensors.first().is_some_and(Value::is_null);
            for (index, tensor) in tensors.iter_mut().enumerate() {
                if recorded {
                    *tensor = ours[1][index].clone();
                } else if tensor.get("shm_name").is_none() {
                    *tensor = Value::Null;
                }
            }
        }
        if let Some(hints) = theirs.get_mut(5).and_then(Value::as_object_mut) {
            hints.remove("other");
        }
    }
    if name.starts_with("STORE")
        || name == "store"
        || name.starts_with("RETRIEVE")
        || name == "retrieve"
    {
        theirs.remove(3); // The event handle.
        if let Some(skip) = theirs.get_mut(3) {
            *skip = json!(skip.as_i64().unwrap().max(0));
        }
    }
    if name.contains("p2p_unlock") {
        theirs.clear();
    }
    assert_eq!(ours, theirs, "{name}");
}

/// The response whose bytes LMCache makes of such a result.
fn response(op: &str, value: &Value) -> Response {
    let text = |value: &Value| -> Arc<str> { value.as_str().unwrap().into() };
    let bytes = |value: &Value| unhex(value["bytes"].as_str().unwrap());
    match op {
        "noop" => Response::Ok,
        "ping" | "commit_store" | "commit_retrieve" => Response::Bool(value.as_bool().unwrap()),
        "get_chunk_size" | "p2p_lookup_and_lock" => Response::Int(value.as_i64().unwrap()),
        "query_prefetch_status" | "wait_prefetch_status" => Response::OptionalInt(value.as_i64()),
        "get_experimental" => {
            Response::Strings(value.as_array().unwrap().iter().map(text).collect())
        }
        "register_kv_cache_engine_driven_context" => Response::Registered {
            shm_name: text(&value["shm_name"]),
            pool_size: value["pool_size"].as_u64().unwrap(),
        },
        "prepare_store" => {
            let slots = value["context"].get("slots").map(|slots| {
                let indices = value["context"]["chunk_indices"].as_array().unwrap();
                let pairs = slots.as_array().unwrap().iter().zip(indices);
                pairs
                    .map(|(at, index)| StoreSlot {
                        chunk_index: index.as_u64().unwrap(),
                        slot: slot(at),
                    })
                    .collect()
            });
            Response::PrepareStore(slots)
        }
        "prepare_retrieve" => Response::PrepareRetrieve {
            success: value["success"].as_bool().unwrap(),
            data: bytes(&value["data"]),
            slots: value["context"]
                .get("slots")
                .map(|slots| slots.as_array().unwrap().iter().map(slot).collect()),
        },
        "store" | "retrieve" => Response::Transferred {
            event_handle: bytes(&value[0]),
            success: value[1].as_bool().unwrap(),
        },
        "subscribe_kv_events" => Response::KvEvents(KvEventBatch {
            enabled: value["enabled"].as_bool().unwrap(),
            incarnation: value["incarnation"].as_u64().unwrap(),
            next_cursor: value["next_cursor"].as_u64().unwrap(),
            lost: value["lost"].as_bool().unwrap(),
            events: value["events"]
                .as_array()
                .unwrap()
                .iter()
                .map(event)
                .collect(),
        }),
        "server_module_call" => Response::ServerModule {
            success: value["success"].as_bool().unwrap(),
            payload: bytes(&value["payload"]),
            error: text(&value["error"]),
        },
        "p2p_query_lookup_results" => {
            Response::P2pAddresses(u32::try_from(value.as_array().unwrap().len()).unwrap())
        }
        other => panic!("no response for {other}"),
    }
}

fn slot(value: &Value) -> SlotDescriptor {
    SlotDescriptor {
        offset: value["offset"].as_u64().unwrap(),
        length: value["length"].as_u64().unwrap(),
        shape: value["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|dim| dim.as_u64().unwrap())
            .collect(),
        dtype: Dtype::parse(value["dtype"].as_str().unwrap()).unwrap(),
    }
}

fn event(value: &Value) -> KvEvent {
    let hash = |value: &Value| unhex(value["bytes"].as_str().unwrap());
    assert_eq!(value["medium"], "CPU");
    KvEvent {
        seq: value["seq"].as_u64().unwrap(),
        kind: match value["kind"].as_str().unwrap() {
            "stored" => KvEventKind::Stored,
            "removed" => KvEventKind::Removed,
            other => panic!("{other}"),
        },
        model_name: value["model_name"].as_str().unwrap().into(),
        block_hashes: value["block_hashes"]
            .as_array()
            .unwrap()
            .iter()
            .map(hash)
            .collect(),
        parent_block_hash: value
            .get("parent_block_hash")
            .filter(|hash| !hash.is_null())
            .map(hash),
        token_ids: value["token_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| u32::try_from(token.as_u64().unwrap()).unwrap())
            .collect(),
    }
}
