//! Why a module is refused or a runtime does not start.

use std::{io, path::PathBuf};

use thiserror::Error;

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
    /// A component, which this version does not run.
    #[error(
        "{name} is a component: components are not yet served, build it for wasm32-wasip1 instead"
    )]
    Component {
        /// The plugin's name.
        name: String,
    },
    /// An import that nothing grants.
    #[error(
        "{name} imports {module}.{field}, which is not granted; \
         a plugin gets WASI preview 1 (wasi_snapshot_preview1) and nothing else"
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
    /// No entry point.
    #[error(
        "{name} exports no _start function without parameters and results; build it as a command, not as a library"
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
