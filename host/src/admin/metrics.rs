//! `/metrics`: the counters of the request path, and gauges read at the scrape.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use prometheus_client::{
    encoding::{
        EncodeLabelSet,
        text::{encode_eof, encode_registry},
    },
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
    },
    registry::{Registry, Unit},
};
use stockade_cache::EngineStatus;
use stockade_transport::DisconnectReason;

use super::Admin;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginLabels {
    plugin: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginStateLabels {
    plugin: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginLimitLabels {
    plugin: String,
    limit: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginHandlerLabels {
    plugin: String,
    handler: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginReasonLabels {
    plugin: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginNameLabels {
    plugin: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginInfoLabels {
    plugin: String,
    sha256: String,
    origin: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabels {
    tenant: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeniedLabels {
    tenant: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoopLabels {
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SaltLabels {
    cache_salt: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct L1Labels {
    backend: &'static str,
    l1_tag: &'static str,
}

/// The labels that LMCache puts on its only pool.
const POOL: L1Labels = L1Labels {
    backend: "dram",
    l1_tag: "_default",
};
/// Tenants get a series of their own up to this many, those with the most bytes first.
const MAX_SALTS: usize = 256;

type FloatGauge = Gauge<f64, AtomicU64>;
type FloatCounter = Counter<f64, AtomicU64>;

/// The OpenMetrics text. LMCache's names carry LMCache's meaning.
pub(super) fn render(admin: &Admin) -> Result<String, fmt::Error> {
    let mut text = String::new();
    if let Some(tier) = admin.service.tier() {
        tier.refresh_metrics();
    }
    encode_registry(&mut text, &admin.registry.lock())?;
    let mut now = Registry::default();
    let engine = admin.service.engine().status();
    let lmcache = now.sub_registry_with_prefix("lmcache_mp");
    read_engine(&engine, lmcache);
    read_service(admin, &engine, lmcache);
    let own = now.sub_registry_with_prefix("stockade");
    read_engine_details(&engine, own);
    read_tenants(&engine, own);
    read_denials(admin, own);
    read_meter(admin, own);
    read_transport(admin, own);
    read_plugins(admin, own);
    read_plugin_calls(admin, own);
    read_server(admin, own);
    read_salts(&engine, own);
    encode_registry(&mut text, &now)?;
    encode_eof(&mut text)?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstCounter::new(value));
}

fn read_engine(status: &EngineStatus, registry: &mut Registry) {
    let ratio = Family::<L1Labels, FloatGauge>::default();
    ratio.get_or_create(&POOL).set(status.usage_ratio);
    registry.register(
        "l1_usage_ratio",
        "Share of the pool in use, reservations included",
        ratio,
    );
    for (name, help, bytes) in [
        (
            "l1_memory_usage_bytes",
            "Bytes of the pool in use",
            status.used_bytes,
        ),
        (
            "l1_staging_bytes",
            "Bytes reserved and not committed",
            status.staging_bytes,
        ),
    ] {
        let family = Family::<L1Labels, Gauge>::default();
        family.get_or_create(&POOL).set(signed(bytes));
        registry.register(name, help, family);
    }
    counter(
        registry,
        "l1_evicted_chunks",
        "Chunks evicted",
        status.evicted_objects,
    );
    counter(
        registry,
        "event_bus_dropped_events",
        "Stored and removed chunks that KV-event subscribers were not told of",
        status.dropped_notices,
    );
}

fn read_service(admin: &Admin, engine: &EngineStatus, registry: &mut Registry) {
    let (_, unasked) = admin.service.sessions();
    gauge(
        registry,
        "active_prefetch_jobs",
        "Lookups whose result nobody has asked for yet",
        unasked as u64,
    );
    gauge(
        registry,
        "kv_events_log_depth",
        "Records kept for KV-event subscribers",
        admin.service.kv_event_log_depth() as u64,
    );
    counter(
        registry,
        "timeouts",
        "Leases that ran out before their owner ended them",
        engine.expired_write_leases + engine.expired_read_leases,
    );
    counter(
        registry,
        "l1_eviction_loop_ticks",
        "Looks at the watermark",
        admin.service.maintenance_rounds(),
    );
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The server itself: its loops, its log, and who was turned away.
fn read_server(admin: &Admin, registry: &mut Registry) {
    let health = Family::<LoopLabels, Gauge>::default();
    for state in admin.watchdog.loops() {
        let labels = LoopLabels {
            name: state.name.to_string(),
        };
        health
            .get_or_create(&labels)
            .set(i64::from(state.stalled_for.is_none()));
    }
    registry.register("loop_healthy", "1 for a loop that goes round", health);
    counter(
        registry,
        "log_lines_dropped",
        "Log lines that stderr did not take in time",
        admin.log.lost_lines(),
    );
    if let Some(spans) = admin.service.traces().counts() {
        counter(
            registry,
            "trace_spans_exported",
            "Spans that the OTLP receiver took",
            spans.exported.load(Ordering::Relaxed),
        );
        let dropped = Family::<ReasonLabels, Counter>::default();
        for (reason, count) in [
            ("queue_full", &spans.queue_full),
            ("export_failed", &spans.export_failed),
        ] {
            dropped
                .get_or_create(&ReasonLabels { reason })
                .inc_by(count.load(Ordering::Relaxed));
        }
        registry.register(
            "trace_spans_dropped",
            "Spans that were lost, by reason",
            dropped,
        );
    }
    if let Some((_, counts)) = admin.service.coordinator().coordinator() {
        let registered = Gauge::<i64>::default();
        registered.set(counts.is_registered.load(Ordering::Relaxed).into());
        registry.register(
            "coordinator_registered",
            "1 while the fleet's coordinator knows this server",
            registered,
        );
        counter(
            registry,
            "coordinator_event_keys_sent",
            "Keys in events that the coordinator took",
            counts.sent.load(Ordering::Relaxed),
        );
        counter(
            registry,
            "coordinator_event_keys_lost",
            "Keys in events that the coordinator will not see",
            counts.lost.load(Ordering::Relaxed),
        );
    }
    let denied = Family::<ReasonLabels, Counter>::default();
    for (reason, count) in [
        ("unauthenticated", &admin.denied.unauthenticated),
        ("forbidden", &admin.denied.forbidden),
        ("cross_origin", &admin.denied.cross_origin),
    ] {
        denied
            .get_or_create(&ReasonLabels { reason })
            .inc_by(count.load(Ordering::Relaxed));
    }
    registry.register(
        "http_denied",
        "HTTP requests turned away, by reason",
        denied,
    );
    gauge(
        registry,
        "workers",
        "Registered workers",
        admin.service.worker_count() as u64,
    );
    let (sessions, _) = admin.service.sessions();
    gauge(
        registry,
        "sessions",
        "Request sessions that have not ended",
        sessions as u64,
    );
}

fn read_salts(status: &EngineStatus, registry: &mut Registry) {
    let bytes = Family::<SaltLabels, Gauge>::default();
    let objects = Family::<SaltLabels, Gauge>::default();
    for usage in status.salts.iter().take(MAX_SALTS) {
        let labels = SaltLabels {
            cache_salt: usage.cache_salt.as_str().to_owned(),
        };
        bytes.get_or_create(&labels).set(signed(usage.bytes));
        objects.get_or_create(&labels).set(signed(usage.objects));
    }
    registry.register_with_unit(
        "salt_used",
        "Bytes of the pool that a cache salt uses",
        Unit::Bytes,
        bytes,
    );
    registry.register("salt_objects", "Objects of a cache salt", objects);
}

fn read_engine_details(status: &EngineStatus, registry: &mut Registry) {
    gauge(
        registry,
        "pool_capacity_bytes",
        "Size of the pool",
        status.capacity_bytes,
    );
    gauge(
        registry,
        "pool_touched_bytes",
        "Bytes of the pool whose pages the kernel has given",
        status.touched_bytes,
    );
    gauge(
        registry,
        "objects_readable",
        "Objects that lookups find",
        status.readable_objects as u64,
    );
    gauge(
        registry,
        "objects_reserved",
        "Objects reserved and not committed",
        status.reserved_objects as u64,
    );
    gauge(
        registry,
        "object_locks",
        "Read locks on objects",
        status.object_locks,
    );
    gauge(
        registry,
        "owned_locks",
        "Read locks that leases own; equals object_locks",
        status.owned_locks,
    );
    counter(
        registry,
        "demand_evicted_objects",
        "Objects evicted because a reservation needed room",
        status.demand_evicted_objects,
    );
    counter(
        registry,
        "ranked_evicted_objects",
        "Objects evicted at the watermark in a plugin's order",
        status.ranked_evicted_objects,
    );
    counter(
        registry,
        "corrupt_objects",
        "Objects withdrawn because their bytes were not what was stored",
        status.corrupt_objects,
    );
    counter(
        registry,
        "expired_write_leases",
        "Reservations that were not committed in time",
        status.expired_write_leases,
    );
    counter(
        registry,
        "expired_read_leases",
        "Read leases that were not ended in time",
        status.expired_read_leases,
    );
}

/// There are at most as many tenants as the engine tracks, so their labels are bounded.
fn read_tenants(status: &EngineStatus, registry: &mut Registry) {
    let used = Family::<TenantLabels, Gauge>::default();
    let share = Family::<TenantLabels, Gauge>::default();
    let floor = Family::<TenantLabels, Gauge>::default();
    let cap = Family::<TenantLabels, Gauge>::default();
    let evicted = Family::<TenantLabels, Counter>::default();
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    for usage in &status.tenants {
        let labels = TenantLabels {
            tenant: usage.tenant.name.to_string(),
        };
        used.get_or_create(&labels).set(signed(usage.used_bytes));
        share.get_or_create(&labels).set(signed(usage.share_bytes));
        floor
            .get_or_create(&labels)
            .set(signed(usage.tenant.budget.floor_bytes));
        if let Some(bytes) = usage.tenant.budget.cap_bytes {
            cap.get_or_create(&labels).set(signed(bytes));
        }
        evicted.get_or_create(&labels).inc_by(usage.evicted_bytes);
    }
    let bytes = Unit::Bytes;
    let help = "Bytes of the pool a tenant uses, reservations included";
    registry.register_with_unit("tenant_used", help, bytes, used);
    let help = "Bytes a tenant would have if all wanted everything";
    registry.register_with_unit("tenant_share", help, Unit::Bytes, share);
    let help = "Bytes no other tenant can push a tenant below";
    registry.register_with_unit("tenant_floor", help, Unit::Bytes, floor);
    let help = "Bytes a tenant never goes beyond; absent without a cap";
    registry.register_with_unit("tenant_cap", help, Unit::Bytes, cap);
    let help = "Bytes of a tenant's objects evicted so far";
    registry.register_with_unit("tenant_evicted", help, Unit::Bytes, evicted);
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TagLabels {
    tenant: String,
    tag: String,
    value: String,
}

/// What tenants used since the start.
fn read_meter(admin: &Admin, registry: &mut Registry) {
    let byte_seconds = Family::<TenantLabels, FloatCounter>::default();
    let requested = Family::<TenantLabels, Counter>::default();
    let served = Family::<TenantLabels, Counter>::default();
    let cpu = Family::<TenantLabels, FloatCounter>::default();
    let tags = Family::<TagLabels, Counter>::default();
    for (name, reading) in admin.service.tenancy().meter().read() {
        let labels = TenantLabels {
            tenant: name.to_string(),
        };
        byte_seconds
            .get_or_create(&labels)
            .inc_by(reading.l1_byte_seconds);
        requested
            .get_or_create(&labels)
            .inc_by(reading.tokens_requested);
        served.get_or_create(&labels).inc_by(reading.tokens_served);
        cpu.get_or_create(&labels)
            .inc_by(reading.plugin_cpu_seconds);
        for ((tag, value), tokens) in reading.tags {
            let labels = TagLabels {
                tenant: name.to_string(),
                tag: tag.to_string(),
                value: value.to_string(),
            };
            tags.get_or_create(&labels).inc_by(tokens);
        }
    }
    let help = "Bytes of the pool times the seconds that a tenant held them";
    registry.register("tenant_l1_byte_seconds", help, byte_seconds);
    let help = "Tokens in whole chunks that a tenant looked up";
    registry.register("tenant_requested_tokens", help, requested);
    let help = "Tokens whose KV a tenant got from the cache";
    registry.register("tenant_served_tokens", help, served);
    let help = "CPU time of a tenant's plugins";
    registry.register_with_unit("tenant_plugin_cpu", help, Unit::Seconds, cpu);
    let help = "Tokens that a tenant looked up with a metered tag";
    registry.register("tenant_tagged_tokens", help, tags);
}

/// What connections named and did not get. Tenants that requests name cannot make labels.
fn read_denials(admin: &Admin, registry: &mut Registry) {
    let denied = Family::<DeniedLabels, Counter>::default();
    for count in admin.service.tenancy().audit().counts() {
        let labels = DeniedLabels {
            tenant: count.tenant().to_owned(),
            reason: count.reason.name(),
        };
        denied.get_or_create(&labels).inc_by(count.count);
    }
    let waits = Family::<TenantLabels, Counter>::default();
    let refusals = Family::<TenantLabels, Counter>::default();
    for usage in admin.service.tenancy().share_use() {
        let labels = TenantLabels {
            tenant: usage.tenant().to_owned(),
        };
        waits.get_or_create(&labels).inc_by(usage.waits);
        refusals.get_or_create(&labels).inc_by(usage.refusals);
    }
    registry.register(
        "tenant_turn_waits",
        "Turns of a tenant's connections that waited for others or for its rate",
        waits,
    );
    registry.register(
        "tenant_rate_refusals",
        "Requests that waited for their tenant's rate and were refused",
        refusals,
    );
    registry.register(
        "tenant_denied",
        "Requests that did not get what they named, by tenant and reason",
        denied,
    );
    let written = admin.service.tenancy().audit().lines();
    let lines = Family::<OutcomeLabels, Counter>::default();
    for (outcome, count) in [
        ("written", written.written),
        ("dropped", written.dropped),
        ("failed", written.failed),
    ] {
        let lines = lines.get_or_create(&OutcomeLabels { outcome });
        lines.inc_by(count);
    }
    registry.register(
        "audit_log_lines",
        "Lines for the audit log: written, dropped because the disk was too slow, or failed to be written",
        lines,
    );
}

fn read_transport(admin: &Admin, registry: &mut Registry) {
    let stats = &admin.transport;
    gauge(
        registry,
        "connections_open",
        "Open connections",
        stats.connections_open(),
    );
    counter(
        registry,
        "connections_accepted",
        "Connections accepted",
        stats.connections_accepted(),
    );
    counter(
        registry,
        "connections_refused",
        "Connections over --max-connections",
        stats.connections_refused(),
    );
    counter(
        registry,
        "accept_errors",
        "Connections that the system could not give us",
        stats.accept_errors(),
    );
    counter(
        registry,
        "messages_in",
        "Messages received",
        stats.messages_in(),
    );
    counter(
        registry,
        "messages_out",
        "Messages sent",
        stats.messages_out(),
    );
    counter(
        registry,
        "received_bytes",
        "Bytes received",
        stats.bytes_in(),
    );
    counter(registry, "sent_bytes", "Bytes sent", stats.bytes_out());
    counter(
        registry,
        "messages_too_large",
        "Messages over a limit",
        stats.messages_too_large(),
    );
    counter(
        registry,
        "handshake_failures",
        "Connections that did not speak ZMTP",
        stats.handshake_failures(),
    );
    counter(
        registry,
        "slow_readers_dropped",
        "Connections closed because they did not read",
        stats.slow_readers_dropped(),
    );
    let disconnects = Family::<ReasonLabels, Counter>::default();
    for reason in DisconnectReason::NAMES {
        disconnects
            .get_or_create(&ReasonLabels { reason })
            .inc_by(stats.disconnects(reason));
    }
    registry.register(
        "disconnects",
        "Connections closed so far, by reason",
        disconnects,
    );
}

fn read_plugins(admin: &Admin, registry: &mut Registry) {
    let states = Family::<PluginStateLabels, Gauge>::default();
    let restarts = Family::<PluginLabels, Counter>::default();
    let lines = Family::<PluginLabels, Counter>::default();
    let dropped = Family::<PluginLabels, Counter>::default();
    let memory = Family::<PluginLabels, Gauge>::default();
    let cpu = Family::<PluginLabels, FloatCounter>::default();
    let info = Family::<PluginInfoLabels, Gauge>::default();
    let declared = Family::<PluginLimitLabels, Gauge>::default();
    let used = Family::<PluginLimitLabels, Gauge>::default();
    let hits = Family::<PluginLimitLabels, Counter>::default();
    for status in admin.supervisor.snapshot() {
        let labels = PluginLabels {
            plugin: status.name.to_string(),
            kind: status.kind.name(),
        };
        states
            .get_or_create(&PluginStateLabels {
                plugin: status.name.to_string(),
                state: status.state.name(),
            })
            .set(1);
        // Empty where the file could not be read.
        let sha256 = status.sha256.map_or_else(String::new, |it| it.to_string());
        let origin = status.origin;
        info.get_or_create(&PluginInfoLabels {
            plugin: status.name.to_string(),
            sha256,
            origin: origin.map_or_else(|| "refused".to_owned(), |origin| origin.to_string()),
        })
        .set(1);
        for limit in &status.limits {
            let labels = PluginLimitLabels {
                plugin: status.name.to_string(),
                limit: limit.limit.name(),
            };
            declared.get_or_create(&labels).set(signed(limit.declared));
            hits.get_or_create(&labels).inc_by(limit.hits);
            used.get_or_create(&labels).set(signed(limit.used));
        }
        restarts.get_or_create(&labels).inc_by(status.restarts);
        lines.get_or_create(&labels).inc_by(status.logs.lines);
        dropped
            .get_or_create(&labels)
            .inc_by(status.logs.dropped_lines);
        if let Some(bytes) = status.memory_bytes {
            memory.get_or_create(&labels).set(signed(bytes));
        }
        if let Some(time) = status.cpu_time {
            cpu.get_or_create(&labels).inc_by(time.as_secs_f64());
        }
    }
    registry.register("plugin_state", "1 for the state a plugin is in", states);
    registry.register(
        "plugin_restarts",
        "Restarts of a plugin since the server's start",
        restarts,
    );
    registry.register(
        "plugin_info",
        "1, with the digest of the bytes that run and where they come from",
        info,
    );
    registry.register(
        "plugin_limit",
        "What a plugin may use; the unit is the end of the limit's name",
        declared,
    );
    registry.register(
        "plugin_limit_used",
        "What a plugin uses of what it may",
        used,
    );
    registry.register(
        "plugin_limit_hits",
        "How often a limit has held a plugin since the server's start",
        hits,
    );
    registry.register("plugin_log_lines", "Lines a plugin has logged", lines);
    registry.register(
        "plugin_log_lines_dropped",
        "Lines of a plugin that came too fast",
        dropped,
    );
    registry.register_with_unit(
        "plugin_memory",
        "Linear memory of a sandboxed plugin",
        Unit::Bytes,
        memory,
    );
    registry.register_with_unit(
        "plugin_cpu",
        "CPU time of a sandboxed plugin's current run",
        Unit::Seconds,
        cpu,
    );
}

/// What plugins asked of the server, and the server of them. Their own metrics have as many names
/// as their limits allow.
fn read_plugin_calls(admin: &Admin, registry: &mut Registry) {
    let asked = Family::<PluginReasonLabels, Counter>::default();
    let handled = Family::<PluginHandlerLabels, Counter>::default();
    let lost = Family::<PluginReasonLabels, Counter>::default();
    let ranked = Family::<PluginReasonLabels, Counter>::default();
    let paused = Family::<PluginReasonLabels, Gauge>::default();
    let counters = Family::<PluginNameLabels, FloatCounter>::default();
    let gauges = Family::<PluginNameLabels, FloatGauge>::default();
    for status in admin.supervisor.snapshot() {
        let counts = status.counts;
        let labels = |reason| PluginReasonLabels {
            plugin: status.name.to_string(),
            reason,
        };
        let refused: u64 = counts.refused.iter().map(|(_, count)| count).sum();
        asked
            .get_or_create(&labels("ok"))
            .inc_by(counts.host_calls.saturating_sub(refused));
        for (code, count) in counts.refused {
            asked.get_or_create(&labels(code.name())).inc_by(count);
        }
        for it in counts.handlers {
            let labels = PluginHandlerLabels {
                plugin: status.name.to_string(),
                handler: it.handler.kind(),
                outcome: it.outcome.name(),
            };
            handled.get_or_create(&labels).inc_by(it.count);
        }
        lost.get_or_create(&labels("behind"))
            .inc_by(counts.events_lost);
        if status.rank {
            let ranking = admin.ranker.status(&status.name);
            ranked.get_or_create(&labels("ok")).inc_by(counts.ranked);
            ranked
                .get_or_create(&labels("paused"))
                .inc_by(ranking.skipped);
            for (failure, count) in counts.rank_failures {
                ranked.get_or_create(&labels(failure.name())).inc_by(count);
            }
            paused
                .get_or_create(&labels("failures"))
                .set(ranking.is_paused.into());
        }
        for metric in counts.custom {
            let labels = PluginNameLabels {
                plugin: status.name.to_string(),
                name: metric.name,
            };
            if metric.is_counter {
                counters.get_or_create(&labels).inc_by(metric.value);
            } else {
                gauges.get_or_create(&labels).set(metric.value);
            }
        }
    }
    registry.register(
        "plugin_host_calls",
        "Calls of a plugin to the server, by what came of them",
        asked,
    );
    registry.register(
        "plugin_handler_calls",
        "Messages that a plugin was brought, by what came of them",
        handled,
    );
    registry.register(
        "plugin_events_lost",
        "Cache events that a plugin was too slow for",
        lost,
    );
    registry.register(
        "plugin_rankings",
        "Rounds of eviction for which a plugin was to give the order: ok, or why the native one was taken",
        ranked,
    );
    registry.register(
        "plugin_ranking_paused",
        "1 while a plugin that failed too often is not asked for an order",
        paused,
    );
    registry.register(
        "plugin_custom",
        "Counters that a plugin makes itself",
        counters,
    );
    registry.register(
        "plugin_custom_gauge",
        "Gauges that a plugin makes itself",
        gauges,
    );
}
