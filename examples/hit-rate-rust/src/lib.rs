//! A sandboxed plugin: the hit rate since the last look and in all, as log lines, a metric and a
//! call. `../hit-rate-go` is the same in Go.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stockade_plugin::{
    Call, Callable, Event, EventBatch, HandlerResult, Plugin, Shutdown, Start, Timer,
    cache::{self, EventType, Subscription},
    config::Config,
    info, metrics, state, timer, warn,
};

/// Time between two looks where nothing else is set.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);

/// Lookups and their tokens.
#[derive(Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Counts {
    lookups: u64,
    tokens: u64,
    hit_tokens: u64,
}

impl Counts {
    fn percent(self) -> f64 {
        match self.tokens {
            0 => 0.0,
            tokens => 100.0 * self.hit_tokens as f64 / tokens as f64,
        }
    }
}

struct HitRate {
    /// In all, also in earlier runs.
    all: Counts,
    /// Since the last look.
    fresh: Counts,
}

impl Plugin for HitRate {
    fn start(start: &Start) -> HandlerResult<Self> {
        let setting = format!("{}.seconds", start.plugin);
        let interval = Config::load()?.seconds(&setting, 0.1..=86_400.0)?;
        let interval = interval.unwrap_or(DEFAULT_INTERVAL);
        timer::every_after("look", interval, interval)?;
        cache::subscribe(&Subscription {
            types: vec![EventType::Lookup],
            ..Subscription::default()
        })?;
        let all: Counts = state::get_json("counts")?.unwrap_or_default();
        info!("watching; {} lookups in earlier runs", all.lookups);
        let fresh = Counts::default();
        Ok(Self { all, fresh })
    }

    fn events(&mut self, batch: &EventBatch) -> HandlerResult {
        if batch.lost > 0 {
            warn!("{} events were lost", batch.lost);
        }
        for event in &batch.events {
            if let Event::Lookup {
                tokens, hit_tokens, ..
            } = event
            {
                for counts in [&mut self.all, &mut self.fresh] {
                    counts.lookups += 1;
                    counts.tokens += tokens;
                    counts.hit_tokens += hit_tokens;
                }
            }
        }
        Ok(())
    }

    fn timer(&mut self, _: &Timer) -> HandlerResult {
        let fresh = std::mem::take(&mut self.fresh);
        if fresh.lookups > 0 {
            info!(
                "{:.1} % of {} tokens hit in {} lookups",
                fresh.percent(),
                fresh.tokens,
                fresh.lookups
            );
            state::set_json("counts", &self.all)?;
        }
        metrics::set("hit_percent", fresh.percent())?;
        Ok(())
    }

    fn shutdown(&mut self, _: &Shutdown) -> HandlerResult {
        Ok(state::set_json("counts", &self.all)?)
    }
}

impl Callable for HitRate {
    fn call(&mut self, call: &Call) -> HandlerResult<Vec<u8>> {
        match call.name() {
            "report" => Ok(serde_json::to_vec(&self.all)?),
            other => Err(format!("no method `{other}`: there is `report`").into()),
        }
    }
}

stockade_plugin::export_plugin!(HitRate: Callable);

#[cfg(test)]
mod tests {
    use super::*;
    use stockade_plugin::testing::{Grant, Host};

    fn lookup(tokens: u64, hit_tokens: u64) -> Event {
        let (salt, model, request) = Default::default();
        Event::Lookup {
            salt,
            model,
            request,
            tokens,
            hit_tokens,
        }
    }

    fn host() -> Host {
        let host = Host::new().grant(Grant::Events).state_kib(1);
        host.setting("under_test.seconds", 10)
    }

    #[test]
    fn it_says_what_was_hit_since_the_last_look() {
        let host = host();
        let mut plugin = host.start::<HitRate>().unwrap();
        plugin
            .events(vec![lookup(512, 256), lookup(512, 512)])
            .unwrap();
        plugin.advance(Duration::from_secs(10)).unwrap();
        assert_eq!(host.gauge("hit_percent"), Some(75.0));
        plugin.advance(Duration::from_secs(10)).unwrap();
        assert_eq!(host.gauge("hit_percent"), Some(0.0));
        let said = [
            "watching; 0 lookups in earlier runs",
            "75.0 % of 1024 tokens hit in 2 lookups",
        ];
        assert_eq!(host.log_lines(), said);
    }

    #[test]
    fn counts_outlive_the_run() {
        let host = host();
        let mut plugin = host.start::<HitRate>().unwrap();
        plugin.events(vec![lookup(512, 0)]).unwrap();
        plugin.shutdown().unwrap();
        let mut plugin = host.start::<HitRate>().unwrap();
        let report = plugin.call("it.report", "").unwrap();
        assert_eq!(report, br#"{"lookups":1,"tokens":512,"hit_tokens":0}"#);
        assert!(plugin.call("it.nothing", "").is_err());
    }
}
