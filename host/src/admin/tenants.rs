//! Tenants: LMCache's `/quota` and our `/v1/tenants`. LMCache counts GiB and calls them GB.

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use stockade_cache::{Budget, CacheSalt, TenantUsage};

use super::{
    Admin, Shared,
    access::{Caller, Role},
    problem::Problem,
    take,
};

/// LMCache's name for the empty salt in a path.
const DEFAULT_SALT: &str = "_default";
const GIB: f64 = (1u64 << 30) as f64;
/// Most GiB of a limit: what an f64 of bytes holds exactly.
const MAX_LIMIT_GB: f64 = (1u64 << 23) as f64;

fn parse_salt(path: &str) -> Result<CacheSalt, Problem> {
    let salt = if path == DEFAULT_SALT { "" } else { path };
    CacheSalt::parse(salt)
        .map_err(|error| Problem::bad_request("bad-salt", format!("cache_salt {path:?}: {error}")))
}

fn shown(salt: &CacheSalt) -> &str {
    match salt.as_str() {
        "" => DEFAULT_SALT,
        salt => salt,
    }
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / GIB
}

/// The tenant whose salt this is, unless it is everybody's.
fn tenant_of(admin: &Admin, salt: &CacheSalt) -> Option<TenantUsage> {
    let all = admin.service.engine().budgets();
    all.into_iter().find(|it| it.tenant.salts.contains(salt))
}

fn usage_of(admin: &Admin, salt: &CacheSalt) -> u64 {
    let salts = admin.service.engine().status().salts;
    salts
        .iter()
        .find(|it| it.cache_salt == *salt)
        .map_or(0, |it| it.bytes)
}

/// A tenant may look at the salts of the tenant that its token names.
fn may_see(admin: &Admin, caller: &Caller, salt: &CacheSalt) -> Result<(), Problem> {
    let Role::Tenant(_) = &caller.role else {
        return Ok(());
    };
    match tenant_of(admin, salt) {
        Some(usage) => caller.may_see_tenant(&usage.tenant.name),
        None => caller.may_see_tenant(salt.as_str()),
    }
}

/// Body of `PUT /quota/{cache_salt}`; a number or its text, as LMCache takes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QuotaRequest {
    limit_gb: Value,
}

pub(super) async fn put_quota(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(salt): Path<String>,
    take::Json(request): take::Json<QuotaRequest>,
) -> Result<Json<Value>, Problem> {
    let salt = parse_salt(&salt)?;
    let limit_gb = match &request.limit_gb {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let limit_gb = limit_gb
        .filter(|limit| (0.0..=MAX_LIMIT_GB).contains(limit))
        .ok_or_else(|| {
            Problem::bad_request(
                "bad-limit",
                format!(
                    "limit_gb {}: give a number of GiB from 0 to {MAX_LIMIT_GB}",
                    request.limit_gb
                ),
            )
        })?;
    let mut budget = tenant_of(&admin, &salt).map_or_else(Budget::default, |it| it.tenant.budget);
    budget.cap_bytes = Some((limit_gb * GIB) as u64);
    let (engine, set) = (std::sync::Arc::clone(&admin), salt.clone());
    tokio::task::spawn_blocking(move || engine.service.engine().set_budget(&set, budget))
        .await
        .map_err(|error| Problem::internal("quota-failed", error.to_string()))?
        .map_err(|error| Problem::bad_request("bad-limit", error.to_string()))?;
    tracing::info!(
        "{} set the limit of {:?} to {limit_gb} GiB",
        caller.name,
        salt.as_str()
    );
    Ok(Json(
        json!({"cache_salt": shown(&salt), "limit_gb": limit_gb, "status": "ok"}),
    ))
}

pub(super) async fn get_quota(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(salt): Path<String>,
) -> Result<Json<Value>, Problem> {
    let salt = parse_salt(&salt)?;
    may_see(&admin, &caller, &salt)?;
    let cap = tenant_of(&admin, &salt).and_then(|it| it.tenant.budget.cap_bytes);
    Ok(Json(json!({
        "cache_salt": shown(&salt),
        "limit_gb": gb(cap.unwrap_or(0)),
        "current_usage_gb": gb(usage_of(&admin, &salt)),
        "exists": cap.is_some(),
    })))
}

pub(super) async fn delete_quota(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(salt): Path<String>,
) -> Result<Json<Value>, Problem> {
    let salt = parse_salt(&salt)?;
    let (engine, removed) = (std::sync::Arc::clone(&admin), salt.clone());
    let removed = tokio::task::spawn_blocking(move || remove_cap(&engine, &removed))
        .await
        .map_err(|error| Problem::internal("quota-failed", error.to_string()))??;
    tracing::info!("{} removed the limit of {:?}", caller.name, salt.as_str());
    let status = if removed { "removed" } else { "not_found" };
    Ok(Json(json!({"cache_salt": shown(&salt), "status": status})))
}

/// Removes a cap. A tenant with a floor or a weight of its own keeps those.
fn remove_cap(admin: &Admin, salt: &CacheSalt) -> Result<bool, Problem> {
    let Some(mut budget) = tenant_of(admin, salt).map(|it| it.tenant.budget) else {
        return Ok(false);
    };
    if budget.cap_bytes.take().is_none() {
        return Ok(false);
    }
    let engine = admin.service.engine();
    if budget == Budget::default() {
        return Ok(engine.remove_budget(salt));
    }
    engine
        .set_budget(salt, budget)
        .map_err(|error| Problem::bad_request("bad-limit", error.to_string()))?;
    Ok(true)
}

pub(super) async fn list_quotas(State(admin): Shared) -> Json<Value> {
    let engine = admin.service.engine();
    let salts = engine.status().salts;
    let mut users = Map::new();
    for usage in engine.budgets() {
        let Some(cap) = usage.tenant.budget.cap_bytes else {
            continue;
        };
        for salt in &usage.tenant.salts {
            let used = salts.iter().find(|it| it.cache_salt == *salt);
            users.insert(
                shown(salt).to_owned(),
                json!({"limit_gb": gb(cap), "current_usage_gb": gb(used.map_or(0, |it| it.bytes))}),
            );
        }
    }
    Json(json!({"users": users}))
}

pub(super) fn tenant_json(usage: &TenantUsage) -> Value {
    let budget = &usage.tenant.budget;
    json!({
        "name": &*usage.tenant.name,
        "cache_salts": usage.tenant.salts.iter().map(shown).collect::<Vec<_>>(),
        "floor_bytes": budget.floor_bytes,
        "weight": budget.weight,
        "cap_bytes": budget.cap_bytes,
        "used_bytes": usage.used_bytes,
        "share_bytes": usage.share_bytes,
        "objects": usage.objects,
        "evicted_bytes": usage.evicted_bytes,
    })
}

/// All tenants; of a tenant's own token, that one.
pub(super) async fn list(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
) -> Json<Value> {
    let tenants: Vec<Value> = admin
        .service
        .engine()
        .budgets()
        .iter()
        .filter(|usage| caller.may_see_tenant(&usage.tenant.name).is_ok())
        .map(tenant_json)
        .collect();
    Json(json!({"tenants": tenants}))
}

pub(super) async fn show(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    caller.may_see_tenant(&name)?;
    let all = admin.service.engine().budgets();
    let found = all.iter().find(|usage| *usage.tenant.name == *name);
    found.map(|usage| Json(tenant_json(usage))).ok_or_else(|| {
        Problem::not_found(
            "tenant-not-found",
            format!("there is no tenant {name:?}: GET /v1/tenants lists those that are"),
        )
    })
}
