//! Connections of the HTTP API: TCP, TLS and a unix socket, with limits for each.

use std::{
    fs::File,
    io::BufReader,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use axum::{Router, extract::Request};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        server::WebPkiClientVerifier,
    },
};

use super::access::Origin;
use crate::watchdog::Heart;

/// Most connections of one listener; operators and scrapers are few.
const MAX_CONNECTIONS: usize = 256;
/// What a client gets for its TLS handshake, and for the head of each request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest head of a request in bytes.
const MAX_HEAD_BYTES: usize = 32 << 10;

/// A bound socket of the HTTP API.
pub(crate) enum Socket {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        _file: SocketFile,
    },
}

/// The file of a unix socket, removed when the listener goes.
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whoever removed it before us did what we want.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds a unix socket that only the server's user can connect to.
///
/// # Errors
/// A sentence that names the path and the way out.
pub(crate) fn bind_socket(path: &Path) -> anyhow::Result<Socket> {
    let shown = path.display();
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("--http-socket {shown} exists and is no socket: remove it or choose another path")
        }
        Ok(_) => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!(
                    "--http-socket {shown}: another server listens there, stop it or choose another path"
                );
            }
            std::fs::remove_file(path).with_context(|| {
                format!("--http-socket {shown} is left over and cannot be removed")
            })?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("--http-socket {shown} cannot be bound"))?;
    let file = SocketFile(path.to_owned());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("--http-socket {shown} cannot be made the owner's alone"))?;
    Ok(Socket::Unix {
        listener,
        _file: file,
    })
}

/// Where TLS takes its keys from.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificate chain, PEM.
    pub cert: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Roots of the client certificates that are asked for, PEM.
    pub client_ca: Option<PathBuf>,
}

/// TLS whose files are read again when they change.
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<(Vec<Option<SystemTime>>, TlsAcceptor)>,
}

impl Tls {
    /// # Errors
    /// A sentence that names the file.
    pub(crate) fn read(files: TlsFiles) -> anyhow::Result<Self> {
        let current = RwLock::new((versions(&files), acceptor(&files)?));
        Ok(Self { files, current })
    }

    /// Takes new certificates over; what is wrong with them leaves the old ones in use.
    pub(crate) fn refresh(&self) {
        let versions = versions(&self.files);
        if versions == self.current.read().0 {
            return;
        }
        match acceptor(&self.files) {
            Ok(acceptor) => {
                self.current.write().1 = acceptor;
                tracing::info!("HTTP certificates were read again");
            }
            Err(error) => tracing::error!("HTTP certificates stay as they were: {error:#}"),
        }
        self.current.write().0 = versions;
    }

    fn acceptor(&self) -> TlsAcceptor {
        self.current.read().1.clone()
    }
}

fn versions(files: &TlsFiles) -> Vec<Option<SystemTime>> {
    [
        Some(&files.cert),
        Some(&files.key),
        files.client_ca.as_ref(),
    ]
    .into_iter()
    .flatten()
    .map(|path| std::fs::metadata(path).and_then(|it| it.modified()).ok())
    .collect()
}

fn certificates(path: &Path, flag: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let what = || format!("{flag} {} holds no PEM certificates", path.display());
    let file = File::open(path).with_context(what)?;
    let found: Vec<_> = CertificateDer::pem_reader_iter(BufReader::new(file))
        .collect::<Result<_, _>>()
        .with_context(what)?;
    if found.is_empty() {
        bail!(what());
    }
    Ok(found)
}

fn acceptor(files: &TlsFiles) -> anyhow::Result<TlsAcceptor> {
    let chain = certificates(&files.cert, "--http-tls-cert")?;
    let key = PrivateKeyDer::from_pem_file(&files.key).with_context(|| {
        format!(
            "--http-tls-key {} holds no PEM private key",
            files.key.display()
        )
    })?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("TLS cannot be set up")?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path, "--http-client-ca")? {
                roots
                    .add(certificate)
                    .with_context(|| format!("--http-client-ca {} is no root", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .context("--http-client-ca cannot be used")?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .context("--http-tls-cert and --http-tls-key do not belong together")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Answers on a socket until `stopped` turns true, then lets requests in flight end.
pub(crate) async fn serve(
    socket: Socket,
    tls: Option<Arc<Tls>>,
    router: Router,
    heart: Heart,
    mut stopped: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = tokio_util::task::TaskTracker::new();
    loop {
        heart.beat();
        heart.stall_here().await;
        let accepted = tokio::select! {
            accepted = accept(&socket) => accepted,
            () = tokio::time::sleep(crate::watchdog::BEAT) => continue,
            _ = stopped.wait_for(|&is_stopped| is_stopped) => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most likely: those in use must go first.
                tracing::warn!("an HTTP connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue; // Closed by dropping it.
        };
        let (router, stopped) = (router.clone(), stopped.clone());
        let acceptor = tls.as_ref().map(|tls| tls.acceptor());
        connections.spawn(async move {
            let _place = place;
            match (stream, acceptor) {
                (Stream::Unix(stream), _) => {
                    connection(stream, Origin::Socket, router, stopped).await;
                }
                (Stream::Tcp(stream), None) => {
                    connection(stream, Origin::Network, router, stopped).await;
                }
                (Stream::Tcp(stream), Some(acceptor)) => {
                    match timeout(HEADER_TIMEOUT, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            connection(stream, Origin::Network, router, stopped).await;
                        }
                        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
                        Err(_) => tracing::debug!("a TLS handshake took too long"),
                    }
                }
            }
        });
    }
    connections.close();
    connections.wait().await;
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(socket: &Socket) -> std::io::Result<Stream> {
    match socket {
        Socket::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
            // A socket that refuses the option still works.
            let _ = stream.set_nodelay(true);
            Stream::Tcp(stream)
        }),
        Socket::Unix { listener, .. } => listener.accept().await.map(|(it, _)| Stream::Unix(it)),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    origin: Origin,
    router: Router,
    mut stopped: watch::Receiver<bool>,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(origin);
        tower::Service::call(&mut router.clone(), request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => {
            if let Err(error) = result {
                tracing::debug!("an HTTP connection ended: {error}");
            }
            return;
        }
        _ = stopped.wait_for(|&is_stopped| is_stopped) => {}
    }
    connection.as_mut().graceful_shutdown();
    // A client that does not read keeps nothing up: the task is dropped with the runtime.
    let _ = connection.await;
}
