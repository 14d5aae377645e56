//! How long each operation takes, counted without a lock.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};
use stockade_wire::Operation;

/// Upper bounds in seconds.
const BOUNDS: [f64; 16] = [
    5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0, 5.0,
    30.0,
];

/// One operation's requests, by how long they took.
#[derive(Debug, Default)]
struct Histogram {
    /// The last one counts what is beyond all bounds.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

/// A histogram per operation.
#[derive(Debug, Clone)]
pub(crate) struct Latencies(Arc<[Histogram]>);

/// Counts at one moment; subtracting two gives those of the time between.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    buckets: [u64; BOUNDS.len() + 1],
    /// Sum of all durations.
    pub nanoseconds: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self(
            Operation::ALL
                .iter()
                .map(|_| Histogram::default())
                .collect(),
        )
    }
}

impl Latencies {
    pub(crate) fn observe(&self, operation: Operation, time: Duration) {
        let Some(histogram) = self.0.get(operation as usize) else {
            return;
        };
        let seconds = time.as_secs_f64();
        let index = BOUNDS.partition_point(|&bound| bound < seconds);
        histogram.buckets[index].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        histogram
            .nanoseconds
            .fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Operations that were asked for at least once.
    pub(crate) fn snapshot(&self) -> Vec<(Operation, Snapshot)> {
        let seen = Operation::ALL.iter().zip(self.0.iter());
        seen.map(|(&operation, histogram)| (operation, histogram.snapshot()))
            .filter(|(_, snapshot)| snapshot.count() > 0)
            .collect()
    }
}

impl Histogram {
    fn snapshot(&self) -> Snapshot {
        Snapshot {
            buckets: std::array::from_fn(|index| self.buckets[index].load(Ordering::Relaxed)),
            nanoseconds: self.nanoseconds.load(Ordering::Relaxed),
        }
    }
}

impl Snapshot {
    /// Requests.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The time that `share` (0 to 1) of the requests did not exceed, in seconds, as far as the
    /// bounds of the histogram tell; `None` without requests.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let count = self.count();
        let wanted = share * count as f64;
        let mut below = 0.0;
        let mut lower = 0.0;
        for (index, &bucket) in self.buckets.iter().enumerate() {
            let upper = BOUNDS
                .get(index)
                .copied()
                .unwrap_or(BOUNDS[BOUNDS.len() - 1]);
            let bucket = bucket as f64;
            if bucket > 0.0 && below + bucket >= wanted {
                return Some(lower + (upper - lower) * ((wanted - below) / bucket));
            }
            below += bucket;
            lower = upper;
        }
        None
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            buckets: std::array::from_fn(|index| {
                self.buckets[index].saturating_sub(earlier.buckets[index])
            }),
            nanoseconds: self.nanoseconds.saturating_sub(earlier.nanoseconds),
        }
    }

    /// Adds another operation's requests.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += more;
        }
        self.nanoseconds += other.nanoseconds;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    operation: &'static str,
}

impl EncodeMetric for Latencies {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        for (operation, snapshot) in self.snapshot() {
            let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(snapshot.buckets).collect();
            let labels = Labels {
                operation: operation.name(),
            };
            encoder
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(
                    snapshot.nanoseconds as f64 / 1e9,
                    snapshot.count(),
                    &buckets,
                    None,
                )?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }

    fn is_empty(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn quantiles_lie_within_the_bucket_of_what_was_seen() {
        let latencies = Latencies::default();
        for _ in 0..99 {
            latencies.observe(Operation::Noop, Duration::from_micros(15));
        }
        latencies.observe(Operation::Noop, Duration::from_secs(60));
        let seen = latencies.snapshot();
        let (operation, snapshot) = &seen[0];
        assert_eq!((*operation, snapshot.count()), (Operation::Noop, 100));
        let median = snapshot.quantile(0.5).unwrap();
        assert!((1e-5..=2e-5).contains(&median), "{median}");
        assert_eq!(snapshot.quantile(1.0), Some(30.0));
        assert_eq!(snapshot.since(snapshot).count(), 0);
        assert_eq!(Snapshot::default().quantile(0.5), None);
    }

    #[test]
    fn the_text_is_cumulative_and_ends_at_infinity() {
        let latencies = Latencies::default();
        latencies.observe(Operation::Ping, Duration::from_micros(7));
        latencies.observe(Operation::Ping, Duration::from_secs(99));
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register("t_seconds", "Time", latencies);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "t_seconds_bucket{le=\"0.000005\",operation=\"ping\"} 0",
            "t_seconds_bucket{le=\"+Inf\",operation=\"ping\"} 2",
            "t_seconds_count{operation=\"ping\"} 2",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
