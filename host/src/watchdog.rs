//! Notices when one of the server's loops stands still, and says which.
//!
//! Each loop has a heart that it beats at least every [`BEAT`]. A thread of its own, which
//! shares nothing with what it watches, compares the beats, so that a stalled runtime is
//! seen as well. Work that is not a loop, such as a write to the log, is watched by how long
//! one piece of it takes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How often a loop beats at least.
pub const BEAT: Duration = Duration::from_millis(250);
/// How long a loop may be silent; with a look every [`LOOK`], a stall shows within 2 s.
const SILENCE: Duration = Duration::from_millis(1500);
/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(200);

/// What a loop shows of itself.
enum Sign {
    /// Counts up while the loop goes round.
    Beats(Box<dyn Fn() -> u64 + Send + Sync>),
    /// How long the piece of work in hand takes by now.
    Busy(Box<dyn Fn() -> Option<Duration> + Send + Sync>),
}

struct Watched {
    name: Arc<str>,
    sign: Sign,
    last: u64,
    changed: Instant,
    stalled_for: Option<Duration>,
}

#[derive(Default)]
struct Shared {
    loops: Mutex<Vec<Watched>>,
    looked: Mutex<Option<Instant>>,
    is_over: AtomicBool,
}

/// Watches the loops of one server; ends with it.
#[derive(Default)]
pub struct Watchdog(Arc<Shared>);

/// The beat of one loop.
#[derive(Clone)]
pub struct Heart {
    #[cfg(debug_assertions)]
    name: Arc<str>,
    beats: Arc<AtomicU64>,
}

/// One loop at one moment.
#[derive(Debug, Clone)]
pub struct LoopState {
    /// Its name.
    pub name: Arc<str>,
    /// How long it stands still, if it does.
    pub stalled_for: Option<Duration>,
}

impl Heart {
    /// Says that the loop goes round.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Stands still while the file that `STOCKADE_TEST_STALL` names contains the loop's name.
    /// Debug builds only: it is how a test sees what happens when a loop hangs.
    pub async fn stall_here(&self) {
        #[cfg(debug_assertions)]
        while is_to_stall(&self.name) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[cfg(debug_assertions)]
fn is_to_stall(name: &str) -> bool {
    static FILE: std::sync::OnceLock<Option<std::path::PathBuf>> = std::sync::OnceLock::new();
    FILE.get_or_init(|| std::env::var_os("STOCKADE_TEST_STALL").map(Into::into))
        .as_ref()
        .and_then(|path| std::fs::read_to_string(path).ok())
        .is_some_and(|names| names.split_whitespace().any(|it| it == name))
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start() -> std::io::Result<Self> {
        let watchdog = Self::default();
        let shared = Arc::clone(&watchdog.0);
        std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                while !shared.is_over.load(Ordering::Relaxed) {
                    shared.look(Instant::now());
                    std::thread::sleep(LOOK);
                }
            })?;
        Ok(watchdog)
    }

    /// A heart for a loop that goes round at least every [`BEAT`].
    #[must_use]
    pub fn heart(&self, name: &str) -> Heart {
        let beats = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&beats);
        self.watch(name, move || read.load(Ordering::Relaxed));
        Heart {
            #[cfg(debug_assertions)]
            name: name.into(),
            beats,
        }
    }

    /// Watches a loop by a number that changes while it goes round.
    pub fn watch(&self, name: &str, beats: impl Fn() -> u64 + Send + Sync + 'static) {
        self.add(name, Sign::Beats(Box::new(beats)));
    }

    /// Watches work by how long the piece in hand takes.
    pub fn watch_work(
        &self,
        name: &str,
        busy: impl Fn() -> Option<Duration> + Send + Sync + 'static,
    ) {
        self.add(name, Sign::Busy(Box::new(busy)));
    }

    fn add(&self, name: &str, sign: Sign) {
        self.0.loops.lock().push(Watched {
            name: name.into(),
            sign,
            last: 0,
            changed: Instant::now(),
            stalled_for: None,
        });
    }

    /// Stops watching: the server takes its loops down.
    pub fn rest(&self) {
        self.0.loops.lock().clear();
    }

    /// Every loop, in the order they were added; a watchdog that does not look any more is
    /// among them.
    #[must_use]
    pub fn loops(&self) -> Vec<LoopState> {
        let looked = *self.0.looked.lock();
        let own = looked.map(|looked| looked.elapsed()).unwrap_or_default();
        let mut loops: Vec<_> = self
            .0
            .loops
            .lock()
            .iter()
            .map(|watched| LoopState {
                name: Arc::clone(&watched.name),
                stalled_for: watched.stalled_for,
            })
            .collect();
        loops.push(LoopState {
            name: Arc::from("watchdog"),
            stalled_for: (own > SILENCE).then_some(own),
        });
        loops
    }

    /// What stands still, as one sentence; `None` if nothing does.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let stalled: Vec<_> = self
            .loops()
            .into_iter()
            .filter_map(|it| {
                Some(format!(
                    "{} for {:.1} s",
                    it.name,
                    it.stalled_for?.as_secs_f64()
                ))
            })
            .collect();
        (!stalled.is_empty()).then(|| format!("standing still: {}", stalled.join(", ")))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn look(&self, now: Instant) {
        for watched in self.loops.lock().iter_mut() {
            let silence = match &watched.sign {
                Sign::Beats(beats) => {
                    let beats = beats();
                    if beats != watched.last {
                        watched.last = beats;
                        watched.changed = now;
                    }
                    now.saturating_duration_since(watched.changed)
                }
                Sign::Busy(busy) => busy().unwrap_or_default(),
            };
            let was_stalled = watched.stalled_for.is_some();
            watched.stalled_for = (silence > SILENCE).then_some(silence);
            match (was_stalled, watched.stalled_for) {
                (false, Some(_)) => {
                    tracing::error!("the loop `{}` stands still", watched.name);
                }
                (true, None) => tracing::info!("the loop `{}` goes on", watched.name),
                _ => {}
            }
        }
        *self.looked.lock() = Some(now);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn a_silent_loop_is_named_until_it_beats_again() {
        let watchdog = Watchdog::default();
        let (quick, slow) = (watchdog.heart("quick"), watchdog.heart("slow"));
        let start = Instant::now();
        watchdog.0.look(start);
        quick.beat();
        watchdog.0.look(start + SILENCE + LOOK);
        let complaint = watchdog.complaint().unwrap();
        assert!(
            complaint.contains("slow") && !complaint.contains("quick"),
            "{complaint}"
        );
        slow.beat();
        watchdog.0.look(start + SILENCE + LOOK * 2);
        assert_eq!(watchdog.complaint(), None);
    }

    #[test]
    fn work_that_takes_too_long_is_named() {
        let watchdog = Watchdog::default();
        let busy = Arc::new(Mutex::new(None));
        let read = Arc::clone(&busy);
        watchdog.watch_work("log writer", move || *read.lock());
        watchdog.0.look(Instant::now());
        assert_eq!(watchdog.complaint(), None);
        *busy.lock() = Some(SILENCE * 2);
        watchdog.0.look(Instant::now());
        assert!(watchdog.complaint().unwrap().contains("log writer"));
    }

    #[test]
    fn a_stall_shows_within_two_seconds() {
        assert!(SILENCE + LOOK + BEAT < Duration::from_secs(2));
    }
}
