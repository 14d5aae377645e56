//! Processor time: what a guest took, and making it wait until it has earned that.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{engine::TICK, guest::Meter, launch::WasmLimits};
use crate::limit::Limit;

/// The weight that earns a whole turn with each round of the guests; others need several.
const FULL_WEIGHT: u32 = 1000;

/// Turns by weight, as deficit round robin gives them: each round earns a guest a part of a
/// turn, and it runs when it has paid for its last one. Alone, it goes through the rounds
/// without anything between them.
struct Turns {
    quantum: Duration,
    owed: Duration,
}

impl Turns {
    fn new(weight: u32) -> Self {
        Self {
            quantum: TICK * weight.clamp(1, FULL_WEIGHT) / FULL_WEIGHT,
            owed: Duration::ZERO,
        }
    }

    /// Whether this round's turn is the guest's.
    fn is_due(&mut self) -> bool {
        self.owed = self.owed.saturating_sub(self.quantum);
        self.owed.is_zero()
    }

    fn took(&mut self, time: Duration) {
        // A call that could not be interrupted is paid for by a few turns, not by hundreds:
        // the quota sees to the rest.
        self.owed = (self.owed + time).min(TICK * 4);
    }
}

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
    burst: Duration,
    turns: Turns,
    meter: Arc<Meter>,
}

impl<F: Future> Metered<F> {
    /// Holds `guest` to the processor time of `limits`, and counts it.
    pub(super) fn new(guest: F, limits: &WasmLimits, meter: Arc<Meter>) -> Self {
        let now = Instant::now();
        Self {
            guest: Box::pin(guest),
            paid: now,
            debt: Box::pin(sleep_until(now)),
            in_debt: false,
            percent: limits.cpu_percent.clamp(1, 100),
            burst: limits.cpu_burst,
            turns: Turns::new(limits.cpu_weight),
            meter,
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
        if !this.turns.is_due() {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = thread_time();
        let outcome = this.guest.as_mut().poll(context);
        let own = thread_time().saturating_sub(before);
        this.turns.took(own);
        // What other threads did for it is its own too.
        let charged = this.meter.charged_nanoseconds.swap(0, Ordering::Relaxed);
        let took = own + Duration::from_nanos(charged);
        this.meter.cpu_nanoseconds.fetch_add(
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        let now = Instant::now();
        this.paid = pay(now, this.paid, took, this.percent, this.burst);
        if this.paid > now && outcome.is_pending() {
            this.meter.hit(Limit::Cpu);
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
fn pay(now: Instant, paid: Instant, took: Duration, percent: u32, burst: Duration) -> Instant {
    // A burst of processor time is earned over a longer time, by the share.
    let earliest = now
        .checked_sub(burst * 100 / percent)
        .map_or(paid, |start| paid.max(start));
    earliest + took * 100 / percent
}

/// Processor time of the calling thread so far.
pub(super) fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: Duration = Duration::from_millis(50);

    #[test]
    fn a_guest_at_a_fifth_waits_four_times_what_it_took() {
        let start = Instant::now();
        let took = Duration::from_millis(5);
        let mut paid = start;
        let mut now = start;
        for _ in 0..100 {
            now = (now + took).max(paid);
            paid = pay(now, paid, took, 20, BURST);
        }
        let whole = paid - start;
        assert!(whole >= Duration::from_millis(2400), "{whole:?}");
        assert!(whole <= Duration::from_millis(2600), "{whole:?}");
    }

    #[test]
    fn sleeping_earns_no_more_than_the_burst() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let took = Duration::from_millis(1);
        let paid = pay(later, start, took, 100, BURST);
        assert_eq!(paid, later - BURST + took);
        // At a tenth, the same 50 ms of processor time are earned in half a second.
        let paid = pay(later, start, took, 10, BURST);
        assert_eq!(paid, later - 10 * BURST + 10 * took);
    }

    #[test]
    fn turns_go_by_weight_and_a_lone_guest_waits_for_nobody() {
        let mut guests = [
            (Turns::new(100), 0),
            (Turns::new(300), 0),
            (Turns::new(1000), 0),
        ];
        for _round in 0..10_000 {
            for (turns, count) in &mut guests {
                if turns.is_due() {
                    *count += 1;
                    turns.took(TICK);
                }
            }
        }
        let [light, middle, heavy] = guests.map(|(_, count)| count);
        assert!((999..=1001).contains(&light), "{light}");
        assert!((2499..=3001).contains(&middle), "{middle}");
        assert!((9999..=10_000).contains(&heavy), "{heavy}");
    }
}
