//! A plugin that counts lookups, and says how many when it is called.

use std::time::Duration;

use stockade_plugin::{
    Call, Callable, Event, EventBatch, HandlerResult, Plugin, Start, Timer,
    cache::{self, EventType, Subscription},
    config::Config,
    info, timer,
};

struct MyPlugin {
    lookups: u64,
}

impl Plugin for MyPlugin {
    fn start(start: &Start) -> HandlerResult<Self> {
        let interval = Config::load()?
            .seconds("my_plugin.seconds", 0.1..=86_400.0)?
            .unwrap_or(Duration::from_secs(30));
        timer::every_after("report", interval, interval)?;
        cache::subscribe(&Subscription {
            types: vec![EventType::Lookup],
            ..Subscription::default()
        })?;
        info!("{} has started", start.plugin);
        Ok(Self { lookups: 0 })
    }

    fn events(&mut self, batch: &EventBatch) -> HandlerResult {
        let is_lookup = |event: &&Event| matches!(event, Event::Lookup { .. });
        self.lookups += batch.events.iter().filter(is_lookup).count() as u64;
        Ok(())
    }

    fn timer(&mut self, _: &Timer) -> HandlerResult {
        info!("{} lookups", self.lookups);
        Ok(())
    }
}

impl Callable for MyPlugin {
    fn call(&mut self, call: &Call) -> HandlerResult<Vec<u8>> {
        match call.name() {
            "lookups" => Ok(self.lookups.to_string().into_bytes()),
            other => Err(format!("no method `{other}`: there is `lookups`").into()),
        }
    }
}

stockade_plugin::export_plugin!(MyPlugin: Callable);

#[cfg(test)]
mod tests {
    use super::*;
    use stockade_plugin::testing::{Grant, Host};

    #[test]
    fn it_counts_lookups() {
        let host = Host::new().grant(Grant::Events);
        let mut plugin = host.start::<MyPlugin>().unwrap();
        let (salt, model, request) = Default::default();
        let lookup = Event::Lookup {
            salt,
            model,
            request,
            tokens: 512,
            hit_tokens: 256,
        };
        plugin.events(vec![lookup.clone(), lookup]).unwrap();
        assert_eq!(plugin.call("my_plugin.lookups", "").unwrap(), b"2");
        plugin.advance(Duration::from_secs(30)).unwrap();
        assert_eq!(host.log_lines(), ["under_test has started", "2 lookups"]);
    }
}
