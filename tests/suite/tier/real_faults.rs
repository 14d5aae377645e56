//! Faults that nobody injects: a full disk, permissions that are taken away, damaged values that a
//! tenant leaves behind, and memory without room.

use std::{
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::json;
use stockade_tests::{Client, Key, PATIENCE, Server, Worker, tokens, wide_registration};

use super::{
    CHUNK, LOADED, STORED, chunks, data_files, end, file_of, fs, hit_of_two, lookup, start, store,
};

/// A user that owns nothing.
const NOBODY: u32 = 65_534;

async fn failures(server: &Server, during: &str, reason: &str) -> f64 {
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    let wanted = format!("during=\"{during}\",reason=\"{reason}\"");
    let lines = metrics
        .lines()
        .filter(|line| line.starts_with("stockade_l2_failures_total") && line.contains(&wanted));
    lines
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

async fn until_failed(server: &Server, during: &str, reason: &str) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while failures(server, during, reason).await == 0.0 {
        assert!(std::time::Instant::now() < deadline, "no {during} {reason}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Runs a program with a small file system of its own at `directory`, which goes with it. `None`,
/// said loudly, where that is not allowed.
fn on_a_small_disk(directory: &Path) -> Option<Vec<String>> {
    let mount = format!("mount -t tmpfs -o size=128k none '{}'", directory.display());
    for flags in [&["--mount"][..], &["--map-root-user", "--mount"]] {
        let mut wrapper = vec!["unshare".to_owned()];
        wrapper.extend(flags.iter().map(|&flag| flag.to_owned()));
        wrapper.extend(["sh", "-c"].map(ToOwned::to_owned));
        wrapper.extend([format!("{mount} && exec \"$@\""), "sh".to_owned()]);
        let tried = Command::new(&wrapper[0])
            .args(&wrapper[1..])
            .arg("true")
            .stderr(Stdio::null())
            .status();
        if tried.is_ok_and(|status| status.success()) {
            return Some(wrapper);
        }
    }
    eprintln!("SKIPPED: no file system can be mounted here, so that no disk can be filled");
    None
}

#[tokio::test]
async fn a_disk_that_is_full_keeps_what_it_has_and_goes_on_once_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let Some(wrapper) = on_a_small_disk(directory.path()) else {
        return;
    };
    let wrapper: Vec<_> = wrapper.iter().map(String::as_str).collect();
    let adapter = fs(&directory).to_string();
    let server = Server::start_through(&wrapper, &["--l2-adapter", &adapter]);
    let seen_inside = PathBuf::from(format!("/proc/{}/root", server.pid()))
        .join(directory.path().strip_prefix("/").unwrap());
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let prompt = tokens(60 * CHUNK, 80);
    let key = Key::new("org/m", &prompt, Some(0), "w");
    assert!(worker.store(&key, |index| 1 + index as u8).await);
    until_failed(&server, "store", "full").await;
    // Some are dropped while the breaker is open; wait until all have had their turn.
    let pending = async || {
        let status = server.json("/status").await;
        let controller = &status["storage_manager"]["store_controller"];
        controller["pending_keys_count"].as_u64().unwrap()
            + controller["in_flight_task_count"].as_u64().unwrap()
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while pending().await > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "stores are pending for ever"
        );
    }
    let kept = data_files(&seen_inside);
    assert!(!kept.is_empty() && kept.len() < 60, "{}", kept.len());
    for file in &kept {
        let value = std::fs::read(file).unwrap();
        assert!(value.len() == super::CHUNK_BYTES && value.iter().all(|&byte| byte == value[0]));
    }
    let names = std::fs::read_dir(&seen_inside).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(
        !names.any(|name| name.ends_with(".tmp")),
        "half a value is left"
    );

    // Memory serves on; what the disk has is still read from it.
    assert_eq!(lookup(&mut worker.client, &key).await, 60);
    end(&mut worker.client, &key).await;
    let (status, _) = server
        .http("POST", "/cache/clear", r#"{"force": true}"#)
        .await;
    assert_eq!(status, 200);
    let first = std::fs::read(&kept[0]).unwrap()[0];
    let expected = (1..=60)
        .take_while(|byte| {
            kept.iter()
                .any(|file| std::fs::read(file).unwrap()[0] == *byte)
        })
        .count();
    let key = Key::new("org/m", &prompt, Some(0), "r");
    assert_eq!(
        lookup(&mut worker.client, &key).await,
        expected as u64,
        "{first}"
    );
    end(&mut worker.client, &key).await;

    for file in kept {
        std::fs::remove_file(file).unwrap();
    }
    let before = server.metric(STORED).await;
    let deadline = std::time::Instant::now() + PATIENCE * 2;
    for number in 0.. {
        let key = Key::new("org/m", &tokens(CHUNK, 8000 + number), Some(0), "again");
        assert!(worker.store(&key, |_| 7).await);
        if server.metric(STORED).await > before {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "it never wrote again");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn permissions_that_are_taken_away_cost_misses_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let adapter = fs(&directory).to_string();
    let flags = ["--l2-adapter", &*adapter];
    // Modes say nothing to root.
    let server = if is_root {
        chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        Server::start_as(NOBODY, &flags)
    } else {
        Server::start(&flags)
    };
    let mode = |mode: u32| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(directory.path(), mode).unwrap();
    };
    let prompt = tokens(2 * CHUNK, 81);
    store(&server, &prompt, 1).await;
    server
        .http("POST", "/cache/clear", r#"{"force": true}"#)
        .await;
    let mut worker = Worker::register(&server, 2, "org/m").await;
    let mut hit = async |name: String| hit_of_two(&mut worker, &prompt, &name).await;
    assert_eq!(hit("before".to_owned()).await, 2);

    mode(0o000);
    assert_eq!(hit("unreadable".to_owned()).await, 0);
    assert!(failures(&server, "lookup", "denied").await > 0.0);

    // Readable, and not writable.
    mode(0o500);
    let mut writer = Worker::register(&server, 3, "org/m").await;
    let fresh = Key::new("org/m", &tokens(CHUNK, 82), Some(0), "w");
    assert!(writer.store(&fresh, |_| 3).await, "memory takes it");
    until_failed(&server, "store", "denied").await;
    assert_eq!(hit("read only".to_owned()).await, 2);

    mode(0o700);
    let fresh = Key::new("org/m", &tokens(CHUNK, 83), Some(0), "w");
    let before = server.metric(STORED).await;
    assert!(writer.store(&fresh, |_| 3).await);
    server.metric_becomes(STORED, |it| it > before).await;
    assert_eq!(server.json("/status").await["is_healthy"], true);
}

/// A chunk has 12 MiB here, and memory 64.
#[tokio::test]
async fn without_room_for_the_whole_prefix_its_front_is_loaded() {
    const HIDDEN: u64 = 98_304;
    let directory = tempfile::tempdir().unwrap();
    let adapter = fs(&directory);
    let server = start(&adapter, &["--l2-store-policy", "skip_l1"]);
    let register = async |server: &Server| {
        let mut client = Client::connect(&server.url).await;
        let payload = wide_registration(1, "org/m", HIDDEN);
        let reply = client.call(14, &[payload]).await.value();
        let name = stockade_tests::field(&reply, "shm_name")
            .as_str()
            .unwrap()
            .to_owned();
        Worker {
            client,
            id: 1,
            model: "org/m".to_owned(),
            segment: Path::new("/dev/shm").join(name),
        }
    };
    let mut worker = register(&server).await;
    let prompt = tokens(7 * CHUNK, 84);
    for chunk in 1..=7_usize {
        let key = Key::new("org/m", &prompt[..chunk * CHUNK], Some(0), "w");
        let part = Key {
            start: ((chunk - 1) * CHUNK) as i64,
            ..key
        };
        assert!(worker.store(&part, |_| chunk as u8).await);
        server.metric_becomes(STORED, |it| it == chunk as f64).await;
    }
    drop((server, worker));

    let server = start(&adapter, &[]);
    let mut worker = register(&server).await;
    let key = Key::new("org/m", &prompt, Some(0), "r");
    let hit = lookup(&mut worker.client, &key).await;
    assert!((4..=5).contains(&hit), "{hit} of 7 chunks in room for 5");
    assert!(server.metric(LOADED).await >= hit as f64);
    let part = Key {
        end: hit as i64 * CHUNK as i64,
        ..key.clone()
    };
    for (number, chunk) in (1_u8..).zip(worker.retrieve(&part).await.unwrap()) {
        assert!(chunk.iter().all(|&byte| byte == number), "chunk {number}");
    }
    assert!(
        server
            .metric("stockade_l2_allocation_failure_objects_total")
            .await
            >= 1.0
    );
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert!(
        metrics.contains("stockade_l2_prefetch_ended_early_total{reason=\"l1_oom\"} 1"),
        "{metrics}"
    );
    end(&mut worker.client, &key).await;
    let status = server.json("/status").await;
    let l1 = &status["storage_manager"]["l1_manager"];
    assert_eq!(
        (&l1["owned_locks"], &l1["staging_object_count"]),
        (&json!(0), &json!(0))
    );
}

#[tokio::test]
async fn what_a_purged_tenant_left_beside_its_values_goes_too() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    std::fs::write(&file, "[tenants.a]\nsalts = [\"salt-a\"]\n").unwrap();
    for folder_by_salt in [false, true] {
        let storage = directory.path().join(format!("kv-{folder_by_salt}"));
        let adapter = json!({"type": "fs", "base_path": storage, "folder_by_salt": folder_by_salt});
        let flags = ["--config", file.to_str().unwrap()];
        let keys: Vec<Key> = ["salt-a", "other"]
            .map(|salt| Key {
                salt: salt.to_owned(),
                ..Key::new("org/m", &tokens(3 * CHUNK, 85), Some(0), salt)
            })
            .to_vec();
        let server = start(&adapter, &flags);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        for key in &keys {
            assert!(worker.store(key, |index| 1 + index as u8).await);
        }
        server.metric_becomes(STORED, |it| it == 6.0).await;
        drop((server, worker));
        // One value of each is damaged, and writers of both were killed.
        for salt in ["salt-a", "other"] {
            let folder = if folder_by_salt {
                storage.join(format!("salt-{salt}"))
            } else {
                storage.clone()
            };
            let mut files = data_files(&folder);
            files.retain(|file| file.to_str().unwrap().ends_with(&format!("@{salt}.data")));
            assert_eq!(files.len(), 3);
            let damaged = files
                .iter()
                .find(|file| std::fs::read(file).unwrap()[0] == 2)
                .unwrap();
            std::fs::write(damaged, [2; 100]).unwrap();
            let half = storage.join(format!(
                ".stockade-00000000000000{:02x}@{salt}.tmp",
                salt.len()
            ));
            std::fs::write(half, [2; 100]).unwrap();
        }
        let server = start(&adapter, &flags);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        for key in &keys {
            assert_eq!(lookup(&mut worker.client, key).await, 1);
            end(&mut worker.client, key).await;
        }
        let everything = || -> Vec<String> {
            let mut found = Vec::new();
            let mut folders = vec![storage.clone()];
            while let Some(folder) = folders.pop() {
                for entry in std::fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    found.push(path.to_str().unwrap().to_owned());
                    if path.is_dir() {
                        folders.push(path);
                    }
                }
            }
            found
        };
        let of = |salt: &str| {
            everything()
                .iter()
                .filter(|path| path.contains(salt))
                .count()
        };
        let folders = usize::from(folder_by_salt);
        assert!(everything().iter().any(|path| path.contains("quarantine/")));
        let (status, receipt) = server.http("POST", "/v1/tenants/a/purge", "").await;
        assert_eq!(status, 200, "{receipt}");
        let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
        // Two values, one in the quarantine, and half a one.
        assert_eq!(
            (&receipt["l2"]["values"], &receipt["complete"]),
            (&json!(4), &json!(true))
        );
        assert_eq!(of("salt-a"), 0, "{:?}", everything());
        let (inside, folder) = (if folder_by_salt { 2 } else { 0 }, folders);
        // Its own two values, the damaged one, half a one, and the folder.
        assert_eq!(of("@other"), 4, "{:?}", everything());
        assert_eq!(of("salt-other"), inside + folder, "{:?}", everything());
        let survivor = if folder_by_salt {
            storage.join("salt-other")
        } else {
            storage.clone()
        };
        assert_eq!(
            std::fs::read(file_of(&survivor, 1)).unwrap(),
            chunks(1, 1)[0]
        );
    }
}
