//! One run of a module: its store, its limits and what its end means.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use wasmtime::{Engine, InstancePre, Linker, ResourceLimiter, Store, Trap, UpdateDeadline};
use wasmtime_wasi::{
    I32Exit, WasiCtxBuilder, WasiView,
    p1::{self, WasiP1Ctx},
};

use super::{GuestOutput, GuestStream, WasmEnd, WasmLimits, streams};

/// What one host call may make the host read of the guest's memory, in bytes.
const HOSTCALL_FUEL: usize = 1 << 20;

/// What one `random_get` may ask for, in bytes.
const RANDOM_LIMIT: u64 = 64 << 10;

/// How many streams, pollables and the like a guest may hold at once.
const HANDLE_LIMIT: usize = 256;

/// How many tables a module may have; C, Rust and Go make one.
const TABLE_LIMIT: usize = 16;

/// What a run has used, as others may read it.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) memory: AtomicU64,
    pub(super) memory_peak: AtomicU64,
    pub(super) refused_growths: AtomicU64,
    pub(super) cpu_nanoseconds: Arc<AtomicU64>,
}

/// What a store holds for host calls.
pub(super) struct GuestState {
    wasi: WasiP1Ctx,
    limiter: Limiter,
}

/// What a plugin is given.
pub(super) struct Invocation {
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    pub(super) input: streams::StopInput,
    pub(super) output: Arc<dyn GuestOutput>,
    pub(super) limits: WasmLimits,
    pub(super) meter: Arc<Meter>,
}

/// Holds a guest to its memory, over all its memories and tables.
struct Limiter {
    memory_limit: u64,
    table_limit: u64,
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
    fn refuse(&mut self, what: String) -> bool {
        self.refused = Some(what);
        self.meter.refused_growths.fetch_add(1, Ordering::Relaxed);
        false
    }

    fn note_memory(&mut self, memory: u64) {
        self.memory = memory;
        self.meter.memory.store(memory, Ordering::Relaxed);
        self.meter.memory_peak.fetch_max(memory, Ordering::Relaxed);
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
            return Ok(self.refuse(format!("{total} bytes of memory, of {limit} at most")));
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
            return Ok(self.refuse(format!("{total} table elements, of {limit} at most")));
        }
        self.latest_elements = added;
        self.elements = total;
        Ok(true)
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.elements = self.elements.saturating_sub(self.latest_elements);
        self.latest_elements = 0;
        Ok(())
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        TABLE_LIMIT
    }

    fn memories(&self) -> usize {
        1
    }
}

/// WASI preview 1 and nothing else.
pub(super) fn new_linker(engine: &Engine) -> wasmtime::Result<Linker<GuestState>> {
    let mut linker = Linker::new(engine);
    p1::add_to_linker_async(&mut linker, |state: &mut GuestState| &mut state.wasi)?;
    Ok(linker)
}

/// Runs `_start` to its end. Instantiating belongs to the run, as a start function may loop.
pub(super) async fn run(module: InstancePre<GuestState>, invocation: Invocation) -> WasmEnd {
    let meter = Arc::clone(&invocation.meter);
    let mut store = new_store(module.module().engine(), invocation);
    let outcome: wasmtime::Result<wasmtime::Result<()>> = async {
        let instance = module.instantiate_async(&mut store).await?;
        let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
        Ok(start.call_async(&mut store, ()).await)
    }
    .await;
    let refused = store.data_mut().limiter.refused.take();
    drop(store);
    meter.memory.store(0, Ordering::Relaxed);
    match outcome {
        Ok(Ok(())) => WasmEnd::Exited(0),
        Ok(Err(error)) => judge(&error, refused),
        Err(error) => match (refused, error.is::<Trap>()) {
            (Some(refused), false) => WasmEnd::LimitHit(format!("it needs {refused}")),
            (refused, _) => judge(&error, refused),
        },
    }
}

fn new_store(engine: &Engine, invocation: Invocation) -> Store<GuestState> {
    let output = |stream| streams::PluginOutput {
        stream,
        sink: Arc::clone(&invocation.output),
    };
    // Nothing is inherited: without directories, sockets and name lookup, what is left are
    // the clocks, randomness and the three streams.
    let mut wasi = WasiCtxBuilder::new()
        .args(&invocation.arguments)
        .envs(&invocation.environment)
        .stdin(invocation.input)
        .stdout(output(GuestStream::Stdout))
        .stderr(output(GuestStream::Stderr))
        .max_random_size(RANDOM_LIMIT)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build_p1();
    wasi.ctx().table.set_max_capacity(HANDLE_LIMIT);
    let limiter = Limiter {
        memory_limit: invocation.limits.memory_bytes,
        table_limit: invocation.limits.table_elements,
        memory: 0,
        elements: 0,
        latest_memory: 0,
        latest_elements: 0,
        refused: None,
        meter: invocation.meter,
    };
    let mut store = Store::new(engine, GuestState { wasi, limiter });
    store.limiter(|state| &mut state.limiter);
    store.set_hostcall_fuel(HOSTCALL_FUEL);
    // Giving the thread back each tick is all: the quota is kept around the polls.
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|_| Ok(UpdateDeadline::Yield(1)));
    store
}

/// What an error that ended a guest says. A program that was refused memory usually aborts, so
/// its trap is laid on the limit.
fn judge(error: &wasmtime::Error, refused: Option<String>) -> WasmEnd {
    if let Some(exit) = error.downcast_ref::<I32Exit>() {
        return WasmEnd::Exited(exit.0);
    }
    match (error.downcast_ref::<Trap>(), refused) {
        (Some(Trap::UnreachableCodeReached), Some(refused)) => {
            WasmEnd::LimitHit(format!("it was refused {refused}, and gave up"))
        }
        (Some(trap), _) => WasmEnd::Trapped(trap.to_string()),
        (None, _) => WasmEnd::Trapped(error.root_cause().to_string()),
    }
}

fn as_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}
