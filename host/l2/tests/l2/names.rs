//! Names are LMCache's: recorded from LMCache 0.5.6 by `tests/lmcache/record_l2_names.py`.

use serde_json::Value;
use stockade_l2::ObjectName;

#[test]
fn names_are_those_that_lmcache_gives() {
    let records = include_str!("../../../../tests/golden/l2_names.json");
    let records: Vec<Value> = serde_json::from_str(records).unwrap();
    assert!(records.len() >= 7);
    for record in &records {
        let text = |field: &str| record[field].as_str().unwrap();
        let number = |field: &str| u32::try_from(record[field].as_u64().unwrap()).unwrap();
        let hash: Vec<u8> = (0..32)
            .map(|at| u8::from_str_radix(&text("chunk_hash")[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let name = ObjectName::new(
            text("model_name").into(),
            number("kv_rank"),
            number("object_group_id"),
            hash.try_into().unwrap(),
            text("cache_salt").into(),
        )
        .unwrap();
        assert_eq!(name.key(), text("key"));
        assert_eq!(ObjectName::from_key(text("key")), Some(name.clone()));
        assert_eq!(ObjectName::from_file_name(text("file")), Some(name.clone()));
        // One of them is too long for a file; LMCache would fail when it opens it.
        match text("file").len() {
            ..=255 => assert_eq!(name.file_name().unwrap(), text("file")),
            _ => assert!(name.file_name().is_err()),
        }
    }
}
