//! The server's part in `stockade plugin prove`: its ring of events, and nothing else of it.

use std::sync::Arc;

use stockade_cache::CacheSalt;
use stockade_sandbox::{
    PluginHost,
    host_api::{
        CacheRequest, CacheStats, CacheWork, Code, EventSource, KeysPage, KeysQuery, PluginRun,
        Refusal, Subscription,
    },
    prove::Flood,
};

use super::{EventLog, TenantScope};

/// The ring alone.
struct Ring(Arc<EventLog>);

/// A ring as servers have it, and a way to make as many events happen as an attack asks for.
pub(crate) fn flood() -> Flood {
    let log = EventLog::new(256);
    let events = Arc::clone(&log);
    Flood {
        host: Arc::new(Ring(log)),
        events: Arc::new(move |count| {
            let (salt, model, request) = (CacheSalt::default(), "flood".into(), "flood".into());
            for _ in 0..count {
                events.session_ended(&salt, &model, &request);
            }
        }),
    }
}

fn none<T>() -> Result<T, Refusal> {
    Err(Refusal::new(
        Code::Unavailable,
        "there is no cache here: limits are being proven",
    ))
}

impl PluginHost for Ring {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        None
    }

    fn stats(&self, _run: &PluginRun) -> Result<CacheStats, Refusal> {
        none()
    }

    fn keys(&self, _run: &PluginRun, _query: &KeysQuery) -> Result<KeysPage, Refusal> {
        none()
    }

    fn request(&self, _run: &PluginRun, _request: &CacheRequest) -> Result<CacheWork, Refusal> {
        none()
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        subscription: &Subscription,
        most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        let log = Arc::clone(&self.0);
        let (cursor, reader) = log.subscribe(subscription, most_behind, || TenantScope::Everything);
        Ok((cursor, Box::new(reader)))
    }

    fn ended(&self, _run: &PluginRun) {}
}
