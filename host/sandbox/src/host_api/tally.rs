//! What is counted of a plugin over all its runs, and the metrics that it makes itself.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use super::{Backlog, Code, Handler, MAX_NAME_BYTES, RankFailure, Refusal};

/// How a handler ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It returned 0, with a reply where one was wanted.
    Ok,
    /// It returned something else, gave no reply, or one that is not used.
    Failed,
    /// It took too long and was ended.
    Timeout,
    /// It trapped.
    Trap,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Failed, Self::Timeout, Self::Trap];

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Trap => "trap",
        }
    }
}

/// How often a handler ended in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandlerCount {
    /// Which handler.
    pub handler: Handler,
    /// In which way.
    pub outcome: Outcome,
    /// How often.
    pub count: u64,
}

/// A metric that the plugin makes.
#[derive(Debug, Clone, PartialEq)]
pub struct CustomMetric {
    /// Its name.
    pub name: String,
    /// Whether it only counts up.
    pub is_counter: bool,
    /// Its value.
    pub value: f64,
}

/// All counts of a plugin since the server's start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PluginCounts {
    /// Calls of functions of the namespace.
    pub host_calls: u64,
    /// Those that came to nothing, by code; codes without any are left out.
    pub refused: Vec<(Code, u64)>,
    /// How handlers ended; what did not happen is left out.
    pub handlers: Vec<HandlerCount>,
    /// Events that it was too slow for.
    pub events_lost: u64,
    /// Orders of eviction that were used.
    pub ranked: u64,
    /// Orders that were not, by reason; reasons without any are left out.
    pub rank_failures: Vec<(RankFailure, u64)>,
    /// What it counts itself.
    pub custom: Vec<CustomMetric>,
}

/// The counters behind [`PluginCounts`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    host_calls: AtomicU64,
    refused: [AtomicU64; Code::ALL.len()],
    handlers: [[AtomicU64; Outcome::ALL.len()]; Handler::ALL.len()],
    events_lost: AtomicU64,
    ranked: AtomicU64,
    rank_failures: [AtomicU64; RankFailure::ALL.len()],
    rank_longest_nanoseconds: AtomicU64,
    backlog: Mutex<Option<Backlog>>,
    custom: Mutex<BTreeMap<String, (bool, f64)>>,
}

fn count(counters: &[AtomicU64], place: usize) {
    if let Some(counter) = counters.get(place) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Tally {
    pub(crate) fn called(&self) {
        self.host_calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self, code: Code) {
        count(&self.refused, code as usize);
    }

    pub(crate) fn handled(&self, handler: Handler, outcome: Outcome) {
        if let Some(outcomes) = self.handlers.get(handler as usize) {
            count(outcomes, outcome as usize);
        }
    }

    pub(crate) fn lost(&self, events: u64) {
        self.events_lost.fetch_add(events, Ordering::Relaxed);
    }

    pub(crate) fn ranked(&self, failure: Option<RankFailure>) {
        match failure {
            None => {
                self.ranked.fetch_add(1, Ordering::Relaxed);
            }
            Some(failure) => count(&self.rank_failures, failure as usize),
        }
    }

    /// The server has waited so long for an order.
    pub(crate) fn rank_took(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.rank_longest_nanoseconds
            .fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// The longest that the server has waited for an order.
    pub(crate) fn longest_rank(&self) -> Duration {
        Duration::from_nanos(self.rank_longest_nanoseconds.load(Ordering::Relaxed))
    }

    /// Events wait as `backlog` says, until there is another or it [ends](Self::unsubscribed).
    pub(crate) fn subscribed(&self, backlog: Backlog) {
        *self.backlog.lock() = Some(backlog);
    }

    /// Nothing waits by `backlog` any more.
    pub(crate) fn unsubscribed(&self, backlog: &Backlog) {
        let mut current = self.backlog.lock();
        if current.as_ref().is_some_and(|it| it.is_same(backlog)) {
            *current = None;
        }
    }

    /// Events that wait for it now.
    pub(crate) fn waiting_events(&self) -> u64 {
        let backlog = self.backlog.lock().clone();
        backlog.map_or(0, |backlog| backlog.events())
    }

    /// Adds to a counter, or sets a gauge; a plugin has `most` names.
    ///
    /// # Errors
    /// [`Refusal`] that names what is wrong.
    pub(crate) fn measure(
        &self,
        name: &str,
        value: f64,
        is_counter: bool,
        most: usize,
    ) -> Result<(), Refusal> {
        let is_name = name.starts_with(|first: char| first.is_ascii_lowercase())
            && name
                .chars()
                .all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || it == '_');
        if !is_name || name.len() > MAX_NAME_BYTES {
            return Err(Refusal::invalid(format!(
                "the metric's name: use at most {MAX_NAME_BYTES} of a-z, 0-9 and _, a letter first"
            )));
        }
        if !value.is_finite() || (is_counter && value < 0.0) {
            return Err(Refusal::invalid(format!(
                "value is {value}: give a finite number, for a counter not below 0"
            )));
        }
        let mut custom = self.custom.lock();
        let names = custom.len();
        match custom.get_mut(name) {
            Some((was_counter, _)) if *was_counter != is_counter => Err(Refusal::invalid(
                "a name is either a counter (metric_add) or a gauge (metric_set)",
            )),
            Some((_, old)) => {
                *old = if is_counter { *old + value } else { value };
                Ok(())
            }
            None if names >= most => Err(Refusal::new(
                Code::Limit,
                format!("it has {most} metrics, which is its limit: raise limits.metrics"),
            )),
            None => {
                custom.insert(name.to_owned(), (is_counter, value));
                Ok(())
            }
        }
    }

    pub(crate) fn counts(&self) -> PluginCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut handlers = Vec::new();
        for (handler, outcomes) in Handler::ALL.into_iter().zip(&self.handlers) {
            for (outcome, counter) in Outcome::ALL.into_iter().zip(outcomes) {
                handlers.push(HandlerCount {
                    handler,
                    outcome,
                    count: read(counter),
                });
            }
        }
        handlers.retain(|handler| handler.count > 0);
        let refused = Code::ALL.into_iter().zip(self.refused.iter().map(read));
        let failures = RankFailure::ALL
            .into_iter()
            .zip(self.rank_failures.iter().map(read));
        let custom = self.custom.lock();
        PluginCounts {
            host_calls: read(&self.host_calls),
            refused: refused.filter(|(_, count)| *count > 0).collect(),
            handlers,
            events_lost: read(&self.events_lost),
            ranked: read(&self.ranked),
            rank_failures: failures.filter(|(_, count)| *count > 0).collect(),
            custom: custom
                .iter()
                .map(|(name, &(is_counter, value))| CustomMetric {
                    name: name.clone(),
                    is_counter,
                    value,
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn names_are_few_and_have_one_kind() {
        let tally = Tally::default();
        tally.measure("a", 1.0, true, 2).unwrap();
        tally.measure("a", 1.5, true, 2).unwrap();
        tally.measure("b", -1.0, false, 2).unwrap();
        let refusals = [
            ("c", 1.0, true, Code::Limit),
            ("a", 1.0, false, Code::Invalid),
            ("a", -1.0, true, Code::Invalid),
            ("b", f64::NAN, false, Code::Invalid),
            ("B", 1.0, false, Code::Invalid),
            ("", 1.0, false, Code::Invalid),
            ("a\"} 1\n", 1.0, false, Code::Invalid),
        ];
        for (name, value, is_counter, code) in refusals {
            let refusal = tally.measure(name, value, is_counter, 2).unwrap_err();
            assert_eq!(refusal.code, code, "{name:?} {value}");
        }
        let custom = tally.counts().custom;
        let values: Vec<_> = custom.iter().map(|it| (&*it.name, it.value)).collect();
        assert_eq!(values, [("a", 2.5), ("b", -1.0)]);
    }

    #[test]
    fn every_enumeration_counts_in_its_own_place() {
        for (place, code) in Code::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, place);
        }
        for (place, handler) in Handler::ALL.into_iter().enumerate() {
            assert_eq!(handler as usize, place);
        }
        for (place, failure) in RankFailure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, place);
        }
    }
}
