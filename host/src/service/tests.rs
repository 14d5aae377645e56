//! What cannot be brought about from outside: a handler that fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use rmpv::Value;
use stockade_cache::{
    Backing, CacheEngine, CacheObserver, EngineConfig, ObjectKey, Prefault, TokenHasher,
};
use stockade_transport::{Config, ListenOptions, Listener, Server};
use stockade_wire::{Dtype, pickle};
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

use super::*;

const CHUNK: usize = 16;

/// Panics where the engine tells what was stored, which is inside of `commit_store`.
struct Failing;

impl CacheObserver for Failing {
    #[expect(clippy::panic, reason = "it is to fail")]
    fn stored(&self, _keys: &[ObjectKey]) {
        panic!("the observer fails on purpose");
    }
}

fn settings() -> ServiceSettings {
    let long = Duration::from_secs(600);
    ServiceSettings {
        deadline: Duration::from_secs(30),
        worker_reap_timeout: long,
        worker_registration_grace: long,
        session_ttl: long,
        write_ttl: long,
        read_ttl: long,
        kv_event_log_size: 16,
        lookup_hash_log: None,
        transfer_mode: TransferMode::Auto,
        null_block_id: 0,
        traces: Traces::default(),
        coordinator: CoordinatorEvents::default(),
    }
}

fn pack(value: &Value) -> Bytes {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes.into()
}

fn map(fields: &[(&str, Value)]) -> Value {
    let entries = fields
        .iter()
        .map(|(name, value)| ((*name).into(), value.clone()));
    Value::Map(entries.collect())
}

async fn call(dealer: &mut DealerSocket, operation: &str, arguments: &[Value]) -> Vec<Bytes> {
    let mut frames = vec![pack(&7.into()), pack(&operation.into())];
    frames.extend(arguments.iter().map(pack));
    dealer
        .send(ZmqMessage::try_from(frames).unwrap())
        .await
        .unwrap();
    let reply = tokio::time::timeout(Duration::from_secs(60), dealer.recv()).await;
    reply.unwrap().unwrap().into_vec()
}

#[tokio::test]
async fn a_handler_that_fails_answers_and_the_connection_goes_on() {
    let config = EngineConfig {
        prefault: Prefault::Nothing,
        ..EngineConfig::new(1 << 20, Backing::Private)
    };
    let engine = Arc::new(CacheEngine::open(config).unwrap());
    let mut registry = Registry::default();
    let service = Service::new(
        Arc::clone(&engine),
        TokenHasher::new(NonZeroUsize::new(CHUNK).unwrap()),
        Arc::new(Tenancy::new(Arc::default(), 2)),
        settings(),
        None,
        &mut registry,
    )
    .unwrap();
    engine.set_observer(Arc::new(Failing));
    let endpoint = "tcp://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&endpoint, ListenOptions::default())
        .await
        .unwrap();
    let url = listener.endpoint().to_string();
    let server = Server::new(ServiceHandler(Arc::clone(&service)), Config::default()).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(vec![listener], async move {
        let _ = stopped.await;
    }));
    let mut dealer = DealerSocket::new();
    dealer.connect(&url).await.unwrap();

    let registration = map(&[
        ("instance_id", 1.into()),
        ("model_name", "m".into()),
        ("world_size", 1.into()),
        ("block_size", 16.into()),
        ("num_layers", 1.into()),
        ("hidden_dim_size", 4.into()),
        ("dtype_str", "uint8".into()),
        ("use_mla", true.into()),
        ("num_physical_slots", 16.into()),
    ]);
    let operation = "register_kv_cache_engine_driven_context";
    assert_eq!(call(&mut dealer, operation, &[registration]).await.len(), 3);
    let key = map(&[
        ("model_name", "m".into()),
        ("world_size", 1.into()),
        ("worker_id", 0.into()),
        (
            "token_ids",
            Value::Array((0..CHUNK as u64).map(Value::from).collect()),
        ),
        ("start", 0.into()),
        ("end", CHUNK.into()),
        ("request_id", "r".into()),
    ]);
    let chunk: &[u8] = &[3; 64];
    let tensors = pickle::write_tensors(&[(Dtype::UInt8, &[1, 16, 4], chunk)]).unwrap();
    let store = [key, 1.into(), Value::Binary(tensors)];
    let reply = call(&mut dealer, "commit_store", &store).await;
    assert_eq!(reply.get(2), Some(&pack(&false.into())), "{reply:?}");
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &registry).unwrap();
    let counted = metrics
        .lines()
        .find(|line| line.contains("reason=\"panic\""));
    assert!(counted.unwrap().contains("commit_store"), "{metrics}");
    let reply = call(&mut dealer, "noop", &[]).await;
    assert_eq!(
        reply.get(2),
        Some(&pack(&"OK".into())),
        "the connection goes on"
    );

    stop.send(()).unwrap();
    serving.await.unwrap();
}
