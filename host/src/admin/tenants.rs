//! Tenants: LMCache's `/quota` and our `/v1/tenants`. LMCache counts GiB and calls them GB.

use std::{num::NonZeroU32, sync::Arc};

use axum::{
    Extension, Json,
    extract::{Path, State},
    http::StatusCode,
};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};
use stockade_cache::{Budget, CacheSalt, TenantUsage};

use super::{
    Admin, Shared,
    access::{Caller, Role},
    problem::Problem,
    take,
};
use crate::{
    budgets::{self, SetError},
    service::{PurgeError, seal},
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
    budgets::tenant_of(admin.service.engine(), salt)
}

/// Does what may wait for a disk, and says what went wrong.
async fn off_the_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SetError> + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Problem::internal("quota-failed", error.to_string()))?;
    done.map_err(|error| match error {
        SetError::Budget(error) => Problem::bad_request("bad-limit", error.to_string()),
        SetError::State(cause) => {
            tracing::error!("a budget could not be kept: {cause}");
            Problem::internal(
                "state-not-written",
                "the budget is as before, because it could not be kept: the server's log says why",
            )
        }
    })
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
    let (state, of) = (Arc::clone(&admin), salt.clone());
    let cap_bytes = Some((limit_gb * GIB) as u64);
    off_the_runtime(move || {
        let engine = state.service.engine();
        let set = |budget: &mut Budget| budget.cap_bytes = cap_bytes;
        state.budgets.change(engine, &of, set)
    })
    .await?;
    tracing::info!(
        "{} set the limit of {:?} to {limit_gb} GiB",
        caller.name,
        salt.as_str()
    );
    Ok(Json(json!({
        "cache_salt": shown(&salt),
        "limit_gb": limit_gb,
        "status": "ok",
        "survives_restart": admin.budgets.survives_restart(),
    })))
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
    let (state, of) = (Arc::clone(&admin), salt.clone());
    let removed =
        off_the_runtime(move || state.budgets.remove_cap(state.service.engine(), &of)).await?;
    tracing::info!("{} removed the limit of {:?}", caller.name, salt.as_str());
    let status = if removed { "removed" } else { "not_found" };
    Ok(Json(json!({
        "cache_salt": shown(&salt),
        "status": status,
        "survives_restart": admin.budgets.survives_restart(),
    })))
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

pub(super) fn tenant_json(admin: &Admin, usage: &TenantUsage) -> Value {
    let budget = &usage.tenant.budget;
    json!({
        "name": &*usage.tenant.name,
        "cache_salts": usage.tenant.salts.iter().map(shown).collect::<Vec<_>>(),
        "floor_bytes": budget.floor_bytes,
        "weight": budget.weight,
        "cap_bytes": budget.cap_bytes,
        "set_over_http": admin.budgets.is_set_over_http(&usage.tenant.name),
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
        .map(|usage| tenant_json(&admin, usage))
        .collect();
    Json(json!({
        "tenants": tenants,
        "survives_restart": admin.budgets.survives_restart(),
    }))
}

pub(super) async fn show(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    caller.may_see_tenant(&name)?;
    named(&admin, &name).map(|usage| Json(tenant_json(&admin, &usage)))
}

fn named(admin: &Admin, name: &str) -> Result<TenantUsage, Problem> {
    let mut all = admin.service.engine().budgets().into_iter();
    all.find(|usage| *usage.tenant.name == *name)
        .ok_or_else(|| {
            Problem::not_found(
                "tenant-not-found",
                format!("there is no tenant {name:?}: GET /v1/tenants lists those that are"),
            )
        })
}

/// Body of `PUT /v1/tenants/{name}`; what it leaves out stays as it is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BudgetRequest {
    floor_bytes: Option<u64>,
    weight: Option<NonZeroU32>,
    #[serde(default, deserialize_with = "given")]
    cap_bytes: Option<Option<u64>>,
}

/// Tells `null` from what was left out.
fn given<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(value).map(Some)
}

pub(super) async fn put(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    take::Json(request): take::Json<BudgetRequest>,
) -> Result<Json<Value>, Problem> {
    let tenant = named(&admin, &name)?.tenant;
    let Some(salt) = tenant.salts.into_iter().next() else {
        return Err(Problem::bad_request(
            "bad-limit",
            format!(
                "{name:?} has all salts that are nobody else's, and what those may use the file says: give a salt a budget of its own with PUT /quota/{{cache_salt}}"
            ),
        ));
    };
    let state = Arc::clone(&admin);
    let budget = off_the_runtime(move || {
        state
            .budgets
            .change(state.service.engine(), &salt, |budget| {
                budget.floor_bytes = request.floor_bytes.unwrap_or(budget.floor_bytes);
                budget.weight = request.weight.unwrap_or(budget.weight);
                budget.cap_bytes = request.cap_bytes.unwrap_or(budget.cap_bytes);
            })
    })
    .await?;
    tracing::info!("{} set the budget of tenant {name:?}", caller.name);
    Ok(Json(json!({
        "name": name,
        "floor_bytes": budget.floor_bytes,
        "weight": budget.weight,
        "cap_bytes": budget.cap_bytes,
        "survives_restart": admin.budgets.survives_restart(),
    })))
}

/// Reads the tenants of the file again; all of them are put in force, or none.
pub(super) async fn reload(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, Problem> {
    tracing::info!("{} asked for the tenants to be read again", caller.name);
    let shared = Arc::clone(&admin);
    let count = tokio::task::spawn_blocking(move || shared.tenant_file.reload(&shared.budgets))
        .await
        .map_err(|error| Problem::internal("reload-failed", error.to_string()))?
        .map_err(|error| Problem::new(StatusCode::CONFLICT, "bad-tenants", error))?;
    Ok(Json(json!({"status": "ok", "tenants": count})))
}

/// Removes everything of a tenant; the receipt says what that was.
pub(super) async fn purge(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    tracing::info!("{} asked for tenant {name:?} to be purged", caller.name);
    let service = Arc::clone(&admin.service);
    let receipt = tokio::task::spawn_blocking(move || {
        let leaving = service.leaving(&name)?;
        let receipt = seal(service.purge(&leaving)?);
        service.tenancy().forget(leaving.name());
        let audit = service.tenancy().audit();
        audit.purged(leaving.name(), receipt["seal_blake3"].as_str());
        Ok(receipt)
    })
    .await
    .map_err(|error| Problem::internal("purge-failed", error.to_string()))?;
    receipt.map(Json).map_err(|error: PurgeError| match error {
        PurgeError::Unknown(_) => Problem::not_found("tenant-not-found", error.to_string()),
        PurgeError::Scrub(_) => Problem::internal("purge-failed", error.to_string()),
    })
}
