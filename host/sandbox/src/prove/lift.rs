//! Switches limiters off, one at a time, to see that the attacks find it. Not in a release build.

use std::time::Duration;

use super::{ADDRESSES, COMPILE, DIRECTORIES, ENVIRONMENT, Held, MEMORIES};
use crate::{grants::Access, limit::Limit, wasm::Lift};

/// No limit that an attack comes to, and no sum of a few of them overflows.
const ENDLESS: Duration = Duration::from_secs(1 << 20);

impl Held {
    /// The same, but for the limiter that the attack `what` is on.
    ///
    /// # Errors
    /// There is no such attack.
    pub fn without(&self, what: &str) -> Result<Self, String> {
        let mut held = self.clone();
        let limits = &mut held.limits;
        let limit = Limit::ALL.into_iter().find(|limit| limit.name() == what);
        let lifts = [Lift::KILL, Lift::NETWORK, Lift::LINKS];
        let Some(limit) = limit else {
            match what {
                MEMORIES => limits.memory_bytes *= 8,
                ENVIRONMENT => held.environment.push(("SECRET".to_owned(), "1".to_owned())),
                DIRECTORIES => held.directories = Some(Access::ReadWrite),
                ADDRESSES => held.trusts_names = true,
                COMPILE => {
                    held.compile.time = ENDLESS;
                    held.compile.memory_bytes = 1 << 40;
                    // One that is over the limits of a test, and not endless without any.
                    held.bomb_depth = held.bomb_depth.min(180);
                }
                _ => match lifts.into_iter().find(|lift| lift.name() == what) {
                    Some(lift) => limits.lifted = Some(lift),
                    None => return Err(format!("there is no attack {what:?}")),
                },
            }
            return Ok(held);
        };
        match limit {
            Limit::Memory => limits.memory_bytes *= 8,
            Limit::Memories => limits.memories = usize::MAX,
            Limit::TableElements => limits.table_elements *= 100,
            Limit::Tables => limits.tables = usize::MAX,
            Limit::Instances => limits.instances = usize::MAX,
            Limit::Stack => held.stack_bytes *= 32,
            Limit::Cpu => limits.cpu_percent = 100,
            Limit::CpuBurst => limits.cpu_burst = Duration::from_secs(10),
            Limit::StartTime => limits.start_time = ENDLESS,
            Limit::RunTime => limits.run_time = None,
            Limit::HostCallTime => limits.host_call_time = ENDLESS,
            Limit::Environment => limits.environment_bytes = 1 << 30,
            Limit::OpenFiles => limits.open_files = 200,
            Limit::DirectoryBytes => {
                limits.directory_bytes = limits.directory_bytes * 8 + (4 << 20)
            }
            Limit::LogLines => held.log.lines_per_second = 1_000_000,
            Limit::LogBytes => held.log.bytes_per_second = 1 << 30,
            Limit::LogLineBytes => held.log.line_bytes *= 8,
            Limit::ModuleBytes => held.form.bytes = 1 << 30,
            Limit::Functions => held.form.functions = 1 << 30,
            Limit::Names => held.form.names = 1 << 30,
            Limit::CompileTime | Limit::CompileMemory => return self.without(COMPILE),
            Limit::HttpHosts => held.http_hosts = 2,
            Limit::HttpRequests => limits.outbound.per_second = 1_000_000,
            Limit::HttpTime => limits.outbound.timeout = ENDLESS,
            Limit::HttpBody => limits.outbound.body_bytes = 1 << 30,
            Limit::CallTime => held.terms.call_time = ENDLESS,
            Limit::RankTime => held.terms.rank_time = ENDLESS,
            Limit::StateBytes => held.terms.state_bytes = 1 << 30,
            Limit::Metrics => held.terms.metrics = 1000,
            Limit::QueuedEvents => held.terms.queued_events = 1 << 30,
        }
        Ok(held)
    }
}
