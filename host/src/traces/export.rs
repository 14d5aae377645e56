//! From the queue to an OTLP receiver, on a thread of its own.

use std::{
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter, WithExportConfig as _, WithTonicConfig as _,
    tonic_types::transport::ClientTlsConfig,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{Facts, MAX_TEXT_BYTES, Span, SpanCounts};
use crate::telemetry::CauseLimiter;

/// Spans in one message, as OpenTelemetry's own batches.
const BATCH_SPANS: usize = 512;
/// How long the first span of a batch waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// What a receiver gets to take one batch, attempts included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The exporter's thread; ends by [`finish`](Self::finish), or when nobody can hand in spans.
#[derive(Debug)]
pub struct Export {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Export {
    pub(super) fn start(
        endpoint: &str,
        instance_id: &str,
        spans: mpsc::Receiver<Span>,
        counts: Arc<SpanCounts>,
    ) -> anyhow::Result<Self> {
        // gRPC runs on threads and timers that must not be those of the data path.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the exporter of traces has no runtime")?;
        let exporter = {
            let _inside = runtime.enter();
            exporter(endpoint, instance_id).context("--otlp-endpoint cannot be used")?
        };
        let shipping = Shipping {
            exporter,
            scope: InstrumentationScope::builder("stockade")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            endpoint: endpoint.to_owned(),
            counts,
            log: CauseLimiter::default(),
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("stockade-otlp".to_owned())
            .spawn(move || runtime.block_on(shipping.run(spans, stopped)))
            .context("the exporter of traces has no thread")?;
        Ok(Self { stop, thread })
    }

    /// Exports what is queued, and gives up on it after `within`.
    pub async fn finish(self, within: Duration) {
        let Self { stop, thread } = self;
        // Nobody listens any more when the thread has ended already.
        let _ = stop.send(());
        let joined = tokio::task::spawn_blocking(move || thread.join());
        match timeout(within, joined).await {
            Ok(Ok(Ok(()))) => {}
            Ok(_) => tracing::error!("the exporter of traces failed"),
            Err(_) => tracing::warn!("the last spans were not exported in time"),
        }
    }
}

fn exporter(endpoint: &str, instance_id: &str) -> Result<SpanExporter, ExporterBuildError> {
    let mut builder = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT);
    if endpoint.starts_with("https:") {
        builder = builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
    }
    let mut exporter = builder.build()?;
    // LMCache's resource names its instance by the same flag.
    let resource = Resource::builder_empty()
        .with_service_name("stockade")
        .with_attributes([
            KeyValue::new("service.instance.id", instance_id.to_owned()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ])
        .build();
    exporter.set_resource(&resource);
    Ok(exporter)
}

struct Shipping {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    endpoint: String,
    counts: Arc<SpanCounts>,
    log: CauseLimiter,
}

impl Shipping {
    async fn run(self, mut spans: mpsc::Receiver<Span>, mut stopped: oneshot::Receiver<()>) {
        let mut batch = Vec::with_capacity(BATCH_SPANS);
        let mut is_stopping = false;
        loop {
            if !is_stopping {
                tokio::select! {
                    _ = &mut stopped => is_stopping = true,
                    () = fill(&mut spans, &mut batch) => {}
                }
            }
            if is_stopping {
                // What is handed in from now on is counted as dropped where that happens.
                spans.close();
                spans.recv_many(&mut batch, BATCH_SPANS).await;
            }
            if batch.is_empty() {
                return;
            }
            self.ship(&mut batch).await;
        }
    }

    async fn ship(&self, batch: &mut Vec<Span>) {
        let count = batch.len() as u64;
        let data = batch.drain(..).map(|span| self.data(span)).collect();
        // The exporter keeps to its own timeout; this one is for what it forgets.
        let shipped = timeout(EXPORT_TIMEOUT * 2, self.exporter.export(data)).await;
        let error = match shipped {
            Ok(Ok(())) => {
                self.counts.exported.fetch_add(count, Ordering::Relaxed);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        self.counts
            .export_failed
            .fetch_add(count, Ordering::Relaxed);
        self.log.warn("otlp", || {
            format!("{count} spans were not taken by {}: {error}", self.endpoint)
        });
    }

    fn data(&self, span: Span) -> SpanData {
        let mut attributes = Vec::with_capacity(6);
        let mut status = Status::Unset;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        if let Some(request_id) = &span.request_id {
            attributes.push(KeyValue::new("session_id", cut(request_id)));
        }
        if let Some(model) = &span.model {
            attributes.push(KeyValue::new("model_name", cut(model)));
        }
        match span.facts {
            Facts::Whole {
                requested_tokens,
                hit_tokens,
            } => {
                let rate = match requested_tokens {
                    0 => 0.0,
                    requested => hit_tokens as f64 / requested as f64,
                };
                attributes.push(KeyValue::new("requested_tokens", number(requested_tokens)));
                attributes.push(KeyValue::new("hit_tokens", number(hit_tokens)));
                attributes.push(KeyValue::new("hit_rate", rate));
            }
            Facts::Part {
                outcome,
                is_error,
                chunks,
                hit_chunks,
            } => {
                attributes.push(KeyValue::new("outcome", outcome));
                if let Some(chunks) = chunks {
                    attributes.push(KeyValue::new("chunks", number(chunks)));
                }
                if let Some(hit) = hit_chunks {
                    attributes.push(KeyValue::new("hit_chunks", number(hit)));
                }
                if is_error {
                    status = Status::error(outcome);
                }
            }
        }
        SpanData {
            span_context: SpanContext::new(
                TraceId::from(span.trace_id),
                SpanId::from(span.span_id),
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: SpanId::from(span.parent_id),
            parent_span_is_remote: false,
            span_kind: SpanKind::Server,
            name: span.name.into(),
            start_time: span.began,
            end_time: span
                .began
                .checked_add(span.took)
                .unwrap_or(SystemTime::now()),
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// Waits for a span and a little longer, until the batch is full or nobody hands in more.
async fn fill(spans: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    if spans.recv_many(batch, BATCH_SPANS).await == 0 {
        return;
    }
    let lingered = sleep(LINGER);
    tokio::pin!(lingered);
    while batch.len() < BATCH_SPANS {
        let room = BATCH_SPANS - batch.len();
        tokio::select! {
            () = &mut lingered => return,
            more = spans.recv_many(batch, room) => if more == 0 { return },
        }
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned()
}
