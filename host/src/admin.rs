//! The HTTP API: LMCache's routes for what is served here, and our own under `/v1`.

mod access;
mod api;
mod cache;
mod health;
mod history;
mod listen;
mod metrics;
mod objects;
mod plugin_view;
mod plugins;
mod problem;
mod take;
mod tenants;
mod ui;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    middleware,
    response::{IntoResponse, Response},
};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use stockade_sandbox::Supervisor;
use stockade_transport::Stats;
use tokio::sync::watch;

use self::{
    access::Access,
    api::{Api, Describe, Method},
    problem::Problem,
};
use crate::{
    budgets::TenantBudgets,
    plugin_host::{PluginRanker, PluginServer},
    service::Service,
    telemetry::Log,
    tenancy::TenantFile,
    watchdog::Watchdog,
};

pub use access::Tokens;
pub(crate) use history::{INTERVAL as HISTORY_INTERVAL, sample};
pub use listen::TlsFiles;
pub(crate) use listen::{Socket, Tls, bind_socket, serve};

/// Largest request body in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;
/// Of those that name many objects or tokens: what ten thousand keys or a million tokens take.
const MAX_LARGE_BODY_BYTES: usize = 16 << 20;

/// What the handlers read.
pub struct Admin {
    /// The request path.
    pub service: Arc<Service>,
    /// What tenants may use, and what of that HTTP set.
    pub budgets: TenantBudgets,
    /// Where tenants come from.
    pub tenant_file: TenantFile,
    /// The plugins.
    pub supervisor: Arc<Supervisor>,
    /// Those of them that rank candidates for eviction.
    pub ranker: Arc<PluginRanker>,
    /// The cache as they see it.
    pub plugin_host: Arc<PluginServer>,
    /// Counters of the transport.
    pub transport: Arc<Stats>,
    /// Metrics that are counted, rather than read at the scrape.
    pub registry: Mutex<Registry>,
    /// The configuration as shown, without secrets.
    pub config: Value,
    /// Which loops go round.
    pub watchdog: Watchdog,
    /// The log's level and losses.
    pub log: Log,
    /// Who may call; `None` lets everybody whom the listener lets in do everything.
    pub tokens: Option<Arc<Tokens>>,
    /// The operator said that anybody may call from anywhere.
    pub insecure: bool,
    /// Turns true when the server stops.
    pub stopped: watch::Receiver<bool>,
    denied: access::Denied,
    probe: health::LastProbe,
    history: history::History,
    openapi: Mutex<Value>,
}

/// What [`Admin`] is made of.
pub struct AdminParts {
    /// The request path.
    pub service: Arc<Service>,
    /// What tenants may use, and what of that HTTP set.
    pub budgets: TenantBudgets,
    /// Where tenants come from.
    pub tenant_file: TenantFile,
    /// The plugins.
    pub supervisor: Arc<Supervisor>,
    /// Those of them that rank candidates for eviction.
    pub ranker: Arc<PluginRanker>,
    /// The cache as they see it.
    pub plugin_host: Arc<PluginServer>,
    /// Counters of the transport.
    pub transport: Arc<Stats>,
    /// Metrics that are counted, rather than read at the scrape.
    pub registry: Registry,
    /// The configuration as shown, without secrets.
    pub config: Value,
    /// Which loops go round.
    pub watchdog: Watchdog,
    /// The log's level and losses.
    pub log: Log,
    /// Who may call.
    pub tokens: Option<Arc<Tokens>>,
    /// The operator said that anybody may call from anywhere.
    pub insecure: bool,
    /// Turns true when the server stops.
    pub stopped: watch::Receiver<bool>,
}

type Shared = State<Arc<Admin>>;

impl Admin {
    /// What the handlers of one server share.
    #[must_use]
    pub fn new(parts: AdminParts) -> Arc<Self> {
        Arc::new(Self {
            service: parts.service,
            budgets: parts.budgets,
            tenant_file: parts.tenant_file,
            supervisor: parts.supervisor,
            ranker: parts.ranker,
            plugin_host: parts.plugin_host,
            transport: parts.transport,
            registry: parts.registry.into(),
            config: parts.config,
            watchdog: parts.watchdog,
            log: parts.log,
            tokens: parts.tokens,
            insecure: parts.insecure,
            stopped: parts.stopped,
            denied: access::Denied::default(),
            probe: health::LastProbe::default(),
            history: history::History::default(),
            openapi: Mutex::default(),
        })
    }
}

/// All routes.
pub fn router(admin: &Arc<Admin>) -> Router {
    use Access::{Operate, Public, Read, Tenant};
    use Method::{Delete, Get, Post, Put};
    let text = |produces| Describe {
        produces,
        ..Describe::default()
    };
    let plain = Describe::default;
    let api = Api::new(admin)
        .add(
            (Get, "/"),
            Public,
            "Whether HTTP is up",
            plain(),
            async || Json(json!({"status": "ok", "service": "Stockade HTTP API"})),
        )
        .add(
            (Get, "/healthcheck"),
            Public,
            "LMCache's readiness probe",
            plain(),
            health::healthcheck,
        )
        .add(
            (Get, "/livez"),
            Public,
            "Whether all loops go round",
            plain(),
            health::livez,
        )
        .add(
            (Get, "/readyz"),
            Public,
            "As /livez, and not stopping",
            plain(),
            health::readyz,
        )
        .add(
            (Get, "/status"),
            Read,
            "LMCache's status document",
            plain(),
            async |State(admin): Shared| Json(admin.service.status()),
        )
        .add(
            (Get, "/config"),
            Read,
            "LMCache's configuration document, without secrets",
            plain(),
            cache::config,
        )
        .add(
            (Get, "/config/adapters"),
            Read,
            "Adapters of the second tier",
            plain(),
            async |State(admin): Shared| {
                let adapters = admin.service.tier().map(|tier| tier.adapters());
                Json(adapters.unwrap_or_else(|| json!({"adapters": []})))
            },
        )
        .add(
            (Get, "/version"),
            Public,
            "Stockade's version",
            plain(),
            async || Json(env!("CARGO_PKG_VERSION")),
        )
        .add(
            (Get, "/lmc_version"),
            Public,
            "The version of LMCache that it is compatible with",
            plain(),
            async || Json("0.5.6"),
        )
        .add(
            (Get, "/commit_id"),
            Public,
            "The commit it was built from",
            plain(),
            async || Json(option_env!("STOCKADE_COMMIT").unwrap_or("unknown")),
        )
        .add(
            (Post, "/cache/clear"),
            Operate,
            "Empties the cache; locked objects stay unless force",
            Describe {
                body: &[
                    ("tier", "string", "l1"),
                    ("force", "boolean", "also locked objects"),
                ],
                ..Describe::default()
            },
            cache::clear,
        )
        .add(
            (Get, "/cache/objects"),
            Read,
            "Objects of one adapter of the second tier, page by page",
            Describe {
                query: &[
                    ("tier", "string", "l2"),
                    (
                        "adapter",
                        "string",
                        "an adapter's type; the first one if left out",
                    ),
                    ("model_name", "string", "only this model's"),
                    ("page_size", "integer", "1 to 5000, 500 if left out"),
                    ("page_token", "string", "next_page_token of the page before"),
                ],
                problems: &[
                    (400, "bad-page-token"),
                    (404, "adapter-not-found"),
                    (503, "storage-failed"),
                ],
                ..Describe::default()
            },
            objects::list,
        )
        .add(
            (Delete, "/cache/objects"),
            Operate,
            "Deletes objects by key from memory, storage or both",
            Describe {
                body: &[
                    ("keys*", "array", "up to 10000, as GET shows them"),
                    ("tier", "string", "l1, l2 (if left out) or all"),
                    ("force", "boolean", "also what is in use in memory"),
                    (
                        "adapter",
                        "string",
                        "an adapter's type; the first one if left out",
                    ),
                ],
                problems: &[
                    (400, "bad-key"),
                    (404, "adapter-not-found"),
                    (503, "no-second-tier"),
                ],
                max_body: Some(MAX_LARGE_BODY_BYTES),
                ..Describe::default()
            },
            objects::delete,
        )
        .add(
            (Post, "/cache/prefetches"),
            Operate,
            "Starts to load what the second tier has of a prompt into memory",
            Describe {
                body: &[
                    ("model_name*", "string", "the engine's name of the model"),
                    ("world_size*", "integer", "its ranks"),
                    ("token_ids*", "array", "up to 1000000 tokens"),
                    ("cache_salt", "string", "whose objects"),
                    ("source_tier", "string", "l2"),
                    ("target_tier", "string", "l1"),
                ],
                status: 202,
                problems: &[
                    (400, "bad-prefetch"),
                    (503, "no-layout"),
                    (503, "too-many-prefetches"),
                ],
                max_body: Some(MAX_LARGE_BODY_BYTES),
                ..Describe::default()
            },
            objects::prefetch,
        )
        .add(
            (Get, "/cache/prefetches/{request_id}"),
            Read,
            "Whether a prefetch is over, and what it found; told once",
            Describe {
                problems: &[(404, "prefetch-not-found")],
                ..Describe::default()
            },
            objects::prefetched,
        )
        .add(
            (Get, "/metrics"),
            Read,
            "OpenMetrics text",
            text("application/openmetrics-text"),
            scrape,
        )
        .add(
            (Get, "/loglevel"),
            Read,
            "LMCache's log level; sets it when an operator gives level",
            Describe {
                query: &[
                    ("level", "string", "level to set"),
                    ("logger_name", "string", "ignored"),
                ],
                produces: "text/plain",
                ..Describe::default()
            },
            cache::loglevel,
        )
        .add(
            (Get, "/threads"),
            Read,
            "LMCache's thread dump, told of the loops",
            text("text/plain"),
            health::threads,
        )
        .add(
            (Get, "/periodic-threads"),
            Read,
            "LMCache's list of loops",
            plain(),
            health::periodic_threads,
        )
        .add(
            (Get, "/periodic-threads-health"),
            Read,
            "LMCache's verdict over its loops",
            plain(),
            health::periodic_threads_health,
        )
        .add(
            (Get, "/v1/health"),
            Read,
            "Every loop and whether it goes round",
            plain(),
            health::health,
        )
        .add(
            (Get, "/v1/health/probe"),
            Read,
            "Stores, looks up and retrieves a chunk of a reserved tenant",
            Describe {
                problems: &[(503, "data-path")],
                ..Describe::default()
            },
            health::probe,
        )
        .add(
            (Get, "/v1/stats"),
            Read,
            "What the server has done, in one document",
            plain(),
            history::stats,
        )
        .add(
            (Get, "/v1/history"),
            Read,
            "The last minutes, a point every two seconds",
            plain(),
            history::history,
        )
        .add(
            (Get, "/v1/whoami"),
            Tenant,
            "The caller's name and role",
            plain(),
            history::whoami,
        )
        .add(
            (Get, "/v1/log-level"),
            Read,
            "The log level",
            plain(),
            cache::get_level,
        )
        .add(
            (Put, "/v1/log-level"),
            Operate,
            "Sets the log level until the next start",
            Describe {
                body: &[("level*", "string", "error, warn, info, debug or trace")],
                problems: &[(400, "bad-level")],
                ..Describe::default()
            },
            cache::put_level,
        )
        .add(
            (Get, "/v1/plugin-view/{name}"),
            Read,
            "What a plugin of this name would be told: the configuration, and its tenant",
            plain(),
            plugin_view::environment,
        )
        .add(
            (Get, "/v1/plugin-view/{name}/stats"),
            Read,
            "The cache's statistics as a plugin of this name would see them",
            plain(),
            plugin_view::stats,
        )
        .add(
            (Get, "/v1/plugin-view/{name}/keys"),
            Read,
            "A page of the keys that a plugin of this name would see",
            Describe {
                query: &[
                    ("salt", "string", "only keys of this salt"),
                    ("model", "string", "only keys of this model"),
                    ("after", "string", "next of the page before"),
                    ("limit", "integer", "at most this many, 1 to 1000; 100 where it is left out"),
                ],
                problems: &[(400, "bad-query"), (403, "plugin-denied")],
                ..Describe::default()
            },
            plugin_view::keys,
        )
        .add(
            (Get, "/v1/plugin-view/{name}/events"),
            Read,
            "The events that a plugin of this name would hear; with follow one batch a line without end, after the cursor",
            Describe {
                query: &[
                    ("types", "string", "stored, retrieved, evicted, lookup, session_end with commas between; all where it is left out"),
                    ("cursor", "integer", "go on after this event; from now on where it is left out"),
                    ("follow", "boolean", "go on with what is to come"),
                    ("max_batch", "integer", "most events of a line, 1 to 1024; 256 where it is left out"),
                ],
                problems: &[(400, "bad-query")],
                ..Describe::default()
            },
            plugin_view::events,
        )
        .add(
            (Get, "/v1/plugins"),
            Read,
            "All plugins",
            plain(),
            plugins::list,
        )
        .add(
            (Get, "/v1/plugins/{name}"),
            Read,
            "One plugin",
            Describe {
                problems: &[(404, "plugin-not-found")],
                ..Describe::default()
            },
            plugins::show,
        )
        .add(
            (Get, "/v1/plugins/{name}/logs"),
            Read,
            "A plugin's newest lines; with follow one JSON object a line without end",
            Describe {
                query: &[
                    ("lines", "integer", "at most this many, up to 1000"),
                    (
                        "since",
                        "integer",
                        "only lines after this one; `next` of the last answer",
                    ),
                    ("follow", "boolean", "go on with lines as they come"),
                ],
                problems: &[(404, "plugin-not-found")],
                ..Describe::default()
            },
            plugins::logs,
        )
        .add(
            (Post, "/v1/plugins/{name}/{action}"),
            Operate,
            "start, stop or restart a plugin, or reload its file",
            Describe {
                status: 202,
                problems: &[(404, "plugin-not-found"), (409, "plugin-busy")],
                ..Describe::default()
            },
            plugins::steer,
        )
        .add(
            (Post, "/v1/plugins/{name}/call/{method}"),
            Operate,
            "Calls a method of a plugin with the body; answers with the plugin's own bytes",
            Describe {
                produces: "application/octet-stream",
                problems: &[
                    (404, "plugin-not-found"),
                    (403, "plugin-serves-no-calls"),
                    (409, "plugin-not-running"),
                    (413, "body-too-large"),
                    (429, "plugin-calls-waiting"),
                    (502, "plugin-call-failed"),
                    (504, "plugin-call-timeout"),
                ],
                ..Describe::default()
            },
            plugins::call,
        )
        .add(
            (Get, "/quota"),
            Read,
            "LMCache's limits and what their salts use",
            plain(),
            tenants::list_quotas,
        )
        .add(
            (Get, "/quota/{cache_salt}"),
            Tenant,
            "LMCache's limit of a salt; `_default` is the empty one",
            plain(),
            tenants::get_quota,
        )
        .add(
            (Put, "/quota/{cache_salt}"),
            Operate,
            "Limits a salt; the answer says whether that survives a restart",
            Describe {
                body: &[("limit_gb*", "number", "GiB, 0 for nothing at all")],
                problems: &[(400, "bad-limit"), (500, "state-not-written")],
                ..Describe::default()
            },
            tenants::put_quota,
        )
        .add(
            (Delete, "/quota/{cache_salt}"),
            Operate,
            "Takes a salt's limit away",
            Describe {
                problems: &[(500, "state-not-written")],
                ..Describe::default()
            },
            tenants::delete_quota,
        )
        .add(
            (Get, "/v1/tenants"),
            Tenant,
            "Tenants, what they use and may use; a tenant sees itself",
            plain(),
            tenants::list,
        )
        .add(
            (Post, "/v1/tenants/{name}/purge"),
            Operate,
            "Removes everything of a tenant and answers a receipt",
            Describe {
                problems: &[(404, "tenant-not-found"), (500, "purge-failed")],
                ..Describe::default()
            },
            tenants::purge,
        )
        .add(
            (Post, "/v1/config/reload"),
            Operate,
            "Reads the configuration file's tenants again and puts them in force",
            Describe {
                problems: &[(409, "bad-tenants")],
                ..Describe::default()
            },
            tenants::reload,
        )
        .add(
            (Get, "/v1/tenants/{name}"),
            Tenant,
            "One tenant",
            Describe {
                problems: &[(404, "tenant-not-found")],
                ..Describe::default()
            },
            tenants::show,
        )
        .add(
            (Put, "/v1/tenants/{name}"),
            Operate,
            "Changes a tenant's budget; the answer says whether that survives a restart",
            Describe {
                body: &[
                    ("floor_bytes", "integer", "no other tenant pushes it below"),
                    ("weight", "integer", "its part of what the floors leave"),
                    (
                        "cap_bytes",
                        "integer",
                        "it never goes beyond; null for no cap",
                    ),
                ],
                problems: &[
                    (400, "bad-limit"),
                    (404, "tenant-not-found"),
                    (500, "state-not-written"),
                ],
                ..Describe::default()
            },
            tenants::put,
        )
        .add(
            (Get, "/v1/openapi.json"),
            Public,
            "This document",
            plain(),
            async |State(admin): Shared| Json(admin.openapi.lock().clone()),
        )
        .add(
            (Get, "/ui"),
            Public,
            "The dashboard",
            text("text/html"),
            ui::page,
        )
        .add(
            (Get, "/ui/app.js"),
            Public,
            "The dashboard's script",
            text("text/javascript"),
            ui::script,
        )
        .add(
            (Get, "/ui/style.css"),
            Public,
            "The dashboard's style",
            text("text/css"),
            ui::style,
        );
    finish(admin, api, true)
}

/// `/metrics` and the probes alone, for a listener of their own.
pub fn metrics_router(admin: &Arc<Admin>) -> Router {
    let plain = Describe::default;
    let api = Api::new(admin)
        .add(
            (Method::Get, "/metrics"),
            Access::Read,
            "OpenMetrics text",
            plain(),
            scrape,
        )
        .add(
            (Method::Get, "/livez"),
            Access::Public,
            "Whether all loops go round",
            plain(),
            health::livez,
        )
        .add(
            (Method::Get, "/readyz"),
            Access::Public,
            "As /livez, and not stopping",
            plain(),
            health::readyz,
        );
    finish(admin, api, false)
}

fn finish(admin: &Arc<Admin>, api: Api, is_whole: bool) -> Router {
    let (router, document) = api.finish();
    if is_whole {
        *admin.openapi.lock() = document;
    }
    router
        .fallback(async || {
            Problem::not_found(
                "no-such-route",
                "this server has no such route: GET /v1/openapi.json lists those that it has",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::map_response(problem::normalise))
        .with_state(Arc::clone(admin))
}

async fn scrape(State(admin): Shared) -> Response {
    let text = tokio::task::spawn_blocking(move || metrics::render(&admin)).await;
    let problem = |error: String| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "metrics", error).into_response()
    };
    match text {
        Ok(Ok(text)) => (
            [(
                axum::http::header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Ok(Err(error)) => problem(format!("metrics could not be written: {error}")),
        Err(error) => problem(error.to_string()),
    }
}
