//! Gives the pool real pages in the background, so that the first store does not pay for
//! them and so that want of memory shows at start and not as a SIGBUS in a worker.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::huge_pages::HUGE_PAGE_BYTES;

/// Bytes per step. The kernel holds the segment's write lock for a step, so this bounds
/// how long a copy into the pool can wait: a few milliseconds.
const STEP_BYTES: u64 = HUGE_PAGE_BYTES;

/// Longest pause between two steps.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// Longest wait for the pool to fill, when it is touched only ahead of its use.
const IDLE_PAUSE: Duration = Duration::from_secs(1);

/// What the thread works on.
pub(crate) trait PrefaultTarget: Send + Sync + 'static {
    /// How far to go.
    fn goal(&self) -> Goal;
    /// Gives the range real pages.
    fn populate(&self, offset: u64, length: u64) -> Result<(), Errno>;
    /// Notes that everything up to `up_to` has real pages.
    fn mark_touched(&self, up_to: u64);
    /// There is no memory behind the untouched part: stop handing it out. Returns the
    /// capacity that is left, in bytes.
    fn give_up_cold(&self) -> u64;
}

/// How far the pool is to be touched, in bytes from its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Goal {
    /// Now.
    pub(crate) wanted: u64,
    /// In the end.
    pub(crate) end: u64,
}

#[derive(Default)]
struct StopSignal {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl StopSignal {
    /// Waits at most that long, less when nudged; returns whether to stop.
    fn wait(&self, pause: Duration) -> bool {
        let mut stopped = self.stopped.lock();
        if !*stopped {
            self.changed.wait_for(&mut stopped, pause);
        }
        *stopped
    }
}

/// The running thread; dropping this stops it within one step and waits for its end.
pub(crate) struct PrefaultThread {
    stop: Arc<StopSignal>,
    thread: Option<JoinHandle<()>>,
}

impl PrefaultThread {
    pub(crate) fn spawn(target: Arc<dyn PrefaultTarget>, align: u64) -> std::io::Result<Self> {
        // A step shorter than the alignment would move nothing.
        let step_bytes = STEP_BYTES.max(align);
        let stop = Arc::new(StopSignal::default());
        let thread = std::thread::Builder::new()
            .name("stockade-prefault".to_owned())
            .spawn({
                let stop = Arc::clone(&stop);
                move || {
                    // On Linux this concerns the calling thread only. It may fail; then
                    // the pauses below still leave the processor to others.
                    let _ = rustix::process::nice(19);
                    prefault(&*target, step_bytes, &stop);
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Whether it has come to the end of the pool, or given up.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Lets a thread that waits for the pool to fill look again.
    pub(crate) fn nudge(&self) {
        self.stop.changed.notify_all();
    }
}

impl Drop for PrefaultThread {
    fn drop(&mut self) {
        *self.stop.stopped.lock() = true;
        self.stop.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn prefault(target: &dyn PrefaultTarget, step_bytes: u64, stop: &StopSignal) {
    let mut reported_quarters = 0;
    // From the very start, past what was handed out meanwhile: its owner may not have
    // touched it yet, and pages that are there already cost next to nothing.
    let mut start = 0;
    loop {
        let Goal { wanted, end } = target.goal();
        if start >= end {
            break;
        }
        if start >= wanted {
            if stop.wait(IDLE_PAUSE) {
                break;
            }
            continue;
        }
        let began = Instant::now();
        let length = step_bytes.min(end - start);
        match target.populate(start, length) {
            Ok(()) => {
                start += length;
                target.mark_touched(start);
            }
            Err(Errno::NOSPC | Errno::NOMEM) => {
                let left = target.give_up_cold();
                tracing::warn!(
                    capacity_bytes = left,
                    "memory ran out while preparing the pool: it goes on with what it has; \
                     lower --l1-size-gb or free memory and restart"
                );
                break;
            }
            Err(errno) => {
                tracing::warn!(%errno, "could not prepare the pool: first stores will be slower");
                break;
            }
        }
        let quarters = start.saturating_mul(4) / end;
        if quarters > reported_quarters {
            reported_quarters = quarters;
            tracing::info!(
                percent = quarters * 25,
                prepared_bytes = start,
                pool_bytes = end,
                "preparing the pool's memory"
            );
        }
        // Rest as long as the step took: half a processor at most.
        if stop.wait(began.elapsed().min(MAX_PAUSE)) {
            break;
        }
    }
}
