//! The time that one handler may take. It is watched beside the guest, because within the guest
//! it would wait for the guest's debt of processor time.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::host_api::Handler;

/// Which handler runs, and when it is late.
type Running = Option<(Handler, Instant)>;

/// The clock of one run.
#[derive(Debug, Default)]
pub(super) struct HandlerClock(watch::Sender<Running>);

impl HandlerClock {
    pub(super) fn start(&self, handler: Handler, deadline: Instant) {
        self.0.send_replace(Some((handler, deadline)));
    }

    /// Stops, with the time that was left.
    pub(super) fn stop(&self) -> Option<Duration> {
        self.pause().map(|(_, left)| left)
    }

    /// Stops while the guest waits for others; [`go_on`](Self::go_on) takes what is returned.
    pub(super) fn pause(&self) -> Option<(Handler, Duration)> {
        let (handler, deadline) = self.0.send_replace(None)?;
        Some((handler, deadline.saturating_duration_since(Instant::now())))
    }

    pub(super) fn go_on(&self, left: Option<(Handler, Duration)>) {
        if let Some((handler, left)) = left {
            self.start(handler, Instant::now() + left);
        }
    }

    /// Resolves when a handler is late, with which.
    pub(super) async fn late(&self) -> Handler {
        let mut running = self.0.subscribe();
        loop {
            let now = *running.borrow_and_update();
            let Some((handler, deadline)) = now else {
                // The sender is ours, so it lives.
                let _ = running.changed().await;
                continue;
            };
            tokio::select! {
                () = sleep_until(deadline) => return handler,
                _ = running.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waiting_for_others_does_not_count() {
        let clock = HandlerClock::default();
        let begun = Instant::now();
        clock.start(Handler::Timer, begun + Duration::from_millis(100));
        let guest = async {
            tokio::time::sleep(Duration::from_millis(60)).await;
            let left = clock.pause();
            tokio::time::sleep(Duration::from_secs(60)).await;
            clock.go_on(left);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            handler = clock.late() => assert_eq!(handler, Handler::Timer),
            () = guest => {}
        }
        assert_eq!(begun.elapsed(), Duration::from_millis(60_100));
    }
}
