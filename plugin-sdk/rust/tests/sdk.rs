//! The crate from a plugin's side, on the double.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use serde_json::{Value, json};
use stockade_plugin::{
    Call, Callable, Candidate, ErrorCode, Event, EventBatch, HandlerResult, Level, Message, Plugin,
    Rank, Ranker, Shutdown, Start, Timer,
    cache::{self, EventType, Key, KeyQuery, Stats, Subscription},
    config::Config,
    http, metrics, next_message, reply, state,
    testing::{Grant, Host},
    timer,
};

/// Uses every handler.
struct Everything {
    seen: Vec<String>,
}

impl Plugin for Everything {
    fn start(start: &Start) -> HandlerResult<Self> {
        timer::every_after("tick", Duration::from_secs(2), Duration::from_secs(2))?;
        timer::once("late", Duration::from_secs(5))?;
        cache::subscribe(&Subscription {
            types: vec![EventType::Lookup, EventType::SessionEnd],
            cursor: Some(7),
            max_batch: None,
        })?;
        Ok(Self {
            seen: vec![format!("start {} {}", start.seq, start.abi)],
        })
    }

    fn timer(&mut self, timer: &Timer) -> HandlerResult {
        let entry = format!(
            "{} at {}",
            timer.name,
            stockade_plugin::clock_ms() % 100_000
        );
        self.seen.push(entry);
        if timer.name == "late" {
            timer::cancel("tick")?;
        }
        Ok(())
    }

    fn events(&mut self, batch: &EventBatch) -> HandlerResult {
        let (count, cursor, lost) = (batch.events.len(), batch.cursor, batch.lost);
        self.seen.push(format!("{count} to {cursor}, {lost} lost"));
        Ok(())
    }

    fn shutdown(&mut self, shutdown: &Shutdown) -> HandlerResult {
        stockade_plugin::warn!("{} ms left", shutdown.grace_ms);
        Ok(())
    }
}

impl Callable for Everything {
    fn call(&mut self, call: &Call) -> HandlerResult<Vec<u8>> {
        match call.name() {
            "seen" => Ok(self.seen.join("\n").into_bytes()),
            "echo" => Ok(call.body.clone()),
            other => Err(format!("no method `{other}`").into()),
        }
    }
}

impl Ranker for Everything {
    fn rank(&mut self, rank: &Rank) -> HandlerResult<Vec<u32>> {
        let mut order: Vec<_> = rank.candidates.iter().collect();
        order.sort_by_key(|candidate| std::cmp::Reverse(candidate.bytes));
        Ok(order.iter().map(|candidate| candidate.id).collect())
    }
}

stockade_plugin::export_plugin!(Everything: Callable, Ranker);

#[test]
fn every_handler_gets_what_the_server_sends() {
    let host = Host::new().grant(Grant::Events);
    let mut plugin = host.start::<Everything>().unwrap();
    assert_eq!(host.subscription().unwrap().cursor, Some(7));
    plugin.advance(Duration::from_secs(9)).unwrap();
    let lookup = Event::Lookup {
        salt: String::new(),
        model: "m".to_owned(),
        request: "r".to_owned(),
        tokens: 512,
        hit_tokens: 256,
    };
    plugin.events(vec![lookup.clone(), lookup.clone()]).unwrap();
    plugin.events_after_loss(vec![lookup], 3).unwrap();
    let seen = plugin.call("it.seen", "").unwrap();
    assert_eq!(
        String::from_utf8(seen).unwrap(),
        "start 1 1\ntick at 2000\ntick at 4000\nlate at 5000\n2 to 2, 0 lost\n1 to 6, 3 lost"
    );
    // Raw bytes pass as they are.
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(plugin.call("it.echo", bytes.clone()).unwrap(), bytes);
    let error = plugin.call("it.other", "").unwrap_err();
    assert_eq!(error.to_string(), "no method `other`");
    let candidate = |id, bytes| Candidate {
        id,
        bytes,
        ..Candidate::default()
    };
    let order = plugin.rank(vec![candidate(0, 1), candidate(1, 3), candidate(2, 2)]);
    assert_eq!(order.unwrap(), [1, 2, 0]);
    plugin.shutdown().unwrap();
    let logs = [(Level::Warn, "5000 ms left".to_owned())];
    assert_eq!(host.logs(), logs);
}

#[test]
fn nothing_is_granted_that_was_not_asked_for() {
    let host = Host::new();
    let error = host.start::<Everything>().err().unwrap();
    assert!(
        error.to_string().contains("cache = [\"events\"]"),
        "{error}"
    );
    let denied = |error: stockade_plugin::Error, line: &str| {
        assert_eq!(error.code(), ErrorCode::Denied);
        assert!(error.message().contains(line), "{error}");
    };
    denied(cache::stats().unwrap_err(), "\"stats\"");
    denied(cache::keys(&KeyQuery::default()).unwrap_err(), "\"keys\"");
    denied(
        cache::pin(&["k"], Duration::from_secs(1)).unwrap_err(),
        "\"pin\"",
    );
    denied(cache::evict(&["k"]).unwrap_err(), "\"evict\"");
    denied(cache::prefetch(&["k"]).unwrap_err(), "\"prefetch\"");
    denied(state::get("k").unwrap_err(), "state_kib");
    let sent = http::Request::get("http://nobody/").send();
    denied(sent.unwrap_err(), "[[http]]");
}

#[test]
fn a_prefetch_finds_what_the_second_tier_has() {
    let key = |name: &str| {
        let mut key = cache::Key::default();
        key.key = name.to_owned();
        key
    };
    let host = Host::new().grant(Grant::Prefetch).grant(Grant::Keys);
    let error = cache::prefetch(&["a"]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    let _host = host
        .keys(vec![key("b")])
        .second_tier(vec![key("a"), key("b"), key("c")]);
    let outcome = cache::prefetch(&["a", "b", "x"]).unwrap();
    assert_eq!((outcome.done, outcome.missing), (2, 1));
    let page = cache::keys(&KeyQuery::default()).unwrap();
    let held: Vec<_> = page.keys.iter().map(|key| &*key.key).collect();
    assert_eq!(held, ["a", "b"]);
}

#[test]
fn without_a_double_calls_say_what_is_missing() {
    let error = state::get("k").unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert!(error.message().contains("testing::Host"), "{error}");
}

#[test]
fn state_is_kept_within_its_limit() {
    let host = Host::new().state_kib(1);
    assert_eq!(state::get("a").unwrap(), None);
    state::set("a", b"\0\xff").unwrap();
    assert_eq!(state::get("a").unwrap().unwrap(), b"\0\xff");
    state::set_json("ab", &json!({"n": 1})).unwrap();
    assert_eq!(state::get_json::<Value>("ab").unwrap().unwrap()["n"], 1);
    let error = state::get_json::<u32>("ab").unwrap_err();
    assert!(error.message().contains("state `ab`"), "{error}");
    assert_eq!(state::keys("a").unwrap(), ["a", "ab"]);
    let error = state::set("big", &[0; 1024]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Limit);
    assert!(state::delete("a").unwrap());
    assert!(!state::delete("a").unwrap());
    assert_eq!(host.state().len(), 1);
    assert_eq!(host.calls_of("state_delete").len(), 2);
}

#[test]
fn keys_are_listed_in_pages_pinned_and_evicted() {
    let key = |key: &str| {
        let value = json!({"key": key, "bytes": 4096, "idle_ms": 5, "pinned": false});
        serde_json::from_value::<Key>(value).unwrap()
    };
    let host = Host::new()
        .grant(Grant::Keys)
        .grant(Grant::Pin)
        .grant(Grant::Evict)
        .keys(vec![key("m@0@0@b"), key("m@0@0@a"), key("n@0@0@c@salt")]);
    let mut query = KeyQuery {
        limit: Some(2),
        ..KeyQuery::default()
    };
    let page = cache::keys(&query).unwrap();
    assert_eq!(page.next.as_deref(), Some("m@0@0@b"));
    query.after = page.next;
    let page = cache::keys(&query).unwrap();
    assert_eq!((page.keys.len(), page.next), (1, None));
    let salted = KeyQuery {
        salt: Some("salt".to_owned()),
        ..KeyQuery::default()
    };
    assert_eq!(cache::keys(&salted).unwrap().keys.len(), 1);
    let outcome = cache::pin(&["m@0@0@a", "gone"], Duration::from_secs(60)).unwrap();
    assert_eq!((outcome.done, outcome.missing), (1, 1));
    assert_eq!(host.pinned(), ["m@0@0@a"]);
    assert_eq!(cache::unpin(&["m@0@0@a"]).unwrap().done, 1);
    assert!(host.pinned().is_empty());
    assert_eq!(cache::evict(&["m@0@0@b"]).unwrap().done, 1);
    assert_eq!(cache::keys(&KeyQuery::default()).unwrap().keys.len(), 2);
}

#[test]
fn http_gives_heads_and_bodies() {
    let body = vec![7; 200_000];
    let sent = body.clone();
    let host = Host::new().http(move |request| {
        if request.url.ends_with("/down") {
            return Err(stockade_plugin::Error::new(
                ErrorCode::Unavailable,
                "refused",
            ));
        }
        assert_eq!((&*request.method, &*request.body), ("POST", &b"\xff"[..]));
        assert_eq!(request.headers["a"], "b");
        let mut response = http::Response::default();
        response.status = 404;
        Ok((response, sent.clone()))
    });
    let request = http::Request::post("http://host/up", *b"\xff")
        .header("a", "b")
        .timeout(Duration::from_millis(1500));
    let response = request.send().unwrap();
    assert!(!response.is_success());
    assert_eq!(response.body_bytes, 200_000);
    assert_eq!(response.body().unwrap(), body);
    assert_eq!(host.calls_of("http_request")[0]["timeout_ms"], 1500);
    let error = http::Request::get("http://host/down").send().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
}

#[test]
fn metrics_are_counters_and_gauges() {
    let host = Host::new();
    metrics::add("done", 1.0).unwrap();
    metrics::add("done", 1.5).unwrap();
    metrics::set("level", -3.0).unwrap();
    assert_eq!(
        (host.counter("done"), host.gauge("level")),
        (2.5, Some(-3.0))
    );
    assert_eq!(
        metrics::add("done", -1.0).unwrap_err().code(),
        ErrorCode::Invalid
    );
}

#[test]
fn lmcache_s_own_configuration_is_read() {
    let text = include_str!("../../abi/lmcache-0.5.6-config.json");
    let _host = Host::new().config(serde_json::from_str(text).unwrap());
    let config = Config::load().unwrap();
    assert_eq!(config.mp_config.port, 15602);
    assert_eq!(config.mp_config.chunk_size, 256);
    let storage = &config.storage_manager_config;
    assert_eq!(
        storage.l1_manager_config.memory_config.size_in_bytes,
        1 << 30
    );
    assert_eq!(storage.eviction_config.eviction_policy, "LRU");
    assert_eq!(config.obs_config.lookup_hash_log.max_files, 100);
    assert_eq!(config.http_config.http_port, 15612);
    assert_eq!(config.raw["mp_config"]["engine_type"], "default");
    let url: String = config.required("plugin.frontend.heartbeat_url").unwrap();
    assert_eq!(url, "http://127.0.0.1:5000/heartbeat");
    assert_eq!(
        config.seconds("n", 0.5..=2.0).unwrap(),
        Some(Duration::from_secs(1))
    );
}

#[test]
fn a_setting_that_cannot_be_used_is_named() {
    let _host = Host::new()
        .setting("p.seconds", 0)
        .setting("p.name", 7)
        .setting("p.huge", 1e300)
        .setting("p.null", Value::Null);
    let config = Config::load().unwrap();
    let message = |error: stockade_plugin::Error| error.message().to_owned();
    let error = config.seconds("p.seconds", 0.1..=10.0).unwrap_err();
    assert_eq!(
        message(error),
        "setting `p.seconds` is 0: give seconds from 0.1 to 10"
    );
    assert!(config.seconds("p.huge", 0.1..=f64::MAX).is_err());
    assert!(config.seconds("p.name", 0.1..=10.0).unwrap().is_some());
    assert!(message(config.setting::<String>("p.name").unwrap_err()).contains("`p.name`"));
    assert_eq!(config.setting::<String>("p.null").unwrap(), None);
    assert!(
        message(config.required::<String>("p.none").unwrap_err())
            .contains("--runtime-plugin-config")
    );
    for (text, why) in [
        ("[]", "not a JSON object"),
        ("{", "cannot be used"),
        (r#"{"mp_config": {"port": "x"}}"#, "\"x\""),
    ] {
        let error = Config::from_json(text).unwrap_err();
        assert!(error.message().contains(why), "{error}");
    }
}

#[test]
fn a_command_waits_for_messages() {
    let host = Host::new();
    assert_eq!(next_message(Some(Duration::from_secs(1))).unwrap(), None);
    host.send(Message::Call(Call::new("it.x", *b"payload")));
    let Some(Message::Call(call)) = next_message(None).unwrap() else {
        panic!("it was a call");
    };
    assert_eq!((call.name(), &*call.body), ("x", &b"payload"[..]));
    reply(b"done").unwrap();
    assert_eq!(host.take_reply().unwrap(), b"done");
    assert_eq!(reply(b"twice").unwrap_err().code(), ErrorCode::State);
    timer::once("soon", Duration::from_secs(3)).unwrap();
    let before = stockade_plugin::clock_ms();
    let Some(Message::Timer(timer)) = next_message(None).unwrap() else {
        panic!("it was a timer");
    };
    assert_eq!(
        (&*timer.name, stockade_plugin::clock_ms() - before),
        ("soon", 3000)
    );
}

#[test]
fn what_newer_servers_add_is_left_alone() {
    let text = r#"{"kind": "events", "seq": 1, "cursor": 2, "new": 1, "events": [{"type": "moved", "key": "k"},
        {"type": "lookup", "tokens": 4, "hit_tokens": 2, "request": "r", "new": []}]}"#;
    let Message::Events(batch) = serde_json::from_str(text).unwrap() else {
        panic!("these were events");
    };
    assert_eq!(batch.events[0], Event::Unknown);
    assert!(matches!(batch.events[1], Event::Lookup { tokens: 4, .. }));
    let unknown: Message = serde_json::from_str(r#"{"kind": "weather", "seq": 2}"#).unwrap();
    assert_eq!(unknown, Message::Unknown);
    let text = r#"{"kind": "rank", "candidates": [{"id": 3, "bytes": 1, "chunk": null, "request": null}]}"#;
    let Message::Rank(rank) = serde_json::from_str(text).unwrap() else {
        panic!("this was a ranking");
    };
    assert_eq!((rank.candidates[0].id, rank.candidates[0].chunk), (3, None));
    let stats: Stats = serde_json::from_str(r#"{"objects": 3, "new": {}}"#).unwrap();
    assert_eq!(stats.objects, 3);
}
