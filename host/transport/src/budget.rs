//! Bytes that all connections together may hold of requests not yet answered.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a connection may hold without asking: its read buffers and small
/// requests, so that those never touch the shared counter.
const FREE_BYTES: usize = 256 << 10;
/// Budget is taken and given back in steps of this size.
const STEP_BYTES: usize = 64 << 10;

/// The budget that all connections of a server share.
pub(crate) struct Budget {
    steps: Arc<Semaphore>,
    /// Whoever holds this may go over the budget. Without it, connections that
    /// each hold a part of their message could wait for each other for ever; with
    /// it, one at a time completes. So the true bound is the budget and one message.
    overdraft: Arc<Semaphore>,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        let steps = (bytes / STEP_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        Self {
            steps: Arc::new(Semaphore::new(steps)),
            overdraft: Arc::new(Semaphore::new(1)),
        }
    }
}

enum Grant {
    Steps(OwnedSemaphorePermit),
    Overdraft(OwnedSemaphorePermit),
}

type Waiting = Pin<Box<dyn Future<Output = Option<Grant>> + Send>>;

/// What one connection holds of a [`Budget`]; gives it back on drop.
pub(crate) struct Account {
    budget: Arc<Budget>,
    steps: Option<OwnedSemaphorePermit>,
    overdraft: Option<OwnedSemaphorePermit>,
    /// Keeps this connection's place in the queue.
    waiting: Option<Waiting>,
}

impl Account {
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            steps: None,
            overdraft: None,
            waiting: None,
        }
    }

    fn granted(&self) -> usize {
        self.steps
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits)
    }

    /// Whether the connection waits for its turn.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Gives back what `held` bytes no longer need, a place in the queue included.
    pub(crate) fn release(&mut self, held: usize) {
        if self.steps.is_none() && self.overdraft.is_none() && self.waiting.is_none() {
            return;
        }
        let needed = steps_for(held);
        if needed <= self.granted() {
            self.overdraft = None;
            self.waiting = None;
            let surplus = self.granted() - needed;
            if let Some(steps) = &mut self.steps {
                drop(steps.split(surplus));
            }
        }
    }

    /// Ready once `held` bytes are covered.
    pub(crate) fn poll_cover(&mut self, cx: &mut Context<'_>, held: usize) -> Poll<()> {
        let needed = steps_for(held);
        loop {
            let granted = self.granted();
            if needed <= granted || self.overdraft.is_some() {
                self.waiting = None;
                return Poll::Ready(());
            }
            // More than fits into the semaphore's arithmetic is more than it has.
            let missing = u32::try_from(needed - granted).unwrap_or(u32::MAX);
            if self.waiting.is_none()
                && let Ok(steps) = Arc::clone(&self.budget.steps).try_acquire_many_owned(missing)
            {
                self.grant(Grant::Steps(steps));
                continue;
            }
            let waiting = self.waiting.get_or_insert_with(|| {
                let steps = Arc::clone(&self.budget.steps);
                let overdraft = Arc::clone(&self.budget.overdraft);
                Box::pin(async move {
                    tokio::select! {
                        biased;
                        steps = steps.acquire_many_owned(missing) => steps.ok().map(Grant::Steps),
                        permit = overdraft.acquire_owned() => permit.ok().map(Grant::Overdraft),
                    }
                })
            });
            match waiting.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(grant) => {
                    self.waiting = None;
                    match grant {
                        Some(grant) => self.grant(grant),
                        // The semaphores are never closed.
                        None => return Poll::Ready(()),
                    }
                }
            }
        }
    }

    fn grant(&mut self, grant: Grant) {
        match (grant, &mut self.steps) {
            (Grant::Overdraft(permit), _) => self.overdraft = Some(permit),
            (Grant::Steps(more), Some(steps)) => steps.merge(more),
            (Grant::Steps(more), none) => *none = Some(more),
        }
    }
}

fn steps_for(held: usize) -> usize {
    held.saturating_sub(FREE_BYTES).div_ceil(STEP_BYTES)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
    use super::*;
    use std::task::Waker;

    const MIB: usize = 1 << 20;

    fn covers(account: &mut Account, held: usize) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        account.poll_cover(&mut cx, held).is_ready()
    }

    #[test]
    fn small_holdings_are_free_and_large_ones_come_back() {
        let budget = Arc::new(Budget::new(MIB));
        let mut account = Account::new(Arc::clone(&budget));
        assert!(covers(&mut account, FREE_BYTES));
        assert_eq!(budget.steps.available_permits(), 16);
        assert!(covers(&mut account, FREE_BYTES + MIB));
        assert_eq!(budget.steps.available_permits(), 0);
        account.release(FREE_BYTES + MIB / 2);
        assert_eq!(budget.steps.available_permits(), 8);
        drop(account);
        assert_eq!(budget.steps.available_permits(), 16);
    }

    #[test]
    fn when_all_hold_a_part_one_at_a_time_completes() {
        let budget = Arc::new(Budget::new(MIB));
        let mut accounts: Vec<_> = (0..4).map(|_| Account::new(Arc::clone(&budget))).collect();
        for account in &mut accounts {
            assert!(covers(account, FREE_BYTES + MIB / 4));
        }
        for turn in 0..4 {
            for (at, account) in accounts.iter_mut().enumerate().skip(turn) {
                // Once the first has given its steps back, the second needs no overdraft.
                let covered = covers(account, FREE_BYTES + MIB);
                assert_eq!(covered, at == turn, "turn {turn}, account {at}");
            }
            accounts[turn].release(0);
        }
        for account in &mut accounts {
            account.release(0);
        }
        assert_eq!(budget.steps.available_permits(), 16);
        assert_eq!(budget.overdraft.available_permits(), 1);
    }
}
