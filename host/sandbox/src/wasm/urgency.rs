//! The priority of the thread that guests share: the lowest, but while one of them is to end.
//!
//! A machine that is busy with other things gives the lowest priority a few milliseconds a second,
//! which is too seldom for a kill. Raising a priority is a privilege (root, `CAP_SYS_NICE`, or a
//! limit of nice values as systemd's `LimitNICE` sets it); without it the thread stays where it is.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use parking_lot::Mutex;
use rustix::process::{Pid, getpriority_process, setpriority_process};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// The thread of the guests takes what the rest of the machine leaves.
const GUEST_NICE: i32 = 19;

/// Gives the calling thread the lowest priority, as far as that can be had.
pub(super) fn yield_to_all() {
    let _ = setpriority_process(None, GUEST_NICE);
}

/// The priority of one thread.
#[derive(Debug)]
pub(super) struct Urgency {
    thread: Pid,
    /// What the thread had before it was a guests'.
    normal: i32,
    /// How many guests are to end now.
    doomed: Mutex<usize>,
}

impl Urgency {
    /// Gives the calling thread the lowest priority.
    ///
    /// # Errors
    /// The system refuses that.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        // On Linux these are about the thread and not its process.
        let normal = getpriority_process(None)?;
        setpriority_process(None, GUEST_NICE)?;
        Ok(Self {
            thread: rustix::thread::gettid(),
            normal,
            doomed: Mutex::new(0),
        })
    }

    /// One more guest is to end, or all of them.
    pub(super) fn raise(&self) {
        let mut doomed = self.doomed.lock();
        *doomed += 1;
        if *doomed == 1 {
            self.set(self.normal);
        }
    }

    fn lower(&self) {
        let mut doomed = self.doomed.lock();
        *doomed = doomed.saturating_sub(1);
        if *doomed == 0 {
            self.set(GUEST_NICE);
        }
    }

    fn set(&self, nice: i32) {
        // Without the privilege the kill comes all the same, when the machine has time for it.
        let _ = setpriority_process(Some(self.thread), nice);
    }
}

/// Resolves when a guest is killed. From the kill until this is dropped, its thread has the
/// priority of the server: whoever kills raises it, as the thread itself may not run for long.
pub(super) struct Killed {
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    alarm: Arc<Alarm>,
    /// The waker of the latest poll, and it with the alarm.
    waker: Option<(Waker, Waker)>,
}

impl Killed {
    pub(super) fn new(kill: CancellationToken, urgency: Arc<Urgency>) -> Self {
        Self {
            cancelled: Box::pin(kill.cancelled_owned()),
            alarm: Arc::new(Alarm {
                urgency,
                has_rung: AtomicBool::new(false),
            }),
            waker: None,
        }
    }
}

impl Future for Killed {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let task = context.waker();
        if !matches!(&this.waker, Some((known, _)) if known.will_wake(task)) {
            let bell = Arc::new(Bell {
                alarm: Arc::clone(&this.alarm),
                task: task.clone(),
            });
            this.waker = Some((task.clone(), bell.into()));
        }
        let waker = this.waker.as_ref().map_or(task, |(_, bell)| bell);
        this.cancelled
            .as_mut()
            .poll(&mut Context::from_waker(waker))
    }
}

#[derive(Debug)]
struct Alarm {
    urgency: Arc<Urgency>,
    has_rung: AtomicBool,
}

impl Alarm {
    fn ring(&self) {
        if !self.has_rung.swap(true, Ordering::AcqRel) {
            self.urgency.raise();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if *self.has_rung.get_mut() {
            self.urgency.lower();
        }
    }
}

/// Rings before it wakes.
struct Bell {
    alarm: Arc<Alarm>,
    task: Waker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.alarm.ring();
        self.task.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::print_stderr,
        reason = "a test fails by panicking, and says what it could not show"
    )]

    use super::*;

    #[test]
    fn the_thread_is_urgent_from_the_kill_to_the_end() {
        // A thread of its own, which this test changes and the machine's others do not share.
        std::thread::spawn(|| {
            let normal = getpriority_process(None).unwrap();
            let urgency = Arc::new(Urgency::of_this_thread().unwrap());
            let nice = || getpriority_process(None).unwrap();
            assert_eq!(nice(), GUEST_NICE);
            // What the test may do itself decides what a kill can.
            let may_raise = setpriority_process(None, normal).is_ok();
            setpriority_process(None, GUEST_NICE).unwrap();
            let urgent = if may_raise { normal } else { GUEST_NICE };

            let kills = [CancellationToken::new(), CancellationToken::new()];
            let [mut first, second] = kills.clone().map(|kill| {
                let mut killed = Killed::new(kill, Arc::clone(&urgency));
                let context = &mut Context::from_waker(Waker::noop());
                assert!(Pin::new(&mut killed).poll(context).is_pending());
                killed
            });
            // By another thread, as kills are.
            std::thread::scope(|scope| {
                scope.spawn(|| kills.iter().for_each(CancellationToken::cancel));
            });
            assert_eq!(nice(), urgent);
            let context = &mut Context::from_waker(Waker::noop());
            assert!(Pin::new(&mut first).poll(context).is_ready());
            drop(first);
            assert_eq!(nice(), urgent, "the second is still to end");
            drop(second);
            assert_eq!(nice(), GUEST_NICE);
            drop(Killed::new(CancellationToken::new(), Arc::clone(&urgency)));
            assert_eq!(*urgency.doomed.lock(), 0);
            if !may_raise {
                eprintln!("no privilege to raise a priority: only its absence was seen");
            }
        })
        .join()
        .unwrap();
    }
}
