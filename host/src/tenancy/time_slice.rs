//! How the server's threads share cores with each other and with the engines beside them.
//!
//! The kernel lets whoever runs on a core run on for a while, milliseconds at times, so that a
//! thread with one tenant's request would stand behind a thread with another one's flood. Linux
//! (6.12 and later) lets a thread say how long it wants to run at a time: who wants less gets a
//! core sooner, and takes it at once from who wants more, and neither changes what part of the time
//! a thread gets. A request that takes milliseconds also offers its core to others now and then.
//! Neither needs a privilege.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use uapi::c;

/// How long a thread wants to run at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeSlice {
    /// As the kernel has it: 1.4 ms on two cores, 2.8 ms on eight and more.
    Usual,
    /// The least there is.
    Short,
    /// More than the usual, so as to give way to all who want that.
    Long,
}

thread_local! {
    static ASKED: Cell<TimeSlice> = const { Cell::new(TimeSlice::Usual) };
}

impl TimeSlice {
    /// As the kernel takes it; 0 is its own.
    fn nanoseconds(self) -> u64 {
        match self {
            Self::Usual => 0,
            Self::Short => 100_000,
            Self::Long => 10_000_000,
        }
    }

    /// What this thread has asked for last.
    pub(super) fn of_this_thread() -> Self {
        ASKED.get()
    }

    /// Asks for it, for this thread. What the thread starts, threads or processes, begins as usual.
    pub(super) fn ask(self) {
        if ASKED.replace(self) == self {
            return;
        }
        let Ok(mut attributes) = uapi::sched_getattr(0, 0) else {
            return;
        };
        // With another policy an operator has decided.
        if i64::from(attributes.sched_policy) != i64::from(c::SCHED_OTHER) {
            return;
        }
        attributes.sched_runtime = self.nanoseconds();
        attributes.sched_flags = c::SCHED_FLAG_RESET_ON_FORK;
        // An older kernel takes no notice, and nothing else depends on it.
        let _ = uapi::sched_setattr(0, &attributes, 0);
    }
}

/// The most that a request loses by offering its core. Where other programs fill all cores, each
/// time may take milliseconds.
const PATIENCE: Duration = Duration::from_millis(3);

thread_local! {
    /// How much more this thread may lose; `None` while it does not give way.
    static GIVES_WAY: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// A request that takes milliseconds, on a thread that offers its core whenever it
/// [breathes](breathe).
#[derive(Debug)]
pub struct GivingWay(());

impl GivingWay {
    /// From now on, on this thread.
    #[must_use]
    pub fn begin() -> Self {
        // Who offers its core gives the rest of its slice away.
        TimeSlice::Short.ask();
        GIVES_WAY.set(Some(PATIENCE));
        Self(())
    }
}

impl Drop for GivingWay {
    fn drop(&mut self) {
        GIVES_WAY.set(None);
    }
}

/// Offers this thread's core to others, if it [gives way](GivingWay).
pub fn breathe() {
    if let Some(left) = GIVES_WAY.get() {
        let begun = Instant::now();
        std::thread::yield_now();
        GIVES_WAY.set(left.checked_sub(begun.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn a_thread_has_the_slice_that_it_asks_for_and_those_that_it_starts_have_not() {
        let slice = || uapi::sched_getattr(0, 0).unwrap().sched_runtime;
        let usual = slice();
        if usual == 0 {
            eprintln!("SKIPPED: this kernel has no slices of a thread's own");
            return;
        }
        for asked in [TimeSlice::Short, TimeSlice::Long] {
            asked.ask();
            assert_eq!(slice(), asked.nanoseconds());
            assert_eq!(std::thread::spawn(slice).join().unwrap(), usual);
        }
        TimeSlice::Usual.ask();
        assert_eq!(slice(), usual);
    }

    #[test]
    fn a_core_is_offered_only_by_who_gives_way_and_only_for_so_long() {
        breathe();
        assert_eq!(GIVES_WAY.get(), None);
        let giving_way = GivingWay::begin();
        breathe();
        assert!(GIVES_WAY.get() < Some(PATIENCE));
        GIVES_WAY.set(Some(Duration::ZERO));
        breathe();
        assert_eq!(GIVES_WAY.get(), None, "it has lost enough");
        drop(giving_way);
        drop(GivingWay::begin());
        assert_eq!(GIVES_WAY.get(), None);
    }
}
