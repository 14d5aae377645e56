//! Keeps live conversations in the cache and evicts finished ones first.
//!
//! LRU knows when a chunk was used last. A chunk of a conversation says more: how often turns have
//! come back to it. One that is used turn after turn, a shared system prompt or the beginning of a
//! long conversation, will be again; the end of one that nobody has continued will not. So a chunk
//! is worth less the longer it was idle *for each of its uses*, and within a conversation its end
//! goes before its beginning, because what lies behind a hole in a prefix cannot be used.
//!
//! Whoever knows that a conversation is over, such as a gateway, says so with the call `finished`,
//! a JSON list of request ids: what these requests used last goes before everything else.

use std::collections::{HashSet, VecDeque};

use serde::Serialize;
use stockade_plugin::{
    Call, Callable, Candidate, HandlerResult, Plugin, Rank, Ranker, Start, info, metrics,
};

/// Finished requests that are remembered; the oldest is forgotten first.
const MAX_FINISHED: usize = 10_000;

/// Longest request id that is remembered, in bytes.
const MAX_REQUEST_BYTES: usize = 256;

#[derive(Default, Serialize)]
struct Report {
    rankings: u64,
    candidates: u64,
    finished: usize,
}

#[derive(Default)]
struct SessionAware {
    finished: HashSet<String>,
    /// The same in the order in which they came.
    order: VecDeque<String>,
    report: Report,
}

impl Plugin for SessionAware {
    fn start(_: &Start) -> HandlerResult<Self> {
        info!("ranking by idle time for each use; finished requests first");
        Ok(Self::default())
    }
}

impl SessionAware {
    fn finish(&mut self, request: String) -> HandlerResult {
        if request.len() > MAX_REQUEST_BYTES {
            return Err(format!("a request id has at most {MAX_REQUEST_BYTES} bytes").into());
        }
        if self.finished.insert(request.clone()) {
            self.order.push_back(request);
        }
        if self.order.len() > MAX_FINISHED
            && let Some(oldest) = self.order.pop_front()
        {
            self.finished.remove(&oldest);
        }
        Ok(())
    }

    /// Lower goes first: finished before live, then idle long for its uses, then from behind.
    fn place(&self, candidate: &Candidate) -> (bool, f64, u64) {
        let request = candidate.request.as_deref();
        let is_live = !request.is_some_and(|request| self.finished.contains(request));
        let idle_for_each_use = candidate.idle_ms as f64 / (candidate.uses as f64 + 1.0);
        (
            is_live,
            -idle_for_each_use,
            u64::MAX - candidate.chunk.unwrap_or_default(),
        )
    }
}

impl Ranker for SessionAware {
    fn rank(&mut self, rank: &Rank) -> HandlerResult<Vec<u32>> {
        self.report.rankings += 1;
        self.report.candidates += rank.candidates.len() as u64;
        let mut places: Vec<_> = rank
            .candidates
            .iter()
            .map(|candidate| (self.place(candidate), candidate.id))
            .collect();
        // Stable, so that the native order decides between equals.
        places.sort_by(
            |((a_live, a_idle, a_from_behind), _), ((b_live, b_idle, b_from_behind), _)| {
                a_live
                    .cmp(b_live)
                    .then(a_idle.total_cmp(b_idle))
                    .then(a_from_behind.cmp(b_from_behind))
            },
        );
        Ok(places.into_iter().map(|(_, id)| id).collect())
    }
}

impl Callable for SessionAware {
    fn call(&mut self, call: &Call) -> HandlerResult<Vec<u8>> {
        match call.name() {
            "finished" => {
                let requests: Vec<String> = serde_json::from_slice(&call.body)
                    .map_err(|error| format!("give a JSON list of request ids: {error}"))?;
                for request in requests {
                    self.finish(request)?;
                }
                metrics::set("finished_requests", self.finished.len() as f64)?;
                Ok(Vec::new())
            }
            "report" => {
                self.report.finished = self.finished.len();
                Ok(serde_json::to_vec(&self.report)?)
            }
            other => Err(format!("no method `{other}`: there are `finished` and `report`").into()),
        }
    }
}

stockade_plugin::export_plugin!(SessionAware: Callable, Ranker);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use stockade_plugin::testing::Host;

    fn candidate(id: u32, request: &str, chunk: u64, idle_ms: u64, uses: u64) -> Candidate {
        Candidate {
            id,
            request: Some(request.to_owned()),
            chunk: Some(chunk),
            idle_ms,
            uses,
            ..Candidate::default()
        }
    }

    #[test]
    fn what_is_used_again_and_again_stays_and_ends_go_before_beginnings() {
        let host = Host::new();
        let mut plugin = host.start::<SessionAware>().unwrap();
        let order = plugin.rank(vec![
            // A system prompt that was idle for longest, but is used by everybody.
            candidate(0, "a", 0, 9000, 99),
            candidate(1, "a", 1, 9000, 1),
            candidate(2, "a", 2, 9000, 0),
            candidate(3, "b", 1, 5000, 0),
            candidate(4, "b", 2, 5000, 0),
        ]);
        assert_eq!(order.unwrap(), [2, 4, 3, 1, 0]);
    }

    #[test]
    fn what_is_finished_goes_first() {
        let host = Host::new();
        let mut plugin = host.start::<SessionAware>().unwrap();
        plugin.call("it.finished", r#"["young"]"#).unwrap();
        let order = plugin.rank(vec![
            candidate(0, "old", 0, 9000, 0),
            candidate(1, "young", 0, 10, 50),
        ]);
        assert_eq!(order.unwrap(), [1, 0]);
        let report = plugin.call("it.report", "").unwrap();
        assert_eq!(report, br#"{"rankings":1,"candidates":2,"finished":1}"#);
        for body in ["", "{}", "[1]"] {
            assert!(plugin.call("it.finished", body).is_err());
        }
    }

    #[test]
    fn it_remembers_only_so_many_and_so_long_names() {
        let host = Host::new();
        let mut plugin = host.start::<SessionAware>().unwrap();
        let names: Vec<String> = (0..MAX_FINISHED + 5).map(|nth| nth.to_string()).collect();
        let body = serde_json::to_vec(&names).unwrap();
        plugin.call("it.finished", body.clone()).unwrap();
        plugin.call("it.finished", body).unwrap();
        assert_eq!(host.gauge("finished_requests"), Some(MAX_FINISHED as f64));
        let long = serde_json::to_vec(&["x".repeat(MAX_REQUEST_BYTES + 1)]).unwrap();
        assert!(plugin.call("it.finished", long).is_err());
    }

    #[test]
    fn an_order_holds_every_candidate_once() {
        let host = Host::new();
        let mut plugin = host.start::<SessionAware>().unwrap();
        let candidates: Vec<_> = (0..500)
            .map(|id| {
                candidate(
                    id,
                    "r",
                    u64::from(id % 7),
                    u64::from(id * 37 % 101),
                    u64::from(id % 3),
                )
            })
            .collect();
        let mut order = plugin.rank(candidates).unwrap();
        order.sort_unstable();
        assert!(order.into_iter().eq(0..500));
    }
}
