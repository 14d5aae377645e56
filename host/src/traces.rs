//! OpenTelemetry traces: a span for each request, under one for the engine's request it belongs to.
//!
//! As in LMCache (`mp_observability/subscribers/tracing/mp_server.py`) the root of a trace is
//! called `request`, lasts from the first to the last operation of an engine's request, and says
//! what its lookup found; what is under it are the requests themselves, each under the name of its
//! operation. Requests outside a session, such as `ping`, are roots of their own.
//!
//! A span is a small record that is put into a bounded queue; what finds it full is dropped and
//! counted. All else, down to the ids' encoding, happens on the exporter's thread. Spans name no
//! `cache_salt`, no token and no text of an error, which may quote one.

mod export;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use axum::http::Uri;
use stockade_wire::{CacheKey, Operation, Request, RequestId, Response};
use tokio::sync::mpsc;

pub use export::Export;

/// Spans that wait for the exporter: seconds at full load, and a few MiB.
const QUEUED_SPANS: usize = 16_384;
/// Longest text in a span, in bytes.
const MAX_TEXT_BYTES: usize = 256;

/// What is traced, and where it goes.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceSettings {
    /// `http://HOST:PORT` or `https://HOST:PORT` of an OTLP receiver that speaks gRPC.
    pub endpoint: String,
    /// Share of the engines' requests, and of the requests outside them, that is traced, 0 to 1.
    pub sample_rate: f64,
}

impl TraceSettings {
    /// Checks an endpoint as LMCache takes it, with or without its scheme.
    ///
    /// # Errors
    /// What is wrong with it and how it should look; never its text, which may hold a password.
    pub fn endpoint(given: &str) -> Result<String, String> {
        const FORM: &str = "give http://HOST:PORT or https://HOST:PORT of an OTLP receiver for gRPC, which usually listens on port 4317";
        let given = match given.contains("://") {
            true => given.to_owned(),
            false => format!("http://{given}"),
        };
        let uri: Uri = given.parse().map_err(|_| format!("it is no URL: {FORM}"))?;
        let authority = uri.authority().ok_or(format!("it names no host: {FORM}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(format!("its scheme is not served: {FORM}"));
        }
        if authority.as_str().contains('@') {
            return Err(format!(
                "a user or password does not belong into it, give the header in OTEL_EXPORTER_OTLP_HEADERS: {FORM}"
            ));
        }
        if authority.port_u16().is_none() {
            return Err(format!("it names no port: {FORM}"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(format!("gRPC takes no path: {FORM}"));
        }
        Ok(given.trim_end_matches('/').to_owned())
    }
}

/// How many spans went where.
#[derive(Debug, Default)]
pub struct SpanCounts {
    /// Taken by the receiver.
    pub exported: AtomicU64,
    /// Dropped because the queue was full.
    pub queue_full: AtomicU64,
    /// Dropped because the receiver did not take them.
    pub export_failed: AtomicU64,
}

/// Where spans are handed in; clones are the same. The default one is off and makes none.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Tracer>>);

struct Tracer {
    queue: mpsc::Sender<Span>,
    sample_rate: f64,
    counts: Arc<SpanCounts>,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("is_on", &self.is_on())
            .finish_non_exhaustive()
    }
}

/// A finished span, as small as it can be made on the data path.
#[derive(Debug)]
struct Span {
    trace_id: u128,
    span_id: u64,
    /// Zero for a root.
    parent_id: u64,
    name: &'static str,
    began: SystemTime,
    took: Duration,
    request_id: Option<RequestId>,
    model: Option<Arc<str>>,
    facts: Facts,
}

/// What a span says beside its name and times.
#[derive(Debug, Clone, Copy)]
enum Facts {
    /// An engine's request as a whole.
    Whole {
        requested_tokens: u64,
        hit_tokens: u64,
    },
    /// One of our requests.
    Part {
        outcome: &'static str,
        is_error: bool,
        chunks: Option<u64>,
        hit_chunks: Option<u64>,
    },
}

/// The trace of an engine's request; its root span is handed in when the last holder is gone.
pub(crate) struct SessionTrace {
    tracer: Arc<Tracer>,
    trace_id: u128,
    span_id: u64,
    request_id: RequestId,
    began: SystemTime,
    requested_tokens: AtomicU64,
    hit_tokens: AtomicU64,
}

impl fmt::Debug for SessionTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionTrace")
            .field("request_id", &self.request_id)
            .finish_non_exhaustive()
    }
}

impl SessionTrace {
    /// A lookup of the request was answered.
    pub(crate) fn looked_up(&self, requested_tokens: usize, hit_tokens: usize) {
        let set = |total: &AtomicU64, tokens: usize| total.store(tokens as u64, Ordering::Relaxed);
        set(&self.requested_tokens, requested_tokens);
        set(&self.hit_tokens, hit_tokens);
    }
}

impl Drop for SessionTrace {
    fn drop(&mut self) {
        self.tracer.hand_in(Span {
            trace_id: self.trace_id,
            span_id: self.span_id,
            parent_id: 0,
            name: "request",
            began: self.began,
            took: self.began.elapsed().unwrap_or_default(),
            request_id: Some(Arc::clone(&self.request_id)),
            model: None,
            facts: Facts::Whole {
                requested_tokens: self.requested_tokens.load(Ordering::Relaxed),
                hit_tokens: self.hit_tokens.load(Ordering::Relaxed),
            },
        });
    }
}

/// Where a request stands between sessions and traces.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// It belongs to no session.
    Alone,
    /// It belongs to one that is not traced.
    Unsampled,
    /// It belongs to one that is.
    Under(Arc<SessionTrace>),
}

/// A request that was answered.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) operation: Option<Operation>,
    pub(crate) request_id: Option<RequestId>,
    pub(crate) model: Option<Arc<str>>,
    pub(crate) chunks: Option<u64>,
    pub(crate) hit_chunks: Option<u64>,
    pub(crate) outcome: &'static str,
    pub(crate) is_error: bool,
}

impl Answered {
    /// What a decoded request says of itself; its outcome is still open.
    pub(crate) fn of(request: &Request, chunk_size: usize) -> Self {
        let key = match request {
            Request::Store { key, .. }
            | Request::Retrieve { key, .. }
            | Request::PrepareStore { key, .. }
            | Request::CommitStore { key, .. }
            | Request::PrepareRetrieve { key, .. }
            | Request::CommitRetrieve { key, .. }
            | Request::Lookup { key }
            | Request::FreeLookupLocks { key } => Some(key),
            _ => None,
        };
        let model = match request {
            Request::Register(context) => Some(&context.model_name),
            Request::RegisterKvCache(registration) => Some(&registration.model_name),
            Request::ReportBlockAllocation { model_name, .. }
            | Request::SubscribeKvEvents { model_name, .. } => Some(model_name),
            _ => key.map(|key| &key.model_name),
        };
        Self {
            operation: request.operation(),
            request_id: request_id(request).cloned(),
            model: model.cloned(),
            chunks: key.map(|key| chunks(key, chunk_size)),
            hit_chunks: None,
            outcome: "ok",
            is_error: false,
        }
    }

    /// A request that could not be decoded, for this reason.
    pub(crate) fn rejected(operation: Option<Operation>, reason: &'static str) -> Self {
        Self {
            operation,
            request_id: None,
            model: None,
            chunks: None,
            hit_chunks: None,
            outcome: reason,
            is_error: true,
        }
    }

    /// How it was answered; `None` for a stream that began.
    pub(crate) fn with(mut self, response: Option<&Response>) -> Self {
        self.outcome = match response {
            Some(Response::PrepareRetrieve { success: false, .. }) => "miss",
            Some(
                Response::Bool(false)
                | Response::Transferred { success: false, .. }
                | Response::ServerModule { success: false, .. },
            ) => "negative",
            _ => "ok",
        };
        if let Some(Response::OptionalInt(Some(hit))) = response {
            self.hit_chunks = u64::try_from(*hit).ok();
        }
        self
    }

    /// It got an error reply, for this reason.
    pub(crate) fn failed(mut self, reason: &'static str) -> Self {
        (self.outcome, self.is_error) = (reason, true);
        self
    }
}

/// The engine's request that a request belongs to.
pub(crate) fn request_id(request: &Request) -> Option<&RequestId> {
    match request {
        Request::Store { key, .. }
        | Request::Retrieve { key, .. }
        | Request::PrepareStore { key, .. }
        | Request::CommitStore { key, .. }
        | Request::PrepareRetrieve { key, .. }
        | Request::CommitRetrieve { key, .. }
        | Request::Lookup { key }
        | Request::FreeLookupLocks { key } => Some(&key.request_id),
        Request::QueryPrefetchStatus { request_id }
        | Request::WaitPrefetchStatus { request_id, .. }
        | Request::EndSession { request_id } => Some(request_id),
        _ => None,
    }
}

/// Whole chunks of the key's range, within the tokens that came.
fn chunks(key: &CacheKey, chunk_size: usize) -> u64 {
    let end = key.end.min(key.tokens.len() as u64);
    end.saturating_sub(key.start) / chunk_size.max(1) as u64
}

impl Traces {
    /// Starts the exporter's thread. Connects at the first span and whenever the connection is
    /// lost, so a receiver need not be there yet.
    ///
    /// # Errors
    /// When the endpoint cannot be used or there is no thread to be had.
    pub fn start(settings: &TraceSettings, instance_id: &str) -> anyhow::Result<(Self, Export)> {
        let (queue, spans) = mpsc::channel(QUEUED_SPANS);
        let counts = Arc::<SpanCounts>::default();
        let export = Export::start(&settings.endpoint, instance_id, spans, Arc::clone(&counts))?;
        let tracer = Tracer {
            queue,
            sample_rate: settings.sample_rate,
            counts,
        };
        Ok((Self(Some(tracer.into())), export))
    }

    /// Whether anything is traced.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// What became of the spans; `None` when nothing is traced.
    #[must_use]
    pub fn counts(&self) -> Option<&SpanCounts> {
        self.0.as_ref().map(|tracer| &*tracer.counts)
    }

    /// The trace of a session that begins, if it is one of those that are traced.
    pub(crate) fn session(&self, request_id: &RequestId) -> Option<Arc<SessionTrace>> {
        let tracer = self.0.as_ref()?;
        if !tracer.samples() {
            return None;
        }
        Some(Arc::new(SessionTrace {
            tracer: Arc::clone(tracer),
            trace_id: fastrand::u128(1..),
            span_id: fastrand::u64(1..),
            request_id: Arc::clone(request_id),
            began: SystemTime::now(),
            requested_tokens: AtomicU64::new(0),
            hit_tokens: AtomicU64::new(0),
        }))
    }

    /// Hands in the span of a request.
    pub(crate) fn answered(&self, place: &Place, began: SystemTime, answered: Answered) {
        let Some(tracer) = &self.0 else { return };
        let (trace_id, parent_id, began) = match place {
            Place::Unsampled => return,
            Place::Alone if !tracer.samples() => return,
            Place::Alone => (fastrand::u128(1..), 0, began),
            // The first request makes the session, and a part does not begin before the whole.
            Place::Under(session) => (session.trace_id, session.span_id, began.max(session.began)),
        };
        tracer.hand_in(Span {
            trace_id,
            span_id: fastrand::u64(1..),
            parent_id,
            name: answered.operation.map_or("unknown", Operation::name),
            began,
            took: began.elapsed().unwrap_or_default(),
            request_id: answered.request_id,
            model: answered.model,
            facts: Facts::Part {
                outcome: answered.outcome,
                is_error: answered.is_error,
                chunks: answered.chunks,
                hit_chunks: answered.hit_chunks,
            },
        });
    }
}

impl Tracer {
    fn samples(&self) -> bool {
        self.sample_rate >= 1.0 || fastrand::f64() < self.sample_rate
    }

    fn hand_in(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.counts.queue_full.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn tracer(sample_rate: f64, room: usize) -> (Traces, mpsc::Receiver<Span>) {
        let (queue, spans) = mpsc::channel(room);
        let tracer = Tracer {
            queue,
            sample_rate,
            counts: Arc::default(),
        };
        (Traces(Some(tracer.into())), spans)
    }

    #[test]
    fn an_endpoint_is_taken_as_lmcache_takes_it_and_hides_no_password() {
        let good = |given| TraceSettings::endpoint(given).unwrap();
        assert_eq!(good("http://localhost:4317"), "http://localhost:4317");
        assert_eq!(good("collector:4317/"), "http://collector:4317");
        assert_eq!(good("https://[::1]:4317"), "https://[::1]:4317");
        for (given, why) in [
            ("ftp://h:1", "scheme"),
            ("http://user:s3cret@h:1", "OTEL_EXPORTER_OTLP_HEADERS"),
            ("http://h:1/v1/traces", "no path"),
            ("", "no URL"),
            ("http://", "no URL"),
            ("http://h:port", "no port"),
            ("http://h:99999", "no port"),
            ("localhost", "no port"),
        ] {
            let error = TraceSettings::endpoint(given).unwrap_err();
            assert!(error.contains(why) && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn parts_lie_within_their_session_and_share_its_trace() {
        let (traces, mut spans) = tracer(1.0, 8);
        let before = SystemTime::now() - Duration::from_secs(1);
        let session = traces.session(&"r".into()).unwrap();
        session.looked_up(64, 32);
        let lookup = Answered::rejected(Some(Operation::Lookup), "x");
        traces.answered(&Place::Under(Arc::clone(&session)), before, lookup);
        drop(session);
        let (part, whole) = (spans.try_recv().unwrap(), spans.try_recv().unwrap());
        assert_eq!(
            (part.trace_id, part.parent_id),
            (whole.trace_id, whole.span_id)
        );
        assert_eq!(
            (part.name, whole.name, whole.parent_id),
            ("lookup", "request", 0)
        );
        assert!(part.began >= whole.began);
        assert!(part.began + part.took <= whole.began + whole.took);
        assert!(matches!(
            whole.facts,
            Facts::Whole {
                requested_tokens: 64,
                hit_tokens: 32
            }
        ));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (traces, _spans) = tracer(1.0, 2);
        for _ in 0..5 {
            let ping = Answered::rejected(Some(Operation::Ping), "x");
            traces.answered(&Place::Alone, SystemTime::now(), ping);
        }
        let counts = traces.counts().unwrap();
        assert_eq!(counts.queue_full.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn sampling_takes_whole_sessions() {
        let (traces, mut spans) = tracer(0.5, 100_000);
        for _ in 0..1000 {
            let place = match traces.session(&"r".into()) {
                Some(session) => Place::Under(session),
                None => Place::Unsampled,
            };
            for _ in 0..3 {
                let ping = Answered::rejected(Some(Operation::Lookup), "x");
                traces.answered(&place, SystemTime::now(), ping);
            }
        }
        let (mut roots, mut parts) = (0_u32, 0_u32);
        while let Ok(span) = spans.try_recv() {
            match span.parent_id {
                0 => roots += 1,
                _ => parts += 1,
            }
        }
        assert_eq!(parts, roots * 3);
        // Ten standard deviations on either side.
        assert!((340..660).contains(&roots), "{roots}");
    }

    #[test]
    fn off_makes_nothing() {
        let traces = Traces::default();
        assert!(traces.session(&"r".into()).is_none() && traces.counts().is_none());
    }
}
