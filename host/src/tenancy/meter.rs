//! What each tenant uses, summed up over time: for metrics, and as lines of a file to bill by.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use stockade_cache::TenantUsage;

use super::line_files::{LineFiles, since_epoch};

/// Tenants with sums of their own at most; more than the pool can have.
const MAX_TENANTS: usize = 4096;
/// Tags with sums of their own per tenant; further ones are summed up as `other`.
const MAX_TAGS: usize = 64;
/// Name of the files, before the time of their first line and `.jsonl`.
const PREFIX: &str = "meter-";

/// Sums of one tenant. What requests add is added without a lock.
#[derive(Debug, Default)]
pub struct Sums {
    tokens_requested: AtomicU64,
    tokens_served: AtomicU64,
    stored_bytes: AtomicU64,
    retrieved_bytes: AtomicU64,
    slow: Mutex<Slow>,
}

#[derive(Debug, Default)]
struct Slow {
    l1_byte_seconds: f64,
    plugin_cpu_seconds: f64,
    /// Tokens by tag name and value.
    tags: BTreeMap<(Arc<str>, Arc<str>), u64>,
}

/// Sums of one tenant, as of one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reading {
    /// Bytes of the pool times the seconds that they were held.
    pub l1_byte_seconds: f64,
    /// Tokens that lookups asked for, in whole chunks.
    pub tokens_requested: u64,
    /// Tokens whose KV was handed out.
    pub tokens_served: u64,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Bytes handed out.
    pub retrieved_bytes: u64,
    /// CPU time of its plugins.
    pub plugin_cpu_seconds: f64,
    /// Tokens that lookups with a metered tag asked for, by name and value.
    pub tags: BTreeMap<(Arc<str>, Arc<str>), u64>,
}

impl Sums {
    /// A lookup asked for tokens.
    pub fn requested(&self, tokens: usize) {
        self.tokens_requested
            .fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// A worker was handed what a number of tokens takes.
    pub fn served(&self, tokens: usize, bytes: u64) {
        self.tokens_served
            .fetch_add(tokens as u64, Ordering::Relaxed);
        self.retrieved_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A store was committed.
    pub fn stored(&self, bytes: u64) {
        self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A lookup with a tag asked for tokens.
    pub fn tagged(&self, name: &Arc<str>, value: &Arc<str>, tokens: usize) {
        let mut slow = self.slow.lock();
        let key = (Arc::clone(name), Arc::clone(value));
        let key = match slow.tags.contains_key(&key) || slow.tags.len() < MAX_TAGS {
            true => key,
            false => (Arc::from("other"), Arc::from("other")),
        };
        *slow.tags.entry(key).or_default() += tokens as u64;
    }

    fn read(&self) -> Reading {
        let slow = self.slow.lock();
        let read = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        Reading {
            l1_byte_seconds: slow.l1_byte_seconds,
            tokens_requested: read(&self.tokens_requested),
            tokens_served: read(&self.tokens_served),
            stored_bytes: read(&self.stored_bytes),
            retrieved_bytes: read(&self.retrieved_bytes),
            plugin_cpu_seconds: slow.plugin_cpu_seconds,
            tags: slow.tags.clone(),
        }
    }
}

/// All tenants' sums.
#[derive(Debug, Default)]
pub struct Meter {
    sums: RwLock<HashMap<Arc<str>, Arc<Sums>>>,
    sampled: Mutex<Option<Instant>>,
    /// CPU time of each plugin's current run when it was last looked at.
    plugins: Mutex<HashMap<String, Duration>>,
}

impl Meter {
    /// The sums of a tenant.
    #[must_use]
    pub fn of(&self, tenant: &str) -> Arc<Sums> {
        if let Some(sums) = self.sums.read().get(tenant) {
            return Arc::clone(sums);
        }
        let mut all = self.sums.write();
        let name = match all.len() < MAX_TENANTS {
            true => tenant,
            false => "other",
        };
        Arc::clone(all.entry(Arc::from(name)).or_default())
    }

    /// Adds what the tenants' bytes took since the last sample. To be called about once a second.
    pub fn sample(&self, usage: &[TenantUsage], now: Instant) {
        let mut sampled = self.sampled.lock();
        let Some(last) = sampled.replace(now) else {
            return;
        };
        let seconds = now.saturating_duration_since(last).as_secs_f64();
        for tenant in usage.iter().filter(|it| it.used_bytes > 0) {
            let sums = self.of(&tenant.tenant.name);
            sums.slow.lock().l1_byte_seconds += tenant.used_bytes as f64 * seconds;
        }
    }

    /// Adds the CPU time that a tenant's plugin took since it was last looked at; `total` is that
    /// of its current run, which begins anew with each.
    pub fn plugin(&self, tenant: &str, plugin: &str, total: Duration) {
        let mut plugins = self.plugins.lock();
        let before = plugins.insert(plugin.to_owned(), total).unwrap_or_default();
        let more = total.checked_sub(before).unwrap_or(total);
        drop(plugins);
        self.of(tenant).slow.lock().plugin_cpu_seconds += more.as_secs_f64();
    }

    /// All sums, by tenant.
    #[must_use]
    pub fn read(&self) -> BTreeMap<Arc<str>, Reading> {
        let sums = self.sums.read();
        sums.iter()
            .map(|(name, sums)| (Arc::clone(name), sums.read()))
            .collect()
    }
}

/// The file that sums are written to: a line per tenant and interval, with what it used in it.
#[derive(Debug)]
pub struct MeterFile {
    files: LineFiles,
    last: BTreeMap<Arc<str>, Reading>,
    written: Instant,
}

impl MeterFile {
    /// Writes into a directory, which is made if its parent exists.
    ///
    /// # Errors
    /// When it cannot be made or written to.
    pub fn open(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            files: LineFiles::open(directory, PREFIX)?,
            last: BTreeMap::new(),
            written: Instant::now(),
        })
    }

    /// Writes what was used since the last lines; a tenant that used nothing gets none. Blocks.
    ///
    /// # Errors
    /// When a line could not be written; what it had is in the next one.
    pub fn write(&mut self, meter: &Meter) -> io::Result<()> {
        let now = Instant::now();
        let seconds = now.saturating_duration_since(self.written).as_secs_f64();
        let time = since_epoch().as_secs();
        let current = meter.read();
        let mut lines = String::new();
        for (name, reading) in &current {
            let last = self.last.get(name).cloned().unwrap_or_default();
            if *reading != last {
                lines.push_str(&line(name, reading, &last, time, seconds).to_string());
                lines.push('\n');
            }
        }
        if !lines.is_empty() {
            self.files.append(&lines)?;
        }
        self.last = current;
        self.written = now;
        Ok(())
    }
}

fn line(name: &str, now: &Reading, last: &Reading, time: u64, seconds: f64) -> Value {
    let tags: Vec<Value> = now
        .tags
        .iter()
        .map(|(key, &count)| (key, count - last.tags.get(key).copied().unwrap_or(0)))
        .filter(|&(_, count)| count > 0)
        .map(|((tag, value), tokens)| json!({"tag": **tag, "value": **value, "tokens": tokens}))
        .collect();
    json!({
        "time_unix": time,
        "seconds": seconds,
        "tenant": name,
        "l1_byte_seconds": now.l1_byte_seconds - last.l1_byte_seconds,
        "tokens_requested": now.tokens_requested - last.tokens_requested,
        "tokens_served": now.tokens_served - last.tokens_served,
        "stored_bytes": now.stored_bytes - last.stored_bytes,
        "retrieved_bytes": now.retrieved_bytes - last.retrieved_bytes,
        "plugin_cpu_seconds": now.plugin_cpu_seconds - last.plugin_cpu_seconds,
        "tags": tags,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use stockade_cache::{Budget, Tenant};

    use super::*;

    fn usage(name: &str, used_bytes: u64) -> TenantUsage {
        TenantUsage {
            tenant: Tenant {
                name: name.into(),
                salts: Vec::new(),
                budget: Budget::default(),
            },
            used_bytes,
            objects: 1,
            share_bytes: 0,
            evicted_bytes: 0,
            evicted_objects: 0,
        }
    }

    #[test]
    fn lines_add_up_to_what_was_used() {
        let directory = tempfile::tempdir().unwrap();
        let meter = Meter::default();
        let mut file = MeterFile::open(directory.path()).unwrap();
        let start = Instant::now();
        let mut lines = 0;
        for round in 0..5_u64 {
            let now = start + Duration::from_secs(2 * round);
            meter.sample(&[usage("a", 100), usage("idle", 0)], now);
            meter.of("a").requested(32);
            meter.of("a").served(16, 1000);
            meter.of("a").stored(7);
            meter.of("a").tagged(&"team".into(), &"x".into(), 32);
            // A plugin that was restarted in between counts on from nothing.
            let cpu = Duration::from_millis(if round < 3 { 100 * (round + 1) } else { 50 });
            meter.plugin("a", "p", cpu);
            file.write(&meter).unwrap();
            lines += 1;
        }
        let path = std::fs::read_dir(directory.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let text = std::fs::read_to_string(path).unwrap();
        let parsed: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(parsed.len(), lines, "who used nothing has no line: {text}");
        let sum = |field: &str| -> f64 {
            let values = parsed.iter().map(|line| line[field].as_f64().unwrap());
            values.sum()
        };
        assert_eq!(sum("l1_byte_seconds"), 100.0 * 8.0);
        assert_eq!(
            (sum("tokens_requested"), sum("tokens_served")),
            (160.0, 80.0)
        );
        assert_eq!(
            (sum("stored_bytes"), sum("retrieved_bytes")),
            (35.0, 5000.0)
        );
        assert!((sum("plugin_cpu_seconds") - 0.35).abs() < 1e-9);
        assert_eq!(parsed[4]["tags"][0]["tokens"], 32);
    }

    #[test]
    fn what_clients_name_cannot_make_the_sums_grow_without_end() {
        let meter = Meter::default();
        for number in 0..3 * MAX_TAGS {
            let value: Arc<str> = number.to_string().into();
            meter.of("a").tagged(&"team".into(), &value, 1);
        }
        let reading = &meter.read()["a"];
        assert!(reading.tags.len() <= MAX_TAGS + 1);
        assert_eq!(reading.tags.values().sum::<u64>(), 3 * MAX_TAGS as u64);
    }
}
