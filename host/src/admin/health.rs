//! Is it up, is it ready, does the data path work.

use std::time::{Duration, Instant};

use axum::{
    Extension, Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use stockade_sandbox::{PluginState, PluginStatus};

use super::{Shared, access::Caller, problem::Problem};
use crate::service::ProbeReport;

/// A result of the probe is good for this long, so that asking often costs nothing.
const PROBE_LIFE: Duration = Duration::from_secs(1);

/// What the last probe found, for those who ask again at once.
#[derive(Default)]
pub(crate) struct LastProbe(tokio::sync::Mutex<Option<(Instant, Result<ProbeReport, String>)>>);

/// `{"status": "ok"}` unless a loop stands still, which only a restart mends.
pub(super) async fn livez(State(admin): Shared) -> Response {
    verdict(admin.watchdog.complaint(), "ok")
}

/// As `livez`, and not while the server stops.
pub(super) async fn readyz(State(admin): Shared) -> Response {
    verdict(complaint(&admin), "ok")
}

/// LMCache's probe: the same as `readyz` in LMCache's words.
pub(super) async fn healthcheck(State(admin): Shared) -> Response {
    verdict(complaint(&admin), "healthy")
}

fn complaint(admin: &super::Admin) -> Option<String> {
    match admin.service.is_draining() {
        true => Some("the server is stopping".to_owned()),
        false => admin.watchdog.complaint(),
    }
}

fn verdict(complaint: Option<String>, well: &str) -> Response {
    match complaint {
        None => Json(json!({"status": well})).into_response(),
        Some(reason) => {
            let body = Json(json!({"status": "unhealthy", "reason": reason}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

/// What an operator should know that no restart of the server mends: plugins that do not run and
/// will not by themselves.
pub(super) fn notes(plugins: &[PluginStatus]) -> Vec<String> {
    let stuck = |state| {
        matches!(
            state,
            PluginState::Refused | PluginState::Quarantined | PluginState::Failed
        )
    };
    let note = |plugin: &PluginStatus| {
        let (name, state) = (&plugin.name, plugin.state.name());
        match &plugin.last_end {
            Some(why) => format!("plugin `{name}` is {state}: {why}"),
            None => format!("plugin `{name}` is {state}"),
        }
    };
    let plugins = plugins.iter().filter(|it| stuck(it.state));
    plugins.map(note).collect()
}

/// Every loop, and notes on what else does not run, which turn nothing red.
pub(super) async fn health(State(admin): Shared) -> Response {
    let loops: Vec<Value> = admin
        .watchdog
        .loops()
        .iter()
        .map(|it| {
            json!({
                "name": &*it.name,
                "healthy": it.stalled_for.is_none(),
                "stalled_seconds": it.stalled_for.map(|time| time.as_secs_f64()),
            })
        })
        .collect();
    let reason = complaint(&admin);
    let status = match reason {
        None => StatusCode::OK,
        Some(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = json!({
        "status": if reason.is_none() { "healthy" } else { "unhealthy" },
        "reason": reason,
        "loops": loops,
        "notes": notes(&admin.supervisor.snapshot()),
    });
    (status, Json(body)).into_response()
}

/// Registers a worker of a reserved tenant, stores, looks up and retrieves a chunk, compares
/// the bytes and removes it again.
pub(super) async fn probe(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, Problem> {
    // Held over the probe, so that a crowd of callers shares one.
    let mut last = admin.probe.0.lock().await;
    let result = match &*last {
        Some((at, result)) if at.elapsed() < PROBE_LIFE => result.clone(),
        _ => {
            let service = std::sync::Arc::clone(&admin.service);
            let result = tokio::task::spawn_blocking(move || service.probe()).await;
            let result = result.unwrap_or_else(|error| Err(error.to_string()));
            if let Err(problem) = &result {
                tracing::warn!(
                    "the data-path probe asked for by {} failed: {problem}",
                    caller.name
                );
            }
            *last = Some((Instant::now(), result.clone()));
            result
        }
    };
    match result {
        Ok(report) => Ok(Json(json!({
            "status": "healthy",
            "store_seconds": report.store.as_secs_f64(),
            "lookup_seconds": report.lookup.as_secs_f64(),
            "retrieve_seconds": report.retrieve.as_secs_f64(),
            "bytes": report.bytes,
        }))),
        Err(problem) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "data-path",
            format!("the data path does not work: {problem}"),
        )),
    }
}

/// LMCache's list of background threads, told of our loops.
pub(super) async fn periodic_threads(State(admin): Shared) -> Json<Value> {
    let loops = admin.watchdog.loops();
    let active = loops.iter().filter(|it| it.stalled_for.is_none()).count();
    let threads: Vec<Value> = loops
        .iter()
        .map(|it| {
            json!({
                "name": &*it.name,
                "level": "critical",
                "interval": crate::watchdog::BEAT.as_secs_f64(),
                "is_running": true,
                "is_active": it.stalled_for.is_none(),
            })
        })
        .collect();
    let counts = json!({"total": loops.len(), "running": loops.len(), "active": active});
    let none = json!({"total": 0, "running": 0, "active": 0});
    Json(json!({
        "summary": {
            "total_count": loops.len(),
            "running_count": loops.len(),
            "active_count": active,
            "by_level": {"critical": counts, "high": none, "medium": none, "low": none},
        },
        "threads": threads,
    }))
}

/// LMCache's verdict over its background threads, told of our loops.
pub(super) async fn periodic_threads_health(State(admin): Shared) -> Json<Value> {
    let stalled: Vec<Value> = admin
        .watchdog
        .loops()
        .iter()
        .filter_map(|it| {
            let silent = it.stalled_for?.as_secs_f64();
            Some(json!({"name": &*it.name, "last_run_ago": silent}))
        })
        .collect();
    Json(json!({
        "healthy": stalled.is_empty(),
        "unhealthy_count": stalled.len(),
        "unhealthy_threads": stalled,
    }))
}

/// Where LMCache prints stacks; here the loops and whether they go round.
pub(super) async fn threads(State(admin): Shared) -> String {
    let line = |it: &crate::watchdog::LoopState| match it.stalled_for {
        None => format!("{}: running\n", it.name),
        Some(time) => format!(
            "{}: standing still for {:.1} s\n",
            it.name,
            time.as_secs_f64()
        ),
    };
    admin.watchdog.loops().iter().map(line).collect()
}
