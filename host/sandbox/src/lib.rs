//! Runs untrusted plugins: WebAssembly in a sandbox, scripts as confined child processes.
//!
//! A plugin file goes through [`loader`] and [`manifest`] to the [`Supervisor`], which runs
//! it as a WASI guest ([`wasm`]) or as a child process ([`NativeScript`]); its output
//! becomes log events in [`log_stream`]. Nothing here knows the cache or the wire.
#![deny(unsafe_code)]

pub mod grants;
pub mod host_api;
pub mod limit;
pub mod loader;
pub mod manifest;
pub mod policy;
pub mod provenance;

mod token_bucket;

mod native_script;
pub mod outbound;
mod python;
pub mod wasm;

pub mod log_stream;
pub mod supervisor;

pub mod prove;

pub use grants::{Access, Directories, Directory, HttpGrant};
pub use host_api::{CallFailure, PluginCounts, PluginHost, RankFailure, RankRequest, Services};
pub use limit::{Limit, LimitHits, LimitUse};
pub use loader::{Found, LoadError, PluginKind, Refusal};
pub use log_stream::{LogCounts, LogLevel, LogLimits, LogLine, LogStream, OutputStream};
pub use manifest::{Limits, Manifest, ManifestError, ProcessGrants, Restart};
pub use native_script::{
    Containment, Granted, KEEPER_ARGUMENT, NativeConfig, NativePolicy, NativeScript, ProcessEnd,
    ProcessLimits, Protection, ScriptEnd, ScriptError, ScriptOutput, keeper_main, passed_on,
};
pub use outbound::{Network, Outbound, OutboundLimits};
pub use policy::{Origin, Policy};
pub use provenance::{PublicKey, SecretKey, Sha256Digest};
pub use supervisor::{
    Contract, FIRST_BACKOFF, PluginState, PluginStatus, Supervisor, SupervisorConfig,
    SupervisorError,
};
pub use wasm::{
    COMPILE_ARGUMENT, CompileLimits, Compiler, ModuleForm, WasmConfig, WasmEnd, WasmError,
    WasmLimits, compile_child_main,
};
