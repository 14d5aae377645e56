//! How often one cause may fill the log.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lets five lines through in ten seconds, and says how many more there were.
#[derive(Debug, Default)]
pub struct LogLimiter(Mutex<Option<Window>>);

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u64,
}

impl LogLimiter {
    const LINES: u64 = 5;
    const WINDOW: Duration = Duration::from_secs(10);

    /// Whether to log now, and how many lines of the last window were left out.
    pub fn turn(&self) -> Option<u64> {
        let mut window = self.0.lock();
        let mut unsaid = 0;
        if let Some(last) = &*window
            && last.began.elapsed() > Self::WINDOW
        {
            unsaid = last.lines.saturating_sub(Self::LINES);
            *window = None;
        }
        let window = window.get_or_insert_with(|| Window {
            began: Instant::now(),
            lines: 0,
        });
        window.lines = window.lines.saturating_add(1);
        (window.lines <= Self::LINES).then_some(unsaid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_has_five_lines_and_no_more() {
        let limiter = LogLimiter::default();
        let turns = [(); 7].map(|()| limiter.turn());
        assert_eq!(
            turns,
            [Some(0), Some(0), Some(0), Some(0), Some(0), None, None]
        );
    }
}
