//! `--l2-adapter`.

use serde_json::json;

use super::parse;

#[test]
fn every_type_of_lmcache_is_served_or_refused_by_name() {
    // `lmcache server --help` of 0.5.6.
    let all = "aerospike bigtable dax fault_inject fs fs_native hf3fs hfbucket mock mooncake_store \
               native_plugin nixl_native p2p plugin raw_block resp s3 sagemaker-hyperpod valkey";
    let served = [
        "fault_inject",
        "fs",
        "fs_native",
        "mock",
        "resp",
        "s3",
        "valkey",
    ];
    for kind in all.split_whitespace() {
        let error = parse(&json!({"type": kind})).unwrap_err();
        if served.contains(&kind) {
            assert!(error.contains("missing field"), "{kind}: {error}");
        } else {
            assert!(error.starts_with(&format!("type {kind}: ")), "{error}");
            assert!(
                error.contains("use") || error.contains("write") || error.contains("share"),
                "{error}"
            );
        }
    }
    assert!(
        parse(&json!({"type": "disk"}))
            .unwrap_err()
            .contains("give one of")
    );
    assert!(
        parse(&json!({"base_path": "/x"}))
            .unwrap_err()
            .contains("type is missing")
    );
    assert!(parse(&json!([1])).unwrap_err().contains("JSON object"));
}

#[test]
fn bad_fields_are_named() {
    for (spec, part) in [
        (json!({"type": "fs", "base_path": ""}), "base_path"),
        (
            json!({"type": "fs", "base_path": "/x", "base_pth": 1}),
            "base_pth",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "num_workers": 0}),
            "num_workers",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "max_capacity_gb": -1}),
            "max_capacity_gb",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "serde": {"type": "fp8"}}),
            "serde",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "persist_enabled": false}),
            "persist_enabled",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "affinity_tag": "a"}),
            "affinity_tag",
        ),
        (
            json!({"type": "fs", "base_path": "/x", "eviction": {"eviction_policy": "ARC"}}),
            "eviction_policy",
        ),
        (
            json!({"type": "mock", "max_size_gb": 0, "mock_bandwidth_gb": 1}),
            "max_size_gb",
        ),
        (
            json!({"type": "fault_inject", "inner": {"type": "p2p"}}),
            "inner",
        ),
        (
            json!({"type": "fault_inject", "rate": 2, "inner": {"type": "fs", "base_path": "/x"}}),
            "rate",
        ),
        (json!({"type": "resp", "host": "h", "port": 0}), "port"),
        (
            json!({"type": "valkey", "startup_nodes": "h"}),
            "startup_nodes",
        ),
        (
            json!({"type": "valkey", "startup_nodes": "h:1", "key_prefix": "a@b"}),
            "key_prefix",
        ),
        (
            json!({"type": "s3", "s3_endpoint": "nobucket", "s3_region": "r"}),
            "s3_endpoint",
        ),
    ] {
        let error = parse(&spec).unwrap_err();
        assert!(error.contains(part), "{spec}: {error}");
    }
}

#[test]
fn no_secret_is_shown() {
    let secret = "hunter2-and-more";
    for spec in [
        json!({"type": "resp", "host": "h", "port": 1, "username": "u", "password": secret}),
        json!({"type": "valkey", "startup_nodes": "h:1", "password": secret}),
        json!({"type": "s3", "s3_endpoint": "b.h", "s3_region": "r", "aws_access_key_id": "id",
               "aws_secret_access_key": secret}),
        json!({"type": "fault_inject", "inner": {"type": "resp", "host": "h", "port": 1, "password": secret}}),
    ] {
        let parsed = parse(&spec).unwrap();
        assert!(!format!("{parsed:?}").contains(secret), "{spec}");
        let redacted = parsed.redacted().to_string();
        assert!(!redacted.contains(secret), "{redacted}");
        assert!(redacted.contains("[redacted]"), "{redacted}");
        // Nor does a mistake beside it make it show.
        let mut wrong = spec.clone();
        wrong["nonsense"] = json!(true);
        assert!(!parse(&wrong).unwrap_err().contains(secret));
    }
    let error =
        stockade_l2::AdapterSpec::parse(&format!("{{\"password\": \"{secret}\""), &|_| None);
    assert!(!error.unwrap_err().contains(secret));
}
