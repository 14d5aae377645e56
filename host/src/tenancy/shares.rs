//! Who of several tenants works next: turns of connections, and how many requests a second.
//!
//! A connection works in turns: it reads, handles and writes for a bounded number of messages
//! and bytes and then lets others go first. There are as many turns at once as the runtime has
//! threads, and one line for all of them: a turn that is free goes to the tenant that got the
//! least per unit of its weight, by what its turns cost. So one tenant's flood waits behind
//! itself, and another's request for one turn at the most. Mostly not even for that: while a
//! tenant was there a moment ago, the others leave one thread free for when it comes back.
//! Alone, a tenant has all of them.
//!
//! The kernel has its own line before each core, and lets whoever runs there run on for a while, so
//! that a thread with another tenant's request would stand behind one with a flood's. So a tenant
//! that presses, beside another that got less of late, takes its turns in the transport's
//! [yielding lane](Lane::Yielding), whose threads give their core up at once; there is one fewer of
//! them, and while each has a turn, who does not press goes first. Among equals that would only
//! cost time.
//!
//! A tenant with a rate has a bucket besides. Over it, its connections are left unread (which the
//! clients' own buffers feel), and only what has waited for [`PATIENCE`] is refused.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{
        MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_transport::{Lane, Turn, wake_after_sockets};
use tokio::time::Sleep;

use super::{Realm, giving_way::offer};

/// A turn where tenants share. A small request takes tens of microseconds, so this is how long
/// another tenant's request waits for a thread at the most.
const TURN: Turn = Turn {
    messages: 4,
    bytes: 8 << 10,
    in_flight_bytes: usize::MAX,
    lane: Lane::Main,
};
/// What a message costs beside its bytes, in bytes that take about as long to work on.
const MESSAGE_COST: u64 = 2 << 10;
/// By how much a tenant that comes from a rest goes before those that always want more, in cost:
/// two turns. It pays for what it takes all the same, so that it gains time and no part.
const HEAD_START: u64 = 2 * (TURN.messages as u64 * MESSAGE_COST + TURN.bytes as u64);
/// A tenant that did nothing for this long is not waited for.
const IDLE: Duration = Duration::from_millis(100);
/// How often those over their rates are let in.
const LET_IN_EVERY: Duration = Duration::from_millis(10);
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

/// When a connection over its rate that may go on at `due` is let in: some at a time, as each time
/// takes a core from somebody. No rate suffers, for what comes meanwhile is less than the burst.
fn let_in_at(begun: Instant, due: Instant, rate: Rate) -> Instant {
    let grain = LET_IN_EVERY.min(seconds(rate.burst / 2.0 / rate.per_second));
    let behind = match grain.as_nanos() {
        0 => 0,
        grain => due.saturating_duration_since(begun).as_nanos() % grain,
    };
    match u64::try_from(behind) {
        Ok(behind) if behind > 0 => due + grain - Duration::from_nanos(behind),
        _ => due,
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_secs(3600))
}

/// What a turn cost, in bytes that take about as long. A turn without a message, in which replies
/// were written, costs as much as one.
fn cost(used: Turn) -> u64 {
    let messages = u64::try_from(used.messages.max(1)).unwrap_or(u64::MAX);
    let bytes = u64::try_from(used.bytes).unwrap_or(u64::MAX);
    messages.saturating_mul(MESSAGE_COST).saturating_add(bytes)
}

/// What a tenant got, per unit of its weight: the number that decides who is next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Pass(u128);

impl Pass {
    /// Half of the number is a fraction, so that no cost vanishes over a large weight.
    fn of(cost: u64, weight: u32) -> Self {
        Self((u128::from(cost) << 64) / u128::from(weight.max(1)))
    }

    fn add(&mut self, cost: u64, weight: u32) {
        self.0 = self.0.saturating_add(Self::of(cost, weight).0);
    }

    fn before(self, head_start: Self) -> Self {
        Self(self.0.saturating_sub(head_start.0))
    }
}

#[derive(Debug)]
struct Party {
    share: Share,
    bucket: Bucket,
    pass: Pass,
    /// Whether it comes from a rest and not from a turn.
    is_back: bool,
    /// The number of its last turn, by which the longest waiting one of equals is next.
    last_turn: u64,
    /// Turns in work.
    running: usize,
    /// When it last had to wait for its rate.
    over_rate_at: Option<Instant>,
    /// When it was last in somebody's way.
    in_the_way_at: Option<Instant>,
    /// Connections that wait for one.
    waiting: VecDeque<u64>,
    active_at: Instant,
    /// When it last wanted another turn while it had one.
    pressed_at: Option<Instant>,
    recent: Recent,
    waits: u64,
    refusals: u64,
}

/// What was had of late; it halves within the time that a tenant is waited for, and at no moment by
/// much, or equals would seem to differ.
#[derive(Debug, Clone, Copy)]
struct Recent {
    cost: f64,
    as_of: Instant,
}

impl Recent {
    fn at(self, now: Instant, idle: Duration) -> f64 {
        let age = now.saturating_duration_since(self.as_of);
        self.cost * (-age.div_duration_f64(idle)).exp2()
    }

    fn add(&mut self, cost: u64, now: Instant, idle: Duration) {
        self.cost = self.at(now, idle) + cost as f64;
        self.as_of = now;
    }
}

/// Whether something was a moment ago.
fn within(at: Option<Instant>, now: Instant, idle: Duration) -> bool {
    at.is_some_and(|at| now.saturating_duration_since(at) < idle)
}

impl Party {
    fn new(share: Share, now: Instant) -> Self {
        Self {
            share,
            bucket: Bucket::default(),
            pass: Pass::default(),
            is_back: false,
            last_turn: 0,
            running: 0,
            over_rate_at: None,
            in_the_way_at: None,
            waiting: VecDeque::new(),
            active_at: now,
            pressed_at: None,
            recent: Recent {
                cost: 0.0,
                as_of: now,
            },
            waits: 0,
            refusals: 0,
        }
    }

    /// What decides who is next: the least goes.
    fn rank(&self) -> (Pass, u64) {
        let head_start = match self.is_back {
            true => Pass::of(HEAD_START, self.share.weight),
            false => Pass::default(),
        };
        (self.pass.before(head_start), self.last_turn)
    }

    /// Whether it has, or waits for, a turn.
    fn is_present(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }

    /// Whether it wanted more than one turn at a time, a moment ago.
    fn is_pressing(&self, now: Instant, idle: Duration) -> bool {
        within(self.pressed_at, now, idle)
    }

    /// Where its turns are taken. What decides that can change from turn to turn, and a
    /// connection that changes its lane costs as much as some turns: it stays there for a while.
    fn lane(&self, now: Instant, idle: Duration) -> Lane {
        match within(self.in_the_way_at, now, idle) {
            true => Lane::Yielding,
            false => Lane::Main,
        }
    }

    /// Whether it takes what it wants and is in nobody's way.
    fn is_modest(&self, now: Instant, idle: Duration) -> bool {
        !self.is_pressing(now, idle) && self.lane(now, idle) == Lane::Main
    }

    /// What it got of late, per unit of its weight.
    fn recent(&self, now: Instant, idle: Duration) -> f64 {
        self.recent.at(now, idle) / f64::from(self.share.weight.max(1))
    }

    /// Whether it has no turn and wants none, but did a moment ago.
    fn is_thinking(&self, now: Instant, idle: Duration) -> bool {
        !self.is_present() && now.saturating_duration_since(self.active_at) < idle
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
    /// Where it takes the turn that it has.
    lane: Lane,
    /// Whether it is to let others go first that can be run, when its turn comes.
    steps_back: bool,
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
    /// Turns in work, of all tenants.
    running: usize,
    /// Those of them in the yielding lane.
    yielding: usize,
    /// The least pass of those that were there when the last turn began. Who comes back from a
    /// rest begins here at least, so that nobody saves up.
    virtual_time: Pass,
    /// Turns so far.
    turns: u64,
}

/// The turns of all connections.
#[derive(Debug)]
pub(super) struct Shares {
    /// Without `parking_lot`'s offer of the core while it waits, which takes tens of microseconds.
    table: std::sync::Mutex<Table>,
    begun: Instant,
    /// Turns at once.
    turns: usize,
    /// How long a tenant that does nothing is waited for.
    idle: Duration,
}

impl Shares {
    /// As many turns at once as there are threads to take them.
    #[must_use]
    pub(super) fn new(turns: usize) -> Self {
        Self {
            table: std::sync::Mutex::default(),
            begun: Instant::now(),
            turns: turns.max(1),
            idle: IDLE,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many other tenants want something now, or did a moment ago.
    pub(super) fn company(&self, realm: &Realm) -> usize {
        let table = self.table();
        table.company(realm, Instant::now(), self.idle).count()
    }

    /// Begins a turn: ready with what it may take.
    pub(super) fn poll_turn(
        &self,
        seat: &Seat,
        realm: &Realm,
        share: Share,
        cx: &mut Context<'_>,
    ) -> Poll<Turn> {
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
            let until = let_in_at(self.begun, Instant::now() + wait, rate);
            let sleep = pause.insert(Box::pin(tokio::time::sleep_until(until.into())));
            if sleep.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
        drop(pause);
        let messages = match (seat.is_refusing(), seat.taken.load(Ordering::Relaxed)) {
            (true, _) => 1,
            (false, 0) => TURN.messages,
            (false, taken) => taken,
        };
        let turn = Turn { messages, ..TURN };
        let lane = self.poll_place(seat, realm, share, cx);
        lane.map(|lane| Turn { lane, ..turn })
    }

    /// Takes messages from the tenant's bucket; how long to wait before the turn, if at all.
    fn take(&self, seat: &Seat, realm: &Realm, share: Share, rate: Rate) -> Option<Duration> {
        let now = Instant::now();
        let mut table = self.table();
        let party = table.party(realm, share, now);
        if party
            .bucket
            .take(rate, TURN.messages as f64, now, Duration::ZERO)
            .is_zero()
        {
            seat.taken.store(TURN.messages, Ordering::Relaxed);
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
        party.over_rate_at = Some(now);
        Some(wait.min(PATIENCE))
    }

    /// Ready once the connection has one of the turns.
    fn poll_place(
        &self,
        seat: &Seat,
        realm: &Realm,
        share: Share,
        cx: &mut Context<'_>,
    ) -> Poll<Lane> {
        let now = Instant::now();
        let mut wakers = Vec::new();
        let turn = {
            let mut table = self.table();
            if !table.places.contains_key(&seat.connection) {
                table.stand_in_line(seat.connection, realm, share, now);
                seat.has_turn.store(true, Ordering::Relaxed);
                self.dispatch(&mut table, now, &mut wakers);
            }
            let Table {
                parties, places, ..
            } = &mut *table;
            match places.get_mut(&seat.connection) {
                Some(place) if !place.is_working => {
                    let is_first_look = place.waker.replace(cx.waker().clone()).is_none();
                    if let Some(party) = parties.get_mut(&place.realm) {
                        party.waits += u64::from(is_first_look);
                    }
                    Poll::Pending
                }
                Some(place) if place.steps_back => {
                    place.steps_back = false;
                    // A task that wakes itself goes behind all others that can be run, and the
                    // others are those that the look at the sockets has just found.
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                place => Poll::Ready(place.map_or(Lane::Main, |place| place.lane)),
            }
        };
        for waker in &wakers {
            wake_after_sockets(waker);
        }
        turn
    }

    /// Ends a turn, of which this came. With `wants_more` the connection stands in line again,
    /// before it is decided who is next, or a tenant of few connections would always come last.
    pub(super) fn turn_over(&self, seat: &Seat, used: Turn, share: Share, wants_more: bool) {
        if used.messages > 0 {
            seat.refusing.store(false, Ordering::Relaxed);
        }
        let unused = seat
            .taken
            .swap(0, Ordering::Relaxed)
            .saturating_sub(used.messages);
        // A rate decides first whether there is a next turn.
        let stays = wants_more && share.rate.is_none();
        self.leave(seat, unused, cost(used), share, stays);
        if used.bytes >= TURN.bytes {
            // The next read of a large message may be as long, and who wakes meanwhile stands
            // behind it if this thread has waited for its like.
            offer();
        }
    }

    /// Frees what a connection that has ended holds.
    pub(super) fn ended(&self, seat: &Seat) {
        self.leave(seat, 0, 0, Share::default(), false);
    }

    /// Gives up a turn or the place in the line, and lets those go on who waited for it.
    fn leave(&self, seat: &Seat, unused: usize, cost: u64, share: Share, stays: bool) {
        let now = Instant::now();
        let mut wakers = Vec::new();
        {
            let mut table = self.table();
            seat.has_turn.store(false, Ordering::Relaxed);
            let Some(place) = table.places.remove(&seat.connection) else {
                return;
            };
            if place.is_working {
                table.running -= 1;
                table.yielding -= usize::from(place.lane == Lane::Yielding);
            }
            if let Some(party) = table.parties.get_mut(&place.realm) {
                if let Some(rate) = share.rate.filter(|_| unused > 0) {
                    party.bucket.give_back(rate, unused as f64);
                }
                if place.is_working {
                    party.running -= 1;
                    party.active_at = now;
                    let unpaid = cost.saturating_sub(MESSAGE_COST);
                    party.pass.add(unpaid, party.share.weight);
                    party.recent.add(cost, now, self.idle);
                    if stays || !party.waiting.is_empty() {
                        party.pressed_at = Some(now);
                    }
                } else {
                    party.waiting.retain(|&other| other != seat.connection);
                }
            }
            if stays && place.is_working {
                table.stand_in_line(seat.connection, &place.realm, share, now);
                if let Some(party) = table.parties.get_mut(&place.realm) {
                    party.is_back = false;
                }
                seat.has_turn.store(true, Ordering::Relaxed);
            }
            self.dispatch(&mut table, now, &mut wakers);
        }
        for waker in &wakers {
            wake_after_sockets(waker);
        }
    }

    /// Lets connections work while there are turns: next is that of the tenant with the least
    /// pass (start-time fair queuing over all threads).
    fn dispatch(&self, table: &mut Table, now: Instant, wakers: &mut Vec<Waker>) {
        while table.running < self.turns {
            // Floods have no more threads than that: of two that press the next one goes on, but
            // who does not press can use a turn that would only wait.
            let is_crowded = table.yielding >= self.turns.saturating_sub(1).max(1);
            let modest = is_crowded.then(|| table.next(|party| party.is_modest(now, self.idle)));
            let next = modest.flatten().or_else(|| table.next(|_| true));
            let Some(realm) = next else {
                return;
            };
            let parties = table.parties.values();
            let is_expected = parties.clone().any(|it| it.is_thinking(now, self.idle));
            // Whoever is about to come back finds a thread that listens.
            if is_expected && table.running > 0 && table.running + 1 >= self.turns {
                return;
            }
            let present = parties.filter(|party| party.is_present());
            let least = present.map(|party| party.pass).min().unwrap_or_default();
            table.virtual_time = table.virtual_time.max(least);
            let is_in_the_way = table.is_in_the_way(&realm, now, self.idle);
            let Some(party) = table.parties.get_mut(&realm) else {
                return;
            };
            let Some(connection) = party.waiting.pop_front() else {
                return;
            };
            if is_in_the_way {
                party.in_the_way_at = Some(now);
            }
            let lane = party.lane(now, self.idle);
            table.turns += 1;
            table.running += 1;
            table.yielding += usize::from(lane == Lane::Yielding);
            party.running += 1;
            party.last_turn = table.turns;
            party.pass.add(MESSAGE_COST, party.share.weight);
            if let Some(place) = table.places.get_mut(&connection) {
                place.is_working = true;
                place.lane = lane;
                // One that comes from a rest has been found by a look at the sockets itself.
                place.steps_back = !party.is_back;
                wakers.extend(place.waker.take());
            }
        }
    }

    /// Forgets tenants that are gone and have nothing in work.
    pub(super) fn retain(&self, keep: impl Fn(&Realm) -> bool) {
        let parties = &mut self.table().parties;
        parties.retain(|realm, party| keep(realm) || party.is_present());
    }

    /// What each tenant went through since the start.
    #[must_use]
    pub(super) fn usage(&self) -> Vec<ShareUse> {
        let table = self.table();
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

    /// The other tenants that want something now, or did a moment ago.
    fn company(&self, realm: &Realm, now: Instant, idle: Duration) -> impl Iterator<Item = &Party> {
        let others = self
            .parties
            .iter()
            .filter(move |(other, _)| *other != realm);
        let others = others.map(|(_, party)| party);
        others.filter(move |party| party.is_present() || party.is_thinking(now, idle))
    }

    /// Whose turn it is, of those that wait for one.
    fn next(&self, may_work: impl Fn(&Party) -> bool) -> Option<Realm> {
        let waiting = self.parties.iter().filter(|(_, party)| {
            let has_asked = !party.waiting.is_empty();
            has_asked && may_work(party)
        });
        let next = waiting.min_by_key(|(_, party)| party.rank());
        next.map(|(realm, _)| realm.clone())
    }

    /// Whether a tenant wants more than it gets, beside somebody who got much less of late, or got
    /// less and takes what it wants; over its rate, beside anybody.
    fn is_in_the_way(&self, realm: &Realm, now: Instant, idle: Duration) -> bool {
        let Some(party) = self.parties.get(realm) else {
            return false;
        };
        let recent = party.recent(now, idle);
        let is_over_rate = within(party.over_rate_at, now, idle);
        let mut company = self.company(realm, now, idle);
        match is_over_rate || party.is_pressing(now, idle) {
            true => company.any(|other| {
                let its = other.recent(now, idle);
                let is_modest = its < recent && !other.is_pressing(now, idle);
                is_over_rate || is_modest || its * 2.0 < recent
            }),
            false => false,
        }
    }

    /// The connection waits for a turn of its tenant.
    fn stand_in_line(&mut self, connection: u64, realm: &Realm, share: Share, now: Instant) {
        let virtual_time = self.virtual_time;
        let party = self.party(realm, share, now);
        if !party.is_present() {
            party.pass = party.pass.max(virtual_time);
            party.is_back = true;
        }
        party.waiting.push_back(connection);
        let place = Place {
            realm: realm.clone(),
            is_working: false,
            lane: Lane::Main,
            steps_back: false,
            waker: None,
        };
        self.places.insert(connection, place);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
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

    /// Where the connection takes its turn, if it has one.
    fn lane(shares: &Shares, seat: &Seat, name: &str, share: Share) -> Option<Lane> {
        let mut cx = Context::from_waker(Waker::noop());
        // The second look is that of one which has stepped back.
        (0..2).find_map(
            |_| match shares.poll_turn(seat, &realm(name), share, &mut cx) {
                Poll::Ready(turn) => Some(turn.lane),
                Poll::Pending => None,
            },
        )
    }

    fn begins(shares: &Shares, seat: &Seat, name: &str, share: Share) -> bool {
        lane(shares, seat, name, share).is_some()
    }

    /// Times are nobody's business but a test's own.
    fn shares_of(turns: usize) -> Shares {
        Shares {
            idle: Duration::from_secs(60),
            ..Shares::new(turns)
        }
    }

    const NOTHING: Turn = Turn {
        messages: 0,
        bytes: 0,
        in_flight_bytes: 0,
        lane: Lane::Main,
    };

    #[test]
    fn alone_a_tenant_has_every_turn_and_beside_another_all_but_one() {
        let shares = shares_of(4);
        let seats: Vec<Seat> = (0..10).map(Seat::new).collect();
        let working = seats[..6]
            .iter()
            .filter(|seat| begins(&shares, seat, "flood", share(1)))
            .count();
        assert_eq!(working, 4, "all turns, while nobody else wants any");
        // The other one is next, though two of the flood came before.
        assert!(!begins(&shares, &seats[9], "other", share(1)));
        shares.turn_over(&seats[0], NOTHING, share(1), true);
        assert!(begins(&shares, &seats[9], "other", share(1)));
        shares.turn_over(&seats[9], NOTHING, share(1), false);
        // It is expected back: the flood gets what is free, but for one turn.
        let running = |name| shares.table().parties[&realm(name)].running;
        assert_eq!(running("flood"), 3);
        shares.turn_over(&seats[1], NOTHING, share(1), true);
        assert_eq!(running("flood"), 3);
        assert!(begins(&shares, &seats[9], "other", share(1)), "at once");
        // It does not come back.
        shares.turn_over(&seats[9], NOTHING, share(1), false);
        let mut table = shares.table();
        let other = table.parties.get_mut(&realm("other")).unwrap();
        other.active_at = other.active_at.checked_sub(2 * shares.idle).unwrap();
        drop(table);
        shares.turn_over(&seats[2], NOTHING, share(1), true);
        assert_eq!(running("flood"), 4);
    }

    #[test]
    fn who_presses_and_got_more_yields_to_who_got_less() {
        let shares = shares_of(4);
        let [flood, other] = [1, 2].map(Seat::new);
        let used = Turn {
            messages: 4,
            ..NOTHING
        };
        // A connection that wants more is given its next turn when the one at hand is over.
        let turn = |seat, name, wants_more| {
            let lane = lane(&shares, seat, name, share(1));
            shares.turn_over(seat, used, share(1), wants_more);
            lane.unwrap()
        };
        let forget = || {
            let mut table = shares.table();
            let flood = table.parties.get_mut(&realm("flood")).unwrap();
            let at = flood.in_the_way_at.unwrap();
            flood.in_the_way_at = at.checked_sub(shares.idle);
        };
        for _ in 0..6 {
            assert_eq!(turn(&flood, "flood", true), Lane::Main, "alone");
        }
        assert_eq!(turn(&other, "other", false), Lane::Main);
        turn(&flood, "flood", true);
        assert_eq!(turn(&flood, "flood", true), Lane::Yielding);
        // Who waits for each answer is in nobody's way, however much it gets.
        for _ in 0..20 {
            assert_eq!(turn(&other, "other", false), Lane::Main);
        }
        turn(&flood, "flood", true);
        assert_eq!(turn(&flood, "flood", true), Lane::Yielding, "of late");
        forget();
        turn(&flood, "flood", true);
        assert_eq!(turn(&flood, "flood", true), Lane::Main, "now got less");
        let lanes = [(); 12].map(|()| turn(&flood, "flood", true));
        assert_eq!((lanes[0], lanes[11]), (Lane::Main, Lane::Yielding));
    }

    #[test]
    fn among_those_that_press_who_got_much_more_yields() {
        let shares = shares_of(4);
        let [a, b] = [1, 2].map(Seat::new);
        let used = Turn {
            messages: 4,
            ..NOTHING
        };
        let turn = |seat, name| {
            let lane = lane(&shares, seat, name, share(1));
            shares.turn_over(seat, used, share(1), true);
            lane.unwrap()
        };
        // Who comes later has had less, and never twice as much.
        for _ in 0..3 {
            assert_eq!(turn(&b, "b"), Lane::Main);
        }
        for _ in 0..3 {
            assert_eq!(turn(&a, "a"), Lane::Main);
        }
        for _ in 0..3 {
            assert_eq!(turn(&a, "a"), Lane::Main);
            assert_eq!(turn(&b, "b"), Lane::Main);
        }
        let lanes = [(); 12].map(|()| turn(&a, "a"));
        assert_eq!(lanes[..3], [Lane::Main; 3], "less than twice as much");
        assert_eq!(lanes[11], Lane::Yielding);
        assert_eq!(turn(&b, "b"), Lane::Main);
    }

    #[test]
    fn those_over_their_rates_are_let_in_some_at_a_time() {
        let begun = Instant::now();
        let rate = |per_second, burst| Rate { per_second, burst };
        let at = |micros, rate| {
            let due = begun + Duration::from_micros(micros);
            let at = let_in_at(begun, due, rate);
            u64::try_from((at - begun).as_micros()).unwrap()
        };
        let fast = rate(2000.0, 100.0);
        let times = [0, 1, 9_999, 10_000, 10_001].map(|due| at(due, fast));
        assert_eq!(times, [0, 10_000, 10_000, 10_000, 20_000]);
        // Two messages come in 2 ms.
        assert_eq!(at(1, rate(1000.0, 4.0)), 2_000);
        assert_eq!(at(17_001, rate(1.0, 1.0)), 20_000);
        assert_eq!(at(1, rate(f64::MAX, 1.0)), 1);
    }

    #[test]
    fn over_its_rate_a_tenant_yields_to_anybody() {
        let shares = shares_of(4);
        let [limited, other] = [1, 2].map(Seat::new);
        let rate = Rate {
            per_second: 2.0,
            burst: 1.0,
        };
        let limits = Share {
            rate: Some(rate),
            ..Share::default()
        };
        let one = Turn {
            messages: 1,
            ..NOTHING
        };
        assert_eq!(lane(&shares, &other, "other", share(1)), Some(Lane::Main));
        shares.turn_over(&other, TURN, share(1), false);
        let name = realm("limited");
        assert_eq!(shares.take(&limited, &name, limits, rate), None);
        assert_eq!(lane(&shares, &limited, "limited", limits), Some(Lane::Main));
        shares.turn_over(&limited, one, limits, true);
        // It got less than the other, and wants more than it may have.
        assert!(shares.take(&limited, &name, limits, rate).is_some());
        let next = lane(&shares, &limited, "limited", limits);
        assert_eq!(next, Some(Lane::Yielding));
    }

    #[test]
    fn floods_leave_a_turn_to_who_is_not_one_even_if_they_are_next() {
        let shares = shares_of(2);
        let floods = [1, 2].map(Seat::new);
        let quiet = Seat::new(3);
        let used = Turn {
            messages: 4,
            ..NOTHING
        };
        assert!(begins(&shares, &quiet, "quiet", share(1)));
        shares.turn_over(&quiet, NOTHING, share(1), false);
        assert!(begins(&shares, &floods[0], "flood", share(1)));
        assert!(!begins(&shares, &floods[1], "flood", share(1)));
        shares.turn_over(&floods[0], used, share(1), true);
        let next = floods
            .each_ref()
            .map(|seat| lane(&shares, seat, "flood", share(1)));
        assert_eq!(next, [None, Some(Lane::Yielding)]);
        let mut table = shares.table();
        table.parties.get_mut(&realm("quiet")).unwrap().pass = Pass(u128::MAX);
        drop(table);
        assert!(begins(&shares, &quiet, "quiet", share(1)));
        assert!(!begins(&shares, &floods[0], "flood", share(1)));
        for seat in [&quiet, &floods[0], &floods[1]] {
            shares.ended(seat);
        }
        let table = shares.table();
        assert_eq!((table.running, table.yielding), (0, 0));
    }

    #[test]
    fn what_was_had_of_late_is_forgotten() {
        let begun = Instant::now();
        let mut recent = Recent {
            cost: 0.0,
            as_of: begun,
        };
        recent.add(1000, begun, IDLE);
        recent.add(0, begun + IDLE / 2, IDLE);
        let at = |recent: Recent, passed| recent.at(begun + passed, IDLE).round();
        assert_eq!(at(recent, IDLE / 2), 707.0);
        assert_eq!(at(recent, IDLE), 500.0);
        recent.add(100, begun + IDLE, IDLE);
        assert_eq!(at(recent, 3 * IDLE), 150.0);
        assert_eq!(at(recent, 10_000 * IDLE), 0.0);
    }

    #[test]
    fn a_turn_that_nobody_takes_is_not_kept() {
        let shares = shares_of(1);
        let [a, b] = [1, 2].map(Seat::new);
        assert!(begins(&shares, &a, "t", share(1)));
        assert!(!begins(&shares, &b, "u", share(1)));
        shares.turn_over(&a, NOTHING, share(1), true);
        // It is b's, whose connection ends before it looks.
        assert!(!begins(&shares, &a, "t", share(1)));
        shares.turn_over(&b, NOTHING, share(1), false);
        assert!(begins(&shares, &a, "t", share(1)));
    }

    /// Tenants that always want more, on a clock of their own: the turn that ends first is the
    /// one that cost least so far. Nothing of it depends on the machine.
    struct Floods {
        shares: Shares,
        /// Name, weight and connections of each.
        tenants: Vec<(String, u32, Vec<Seat>)>,
        /// What each was served.
        served: Vec<u64>,
        /// When the turns at hand end: time, tenant, connection, and what they take.
        ends: Vec<(u64, usize, usize, Turn)>,
        now: u64,
    }

    impl Floods {
        fn new(turns: usize, tenants: &[(u32, usize)]) -> Self {
            let mut numbers = 0..;
            let tenants = tenants
                .iter()
                .enumerate()
                .map(|(at, &(weight, connections))| {
                    let seats = numbers.by_ref().take(connections).map(Seat::new).collect();
                    (format!("t{at}"), weight, seats)
                });
            let tenants: Vec<_> = tenants.collect();
            Self {
                shares: shares_of(turns),
                served: vec![0; tenants.len()],
                tenants,
                ends: Vec::new(),
                now: 0,
            }
        }

        /// All that may work and do not yet begin a turn that takes what `next` says.
        fn begin(&mut self, next: &mut impl FnMut(usize) -> Turn) {
            for (at, (name, weight, seats)) in self.tenants.iter().enumerate() {
                for (number, seat) in seats.iter().enumerate() {
                    let is_at_work = self.ends.iter().any(|end| (end.1, end.2) == (at, number));
                    if !is_at_work && begins(&self.shares, seat, name, share(*weight)) {
                        let used = next(at);
                        self.ends.push((self.now + cost(used), at, number, used));
                    }
                }
            }
        }

        fn step(&mut self, next: &mut impl FnMut(usize) -> Turn) {
            self.begin(next);
            assert!(
                self.ends.len() <= self.shares.turns,
                "more turns than there are"
            );
            let first = (0..self.ends.len())
                .min_by_key(|&at| self.ends[at].0)
                .unwrap();
            let (time, at, number, used) = self.ends.swap_remove(first);
            self.now = time;
            self.served[at] += cost(used);
            let (_, weight, seats) = &self.tenants[at];
            self.shares
                .turn_over(&seats[number], used, share(*weight), true);
        }
    }

    #[test]
    fn on_two_threads_a_weight_of_three_gets_three_times_as_much() {
        // Its turns are cheap and the others' dear, which must make no difference.
        let mut next = |tenant| match tenant {
            0 => Turn {
                messages: 1,
                bytes: 100,
                ..NOTHING
            },
            _ => TURN,
        };
        let mut floods = Floods::new(2, &[(3, 2), (1, 2), (1, 2), (1, 2)]);
        for _ in 0..20_000 {
            floods.step(&mut next);
        }
        let total: u64 = floods.served.iter().sum();
        let parts = floods.served.iter().map(|&it| it as f64 / total as f64);
        for (part, due) in parts.zip([0.5, 1.0 / 6.0, 1.0 / 6.0, 1.0 / 6.0]) {
            assert!((part - due).abs() < 0.005, "{:?}", floods.served);
        }
    }

    #[test]
    fn a_connection_that_ends_leaves_neither_a_turn_nor_a_place_in_the_line() {
        let shares = shares_of(1);
        let [a, b, c] = [1, 2, 3].map(Seat::new);
        assert!(begins(&shares, &a, "t", share(1)));
        assert!(!begins(&shares, &b, "t", share(1)));
        assert!(!begins(&shares, &c, "t", share(1)));
        shares.ended(&b);
        shares.ended(&a);
        assert!(begins(&shares, &c, "t", share(1)), "it was next");
        shares.ended(&c);
        let table = shares.table();
        assert!(table.places.is_empty());
        assert_eq!((table.parties[&realm("t")].running, table.running), (0, 0));
    }

    proptest! {
        /// Of tenants that always want more, whatever their turns cost, none is ahead of another
        /// by more than the turns at hand, per unit of weight. Each has as many connections as
        /// there are turns, since one with fewer cannot use more.
        #[test]
        fn what_tenants_get_is_by_weight(
            turns in 1..5_usize,
            weights in prop::collection::vec(1..10_u32, 2..6),
            costs in prop::collection::vec((0..20_usize, 0..100_000_usize), 1..50),
        ) {
            let tenants: Vec<_> = weights.iter().map(|&weight| (weight, turns)).collect();
            let mut floods = Floods::new(turns, &tenants);
            let mut costs_of = costs.iter().cycle();
            let mut next = |_| {
                let &(messages, bytes) = costs_of.next().unwrap_or(&(1, 0));
                Turn { messages, bytes, ..NOTHING }
            };
            let most = costs.iter().map(|&(messages, bytes)| cost(Turn { messages, bytes, ..NOTHING })).max();
            let slack = (turns as u64 + 1) * most.unwrap_or(0);
            for _ in 0..500 {
                floods.step(&mut next);
                for (a, b) in (0..weights.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                    let per_weight = |at: usize| floods.served[at] as f64 / f64::from(weights[at]);
                    let bound = |at: usize| slack as f64 / f64::from(weights[at]);
                    let ahead = (per_weight(a) - per_weight(b)).abs();
                    prop_assert!(ahead <= bound(a) + bound(b), "{:?} by {weights:?}", floods.served);
                }
            }
        }

        /// Whatever floods: who takes less than its part waits for the end of one turn at most,
        /// and not at all if it was there a moment ago and there are two threads.
        #[test]
        fn a_flood_costs_another_one_turn_at_most(
            turns in 1..5_usize,
            floods in prop::collection::vec((1..10_u32, 1..6_usize), 1..5),
            steps in 1..200_usize,
        ) {
            let mut floods = Floods::new(turns, &floods);
            // Of at most 46 in all, for turns that cost a sixteenth of the others'.
            let quiets = share(10);
            let quiet = Seat::new(1 << 32);
            let mut next = |_| TURN;
            // Those that come for the first time have come first.
            while floods.served.contains(&0) {
                floods.step(&mut next);
            }
            for _ in 0..steps {
                floods.step(&mut next);
                floods.begin(&mut next);
                if !begins(&floods.shares, &quiet, "quiet", quiets) {
                    floods.step(&mut next);
                    let is_next = begins(&floods.shares, &quiet, "quiet", quiets);
                    prop_assert!(is_next, "{:#?}", floods.shares.table());
                }
                floods.shares.turn_over(&quiet, NOTHING, quiets, false);
                if turns > 1 {
                    // Thinks for one turn of the others, and finds a free one.
                    floods.step(&mut next);
                    floods.begin(&mut next);
                    prop_assert!(begins(&floods.shares, &quiet, "quiet", quiets));
                    floods.shares.turn_over(&quiet, NOTHING, quiets, false);
                }
            }
        }

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
                let turn = turn.await;
                (turn.messages, seat.is_refusing(), begun.elapsed())
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
