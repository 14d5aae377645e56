//! Gives the pool real pages in the background, so that the first store does not pay for
//! them and so that want of memory shows at start and not as a SIGBUS in a worker.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

/// Bytes per step. The kernel holds the segment's write lock for a step, so this bounds
/// how long a copy into the pool can wait: about a millisecond.
const STEP_BYTES: u64 = 1 << 20;

/// Longest pause between two steps.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// What the thread works on.
pub(crate) trait Prefault: Send + Sync + 'static {
    /// Where the untouched part begins and where it ends, in bytes.
    fn cold_range(&self) -> (u64, u64);
    /// Gives the range real pages.
    fn populate(&self, offset: u64, length: u64) -> Result<(), Errno>;
    /// Notes that everything up to `up_to` has real pages.
    fn mark_touched(&self, up_to: u64);
    /// There is no memory behind the untouched part: stop handing it out. Returns the
    /// capacity that is left, in bytes.
    fn give_up_cold(&self) -> u64;
}

#[derive(Default)]
struct StopSignal {
    stopped: Mutex<bool>,
    changed: Condvar,
}

/// The running thread; dropping this stops it within one step and waits for its end.
pub(crate) struct PrefaultThread {
    stop: Arc<StopSignal>,
    thread: Option<JoinHandle<()>>,
}

impl PrefaultThread {
    pub(crate) fn spawn(target: Arc<dyn Prefault>, align: u64) -> std::io::Result<Self> {
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

fn prefault(target: &dyn Prefault, step_bytes: u64, stop: &StopSignal) {
    let mut reported_quarters = 0;
    loop {
        let (start, end) = target.cold_range();
        if start >= end {
            break;
        }
        let began = Instant::now();
        let length = step_bytes.min(end - start);
        match target.populate(start, length) {
            Ok(()) => target.mark_touched(start + length),
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
        let quarters = (start + length) * 4 / end;
        if quarters > reported_quarters {
            reported_quarters = quarters;
            tracing::info!(percent = quarters * 25, "preparing the pool's memory");
        }
        // Rest as long as the step took: half a processor at most.
        let mut stopped = stop.stopped.lock();
        if !*stopped {
            stop.changed
                .wait_for(&mut stopped, began.elapsed().min(MAX_PAUSE));
        }
        if *stopped {
            break;
        }
    }
}
