//! The cache as a plugin of a certain name would see it: what `stockade plugin run --live` puts a
//! plugin beside without putting it into the server.
//!
//! Everything here only looks. A name that belongs to a tenant sees what is that tenant's.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};
use stockade_sandbox::{
    PluginHost,
    host_api::{
        Code, EventBatch, EventKind, EventSource, KeysQuery, PluginRun, Refusal, Subscription,
    },
};
use tokio::{sync::watch, time::timeout};

use super::{Shared, problem::Problem, take::Query};

/// Events that a reader may be behind before the oldest are dropped: what a plugin gets that does
/// not say.
const MOST_BEHIND: u64 = 4096;
/// How long a reader of events hears nothing before it gets an empty line, which shows whether it
/// is still there.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// No run has this number, so nothing can be held in its name.
fn run(name: &str) -> PluginRun {
    PluginRun {
        plugin: name.into(),
        run: 0,
    }
}

fn problem(refusal: Refusal) -> Problem {
    let (status, code) = match refusal.code {
        Code::Invalid => (StatusCode::BAD_REQUEST, "bad-query"),
        Code::Denied => (StatusCode::FORBIDDEN, "plugin-denied"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "cache-unavailable"),
    };
    Problem::new(status, code, refusal.reason)
}

/// Has the cache looked at where blocking is allowed.
async fn look<T: Send + 'static>(
    host: Arc<dyn PluginHost>,
    work: impl FnOnce(&dyn PluginHost) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(move || work(&*host))
        .await
        .map_err(|error| Problem::internal("look-failed", error.to_string()))?
        .map_err(problem)
}

/// The configuration that plugins are given, and the tenant of this one.
pub(super) async fn environment(State(admin): Shared, Path(name): Path<String>) -> Json<Value> {
    let tenant = admin.plugin_host.tenant_of(&name);
    Json(json!({"name": name, "tenant": tenant.as_deref(), "config": admin.config}))
}

/// The answer of `cache_stats`.
pub(super) async fn stats(
    State(admin): Shared,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    let host = Arc::clone(&admin.plugin_host);
    let stats = look(host, move |host| host.stats(&run(&name))).await?;
    Ok(Json(json!(stats)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    salt: Option<String>,
    model: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

/// The answer of `cache_keys`.
pub(super) async fn keys(
    State(admin): Shared,
    Path(name): Path<String>,
    Query(page): Query<PageQuery>,
) -> Result<Json<Value>, Problem> {
    let query = KeysQuery {
        salt: page.salt,
        model: page.model,
        after: page.after,
        limit: page.limit,
    };
    query.check().map_err(problem)?;
    let host = Arc::clone(&admin.plugin_host);
    let page = look(host, move |host| host.keys(&run(&name), &query)).await?;
    Ok(Json(json!(page)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    /// Kinds with commas between; all where it is left out.
    types: Option<String>,
    cursor: Option<u64>,
    max_batch: Option<usize>,
    #[serde(default)]
    follow: bool,
}

/// What has happened since the cursor, as an `events` message has it; with `follow` one JSON
/// object a line for as long as the caller reads, the cursor first.
pub(super) async fn events(
    State(admin): Shared,
    Path(name): Path<String>,
    Query(query): Query<EventsQuery>,
) -> Result<Response, Problem> {
    let types: Option<BTreeSet<EventKind>> = match &query.types {
        None => None,
        Some(types) => {
            let names: Vec<_> = types.split(',').collect();
            let read = serde_json::from_value(json!(names)).map_err(|error| {
                Problem::bad_request("bad-query", format!("types {types:?}: {error}"))
            })?;
            Some(read)
        }
    };
    let subscription = Subscription {
        types,
        cursor: query.cursor,
        max_batch: query.max_batch,
    };
    subscription.check().map_err(problem)?;
    let host = Arc::clone(&admin.plugin_host);
    let begun = look(host, move |host| {
        host.subscribe(&run(&name), &subscription, MOST_BEHIND)
    });
    let (cursor, mut source) = begun.await?;
    if !query.follow {
        // What is there already, and nothing that is to come.
        return match timeout(Duration::ZERO, source.next()).await {
            Ok(Some(batch)) => {
                let kind = [(header::CONTENT_TYPE, "application/json")];
                Ok((kind, text(batch).await?).into_response())
            }
            _ => {
                let nothing = json!({"cursor": cursor, "lost": 0, "events": []});
                Ok(Json(nothing).into_response())
            }
        };
    }
    let reader = Reader {
        source,
        stopped: admin.stopped.clone(),
        first: Some(line(&json!({"cursor": cursor}))),
    };
    let stream = futures_util::stream::unfold(reader, |mut reader| async move {
        let chunk = reader.next().await?;
        Some((Ok::<_, Infallible>(chunk), reader))
    });
    Ok((
        [
            (header::CONTENT_TYPE, "application/x-ndjson"),
            (header::CACHE_CONTROL, "no-store"),
        ],
        Body::from_stream(stream),
    )
        .into_response())
}

fn line(value: &Value) -> Bytes {
    format!("{value}\n").into()
}

/// Makes a batch's text, where that keeps no request waiting.
async fn text(batch: EventBatch) -> Result<Bytes, Problem> {
    let make = move || {
        let events = (batch.events)();
        line(&json!({"cursor": batch.cursor, "lost": batch.lost, "events": events}))
    };
    tokio::task::spawn_blocking(make)
        .await
        .map_err(|error| Problem::internal("look-failed", error.to_string()))
}

/// One reader of events; what it is too slow for, it misses and is told the number of.
struct Reader {
    source: Box<dyn EventSource>,
    stopped: watch::Receiver<bool>,
    first: Option<Bytes>,
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        let batch = tokio::select! {
            batch = timeout(KEEPALIVE, self.source.next()) => batch,
            _ = self.stopped.wait_for(|&is_stopped| is_stopped) => return None,
        };
        let Ok(batch) = batch else {
            return Some(Bytes::from_static(b"\n"));
        };
        text(batch?).await.ok()
    }
}
