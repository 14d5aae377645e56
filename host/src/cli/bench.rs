//! `stockade bench`: load on a running server, beside another one or a bare echo in turns.

pub(super) mod client;
mod echo;
mod floor;
mod plot;
mod workload;

use std::{io::Write as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

use self::{
    echo::Echo,
    workload::{Load, LoadClient, Samples, Workload},
};

/// Arguments of `stockade bench`.
#[derive(Debug, Args)]
pub struct BenchCommand {
    /// Server to load, `tcp://HOST:PORT` or `ipc:///PATH`; stores need it on this machine
    #[arg(long, value_name = "URL", default_value = "tcp://127.0.0.1:5555")]
    url: String,
    /// A second server that takes turns with the first; X says how many times the first is faster
    #[arg(long, value_name = "URL", conflicts_with = "compare_echo")]
    compare: Option<String>,
    /// Take turns with a bare ZeroMQ echo instead, for noop and chunk-size; for lookups, store and
    /// retrieve with the same requests to the echo, around the same copy
    #[arg(long)]
    compare_echo: bool,
    /// What to do, one after the other
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "noop,lookup-miss,lookup-hit,store,retrieve"
    )]
    workload: Vec<Workload>,
    /// Tokens of a prompt, for each of which lookups, stores and retrieves are measured
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N",
        default_value = "1024,8192,32768"
    )]
    tokens: Vec<usize>,
    /// Connections at once
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1")]
    clients: Vec<usize>,
    /// Requests in flight per connection, for noop, chunk-size and ping
    #[arg(long, value_name = "N", default_value_t = 1)]
    in_flight: usize,
    /// KV of one chunk in KiB
    #[arg(long, value_name = "KIB", default_value_t = 256)]
    chunk_kib: usize,
    /// Turns per server and measurement
    #[arg(long, value_name = "N", default_value_t = 4)]
    turns: u32,
    /// Seconds of one turn
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// Tenant that the load belongs to
    #[arg(long, value_name = "SALT", default_value = "")]
    cache_salt: String,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Directory for latency-over-tokens.svg and throughput-over-clients.svg, each where several
    /// sizes were measured
    #[arg(long, value_name = "DIRECTORY")]
    plot: Option<PathBuf>,
    /// Be the echo that `--compare-echo` starts
    #[arg(long, hide = true)]
    serve_echo: bool,
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Row {
    workload: &'static str,
    tokens: Option<usize>,
    clients: usize,
    in_flight: usize,
    url: String,
    rounds: u64,
    rounds_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    gib_per_second: Option<f64>,
    refused: u64,
    errors: u64,
    first_error: Option<String>,
    /// The compared server's median over this one's; above 1 this one is faster.
    p50_speedup: Option<f64>,
    /// This server's rate over the compared one's; above 1 this one is faster.
    rate_speedup: Option<f64>,
}

/// One measurement: a workload at one size.
#[derive(Debug, Clone, Copy)]
struct Cell {
    workload: Workload,
    tokens: Option<usize>,
    clients: usize,
}

impl BenchCommand {
    /// Loads, measures and prints.
    ///
    /// # Errors
    /// When a server cannot be reached, or any round ended with an error or a wrong byte.
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        if self.serve_echo {
            return runtime.block_on(echo::serve());
        }
        ensure!(
            self.seconds.is_finite() && (0.001..=86_400.0).contains(&self.seconds),
            "--seconds {}: give a number between 0.001 and 86400",
            self.seconds
        );
        ensure!(self.turns > 0, "--turns 0 measures nothing");
        ensure!(self.in_flight > 0, "--in-flight 0 sends nothing");
        ensure!(
            self.clients
                .iter()
                .all(|&clients| (1..=10_000).contains(&clients)),
            "--clients: give numbers between 1 and 10000"
        );
        ensure!(
            self.tokens
                .iter()
                .all(|&tokens| (1..=1 << 24).contains(&tokens)),
            "--tokens: give numbers between 1 and {}",
            1 << 24
        );
        runtime.block_on(self.measure())
    }

    async fn measure(&self) -> anyhow::Result<()> {
        let echo = if self.compare_echo {
            Some(Echo::start()?)
        } else {
            None
        };
        let mut urls = vec![self.url.as_str()];
        urls.extend(self.compare.as_deref());
        urls.extend(echo.as_ref().map(|echo| echo.url.as_str()));
        let cells = self.cells();
        let mut rows = Vec::new();
        for (number, cell) in cells.iter().enumerate() {
            let tokens = cell
                .tokens
                .map_or(String::new(), |tokens| format!(", {tokens} tokens"));
            // Progress is for people; its loss costs nothing.
            let _ = writeln!(
                std::io::stderr(),
                "{}/{}: {}{tokens}, {} clients, {} turns of {} s per server",
                number + 1,
                cells.len(),
                cell.workload.name(),
                cell.clients,
                self.turns,
                self.seconds
            );
            let has_pair = self.compare.is_some() || cell.workload.suits_echo();
            let urls = if has_pair { &urls[..] } else { &urls[..1] };
            rows.extend(self.cell(*cell, urls).await?);
        }
        if self.json {
            super::print(&format!("{}\n", serde_json::to_string_pretty(&rows)?))?;
        } else {
            super::print(&table(&rows))?;
        }
        if let Some(directory) = &self.plot {
            let written = plot::draw(directory, &rows).context("--plot")?;
            ensure!(
                !written.is_empty(),
                "--plot: there is no line to draw; give --tokens or --clients several sizes"
            );
        }
        let failed: u64 = rows.iter().map(|row| row.errors).sum();
        let first = rows.iter().find_map(|row| row.first_error.clone());
        ensure!(
            failed == 0,
            "{failed} rounds failed, the first with: {}",
            first.unwrap_or_default()
        );
        Ok(())
    }

    fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &workload in &self.workload {
            let sizes: Vec<_> = if workload.has_tokens() {
                self.tokens.iter().copied().map(Some).collect()
            } else {
                vec![None]
            };
            for tokens in sizes {
                cells.extend(self.clients.iter().map(|&clients| Cell {
                    workload,
                    tokens,
                    clients,
                }));
            }
        }
        cells
    }

    /// Measures one cell on every server, turn by turn, so that what else runs on the machine
    /// meets all of them alike.
    async fn cell(&self, cell: Cell, urls: &[&str]) -> anyhow::Result<Vec<Row>> {
        let mut fleets = Vec::new();
        let chunk_tokens = match cell.workload.has_floor() && self.compare_echo {
            true => Some(
                client::Client::connect(&self.url)
                    .await?
                    .chunk_size()
                    .await?,
            ),
            false => None,
        };
        for (place, url) in urls.iter().enumerate() {
            let mut fleet = Vec::new();
            for index in 0..cell.clients {
                let load = Load {
                    workload: cell.workload,
                    tokens: cell.tokens.unwrap_or(0),
                    chunk_bytes: self.chunk_kib.max(1) << 10,
                    in_flight: self.in_flight,
                    salt: self.cache_salt.clone(),
                    echo_chunk_tokens: chunk_tokens.filter(|_| place > 0),
                    seed: fastrand::u64(..1 << 62) & !0xffff | index as u64,
                };
                let client = LoadClient::prepare(url, load).await;
                fleet.push(client.with_context(|| format!("{} on {url}", cell.workload.name()))?);
            }
            fleets.push((*url, fleet, Samples::new()?, Duration::ZERO));
        }
        let turn = Duration::from_secs_f64(self.seconds);
        for _ in 0..self.turns {
            for (_, fleet, total, elapsed) in &mut fleets {
                let mut running = tokio::task::JoinSet::new();
                for mut client in fleet.drain(..) {
                    running.spawn(async move {
                        let samples = client.run(turn).await;
                        (client, samples)
                    });
                }
                let mut longest = Duration::ZERO;
                while let Some(ended) = running.join_next().await {
                    let (client, samples) = ended.context("a load client ended early")?;
                    let samples = samples?;
                    longest = longest.max(samples.elapsed);
                    total.add(&samples);
                    fleet.push(client);
                }
                *elapsed += longest;
            }
        }
        let mut rows: Vec<Row> = Vec::new();
        for (url, fleet, total, elapsed) in fleets {
            for client in fleet {
                client.finish().await?;
            }
            rows.push(self.row(cell, url, &total, elapsed));
        }
        if let [first, second] = &mut rows[..]
            && first.rounds > 0
            && second.rounds > 0
        {
            first.p50_speedup = Some(second.p50_us / first.p50_us);
            first.rate_speedup = Some(first.rounds_per_second / second.rounds_per_second);
        }
        Ok(rows)
    }

    fn row(&self, cell: Cell, url: &str, samples: &Samples, elapsed: Duration) -> Row {
        let quantile = |share| samples.latency.value_at_quantile(share) as f64 / 1e3;
        let per_client = samples.transfer.as_secs_f64() / cell.clients as f64;
        Row {
            workload: cell.workload.name(),
            tokens: cell.tokens,
            clients: cell.clients,
            in_flight: if cell.workload.is_control() {
                self.in_flight
            } else {
                1
            },
            url: url.to_owned(),
            rounds: samples.rounds,
            rounds_per_second: samples.rounds as f64 / elapsed.as_secs_f64().max(1e-9),
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            gib_per_second: (samples.bytes > 0)
                .then(|| samples.bytes as f64 / per_client.max(1e-9) / (1u64 << 30) as f64),
            refused: samples.refused,
            errors: samples.errors,
            first_error: samples.first_error.clone(),
            p50_speedup: None,
            rate_speedup: None,
        }
    }
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "WORKLOAD", "TOKENS", "CLIENTS", "SERVER", "ROUNDS/S", "P50 US", "P99 US", "P99.9 US",
        "GIB/S", "REFUSED", "ERRORS", "P50 X", "RATE X",
    ]);
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    for row in rows {
        table.add_row([
            row.workload.to_owned(),
            row.tokens
                .map_or("-".to_owned(), |tokens| tokens.to_string()),
            row.clients.to_string(),
            row.url.clone(),
            format!("{:.0}", row.rounds_per_second),
            format!("{:.0}", row.p50_us),
            format!("{:.0}", row.p99_us),
            format!("{:.0}", row.p999_us),
            optional(row.gib_per_second),
            row.refused.to_string(),
            row.errors.to_string(),
            optional(row.p50_speedup),
            optional(row.rate_speedup),
        ]);
    }
    format!("{}\n", table.trim_fmt())
}
