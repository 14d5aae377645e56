//! The bounded queue between those who must not wait for a disk and the thread that writes to it.

use std::{
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread,
    time::{Duration, Instant},
};

/// Time that a server which ends waits for the last entries.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// What the writing thread receives.
#[derive(Debug)]
pub(crate) enum Entry<T> {
    /// To be written.
    Item(T),
    /// To be answered once all before it is written; who asked may have gone.
    End(SyncSender<()>),
}

/// Where entries are handed in.
#[derive(Debug)]
pub(crate) struct WriterQueue<T>(SyncSender<Entry<T>>);

impl<T> WriterQueue<T> {
    /// A queue of so many entries, and its other end.
    pub(crate) fn new(entries: usize) -> (Self, Receiver<Entry<T>>) {
        let (sender, receiver) = sync_channel(entries);
        (Self(sender), receiver)
    }

    /// Hands an item in; false if there is no room, and it is dropped. Never waits.
    #[must_use]
    pub(crate) fn offer(&self, item: T) -> bool {
        self.0.try_send(Entry::Item(item)).is_ok()
    }

    /// Waits a moment until what was handed in is written. May block.
    pub(crate) fn end(&self) {
        let until = Instant::now() + END_PATIENCE;
        let (written, is_written) = sync_channel(1);
        let mut entry = Entry::End(written);
        while let Err(TrySendError::Full(back)) = self.0.try_send(entry) {
            if Instant::now() > until {
                return;
            }
            entry = back;
            thread::sleep(Duration::from_millis(5));
        }
        let _ = is_written.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}
