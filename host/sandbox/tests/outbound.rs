//! Requests of plugins go where they were granted, in time and in size, and nowhere else. The
//! servers here are real listeners that misbehave.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use stockade_sandbox::{
    HttpGrant, Limit, Network, Outbound, OutboundLimits,
    outbound::{OutboundError, OutboundRequest, OutboundResponse, Resolve},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

/// A listener that answers each connection with `answer`.
struct Listener {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    async fn new<F>(answer: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(answer(stream));
            }
        });
        Self {
            address,
            connections,
            task,
        }
    }

    /// Answers with these bytes once a request's head was read, and closes.
    async fn saying(text: impl Into<Vec<u8>>) -> Self {
        let text: Arc<[u8]> = text.into().into();
        Self::new(move |mut stream| {
            let text = Arc::clone(&text);
            async move {
                read_head(&mut stream).await;
                let _ = stream.write_all(&text).await;
            }
        })
        .await
    }

    /// Sends back the request as the body.
    async fn echo() -> Self {
        Self::new(|mut stream| async move { echo(&mut stream).await }).await
    }

    /// Writes `head`, then `piece` for ever.
    async fn endless(head: &'static str, piece: &'static [u8], pause: Duration) -> Self {
        Self::new(move |mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(head.as_bytes()).await;
            while stream.write_all(piece).await.is_ok() {
                tokio::time::sleep(pause).await;
            }
        })
        .await
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn port(&self) -> u16 {
        self.address.port()
    }
}

async fn echo(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let mut request = read_head(stream).await;
    let text = String::from_utf8_lossy(&request).to_lowercase();
    let length: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
        .unwrap_or_default();
    let head = text.find("\r\n\r\n").map_or(0, |end| end + 4);
    while request.len() < head + length && stream.read_buf(&mut request).await.unwrap_or(0) > 0 {}
    let answer = format!(
        "HTTP/1.1 200 OK\r\nX-Mine: yes\r\nContent-Length: {}\r\n\r\n",
        request.len()
    );
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.write_all(&request).await;
    let _ = stream.shutdown().await;
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut read = Vec::new();
    while !read.windows(4).any(|it| it == b"\r\n\r\n") {
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            break;
        }
    }
    read
}

/// A name server that says what the test wants, differently each time.
struct Names {
    answers: Vec<Vec<IpAddr>>,
    asked: AtomicUsize,
}

impl Names {
    fn saying(answers: &[&[&str]]) -> Arc<Self> {
        let answer = |it: &&[&str]| it.iter().map(|it| it.parse().unwrap()).collect();
        Arc::new(Self {
            answers: answers.iter().map(answer).collect(),
            asked: AtomicUsize::new(0),
        })
    }
}

impl Resolve for Names {
    fn resolve(&self, _host: &str) -> io::Result<Vec<IpAddr>> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst);
        let last = self.answers.len() - 1;
        Ok(self.answers[number.min(last)].clone())
    }
}

fn grant(host: &str, port: u16) -> HttpGrant {
    HttpGrant {
        host: host.to_owned(),
        port,
        methods: vec!["GET".to_owned(), "POST".to_owned()],
    }
}

fn limits(grants: Vec<HttpGrant>) -> OutboundLimits {
    OutboundLimits {
        grants,
        per_second: 1000,
        ..OutboundLimits::default()
    }
}

fn outbound(limits: OutboundLimits) -> Outbound {
    Outbound::new(Arc::default(), "it".into(), limits)
}

/// A way out to this listener alone.
fn to(listener: &Listener) -> Outbound {
    outbound(limits(vec![grant("127.0.0.1", listener.port())]))
}

fn get(url: impl Into<String>) -> OutboundRequest {
    OutboundRequest {
        method: "GET".to_owned(),
        url: url.into(),
        ..OutboundRequest::default()
    }
}

fn url(listener: &Listener) -> String {
    format!("http://{}/", listener.address)
}

fn text(response: &OutboundResponse) -> String {
    String::from_utf8_lossy(&response.body).into_owned()
}

#[tokio::test]
async fn a_granted_request_is_sent_whole_and_answered_whole() {
    let listener = Listener::echo().await;
    let out = to(&listener);
    let request = OutboundRequest {
        method: "POST".to_owned(),
        url: format!("http://{}/a/b?c=d#not-sent", listener.address),
        headers: vec![("X-Token".to_owned(), "1 2".to_owned())],
        body: b"\0raw\n".as_slice().into(),
        timeout: None,
    };
    let response = out.request(request).await.unwrap();
    assert_eq!(response.status, 200);
    let mine = ("x-mine".to_owned(), "yes".to_owned());
    assert!(response.headers.contains(&mine), "{:?}", response.headers);
    let sent = text(&response);
    assert!(sent.starts_with("POST /a/b?c=d HTTP/1.1\r\n"), "{sent}");
    assert!(sent.ends_with("\r\n\r\n\0raw\n"), "{sent:?}");
    let lower = sent.to_lowercase();
    assert!(
        lower.contains(&format!("\r\nhost: {}\r\n", listener.address)),
        "{sent}"
    );
    assert!(lower.contains("\r\nx-token: 1 2\r\n"), "{sent}");
    assert!(lower.contains("\r\ncontent-length: 5\r\n"), "{sent}");
    let used = out.usage();
    assert_eq!(used.hosts, 1);
    assert_eq!(used.largest_body, response.body.len() as u64);
    assert!(used.longest > Duration::ZERO);
    assert_eq!(out.hits(), Default::default());
}

#[tokio::test]
async fn only_what_is_granted_is_connected_to() {
    let listener = Listener::echo().await;
    let port = listener.port();
    let denied = async |grants: Vec<HttpGrant>, request: OutboundRequest| {
        let out = outbound(limits(grants));
        let refused = out.request(request).await;
        assert_eq!(out.hits().of(Limit::HttpHosts), 1, "{refused:?}");
        match refused {
            Err(OutboundError::Denied(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    // Nothing, another port, another host, another spelling of it, another method.
    let reason = denied(vec![], get(url(&listener))).await;
    assert!(reason.contains("[[http]] host = \"127.0.0.1\""), "{reason}");
    denied(vec![grant("127.0.0.1", port ^ 1)], get(url(&listener))).await;
    denied(vec![grant("127.0.0.2", port)], get(url(&listener))).await;
    denied(vec![grant("localhost", port)], get(url(&listener))).await;
    let delete = OutboundRequest {
        method: "DELETE".to_owned(),
        ..get(url(&listener))
    };
    let reason = denied(vec![grant("127.0.0.1", port)], delete).await;
    assert!(reason.contains("DELETE"), "{reason}");
    // A method in small letters is another method.
    let small = OutboundRequest {
        method: "get".to_owned(),
        ..get(url(&listener))
    };
    denied(vec![grant("127.0.0.1", port)], small).await;
    assert_eq!(listener.connections(), 0);

    // The same address in the form of IPv6 is the same address; `localhost` is one when named.
    let mapped = format!("http://[::ffff:127.0.0.1]:{port}/");
    assert!(to(&listener).request(get(mapped)).await.is_ok());
    let out = outbound(limits(vec![grant("LOCALHOST", port)]));
    let local = out.request(get(format!("http://localhost:{port}/"))).await;
    assert_eq!(local.unwrap().status, 200);
    assert_eq!(listener.connections(), 2);
}

#[tokio::test]
async fn a_name_does_not_lead_to_this_machine() {
    let listener = Listener::echo().await;
    let port = listener.port();
    for addresses in [
        &["127.0.0.1"] as &[&str],
        &["0.0.0.0"],
        &["::1"],
        &["::ffff:127.0.0.1"],
        &["169.254.169.254"],
        &["203.0.113.1", "127.0.0.1"],
    ] {
        let network = Network::default().with_resolver(Names::saying(&[addresses]));
        let grants = vec![grant("collector.example.com", port)];
        let out = Outbound::new(Arc::new(network), "it".into(), limits(grants));
        let refused = out
            .request(get(format!("http://collector.example.com:{port}/")))
            .await;
        let Err(OutboundError::Denied(reason)) = refused else {
            panic!("{addresses:?}: {refused:?}");
        };
        assert!(
            reason.contains("collector.example.com leads to"),
            "{reason}"
        );
        assert_eq!(out.hits().of(Limit::HttpHosts), 1);
    }
    assert_eq!(listener.connections(), 0);
}

/// The name says a good address when it is checked, and would say ours when it is connected to.
#[tokio::test]
async fn a_second_answer_of_the_name_server_changes_nothing() {
    let listener = Listener::echo().await;
    let port = listener.port();
    let names = Names::saying(&[&["203.0.113.1"], &["127.0.0.1"]]);
    let network = Network::default().with_resolver(Arc::clone(&names) as Arc<dyn Resolve>);
    let limits = OutboundLimits {
        timeout: Duration::from_millis(300),
        ..limits(vec![grant("collector.example.com", port)])
    };
    let out = Outbound::new(Arc::new(network), "it".into(), limits);
    let request = || get(format!("http://collector.example.com:{port}/"));
    // Nobody is at the documentation's address; whatever the network says of that, it is not us.
    let first = out.request(request()).await;
    let is_elsewhere = matches!(
        first,
        Err(OutboundError::Timeout(_) | OutboundError::Unavailable(_))
    );
    assert!(is_elsewhere, "{first:?}");
    assert_eq!(names.asked.load(Ordering::SeqCst), 1);
    let second = out.request(request()).await;
    assert!(
        matches!(second, Err(OutboundError::Denied(_))),
        "{second:?}"
    );
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_is_not_followed() {
    let secret = Listener::echo().await;
    let redirect = format!(
        "HTTP/1.1 302 Found\r\nLocation: {}\r\nContent-Length: 0\r\n\r\n",
        url(&secret)
    );
    let listener = Listener::saying(redirect).await;
    let out = outbound(limits(vec![
        grant("127.0.0.1", listener.port()),
        grant("127.0.0.1", secret.port()),
    ]));
    let response = out.request(get(url(&listener))).await.unwrap();
    assert_eq!(response.status, 302);
    let location = ("location".to_owned(), url(&secret));
    assert!(response.headers.contains(&location));
    assert_eq!(secret.connections(), 0);
}

#[tokio::test]
async fn a_response_is_bounded_in_size() {
    let now = Duration::ZERO;
    let megabyte: &'static [u8] = Vec::leak(vec![b'x'; 1 << 20]);
    let chunk: &'static [u8] =
        Vec::leak([b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat());
    let endless = [
        // Until the connection closes, in chunks, and announced.
        ("HTTP/1.1 200 OK\r\n\r\n", megabyte),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            chunk,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n",
            megabyte,
        ),
        // Of the head alone.
        (
            "HTTP/1.1 200 OK\r\n",
            b"X-Header: xxxxxxxxxxxxxxxxxxxxxxxx\r\n",
        ),
        ("HTTP/1.1 200 OK\r\nX-Header: ", megabyte),
    ];
    for (head, piece) in endless {
        let listener = Listener::endless(head, piece, now).await;
        let out = to(&listener);
        let refused = out.request(get(url(&listener))).await;
        let is_held = matches!(
            refused,
            Err(OutboundError::Limit {
                limit: Limit::HttpBody,
                ..
            })
        );
        assert!(is_held, "{head:?}: {refused:?}");
        assert_eq!(out.hits().of(Limit::HttpBody), 1);
    }
    // As much as is allowed comes through, and a byte more does not.
    for (bytes, is_whole) in [(4096, true), (4097, false)] {
        let answer = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(bytes));
        let listener = Listener::saying(answer).await;
        let out = outbound(OutboundLimits {
            body_bytes: 4096,
            ..limits(vec![grant("127.0.0.1", listener.port())])
        });
        let response = out.request(get(url(&listener))).await;
        assert_eq!(response.is_ok(), is_whole, "{bytes}: {response:?}");
    }
}

#[tokio::test]
async fn a_request_is_bounded_in_size() {
    let listener = Listener::echo().await;
    let out = to(&listener);
    let large = OutboundRequest {
        method: "POST".to_owned(),
        body: vec![0; (1 << 20) + 1].into(),
        ..get(url(&listener))
    };
    let refused = out.request(large).await;
    assert!(matches!(
        refused,
        Err(OutboundError::Limit {
            limit: Limit::HttpBody,
            ..
        })
    ));
    assert_eq!(out.hits().of(Limit::HttpBody), 1);
    let header = |value: String| OutboundRequest {
        headers: vec![("x-a".to_owned(), value)],
        ..get(url(&listener))
    };
    let many = OutboundRequest {
        headers: vec![("x-a".to_owned(), "1".to_owned()); 65],
        ..get(url(&listener))
    };
    for request in [header("x".repeat(16 << 10)), many] {
        let refused = out.request(request).await;
        assert!(
            matches!(refused, Err(OutboundError::Invalid(_))),
            "{refused:?}"
        );
    }
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn a_request_is_bounded_in_time() {
    let time = Duration::from_millis(300);
    let drip = Duration::from_millis(20);
    let silent = Listener::new(|stream| async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        drop(stream);
    });
    let listeners = [
        silent.await,
        Listener::endless("HTTP/1.1 200 OK\r\nX-Slow: ", b"x", drip).await,
        Listener::endless("HTTP/1.1 200 OK\r\n\r\n", b"x", drip).await,
        Listener::endless("", b"HTTP/1.1 100 Continue\r\n\r\n", drip).await,
    ];
    for listener in listeners {
        let out = outbound(OutboundLimits {
            timeout: time,
            ..limits(vec![grant("127.0.0.1", listener.port())])
        });
        let begun = Instant::now();
        let refused = out.request(get(url(&listener))).await;
        assert_eq!(refused, Err(OutboundError::Timeout(time)));
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(out.hits().of(Limit::HttpTime), 1);
        assert!(out.usage().longest >= time);

        // What the guest itself wants to wait is its own affair, and no more than the limit.
        let own = |timeout| OutboundRequest {
            timeout: Some(timeout),
            ..get(url(&listener))
        };
        let shorter = Duration::from_millis(50);
        let refused = out.request(own(shorter)).await;
        assert_eq!(refused, Err(OutboundError::Timeout(shorter)));
        assert_eq!(out.hits().of(Limit::HttpTime), 1);
        let refused = out.request(own(Duration::from_secs(600))).await;
        assert_eq!(refused, Err(OutboundError::Timeout(time)));
    }
}

/// A name server that never answers holds back its own guest, for as long as a request may take.
#[tokio::test]
async fn a_look_up_that_hangs_is_bounded() {
    struct Hangs(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);
    impl Resolve for Hangs {
        fn resolve(&self, _host: &str) -> io::Result<Vec<IpAddr>> {
            let _ = self.0.lock().unwrap().recv();
            Err(io::ErrorKind::TimedOut.into())
        }
    }
    let (release, released) = std::sync::mpsc::channel();
    let resolver = Arc::new(Hangs(std::sync::Mutex::new(released)));
    let network = Arc::new(Network::default().with_resolver(resolver));
    let time = Duration::from_millis(100);
    let limits = OutboundLimits {
        timeout: time,
        ..limits(vec![grant("a.example", 80), grant("127.0.0.1", 1)])
    };
    let out = Outbound::new(network, "it".into(), limits);
    // More than are looked up at once.
    for _ in 0..8 {
        let refused = out.request(get("http://a.example/")).await;
        assert_eq!(refused, Err(OutboundError::Timeout(time)));
    }
    // An address needs no look-up.
    let refused = out.request(get("http://127.0.0.1:1/")).await;
    assert!(
        matches!(refused, Err(OutboundError::Unavailable(_))),
        "{refused:?}"
    );
    drop(release);
}

#[tokio::test]
async fn requests_come_at_their_rate_denied_ones_too() {
    let listener = Listener::echo().await;
    let out = outbound(OutboundLimits {
        per_second: 5,
        ..limits(vec![grant("127.0.0.1", listener.port())])
    });
    let mut sent = 0;
    let begun = Instant::now();
    for number in 0..100 {
        // Every second one is denied, and costs as much.
        let request = match number % 2 {
            0 => get(url(&listener)),
            _ => get("http://a.example/"),
        };
        let outcome = out.request(request).await;
        let is_limited = matches!(
            outcome,
            Err(OutboundError::Limit {
                limit: Limit::HttpRequests,
                ..
            })
        );
        sent += usize::from(!is_limited);
    }
    let allowed = 10 + (begun.elapsed().as_secs_f64() * 5.0).ceil() as usize;
    assert!((10..=allowed).contains(&sent), "{sent} of {allowed}");
    assert_eq!(out.hits().of(Limit::HttpRequests), 100 - sent as u64);
    assert!(listener.connections() <= sent.div_ceil(2));
}

#[tokio::test]
async fn headers_cannot_change_where_a_request_goes_or_hide_another() {
    let listener = Listener::echo().await;
    let out = to(&listener);
    for (name, value) in [
        ("Host", "other.example"),
        ("host", "other.example"),
        (":authority", "other.example"),
        ("Content-Length", "0"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "keep-alive"),
        ("Keep-Alive", "1"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic eDp5"),
        ("Upgrade", "websocket"),
        ("TE", "trailers"),
        ("Trailer", "x"),
        ("Expect", "100-continue"),
        ("X-A\r\nHost", "other.example"),
        ("X-A: b\r\nX-C", "d"),
        ("", "x"),
        ("X A", "x"),
        ("X-A", "b\r\nHost: other.example"),
        ("X-A", "b\r\n\r\nGET /second HTTP/1.1"),
        ("X-A", "b\nc"),
        ("X-A", "b\0c"),
    ] {
        let request = OutboundRequest {
            headers: vec![(name.to_owned(), value.to_owned())],
            ..get(url(&listener))
        };
        let refused = out.request(request).await;
        let Err(OutboundError::Invalid(reason)) = refused else {
            panic!("{name:?}: {value:?}: {refused:?}");
        };
        assert!(reason.contains("header"), "{reason}");
    }
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn what_is_no_http_is_an_error() {
    for answer in [
        "",
        "SSH-2.0-OpenSSH_9.9\r\n",
        "\0\0\0\0",
        "HTTP/1.1 xyz\r\n\r\n",
    ] {
        let listener = Listener::saying(answer).await;
        let refused = to(&listener).request(get(url(&listener))).await;
        let is_broken = matches!(refused, Err(OutboundError::Unavailable(_)));
        assert!(is_broken, "{answer:?}: {refused:?}");
    }
    // Less than was announced.
    let short = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc";
    let listener = Listener::saying(short).await;
    let refused = to(&listener).request(get(url(&listener))).await;
    assert!(
        matches!(refused, Err(OutboundError::Unavailable(_))),
        "{refused:?}"
    );
}

/// Runs itself again in an environment that names a proxy at which nobody is.
#[tokio::test]
async fn no_proxy_of_the_environment_is_used() {
    let listener = Listener::saying("HTTP/1.1 204 No Content\r\n\r\n").await;
    let program = std::env::current_exe().unwrap();
    if std::env::var_os("STOCKADE_TEST_TARGET").is_none() {
        let ran = tokio::process::Command::new(program)
            .args(["--exact", "no_proxy_of_the_environment_is_used"])
            .env("STOCKADE_TEST_TARGET", url(&listener))
            .env("http_proxy", "http://127.0.0.1:1")
            .env("HTTP_PROXY", "http://127.0.0.1:1")
            .env("ALL_PROXY", "http://127.0.0.1:1")
            .output();
        let ran = ran.await.unwrap();
        assert!(
            ran.status.success(),
            "{}",
            String::from_utf8_lossy(&ran.stdout)
        );
        assert_eq!(listener.connections(), 1);
        return;
    }
    let target = std::env::var("STOCKADE_TEST_TARGET").unwrap();
    let address: SocketAddr = target
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .parse()
        .unwrap();
    let out = outbound(limits(vec![grant("127.0.0.1", address.port())]));
    assert_eq!(out.request(get(target)).await.unwrap().status, 204);
}

#[tokio::test]
async fn tls_is_checked_against_the_roots_and_the_name() {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned()];
    let certificate = CertificateParams::new(names)
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = Listener::new(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                echo(&mut stream).await;
            }
        }
    })
    .await;
    let port = listener.port();
    let grants = || limits(vec![grant("localhost", port), grant("127.0.0.1", port)]);
    let trusting = Network::default()
        .with_roots(issuer.pem().as_bytes())
        .unwrap();
    let trusting = Outbound::new(Arc::new(trusting), "it".into(), grants());
    let response = trusting
        .request(get(format!("https://localhost:{port}/x")))
        .await;
    assert!(text(&response.unwrap()).starts_with("GET /x HTTP/1.1"));

    // Another name, no such root, and no TLS at all.
    let unavailable = async |out: &Outbound, url: String| {
        let refused = out.request(get(url)).await;
        assert!(
            matches!(refused, Err(OutboundError::Unavailable(_))),
            "{refused:?}"
        );
    };
    unavailable(&trusting, format!("https://127.0.0.1:{port}/")).await;
    unavailable(&outbound(grants()), format!("https://localhost:{port}/")).await;
    unavailable(&trusting, format!("http://localhost:{port}/")).await;

    let refused = Network::default()
        .with_roots(b"no certificate")
        .unwrap_err();
    assert!(refused.contains("no PEM certificate"), "{refused}");
}
