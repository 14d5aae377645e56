//! `stockade bench`: it measures what it says, and notices what is wrong.

use std::{os::unix::fs::FileExt as _, process::Command};

use serde_json::Value;
use stockade_tests::{Server, binary, wait_for};

fn bench(server: &Server, flags: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["bench", "--json", "--turns", "2", "--chunk-kib", "2"])
        .args(["--url", &server.url])
        .args(flags);
    command
}

#[test]
fn every_workload_runs_without_an_error_and_takes_turns() {
    let server = Server::start(&[]);
    let other = Server::start(&["--shm-name", ""]);
    let plots = tempfile::tempdir().unwrap();
    let output = bench(&server, &["--compare", &other.url])
        .args(["--workload", "noop,chunk-size,ping,lookup-miss,lookup-hit"])
        .args(["--workload", "store,retrieve,chat", "--tokens", "64"])
        .args(["--clients", "1,2", "--in-flight", "4", "--seconds", "0.05"])
        .arg("--plot")
        .arg(plots.path())
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{problem}");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        rows.len(),
        32,
        "eight workloads of two sizes on two servers"
    );
    let plot = std::fs::read_to_string(plots.path().join("throughput-over-clients.svg")).unwrap();
    assert!(plot.contains("retrieve") && plot.contains(&other.url));
    assert!(!plots.path().join("latency-over-tokens.svg").exists());
    for row in &rows {
        assert!(row["rounds"].as_u64().unwrap() > 0, "{row}");
        assert_eq!(row["errors"], 0, "{row}");
        assert!(row["p50_us"].as_f64() <= row["p99_us"].as_f64(), "{row}");
        let moves_bytes =
            ["store", "retrieve", "chat"].contains(&row["workload"].as_str().unwrap());
        assert_eq!(row["gib_per_second"].is_f64(), moves_bytes, "{row}");
        let is_first = row["url"] == server.url.as_str();
        assert_eq!(row["p50_speedup"].is_f64(), is_first, "{row}");
    }
}

#[test]
fn lookups_that_ask_a_second_tier_are_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = serde_json::json!({"type": "fs", "base_path": directory.path()}).to_string();
    let server = Server::start(&["--l2-adapter", &adapter]);
    let output = bench(&server, &["--workload", "lookup-miss,lookup-hit,retrieve"])
        .args(["--workload", "chat", "--tokens", "64", "--seconds", "0.05"])
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{problem}");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows.len(), 4);
    for row in &rows {
        assert!(row["rounds"].as_u64().unwrap() > 0, "{row}");
        assert_eq!(row["errors"], 0, "{row}");
    }
}

#[test]
fn the_echo_is_measured_beside_the_server() {
    let server = Server::start(&[]);
    let output = bench(&server, &["--compare-echo", "--workload", "noop,ping"])
        .args(["--workload", "store,retrieve,lookup-miss,lookup-hit"])
        .args(["--tokens", "64", "--seconds", "0.05"])
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{problem}");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows.len(), 11, "an echo cannot ping: {problem}");
    for pair in [0, 3, 5, 7, 9].map(|first| &rows[first..first + 2]) {
        assert_eq!(pair[0]["workload"], pair[1]["workload"]);
        assert!(pair[0]["rate_speedup"].as_f64().unwrap() > 0.0);
    }
    // The floor copies as the server's client does.
    assert!(rows[4]["gib_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_wrong_byte_is_found_and_fails_the_run() {
    let mut server = Server::start(&[]);
    let line = server.wait_for_line("shared memory stockade-");
    let name = line.split("shared memory ").nth(1).unwrap();
    let name = name.split(',').next().unwrap().to_owned();
    let mut running = bench(&server, &["--workload", "retrieve", "--tokens", "32"])
        .args(["--seconds", "10"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Any client that maps the segment can do this.
    let segment = std::fs::File::options()
        .write(true)
        .open(format!("/dev/shm/{name}"))
        .unwrap();
    let ended = wait_for("the end of the load", || {
        segment.write_all_at(&[0xa5; 1 << 20], 0).unwrap();
        running.try_wait().unwrap()
    });
    assert_eq!(ended.code(), Some(1));
    let output = running.wait_with_output().unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(problem.contains("WRONG BYTES"), "{problem}");
}

#[test]
fn a_bench_without_server_says_so() {
    let output = Command::new(binary())
        .args(["bench", "--url", "tcp://127.0.0.1:1", "--workload", "noop"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(problem.contains("tcp://127.0.0.1:1 "), "{problem}");
}
