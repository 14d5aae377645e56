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
mod directory_quota;
mod engine;
mod error;
mod filesystem;
mod guest;
mod handler_clock;
mod imports;
mod inspect;
mod launch;
mod linking;
mod made;
mod quota;
mod reactor;
mod room;
mod streams;
mod turns;
mod urgency;
mod usage;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{runtime, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use wasmtime::Engine;

use self::{
    artefact::Compiled,
    cache::Cache,
    guest::{Code, Invocation, Meter},
    linking::Linkers,
    quota::{Burst, Metered},
    room::Room,
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
    usage::{WasmUsage, module_limits},
};
use crate::{
    host_api,
    limit::Limit,
    log_stream::LogLevel,
    outbound::{LOOKUPS_AT_ONCE, Network, Outbound},
};

/// Threads on which guests' file calls wait for the system, beside those of look-ups; they start
/// when they are needed.
const FILE_THREADS: usize = 16;

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
    linkers: Linkers,
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
        let linkers = Linkers::new(&engine).map_err(|error| failed(&error))?;
        let shutdown = CancellationToken::new();
        let (guest_thread, guests, urgency) =
            start_guest_thread(shutdown.clone()).map_err(|error| failed(&error))?;
        let turns = Arc::new(Turns::default());
        guests.spawn(Arc::clone(&turns).dispatch());
        let mut runtime = Self {
            compatibility: engine::compatibility(&engine),
            linkers,
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
            code: self.linkers.link(name, &compiled)?,
            made: Made {
                bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
                memories: required(|required| required.num_memories),
                tables: required(|required| required.num_tables),
                ..made
            },
        });
        let mut all = self.loaded.lock();
        // Another plugin with these bytes may have come first.
        if let Some(loaded) = all.get(&key).and_then(Weak::upgrade) {
            return Ok(module(loaded));
        }
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
