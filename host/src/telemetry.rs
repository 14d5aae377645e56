//! The log on stderr, and how often one cause may fill it.

use std::{
    collections::HashMap,
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_transport::LogLimiter;
use tracing::{Event, Level, Subscriber, field::Visit};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::LevelFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt as _,
};

use crate::config::LogFormat;

/// Lines that wait for a slow stderr; further ones are dropped, so that nobody waits for a log.
const QUEUED_LINES: usize = 16_384;
/// Target of plugins' output.
const PLUGIN_TARGET: &str = "stockade::plugin";

/// The log of a running server: its level, what it lost, and whether stderr takes it.
#[derive(Clone)]
pub struct Log(Arc<LogState>);

struct LogState {
    level: Mutex<Level>,
    set: Box<dyn Fn(Level) -> Result<(), String> + Send + Sync>,
    lost: Box<dyn Fn() -> u64 + Send + Sync>,
    writing_since: Arc<Mutex<Option<Instant>>>,
}

impl Log {
    /// The most verbose level that is logged.
    #[must_use]
    pub fn level(&self) -> Level {
        *self.0.level.lock()
    }

    /// Changes the level from now on.
    ///
    /// # Errors
    /// When the subscriber is gone.
    pub fn set_level(&self, level: Level) -> Result<(), String> {
        let mut current = self.0.level.lock();
        (self.0.set)(level)?;
        *current = level;
        Ok(())
    }

    /// Lines that were dropped because stderr did not take them.
    #[must_use]
    pub fn lost_lines(&self) -> u64 {
        (self.0.lost)()
    }

    /// How long the write in hand takes by now; `None` if there is none.
    #[must_use]
    pub fn writing_for(&self) -> Option<Duration> {
        self.0.writing_since.lock().map(|since| since.elapsed())
    }
}

/// Stderr that shows how long a write to it takes.
struct Timed {
    since: Arc<Mutex<Option<Instant>>>,
}

impl io::Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        *self.since.lock() = Some(Instant::now());
        let written = io::stderr().write(bytes);
        *self.since.lock() = None;
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Starts logging. The guard flushes what is queued when it is dropped.
///
/// # Errors
/// When a subscriber has been set in this process before.
pub fn init(level: Level, format: LogFormat) -> anyhow::Result<(Log, WorkerGuard)> {
    let writing_since = Arc::new(Mutex::new(None));
    let stderr = Timed {
        since: Arc::clone(&writing_since),
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(QUEUED_LINES)
        .finish(stderr);
    let lost = writer.error_counter();
    let (filter, handle) = reload::Layer::new(LevelFilter::from_level(level));
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(false);
    let result = match format {
        LogFormat::Human => registry.with(layer.event_format(Human)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    result.map_err(|error| anyhow::anyhow!("logging could not be started: {error}"))?;
    let log = Log(Arc::new(LogState {
        level: Mutex::new(level),
        set: Box::new(move |level| {
            handle
                .reload(LevelFilter::from_level(level))
                .map_err(|error| error.to_string())
        }),
        lost: Box::new(move || lost.dropped_lines() as u64),
        writing_since,
    }));
    Ok((log, guard))
}

/// `[time] Stockade LEVEL: message field=value`, LMCache's shape without its colours.
struct Human;

impl<S, N> FormatEvent<S, N> for Human
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_char('[')?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "] Stockade {}: ", event.metadata().level())?;
        let mut line = Line::default();
        event.record(&mut line);
        if event.metadata().target() == PLUGIN_TARGET {
            // The line is the plugin's alone: fields would look like a part of it.
            return writeln!(writer, "[{}] {}", line.plugin, line.message);
        }
        writeln!(
            writer,
            "{}{}",
            OneLine(&line.message),
            OneLine(&line.fields)
        )
    }
}

/// Text with its control characters escaped: names that clients choose must not look like
/// lines of ours.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.split_inclusive(char::is_control) {
            match part.char_indices().next_back() {
                Some((at, last)) if last.is_control() => {
                    write!(f, "{}{}", &part[..at], last.escape_default())?;
                }
                _ => f.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Line {
    message: String,
    plugin: String,
    fields: String,
}

impl Visit for Line {
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        if field.name() == "plugin" {
            self.plugin = value.to_owned();
        } else {
            self.record_debug(field, &format_args!("{value}"));
        }
    }

    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Limits the lines of each cause by itself.
#[derive(Debug, Default)]
pub struct CauseLimiter(Mutex<HashMap<&'static str, LogLimiter>>);

impl CauseLimiter {
    /// Logs `line` as a warning unless `cause` has used up its lines.
    pub fn warn(&self, cause: &'static str, line: impl FnOnce() -> String) {
        let turn = self.0.lock().entry(cause).or_default().turn();
        let Some(unsaid) = turn else {
            return;
        };
        let line = line();
        if unsaid > 0 {
            tracing::warn!("{line} ({unsaid} more like it were not logged)");
        } else {
            tracing::warn!("{line}");
        }
    }
}
