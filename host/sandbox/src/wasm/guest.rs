//! One run of a module: its store, its limits and what its end means.

use std::{
    os::fd::AsRawFd as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use wasmtime::{
    Engine, InstancePre, Linker, ResourceLimiter, Store, Trap, UpdateDeadline, component,
};
use wasmtime_wasi::{
    FsPerms, I32Exit, WasiCtxBuilder, WasiCtxView, WasiView,
    p1::{self, WasiP1Ctx},
    p2::{self, bindings::CommandPre},
};

use super::{
    Access, Directory, GUEST_STACK, GuestOutput, GuestStream, WasmEnd, WasmLimits, component_files,
    filesystem::{self, Files, HostCallTimeout, OpenDirectory},
    handler_clock::HandlerClock,
    imports::{self, Api},
    launch::Lift,
    reactor, streams,
};
use crate::{
    host_api,
    limit::{Limit, LimitHits},
    outbound::Outbound,
};

/// What one host call may make the host read of the guest's memory, in bytes.
const HOSTCALL_FUEL: usize = 1 << 20;

/// What one `random_get` may ask for, in bytes.
const RANDOM_LIMIT: u64 = 64 << 10;

/// How many streams, pollables and the like a guest may hold at once.
const HANDLE_LIMIT: usize = 256;

/// No stack of a guest is larger, in bytes, that of `prove`'s tests included.
const STACK_REACH: usize = 64 << 20;

/// What a run has used, as others may read it.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) memory: AtomicU64,
    pub(super) memory_peak: AtomicU64,
    pub(super) table_elements: AtomicU64,
    pub(super) table_elements_peak: AtomicU64,
    pub(super) cpu_nanoseconds: AtomicU64,
    /// Processor time of other threads that the run has yet to pay for.
    pub(super) charged_nanoseconds: AtomicU64,
    pub(super) handler_clock: HandlerClock,
    pub(super) host_call_longest: AtomicU64,
    pub(super) open_files_peak: AtomicU64,
    pub(super) directory_bytes: AtomicU64,
    pub(super) environment_bytes: AtomicU64,
    /// The time after the beginning to which what was taken is paid for.
    pub(super) burst_paid_nanoseconds: AtomicU64,
    pub(super) call_longest: AtomicU64,
    pub(super) stack: StackDepth,
    /// When it was instantiated, start function and all.
    pub(super) started: OnceLock<Instant>,
    hits: [AtomicU64; Limit::ALL.len()],
}

impl Meter {
    /// Counts that a limit held.
    pub(super) fn hit(&self, limit: Limit) {
        if let Some(count) = self.hits.get(limit as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It has started.
    pub(super) fn has_started(&self) {
        let _ = self.started.set(Instant::now());
    }

    /// A handler took so long.
    pub(super) fn called(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.call_longest.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    pub(super) fn hits(&self) -> LimitHits {
        let mut hits = LimitHits::default();
        for (limit, count) in Limit::ALL.into_iter().zip(&self.hits) {
            hits.add(limit, count.load(Ordering::Relaxed));
        }
        hits
    }
}

/// How deep a guest's stack was seen. Host calls run on the stack of the guest that makes them, so
/// the place of one of their variables tells how much of it is taken.
#[derive(Debug, Default)]
pub(super) struct StackDepth {
    /// The shallowest and the deepest address; 0 where there is none.
    shallowest: AtomicUsize,
    deepest: AtomicUsize,
}

impl StackDepth {
    /// Looks at the stack of the caller.
    fn look(&self) {
        let here = 0_u8;
        let address = std::ptr::from_ref(std::hint::black_box(&here)).addr();
        self.note(address);
    }

    fn note(&self, address: usize) {
        let shallowest = self.shallowest.load(Ordering::Relaxed);
        // Far from the others it is no guest's stack, but the thread's own.
        if shallowest != 0 && shallowest.abs_diff(address) > STACK_REACH {
            return;
        }
        // Only the guests' thread gets here.
        self.shallowest
            .store(shallowest.max(address), Ordering::Relaxed);
        let deepest = self.deepest.load(Ordering::Relaxed);
        if deepest == 0 || address < deepest {
            self.deepest.store(address, Ordering::Relaxed);
        }
    }

    /// All `bytes` of it were taken, which ended the guest.
    fn is_full(&self, bytes: usize) {
        let shallowest = self.shallowest.load(Ordering::Relaxed).max(bytes + 1);
        self.shallowest.store(shallowest, Ordering::Relaxed);
        self.deepest.store(shallowest - bytes, Ordering::Relaxed);
    }

    /// Bytes between the shallowest and the deepest.
    pub(super) fn deepest(&self) -> u64 {
        let [shallowest, deepest] =
            [&self.shallowest, &self.deepest].map(|it| it.load(Ordering::Relaxed));
        as_u64(shallowest.saturating_sub(deepest))
    }
}

/// Compiled code with its imports resolved.
#[derive(Clone)]
pub(super) enum Code {
    /// A core module for preview 1 that runs until it ends.
    Module(InstancePre<GuestState>),
    /// A core module whose handlers are called.
    Reactor(InstancePre<GuestState>),
    /// A component for WASI 0.2.
    Component(CommandPre<GuestState>),
}

/// What a store holds for host calls.
pub(super) struct GuestState {
    pub(super) wasi: WasiP1Ctx,
    pub(super) files: Files,
    /// The way to the hosts that were granted.
    pub(super) outbound: Arc<Outbound>,
    pub(super) api: Api,
    limiter: Limiter,
}

impl GuestState {
    /// The limits' side of every call of the host.
    pub(super) fn note_stack(&self) {
        self.limiter.meter.stack.look();
    }
}

impl WasiView for GuestState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.note_stack();
        self.wasi.ctx()
    }
}

/// What a plugin is given.
pub(super) struct Invocation {
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    pub(super) directories: Vec<Directory>,
    pub(super) input: streams::StopInput,
    pub(super) output: Arc<dyn GuestOutput>,
    pub(super) limits: WasmLimits,
    pub(super) meter: Arc<Meter>,
    pub(super) outbound: Arc<Outbound>,
    pub(super) access: host_api::Access,
}

/// Holds a guest to its memory, over all its memories and tables.
struct Limiter {
    memory_limit: u64,
    table_limit: u64,
    /// Of instances, tables and memories.
    counts: [usize; 3],
    /// Granted, in bytes.
    memory: u64,
    /// Granted, in elements.
    elements: u64,
    /// What the latest grant added, given back when the system then refuses it.
    latest_memory: u64,
    latest_elements: u64,
    /// What was last refused, for a module that does not even start.
    refused: Option<String>,
    meter: Arc<Meter>,
}

impl Limiter {
    fn refuse(&mut self, limit: Limit, what: String) -> bool {
        self.refused = Some(what);
        self.meter.hit(limit);
        false
    }

    fn note_memory(&mut self, memory: u64) {
        self.memory = memory;
        self.meter.memory.store(memory, Ordering::Relaxed);
        self.meter.memory_peak.fetch_max(memory, Ordering::Relaxed);
    }

    fn note_elements(&mut self, elements: u64) {
        self.elements = elements;
        self.meter.table_elements.store(elements, Ordering::Relaxed);
        self.meter
            .table_elements_peak
            .fetch_max(elements, Ordering::Relaxed);
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // Wasmtime refuses these itself, after asking.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(true);
        }
        let added = as_u64(desired.saturating_sub(current));
        let total = self.memory.saturating_add(added);
        if total > self.memory_limit {
            let limit = self.memory_limit;
            let what = format!("{total} bytes of memory, of {limit} at most");
            return Ok(self.refuse(Limit::Memory, what));
        }
        self.latest_memory = added;
        self.note_memory(total);
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        let memory = self.memory.saturating_sub(self.latest_memory);
        self.latest_memory = 0;
        self.note_memory(memory);
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(true);
        }
        let added = as_u64(desired.saturating_sub(current));
        let total = self.elements.saturating_add(added);
        if total > self.table_limit {
            let limit = self.table_limit;
            let what = format!("{total} table elements, of {limit} at most");
            return Ok(self.refuse(Limit::TableElements, what));
        }
        self.latest_elements = added;
        self.note_elements(total);
        Ok(true)
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        let elements = self.elements.saturating_sub(self.latest_elements);
        self.latest_elements = 0;
        self.note_elements(elements);
        Ok(())
    }

    fn instances(&self) -> usize {
        self.counts[0]
    }

    fn tables(&self) -> usize {
        self.counts[1]
    }

    fn memories(&self) -> usize {
        self.counts[2]
    }
}

/// WASI preview 1, the functions of `stockade:plugin/v1`, and nothing else.
pub(super) fn new_linker(engine: &Engine) -> wasmtime::Result<Linker<GuestState>> {
    let mut linker = Linker::new(engine);
    p1::add_to_linker_async(&mut linker, |state: &mut GuestState| {
        state.note_stack();
        &mut state.wasi
    })?;
    filesystem::add_to_linker(&mut linker)?;
    imports::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// WASI 0.2 for commands and nothing else.
pub(super) fn new_component_linker(
    engine: &Engine,
) -> wasmtime::Result<component::Linker<GuestState>> {
    let mut linker = component::Linker::new(engine);
    p2::add_to_linker_async(&mut linker)?;
    component_files::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// Runs a guest to its end. Instantiating belongs to the run, as a start function may loop.
pub(super) async fn run(code: Code, engine: Engine, invocation: Invocation) -> WasmEnd {
    let meter = Arc::clone(&invocation.meter);
    let size = environment_size(&invocation);
    meter.environment_bytes.store(size, Ordering::Relaxed);
    let limit = invocation.limits.environment_bytes;
    if size > limit {
        meter.hit(Limit::Environment);
        return WasmEnd::LimitHit(format!(
            "its arguments and environment have {size} bytes, of {limit} at most"
        ));
    }
    let time = invocation.limits.host_call_time;
    let mut store = match filesystem::open(invocation.directories.clone(), time).await {
        Ok(directories) => match new_store(&engine, invocation, directories, &code) {
            Ok(store) => store,
            Err(error) => return WasmEnd::Refused(format!("{error:#}")),
        },
        Err(reason) => return WasmEnd::Refused(reason),
    };
    // The outer result is that of instantiating, the inner one that of running.
    let outcome: wasmtime::Result<wasmtime::Result<Result<(), ()>>> = match code {
        Code::Module(module) => {
            let started = async {
                let instance = module.instantiate_async(&mut store).await?;
                instance.get_typed_func::<(), ()>(&mut store, "_start")
            };
            match started.await {
                Ok(start) => {
                    meter.has_started();
                    Ok(start.call_async(&mut store, ()).await.map(Ok))
                }
                Err(error) => Err(error),
            }
        }
        Code::Reactor(module) => {
            let started = async {
                let instance = module.instantiate_async(&mut store).await?;
                reactor::initialize(&mut store, &instance).await?;
                Ok(instance)
            };
            match started.await {
                Ok(instance) => Ok(reactor::serve(&mut store, &instance).await.map(Ok)),
                Err(error) => Err(error),
            }
        }
        Code::Component(command) => match command.instantiate_async(&mut store).await {
            Ok(command) => {
                meter.has_started();
                Ok(command.wasi_cli_run().call_run(&mut store).await)
            }
            Err(error) => Err(error),
        },
    };
    let refused = store.data_mut().limiter.refused.take();
    drop(store);
    meter.memory.store(0, Ordering::Relaxed);
    meter.table_elements.store(0, Ordering::Relaxed);
    match outcome {
        Ok(Ok(Ok(()))) => WasmEnd::Exited(0),
        Ok(Ok(Err(()))) => WasmEnd::Exited(1),
        Ok(Err(error)) => judge(&error, refused, &meter),
        Err(error) => match (refused, error.is::<Trap>()) {
            (Some(refused), false) => WasmEnd::LimitHit(format!("it needs {refused}")),
            (refused, _) => judge(&error, refused, &meter),
        },
    }
}

fn environment_size(invocation: &Invocation) -> u64 {
    // With the NUL and the equals sign that each takes in the guest.
    let arguments = invocation
        .arguments
        .iter()
        .map(|argument| argument.len() + 1);
    let variables = invocation
        .environment
        .iter()
        .map(|(name, value)| name.len() + value.len() + 2);
    as_u64(arguments.chain(variables).sum())
}

fn new_store(
    engine: &Engine,
    invocation: Invocation,
    directories: Vec<OpenDirectory>,
    code: &Code,
) -> wasmtime::Result<Store<GuestState>> {
    let output = |stream| streams::PluginOutput {
        stream,
        sink: Arc::clone(&invocation.output),
    };
    // Nothing is inherited: without directories, sockets and name lookup, what is left are
    // the clocks, randomness and the three streams.
    let mut wasi = WasiCtxBuilder::new();
    let has_network = invocation.limits.lifted == Some(Lift::NETWORK);
    wasi.args(&invocation.arguments)
        .envs(&invocation.environment)
        .stdin(invocation.input)
        .stdout(output(GuestStream::Stdout))
        .stderr(output(GuestStream::Stderr))
        .max_random_size(RANDOM_LIMIT)
        .allow_tcp(has_network)
        .allow_udp(false)
        .allow_ip_name_lookup(false);
    for directory in &directories {
        let permissions = match directory.access {
            Access::ReadOnly => FsPerms::ReadOnly,
            Access::ReadWrite => FsPerms::ReadWrite,
        };
        // The directory that was opened before, whatever its path leads to by now.
        let path = format!("/proc/self/fd/{}", directory.file.as_raw_fd());
        wasi.preopened_dir(path, &directory.guest, permissions)?;
    }
    let mut wasi = wasi.build_p1();
    let limits = &invocation.limits;
    wasi.ctx().table.set_max_capacity(HANDLE_LIMIT);
    let files = Files::new(
        &directories,
        limits.host_call_time,
        limits.open_files,
        limits.directory_bytes,
        limits.lifted == Some(Lift::LINKS),
        Arc::clone(&invocation.meter),
    );
    let api = Api::new(
        invocation.access,
        Arc::clone(&invocation.output),
        Arc::clone(&invocation.meter),
        limits.host_call_time,
        !matches!(code, Code::Reactor(_)),
    );
    let limiter = Limiter {
        memory_limit: limits.memory_bytes,
        table_limit: limits.table_elements,
        counts: [limits.instances, limits.tables, limits.memories],
        memory: 0,
        elements: 0,
        latest_memory: 0,
        latest_elements: 0,
        refused: None,
        meter: invocation.meter,
    };
    let state = GuestState {
        wasi,
        files,
        outbound: invocation.outbound,
        api,
        limiter,
    };
    let mut store = Store::new(engine, state);
    store.limiter(|state| &mut state.limiter);
    store.set_hostcall_fuel(HOSTCALL_FUEL);
    // Giving the thread back each tick is all: the quota is kept around the polls.
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|store| {
        store.data().note_stack();
        Ok(UpdateDeadline::Yield(1))
    });
    Ok(store)
}

/// What an error that ended a guest says. A program that was refused memory usually aborts, so
/// its trap is laid on the limit.
fn judge(error: &wasmtime::Error, refused: Option<String>, meter: &Meter) -> WasmEnd {
    if let Some(exit) = error.downcast_ref::<I32Exit>() {
        return WasmEnd::Exited(exit.0);
    }
    if let Some(timeout) = error.downcast_ref::<HostCallTimeout>() {
        return WasmEnd::LimitHit(timeout.to_string());
    }
    match (error.downcast_ref::<Trap>(), refused) {
        (Some(Trap::UnreachableCodeReached), Some(refused)) => {
            WasmEnd::LimitHit(format!("it was refused {refused}, and gave up"))
        }
        (Some(trap), _) => {
            if *trap == Trap::StackOverflow {
                meter.hit(Limit::Stack);
                meter.stack.is_full(GUEST_STACK);
            }
            WasmEnd::Trapped(trap.to_string())
        }
        (None, _) => {
            let reason = error.root_cause().to_string();
            // What wasmtime says of the counts that it takes from the limiter.
            for (what, limit) in [
                ("instance", Limit::Instances),
                ("table", Limit::Tables),
                ("memory", Limit::Memories),
            ] {
                if reason.starts_with(&format!("resource limit exceeded: {what}")) {
                    meter.hit(limit);
                    return WasmEnd::LimitHit(reason);
                }
            }
            WasmEnd::Trapped(reason)
        }
    }
}

fn as_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}
