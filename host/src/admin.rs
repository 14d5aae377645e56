//! The HTTP API: LMCache's routes for what is served here, and our own under `/v1`.

mod metrics;

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde::Deserialize;
use serde_json::{Value, json};
use stockade_sandbox::{PluginStatus, Supervisor, SupervisorError};
use stockade_transport::Stats;

use crate::service::Service;

/// Largest request body in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;
/// Most log lines of one answer.
const MAX_LOG_LINES: usize = 1000;

/// What the handlers read.
pub struct Admin {
    /// The request path.
    pub service: Arc<Service>,
    /// The plugins.
    pub supervisor: Arc<Supervisor>,
    /// Counters of the transport.
    pub transport: Arc<Stats>,
    /// Metrics that are counted, rather than read at the scrape.
    pub registry: Mutex<Registry>,
    /// The configuration as shown, without secrets.
    pub config: Value,
}

type Shared = State<Arc<Admin>>;

/// A problem as RFC 9457 shows it.
struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": format!("urn:stockade:problem:{}", self.code),
            "title": self.status.canonical_reason(),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
        });
        (
            self.status,
            [(header::CONTENT_TYPE, "application/problem+json")],
            body.to_string(),
        )
            .into_response()
    }
}

impl From<SupervisorError> for Problem {
    fn from(error: SupervisorError) -> Self {
        let (status, code) = match error {
            SupervisorError::NotFound(_) => (StatusCode::NOT_FOUND, "plugin-not-found"),
            SupervisorError::Busy(_) => (StatusCode::CONFLICT, "plugin-busy"),
            SupervisorError::NotReloaded { .. } => (StatusCode::CONFLICT, "plugin-not-reloaded"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "plugin-error"),
        };
        Self {
            status,
            code,
            detail: error.to_string(),
        }
    }
}

/// All routes.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/", get(async || Json(json!({"status": "ok", "service": "Stockade HTTP API"}))))
        .route("/healthcheck", get(health))
        .route("/livez", get(async || Json(json!({"status": "ok"}))))
        .route("/readyz", get(health))
        .route("/status", get(async |State(admin): Shared| Json(admin.service.status())))
        .route("/config", get(async |State(admin): Shared| Json(admin.config.clone())))
        .route("/version", get(async || Json(env!("CARGO_PKG_VERSION"))))
        .route("/lmc_version", get(async || Json("0.5.6")))
        .route("/cache/clear", post(clear))
        .route("/v1/plugins", get(list_plugins))
        .route("/v1/plugins/{name}", get(show_plugin))
        .route("/v1/plugins/{name}/logs", get(plugin_logs))
        .route("/v1/plugins/{name}/{action}", post(steer_plugin))
        .merge(metrics_router(Arc::clone(&admin)))
        .fallback(async || Problem {
            status: StatusCode::NOT_FOUND,
            code: "no-such-route",
            detail: "this server has no such route; docs/compatibility.md lists those of LMCache that it serves".to_owned(),
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(admin)
}

/// `/metrics` alone, for a listener of its own.
pub fn metrics_router<S: Clone + Send + Sync + 'static>(admin: Arc<Admin>) -> Router<S> {
    Router::new()
        .route("/metrics", get(scrape))
        .with_state(admin)
}

async fn health(State(admin): Shared) -> Response {
    if admin.service.is_draining() {
        let body = Json(json!({"status": "unhealthy", "reason": "the server is stopping"}));
        return (StatusCode::SERVICE_UNAVAILABLE, body).into_response();
    }
    Json(json!({"status": "healthy"})).into_response()
}

async fn scrape(State(admin): Shared) -> Response {
    match metrics::render(&admin) {
        Ok(text) => (
            [(
                header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(error) => Problem {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            code: "metrics",
            detail: format!("metrics could not be written: {error}"),
        }
        .into_response(),
    }
}

/// Body of `POST /cache/clear`; an empty body means the defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct ClearRequest {
    tier: String,
    force: bool,
}

impl Default for ClearRequest {
    fn default() -> Self {
        Self {
            tier: "l1".to_owned(),
            force: false,
        }
    }
}

async fn clear(State(admin): Shared, body: Bytes) -> Result<Json<Value>, Problem> {
    let bad = |detail: String| Problem {
        status: StatusCode::BAD_REQUEST,
        code: "bad-clear-request",
        detail,
    };
    let request: ClearRequest = match body.as_ref() {
        [] => ClearRequest::default(),
        body => serde_json::from_slice(body)
            .map_err(|error| bad(format!("the body is not a clear request: {error}")))?,
    };
    if request.tier != "l1" && request.tier != "all" {
        return Err(bad(format!(
            "tier {:?}: this server has only \"l1\"",
            request.tier
        )));
    }
    let service = Arc::clone(&admin.service);
    let force = request.force;
    let done = tokio::task::spawn_blocking(move || service.clear_cache(force)).await;
    done.map_err(|error| Problem {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        code: "clear-failed",
        detail: error.to_string(),
    })?;
    Ok(Json(
        json!({"status": "ok", "cleared": {"tier": request.tier}}),
    ))
}

fn plugin_json(status: &PluginStatus) -> Value {
    json!({
        "name": &*status.name,
        "kind": status.kind.name(),
        "path": status.path.to_string_lossy(),
        "state": status.state.name(),
        "sha256": status.sha256.to_string(),
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
        "limits": status.limits.iter().map(|limit| json!({
            "limit": limit.limit.name(),
            "declared": limit.declared,
            "used": limit.used,
            "hits": limit.hits,
        })).collect::<Vec<_>>(),
    })
}

async fn list_plugins(State(admin): Shared) -> Json<Value> {
    let plugins: Vec<_> = admin
        .supervisor
        .snapshot()
        .iter()
        .map(plugin_json)
        .collect();
    Json(json!({"plugins": plugins}))
}

async fn show_plugin(
    State(admin): Shared,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    Ok(Json(plugin_json(&admin.supervisor.status(&name)?)))
}

#[derive(Debug, Deserialize)]
struct LogsQuery {
    #[serde(default = "default_log_lines")]
    lines: usize,
}

fn default_log_lines() -> usize {
    100
}

async fn plugin_logs(
    State(admin): Shared,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Json<Value>, Problem> {
    let lines = admin
        .supervisor
        .logs(&name, query.lines.min(MAX_LOG_LINES))?;
    let lines: Vec<_> = lines
        .iter()
        .map(|line| json!({"unix_ms": line.unix_ms, "stream": line.stream.name(), "text": &*line.text}))
        .collect();
    Ok(Json(json!({"name": name, "lines": lines})))
}

async fn steer_plugin(
    State(admin): Shared,
    Path((name, action)): Path<(String, String)>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    match action.as_str() {
        "start" => admin.supervisor.start_plugin(&name)?,
        "stop" => admin.supervisor.stop_plugin(&name)?,
        "restart" => admin.supervisor.restart_plugin(&name)?,
        // Alone in having an outcome to wait for.
        "reload" => {
            admin.supervisor.reload_plugin(&name).await?;
            let status = plugin_json(&admin.supervisor.status(&name)?);
            return Ok((StatusCode::OK, Json(status)));
        }
        _ => {
            return Err(Problem {
                status: StatusCode::NOT_FOUND,
                code: "no-such-action",
                detail: format!(
                    "{action} is nothing a plugin can be asked: use start, stop, restart or reload"
                ),
            });
        }
    }
    Ok((
        StatusCode::ACCEPTED,
        Json(json!({"name": name, "action": action})),
    ))
}
