//! WebAssembly plugins: WASI preview 1 commands in a sandbox inside the server's process.
//!
//! A module is compiled in a child process ([`compile_child_main`]), cached, and run on one
//! thread that all guests share and that yields to everything else on the machine. A guest
//! has what it is passed - arguments, variables, two output streams, an input that ends when it
//! is to stop - with clocks and randomness, and nothing else.
#![deny(unsafe_code)]

mod artefact;
mod cache;
mod compiler;
mod engine;
mod error;
mod guest;
mod inspect;
mod quota;
mod streams;

use std::{
    fmt,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::process::setpriority_process;
use tokio::{runtime, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use wasmtime::{Engine, InstancePre, Linker, Module, UnknownImportError};

use self::{
    cache::Cache,
    guest::{GuestState, Invocation, Meter},
    quota::Metered,
    streams::StopInput,
};
pub use self::{
    compiler::{COMPILE_ARGUMENT, compile_child_main},
    error::WasmError,
};

/// The thread of the guests takes what the rest of the machine leaves.
const GUEST_NICE: i32 = 19;

/// How many guests run at once. Each takes six or seven of the 65530 maps that Linux gives a
/// process by default, and when those end the server's own allocations fail too.
const GUEST_LIMIT: usize = 4096;

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
}

/// How WebAssembly is compiled and kept.
#[derive(Clone, Debug)]
pub struct WasmConfig {
    /// Where compiled modules are kept. Created with mode 0700; refused when it is another
    /// user's or others can write it, as what lies there is run.
    pub cache_dir: PathBuf,
    /// What compiles.
    pub compiler: Compiler,
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

/// What one run may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WasmLimits {
    /// Linear memory, in bytes, over all memories. The C library that zig brings starts at
    /// 16.4 MiB, so anything below 17 MiB refuses its programs.
    pub memory_bytes: u64,
    /// Elements over all tables, of 8 bytes each.
    pub table_elements: u64,
    /// Processor time, in percent of one core, 1 to 100; what is outside is taken as the nearer.
    pub cpu_percent: u32,
}

impl Default for WasmLimits {
    /// 64 MiB, 100 000 table elements and half a core.
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            table_elements: 100_000,
            cpu_percent: 50,
        }
    }
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
    /// How often the guest was refused memory or table elements.
    pub refused_growths: u64,
    /// Processor time, host calls included.
    pub cpu_time: Duration,
}

/// A compiled module that may be run; cheap to clone.
#[derive(Clone)]
pub struct WasmModule {
    name: Arc<str>,
    digest: Arc<str>,
    instance: InstancePre<GuestState>,
}

impl WasmModule {
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

    /// What the run has used so far.
    pub fn usage(&self) -> WasmUsage {
        let meter = &self.meter;
        WasmUsage {
            memory_bytes: meter.memory.load(Ordering::Relaxed),
            peak_memory_bytes: meter.memory_peak.load(Ordering::Relaxed),
            refused_growths: meter.refused_growths.load(Ordering::Relaxed),
            cpu_time: Duration::from_nanos(meter.cpu_nanoseconds.load(Ordering::Relaxed)),
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
    cache: Cache,
    compiler: Compiler,
    compatibility: u64,
    /// One compilation at a time: each may take gigabytes.
    compiling: Mutex<()>,
    guests: runtime::Handle,
    live: Arc<AtomicUsize>,
    shutdown: CancellationToken,
    ticker_stop: Arc<AtomicBool>,
    guest_thread: Option<JoinHandle<()>>,
    ticker: Option<JoinHandle<()>>,
}

impl fmt::Debug for WasmRuntime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WasmRuntime")
            .field("cache", &self.cache)
            .field("compiler", &self.compiler)
            .field("guests", &self.live.load(Ordering::Relaxed))
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
        let engine = engine::new_engine().map_err(|error| failed(&error))?;
        let linker = guest::new_linker(&engine).map_err(|error| failed(&error))?;
        let shutdown = CancellationToken::new();
        let (guest_thread, guests) =
            start_guest_thread(shutdown.clone()).map_err(|error| failed(&error))?;
        let mut runtime = Self {
            compatibility: engine::compatibility(&engine),
            linker,
            cache,
            compiler: config.compiler,
            compiling: Mutex::new(()),
            guests,
            live: Arc::new(AtomicUsize::new(0)),
            shutdown,
            ticker_stop: Arc::new(AtomicBool::new(false)),
            guest_thread: Some(guest_thread),
            ticker: None,
            engine,
        };
        let stop = Arc::clone(&runtime.ticker_stop);
        let ticker =
            engine::start_ticker(runtime.engine.weak(), stop).map_err(|error| failed(&error))?;
        runtime.ticker = Some(ticker);
        Ok(runtime)
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
        inspect::inspect(name, bytes)?;
        let digest = blake3::hash(bytes).to_hex();
        let key = format!("{digest}-{:016x}", self.compatibility);
        let module = match self.load(&key) {
            Some(module) => module,
            None => self.compile(name, &key, bytes)?,
        };
        Ok(WasmModule {
            instance: self.check(name, &module)?,
            name: name.into(),
            digest: digest.as_str().into(),
        })
    }

    /// Runs a module's `_start`.
    ///
    /// `args` is the whole argument list, the program's name first; an empty one becomes the
    /// module's name. When `stop` is cancelled the guest's stdin reaches its end, and it may go
    /// on for as long as it wants; when `kill` is, it ends at its next turn, within 20 ms where
    /// it shares the thread with no more than three busy guests.
    #[expect(
        clippy::too_many_arguments,
        reason = "one call site, and every argument is another kind of thing"
    )]
    pub fn spawn(
        &self,
        module: &WasmModule,
        mut args: Vec<String>,
        env: Vec<(String, String)>,
        limits: &WasmLimits,
        output: Arc<dyn GuestOutput>,
        stop: CancellationToken,
        kill: CancellationToken,
    ) -> WasmRun {
        if args.is_empty() {
            args.push(module.name.to_string());
        }
        // A child of its own, so that dropping the handle kills this run and no other.
        let kill = kill.child_token();
        let meter = Arc::new(Meter::default());
        let (end, ended) = watch::channel(None);
        let run = WasmRun {
            ended,
            meter: Arc::clone(&meter),
            _kill: Arc::new(kill.clone().drop_guard()),
        };
        let Some(place) = Place::take(&self.live) else {
            end.send_replace(Some(WasmEnd::LimitHit(format!(
                "{GUEST_LIMIT} guests run already"
            ))));
            return run;
        };
        let taken = Arc::clone(&meter.cpu_nanoseconds);
        let guest = guest::run(
            module.instance.clone(),
            Invocation {
                arguments: args,
                environment: env,
                input: StopInput { stop },
                output,
                limits: limits.clone(),
                meter: Arc::clone(&meter),
            },
        );
        let guest = Metered::new(guest, limits.cpu_percent, taken);
        let engine = self.engine.clone();
        self.guests.spawn(async move {
            let ended = tokio::select! {
                biased;
                () = kill.cancelled() => WasmEnd::Killed,
                ended = guest => ended,
            };
            // Whoever is told of the end finds memory and place free.
            meter.memory.store(0, Ordering::Relaxed);
            drop((place, engine));
            end.send_replace(Some(ended));
        });
        run
    }

    fn load(&self, key: &str) -> Option<Module> {
        artefact::load(&self.engine, self.cache.open(key)?).ok()
    }

    fn compile(&self, name: &str, key: &str, bytes: &[u8]) -> Result<Module, WasmError> {
        let _one_at_a_time = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = self.load(key) {
            return Ok(module);
        }
        let failed = |error| self.cache.failed(error);
        let mut unfinished = self.cache.create().map_err(failed)?;
        match &self.compiler {
            Compiler::Child { program } => {
                compiler::compile_in_child(program, name, bytes, &unfinished.file)?;
            }
            Compiler::InProcess => compiler::compile_here(name, bytes, &mut unfinished.file)?,
        }
        self.cache.keep(key, unfinished).map_err(failed)?;
        self.load(key).ok_or_else(|| WasmError::CompilerFailed {
            name: name.to_owned(),
            reason: "what it wrote cannot be loaded".to_owned(),
        })
    }

    /// Refuses what does not fit the sandbox, and links the rest.
    fn check(&self, name: &str, module: &Module) -> Result<InstancePre<GuestState>, WasmError> {
        let has_start = module
            .get_export("_start")
            .and_then(|export| export.func().map(|f| f.params().len() + f.results().len()))
            .is_some_and(|values| values == 0);
        let instance = self.linker.instantiate_pre(module).map_err(|error| {
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
        })?;
        if has_start {
            Ok(instance)
        } else {
            Err(WasmError::NoStart {
                name: name.to_owned(),
            })
        }
    }
}

impl Drop for WasmRuntime {
    fn drop(&mut self) {
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

/// One of the places for running guests.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(live: &Arc<AtomicUsize>) -> Option<Self> {
        live.fetch_update(Ordering::AcqRel, Ordering::Acquire, |live| {
            (live < GUEST_LIMIT).then_some(live + 1)
        })
        .ok()?;
        Some(Self(Arc::clone(live)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts the thread that guests share; it ends, and all guests with it, at `shutdown`.
fn start_guest_thread(
    shutdown: CancellationToken,
) -> std::io::Result<(JoinHandle<()>, runtime::Handle)> {
    // With these intervals timers and wake-ups are looked at after every turn of a guest,
    // not after 61.
    let guests = runtime::Builder::new_current_thread()
        .enable_time()
        .event_interval(1)
        .global_queue_interval(1)
        .max_blocking_threads(1)
        .build()?;
    let handle = guests.handle().clone();
    let (started, start) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("wasm-guests".to_owned())
        .spawn(move || {
            // On Linux this is about the calling thread.
            let nice = setpriority_process(None, GUEST_NICE);
            let failed = nice.is_err();
            let _ = started.send(nice);
            if !failed {
                guests.block_on(shutdown.cancelled());
            }
        })?;
    start.recv().map_err(std::io::Error::other)??;
    Ok((thread, handle))
}
