//! The engine's settings, which the compile child and the runtime must share, and its clock.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use wasmtime::{
    Config, Engine, EngineWeak, InstanceAllocationStrategy, OptLevel, Strategy, WasmFeatures,
};

/// How long a guest runs before it lets others run.
pub(super) const TICK: Duration = Duration::from_millis(5);

/// What a guest's stack may take, in bytes; beyond it is a trap.
pub const GUEST_STACK: usize = 512 << 10;

/// What host calls take above a guest's stack, in bytes.
const HOST_STACK: usize = 512 << 10;

/// The proposals that modules may use beside WebAssembly 1.0: what Rust, C and Go compile to. All
/// else that wasmtime knows is off, also what a later version of it would turn on.
const ALLOWED: WasmFeatures = WasmFeatures::MUTABLE_GLOBAL
    .union(WasmFeatures::SATURATING_FLOAT_TO_INT)
    .union(WasmFeatures::SIGN_EXTENSION)
    .union(WasmFeatures::FLOATS)
    .union(WasmFeatures::REFERENCE_TYPES)
    .union(WasmFeatures::CALL_INDIRECT_OVERLONG)
    .union(WasmFeatures::MULTI_VALUE)
    .union(WasmFeatures::BULK_MEMORY)
    .union(WasmFeatures::BULK_MEMORY_OPT)
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::COMPONENT_MODEL);

/// The engine that plugins are compiled by and run on, with a stack of `stack` bytes, which
/// compiling does not depend on.
///
/// Only Cranelift and on-demand allocation: the security advisories of 2026 hit the baseline
/// compiler and the pooling allocator.
pub(super) fn new_engine(stack: usize) -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        .cranelift_opt_level(OptLevel::Speed)
        .epoch_interruption(true)
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
        .memory_init_cow(true)
        .memory_may_move(false)
        .memory_reservation(4 << 30)
        .memory_guard_size(32 << 20)
        .guard_before_linear_memory(true)
        .max_wasm_stack(stack)
        .async_stack_size(stack + HOST_STACK)
        .signals_based_traps(true)
        .wasm_features(WasmFeatures::all().difference(ALLOWED), false)
        .gc_support(false);
    Engine::new(&config)
}

/// Names the compiler, its settings and the processor: artefacts of another name are not ours.
pub(super) fn compatibility(engine: &Engine) -> u64 {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hasher.finish()
}

/// Advances the epoch until `stop` is set or nobody holds the engine any more, and counts
/// `ticks`, by which somebody else can see that it still runs.
pub(super) fn start_ticker(
    engine: EngineWeak,
    stop: Arc<AtomicBool>,
    ticks: Arc<AtomicU64>,
) -> io::Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name("wasm-epoch".to_owned())
        .spawn(move || {
            while !stop.load(Ordering::Acquire) {
                thread::sleep(TICK);
                // Weak, so that a forgotten ticker keeps no code mapped.
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                engine.increment_epoch();
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        })
}
