//! Strangers on one server: what a connection may name, and what it must never learn.

mod changes;
mod denials;
mod hints;
mod leaving;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{
    Client, Key, Process, Server, Worker, field, lookup, lookup_free, pack, registration, tokens,
};

const CHUNK: usize = 16;
const SALT_A: &str = "salt-of-a-59c1";
const SALT_B: &str = "salt-of-b-e07d";

/// A server with a listener per name, on local sockets, and the tenants of `tables`.
struct House {
    directory: tempfile::TempDir,
    server: Server,
}

impl House {
    fn start(listeners: &[&str], tables: &str, flags: &[&str]) -> Self {
        Self::start_with(listeners, tables, flags, &[])
    }

    fn start_with_env(listeners: &[&str], tables: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_with(listeners, tables, &[], environment)
    }

    fn start_with(
        listeners: &[&str],
        tables: &str,
        flags: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = write_file(directory.path(), listeners, tables);
        let flags = [&["--config", file.to_str().unwrap()], flags].concat();
        let server = Server::start_with_env(&flags, environment);
        Self { directory, server }
    }

    /// Two tenants, each with a listener of its own name.
    fn of_two() -> Self {
        let tables = format!(
            "[tenants.a]\nsalts = ['{SALT_A}']\nlisteners = ['a']\n\
             [tenants.b]\nsalts = ['{SALT_B}']\nlisteners = ['b']\n"
        );
        Self::start(&["a", "b"], &tables, &[])
    }

    fn url(&self, listener: &str) -> String {
        url(self.directory.path(), listener)
    }

    fn rewrite(&self, listeners: &[&str], tables: &str) {
        write_file(self.directory.path(), listeners, tables);
    }

    async fn denied(&self, tenant: &str, reason: &str) -> u64 {
        let (_, body) = self.server.http("GET", "/metrics", "").await;
        let sample =
            format!("stockade_tenant_denied_total{{tenant=\"{tenant}\",reason=\"{reason}\"}} ");
        let line = body.lines().find_map(|line| line.strip_prefix(&sample));
        line.map_or(0, |count| count.parse().unwrap())
    }
}

fn url(directory: &Path, listener: &str) -> String {
    format!("ipc://{}/{listener}.sock", directory.display())
}

fn write_file(directory: &Path, listeners: &[&str], tables: &str) -> PathBuf {
    let listeners = listeners.iter().map(|name| {
        let endpoint = url(directory, name);
        format!("[[listener]]\nname = '{name}'\nendpoint = '{endpoint}'\n")
    });
    let path = directory.join("stockade.toml");
    std::fs::write(&path, listeners.collect::<String>() + tables).unwrap();
    path
}

fn salted(key: &Key, salt: &str, request: &str) -> Key {
    Key {
        salt: salt.to_owned(),
        request_id: request.to_owned(),
        ..key.clone()
    }
}

#[tokio::test]
async fn equal_prompts_and_numbers_of_two_tenants_never_meet() {
    let mut house = House::of_two();
    // The same worker number, model, prompt and request ids on both sides, and no salt.
    let mut a = Worker::register_at(&house.url("a"), 1, "m").await;
    let mut b = Worker::register_at(&house.url("b"), 1, "m").await;
    let prompt = tokens(3 * CHUNK, 1);
    let key = Key::new("m", &prompt, Some(0), "r");
    assert!(a.store(&key, |_| 0xaa).await);
    assert_eq!(lookup_free(&mut a.client, &key).await, 3);
    assert_eq!(lookup_free(&mut b.client, &key).await, 0, "a cross hit");
    assert!(b.store(&key, |_| 0xbb).await, "b stores its own");
    for (worker, byte) in [(&mut a, 0xaa), (&mut b, 0xbb)] {
        assert_eq!(lookup(&mut worker.client, &key).await, 3);
        let chunks = worker.retrieve(&key).await.unwrap();
        assert!(chunks.iter().flatten().all(|&found| found == byte));
    }

    // A salt that is its own may be sent, one that is not is a miss, whoever has it or nobody.
    let own = salted(&key, SALT_A, "own");
    assert_eq!(lookup_free(&mut a.client, &own).await, 3);
    for forged in [SALT_A, "nobody's", "stockade-denied"] {
        let key = salted(&key, forged, "forged");
        assert_eq!(lookup(&mut b.client, &key).await, 0, "{forged}");
        assert!(b.retrieve(&key).await.is_none(), "{forged}");
        assert!(b.prepare_store(&key).await.is_empty(), "{forged}");
        assert!(!b.commit_store(&key).await, "{forged}");
        assert_eq!(lookup_free(&mut b.client, &key).await, 0, "{forged}");
    }
    // Nor does the open listener lead to what is bound elsewhere.
    let mut open = Worker::register(&house.server, 1, "m").await;
    let forged = salted(&key, SALT_A, "forged");
    assert_eq!(lookup_free(&mut open.client, &forged).await, 0);
    let nobodys = salted(&key, "nobody's", "w");
    assert!(open.store(&nobodys, |_| 1).await, "other salts are as ever");
    assert_eq!(lookup_free(&mut open.client, &nobodys).await, 3);

    assert!(house.denied("b", "foreign_salt").await >= 9);
    assert!(house.denied("(none)", "foreign_salt").await >= 1);
    assert_eq!(house.denied("a", "foreign_salt").await, 0);
    let line = house.server.wait_for_line("denied: lookup from ipc://");
    assert!(
        line.contains("listener b") && line.contains("salt_blake3="),
        "{line}"
    );
    assert!(!house.server.log().join("\n").contains(SALT_A));
}

#[tokio::test]
async fn no_operation_reaches_into_another_tenant() {
    let house = House::of_two();
    let mut a = Worker::register_at(&house.url("a"), 7, "m").await;
    let mut b = Client::connect(&house.url("b")).await;
    let key = Key::new("m", &tokens(2 * CHUNK, 2), Some(0), "shared-id");
    assert!(a.store(&key, |_| 0xa1).await);
    assert_eq!(lookup(&mut a.client, &key).await, 2);

    // Without a registration of its own, b learns nothing of a's model or worker.
    assert_eq!(lookup(&mut b, &key).await, 0);
    let data = Value::Binary(Vec::new());
    let commit = b.call(17, &[key.value(), 7.into(), data]).await.value();
    assert_eq!(
        commit,
        Value::from(false),
        "a worker of that number is not b's"
    );
    // Neither its end of the session, nor of the worker, nor its clearing, is a's.
    for (operation, arguments) in [
        (Value::from("end_session"), vec!["shared-id".into()]),
        (
            Value::from("unregister_kv_cache_engine_driven_context"),
            vec![7.into()],
        ),
        (Value::from("clear"), vec![true.into()]),
        (
            Value::from("free_lookup_locks"),
            vec![key.value(), 1.into()],
        ),
    ] {
        assert_eq!(b.call(operation, &arguments).await.value(), Value::Nil);
    }
    let chunks = a.retrieve(&key).await.expect("a's locks are a's");
    assert!(chunks.iter().flatten().all(|&byte| byte == 0xa1));
    assert_eq!(
        lookup_free(&mut a.client, &key).await,
        2,
        "nothing was cleared"
    );

    // Events of a are a's, also those of what goes.
    let events = async |listener: &str| {
        let mut client = Client::connect(&house.url(listener)).await;
        let arguments = [9.into(), "m".into(), 0.into(), 100.into()];
        let batch = client.call("subscribe_kv_events", &arguments).await.value();
        field(&batch, "events").as_array().unwrap().len()
    };
    assert_eq!(events("b").await, 0);
    assert_eq!(events("a").await, 2);
    let mut client = Client::connect(&house.url("a")).await;
    client.call("clear", &[false.into()]).await.value();
    assert_eq!(events("b").await, 0);
    assert!(events("a").await > 2);
    assert_eq!(
        lookup_free(&mut a.client, &key).await,
        0,
        "its own clearing is"
    );
}

#[tokio::test]
async fn a_stream_of_events_ends_by_nobody_else_who_calls_itself_the_same() {
    let house = House::of_two();
    let mut a = Worker::register_at(&house.url("a"), 1, "m").await;
    let mut stream = Client::connect(&house.url("a")).await;
    let arguments = [1.into(), "m".into(), 0.into(), 100.into()];
    stream.call("subscribe_kv_events", &arguments).await.value();
    let mut b = Client::connect(&house.url("b")).await;
    b.call("subscribe_kv_events", &arguments).await.value();
    // The credit for the next batch, which the next store fills.
    stream
        .send(vec![
            pack(&0.into()),
            Bytes::new(),
            Bytes::from_static(b"ack"),
        ])
        .await;
    let key = Key::new("m", &tokens(CHUNK, 3), Some(0), "w");
    assert!(a.store(&key, |_| 1).await);
    let batch = stream.receive().await;
    let payload = rmpv::decode::read_value(&mut &batch[2][..]).expect("the stream was ended");
    assert_eq!(field(&payload, "events").as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn whose_a_local_process_is_the_kernel_says() {
    let uid = rustix::process::getuid().as_raw();
    let tables = format!(
        "[tenants.mine]\nsalts = ['{SALT_A}']\nlisteners = ['shared']\nuids = [{uid}]\n\
         [tenants.other]\nsalts = ['{SALT_B}']\nlisteners = ['shared', 'foreign']\nuids = [{}]\n",
        uid + 1
    );
    let house = House::start(&["shared", "foreign"], &tables, &[]);
    let mut mine = Worker::register_at(&house.url("shared"), 1, "m").await;
    let key = Key::new("m", &tokens(CHUNK, 4), Some(0), "r");
    assert!(mine.store(&key, |_| 1).await);
    assert_eq!(
        lookup_free(&mut mine.client, &salted(&key, SALT_A, "q")).await,
        1
    );
    assert_eq!(
        lookup_free(&mut mine.client, &salted(&key, SALT_B, "q")).await,
        0
    );

    let mut stranger = Client::connect(&house.url("foreign")).await;
    let refusal = stranger.call(14, &[registration(1, "m")]).await.error();
    assert!(
        refusal.contains("no tenant of listener foreign"),
        "{refusal}"
    );
    assert_eq!(stranger.call(24, &[]).await.value(), Value::from("OK"));
    for salt in ["", SALT_A, SALT_B] {
        assert_eq!(lookup(&mut stranger, &salted(&key, salt, "s")).await, 0);
    }
    stranger.call("clear", &[true.into()]).await.value();
    assert_eq!(lookup_free(&mut mine.client, &key).await, 1);
    assert!(house.denied("(stranger)", "stranger").await >= 4);
    assert_eq!(house.denied("(stranger)", "scope").await, 1);
}

/// Takes connections on a port and hands them on to a local socket, as another user.
const BRIDGE: &str = r"
import os, socket, sys, threading
os.setgroups([]), os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
def pump(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
listener = socket.create_server(('127.0.0.1', 0))
print(listener.getsockname()[1], flush=True)
while True:
    near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
    far.connect(sys.argv[2])
    for ends in ((near, far), (far, near)):
        threading.Thread(target=pump, args=ends, daemon=True).start()
";

/// A [`BRIDGE`] that ends with this.
struct Bridge {
    _process: Process,
    url: String,
}

impl Bridge {
    fn start(uid: u32, socket: &Path) -> Self {
        use std::io::BufRead as _;
        let child = std::process::Command::new("python3")
            .args(["-c", BRIDGE, &uid.to_string(), socket.to_str().unwrap()])
            .stdout(std::process::Stdio::piped())
            .spawn();
        let mut process = Process(child.unwrap());
        let mut port = String::new();
        let stdout = process.0.stdout.as_mut().unwrap();
        std::io::BufReader::new(stdout)
            .read_line(&mut port)
            .unwrap();
        let url = format!("tcp://127.0.0.1:{}", port.trim());
        Self {
            _process: process,
            url,
        }
    }
}

#[tokio::test]
async fn processes_of_several_users_at_one_socket_are_several_tenants() {
    use std::os::unix::fs::PermissionsExt as _;
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: only root can be several users");
        return;
    }
    let tables = format!(
        "[tenants.one]\nsalts = ['{SALT_A}']\nlisteners = ['shared']\nuids = [54321]\n\
         [tenants.two]\nsalts = ['{SALT_B}']\nlisteners = ['shared']\ngids = [54322]\n"
    );
    let house = House::start(&["shared"], &tables, &[]);
    let socket = house.directory.path().join("shared.sock");
    for (path, mode) in [(house.directory.path(), 0o755), (&*socket, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let bridges = [54321, 54322, 54323].map(|uid| Bridge::start(uid, &socket));
    // Equal numbers, models, prompts and request ids, and no salt.
    let mut one = Worker::register_at(&bridges[0].url, 1, "m").await;
    let mut two = Worker::register_at(&bridges[1].url, 1, "m").await;
    let key = Key::new("m", &tokens(2 * CHUNK, 9), Some(0), "r");
    assert!(one.store(&key, |_| 0xaa).await);
    assert_eq!(lookup_free(&mut one.client, &key).await, 2);
    assert_eq!(lookup_free(&mut two.client, &key).await, 0, "a cross hit");
    let forged = salted(&key, SALT_A, "q");
    assert_eq!(lookup_free(&mut two.client, &forged).await, 0);
    assert!(house.denied("two", "foreign_salt").await >= 1);
    let mut stranger = Client::connect(&bridges[2].url).await;
    let refusal = stranger.call(14, &[registration(1, "m")]).await.error();
    assert!(
        refusal.contains("no tenant of listener shared"),
        "{refusal}"
    );
    assert_eq!(lookup(&mut stranger, &forged).await, 0);
}

#[tokio::test]
async fn requests_without_a_salt_get_what_the_tenant_says() {
    let tables = "[tenants.several]\nsalts = ['x', 'y']\ndefault_salt = 'y'\nlisteners = ['a']\n\
                  [tenants.strict]\nsalts = ['z']\nunsalted = 'refuse'\nlisteners = ['b']\n";
    let house = House::start(&["a", "b"], tables, &[]);
    let key = Key::new("m", &tokens(CHUNK, 5), Some(0), "r");
    let mut several = Worker::register_at(&house.url("a"), 1, "m").await;
    assert!(several.store(&key, |_| 1).await);
    for (salt, found) in [("", 1), ("y", 1), ("x", 0)] {
        let key = salted(&key, salt, "q");
        assert_eq!(
            lookup_free(&mut several.client, &key).await,
            found,
            "{salt}"
        );
    }
    let mut strict = Worker::register_at(&house.url("b"), 1, "m").await;
    assert!(!strict.store(&key, |_| 1).await);
    assert_eq!(lookup_free(&mut strict.client, &key).await, 0);
    assert!(strict.store(&salted(&key, "z", "w"), |_| 1).await);
    assert_eq!(
        lookup_free(&mut strict.client, &salted(&key, "z", "q")).await,
        1
    );
    assert!(house.denied("strict", "unsalted").await >= 3);
}

#[tokio::test]
async fn a_tenant_without_the_segment_moves_its_kv_inline() {
    let tables = format!(
        "[tenants.far]\nsalts = ['{SALT_A}']\nlisteners = ['far']\nshared_memory = false\n"
    );
    let house = House::start(&["far"], &tables, &[]);
    let mut client = Client::connect(&house.url("far")).await;
    let registered = client.call(14, &[registration(1, "m")]).await.value();
    assert_eq!(field(&registered, "shm_name").as_str(), Some(""));
    assert_eq!(field(&registered, "pool_size").as_u64(), Some(0));
    let key = Key::new("m", &tokens(CHUNK, 6), Some(0), "r");
    let bytes = vec![0x5a; 2 * 2 * CHUNK * 16 * 2];
    let data = stockade_wire::pickle::write_tensors(&[(
        stockade_wire::Dtype::Float16,
        &[2, 2, CHUNK as u64, 16],
        &bytes,
    )])
    .unwrap();
    let prepared = client.call(16, &[key.value(), 1.into()]).await.value();
    let context = field(&prepared, "context").as_map().unwrap();
    assert!(context.is_empty(), "slots for nobody: {prepared}");
    let stored = client
        .call(17, &[key.value(), 1.into(), Value::Binary(data)])
        .await;
    assert_eq!(stored.value(), Value::from(true));
    assert_eq!(lookup(&mut client, &key).await, 1);
    let answer = client.call(18, &[key.value(), 1.into()]).await.value();
    assert_eq!(field(&answer, "success").as_bool(), Some(true));
    let data = Bytes::copy_from_slice(field(&answer, "data").as_slice().unwrap());
    let tensors = stockade_wire::pickle::read_tensors(&data).unwrap();
    let returned: Vec<u8> = tensors[0].parts().flatten().copied().collect();
    assert_eq!(returned, bytes);
}

#[tokio::test]
async fn tenants_of_a_changed_file_are_in_force_without_a_restart() {
    let mut house = House::of_two();
    let mut a = Worker::register_at(&house.url("a"), 1, "m").await;
    let key = Key::new("m", &tokens(2 * CHUNK, 7), Some(0), "r");
    assert!(a.store(&key, |_| 0x11).await);
    assert_eq!(lookup(&mut a.client, &key).await, 2);

    // What cannot be is refused as a whole, by HTTP and by signal.
    house.rewrite(
        &["a", "b"],
        "[tenants.a]\nsalts = ['q']\nlisteners = ['nowhere']\n",
    );
    let (status, body) = house.server.http("POST", "/v1/config/reload", "").await;
    assert_eq!(status, 409, "{body}");
    assert!(
        body.contains("no listener") && body.contains("nowhere"),
        "{body}"
    );
    house.server.signal(rustix::process::Signal::HUP);
    house.server.wait_for_line("tenants stay as they were");

    // a gets a second salt as its default and a budget; b is gone, c has its listener.
    let tables = format!(
        "[tenants.a]\nsalts = ['{SALT_A}', 'second']\ndefault_salt = 'second'\nlisteners = ['a']\nfloor_gb = 0.01\n\
         [tenants.c]\nsalts = ['c']\nlisteners = ['b']\n"
    );
    house.rewrite(&["a", "b"], &tables);
    let (status, body) = house.server.http("POST", "/v1/config/reload", "").await;
    assert_eq!(status, 200, "{body}");
    // The session that was alive goes on: its connection, its locks, its worker. What it has
    // looked up before was under the other salt, which it still has.
    let old = salted(&key, SALT_A, "r");
    let chunks = a
        .retrieve(&old)
        .await
        .expect("the locks outlive the reload");
    assert!(chunks.iter().flatten().all(|&byte| byte == 0x11));
    assert_eq!(
        lookup_free(&mut a.client, &key).await,
        0,
        "the default is new"
    );
    assert_eq!(
        lookup_free(&mut a.client, &salted(&key, SALT_A, "q")).await,
        2
    );
    let tenants = house.server.json("/v1/tenants").await;
    let tenants = tenants["tenants"].as_array().unwrap();
    let names: Vec<_> = tenants
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"c") && !names.contains(&"b"), "{names:?}");
    let floor = tenants.iter().find(|it| it["name"] == "a").unwrap()["floor_bytes"].clone();
    assert_eq!(floor, 10_737_418);

    house.rewrite(&["a", "b"], "");
    house.server.signal(rustix::process::Signal::HUP);
    house
        .server
        .wait_for_line("tenants were read again count=0");
    assert_eq!(
        lookup_free(&mut a.client, &salted(&key, SALT_A, "q")).await,
        0,
        "another realm's model"
    );
    let mut again = Worker::register_at(&house.url("b"), 1, "m").await;
    assert_eq!(
        lookup_free(&mut again.client, &salted(&key, SALT_A, "q")).await,
        2
    );
}

/// A key with settings of its request.
fn with_configs(key: &Key, configs: &[(&str, Value)]) -> Value {
    let Value::Map(mut fields) = key.value() else {
        panic!("a key is a map");
    };
    for (name, value) in &mut fields {
        if name.as_str() == Some("request_configs") {
            *value = stockade_tests::map(configs);
        }
    }
    Value::Map(fields)
}

/// Stores one chunk inline, with settings; the server's answer.
async fn store_inline(worker: &mut Worker, key: &Key, configs: &[(&str, Value)]) -> Value {
    let bytes = vec![7; 2 * 2 * CHUNK * 16 * 2];
    let shape = [2, 2, CHUNK as u64, 16];
    let tensors = [(stockade_wire::Dtype::Float16, &shape[..], &bytes[..])];
    let data = Value::Binary(stockade_wire::pickle::write_tensors(&tensors).unwrap());
    let arguments = [with_configs(key, configs), worker.id.into(), data];
    worker.client.call(17, &arguments).await.value()
}

#[tokio::test]
async fn hints_of_a_request_are_heard_as_far_as_its_tenant_may() {
    let tables = "[tenants.free]\nsalts = ['f']\nlisteners = ['a']\n\
                  [tenants.limited]\nsalts = ['l']\nlisteners = ['b']\nmax_ttl_seconds = 0.2\nskip_save = false\n";
    let house = House::start(&["a", "b"], tables, &[]);
    let mut free = Worker::register_at(&house.url("a"), 1, "m").await;
    let mut limited = Worker::register_at(&house.url("b"), 1, "m").await;
    let skip = [("lmcache.skip_save", Value::from(true))];
    let key = |seed| Key::new("m", &tokens(CHUNK, seed), Some(0), "r");

    // Not stored, both ways of transfer, and both are told that all is well.
    assert_eq!(store_inline(&mut free, &key(20), &skip).await, true.into());
    let prepare = [with_configs(&key(20), &skip), 1.into()];
    let prepared = free.client.call(16, &prepare).await.value();
    let slots = field(field(&prepared, "context"), "slots");
    assert!(slots.as_array().unwrap().is_empty(), "{prepared}");
    assert_eq!(lookup_free(&mut free.client, &key(20)).await, 0);
    // A tenant that always saves does not hear it.
    assert_eq!(
        store_inline(&mut limited, &key(20), &skip).await,
        true.into()
    );
    assert_eq!(lookup_free(&mut limited.client, &key(20)).await, 1);

    // A long time is a long time for one, and what the file says for the other, as is none.
    let long = [("lmcache.ttl", Value::from(3600))];
    let short = [("lmcache.ttl", Value::from(0.2))];
    assert_eq!(store_inline(&mut free, &key(21), &long).await, true.into());
    assert_eq!(store_inline(&mut free, &key(22), &short).await, true.into());
    assert_eq!(
        store_inline(&mut limited, &key(21), &long).await,
        true.into()
    );
    for (listener, seed) in [("a", 22), ("b", 21), ("b", 20)] {
        let mut client = Client::connect(&house.url(listener)).await;
        let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
        while lookup_free(&mut client, &key(seed)).await > 0 {
            assert!(std::time::Instant::now() < deadline, "{seed} does not end");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    assert_eq!(lookup_free(&mut free.client, &key(21)).await, 1);
}

#[tokio::test]
async fn over_its_rate_a_tenant_is_refused_and_another_is_not() {
    let tables = "[tenants.fast]\nsalts = ['f']\nlisteners = ['a']\n\
                  [tenants.slow]\nsalts = ['s']\nlisteners = ['b']\nrequests_per_second = 0.05\nburst = 3\n";
    let house = House::start(&["a", "b"], tables, &[]);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let url = house.url("b");
        calls.spawn(async move { Client::connect(&url).await.call(24, &[]).await });
    }
    let mut fast = Client::connect(&house.url("a")).await;
    for _ in 0..500 {
        assert_eq!(fast.call(24, &[]).await.value(), Value::from("OK"));
    }
    let replies = calls.join_all().await;
    let refused = replies
        .iter()
        .filter(|reply| matches!(reply, stockade_tests::Reply::Error(text) if text.contains("over its rate")))
        .count();
    let served = replies.len() - refused;
    assert!((1..=4).contains(&served), "{replies:?}");
    house
        .server
        .metric_becomes("stockade_tenant_rate_refusals_total", |count| count >= 4.0)
        .await;
}

/// The fields of a thread's `stat` behind its name, by their numbers in proc(5) less 3.
fn stat(task: &Path) -> Option<Vec<String>> {
    let line = std::fs::read_to_string(task.join("stat")).ok()?;
    let (_, fields) = line.rsplit_once(") ")?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// `SCHED_OTHER` and `SCHED_BATCH` in `stat`.
const OTHER: &str = "0";
const BATCH: &str = "3";

fn policy(stat: &[String]) -> &str {
    &stat[41 - 3]
}

/// Of the server's threads that work for floods: nanoseconds that they ran, and whether each has a
/// nice value of 10 at least and the policy `SCHED_BATCH`.
fn yielding_threads(pid: i32) -> (u64, bool) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // Those that end meanwhile have nothing to read any more.
    let threads: Vec<_> = tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            let ran = std::fs::read_to_string(path.join("schedstat")).ok()?;
            let ran: u64 = ran.split_whitespace().next()?.parse().ok()?;
            let stat = stat(&path)?;
            (name == "stockade yields\n").then_some((ran, stat))
        })
        .collect();
    assert!(!threads.is_empty(), "there are none");
    let yields = |stat: &[String]| {
        let nice: i32 = stat[19 - 3].parse().unwrap();
        nice >= 10 && policy(stat) == BATCH
    };
    let ran = threads.iter().map(|(ran, _)| ran).sum();
    (ran, threads.iter().all(|(_, stat)| yields(stat)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_beside_another_is_worked_for_by_threads_that_give_way() {
    let tables = "[tenants.noisy]\nsalts = ['n']\nlisteners = ['noisy']\n\
                  [tenants.quiet]\nsalts = ['q']\nlisteners = ['quiet']\n";
    let house = House::start(&["noisy", "quiet"], tables, &[]);
    let (before, all_yield) = yielding_threads(house.server.pid());
    // A test that runs under another policy gives that to its server.
    let own = stat(Path::new("/proc/self")).unwrap();
    assert!(all_yield || policy(&own) != OTHER);

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (url, stopped) = (house.url("noisy"), stopped.clone());
        floods.spawn(async move {
            let mut client = Client::connect(&url).await;
            let mut answered = 0;
            while !*stopped.borrow() {
                for _ in 0..64 {
                    client.post(&Value::from(24), &[]).await;
                }
                for _ in 0..64 {
                    client.receive().await;
                    answered += 1;
                }
            }
            answered
        });
    }
    let mut quiet = Client::connect(&house.url("quiet")).await;
    let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
    while yielding_threads(house.server.pid()).0 < before + 20_000_000 {
        assert!(
            std::time::Instant::now() < deadline,
            "nothing is done there"
        );
        for _ in 0..50 {
            assert_eq!(quiet.call(24, &[]).await.value(), Value::from("OK"));
        }
    }
    // Alone it has the usual threads again, and loses nothing on the way.
    drop(quiet);
    let ran = || yielding_threads(house.server.pid()).0;
    loop {
        assert!(std::time::Instant::now() < deadline, "it stays there");
        let at = ran();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        if ran() < at + 1_000_000 {
            break;
        }
    }
    stop.send(true).unwrap();
    let answered: Vec<u64> = floods.join_all().await;
    assert!(answered.iter().all(|&count| count > 0), "{answered:?}");
}

/// Runs the self-test against a server with two tenants; whether it succeeded, and what it said.
fn selftest(house: &House) -> (bool, serde_json::Value) {
    let config = house.directory.path().join("stockade.toml");
    let output = std::process::Command::new(stockade_tests::binary())
        .args([
            "selftest",
            "isolation",
            "--json",
            "--l1-size-gb",
            "0.0625",
            "--config",
        ])
        .arg(config)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = serde_json::from_str(&text)
        .unwrap_or_else(|_| panic!("no JSON: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_self_test_passes_where_tenants_are_kept_apart_and_fails_where_not() {
    let tables = format!(
        "[tenants.a]\nsalts = ['{SALT_A}']\nlisteners = ['a']\n\
         [tenants.b]\nsalts = ['{SALT_B}', 'second']\ndefault_salt = 'second'\nlisteners = ['b']\n"
    );
    let house = House::start(&["a", "b"], &tables, &[]);
    let (passed, said) = selftest(&house);
    assert!(passed, "{said:#}");
    assert_eq!(said["pairs"].as_array().unwrap().len(), 2);
    for pair in said["pairs"].as_array().unwrap() {
        assert_eq!(pair["verdict"], "kept-apart", "{said:#}");
        assert!(pair["control_z"].as_f64().unwrap() >= 6.0, "{said:#}");
    }
    drop(house);

    // The same server without the check of salts: it must be seen.
    let environment = [("STOCKADE_TEST_NO_SALT_CHECK", "1")];
    // Salts are sent, so that those of the owner are what is to be found out.
    let salted = format!(
        "[tenants.a]\nsalts = ['{SALT_A}']\nunsalted = 'refuse'\nlisteners = ['a']\n\
         [tenants.b]\nsalts = ['{SALT_B}']\nunsalted = 'refuse'\nlisteners = ['b']\n"
    );
    let leaky = House::start_with_env(&["a", "b"], &salted, &environment);
    let (passed, said) = selftest(&leaky);
    assert!(!passed, "{said:#}");
    for pair in said["pairs"].as_array().unwrap() {
        assert_eq!(pair["verdict"], "leaks", "{said:#}");
        let why = pair["why"].as_str().unwrap();
        assert!(why.contains("a salt of the owner"), "{why}");
        assert!(
            why.contains("another time"),
            "the times alone tell too: {why}"
        );
    }
    drop(leaky);

    // A tenant that can store nothing: whatever the prober finds proves nothing.
    let tables = tables.replace("listeners = ['a']", "listeners = ['a']\ncap_gb = 0.0");
    let house = House::start(&["a", "b"], &tables, &[]);
    let (passed, said) = selftest(&house);
    assert!(!passed, "{said:#}");
    assert_eq!(said["pairs"][0]["verdict"], "inconclusive", "{said:#}");
    assert_eq!(said["pairs"][1]["verdict"], "kept-apart", "{said:#}");
}

/// How often the bytes are in the server's segment.
fn found_in_segment(segment: &Path, needle: &[u8]) -> usize {
    let bytes = std::fs::read(segment).unwrap();
    bytes
        .windows(needle.len())
        .step_by(64)
        .filter(|window| *window == needle)
        .count()
}

#[tokio::test]
async fn a_purged_tenant_leaves_nothing_but_its_receipt() {
    let house = House::of_two();
    let mut a = Worker::register_at(&house.url("a"), 1, "m").await;
    let mut b = Worker::register_at(&house.url("b"), 1, "m").await;
    let key = Key::new("m", &tokens(20 * CHUNK, 30), Some(0), "r");
    assert!(a.store(&key, |_| 0xa7).await);
    assert!(b.store(&key, |_| 0xb3).await);
    // Traces of a in free memory too: reserved and written, never committed.
    let pending = Key::new("m", &tokens(4 * CHUNK, 31), Some(0), "p");
    let slots = a.prepare_store(&pending).await;
    assert_eq!(slots.len(), 4);
    {
        use std::os::unix::fs::FileExt as _;
        let segment = std::fs::OpenOptions::new()
            .write(true)
            .open(&a.segment)
            .unwrap();
        for (_, offset, length) in slots {
            let bytes = vec![0xa7; usize::try_from(length).unwrap()];
            segment.write_all_at(&bytes, offset).unwrap();
        }
    }
    assert_eq!(lookup(&mut a.client, &key).await, 20);
    let (of_a, of_b) = ([0xa7; 64], [0xb3; 64]);
    assert!(found_in_segment(&a.segment, &of_a) > 0);

    let (status, body) = house
        .server
        .http("POST", "/v1/tenants/nobody/purge", "")
        .await;
    assert_eq!(status, 404, "{body}");
    let output = std::process::Command::new(stockade_tests::binary())
        .args(["tenant", "purge", "a", "--server"])
        .arg(format!("http://{}", house.server.http))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let receipt: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(receipt["complete"], true, "{receipt:#}");
    assert_eq!(receipt["l1"]["objects"], 20, "{receipt:#}");
    assert_eq!(receipt["workers_ended"], 1);
    assert!(receipt["sessions_ended"].as_u64().unwrap() >= 1);
    assert!(receipt["label_sets_forgotten"].as_u64().unwrap() > 0);
    assert!(!text.contains(SALT_A), "a salt is not told");

    // Nothing of a is in the segment, b's is where it was.
    assert_eq!(found_in_segment(&a.segment, &of_a), 0);
    assert!(found_in_segment(&b.segment, &of_b) > 0);
    assert_eq!(
        lookup(
            &mut b.client,
            &Key {
                request_id: "again".into(),
                ..key.clone()
            }
        )
        .await,
        20
    );
    let again = Key {
        request_id: "again".into(),
        ..key.clone()
    };
    let chunks = b.retrieve(&again).await.unwrap();
    assert!(chunks.iter().flatten().all(|&byte| byte == 0xb3));
    let (_, metrics) = house.server.http("GET", "/metrics", "").await;
    assert!(!metrics.contains(SALT_A), "{metrics}");

    // The receipt can be checked, and one that was changed, or that is wrong, is found out.
    let path = house.directory.path().join("receipt.json");
    let check = |receipt: &serde_json::Value| {
        std::fs::write(&path, receipt.to_string()).unwrap();
        let output = std::process::Command::new(stockade_tests::binary())
            .args(["tenant", "check-receipt"])
            .arg(&path)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    let (is_good, said) = check(&receipt);
    assert!(is_good && said.contains("none of its 20 objects"), "{said}");
    let mut changed = receipt.clone();
    changed["l1"]["objects"] = 3.into();
    let (is_good, said) = check(&changed);
    assert!(!is_good && said.contains("seal"), "{said}");
    // As if nothing had been removed: the bytes are put back.
    {
        use std::os::unix::fs::FileExt as _;
        let segment = std::fs::OpenOptions::new()
            .write(true)
            .open(&a.segment)
            .unwrap();
        let first = &receipt["l1"]["digests"][0];
        let (offset, length) = (
            first["offset"].as_u64().unwrap(),
            first["length"].as_u64().unwrap(),
        );
        let bytes = vec![0xa7; usize::try_from(length).unwrap()];
        segment.write_all_at(&bytes, offset).unwrap();
    }
    let (is_good, said) = check(&receipt);
    assert!(!is_good && said.contains("still there"), "{said}");
}

#[tokio::test]
async fn what_tenants_use_is_written_down_line_by_line() {
    let directory = tempfile::tempdir().unwrap();
    let meter = directory.path().join("meter");
    let tables = format!(
        "[tenants.a]\nsalts = ['{SALT_A}']\nlisteners = ['a']\ntags = ['team']\n\
         [tenants.b]\nsalts = ['{SALT_B}']\nlisteners = ['b']\n"
    );
    let flags = [
        "--metering-dir",
        meter.to_str().unwrap(),
        "--metering-interval-seconds",
        "1",
    ];
    let house = House::start(&["a", "b"], &tables, &flags);
    let mut a = Worker::register_at(&house.url("a"), 1, "m").await;
    let key = Key::new("m", &tokens(3 * CHUNK, 40), Some(0), "r");
    assert!(a.store(&key, |_| 1).await);
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    let tagged = with_configs(
        &scheduler,
        &[
            ("lmcache.tag.team", "x".into()),
            ("lmcache.tag.other", "not metered".into()),
        ],
    );
    a.client.call(8, &[tagged, 1.into()]).await.value();
    assert!(a.retrieve(&key).await.is_some());
    let lines = stockade_tests::wait_for("lines of the meter", || {
        let file = std::fs::read_dir(&meter).unwrap().flatten().next()?;
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let held: f64 = lines
            .iter()
            .map(|line| line["l1_byte_seconds"].as_f64().unwrap())
            .sum();
        (held > 0.0).then_some(lines)
    });
    let sum = |field: &str| {
        lines
            .iter()
            .map(|line| line[field].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!((sum("tokens_requested"), sum("tokens_served")), (48, 48));
    assert_eq!(sum("stored_bytes"), 3 * 2 * 2 * CHUNK as u64 * 16 * 2);
    assert!(lines.iter().all(|line| line["tenant"] == "a"), "{lines:?}");
    let text = serde_json::to_string(&lines).unwrap();
    assert!(
        text.contains("\"team\"") && !text.contains("not metered"),
        "{text}"
    );
    let (_, metrics) = house.server.http("GET", "/metrics", "").await;
    assert!(
        metrics.contains(
            "stockade_tenant_tagged_tokens_total{tenant=\"a\",tag=\"team\",value=\"x\"} 48"
        )
    );
}
