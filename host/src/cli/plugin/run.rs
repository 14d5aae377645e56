//! `stockade plugin run` and `bench`: a plugin in the sandbox of this process.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use stockade_sandbox::{PluginState, RankFailure, RankRequest, Services, host_api::RankCandidate};

use super::{
    super::{print, print_json, remote::Remote},
    live::LiveCache,
    local::Local,
    trial::{self, Trial},
};

/// Time between two looks at the log.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Calls before those that are measured.
const WARM_UP: usize = 100;

/// How often, and after which time, a plugin is asked again that is still busy with the last time.
const BUSY_TRIES: usize = 10_000;
const BUSY_PAUSE: Duration = Duration::from_micros(100);

/// Arguments of `stockade plugin run`.
#[derive(Debug, Args)]
pub(super) struct Run {
    /// A .wasm or .wat file, its manifest beside it
    file: PathBuf,
    /// Settings of plugins, a JSON object, as `serve --runtime-plugin-config`
    #[arg(long, value_name = "JSON", default_value = "{}")]
    settings: String,
    /// Beside the cache of the server that --server names: its settings, statistics, keys and
    /// events. The plugin changes nothing there
    #[arg(long)]
    live: bool,
    /// End it after so many seconds; without it, at Ctrl-C or when it ends
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    #[command(flatten)]
    local: Local,
}

/// Arguments of `stockade plugin bench`.
#[derive(Debug, Args)]
pub(super) struct Bench {
    /// A .wasm or .wat file, its manifest beside it
    file: PathBuf,
    /// Call this method, such as my_plugin.lookups
    #[arg(long, conflicts_with = "rank", required_unless_present = "rank")]
    method: Option<String>,
    /// Bytes of the payload of a call
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    payload: usize,
    /// Have it rank so many candidates instead
    #[arg(long, value_name = "CANDIDATES")]
    rank: Option<u32>,
    /// Seconds to measure
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Settings of plugins, a JSON object, as `serve --runtime-plugin-config`
    #[arg(long, value_name = "JSON", default_value = "{}")]
    settings: String,
    #[command(flatten)]
    local: Local,
}

fn object(text: &str) -> anyhow::Result<Map<String, Value>> {
    match serde_json::from_str(text).context("--settings is not JSON")? {
        Value::Object(object) => Ok(object),
        _ => bail!("--settings: give a JSON object, for example '{{\"my_plugin.seconds\": 5}}'"),
    }
}

fn duration(seconds: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .with_context(|| format!("--seconds {seconds}: give a number of seconds, 0 or more"))
}

impl Run {
    /// Runs the plugin beside a made-up cache that is empty, or a server's, and prints what it
    /// logs.
    ///
    /// # Errors
    /// When it cannot be started, or ends badly, or the server is lost.
    pub(super) fn run(&self, remote: &Remote) -> anyhow::Result<()> {
        let is_json = remote.is_json();
        let settings = object(&self.settings)?;
        let time = self.seconds.map(duration).transpose()?;
        let live = match self.live {
            true => {
                let name = self.file.file_stem().context("the file has no name")?;
                Some(LiveCache::connect(remote, &name.to_string_lossy())?)
            }
            false => None,
        };
        let runtime = trial::runtime()?;
        let outcome = runtime.block_on(async {
            let mut trial = match &live {
                Some((cache, config)) => {
                    let services = Services {
                        host: Some(Arc::clone(cache) as _),
                        ..Services::default()
                    };
                    let config = config.clone();
                    Trial::beside(&self.file, &self.local, settings, config, services).await?
                }
                None => Trial::start(&self.file, &self.local, settings).await?,
            };
            let until = time.map(|time| Instant::now() + time);
            loop {
                show(&mut trial, is_json)?;
                if let Some(why) = live.as_ref().and_then(|(cache, _)| cache.lost()) {
                    bail!("{} gives no more events: {why}", remote.server());
                }
                let is_over = until.is_some_and(|until| Instant::now() >= until);
                if is_over || !trial.is_running() {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                    _ = tokio::signal::ctrl_c() => break,
                }
            }
            let before = trial.status()?;
            let status = match before.state {
                PluginState::Running => trial.end().await?,
                _ => before,
            };
            show(&mut trial, is_json)?;
            let end = status
                .last_end
                .unwrap_or_else(|| "it was told to end".to_owned());
            match status.state {
                PluginState::Exited | PluginState::Stopped => Ok(end),
                _ => bail!("{end}"),
            }
        });
        runtime.shutdown_background();
        let end = outcome?;
        match is_json {
            true => print_json(&json!({"end": end})),
            false => print(&format!("-- {end}\n")),
        }
    }
}

fn show(trial: &mut Trial, is_json: bool) -> anyhow::Result<()> {
    for line in trial.take_lines()? {
        let level = format!("{:?}", line.level).to_lowercase();
        match is_json {
            true => print(&format!(
                "{}\n",
                json!({"level": level, "text": &*line.text})
            ))?,
            false => print(&format!("{level:<5} {}\n", line.text))?,
        }
    }
    Ok(())
}

impl Bench {
    /// Measures calls or rankings, one at a time, from the server to the plugin and back.
    ///
    /// # Errors
    /// When the plugin cannot be started, or one of them fails.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let settings = object(&self.settings)?;
        let time = duration(self.seconds)?;
        let runtime = trial::runtime()?;
        let outcome = runtime.block_on(async {
            let mut trial = Trial::start(&self.file, &self.local, settings).await?;
            ensure!(
                trial.is_running(),
                "it does not run: {}",
                trial.status()?.last_end.unwrap_or_default()
            );
            let mut nanoseconds = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
            let before = trial.status()?.cpu_time.unwrap_or_default();
            let mut began = Instant::now();
            let mut calls = 0_u64;
            for nth in 0_usize.. {
                if nth == WARM_UP {
                    began = Instant::now();
                    nanoseconds.reset();
                    calls = 0;
                }
                let spent = match self.once(&trial).await {
                    Ok(spent) => spent,
                    Err(error) => {
                        let said = trial.take_lines()?;
                        let said = said.iter().map(|line| format!("\n  | {}", line.text));
                        bail!("{error:#}; the plugin logged:{}", said.collect::<String>());
                    }
                };
                let spent = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
                nanoseconds.saturating_record(spent);
                calls += 1;
                if nth >= WARM_UP && began.elapsed() >= time {
                    break;
                }
            }
            let elapsed = began.elapsed();
            // Known of a run only while it goes on.
            let status = trial.status()?;
            trial.end().await?;
            let guest = status.cpu_time.unwrap_or_default().saturating_sub(before);
            Ok::<_, anyhow::Error>((nanoseconds, calls, elapsed, guest))
        });
        runtime.shutdown_background();
        let (nanoseconds, calls, elapsed, guest) = outcome?;
        let rate = calls as f64 / elapsed.as_secs_f64();
        let quantile = |share| nanoseconds.value_at_quantile(share);
        if is_json {
            return print_json(&json!({
                "calls": calls,
                "seconds": elapsed.as_secs_f64(),
                "calls_per_second": rate,
                "nanoseconds": {
                    "mean": nanoseconds.mean(),
                    "p50": quantile(0.5),
                    "p99": quantile(0.99),
                    "max": nanoseconds.max(),
                },
                "guest_cpu_seconds": guest.as_secs_f64(),
            }));
        }
        print(&format!(
            "{calls} in {:.1} s, one at a time: {rate:.0} a second; p50 {} ns, p99 {} ns, max {} ns; processor time of the plugin {:.3} s\n",
            elapsed.as_secs_f64(),
            quantile(0.5),
            quantile(0.99),
            nanoseconds.max(),
            guest.as_secs_f64(),
        ))
    }

    /// One call or ranking, and the time that it took.
    async fn once(&self, trial: &Trial) -> anyhow::Result<Duration> {
        let supervisor = trial.supervisor();
        if let Some(method) = &self.method {
            let payload = vec![b'x'; self.payload];
            let start = Instant::now();
            supervisor
                .call(method, "", "http", payload.into())
                .await
                .map_err(|error| anyhow::anyhow!("{method} failed: {error}"))?;
            return Ok(start.elapsed());
        }
        let count = self.rank.unwrap_or_default();
        for _ in 0..BUSY_TRIES {
            let request = RankRequest {
                tenant: Arc::from("default"),
                bytes_wanted: 4096 * u64::from(count) / 5,
                count: usize::try_from(count)?,
                candidates: Box::new(move || (0..count).map(candidate).collect()),
            };
            let (supervisor, name) = (Arc::clone(supervisor), Arc::clone(&trial.name));
            let ranked = tokio::task::spawn_blocking(move || {
                let start = Instant::now();
                supervisor.rank(&name, request).map(|_| start.elapsed())
            });
            match ranked.await? {
                Ok(spent) => return Ok(spent),
                // Its reply is out before its handler has returned.
                Err(RankFailure::Busy) => tokio::time::sleep(BUSY_PAUSE).await,
                Err(failure) => bail!("the ranking failed: {}", failure.name()),
            }
        }
        bail!("the ranking failed: it stays busy")
    }
}

/// A made-up candidate.
fn candidate(id: u32) -> RankCandidate {
    RankCandidate {
        id,
        key: format!("model@00000001@0@{id:064x}"),
        salt: String::new(),
        model: "model".to_owned(),
        bytes: 4096,
        chunk: Some(id % 64),
        idle_ms: u64::from(id) * 37 % 10_007,
        age_ms: 20_000,
        uses: id % 5,
        request: Some(format!("request-{}", id / 64)),
    }
}
