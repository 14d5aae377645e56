//! Attacks on where HTTP requests go, how many, how long and how large.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{
    ADDRESSES, Proof, ProveError,
    arena::{Arena, WINDOW, at_most},
};
use crate::{
    grants::HttpGrant,
    limit::Limit,
    outbound::{Outbound, OutboundError, OutboundLimits, OutboundRequest, Resolve},
};

/// A name that leads to this machine.
const NAME: &str = "attacker.example";

/// Says that every name leads to this machine.
pub(super) struct LeadsHere;

impl Resolve for LeadsHere {
    fn resolve(&self, _host: &str) -> io::Result<Vec<IpAddr>> {
        Ok(vec![Ipv4Addr::LOCALHOST.into()])
    }
}

/// What a host does with a request.
#[derive(Clone, Copy)]
enum Answer {
    Nothing,
    Bytes(u64),
}

/// A host on this machine that counts who comes.
struct Host {
    port: u16,
    visitors: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Host {
    async fn start(answer: Answer) -> io::Result<Self> {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = socket.local_addr()?.port();
        let visitors = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&visitors);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = socket.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                connections.spawn(serve(stream, answer));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            port,
            visitors,
            _tasks: tasks,
        })
    }

    fn visitors(&self) -> u64 {
        self.visitors.load(Ordering::Relaxed)
    }

    fn grant(&self, host: &str) -> HttpGrant {
        HttpGrant {
            host: host.to_owned(),
            port: self.port,
            methods: vec!["GET".to_owned()],
        }
    }

    fn request(&self, host: &str) -> OutboundRequest {
        OutboundRequest {
            method: "GET".to_owned(),
            url: format!("http://{host}:{}/", self.port),
            ..OutboundRequest::default()
        }
    }
}

async fn serve(mut stream: TcpStream, answer: Answer) {
    let mut head = [0; 1024];
    let Answer::Bytes(mut left) = answer else {
        // Until the other side goes.
        while stream.read(&mut head).await.is_ok_and(|read| read > 0) {}
        return;
    };
    let _ = stream.read(&mut head).await;
    let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
    while left > 0 && sent.is_ok() {
        let some = left.min(64 << 10);
        sent = stream.write_all(&vec![b'x'; some as usize]).await;
        left -= some;
    }
}

const LOCAL: &str = "127.0.0.1";

impl Arena<'_> {
    /// The way out as it is applied, to other hosts.
    fn outbound(&self, grants: Vec<HttpGrant>) -> Outbound {
        let limits = OutboundLimits {
            grants,
            ..self.applied.limits.outbound.clone()
        };
        Outbound::new(self.runtime.network(), "attacker".into(), limits)
    }

    /// Of two hosts, as many can be reached as are granted.
    pub(super) async fn http_hosts(&self) -> Result<Proof, ProveError> {
        let hosts = [
            Host::start(Answer::Bytes(1)).await?,
            Host::start(Answer::Bytes(1)).await?,
        ];
        let granted = hosts.iter().take(self.applied.http_hosts);
        let outbound = self.outbound(granted.map(|host| host.grant(LOCAL)).collect());
        for host in &hosts {
            let _ = outbound.request(host.request(LOCAL)).await;
        }
        let reached = hosts.iter().filter(|host| host.visitors() > 0).count();
        Ok(Proof {
            what: Limit::HttpHosts.name(),
            declared: format!("{} of 2 hosts", self.declared.http_hosts),
            measured: format!("{reached} reached"),
            holds: reached <= self.declared.http_hosts,
        })
    }

    /// A name that was granted, and leads to this machine.
    pub(super) async fn http_addresses(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Bytes(1)).await?;
        let outbound = self.outbound(vec![host.grant(NAME)]);
        let outcome = outbound.request(host.request(NAME)).await;
        Ok(Proof {
            what: ADDRESSES,
            declared: "not reached by a name".to_owned(),
            measured: match &outcome {
                Ok(_) => "reached".to_owned(),
                Err(error) => error.to_string(),
            },
            holds: host.visitors() == 0 && matches!(outcome, Err(OutboundError::Denied(_))),
        })
    }

    pub(super) async fn http_rate(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Bytes(1)).await?;
        let outbound = self.outbound(vec![host.grant(LOCAL)]);
        let begun = Instant::now();
        while begun.elapsed() < WINDOW {
            let _ = outbound.request(host.request(LOCAL)).await;
            // One that is refused takes no time, and others want to run.
            tokio::task::yield_now().await;
        }
        let declared = self.declared.limits.outbound.per_second;
        // Two seconds' worth may come at once.
        let beyond = (host.visitors() as f64 - 2.0 * f64::from(declared)).max(0.0);
        let rate = (beyond / begun.elapsed().as_secs_f64()) as u64;
        Ok(at_most(Limit::HttpRequests.name(), declared.into(), rate))
    }

    pub(super) async fn http_time(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Nothing).await?;
        let outbound = self.outbound(vec![host.grant(LOCAL)]);
        let declared = self.declared.limits.outbound.timeout;
        let slack = Duration::from_secs(1);
        let begun = Instant::now();
        let request = outbound.request(host.request(LOCAL));
        let outcome = tokio::time::timeout(declared + slack * 2, request).await;
        let took = begun.elapsed();
        Ok(Proof {
            what: Limit::HttpTime.name(),
            declared: declared.as_millis().to_string(),
            measured: took.as_millis().to_string(),
            holds: matches!(outcome, Ok(Err(OutboundError::Timeout(_))))
                && took <= declared + slack,
        })
    }

    pub(super) async fn http_body(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.outbound.body_bytes;
        let host = Host::start(Answer::Bytes(declared + 1)).await?;
        let outbound = self.outbound(vec![host.grant(LOCAL)]);
        let outcome = outbound.request(host.request(LOCAL)).await;
        let limit = match &outcome {
            Err(OutboundError::Limit { limit, .. }) => Some(*limit),
            _ => None,
        };
        Ok(Proof {
            what: Limit::HttpBody.name(),
            declared: declared.to_string(),
            measured: match outcome {
                Ok(response) => format!("{} came through", response.body.len()),
                Err(error) => error.to_string(),
            },
            holds: limit == Some(Limit::HttpBody),
        })
    }
}
