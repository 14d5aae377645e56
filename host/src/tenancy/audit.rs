//! Every denial, counted; as a line of a file of its own; and in the server's log, unless there
//! are too many of a kind at once.
//!
//! The file has every one of them. Its lines wait in a bounded queue for a thread that writes, so
//! that nothing waits for a disk; what it is too slow for is counted, and the next line says how
//! many were lost. In the server's log denials of one tenant and reason get [`LINES`] lines in
//! [`WINDOW`]; how many more there were is a line of its own when the window is over.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::Receiver,
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{
    Caller, Denial, Realm,
    line_files::{LineFiles, since_epoch},
};
use crate::writer_queue::{Entry, WriterQueue};

/// Lines in full per tenant, reason and window.
const LINES: u64 = 5;
/// How long they are for.
const WINDOW: Duration = Duration::from_secs(10);
/// Target of the lines: `stockade::audit`.
const TARGET: &str = "stockade::audit";

/// Lines that wait for the disk.
const QUEUED_LINES: usize = 4096;
/// Lines written in one call.
const LINES_AT_ONCE: usize = 256;
/// Longest text of a line that comes from outside, in characters.
const MAX_TEXT: usize = 256;
/// Name of the files, before the time of their first line.
const PREFIX: &str = "audit-";
/// Time between two warnings about the disk.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// What was denied to whom.
#[derive(Debug, Clone, Copy)]
pub struct Denied<'d> {
    /// The tenant of who asked.
    pub realm: &'d Realm,
    /// Who asked, in words.
    pub origin: &'d str,
    /// Why not.
    pub reason: Denial,
    /// What it asked for.
    pub operation: &'d str,
    /// The salt that it named. Shown by its digest: salts are secrets between an engine and this
    /// server.
    pub salt: Option<&'d str>,
}

/// What became of lines for the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AuditLines {
    /// They are in the file.
    pub written: u64,
    /// The disk was too slow for them.
    pub dropped: u64,
    /// The disk did not take them.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

/// The queue to the file's writer.
#[derive(Debug)]
struct Sink {
    queue: WriterQueue<Value>,
    counts: Arc<Counts>,
}

/// Denials of one kind.
#[derive(Debug)]
struct Kind {
    began: Instant,
    /// In this window.
    seen: u64,
    total: u64,
}

/// How often a tenant was denied something for a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedCount {
    /// Of whose connections.
    pub realm: Realm,
    /// Why.
    pub reason: Denial,
    /// How often since the start.
    pub count: u64,
}

/// The audit log. What it keeps has a bound: there are as many kinds as tenants times reasons.
#[derive(Debug, Default)]
pub struct Audit {
    kinds: Mutex<BTreeMap<(Realm, Denial), Kind>>,
    sink: OnceLock<Sink>,
}

impl Audit {
    /// Writes every denial from now on into files of a directory, which is made if its parent
    /// exists. To be called once.
    ///
    /// # Errors
    /// When the directory cannot be made or written to, or there is no thread to be had.
    pub fn write_to(&self, directory: &Path) -> io::Result<()> {
        let files = LineFiles::open(directory, PREFIX)?;
        let (queue, entries) = WriterQueue::new(QUEUED_LINES);
        let counts = Arc::new(Counts::default());
        let sink = Sink {
            queue,
            counts: Arc::clone(&counts),
        };
        thread::Builder::new()
            .name("audit log".to_owned())
            .spawn(move || write(&entries, files, &counts))?;
        // A second file would have been a mistake of the caller; the first one stays.
        let _ = self.sink.set(sink);
        Ok(())
    }

    /// A request was not given what it named.
    pub fn denied(
        &self,
        caller: &Caller,
        reason: Denial,
        operation: &'static str,
        salt: Option<&str>,
    ) {
        self.record(Denied {
            realm: caller.realm(),
            origin: caller.origin(),
            reason,
            operation,
            salt,
        });
    }

    /// Somebody was not given what it named. Never waits.
    pub fn record(&self, denied: Denied<'_>) {
        let Denied {
            realm,
            origin,
            reason,
            operation,
            salt,
        } = denied;
        let digest = salt.map(|salt| blake3::hash(salt.as_bytes()).to_hex());
        let digest = digest.as_ref().and_then(|hex| hex.get(..16));
        if let Some(sink) = self.sink.get() {
            sink.line(json!({
                "time_unix": since_epoch().as_secs_f64(),
                "event": "denied",
                "tenant": realm.shown(),
                "reason": reason.name(),
                "operation": shortened(operation),
                "origin": shortened(origin),
                "salt_blake3": digest,
            }));
        }
        if self.count(realm, reason) {
            tracing::warn!(
                target: TARGET,
                tenant = realm.shown(),
                reason = reason.name(),
                operation,
                salt_blake3 = digest.unwrap_or("-"),
                "denied: {operation} from {origin}",
            );
        }
    }

    /// A tenant was purged, and the receipt has this seal.
    pub fn purged(&self, tenant: &str, seal: Option<&str>) {
        if let Some(sink) = self.sink.get() {
            sink.line(json!({
                "time_unix": since_epoch().as_secs_f64(),
                "event": "purged",
                "tenant": tenant,
                "seal_blake3": seal,
            }));
        }
        tracing::info!(target: TARGET, tenant, seal, "a tenant was purged");
    }

    /// What became of lines for the file.
    #[must_use]
    pub fn lines(&self) -> AuditLines {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.sink.get().map_or_else(AuditLines::default, |sink| {
            let Counts {
                written,
                dropped,
                failed,
            } = &*sink.counts;
            AuditLines {
                written: read(written),
                dropped: read(dropped),
                failed: read(failed),
            }
        })
    }

    /// Waits a moment until what is queued is written. May block.
    pub fn end(&self) {
        if let Some(sink) = self.sink.get() {
            sink.queue.end();
        }
    }

    /// Whether this one gets a line of its own.
    fn count(&self, realm: &Realm, reason: Denial) -> bool {
        let mut kinds = self.kinds.lock();
        let kind = kinds
            .entry((realm.clone(), reason))
            .or_insert_with(|| Kind {
                began: Instant::now(),
                seen: 0,
                total: 0,
            });
        if kind.began.elapsed() > WINDOW && kind.seen <= LINES {
            kind.began = Instant::now();
            kind.seen = 0;
        }
        kind.seen += 1;
        kind.total += 1;
        kind.seen <= LINES
    }

    /// Logs how many denials of windows that are over had no line. To be called now and then.
    pub fn settle(&self) {
        let mut unsaid = Vec::new();
        for ((realm, reason), kind) in self.kinds.lock().iter_mut() {
            if kind.began.elapsed() > WINDOW && kind.seen > LINES {
                unsaid.push((realm.clone(), *reason, kind.seen - LINES));
                kind.seen = 0;
                kind.began = Instant::now();
            }
        }
        for (realm, reason, count) in unsaid {
            tracing::warn!(
                target: TARGET,
                tenant = realm.shown(),
                reason = reason.name(),
                count,
                "denied: {count} more requests",
            );
        }
    }

    /// All counts since the start.
    #[must_use]
    pub fn counts(&self) -> Vec<DeniedCount> {
        let kinds = self.kinds.lock();
        let counts = kinds.iter().map(|((realm, reason), kind)| DeniedCount {
            realm: realm.clone(),
            reason: *reason,
            count: kind.total,
        });
        counts.collect()
    }

    /// Forgets a tenant that is gone.
    pub fn forget(&self, name: &str) {
        self.kinds
            .lock()
            .retain(|(realm, _), _| realm.name() != name);
    }
}

impl Sink {
    fn line(&self, line: Value) {
        if !self.queue.offer(line) {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The writer's thread.
fn write(entries: &Receiver<Entry<Value>>, mut files: LineFiles, counts: &Counts) {
    let mut last_warning: Option<Instant> = None;
    let mut told = 0;
    while let Ok(first) = entries.recv() {
        let (mut text, mut lines, mut ends) = (String::new(), 0, Vec::new());
        let more = std::iter::from_fn(|| entries.try_recv().ok());
        for entry in std::iter::once(first).chain(more.take(LINES_AT_ONCE)) {
            match entry {
                Entry::Item(line) => {
                    text.push_str(&line.to_string());
                    text.push('\n');
                    lines += 1;
                }
                Entry::End(written) => ends.push(written),
            }
        }
        // Those that failed are lost to the reader as well.
        let lost = counts.dropped.load(Ordering::Relaxed) + counts.failed.load(Ordering::Relaxed);
        if lost > told {
            let line = json!({
                "time_unix": since_epoch().as_secs_f64(),
                "event": "lost",
                "lines": lost - told,
            });
            text.push_str(&format!("{line}\n"));
        }
        if !text.is_empty() {
            match files.append(&text) {
                Ok(()) => {
                    counts.written.fetch_add(lines, Ordering::Relaxed);
                    told = lost;
                }
                Err(error) => {
                    counts.failed.fetch_add(lines, Ordering::Relaxed);
                    if last_warning.is_none_or(|at| at.elapsed() > WARNING_INTERVAL) {
                        last_warning = Some(Instant::now());
                        let directory = files.directory().display();
                        tracing::error!(
                            "denials cannot be written into {directory}, and are counted as lost: {error}"
                        );
                    }
                }
            }
        }
        for written in ends {
            let _ = written.send(());
        }
    }
}

/// Text from outside, within a bound.
fn shortened(text: &str) -> &str {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => text.get(..end).unwrap_or_default(),
        None => text,
    }
}

impl DeniedCount {
    /// The tenant as metrics name it; `(none)` and `(stranger)` for connections without one.
    #[must_use]
    pub fn tenant(&self) -> &str {
        self.realm.shown()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn denied(realm: &Realm, origin: &str) -> Denied<'static> {
        Denied {
            realm: Box::leak(Box::new(realm.clone())),
            origin: Box::leak(origin.to_owned().into_boxed_str()),
            reason: Denial::ForeignSalt,
            operation: "lookup",
            salt: Some("secret"),
        }
    }

    fn lines_in(directory: &Path) -> Vec<Value> {
        let files = std::fs::read_dir(directory).unwrap();
        let text: String = files
            .map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap())
            .collect();
        assert!(!text.contains("secret"), "{text}");
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    #[test]
    fn the_file_has_every_denial_also_those_without_a_line_in_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let audit = Audit::default();
        audit.write_to(directory.path()).unwrap();
        let long = "x".repeat(1000);
        for _ in 0..100 {
            audit.record(denied(&Realm::open(), &long));
        }
        audit.purged("a", Some("seal"));
        audit.end();
        let lines = lines_in(directory.path());
        assert_eq!(lines.len(), 101);
        assert_eq!(lines[99]["reason"], "foreign_salt");
        assert_eq!(lines[99]["origin"].as_str().unwrap().len(), MAX_TEXT);
        assert_eq!(lines[100]["event"], "purged");
        assert_eq!(audit.lines().written, 101);
    }

    #[test]
    fn what_the_disk_is_too_slow_for_is_counted_and_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let audit = Audit::default();
        // A writer that has not begun yet.
        let (queue, entries) = WriterQueue::new(10);
        let counts = Arc::new(Counts::default());
        let sink = Sink {
            queue,
            counts: Arc::clone(&counts),
        };
        audit.sink.set(sink).unwrap();
        for _ in 0..25 {
            audit.record(denied(&Realm::open(), "x"));
        }
        assert_eq!(audit.lines().dropped, 15);
        let files = LineFiles::open(directory.path(), PREFIX).unwrap();
        let writer = thread::spawn(move || write(&entries, files, &counts));
        audit.end();
        let lines = lines_in(directory.path());
        assert_eq!(lines.len(), 11, "{lines:?}");
        assert_eq!(
            (&lines[10]["event"], &lines[10]["lines"]),
            (&json!("lost"), &json!(15))
        );
        drop(audit);
        writer.join().unwrap();
    }

    #[test]
    fn every_denial_is_counted_and_those_without_a_line_are_told_of_later() {
        let audit = Audit::default();
        let realm = Realm::open();
        let lines = (0..20)
            .filter(|_| audit.count(&realm, Denial::ForeignSalt))
            .count();
        assert_eq!(lines as u64, LINES);
        assert_eq!(audit.counts()[0].count, 20);
        let unsaid = |audit: &Audit| {
            let kinds = audit.kinds.lock();
            kinds.values().map(|kind| kind.seen).sum::<u64>()
        };
        audit.settle();
        assert_eq!(unsaid(&audit), 20, "the window is not over");
        for kind in audit.kinds.lock().values_mut() {
            let before = kind.began.checked_sub(WINDOW + Duration::from_secs(1));
            kind.began = before.unwrap_or(kind.began);
        }
        // A flood that goes on does not swallow what the last window left unsaid.
        assert!(!audit.count(&realm, Denial::ForeignSalt));
        audit.settle();
        assert_eq!(unsaid(&audit), 0);
        assert!(audit.count(&realm, Denial::ForeignSalt));
        assert_eq!(audit.counts()[0].count, 22);
    }
}
