//! What a run and its module use of their limits.

use std::time::Duration;

use super::{CompileLimits, GUEST_STACK, Made, ModuleForm, WasmLimits};
use crate::{
    limit::{Limit, LimitHits, LimitUse},
    outbound::OutboundUse,
};

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
            (Limit::Stack, count(GUEST_STACK), self.peak_stack_bytes),
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
