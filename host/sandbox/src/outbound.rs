//! HTTP requests of plugins to the hosts that they were granted, and to no others.
//!
//! 1. The request costs one token of its plugin's rate, whatever becomes of it.
//! 2. Its URL must name a granted host, port and method (`target`).
//! 3. A name is looked up, and every address is checked (`address`); the connection goes to the
//!    addresses that were checked, so that a second answer of the name server changes nothing.
//! 4. Request and response are bounded in size and time. No redirect is followed, no proxy of the
//!    environment used, no connection kept, and nothing is decompressed.
//!
//! All of it happens within the future of the request: dropping that closes the connection, and
//! who polls it pays for the cryptography.

mod address;
mod target;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _},
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Method, Request,
    body::{Body as _, Bytes, Incoming},
    client::conn::http1,
    header::{self, HeaderName, HeaderValue},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};
use url::Host;

use self::target::Target;
use crate::{
    grants::HttpGrant,
    limit::{Limit, LimitHits},
    token_bucket::TokenBucket,
};

/// Names being looked up at once, over all plugins: a name server that does not answer holds a
/// thread for as long as the C library has patience.
pub(crate) const LOOKUPS_AT_ONCE: usize = 4;

/// Addresses of a name that are checked and tried.
const MAX_ADDRESSES: usize = 16;

/// Headers of a request.
const MAX_REQUEST_HEADERS: usize = 64;

/// Headers of a request, in bytes.
const MAX_REQUEST_HEADER_BYTES: usize = 16 << 10;

/// Headers of a response, in bytes.
const MAX_RESPONSE_HEAD_BYTES: usize = 64 << 10;

/// How often a plugin's denials are logged.
const DENIAL_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Headers that say where a request goes, how long it is, or what becomes of its connection.
/// They are ours to set: with them a request could mean another host to a proxy, or hide a second
/// request.
const REFUSED_HEADERS: [HeaderName; 10] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    header::EXPECT,
    header::PROXY_AUTHORIZATION,
    header::PROXY_AUTHENTICATE,
];
const REFUSED_HEADER_NAMES: [&str; 4] = [
    "keep-alive",
    "proxy-connection",
    "http2-settings",
    "alt-used",
];

/// Where a plugin may send requests, and how many of which size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundLimits {
    /// The hosts; none denies everything.
    pub grants: Vec<HttpGrant>,
    /// Wall time of one request, from the look-up to the response's last byte.
    pub timeout: Duration,
    /// Bytes of a request's body, and of a response's.
    pub body_bytes: u64,
    /// Requests a second; as many at once as two seconds give.
    pub per_second: u32,
}

impl Default for OutboundLimits {
    /// Those of a plugin without manifest.
    fn default() -> Self {
        Self {
            grants: Vec::new(),
            timeout: Duration::from_secs(10),
            body_bytes: 1 << 20,
            per_second: 10,
        }
    }
}

/// Looks up names.
pub trait Resolve: Send + Sync + 'static {
    /// The addresses of `host`. May block; called on a thread that may.
    ///
    /// # Errors
    /// Whatever keeps the name from being looked up.
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// Asks the C library, as every other program of the machine does.
struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        let addresses = (host, 0).to_socket_addrs()?;
        Ok(addresses.map(|address| address.ip()).collect())
    }
}

/// What the requests of all plugins share: how names are looked up and whom TLS trusts.
pub struct Network {
    resolver: Arc<dyn Resolve>,
    /// Beside Mozilla's.
    roots: Vec<CertificateDer<'static>>,
    tls: OnceLock<Arc<ClientConfig>>,
    lookups: Arc<Semaphore>,
    /// Whether names may lead anywhere; only in tests of `prove`.
    trusts_names: bool,
}

impl fmt::Debug for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Network")
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            resolver: Arc::new(SystemResolver),
            roots: Vec::new(),
            tls: OnceLock::new(),
            lookups: Arc::new(Semaphore::new(LOOKUPS_AT_ONCE)),
            trusts_names: false,
        }
    }
}

impl Network {
    /// Trusts the certificates of `pem` beside Mozilla's.
    ///
    /// # Errors
    /// One sentence when it holds no certificate, or one that is no root.
    pub fn with_roots(mut self, pem: &[u8]) -> Result<Self, String> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let roots = read.map_err(|error| format!("it is not PEM: {error}"))?;
        if roots.is_empty() {
            return Err("it holds no PEM certificate".to_owned());
        }
        let mut store = RootCertStore::empty();
        for root in &roots {
            let added = store.add(root.clone());
            added.map_err(|error| format!("a certificate of it is no root: {error}"))?;
        }
        self.roots.extend(roots);
        Ok(self)
    }

    /// Looks names up with `resolver`.
    #[must_use]
    pub fn with_resolver(mut self, resolver: Arc<dyn Resolve>) -> Self {
        self.resolver = resolver;
        self
    }

    /// Does not check where names lead to, so that `prove` can be seen to find that.
    #[cfg(debug_assertions)]
    pub(crate) fn trusting_names(self) -> Self {
        Self {
            trusts_names: true,
            ..self
        }
    }

    /// Made for the first `https` request.
    fn tls(&self) -> Result<Arc<ClientConfig>, OutboundError> {
        if let Some(config) = self.tls.get() {
            return Ok(Arc::clone(config));
        }
        let unavailable = |error: &dyn fmt::Display| {
            OutboundError::Unavailable(format!("TLS cannot be set up: {error}"))
        };
        let mut roots = RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        for root in &self.roots {
            roots.add(root.clone()).map_err(|it| unavailable(&it))?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| unavailable(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::clone(self.tls.get_or_init(|| Arc::new(config))))
    }

    async fn resolve(&self, host: &str) -> Result<Vec<IpAddr>, OutboundError> {
        let unavailable = |error: &dyn fmt::Display| {
            OutboundError::Unavailable(format!("{host} cannot be looked up: {error}"))
        };
        let permit = Arc::clone(&self.lookups).acquire_owned().await;
        let permit = permit.map_err(|error| unavailable(&error))?;
        let (resolver, name) = (Arc::clone(&self.resolver), host.to_owned());
        let looking_up = tokio::task::spawn_blocking(move || {
            // Given back when the look-up is over, not when the guest gave it up.
            let _permit = permit;
            resolver.resolve(&name)
        });
        let found = looking_up.await.map_err(|error| unavailable(&error))?;
        let found = found.map_err(|error| unavailable(&error))?;
        if found.is_empty() {
            return Err(unavailable(&"it has no address"));
        }
        Ok(found)
    }
}

/// A request as a guest asks for it.
#[derive(Debug, Clone, Default)]
pub struct OutboundRequest {
    /// One of the grant's, in capitals.
    pub method: String,
    /// Absolute, `http` or `https`.
    pub url: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// Raw bytes.
    pub body: Bytes,
    /// What the guest wants to wait at most; the limit holds besides.
    pub timeout: Option<Duration>,
}

/// What the host answered, whatever it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundResponse {
    /// The status; a redirect is one like any other.
    pub status: u16,
    /// Names in small letters, and values; what is not UTF-8 in them is replaced.
    pub headers: Vec<(String, String)>,
    /// As it was sent, compressed or not.
    pub body: Bytes,
}

/// Why a request has no response. Each is a sentence for the plugin's author.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutboundError {
    /// Nothing grants it.
    #[error("{0}")]
    Denied(String),
    /// The request is not one.
    #[error("{0}")]
    Invalid(String),
    /// A limit is used up, or would be.
    #[error("{reason}")]
    Limit {
        /// Which.
        limit: Limit,
        /// What it is, and what was asked for.
        reason: String,
    },
    /// It took too long.
    #[error("the request was not over after {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The host could not be reached, or did not speak HTTP.
    #[error("{0}")]
    Unavailable(String),
}

/// What a plugin has used of its grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutboundUse {
    /// Requests a second of late.
    pub per_second: u64,
    /// The longest request.
    pub longest: Duration,
    /// The largest body of a request or a response, in bytes.
    pub largest_body: u64,
    /// Grants that were used.
    pub hosts: u64,
}

/// The way out of one run of a plugin.
pub struct Outbound {
    network: Arc<Network>,
    plugin: Arc<str>,
    limits: OutboundLimits,
    rate: Mutex<TokenBucket>,
    longest: AtomicU64,
    largest_body: AtomicU64,
    /// A bit for each grant.
    used: AtomicU64,
    hits: Mutex<LimitHits>,
    denials: Mutex<DenialLog>,
}

#[derive(Default)]
struct DenialLog {
    last: Option<Instant>,
    suppressed: u64,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Outbound")
            .field("plugin", &self.plugin)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Outbound {
    /// The way out of `plugin`.
    #[must_use]
    pub fn new(network: Arc<Network>, plugin: Arc<str>, limits: OutboundLimits) -> Self {
        Self {
            network,
            plugin,
            rate: Mutex::new(TokenBucket::new(limits.per_second)),
            limits,
            longest: AtomicU64::new(0),
            largest_body: AtomicU64::new(0),
            used: AtomicU64::new(0),
            hits: Mutex::default(),
            denials: Mutex::default(),
        }
    }

    /// What was used so far.
    #[must_use]
    pub fn usage(&self) -> OutboundUse {
        OutboundUse {
            per_second: self.rate.lock().rate(),
            longest: Duration::from_nanos(self.longest.load(Ordering::Relaxed)),
            largest_body: self.largest_body.load(Ordering::Relaxed),
            hosts: self.used.load(Ordering::Relaxed).count_ones().into(),
        }
    }

    /// How often its limits were hit; a denial is a hit of [`Limit::HttpHosts`].
    #[must_use]
    pub fn hits(&self) -> LimitHits {
        self.hits.lock().clone()
    }

    /// Sends a request and reads the whole response. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`OutboundError`].
    pub async fn request(
        &self,
        request: OutboundRequest,
    ) -> Result<OutboundResponse, OutboundError> {
        let begun = Instant::now();
        let outcome = self.bounded(request).await;
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.longest.fetch_max(took, Ordering::Relaxed);
        match &outcome {
            Err(OutboundError::Denied(reason)) => {
                self.hit(Limit::HttpHosts);
                self.log_denial(reason);
            }
            Err(OutboundError::Limit { limit, .. }) => self.hit(*limit),
            Err(OutboundError::Timeout(time)) if *time >= self.limits.timeout => {
                self.hit(Limit::HttpTime);
            }
            _ => {}
        }
        outcome
    }

    async fn bounded(&self, request: OutboundRequest) -> Result<OutboundResponse, OutboundError> {
        if !self.rate.lock().take_one() {
            return Err(OutboundError::Limit {
                limit: Limit::HttpRequests,
                reason: format!(
                    "limits.http_per_second is {}, and it sent more",
                    self.limits.per_second
                ),
            });
        }
        let target = Target::parse(&request.url).map_err(OutboundError::Invalid)?;
        self.find_grant(&target, &request.method)?;
        let message = self.message(&target, &request)?;
        let time = self.limits.timeout;
        let time = request.timeout.map_or(time, |wanted| wanted.min(time));
        match timeout(time, self.exchange(&target, message)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(OutboundError::Timeout(time)),
        }
    }

    fn find_grant(&self, target: &Target, method: &str) -> Result<(), OutboundError> {
        let (host, port) = (&target.host, target.port);
        let mut is_host = false;
        for (number, grant) in self.limits.grants.iter().enumerate() {
            if grant.port != port || grant.parsed_host().as_ref() != Ok(host) {
                continue;
            }
            is_host = true;
            if grant.methods.iter().any(|granted| granted == method) {
                self.used.fetch_or(1 << (number % 64), Ordering::Relaxed);
                return Ok(());
            }
        }
        Err(OutboundError::Denied(match is_host {
            true => format!(
                "method {method:?} is not granted for {host}:{port}: add it to the methods of that [[http]] in the manifest, and see what [plugins] of the server leaves of it"
            ),
            false => format!(
                "{host}:{port} is not granted: add [[http]] host = {:?}, port = {port}, methods = [{method:?}] to the manifest, and see what [plugins] of the server leaves of it",
                host.to_string()
            ),
        }))
    }

    /// The request as it is sent.
    fn message(
        &self,
        target: &Target,
        request: &OutboundRequest,
    ) -> Result<Request<Full<Bytes>>, OutboundError> {
        let invalid = OutboundError::Invalid;
        let body_bytes = request.body.len() as u64;
        if body_bytes > self.limits.body_bytes {
            return Err(self.body_limit(&format!("the request's has {body_bytes}")));
        }
        self.largest_body.fetch_max(body_bytes, Ordering::Relaxed);
        let method = Method::from_bytes(request.method.as_bytes())
            .map_err(|_| invalid(format!("method {:?} is none", request.method)))?;
        let mut message = Request::new(Full::new(request.body.clone()));
        *message.method_mut() = method;
        *message.uri_mut() = target
            .path
            .parse()
            .map_err(|error| invalid(format!("url's path cannot be sent: {error}")))?;
        let headers = message.headers_mut();
        guest_headers(&request.headers, headers)?;
        let authority = HeaderValue::from_str(&target.authority)
            .map_err(|error| invalid(format!("url's host cannot be sent: {error}")))?;
        headers.insert(header::HOST, authority);
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        headers
            .entry(header::USER_AGENT)
            .or_insert(HeaderValue::from_static(concat!(
                "stockade/",
                env!("CARGO_PKG_VERSION")
            )));
        Ok(message)
    }

    async fn exchange(
        &self,
        target: &Target,
        message: Request<Full<Bytes>>,
    ) -> Result<OutboundResponse, OutboundError> {
        let addresses = self.addresses(target).await?;
        let stream = connect(&target.authority, &addresses).await?;
        if !target.is_tls {
            return self.converse(stream, message).await;
        }
        let name = match &target.host {
            Host::Domain(name) => ServerName::try_from(name.clone())
                .map_err(|error| OutboundError::Invalid(format!("url's host: {error}")))?,
            Host::Ipv4(address) => ServerName::from(IpAddr::from(*address)),
            Host::Ipv6(address) => ServerName::from(IpAddr::from(*address)),
        };
        let connector = TlsConnector::from(self.network.tls()?);
        let stream = connector.connect(name, stream).await.map_err(|error| {
            OutboundError::Unavailable(format!("TLS with {}: {error}", target.authority))
        })?;
        self.converse(stream, message).await
    }

    /// The addresses to connect to, each of them allowed.
    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>, OutboundError> {
        let name = match &target.host {
            // Addresses were granted as what they are.
            Host::Ipv4(address) => return Ok(vec![((*address), target.port).into()]),
            Host::Ipv6(address) => return Ok(vec![((*address), target.port).into()]),
            // Nobody else may say where that is (RFC 6761).
            Host::Domain(name) if name == "localhost" => {
                let addresses: [IpAddr; 2] =
                    [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                return Ok(addresses.map(|it| (it, target.port).into()).to_vec());
            }
            Host::Domain(name) => name,
        };
        let found = self.network.resolve(name).await?;
        // One bad address denies them all: a name of others that leads here too is an attack or a
        // mistake, and neither gets a connection.
        for address in &found {
            if let Some(kind) = address::forbidden(*address)
                && !self.network.trusts_names
            {
                return Err(OutboundError::Denied(format!(
                    "{name} leads to {address}, {kind}: such an address is granted only by itself, as [[http]] host = \"{address}\""
                )));
            }
        }
        let some = found.into_iter().take(MAX_ADDRESSES);
        Ok(some.map(|it| SocketAddr::new(it, target.port)).collect())
    }

    /// Sends a request on a connection of its own and reads the response.
    async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        message: Request<Full<Bytes>>,
    ) -> Result<OutboundResponse, OutboundError> {
        let mut builder = http1::Builder::new();
        builder
            .max_buf_size(MAX_RESPONSE_HEAD_BYTES)
            .max_header_size(MAX_RESPONSE_HEAD_BYTES);
        let (mut sender, connection) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(&error))?;
        let mut exchange = pin!(async {
            let sent = sender.send_request(message).await;
            let response = sent.map_err(|error| self.broken(&error))?;
            let (head, body) = response.into_parts();
            Ok(OutboundResponse {
                status: head.status.as_u16(),
                headers: response_headers(&head.headers),
                body: self.read(body).await?,
            })
        });
        // The connection's own end is told to the exchange, which may have bytes left to read.
        tokio::select! {
            biased;
            outcome = &mut exchange => outcome,
            _ = pin!(connection) => exchange.await,
        }
    }

    async fn read(&self, mut body: Incoming) -> Result<Bytes, OutboundError> {
        let limit = self.limits.body_bytes;
        let announced = body.size_hint().lower();
        if announced > limit {
            return Err(self.body_limit(&format!("the response's has {announced}")));
        }
        let mut read = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.broken(&error))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if (read.len() + data.len()) as u64 > limit {
                return Err(self.body_limit("the response's has more"));
            }
            read.extend_from_slice(&data);
        }
        self.largest_body
            .fetch_max(read.len() as u64, Ordering::Relaxed);
        Ok(read.into())
    }

    fn body_limit(&self, what: &str) -> OutboundError {
        OutboundError::Limit {
            limit: Limit::HttpBody,
            reason: format!(
                "limits.http_body_kib allows bodies of {} bytes, and {what}",
                self.limits.body_bytes
            ),
        }
    }

    fn broken(&self, error: &hyper::Error) -> OutboundError {
        if error.is_parse_too_large() {
            return OutboundError::Limit {
                limit: Limit::HttpBody,
                reason: format!(
                    "the response's headers have more than {MAX_RESPONSE_HEAD_BYTES} bytes"
                ),
            };
        }
        OutboundError::Unavailable(match std::error::Error::source(error) {
            Some(cause) => format!("the exchange broke off: {error}: {cause}"),
            None => format!("the exchange broke off: {error}"),
        })
    }

    fn hit(&self, limit: Limit) {
        self.hits.lock().add(limit, 1);
    }

    fn log_denial(&self, reason: &str) {
        let suppressed = {
            let mut denials = self.denials.lock();
            let is_due = denials
                .last
                .is_none_or(|last| last.elapsed() >= DENIAL_LOG_INTERVAL);
            if !is_due {
                denials.suppressed += 1;
                return;
            }
            denials.last = Some(Instant::now());
            std::mem::take(&mut denials.suppressed)
        };
        let name = &*self.plugin;
        tracing::warn!(
            plugin = name,
            suppressed,
            "a request of plugin `{name}` was denied: {reason}"
        );
    }
}

/// Checks a guest's headers and adds them.
fn guest_headers(guest: &[(String, String)], headers: &mut HeaderMap) -> Result<(), OutboundError> {
    let invalid = |reason: String| Err(OutboundError::Invalid(reason));
    let bytes: usize = guest
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if guest.len() > MAX_REQUEST_HEADERS || bytes > MAX_REQUEST_HEADER_BYTES {
        return invalid(format!(
            "headers are {} with {bytes} bytes, of {MAX_REQUEST_HEADERS} with {MAX_REQUEST_HEADER_BYTES} at most",
            guest.len()
        ));
    }
    for (name, value) in guest {
        let Ok(parsed) = HeaderName::from_bytes(name.as_bytes()) else {
            return invalid(format!("header {name:?} has no name that can be sent"));
        };
        if REFUSED_HEADERS.contains(&parsed) || REFUSED_HEADER_NAMES.contains(&parsed.as_str()) {
            return invalid(format!("header {name:?} is not the plugin's to set"));
        }
        // Line ends and other control characters are not taken.
        let Ok(value) = HeaderValue::from_str(value) else {
            return invalid(format!("header {name:?} has a value that cannot be sent"));
        };
        headers.append(parsed, value);
    }
    Ok(())
}

fn response_headers(headers: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), text(value)))
        .collect()
}

/// The first of the addresses that takes a connection.
async fn connect(authority: &str, addresses: &[SocketAddr]) -> Result<TcpStream, OutboundError> {
    /// What an address gets that others come after.
    const PATIENCE: Duration = Duration::from_secs(2);
    let mut failed = None;
    for (number, address) in addresses.iter().enumerate() {
        let connecting = TcpStream::connect(address);
        let connected = match number + 1 == addresses.len() {
            true => connecting.await,
            false => timeout(PATIENCE, connecting)
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        };
        match connected {
            Ok(stream) => {
                // A small request goes at once; without the option it only goes later.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => failed = Some(error),
        }
    }
    let reason = failed.map_or_else(|| "it has no address".to_owned(), |it| it.to_string());
    Err(OutboundError::Unavailable(format!(
        "{authority} cannot be reached: {reason}"
    )))
}
