//! The adapters against real storage.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

mod capped;
mod faults;
mod fs;
mod names;
mod networked;
mod specs;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use stockade_l2::{Adapter, AdapterSpec, Entry, Form, ObjectName};
use tokio::sync::mpsc;

/// Opens an adapter as `--l2-adapter` would.
fn open(spec: &Value) -> Arc<dyn Adapter> {
    parse(spec).unwrap().open().unwrap()
}

fn parse(spec: &Value) -> Result<AdapterSpec, String> {
    AdapterSpec::parse(&spec.to_string(), &|_| None)
}

fn open_fs(directory: &tempfile::TempDir) -> Arc<dyn Adapter> {
    open(&json!({"type": "fs", "base_path": directory.path()}))
}

fn name(number: u8) -> ObjectName {
    named(number, "")
}

fn named(number: u8, salt: &str) -> ObjectName {
    ObjectName::new("org/m".into(), 0x0100_0100, 0, [number; 32], salt.into()).unwrap()
}

/// What tests ask for: values of one layout.
fn form(length: u64) -> Form {
    Form { length, layout: 7 }
}

/// Bytes that no two values share.
fn value(number: u8, length: usize) -> Bytes {
    let byte = |at: usize| (at as u8).wrapping_mul(31) ^ number ^ ((at >> 8) as u8);
    (0..length).map(byte).collect()
}

async fn list(adapter: &Arc<dyn Adapter>, salt: Option<&str>) -> Vec<Entry> {
    let (sender, mut receiver) = mpsc::channel(4);
    let take = async {
        let mut found = Vec::new();
        while let Some(entry) = receiver.recv().await {
            found.push(entry);
        }
        found
    };
    let (listed, mut found) = tokio::join!(adapter.list(salt, sender), take);
    listed.unwrap();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Waits until `is_so`; fails after a time that only a hang can take.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
