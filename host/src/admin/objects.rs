//! LMCache's routes about single objects and prefetches (`http_apis/cache_api.py` there), which its
//! coordinator calls.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};
use stockade_cache::{CacheSalt, ChunkHash, KeyScope, ObjectKey};

use super::{
    Admin, Shared,
    access::Caller,
    problem::Problem,
    take::{self, Query},
};
use crate::{
    service::WarmError,
    tier::{ObjectsError, Tier, WarmStatus},
};

/// Most keys that one request deletes, as in LMCache.
const MAX_KEYS: usize = 10_000;
/// Most tokens of one prefetch, as in LMCache.
const MAX_TOKENS: usize = 1_000_000;
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 1..=5000;
const DEFAULT_PAGE_SIZE: usize = 500;

/// `EncodedObjectKey`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EncodedKey {
    chunk_hash_hex: String,
    model_name: String,
    kv_rank: u32,
    #[serde(default)]
    object_group_id: u32,
    #[serde(default)]
    cache_salt: String,
}

impl EncodedKey {
    fn decode(&self) -> Result<ObjectKey, String> {
        let chunk_hash = blake3::Hash::from_hex(&self.chunk_hash_hex)
            .map_err(|_| "chunk_hash_hex: give 64 hex digits")?;
        if self.model_name.is_empty() || self.model_name.contains(['@', '\0']) {
            return Err("model_name is empty or contains '@'".to_owned());
        }
        let salt = CacheSalt::parse(&self.cache_salt);
        let scope = KeyScope {
            model_name: Arc::from(&*self.model_name),
            kv_rank: self.kv_rank,
            object_group_id: self.object_group_id,
            cache_salt: salt.map_err(|error| format!("cache_salt: {error}"))?,
        };
        Ok(ObjectKey::new(
            Arc::new(scope),
            ChunkHash(chunk_hash.into()),
        ))
    }
}

fn problem_of(error: &ObjectsError) -> Problem {
    let (status, code) = match error {
        ObjectsError::NoSuchAdapter(_) => (StatusCode::NOT_FOUND, "adapter-not-found"),
        ObjectsError::PageToken => (StatusCode::BAD_REQUEST, "bad-page-token"),
        ObjectsError::Storage { .. } => (StatusCode::SERVICE_UNAVAILABLE, "storage-failed"),
        ObjectsError::TooMany => (StatusCode::SERVICE_UNAVAILABLE, "too-many-prefetches"),
    };
    Problem::new(status, code, error.to_string())
}

fn tier_of(admin: &Admin) -> Result<&Arc<Tier>, Problem> {
    admin.service.tier().ok_or_else(|| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no-second-tier",
            "there is no second tier: start the server with --l2-adapter",
        )
    })
}

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    tier: Option<String>,
    adapter: Option<String>,
    model_name: Option<String>,
    page_size: Option<usize>,
    page_token: Option<String>,
}

pub(super) async fn list(
    State(admin): Shared,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, Problem> {
    if let Some(tier) = query.tier.filter(|tier| tier != "l2") {
        return Err(Problem::bad_request(
            "bad-tier",
            format!("tier {tier:?}: objects of \"l2\" can be listed"),
        ));
    }
    let size = query.page_size.unwrap_or(DEFAULT_PAGE_SIZE);
    if !PAGE_SIZES.contains(&size) {
        return Err(Problem::bad_request(
            "bad-page-size",
            format!("page_size {size}: give a number from 1 to 5000"),
        ));
    }
    let page = tier_of(&admin)?
        .list_page(
            query.adapter.as_deref(),
            query.model_name.as_deref(),
            size,
            query.page_token.as_deref(),
        )
        .await
        .map_err(|error| problem_of(&error))?;
    let entry = |entry: &stockade_l2::Entry| {
        json!({
            "key": {
                "chunk_hash_hex": ChunkHash(*entry.name.chunk_hash()).to_string(),
                "model_name": **entry.name.model_name(),
                "kv_rank": entry.name.kv_rank(),
                "object_group_id": entry.name.object_group_id(),
                "cache_salt": **entry.name.cache_salt(),
            },
            "size_bytes": entry.bytes,
        })
    };
    Ok(Json(json!({
        "adapter": page.adapter,
        "shared": page.shared,
        "entries": page.entries.iter().map(entry).collect::<Vec<_>>(),
        "next_page_token": page.next,
    })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteRequest {
    keys: Vec<EncodedKey>,
    tier: Option<String>,
    #[serde(default)]
    force: bool,
    adapter: Option<String>,
}

pub(super) async fn delete(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    take::Json(request): take::Json<DeleteRequest>,
) -> Result<Json<Value>, Problem> {
    let (from_memory, from_storage) = match request.tier.as_deref().unwrap_or("l2") {
        "l1" => (true, false),
        "l2" => (false, true),
        "all" => (true, true),
        other => {
            return Err(Problem::bad_request(
                "bad-tier",
                format!("tier {other:?}: give \"l1\", \"l2\" or \"all\""),
            ));
        }
    };
    if request.keys.len() > MAX_KEYS {
        return Err(Problem::bad_request(
            "too-many-keys",
            format!(
                "{} keys: one request deletes {MAX_KEYS}",
                request.keys.len()
            ),
        ));
    }
    let mut keys = Vec::with_capacity(request.keys.len());
    for (index, key) in request.keys.iter().enumerate() {
        let key = key.decode().map_err(|problem| {
            Problem::bad_request("bad-key", format!("keys[{index}].{problem}"))
        })?;
        keys.push(key);
    }
    // Before anything is gone.
    let tier = from_storage.then(|| tier_of(&admin)).transpose()?;
    tracing::info!("{} deletes {} objects", caller.name, keys.len());
    let (mut deleted, mut skipped) = (0, 0);
    if from_memory {
        let (service, keys) = (Arc::clone(&admin.service), keys.clone());
        let force = request.force;
        let work = move || service.delete_from_memory(&keys, force);
        (deleted, skipped) = tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Problem::internal("delete-failed", error.to_string()))?;
    }
    let mut error = None;
    if let Some(tier) = tier {
        match tier.delete_objects(request.adapter.as_deref(), &keys).await {
            Ok(count) => deleted += count,
            Err(failed @ ObjectsError::NoSuchAdapter(_)) => return Err(problem_of(&failed)),
            Err(failed) => error = Some(failed.to_string()),
        }
    }
    let mut answer = json!({"deleted": deleted, "skipped": skipped, "ok": error.is_none()});
    if let (Some(error), Some(fields)) = (error, answer.as_object_mut()) {
        fields.insert("error".to_owned(), error.into());
    }
    Ok(Json(answer))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PrefetchRequest {
    model_name: String,
    world_size: u32,
    token_ids: Vec<u32>,
    #[serde(default)]
    cache_salt: String,
    source_tier: Option<String>,
    target_tier: Option<String>,
}

pub(super) async fn prefetch(
    State(admin): Shared,
    Extension(caller): Extension<Caller>,
    take::Json(request): take::Json<PrefetchRequest>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let tiers = (
        request.source_tier.as_deref(),
        request.target_tier.as_deref(),
    );
    let (source, target) = (tiers.0.unwrap_or("l2"), tiers.1.unwrap_or("l1"));
    if (source, target) != ("l2", "l1") {
        return Err(Problem::bad_request(
            "bad-tier",
            format!(
                "source_tier {source:?} and target_tier {target:?}: prefetches go from \"l2\" to \"l1\""
            ),
        ));
    }
    if request.token_ids.len() > MAX_TOKENS {
        return Err(Problem::bad_request(
            "too-many-tokens",
            format!(
                "{} token_ids: a prefetch has up to {MAX_TOKENS}",
                request.token_ids.len()
            ),
        ));
    }
    let salt = CacheSalt::parse(&request.cache_salt)
        .map_err(|error| Problem::bad_request("bad-salt", format!("cache_salt: {error}")))?;
    let tier = Arc::clone(tier_of(&admin)?);
    let service = Arc::clone(&admin.service);
    let resolve = move || {
        let PrefetchRequest {
            model_name,
            world_size,
            token_ids,
            ..
        } = &request;
        service.warm_keys(model_name, *world_size, token_ids, &salt)
    };
    let warm = tokio::task::spawn_blocking(resolve)
        .await
        .map_err(|error| Problem::internal("prefetch-failed", error.to_string()))?
        .map_err(|error| match error {
            WarmError::Invalid(_) => Problem::bad_request("bad-prefetch", error.to_string()),
            WarmError::NoLayout { .. } => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "no-layout",
                error.to_string(),
            ),
        })?;
    if warm.chunks == 0 {
        let answer = json!({"chunks": 0, "status": "noop"});
        return Ok((StatusCode::ACCEPTED, Json(answer)));
    }
    let id = tier
        .warm(warm.keys, warm.object_bytes)
        .map_err(|error| problem_of(&error))?;
    tracing::info!("{} has {} chunks prefetched", caller.name, warm.chunks);
    let answer = json!({
        "request_id": format!("{id:032x}"),
        "chunks": warm.chunks,
        "status": "submitted",
    });
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

pub(super) async fn prefetched(
    State(admin): Shared,
    Path(request_id): Path<String>,
) -> Result<Json<Value>, Problem> {
    let unknown = || {
        Problem::not_found(
            "prefetch-not-found",
            "no such prefetch: its end is told once, and the newest 1024 are remembered",
        )
    };
    let id = u128::from_str_radix(&request_id, 16).map_err(|_| unknown())?;
    let status = tier_of(&admin)?.warm_status(id).ok_or_else(unknown)?;
    Ok(Json(match status {
        WarmStatus::Pending => json!({"request_id": request_id, "status": "pending"}),
        WarmStatus::Completed { found, total } => json!({
            "request_id": request_id,
            "status": "completed",
            "found_keys": found,
            "total_keys": total,
        }),
    }))
}
