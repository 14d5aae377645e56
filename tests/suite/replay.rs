//! Frames recorded between LMCache 0.5.6's own client and server, sent again to this one.
//!
//! `tests/golden/lmcache_frames.jsonl` has one exchange per line, in order, for a server with
//! chunks of 16 tokens: with shared memory, then without. No reply means that LMCache was silent.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rmpv::Value;
use serde_json::Value as Json;
use stockade_tests::{Client, PATIENCE, Server, field, root};

/// What must come back.
#[derive(Debug, PartialEq)]
enum Expected {
    /// The recorded frames.
    Same,
    /// The recorded frames but for values that are a server's own.
    OwnValues,
    /// The recorded tensors in a pickle of our own.
    Tensors,
    /// An error reply, where LMCache is silent or serves what is refused here.
    Error,
    /// Either: without shared memory LMCache does not look at the key of a prepare.
    SameOrError,
    /// `success=false` and a sentence, where LMCache is silent.
    NoModule,
}

fn expected(operation: &str, mode: &str, reply: &[Json]) -> Expected {
    match operation {
        "prepare_store" if mode == "pickle" => Expected::SameOrError,
        "server_module_call" => Expected::NoModule,
        "register_kv_cache_engine_driven_context" => Expected::OwnValues,
        _ if reply.is_empty() => Expected::Error,
        _ if reply.last() == Some(&"<tensors>".into()) => Expected::Tensors,
        _ => Expected::Same,
    }
}

fn bytes(frame: &Json) -> Bytes {
    let hex = frame.as_str().unwrap();
    let digits = (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16));
    digits.collect::<Result<Vec<u8>, _>>().unwrap().into()
}

fn unpacked(frame: &Bytes) -> Value {
    rmpv::decode::read_value(&mut &frame[..]).unwrap()
}

/// A client that connects when connections are no longer taken for those of engines that
/// outlived the last server: their pings are answered otherwise.
async fn late_client(server: &Server) -> Client {
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(3_100) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Client::connect(&server.url).await
}

/// The segments that the recorded registration names, under names of this test's own.
struct Segments {
    mode_name: String,
}

const RECORDED_SEGMENT: &str = "/lmcache_kv_10954_";

impl Segments {
    fn new(mode: &str) -> Self {
        // As long as the recorded name, so that the frames stay what they are.
        let mode_name = format!("/{mode:_<8.8}{:09}", std::process::id());
        assert_eq!(mode_name.len(), RECORDED_SEGMENT.len());
        let segments = Self { mode_name };
        for index in 0..2 {
            std::fs::write(segments.path(index), vec![0; 65_536]).unwrap();
        }
        segments
    }

    fn path(&self, index: usize) -> String {
        format!("/dev/shm{}{index}", self.mode_name)
    }

    fn rename(&self, frame: Bytes) -> Bytes {
        let mut renamed = frame.to_vec();
        let names = renamed
            .windows(RECORDED_SEGMENT.len())
            .enumerate()
            .filter(|(_, name)| *name == RECORDED_SEGMENT.as_bytes());
        let places: Vec<usize> = names.map(|(place, _)| place).collect();
        for place in places {
            renamed[place..place + RECORDED_SEGMENT.len()]
                .copy_from_slice(self.mode_name.as_bytes());
        }
        renamed.into()
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        for index in 0..2 {
            let _ = std::fs::remove_file(self.path(index));
        }
    }
}

async fn replay(mode: &str, flags: &[&str]) -> (usize, usize) {
    let server = Server::start(flags);
    let segments = Segments::new(mode);
    let mut client = late_client(&server).await;
    let recorded = std::fs::read_to_string(root().join("tests/golden/lmcache_frames.jsonl"));
    let (mut same, mut documented) = (0, 0);
    let mut stored = Bytes::new();
    for line in recorded.unwrap().lines() {
        let exchange: Json = serde_json::from_str(line).unwrap();
        if exchange["mode"] != mode {
            continue;
        }
        let operation = exchange["op"].as_str().unwrap();
        let request: Vec<Bytes> = exchange["request"]
            .as_array()
            .unwrap()
            .iter()
            .map(|frame| segments.rename(bytes(frame)))
            .collect();
        let recorded = exchange["reply"].as_array().unwrap();
        if operation == "commit_store" && request.len() == 5 && request[4].len() > 100 {
            stored = request[4].clone();
        }
        client.send(request.clone()).await;
        let reply = tokio::time::timeout(PATIENCE, client.receive())
            .await
            .unwrap();
        assert_eq!(reply[0], request[0], "{operation}: {reply:?}");
        let expected = expected(operation, mode, recorded);
        let is_error = unpacked(&reply[1])
            .as_str()
            .is_some_and(|text| text.starts_with("error: "));
        match expected {
            Expected::SameOrError if is_error => documented += 1,
            Expected::Same | Expected::SameOrError => {
                let recorded: Vec<Bytes> = recorded.iter().map(bytes).collect();
                assert_eq!(reply, recorded, "{operation}");
                same += 1;
            }
            Expected::OwnValues => {
                assert_eq!(reply[1], request[1]);
                let (ours, theirs) = (unpacked(&reply[2]), unpacked(&bytes(&recorded[2])));
                let names = |value: &Value| -> Vec<Value> {
                    value
                        .as_map()
                        .unwrap()
                        .iter()
                        .map(|(name, _)| name.clone())
                        .collect()
                };
                assert_eq!(names(&ours), names(&theirs), "{operation}");
                documented += 1;
            }
            Expected::Tensors => {
                let ours = unpacked(&reply[2]);
                assert_eq!(field(&ours, "success"), &true.into());
                let data = field(&ours, "data").as_slice().unwrap();
                // Two tensors of 2 KiB; torch puts the elements of each after its own headers.
                let (mut found, mut from) = (0, 0);
                while from + 2048 <= stored.len() && found < 2 {
                    let part = &stored[from..from + 2048];
                    if data.windows(2048).any(|window| window == part) {
                        found += 1;
                        from += 2048;
                    } else {
                        from += 1;
                    }
                }
                assert_eq!(found, 2, "the stored bytes come back");
                documented += 1;
            }
            Expected::Error => {
                assert!(is_error && reply.len() == 2, "{operation}: {reply:?}");
                documented += 1;
            }
            Expected::NoModule => {
                assert_eq!(field(&unpacked(&reply[2]), "success"), &false.into());
                documented += 1;
            }
        }
    }
    eprintln!("{mode}: {same} replies are the recorded bytes, {documented} differ as documented");
    (same, documented)
}

#[tokio::test]
async fn recorded_frames_with_shared_memory_are_answered_as_recorded() {
    let (same, documented) = replay("shm", &[]).await;
    assert!(
        same >= 40 && documented <= 25,
        "{same} same, {documented} documented"
    );
}

#[tokio::test]
async fn recorded_frames_without_shared_memory_are_answered_as_recorded() {
    let (same, documented) = replay("pickle", &["--shm-name", ""]).await;
    assert!(
        same >= 6 && documented <= 8,
        "{same} same, {documented} documented"
    );
}
