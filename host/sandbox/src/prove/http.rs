//! Attacks on where HTTP requests go, how many, how long and how large.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{
    ADDRESSES, Proof, ProveError,
    arena::{Arena, Attack, PATIENCE, WINDOW, at_most},
};
use crate::{grants::HttpGrant, host_api::Code, limit::Limit, outbound::Resolve, wasm::WasmLimits};

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

    fn url(&self, host: &str) -> String {
        format!("http://{host}:{}/", self.port)
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

/// A guest that sends requests to these addresses by the plugin API, once or for ever, and exits with
/// what became of the last: 0, or the number of the code without its sign.
fn requester(urls: &[String], is_endless: bool) -> String {
    let mut data = String::new();
    let mut calls = String::new();
    let mut at = 1024;
    for url in urls {
        let request = format!(r#"{{"method":"GET","url":"{url}"}}"#);
        let (quoted, length) = (request.replace('"', "\\22"), request.len());
        data += &format!("(data (i32.const {at}) \"{quoted}\")\n");
        calls += &format!(
            "(local.set $last (call $request (i32.const {at}) (i32.const {length}) (i32.const 0) (i32.const 0)))\n"
        );
        at += length;
    }
    let repeat = if is_endless { "(br $again)" } else { "" };
    format!(
        r#"(module
        (import "stockade:plugin/v1" "http_request" (func $request (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (memory (export "memory") 1)
        {data}
        (func (export "_start") (local $last i32)
          (loop $again {calls} {repeat})
          (if (i32.lt_s (local.get $last) (i32.const 0))
            (then (call $exit (i32.sub (i32.const 0) (local.get $last)))))))"#
    )
}

impl Attack {
    /// Whether the guest was given a code in place of its last response.
    fn was_refused(&self, code: Code) -> bool {
        self.exit_code() == Some(-code.number())
    }

    /// What became of the guest's last request.
    fn outcome(&self) -> String {
        let refused = Code::ALL.into_iter().find(|code| self.was_refused(*code));
        match (refused, self.exit_code()) {
            (Some(code), _) => code.name().to_owned(),
            (None, Some(0)) => "a response".to_owned(),
            (None, _) => self.end(),
        }
    }
}

impl Arena<'_> {
    /// Runs a guest that may reach `grants` and sends to `urls`.
    async fn request(
        &self,
        grants: Vec<HttpGrant>,
        urls: &[String],
        is_endless: bool,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let mut limits = WasmLimits {
            run_time: None,
            ..self.unhurried()
        };
        limits.outbound.grants = grants;
        self.attack(&requester(urls, is_endless), limits, time)
            .await
    }

    /// Of two hosts, as many can be reached as are granted.
    pub(super) async fn http_hosts(&self) -> Result<Proof, ProveError> {
        let hosts = [
            Host::start(Answer::Bytes(1)).await?,
            Host::start(Answer::Bytes(1)).await?,
        ];
        let granted = hosts.iter().take(self.applied.http_hosts);
        let grants = granted.map(|host| host.grant(LOCAL)).collect();
        let urls = hosts.each_ref().map(|host| host.url(LOCAL));
        self.request(grants, &urls, false, PATIENCE).await?;
        let reached = hosts.iter().filter(|host| host.visitors() > 0).count();
        Ok(Proof {
            what: Limit::HttpHosts.name(),
            declared: format!("{} of 2 hosts", self.declared.http_hosts),
            measured: format!("{reached} reached"),
            // One that is granted and not reached would prove nothing.
            holds: reached == self.declared.http_hosts,
        })
    }

    /// A name that was granted, and leads to this machine.
    pub(super) async fn http_addresses(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Bytes(1)).await?;
        let grants = vec![host.grant(NAME)];
        let attack = self
            .request(grants, &[host.url(NAME)], false, PATIENCE)
            .await?;
        Ok(Proof {
            what: ADDRESSES,
            declared: "not reached by a name".to_owned(),
            measured: attack.outcome(),
            holds: host.visitors() == 0 && attack.was_refused(Code::Denied),
        })
    }

    pub(super) async fn http_rate(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Bytes(1)).await?;
        let grants = vec![host.grant(LOCAL)];
        let attack = self
            .request(grants, &[host.url(LOCAL)], true, WINDOW)
            .await?;
        let declared = self.declared.limits.outbound.per_second;
        // Two seconds' worth may come at once.
        let beyond = (host.visitors() as f64 - 2.0 * f64::from(declared)).max(0.0);
        let rate = (beyond / attack.took.as_secs_f64()) as u64;
        let mut proof = at_most(Limit::HttpRequests.name(), declared.into(), rate);
        proof.holds &= host.visitors() > 0;
        Ok(proof)
    }

    pub(super) async fn http_time(&self) -> Result<Proof, ProveError> {
        let host = Host::start(Answer::Nothing).await?;
        let declared = self.declared.limits.outbound.timeout;
        let slack = Duration::from_secs(1);
        let grants = vec![host.grant(LOCAL)];
        let attack = self
            .request(grants, &[host.url(LOCAL)], false, declared + slack * 2)
            .await?;
        Ok(Proof {
            what: Limit::HttpTime.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.outcome()),
            holds: attack.was_refused(Code::Timeout) && attack.took <= declared + slack,
        })
    }

    pub(super) async fn http_body(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.outbound.body_bytes;
        let host = Host::start(Answer::Bytes(declared + 1)).await?;
        let grants = vec![host.grant(LOCAL)];
        let attack = self
            .request(grants, &[host.url(LOCAL)], false, PATIENCE)
            .await?;
        Ok(Proof {
            what: Limit::HttpBody.name(),
            declared: declared.to_string(),
            measured: format!("{} bytes: {}", declared + 1, attack.outcome()),
            holds: attack.was_refused(Code::Limit) && attack.usage.hits.of(Limit::HttpBody) == 1,
        })
    }
}
