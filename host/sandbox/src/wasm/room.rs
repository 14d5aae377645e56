//! How many guests there is room for, by the memory maps that the process may have.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

/// Maps that one guest takes at most: its memory's two guards, content and rest, its stack's
/// guard and content, and one to spare. Neighbours share some, so that most take five.
const MAPS_PER_GUEST: usize = 7;

/// How many guests start before the maps are counted again, which takes milliseconds when there
/// are tens of thousands.
const STARTS_PER_COUNT: usize = 256;

/// What Linux gives a process where it does not say.
const DEFAULT_MAX_MAPS: usize = 65_530;

/// The part of all maps that guests may take; when they end, the server's own allocations fail.
const MAPS_FOR_GUESTS_PERCENT: usize = 80;

/// Room for guests: what the process may map, less what the server keeps for itself.
pub(super) struct Room {
    pub(super) live: AtomicUsize,
    most_maps: usize,
    /// How many guests may start before the maps are counted again.
    starts: Mutex<usize>,
}

impl Room {
    pub(super) fn new() -> Self {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_MAX_MAPS);
        Self {
            live: AtomicUsize::new(0),
            most_maps: limit / 100 * MAPS_FOR_GUESTS_PERCENT,
            starts: Mutex::new(STARTS_PER_COUNT),
        }
    }

    /// A place for one more guest, if there is room.
    pub(super) fn take(room: &Arc<Self>) -> Option<Place> {
        let mut starts = room.starts.lock().unwrap_or_else(PoisonError::into_inner);
        if *starts == 0 {
            let free = room.most_maps.saturating_sub(count_maps());
            *starts = (free / MAPS_PER_GUEST).min(STARTS_PER_COUNT);
        }
        *starts = starts.checked_sub(1)?;
        room.live.fetch_add(1, Ordering::Relaxed);
        Some(Place(Arc::clone(room)))
    }
}

/// The memory maps of this process.
fn count_maps() -> usize {
    let Ok(file) = std::fs::File::open("/proc/self/maps") else {
        return 0;
    };
    let lines = std::io::BufReader::with_capacity(64 << 10, file);
    std::io::BufRead::split(lines, b'\n')
        .map_while(Result::ok)
        .count()
}

/// One of the places for running guests.
pub(super) struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}
