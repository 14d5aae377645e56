//! WebAssembly plugins: WASI commands in a sandbox inside the server's process, core modules for
//! preview 1 and components for 0.2.
//!
//! A module is compiled in a child process ([`compile_child_main`]), cached, and run on one
//! thread that all guests share and that yields to everything else on the machine. A guest
//! has what it is passed - arguments, variables, directories, two output streams, an input that
//! ends when it is to stop - with clocks and randomness, and nothing else.
#![deny(unsafe_code)]

mod artefact;
mod cache;
mod compiler;
mod component_files;
mod engine;
mod error;
mod filesystem;
mod guest;
mod handler_clock;
mod imports;
mod inspect;
mod launch;
mod made;
mod quota;
mod reactor;
mod streams;
mod turns;
mod urgency;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{runtime, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use wasmtime::{Engine, Linker, UnknownImportError, component};
use wasmtime_wasi::p2::bindings::CommandPre;

use self::{
    artefact::Compiled,
    cache::Cache,
    guest::{Code, GuestState, Invocation, Meter},
    quota::{Burst, Metered},
    streams::StopInput,
    turns::Turns,
    urgency::{Killed, Urgency},
};
pub use self::{
    compiler::{COMPILE_ARGUMENT, CompileLimits, compile_child_main},
    engine::GUEST_STACK,
    error::WasmError,
    inspect::{ModuleFacts, ModuleForm, inspect},
    launch::{Access, Directory, Launch, Lift, WasmLimits},
    made::Made,
};
use crate::{
    host_api,
    limit::{Limit, LimitHits, LimitUse},
    log_stream::LogLevel,
    outbound::{LOOKUPS_AT_ONCE, Network, Outbound, OutboundUse},
};

/// Threads on which guests' file calls wait for the system, beside those of look-ups; they start
/// when they are needed.
const FILE_THREADS: usize = 16;

/// Maps that one guest takes at most: its memory's two guards, content and rest, its stack's
/// guard and content, and one to spare. Neighbours share some, so that most take five.
const MAPS_PER_GUEST: usize = 7;

/// How many guests start before the maps are counted again, which takes milliseconds when there
/// are tens of thousands.
const STARTS_PER_COUNT: usize = 256;

/// What Linux gives a process where it does not say.
const DEFAULT_MAX_MAPS: usize = 65_530;

/// The part of all maps that guests may take; when they end, the server's own allocations fail.
const MAPS_FOR_GUESTS_PERCENT: usize = 80;

/// Which of a guest's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// Where a guest's output goes.
///
/// All calls come from the thread that guests share, so none of them may block.
pub trait GuestOutput: Send + Sync + 'static {
    /// Takes bytes, no more than [`budget`](Self::budget) answered before.
    fn push(&self, stream: GuestStream, bytes: &[u8]);

    /// How many bytes are taken now; with 0 the guest waits.
    fn budget(&self) -> usize;

    /// Resolves when the budget is above 0.
    fn ready(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// Takes one line that the guest logs at a level. It counts against the budget, and may go
    /// beyond it by a line.
    fn log(&self, level: LogLevel, line: &[u8]);
}

/// How WebAssembly is compiled and kept.
#[derive(Clone, Debug)]
pub struct WasmConfig {
    /// Where compiled modules are kept. Created with mode 0700; refused when it is another
    /// user's or others can write it, as what lies there is run.
    pub cache_dir: PathBuf,
    /// What compiles.
    pub compiler: Compiler,
    /// What compiling one module may take.
    pub compile_limits: CompileLimits,
    /// What a module may be made of.
    pub form: ModuleForm,
    /// What the HTTP requests of all guests share.
    pub network: Arc<Network>,
    /// What a guest's stack may take, in bytes; [`GUEST_STACK`] but in tests.
    pub stack_bytes: usize,
}

impl WasmConfig {
    /// The defaults.
    #[must_use]
    pub fn new(cache_dir: PathBuf, compiler: Compiler) -> Self {
        Self {
            cache_dir,
            compiler,
            compile_limits: CompileLimits::default(),
            form: ModuleForm::default(),
            network: Arc::default(),
            stack_bytes: GUEST_STACK,
        }
    }
}

/// Who compiles modules.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// A program that calls [`compile_child_main`] when its first argument is
    /// [`COMPILE_ARGUMENT`]; it runs under limits and may die of a module.
    Child {
        /// The program, by absolute path: it is started in `/` with no environment.
        program: PathBuf,
    },
    /// This process, without limits: only for modules that are trusted.
    InProcess,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WasmEnd {
    /// The guest returned (0) or called `proc_exit`.
    Exited(i32),
    /// The guest did what it must not: the trap's name.
    Trapped(String),
    /// A limit ended the guest, or kept it from starting: which one.
    LimitHit(String),
    /// It could not be given what it was granted: what, and why.
    Refused(String),
    /// The run was killed, or its runtime dropped.
    Killed,
}

/// What a run has used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WasmUsage {
    /// Linear memory now, in bytes; 0 after the end.
    pub memory_bytes: u64,
    /// The most linear memory so far, in bytes.
    pub peak_memory_bytes: u64,
    /// Table elements now; 0 after the end.
    pub table_elements: u64,
    /// The most table elements so far.
    pub peak_table_elements: u64,
    /// Memories, tables and instances of its code.
    pub memories: u64,
    /// As `memories`.
    pub tables: u64,
    /// As `memories`.
    pub instances: u64,
    /// The deepest that its stack was seen, in bytes: at calls of the host and at the ends of
    /// turns, from the shallowest of them.
    pub peak_stack_bytes: u64,
    /// Processor time, host calls included.
    pub cpu_time: Duration,
    /// What of its burst it has not, as it took it or has yet to earn it.
    pub cpu_burst: Duration,
    /// Wall time that starting took, or has taken so far.
    pub start_time: Duration,
    /// The longest that a handler took.
    pub longest_call: Duration,
    /// The longest that one call into the file system took.
    pub longest_host_call: Duration,
    /// The most files that were open at once.
    pub peak_open_files: u64,
    /// What lies in the writable directories, or more, as of the last write.
    pub directory_bytes: u64,
    /// Arguments and environment, in bytes.
    pub environment_bytes: u64,
    /// HTTP requests.
    pub outbound: OutboundUse,
    /// How often each limit was hit.
    pub hits: LimitHits,
    /// Wall time since the start.
    pub wall_time: Duration,
}

impl WasmUsage {
    /// The limits that a run is held to, with what is used of each.
    #[must_use]
    pub fn limits(&self, limits: &WasmLimits) -> Vec<LimitUse> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let wall = self.wall_time.as_secs_f64().max(0.001);
        let cpu_percent = self.cpu_time.as_secs_f64() / wall * 100.0;
        let rows = [
            (Limit::Memory, limits.memory_bytes, self.memory_bytes),
            (Limit::Memories, count(limits.memories), self.memories),
            (
                Limit::TableElements,
                limits.table_elements,
                self.table_elements,
            ),
            (Limit::Tables, count(limits.tables), self.tables),
            (Limit::Instances, count(limits.instances), self.instances),
            (
                Limit::Stack,
                count(engine::GUEST_STACK),
                self.peak_stack_bytes,
            ),
            (
                Limit::Cpu,
                limits.cpu_percent.into(),
                cpu_percent.round() as u64,
            ),
            (
                Limit::CpuBurst,
                milliseconds(limits.cpu_burst),
                milliseconds(self.cpu_burst),
            ),
            (
                Limit::StartTime,
                milliseconds(limits.start_time),
                milliseconds(self.start_time),
            ),
            (
                Limit::RunTime,
                limits.run_time.map_or(0, milliseconds),
                milliseconds(self.wall_time),
            ),
            (
                Limit::HostCallTime,
                milliseconds(limits.host_call_time),
                milliseconds(self.longest_host_call),
            ),
            (
                Limit::Environment,
                limits.environment_bytes,
                self.environment_bytes,
            ),
            (
                Limit::OpenFiles,
                limits.open_files.into(),
                self.peak_open_files,
            ),
            (
                Limit::DirectoryBytes,
                limits.directory_bytes,
                self.directory_bytes,
            ),
            (
                Limit::HttpHosts,
                count(limits.outbound.grants.len()),
                self.outbound.hosts,
            ),
            (
                Limit::HttpRequests,
                limits.outbound.per_second.into(),
                self.outbound.per_second,
            ),
            (
                Limit::HttpTime,
                milliseconds(limits.outbound.timeout),
                milliseconds(self.outbound.longest),
            ),
            (
                Limit::HttpBody,
                limits.outbound.body_bytes,
                self.outbound.largest_body,
            ),
        ];
        rows.into_iter()
            .map(|(limit, declared, used)| LimitUse {
                limit,
                declared,
                used,
                hits: self.hits.of(limit),
            })
            .collect()
    }
}

/// The limits on a module itself, with how often they refused it.
#[must_use]
pub fn module_limits(made: Made, compile: CompileLimits, hits: &LimitHits) -> Vec<LimitUse> {
    let milliseconds = u64::try_from(compile.time.as_millis()).unwrap_or(u64::MAX);
    let form = ModuleForm::default();
    let rows = [
        (Limit::ModuleBytes, form.bytes, made.bytes),
        (Limit::Functions, form.functions, made.functions),
        (Limit::Names, form.names, made.names),
        (Limit::CompileTime, milliseconds, made.compile_milliseconds),
        (
            Limit::CompileMemory,
            compile.memory_bytes,
            made.compile_memory_bytes,
        ),
    ];
    rows.into_iter()
        .map(|(limit, declared, used)| LimitUse {
            limit,
            declared,
            used,
            hits: hits.of(limit),
        })
        .collect()
}

/// A compiled module that may be run; cheap to clone.
#[derive(Clone)]
pub struct WasmModule {
    name: Arc<str>,
    digest: Arc<str>,
    loaded: Arc<Loaded>,
}

/// Code that is mapped, once for all plugins with the same bytes.
struct Loaded {
    code: Code,
    made: Made,
}

impl WasmModule {
    /// What it is made of, and what compiling it took.
    pub fn made(&self) -> Made {
        self.loaded.made
    }

    /// The BLAKE3 digest of the bytes it was prepared from, 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

impl fmt::Debug for WasmModule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WasmModule")
            .field("name", &self.name)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

/// One run of a module; clones are handles to the same run, which is killed when the last of
/// them is dropped.
#[derive(Clone, Debug)]
pub struct WasmRun {
    ended: watch::Receiver<Option<WasmEnd>>,
    meter: Arc<Meter>,
    outbound: Arc<Outbound>,
    began: std::time::Instant,
    made: Made,
    burst: Burst,
    _kill: Arc<DropGuard>,
}

impl WasmRun {
    /// Resolves when the guest is gone, its memory given back.
    pub async fn ended(&self) -> WasmEnd {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(WasmEnd::Killed),
            // The task went with its runtime.
            Err(_) => WasmEnd::Killed,
        }
    }

    /// Whether both are handles to one run.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.meter, &other.meter)
    }

    /// What the run has used so far.
    pub fn usage(&self) -> WasmUsage {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let meter = &self.meter;
        let mut hits = meter.hits();
        hits.add_all(&self.outbound.hits());
        WasmUsage {
            memory_bytes: read(&meter.memory),
            peak_memory_bytes: read(&meter.memory_peak),
            memories: self.made.memories,
            tables: self.made.tables,
            instances: self.made.instances,
            peak_stack_bytes: meter.stack.deepest(),
            cpu_burst: self
                .burst
                .taken(Duration::from_nanos(read(&meter.burst_paid_nanoseconds))),
            start_time: meter
                .started
                .get()
                .map_or_else(|| self.began.elapsed(), |started| *started - self.began),
            longest_call: Duration::from_nanos(read(&meter.call_longest)),
            table_elements: read(&meter.table_elements),
            peak_table_elements: read(&meter.table_elements_peak),
            cpu_time: Duration::from_nanos(read(&meter.cpu_nanoseconds)),
            longest_host_call: Duration::from_nanos(read(&meter.host_call_longest)),
            peak_open_files: read(&meter.open_files_peak),
            directory_bytes: read(&meter.directory_bytes),
            environment_bytes: read(&meter.environment_bytes),
            outbound: self.outbound.usage(),
            hits,
            wall_time: self.began.elapsed(),
        }
    }
}

/// The engine, the thread that guests run on and the one that makes them take turns.
///
/// Dropping it ends all guests and waits for both threads: one turn of a guest, or as long as
/// one `memory.fill` within the memory limit takes.
pub struct WasmRuntime {
    engine: Engine,
    linker: Linker<GuestState>,
    component_linker: component::Linker<GuestState>,
    cache: Cache,
    compiler: Compiler,
    compile_limits: CompileLimits,
    form: ModuleForm,
    network: Arc<Network>,
    compatibility: u64,
    /// One compilation at a time: each may take gigabytes.
    compiling: Mutex<()>,
    /// What plugins have now, by its name in the cache.
    loaded: parking_lot::Mutex<HashMap<String, Weak<Loaded>>>,
    guests: runtime::Handle,
    turns: Arc<Turns>,
    urgency: Arc<Urgency>,
    room: Arc<Room>,
    shutdown: CancellationToken,
    ticker_stop: Arc<AtomicBool>,
    ticks: Arc<AtomicU64>,
    guest_thread: Option<JoinHandle<()>>,
    ticker: Option<JoinHandle<()>>,
}

impl fmt::Debug for WasmRuntime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WasmRuntime")
            .field("cache", &self.cache)
            .field("compiler", &self.compiler)
            .field("guests", &self.room.live.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl WasmRuntime {
    /// Checks the cache directory and starts the two threads.
    ///
    /// # Errors
    ///
    /// [`WasmError::CacheDirectory`] and [`WasmError::Cache`] for the directory,
    /// [`WasmError::Runtime`] when the engine or a thread cannot be had.
    pub fn start(config: WasmConfig) -> Result<Self, WasmError> {
        let failed = |error: &dyn fmt::Display| WasmError::Runtime(error.to_string());
        let cache = Cache::open_directory(&config.cache_dir)?;
        let engine = engine::new_engine(config.stack_bytes).map_err(|error| failed(&error))?;
        let linker = guest::new_linker(&engine).map_err(|error| failed(&error))?;
        let component_linker =
            guest::new_component_linker(&engine).map_err(|error| failed(&error))?;
        let shutdown = CancellationToken::new();
        let (guest_thread, guests, urgency) =
            start_guest_thread(shutdown.clone()).map_err(|error| failed(&error))?;
        let turns = Arc::new(Turns::default());
        guests.spawn(Arc::clone(&turns).dispatch());
        let mut runtime = Self {
            compatibility: engine::compatibility(&engine),
            linker,
            component_linker,
            cache,
            compiler: config.compiler,
            compile_limits: config.compile_limits,
            form: config.form,
            network: config.network,
            compiling: Mutex::new(()),
            loaded: parking_lot::Mutex::default(),
            guests,
            turns,
            urgency: Arc::new(urgency),
            room: Arc::new(Room::new()),
            shutdown,
            ticker_stop: Arc::new(AtomicBool::new(false)),
            ticks: Arc::new(AtomicU64::new(0)),
            guest_thread: Some(guest_thread),
            ticker: None,
            engine,
        };
        let stop = Arc::clone(&runtime.ticker_stop);
        let ticks = Arc::clone(&runtime.ticks);
        let ticker = engine::start_ticker(runtime.engine.weak(), stop, ticks)
            .map_err(|error| failed(&error))?;
        runtime.ticker = Some(ticker);
        Ok(runtime)
    }

    /// Counts up while guests are made to take turns.
    #[must_use]
    pub fn ticks(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.ticks)
    }

    /// Makes a module of a plugin's bytes, binary or text: from the cache when these bytes were
    /// compiled before by the same compiler, else by compiling them.
    ///
    /// Blocks, up to a minute for each module that is being compiled.
    ///
    /// # Errors
    ///
    /// Any [`WasmError`] but those of [`start`](Self::start); each names the plugin and the reason.
    pub fn prepare(&self, name: &str, bytes: &[u8]) -> Result<WasmModule, WasmError> {
        self.check(name, bytes)?;
        let digest = blake3::hash(bytes).to_hex();
        let key = format!("{digest}-{:016x}", self.compatibility);
        let module = |loaded| WasmModule {
            loaded,
            name: name.into(),
            digest: digest.as_str().into(),
        };
        if let Some(loaded) = self.loaded.lock().get(&key).and_then(Weak::upgrade) {
            return Ok(module(loaded));
        }
        let (compiled, made) = match self.load(&key) {
            Some(compiled) => compiled,
            None => self.compile(name, &key, bytes)?,
        };
        let required = match &compiled {
            Compiled::Module(module) => Some(module.resources_required()),
            Compiled::Component(component) => component.resources_required(),
        };
        let required = |count: fn(&wasmtime::ResourcesRequired) -> u32| {
            required.as_ref().map_or(0, count).into()
        };
        let loaded = Arc::new(Loaded {
            code: self.link(name, &compiled)?,
            made: Made {
                bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
                memories: required(|required| required.num_memories),
                tables: required(|required| required.num_tables),
                ..made
            },
        });
        let mut all = self.loaded.lock();
        all.retain(|_, loaded| loaded.strong_count() > 0);
        all.insert(key, Arc::downgrade(&loaded));
        Ok(module(loaded))
    }

    /// Refuses what is too big in any way to be compiled; text passes unparsed.
    ///
    /// # Errors
    ///
    /// The [`WasmError`] of the limit.
    pub fn check(&self, name: &str, bytes: &[u8]) -> Result<(), WasmError> {
        inspect::check(name, bytes, self.form)
    }

    /// Runs a module's `_start`, its handlers, or a component's `wasi:cli/run`. Of the server
    /// it gets nothing but its log.
    pub fn spawn(&self, module: &WasmModule, launch: Launch) -> WasmRun {
        let access = host_api::Access::none(Arc::clone(&module.name), launch.stop.clone());
        self.spawn_with(module, launch, access)
    }

    /// As [`spawn`](Self::spawn), with what the plugin is granted of the server.
    pub(crate) fn spawn_with(
        &self,
        module: &WasmModule,
        launch: Launch,
        access: host_api::Access,
    ) -> WasmRun {
        let Launch {
            mut arguments,
            environment,
            directories,
            limits,
            output,
            stop,
            kill,
        } = launch;
        if arguments.is_empty() {
            arguments.push(module.name.to_string());
        }
        // A child of its own, so that dropping the handle kills this run and no other.
        let kill = match limits.lifted == Some(Lift::KILL) {
            true => CancellationToken::new(),
            false => kill.child_token(),
        };
        let meter = Arc::new(Meter::default());
        let name = arguments.first().map_or(&*module.name, String::as_str);
        let outbound = Arc::new(Outbound::new(
            Arc::clone(&self.network),
            name.into(),
            limits.outbound.clone(),
        ));
        let (end, ended) = watch::channel(None);
        let began = std::time::Instant::now();
        let run = WasmRun {
            ended,
            meter: Arc::clone(&meter),
            outbound: Arc::clone(&outbound),
            began,
            made: module.made(),
            burst: Burst::new(&limits, began),
            _kill: Arc::new(kill.clone().drop_guard()),
        };
        let Some(place) = Room::take(&self.room) else {
            end.send_replace(Some(WasmEnd::LimitHit(format!(
                "{} guests run already, which is what the kernel's limit of memory maps per process leaves room for; raise it with `sysctl vm.max_map_count`",
                self.room.live.load(Ordering::Relaxed)
            ))));
            return run;
        };
        let (start_time, run_time) = (limits.start_time, limits.run_time);
        let (call_time, tally) = (access.terms.call_time, Arc::clone(&access.tally));
        let ending = Ending {
            counter: Arc::clone(&access.counter),
            run: access.run.clone(),
        };
        let engine = self.engine.clone();
        let guest = guest::run(
            module.loaded.code.clone(),
            engine.clone(),
            Invocation {
                arguments,
                environment,
                directories,
                input: StopInput { stop },
                output,
                limits: limits.clone(),
                meter: Arc::clone(&meter),
                outbound,
                access,
            },
        );
        let turn = self.turns.join(limits.cpu_weight);
        let guest = Metered::new(guest, &limits, began, turn, Arc::clone(&meter));
        let killed = Killed::new(kill, Arc::clone(&self.urgency));
        self.guests.spawn(async move {
            let over = async {
                match run_time {
                    Some(time) => tokio::time::sleep(time).await,
                    None => std::future::pending().await,
                }
            };
            // Beside the guest rather than in it, where they would wait for its debt.
            let late = async {
                tokio::time::sleep(start_time).await;
                if meter.started.get().is_some() {
                    std::future::pending::<()>().await;
                }
            };
            let ended = tokio::select! {
                biased;
                () = killed => WasmEnd::Killed,
                () = late => {
                    meter.hit(Limit::StartTime);
                    let milliseconds = start_time.as_millis();
                    WasmEnd::LimitHit(format!("it was not instantiated within {milliseconds} ms"))
                }
                handler = meter.handler_clock.late() => {
                    meter.hit(Limit::CallTime);
                    meter.called(call_time);
                    tally.handled(handler, host_api::Outcome::Timeout);
                    let (export, milliseconds) = (handler.export(), call_time.as_millis());
                    WasmEnd::LimitHit(format!("{export} was not over after its call_ms of {milliseconds} ms"))
                }
                () = over => {
                    meter.hit(Limit::RunTime);
                    let milliseconds = run_time.unwrap_or_default().as_millis();
                    WasmEnd::LimitHit(format!("its run was not over after {milliseconds} ms"))
                }
                ended = guest => ended,
            };
            // Whoever is told of the end finds memory and place free.
            meter.memory.store(0, Ordering::Relaxed);
            meter.table_elements.store(0, Ordering::Relaxed);
            drop((place, engine, ending));
            end.send_replace(Some(ended));
        });
        run
    }

    fn load(&self, key: &str) -> Option<(Compiled, Made)> {
        let (artefact, made) = self.cache.open(key)?;
        Some((artefact::load(&self.engine, artefact).ok()?, made))
    }

    fn compile(&self, name: &str, key: &str, bytes: &[u8]) -> Result<(Compiled, Made), WasmError> {
        let _one_at_a_time = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = self.load(key) {
            return Ok(module);
        }
        let failed = |error| self.cache.failed(error);
        let mut unfinished = self.cache.create().map_err(failed)?;
        let begun = std::time::Instant::now();
        let mut made = match &self.compiler {
            Compiler::Child { program } => compiler::compile_in_child(
                program,
                name,
                bytes,
                self.compile_limits,
                &unfinished.file,
            )?,
            Compiler::InProcess => compiler::compile_here(name, bytes, &mut unfinished.file)?,
        };
        made.compile_milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.cache.keep(key, unfinished, &made).map_err(failed)?;
        self.load(key).ok_or_else(|| WasmError::CompilerFailed {
            name: name.to_owned(),
            reason: "what it wrote cannot be loaded".to_owned(),
        })
    }

    /// Refuses what does not fit the sandbox, and links the rest.
    fn link(&self, name: &str, compiled: &Compiled) -> Result<Code, WasmError> {
        match compiled {
            Compiled::Module(module) => {
                let imports = module.imports();
                let imports = imports.map(|import| (import.module(), import.name()));
                host_api::check_imports(name, imports)?;
                let start = module.get_export("_start");
                let has_start = start
                    .and_then(|it| it.func().map(|f| f.params().len() + f.results().len()))
                    .is_some_and(|values| values == 0);
                let is_reactor = !has_start && has_handler(name, module)?;
                let instance = self
                    .linker
                    .instantiate_pre(module)
                    .map_err(|error| import_error(name, &error))?;
                match (has_start, is_reactor) {
                    (true, _) => Some(Code::Module(instance)),
                    (false, true) => Some(Code::Reactor(instance)),
                    (false, false) => None,
                }
            }
            Compiled::Component(component) => {
                let instance = self
                    .component_linker
                    .instantiate_pre(component)
                    .map_err(|error| component_import_error(name, &error))?;
                CommandPre::new(instance).ok().map(Code::Component)
            }
        }
        .ok_or_else(|| WasmError::NoStart {
            name: name.to_owned(),
        })
    }
}

/// Whether a module exports handlers, which must have their type.
fn has_handler(name: &str, module: &wasmtime::Module) -> Result<bool, WasmError> {
    let mut has_any = false;
    for handler in host_api::Handler::ALL {
        let Some(export) = module.get_export(handler.export()) else {
            continue;
        };
        let is_handler = export.func().is_some_and(|function| {
            let is_i32 = |it: wasmtime::ValType| it.is_i32();
            function.params().len() == 1
                && function.results().len() == 1
                && function.params().all(is_i32)
                && function.results().all(is_i32)
        });
        if !is_handler {
            return Err(WasmError::HandlerType {
                name: name.to_owned(),
                handler: handler.export(),
            });
        }
        has_any = true;
    }
    Ok(has_any)
}

/// Tells the server that a run is over, however it ended.
struct Ending {
    counter: Arc<host_api::Counter>,
    run: host_api::PluginRun,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let counter = &self.counter;
        if let (Some(host), Some(runtime)) = (counter.host.clone(), &counter.runtime) {
            let run = self.run.clone();
            // Not here, where a lock would be held at the guests' priority.
            drop(runtime.spawn_blocking(move || host.ended(&run)));
        }
    }
}

fn import_error(name: &str, error: &wasmtime::Error) -> WasmError {
    let name = name.to_owned();
    match error.downcast_ref::<UnknownImportError>() {
        Some(import) => WasmError::NotGranted {
            name,
            module: import.module().to_owned(),
            field: import.name().to_owned(),
        },
        None => WasmError::ImportType {
            name,
            reason: format!("{error:#}"),
        },
    }
}

/// The linker of components names a missing import in its text alone.
fn component_import_error(name: &str, error: &wasmtime::Error) -> WasmError {
    let reason = format!("{error:#}");
    let missing = reason
        .contains("was not found in the linker")
        .then(|| reason.split('`').nth(1))
        .flatten();
    match missing {
        Some(instance) => WasmError::NotGranted {
            name: name.to_owned(),
            module: instance.to_owned(),
            field: "*".to_owned(),
        },
        None => WasmError::ImportType {
            name: name.to_owned(),
            reason,
        },
    }
}

impl Drop for WasmRuntime {
    fn drop(&mut self) {
        // For good: the thread ends.
        self.urgency.raise();
        self.shutdown.cancel();
        // The ticker goes last: without it a busy guest would never give its thread back.
        for (thread, stop_ticker) in [
            (self.guest_thread.take(), true),
            (self.ticker.take(), false),
        ] {
            if let Some(thread) = thread
                && thread.thread().id() != thread::current().id()
            {
                // A panic there was reported there.
                let _ = thread.join();
            }
            if stop_ticker {
                self.ticker_stop.store(true, Ordering::Release);
            }
        }
    }
}

/// Room for guests: what the process may map, less what the server keeps for itself.
struct Room {
    live: AtomicUsize,
    most_maps: usize,
    /// How many guests may start before the maps are counted again.
    starts: Mutex<usize>,
}

impl Room {
    fn new() -> Self {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_MAX_MAPS);
        Self {
            live: AtomicUsize::new(0),
            most_maps: limit / 100 * MAPS_FOR_GUESTS_PERCENT,
            starts: Mutex::new(STARTS_PER_COUNT),
        }
    }

    /// A place for one more guest, if there is room.
    fn take(room: &Arc<Self>) -> Option<Place> {
        let mut starts = room.starts.lock().unwrap_or_else(PoisonError::into_inner);
        if *starts == 0 {
            let free = room.most_maps.saturating_sub(count_maps());
            *starts = (free / MAPS_PER_GUEST).min(STARTS_PER_COUNT);
        }
        *starts = starts.checked_sub(1)?;
        room.live.fetch_add(1, Ordering::Relaxed);
        Some(Place(Arc::clone(room)))
    }
}

/// The memory maps of this process.
fn count_maps() -> usize {
    let Ok(file) = std::fs::File::open("/proc/self/maps") else {
        return 0;
    };
    let lines = std::io::BufReader::with_capacity(64 << 10, file);
    std::io::BufRead::split(lines, b'\n')
        .map_while(Result::ok)
        .count()
}

/// One of the places for running guests.
struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Starts the thread that guests share; it ends, and all guests with it, at `shutdown`.
fn start_guest_thread(
    shutdown: CancellationToken,
) -> std::io::Result<(JoinHandle<()>, runtime::Handle, Urgency)> {
    // With these intervals timers and wake-ups are looked at after every turn of a guest,
    // not after 61.
    let guests = runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(1)
        .global_queue_interval(1)
        .max_blocking_threads(FILE_THREADS + LOOKUPS_AT_ONCE)
        // Of threads that start during a kill, too.
        .on_thread_start(urgency::yield_to_all)
        .build()?;
    let handle = guests.handle().clone();
    let (started, start) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("wasm-guests".to_owned())
        .spawn(move || {
            let urgency = Urgency::of_this_thread();
            let failed = urgency.is_err();
            let _ = started.send(urgency);
            if !failed {
                guests.block_on(shutdown.cancelled());
                // A file call that hangs in the kernel is left to itself.
                guests.shutdown_background();
            }
        })?;
    let urgency = start.recv().map_err(std::io::Error::other)??;
    Ok((thread, handle, urgency))
}
