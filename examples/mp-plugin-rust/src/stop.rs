//! How a plugin learns that it should stop: standard input, open and silent until then, ends.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// Sleeps for `time`, or until the server asks to stop; tells whether it did.
pub fn requested_within(time: Duration) -> bool {
    let until = Instant::now() + time;
    let stdin = io::stdin();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return false,
            // Whatever is written to us means nothing; only the end does.
            Ok(_) => match stdin.lock().read(&mut [0; 256]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return true,
            },
            Err(rustix::io::Errno::INTR) => {}
            // No way to wait for input here: sleep, and be ended by the server when it must.
            Err(_) => {
                std::thread::sleep(left);
                return false;
            }
        }
    }
}
