//! Reports what each tenant uses: `stockade_tenants.prom` for the textfile collector of Prometheus'
//! node_exporter, and one JSON line a report in `usage-<day>.jsonl` for billing.
//!
//! Memory is charged by what was held for how long: byte-seconds, the sum over the samples since the
//! plugin first ran, kept in its state.

use std::{collections::BTreeMap, fs, io::Write as _, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use stockade_plugin::{
    HandlerResult, Plugin, Shutdown, Start, Timer,
    cache::{self, TenantStats},
    config::Config,
    info, state, timer, warn,
};

/// Times between samples and between reports where nothing else is set.
const DEFAULT_SAMPLE: Duration = Duration::from_secs(5);
const DEFAULT_REPORT: Duration = Duration::from_secs(60);

/// Reports kept, in days, where nothing else is set.
const DEFAULT_KEEP_DAYS: u32 = 31;

/// The granted directory, as a plugin finds it.
const DIRECTORY: &str = "/reports";

/// Byte-seconds by tenant.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Held(BTreeMap<String, f64>);

impl Held {
    /// Adds what was held since the last sample, taking it to be what is held now.
    fn add(&mut self, tenants: &[TenantStats], seconds: f64) {
        for tenant in tenants {
            *self.0.entry(tenant.name.clone()).or_default() += tenant.used_bytes as f64 * seconds;
        }
    }

    fn of(&self, tenant: &TenantStats) -> f64 {
        self.0.get(&tenant.name).copied().unwrap_or_default()
    }
}

struct TenantUsage {
    directory: PathBuf,
    keep_days: u32,
    held: Held,
    sampled_ms: i64,
}

impl Plugin for TenantUsage {
    fn start(_: &Start) -> HandlerResult<Self> {
        let config = Config::load()?;
        let seconds = |name: &str, otherwise| -> HandlerResult<Duration> {
            Ok(config.seconds(name, 0.1..=86_400.0)?.unwrap_or(otherwise))
        };
        let sample = seconds("tenant_usage.sample_seconds", DEFAULT_SAMPLE)?;
        let report = seconds("tenant_usage.report_seconds", DEFAULT_REPORT)?;
        let keep_days = config
            .setting("tenant_usage.keep_days")?
            .unwrap_or(DEFAULT_KEEP_DAYS);
        // Native tests have no directory of that name.
        let directory = config.setting::<String>("tenant_usage.directory")?;
        let directory = PathBuf::from(directory.as_deref().unwrap_or(DIRECTORY));
        if !directory.is_dir() {
            let reason = format!(
                "{} is not there: grant it in [directories] of the plugin's manifest",
                directory.display()
            );
            return Err(reason.into());
        }
        let held = state::get_json("held")?.unwrap_or_default();
        timer::every_after("sample", sample, sample)?;
        timer::every_after("report", report, report)?;
        info!(
            "reporting into {} every {} s",
            directory.display(),
            report.as_secs_f64()
        );
        Ok(Self {
            directory,
            keep_days,
            held,
            sampled_ms: stockade_plugin::clock_ms(),
        })
    }

    fn timer(&mut self, timer: &Timer) -> HandlerResult {
        let tenants = self.sample()?;
        match &*timer.name {
            "report" => self.report(&tenants),
            _ => Ok(()),
        }
    }

    fn shutdown(&mut self, _: &Shutdown) -> HandlerResult {
        let tenants = self.sample()?;
        self.report(&tenants)
    }
}

impl TenantUsage {
    fn sample(&mut self) -> HandlerResult<Vec<TenantStats>> {
        let tenants = cache::stats()?.tenants;
        let now_ms = stockade_plugin::clock_ms();
        // A clock that was set back must not give anybody time back.
        let seconds = (now_ms - self.sampled_ms).max(0) as f64 / 1000.0;
        self.held.add(&tenants, seconds);
        self.sampled_ms = now_ms;
        Ok(tenants)
    }

    fn report(&mut self, tenants: &[TenantStats]) -> HandlerResult {
        state::set_json("held", &self.held)?;
        self.write_whole("stockade_tenants.prom", &textfile(tenants, &self.held))?;
        let day = self.sampled_ms.div_euclid(86_400_000);
        self.append(day, tenants)?;
        self.forget_before(day - i64::from(self.keep_days))
    }

    /// A reader sees the old file or the new one, never half of it.
    fn write_whole(&self, name: &str, text: &str) -> HandlerResult {
        let (path, fresh) = (
            self.directory.join(name),
            self.directory.join(format!("{name}.new")),
        );
        fs::write(&fresh, text)
            .and_then(|()| fs::rename(&fresh, &path))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(())
    }

    fn append(&self, day: i64, tenants: &[TenantStats]) -> HandlerResult {
        #[derive(Serialize)]
        struct Line<'a> {
            time_ms: i64,
            tenants: BTreeMap<&'a str, Usage>,
        }
        #[derive(Serialize)]
        struct Usage {
            used_bytes: u64,
            objects: u64,
            byte_seconds: f64,
        }
        let usage = |tenant: &TenantStats| Usage {
            used_bytes: tenant.used_bytes,
            objects: tenant.objects,
            byte_seconds: self.held.of(tenant),
        };
        let tenants = tenants.iter().map(|tenant| (&*tenant.name, usage(tenant)));
        let mut line = serde_json::to_vec(&Line {
            time_ms: self.sampled_ms,
            tenants: tenants.collect(),
        })?;
        line.push(b'\n');
        let path = self.directory.join(format!("usage-{day}.jsonl"));
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(&line))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(())
    }

    /// Removes reports of days before `first`.
    fn forget_before(&self, first: i64) -> HandlerResult {
        for entry in fs::read_dir(&self.directory)?.flatten() {
            let name = entry.file_name();
            let day = name
                .to_str()
                .and_then(|name| name.strip_prefix("usage-")?.strip_suffix(".jsonl"))
                .and_then(|day| day.parse::<i64>().ok());
            if day.is_some_and(|day| day < first)
                && let Err(error) = fs::remove_file(entry.path())
            {
                warn!("{} cannot be removed: {error}", entry.path().display());
            }
        }
        Ok(())
    }
}

/// The text format of Prometheus, a family after the other.
fn textfile(tenants: &[TenantStats], held: &Held) -> String {
    type Value = fn(&TenantStats, &Held) -> Option<f64>;
    let families: [(&str, &str, &str, Value); 5] = [
        (
            "stockade_tenant_report_used_bytes",
            "gauge",
            "Bytes that the tenant holds in the pool.",
            |it, _| Some(it.used_bytes as f64),
        ),
        (
            "stockade_tenant_report_floor_bytes",
            "gauge",
            "Bytes that nobody else can push the tenant below.",
            |it, _| Some(it.floor_bytes as f64),
        ),
        (
            "stockade_tenant_report_cap_bytes",
            "gauge",
            "Bytes that the tenant cannot exceed, where it is capped.",
            |it, _| it.cap_bytes.map(|cap| cap as f64),
        ),
        (
            "stockade_tenant_report_objects",
            "gauge",
            "Objects of the tenant that can be read.",
            |it, _| Some(it.objects as f64),
        ),
        (
            "stockade_tenant_report_byte_seconds_total",
            "counter",
            "Bytes held, times the seconds that they were held.",
            |it, held| Some(held.of(it)),
        ),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in families {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for tenant in tenants {
            if let Some(value) = value(tenant, held) {
                let label = escaped(&tenant.name);
                text.push_str(&format!("{name}{{tenant=\"{label}\"}} {value}\n"));
            }
        }
    }
    text
}

/// A label's value as the text format quotes it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

stockade_plugin::export_plugin!(TenantUsage);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use serde_json::{Value, json};
    use stockade_plugin::{
        cache::Stats,
        testing::{Grant, Host},
    };

    fn stats(used_bytes: u64) -> Stats {
        let tenants = json!({"tenants": [
            {"name": "default", "used_bytes": used_bytes, "floor_bytes": 10, "cap_bytes": null, "objects": 1},
            {"name": "a\"b\\", "used_bytes": 0, "floor_bytes": 0, "cap_bytes": 99, "objects": 0}]});
        serde_json::from_value(tenants).unwrap()
    }

    fn host(directory: &std::path::Path) -> Host {
        let host = Host::new()
            .grant(Grant::Stats)
            .state_kib(64)
            .stats(stats(1000));
        host.setting("tenant_usage.directory", directory.to_str().unwrap())
    }

    fn lines(directory: &std::path::Path) -> Vec<Value> {
        let reports = fs::read_dir(directory)
            .unwrap()
            .flatten()
            .map(|entry| entry.path());
        let text = reports
            .filter(|path| path.extension().unwrap() == "jsonl")
            .map(|path| fs::read_to_string(path).unwrap())
            .collect::<String>();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn what_is_held_is_charged_for_as_long_as_it_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let host = host(directory.path());
        let mut plugin = host.start::<TenantUsage>().unwrap();
        plugin.advance(Duration::from_secs(60)).unwrap();
        host.set_stats(stats(500));
        plugin.advance(Duration::from_secs(60)).unwrap();
        let said: Vec<f64> = lines(directory.path())
            .iter()
            .map(|line| line["tenants"]["default"]["byte_seconds"].as_f64().unwrap())
            .collect();
        assert_eq!(said, [60_000.0, 90_000.0]);
        let text = fs::read_to_string(directory.path().join("stockade_tenants.prom")).unwrap();
        for line in [
            "# TYPE stockade_tenant_report_byte_seconds_total counter",
            "stockade_tenant_report_byte_seconds_total{tenant=\"default\"} 90000",
            "stockade_tenant_report_used_bytes{tenant=\"a\\\"b\\\\\"} 0",
            "stockade_tenant_report_cap_bytes{tenant=\"a\\\"b\\\\\"} 99",
        ] {
            assert!(
                text.lines().any(|it| it == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(!text.contains("cap_bytes{tenant=\"default\"}"));
        assert!(!directory.path().join("stockade_tenants.prom.new").exists());
    }

    #[test]
    fn a_restart_goes_on_counting() {
        let directory = tempfile::tempdir().unwrap();
        let host = host(directory.path());
        let mut plugin = host.start::<TenantUsage>().unwrap();
        plugin.advance(Duration::from_secs(10)).unwrap();
        plugin.shutdown().unwrap();
        let mut plugin = host.start::<TenantUsage>().unwrap();
        plugin.advance(Duration::from_secs(60)).unwrap();
        let last = lines(directory.path()).pop().unwrap();
        assert_eq!(last["tenants"]["default"]["byte_seconds"], 70_000.0);
    }

    #[test]
    fn old_reports_go_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["usage-1.jsonl", "usage-x.jsonl", "notes.txt"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let host = host(directory.path());
        let mut plugin = host.start::<TenantUsage>().unwrap();
        plugin.advance(Duration::from_secs(60)).unwrap();
        let exists = |name| directory.path().join(name).exists();
        assert_eq!(
            ["usage-1.jsonl", "usage-x.jsonl", "notes.txt"].map(exists),
            [false, true, true]
        );
    }

    #[test]
    fn without_its_directory_it_says_what_to_grant() {
        let host = Host::new().grant(Grant::Stats).state_kib(1);
        let host = host.setting("tenant_usage.directory", "/does/not/exist");
        let error = host.start::<TenantUsage>().err().unwrap().to_string();
        assert!(error.contains("[directories]"), "{error}");
    }
}
