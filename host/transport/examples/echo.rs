//! Compares this crate's server with the `zeromq` crate's ROUTER, both as an echo.
//!
//! ```text
//! cargo run --release -p stockade-transport --example echo -- compare [CLIENTS IN_FLIGHT PAYLOAD_BYTES]
//! ```
//!
//! runs three servers and a load generator as processes of their own: `own` (this
//! crate), `zeromq` (a bare ROUTER) and `guard` (the bare ROUTER behind a proxy
//! that only copies bytes, the least that a guard in front of it could do). They
//! take turns, round by round, so that a busy machine slows all of them; the
//! ratios are to be read, not the rates. The parts can be run alone: `serve own`,
//! `serve zeromq`, `proxy ADDRESS`, `load ADDRESS CLIENTS IN_FLIGHT BYTES SECONDS`.
//! `THREADS=2` gives servers two runtime workers instead of a current-thread runtime.

use std::env;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stockade_transport::{
    Config, Handler, ListenOptions, Listener, Message, Outcome, Peer, Server,
};
use tokio::net::{TcpListener, TcpStream};
use zeromq::{DealerSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Clients, requests in flight per client, payload bytes.
type Setting = (usize, usize, usize);

const SETTINGS: [Setting; 5] = [
    (1, 1, 0),
    (16, 1, 0),
    (16, 16, 0),
    (1, 1, 32_000),
    (1, 1, 520_000),
];
const ROUNDS: usize = 5;
const SECONDS_PER_RUN: f64 = 1.5;

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["serve", "own"] => runtime()?.block_on(serve_own()),
        ["serve", "zeromq"] => runtime()?.block_on(serve_zeromq()),
        ["proxy", target] => runtime()?.block_on(proxy(target)),
        ["load", address, clients, in_flight, payload, seconds] => {
            let setting = (clients.parse()?, in_flight.parse()?, payload.parse()?);
            // The generator is not what is measured: one thread leaves the rest to the server.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(load(address, setting, seconds.parse()?))
        }
        ["compare"] => SETTINGS.into_iter().try_for_each(compare),
        ["compare", clients, in_flight, payload] => {
            compare((clients.parse()?, in_flight.parse()?, payload.parse()?))
        }
        _ => Err("arguments: compare | serve own|zeromq | proxy ADDRESS | load ..".into()),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let threads = env::var("THREADS").map_or(Ok(1), |threads| threads.parse())?;
    let mut builder = if threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    Ok(builder.enable_all().build()?)
}

struct Echo;

impl Handler for Echo {
    fn message(&self, _: &Arc<Peer>, message: Message) -> Outcome {
        match message {
            Message::Frames(frames) => Outcome::Reply(frames),
            Message::TooLarge { .. } => Outcome::Nothing,
        }
    }
}

/// Tells the parent where we listen.
fn announce(endpoint: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{endpoint}")?;
    Ok(())
}

async fn serve_own() -> Result<()> {
    let endpoint = "tcp://127.0.0.1:0".parse()?;
    let listener = Listener::bind(&endpoint, ListenOptions::default()).await?;
    announce(&listener.endpoint().to_string())?;
    let server = Server::new(Echo, Config::default())?;
    // A task, as the accept loop is: the main task of a runtime is polled less well.
    tokio::spawn(server.serve(vec![listener], std::future::pending())).await?;
    Ok(())
}

async fn serve_zeromq() -> Result<()> {
    let mut router = RouterSocket::new();
    announce(&router.bind("tcp://127.0.0.1:0").await?.to_string())?;
    let echo = async move {
        loop {
            if let Ok(message) = router.recv().await {
                // A client that left between its request and this reply is no error.
                let _ = router.send(message).await;
            }
        }
    };
    tokio::spawn(echo).await?;
    Ok(())
}

async fn proxy(target: &str) -> Result<()> {
    let target = target.trim_start_matches("tcp://").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    announce(&format!("tcp://{}", listener.local_addr()?))?;
    loop {
        let (mut client, _) = listener.accept().await?;
        let mut server = TcpStream::connect(&target).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        tokio::spawn(async move {
            let size = 64 << 10;
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, size, size)
                .await;
        });
    }
}

async fn load(address: &str, (clients, in_flight, payload): Setting, seconds: f64) -> Result<()> {
    let mut sockets = Vec::new();
    for _ in 0..clients {
        let mut dealer = DealerSocket::new();
        dealer.connect(address).await?;
        // The server may learn of the peer a little later than we do.
        dealer.send(request(payload)?).await?;
        dealer.recv().await?;
        sockets.push(dealer);
    }
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(seconds);
    let tasks: Vec<_> = sockets
        .into_iter()
        .map(|mut dealer| {
            tokio::spawn(async move {
                for _ in 0..in_flight {
                    dealer.send(request(payload)?).await?;
                }
                let mut answered = 0_u64;
                while Instant::now() < end {
                    dealer.recv().await?;
                    dealer.send(request(payload)?).await?;
                    answered += 1;
                }
                Result::Ok(answered)
            })
        })
        .collect();
    let mut answered = 0;
    for task in tasks {
        answered += task.await??;
    }
    let rate = answered as f64 / begun.elapsed().as_secs_f64();
    writeln!(std::io::stdout(), "{answered} {rate}")?;
    Ok(())
}

/// `[uid][operation]` as a cache client sends it, and a payload if there is one.
fn request(payload: usize) -> Result<ZmqMessage> {
    let mut frames = vec![
        Bytes::from_static(b"\xce\0\0\0\x01"),
        Bytes::from_static(b"\x18"),
    ];
    if payload > 0 {
        frames.push(Bytes::from(vec![7; payload]));
    }
    ZmqMessage::try_from(frames).map_err(|_| "no frames".into())
}

/// A child of this same program, killed on drop.
struct Process {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Process {
    fn spawn(args: &[&str]) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self { child, output })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// CPU seconds used so far, to a hundredth.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the command in parentheses: user and system time are fields 14 and 15.
        let fields = stat.rsplit_once(')').ok_or("no stat")?.1;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn compare(setting: Setting) -> Result<()> {
    let mut own = Process::spawn(&["serve", "own"])?;
    let mut zeromq = Process::spawn(&["serve", "zeromq"])?;
    let (own_at, zeromq_at) = (own.line()?, zeromq.line()?);
    let mut guard = Process::spawn(&["proxy", &zeromq_at])?;
    let guard_at = guard.line()?;

    let (clients, in_flight, payload) = setting;
    let numbers = [clients, in_flight, payload].map(|number| number.to_string());
    let seconds = SECONDS_PER_RUN.to_string();
    let mut rates = [const { Vec::new() }; 3];
    let mut cpu = [(0.0, 0.0); 3];
    for _ in 0..ROUNDS {
        for (at, address) in [&own_at, &zeromq_at, &guard_at].into_iter().enumerate() {
            let used = [own.cpu()?, zeromq.cpu()?, guard.cpu()?];
            let [clients, in_flight, payload] = &numbers;
            let mut load =
                Process::spawn(&["load", address, clients, in_flight, payload, &seconds])?;
            let line = load.line()?;
            let name = ["own", "zeromq", "guard"][at];
            let (answered, rate) = line
                .split_once(' ')
                .ok_or_else(|| format!("the load generator failed against {name}"))?;
            rates[at].push(rate.parse::<f64>()?);
            let now = [own.cpu()?, zeromq.cpu()?, guard.cpu()?];
            let spent: f64 = now.iter().zip(used).map(|(now, used)| now - used).sum();
            cpu[at].0 += spent;
            cpu[at].1 += answered.parse::<f64>()?;
        }
    }
    let ratio = |of: usize, to: usize| {
        let ratios = rates[of].iter().zip(&rates[to]).map(|(of, to)| of / to);
        median(ratios.collect())
    };
    let [own, zeromq, guard] = [0, 1, 2].map(|at| {
        let per_request = 1e6 * cpu[at].0 / cpu[at].1;
        format!("{:.1}k, {per_request:.1}", median(rates[at].clone()) / 1e3)
    });
    writeln!(
        std::io::stdout(),
        "| {clients} | {in_flight} | {payload} | {own} | {zeromq} | {guard} | {:.2} | {:.2} |",
        ratio(0, 1),
        ratio(2, 1),
    )?;
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
