//! Processor time: what a guest took, and making it wait until it has earned that.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, Sleep, sleep_until};

/// How far a guest that slept may run ahead of its quota, so that starting and answering an
/// event are not stretched.
const BURST: Duration = Duration::from_millis(50);

/// A future that is polled no more than its share of one core allows.
///
/// Around each poll the thread's own clock is read, so that waiting for other guests or other
/// processes costs nothing. All polls are metered, host calls included, and the first comes
/// after the same rule: a start function that loops is in debt like any other.
pub(super) struct Metered<F> {
    guest: Pin<Box<F>>,
    /// When what was taken so far is paid for.
    paid: Instant,
    debt: Pin<Box<Sleep>>,
    in_debt: bool,
    percent: u32,
    taken: Arc<AtomicU64>,
}

impl<F: Future> Metered<F> {
    /// `percent` of one core, 1 to 100; nanoseconds taken are added to `taken`.
    pub(super) fn new(guest: F, percent: u32, taken: Arc<AtomicU64>) -> Self {
        let now = Instant::now();
        Self {
            guest: Box::pin(guest),
            paid: now,
            debt: Box::pin(sleep_until(now)),
            in_debt: false,
            percent: percent.clamp(1, 100),
            taken,
        }
    }
}

impl<F: Future> Future for Metered<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        if this.in_debt {
            ready!(this.debt.as_mut().poll(context));
            this.in_debt = false;
        }
        let before = thread_time();
        let outcome = this.guest.as_mut().poll(context);
        let took = thread_time().saturating_sub(before);
        this.taken.fetch_add(
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        let now = Instant::now();
        this.paid = pay(now, this.paid, took, this.percent);
        if this.paid > now && outcome.is_pending() {
            this.debt.as_mut().reset(this.paid);
            this.in_debt = true;
            // Whatever woke the guest by then, its poll comes after the sleep; the sleep's own
            // waker is registered here.
            if this.debt.as_mut().poll(context).is_ready() {
                this.in_debt = false;
                context.waker().wake_by_ref();
            }
        }
        outcome
    }
}

/// The instant at which `took` more is paid for, at `percent` of real time.
fn pay(now: Instant, paid: Instant, took: Duration, percent: u32) -> Instant {
    let earliest = now.checked_sub(BURST).map_or(paid, |start| paid.max(start));
    earliest + took * 100 / percent
}

fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_at_a_fifth_waits_four_times_what_it_took() {
        let start = Instant::now();
        let took = Duration::from_millis(5);
        let mut paid = start;
        let mut now = start;
        for _ in 0..100 {
            now = (now + took).max(paid);
            paid = pay(now, paid, took, 20);
        }
        let whole = paid - start;
        assert!(whole >= Duration::from_millis(2400), "{whole:?}");
        assert!(whole <= Duration::from_millis(2600), "{whole:?}");
    }

    #[test]
    fn sleeping_earns_no_more_than_the_burst() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let paid = pay(later, start, Duration::from_millis(1), 100);
        assert_eq!(paid, later - BURST + Duration::from_millis(1));
    }
}
