//! Engines that leave the copying to the server: the same bytes as if they had copied, only
//! memory of their own, and nothing worse than a refusal when that memory changes.
//!
//! What each layout of LMCache becomes is compared with LMCache's own server by
//! `tests/lmcache/lmcache_driven.py`.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use rmpv::Value;
use stockade_tests::{
    Client, Key, Server, Worker, lookup, lookup_free, map, pack, tokens, wait_for,
};

const CHUNK: usize = 16;
/// A layer of a [`Engine`]: K and V, blocks, heads, tokens of a block, elements of a head.
const SHAPE: [usize; 5] = [2, 10, 2, 8, 8];
const LAYERS: usize = 2;
const LAYER_BYTES: usize = 2 * 10 * 2 * 8 * 8 * 2;

/// A segment with a name of its own, gone with its owner.
struct Segment {
    name: String,
    file: File,
}

impl Segment {
    /// `bytes` zeros, all of them allocated.
    fn new(bytes: usize) -> Self {
        let (file, path) = tempfile::Builder::new()
            .prefix("stockade-test-")
            .tempfile_in("/dev/shm")
            .unwrap()
            .keep()
            .unwrap();
        file.write_all_at(&vec![0; bytes], 0).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        Self { name, file }
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev/shm").join(&self.name)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.path());
    }
}

/// A float16 tensor in `segment` from element `offset` on, dense.
fn tensor(segment: &str, segment_bytes: usize, shape: &[usize], offset: usize) -> Value {
    let strides = (0..shape.len()).map(|at| shape[at + 1..].iter().product::<usize>());
    let strides: Vec<Value> = strides.map(Value::from).collect();
    let metadata = map(&[
        ("dtype", "float16".into()),
        (
            "shape",
            Value::Array(shape.iter().map(|&it| it.into()).collect()),
        ),
        ("stride", Value::Array(strides)),
        ("storage_offset", offset.into()),
        ("device_uuid", "cpu".into()),
    ]);
    handle(&[
        ("type", "cpu_shm".into()),
        ("shm_name", segment.into()),
        ("nbytes", segment_bytes.into()),
        ("version", 1.into()),
        ("metadata", metadata),
    ])
}

fn handle(fields: &[(&str, Value)]) -> Value {
    Value::Ext(1, pack(&map(fields)).to_vec())
}

fn registration(id: u64, model: &str, tensors: Vec<Value>, layout: &str) -> [Value; 7] {
    [
        id.into(),
        Value::Array(tensors),
        model.into(),
        1.into(),
        "vllm".into(),
        map(&[("kv_layout", layout.into())]),
        Value::Array(Vec::new()),
    ]
}

/// An engine with two layers in one segment, each with its heads outside or inside.
struct Engine {
    client: Client,
    id: u64,
    is_hnd: bool,
    segment: Segment,
}

impl Engine {
    async fn register(url: &str, id: u64, model: &str, is_hnd: bool) -> Self {
        let segment = Segment::new(LAYERS * LAYER_BYTES);
        let mut shape = SHAPE;
        if !is_hnd {
            shape.swap(2, 3);
        }
        let layer = |layer: usize| {
            tensor(
                &format!("/{}", segment.name),
                LAYERS * LAYER_BYTES,
                &shape,
                layer * LAYER_BYTES / 2,
            )
        };
        let layout = if is_hnd { "HND" } else { "NHD" };
        let tensors = (0..LAYERS).map(layer).collect();
        let mut client = Client::connect(url).await;
        let reply = client
            .call(
                "register_kv_cache",
                &registration(id, model, tensors, layout),
            )
            .await;
        assert_eq!(reply.value(), Value::Nil);
        Self {
            client,
            id,
            is_hnd,
            segment,
        }
    }

    /// Where one element lies in the segment.
    fn place(
        &self,
        kv: usize,
        layer: usize,
        block: usize,
        slot: usize,
        head: usize,
        at: usize,
    ) -> u64 {
        let [_, blocks, heads, slots, width] = SHAPE;
        let inner = if self.is_hnd {
            head * slots + slot
        } else {
            slot * heads + head
        };
        let element = ((kv * blocks + block) * heads * slots + inner) * width + at;
        (layer * LAYER_BYTES + element * 2) as u64
    }

    /// The chunk that these blocks hold: K and V, layers, tokens, heads and their elements.
    fn chunk(&self, blocks: &[u64]) -> Vec<u8> {
        let [_, _, heads, slots, width] = SHAPE;
        let mut chunk = Vec::new();
        for (kv, layer) in (0..2).flat_map(|kv| (0..LAYERS).map(move |layer| (kv, layer))) {
            for token in 0..blocks.len() * slots {
                for (head, at) in (0..heads).flat_map(|head| (0..width).map(move |at| (head, at))) {
                    let block = blocks[token / slots] as usize;
                    let mut element = [0; 2];
                    let place = self.place(kv, layer, block, token % slots, head, at);
                    self.segment
                        .file
                        .read_exact_at(&mut element, place)
                        .unwrap();
                    chunk.extend(element);
                }
            }
        }
        chunk
    }

    /// Gives every element a value of its own.
    fn fill(&self, seed: u16) {
        for element in 0..(LAYERS * LAYER_BYTES / 2) as u16 {
            let value = element.wrapping_mul(7).wrapping_add(seed).to_le_bytes();
            self.segment
                .file
                .write_all_at(&value, u64::from(element) * 2)
                .unwrap();
        }
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.segment.path()).unwrap()
    }

    async fn store(&mut self, key: &Key, blocks: &[u64]) -> bool {
        let reply = self
            .client
            .call("store", &transfer(key, self.id, blocks))
            .await;
        success(&reply.value())
    }

    async fn retrieve(&mut self, key: &Key, blocks: &[u64], skip: i64) -> bool {
        let mut arguments = transfer(key, self.id, blocks);
        arguments.push(skip.into());
        success(&self.client.call("retrieve", &arguments).await.value())
    }
}

fn transfer(key: &Key, id: u64, blocks: &[u64]) -> Vec<Value> {
    let blocks = blocks.iter().map(|&block| block.into()).collect();
    let groups = Value::Array(vec![Value::Array(blocks)]);
    vec![
        key.value(),
        id.into(),
        groups,
        Value::Binary(b"stub_ipc_handle".to_vec()),
    ]
}

fn success(reply: &Value) -> bool {
    reply.as_array().unwrap()[1].as_bool().unwrap()
}

/// A server, and a local socket of it.
fn server_with_socket(flags: &[&str]) -> (Server, String, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("ipc://{}", dir.path().join("engines.sock").display());
    let server = Server::start(&[flags, &["--listen", &url]].concat());
    (server, url, dir)
}

#[tokio::test]
async fn chunks_are_the_same_whoever_copies_them() {
    let (server, socket, _dir) = server_with_socket(&[]);
    for (index, (url, is_hnd)) in [(&server.url, true), (&socket, false)]
        .into_iter()
        .enumerate()
    {
        let model = format!("m{index}");
        let prompt = tokens(2 * CHUNK, index as u64);
        let mut engine = Engine::register(url, 1, &model, is_hnd).await;
        engine.fill(3);
        let before = engine.bytes();
        let stored = Key::new(&model, &prompt, Some(0), "w");
        assert!(engine.store(&stored, &[4, 1, 2, 3]).await);
        assert_eq!(engine.bytes(), before, "a store reads only");

        // An engine that copies by itself finds what it would have stored.
        let mut worker = Worker::register(&server, 2, &model).await;
        let key = Key::new(&model, &prompt, Some(0), "r");
        assert_eq!(lookup(&mut worker.client, &key).await, 2);
        let chunks = worker.retrieve(&key).await.unwrap();
        assert_eq!(chunks, [engine.chunk(&[4, 1]), engine.chunk(&[2, 3])]);

        // And the other way round, into other blocks, but for the first one.
        let other = tokens(2 * CHUNK, 10 + index as u64);
        let stored = Key::new(&model, &other, Some(0), "w2");
        assert!(worker.store(&stored, |chunk| 100 + chunk as u8).await);
        let key = Key::new(&model, &other, Some(0), "r2");
        assert_eq!(lookup(&mut worker.client, &key).await, 2);
        assert!(engine.retrieve(&key, &[9, 5, 7, 6], 8).await);
        assert_eq!(engine.chunk(&[5]), [100; 1024]);
        assert_eq!(engine.chunk(&[7, 6]), [101; 2048]);
        let mut expected = Engine::register(url, 3, &model, is_hnd).await;
        expected.fill(3);
        assert_eq!(
            engine.chunk(&[9, 8, 0]),
            expected.chunk(&[9, 8, 0]),
            "the rest is as it was"
        );
        expected
            .client
            .call("unregister_kv_cache", &[3.into()])
            .await
            .value();
        let locks =
            server.json("/status").await["storage_manager"]["l1_manager"]["owned_locks"].clone();
        assert_eq!(locks, 0, "a retrieve gives its locks back");

        // So does one that comes after its registration has ended.
        engine
            .client
            .call("unregister_kv_cache", &[1.into()])
            .await
            .value();
        let key = Key::new(&model, &other, Some(0), "r3");
        assert_eq!(lookup(&mut engine.client, &key).await, 2);
        assert!(!engine.retrieve(&key, &[9, 5, 7, 6], 0).await);
        let locks =
            server.json("/status").await["storage_manager"]["l1_manager"]["owned_locks"].clone();
        assert_eq!(locks, 0);
    }
}

#[tokio::test]
async fn a_store_that_is_not_to_be_saved_is_not() {
    let server = Server::start(&[]);
    let mut engine = Engine::register(&server.url, 1, "m", true).await;
    engine.fill(3);
    let key = Key::new("m", &tokens(2 * CHUNK, 1), Some(0), "w");
    let mut arguments = transfer(&key, engine.id, &[4, 1, 2, 3]);
    let Value::Map(fields) = &mut arguments[0] else {
        panic!("a key is a map");
    };
    for (name, value) in fields {
        if name.as_str() == Some("request_configs") {
            *value = map(&[("lmcache.skip_save", true.into())]);
        }
    }
    let reply = engine.client.call("store", &arguments).await.value();
    assert!(success(&reply), "done as asked");
    assert_eq!(lookup_free(&mut engine.client, &key).await, 0);
    assert!(engine.store(&key, &[4, 1, 2, 3]).await);
    assert_eq!(lookup_free(&mut engine.client, &key).await, 2);
}

#[tokio::test]
async fn an_engines_registration_is_shown_and_ends_with_its_descriptors() {
    let server = Server::start(&[]);
    let open_files = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
        let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        links
            .filter(|link| link.to_string_lossy().contains("/dev/shm/stockade-test-"))
            .count()
    };
    let mut engine = Engine::register(&server.url, 41, "m", true).await;
    assert_eq!(open_files(), 1, "both layers are in one segment");
    let status = server.json("/status").await;
    assert_eq!(status["registered_gpu_ids"], serde_json::json!([41]));
    let layout = &status["cache_context_meta"]["41"]["kv_cache_layout"];
    assert_eq!(layout["cache_size_per_token"], 2 * 2 * 2 * 8 * 2);
    let group = &layout["kernel_groups"][0];
    assert_eq!(group["engine_kv_format"], "NL_X_TWO_NB_NH_BS_HS");
    assert_eq!(group["engine_kv_concrete_shape"], "2 x [2, 10, 2, 8, 8]");

    // The other path's operation ends registrations of the other path.
    engine.client.call(15, &[41.into()]).await.value();
    assert_eq!(open_files(), 1);
    engine.client.call(2, &[41.into()]).await.value();
    assert_eq!(open_files(), 0);
    let key = Key::new("m", &tokens(CHUNK, 1), Some(0), "late");
    let reply = engine.client.call(6, &transfer(&key, 41, &[1, 2])).await;
    assert_eq!(
        reply.value(),
        Value::Array(vec![Value::Binary(Vec::new()), false.into()]),
        "as LMCache answers it, with no event to wait for"
    );
}

#[tokio::test]
async fn what_is_not_an_engines_own_memory_is_refused() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    let own = Segment::new(LAYER_BYTES);
    let link = Segment::new(0);
    std::fs::remove_file(link.path()).unwrap();
    std::os::unix::fs::symlink(own.path(), link.path()).unwrap();
    let fifo = Segment::new(0);
    std::fs::remove_file(fifo.path()).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, fifo.path(), mode).unwrap();
    let sparse = Segment::new(0);
    sparse.file.set_len(LAYER_BYTES as u64).unwrap();
    let short = Segment::new(LAYER_BYTES - 1);
    let pool = format!("stockade-{}", server.url.rsplit(':').next().unwrap());
    let up = format!("../dev/shm/{}", own.name);
    let mut cases = vec![
        ("", "no name"),
        ("/", "no name"),
        ("..", "no name"),
        (up.as_str(), "no name"),
        ("stockade-test-nowhere", "cannot be opened"),
        (&link.name, "cannot be opened"),
        (&fifo.name, "does not belong"),
        (&sparse.name, "has holes"),
        (&short.name, "shorter"),
        (&pool, "this server's pool"),
    ];
    let foreign = Segment::new(LAYER_BYTES);
    if rustix::process::getuid().is_root() {
        std::os::unix::fs::chown(foreign.path(), Some(12_345), None).unwrap();
        cases.push((&foreign.name, "does not belong"));
    }
    for (name, sentence) in cases {
        let tensors = vec![tensor(name, LAYER_BYTES, &SHAPE, 0)];
        let reply = client
            .call("register_kv_cache", &registration(1, "m", tensors, "HND"))
            .await;
        let error = reply.error();
        assert!(error.contains(sentence), "`{name}`: {error}");
    }
    let cuda = handle(&[("type", "cuda".into()), ("version", 1.into())]);
    let pickled = Value::Ext(1, b"\x80\x04cos\nsystem\n.".to_vec());
    for (tensors, sentence) in [
        (vec![cuda], "LMCACHE_MP_TRANSFER_MODE=engine_driven"),
        (vec![pickled], "never opened"),
        (vec![], "is empty"),
        (
            vec![tensor(&own.name, 4096, &[2, 10, 2, 8, 8], 0)],
            "behind its segment",
        ),
        (
            vec![tensor(&own.name, LAYER_BYTES, &[40], 0)],
            "no layout of Vllm",
        ),
        (
            vec![tensor(&own.name, LAYER_BYTES, &[2, 2, 2, 7, 8], 0)],
            "--chunk-size",
        ),
    ] {
        let reply = client
            .call("register_kv_cache", &registration(1, "m", tensors, "HND"))
            .await;
        let error = reply.error();
        assert!(error.contains(sentence), "{error}");
    }
    let status = server.json("/status").await;
    assert_eq!(status["registered_gpu_ids"], serde_json::json!([]));
}

#[tokio::test]
async fn memory_that_changes_after_its_registration_costs_its_engine_only() {
    let mut server = Server::start(&[]);
    let mut engine = Engine::register(&server.url, 1, "m", true).await;
    engine.fill(1);
    let prompt = tokens(CHUNK, 1);
    let stored = Key::new("m", &prompt, Some(0), "w");
    assert!(engine.store(&stored, &[1, 2]).await);

    let other = Key::new("m", &tokens(CHUNK, 2), Some(0), "w2");
    for blocks in [&[1][..], &[1, 10], &[1, u64::MAX], &[]] {
        assert!(!engine.store(&other, blocks).await, "{blocks:?}");
    }
    // Blocks that hold nothing are not stored, and that is no failure.
    assert!(engine.store(&other, &[0, 0]).await);

    let file = OpenOptions::new()
        .write(true)
        .open(engine.segment.path())
        .unwrap();
    file.set_len(100).unwrap();
    assert!(
        !engine.store(&other, &[1, 2]).await,
        "a store of what was cut off"
    );
    assert_eq!(lookup_free(&mut engine.client, &other).await, 0);
    let key = Key::new("m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut engine.client, &key).await, 1);
    assert!(
        !engine.retrieve(&key, &[3, 4], 0).await,
        "into what was cut off"
    );
    assert_eq!(file.metadata().unwrap().len(), 100, "nor is it lengthened");

    // Holes would be filled with pages that the kernel counts as the server's.
    file.set_len((LAYERS * LAYER_BYTES) as u64).unwrap();
    let key = Key::new("m", &prompt, Some(0), "r2");
    assert_eq!(lookup(&mut engine.client, &key).await, 1);
    assert!(!engine.retrieve(&key, &[3, 4], 0).await);
    let full = OpenOptions::new()
        .write(true)
        .open(engine.segment.path())
        .unwrap();
    full.write_all_at(&vec![0; LAYERS * LAYER_BYTES], 0)
        .unwrap();
    assert!(full.metadata().unwrap().blocks() * 512 >= (LAYERS * LAYER_BYTES) as u64);
    let key = Key::new("m", &prompt, Some(0), "r3");
    assert_eq!(lookup(&mut engine.client, &key).await, 1);
    assert!(engine.retrieve(&key, &[3, 4], 0).await, "whole again");

    // Nothing stays behind of all that failed.
    assert!(server.is_running());
    let l1 = server.json("/status").await["storage_manager"]["l1_manager"].clone();
    assert_eq!(
        (&l1["owned_locks"], &l1["staging_object_count"]),
        (&0.into(), &0.into())
    );
    assert_eq!(l1["total_object_count"], 1);
}

#[tokio::test]
async fn instance_ids_are_of_no_use_to_other_users() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can make a connection look like another user's.
    }
    let server = Server::start(&[]);
    let mut engine = Engine::register(&server.url, 7, "m", true).await;
    let prompt = tokens(CHUNK, 1);
    let stored = Key::new("m", &prompt, Some(0), "w");
    assert!(engine.store(&stored, &[1, 2]).await);
    let sockets = || -> Vec<PathBuf> {
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        let files = files.filter_map(|file| Some(file.ok()?.path()));
        let is_socket = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
        };
        files.filter(is_socket).collect()
    };
    let before = sockets();
    let mut stranger = Client::connect(&server.url).await;
    for socket in sockets().iter().filter(|socket| !before.contains(socket)) {
        std::os::unix::fs::chown(socket, Some(12_345), None).unwrap();
    }
    let key = Key::new("m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut stranger, &key).await, 1);
    let before = engine.bytes();
    let mut retrieve = transfer(&key, 7, &[3, 4]);
    retrieve.push(0.into());
    assert!(!success(
        &stranger.call("retrieve", &retrieve).await.value()
    ));
    assert_eq!(engine.bytes(), before, "nobody else writes into its memory");
    let other = Key::new("m", &tokens(CHUNK, 2), Some(0), "w2");
    assert!(!success(
        &stranger
            .call("store", &transfer(&other, 7, &[1, 2]))
            .await
            .value()
    ));
    let own = Segment::new(LAYER_BYTES);
    std::os::unix::fs::chown(own.path(), Some(12_345), None).unwrap();
    let tensors = vec![tensor(&own.name, LAYER_BYTES, &SHAPE, 0)];
    for (operation, arguments) in [
        (
            "register_kv_cache",
            registration(7, "m", tensors.clone(), "HND").to_vec(),
        ),
        ("unregister_kv_cache", vec![7.into()]),
        (
            "register_kv_cache_engine_driven_context",
            vec![stockade_tests::registration(7, "m")],
        ),
    ] {
        let error = stranger.call(operation, &arguments).await.error();
        assert!(error.contains("another user"), "{operation}: {error}");
    }
    // Under an instance id of its own, its own memory is as good as anybody's.
    let arguments = registration(8, "m", tensors, "HND");
    stranger.call("register_kv_cache", &arguments).await.value();
    assert!(engine.store(&other, &[1, 2]).await, "the engine goes on");
}

#[tokio::test]
async fn modes_say_who_may_copy() {
    let prompt = tokens(CHUNK, 1);
    let key = Key::new("m", &prompt, Some(0), "w");
    let server = Server::start(&["--supported-transfer-mode", "engine_driven"]);
    let mut worker = Worker::register(&server, 1, "m").await;
    assert!(worker.store(&key, |_| 1).await);
    let segment = Segment::new(LAYER_BYTES);
    let tensors = || vec![tensor(&segment.name, LAYER_BYTES, &SHAPE, 0)];
    let mut retrieve = transfer(&key, 1, &[1, 2]);
    let store = retrieve.clone();
    retrieve.push(0.into());
    for (operation, arguments) in [
        (
            "register_kv_cache",
            registration(2, "m", tensors(), "HND").to_vec(),
        ),
        ("store", store.clone()),
        ("retrieve", retrieve.clone()),
    ] {
        let error = worker.client.call(operation, &arguments).await.error();
        assert!(error.contains("start the server with auto"), "{error}");
    }
    drop(server);

    let server = Server::start(&["--supported-transfer-mode", "lmcache_driven"]);
    let mut engine = Engine::register(&server.url, 1, "m", true).await;
    assert!(engine.store(&key, &[1, 2]).await);
    let error = engine
        .client
        .call(14, &[stockade_tests::registration(2, "m")])
        .await
        .error();
    assert!(error.contains("auto"), "{error}");
    drop(server);

    // With both, what a worker registered for is what it may use.
    let server = Server::start(&[]);
    let mut engine = Engine::register(&server.url, 1, "m", true).await;
    let error = engine
        .client
        .call(16, &[key.value(), 1.into()])
        .await
        .error();
    assert!(error.contains("left the copying to the server"), "{error}");
    let mut worker = Worker::register(&server, 2, "m").await;
    let mut store = store;
    store[1] = 2.into();
    assert!(!success(&worker.client.call("store", &store).await.value()));
}

#[tokio::test]
async fn a_reaped_engine_registers_again_and_goes_on() {
    let server = Server::start(&[
        "--worker-reap-timeout-seconds",
        "0.5",
        "--worker-registration-grace-seconds",
        "0.5",
    ]);
    let mut engine = Engine::register(&server.url, 5, "m", true).await;
    engine.fill(9);
    let log = || {
        server
            .log()
            .iter()
            .any(|line| line.contains("worker reaped"))
    };
    wait_for("the silent engine to be reaped", || log().then_some(()));
    let key = Key::new("m", &tokens(CHUNK, 1), Some(0), "w");
    assert!(
        !engine.store(&key, &[1, 2]).await,
        "declined, not left waiting"
    );
    let ping = engine.client.call(22, &[5.into()]).await.value();
    assert_eq!(
        ping,
        Value::from(false),
        "its ping tells it to register again"
    );
    let mut again = Engine::register(&server.url, 5, "m", true).await;
    again.fill(9);
    assert!(again.store(&key, &[1, 2]).await);
    let found = lookup(
        &mut again.client,
        &Key::new("m", &tokens(CHUNK, 1), Some(0), "r"),
    )
    .await;
    assert_eq!(found, 1);
}
