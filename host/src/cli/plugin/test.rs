//! `stockade plugin test`: what a plugin is sent, and what must come of it, as a file.
//!
//! The plugin runs in the real sandbox, with the grants of its manifest, beside a made-up cache.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use stockade_sandbox::{
    PluginState, RankRequest,
    host_api::{CacheEvent, CacheStats, KeyFacts, RankCandidate, TenantStats},
};

use super::{
    super::{print, print_json},
    local::Local,
    trial::{self, Trial},
};

/// Time that a step has for what it expects, where it does not say.
const STEP_MS: u64 = 10_000;

/// Time to see that something does not happen.
const SETTLE: Duration = Duration::from_millis(50);

/// Arguments of `stockade plugin test`.
#[derive(Debug, Args)]
pub(super) struct Test {
    /// The test [default: the only *.test.toml here]
    file: Option<PathBuf>,
    /// The module [default: the test's name in dist/ beside it, or beside it]
    #[arg(long, value_name = "FILE")]
    module: Option<PathBuf>,
    #[command(flatten)]
    local: Local,
}

/// A test file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Script {
    /// As `--runtime-plugin-config`.
    #[serde(default)]
    settings: toml::Table,
    /// What the made-up cache holds.
    #[serde(default)]
    cache: Cache,
    step: Vec<Step>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cache {
    stats: Stats,
    keys: Vec<Key>,
    /// What a prefetch finds; without it there is no second tier.
    second_tier: Option<Vec<Key>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Stats {
    capacity_bytes: u64,
    used_bytes: u64,
    objects: u64,
    lookups: u64,
    lookup_tokens: u64,
    hit_tokens: u64,
    stored_chunks: u64,
    retrieved_chunks: u64,
    evicted_objects: u64,
    tenants: Vec<Tenant>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tenant {
    name: String,
    used_bytes: u64,
    floor_bytes: u64,
    cap_bytes: Option<u64>,
    objects: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Key {
    key: String,
    bytes: u64,
    idle_ms: Option<u64>,
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sent {
    /// Nothing: the start, or a timer, is what the step waits for.
    Nothing,
    /// Events.
    Events,
    /// A call.
    Call,
    /// Candidates for eviction.
    Rank,
    /// The request to end.
    Shutdown,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    send: Sent,
    /// For `events`.
    #[serde(default)]
    events: Vec<Value>,
    /// For `events`: a file of them, a JSON object on each line, from the test's folder.
    #[serde(default)]
    events_file: Option<PathBuf>,
    /// For `call`.
    #[serde(default)]
    method: String,
    #[serde(default)]
    body: String,
    /// For `rank`.
    #[serde(default)]
    candidates: Vec<Candidate>,
    #[serde(default)]
    bytes_wanted: u64,

    /// Each must be in a line of the log, in this order; other lines may be between them.
    #[serde(default)]
    logs: Vec<String>,
    /// None of these may be in a line of the log.
    #[serde(default)]
    no_logs: Vec<String>,
    /// Exactly what the plugin asked of the cache in this step.
    #[serde(default)]
    calls: Option<Vec<String>>,
    /// Exactly what it did with its state, such as `state_set counter`.
    #[serde(default)]
    state: Option<Vec<String>>,
    /// Exactly the requests that it sent, with what became of them, such as
    /// `GET http://host/path 200` or `GET http://host/path denied`.
    #[serde(default)]
    http: Option<Vec<String>>,
    /// Values of the plugin's metrics after the step.
    #[serde(default)]
    metrics: Map<String, Value>,
    /// The reply to `call`.
    #[serde(default)]
    reply: Option<String>,
    /// What the reason of a `call` or `rank` that fails must contain.
    #[serde(default)]
    fails: Option<String>,
    /// The ids that the order of `rank` must begin with.
    #[serde(default)]
    order: Option<Vec<u32>>,
    /// Milliseconds that the step may take.
    #[serde(default = "step_ms")]
    within_ms: u64,
}

fn step_ms() -> u64 {
    STEP_MS
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Candidate {
    key: String,
    salt: String,
    model: String,
    bytes: u64,
    chunk: Option<u32>,
    idle_ms: u64,
    age_ms: u64,
    uses: u32,
    request: Option<String>,
}

/// An event as a test or a file of events has it: the shape in which plugins get them, and what is left
/// out is empty.
pub(super) fn event(value: &Value) -> anyhow::Result<CacheEvent> {
    let object = value.as_object().context("an event is no table")?;
    let text = |name: &str| {
        let found = object.get(name).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let number = |name: &str| object.get(name).and_then(Value::as_u64).unwrap_or_default();
    let (salt, model, key) = (text("salt"), text("model"), text("key"));
    let (bytes, request) = (number("bytes"), text("request"));
    let (event, known): (CacheEvent, &[&str]) = match &*text("type") {
        "stored" => (
            CacheEvent::Stored {
                key,
                salt,
                model,
                bytes,
                request: Some(request).filter(|it| !it.is_empty()),
                tokens: number("tokens"),
            },
            &["key", "bytes", "request", "tokens"],
        ),
        "retrieved" => (
            CacheEvent::Retrieved {
                key,
                salt,
                model,
                bytes,
                request,
            },
            &["key", "bytes", "request"],
        ),
        "evicted" => (
            CacheEvent::Evicted {
                key,
                salt,
                model,
                bytes,
                why: text("why"),
            },
            &["key", "bytes", "why"],
        ),
        "lookup" => (
            CacheEvent::Lookup {
                salt,
                model,
                request,
                tokens: number("tokens"),
                hit_tokens: number("hit_tokens"),
            },
            &["request", "tokens", "hit_tokens"],
        ),
        "session_end" => (
            CacheEvent::SessionEnd {
                salt,
                model,
                request,
            },
            &["request"],
        ),
        other => bail!(
            "an event has type {other:?}: give stored, retrieved, evicted, lookup or session_end"
        ),
    };
    for name in object.keys() {
        let is_known = ["type", "salt", "model"].contains(&&**name) || known.contains(&&**name);
        ensure!(
            is_known,
            "an event of type {:?} has no {name:?}",
            text("type")
        );
    }
    Ok(event)
}

impl Test {
    /// Runs the test.
    ///
    /// # Errors
    /// When a step does not end as it says; the error names it.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => only_test(Path::new("."))?,
        };
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let script: Script = toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("{}: {}", file.display(), error.to_string().trim_end())
        })?;
        let module = match &self.module {
            Some(module) => module.clone(),
            None => module_of(&file)?,
        };
        let runtime = trial::runtime()?;
        let outcome = runtime.block_on(play(&module, &self.local, &script, &file, is_json));
        runtime.shutdown_background();
        let steps = outcome?;
        if is_json {
            return print_json(&json!({
                "test": file.to_string_lossy(),
                "module": module.to_string_lossy(),
                "steps": steps,
            }));
        }
        print(&format!(
            "{}: {} steps passed\n",
            file.display(),
            steps.len()
        ))
    }
}

fn only_test(directory: &Path) -> anyhow::Result<PathBuf> {
    let mut tests: Vec<PathBuf> = fs::read_dir(directory)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(".test.toml"))
        .collect();
    match (tests.pop(), tests.is_empty()) {
        (Some(test), true) => Ok(test),
        (None, _) => bail!("there is no *.test.toml here: name the test"),
        _ => bail!("there are several *.test.toml here: name one"),
    }
}

fn module_of(test: &Path) -> anyhow::Result<PathBuf> {
    let name = test
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_suffix(".test.toml"))
        .context("the test is not called NAME.test.toml: give --module")?;
    let folder = test.parent().unwrap_or_else(|| Path::new(""));
    let module = format!("{name}.wasm");
    let places = [folder.join("dist").join(&module), folder.join(&module)];
    let found = places.iter().find(|path| path.is_file());
    found.cloned().with_context(|| {
        format!(
            "there is no {}: run `stockade plugin build`, or give --module",
            places[0].display()
        )
    })
}

async fn play(
    module: &Path,
    local: &Local,
    script: &Script,
    file: &Path,
    is_json: bool,
) -> anyhow::Result<Vec<Value>> {
    let settings = match serde_json::to_value(&script.settings)? {
        Value::Object(settings) => settings,
        _ => Map::new(),
    };
    let mut trial = Trial::start(module, local, settings).await?;
    fill(&trial, &script.cache);
    let mut steps = Vec::new();
    let mut said: Vec<String> = Vec::new();
    for (nth, step) in script.step.iter().enumerate() {
        let place = format!("{} step {} ({:?})", file.display(), nth + 1, step.send).to_lowercase();
        match take(&mut trial, step, file).await {
            Ok(lines) => {
                if !is_json {
                    print(&format!("ok   {place}\n"))?;
                }
                said.extend(lines.iter().cloned());
                steps.push(json!({"step": nth + 1, "logs": lines}));
            }
            Err((error, lines)) => {
                said.extend(lines);
                let said: String = said.iter().map(|line| format!("\n  | {line}")).collect();
                let status = trial.status()?;
                let state = status.state.name();
                let end = status
                    .last_end
                    .map(|end| format!(", {end}"))
                    .unwrap_or_default();
                bail!("{place}: {error:#}\nthe plugin is {state}{end}, and logged:{said}");
            }
        }
    }
    trial.end().await?;
    Ok(steps)
}

fn fill(trial: &Trial, cache: &Cache) {
    let stats = &cache.stats;
    let tenant = |tenant: &Tenant| TenantStats {
        name: tenant.name.clone(),
        used_bytes: tenant.used_bytes,
        floor_bytes: tenant.floor_bytes,
        cap_bytes: tenant.cap_bytes,
        objects: tenant.objects,
    };
    trial.cache.set_stats(CacheStats {
        capacity_bytes: stats.capacity_bytes,
        used_bytes: stats.used_bytes,
        objects: stats.objects,
        lookups: stats.lookups,
        lookup_tokens: stats.lookup_tokens,
        hit_tokens: stats.hit_tokens,
        stored_chunks: stats.stored_chunks,
        retrieved_chunks: stats.retrieved_chunks,
        evicted_objects: stats.evicted_objects,
        tenants: stats.tenants.iter().map(tenant).collect(),
    });
    let facts = |key: &Key| KeyFacts {
        key: key.key.clone(),
        bytes: key.bytes,
        idle_ms: key.idle_ms,
        pinned: false,
    };
    trial.cache.set_keys(cache.keys.iter().map(facts).collect());
    let lower = cache.second_tier.as_ref();
    let lower = lower.map(|keys| keys.iter().map(facts).collect());
    trial.cache.set_second_tier(lower);
}

/// Does one step; its lines, and why it failed if it did.
async fn take(
    trial: &mut Trial,
    step: &Step,
    file: &Path,
) -> Result<Vec<String>, (anyhow::Error, Vec<String>)> {
    let mut lines = Vec::new();
    match attempt(trial, step, file, &mut lines).await {
        Ok(()) => Ok(lines),
        Err(error) => Err((error, lines)),
    }
}

async fn attempt(
    trial: &mut Trial,
    step: &Step,
    file: &Path,
    lines: &mut Vec<String>,
) -> anyhow::Result<()> {
    send(trial, step, file).await?;
    let time = Duration::from_millis(step.within_ms);
    let mut asked = Vec::new();
    let mut problem = String::new();
    let is_done = trial
        .wait(time, |trial| {
            lines.extend(trial.take_lines()?.iter().map(|line| line.text.to_string()));
            asked.extend(trial.cache.take_asked());
            problem = missing(trial, step, lines, &asked)?;
            Ok(problem.is_empty())
        })
        .await?;
    ensure!(is_done, "within {} ms: {problem}", step.within_ms);
    let is_exact = [&step.calls, &step.state, &step.http];
    if is_exact.iter().any(|it| it.is_some()) || !step.no_logs.is_empty() {
        // What must not happen is given a moment to happen.
        tokio::time::sleep(SETTLE).await;
        lines.extend(trial.take_lines()?.iter().map(|line| line.text.to_string()));
        asked.extend(trial.cache.take_asked());
        problem = missing(trial, step, lines, &asked)?;
        ensure!(problem.is_empty(), "{problem}");
    }
    for unwanted in &step.no_logs {
        let found = lines.iter().find(|line| line.contains(unwanted));
        if let Some(line) = found {
            bail!("the log has {line:?}, and no_logs has {unwanted:?}");
        }
    }
    Ok(())
}

/// What the step still waits for; empty when it is done.
fn missing(
    trial: &Trial,
    step: &Step,
    lines: &[String],
    asked: &[String],
) -> anyhow::Result<String> {
    let mut rest = lines.iter();
    for wanted in &step.logs {
        if !rest.any(|line| line.contains(wanted)) {
            return Ok(format!("the log has no line with {wanted:?} there"));
        }
    }
    let is_state = |it: &&String| it.starts_with("state_");
    // Nothing but a request has words between a method and an outcome.
    let is_http = |it: &&String| !is_state(it) && it.contains("://");
    let is_cache = |it: &&String| !is_state(it) && !is_http(it);
    let all = || asked.iter();
    for (field, wanted, found) in [
        ("calls", &step.calls, all().filter(is_cache).collect()),
        ("state", &step.state, all().filter(is_state).collect()),
        ("http", &step.http, all().filter(is_http).collect()),
    ] {
        let found: Vec<&String> = found;
        if let Some(wanted) = wanted
            && !wanted.iter().eq(found.iter().copied())
        {
            return Ok(format!(
                "it asked for {found:?}, and {field} has {wanted:?}"
            ));
        }
    }
    let status = trial.status()?;
    for (name, wanted) in &step.metrics {
        let custom = status.counts.custom.iter();
        let value = custom
            .clone()
            .find(|it| it.name == *name)
            .map(|it| it.value);
        if value != wanted.as_f64() {
            return Ok(format!(
                "metric {name} is {value:?}, and metrics has {wanted}"
            ));
        }
    }
    if step.send == Sent::Shutdown && status.state == PluginState::Running {
        return Ok("it still runs".to_owned());
    }
    Ok(String::new())
}

async fn send(trial: &mut Trial, step: &Step, file: &Path) -> anyhow::Result<()> {
    match step.send {
        Sent::Nothing => Ok(()),
        Sent::Events => {
            let mut events = Vec::new();
            if let Some(path) = &step.events_file {
                let path = file.parent().unwrap_or_else(|| Path::new("")).join(path);
                let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                for (nth, line) in text.lines().enumerate() {
                    let place = || format!("{} line {}", path.display(), nth + 1);
                    let value: Value = serde_json::from_str(line).with_context(place)?;
                    events.push(event(&value).with_context(place)?);
                }
            }
            for value in &step.events {
                events.push(event(value)?);
            }
            let cache = Arc::clone(&trial.cache);
            ensure!(cache.send(events).await, "it has not subscribed to events");
            Ok(())
        }
        Sent::Call => {
            let reply = trial
                .supervisor()
                .call(
                    &step.method,
                    "",
                    "http",
                    step.body.clone().into_bytes().into(),
                )
                .await;
            match (&step.fails, reply) {
                (None, Ok(reply)) => {
                    let reply = String::from_utf8_lossy(&reply);
                    if let Some(wanted) = &step.reply {
                        ensure!(
                            reply == **wanted,
                            "the reply is {reply:?}, and reply has {wanted:?}"
                        );
                    }
                    Ok(())
                }
                (None, Err(error)) => bail!("the call failed: {error}"),
                (Some(wanted), Ok(reply)) => bail!(
                    "the call had the reply {:?}, and fails has {wanted:?}",
                    String::from_utf8_lossy(&reply)
                ),
                (Some(wanted), Err(error)) => {
                    ensure!(
                        error.to_string().contains(&**wanted),
                        "the call failed with {:?}, and fails has {wanted:?}",
                        error.to_string()
                    );
                    Ok(())
                }
            }
        }
        Sent::Rank => rank(trial, step).await,
        Sent::Shutdown => Ok(trial.supervisor().stop_plugin(&trial.name)?),
    }
}

async fn rank(trial: &Trial, step: &Step) -> anyhow::Result<()> {
    let candidates: Vec<RankCandidate> = step
        .candidates
        .iter()
        .zip(0..)
        .map(|(given, id)| RankCandidate {
            id,
            key: given.key.clone(),
            salt: given.salt.clone(),
            model: given.model.clone(),
            bytes: given.bytes,
            chunk: given.chunk,
            idle_ms: given.idle_ms,
            age_ms: given.age_ms,
            uses: given.uses,
            request: given.request.clone(),
        })
        .collect();
    let request = RankRequest {
        tenant: Arc::from("default"),
        bytes_wanted: step.bytes_wanted,
        count: candidates.len(),
        candidates: Box::new(move || candidates),
    };
    let (supervisor, name) = (Arc::clone(trial.supervisor()), Arc::clone(&trial.name));
    let order = tokio::task::spawn_blocking(move || supervisor.rank(&name, request)).await?;
    match (&step.fails, order) {
        (None, Ok(order)) => {
            if let Some(wanted) = &step.order {
                ensure!(
                    order.starts_with(wanted),
                    "the order is {order:?}, and order has {wanted:?}"
                );
            }
            Ok(())
        }
        (None, Err(error)) => bail!("the ranking failed: {}", error.name()),
        (Some(wanted), Ok(order)) => {
            bail!("the order is {order:?}, and fails has {wanted:?}")
        }
        (Some(wanted), Err(error)) => {
            let error = error.name();
            ensure!(
                error.contains(&**wanted),
                "the ranking failed with {error:?}, and fails has {wanted:?}"
            );
            Ok(())
        }
    }
}
