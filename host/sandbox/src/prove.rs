//! Attacks the limits of a plugin as it would run here, and measures what comes through.
//!
//! Each attack is a guest that takes what it can get, run by the same runtime, the same log and
//! under the same grants as the plugin, in a process of its own. What was declared and what is
//! applied come in two values, which are one and the same outside tests: a test lifts one limit
//! of what is applied, and sees that its attack succeeds.

use std::{
    fs,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    grants::Access,
    limit::Limit,
    log_stream::{LogLevel, LogLimits, LogStream, MAX_LINE_BYTES},
    manifest::Manifest,
    supervisor::{GuestLog, wasm_limits},
    wasm::{
        CompileLimits, Compiler, Directory, GuestOutput, GuestStream, Launch, ModuleForm,
        WasmConfig, WasmEnd, WasmError, WasmLimits, WasmModule, WasmRuntime, WasmUsage,
    },
};

/// How long attacks on rates go on.
const WINDOW: Duration = Duration::from_secs(2);
/// What an attack gets to end when it is not the time that is measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest a guest may live once it is killed, in milliseconds.
const KILL_MILLISECONDS: u64 = 1000;
/// 18 KiB of code that take the compiler minutes and gigabytes.
const BOMB_DEPTH: usize = 1000;
/// Names of attacks that are not those of one limit.
const MEMORIES: &str = "memory_bytes over three memories";
const KILL: &str = "kill_ms";
const ENVIRONMENT: &str = "environment";
const DIRECTORIES: &str = "directories";
const NETWORK: &str = "network";
const LINKS: &str = "symbolic links";
const COMPILE: &str = "compile_ms, compile_memory_bytes";

/// What lies where no grant leads.
const SECRET: &str = "5b1d3c";

/// Everything that a plugin is held to.
#[derive(Debug, Clone)]
pub struct Held {
    /// What a run may use.
    pub limits: WasmLimits,
    /// What it may print.
    pub log: LogLimits,
    /// What compiling may take.
    pub compile: CompileLimits,
    /// What a module may be made of.
    pub form: ModuleForm,
    /// Loops within loops of the module that the compiler is attacked with; the more, the more
    /// generous a limit it reaches.
    pub bomb_depth: usize,
    /// Directories in place of those that the manifest names, which an attack must not touch:
    /// none, for a plugin that has none.
    pub directories: Option<Access>,
    /// The environment of a run.
    pub environment: Vec<(String, String)>,
}

impl Held {
    /// What a manifest and the server's settings hold a plugin to.
    #[must_use]
    pub fn new(manifest: &Manifest, compile: CompileLimits) -> Self {
        let most = manifest.directories.values().map(|it| it.access).max();
        Self {
            limits: wasm_limits(manifest),
            log: manifest.log_limits(),
            compile,
            form: ModuleForm::default(),
            bomb_depth: BOMB_DEPTH,
            directories: most,
            environment: manifest
                .env
                .iter()
                .map(|name| (name.clone(), "granted".to_owned()))
                .collect(),
        }
    }
}

/// What one attack came to.
#[derive(Debug, Clone)]
pub struct Proof {
    /// What was attacked, by the limit's name where it has one.
    pub what: &'static str,
    /// What was declared.
    pub declared: String,
    /// What was measured.
    pub measured: String,
    /// Whether it held.
    pub holds: bool,
}

/// Why nothing could be proven.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The sandbox or a guest cannot be had.
    #[error(transparent)]
    Wasm(#[from] WasmError),
    /// A directory for the attacks cannot be made.
    #[error("the attacks need a directory: {0}")]
    Directory(#[from] std::io::Error),
}

/// Attacks every limit of `declared` in a sandbox that applies `applied`, with `scratch` as
/// the directory to work in, or the one attack that `only` names. Calls `tell` with each proof as
/// it comes; takes half a minute, and as long as starting, host calls and compiling may take.
/// `declared` and `applied` are the same outside tests.
///
/// # Errors
/// [`ProveError`] when the attacks could not be made.
pub async fn prove(
    declared: &Held,
    applied: &Held,
    compiler: Compiler,
    scratch: &Path,
    only: Option<&str>,
    mut tell: impl FnMut(&Proof),
) -> Result<Vec<Proof>, ProveError> {
    let runtime = WasmRuntime::start(WasmConfig {
        cache_dir: scratch.join("cache"),
        compiler,
        compile_limits: applied.compile,
        form: applied.form,
        network: Arc::default(),
    })?;
    let arena = Arena {
        runtime: Arc::new(runtime),
        declared,
        applied,
        scratch: scratch.to_owned(),
    };
    let wants = |what: &str| only.is_none_or(|only| only == what);
    let mut proofs = Vec::new();
    let mut add = |proof: Proof| {
        tell(&proof);
        proofs.push(proof);
    };
    if wants(Limit::Memory.name()) {
        add(arena.memory().await?);
    }
    if wants(MEMORIES) {
        add(arena.memories().await?);
    }
    if wants(Limit::TableElements.name()) {
        add(arena.table_elements().await?);
    }
    if wants(Limit::Tables.name()) {
        add(arena.tables().await?);
    }
    if wants(Limit::Stack.name()) {
        add(arena.stack().await?);
    }
    if wants(Limit::Cpu.name()) {
        add(arena.cpu().await?);
    }
    if wants(Limit::CpuBurst.name()) {
        add(arena.cpu_burst().await?);
    }
    if wants(Limit::StartTime.name()) {
        add(arena.start_time().await?);
    }
    if declared.limits.run_time.is_some() && wants(Limit::RunTime.name()) {
        add(arena.run_time().await?);
    }
    if wants(KILL) {
        add(arena.kill().await?);
    }
    if wants(Limit::Environment.name()) {
        add(arena.environment_size().await?);
    }
    if wants(ENVIRONMENT) {
        add(arena.environment().await?);
    }
    if wants(DIRECTORIES) {
        add(arena.no_directory().await?);
    }
    if wants(NETWORK) {
        add(arena.network()?);
    }
    if declared.directories.is_some() {
        if wants(LINKS) {
            add(arena.escape().await?);
        }
        if wants(Limit::OpenFiles.name()) {
            add(arena.open_files().await?);
        }
        if wants(Limit::HostCallTime.name()) {
            add(arena.host_call_time().await?);
        }
        if wants(Limit::DirectoryBytes.name()) {
            add(arena.directory_bytes().await?);
        }
    }
    let logs = [Limit::LogLines, Limit::LogBytes, Limit::LogLineBytes];
    if logs.iter().any(|limit| wants(limit.name())) {
        for proof in arena.log().await? {
            add(proof);
        }
    }
    let forms = [Limit::ModuleBytes, Limit::Functions, Limit::Names];
    if forms.iter().any(|limit| wants(limit.name())) {
        for proof in arena.module_form() {
            add(proof);
        }
    }
    if wants(COMPILE) {
        add(arena.compile().await);
    }
    Ok(proofs)
}

struct Arena<'a> {
    runtime: Arc<WasmRuntime>,
    declared: &'a Held,
    applied: &'a Held,
    scratch: PathBuf,
}

/// What an attack left.
struct Attack {
    end: Option<WasmEnd>,
    usage: WasmUsage,
    log: Arc<LogStream>,
    took: Duration,
}

impl Attack {
    fn exit_code(&self) -> Option<i32> {
        match self.end {
            Some(WasmEnd::Exited(code)) => Some(code),
            _ => None,
        }
    }

    fn text(&self) -> String {
        let lines = self.log.tail(usize::MAX);
        let texts: Vec<&str> = lines.iter().map(|line| &*line.text).collect();
        texts.join("\n")
    }

    fn end(&self) -> String {
        match &self.end {
            None => "it goes on".to_owned(),
            Some(WasmEnd::Exited(code)) => format!("exit code {code}"),
            Some(
                WasmEnd::Trapped(reason) | WasmEnd::LimitHit(reason) | WasmEnd::Refused(reason),
            ) => reason.clone(),
            Some(WasmEnd::Killed) => "killed".to_owned(),
        }
    }
}

impl Arena<'_> {
    fn module(&self, text: &str) -> Result<WasmModule, ProveError> {
        Ok(self.runtime.prepare("attacker", text.as_bytes())?)
    }

    /// Limits that let an attack get on with what it attacks: all of the processor.
    fn unhurried(&self) -> WasmLimits {
        WasmLimits {
            cpu_percent: 100,
            ..self.applied.limits.clone()
        }
    }

    async fn attack(
        &self,
        text: &str,
        limits: WasmLimits,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let launch = Launch {
            limits,
            ..Launch::new(Arc::new(Silence))
        };
        self.launch(text, launch, time).await
    }

    /// Runs an attacker until it ends, or for `time`.
    async fn launch(
        &self,
        text: &str,
        mut launch: Launch,
        time: Duration,
    ) -> Result<Attack, ProveError> {
        let module = self.module(text)?;
        let log = Arc::new(LogStream::quiet(Arc::from("attacker"), self.applied.log));
        launch.output = Arc::new(GuestLog(Arc::clone(&log)));
        let kill = launch.kill.clone();
        let begun = Instant::now();
        let run = self.runtime.spawn(&module, launch);
        let end = tokio::time::timeout(time, run.ended()).await.ok();
        let (took, usage) = (begun.elapsed(), run.usage());
        kill.cancel();
        let _killed = tokio::time::timeout(PATIENCE, run.ended()).await;
        log.finish();
        Ok(Attack {
            end,
            usage,
            log,
            took,
        })
    }

    async fn memory(&self) -> Result<Proof, ProveError> {
        let attack = self
            .attack(
                include_str!("../../../tests/guests/memory_hog.wat"),
                self.unhurried(),
                PATIENCE,
            )
            .await?;
        Ok(at_most(
            Limit::Memory.name(),
            self.declared.limits.memory_bytes,
            attack.usage.peak_memory_bytes,
        ))
    }

    async fn memories(&self) -> Result<Proof, ProveError> {
        let hog = include_str!("../../../tests/guests/memory_hog_over_memories.wat");
        let attack = self.attack(hog, self.unhurried(), PATIENCE).await?;
        Ok(at_most(
            MEMORIES,
            self.declared.limits.memory_bytes,
            attack.usage.peak_memory_bytes,
        ))
    }

    async fn table_elements(&self) -> Result<Proof, ProveError> {
        let hog = include_str!("../../../tests/guests/table_hog.wat");
        let attack = self.attack(hog, self.unhurried(), PATIENCE).await?;
        Ok(at_most(
            Limit::TableElements.name(),
            self.declared.limits.table_elements,
            attack.usage.peak_table_elements,
        ))
    }

    async fn tables(&self) -> Result<Proof, ProveError> {
        let tables = "(table 0 funcref)".repeat(64);
        let hog =
            format!("(module (memory (export \"memory\") 1) {tables} (func (export \"_start\")))");
        let attack = self.attack(&hog, self.unhurried(), PATIENCE).await?;
        let hits = attack.usage.hits.of(Limit::Tables);
        Ok(Proof {
            what: Limit::Tables.name(),
            declared: "16".to_owned(),
            measured: format!("64 tables: {}", attack.end()),
            holds: hits > 0,
        })
    }

    async fn stack(&self) -> Result<Proof, ProveError> {
        let hog = include_str!("../../../tests/guests/stack_overflow.wat");
        let attack = self.attack(hog, self.unhurried(), PATIENCE).await?;
        Ok(Proof {
            what: Limit::Stack.name(),
            declared: "524288".to_owned(),
            measured: format!("endless recursion: {}", attack.end()),
            holds: attack.usage.hits.of(Limit::Stack) == 1,
        })
    }

    async fn cpu(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../tests/guests/endless_loop.wat");
        let mut limits = self.applied.limits.clone();
        limits.run_time = None;
        let attack = self.attack(spin, limits, WINDOW).await?;
        let burst = self.declared.limits.cpu_burst;
        let cpu = attack.usage.cpu_time.saturating_sub(burst).as_secs_f64();
        let percent = cpu / attack.took.as_secs_f64() * 100.0;
        let declared = self.declared.limits.cpu_percent;
        Ok(Proof {
            what: Limit::Cpu.name(),
            declared: declared.to_string(),
            measured: format!("{percent:.1} over {WINDOW:?}, after the burst"),
            // A turn is not cut short, and 5 ms of 2 s are a quarter of a percent.
            holds: percent <= f64::from(declared) + 1.0,
        })
    }

    /// Sleeps for as long as a burst takes to be earned, then spins: what it takes at once.
    async fn cpu_burst(&self) -> Result<Proof, ProveError> {
        let sleep_then_spin = r#"(module
            (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 1)
            (func (export "_start")
              (i32.store (i32.const 16) (i32.const 1))
              (i64.store (i32.const 24) (i64.const 1500000000))
              (drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))
              (loop $forever (br $forever))))"#;
        let percent = 5;
        let limits = WasmLimits {
            cpu_percent: percent,
            run_time: None,
            ..self.applied.limits.clone()
        };
        let window = Duration::from_millis(2700);
        let attack = self.attack(sleep_then_spin, limits, window).await?;
        // What the share gives after the sleep is no burst, and neither is its last turn.
        let share = attack.took.saturating_sub(Duration::from_millis(1500)) * percent / 100;
        let burst = attack.usage.cpu_time.saturating_sub(share);
        let declared = self.declared.limits.cpu_burst;
        Ok(Proof {
            what: Limit::CpuBurst.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{:.1}", burst.as_secs_f64() * 1000.0),
            holds: burst <= declared + Duration::from_millis(15),
        })
    }

    async fn start_time(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../tests/guests/endless_loop_in_start_function.wat");
        let limits = WasmLimits {
            run_time: None,
            ..self.applied.limits.clone()
        };
        let declared = self.declared.limits.start_time;
        self.timed(Limit::StartTime, spin, limits, declared).await
    }

    async fn run_time(&self) -> Result<Proof, ProveError> {
        let spin = include_str!("../../../tests/guests/endless_loop.wat");
        let declared = self.declared.limits.run_time.unwrap_or_default();
        let limits = self.applied.limits.clone();
        self.timed(Limit::RunTime, spin, limits, declared).await
    }

    async fn timed(
        &self,
        limit: Limit,
        text: &str,
        limits: WasmLimits,
        declared: Duration,
    ) -> Result<Proof, ProveError> {
        // A second beyond the limit is for a loaded machine.
        let slack = Duration::from_secs(1);
        let attack = self.attack(text, limits, declared + slack * 2).await?;
        Ok(Proof {
            what: limit.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.end()),
            holds: attack.end.is_some()
                && attack.took <= declared + slack
                && attack.usage.hits.of(limit) == 1,
        })
    }

    async fn kill(&self) -> Result<Proof, ProveError> {
        let module = self.module(include_str!(
            "../../../tests/guests/endless_loop_in_host_calls.wat"
        ))?;
        let kill = CancellationToken::new();
        let launch = Launch {
            limits: WasmLimits {
                run_time: None,
                ..self.applied.limits.clone()
            },
            kill: kill.clone(),
            ..Launch::new(Arc::new(Silence))
        };
        let run = self.runtime.spawn(&module, launch);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let begun = Instant::now();
        kill.cancel();
        let ended = tokio::time::timeout(PATIENCE, run.ended()).await.is_ok();
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut proof = at_most(KILL, KILL_MILLISECONDS, took);
        proof.holds &= ended;
        Ok(proof)
    }

    async fn environment_size(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.environment_bytes;
        let bytes = usize::try_from(declared)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        let launch = Launch {
            environment: vec![("A".to_owned(), "x".repeat(bytes))],
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        let attack = self
            .launch(
                include_str!("../../../tests/guests/hello.wat"),
                launch,
                PATIENCE,
            )
            .await?;
        Ok(Proof {
            what: Limit::Environment.name(),
            declared: declared.to_string(),
            measured: format!("with a little more: {}", attack.end()),
            holds: attack.usage.hits.of(Limit::Environment) == 1,
        })
    }

    async fn environment(&self) -> Result<Proof, ProveError> {
        let launch = Launch {
            environment: self.applied.environment.clone(),
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        let probe = include_str!("../../../tests/guests/print_environ.wat");
        let attack = self.launch(probe, launch, PATIENCE).await?;
        let seen: Vec<String> = attack
            .text()
            .lines()
            .filter_map(|line| line.split_once('=').map(|(name, _)| name.to_owned()))
            .collect();
        let granted: Vec<&str> = self
            .declared
            .environment
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        Ok(Proof {
            what: ENVIRONMENT,
            declared: format!("{granted:?}"),
            measured: format!("{seen:?}"),
            holds: seen.iter().all(|name| granted.contains(&name.as_str())),
        })
    }

    /// Without a grant of directories, there is none; with one, that is all there is.
    async fn no_directory(&self) -> Result<Proof, ProveError> {
        // Exits with how many directories there are.
        let probe = r#"(module
            (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start") (local $fd i32) (local $count i32)
              (loop $next
                (local.set $count (i32.add (local.get $count)
                  (i32.eqz (call $prestat (local.get $fd) (i32.const 0)))))
                (br_if $next (i32.lt_u (local.tee $fd (i32.add (local.get $fd) (i32.const 1))) (i32.const 256))))
              (call $exit (local.get $count))))"#;
        let (launch, _) = self.with_directory("count")?;
        let attack = self.launch(probe, launch, PATIENCE).await?;
        let declared = i32::from(self.declared.directories.is_some());
        Ok(Proof {
            what: DIRECTORIES,
            declared: declared.to_string(),
            measured: attack
                .exit_code()
                .map_or_else(|| attack.end(), |count| count.to_string()),
            holds: attack.exit_code().is_some_and(|count| count <= declared),
        })
    }

    /// What a plugin could reach the network with is not there.
    fn network(&self) -> Result<Proof, ProveError> {
        let wants = [
            r#"(module (import "wasi_snapshot_preview1" "sock_open" (func (param i32 i32 i32) (result i32))) (memory (export "memory") 1) (func (export "_start")))"#,
            include_str!("../../../tests/guests/component_wants_http.wat"),
        ];
        let granted = wants
            .iter()
            .filter(|text| self.module(text).is_ok())
            .count();
        Ok(Proof {
            what: NETWORK,
            declared: "none".to_owned(),
            measured: format!("{granted} of {} ways granted", wants.len()),
            holds: granted == 0,
        })
    }

    /// A run with a fresh directory like the plugin's own, if it has any.
    fn with_directory(&self, name: &str) -> Result<(Launch, PathBuf), ProveError> {
        let path = self.scratch.join(name);
        fs::create_dir_all(&path)?;
        let directories = self.applied.directories.map(|access| Directory {
            guest: "/granted".to_owned(),
            host: path.clone(),
            access,
        });
        let launch = Launch {
            directories: directories.into_iter().collect(),
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        Ok((launch, path))
    }

    async fn escape(&self) -> Result<Proof, ProveError> {
        let secret = self.scratch.join("secret");
        fs::write(&secret, SECRET)?;
        let mut leaks = 0;
        let mut tried = 0;
        for target in [secret.as_path(), Path::new("../secret")] {
            let (launch, path) = self.with_directory("escape")?;
            let link = path.join("note");
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(target, &link)?;
            let read = include_str!("../../../tests/guests/read_note.wat");
            let attack = self.launch(read, launch, PATIENCE).await?;
            tried += 1;
            leaks += usize::from(attack.text().contains(SECRET) || attack.exit_code() == Some(0));
        }
        let (launch, path) = self.with_directory("link")?;
        let make = include_str!("../../../tests/guests/symlink_escape.wat");
        self.launch(make, launch, PATIENCE).await?;
        tried += 1;
        leaks += usize::from(fs::symlink_metadata(path.join("note")).is_ok());
        Ok(Proof {
            what: LINKS,
            declared: "not followed, not made".to_owned(),
            measured: format!("{leaks} of {tried} ways lead out"),
            holds: leaks == 0,
        })
    }

    async fn open_files(&self) -> Result<Proof, ProveError> {
        let (launch, _) = self.with_directory("open")?;
        let hog = include_str!("../../../tests/guests/open_files_hog.wat");
        let attack = self.launch(hog, launch, PATIENCE).await?;
        Ok(at_most(
            Limit::OpenFiles.name(),
            self.declared.limits.open_files.into(),
            attack.usage.peak_open_files,
        ))
    }

    async fn host_call_time(&self) -> Result<Proof, ProveError> {
        let (launch, path) = self.with_directory("hang")?;
        let pipe = path.join("note");
        let _ = fs::remove_file(&pipe);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0)
            .map_err(std::io::Error::from)?;
        let declared = self.declared.limits.host_call_time;
        let slack = Duration::from_secs(1);
        let read = include_str!("../../../tests/guests/read_note.wat");
        let attack = self.launch(read, launch, declared + slack * 2).await;
        // The thread that waits for somebody who writes is let go.
        drop(fs::OpenOptions::new().read(true).write(true).open(&pipe));
        let attack = attack?;
        Ok(Proof {
            what: Limit::HostCallTime.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.end()),
            holds: attack.end.is_some() && attack.took <= declared + slack,
        })
    }

    async fn directory_bytes(&self) -> Result<Proof, ProveError> {
        let (launch, path) = self.with_directory("fill")?;
        let hog = include_str!("../../../tests/guests/disk_hog.wat");
        let attack = self.launch(hog, launch, PATIENCE).await?;
        let bytes = fs::metadata(path.join("hog")).map_or(0, |metadata| metadata.len());
        fs::remove_dir_all(&path)?;
        let declared = match self.declared.directories {
            Some(Access::ReadWrite) => self.declared.limits.directory_bytes,
            _ => 0,
        };
        let mut proof = at_most(Limit::DirectoryBytes.name(), declared, bytes);
        proof.holds &= attack.end.is_some();
        Ok(proof)
    }

    async fn log(&self) -> Result<Vec<Proof>, ProveError> {
        let flood = include_str!("../../../tests/guests/log_flood.wat");
        let limits = WasmLimits {
            run_time: None,
            ..self.unhurried()
        };
        let attack = self.attack(flood, limits.clone(), WINDOW).await?;
        let counts = attack.log.counts();
        let seconds = attack.took.as_secs_f64();
        // Two seconds' worth may come at once.
        let rate = |count: u64, per_second: u32| {
            ((count as f64 - 2.0 * f64::from(per_second)).max(0.0) / seconds) as u64
        };
        let declared = self.declared.log;
        let line = {
            let endless = include_str!("../../../tests/guests/endless_line.wat");
            let attack = self.attack(endless, limits, WINDOW).await?;
            let lines = attack.log.tail(usize::MAX);
            lines
                .iter()
                .map(|line| line.text.len() as u64)
                .max()
                .unwrap_or_default()
        };
        Ok(vec![
            at_most(
                Limit::LogLines.name(),
                declared.lines_per_second.into(),
                rate(counts.lines, declared.lines_per_second),
            ),
            at_most(
                Limit::LogBytes.name(),
                // A write is taken whole, and the last one may be 64 KiB.
                u64::from(declared.bytes_per_second) + (64 << 10),
                rate(counts.bytes, declared.bytes_per_second),
            ),
            at_most(
                Limit::LogLineBytes.name(),
                // With the mark that says how much was cut.
                MAX_LINE_BYTES as u64 + 64,
                line,
            ),
        ])
    }

    /// Modules that are too big in one way each.
    fn module_form(&self) -> Vec<Proof> {
        let form = self.declared.form;
        let mut large = b"\0asm\x01\0\0\0".to_vec();
        large.resize(
            usize::try_from(form.bytes)
                .unwrap_or(usize::MAX)
                .saturating_add(1),
            0,
        );
        let count = |limit: u64| {
            usize::try_from(limit)
                .unwrap_or(usize::MAX)
                .saturating_add(1)
        };
        let functions = module_of(count(form.functions), 0, &[], &[]);
        let names = module_of_exports(count(form.names));
        [
            (Limit::ModuleBytes, form.bytes, large),
            (Limit::Functions, form.functions, functions),
            (Limit::Names, form.names, names),
        ]
        .into_iter()
        .map(|(limit, declared, module)| {
            let refused = self.runtime.check("attacker", &module).err();
            Proof {
                what: limit.name(),
                declared: declared.to_string(),
                measured: match &refused {
                    Some(error) => format!("one more: {error}"),
                    None => "one more was taken".to_owned(),
                },
                holds: refused.and_then(|error| error.limit()) == Some(limit),
            }
        })
        .collect()
    }

    /// A function that takes the compiler longer or more memory than it may; which of the two
    /// ends it depends on the machine.
    async fn compile(&self) -> Proof {
        let declared = self.declared.compile;
        let bomb = compile_bomb(self.declared.bomb_depth);
        let runtime = Arc::clone(&self.runtime);
        let begun = Instant::now();
        let compiled = tokio::task::spawn_blocking(move || runtime.prepare("bomb", &bomb)).await;
        let took = begun.elapsed();
        let limit = match &compiled {
            Ok(Err(error)) => error.limit(),
            _ => None,
        };
        let measured = match compiled {
            Ok(Ok(_)) => "it was compiled".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Proof {
            what: COMPILE,
            declared: format!("{}, {}", declared.time.as_millis(), declared.memory_bytes),
            measured: format!("{:.1} s: {measured}", took.as_secs_f64()),
            holds: matches!(limit, Some(Limit::CompileTime | Limit::CompileMemory))
                && took <= declared.time + Duration::from_secs(5),
        }
    }
}

fn at_most(what: &'static str, declared: u64, measured: u64) -> Proof {
    Proof {
        what,
        declared: declared.to_string(),
        measured: measured.to_string(),
        holds: measured <= declared,
    }
}

/// Takes output that nobody reads.
struct Silence;

impl GuestOutput for Silence {
    fn log(&self, _level: LogLevel, _line: &[u8]) {}

    fn push(&self, _stream: GuestStream, _bytes: &[u8]) {}

    fn budget(&self) -> usize {
        usize::MAX
    }

    fn ready(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// A section of a module: its number, its length, its content.
fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![id];
    number(content.len(), &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// An unsigned number as modules hold them.
fn number(mut value: usize, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// A module whose functions all have this body, and so many local variables of 64 bits.
fn module_of(functions: usize, locals: usize, body: &[u8], exports: &[u8]) -> Vec<u8> {
    let mut module = b"\0asm\x01\0\0\0".to_vec();
    module.extend(section(1, &[1, 0x60, 0, 0]));
    let mut types = Vec::new();
    number(functions, &mut types);
    types.resize(types.len() + functions, 0);
    module.extend(section(3, &types));
    if !exports.is_empty() {
        module.extend(section(7, exports));
    }
    let mut function = vec![1];
    number(locals, &mut function);
    function.push(0x7e);
    function.extend_from_slice(body);
    function.push(0x0b);
    let mut code = Vec::new();
    number(functions, &mut code);
    for _ in 0..functions {
        number(function.len(), &mut code);
        code.extend_from_slice(&function);
    }
    module.extend(section(10, &code));
    module
}

fn module_of_exports(count: usize) -> Vec<u8> {
    let mut exports = Vec::new();
    number(count, &mut exports);
    for export in 0..count {
        let name = format!("e{export}");
        number(name.len(), &mut exports);
        exports.extend_from_slice(name.as_bytes());
        exports.extend_from_slice(&[0, 0]);
    }
    module_of(1, 0, &[], &exports)
}

/// As many loops within each other as there are local variables, all of which change in the
/// innermost and live on in every other: work and memory grow with a power of the size.
fn compile_bomb(depth: usize) -> Vec<u8> {
    let mut body = [0x03, 0x40].repeat(depth);
    for local in 0..depth {
        // local.get, i64.const 1, i64.add, local.set
        body.push(0x20);
        number(local, &mut body);
        body.extend_from_slice(&[0x42, 1, 0x7c, 0x21]);
        number(local, &mut body);
    }
    for level in 0..depth {
        // local.get 0, i32.wrap_i64, br_if
        body.extend_from_slice(&[0x20, 0, 0xa7, 0x0d]);
        number(level, &mut body);
    }
    body.resize(body.len() + depth, 0x0b);
    let start = [b"\x01\x06_start".as_slice(), &[0, 0]].concat();
    module_of(1, depth, &body, &start)
}
