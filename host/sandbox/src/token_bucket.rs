//! How a rate is held: of log lines, of bytes, of requests.

use std::time::Instant;

/// Tokens that come at a steady rate, and are kept for two seconds.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    pub(crate) per_second: f64,
    pub(crate) tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket; a rate of 0 is taken as 1.
    pub(crate) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self {
            per_second,
            tokens: per_second * 2.0,
            filled: Instant::now(),
        }
    }

    /// Sets another rate; what was saved up stays, as far as the new rate allows.
    pub(crate) fn set(&mut self, per_second: u32) {
        self.refill();
        self.per_second = f64::from(per_second.max(1));
        self.tokens = self.tokens.min(self.per_second * 2.0);
    }

    /// What was taken of late, a second: the rate when nothing is left, 0 after a pause.
    pub(crate) fn rate(&mut self) -> u64 {
        self.refill();
        ((self.per_second * 2.0 - self.tokens) / 2.0).max(0.0) as u64
    }

    /// Adds what came since the last time.
    pub(crate) fn refill(&mut self) {
        let now = Instant::now();
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.per_second * 2.0);
        self.filled = now;
    }

    /// Takes a token, if there is one.
    pub(crate) fn take_one(&mut self) -> bool {
        self.refill();
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }
}
