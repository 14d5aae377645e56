//! LMCache 0.5.6's flags that are not settings of ours: refused by name, or accepted with a warning.

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};

/// What becomes of a flag that `lmcache server` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It would change what the cache does, and we do not do that.
    Refused,
    /// It only tunes LMCache's Python process; nothing is lost by going on without it.
    Ignored,
    /// Asking for it is asking for what we do anyway.
    Harmless,
}

struct LmcacheFlag {
    name: &'static str,
    /// Most values that the flag takes: 0 for a switch, 1, or `usize::MAX` for a list.
    values: usize,
    verdict: Verdict,
    reason: &'static str,
}

const fn refused(name: &'static str, values: usize, reason: &'static str) -> LmcacheFlag {
    LmcacheFlag {
        name,
        values,
        verdict: Verdict::Refused,
        reason,
    }
}
const fn ignored(name: &'static str, values: usize, reason: &'static str) -> LmcacheFlag {
    LmcacheFlag {
        name,
        values,
        verdict: Verdict::Ignored,
        reason,
    }
}
const fn harmless(name: &'static str, values: usize) -> LmcacheFlag {
    LmcacheFlag {
        name,
        values,
        verdict: Verdict::Harmless,
        reason: "",
    }
}

const LIST: usize = usize::MAX;
const WORKERS: &str = "requests run on async tasks, there is no worker pool to size";
const NO_GC: &str = "there is no garbage collector to monitor";
const NO_BLEND: &str = "CacheBlend is not served; leave it out and use prefix caching";
const NO_P2P: &str = "peer-to-peer reads are not served; leave it out";
const OLD_COORDINATOR: &str = "LMCache gave this name up; use --coordinator-event-reporting and --coordinator-event-flush-interval";
const NO_KAFKA: &str = "events go to the coordinator over HTTP; leave it out";
const NO_GDS: &str = "the pool lives in host memory; leave it out and use --l1-size-gb";
const NO_DEVDAX: &str = "the pool is a shared-memory segment; leave it out and use --l1-size-gb";
const NO_SCRIPT: &str =
    "running callers' scripts in the server is remote code execution; write a plugin";

/// `lmcache server --help` of 0.5.6 less what [`super::Settings`] covers.
const FLAGS: &[LmcacheFlag] = &[
    refused(
        "l1-manager",
        LIST,
        "tagged L1 managers are not served; use --l1-size-gb, --eviction-policy and the --l1-* flags",
    ),
    ignored("max-workers", 1, WORKERS),
    ignored("max-gpu-workers", 1, WORKERS),
    ignored("max-cpu-workers", 1, WORKERS),
    ignored("grpc-server-workers", 1, WORKERS),
    refused(
        "isolated-ipc",
        0,
        "it concerns CUDA IPC, which is not served; leave it out",
    ),
    harmless("no-isolated-ipc", 0),
    refused("script-allowed-imports", LIST, NO_SCRIPT),
    refused("run-script-api-enabled", 0, NO_SCRIPT),
    harmless("no-run-script-api-enabled", 0),
    refused(
        "separate-object-groups",
        0,
        "kernel groups exist on the lmcache-driven path only; leave it out",
    ),
    harmless("no-separate-object-groups", 0),
    refused("enable-segmented-prefix", 0, NO_BLEND),
    refused("enable-dedup-content", 0, NO_BLEND),
    refused("enable-blend-reorder", 0, NO_BLEND),
    refused(
        "enable",
        LIST,
        "experimental transfer modules are not served; leave it out",
    ),
    refused(
        "server-module",
        LIST,
        "server modules are Python run inside the server; write a sandboxed plugin and use --runtime-plugin-locations",
    ),
    refused("p2p-advertise-url", 1, NO_P2P),
    refused("p2p-listen-url", 1, NO_P2P),
    refused("p2p-lookup-timeout", 1, NO_P2P),
    refused("p2p-load-timeout", 1, NO_P2P),
    refused("p2p-transfer-engine", 1, NO_P2P),
    refused(
        "l1-use-hugepages",
        0,
        "it excludes shared memory in LMCache too; leave it out, transparent huge pages are used where the kernel gives them",
    ),
    harmless("no-l1-use-hugepages", 0),
    refused("l1-devdax-path", 1, NO_DEVDAX),
    refused("gds-l1-path", 1, NO_GDS),
    refused("gds-l1-use-direct-io", 0, NO_GDS),
    harmless("no-gds-l1-use-direct-io", 0),
    refused("gds-l1-backend", 1, NO_GDS),
    ignored(
        "periodic-notifier-interval-ms",
        1,
        "events are pushed when they happen",
    ),
    refused(
        "disable-observability",
        0,
        "counters cost nothing here and cannot be turned off; leave it out",
    ),
    ignored(
        "disable-metrics",
        0,
        "counters cost nothing here and cannot be turned off",
    ),
    harmless("disable-grpc-metrics", 0),
    ignored(
        "disable-logging",
        0,
        "use --log-level error for a quiet server",
    ),
    ignored("event-bus-queue-size", 1, "there is no event bus to size"),
    ignored("metrics-sample-rate", 1, "every event is counted"),
    ignored("enable-gc-monitor", 0, NO_GC),
    ignored("gc-monitor-min-pause-ms", 1, NO_GC),
    ignored("gc-monitor-top-objects", 1, NO_GC),
    ignored("enable-extra-logging", 0, "throughput is on /metrics"),
    ignored("extra-logging-interval", 1, "throughput is on /metrics"),
    refused(
        "trace-level",
        1,
        "storage traces are not recorded in this release; leave it out",
    ),
    refused(
        "trace-output",
        1,
        "storage traces are not recorded in this release; leave it out",
    ),
    refused("coordinator-kafka-bootstrap-servers", 1, NO_KAFKA),
    refused("coordinator-kafka-topic", 1, NO_KAFKA),
    refused("coordinator-kafka-delivery-timeout", 1, NO_KAFKA),
    refused("coordinator-blend-timeout", 1, NO_BLEND),
    refused("coordinator-blend-match-concurrency", 1, NO_BLEND),
    refused("coordinator-l2-event-reporting", 0, OLD_COORDINATOR),
    refused("coordinator-l2-event-flush-interval", 1, OLD_COORDINATOR),
];

/// Teaches `serve` these flags, hidden, so that they are told from typing errors.
pub(crate) fn augment(mut serve: Command) -> Command {
    for flag in FLAGS {
        let arg = Arg::new(flag.name).long(flag.name).hide(true);
        serve = serve.arg(match flag.values {
            0 => arg.action(ArgAction::SetTrue),
            1 => arg
                .num_args(1)
                .allow_hyphen_values(true)
                .action(ArgAction::Append),
            _ => arg.num_args(0..).action(ArgAction::Append),
        });
    }
    serve
}

/// Sorts the LMCache-only flags that were given.
///
/// Returns one warning per accepted flag.
///
/// # Errors
/// The sentence for the first refused flag: its name, the reason and what to do.
pub(crate) fn judge(serve: &ArgMatches) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    for flag in FLAGS {
        if serve.value_source(flag.name) != Some(ValueSource::CommandLine) {
            continue;
        }
        match flag.verdict {
            Verdict::Refused => return Err(format!("--{}: {}", flag.name, flag.reason)),
            Verdict::Ignored => {
                warnings.push(format!("--{} has no effect: {}", flag.name, flag.reason))
            }
            Verdict::Harmless => {}
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn reasons_say_what_to_do_and_names_are_unique() {
        let mut names: Vec<_> = FLAGS.iter().map(|flag| flag.name).collect();
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
        assert!(
            FLAGS
                .iter()
                .all(|flag| (flag.verdict == Verdict::Harmless) == flag.reason.is_empty())
        );
    }
}
