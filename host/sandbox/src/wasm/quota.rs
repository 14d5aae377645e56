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

use super::{guest::Meter, launch::WasmLimits, turns::Ticket};
use crate::limit::Limit;

/// What a guest may take at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Burst {
    burst: Duration,
    percent: u32,
    began: std::time::Instant,
}

impl Burst {
    /// For a run that began then.
    pub(super) fn new(limits: &WasmLimits, began: std::time::Instant) -> Self {
        Self {
            burst: limits.cpu_burst,
            percent: limits.cpu_percent.clamp(1, 100),
            began,
        }
    }

    /// What is not there of it now, where all before `paid` after the beginning is paid for.
    pub(super) fn taken(&self, paid: Duration) -> Duration {
        let idle = self.began.elapsed().saturating_sub(paid);
        self.burst.saturating_sub(idle * self.percent / 100)
    }
}

/// A future that is polled no more than its share of one core allows.
///
/// Around each poll the thread's own clock is read, so that waiting for other guests or other
/// processes costs nothing. All polls are metered, host calls included, and the first comes
/// after the same rule: a start function that loops is in debt like any other.
pub(super) struct Metered<F> {
    guest: Pin<Box<F>>,
    began: Instant,
    /// When what was taken so far is paid for.
    paid: Instant,
    /// The whole burst was there, and has not been used up since.
    had_burst: bool,
    debt: Pin<Box<Sleep>>,
    in_debt: bool,
    percent: u32,
    burst: Duration,
    turn: Ticket,
    meter: Arc<Meter>,
}

impl<F: Future> Metered<F> {
    /// Holds `guest` to the processor time of `limits` and to its turns, and counts it.
    pub(super) fn new(
        guest: F,
        limits: &WasmLimits,
        began: std::time::Instant,
        turn: Ticket,
        meter: Arc<Meter>,
    ) -> Self {
        let now = Instant::from_std(began);
        Self {
            guest: Box::pin(guest),
            began: now,
            paid: now,
            had_burst: false,
            debt: Box::pin(sleep_until(now)),
            in_debt: false,
            percent: limits.cpu_percent.clamp(1, 100),
            burst: limits.cpu_burst,
            turn,
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
        ready!(this.turn.poll_turn(context));
        let before = thread_time();
        let outcome = this.guest.as_mut().poll(context);
        let own = thread_time().saturating_sub(before);
        this.turn.give_back(own);
        // What other threads did for it is its own too.
        let charged = this.meter.charged_nanoseconds.swap(0, Ordering::Relaxed);
        let took = own + Duration::from_nanos(charged);
        this.meter.cpu_nanoseconds.fetch_add(
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        let now = Instant::now();
        let whole_burst = this.burst * 100 / this.percent;
        this.had_burst |= now.saturating_duration_since(this.paid) >= whole_burst;
        this.paid = pay(now, this.paid, took, this.percent, this.burst);
        let paid = this.paid.saturating_duration_since(this.began);
        this.meter.burst_paid_nanoseconds.store(
            u64::try_from(paid.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        if this.paid > now && outcome.is_pending() {
            this.meter.hit(Limit::Cpu);
            if std::mem::take(&mut this.had_burst) {
                this.meter.hit(Limit::CpuBurst);
            }
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
    use crate::wasm::turns::Turns;

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

    /// Takes so much of the thread's processor time.
    async fn burn(time: Duration) {
        let begun = thread_time();
        while thread_time() - begun < time {
            std::hint::spin_loop();
        }
        tokio::task::yield_now().await;
    }

    #[tokio::test(start_paused = true)]
    async fn using_up_a_whole_burst_is_a_hit_of_its_own() {
        let meter = Arc::new(Meter::default());
        let turns = Arc::new(Turns::default());
        tokio::spawn(Arc::clone(&turns).dispatch());
        let limits = WasmLimits {
            cpu_burst: Duration::from_millis(4),
            ..WasmLimits::default()
        };
        let hits = |meter: &Meter| [Limit::Cpu, Limit::CpuBurst].map(|it| meter.hits().of(it));
        let began = Instant::now().into_std();
        let burst = Burst::new(&limits, began);
        let seen = Arc::clone(&meter);
        let guest = async move {
            // A guest that just began has earned nothing.
            burn(Duration::from_millis(8)).await;
            assert_eq!(hits(&seen), [1, 0]);
            tokio::time::sleep(Duration::from_secs(1)).await;
            burn(Duration::from_millis(8)).await;
            assert_eq!(hits(&seen), [2, 1]);
            // Without another sleep it goes on in debt.
            burn(Duration::from_millis(8)).await;
            assert_eq!(hits(&seen), [3, 1]);
        };
        let turn = turns.join(limits.cpu_weight);
        Metered::new(guest, &limits, began, turn, Arc::clone(&meter)).await;
        let paid = meter.burst_paid_nanoseconds.load(Ordering::Relaxed);
        // The clock of the run is the real one, and stood still meanwhile: nothing is earned again.
        assert_eq!(burst.taken(Duration::from_nanos(paid)), limits.cpu_burst);
    }
}
