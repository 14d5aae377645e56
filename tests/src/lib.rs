//! A server on free ports, a client that is not ours, and what tests need to wait for.
//!
//! The client is the `zeromq` crate with hand-made msgpack, so that server and client share
//! no code. Everything that is started ends with the value that started it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking, wherever the problem shows"
)]

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rmpv::Value;
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

/// What a condition gets on a loaded machine before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// The server's binary, which `cargo build` puts beside the directory of the tests.
#[must_use]
pub fn binary() -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let binary = deps
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("stockade");
    assert!(
        binary.exists(),
        "{} is missing: run `cargo build` first, as tests/run.sh does",
        binary.display()
    );
    binary
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "{what} did not come within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process of a test, which is killed at its end at the latest and only then looked at.
pub struct Process(pub Child);

impl Process {
    /// Kills it and waits for its end; of no effect on one that has ended.
    pub fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A running server.
pub struct Server {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// `tcp://127.0.0.1:PORT`
    pub url: String,
    /// The same port as a socket address.
    pub addr: String,
    /// `127.0.0.1:PORT` of the HTTP API.
    pub http: String,
    _cache: tempfile::TempDir,
}

impl Server {
    /// Starts a server with a pool of 64 MiB, chunks of 16 tokens and `flags`.
    #[must_use]
    pub fn start(flags: &[&str]) -> Self {
        Self::start_with_env(flags, &[])
    }

    /// The same, with variables in its environment.
    #[must_use]
    pub fn start_with_env(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary());
        command.envs(environment.iter().copied());
        Self::launch(command, tempfile::tempdir().unwrap(), flags)
    }

    /// The same, by a program that does something first and then runs what it is given.
    #[must_use]
    pub fn start_through(wrapper: &[&str], flags: &[&str]) -> Self {
        let (program, arguments) = wrapper.split_first().unwrap();
        let mut command = Command::new(program);
        command.args(arguments).arg(binary());
        Self::launch(command, tempfile::tempdir().unwrap(), flags)
    }

    /// The same, as another user; only root can do that.
    #[must_use]
    pub fn start_as(uid: u32, flags: &[&str]) -> Self {
        use std::os::unix::{fs::chown, process::CommandExt as _};
        let cache = tempfile::tempdir().unwrap();
        // The build may lie where that user cannot go.
        let copy = cache.path().join("stockade");
        std::fs::copy(binary(), &copy).unwrap();
        chown(cache.path(), Some(uid), Some(uid)).unwrap();
        let mut command = Command::new(copy);
        command.uid(uid).gid(uid).current_dir("/");
        command.env("HOME", cache.path());
        Self::launch(command, cache, flags)
    }

    fn launch(mut command: Command, cache: tempfile::TempDir, flags: &[&str]) -> Self {
        command
            .args([
                "serve",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--http-port",
                "0",
                "--chunk-size",
                "16",
            ])
            .args(["--l1-size-gb", "0.0625", "--plugin-cache-dir"])
            .arg(cache.path().join("plugins"))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let mut server = Self {
            child,
            log,
            url: String::new(),
            addr: String::new(),
            http: String::new(),
            _cache: cache,
        };
        let line = server.wait_for_line("serving on tcp://");
        let port_after = |marker: &str| {
            let digits = &line[line.find(marker).unwrap() + marker.len()..];
            digits
                .split(|character: char| !character.is_ascii_digit())
                .next()
                .unwrap()
                .to_owned()
        };
        server.addr = format!("127.0.0.1:{}", port_after("tcp://127.0.0.1:"));
        let scheme = if line.contains("HTTP on https") {
            "https"
        } else {
            "http"
        };
        server.http = format!(
            "127.0.0.1:{}",
            port_after(&format!("HTTP on {scheme}://127.0.0.1:"))
        );
        server.url = format!("tcp://{}", server.addr);
        server
    }

    /// Waits for a log line that contains `text`.
    pub fn wait_for_line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.log().iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let ended = self.child.try_wait().unwrap();
            let log = self.log().join("\n");
            assert!(
                ended.is_none(),
                "the server ended with {ended:?} before it logged {text:?}:\n{log}"
            );
            assert!(
                Instant::now() < deadline,
                "no line with {text:?} in the log:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The log so far.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end and returns the exit code; `None` after a signal.
    pub fn wait(&mut self) -> Option<i32> {
        let child = &mut self.child;
        wait_for("the end of the server", || child.try_wait().unwrap()).code()
    }

    /// A request of the HTTP API: status and body.
    pub async fn http(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let answer = self.request(method, path, &[], body).await;
        (answer.status, answer.body)
    }

    /// A request with headers of its own.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let stream = tokio::net::TcpStream::connect(&self.http).await.unwrap();
        exchange(stream, &self.http, method, path, headers, body).await
    }

    /// The value of a metric without labels, or the sum over its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let (status, body) = self.http("GET", "/metrics", "").await;
        assert_eq!(status, 200, "{body}");
        let samples = body.lines().filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values: Vec<f64> = samples
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "there is no metric {name}:\n{body}");
        values.iter().sum()
    }

    /// Waits for a metric to have a value that is `wanted`.
    pub async fn metric_becomes(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.metric(name).await;
            if wanted(value) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} stays at {value}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Memory of its own that the server's process holds; the pool is not counted.
    #[must_use]
    pub fn anonymous_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap()
    }

    /// GET of a JSON document.
    pub async fn json(&self, path: &str) -> serde_json::Value {
        let (status, body) = self.http("GET", path, "").await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// What an HTTP server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its head, in lower case.
    pub head: String,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// One HTTP request over a connection of any kind.
pub async fn exchange(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    host: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Answer {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "Host") {
        request.push_str(&format!("Host: {host}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() {
        request.push_str("Content-Type: application/json\r\n");
    }
    request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A TLS peer that closes without saying so has answered all the same.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .unwrap();
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGTERM first, so that it can take its plugins and its segment with it.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal(rustix::process::Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.child.try_wait().is_ok_and(|ended| ended.is_none())
                && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some((_, port)) = self.addr.rsplit_once(':') {
            // A server that was killed could not remove it.
            let _ = std::fs::remove_file(format!("/dev/shm/stockade-{port}"));
        }
        if std::thread::panicking() {
            eprintln!("log of the server:\n{}", self.log().join("\n"));
        }
    }
}

/// What the server answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The third frame, or nil when there is none.
    Value(Value),
    /// The sentence of an error reply.
    Error(String),
}

impl Reply {
    /// The value; panics on an error reply.
    pub fn value(self) -> Value {
        match self {
            Self::Value(value) => value,
            Self::Error(error) => panic!("error reply: {error}"),
        }
    }

    /// The error; panics on a value.
    #[must_use]
    pub fn error(self) -> String {
        match self {
            Self::Error(error) => error,
            Self::Value(value) => panic!("expected an error, got {value}"),
        }
    }
}

/// msgpack of a value.
#[must_use]
pub fn pack(value: &Value) -> Bytes {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes.into()
}

fn unpack(bytes: &Bytes) -> Value {
    rmpv::decode::read_value(&mut &bytes[..]).unwrap()
}

/// A DEALER client.
pub struct Client {
    socket: DealerSocket,
    next_uid: u64,
}

impl Client {
    /// Connects.
    pub async fn connect(url: &str) -> Self {
        let mut socket = DealerSocket::new();
        tokio::time::timeout(PATIENCE, socket.connect(url))
            .await
            .unwrap()
            .unwrap();
        Self {
            socket,
            next_uid: 0,
        }
    }

    /// Sends raw frames.
    pub async fn send(&mut self, frames: Vec<Bytes>) {
        let message = ZmqMessage::try_from(frames).unwrap();
        tokio::time::timeout(PATIENCE, self.socket.send(message))
            .await
            .unwrap()
            .unwrap();
    }

    /// Receives raw frames.
    pub async fn receive(&mut self) -> Vec<Bytes> {
        let message = tokio::time::timeout(PATIENCE, self.socket.recv())
            .await
            .expect("no reply in time");
        message.unwrap().into_vec()
    }

    /// Sends a request without waiting for its reply; returns its uid.
    pub async fn post(&mut self, operation: &Value, arguments: &[Value]) -> u64 {
        let uid = self.next_uid;
        self.next_uid += 1;
        let mut frames = vec![pack(&Value::from(uid)), pack(operation)];
        frames.extend(arguments.iter().map(pack));
        self.send(frames).await;
        uid
    }

    /// One request and its reply; `operation` is a legacy number or a name.
    pub async fn call(&mut self, operation: impl Into<Value>, arguments: &[Value]) -> Reply {
        let operation = operation.into();
        let uid = self.post(&operation, arguments).await;
        let reply = self.receive().await;
        assert_eq!(
            unpack(&reply[0]),
            Value::from(uid),
            "the reply is to another request"
        );
        let answered = unpack(&reply[1]);
        match answered.as_str() {
            Some(error) if error.starts_with("error: ") && answered != operation => {
                Reply::Error(error.to_owned())
            }
            _ => {
                assert_eq!(
                    answered, operation,
                    "the operation comes back as it was sent"
                );
                Reply::Value(reply.get(2).map_or(Value::Nil, unpack))
            }
        }
    }
}

/// A map with text keys.
#[must_use]
pub fn map(fields: &[(&str, Value)]) -> Value {
    Value::Map(
        fields
            .iter()
            .map(|(name, value)| (Value::from(*name), value.clone()))
            .collect(),
    )
}

/// A field of a map.
#[must_use]
pub fn field<'a>(value: &'a Value, name: &str) -> &'a Value {
    let fields = value
        .as_map()
        .unwrap_or_else(|| panic!("{value} is no map"));
    let found = fields.iter().find(|(key, _)| key.as_str() == Some(name));
    &found
        .unwrap_or_else(|| panic!("{value} has no field {name}"))
        .1
}

/// Tokens that no other seed gives.
#[must_use]
pub fn tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 33).unwrap() % 150_000
    };
    (0..count).map(|_| next()).collect()
}

/// A cache key as LMCache's client sends it.
#[derive(Debug, Clone)]
pub struct Key {
    /// Model.
    pub model: String,
    /// World size.
    pub world_size: u32,
    /// Rank; `None` for the scheduler.
    pub rank: Option<u32>,
    /// All tokens of the request.
    pub tokens: Vec<u32>,
    /// First token of the range.
    pub start: i64,
    /// Token after the range.
    pub end: i64,
    /// Request.
    pub request_id: String,
    /// Tenant.
    pub salt: String,
    /// Locks per object.
    pub readers: i64,
}

impl Key {
    /// A key over all of `tokens`.
    #[must_use]
    pub fn new(model: &str, tokens: &[u32], rank: Option<u32>, request_id: &str) -> Self {
        Self {
            model: model.to_owned(),
            world_size: 1,
            rank,
            tokens: tokens.to_vec(),
            start: 0,
            end: i64::try_from(tokens.len()).unwrap(),
            request_id: request_id.to_owned(),
            salt: String::new(),
            readers: 1,
        }
    }

    /// As msgpack.
    #[must_use]
    pub fn value(&self) -> Value {
        map(&[
            ("model_name", self.model.as_str().into()),
            ("world_size", self.world_size.into()),
            ("worker_id", self.rank.map_or(Value::Nil, Value::from)),
            (
                "token_ids",
                Value::Array(self.tokens.iter().map(|&token| token.into()).collect()),
            ),
            ("start", self.start.into()),
            ("end", self.end.into()),
            ("request_id", self.request_id.as_str().into()),
            ("cache_salt", self.salt.as_str().into()),
            ("request_configs", Value::Nil),
            ("num_kv_readers", self.readers.into()),
        ])
    }
}

/// A registered worker that copies KV through shared memory.
pub struct Worker {
    /// Its own connection.
    pub client: Client,
    /// Its instance id.
    pub id: u64,
    /// Its model.
    pub model: String,
    /// The segment's file; empty name when the server has SHM off.
    pub segment: PathBuf,
}

impl Worker {
    /// Registers a float16 worker of 2 layers, hidden size 16: 2 KiB a chunk of 16 tokens.
    pub async fn register(server: &Server, id: u64, model: &str) -> Self {
        Self::register_at(&server.url, id, model).await
    }

    /// The same, through another listener.
    pub async fn register_at(url: &str, id: u64, model: &str) -> Self {
        let mut client = Client::connect(url).await;
        let reply = client.call(14, &[registration(id, model)]).await.value();
        let name = field(&reply, "shm_name").as_str().unwrap().to_owned();
        Self {
            client,
            id,
            model: model.to_owned(),
            segment: Path::new("/dev/shm").join(name),
        }
    }

    /// Stores prompts of eight chunks of 16 tokens until eviction has gone over the pool's watermark
    /// several times; every store succeeds.
    pub async fn churn(&mut self) {
        for round in 0..60 {
            let prompt = tokens(8 * 16, 1000 + round);
            let key = Key::new(&self.model, &prompt, Some(0), &format!("r{round}"));
            assert!(self.store(&key, |_| 1).await, "round {round}");
            let ended = [key.request_id.as_str().into()];
            self.client.call("end_session", &ended).await.value();
        }
    }

    /// Reserves slots: chunk index, offset, length.
    pub async fn prepare_store(&mut self, key: &Key) -> Vec<(u64, u64, u64)> {
        let reply = self
            .client
            .call(16, &[key.value(), self.id.into()])
            .await
            .value();
        let context = field(&reply, "context");
        let indices = field(context, "chunk_indices").as_array().unwrap();
        let slots = field(context, "slots").as_array().unwrap();
        let number = |value: &Value| value.as_u64().unwrap();
        indices
            .iter()
            .zip(slots)
            .map(|(index, slot)| {
                (
                    number(index),
                    number(field(slot, "offset")),
                    number(field(slot, "length")),
                )
            })
            .collect()
    }

    /// Commits what was prepared.
    pub async fn commit_store(&mut self, key: &Key) -> bool {
        let data = Value::Binary(Vec::new());
        self.client
            .call(17, &[key.value(), self.id.into(), data])
            .await
            .value()
            .as_bool()
            .unwrap()
    }

    /// Stores every chunk of the range, each filled by `byte` of its index.
    pub async fn store(&mut self, key: &Key, byte: impl Fn(u64) -> u8) -> bool {
        use std::os::unix::fs::FileExt as _;
        let slots = self.prepare_store(key).await;
        let segment = std::fs::OpenOptions::new()
            .write(true)
            .open(&self.segment)
            .unwrap();
        for (index, offset, length) in slots {
            segment
                .write_all_at(&vec![byte(index); usize::try_from(length).unwrap()], offset)
                .unwrap();
        }
        self.commit_store(key).await
    }

    /// Reads the range: the bytes of each chunk, or `None` for a miss.
    pub async fn retrieve(&mut self, key: &Key) -> Option<Vec<Vec<u8>>> {
        use std::os::unix::fs::FileExt as _;
        let reply = self
            .client
            .call(18, &[key.value(), self.id.into()])
            .await
            .value();
        if !field(&reply, "success").as_bool().unwrap() {
            return None;
        }
        let segment = std::fs::File::open(&self.segment).unwrap();
        let slots = field(field(&reply, "context"), "slots").as_array().unwrap();
        let chunks = slots
            .iter()
            .map(|slot| {
                let mut bytes =
                    vec![0; usize::try_from(field(slot, "length").as_u64().unwrap()).unwrap()];
                segment
                    .read_exact_at(&mut bytes, field(slot, "offset").as_u64().unwrap())
                    .unwrap();
                bytes
            })
            .collect();
        assert_eq!(
            self.client
                .call(19, &[key.value(), self.id.into()])
                .await
                .value(),
            Value::from(true)
        );
        Some(chunks)
    }
}

/// The payload of a registration.
#[must_use]
pub fn registration(id: u64, model: &str) -> Value {
    wide_registration(id, model, 16)
}

/// The same with another hidden size, of which a chunk takes 128 bytes each.
#[must_use]
pub fn wide_registration(id: u64, model: &str, hidden_size: u64) -> Value {
    map(&[
        ("instance_id", id.into()),
        ("model_name", model.into()),
        ("world_size", 1.into()),
        ("block_size", 16.into()),
        ("num_layers", 2.into()),
        ("hidden_dim_size", hidden_size.into()),
        ("dtype_str", "float16".into()),
        ("use_mla", false.into()),
        ("num_physical_slots", Value::Nil),
    ])
}

/// Looks a key up and returns the hit length in chunks; the locks stay with its request.
pub async fn lookup(client: &mut Client, key: &Key) -> u64 {
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    assert_eq!(
        client.call(8, &[scheduler.value(), 1.into()]).await.value(),
        Value::Nil
    );
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Without a value while a second tier is still asked; engines ask again, too.
        let found = client.call(9, &[key.request_id.as_str().into()]).await;
        if let Some(found) = found.value().as_u64() {
            return found;
        }
        assert!(Instant::now() < deadline, "a lookup does not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Looks a key up, gives the locks back, and returns the hit length in chunks.
pub async fn lookup_free(client: &mut Client, key: &Key) -> u64 {
    let hit = lookup(client, key).await;
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    assert_eq!(
        client
            .call(12, &[scheduler.value(), 1.into()])
            .await
            .value(),
        Value::Nil
    );
    hit
}
