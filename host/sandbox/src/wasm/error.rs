//! Why a module is refused or a runtime does not start.

use std::{io, path::PathBuf};

use thiserror::Error;

use crate::limit::Limit;

/// Why WebAssembly cannot be prepared or run.
#[derive(Debug, Error)]
pub enum WasmError {
    /// The bytes are neither a core module nor its text form.
    #[error("{name} is not a WebAssembly module: {reason}")]
    NotAModule {
        /// The plugin's name.
        name: String,
        /// What the decoder met.
        reason: String,
    },
    /// An import that nothing grants.
    #[error(
        "{name} imports {module}.{field}, which is not granted; \
         a module gets WASI preview 1 (wasi_snapshot_preview1) and stockade:plugin/v1, a component WASI 0.2 for commands, and nothing else"
    )]
    NotGranted {
        /// The plugin's name.
        name: String,
        /// The import's module part.
        module: String,
        /// The import's field part.
        field: String,
    },
    /// An import that is granted with another type.
    #[error("{name} imports something under a type it does not have: {reason}")]
    ImportType {
        /// The plugin's name.
        name: String,
        /// What differs.
        reason: String,
    },
    /// A version of the plugins' namespace that is not served.
    #[error(
        "{name} imports {wanted}, which this server does not have; it has {served}: build the plugin against that version, or update the server"
    )]
    ContractVersion {
        /// The plugin's name.
        name: String,
        /// The namespace that it imports.
        wanted: String,
        /// The namespace that is served.
        served: &'static str,
    },
    /// A function that the namespace does not have.
    #[error(
        "{name} imports {version}.{function}, which that version does not have; plugin-sdk/abi/README.md lists those that it has"
    )]
    ContractFunction {
        /// The plugin's name.
        name: String,
        /// The namespace.
        version: &'static str,
        /// The function.
        function: String,
    },
    /// A handler of another type.
    #[error("{name} exports {handler} with another type than (i32) -> i32")]
    HandlerType {
        /// The plugin's name.
        name: String,
        /// The export.
        handler: &'static str,
    },
    /// No entry point.
    #[error(
        "{name} exports no _start function without parameters and results, no handler such as stockade_start or stockade_timer, or, as a component, no wasi:cli/run; build it as a command, or export a handler"
    )]
    NoStart {
        /// The plugin's name.
        name: String,
    },
    /// Shared memory or atomics.
    #[error("{name} needs threads, which plugins do not get; build it for wasm32-wasip1")]
    Threads {
        /// The plugin's name.
        name: String,
    },
    /// The module uses a proposal that is switched off, or does not validate.
    #[error("{name} is refused: {reason}")]
    Invalid {
        /// The plugin's name.
        name: String,
        /// The validator's reason.
        reason: String,
    },
    /// More bytes than are compiled.
    #[error("{name} is too large: {bytes} bytes of {limit} at most")]
    TooLarge {
        /// The plugin's name.
        name: String,
        /// Its size in bytes.
        bytes: u64,
        /// The cap in bytes.
        limit: u64,
    },
    /// More functions than are compiled.
    #[error("{name} has too many functions: {functions} of {limit} at most")]
    TooManyFunctions {
        /// The plugin's name.
        name: String,
        /// How many it declares.
        functions: u64,
        /// The cap.
        limit: u64,
    },
    /// More imports and exports than any program has.
    #[error("{name} has too many names: it imports and exports {names}, of {limit} at most")]
    TooManyNames {
        /// The plugin's name.
        name: String,
        /// How many it imports and exports.
        names: u64,
        /// The cap.
        limit: u64,
    },
    /// Compilation ran out of time.
    #[error("{name} took more than the {seconds} seconds that compiling may take")]
    CompileTime {
        /// The plugin's name.
        name: String,
        /// The cap in seconds.
        seconds: u64,
    },
    /// Compilation ran out of memory or file size.
    #[error("{name} took more memory than the {bytes} bytes that compiling may take")]
    CompileMemory {
        /// The plugin's name.
        name: String,
        /// The cap in bytes.
        bytes: u64,
    },
    /// The compiler did not work, through no fault that could be laid on the module.
    #[error("compiling {name} failed: {reason}")]
    CompilerFailed {
        /// The plugin's name.
        name: String,
        /// What is known.
        reason: String,
    },
    /// The cache directory is not one that only we can write.
    #[error("cache_dir {} is refused: {reason}", path.display())]
    CacheDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The cache directory cannot be worked with.
    #[error("cache_dir {}: {source}", path.display())]
    Cache {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The engine, its threads or its functions could not be set up.
    #[error("the WebAssembly runtime does not start: {0}")]
    Runtime(String),
}

impl WasmError {
    /// The limit that refused the module, if one did.
    #[must_use]
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::TooLarge { .. } => Some(Limit::ModuleBytes),
            Self::TooManyFunctions { .. } => Some(Limit::Functions),
            Self::TooManyNames { .. } => Some(Limit::Names),
            Self::CompileTime { .. } => Some(Limit::CompileTime),
            Self::CompileMemory { .. } => Some(Limit::CompileMemory),
            _ => None,
        }
    }
}
