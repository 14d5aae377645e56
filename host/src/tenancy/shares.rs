//! Who of several tenants works next: turns of connections, and how many requests a second.
//!
//! A connection works in turns: it reads, handles and writes for a bounded number of messages
//! and then lets others go first. There are as many turns at once as the runtime has threads.
//! While several tenants are at it, each has its part of them by weight, at least one, so that
//! one tenant's flood waits behind itself and another's request finds a thread. Alone, a tenant
//! has all of them.
//!
//! A tenant with a rate has a bucket besides. Over it, its connections are left unread (which the
//! clients' own buffers feel), and only what has waited for [`PATIENCE`] is refused.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::time::Sleep;

use super::Realm;

/// Messages of one turn where tenants share. A small request takes tens of microseconds, so
/// this is how long another tenant's request waits for a thread at the most.
const MESSAGES: usize = 8;
/// A tenant that did nothing for this long leaves its part to the others.
const IDLE: Duration = Duration::from_millis(100);
/// How long a request over its tenant's rate waits before it is refused.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a tenant gets of the server's time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Its part, relative to the others' weights.
    pub weight: u32,
    /// Its rate; `None` for any.
    pub rate: Option<Rate>,
    /// Large requests that it may have waiting or in work.
    pub max_in_flight: usize,
}

impl Share {
    /// Large requests of a tenant at once, unless its table says otherwise.
    pub const MAX_IN_FLIGHT: usize = 1024;
}

impl Default for Share {
    fn default() -> Self {
        Self {
            weight: 1,
            rate: None,
            max_in_flight: Self::MAX_IN_FLIGHT,
        }
    }
}

/// Requests over time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Requests a second in the long run, above 0.
    pub per_second: f64,
    /// Requests that may come at once after a pause, at least 1.
    pub burst: f64,
}

/// A bucket as the time at which it is full again (GCRA).
#[derive(Debug, Default, Clone, Copy)]
struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    /// How long until `count` requests may go; takes them if that is at most `patience`. More
    /// than the burst never go at once.
    fn take(&mut self, rate: Rate, count: f64, now: Instant, patience: Duration) -> Duration {
        let full_at = self.full_at.map_or(now, |at| at.max(now));
        let after = full_at + seconds(count / rate.per_second);
        let room = seconds(rate.burst / rate.per_second);
        let wait = after.saturating_duration_since(now + room);
        if wait <= patience {
            self.full_at = Some(after);
        }
        wait
    }

    fn give_back(&mut self, rate: Rate, count: f64) {
        let unused = seconds(count / rate.per_second);
        self.full_at = self.full_at.and_then(|at| at.checked_sub(unused));
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_secs(3600))
}

#[derive(Debug)]
struct Party {
    share: Share,
    bucket: Bucket,
    /// Turns in work.
    running: usize,
    /// Connections that wait for one, some of them perhaps gone.
    waiting: VecDeque<u64>,
    active_at: Instant,
    waits: u64,
    refusals: u64,
}

impl Party {
    fn new(share: Share, now: Instant) -> Self {
        Self {
            share,
            bucket: Bucket::default(),
            running: 0,
            waiting: VecDeque::new(),
            active_at: now,
            waits: 0,
            refusals: 0,
        }
    }

    fn is_active(&self, now: Instant) -> bool {
        self.running > 0
            || !self.waiting.is_empty()
            || now.saturating_duration_since(self.active_at) < IDLE
    }
}

/// What a connection keeps of its own turns. Only its own task uses it.
#[derive(Debug)]
pub(super) struct Seat {
    connection: u64,
    /// Whether the next message is to be refused for its rate.
    refusing: AtomicBool,
    /// Messages that were taken from the bucket for the next turn.
    taken: AtomicUsize,
    /// Whether it has a turn, or waits for one.
    has_turn: AtomicBool,
    /// The wait for the bucket.
    pause: Mutex<Option<Pin<Box<Sleep>>>>,
}

impl Seat {
    /// That of a connection, by its number.
    #[must_use]
    pub(super) fn new(connection: u64) -> Self {
        Self {
            connection,
            refusing: AtomicBool::new(false),
            taken: AtomicUsize::new(0),
            has_turn: AtomicBool::new(false),
            pause: Mutex::default(),
        }
    }

    /// Whether it has a turn, or waits for one.
    pub(super) fn has_turn(&self) -> bool {
        self.has_turn.load(Ordering::Relaxed)
    }

    /// Whether the message at hand is to be refused, because its tenant is over its rate.
    #[must_use]
    pub(super) fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
    }
}

/// A connection that has a turn, or waits for one.
#[derive(Debug)]
struct Place {
    /// The tenant that it counts for.
    realm: Realm,
    is_working: bool,
    waker: Option<Waker>,
}

/// What one tenant's connections went through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareUse {
    /// Whose.
    pub realm: Realm,
    /// Turns that had to wait, for others or for the rate.
    pub waits: u64,
    /// Requests refused because of the rate.
    pub refusals: u64,
}

impl ShareUse {
    /// The tenant as metrics name it.
    #[must_use]
    pub fn tenant(&self) -> &str {
        self.realm.shown()
    }
}

#[derive(Debug, Default)]
struct Table {
    parties: HashMap<Realm, Party>,
    places: HashMap<u64, Place>,
}

/// The turns of all connections.
#[derive(Debug)]
pub(super) struct Shares {
    table: Mutex<Table>,
    /// Turns at once.
    turns: usize,
}

impl Shares {
    /// As many turns at once as there are threads to take them.
    #[must_use]
    pub(super) fn new(turns: usize) -> Self {
        Self {
            table: Mutex::default(),
            turns: turns.max(1),
        }
    }

    /// Begins a turn: ready with the number of messages that it may have.
    pub(super) fn poll_turn(
        &self,
        seat: &Seat,
        realm: &Realm,
        share: Share,
        cx: &mut Context<'_>,
    ) -> Poll<usize> {
        let mut pause = seat.pause.lock();
        if let Some(waiting) = pause.as_mut() {
            if waiting.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            *pause = None;
            if seat.taken.load(Ordering::Relaxed) == 0 {
                // It has waited for as long as anybody should, and there is still no room.
                seat.refusing.store(true, Ordering::Relaxed);
            }
        } else if let Some(rate) = share.rate
            && seat.taken.load(Ordering::Relaxed) == 0
            && !seat.is_refusing()
            && let Some(wait) = self.take(seat, realm, share, rate)
        {
            let sleep = pause.insert(Box::pin(tokio::time::sleep(wait)));
            if sleep.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
        drop(pause);
        let messages = match (seat.is_refusing(), seat.taken.load(Ordering::Relaxed)) {
            (true, _) => 1,
            (false, 0) => MESSAGES,
            (false, taken) => taken,
        };
        self.poll_place(seat, realm, share, cx).map(|()| messages)
    }

    /// Takes messages from the tenant's bucket; how long to wait before the turn, if at all.
    fn take(&self, seat: &Seat, realm: &Realm, share: Share, rate: Rate) -> Option<Duration> {
        let now = Instant::now();
        let mut table = self.table.lock();
        let party = table.party(realm, share, now);
        if party
            .bucket
            .take(rate, MESSAGES as f64, now, Duration::ZERO)
            .is_zero()
        {
            seat.taken.store(MESSAGES, Ordering::Relaxed);
            return None;
        }
        let wait = party.bucket.take(rate, 1.0, now, PATIENCE);
        if wait <= PATIENCE {
            seat.taken.store(1, Ordering::Relaxed);
        } else {
            party.refusals += 1;
        }
        if wait.is_zero() {
            return None;
        }
        party.waits += 1;
        Some(wait.min(PATIENCE))
    }

    /// Ready once the connection has one of its tenant's turns.
    fn poll_place(
        &self,
        seat: &Seat,
        realm: &Realm,
        share: Share,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let now = Instant::now();
        let mut table = self.table.lock();
        if let Some(place) = table.places.get_mut(&seat.connection) {
            if place.is_working {
                return Poll::Ready(());
            }
            place.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        table.party(realm, share, now);
        let limit = self.limit(&table.parties, realm, now);
        let party = table.party(realm, share, now);
        let is_working = party.running < limit && party.waiting.is_empty();
        if is_working {
            party.running += 1;
        } else {
            party.waits += 1;
            party.waiting.push_back(seat.connection);
        }
        let place = Place {
            realm: realm.clone(),
            is_working,
            waker: (!is_working).then(|| cx.waker().clone()),
        };
        table.places.insert(seat.connection, place);
        seat.has_turn.store(true, Ordering::Relaxed);
        match is_working {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// Ends a turn in which so many messages came.
    pub(super) fn turn_over(&self, seat: &Seat, messages: usize, share: Share) {
        if messages > 0 {
            seat.refusing.store(false, Ordering::Relaxed);
        }
        let unused = seat
            .taken
            .swap(0, Ordering::Relaxed)
            .saturating_sub(messages);
        self.leave(seat, unused, share.rate);
    }

    /// Frees what a connection that has ended holds.
    pub(super) fn ended(&self, seat: &Seat) {
        self.leave(seat, 0, None);
    }

    /// Gives up a turn or the place in the line, and lets those go on who waited for it.
    fn leave(&self, seat: &Seat, unused: usize, rate: Option<Rate>) {
        seat.has_turn.store(false, Ordering::Relaxed);
        let now = Instant::now();
        let mut wakers = Vec::new();
        {
            let mut table = self.table.lock();
            let Some(place) = table.places.remove(&seat.connection) else {
                return;
            };
            let Table { parties, places } = &mut *table;
            let limit = self.limit(parties, &place.realm, now);
            let Some(party) = parties.get_mut(&place.realm) else {
                return;
            };
            if let Some(rate) = rate.filter(|_| unused > 0) {
                party.bucket.give_back(rate, unused as f64);
            }
            if place.is_working {
                party.running -= 1;
            } else {
                party.waiting.retain(|&other| other != seat.connection);
            }
            while party.running < limit
                && let Some(next) = party.waiting.pop_front()
            {
                if let Some(next) = places.get_mut(&next) {
                    next.is_working = true;
                    party.running += 1;
                    wakers.extend(next.waker.take());
                }
            }
        }
        for waker in wakers {
            waker.wake();
        }
    }

    /// Turns that a tenant may have at once now.
    fn limit(&self, parties: &HashMap<Realm, Party>, realm: &Realm, now: Instant) -> usize {
        let mut weights = 0_u64;
        let mut own = 0_u64;
        let mut others = false;
        for (other, party) in parties {
            if other == realm {
                own = u64::from(party.share.weight);
                weights += own;
            } else if party.is_active(now) {
                weights += u64::from(party.share.weight);
                others = true;
            }
        }
        if !others {
            return self.turns;
        }
        // At most the number of turns, so it fits.
        ((self.turns as u64 * own / weights.max(1)) as usize).max(1)
    }

    /// Forgets tenants that are gone and have nothing in work.
    pub(super) fn retain(&self, keep: impl Fn(&Realm) -> bool) {
        let parties = &mut self.table.lock().parties;
        parties
            .retain(|realm, party| keep(realm) || party.running > 0 || !party.waiting.is_empty());
    }

    /// What each tenant went through since the start.
    #[must_use]
    pub(super) fn usage(&self) -> Vec<ShareUse> {
        let table = self.table.lock();
        let usage = table.parties.iter().map(|(realm, party)| ShareUse {
            realm: realm.clone(),
            waits: party.waits,
            refusals: party.refusals,
        });
        usage.collect()
    }
}

impl Table {
    fn party(&mut self, realm: &Realm, share: Share, now: Instant) -> &mut Party {
        let party = self
            .parties
            .entry(realm.clone())
            .or_insert_with(|| Party::new(share, now));
        party.share = share;
        party.active_at = now;
        party
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn realm(name: &str) -> Realm {
        Realm(Arc::from(name))
    }

    fn share(weight: u32) -> Share {
        Share {
            weight,
            ..Share::default()
        }
    }

    fn begins(shares: &Shares, seat: &Seat, name: &str, share: Share) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        shares
            .poll_turn(seat, &realm(name), share, &mut cx)
            .is_ready()
    }

    #[test]
    fn alone_a_tenant_has_every_turn_and_beside_another_its_part() {
        let shares = Shares::new(4);
        let seats: Vec<Seat> = (0..10).map(Seat::new).collect();
        let working = seats[..6]
            .iter()
            .filter(|seat| begins(&shares, seat, "flood", share(1)))
            .count();
        assert_eq!(working, 4, "all turns, while nobody else wants any");
        // The other one is let in at once, and the flood loses turns as they end.
        assert!(begins(&shares, &seats[9], "other", share(1)));
        for seat in &seats[..4] {
            shares.turn_over(seat, 1, share(1));
        }
        let flood = shares.table.lock().parties[&realm("flood")].running;
        assert_eq!(flood, 2, "half of four");
        // Those that were let in find their turn, the others wait in line.
        let working = seats[4..6]
            .iter()
            .filter(|seat| begins(&shares, seat, "flood", share(1)))
            .count();
        assert_eq!(working, 2);
        assert!(!begins(&shares, &seats[0], "flood", share(1)));
    }

    #[test]
    fn a_connection_that_ends_leaves_neither_a_turn_nor_a_place_in_the_line() {
        let shares = Shares::new(1);
        let [a, b, c] = [1, 2, 3].map(Seat::new);
        assert!(begins(&shares, &a, "t", share(1)));
        assert!(!begins(&shares, &b, "t", share(1)));
        assert!(!begins(&shares, &c, "t", share(1)));
        shares.ended(&b);
        shares.ended(&a);
        assert!(begins(&shares, &c, "t", share(1)), "it was next");
        shares.ended(&c);
        let table = shares.table.lock();
        assert!(table.places.is_empty());
        assert_eq!(table.parties[&realm("t")].running, 0);
    }

    proptest! {
        /// Over any time, a bucket lets through at most its burst and its rate times that time.
        #[test]
        fn a_bucket_keeps_its_rate(
            per_second in 1.0..1000.0_f64,
            burst in 1.0..100.0_f64,
            gaps in prop::collection::vec(0..200_u64, 1..200),
        ) {
            let rate = Rate { per_second, burst };
            let mut bucket = Bucket::default();
            let start = Instant::now();
            let mut now = start;
            let mut passed = 0.0;
            for gap in gaps {
                now += Duration::from_millis(gap);
                if bucket.take(rate, 1.0, now, Duration::ZERO).is_zero() {
                    passed += 1.0;
                }
            }
            let time = (now - start).as_secs_f64();
            prop_assert!(passed <= burst + per_second * time + 1e-3, "{passed} in {time}");
        }
    }

    #[tokio::test]
    async fn over_its_rate_a_tenant_waits_and_is_then_refused() {
        let limited = Share {
            rate: Some(Rate {
                per_second: 0.1,
                burst: 2.0,
            }),
            ..Share::default()
        };
        let shares = Shares::new(8);
        let name = realm("t");
        let mut refused = 0;
        let mut served = 0;
        let seats: Vec<Seat> = (0..6).map(Seat::new).collect();
        let begun = tokio::time::Instant::now();
        let turns = seats.iter().map(|seat| {
            let turn = std::future::poll_fn(|cx| shares.poll_turn(seat, &name, limited, cx));
            async move {
                let messages = turn.await;
                (messages, seat.is_refusing(), begun.elapsed())
            }
        });
        for (messages, is_refusing, waited) in futures_util::future::join_all(turns).await {
            assert_eq!(messages, 1);
            match is_refusing {
                true => {
                    assert!(waited >= PATIENCE, "refused after {waited:?}");
                    refused += 1;
                }
                false => served += 1,
            }
        }
        // Two at once; the next one would wait for ten seconds.
        assert_eq!((served, refused), (2, 4));
    }
}
