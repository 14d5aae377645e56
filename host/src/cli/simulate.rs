//! `stockade simulate`: the hit rates that policies and pool sizes would have given.

mod plot;
mod plugin;
mod trace_file;

use std::{
    io::Write as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde_json::json;
use stockade_cache::{
    PolicyKind,
    simulator::{Simulated, SimulatedPool, Trace, Workload, simulate},
};

use self::plugin::{PluginPolicy, PolicyChoice};
use super::print;

const GIB: f64 = (1_u64 << 30) as f64;
/// Time between two lines on stderr.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);
/// Parts of the trace's footprint that are tried when no size is given.
const DEFAULT_PARTS: [u64; 6] = [64, 32, 16, 8, 4, 2];
/// Most requests that are made up.
const MAX_GENERATED: usize = 10_000_000;

/// Arguments of `stockade simulate`.
#[derive(Debug, Args)]
pub struct SimulateCommand {
    /// LMCache's lookup-hash logs (.jsonl, or a directory of lookup_hashes_*.jsonl) or a trace of `--trace-level storage`
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "generate")]
    trace: Vec<PathBuf>,
    /// Replay made-up requests instead: zipf, scan or chat
    #[arg(long, value_name = "WORKLOAD", conflicts_with = "trace")]
    generate: Option<Workload>,
    /// Seed of the made-up requests; the same seed makes the same requests
    #[arg(long, default_value_t = 1, requires = "generate")]
    seed: u64,
    /// Number of made-up requests
    #[arg(long, default_value_t = 20_000, requires = "generate")]
    requests: usize,
    /// Only requests of this model
    #[arg(long)]
    model: Option<String>,
    /// Bytes of one chunk, for logs that do not say
    #[arg(long, value_name = "BYTES")]
    kv_bytes_per_chunk: Option<u64>,

    /// Policies to compare, separated by commas; plugin:FILE is LRU with a plugin that ranks at the watermark [default: all that evict]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    policy: Vec<PolicyChoice>,
    /// Sizes of the pool in GiB, separated by commas [default: parts of what the trace stores]
    #[arg(long, value_delimiter = ',', value_name = "GIB")]
    size_gb: Vec<f64>,
    /// Alignment of slots in bytes, a power of two
    #[arg(long, default_value_t = 4096)]
    l1_align_bytes: u64,
    /// Share of the pool in use at which eviction starts, as in `serve`; 1 for on demand only
    #[arg(long, default_value_t = 0.8)]
    eviction_trigger_watermark: f64,
    /// Share of the bytes in use that one eviction frees, as in `serve`
    #[arg(long, default_value_t = 0.2)]
    eviction_ratio: f64,

    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Draw the hit rates over the sizes into this SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Write the requests to this file, in the format of LMCache's lookup-hash logs
    #[arg(long, value_name = "FILE.jsonl")]
    write_trace: Option<PathBuf>,
}

/// One policy at one size.
#[derive(Debug, Clone)]
struct Run {
    policy: String,
    size_bytes: u64,
    result: Simulated,
    /// Rounds of eviction that a plugin gave no order for; `None` without a plugin.
    fallbacks: Option<u64>,
}

/// One pool to try.
struct Trial {
    policy: PolicyChoice,
    pool: SimulatedPool,
}

impl Trial {
    /// Replays the trace; a plugin runs for this pool alone.
    fn run(
        &self,
        trace: &Trace,
        progress: &mut dyn FnMut(usize),
    ) -> anyhow::Result<(Simulated, Option<u64>)> {
        let PolicyChoice::Plugin(file) = &self.policy else {
            return Ok((simulate(trace, &self.pool, progress)?, None));
        };
        let plugin = PluginPolicy::start(file)?;
        let ranker = Arc::clone(&plugin);
        let pool = SimulatedPool {
            ranker: Some(ranker as _),
            ..self.pool.clone()
        };
        let result = simulate(trace, &pool, progress)?;
        Ok((result, Some(plugin.fallbacks())))
    }
}

impl SimulateCommand {
    /// Replays, prints and draws.
    ///
    /// # Errors
    /// When a trace cannot be read, a flag makes no sense, or a file cannot be written.
    pub fn run(self) -> anyhow::Result<()> {
        self.check()?;
        let trace = self.requests()?;
        ensure!(
            !trace.is_empty(),
            "the trace has no request: check --trace and --model"
        );
        if let Some(path) = &self.write_trace {
            trace_file::write(path, &trace)
                .with_context(|| format!("--write-trace {} cannot be written", path.display()))?;
        }
        let footprint = trace.footprint_bytes();
        let runs = self.simulate(&trace, footprint)?;
        if let Some(path) = &self.plot {
            plot::draw(path, &self.title(), &runs)
                .with_context(|| format!("--plot {} cannot be drawn", path.display()))?;
        }
        match self.json {
            true => print(&format!("{:#}\n", self.json(&trace, footprint, &runs))),
            false => print(&self.table(&trace, footprint, &runs)),
        }
    }

    fn requests(&self) -> anyhow::Result<Trace> {
        match self.generate {
            Some(workload) => Ok(workload.generate(self.seed, self.requests)),
            None => trace_file::read(&self.trace, self.model.as_deref(), self.kv_bytes_per_chunk),
        }
    }

    fn title(&self) -> String {
        match self.generate {
            Some(workload) => format!("{}, seed {}", workload.name(), self.seed),
            None => {
                let names = self.trace.iter().filter_map(|path| path.file_name());
                let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
                names.join(", ")
            }
        }
    }

    /// Checks the flags, before anything takes time.
    fn check(&self) -> anyhow::Result<()> {
        for (flag, share) in [
            (
                "eviction-trigger-watermark",
                self.eviction_trigger_watermark,
            ),
            ("eviction-ratio", self.eviction_ratio),
        ] {
            ensure!(
                (0.0..=1.0).contains(&share),
                "--{flag} {share}: give a number between 0.0 and 1.0"
            );
        }
        let align = self.l1_align_bytes;
        ensure!(
            align.is_power_of_two() && align <= 1 << 30,
            "--l1-align-bytes {align}: give a power of two up to 1073741824"
        );
        for &gb in &self.size_gb {
            ensure!(
                gb.is_finite() && gb > 0.0 && gb <= f64::from(1 << 24),
                "--size-gb {gb}: give numbers of GiB above 0"
            );
        }
        ensure!(
            self.requests <= MAX_GENERATED,
            "--requests {}: give at most {MAX_GENERATED}",
            self.requests
        );
        Ok(())
    }

    /// The pools to try, policy by policy.
    fn trials(&self, footprint: u64) -> Vec<Trial> {
        let mut sizes = Vec::new();
        sizes.extend(self.size_gb.iter().map(|&gb| (gb * GIB) as u64));
        if sizes.is_empty() {
            sizes.extend(DEFAULT_PARTS.map(|part| (footprint / part).max(self.l1_align_bytes)));
        }
        sizes.sort_unstable();
        sizes.dedup();
        let evicting = PolicyKind::ALL
            .into_iter()
            .filter(|&it| it != PolicyKind::Noop);
        let policies = match self.policy.is_empty() {
            true => evicting.map(PolicyChoice::Native).collect(),
            false => self.policy.clone(),
        };
        let trials = policies.iter().flat_map(|policy| {
            let kind = match policy {
                PolicyChoice::Native(kind) => *kind,
                PolicyChoice::Plugin(_) => PolicyKind::Lru,
            };
            sizes.iter().map(move |&size| Trial {
                policy: policy.clone(),
                pool: SimulatedPool {
                    align_bytes: self.l1_align_bytes,
                    trigger_watermark: self.eviction_trigger_watermark,
                    eviction_ratio: self.eviction_ratio,
                    ..SimulatedPool::new(size, kind)
                },
            })
        });
        trials.collect()
    }

    /// Tries all pools, as many at once as there are processors.
    fn simulate(&self, trace: &Trace, footprint: u64) -> anyhow::Result<Vec<Run>> {
        let pools = self.trials(footprint);
        let (next, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let (sender, receiver) = mpsc::channel();
        let mut runs: Vec<Option<Run>> = vec![None; pools.len()];
        std::thread::scope(|scope| -> anyhow::Result<()> {
            for _ in 0..workers.min(pools.len()) {
                let (sender, pools, next, served) = (sender.clone(), &pools, &next, &served);
                scope.spawn(move || {
                    loop {
                        let nth = next.fetch_add(1, Ordering::Relaxed);
                        let Some(pool) = pools.get(nth) else { return };
                        let mut before = 0;
                        let mut progress = |done: usize| {
                            served.fetch_add(done - before, Ordering::Relaxed);
                            before = done;
                        };
                        let result = pool.run(trace, &mut progress);
                        // The receiver is gone only when another run has failed.
                        let _ = sender.send((nth, result));
                    }
                });
            }
            drop(sender);
            let all = pools.len() * trace.len();
            loop {
                match receiver.recv_timeout(PROGRESS_INTERVAL) {
                    Ok((nth, result)) => {
                        if let (Some(run), Some(pool)) = (runs.get_mut(nth), pools.get(nth)) {
                            let (result, fallbacks) = result?;
                            *run = Some(Run {
                                policy: pool.policy.name(),
                                size_bytes: pool.pool.capacity_bytes,
                                result,
                                fallbacks,
                            });
                        }
                    }
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        let percent = served.load(Ordering::Relaxed) * 100 / all.max(1);
                        let _ = writeln!(std::io::stderr(), "simulating: {percent} % done");
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        })?;
        let runs: Vec<Run> = runs.into_iter().flatten().collect();
        if runs.len() != pools.len() {
            bail!("a simulation ended without a result");
        }
        Ok(runs)
    }

    fn table(&self, trace: &Trace, footprint: u64, runs: &[Run]) -> String {
        let mut sizes: Vec<u64> = runs.iter().map(|run| run.size_bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let mut policies: Vec<String> = runs.iter().map(|run| run.policy.clone()).collect();
        policies.dedup();
        let mut table = Table::new();
        table.load_style(NOTHING);
        let mut header = vec!["POOL GIB".to_owned(), "OF ALL".to_owned()];
        header.extend(policies.iter().cloned());
        table.set_header(header);
        for size in sizes {
            let mut row = vec![
                format!("{:.2}", size as f64 / GIB),
                format!("{:.1} %", 100.0 * size as f64 / footprint.max(1) as f64),
            ];
            row.extend(policies.iter().map(|policy| {
                let run = runs
                    .iter()
                    .find(|run| run.policy == *policy && run.size_bytes == size);
                run.map_or_else(String::new, |run| {
                    format!("{:.2} %", 100.0 * run.result.token_hit_rate())
                })
            }));
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let rows = table.trim_fmt();
        format!(
            "{}: {} requests, {:.2} GiB of different objects; hit rates in tokens\n{rows}\n",
            self.title(),
            trace.len(),
            footprint as f64 / GIB,
        )
    }

    fn json(&self, trace: &Trace, footprint: u64, runs: &[Run]) -> serde_json::Value {
        let results: Vec<_> = runs
            .iter()
            .map(|run| {
                json!({
                    "policy": run.policy,
                    "size_bytes": run.size_bytes,
                    "token_hit_rate": run.result.token_hit_rate(),
                    "lookups": run.result.lookups,
                    "tokens": run.result.tokens,
                    "hit_tokens": run.result.hit_tokens,
                    "evicted_objects": run.result.evicted_objects,
                    "refused_objects": run.result.refused_objects,
                    "rank_fallbacks": run.fallbacks,
                })
            })
            .collect();
        json!({
            "trace": self.title(),
            "requests": trace.len(),
            "footprint_bytes": footprint,
            "eviction_trigger_watermark": self.eviction_trigger_watermark,
            "eviction_ratio": self.eviction_ratio,
            "results": results,
        })
    }
}
