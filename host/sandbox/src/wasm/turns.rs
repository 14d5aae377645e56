//! Whose turn it is on the thread that guests share: start-time fair queueing.
//!
//! Each guest has a place on a line of virtual time, which a turn moves on by the processor time
//! that it took, divided by the guest's weight. The foremost is next. Who comes from a sleep
//! stands where the line is now, so it waits for one turn however many others never sleep.
//!
//! Those who wait do so here and not in the executor's queue: what else may become of a guest, to
//! be killed above all, is never behind the turns of others.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;

use super::engine::TICK;

/// The weight at which virtual time is processor time.
const FULL_WEIGHT: u32 = 1000;

/// Virtual time in nanoseconds, and a number that tells apart who stands at the same.
type Place = (u64, u64);

/// The queue of one thread.
#[derive(Default)]
pub(super) struct Turns(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    waiting: BTreeMap<Place, Waker>,
    /// Whose turn it is.
    holder: Option<Place>,
    /// Where the last turn began.
    now: u64,
    next_number: u64,
    dispatcher: Option<Waker>,
}

impl Queue {
    fn call_dispatcher(&self) {
        if let Some(dispatcher) = &self.dispatcher {
            dispatcher.wake_by_ref();
        }
    }

    /// Gives the turn to the foremost, and returns how to tell it.
    fn advance(&mut self) -> Option<Waker> {
        if self.holder.is_some() {
            return None;
        }
        let (place, waker) = self.waiting.pop_first()?;
        self.now = self.now.max(place.0);
        self.holder = Some(place);
        Some(waker)
    }
}

impl Turns {
    /// Gives the turns. A task of its own that, once called, steps behind all that are ready: whoever
    /// wants a turn stands in the queue by then, also who has just had one.
    pub(super) async fn dispatch(self: Arc<Self>) {
        let mut has_stepped_behind = false;
        poll_fn(|context| {
            let mut queue = self.0.lock();
            queue.dispatcher = Some(context.waker().clone());
            has_stepped_behind = !has_stepped_behind;
            if has_stepped_behind {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let next = queue.advance();
            drop(queue);
            if let Some(next) = next {
                next.wake();
            }
            Poll::Pending
        })
        .await
    }

    /// A guest's part in it, with a weight of 1 to 1000.
    pub(super) fn join(self: &Arc<Self>, weight: u32) -> Ticket {
        Ticket {
            turns: Arc::clone(self),
            weight: weight.clamp(1, FULL_WEIGHT),
            paid: 0,
            place: None,
        }
    }
}

/// One guest's part in the turns; dropped, it is out of them.
pub(super) struct Ticket {
    turns: Arc<Turns>,
    weight: u32,
    /// The virtual time to which it has taken its turns.
    paid: u64,
    /// While it waits and while it has the turn.
    place: Option<Place>,
}

impl Ticket {
    /// Ready when it is this guest's turn, which is then to be [given back](Self::give_back).
    pub(super) fn poll_turn(&mut self, context: &Context<'_>) -> Poll<()> {
        let mut queue = self.turns.0.lock();
        let Some(place) = self.place else {
            let place = (queue.now.max(self.paid), queue.next_number);
            queue.next_number += 1;
            queue.waiting.insert(place, context.waker().clone());
            self.place = Some(place);
            if queue.holder.is_none() {
                queue.call_dispatcher();
            }
            return Poll::Pending;
        };
        if queue.holder == Some(place) {
            return Poll::Ready(());
        }
        let replaced = match queue.waiting.get_mut(&place) {
            Some(waker) if !waker.will_wake(context.waker()) => {
                Some(std::mem::replace(waker, context.waker().clone()))
            }
            _ => None,
        };
        // A waker can be what keeps a task, and a task has a ticket: not under the lock.
        drop(queue);
        drop(replaced);
        Poll::Pending
    }

    /// Ends the turn that was got, which took so much processor time.
    pub(super) fn give_back(&mut self, took: Duration) {
        // A call that could not be interrupted is paid for by a few turns, not by hundreds:
        // the quota sees to the rest.
        let took = took.min(TICK * 4) * FULL_WEIGHT / self.weight;
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let began = self.place.map_or(self.paid, |place| place.0);
        self.paid = began.saturating_add(took);
        self.leave();
    }

    fn leave(&mut self) {
        let Some(place) = self.place.take() else {
            return;
        };
        let mut queue = self.turns.0.lock();
        let waker = queue.waiting.remove(&place);
        if queue.holder == Some(place) {
            queue.holder = None;
            queue.call_dispatcher();
        }
        drop(queue);
        drop(waker);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    };

    use tokio::runtime;
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// The executor of guests, in the small.
    fn executor() -> (runtime::Runtime, Arc<Turns>) {
        let executor = runtime::Builder::new_current_thread()
            .event_interval(1)
            .global_queue_interval(1)
            .build()
            .unwrap();
        let turns = Arc::new(Turns::default());
        executor.spawn(Arc::clone(&turns).dispatch());
        (executor, turns)
    }

    /// Takes turns of a tick for ever, and tells of each.
    async fn spin(mut ticket: Ticket, mut tell: impl FnMut()) {
        poll_fn(|context| {
            if ticket.poll_turn(context).is_ready() {
                tell();
                ticket.give_back(TICK);
                context.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        })
        .await
    }

    #[test]
    fn turns_go_by_weight() {
        let (executor, turns) = executor();
        let total = Arc::new(AtomicU64::new(0));
        let counts = [100, 300, 1000].map(|weight| {
            let (count, total) = (Arc::new(AtomicU64::new(0)), Arc::clone(&total));
            let told = Arc::clone(&count);
            executor.spawn(spin(turns.join(weight), move || {
                told.fetch_add(1, Ordering::Relaxed);
                total.fetch_add(1, Ordering::Relaxed);
            }));
            count
        });
        executor.block_on(async {
            while total.load(Ordering::Relaxed) < 14_000 {
                tokio::task::yield_now().await;
            }
        });
        let [light, middle, heavy] = counts.map(|count| count.load(Ordering::Relaxed));
        assert!((990..=1010).contains(&light), "{light}");
        assert!((2990..=3010).contains(&middle), "{middle}");
        assert!((9980..=10_020).contains(&heavy), "{heavy}");
    }

    /// A kill, and a guest that comes anew or from a sleep, wait for the turn that is under way
    /// and not for those of fifty others.
    #[test]
    fn neither_a_kill_nor_a_sleeper_waits_for_the_turns_of_fifty_others() {
        let (executor, turns) = executor();
        let all = Arc::new(AtomicU64::new(0));
        let kill = CancellationToken::new();
        for _ in 0..50 {
            let all = Arc::clone(&all);
            executor.spawn(spin(turns.join(100), move || {
                all.fetch_add(1, Ordering::Relaxed);
            }));
        }
        let (doomed, killed) = (turns.join(100), kill.clone());
        let seen = Arc::clone(&all);
        let doomed = executor.spawn(async move {
            tokio::select! {
                biased;
                () = killed.cancelled() => {}
                () = spin(doomed, || {}) => {}
            }
            seen.load(Ordering::Relaxed)
        });
        executor.block_on(async {
            for round in 1..=20 {
                while all.load(Ordering::Relaxed) < 1000 * round {
                    tokio::task::yield_now().await;
                }
                let (before, seen) = (all.load(Ordering::Relaxed), Arc::clone(&all));
                let mut newcomer = turns.join(100);
                let began = tokio::spawn(async move {
                    poll_fn(|context| newcomer.poll_turn(context)).await;
                    seen.load(Ordering::Relaxed)
                });
                // One that had its turn, and one that was given before.
                assert!(began.await.unwrap() <= before + 2);
            }
            let before = all.load(Ordering::Relaxed);
            kill.cancel();
            assert!(doomed.await.unwrap() <= before + 1);
        });
    }

    #[test]
    fn whoever_goes_with_the_turn_leaves_it_to_the_others() {
        let (executor, turns) = executor();
        let mut leaves = turns.join(100);
        let got = Arc::new(AtomicBool::new(false));
        executor.block_on(async {
            poll_fn(|context| leaves.poll_turn(context)).await;
            let (other, told) = (turns.join(100), Arc::clone(&got));
            tokio::spawn(spin(other, move || told.store(true, Ordering::Relaxed)));
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert!(!got.load(Ordering::Relaxed), "two had the turn at once");
            drop(leaves);
            while !got.load(Ordering::Relaxed) {
                tokio::task::yield_now().await;
            }
        });
    }

    /// No two of those who always want to run are ever further apart than what each may take at
    /// once, whatever they take.
    #[test]
    fn service_is_fair_at_every_moment() {
        // A generator of numbers that is the same each time.
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _case in 0..200 {
            let turns = Arc::new(Turns::default());
            let context = &Context::from_waker(Waker::noop());
            let mut tickets: Vec<_> = (0..2 + random(4))
                .map(|_| (turns.join(10 + random(991) as u32), 0_f64))
                .collect();
            let most = |(ticket, _): &(Ticket, f64)| 5000.0 / f64::from(ticket.weight);
            let allowed = tickets.iter().map(most).fold(0.0, f64::max) * 2.0;
            for _turn in 0..300 {
                for (ticket, _) in &mut tickets {
                    let _ = ticket.poll_turn(context);
                }
                turns.0.lock().advance();
                let mut holders = 0;
                for (ticket, service) in &mut tickets {
                    if ticket.poll_turn(context).is_ready() {
                        holders += 1;
                        let took = 1 + random(5000);
                        *service += took as f64 / f64::from(ticket.weight);
                        ticket.give_back(Duration::from_micros(took));
                    }
                }
                assert_eq!(holders, 1);
                let services = tickets.iter().map(|(_, service)| *service);
                let least = services.clone().fold(f64::MAX, f64::min);
                let apart = services.fold(0.0, f64::max) - least;
                assert!(apart <= allowed + 1e-6, "{apart} apart, {allowed} allowed");
            }
        }
    }
}
