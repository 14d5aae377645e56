//! What the server has done: sums for those who ask, and a point every two seconds for curves.

use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{Extension, Json, extract::State};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{
    Admin, Shared,
    access::{Caller, Role},
    health::notes,
    plugins::plugin_json,
    tenants::tenant_json,
};
use crate::service::{Activity, LatencySnapshot};

/// Between two points.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);
/// Points kept: ten minutes.
const POINTS: usize = 300;

/// The last minutes.
#[derive(Default)]
pub(crate) struct History {
    points: Mutex<VecDeque<Point>>,
    last: Mutex<Option<(Instant, Activity)>>,
}

/// Rates over one interval, and the pool at its end.
#[derive(Debug, Clone)]
struct Point {
    unix_ms: u64,
    used_bytes: u64,
    requests_per_second: f64,
    stored_bytes_per_second: f64,
    retrieved_bytes_per_second: f64,
    /// Tokens found of those looked up; `None` when nobody looked.
    hit_rate: Option<f64>,
    p50_seconds: Option<f64>,
    p99_seconds: Option<f64>,
}

fn unix_ms() -> u64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

fn all_requests(activity: &Activity) -> LatencySnapshot {
    let mut all = LatencySnapshot::default();
    for (_, snapshot) in &activity.requests {
        all.add(snapshot);
    }
    all
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Adds a point; to be called every [`INTERVAL`].
pub(crate) fn sample(admin: &Admin) {
    let now = Instant::now();
    let activity = admin.service.activity();
    let used_bytes = admin.service.engine().status().used_bytes;
    let mut last = admin.history.last.lock();
    if let Some((then, before)) = last.as_ref() {
        let seconds = now.duration_since(*then).as_secs_f64().max(1e-3);
        let requests = all_requests(&activity).since(&all_requests(before));
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        let point = Point {
            unix_ms: unix_ms(),
            used_bytes,
            requests_per_second: requests.count() as f64 / seconds,
            stored_bytes_per_second: rate(activity.stored_bytes, before.stored_bytes),
            retrieved_bytes_per_second: rate(activity.retrieved_bytes, before.retrieved_bytes),
            hit_rate: ratio(
                activity.hit_tokens.saturating_sub(before.hit_tokens),
                activity
                    .requested_tokens
                    .saturating_sub(before.requested_tokens),
            ),
            p50_seconds: requests.quantile(0.5),
            p99_seconds: requests.quantile(0.99),
        };
        let mut points = admin.history.points.lock();
        if points.len() >= POINTS {
            points.pop_front();
        }
        points.push_back(point);
    }
    *last = Some((now, activity));
}

fn point_json(point: &Point) -> Value {
    json!({
        "unix_ms": point.unix_ms,
        "used_bytes": point.used_bytes,
        "requests_per_second": point.requests_per_second,
        "stored_bytes_per_second": point.stored_bytes_per_second,
        "retrieved_bytes_per_second": point.retrieved_bytes_per_second,
        "hit_rate": point.hit_rate,
        "p50_seconds": point.p50_seconds,
        "p99_seconds": point.p99_seconds,
    })
}

pub(super) async fn history(State(admin): Shared) -> Json<Value> {
    let points: Vec<Value> = admin.history.points.lock().iter().map(point_json).collect();
    Json(json!({"interval_seconds": INTERVAL.as_secs(), "points": points}))
}

pub(super) async fn stats(State(admin): Shared) -> Json<Value> {
    let engine = admin.service.engine().status();
    let activity = admin.service.activity();
    let (sessions, _) = admin.service.sessions();
    let requests: serde_json::Map<String, Value> = activity
        .requests
        .iter()
        .map(|(operation, snapshot)| {
            let document = json!({
                "count": snapshot.count(),
                "p50_seconds": snapshot.quantile(0.5),
                "p99_seconds": snapshot.quantile(0.99),
            });
            (operation.name().to_owned(), document)
        })
        .collect();
    let snapshot = admin.supervisor.snapshot();
    let plugins: Vec<_> = snapshot.iter().map(plugin_json).collect();
    let last = admin.history.points.lock().back().map(point_json);
    Json(json!({
        "unix_ms": unix_ms(),
        "version": env!("CARGO_PKG_VERSION"),
        "instance_id": admin.config.pointer("/mp_config/instance_id"),
        "complaint": admin.watchdog.complaint(),
        "notes": notes(&snapshot),
        "pool": {
            "used_bytes": engine.used_bytes,
            "capacity_bytes": engine.capacity_bytes,
            "staging_bytes": engine.staging_bytes,
            "evictable_bytes": engine.evictable_bytes,
            "touched_bytes": engine.touched_bytes,
            "objects": engine.readable_objects,
            "evicted_objects": engine.evicted_objects,
            "demand_evicted_objects": engine.demand_evicted_objects,
            "allocation_failures": engine.allocation_failures,
            "eviction_policy": admin.service.engine().config().policy.to_string(),
            "trigger_watermark": admin.service.engine().config().trigger_watermark,
        },
        "lookups": {
            "requested_tokens": activity.requested_tokens,
            "hit_tokens": activity.hit_tokens,
            "hit_rate": ratio(activity.hit_tokens, activity.requested_tokens),
        },
        "stored_bytes": activity.stored_bytes,
        "retrieved_bytes": activity.retrieved_bytes,
        "errors": activity.errors,
        "requests": requests,
        "sessions": sessions,
        "workers": admin.service.worker_count(),
        "connections": admin.transport.connections_open(),
        "tenants": engine.tenants.iter().map(|it| tenant_json(&admin, it)).collect::<Vec<_>>(),
        "plugins": plugins,
        "now": last,
    }))
}

pub(super) async fn whoami(Extension(caller): Extension<Caller>) -> Json<Value> {
    let (role, tenant) = match &caller.role {
        Role::Operator => ("operator", None),
        Role::ReadOnly => ("read-only", None),
        Role::Tenant(tenant) => ("tenant", Some(&**tenant)),
    };
    Json(json!({"name": &*caller.name, "role": role, "tenant": tenant}))
}
