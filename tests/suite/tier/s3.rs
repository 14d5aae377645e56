//! Storage in a bucket, by a server that is not ours.

use std::process::Command;

use serde_json::{Value as Json, json};
use stockade_tests::{Key, Worker, exchange, tokens};

use super::{CHUNK, STORED, chunks, end, free_port, lookup, run, start};

/// The command of an S3-compatible server.
pub(super) fn moto(port: u16) -> Command {
    let program = std::env::var("STOCKADE_TEST_MOTO").unwrap_or_else(|_| "moto_server".to_owned());
    let mut command = Command::new(program);
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
    command
}

/// An adapter for the bucket `bucket` of the server at `host`.
pub(super) fn bucket_of(host: &str) -> Json {
    json!({"type": "s3", "s3_endpoint": host, "s3_bucket": "bucket", "s3_region": "us-east-1",
        "aws_access_key_id": "id", "aws_secret_access_key": "secret"})
}

async fn ask(host: &str, method: &str, path: &str) -> String {
    let stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let answer = exchange(stream, host, method, path, &[], "").await;
    assert!(answer.status < 300, "{method} {path}: {answer:?}");
    answer.body
}

#[tokio::test]
async fn a_tenant_that_is_purged_is_gone_from_the_bucket_and_the_others_stay() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let Some(_moto) = run(&mut moto(port), directory.path(), port) else {
        return;
    };
    let host = format!("127.0.0.1:{port}");
    let file = directory.path().join("stockade.toml");
    std::fs::write(&file, "[tenants.a]\nsalts = [\"salt-a\"]\n").unwrap();
    for folder_by_salt in [false, true] {
        let bucket = format!("bucket-{folder_by_salt}");
        ask(&host, "PUT", &format!("/{bucket}")).await;
        let mut adapter = bucket_of(&host);
        adapter["s3_bucket"] = json!(bucket);
        adapter["folder_by_salt"] = json!(folder_by_salt);
        adapter["disable_tls"] = json!(true);
        let flags = ["--config", file.to_str().unwrap()];
        let server = start(&adapter, &flags);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        let keys = ["salt-a", "other"].map(|salt| Key {
            salt: salt.to_owned(),
            ..Key::new("org/m", &tokens(3 * CHUNK, 73), Some(0), salt)
        });
        for key in &keys {
            assert!(worker.store(key, |index| 1 + index as u8).await);
        }
        server.metric_becomes(STORED, |it| it == 6.0).await;
        let names = async || -> Vec<String> {
            let list = ask(&host, "GET", &format!("/{bucket}?list-type=2")).await;
            let mut parts = list.split("<Key>");
            parts.next();
            let name = |part: &str| part.split("</Key>").next().unwrap().to_owned();
            parts.map(name).collect()
        };
        let before = names().await;
        let of = |names: &[String], what: &str| names.iter().filter(|it| it.contains(what)).count();
        let values =
            |names: &[String], salt: &str| names.iter().filter(|it| it.ends_with(salt)).count();
        assert_eq!(
            (values(&before, "@salt-a"), values(&before, "@other")),
            (3, 3),
            "{before:?}"
        );
        let is_in_folder = of(&before, "salt-salt-a/") > 0;
        assert_eq!(is_in_folder, folder_by_salt, "{before:?}");
        let (status, receipt) = server.http("POST", "/v1/tenants/a/purge", "").await;
        assert_eq!(status, 200, "{receipt}");
        let receipt: Json = serde_json::from_str(&receipt).unwrap();
        assert_eq!(
            (&receipt["l2"]["values"], &receipt["complete"]),
            (&json!(3), &json!(true)),
            "{receipt}"
        );
        let after = names().await;
        assert_eq!(
            (of(&after, "salt-a"), values(&after, "@other")),
            (0, 3),
            "{after:?}"
        );
        // What is left is whole: it is read back by a server that has nothing else.
        drop((server, worker));
        let server = start(&adapter, &flags);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        assert_eq!(lookup(&mut worker.client, &keys[0]).await, 0);
        end(&mut worker.client, &keys[0]).await;
        assert_eq!(lookup(&mut worker.client, &keys[1]).await, 3);
        assert_eq!(worker.retrieve(&keys[1]).await.unwrap(), chunks(1, 3));
    }
}
