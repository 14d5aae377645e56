//! Large requests: which one is worked on next, over all tenants.
//!
//! They take milliseconds on a thread of their own. There are as many at once as there are cores,
//! because more would only make all of them slower. Those that wait stand in a line per tenant;
//! the lines are served by deficit round robin over the bytes, so that each tenant gets its part
//! by weight however large its requests are. While others are there too, be it with small requests
//! only, a tenant leaves at least one place free, so that the others wait for nothing that takes
//! long.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Realm, Share};

/// What a tenant of weight 1 gains in one round, in bytes.
const QUANTUM_BYTES: usize = 256 << 10;
/// The most that one request costs, in quanta; it bounds the rounds until it goes.
const MAX_COST: u64 = 256;

/// Bytes of requests that all tenants may have waiting and in work while several are there, before
/// more of them are left unread: half of what all connections may have (`max_inbound_bytes`), so
/// that there is room for whoever comes.
const HELD_BYTES: usize = 128 << 20;
/// Fewest and most tenants that share this.
const SHARERS: (usize, usize) = (4, 32);

/// Bytes that each of so many tenants may have waiting and in work: 4 to 32 MiB.
#[must_use]
pub(super) fn part_of_each(tenants: usize) -> usize {
    HELD_BYTES / tenants.clamp(SHARERS.0, SHARERS.1)
}

/// A tenant has too many large requests waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{limit} large requests of this tenant are in flight already: send fewer at once, or raise max_in_flight of its table"
)]
pub struct TooManyInFlight {
    limit: usize,
}

#[derive(Debug, Default)]
struct Line {
    weight: u64,
    /// Whether other tenants' requests were there when its last one came.
    has_company: bool,
    deficit: u64,
    running: usize,
    waiting: VecDeque<(u64, oneshot::Sender<()>)>,
}

#[derive(Debug, Default)]
struct Lines {
    lines: HashMap<Realm, Line>,
    /// Tenants with something waiting, in the order in which they are looked at.
    round: VecDeque<Realm>,
    running: usize,
    /// Bytes of the requests of each tenant, waiting and in work.
    held: HashMap<Realm, usize>,
}

/// The lines of large requests.
#[derive(Debug)]
pub struct LargeRequests {
    lines: Arc<Mutex<Lines>>,
    places: usize,
}

/// A place to work in; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    lines: Arc<Mutex<Lines>>,
    realm: Realm,
    places: usize,
    bytes: usize,
}

impl LargeRequests {
    /// So many requests at once.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self {
            lines: Arc::default(),
            places: places.max(1),
        }
    }

    /// Waits in the tenant's line until a request of so many bytes may be worked on;
    /// `has_company` while other tenants are there.
    ///
    /// # Errors
    /// [`TooManyInFlight`] at once, when the line is full.
    pub async fn admit(
        &self,
        realm: &Realm,
        share: Share,
        bytes: usize,
        has_company: bool,
    ) -> Result<Place, TooManyInFlight> {
        let admitted = {
            let mut lines = self.lines.lock();
            let line = lines.lines.entry(realm.clone()).or_default();
            line.weight = u64::from(share.weight.max(1));
            line.has_company = has_company;
            if line.running + line.waiting.len() >= share.max_in_flight {
                return Err(TooManyInFlight {
                    limit: share.max_in_flight,
                });
            }
            let (go, admitted) = oneshot::channel();
            let cost = (bytes.div_ceil(QUANTUM_BYTES) as u64).clamp(1, MAX_COST);
            let was_empty = line.waiting.is_empty();
            line.waiting.push_back((cost, go));
            if was_empty {
                lines.round.push_back(realm.clone());
            }
            *lines.held.entry(realm.clone()).or_default() += bytes;
            lines.dispatch(self.places);
            admitted
        };
        // Held from here on, so that a place that is given while the waiting ends is not lost.
        let place = PendingPlace {
            lines: Arc::clone(&self.lines),
            realm: realm.clone(),
            places: self.places,
            bytes,
            admitted: Some(admitted),
        };
        Ok(place.wait().await)
    }

    /// Bytes of the tenant's requests that wait or are worked on.
    #[must_use]
    pub fn held_bytes(&self, realm: &Realm) -> usize {
        self.lines.lock().held.get(realm).copied().unwrap_or(0)
    }
}

/// A place that is waited for; given back if the waiting ends early.
struct PendingPlace {
    lines: Arc<Mutex<Lines>>,
    realm: Realm,
    places: usize,
    bytes: usize,
    admitted: Option<oneshot::Receiver<()>>,
}

impl PendingPlace {
    async fn wait(mut self) -> Place {
        if let Some(admitted) = &mut self.admitted {
            // The sender is dropped without a word only together with all lines.
            let _ = admitted.await;
        }
        self.admitted = None;
        Place {
            lines: Arc::clone(&self.lines),
            realm: self.realm.clone(),
            places: self.places,
            bytes: self.bytes,
        }
    }
}

impl Drop for PendingPlace {
    fn drop(&mut self) {
        // A place that came between the last look and the end belongs to nobody.
        if let Some(mut admitted) = self.admitted.take() {
            admitted.close();
            if admitted.try_recv().is_ok() {
                drop(Place {
                    lines: Arc::clone(&self.lines),
                    realm: self.realm.clone(),
                    places: self.places,
                    bytes: self.bytes,
                });
            } else {
                self.lines.lock().release(&self.realm, self.bytes);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.lines.lock();
        lines.release(&self.realm, self.bytes);
        lines.running -= 1;
        let is_done = lines.lines.get_mut(&self.realm).is_some_and(|line| {
            line.running -= 1;
            line.running == 0 && line.waiting.is_empty()
        });
        if is_done {
            lines.lines.remove(&self.realm);
        }
        lines.dispatch(self.places);
    }
}

impl Lines {
    /// A request is not held any more.
    fn release(&mut self, realm: &Realm, bytes: usize) {
        if let Some(held) = self.held.get_mut(realm) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.held.remove(realm);
            }
        }
    }

    /// Lets requests go while there are places.
    fn dispatch(&mut self, places: usize) {
        // Looks in a row that let nobody go; after a whole round of them all are at their most.
        let mut idle = 0;
        while self.running < places && idle < self.round.len() {
            let Some(realm) = self.round.pop_front() else {
                return;
            };
            let others = self.lines.len() > 1;
            let Some(line) = self.lines.get_mut(&realm) else {
                continue;
            };
            let most = if others || line.has_company {
                places.saturating_sub(1).max(1)
            } else {
                places
            };
            if line.running >= most {
                self.round.push_back(realm);
                idle += 1;
                continue;
            }
            idle = 0;
            let Some(&(cost, _)) = line.waiting.front() else {
                line.deficit = 0;
                continue;
            };
            if line.deficit < cost {
                line.deficit += line.weight;
                self.round.push_back(realm);
                continue;
            }
            line.deficit -= cost;
            let is_taken = line
                .waiting
                .pop_front()
                .is_some_and(|(_, go)| go.send(()).is_ok());
            if is_taken {
                line.running += 1;
                self.running += 1;
            }
            if line.waiting.is_empty() {
                line.deficit = 0;
                if line.running == 0 {
                    self.lines.remove(&realm);
                }
            } else {
                // It goes on until its deficit is used up.
                self.round.push_front(realm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use std::{
        pin::Pin,
        sync::atomic::{AtomicUsize, Ordering},
        task::{Context, Waker},
    };

    use super::*;

    fn realm(name: &str) -> Realm {
        Realm(Arc::from(name))
    }

    #[test]
    fn tenants_of_any_number_leave_room_for_another_one() {
        for tenants in 0..=SHARERS.1 {
            assert!(tenants * part_of_each(tenants) <= HELD_BYTES, "{tenants}");
        }
        // Nobody is left without, and one alone with another has no more than an eighth of all.
        assert_eq!(part_of_each(1), 32 << 20);
        assert_eq!(part_of_each(usize::MAX), 4 << 20);
    }

    fn share(weight: u32) -> Share {
        Share {
            weight,
            ..Share::default()
        }
    }

    /// Polls once.
    fn is_pending<F: Future>(future: &mut Pin<Box<F>>) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        future.as_mut().poll(&mut cx).is_pending()
    }

    /// Fills the one place, queues requests, and returns the order in which they went.
    async fn order(requests: &[(&'static str, u32, usize)]) -> Vec<&'static str> {
        let large = Arc::new(LargeRequests::new(1));
        let first = large
            .admit(&realm("first"), share(1), 1, false)
            .await
            .unwrap();
        let went = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for &(name, weight, bytes) in requests {
            let (large, went) = (Arc::clone(&large), Arc::clone(&went));
            let mut waiting = Box::pin(async move {
                let place = large.admit(&realm(name), share(weight), bytes, false).await;
                went.lock().push(name);
                drop(place.unwrap());
            });
            // Stands in line before the next one comes.
            assert!(is_pending(&mut waiting));
            tasks.push(tokio::spawn(waiting));
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        std::mem::take(&mut *went.lock())
    }

    #[tokio::test]
    async fn tenants_take_turns_by_bytes_and_weight() {
        let flood = [("flood", 1, QUANTUM_BYTES); 6];
        let mut requests = flood.to_vec();
        requests.push(("other", 1, QUANTUM_BYTES));
        let went = order(&requests).await;
        let at = went.iter().position(|&name| name == "other").unwrap();
        assert!(at <= 1, "a flood that came first goes first: {went:?}");

        // Four times the bytes at four times the weight: one for one.
        let mut requests = Vec::new();
        for _ in 0..8 {
            requests.push(("large", 4, 4 * QUANTUM_BYTES));
            requests.push(("small", 1, QUANTUM_BYTES));
        }
        let went = order(&requests).await;
        for part in went.chunks(4) {
            let small = part.iter().filter(|&&name| name == "small").count();
            assert!((1..=3).contains(&small), "{went:?}");
        }
        // The same bytes at the same weight: four small ones for each large one.
        let mut requests = vec![("large", 1, 4 * QUANTUM_BYTES); 4];
        requests.extend([("small", 1, QUANTUM_BYTES); 12]);
        let went = order(&requests).await;
        let second = went
            .iter()
            .skip(1)
            .position(|&name| name == "large")
            .unwrap()
            + 1;
        let between = went[..second]
            .iter()
            .filter(|&&name| name == "small")
            .count();
        assert!(between >= 3, "{went:?}");
    }

    #[tokio::test]
    async fn a_flood_leaves_a_place_and_its_line_has_an_end() {
        let large = Arc::new(LargeRequests::new(2));
        let limited = Share {
            max_in_flight: 3,
            ..Share::default()
        };
        let other = large
            .admit(&realm("other"), share(1), 1, false)
            .await
            .unwrap();
        let first = large
            .admit(&realm("flood"), limited, 1, false)
            .await
            .unwrap();
        drop(other);
        let mut waiting = Box::pin({
            let large = Arc::clone(&large);
            async move { large.admit(&realm("flood"), limited, 1, false).await }
        });
        let second = waiting.as_mut().await.unwrap();
        let mut third = Box::pin({
            let large = Arc::clone(&large);
            async move { large.admit(&realm("flood"), limited, 1, false).await }
        });
        assert!(is_pending(&mut third));
        let refused = large.admit(&realm("flood"), limited, 1, false).await;
        assert_eq!(refused.unwrap_err(), TooManyInFlight { limit: 3 });
        // One that gives up leaves no hole.
        drop(third);
        drop((first, second));
        let all = large.lines.lock();
        assert_eq!(all.running, 0);
    }

    #[tokio::test]
    async fn beside_small_requests_of_others_a_place_stays_free() {
        let large = LargeRequests::new(2);
        let flood = realm("flood");
        let first = large.admit(&flood, share(1), 1, true).await.unwrap();
        let mut second = Box::pin(large.admit(&flood, share(1), 1, true));
        assert!(is_pending(&mut second), "the second place is kept free");
        assert_eq!(large.held_bytes(&flood), 2);
        // The others have gone: both places are its own.
        let third = large.admit(&flood, share(1), 1, false);
        let (second, third) = tokio::join!(second, async {
            let mut third = Box::pin(third);
            assert!(is_pending(&mut third), "no more than there are places");
            drop(first);
            third.await
        });
        assert!(second.is_ok() && third.is_ok());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_more_than_the_places_work_at_once_and_all_are_served() {
        let large = Arc::new(LargeRequests::new(3));
        let working = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..300)
            .map(|number: usize| {
                let (large, working) = (Arc::clone(&large), Arc::clone(&working));
                tokio::spawn(async move {
                    let name = ["a", "b", "c"][number % 3];
                    let realm = realm(name);
                    let admitted = large.admit(&realm, share(1), number << 12, false);
                    if number.is_multiple_of(7) {
                        // Gives up half-way.
                        let mut admitted = Box::pin(admitted);
                        let _ = is_pending(&mut admitted);
                        return;
                    }
                    let place = admitted.await.unwrap();
                    assert!(working.fetch_add(1, Ordering::SeqCst) < 3);
                    tokio::task::yield_now().await;
                    working.fetch_sub(1, Ordering::SeqCst);
                    drop(place);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let lines = large.lines.lock();
        assert_eq!((lines.running, lines.lines.len()), (0, 0));
        assert_eq!(lines.held.len(), 0, "{:?}", lines.held);
    }
}
