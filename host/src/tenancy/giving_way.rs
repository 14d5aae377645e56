//! How the server's threads share cores with each other and with the engines beside them.
//!
//! The kernel lets whoever runs on a core run on for a while, milliseconds at times, so that a
//! thread with one tenant's request would stand behind a thread with another one's flood. So
//! floods have [threads of their own](give_way_to_all), which give a core up to whoever wants it.
//! Elsewhere a request that takes milliseconds [offers its core](breathe) now and then. None of it
//! needs a privilege.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use uapi::c;

/// A tenth of the weight of a thread of nice 0, so that one which did little work of late is owed
/// a core at any time. Among threads of one weight it would first have to wait for as long as it
/// has worked.
const NICE: i32 = 10;
/// How long such a thread wants to run at a time, in nanoseconds: more than the kernel's own
/// slices of 1.4 to 2.8 ms. Linux (6.12 and later) takes its core at once for a thread that wants
/// less. An older one takes no notice.
const SLICE: u64 = 10_000_000;
/// How `sched_setattr` takes the policy.
const SCHED_BATCH: u32 = c::SCHED_BATCH as u32;
/// How long a thread wants to run at a time that offers its core, in nanoseconds, the least that
/// there is: it gives the rest away each time.
const SHORT_SLICE: u64 = 100_000;

thread_local! {
    static GIVES_WAY_TO_ALL: Cell<bool> = const { Cell::new(false) };
    /// How much more this thread may lose by offering its core; `None` while it does not.
    static PATIENCE_LEFT: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// From now on the calling thread gives up its core to all others: it takes none when it wakes,
/// has a long slice and little weight. That cannot be taken back.
pub fn give_way_to_all() {
    GIVES_WAY_TO_ALL.set(true);
    change(|attributes| {
        attributes.sched_policy = SCHED_BATCH;
        attributes.sched_nice = attributes.sched_nice.max(NICE);
        attributes.sched_runtime = SLICE;
    });
}

/// Changes how the calling thread is scheduled.
fn change(how: impl FnOnce(&mut c::sched_attr)) {
    let Ok(mut attributes) = uapi::sched_getattr(0, 0) else {
        return;
    };
    // With another policy an operator has decided.
    if i64::from(attributes.sched_policy) == i64::from(c::SCHED_OTHER) {
        how(&mut attributes);
        // What the thread starts, threads or processes, begins with the kernel's own slices.
        attributes.sched_flags = c::SCHED_FLAG_RESET_ON_FORK;
        // Where that is refused the turns of tenants decide alone.
        let _ = uapi::sched_setattr(0, &attributes, 0);
    }
}

/// The most that a request loses by offering its core. Where other programs fill all cores, each
/// time may take milliseconds.
const PATIENCE: Duration = Duration::from_millis(3);

/// A request that takes milliseconds, on a thread that offers its core whenever it
/// [breathes](breathe).
#[derive(Debug)]
pub struct GivingWay(());

impl GivingWay {
    /// From now on, on this thread. One that gives way to all offers its core as well, and mostly
    /// to its like: one of them may hold a lock that another tenant's request waits for.
    #[must_use]
    pub fn begin() -> Self {
        PATIENCE_LEFT.set(Some(PATIENCE));
        if !GIVES_WAY_TO_ALL.get() {
            change(|attributes| attributes.sched_runtime = SHORT_SLICE);
        }
        Self(())
    }
}

impl Drop for GivingWay {
    fn drop(&mut self) {
        PATIENCE_LEFT.set(None);
        if !GIVES_WAY_TO_ALL.get() {
            // The kernel's own.
            change(|attributes| attributes.sched_runtime = 0);
        }
    }
}

/// Offers this thread's core to others, if it [gives way to all](give_way_to_all).
pub(super) fn offer() {
    if GIVES_WAY_TO_ALL.get() {
        std::thread::yield_now();
    }
}

/// Offers this thread's core to others, if it [gives way](GivingWay).
pub fn breathe() {
    if let Some(left) = PATIENCE_LEFT.get() {
        let begun = Instant::now();
        std::thread::yield_now();
        PATIENCE_LEFT.set(left.checked_sub(begun.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn attributes() -> c::sched_attr {
        uapi::sched_getattr(0, 0).unwrap()
    }

    fn in_a_thread(work: impl FnOnce() + Send + 'static) {
        if i64::from(attributes().sched_policy) != i64::from(c::SCHED_OTHER) {
            eprintln!("SKIPPED: another policy is in force here");
            return;
        }
        std::thread::spawn(work).join().unwrap();
    }

    #[test]
    fn a_thread_gives_way_to_all_from_then_on() {
        in_a_thread(|| {
            let before = attributes();
            give_way_to_all();
            let after = attributes();
            assert_eq!(after.sched_policy, SCHED_BATCH);
            assert_eq!(after.sched_nice, before.sched_nice.max(NICE));
            if before.sched_runtime == 0 {
                eprintln!("SKIPPED: this kernel has no slices of a thread's own");
            } else {
                assert_eq!(after.sched_runtime, SLICE);
            }
            drop(GivingWay::begin());
            assert_eq!(attributes().sched_runtime, after.sched_runtime);
        });
    }

    #[test]
    fn a_request_has_a_short_slice_while_it_gives_way_and_what_it_starts_has_not() {
        in_a_thread(|| {
            let slice = || attributes().sched_runtime;
            let usual = slice();
            if usual == 0 {
                eprintln!("SKIPPED: this kernel has no slices of a thread's own");
                return;
            }
            let giving_way = GivingWay::begin();
            assert_eq!(slice(), SHORT_SLICE);
            assert_eq!(std::thread::spawn(slice).join().unwrap(), usual);
            drop(giving_way);
            assert_eq!(slice(), usual);
        });
    }

    #[test]
    fn a_core_is_offered_only_by_who_gives_way_and_only_for_so_long() {
        in_a_thread(|| {
            breathe();
            assert_eq!(PATIENCE_LEFT.get(), None);
            let giving_way = GivingWay::begin();
            breathe();
            assert!(PATIENCE_LEFT.get() < Some(PATIENCE));
            PATIENCE_LEFT.set(Some(Duration::ZERO));
            breathe();
            assert_eq!(PATIENCE_LEFT.get(), None, "it has lost enough");
            drop(giving_way);
            drop(GivingWay::begin());
            assert_eq!(PATIENCE_LEFT.get(), None);
        });
    }
}
