//! What was looked up, as JSON lines in files that rotate, for `stockade simulate` and LMCache's
//! cache simulator. Follows `mp_observability/subscribers/logging/lookup_hash.py` of LMCache 0.5.6.
//!
//! A lookup hands its hashes to a bounded queue and goes on; a thread writes. What the thread is too
//! slow for is dropped and counted.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use serde::Serialize;
use stockade_cache::ChunkHash;

use super::workers::ChunkLayout;
use crate::writer_queue::{Entry, WriterQueue};

/// Lookups that wait for the disk, in number and in bytes of their hashes.
const QUEUED_RECORDS: usize = 4096;
const QUEUED_BYTES: usize = 16 << 20;

/// Time between two warnings about the disk.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

const PREFIX: &str = "lookup_hashes_";
const SUFFIX: &str = ".jsonl";

/// Where lookups are logged, and how files rotate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashLogSettings {
    /// The directory; made if it is not there.
    pub directory: PathBuf,
    /// Age at which a file ends.
    pub rotation_interval: Duration,
    /// Bytes at which a file ends.
    pub rotation_max_bytes: u64,
    /// Files that are kept; the oldest goes first.
    pub max_files: usize,
}

/// One lookup.
pub(super) struct Record {
    pub(super) request_id: Arc<str>,
    pub(super) model_name: Arc<str>,
    pub(super) chunk_tokens: usize,
    pub(super) tokens: usize,
    pub(super) layout: ChunkLayout,
    pub(super) hashes: Vec<ChunkHash>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// What became of records, and how much waits.
#[derive(Debug)]
pub(super) struct Counts {
    written: Counter,
    dropped: Counter,
    failed: Counter,
    queued_bytes: AtomicUsize,
}

impl Counts {
    /// Registers the counts, also where nothing is logged.
    pub(super) fn register(registry: &mut Registry) -> Arc<Self> {
        let records = Family::<OutcomeLabels, Counter>::default();
        let of = |outcome| records.get_or_create(&OutcomeLabels { outcome }).clone();
        let counts = Self {
            written: of("written"),
            dropped: of("dropped"),
            failed: of("failed"),
            queued_bytes: AtomicUsize::new(0),
        };
        registry.sub_registry_with_prefix("stockade").register(
            "lookup_hash_log_records",
            "Lookups for the lookup-hash log: written, dropped because the disk was too slow, or failed to be written",
            records,
        );
        Arc::new(counts)
    }
}

/// The log of lookups.
pub(super) struct HashLog {
    queue: WriterQueue<(SystemTime, Record)>,
    counts: Arc<Counts>,
}

impl HashLog {
    /// Starts the writer; its counts go to `counts`.
    ///
    /// # Errors
    /// When the directory cannot be made or read, or there is no thread to be had.
    pub(super) fn open(settings: HashLogSettings, counts: Arc<Counts>) -> io::Result<Self> {
        let files = Files::open(settings)?;
        let (queue, entries) = WriterQueue::new(QUEUED_RECORDS);
        let log = Self {
            queue,
            counts: Arc::clone(&counts),
        };
        thread::Builder::new()
            .name("lookup hash log".to_owned())
            .spawn(move || write(&entries, files, &counts))?;
        Ok(log)
    }

    /// Hands a lookup to the writer, or drops it; never waits.
    pub(super) fn log(&self, record: Record) {
        let counts = &self.counts;
        let bytes = size_of_val(&*record.hashes);
        // Two that come at once may both pass; the queue's length is the hard limit.
        if counts.queued_bytes.load(Ordering::Relaxed) + bytes > QUEUED_BYTES {
            counts.dropped.inc();
            return;
        }
        counts.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !self.queue.offer((SystemTime::now(), record)) {
            counts.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            counts.dropped.inc();
        }
    }

    /// Waits a moment until what was handed over is written. May block.
    pub(super) fn end(&self) {
        self.queue.end();
    }
}

/// The writer's thread.
fn write(entries: &Receiver<Entry<(SystemTime, Record)>>, mut files: Files, counts: &Counts) {
    let mut last_warning: Option<Instant> = None;
    let mut warn = |error: &io::Error, directory: &Path| {
        if last_warning.is_none_or(|at| at.elapsed() > WARNING_INTERVAL) {
            last_warning = Some(Instant::now());
            tracing::warn!(
                "lookups cannot be logged into {}: {error}",
                directory.display()
            );
        }
    };
    loop {
        let entry = match entries.try_recv() {
            Ok(entry) => entry,
            Err(TryRecvError::Empty) => {
                // Nobody waits for us: what is written should be seen.
                if let Err(error) = files.flush() {
                    warn(&error, &files.settings.directory);
                }
                match entries.recv() {
                    Ok(entry) => entry,
                    Err(_) => return,
                }
            }
            Err(TryRecvError::Disconnected) => return,
        };
        match entry {
            Entry::Item((time, record)) => {
                let bytes = size_of_val(&*record.hashes);
                counts.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
                match files.append(time, &record) {
                    Ok(()) => counts.written.inc(),
                    Err(error) => {
                        warn(&error, &files.settings.directory);
                        counts.failed.inc()
                    }
                };
            }
            Entry::End(written) => {
                if let Err(error) = files.flush() {
                    warn(&error, &files.settings.directory);
                }
                let _ = written.send(());
            }
        }
    }
}

/// A line, in LMCache's order of fields.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: f64,
    request_id: &'a str,
    model_name: &'a str,
    chunk_size: usize,
    seq_len: usize,
    dtypes: Vec<&'a str>,
    shapes: Vec<&'a [u64]>,
    chunk_hashes: Vec<String>,
}

/// The file that is written.
struct Current {
    file: BufWriter<File>,
    bytes: u64,
    since: SystemTime,
}

/// The files of the directory, oldest first.
struct Files {
    settings: HashLogSettings,
    names: VecDeque<PathBuf>,
    /// Number of the next file.
    next: usize,
    current: Option<Current>,
}

impl Files {
    fn open(settings: HashLogSettings) -> io::Result<Self> {
        fs::create_dir_all(&settings.directory)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&settings.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_ours = name
                .to_str()
                .is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
            let metadata = entry.metadata()?;
            if is_ours && metadata.is_file() {
                found.push((metadata.modified()?, entry.path()));
            }
        }
        found.sort();
        let names: VecDeque<PathBuf> = found.into_iter().map(|(_, path)| path).collect();
        Ok(Self {
            next: names.len(),
            settings,
            names,
            current: None,
        })
    }

    fn append(&mut self, time: SystemTime, record: &Record) -> io::Result<()> {
        let layout = &record.layout;
        let parts = || std::iter::once(&layout.first).chain(&*layout.rest);
        let line = Line {
            timestamp: since_epoch(time).as_secs_f64(),
            request_id: &record.request_id,
            model_name: &record.model_name,
            chunk_size: record.chunk_tokens,
            seq_len: record.tokens,
            // LMCache writes `torch.` before it, which its own simulator takes for no dtype.
            dtypes: parts().map(|part| part.dtype.torch_name()).collect(),
            shapes: parts().map(|part| &*part.shape).collect(),
            chunk_hashes: record.hashes.iter().map(|hash| hex(&hash.0)).collect(),
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let settings = &self.settings;
        let is_over = self.current.as_ref().is_none_or(|current| {
            let age = time.duration_since(current.since).unwrap_or_default();
            age >= settings.rotation_interval || current.bytes >= settings.rotation_max_bytes
        });
        if is_over {
            self.rotate(time)?;
        }
        let Some(current) = &mut self.current else {
            return Err(io::Error::other("there is no file"));
        };
        let written = current.file.write_all(&text);
        current.bytes += text.len() as u64;
        if written.is_err() {
            // Half a line may be in it; the next one begins a file of its own.
            self.current = None;
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self
            .current
            .as_mut()
            .map_or(Ok(()), |current| current.file.flush());
        if flushed.is_err() {
            self.current = None;
        }
        flushed
    }

    fn rotate(&mut self, time: SystemTime) -> io::Result<()> {
        let ended = self.flush();
        self.current = None;
        ended?;
        let (path, file) = loop {
            let name = format!("{PREFIX}{}_{:06}{SUFFIX}", stamp(time), self.next);
            self.next += 1;
            let path = self.settings.directory.join(name);
            // A plugin may be granted the directory, so nothing that is there already is opened.
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        };
        self.current = Some(Current {
            file: BufWriter::new(file),
            bytes: 0,
            since: time,
        });
        self.names.push_back(path);
        while self.names.len() > self.settings.max_files {
            let Some(oldest) = self.names.pop_front() else {
                break;
            };
            match fs::remove_file(&oldest) {
                // Somebody has shipped it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!("{} cannot be removed: {error}", oldest.display()),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold("0x".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A time in UTC as `%Y%m%d_%H%M%S`.
fn stamp(time: SystemTime) -> String {
    let seconds = since_epoch(time).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Eras of 400 years that begin in March, so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}{month:02}{day:02}_{:02}{:02}{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use stockade_wire::Dtype;

    use super::{super::workers::LayoutPart, *};

    fn settings(directory: &Path) -> HashLogSettings {
        HashLogSettings {
            directory: directory.to_owned(),
            rotation_interval: Duration::from_secs(100),
            rotation_max_bytes: 10_000,
            max_files: 3,
        }
    }

    fn record(request: &str, hashes: usize) -> Record {
        Record {
            request_id: Arc::from(request),
            model_name: Arc::from("m/7b"),
            chunk_tokens: 256,
            tokens: 800,
            layout: ChunkLayout {
                first: LayoutPart {
                    shape: Arc::from([2, 32, 256, 8]),
                    dtype: Dtype::parse("bfloat16").unwrap(),
                    kept_blocks: None,
                },
                rest: Arc::from([]),
                bytes: 262_144,
            },
            hashes: (0..hashes).map(|nth| ChunkHash([nth as u8; 32])).collect(),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_775_053_825 + seconds)
    }

    fn listed(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn lines_and_names_are_lmcache_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/on/the/way");
        let mut files = Files::open(settings(&path)).unwrap();
        files.append(at(0), &record("r", 2)).unwrap();
        files.flush().unwrap();
        assert_eq!(
            listed(&path),
            ["lookup_hashes_20260401_143025_000000.jsonl"]
        );
        let text = fs::read_to_string(path.join(&listed(&path)[0])).unwrap();
        let expected = format!(
            "{{\"timestamp\":1775053825.0,\"request_id\":\"r\",\"model_name\":\"m/7b\",\"chunk_size\":256,\"seq_len\":800,\"dtypes\":[\"bfloat16\"],\"shapes\":[[2,32,256,8]],\"chunk_hashes\":[\"0x{}\",\"0x{}\"]}}\n",
            "00".repeat(32),
            "01".repeat(32)
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn files_end_by_age_and_by_size_and_the_oldest_go() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = Files::open(settings(directory.path())).unwrap();
        for second in [0, 99, 100, 150] {
            files.append(at(second), &record("r", 1)).unwrap();
        }
        assert_eq!(listed(directory.path()).len(), 2);
        // About 13 000 bytes: the file ends after it.
        files.append(at(151), &record("large", 200)).unwrap();
        assert_eq!(listed(directory.path()).len(), 2);
        files.append(at(152), &record("r", 1)).unwrap();
        assert_eq!(listed(directory.path()).len(), 3);
        files.append(at(300), &record("r", 1)).unwrap();
        drop(files);
        let names = listed(directory.path());
        assert_eq!(names.len(), 3);
        assert!(names[0].ends_with("_000001.jsonl"), "{names:?}");
        // The next server counts on, and holds the limit over the files of this one.
        let mut files = Files::open(settings(directory.path())).unwrap();
        files.append(at(500), &record("r", 1)).unwrap();
        assert_eq!(listed(directory.path()).len(), 3);
    }

    #[test]
    fn what_lies_there_is_never_written_through() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        let logs = directory.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let planted = logs.join(format!("{PREFIX}{}_000000{SUFFIX}", stamp(at(0))));
        std::os::unix::fs::symlink(&outside, planted).unwrap();
        let mut files = Files::open(settings(&logs)).unwrap();
        files.append(at(0), &record("r", 1)).unwrap();
        files.flush().unwrap();
        assert!(!outside.exists());
        assert!(listed(&logs)[1].ends_with("_000001.jsonl"));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let directory = tempfile::tempdir().unwrap();
        let counts = Counts::register(&mut Registry::default());
        let (queue, entries) = WriterQueue::new(2);
        let log = HashLog {
            queue,
            counts: Arc::clone(&counts),
        };
        for _ in 0..5 {
            log.log(record("r", 1));
        }
        assert_eq!(counts.dropped.get(), 3);
        // One record that is larger than all that may wait.
        log.log(record("r", QUEUED_BYTES / 32 + 1));
        assert_eq!(counts.dropped.get(), 4);
        let files = Files::open(settings(directory.path())).unwrap();
        let writer = {
            let counts = Arc::clone(&counts);
            thread::spawn(move || write(&entries, files, &counts))
        };
        log.end();
        assert_eq!(counts.written.get(), 2);
        assert_eq!(counts.queued_bytes.load(Ordering::Relaxed), 0);
        drop(log);
        writer.join().unwrap();
    }

    #[test]
    fn a_directory_that_went_away_costs_records_not_the_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("logs");
        let counts = Counts::register(&mut Registry::default());
        let log = HashLog::open(settings(&path), Arc::clone(&counts)).unwrap();
        fs::remove_dir(&path).unwrap();
        log.log(record("lost", 1));
        log.end();
        assert_eq!(counts.failed.get(), 1);
        fs::create_dir(&path).unwrap();
        log.log(record("kept", 1));
        log.end();
        assert_eq!(counts.written.get(), 1);
        assert_eq!(listed(&path).len(), 1);
    }

    #[test]
    fn stamps_are_those_of_the_calendar() {
        assert_eq!(stamp(UNIX_EPOCH), "19700101_000000");
        let leap = UNIX_EPOCH + Duration::from_secs(951_782_400);
        assert_eq!(stamp(leap), "20000229_000000");
        let end = UNIX_EPOCH + Duration::from_secs(1_709_251_199);
        assert_eq!(stamp(end), "20240229_235959");
    }
}
