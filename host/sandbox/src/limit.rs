//! The limits a plugin is held to, by name: what was declared, what is used, how often it was hit.

/// One limit. The list is closed, so that labels of metrics stay bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Linear memory over all memories, in bytes.
    Memory,
    /// Linear memories.
    Memories,
    /// Elements over all tables.
    TableElements,
    /// Tables.
    Tables,
    /// Instances of core modules in one run; components have several.
    Instances,
    /// The guest's stack, in bytes.
    Stack,
    /// Share of one core over time, in percent.
    Cpu,
    /// Processor time that a guest that slept may take at once, in milliseconds.
    CpuBurst,
    /// Wall time for instantiating, in milliseconds.
    StartTime,
    /// Wall time of a whole run, in milliseconds.
    RunTime,
    /// Wall time of one host call that waits for the system, in milliseconds.
    HostCallTime,
    /// Arguments and environment, in bytes.
    Environment,
    /// Files and directories open at once.
    OpenFiles,
    /// What writable directories may hold, in bytes.
    DirectoryBytes,
    /// Lines logged a second.
    LogLines,
    /// Bytes of output a second.
    LogBytes,
    /// Bytes of one line, and of one that has no end yet.
    LogLineBytes,
    /// Size of the module, in bytes.
    ModuleBytes,
    /// Functions the module defines.
    Functions,
    /// Names the module imports and exports.
    Names,
    /// Wall and processor time of the compiler, in milliseconds.
    CompileTime,
    /// Memory of the compiler, in bytes.
    CompileMemory,
    /// Hosts that it may send HTTP requests to; a hit is a request that was denied.
    HttpHosts,
    /// Outbound HTTP requests a second.
    HttpRequests,
    /// Wall time of one outbound HTTP request, in milliseconds.
    HttpTime,
    /// Body of an outbound HTTP request and of its response, in bytes.
    HttpBody,
    /// Wall time of one handler, in milliseconds.
    CallTime,
    /// Wall time until an order for eviction, in milliseconds.
    RankTime,
    /// Keys and values that it keeps, in bytes.
    StateBytes,
    /// Events that may wait for it.
    QueuedEvents,
    /// Metrics of its own.
    Metrics,
}

impl Limit {
    /// All of them, in the order they are shown.
    pub const ALL: [Self; 31] = [
        Self::Memory,
        Self::Memories,
        Self::TableElements,
        Self::Tables,
        Self::Instances,
        Self::Stack,
        Self::Cpu,
        Self::CpuBurst,
        Self::StartTime,
        Self::RunTime,
        Self::HostCallTime,
        Self::Environment,
        Self::OpenFiles,
        Self::DirectoryBytes,
        Self::LogLines,
        Self::LogBytes,
        Self::LogLineBytes,
        Self::ModuleBytes,
        Self::Functions,
        Self::Names,
        Self::CompileTime,
        Self::CompileMemory,
        Self::HttpHosts,
        Self::HttpRequests,
        Self::HttpTime,
        Self::HttpBody,
        Self::CallTime,
        Self::RankTime,
        Self::StateBytes,
        Self::QueuedEvents,
        Self::Metrics,
    ];

    /// The name in the API and in metrics; its end is the unit.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory_bytes",
            Self::Memories => "memories",
            Self::TableElements => "table_elements",
            Self::Tables => "tables",
            Self::Instances => "instances",
            Self::Stack => "stack_bytes",
            Self::Cpu => "cpu_percent",
            Self::CpuBurst => "cpu_burst_ms",
            Self::StartTime => "start_ms",
            Self::RunTime => "run_ms",
            Self::HostCallTime => "host_call_ms",
            Self::Environment => "environment_bytes",
            Self::OpenFiles => "open_files",
            Self::DirectoryBytes => "directory_bytes",
            Self::LogLines => "log_lines_per_second",
            Self::LogBytes => "log_bytes_per_second",
            Self::LogLineBytes => "log_line_bytes",
            Self::ModuleBytes => "module_bytes",
            Self::Functions => "module_functions",
            Self::Names => "module_names",
            Self::CompileTime => "compile_ms",
            Self::CompileMemory => "compile_memory_bytes",
            Self::HttpHosts => "http_hosts",
            Self::HttpRequests => "http_requests_per_second",
            Self::HttpTime => "http_request_ms",
            Self::HttpBody => "http_body_bytes",
            Self::CallTime => "call_ms",
            Self::RankTime => "rank_ms",
            Self::StateBytes => "state_bytes",
            Self::QueuedEvents => "queued_events",
            Self::Metrics => "metrics",
        }
    }
}

/// How often each limit was hit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitHits([u64; Limit::ALL.len()]);

impl LimitHits {
    /// How often `limit` was hit.
    #[must_use]
    pub fn of(&self, limit: Limit) -> u64 {
        self.0.get(limit as usize).copied().unwrap_or_default()
    }

    /// Counts hits.
    pub fn add(&mut self, limit: Limit, hits: u64) {
        if let Some(count) = self.0.get_mut(limit as usize) {
            *count = count.saturating_add(hits);
        }
    }

    /// Counts all hits of another run.
    pub fn add_all(&mut self, other: &Self) {
        for limit in Limit::ALL {
            self.add(limit, other.of(limit));
        }
    }
}

/// A limit as it stands for one plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitUse {
    /// Which.
    pub limit: Limit,
    /// What is allowed; 0 is no limit, which only the run time can have.
    pub declared: u64,
    /// What is used now, or the most that was used, or was by what is over.
    pub used: u64,
    /// How often it was hit since the server's start.
    pub hits: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_use_of_every_limit_is_described() {
        let page = include_str!("../../../docs/plugins/security.md");
        for limit in Limit::ALL {
            let name = format!("`{}`", limit.name());
            assert!(page.contains(&name), "{name} is not in security.md");
        }
    }

    #[test]
    fn every_limit_has_a_place_and_a_name_of_its_own() {
        let mut hits = LimitHits::default();
        for (place, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, place);
            hits.add(limit, place as u64);
            assert_eq!(hits.of(limit), place as u64);
        }
        let mut names: Vec<_> = Limit::ALL.iter().map(|limit| limit.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Limit::ALL.len());
    }
}
