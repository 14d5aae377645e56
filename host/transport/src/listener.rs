//! Bound sockets that connections come through.

mod endpoint;

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

pub use endpoint::{Endpoint, EndpointError};

use crate::peer::{Credentials, Origin, PeerAddress};
use crate::zmtp::Mechanism;

/// Connections the kernel keeps for us between two accepts.
const BACKLOG: u32 = 1024;

/// Why a listener could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process has the port.
    #[error("another server listens on {0}: stop it or choose --port")]
    PortInUse(Endpoint),
    /// Another process answers at the path.
    #[error("another server listens on {0}: stop it or choose another path")]
    PathInUse(Endpoint),
    /// Something that is no socket lies at the path.
    #[error("{0} exists and is not a socket: remove it or choose another path")]
    NotASocket(Endpoint),
    /// The path does not fit into a socket address.
    #[error("the path of {0} is longer than the 107 bytes a socket may have: choose a shorter one")]
    PathTooLong(Endpoint),
    /// The port needs a privilege.
    #[error(
        "not permitted to listen on {0}: choose a --port from 1024 up, or a directory this user may write"
    )]
    NotPermitted(Endpoint),
    /// The host name has no address.
    #[error("the host of {endpoint} does not resolve: correct --host or the resolver")]
    Resolve {
        /// What was to be bound.
        endpoint: Endpoint,
        /// What the resolver said.
        source: io::Error,
    },
    /// The address belongs to no interface of this machine.
    #[error("{0} is no address of this machine: choose one of its own as --host, or *")]
    NotLocal(Endpoint),
    /// Anything else.
    #[error("could not listen on {endpoint}")]
    Io {
        /// What was to be bound.
        endpoint: Endpoint,
        /// What the system said.
        source: io::Error,
    },
}

/// How a listener presents itself.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// Its name, as [`Peer::listener`](crate::Peer::listener) returns it.
    pub name: Arc<str>,
    /// How its peers prove who they are.
    pub mechanism: Mechanism,
    /// Permission bits of an ipc socket file, at most 0660; the group and others
    /// get no more than this whatever the umask says. Default 0600.
    pub ipc_mode: u32,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            name: Arc::from("default"),
            mechanism: Mechanism::Null,
            ipc_mode: 0o600,
        }
    }
}

/// A bound socket; the kernel queues its connections until it is served.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    endpoint: Endpoint,
    options: ListenOptions,
    turns: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Ipc {
        listener: UnixListener,
        path: Arc<Path>,
        _file: SocketFile,
    },
}

/// A connection as accepted.
pub(crate) enum Accepted {
    Tcp(TcpStream),
    Ipc(UnixStream),
}

impl Listener {
    /// Binds an endpoint. Must be called within a tokio runtime.
    ///
    /// A name is resolved and its first IPv4 address taken, or else its first IPv6
    /// address. The file of an ipc socket whose server is dead is replaced.
    ///
    /// # Errors
    /// [`BindError`], which names the endpoint and the way out.
    pub async fn bind(endpoint: &Endpoint, options: ListenOptions) -> Result<Self, BindError> {
        let (socket, endpoint) = match endpoint {
            Endpoint::Tcp { host, port } => bind_tcp(endpoint, host, *port).await?,
            Endpoint::Ipc(path) => {
                let socket = bind_ipc(endpoint, path, options.ipc_mode).await?;
                (socket, endpoint.clone())
            }
        };
        Ok(Self {
            socket,
            endpoint,
            options,
            turns: Arc::default(),
        })
    }

    /// What it is bound to, with the port the system chose.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.options.name
    }

    /// Counts up at least four times a second while connections are accepted, so that
    /// somebody else can see that they are.
    pub fn turns(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.turns)
    }

    pub(crate) fn count_turn(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn mechanism(&self) -> &Mechanism {
        &self.options.mechanism
    }

    /// The next connection. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, Origin)> {
        let listener = Arc::clone(&self.options.name);
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, address) = socket.accept().await?;
                let origin = Origin {
                    listener,
                    since: Instant::now(),
                    address: PeerAddress::Tcp(address),
                    credentials: None,
                    own_address: stream.local_addr().ok(),
                };
                Ok((Accepted::Tcp(stream), origin))
            }
            Socket::Ipc {
                listener: socket,
                path,
                ..
            } => {
                let (stream, _) = socket.accept().await?;
                let credentials = stream.peer_cred().ok().map(|cred| Credentials {
                    pid: cred.pid(),
                    uid: cred.uid(),
                    gid: cred.gid(),
                });
                let origin = Origin {
                    listener,
                    since: Instant::now(),
                    address: PeerAddress::Ipc(Arc::clone(path)),
                    credentials,
                    own_address: None,
                };
                Ok((Accepted::Ipc(stream), origin))
            }
        }
    }
}

/// Small replies at once, and an end for peers whose machine vanished.
///
/// A socket that refuses an option still works, so failures are left alone.
pub(crate) fn tune_tcp(stream: &TcpStream, user_timeout: Duration) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let idle = user_timeout.max(Duration::from_secs(1));
    let _ = sockopt::set_tcp_keepidle(stream, idle);
    let _ = sockopt::set_tcp_keepintvl(stream, (idle / 4).max(Duration::from_secs(1)));
    let millis = u32::try_from(user_timeout.as_millis()).unwrap_or(u32::MAX);
    let _ = sockopt::set_tcp_user_timeout(stream, millis);
}

async fn bind_tcp(
    endpoint: &Endpoint,
    host: &str,
    port: u16,
) -> Result<(Socket, Endpoint), BindError> {
    let host = if host == "*" { "0.0.0.0" } else { host };
    let resolve = |source| BindError::Resolve {
        endpoint: endpoint.clone(),
        source,
    };
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port))
        .await
        .map_err(resolve)?
        .collect();
    let address = addresses
        .iter()
        .find(|address| address.is_ipv4())
        .or(addresses.first())
        .ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))?;
    let listen = || {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        // Only lets a restart bind over connections in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(*address)?;
        let listener = socket.listen(BACKLOG)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    let (listener, bound) = listen().map_err(|source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::PortInUse(endpoint.clone()),
        io::ErrorKind::PermissionDenied => BindError::NotPermitted(endpoint.clone()),
        io::ErrorKind::AddrNotAvailable => BindError::NotLocal(endpoint.clone()),
        _ => BindError::Io {
            endpoint: endpoint.clone(),
            source,
        },
    })?;
    let bound = Endpoint::Tcp {
        host: bound.ip().to_string(),
        port: bound.port(),
    };
    Ok((Socket::Tcp(listener), bound))
}

async fn bind_ipc(endpoint: &Endpoint, path: &Path, mode: u32) -> Result<Socket, BindError> {
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied => BindError::NotPermitted(endpoint.clone()),
        io::ErrorKind::AddrInUse => BindError::PathInUse(endpoint.clone()),
        _ => BindError::Io {
            endpoint: endpoint.clone(),
            source,
        },
    };
    let address =
        SocketAddrUnix::new(path).map_err(|_| BindError::PathTooLong(endpoint.clone()))?;
    remove_stale(endpoint, path).await?;
    let bind = || {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let mode = Mode::from_raw_mode(mode & 0o660);
        // Before the bind, so that there is no moment in which the file has the
        // permissions of the umask; after it, because the umask takes bits away.
        rustix::fs::fchmod(socket.as_fd(), mode)?;
        rustix::net::bind(&socket, &address)?;
        let file = SocketFile::new(path)?;
        rustix::fs::chmod(path, mode)?;
        rustix::net::listen(&socket, BACKLOG as i32)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Socket::Ipc {
            listener,
            path: path.into(),
            _file: file,
        })
    };
    bind().map_err(io)
}

/// Removes the socket file of a server that no longer runs.
async fn remove_stale(endpoint: &Endpoint, path: &Path) -> Result<(), BindError> {
    let io = |source| BindError::Io {
        endpoint: endpoint.clone(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io(source)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(endpoint.clone()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            match std::fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io(source)),
                _ => Ok(()),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(BindError::NotPermitted(endpoint.clone()))
        }
        // Answered, or too busy to answer (EAGAIN): somebody is there.
        _ => Err(BindError::PathInUse(endpoint.clone())),
    }
}

/// The file of an ipc socket, removed on drop unless another took its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Ok(now) = std::fs::symlink_metadata(&self.path)
            && (now.dev(), now.ino()) == (self.device, self.inode)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
