//! Plugins: what they do, what they print, and starting and stopping them.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};
use stockade_sandbox::{CallFailure, LogLine, PluginStatus, Supervisor};

use super::{Shared, access::Caller, problem::Problem, take::Query};

/// Most log lines of one answer.
const MAX_LOG_LINES: usize = 1000;
/// How often a follower is given what is new.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);
/// How long a follower hears nothing before it gets an empty line, which shows whether it is
/// still there.
const FOLLOW_KEEPALIVE: u32 = 50;

pub(super) fn plugin_json(status: &PluginStatus) -> Value {
    json!({
        "name": &*status.name,
        "kind": status.kind.name(),
        "path": status.path.to_string_lossy(),
        "state": status.state.name(),
        "sha256": status.sha256.map(|digest| digest.to_string()),
        "origin": status.origin.map(|origin| origin.to_string()),
        "restarts": status.restarts,
        "last_end": status.last_end,
        "last_reload": status.last_reload,
        "running_since_unix_ms": status.running_since_unix_ms,
        "memory_bytes": status.memory_bytes,
        "cpu_seconds": status.cpu_time.map(|time| time.as_secs_f64()),
        "containment": status.containment,
        "granted": status.granted,
        "log_lines": status.logs.lines,
        "log_lines_dropped": status.logs.dropped_lines,
        "log_lines_cut": status.logs.cut_lines,
        "log_bytes": status.logs.bytes,
        "cache": status.cache,
        "calls": status.calls,
        "rank": status.rank,
        "host_calls": status.counts.host_calls,
        "host_calls_refused": status.counts.refused.iter()
            .map(|(code, count)| (code.name().to_owned(), json!(count)))
            .collect::<serde_json::Map<_, _>>(),
        "handlers": status.counts.handlers.iter().map(|it| json!({
            "handler": it.handler.kind(),
            "outcome": it.outcome.name(),
            "count": it.count,
        })).collect::<Vec<_>>(),
        "events_lost": status.counts.events_lost,
        "ranked": status.counts.ranked,
        "rank_fallbacks": status.counts.rank_failures.iter()
            .map(|(failure, count)| (failure.name().to_owned(), json!(count)))
            .collect::<serde_json::Map<_, _>>(),
        "metrics": status.counts.custom.iter()
            .map(|it| (it.name.clone(), json!(it.value)))
            .collect::<serde_json::Map<_, _>>(),
        "limits": status.limits.iter().map(|limit| json!({
            "limit": limit.limit.name(),
            "declared": limit.declared,
            "used": limit.used,
            "hits": limit.hits,
        })).collect::<Vec<_>>(),
    })
}

pub(super) async fn list(State(admin): Shared) -> Json<Value> {
    let plugins: Vec<_> = admin
        .supervisor
        .snapshot()
        .iter()
        .map(plugin_json)
        .collect();
    Json(json!({"plugins": plugins}))
}

pub(super) async fn show(
    State(admin): Shared,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    Ok(Json(plugin_json(&admin.supervisor.status(&name)?)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogsQuery {
    #[serde(default = "default_log_lines")]
    lines: usize,
    #[serde(default)]
    since: Option<u64>,
    #[serde(default)]
    follow: bool,
}

fn default_log_lines() -> usize {
    100
}

fn line_json(line: &LogLine) -> Value {
    json!({
        "unix_ms": line.unix_ms,
        "stream": line.stream.name(),
        "level": line.level.name(),
        "text": &*line.text,
    })
}

/// The newest lines, or those after `since`; with `follow` one JSON object a line, for as long
/// as the caller reads.
pub(super) async fn logs(
    State(admin): Shared,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, Problem> {
    let most = query.lines.min(MAX_LOG_LINES);
    let (lines, next) = admin
        .supervisor
        .logs_since(&name, query.since.unwrap_or(0), most)?;
    if !query.follow {
        let lines: Vec<_> = lines.iter().map(line_json).collect();
        return Ok(Json(json!({"name": name, "lines": lines, "next": next})).into_response());
    }
    let follower = Follower {
        supervisor: Arc::clone(&admin.supervisor),
        stopped: admin.stopped.clone(),
        name,
        seen: next,
        first: Some(encode(&lines)),
    };
    let stream = futures_util::stream::unfold(follower, |mut follower| async move {
        let chunk = follower.next().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), follower))
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

fn encode(lines: &[LogLine]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        text.push_str(&line_json(line).to_string());
        text.push('\n');
    }
    text.into()
}

/// One reader of a plugin's lines. It holds no lines: what it is too slow for, it misses.
struct Follower {
    supervisor: Arc<Supervisor>,
    stopped: tokio::sync::watch::Receiver<bool>,
    name: String,
    seen: u64,
    first: Option<Bytes>,
}

impl Follower {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take().filter(|it| !it.is_empty()) {
            return Some(first);
        }
        for _ in 0..FOLLOW_KEEPALIVE {
            tokio::select! {
                () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
                _ = self.stopped.wait_for(|&is_stopped| is_stopped) => return None,
            }
            let (lines, next) = self
                .supervisor
                .logs_since(&self.name, self.seen, MAX_LOG_LINES)
                .ok()?;
            self.seen = next;
            if !lines.is_empty() {
                return Some(encode(&lines));
            }
        }
        Some(Bytes::from_static(b"\n"))
    }
}

pub(super) async fn steer(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path((name, action)): Path<(String, String)>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    match action.as_str() {
        "start" => admin.supervisor.start_plugin(&name)?,
        "stop" => admin.supervisor.stop_plugin(&name)?,
        "restart" => admin.supervisor.restart_plugin(&name)?,
        // Alone in having an outcome to wait for.
        "reload" => {
            tracing::info!("{} asked for a reload of plugin `{name}`", caller.name);
            admin.supervisor.reload_plugin(&name).await?;
            let status = plugin_json(&admin.supervisor.status(&name)?);
            return Ok((StatusCode::OK, Json(status)));
        }
        _ => {
            return Err(Problem::not_found(
                "no-such-action",
                format!(
                    "{action:?} is nothing a plugin can be asked: use start, stop, restart or reload"
                ),
            ));
        }
    }
    tracing::info!("{} asked for a {action} of plugin `{name}`", caller.name);
    Ok((
        StatusCode::ACCEPTED,
        Json(json!({"name": name, "action": action})),
    ))
}

/// Calls a method of a plugin, as an operator rather than a client.
pub(super) async fn call(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path((name, method)): Path<(String, String)>,
    body: Bytes,
) -> Result<Response, Problem> {
    admin.supervisor.status(&name)?;
    tracing::info!("{} calls a method of plugin `{name}`", caller.name);
    let method = format!("{name}.{method}");
    let called = admin.supervisor.call(&method, "", "http", body);
    let failed = |failure: CallFailure| {
        let (status, code) = match failure {
            CallFailure::NoPlugin(_) => (StatusCode::NOT_FOUND, "plugin-not-found"),
            CallFailure::NotGranted(_) => (StatusCode::FORBIDDEN, "plugin-serves-no-calls"),
            CallFailure::NotRunning { .. } => (StatusCode::CONFLICT, "plugin-not-running"),
            CallFailure::Busy(_) => (StatusCode::TOO_MANY_REQUESTS, "plugin-calls-waiting"),
            CallFailure::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large"),
            CallFailure::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "plugin-call-timeout"),
            CallFailure::Ended(_) | CallFailure::Failed(_) => {
                (StatusCode::BAD_GATEWAY, "plugin-call-failed")
            }
        };
        Problem::new(status, code, failure.to_string())
    };
    let payload = called.await.map_err(failed)?;
    Ok((
        [(header::CONTENT_TYPE, "application/octet-stream")],
        payload,
    )
        .into_response())
}
