//! What must hold after each fault.

use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::Value as Json;
use stockade_tests::{Client, Server, Worker, lookup};

use crate::{
    prompt::{MAX_CHUNKS, MODEL, Prompt},
    world::{World, becomes, slot_bytes},
};

/// Prompts that others may have stored and that each audit reads.
const READ_BACK: usize = 3;

/// Serves a fresh client, reads old prompts back, and waits until nothing is held. Returns how long
/// after the fault's end the fresh client had its bytes.
pub(crate) async fn audit(
    world: &mut World,
    rng: &mut fastrand::Rng,
    round: u64,
    ended: Instant,
) -> Duration {
    assert!(world.server.is_running(), "the server has ended");
    let mut worker = worker(world, round).await;
    let fresh = Prompt::fresh(round);
    store(&mut worker, fresh, &format!("audit-{round}")).await;
    let found = read_back(world, &mut worker, fresh, &format!("read-{round}")).await;
    assert_eq!(
        found, fresh.chunks,
        "what was just stored is not found whole"
    );
    let served = ended.elapsed();
    for number in 0..READ_BACK {
        let prompt = Prompt {
            chunks: MAX_CHUNKS,
            ..Prompt::shared(rng)
        };
        read_back(
            world,
            &mut worker,
            prompt,
            &format!("read-{round}-{number}"),
        )
        .await;
    }
    worker.client.call(15, &[worker.id.into()]).await.value();
    drop(worker);
    becomes("a state in which nothing is held", || {
        settled(&world.server)
    })
    .await;
    served
}

/// Waits until plugins run again and descriptors and threads are back to a few.
pub(crate) async fn at_the_end(world: &mut World) {
    becomes("an end of all connections", || async {
        let count = |what: &str| {
            let path = format!("/proc/{}/{what}", world.server.pid());
            std::fs::read_dir(path).unwrap().count()
        };
        let (descriptors, threads) = (count("fd"), count("task"));
        let is_small = descriptors < 80 && threads < 60;
        is_small
            .then_some(())
            .ok_or(format!("{descriptors} descriptors, {threads} threads"))
    })
    .await;
}

/// A worker of the auditor over the local socket.
pub(crate) async fn worker(world: &World, round: u64) -> Worker {
    let mut client = Client::connect(&world.ipc()).await;
    let id = 1 + round;
    let registration = stockade_tests::registration(id, MODEL);
    let reply = client.call(14, &[registration]).await.value();
    Worker {
        client,
        id,
        model: MODEL.to_owned(),
        segment: crate::victim::segment(&reply),
    }
}

/// Stores a prompt that nobody has stored before.
pub(crate) async fn store(worker: &mut Worker, prompt: Prompt, request: &str) {
    use std::os::unix::fs::FileExt as _;
    let key = prompt.key(Some(0), request);
    let slots = worker.prepare_store(&key).await;
    let file = std::fs::File::options()
        .write(true)
        .open(&worker.segment)
        .unwrap();
    for (index, offset, length) in slots {
        let kv = prompt.kv(index, usize::try_from(length).unwrap());
        file.write_all_at(&kv, offset).unwrap();
    }
    assert!(worker.commit_store(&key).await, "a commit is refused");
    end_session(worker, request).await;
}

/// Reads what is there of a prompt and compares it; the number of chunks.
pub(crate) async fn read_back(
    world: &mut World,
    worker: &mut Worker,
    prompt: Prompt,
    request: &str,
) -> usize {
    let scheduler = prompt.key(None, request);
    let found = lookup(&mut worker.client, &scheduler).await;
    let found = usize::try_from(found).unwrap();
    assert!(found <= prompt.chunks, "more was found than asked for");
    if found > 0 {
        let hit = Prompt {
            chunks: found,
            ..prompt
        };
        let read = worker.retrieve(&hit.key(Some(0), request)).await;
        let chunks = read.expect("what a lookup has locked is not handed out");
        assert_eq!(chunks.len(), found);
        hit.compare(&chunks);
        world.chunks_compared += found as u64;
    }
    end_session(worker, request).await;
    found
}

async fn end_session(worker: &mut Worker, request: &str) {
    let reply = worker.client.call(13, &[request.into()]).await;
    assert_eq!(reply.value(), Value::Nil);
}

/// Whether `/status` shows nothing held, and sums that agree.
async fn settled(server: &Server) -> Result<(), String> {
    let status = server.json("/status").await;
    let l1 = &status["storage_manager"]["l1_manager"];
    let number = |value: &Json, name: &str| {
        value[name]
            .as_u64()
            .unwrap_or_else(|| panic!("/status has no {name}: {value}"))
    };
    let locks = (number(l1, "object_locks"), number(l1, "owned_locks"));
    // Both are read under one lock, so they must agree at any time.
    assert_eq!(locks.0, locks.1, "locks without an owner: {l1}");
    let used = number(l1, "memory_used_bytes");
    let objects = number(l1, "total_object_count");
    let sum = |map: &Json, of: &dyn Fn(&Json) -> u64| -> u64 {
        map.as_object().unwrap().values().map(of).sum()
    };
    let of_salts = sum(&l1["bytes_by_cache_salt"], &|bytes| bytes.as_u64().unwrap());
    let of_tenants = sum(&l1["tenants"], &|tenant| number(tenant, "used_bytes"));
    for (held, what) in [
        (locks.0, "locks"),
        (number(l1, "staging_bytes"), "staging bytes"),
        (number(l1, "withdrawn_count"), "withdrawn objects"),
        (number(&status, "active_sessions"), "sessions"),
        (
            number(&status["worker_liveness"], "tracked_instances"),
            "workers",
        ),
        (number(&status["kv_events"], "subscribers"), "subscribers"),
        (
            used.abs_diff(objects * slot_bytes()),
            "bytes without an object",
        ),
        (used.abs_diff(of_salts), "bytes without a salt"),
        (used.abs_diff(of_tenants), "bytes without a tenant"),
    ] {
        if held > 0 {
            return Err(format!("{held} {what}: {l1}"));
        }
    }
    Ok(())
}
