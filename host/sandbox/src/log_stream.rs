//! Turns a plugin's output bytes into log events, one per line.
//!
//! Whatever a plugin prints costs the server a bounded amount: lines over
//! [`LogLimits::line_bytes`] are cut and marked, lines over the plugin's rate are counted and
//! dropped, bytes over its rate are not taken, so that the plugin waits. What is not UTF-8
//! is replaced, control characters are escaped.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use crate::{
    limit::{Limit, LimitUse},
    token_bucket::TokenBucket,
};

/// Longest line that is kept, in bytes.
pub(crate) const MAX_LINE_BYTES: u32 = 8 * 1024;
/// Lines kept per plugin for `tail`.
const RING_LINES: usize = 1000;
/// Bytes of lines kept per plugin for `tail`.
const RING_BYTES: usize = 256 * 1024;

/// Where a line was printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputStream {
    /// Standard output; of a script, standard output and error as one.
    Stdout,
    /// Standard error of a sandboxed plugin.
    Stderr,
    /// Lines that a plugin logs at a level, rather than prints.
    Log,
}

/// How much a line that a plugin logs matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Something does not work.
    Error,
    /// Something may not work.
    Warn,
    /// Something worth knowing.
    Info,
    /// For who looks for a fault.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The name in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl OutputStream {
    /// The name in log events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Log => "log",
        }
    }
}

/// How much a plugin may print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Lines a second; as many at once as two seconds give.
    pub lines_per_second: u32,
    /// Bytes a second; as many at once as two seconds give.
    pub bytes_per_second: u32,
    /// Bytes of a line; the rest of it is cut.
    pub line_bytes: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            lines_per_second: 200,
            bytes_per_second: 1 << 20,
            line_bytes: MAX_LINE_BYTES,
        }
    }
}

/// A line as it is kept for `tail`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// Where it was printed.
    pub stream: OutputStream,
    /// The level of a line that was logged; what is printed counts as information.
    pub level: LogLevel,
    /// The line, escaped and cut.
    pub text: Arc<str>,
}

/// What was printed so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogCounts {
    /// Lines logged.
    pub lines: u64,
    /// Lines dropped because they came too fast.
    pub dropped_lines: u64,
    /// Lines cut because they were too long.
    pub cut_lines: u64,
    /// Bytes taken.
    pub bytes: u64,
    /// How often the plugin had to wait because it printed too many bytes.
    pub waits: u64,
}

#[derive(Debug, Default)]
struct Partial {
    bytes: Vec<u8>,
    cut_bytes: usize,
}

#[derive(Debug)]
struct State {
    partial: [Partial; 3],
    line_bytes: usize,
    lines: TokenBucket,
    bytes: TokenBucket,
    unreported_drops: u64,
    counts: LogCounts,
    ring: VecDeque<LogLine>,
    ring_bytes: usize,
}

/// The output of one plugin over all its runs.
#[derive(Debug)]
pub struct LogStream {
    plugin: Arc<str>,
    is_logged: bool,
    state: Mutex<State>,
}

impl LogStream {
    /// A stream whose events carry `plugin` as their field of that name.
    #[must_use]
    pub fn new(plugin: Arc<str>, limits: LogLimits) -> Self {
        let state = State {
            partial: Default::default(),
            line_bytes: limits.line_bytes as usize,
            lines: TokenBucket::new(limits.lines_per_second),
            bytes: TokenBucket::new(limits.bytes_per_second),
            unreported_drops: 0,
            counts: LogCounts::default(),
            ring: VecDeque::new(),
            ring_bytes: 0,
        };
        Self {
            plugin,
            is_logged: true,
            state: Mutex::new(state),
        }
    }

    /// A stream whose lines are kept for `tail` and make no events.
    pub(crate) fn quiet(plugin: Arc<str>, limits: LogLimits) -> Self {
        Self {
            is_logged: false,
            ..Self::new(plugin, limits)
        }
    }

    /// Bytes that may be pushed now; 0 says to wait for [`ready`](Self::ready).
    pub fn budget(&self) -> usize {
        let mut state = self.state.lock();
        state.bytes.refill();
        state.bytes.tokens.max(0.0) as usize
    }

    /// Waits until [`budget`](Self::budget) is at least a tenth of a second's worth.
    pub async fn ready(&self) {
        loop {
            let missing = {
                let mut state = self.state.lock();
                state.bytes.refill();
                let missing = state.bytes.per_second / 10.0 - state.bytes.tokens;
                state.counts.waits += u64::from(missing > 0.0);
                missing
            };
            if missing <= 0.0 {
                return;
            }
            let seconds = missing / self.state.lock().bytes.per_second;
            tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.001, 10.0))).await;
        }
    }

    /// Takes output; each completed line becomes one log event.
    pub fn push(&self, stream: OutputStream, bytes: &[u8]) {
        let mut events = Vec::new();
        {
            let mut state = self.state.lock();
            state.counts.bytes += bytes.len() as u64;
            state.bytes.tokens -= bytes.len() as f64;
            let mut pieces = bytes.split(|&byte| byte == b'\n');
            let last = pieces.next_back().unwrap_or_default();
            for piece in pieces {
                state.extend(stream, piece);
                state.complete(stream, LogLevel::Info, &mut events);
            }
            state.extend(stream, last);
        }
        self.emit(stream, events);
    }

    /// Takes one line at a level. It is held to the same rates as what is printed.
    pub fn log(&self, level: LogLevel, line: &[u8]) {
        let mut events = Vec::new();
        {
            let mut state = self.state.lock();
            state.counts.bytes += line.len() as u64;
            state.bytes.tokens -= line.len() as f64;
            state.extend(OutputStream::Log, line);
            state.complete(OutputStream::Log, level, &mut events);
        }
        self.emit(OutputStream::Log, events);
    }

    /// Reports lines dropped since the last report, which otherwise waits for the next line
    /// that is kept.
    pub fn report_drops(&self) {
        let drops = std::mem::take(&mut self.state.lock().unreported_drops);
        if drops > 0 {
            self.emit(OutputStream::Stdout, vec![Event::Dropped(drops)]);
        }
    }

    /// Ends a run: lines without a newline are logged too.
    pub fn finish(&self) {
        for stream in [OutputStream::Stdout, OutputStream::Stderr] {
            let mut events = Vec::new();
            {
                let mut state = self.state.lock();
                let partial = &state.partial[stream as usize];
                if !partial.bytes.is_empty() {
                    state.complete(stream, LogLevel::Info, &mut events);
                }
            }
            self.emit(stream, events);
        }
        self.report_drops();
    }

    /// The newest `count` lines, oldest first.
    #[must_use]
    pub fn tail(&self, count: usize) -> Vec<LogLine> {
        let state = self.state.lock();
        state
            .ring
            .iter()
            .skip(state.ring.len().saturating_sub(count))
            .cloned()
            .collect()
    }

    /// Holds the plugin to other limits from now on.
    pub fn set_limits(&self, limits: LogLimits) {
        let mut state = self.state.lock();
        state.lines.set(limits.lines_per_second);
        state.bytes.set(limits.bytes_per_second);
        state.line_bytes = limits.line_bytes as usize;
    }

    /// The limits, with what was used of late.
    #[must_use]
    pub fn limits(&self) -> Vec<LimitUse> {
        let mut state = self.state.lock();
        let partial = state
            .partial
            .iter()
            .map(|partial| partial.bytes.len())
            .max();
        let counts = state.counts;
        let rows = [
            (
                Limit::LogLines,
                state.lines.per_second as u64,
                state.lines.rate(),
                counts.dropped_lines,
            ),
            (
                Limit::LogBytes,
                state.bytes.per_second as u64,
                state.bytes.rate(),
                counts.waits,
            ),
            (
                Limit::LogLineBytes,
                state.line_bytes as u64,
                partial.unwrap_or_default() as u64,
                counts.cut_lines,
            ),
        ];
        rows.into_iter()
            .map(|(limit, declared, used, hits)| LimitUse {
                limit,
                declared,
                used,
                hits,
            })
            .collect()
    }

    /// Lines after the first `seen`, oldest first and at most `most` of the newest, and the
    /// number of all lines so far, to be given as `seen` the next time.
    #[must_use]
    pub fn since(&self, seen: u64, most: usize) -> (Vec<LogLine>, u64) {
        let state = self.state.lock();
        let unseen = state.counts.lines.saturating_sub(seen);
        let unseen = usize::try_from(unseen).unwrap_or(usize::MAX).min(most);
        let skip = state.ring.len().saturating_sub(unseen);
        let lines = state.ring.iter().skip(skip).cloned().collect();
        (lines, state.counts.lines)
    }

    /// What was printed so far.
    #[must_use]
    pub fn counts(&self) -> LogCounts {
        self.state.lock().counts
    }

    /// Logs outside the lock, so that a slow subscriber holds up only this plugin.
    fn emit(&self, stream: OutputStream, events: Vec<Event>) {
        if !self.is_logged {
            return;
        }
        for event in events {
            match event {
                Event::Line(level, text) => {
                    macro_rules! emit {
                        ($level:ident) => {
                            tracing::$level!(target: "stockade::plugin", plugin = &*self.plugin, stream = stream.name(), "{text}")
                        };
                    }
                    match level {
                        LogLevel::Error => emit!(error),
                        LogLevel::Warn => emit!(warn),
                        LogLevel::Info => emit!(info),
                        LogLevel::Debug => emit!(debug),
                        LogLevel::Trace => emit!(trace),
                    }
                }
                Event::Dropped(lines) => {
                    tracing::warn!(
                        plugin = &*self.plugin,
                        lines,
                        "plugin `{}` printed too fast, {lines} lines were dropped",
                        self.plugin
                    );
                }
            }
        }
    }
}

enum Event {
    Line(LogLevel, Arc<str>),
    Dropped(u64),
}

impl State {
    fn extend(&mut self, stream: OutputStream, bytes: &[u8]) {
        let partial = &mut self.partial[stream as usize];
        let room = self.line_bytes.saturating_sub(partial.bytes.len());
        let kept = bytes.len().min(room);
        partial.bytes.extend_from_slice(&bytes[..kept]);
        partial.cut_bytes = partial.cut_bytes.saturating_add(bytes.len() - kept);
    }

    fn complete(&mut self, stream: OutputStream, level: LogLevel, events: &mut Vec<Event>) {
        let partial = &mut self.partial[stream as usize];
        let cut_bytes = std::mem::take(&mut partial.cut_bytes);
        let has_token = self.lines.take_one();
        if !has_token {
            self.unreported_drops += 1;
            self.counts.dropped_lines += 1;
            partial.bytes.clear();
            return;
        }
        let mut text = printable(&partial.bytes);
        if cut_bytes > 0 {
            // Writing to a String cannot fail.
            let _ = write!(text, " [{cut_bytes} bytes cut]");
        }
        let text: Arc<str> = text.into();
        partial.bytes.clear();
        if self.unreported_drops > 0 {
            events.push(Event::Dropped(std::mem::take(&mut self.unreported_drops)));
        }
        self.counts.lines += 1;
        self.counts.cut_lines += u64::from(cut_bytes > 0);
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let unix_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        self.ring_bytes += text.len();
        self.ring.push_back(LogLine {
            unix_ms,
            stream,
            level,
            text: Arc::clone(&text),
        });
        while self.ring.len() > RING_LINES || self.ring_bytes > RING_BYTES {
            self.ring_bytes -= self
                .ring
                .pop_front()
                .map_or(self.ring_bytes, |line| line.text.len());
        }
        events.push(Event::Line(level, text));
    }
}

/// A line without what could fake other lines or move a terminal's cursor.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        let is_bidi = matches!(character, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (character.is_control() && character != '\t') || is_bidi {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn stream(lines_per_second: u32) -> LogStream {
        LogStream::new(
            Arc::from("p"),
            LogLimits {
                lines_per_second,
                bytes_per_second: 1 << 20,
                ..LogLimits::default()
            },
        )
    }

    fn texts(stream: &LogStream) -> Vec<String> {
        stream
            .tail(usize::MAX)
            .iter()
            .map(|line| line.text.to_string())
            .collect()
    }

    #[test]
    fn lines_are_whole_however_the_bytes_come() {
        let stream = stream(100);
        for byte in b"one\ntwo\r\n\nthree" {
            stream.push(OutputStream::Stdout, &[*byte]);
        }
        assert_eq!(texts(&stream), ["one", "two", ""]);
        stream.finish();
        assert_eq!(texts(&stream), ["one", "two", "", "three"]);
    }

    #[test]
    fn the_two_streams_do_not_mix_within_a_line() {
        let stream = stream(100);
        stream.push(OutputStream::Stdout, b"out ");
        stream.push(OutputStream::Stderr, b"err\n");
        stream.push(OutputStream::Stdout, b"put\n");
        assert_eq!(texts(&stream), ["err", "out put"]);
    }

    #[test]
    fn control_characters_cannot_fake_lines_or_colours() {
        let stream = stream(100);
        stream.push(
            OutputStream::Stdout,
            b"a\x1b[31mred\x07\tb \xff\xfe \r[core] fake\n",
        );
        assert_eq!(
            texts(&stream),
            ["a\\u{1b}[31mred\\u{7}\tb \u{fffd}\u{fffd} \\r[core] fake"]
        );
    }

    #[test]
    fn a_long_line_is_cut_and_its_rest_is_not_kept() {
        let stream = stream(100);
        for _ in 0..1000 {
            stream.push(OutputStream::Stdout, &[b'x'; 10_000]);
        }
        assert!(stream.state.lock().partial[0].bytes.capacity() <= 2 * MAX_LINE_BYTES as usize);
        stream.push(OutputStream::Stdout, b"\nnext\n");
        let lines = texts(&stream);
        assert!(
            lines[0].ends_with(&format!(
                " [{} bytes cut]",
                10_000_000 - MAX_LINE_BYTES as usize
            )),
            "{}",
            lines[0].len()
        );
        assert_eq!(lines[1], "next");
        assert_eq!(stream.counts().cut_lines, 1);
    }

    #[test]
    fn a_flood_is_counted_and_dropped() {
        let stream = stream(5);
        for _ in 0..1000 {
            stream.push(OutputStream::Stdout, b"line\n");
        }
        let counts = stream.counts();
        assert_eq!(counts.lines + counts.dropped_lines, 1000);
        assert!((10..20).contains(&counts.lines), "{counts:?}");
    }

    #[test]
    fn followers_get_each_line_once() {
        let stream = LogStream::new(Arc::from("p"), LogLimits::default());
        let texts = |lines: Vec<LogLine>| -> Vec<String> {
            lines.iter().map(|line| line.text.to_string()).collect()
        };
        stream.push(OutputStream::Stdout, b"a\nb\n");
        let (lines, seen) = stream.since(0, 10);
        assert_eq!(
            (texts(lines), seen),
            (vec!["a".to_owned(), "b".to_owned()], 2)
        );
        assert_eq!(stream.since(seen, 10).0, []);
        stream.push(OutputStream::Stdout, b"c\nd\n");
        let (lines, seen) = stream.since(seen, 1);
        assert_eq!((texts(lines), seen), (vec!["d".to_owned()], 4));
    }

    #[test]
    fn bytes_over_the_rate_are_not_taken() {
        let stream = LogStream::new(
            Arc::from("p"),
            LogLimits {
                lines_per_second: 1,
                bytes_per_second: 1000,
                ..LogLimits::default()
            },
        );
        assert_eq!(stream.budget(), 2000);
        stream.push(OutputStream::Stdout, &[b'x'; 5000]);
        assert_eq!(stream.budget(), 0);
    }

    #[tokio::test]
    async fn ready_comes_when_the_bucket_has_refilled() {
        let stream = LogStream::new(
            Arc::from("p"),
            LogLimits {
                lines_per_second: 1,
                bytes_per_second: 1_000_000,
                ..LogLimits::default()
            },
        );
        stream.push(OutputStream::Stdout, &vec![b'x'; 2_000_000]);
        stream.ready().await;
        assert!(stream.budget() >= 100_000);
    }
}
