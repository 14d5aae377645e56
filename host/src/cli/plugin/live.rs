//! The cache of a running server, for a plugin that runs beside it: `stockade plugin run --live`.
//!
//! It is read over the HTTP API. The plugin stays in this process and changes nothing there.

use std::{
    sync::{Arc, OnceLock},
    thread,
};

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stockade_sandbox::{
    PluginHost,
    host_api::{
        Backlog, CacheRequest, CacheStats, CacheWork, Code, EventBatch, EventSource, KeysPage,
        KeysQuery, Pending, PluginRun, Refusal, Subscription,
    },
};
use tokio::sync::mpsc;

use super::{super::remote::Remote, test::event};

/// Batches of events that may wait for the plugin; beyond that the server drops and counts them.
const WAITING_BATCHES: usize = 4;

/// The cache of a server, as a plugin of this name would see it there.
pub(super) struct LiveCache {
    remote: Remote,
    path: String,
    tenant: Option<Arc<str>>,
    /// Why events ended, if they did.
    ended: Arc<OnceLock<String>>,
}

impl LiveCache {
    /// Asks the server for the configuration that plugins are given there.
    ///
    /// # Errors
    /// When no server answers, or the token may not look.
    pub(super) fn connect(remote: &Remote, name: &str) -> anyhow::Result<(Arc<Self>, Value)> {
        let path = format!("/v1/plugin-view/{name}");
        let mut view = remote.get(&path)?;
        let config = view["config"].take();
        let cache = Self {
            remote: remote.clone(),
            path,
            tenant: view["tenant"].as_str().map(Arc::from),
            ended: Arc::default(),
        };
        Ok((Arc::new(cache), config))
    }

    /// Why the server's events ended, if they did.
    pub(super) fn lost(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }

    fn get<T: DeserializeOwned>(&self, part: &str, query: &[(&str, String)]) -> Result<T, Refusal> {
        let answer = self.remote.query(&format!("{}/{part}", self.path), query);
        answer
            .and_then(|answer| Ok(serde_json::from_value(answer)?))
            .map_err(|error| Refusal::new(Code::Unavailable, format!("{error:#}")))
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_default()
}

impl PluginHost for LiveCache {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        self.tenant.clone()
    }

    fn stats(&self, _run: &PluginRun) -> Result<CacheStats, Refusal> {
        self.get("stats", &[])
    }

    fn keys(&self, _run: &PluginRun, query: &KeysQuery) -> Result<KeysPage, Refusal> {
        let asked = [
            ("salt", query.salt.clone()),
            ("model", query.model.clone()),
            ("after", query.after.clone()),
            ("limit", query.limit.map(|limit| limit.to_string())),
        ];
        let asked: Vec<_> = asked
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect();
        self.get("keys", &asked)
    }

    fn request(&self, _run: &PluginRun, _request: &CacheRequest) -> Result<CacheWork, Refusal> {
        Err(Refusal::new(
            Code::Denied,
            "a plugin that is run with --live looks at the server and changes nothing there: \
             put it into the server's plugins to pin, evict or prefetch",
        ))
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        subscription: &Subscription,
        _most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        let mut query = vec![("follow", "true".to_owned())];
        if let Some(types) = &subscription.types {
            let names: Vec<_> = types.iter().map(|kind| json!(kind)).collect();
            let names = names.iter().filter_map(Value::as_str);
            query.push(("types", names.collect::<Vec<_>>().join(",")));
        }
        if let Some(cursor) = subscription.cursor {
            query.push(("cursor", cursor.to_string()));
        }
        if let Some(most) = subscription.max_batch {
            query.push(("max_batch", most.to_string()));
        }
        let (lines_in, mut lines) = mpsc::channel(WAITING_BATCHES);
        let (remote, path) = (self.remote.clone(), format!("{}/events", self.path));
        let ended = Arc::clone(&self.ended);
        // Ends with the process, or when nobody takes what it reads.
        thread::spawn(move || {
            let read = remote.follow(&path, &query, |line| {
                lines_in.blocking_send(line).context("the plugin ended")
            });
            let why = match read {
                Ok(()) => "it is stopping, or the connection was cut".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let _ = ended.set(why);
        });
        let first = lines.blocking_recv().ok_or_else(|| {
            let why = self.lost().unwrap_or("the server gives no events");
            Refusal::new(Code::Unavailable, why)
        })?;
        Ok((number(&first, "cursor"), Box::new(LiveEvents(lines))))
    }

    fn ended(&self, _run: &PluginRun) {}
}

/// The events of one subscription.
struct LiveEvents(mpsc::Receiver<Value>);

impl EventSource for LiveEvents {
    /// What waits is with the server, which does not tell.
    fn backlog(&self) -> Backlog {
        Backlog::new(|| 0)
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        Box::pin(async move {
            let batch = self.0.recv().await?;
            let (cursor, lost) = (number(&batch, "cursor"), number(&batch, "lost"));
            let events = move || {
                let events = batch["events"].as_array().into_iter().flatten();
                // A newer server may have kinds of events that this program does not know.
                events.filter_map(|value| event(value).ok()).collect()
            };
            Some(EventBatch {
                cursor,
                lost,
                events: Box::new(events),
            })
        })
    }
}
