//! The wire protocol against what LMCache sends, answers and refuses, and against hostile bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod golden;
mod hostile;
mod memory;
mod pickles;
mod rules;

use std::path::PathBuf;

use bytes::Bytes;
use serde_json::Value;

/// The lines of a golden file, as JSON.
fn golden_lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden_path(name)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn golden_path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", name]
        .iter()
        .collect()
}

fn unhex(text: &str) -> Bytes {
    let digits: Vec<u8> = text
        .chars()
        .map(|digit| u8::try_from(digit.to_digit(16).unwrap()).unwrap())
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn frames(list: &Value) -> Vec<Bytes> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|frame| unhex(frame.as_str().unwrap()))
        .collect()
}

/// A msgpack string, for frames that name an operation.
fn packed_str(text: &str) -> Bytes {
    let mut out = Vec::new();
    rmp::encode::write_str(&mut out, text).unwrap();
    out.into()
}
