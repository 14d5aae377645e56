//! Every denial, counted; and logged, unless there are too many of a kind at once.
//!
//! Denials of one tenant and reason get [`LINES`] lines in [`WINDOW`]; how many more there were
//! is a line of its own when the window is over. So a flood costs a few lines, and no denial is
//! left out of the log's sums.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Caller, Denial, Realm};

/// Lines in full per tenant, reason and window.
const LINES: u64 = 5;
/// How long they are for.
const WINDOW: Duration = Duration::from_secs(10);
/// Target of the lines: `stockade::audit`.
const TARGET: &str = "stockade::audit";

/// Denials of one kind.
#[derive(Debug)]
struct Kind {
    began: Instant,
    /// In this window.
    seen: u64,
    total: u64,
}

/// How often a tenant was denied something for a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedCount {
    /// Of whose connections.
    pub realm: Realm,
    /// Why.
    pub reason: Denial,
    /// How often since the start.
    pub count: u64,
}

/// The audit log. What it keeps has a bound: there are as many kinds as tenants times reasons.
#[derive(Debug, Default)]
pub struct Audit(Mutex<BTreeMap<(Realm, Denial), Kind>>);

impl Audit {
    /// A request was not given what it named. `salt` is what it asked for, which is shown by its
    /// digest: salts are secrets between an engine and this server.
    pub fn denied(
        &self,
        caller: &Caller,
        reason: Denial,
        operation: &'static str,
        salt: Option<&str>,
    ) {
        let realm = caller.realm();
        if !self.count(realm, reason) {
            return;
        }
        let digest = salt.map(|salt| blake3::hash(salt.as_bytes()).to_hex());
        let digest = digest.as_ref().and_then(|hex| hex.get(..16)).unwrap_or("-");
        tracing::warn!(
            target: TARGET,
            tenant = realm.shown(),
            reason = reason.name(),
            operation,
            salt_blake3 = digest,
            "denied: {operation} from {}",
            caller.origin,
        );
    }

    /// Whether this one gets a line of its own.
    fn count(&self, realm: &Realm, reason: Denial) -> bool {
        let mut kinds = self.0.lock();
        let kind = kinds
            .entry((realm.clone(), reason))
            .or_insert_with(|| Kind {
                began: Instant::now(),
                seen: 0,
                total: 0,
            });
        if kind.began.elapsed() > WINDOW && kind.seen <= LINES {
            kind.began = Instant::now();
            kind.seen = 0;
        }
        kind.seen += 1;
        kind.total += 1;
        kind.seen <= LINES
    }

    /// Logs how many denials of windows that are over had no line. To be called now and then.
    pub fn settle(&self) {
        let mut unsaid = Vec::new();
        for ((realm, reason), kind) in self.0.lock().iter_mut() {
            if kind.began.elapsed() > WINDOW && kind.seen > LINES {
                unsaid.push((realm.clone(), *reason, kind.seen - LINES));
                kind.seen = 0;
                kind.began = Instant::now();
            }
        }
        for (realm, reason, count) in unsaid {
            tracing::warn!(
                target: TARGET,
                tenant = realm.shown(),
                reason = reason.name(),
                count,
                "denied: {count} more requests",
            );
        }
    }

    /// All counts since the start.
    #[must_use]
    pub fn counts(&self) -> Vec<DeniedCount> {
        let kinds = self.0.lock();
        let counts = kinds.iter().map(|((realm, reason), kind)| DeniedCount {
            realm: realm.clone(),
            reason: *reason,
            count: kind.total,
        });
        counts.collect()
    }

    /// Forgets a tenant that is gone.
    pub fn forget(&self, name: &str) {
        self.0.lock().retain(|(realm, _), _| realm.name() != name);
    }
}

impl DeniedCount {
    /// The tenant as metrics name it; `(none)` and `(stranger)` for connections without one.
    #[must_use]
    pub fn tenant(&self) -> &str {
        self.realm.shown()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_denial_is_counted_and_those_without_a_line_are_told_of_later() {
        let audit = Audit::default();
        let realm = Realm::open();
        let lines = (0..20)
            .filter(|_| audit.count(&realm, Denial::ForeignSalt))
            .count();
        assert_eq!(lines as u64, LINES);
        assert_eq!(audit.counts()[0].count, 20);
        let unsaid = |audit: &Audit| {
            let kinds = audit.0.lock();
            kinds.values().map(|kind| kind.seen).sum::<u64>()
        };
        audit.settle();
        assert_eq!(unsaid(&audit), 20, "the window is not over");
        for kind in audit.0.lock().values_mut() {
            let before = kind.began.checked_sub(WINDOW + Duration::from_secs(1));
            kind.began = before.unwrap_or(kind.began);
        }
        // A flood that goes on does not swallow what the last window left unsaid.
        assert!(!audit.count(&realm, Denial::ForeignSalt));
        audit.settle();
        assert_eq!(unsaid(&audit), 0);
        assert!(audit.count(&realm, Denial::ForeignSalt));
        assert_eq!(audit.counts()[0].count, 22);
    }
}
