//! LMCache's routes about the cache: status, configuration, clearing (`http_apis/` there).

use std::sync::Arc;

use axum::{Extension, Json, extract::State, http::HeaderMap};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Shared,
    access::{Caller, Role},
    problem::Problem,
    take::{self, Query},
};

/// Body of `POST /cache/clear`; an empty body means the defaults.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ClearRequest {
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

pub(super) async fn clear(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    take::Json(request): take::Json<ClearRequest>,
) -> Result<Json<Value>, Problem> {
    if request.tier != "l1" {
        return Err(Problem::bad_request(
            "bad-clear-request",
            format!("tier {:?} cannot be cleared: use \"l1\"", request.tier),
        ));
    }
    tracing::info!("{} asked for the cache to be cleared", caller.name);
    let service = Arc::clone(&admin.service);
    let force = request.force;
    tokio::task::spawn_blocking(move || service.clear_cache(force))
        .await
        .map_err(|error| Problem::internal("clear-failed", error.to_string()))?;
    Ok(Json(json!({"status": "ok", "cleared": {"tier": "l1"}})))
}

/// LMCache's configuration document; secrets never enter it.
pub(super) async fn config(State(admin): Shared) -> Json<Value> {
    let part = |name: &str| admin.config.get(name).cloned().unwrap_or_default();
    let fleet = admin.service.coordinator().coordinator();
    let fleet = fleet.map(|(settings, _)| settings);
    Json(json!({
        "mp": part("mp_config"),
        "storage_manager": part("storage_manager_config"),
        "observability": part("obs_config"),
        "http": part("http_config"),
        "coordinator": {
            "url": fleet.map_or("", |it| it.url.as_str()),
            "advertise_ip": fleet.and_then(|it| it.advertise_ip.as_deref()).unwrap_or_default(),
            "heartbeat_interval": fleet.map_or(5.0, |it| it.heartbeat.as_secs_f64()),
            "event_reporting": fleet.is_some_and(|it| it.reports_events),
            "event_flush_interval": fleet.map_or(1.0, |it| it.flush.as_secs_f64()),
            "event_sink_config": {},
            "blend_timeout": 1.0,
            "blend_match_concurrency": 8,
        },
    }))
}

/// The log level as LMCache shows it, and sets it: by GET, for its frontend.
#[derive(Debug, Deserialize)]
pub(super) struct LogLevelQuery {
    level: Option<String>,
    logger_name: Option<String>,
}

pub(super) async fn loglevel(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Query(query): Query<LogLevelQuery>,
) -> Result<String, Problem> {
    let Some(level) = &query.level else {
        return Ok(format!(
            "=== Loggers and Levels ===\nstockade: {}\n",
            admin.log.level()
        ));
    };
    let from_elsewhere = headers
        .get("sec-fetch-site")
        .is_some_and(|site| site != "same-origin" && site != "none");
    if caller.role != Role::Operator || from_elsewhere {
        return Err(Problem::new(
            axum::http::StatusCode::FORBIDDEN,
            "forbidden",
            "setting the level needs an operator: use PUT /v1/log-level",
        ));
    }
    set_level(&admin, &caller, level)?;
    let logger = query.logger_name.as_deref().unwrap_or("stockade");
    Ok(format!("Set {logger} level to {}\n", admin.log.level()))
}

/// Body of `PUT /v1/log-level`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LevelRequest {
    level: String,
}

pub(super) async fn get_level(State(admin): Shared) -> Json<Value> {
    Json(json!({"level": admin.log.level().to_string().to_lowercase()}))
}

pub(super) async fn put_level(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    take::Json(request): take::Json<LevelRequest>,
) -> Result<Json<Value>, Problem> {
    set_level(&admin, &caller, &request.level)?;
    Ok(get_level(State(admin)).await)
}

fn set_level(admin: &super::Admin, caller: &Caller, level: &str) -> Result<(), Problem> {
    // Python's name for it, which LMCache's frontend sends.
    let name = if level.eq_ignore_ascii_case("warning") {
        "warn"
    } else {
        level
    };
    let parsed = name.parse().map_err(|_| {
        Problem::bad_request(
            "bad-level",
            format!("level {level:?}: give error, warn, info, debug or trace"),
        )
    })?;
    admin
        .log
        .set_level(parsed)
        .map_err(|error| Problem::internal("log-level", error))?;
    tracing::info!("{} set the log level to {parsed}", caller.name);
    Ok(())
}
