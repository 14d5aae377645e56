//! A plugin of the tests: a call has it list what the cache holds, pin the first object, evict the
//! second and load it again, and count that in its state. `../warden-go` is the same in Go.

use std::time::Duration;

use serde::Serialize;
use stockade_plugin::{
    Call, Callable, HandlerResult, Plugin, Start,
    cache::{self, KeyQuery},
    state,
};

#[derive(Serialize)]
struct Report {
    listed: usize,
    pinned: u64,
    is_shown_pinned: bool,
    evicted: u64,
    loaded: u64,
    rounds: u64,
}

struct Warden;

impl Plugin for Warden {
    fn start(_: &Start) -> HandlerResult<Self> {
        Ok(Self)
    }
}

impl Callable for Warden {
    fn call(&mut self, _: &Call) -> HandlerResult<Vec<u8>> {
        let listed = cache::keys(&KeyQuery::default())?.keys;
        let [first, second, ..] = &listed[..] else {
            return Err(format!("the cache holds {} objects", listed.len()).into());
        };
        let pinned = cache::pin(&[&first.key], Duration::from_secs(60))?.done;
        let again = cache::keys(&KeyQuery::default())?.keys;
        let is_shown_pinned = again.iter().any(|it| it.key == first.key && it.pinned);
        let evicted = cache::evict(&[&second.key])?.done;
        let loaded = cache::prefetch(&[&second.key])?.done;
        cache::unpin(&[&first.key])?;
        let rounds = state::get_json::<u64>("rounds")?.unwrap_or_default() + 1;
        state::set_json("rounds", &rounds)?;
        Ok(serde_json::to_vec(&Report {
            listed: listed.len(),
            pinned,
            is_shown_pinned,
            evicted,
            loaded,
            rounds,
        })?)
    }
}

stockade_plugin::export_plugin!(Warden: Callable);
