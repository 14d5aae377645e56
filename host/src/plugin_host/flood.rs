//! The server's part in `stockade plugin prove`: its ring of events, and nothing else of it.

use std::sync::Arc;

use stockade_cache::CacheSalt;
use stockade_sandbox::prove::Flood;

use super::{EventLog, TenantScope};

/// A ring as servers have it, and a way to make as many events happen as an attack asks for.
pub(crate) fn flood() -> Flood {
    let log = EventLog::new(256);
    let events = Arc::clone(&log);
    Flood {
        subscribe: Arc::new(move |subscription, most_behind| {
            let log = Arc::clone(&log);
            let (cursor, reader) =
                log.subscribe(subscription, most_behind, || TenantScope::Everything);
            (cursor, Box::new(reader))
        }),
        events: Arc::new(move |count| {
            let (salt, model, request) = (CacheSalt::default(), "flood".into(), "flood".into());
            for _ in 0..count {
                events.session_ended(&salt, &model, &request);
            }
        }),
    }
}
