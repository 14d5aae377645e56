//! Names of stored objects and specifications of adapters: nothing panics, two names never share
//! a key or a file, and what is read back is what was written.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stockade_fuzz as _;
use stockade_l2::{AdapterSpec, ObjectName};

/// A name from anything: rank, group and hash in front, then the model and the salt after a `|`.
fn name(input: &[u8]) -> Option<ObjectName> {
    let (rank, rest) = input.split_first_chunk::<4>()?;
    let (group, rest) = rest.split_first_chunk::<4>()?;
    let (model, salt) = std::str::from_utf8(rest).ok()?.split_once('|')?;
    let hash = std::array::from_fn(|place| rank[place % 4] ^ group[place % 3]);
    ObjectName::new(
        Arc::from(model),
        u32::from_le_bytes(*rank),
        u32::from_le_bytes(*group),
        hash,
        Arc::from(salt),
    )
    .ok()
}

fuzz_target!(|input: &[u8]| {
    if let Some(name) = name(input) {
        assert_eq!(ObjectName::from_key(&name.key()).as_ref(), Some(&name));
        if let Ok(file) = name.file_name() {
            assert!(!file.contains('/') && file.len() <= 255, "{file}");
            assert_eq!(ObjectName::from_file_name(&file).as_ref(), Some(&name));
        }
    }
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Some(name) = ObjectName::from_key(text) {
        assert_eq!(name.key(), text);
    }
    if let Some(name) = ObjectName::from_file_name(text) {
        assert_eq!(name.file_name().as_deref(), Ok(text));
    }
    let nothing = |_: &str| None;
    match AdapterSpec::parse(text, &nothing) {
        Ok(spec) => {
            assert!(spec.concurrency() > 0);
            assert!(spec.redacted().is_object());
        }
        Err(problem) => assert!(!problem.is_empty()),
    }
});
