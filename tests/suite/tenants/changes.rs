//! Tenants that change while they work, and tenants that come in as PLAIN users.

use std::{
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

use super::*;

/// One of a tenant's engines, `id` among all of them: stores prompts that all others store too, each with a byte of its own, and
/// reads back what it finds. Returns how many rounds it went.
async fn works(
    url: String,
    id: u64,
    byte: u8,
    is_over: Arc<AtomicBool>,
    hits: Arc<AtomicU64>,
) -> u64 {
    let mut worker = Worker::register_at(&url, id, "m").await;
    let mut round = 0;
    while !is_over.load(Ordering::Relaxed) {
        let prompt = tokens(2 * CHUNK, round % 40);
        let key = Key::new("m", &prompt, Some(0), &format!("{id}-{round}"));
        // May be declined while its salt is nobody's.
        worker.store(&key, |_| byte).await;
        if lookup(&mut worker.client, &key).await == 2
            && let Some(chunks) = worker.retrieve(&key).await
        {
            let other = chunks.iter().flatten().find(|&&found| found != byte);
            assert_eq!(other, None, "not the bytes of tenant {byte}");
            hits.fetch_add(1, Ordering::Relaxed);
        }
        let ended = [key.request_id.as_str().into()];
        worker.client.call("end_session", &ended).await.value();
        round += 1;
    }
    round
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_change_while_they_work_and_nobody_meets_or_waits_for_ever() {
    // Salts and budgets go from one file to the next; listeners stay their tenants'.
    let tables = |round: usize| {
        let [a, b] = match round % 2 {
            0 => ["one", "two"],
            _ => ["three", "four"],
        };
        format!(
            "[tenants.a]\nsalts = ['{a}']\nlisteners = ['a']\nweight = {}\nfloor_gb = 0.0{}\n\
             [tenants.b]\nsalts = ['{b}']\nlisteners = ['b']\nrequests_per_second = {}\n",
            round % 5 + 1,
            round % 3,
            1000 * (round % 2) + 5000,
        )
    };
    let house = House::start(&["a", "b"], &tables(0), &[]);
    let is_over = Arc::new(AtomicBool::new(false));
    let hits = [Arc::<AtomicU64>::default(), Arc::default()];
    let working: Vec<_> = [
        ("a", 1, 0xaa, 0),
        ("b", 2, 0xbb, 1),
        ("a", 3, 0xaa, 0),
        ("b", 4, 0xbb, 1),
    ]
    .map(|(listener, id, byte, at)| {
        let (url, hits) = (house.url(listener), Arc::clone(&hits[at]));
        tokio::spawn(works(url, id, byte, Arc::clone(&is_over), hits))
    })
    .into();
    for round in 1..40 {
        let before: Vec<u64> = hits.iter().map(|it| it.load(Ordering::Relaxed)).collect();
        house.rewrite(&["a", "b"], &tables(round));
        let (status, body) = house.server.http("POST", "/v1/config/reload", "").await;
        assert_eq!(status, 200, "{body}");
        // Both go on under every file.
        let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
        while (0..2).any(|at| hits[at].load(Ordering::Relaxed) <= before[at]) {
            assert!(
                std::time::Instant::now() < deadline,
                "no hits since {round}"
            );
            assert!(working.iter().all(|it| !it.is_finished()), "one has failed");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    is_over.store(true, Ordering::Relaxed);
    for worker in working {
        assert!(worker.await.unwrap() > 0);
    }
    let status = house.server.json("/status").await;
    let l1 = &status["storage_manager"]["l1_manager"];
    assert_eq!(l1["owned_locks"], l1["object_locks"], "{l1}");
}

/// A DEALER that gives a user and a password, spoken by hand: the library of these tests has no
/// PLAIN. `tests/users/test_users.py` does the same with libzmq, and with CURVE.
struct PlainClient(UnixStream);

impl PlainClient {
    async fn connect(path: &Path, username: &str, password: &str) -> Option<Self> {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let mut greeting = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0];
        greeting.extend_from_slice(b"PLAIN");
        greeting.resize(64, 0);
        stream.write_all(&greeting).await.unwrap();
        let mut theirs = [0; 64];
        stream.read_exact(&mut theirs).await.unwrap();
        let mut client = Self(stream);
        let mut hello = b"\x05HELLO".to_vec();
        for text in [username, password] {
            hello.push(u8::try_from(text.len()).unwrap());
            hello.extend_from_slice(text.as_bytes());
        }
        client.write(0x04, &hello).await;
        let (_, welcome) = client.read().await?;
        if !welcome.ends_with(b"WELCOME") {
            return None;
        }
        let initiate = b"\x08INITIATE\x0bSocket-Type\x00\x00\x00\x06DEALER";
        client.write(0x04, initiate).await;
        let (_, ready) = client.read().await?;
        assert!(ready.starts_with(b"\x05READY"), "{ready:?}");
        Some(client)
    }

    async fn write(&mut self, flags: u8, body: &[u8]) {
        let mut frame = vec![flags | 2];
        frame.extend_from_slice(&(body.len() as u64).to_be_bytes());
        frame.extend_from_slice(body);
        self.0.write_all(&frame).await.unwrap();
    }

    /// Flags and body of a frame; `None` when the server has closed.
    async fn read(&mut self) -> Option<(u8, Vec<u8>)> {
        let read = async {
            let flags = self.0.read_u8().await.ok()?;
            let length = match flags & 2 {
                0 => u64::from(self.0.read_u8().await.ok()?),
                _ => self.0.read_u64().await.ok()?,
            };
            let mut body = vec![0; usize::try_from(length).unwrap()];
            self.0.read_exact(&mut body).await.ok()?;
            Some((flags, body))
        };
        tokio::time::timeout(stockade_tests::PATIENCE, read)
            .await
            .expect("no frame in time")
    }

    async fn call(&mut self, operation: &str, arguments: &[Value]) -> Value {
        let frames: Vec<Bytes> = [Value::from(1), operation.into()]
            .iter()
            .chain(arguments)
            .map(pack)
            .collect();
        for (at, frame) in frames.iter().enumerate() {
            self.write(u8::from(at + 1 < frames.len()), frame).await;
        }
        let mut last = Vec::new();
        loop {
            let (flags, body) = self.read().await.expect("the server has closed");
            if flags & 4 != 0 {
                continue;
            }
            last.push(body);
            if flags & 1 == 0 {
                break;
            }
        }
        let value = last
            .get(2)
            .map(|body| rmpv::decode::read_value(&mut &body[..]));
        value.map_or(Value::Nil, Result::unwrap)
    }

    /// Chunks found, as [`lookup_free`] has it.
    async fn found(&mut self, key: &Key) -> u64 {
        self.call("lookup", &[key.value(), 1.into()]).await;
        let id = [Value::from(key.request_id.as_str())];
        let found = self.call("query_prefetch_status", &id).await;
        self.call("end_session", &id).await;
        found.as_u64().unwrap_or(0)
    }

    /// Stores one chunk, inline.
    async fn store(&mut self, key: &Key, byte: u8) -> Value {
        let bytes = vec![byte; 2 * 2 * CHUNK * 16 * 2];
        let shape = [2, 2, CHUNK as u64, 16];
        let tensors = [(stockade_wire::Dtype::Float16, &shape[..], &bytes[..])];
        let data = Value::Binary(stockade_wire::pickle::write_tensors(&tensors).unwrap());
        self.call("commit_store", &[key.value(), 1.into(), data])
            .await
    }
}

#[tokio::test]
async fn a_user_with_a_password_is_its_tenant_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let users = directory.path().join("users");
    std::fs::write(
        &users,
        "ann:correct horse battery\nbob:staple and more of it\neve:of no tenant at all\n",
    )
    .unwrap();
    std::fs::set_permissions(&users, std::fs::Permissions::from_mode(0o600)).unwrap();
    let socket = directory.path().join("users.sock");
    let text = format!(
        "[[listener]]\nname = 'users'\nendpoint = 'ipc://{}'\nmechanism = 'plain'\nusers-file = '{}'\n\
         [tenants.anns]\nsalts = ['{SALT_A}']\nlisteners = ['users']\nusers = ['ann']\n\
         [tenants.bobs]\nsalts = ['{SALT_B}']\nlisteners = ['users']\nusers = ['bob']\n",
        socket.display(),
        users.display(),
    );
    let config = directory.path().join("stockade.toml");
    std::fs::write(&config, &text).unwrap();
    let server = Server::start(&["--config", config.to_str().unwrap()]);
    let key = Key::new("m", &tokens(CHUNK, 1), Some(0), "r");
    let connect =
        async |name: &str, password: &str| PlainClient::connect(&socket, name, password).await;
    let mut ann = connect("ann", "correct horse battery").await.unwrap();
    let mut bob = connect("bob", "staple and more of it").await.unwrap();
    for (client, byte) in [(&mut ann, 1), (&mut bob, 2)] {
        client
            .call(
                "register_kv_cache_engine_driven_context",
                &[registration(1, "m")],
            )
            .await;
        assert_eq!(client.found(&key).await, 0, "equal prompts never meet");
        assert_eq!(client.store(&key, byte).await, Value::from(true));
        assert_eq!(client.found(&key).await, 1);
    }
    assert_eq!(ann.found(&salted(&key, SALT_A, "own")).await, 1);
    assert_eq!(ann.found(&salted(&key, SALT_B, "forged")).await, 0);
    // A wrong password does not come in; a right one without a tenant finds nothing.
    assert!(connect("ann", "staple and more of it").await.is_none());
    let mut eve = connect("eve", "of no tenant at all").await.unwrap();
    for salt in ["", SALT_A, SALT_B] {
        assert_eq!(eve.found(&salted(&key, salt, "e")).await, 0);
    }

    // ann's connection becomes the other tenant's while it is open.
    let swapped = text
        .replace("['ann']", "['nobody']")
        .replace("['bob']", "['bob', 'ann']");
    std::fs::write(&config, swapped).unwrap();
    let (status, body) = server.http("POST", "/v1/config/reload", "").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(ann.found(&salted(&key, SALT_A, "was")).await, 0);
    assert_eq!(ann.found(&salted(&key, SALT_B, "is")).await, 1);
}
