//! A Redis Cluster of three nodes: slots that move, a node that dies, and a tenant that leaves.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use serde_json::json;
use stockade_tests::{Key, Process, Server, Worker, tokens, wait_for};

use super::{CHUNK, chunks, end, free_port, lookup, redis_command, start, store};

/// Slots of a cluster.
const SLOTS: u32 = 16_384;
/// Chunks of a prompt: so many that every node has some.
const CHUNKS: u8 = 24;
/// What the first chunk is filled with: all of them are printable.
const FIRST: u8 = 100;

struct Node {
    child: Process,
    port: u16,
    id: String,
    _directory: tempfile::TempDir,
}

impl Node {
    fn command(&self, words: &[&str]) -> String {
        let answer = redis_command(self.port, words).unwrap();
        assert!(!answer.starts_with('-'), "{words:?}: {answer}");
        answer
    }

    /// The lines of an answer that are no lengths.
    fn lines(&self, words: &[&str]) -> Vec<String> {
        let answer = self.command(words);
        let lines = answer.lines().filter(|line| !line.starts_with(['*', '$']));
        lines.map(ToOwned::to_owned).collect()
    }

    /// The chunks whose values lie here, by the byte that they are filled with.
    fn chunks(&self, first: u8) -> BTreeSet<u8> {
        let values = self.lines(&["KEYS", "org/m@*"]);
        values
            .iter()
            .map(|key| {
                let start = self.command(&["GETRANGE", key, "0", "0"]);
                start.lines().nth(1).unwrap().bytes().next().unwrap() - first
            })
            .collect()
    }
}

struct Cluster(Vec<Node>);

impl Cluster {
    /// Three nodes without replicas that serve their slots also while another is down. `None`,
    /// said loudly, where there is no Redis.
    fn start() -> Option<Self> {
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..3 {
            let (port, bus) = (free_port(), free_port());
            let directory = tempfile::tempdir().unwrap();
            let child = Command::new("redis-server")
                .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
                .args(["--cluster-port", &bus.to_string(), "--save", ""])
                .args(["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"])
                .args(["--cluster-require-full-coverage", "no", "--dir"])
                .arg(directory.path())
                .stdout(Stdio::null())
                .spawn();
            let Ok(child) = child else {
                eprintln!("SKIPPED: no redis-server in PATH; apt-get install redis-server");
                return None;
            };
            let mut node = Node {
                child: Process(child),
                port,
                id: String::new(),
                _directory: directory,
            };
            node.id = wait_for("a node", || {
                let id = redis_command(port, &["CLUSTER", "MYID"])?;
                id.lines().nth(1).map(ToOwned::to_owned)
            });
            nodes.push(node);
            buses.push(bus);
        }
        let share = SLOTS.div_ceil(3);
        for (number, node) in (0..).zip(&nodes) {
            let (from, to) = (number * share, ((number + 1) * share).min(SLOTS) - 1);
            node.command(&[
                "CLUSTER",
                "ADDSLOTSRANGE",
                &from.to_string(),
                &to.to_string(),
            ]);
            node.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()]);
        }
        for (node, bus) in nodes.iter().zip(&buses).skip(1) {
            let (port, bus) = (node.port.to_string(), bus.to_string());
            nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
        }
        for node in &nodes {
            wait_for("the cluster", || {
                let info = node.command(&["CLUSTER", "INFO"]);
                let is_whole = info.contains("cluster_state:ok") && info.contains("cluster_size:3");
                is_whole.then_some(())
            });
        }
        Some(Self(nodes))
    }

    fn adapter(&self) -> serde_json::Value {
        // One of them: the client learns of the others.
        json!({"type": "valkey", "startup_nodes": format!("127.0.0.1:{}", self.0[0].port), "cluster_mode": true})
    }
}

/// How much of the prompt is found; what is must be right.
async fn hit(worker: &mut Worker, prompt: &[u32], first: u8, request: &str) -> u8 {
    let key = Key::new("org/m", prompt, Some(0), request);
    let hit = u8::try_from(lookup(&mut worker.client, &key).await).unwrap();
    if hit > 0 {
        let part = Key {
            end: i64::from(hit) * CHUNK as i64,
            ..key.clone()
        };
        assert_eq!(worker.retrieve(&part).await.unwrap(), chunks(first, hit));
    }
    end(&mut worker.client, &key).await;
    hit
}

#[tokio::test]
async fn a_cluster_is_followed_while_its_slots_move() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let prompt = tokens(CHUNKS as usize * CHUNK, 70);
    drop({
        let server = start(&cluster.adapter(), &[]);
        store(&server, &prompt, FIRST).await;
        server
    });
    for node in &cluster.0 {
        assert!(!node.chunks(FIRST).is_empty(), "a node has nothing");
    }
    let server = start(&cluster.adapter(), &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    assert_eq!(hit(&mut worker, &prompt, FIRST, "still").await, CHUNKS);

    let (from, to) = (&cluster.0[0], &cluster.0[2]);
    let key = from.lines(&["KEYS", "org/m@*"]).remove(0);
    let slot = from.command(&["CLUSTER", "KEYSLOT", &key]);
    let slot = slot.trim().trim_start_matches(':');
    to.command(&["CLUSTER", "SETSLOT", slot, "IMPORTING", &from.id]);
    from.command(&["CLUSTER", "SETSLOT", slot, "MIGRATING", &to.id]);
    let keys = from.lines(&["CLUSTER", "GETKEYSINSLOT", slot, "10"]);
    assert!(
        keys.len() >= 2,
        "a value is in one slot with its seal: {keys:?}"
    );
    let port = to.port.to_string();
    for key in &keys {
        let moved = from.command(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
        assert_eq!(moved, "+OK\r\n");
    }
    let asked = redis_command(from.port, &["GET", &key]).unwrap();
    assert!(asked.starts_with("-ASK "), "{asked}");
    assert_eq!(hit(&mut worker, &prompt, FIRST, "asked").await, CHUNKS);

    for node in [to, from] {
        node.command(&["CLUSTER", "SETSLOT", slot, "NODE", &to.id]);
    }
    let moved = redis_command(from.port, &["GET", &key]).unwrap();
    assert!(moved.starts_with("-MOVED "), "{moved}");
    assert_eq!(hit(&mut worker, &prompt, FIRST, "moved").await, CHUNKS);
    let status = server.json("/status").await;
    let adapter = &status["storage_manager"]["l2_adapters"][0];
    assert_eq!(adapter["is_healthy"], true, "{adapter}");
}

#[tokio::test]
async fn a_node_of_a_cluster_that_dies_under_load_costs_its_own_values_only() {
    let Some(mut cluster) = Cluster::start() else {
        return;
    };
    let prompt = tokens(CHUNKS as usize * CHUNK, 71);
    drop({
        let server = start(&cluster.adapter(), &[]);
        store(&server, &prompt, FIRST).await;
        server
    });
    // The node whose first chunk comes last: most of the prompt is on others before it.
    let first_chunk = |node: &Node| *node.chunks(FIRST).first().unwrap();
    let (dying, left) = (0..3)
        .map(|number| (number, first_chunk(&cluster.0[number])))
        .max_by_key(|&(_, first)| first)
        .unwrap();
    assert!(left > 0);
    let server = start(&cluster.adapter(), &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    assert_eq!(hit(&mut worker, &prompt, FIRST, "before").await, CHUNKS);

    let mut dead = None;
    let mut hits = Vec::new();
    for number in 0..40 {
        if number == 3 {
            let mut node = cluster.0.remove(dying);
            node.child.0.kill().unwrap();
            node.child.0.wait().unwrap();
            dead = Some(node);
        }
        // Stores go on meanwhile; nobody waits for theirs.
        let other = Key::new("org/m", &tokens(CHUNK, 7100 + number), Some(0), "w");
        assert!(worker.store(&other, |_| 9).await);
        hits.push(hit(&mut worker, &prompt, FIRST, &format!("during{number}")).await);
    }
    assert_eq!(hits[..3], [CHUNKS; 3], "{hits:?}");
    // Right away, or after a pause of the breaker: never more, and in the end that much.
    assert!(
        hits[3..].iter().all(|&hit| hit <= left || hit == CHUNKS),
        "{hits:?}"
    );
    let deadline = std::time::Instant::now() + stockade_tests::PATIENCE * 2;
    for number in 0.. {
        if hit(&mut worker, &prompt, FIRST, &format!("after{number}")).await == left {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "not {left} of {hits:?}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(server.json("/status").await["is_healthy"], true);
    drop(dead);
}

#[tokio::test]
async fn a_tenant_that_is_purged_is_gone_from_every_node() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    std::fs::write(&file, "[tenants.a]\nsalts = [\"salt-a\"]\n").unwrap();
    for folder_by_salt in [false, true] {
        let mut adapter = cluster.adapter();
        adapter["folder_by_salt"] = json!(folder_by_salt);
        let server: Server = start(&adapter, &["--config", file.to_str().unwrap()]);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        let mut key = Key::new("org/m", &tokens(12 * CHUNK, 72), Some(0), "w");
        for salt in ["salt-a", "other"] {
            salt.clone_into(&mut key.salt);
            assert!(worker.store(&key, |_| 1).await);
        }
        let written = "lmcache_mp_l2_store_completed_requests_total";
        server.metric_becomes(written, |it| it == 24.0).await;
        let named = |pattern: &str| -> usize {
            let keys = cluster.0.iter().map(|node| node.lines(&["KEYS", pattern]));
            keys.flatten().count()
        };
        let folder = if folder_by_salt { 12 } else { 0 };
        assert_eq!(named("salt-salt-a/*"), folder);
        // Values, and their seals.
        assert_eq!((named("*@salt-a"), named("*@salt-a}")), (12, 12));
        let (status, receipt) = server.http("POST", "/v1/tenants/a/purge", "").await;
        assert_eq!(status, 200, "{receipt}");
        let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
        assert_eq!(
            (&receipt["l2"]["values"], &receipt["complete"]),
            (&json!(12), &json!(true))
        );
        assert_eq!((named("*@salt-a*"), named("*@other")), (0, 12));
        for node in &cluster.0 {
            node.command(&["FLUSHALL"]);
        }
    }
}
