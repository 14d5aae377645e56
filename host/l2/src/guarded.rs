//! Storage that may be slow, down or wrong, made safe to wait for.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    adapter::{Adapter, AdapterError, Entry, Evictions, Form, IsWanted},
    name::ObjectName,
};

/// Failures in a row after which storage is left alone.
const FAILURES_TO_OPEN: u32 = 5;
/// Shortest and longest time for which it is left alone.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Tries of one call, and the pause before the second one; it doubles after that.
const TRIES: u32 = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// `time`, a quarter more or less, so that many servers do not come back in one moment.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.75 + fastrand::f64() / 2.0)
}

/// Whether calls go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// All do.
    Closed,
    /// None does until the pause is over.
    Open,
    /// The pause is over: one call goes through and decides.
    HalfOpen,
}

impl BreakerState {
    /// Its name in `/status`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

#[derive(Debug)]
struct Inner {
    failures: u32,
    /// Times in a row that it opened.
    opened: u32,
    /// When the pause ends; `None` while closed.
    until: Option<Instant>,
    is_probing: bool,
}

/// A circuit breaker: stops asking storage that keeps failing, and asks it once now and then.
#[derive(Debug)]
pub struct Breaker {
    inner: Mutex<Inner>,
    openings: AtomicU64,
}

/// Leave for one call. Dropped without an outcome it counts for nothing.
struct Leave<'b> {
    breaker: &'b Breaker,
    is_probe: bool,
}

impl Breaker {
    fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                failures: 0,
                opened: 0,
                until: None,
                is_probing: false,
            }),
            openings: AtomicU64::new(0),
        }
    }

    fn ask(&self, now: Instant) -> Option<Leave<'_>> {
        let mut inner = self.inner.lock();
        let is_probe = match inner.until {
            None => false,
            Some(until) if until > now || inner.is_probing => return None,
            Some(_) => {
                inner.is_probing = true;
                true
            }
        };
        Some(Leave {
            breaker: self,
            is_probe,
        })
    }

    /// Whether a call would go through now.
    #[must_use]
    pub fn state(&self) -> BreakerState {
        let inner = self.inner.lock();
        match inner.until {
            None => BreakerState::Closed,
            Some(until) if until > Instant::now() || inner.is_probing => BreakerState::Open,
            Some(_) => BreakerState::HalfOpen,
        }
    }

    /// How often it has opened.
    #[must_use]
    pub fn openings(&self) -> u64 {
        self.openings.load(Ordering::Relaxed)
    }
}

impl Leave<'_> {
    /// Returns whether the storage was left alone for the first time because of this call.
    fn end(self, failed: bool, now: Instant) -> bool {
        let mut inner = self.breaker.inner.lock();
        if !failed {
            inner.failures = 0;
            // A call that began before the breaker opened says nothing about now.
            if self.is_probe || inner.until.is_none() {
                inner.until = None;
                inner.opened = 0;
            }
            return false;
        }
        inner.failures = inner.failures.saturating_add(1);
        let opens = self.is_probe || (inner.until.is_none() && inner.failures >= FAILURES_TO_OPEN);
        if !opens {
            return false;
        }
        let pause = PAUSE
            .0
            .saturating_mul(1 << inner.opened.min(10))
            .min(PAUSE.1);
        inner.until = Some(now + jittered(pause));
        inner.opened = inner.opened.saturating_add(1);
        self.breaker.openings.fetch_add(1, Ordering::Relaxed);
        inner.opened == 1
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if self.is_probe {
            self.breaker.inner.lock().is_probing = false;
        }
    }
}

/// An adapter whose calls end at their deadline, are tried again where that may help, and fail at
/// once while the storage is known to be down.
///
/// Reads and writes have a breaker each: a full disk still serves.
#[derive(Debug)]
pub struct Guarded {
    adapter: Arc<dyn Adapter>,
    reads: Breaker,
    writes: Breaker,
}

impl Guarded {
    /// Guards `adapter`.
    #[must_use]
    pub fn new(adapter: Arc<dyn Adapter>) -> Self {
        Self {
            adapter,
            reads: Breaker::new(),
            writes: Breaker::new(),
        }
    }

    /// The breaker of lookups and loads.
    #[must_use]
    pub fn reads(&self) -> &Breaker {
        &self.reads
    }

    /// The breaker of stores.
    #[must_use]
    pub fn writes(&self) -> &Breaker {
        &self.writes
    }

    /// As [`Adapter::find`], until `deadline`.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn find(
        &self,
        names: &[ObjectName],
        deadline: Instant,
    ) -> Result<Vec<bool>, AdapterError> {
        self.call(&self.reads, "lookup", deadline, || self.adapter.find(names))
            .await
    }

    /// As [`Adapter::load`], until `deadline`.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn load(
        &self,
        name: &ObjectName,
        wanted: Form,
        deadline: Instant,
    ) -> Result<Bytes, AdapterError> {
        self.call(&self.reads, "load", deadline, || {
            self.adapter.load(name, wanted)
        })
        .await
    }

    /// As [`Adapter::store`], until `deadline`.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn store(
        &self,
        name: &ObjectName,
        value: &Bytes,
        layout: u32,
        deadline: Instant,
    ) -> Result<(), AdapterError> {
        self.call(&self.writes, "store", deadline, || {
            self.adapter.store(name, value.clone(), layout)
        })
        .await
    }

    /// As [`Adapter::delete`], until `deadline`.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn delete(
        &self,
        names: &[ObjectName],
        deadline: Instant,
    ) -> Result<Vec<bool>, AdapterError> {
        self.call(&self.writes, "delete", deadline, || {
            self.adapter.delete(names)
        })
        .await
    }

    /// As [`Adapter::list`]; its receiver says how long that may take.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        self.adapter.list(cache_salt, found).await
    }

    /// As [`Adapter::discard_aside`], until `deadline`.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub async fn discard_aside(
        &self,
        is_wanted: &IsWanted<'_>,
        deadline: Instant,
    ) -> Result<u64, AdapterError> {
        self.call(&self.writes, "purge", deadline, || {
            self.adapter.discard_aside(is_wanted)
        })
        .await
    }

    /// As [`Adapter::used_bytes`].
    #[must_use]
    pub fn used_bytes(&self) -> Option<u64> {
        self.adapter.used_bytes()
    }

    /// As [`Adapter::watch_evictions`].
    pub fn watch_evictions(&self, evictions: Arc<dyn Evictions>) {
        self.adapter.watch_evictions(evictions);
    }

    /// As [`Adapter::status`].
    #[must_use]
    pub fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        self.adapter.status()
    }

    async fn call<T, F: Future<Output = Result<T, AdapterError>>>(
        &self,
        breaker: &Breaker,
        what: &'static str,
        deadline: Instant,
        call: impl Fn() -> F,
    ) -> Result<T, AdapterError> {
        let leave = breaker.ask(Instant::now()).ok_or(AdapterError::Open)?;
        // One try for a probe: it is to find out, not to insist.
        let tries = if leave.is_probe { 1 } else { TRIES };
        let result = within(deadline, retried(tries, call)).await;
        let failed = result.as_ref().is_err_and(AdapterError::is_failure);
        if leave.end(failed, Instant::now())
            && let Err(error) = &result
        {
            tracing::warn!(
                adapter = ?self.adapter,
                "{what} failed {FAILURES_TO_OPEN} times in a row, last: {error}; the storage is left alone for a while"
            );
        }
        result
    }
}

async fn within<T>(
    deadline: Instant,
    call: impl Future<Output = Result<T, AdapterError>>,
) -> Result<T, AdapterError> {
    match tokio::time::timeout_at(deadline.into(), call).await {
        Ok(result) => result,
        Err(_) => Err(AdapterError::Deadline),
    }
}

async fn retried<T, F: Future<Output = Result<T, AdapterError>>>(
    tries: u32,
    call: impl Fn() -> F,
) -> Result<T, AdapterError> {
    let mut pause = RETRY_PAUSE;
    for _ in 1..tries {
        match call().await {
            Err(error) if error.is_transient() => {
                tokio::time::sleep(jittered(pause)).await;
                pause *= 2;
            }
            result => return result,
        }
    }
    call().await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn fail(breaker: &Breaker, now: Instant) {
        breaker.ask(now).unwrap().end(true, now);
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_call_find_out() {
        let breaker = Breaker::new();
        let now = Instant::now();
        for _ in 1..FAILURES_TO_OPEN {
            fail(&breaker, now);
        }
        breaker.ask(now).unwrap().end(false, now);
        for _ in 1..FAILURES_TO_OPEN {
            fail(&breaker, now);
        }
        assert_eq!(breaker.state(), BreakerState::Closed, "a success counts");
        fail(&breaker, now);
        assert!(breaker.ask(now).is_none());
        // Above the jitter of the first pause, below that of the second.
        let later = now + PAUSE.0.mul_f64(1.3);
        let probe = breaker.ask(later).unwrap();
        assert!(breaker.ask(later).is_none(), "one probe at a time");
        probe.end(true, later);
        assert!(breaker.ask(later + PAUSE.0.mul_f64(1.3)).is_none());
        let much_later = later + PAUSE.0.mul_f64(2.6);
        drop(breaker.ask(much_later).unwrap());
        breaker.ask(much_later).unwrap().end(false, much_later);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(breaker.openings(), 2);
    }

    #[test]
    fn the_pause_grows_to_its_bound() {
        let breaker = Breaker::new();
        let mut now = Instant::now();
        for _ in 0..FAILURES_TO_OPEN {
            fail(&breaker, now);
        }
        for _ in 0..20 {
            now += PAUSE.1.mul_f64(1.3);
            fail(&breaker, now);
        }
        assert!(breaker.ask(now + PAUSE.1.mul_f64(0.7)).is_none());
        assert!(breaker.ask(now + PAUSE.1.mul_f64(1.3)).is_some());
    }
}
